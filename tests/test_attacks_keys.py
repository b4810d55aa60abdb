"""Keys over the wire: who gets in, for what, how often; and that no way leads around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unittest
from typing import Any, ClassVar
from unittest import mock

from portway.config import ConfigError
from portway.standin.server import StandIn
from tests.daemon import ROOT, Daemon, DaemonProcess
from tests.doubles import HANG, RawClient, RawResponse, chunk, json_reply, sse_reply, stream_head
from tests.llama_server import wait_for
from tests.targets import CHAT, MESSAGES, Target, answer, ask, chain, delta, finish, usage

MODEL = '[backends.b]\nkind = "ollama"\nurl = "{url}"\n[models.fast]\nbackend = "b"\nmodel = "qwen3.5:9b"\n'
MODEL += 'aliases = ["gpt"]\nfallback = ["small"]\n[models.small]\nbackend = "b"\nmodel = "gemma3:1b"\nflag = "1b"\n'
MODEL += '[models.embed]\nbackend = "b"\nmodel = "nomic-embed-text"\n'
KEYS = """
[[server.api_keys]]
key = "sk-all"
[[server.api_keys]]
key = "sk-small"
name = "editor"
models = ["small", "embed"]
[[server.api_keys]]
key = "sk-rate"
rpm = 2
"""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class KeyCase(unittest.TestCase):
    daemon: ClassVar[DaemonProcess]
    keys = KEYS

    @classmethod
    def setUpClass(cls) -> None:
        standin = cls.enterClassContext(StandIn())
        cls.daemon = cls.enterClassContext(DaemonProcess(cls.keys + MODEL.format(url=standin.url)))

    def setUp(self) -> None:
        self.client = self.enterContext(self.daemon.client())

    def call(self, method: str, path: str, key: str, body: Any = None) -> RawResponse:
        return self.client.call(method, path, body, bearer(key))

    def chat(self, key: str, model: str = "small", **fields: Any) -> RawResponse:
        return self.call("POST", CHAT, key, {"model": model, "messages": MESSAGES, **fields})

    def assert_error(self, response: RawResponse, status: int, code: str) -> str:
        error = response.json["error"]
        self.assertEqual({"message", "type", "param", "code"}, set(error))
        self.assertEqual((status, code), (response.status, error["code"]), error)
        return str(error["message"])


class ScopeTest(KeyCase):
    def test_without_a_key(self):
        """Every route but /health is 401, by every method, whatever stands in the body."""
        for path in ("/v1/models", "/v1/models/fast", "/metrics", "/portway/residency"):
            self.assert_error(self.client.call("GET", path), 401, "invalid_api_key")
            self.assertEqual(401, self.client.call("HEAD", path).status)
        for path in (CHAT, "/v1/completions", "/v1/embeddings", "/portway/load", "/portway/unload"):
            response = self.client.call("POST", path, {"model": "fast", "api_key": "sk-all", "messages": MESSAGES})
            self.assert_error(response, 401, "invalid_api_key")
            self.assertEqual("Bearer", response.header("www-authenticate"))

    def test_health_tells_strangers_nothing(self):
        """Without a key, or with one for some models alone, it says that it is well, and no name of anything."""
        for headers in ({}, bearer("sk-wrong"), bearer("sk-small")):
            self.assertEqual({"status", "version"}, set(self.client.call("GET", "/health", headers=headers).json))
        self.assertIn("config", self.call("GET", "/health", "sk-all").json)

    def test_a_key_for_some_models(self):
        """It may ask for them by name, alias and flag; any other is 403, which names its own."""
        for model in ("small", "flag:1b"):
            self.assertEqual(200, self.chat("sk-small", model).status)
        self.assertEqual(200, self.call("POST", "/v1/embeddings", "sk-small", {"model": "embed", "input": "x"}).status)
        for model in ("fast", "gpt", "flag:default"):
            for stream in (False, True):
                message = self.assert_error(self.chat("sk-small", model, stream=stream), 403, "model_not_allowed")
                self.assertIn("small, embed", message)
        body = {"model": "fast", "prompt": "x"}
        self.assert_error(self.call("POST", "/v1/completions", "sk-small", body), 403, "model_not_allowed")

    def test_it_learns_of_no_other(self):
        """The list has its models alone, and no message names another one."""
        listed = self.call("GET", "/v1/models", "sk-small").json["data"]
        self.assertEqual(["small", "embed"], [card["id"] for card in listed])
        self.assertEqual(200, self.call("GET", "/v1/models/small", "sk-small").status)
        self.assert_error(self.call("GET", "/v1/models/fast", "sk-small"), 403, "model_not_allowed")
        for name in ("fasst", "nothing", "gpt4", ""):
            response = self.chat("sk-small", name)
            self.assertIn(response.status, (400, 404))
            self.assertNotIn(b"fast,", response.body)
            self.assertNotIn(b"mean fast", response.body)
            self.assertNotIn(b"mean gpt", response.body)
        self.assertEqual(3, len(self.call("GET", "/v1/models", "sk-all").json["data"]))

    def test_what_concerns_the_server(self):
        """Metrics, memory, loading and unloading are for keys that may do everything."""
        for method, path in (("GET", "/metrics"), ("GET", "/portway/residency"), ("HEAD", "/metrics")):
            self.assertEqual(403, self.call(method, path, "sk-small").status)
            self.assertEqual(200, self.call(method, path, "sk-all").status)
        for path in ("/portway/load", "/portway/unload"):
            self.assert_error(self.call("POST", path, "sk-small", {"model": "small"}), 403, "key_not_allowed")

    def test_the_log_says_whose(self):
        """A line has the key's name, and nothing of the key."""
        for key, model in (("sk-small", "small"), ("sk-small", "fast"), ("sk-all", "small"), ("sk-wrong", "small")):
            headers = {**bearer(key), "X-Portway-Client": "log test"}
            self.client.call("POST", CHAT, {"model": model, "messages": MESSAGES}, headers)
        wait_for(lambda: len(self.lines()) == 4, "the lines")
        self.assertEqual(["editor", "editor", None, None], [json.loads(line)["key"] for line in self.lines()])
        self.assertNotIn("sk-", "".join(self.daemon.lines()))

    def lines(self) -> list[str]:
        return [line for line in self.daemon.lines() if '"log test"' in line]


class RateTest(KeyCase):
    def test_requests_a_minute(self):
        """The third is 429, with the seconds to wait, in OpenAI's words; other keys and the lists go on."""
        self.assertEqual(200, self.chat("sk-rate").status)
        self.assertEqual(400, self.call("POST", CHAT, "sk-rate", b"{").status)  # it counts all the same
        response = self.chat("sk-rate")
        message = self.assert_error(response, 429, "rate_limit_exceeded")
        self.assertEqual("rate_limit_error", response.json["error"]["type"])
        wait = int(response.header("retry-after") or 0)
        self.assertTrue(50 <= wait <= 61, wait)
        self.assertIn(f"{wait} s", message)
        self.assertEqual(200, self.call("GET", "/v1/models", "sk-rate").status)
        self.assertEqual(200, self.chat("sk-all").status)
        self.assert_error(self.chat("sk-rate", "no-such-model"), 429, "rate_limit_exceeded")


class TokenTest(unittest.TestCase):
    def daemon_with(self, target: Target, tpm: int) -> RawClient:
        keys = f'[[server.api_keys]]\nkey = "sk-t"\ntpm = {tpm}\n[[server.api_keys]]\nkey = "sk-all"\n'
        self.daemon = self.enterContext(Daemon(keys + chain(target.url)))
        return self.enterContext(self.daemon.client())

    def test_tokens_a_minute(self):
        """What answers say that they took counts, plain and streamed; then it is 429 until a minute has passed."""
        counted = {"prompt_tokens": 50, "completion_tokens": 30, "total_tokens": 80}
        choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        plain = json_reply({"object": "chat.completion", "choices": [choice], "usage": counted})
        stream = sse_reply([delta(content="hi"), finish(), usage(50, 30)])
        with Target(plain, stream) as target:
            client = self.daemon_with(target, 160)
            self.assertEqual(200, ask(client, headers=bearer("sk-t")).status)
            self.assertEqual(200, ask(client, headers=bearer("sk-t"), stream=True).status)
            response = ask(client, headers=bearer("sk-t"))
            self.assertEqual((429, "rate_limit_exceeded"), (response.status, response.json["error"]["code"]))
            self.assertIn("160 tokens", response.json["error"]["message"])
            self.assertGreater(int(response.header("retry-after") or 0), 50)
            self.assertEqual(2, len(target.asked))
            target.add_answer(plain)
            self.assertEqual(200, ask(client, headers=bearer("sk-all")).status)

    def test_a_stream_that_is_left(self):
        """Leaving before the counts come is no way around them: what was sent counts by its characters."""
        words = chunk(b"data: " + json.dumps(delta(content="x" * 4000)).encode() + b"\n\n")
        with Target([stream_head(), words, HANG]) as target:
            client = self.daemon_with(target, 500)
            client.request("POST", CHAT, {"model": "first", "messages": MESSAGES, "stream": True}, bearer("sk-t"))
            next(client.events(client.head()))
            client.close()
            target.wait_closed(target.asked[0].connection)
            with self.daemon.client() as again:
                target.add_answer(*[answer("openai", "x")] * 50)
                wait_for(lambda: ask(again, headers=bearer("sk-t")).status == 429, "its being counted")


class OpenTest(unittest.TestCase):
    """An address that others can reach is never open to everybody."""

    def test_a_bind_without_a_key(self):
        """Neither by the file nor by --host: the daemon does not start, and says which rule it was."""
        with StandIn() as standin:
            text = MODEL.format(url=standin.url)
            everywhere = '[server]\nhost = "0.0.0.0"\n'
            for server, words in ((everywhere, []), ("", ["--host", "0.0.0.0"]), ("", ["--host", "::"])):
                daemon = DaemonProcess(server + text, None, *words)
                with self.assertRaises(AssertionError) as caught, daemon:
                    pass
                self.assertIn("api_keys is empty", str(caught.exception))

    def test_a_reload_that_takes_the_last_key_away(self):
        """While others can reach the address the old keys stay in force, though the new file is right by itself."""
        with StandIn() as standin, mock.patch("portway.proxy.is_loopback", return_value=False):
            text = MODEL.format(url=standin.url)
            with Daemon(f'[server]\napi_keys = ["sk-1"]\n{text}') as daemon, daemon.client() as client:
                with self.assertRaises(ConfigError) as caught:
                    daemon.use(text)
                self.assertIn("server.api_keys", str(caught.exception))
                self.assertEqual(401, client.call("GET", "/v1/models").status)
                daemon.use(f'[server]\napi_keys = ["sk-2"]\n{text}')
                self.assertEqual(200, client.call("GET", "/v1/models", headers=bearer("sk-2")).status)

    def test_keys_that_come_and_go(self):
        """A reload that adds a key asks for it from the next request on, also on connections that are open."""
        with StandIn() as standin:
            text = MODEL.format(url=standin.url)
            with Daemon(text) as daemon, daemon.client() as client:
                self.assertEqual(200, client.call("GET", "/v1/models").status)
                daemon.use(f'[server]\napi_keys = ["sk-2"]\n{text}')
                self.assertEqual(401, client.call("GET", "/v1/models").status)
                self.assertEqual(200, client.call("GET", "/v1/models", headers=bearer("sk-2")).status)
                daemon.use(text)
                self.assertEqual(200, client.call("GET", "/v1/models").status)


class CommandTest(unittest.TestCase):
    def test_from_key_new_to_an_answer(self):
        """A key made beside a running daemon opens it within seconds, and none does once it is removed."""
        with StandIn() as standin, DaemonProcess(MODEL.format(url=standin.url)) as daemon, daemon.client() as client:
            self.assertEqual(200, client.call("GET", "/v1/models").status)
            key = self.portway(daemon, "key", "new", "--name", "ed", "--models", "small").stdout.strip()
            wait_for(lambda: client.call("GET", "/v1/models").status == 401, "the key's being asked for")
            listed = client.call("GET", "/v1/models", headers=bearer(key)).json["data"]
            self.assertEqual(["small"], [card["id"] for card in listed])
            self.assertNotIn(key, daemon.log)
            full = self.portway(daemon, "key", "new", "--name", "me").stdout.strip()
            self.portway(daemon, "key", "remove", "ed")
            wait_for(lambda: [self.status(client, each) for each in (key, full)] == [401, 200], "both being taken over")

    def status(self, client: RawClient, key: str) -> int:
        return client.call("GET", "/v1/models", headers=bearer(key)).status

    def portway(self, daemon: DaemonProcess, *words: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "PORTWAY_CONFIG": str(daemon.configuration)}
        command = [sys.executable, "-m", "portway", *words]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(0, done.returncode, done.stderr)
        return done


if __name__ == "__main__":
    unittest.main()
