"""Whatever is wrong with the files of cache and log: the daemon goes on answering, says so, and recovers."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from portway.cache import file as cache_file
from portway.cache import store as cache_module
from portway.cache.store import Cache
from portway.commands import cache as cache_cli
from portway.standin.server import StandIn
from tests.cached import MODELS, CachedCase, chat, configured, verdict
from tests.daemon import Daemon, DaemonProcess
from tests.doubles import RawClient
from tests.llama_server import wait_for
from tests.targets import CHAT


class Trouble(CachedCase):
    """Whatever is wrong with the cache's file: requests go on, /health and stderr say so once, and it recovers."""

    def setUp(self) -> None:
        for name, seconds in (("RETRY_AFTER", 0.05), ("RETRY_AT_MOST", 0.1), ("WRITE_PATIENCE", 0.05)):
            self.enterContext(mock.patch.object(cache_module, name, seconds))
        super().setUp()

    @contextmanager
    def cached_at(self, path: str) -> Iterator[None]:
        """Another daemon, with its cache there."""
        self.cache.close()
        self.path, self.cache = path, Cache(path, say=self.said.append)
        self.daemon = Daemon(configured(self.backend.url), cache=self.cache)
        with closing(self.cache), self.daemon, self.daemon.client() as self.client:
            yield

    def assert_works(self) -> None:
        wait_for(lambda: self.health()["problem"] is None, "the cache's recovery", lambda: str(self.said))
        self.assertEqual(["MISS", "HIT"], [self.post(chat("three", top_k=9)).header("x-cache") for _ in range(2)])

    def assert_goes_on_without(self, words: str) -> None:
        """Requests are answered; the trouble is said, and said once."""
        wait_for(lambda: words in str(self.health()["problem"]), "the problem's being known", lambda: str(self.said))
        answers = [self.post(chat("three", seed=7)) for _ in range(3)]
        self.assertEqual([200] * 3, [answer.status for answer in answers])
        self.assertEqual(1, sum(words in line for line in self.said), self.said)

    def test_corrupt(self) -> None:
        """What is no database is kept aside, and a new one begun."""
        path = os.path.join(self.folder, "corrupt.sqlite3")
        Path(path).write_bytes(b"this is no database" * 1000)
        with self.cached_at(path):
            self.assert_works()
            self.assertIn("was corrupt; it is kept as", self.health()["notice"])
            self.assertEqual(1, len(self.said))
            self.assertEqual(1, len(cache_file.aside(path)))

    def test_torn_pages(self) -> None:
        """A file that looks right until it is read: the look-up is a miss, and then the same happens."""
        for seed in range(30):
            self.post(chat("three", seed=seed))
        self.cache.close()
        with open(self.path, "r+b") as file:
            file.seek(cache_file.PAGE)
            file.write(os.urandom(os.path.getsize(self.path) - cache_file.PAGE))
        with self.cached_at(self.path):
            self.assertEqual({(200, "MISS")}, {verdict(self.post(chat("three", seed=seed))) for seed in range(30)})
            wait_for(lambda: len(self.said) == 1 and not self.cache.problem, "a new file", lambda: str(self.said))
            self.assert_works()

    def test_locked(self) -> None:
        """Another process holds the file: answers wait in memory, where they are found, and are written later."""
        lock = (
            "import sqlite3, sys\n"
            "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "db.execute('BEGIN IMMEDIATE')\n"
            "print('locked', flush=True)\n"
            "sys.stdin.read()\n"
        )
        self.post(chat("three"))
        self.written()
        command = [sys.executable, "-c", lock, self.path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdin and other.stdout
            other.stdout.readline()
            self.assertEqual(["MISS", "HIT"], [self.post(chat("three", seed=1)).header("x-cache") for _ in range(2)])
            self.assert_goes_on_without("is locked by another process")
            other.stdin.close()
        self.assert_works()
        self.assertEqual("HIT", self.post(chat("three", seed=1)).header("x-cache"))
        self.assertEqual("the cache works again", self.said[-1])

    def test_of_a_newer_version(self) -> None:
        """It is left alone."""
        path = os.path.join(self.folder, "newer.sqlite3")
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE t (x)")
            db.execute("PRAGMA user_version = 99")
        before = Path(path).read_bytes()
        with self.cached_at(path):
            self.assert_goes_on_without("was written by a newer Portway")
            self.assertEqual(before, Path(path).read_bytes())
            os.unlink(path)
            self.assert_works()

    def test_where_no_file_can_be(self) -> None:
        """A folder that can't be made."""
        with self.cached_at("/dev/null/portway/cache.sqlite3"):
            self.assert_goes_on_without("can't be used")

    def test_off_and_on(self) -> None:
        """`portway cache off`: nothing is looked up, nothing kept, and answers say BYPASS; `on`: all of it is back."""
        self.post(chat("three"))
        self.written()
        with redirect_stdout(StringIO()):
            self.assertEqual(0, cache_cli.main(["off"], self.path))
        self.cache.flush(10)
        self.assert_goes_on_without("is turned off")
        self.assertEqual((200, "BYPASS"), verdict(self.post(chat("three"))))
        self.assertEqual(504, self.post(chat("three"), Cache_Control="only-if-cached").status)
        self.assertEqual(0, self.health()["dropped"])
        with redirect_stdout(StringIO()):
            self.assertEqual(0, cache_cli.main(["on"], self.path))
        self.assert_works()
        self.assertEqual("HIT", self.post(chat("three")).header("x-cache"))


class Killed(unittest.TestCase):
    """The daemon as a process, with the files of a user."""

    def setUp(self) -> None:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.environ = {"XDG_CACHE_HOME": f"{folder}/cache", "XDG_DATA_HOME": f"{folder}/data"}
        self.path = f"{folder}/cache/portway/cache.sqlite3"
        self.log = Path(folder) / "data" / "portway" / "log.jsonl"
        self.backend = self.enterContext(StandIn())
        models = {name: MODELS[name] for name in ("three", "embed")}
        self.toml = configured(self.backend.url, models)

    def test_kill_9_in_the_middle_of_a_thousand_writes(self) -> None:
        """What was in the file stays there and is found again; the log has whole lines only."""
        with DaemonProcess(self.toml, self.environ) as daemon:
            threads = [threading.Thread(target=self.write, args=(daemon, place), daemon=True) for place in range(10)]
            for thread in threads:
                thread.start()
            wait_for(lambda: len(self.stored()) >= 300, "300 answers in the file")
            before = self.stored()
            daemon.send(signal.SIGKILL)
            daemon.wait()
            for thread in threads:
                thread.join(30)
        self.assertLess(len(before), 1000)
        with DaemonProcess(self.toml, self.environ) as daemon, daemon.client() as client:
            self.assertEqual(set(), before - self.stored())
            with closing(sqlite3.connect(self.path)) as db:
                self.assertEqual([("ok",)], db.execute("PRAGMA integrity_check").fetchall())
            verdicts = [client.call("POST", CHAT, chat("three", seed=seed)).header("x-cache") for seed in range(1000)]
            self.assertGreaterEqual(verdicts.count("HIT"), len(before))
            wait_for(lambda: self.log.read_bytes().count(b'"cache_hit":true') >= len(before), "the log")
            lines = self.log.read_bytes().split(b"\n")
        self.assertEqual(b"", lines.pop())
        for line in lines:
            self.assertIn("prompt_hash", json.loads(line))

    def write(self, daemon: DaemonProcess, place: int) -> None:
        """A tenth of the thousand, as far as the daemon lives."""
        try:
            with daemon.client() as client:
                for seed in range(place, 1000, 10):
                    client.call("POST", CHAT, chat("three", seed=seed))
        except (ConnectionError, TimeoutError):
            pass

    def stored(self) -> set[bytes]:
        """The keys in the file."""
        try:
            with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as db:
                return {key for (key,) in db.execute("SELECT key FROM answers")}
        except sqlite3.OperationalError:  # there is no table yet
            return set()

    @unittest.skipUnless(hasattr(resource, "prlimit"), "needs Linux, to take a process its disk away")
    def test_a_full_disk(self) -> None:
        """Requests go on, /health and stderr tell of log and cache, once; with room again both go on."""
        with DaemonProcess(self.toml, self.environ) as daemon, daemon.client() as client:
            first = client.call("POST", "/v1/embeddings", vectors(0))
            wait_for(lambda: len(self.stored()) == 1 and self.log.exists(), "the files")
            self.limit(daemon, 8192)
            answers = [client.call("POST", "/v1/embeddings", vectors(number)) for number in range(1, 40)]
            wait_for(lambda: all(self.problems(client)), "both problems", lambda: daemon.log)
            self.assertEqual({200}, {answer.status for answer in [first, *answers]})
            self.assertEqual(200, client.call("POST", "/v1/embeddings", vectors(99)).status)
            self.limit(daemon, resource.RLIM_INFINITY)
            wait_for(lambda: not any(self.problems(client)), "their end", lambda: daemon.log)
            again = [client.call("POST", "/v1/embeddings", vectors(100)) for _ in range(2)]
            self.assertEqual("HIT", again[1].header("x-cache"))
            self.assertEqual(1, daemon.log.count("the cache's file"), daemon.log)
            self.assertEqual(1, daemon.log.count("the log can't be written"), daemon.log)

    def problems(self, client: RawClient) -> list[str | None]:
        health = client.call("GET", "/health").json
        return [health[part]["problem"] for part in ("cache", "log")]

    def limit(self, daemon: DaemonProcess, size: int) -> None:
        """No file of the daemon may grow beyond `size` bytes."""
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def vectors(number: int) -> dict[str, Any]:
    return {"model": "embed", "input": [f"text {number}", f"more of {number}"]}


if __name__ == "__main__":
    unittest.main()
