"""Portway itself for tests: in this process, or as the program a user starts. Both listen on a free port.

    with Daemon(toml) as daemon, daemon.client() as client:
        client.call("GET", "/v1/models")

`toml` is a models.toml's text. Nothing here knows which backends it names.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

from portway import config, proxy
from portway.cache.store import Cache
from portway.loop import POLLOUT
from portway.telemetry import Log
from tests.doubles import RawClient
from tests.llama_server import wait_for

ROOT = Path(__file__).resolve().parent.parent


def _without_memory(toml: str) -> str:
    """A stand-in's models take no memory: this machine's must not keep them out, unless a test wants it."""
    return toml if "[memory]" in toml else f"{toml}\n[memory]\nenabled = false\n"


class _Running:
    """What both kinds have in common: an address, and clients of it."""

    port = 0

    @property
    def url(self) -> str:
        """The base URL that SDKs want."""
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self) -> RawClient:
        """A new connection to it."""
        return RawClient(self.port)


class Daemon(_Running):
    """The daemon in this process, on threads of its own. Its log's lines are in `log`."""

    def __init__(
        self,
        toml: str,
        environ: Mapping[str, str] | None = None,
        log: Log | None = None,
        cache: Cache | None = None,
    ) -> None:
        parsed = config.parse(_without_memory(toml), "models.toml", environ or {})
        self.config = replace(parsed, server=replace(parsed.server, port=0))
        self.log: list[str] = []
        self._daemon = proxy.Daemon(self.config, say=self.log.append, log=log, cache=cache)

    def __enter__(self) -> Self:
        self._daemon.start()
        self.port = self._daemon.port
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.stop(drain=1.0)

    def stop(self) -> None:
        """End it before the end of its block."""
        self._daemon.stop(drain=1.0)

    def use(self, toml: str) -> None:
        """Reload with this configuration."""
        self._daemon.use(config.parse(_without_memory(toml), "models.toml", {}))

    @property
    def workers(self) -> int:
        """How many worker threads it has."""
        return self._daemon._server.workers.count

    @property
    def sharing(self) -> int:
        """How many requests wait for the answer to an identical one."""
        return sum(flight.waiters for flight in list(self._daemon._flights._table.values()))

    @property
    def flights(self) -> int:
        """How many requests others may wait for."""
        return len(self._daemon._flights)

    @property
    def idle(self) -> list[proxy.Handler]:
        """The connections that have no request under way, nor one that waits for its turn."""
        return [handler for handler in list(self._daemon._server._open) if handler.is_idle]

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return self._daemon._server.connections

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return self._daemon._server.in_flight.count

    @property
    def writing(self) -> int:
        """How many requests wait on the loop until somebody takes more."""
        entries = list(self._daemon._server.loop._entries.values())
        return sum(entry.mask == POLLOUT and entry.task is not None for entry in entries)

    @property
    def ended(self) -> int:
        """How many streams have had their last piece, taken or not."""
        streams = [handler._stream for handler in list(self._daemon._server._open)]
        return sum(stream is not None and stream.ended for stream in streams)

    @property
    def owed(self) -> int:
        """Bytes that clients have not taken of answers that others may wait for."""
        return sum(len(handler._owed) for handler in list(self._daemon._server._open))

    @property
    def backlog(self) -> int:
        """How many connections have a request that waits for its turn."""
        return len(self._daemon._server.backlog)


class DaemonProcess(_Running):
    """`portway serve` as a process of its own, isolated as a service would run it.

    `configuration` is the file it reads: write to it to change what is served.
    """

    def __init__(self, toml: str, environ: Mapping[str, str] | None = None, *args: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="portway-daemon-")
        self.configuration = Path(self._folder.name) / "models.toml"
        self.configuration.write_text(_without_memory(toml), encoding="utf-8")
        own = {
            "HOME": self._folder.name,
            "XDG_DATA_HOME": "",
            "XDG_CACHE_HOME": "",
            "XDG_CONFIG_HOME": "",
            "XDG_STATE_HOME": "",
        }
        self._environ = {**os.environ, **own, **(environ or {})}
        self._args = args
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it has written to stdout and stderr so far."""
        return (Path(self._folder.name) / "log").read_text(encoding="utf-8", errors="replace")

    def lines(self) -> list[str]:
        """The lines of its log of requests."""
        path = Path(self._folder.name) / ".local" / "share" / "portway" / "log.jsonl"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    @property
    def pid(self) -> int:
        """The process that serves."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        command = [sys.executable, "-I", "-S", str(ROOT / "portway"), "serve", "--port", "0"]
        command += ["--config", str(self.configuration), *self._args]
        with (Path(self._folder.name) / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environ
            )
        try:
            wait_for(self._is_up, "the daemon's being up", lambda: self.log)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 10.0) -> int:
        """Wait until it has ended by itself. Returns its exit code."""
        assert self._process is not None
        return self._process.wait(timeout)

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self._process.returncode}:\n{self.log}")
        listening = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log)
        self.port = int(listening[1]) if listening else 0
        return self.port != 0

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10.0)
        self._folder.cleanup()
