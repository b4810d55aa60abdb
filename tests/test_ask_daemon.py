"""`ask` as a process against the real daemon, with a stand-in behind it."""

from __future__ import annotations

import json
import os
import pathlib
import select
import signal
import subprocess
import tempfile
import unittest
from contextlib import closing
from typing import Any

from portway.cache.store import Cache
from portway.standin.server import DEFAULT_MODELS, Fault, StandIn
from portway.telemetry import Log
from tests.daemon import Daemon
from tests.doubles import PATIENCE
from tests.llama_server import wait_for
from tests.test_ask import COMMAND

TOML = """
[server]
heartbeat = 0.05
[cooldown]
failures = 1000
[memory]
enabled = false
[backends.box]
kind = "ollama"
url = "{url}"
[models.three]
backend = "box"
model = "llama3.2:3b"
flag = "3b"
cache = "1h"
[models.nine]
backend = "box"
model = "qwen3.5:9b"
think = false
flag = "9b"
default = true
fallback = ["three"]
cache = "1h"
[models.thinker]
backend = "box"
model = "qwen3.5:9b"
think = true
flag = "think"
[models.council]
kind = "council"
members = ["three", "three"]
chairman = "nine"
[models.cascade]
kind = "cascade"
members = ["three", "nine"]
"""
BROKEN = Fault("status", status=500, error="it broke")


class AskedForReal(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.backend = self.enterContext(StandIn(DEFAULT_MODELS))
        self.log = Log(os.path.join(self.folder, "log.jsonl"))
        self.addCleanup(self.log.close, 5.0)
        cache = self.enterContext(closing(Cache(os.path.join(self.folder, "cache.sqlite3"))))
        self.daemon = self.enterContext(Daemon(TOML.format(url=self.backend.url), log=self.log, cache=cache))
        self.environ = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": self.folder,
            "LC_ALL": "C.UTF-8",
            "TERM": "xterm",
            "PORTWAY_URL": self.daemon.url,
        }
        self.lines = 0

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            env=self.environ,
            capture_output=True,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """An ask that goes on while the test does."""
        command = [*COMMAND, *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.environ
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        for stream in (process.stdout, process.stderr):
            assert stream
            self.addCleanup(stream.close)
        return process

    @property
    def asked(self) -> list[str]:
        """The models that were asked for answers."""
        return [request.model for request in self.backend.requests if request.path == "/api/chat"]

    def await_hanging(self) -> None:
        self.assertTrue(
            self.backend.wait_for(
                lambda backend: any(each.phase == "hang" and each.ended is None for each in backend.requests)
            )
        )

    def line(self) -> dict[str, Any]:
        """The newest line of the log, one more than at the last call."""
        self.lines += 1
        wait_for(lambda: self.log.written >= self.lines, "a line in the log")
        text = pathlib.Path(self.log.path).read_text()
        lines = text.splitlines()
        self.assertEqual(self.lines, len(lines), text)
        line: dict[str, Any] = json.loads(lines[-1])
        return line

    def test_tiers(self) -> None:
        """No flag is the default model, a flag is the model that has it in the daemon's configuration."""
        for flags, model in (
            ([], "nine"),
            (["--9b"], "nine"),
            (["--3b"], "three"),
            (["-m", "thinker"], "thinker"),
            (["--council"], "council"),
        ):
            done = self.ask("Why?", *flags, "--no-cache")
            self.assertEqual((0, ""), (done.returncode, done.stderr))
            self.assertIn('You asked: "Why?', done.stdout)
            line = self.line()
            self.assertEqual((model, "ask", 0), (line["model"], line["client"], line["exit_code"]))

    def test_an_unknown_tier(self) -> None:
        """It is named, with those that there are, and the nearest one."""
        done = self.ask("--9bb", "Why?")
        self.assertEqual((2, ""), (done.returncode, done.stdout))
        self.assertIn("no tier --9bb; there are --3b, --9b, --think, --council; did you mean --9b?", done.stderr)
        self.assertEqual([], self.asked)
        wait_for(lambda: self.log.written == 2, "its question, and that for the tiers")
        lines = [json.loads(line) for line in pathlib.Path(self.log.path).read_text().splitlines()]
        self.assertEqual([(404, 2), (200, 0)], [(line["status"], line["exit_code"]) for line in lines])

    def test_the_list_of_tiers(self) -> None:
        """As shell completion asks for it."""
        self.assertEqual(
            "--3b\tthree\n--9b\tnine\n--think\tthinker\n--council\tcouncil\n\tcascade\n", self.ask("--tiers").stdout
        )

    def test_a_hit(self) -> None:
        """The second time no model works, and -v says so."""
        first, second = (self.ask("-v", "Why?") for _ in range(2))
        self.assertEqual(first.stdout, second.stdout)
        self.assertRegex(first.stderr, r"^\[served by nine; cache miss; \d+ \+ \d+ tokens; \d\.\d\d s\]\n$")
        self.assertRegex(
            second.stderr, r"^\[served by nine; cache hit \([01] s old\); \d+ \+ \d+ tokens; \d\.\d\d s\]\n$"
        )
        self.assertEqual(1, len(self.asked))

    def test_no_cache_and_refresh(self) -> None:
        """--no-cache neither looks up nor keeps; --refresh asks anew and keeps what comes."""
        verdicts = []
        for flags in ([], [], ["--no-cache"], ["--refresh"], [], ["--no-cache", "--9b"]):
            self.ask("Why?", *flags)
            verdicts.append(self.line()["cache_hit"])
        self.assertEqual([False, True, None, False, True, None], verdicts)
        self.assertEqual(4, len(self.asked))
        self.ask("What else?", "--no-cache")
        self.line()
        self.ask("What else?")
        self.assertIs(False, self.line()["cache_hit"])

    def test_demoted(self) -> None:
        """The note is always there, also where the answer was another request's; and with --last; never later on."""
        self.backend.fail("/api/chat", BROKEN)
        self.backend.fail("/api/chat", "hang")
        first = self.start("Why?")
        self.await_hanging()
        second = self.start("Why?")
        wait_for(lambda: self.daemon.sharing == 1, "the second one's waiting")
        self.backend.release()
        for process in (first, second):
            out, notes = process.communicate(timeout=PATIENCE)
            self.assertEqual("[degraded: nine \u2192 three]\n", notes.decode())
            self.assertEqual(0, process.returncode)
            self.assertIn(b"playing llama3.2:3b", out)
        self.assertEqual(["qwen3.5:9b", "llama3.2:3b"], self.asked)
        self.assertIn("[degraded: nine", self.ask("--last").stderr)
        later = self.ask("Why?")
        self.assertEqual("", later.stderr)
        self.assertIn("playing qwen3.5:9b", later.stdout)

    def test_a_council(self) -> None:
        """Its one answer; where a part of it failed, or was stood in for, the note says who and why."""
        done = self.ask("--council", "Why?")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertIn("playing qwen3.5:9b", done.stdout)
        self.backend.fail("/api/chat", BROKEN)
        self.assertEqual("[degraded: three: server_error]\n", self.ask("--council", "Why?").stderr)
        self.backend.fail("qwen3.5:9b", BROKEN)
        self.assertEqual("[degraded: nine \u2192 three]\n", self.ask("--council", "Why?").stderr)
        self.assertEqual("[degraded: nine \u2192 three]\n", self.ask("--last").stderr)

    def test_a_cascade(self) -> None:
        """The next one's answering is what it is for; -v tells why."""
        self.backend.fail("/api/chat", BROKEN)
        done = self.ask("-v", "-m", "cascade", "Why?")
        self.assertIn("playing qwen3.5:9b", done.stdout)
        self.assertRegex(done.stderr, r"^\[served by cascade\(three>nine\); three=server_error\(.*\), nine=ok; ")

    def test_strict(self) -> None:
        """--strict takes no other model's answer: exit code 4, which the log has, too."""
        self.backend.fail("/api/chat", BROKEN)
        done = self.ask("--strict", "Why?")
        self.assertEqual((4, ""), (done.returncode, done.stdout))
        self.assertIn("nine could not answer", done.stderr)
        self.assertEqual(4, self.line()["exit_code"])
        self.assertEqual(["qwen3.5:9b"], self.asked)

    def test_failed(self) -> None:
        """Without --strict a chain that failed is 1."""
        self.backend.fail("/api/chat", BROKEN, 2)
        done = self.ask("Why?")
        self.assertEqual((1, ""), (done.returncode, done.stdout))
        self.assertEqual(1, self.line()["exit_code"])

    def test_ctrl_c(self) -> None:
        """It cancels the generation at the backend, at once."""
        self.backend.fail("/api/chat", "hang")
        process = self.start("Why?")
        self.await_hanging()
        process.send_signal(signal.SIGINT)
        self.assertEqual(130, process.wait(PATIENCE))
        self.assertTrue(self.backend.wait_for(lambda backend: any(each.left for each in backend.requests)))
        line = self.line()
        self.assertEqual((130, "prompt"), (line["exit_code"], line["cancelled_in"]))

    def test_in_a_terminal(self) -> None:
        """A stream: its text as it comes, Ctrl-C in the middle of it."""
        self.backend.fail("/api/chat", Fault("hang_mid_stream", after=3))
        terminal, far = os.openpty()
        self.addCleanup(os.close, terminal)
        process = subprocess.Popen([*COMMAND, "Why?"], stdin=far, stdout=far, stderr=far, env=self.environ)
        os.close(far)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        read_until(terminal, b"I am the")
        process.send_signal(signal.SIGINT)
        self.assertEqual(130, process.wait(PATIENCE))
        self.assertTrue(self.backend.wait_for(lambda backend: any(each.left for each in backend.requests)))
        line = self.line()
        self.assertEqual((130, "answer", 200), (line["exit_code"], line["cancelled_in"], line["status"]))

    def test_the_daemon_is_down(self) -> None:
        """Exit code 3, and how to start it."""
        self.environ["PORTWAY_URL"] = "http://127.0.0.1:9"
        done = self.ask("Why?")
        self.assertEqual(3, done.returncode)
        self.assertIn("nothing answers at PORTWAY_URL=http://127.0.0.1:9", done.stderr)


def read_until(terminal: int, mark: bytes) -> bytes:
    """What a process shows on its terminal, as far as the mark."""
    shown = b""
    while mark not in shown:
        ready, _, _ = select.select([terminal], [], [], PATIENCE)
        if not ready:
            raise AssertionError(f"no {mark!r} in {shown!r}")
        shown += os.read(terminal, 65536)
    return shown


if __name__ == "__main__":
    unittest.main()
