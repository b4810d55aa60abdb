"""A daemon to attack: a process of its own, over a stand-in, a scripted backend and one whose streams never end.

with Attacked() as world:
    row = attacks.attack_framing(world)
"""

from __future__ import annotations

import json
import subprocess
import unittest
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

from portway.standin.server import StandIn
from scripts.torture_rows.attacks import Attack, Connection
from tests.daemon import DaemonProcess
from tests.doubles import ScriptedRequest, ScriptedServer, chunk, json_reply, stream_head
from tests.targets import Target, delta

MB = 1024**2
FLOOD = chunk(b"".join(b"data: " + json.dumps(delta(content="x" * 8000)).encode() + b"\n\n" for _ in range(8)))
QUESTION = [{"role": "user", "content": "hi"}]


class Counts(NamedTuple):
    """What a process has. On a system that does not tell, 0."""

    threads: int
    descriptors: int
    rss: int  # bytes


def counts(pid: int) -> Counts:
    """Those of a process."""
    proc = Path(f"/proc/{pid}")
    if not proc.exists():
        said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
        return Counts(0, 0, int(said.stdout) * 1024)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return Counts(int(status["Threads"]), len(list((proc / "fd").iterdir())), int(status["VmRSS"].split()[0]) * 1024)


class Attacked:
    """`server`: further lines of [server]; `rest`: further sections. What it says of itself, the attacks read."""

    header_timeout = 1.0
    body_timeout = 1.0
    write_timeout = 2.0
    max_body = 4 * MB
    flood = "flood"

    def __init__(self, server: str = "", rest: str = "") -> None:
        self._stack = ExitStack()
        self._server = server
        self._rest = rest

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.standin = stack.enter_context(StandIn())
            self.scripted = stack.enter_context(Target())
            self.flooding = stack.enter_context(ScriptedServer(then=_flood))
            self.daemon = stack.enter_context(DaemonProcess(self._toml()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.daemon.port

    def check(self) -> Counts:
        """See scripts.torture_rows.attacks.World."""
        body = json.dumps({"model": "fast", "messages": QUESTION}).encode()
        with Connection(self.port) as connection:
            answer = connection.ask("POST", "/v1/chat/completions", {}, body)
        assert answer.status == 200, answer
        assert answer.header("x-served-by") == "fast", answer
        return counts(self.daemon.pid)

    @property
    def reached(self) -> list[str]:
        """The paths of all requests that the backends have seen, but for what the daemon asks of its own accord."""
        own = ("/api/tags", "/api/show", "/api/ps", "/api/version", "/v1/models", "/health", "/props", "/slots")
        seen = [request.path for request in self.standin.requests]
        seen += [request.path for server in (self.scripted, self.flooding) for request in server.requests]
        return [path for path in seen if path not in own]

    def _toml(self) -> str:
        return f"""
            [server]
            header_timeout = {self.header_timeout}
            body_timeout = {self.body_timeout}
            write_timeout = {self.write_timeout}
            max_body = {self.max_body}
            {self._server}
            [backends.standin]
            kind = "ollama"
            url = "{self.standin.url}"
            [backends.scripted]
            kind = "openai"
            url = "{self.scripted.url}"
            [backends.flooding]
            kind = "openai"
            url = "{self.flooding.url}"
            [models.fast]
            backend = "standin"
            model = "qwen3.5:9b"
            fallback = ["small"]
            [models.small]
            backend = "standin"
            model = "gemma3:1b"
            [models.embed]
            backend = "standin"
            model = "nomic-embed-text"
            [models.scripted]
            backend = "scripted"
            model = "physical"
            [models.flood]
            backend = "flooding"
            model = "physical"
            [models.shared]
            backend = "flooding"
            model = "physical"
            cache = "1h"
            {self._rest}
        """


def _flood(request: ScriptedRequest) -> bytes | list[bytes]:
    if request.method == "GET":
        return json_reply({"error": "not now"}, 404)
    return [stream_head(), *[FLOOD] * 20_000]  # 1.3 GB, of which one piece is in memory


class AttackCase(unittest.TestCase):
    """Tests that share one daemon; it must be well after each."""

    world: Attacked
    server = ""
    rest = ""

    @classmethod
    def setUpClass(cls) -> None:
        cls.world = cls.enterClassContext(Attacked(cls.server, cls.rest))

    def tearDown(self) -> None:
        self.world.check()
        self.assertNotIn("unforeseen", self.world.daemon.log)
        self.assertNotIn("Traceback", self.world.daemon.log)

    def holds(self, attack: Attack) -> None:
        """The attack is made and holds in every case."""
        row = attack(self.world)
        if not row.tries:
            self.skipTest(row.note)
        self.assertEqual((row.tries, ""), (row.held, row.note))
