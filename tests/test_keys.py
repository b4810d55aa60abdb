"""keys.py and quotas.py: what stands in a configuration, what a key has used up, and `portway key`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

from portway import config, keys
from portway.answers import Facts, Found
from portway.call import Call, Served, Tally
from portway.cli import main
from portway.commands import keys as command
from portway.config import Config, ConfigError, ConfigWatcher
from portway.errors import ClientError
from portway.keys import Key
from portway.quotas import Quotas, spent

MODELS = """
[backends.b]
kind = "ollama"
url = "http://127.0.0.1:1"
[models.fast]
backend = "b"
model = "x"
aliases = ["gpt"]
[models.slow]
backend = "b"
model = "y"
"""
HASHED = f"sha256:{hashlib.sha256(b'sk-1').hexdigest()}"


def parsed(api_keys: str, environ: dict[str, str] | None = None) -> tuple[Key, ...]:
    """The keys of a configuration with `server.api_keys` as given."""
    return config.parse(f"[server]\napi_keys = {api_keys}\n{MODELS}", "m.toml", environ or {}).server.api_keys


def mistakes(api_keys: str) -> list[tuple[str, str]]:
    try:
        parsed(api_keys)
    except ConfigError as exc:
        return [(mistake.key, mistake.problem) for mistake in exc.mistakes]
    return []


class ConfiguredTest(unittest.TestCase):
    def test_a_plain_key_a_variable_and_a_hash(self):
        """All three are the same key; only the first two are known to this machine's own commands."""
        tables = ('[{ key = "sk-1" }]', f'[{{ key = "{HASHED}" }}]')
        for text in ('["sk-1"]', '["env:K"]', f'["{HASHED}"]', '["env:H"]', *tables):
            with self.subTest(text):
                (key,) = parsed(text, {"K": "sk-1", "H": HASHED})
                self.assertEqual(keys.digest_of("sk-1"), key.digest)
                self.assertEqual(("", (), None, None), (key.name, key.models, key.rpm, key.tpm))
                self.assertEqual("" if "sha256" in text or "env:H" in text else "sk-1", key.secret)

    def test_a_table_that_says_more(self):
        """A name, models by name or alias, rates."""
        (key,) = parsed('[{ key = "sk-1", name = "ed", models = ["gpt", "fast", "slow"], rpm = 5, tpm = 600 }]')
        self.assertEqual(("ed", ("fast", "slow"), 5, 600), (key.name, key.models, key.rpm, key.tpm))

    def test_no_key_in_a_repr(self):
        """What is printed of a configuration in a trace holds no key."""
        self.assertNotIn("sk-1", repr(parsed('["sk-1"]')))

    def test_mistakes(self):
        """Each is told under its own key, and none shows the key itself."""
        for text, where in (
            ('["sk-1", "sk-1"]', "server.api_keys[1]"),
            (f'["sk-1", {{ key = "{HASHED}" }}]', "server.api_keys[1]"),
            ('["sha256:abc"]', "server.api_keys[0]"),
            (f'["{HASHED.upper()}"]', ""),  # no hash, but a key that nobody guesses: SHA256:..
            (f'["sha256:{"A" * 64}"]', "server.api_keys[0]"),
            ('[{ name = "x" }]', "server.api_keys[0].key"),
            ('[{ key = "" }]', "server.api_keys[0].key"),
            ('[{ key = "a b" }]', "server.api_keys[0].key"),
            ('[{ key = "k", models = [] }]', "server.api_keys[0].models"),
            ('[{ key = "k", models = ["fasst"] }]', "server.api_keys[0].models[0]"),
            ('[{ key = "k", models = "fast" }]', "server.api_keys[0].models"),
            ('[{ key = "k", rpm = 0 }]', "server.api_keys[0].rpm"),
            ('[{ key = "k", tpm = true }]', "server.api_keys[0].tpm"),
            ('[{ key = "k", name = "a\\nb" }]', "server.api_keys[0].name"),
            ('[{ key = "k", name = "a" }, { key = "l", name = "a" }]', "server.api_keys[1].name"),
            ('[{ key = "k", role = "admin" }]', "server.api_keys[0].role"),
        ):
            with self.subTest(text):
                found = mistakes(text)
                self.assertEqual([where] if where else [], [key for key, _ in found])
                self.assertNotIn("sk-1", str(found))

    def test_a_bad_key_is_not_left_out(self):
        """A list whose only key is no good is a mistake, never a server without keys."""
        self.assertTrue(mistakes('[{ key = "env:UNSET" }]'))
        with self.assertRaises(ConfigError):
            parsed('[{ key = "env:EMPTY" }]', {"EMPTY": ""})

    @unittest.skipUnless(os.name == "posix", "file modes")
    def test_only_a_key_itself_is_a_secret(self):
        """A file that others may read is warned of if it holds a key, not if it holds a hash or a variable's name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "m.toml")
            for text, warned in ((f'["{HASHED}", "env:K"]', False), ('[{ key = "sk-2" }]', True)):
                path.write_text(f"[server]\napi_keys = {text}\n{MODELS}")
                path.chmod(0o644)
                self.assertEqual(warned, bool(config.load(str(path), {"K": "v"}).warnings))


class QuotaTest(unittest.TestCase):
    def setUp(self):
        self.now = 1000.5
        self.quotas = Quotas(lambda: self.now)

    def refused(self, key: Key) -> ClientError:
        with self.assertRaises(ClientError) as caught:
            self.quotas.admit(key)
        error = caught.exception
        self.assertEqual((429, "rate_limit_error", "rate_limit_exceeded"), (error.status, error.type, error.code))
        return error

    def test_requests(self):
        """No more than rpm in any minute; Retry-After is when the next one is let in, and not before."""
        key = Key(b"1", rpm=3)
        for _ in range(3):
            self.quotas.admit(key)
            self.now += 10
        error = self.refused(key)
        self.assertIn("3 requests", error.message)
        wait = int(error.headers["Retry-After"])
        self.now += wait - 1.5
        self.refused(key)
        self.now += 1.5
        self.quotas.admit(key)
        self.refused(key)

    def test_any_minute(self):
        """However requests are spread, no window of 60 seconds holds more than rpm of them."""
        key = Key(b"1", rpm=5)
        admitted = []
        for _ in range(2000):
            self.now += 0.37
            try:
                self.quotas.admit(key)
                admitted.append(self.now)
            except ClientError:
                pass
        self.assertGreater(len(admitted), 50)
        self.assertTrue(all(b - a >= 60 for a, b in zip(admitted, admitted[5:], strict=False)))

    def test_tokens(self):
        """Those of the last minute's answers count; a request is refused once they are used up."""
        key = Key(b"1", tpm=100)
        self.quotas.admit(key)
        self.quotas.spend(key, 60)
        self.now += 30
        self.quotas.admit(key)
        self.quotas.spend(key, 60)
        error = self.refused(key)
        self.assertIn("100 tokens", error.message)
        self.now += int(error.headers["Retry-After"])
        self.quotas.admit(key)

    def test_a_refused_request_does_not_count(self):
        """Who asks on and on is not kept out for ever."""
        key = Key(b"1", rpm=1)
        self.quotas.admit(key)
        for _ in range(100):
            self.now += 1
            with contextlib.suppress(ClientError):
                self.quotas.admit(key)
                break
        self.assertLess(self.now, 1000.5 + 63)

    def test_keys_have_nothing_in_common(self):
        """One key's use is no other's, and a key without limits has none."""
        one, two = Key(b"1", rpm=1), Key(b"2", rpm=1)
        self.quotas.admit(one)
        self.quotas.admit(two)
        self.refused(one)
        for _ in range(10_000):
            self.quotas.admit(Key(b"3"))
            self.quotas.spend(Key(b"3"), 10**9)

    def test_a_reload_resets_nothing(self):
        """A key that stays has used what it has used, also under another limit; one that comes back begins anew."""
        self.quotas.admit(Key(b"1", rpm=2))
        self.quotas.admit(Key(b"1", rpm=2))
        self.quotas.adopt([Key(b"1", rpm=1)])
        self.refused(Key(b"1", rpm=1))
        self.quotas.adopt([])
        self.quotas.admit(Key(b"1", rpm=1))

    def test_its_size_is_bounded(self):
        """A minute of a million requests is 62 numbers at most."""
        key = Key(b"1", rpm=10**9, tpm=10**9)
        for _ in range(20_000):
            self.now += 0.01
            self.quotas.admit(key)
            self.quotas.spend(key, 1)
        used = self.quotas._used[b"1"]
        self.assertLess(max(len(used.requests._amounts), len(used.tokens._amounts)), 63)

    def test_many_threads(self):
        """Exactly rpm of them get in."""
        key = Key(b"1", rpm=50)
        admitted: list[int] = []

        def work() -> None:
            for _ in range(20):
                with contextlib.suppress(ClientError):
                    self.quotas.admit(key)
                    admitted.append(1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(50, len(admitted))


class SpentTest(unittest.TestCase):
    def found(self, tally: Tally | None, endpoint: str = "chat") -> int:
        model = config.parse(MODELS, "m.toml", {}).models["fast"]
        body = {"model": "fast", "messages": [{"role": "user", "content": "x" * 400}]}
        call = Call(endpoint, body, b"x" * 800, model, False, False, "id", 0)  # type: ignore[arg-type]
        answer = mock.Mock(tally=tally)
        served = Served(model, answer, []) if tally else None
        return spent(Found(call, Facts("fast", "MISS"), served=served, document=b"{}"))

    def test_what_an_answer_cost(self):
        """The backend's count; by characters what it did not count; nothing out of the cache."""
        self.assertEqual(12, self.found(Tally(prompt_tokens=5, completion_tokens=7)))
        self.assertEqual(100 + 25, self.found(Tally(content_chars=60, reasoning_chars=40)))
        self.assertEqual(100 + 7, self.found(Tally(completion_tokens=7, content_chars=4000)))
        self.assertEqual(200, self.found(Tally(), "embeddings"))
        self.assertEqual(0, self.found(None))


class FolderCase(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.config = self.folder / "models.toml"
        self.config.write_text(MODELS)
        self.file = self.folder / "keys.toml"
        self.environ = {"PORTWAY_CONFIG": str(self.config), "HOME": str(self.folder)}

    def run_key(self, *words: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command.main(words, self.environ)
        return status, out.getvalue(), err.getvalue()

    def loaded(self) -> Config:
        return config.load(None, self.environ)


class CommandTest(FolderCase):
    def test_new(self):
        """The key alone goes to stdout, its hash into a file for its owner's eyes, and it opens from then on."""
        status, out, err = self.run_key("new", "--name", "ed", "--models", "gpt,slow", "--rpm=5", "--tpm", "600")
        self.assertEqual(0, status)
        self.assertRegex(out, r"^sk-portway-[A-Za-z0-9_-]{43}\n$")
        self.assertIn("every request needs a key", err)
        self.assertNotIn(out.strip(), err + self.file.read_text())
        self.assertEqual(0o600, stat.S_IMODE(self.file.stat().st_mode))
        (key,) = self.loaded().server.api_keys
        self.assertEqual(keys.digest_of(out.strip()), key.digest)
        self.assertEqual(("ed", ("fast", "slow"), 5, 600, ""), (key.name, key.models, key.rpm, key.tpm, key.secret))

    def test_each_key_is_another(self):
        """Of a hundred no two are alike, and each has a name."""
        made = {self.run_key("new")[1] for _ in range(20)}
        self.assertEqual(20, len(made))
        self.assertEqual(20, len({key.name for key in self.loaded().server.api_keys} - {""}))
        self.assertEqual("", self.run_key("new")[2].partition("every request")[1])

    def test_list_and_remove(self):
        """A key that is removed is gone; those of models.toml are listed, and removed there."""
        self.config.write_text(f'[server]\napi_keys = [{{ key = "sk-1", name = "old", rpm = 3 }}]\n{MODELS}')
        self.run_key("new", "--name", "ed", "--models", "fast")
        _, out, _ = self.run_key("list")
        self.assertRegex(out, r"^old +all models; 3 requests a minute\ned +fast\n$")
        self.assertEqual(1, self.run_key("remove", "old")[0])
        self.assertIn("models.toml", self.run_key("remove", "old")[2])
        self.assertEqual((0, ""), self.run_key("remove", "ed")[:2])
        self.assertEqual(["old"], [key.name for key in self.loaded().server.api_keys])
        self.assertEqual(1, self.run_key("remove", "ed")[0])

    def test_nothing_is_written_that_would_not_load(self):
        """A model that is none, a name that is taken: said, and the file is as before."""
        self.run_key("new", "--name", "ed")
        before = self.file.read_bytes()
        models = (["--models", "fasst"], ["--models", ""], ["--models", "fast,,slow"])
        for words in (*models, ["--name", "ed"], ["--name", "a b"]):
            with self.subTest(words):
                status, out, err = self.run_key("new", *words)
                self.assertIn(status, (2, 78))
                self.assertEqual("", out)
                self.assertTrue(err)
                self.assertEqual(before, self.file.read_bytes())

    def test_the_last_key_of_an_open_address_stays(self):
        """Where other machines can reach the server it is not opened to everybody by a command."""
        self.config.write_text(f'[server]\nhost = "0.0.0.0"\n{MODELS}')
        self.assertEqual(0, self.run_key("new", "--name", "ed")[0])
        status, _, err = self.run_key("remove", "ed")
        self.assertEqual(78, status)
        self.assertIn("server.host", err)
        self.assertEqual(1, len(self.loaded().server.api_keys))

    def test_a_file_that_others_may_read(self):
        """It is no longer trusted: neither the daemon nor the command uses it, and both say what to do."""
        self.run_key("new")
        for mode in (0o640, 0o602, 0o644):
            self.file.chmod(mode)
            with self.assertRaises(ConfigError) as caught:
                self.loaded()
            self.assertIn(f"chmod 600 {self.file}", str(caught.exception))
            status, _, err = self.run_key("new")
            self.assertEqual(1, status)
            self.assertIn("chmod 600", err)

    def test_a_file_that_is_none(self):
        """Broken TOML, or another shape, is a mistake and never a server without keys."""
        for text in ("keys = 5", "[keys", '[[keys]]\nname = "x"', "[[keys]]\nkey = 5", 'colour = "red"'):
            with self.subTest(text):
                self.file.touch(0o600)
                self.file.write_text(text)
                with self.assertRaises(ConfigError):
                    self.loaded()

    def test_two_at_once(self):
        """While one command writes, another does not, and says so."""
        new = self.folder / "keys.toml.new"
        new.touch()
        status, out, err = self.run_key("new")
        self.assertEqual((1, ""), (status, out))
        self.assertIn(str(new), err)

    def test_with_the_shipped_configuration(self):
        """Keys that go with it stand in the user's own folder."""
        del self.environ["PORTWAY_CONFIG"]
        self.assertEqual(0, self.run_key("new")[0])
        self.assertTrue((self.folder / ".config" / "portway" / "keys.toml").exists())
        self.assertEqual(1, len(self.loaded().server.api_keys))

    def test_usage(self):
        """What can't be understood is said with exit code 2; help is no failure."""
        new = (["new", "--rpm", "0"], ["new", "--rpm", "x"], ["new", "--colour"], ["new", "--name"])
        for words in (["now"], *new, ["remove"], ["list", "x"]):
            with self.subTest(words):
                status, out, err = self.run_key(*words)
                self.assertEqual((2, ""), (status, out))
                self.assertIn("portway key", err)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual(0, main(["key", "--help"]))
        self.assertIn("portway key new", said.getvalue())


class WatcherTest(FolderCase):
    def poll(self, watcher: ConfigWatcher) -> Config | None:
        """What two looks at a file that holds still lead to."""
        watcher.changed()
        return watcher.poll()

    def test_a_change_is_noticed(self):
        """A new key, and one that is removed, are taken over without a change of models.toml."""
        watcher = ConfigWatcher(None, self.environ)
        self.assertEqual((), watcher.reload().server.api_keys)
        self.run_key("new", "--name", "ed")
        found = self.poll(watcher)
        self.assertEqual(["ed"], [key.name for key in found.server.api_keys] if found else None)
        self.assertIsNone(self.poll(watcher))
        self.run_key("remove", "ed")
        found = self.poll(watcher)
        self.assertEqual((), found.server.api_keys if found else None)

    def test_a_file_that_is_gone_lets_nobody_in(self):
        """Its keys stay in force, by SIGHUP as by a look, and the reason is told once."""
        watcher = ConfigWatcher(None, self.environ)
        self.run_key("new", "--name", "ed")
        watcher.reload()
        self.file.unlink()
        with self.assertRaises(ConfigError) as caught:
            self.poll(watcher)
        self.assertIn("keys.toml is gone", str(caught.exception))
        self.assertIsNone(self.poll(watcher))
        with self.assertRaises(ConfigError):
            watcher.reload()
        self.run_key("new", "--name", "again")
        found = self.poll(watcher)
        self.assertEqual(["again"], [key.name for key in found.server.api_keys] if found else None)


if __name__ == "__main__":
    unittest.main()
