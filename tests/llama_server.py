"""A real llama-server for tests: found or built, started on a free port, watched, stopped.

    with LlamaServer(TinyModel()) as server:
        ... server.url ...

`LlamaServer` runs one model, `LlamaServer.router` several of them behind one address. Nothing here
knows Portway. A test that needs the program is skipped where there is none, and fails in CI.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.build_llama_server import build, cache, cached
from tests.tiny_gguf import TinyModel

PATIENCE = 30.0  # seconds that anything may take here; a tiny model is up in a tenth of one


def program() -> Path:
    """The llama-server to test with: $PORTWAY_LLAMA_SERVER, the one on PATH, or the one built before.

    With PORTWAY_BUILD_LLAMA_SERVER=1 it is built if need be. Otherwise the test is skipped, in CI failed.
    """
    for found in (os.environ.get("PORTWAY_LLAMA_SERVER"), shutil.which("llama-server"), cached()):
        if found and os.access(found, os.X_OK):
            return Path(found)
    if os.environ.get("PORTWAY_BUILD_LLAMA_SERVER") == "1":
        build(cached())
        return cached()
    way_out = "no llama-server: put one on PATH, or have one built with PORTWAY_BUILD_LLAMA_SERVER=1"
    if os.environ.get("CI") == "true":
        raise AssertionError(way_out)
    raise unittest.SkipTest(way_out)


class LlamaServer:
    """One llama-server process on loopback, as a context manager. `args` go to it as they are.

    It answers with the models' names: "tiny" for a single one.
    """

    def __init__(self, model: TinyModel | None, *args: str) -> None:
        self._program = program()
        self._folder = tempfile.TemporaryDirectory(prefix="portway-llama-")
        self._args = list(args)
        if model is not None:
            self._args += ["--model", str(model.write(cache())), "--alias", "tiny"]
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @classmethod
    def router(cls, models: Mapping[str, TinyModel], *args: str) -> Self:
        """A server that loads each of `models`, by name, when it is asked for."""
        server = cls(None, *args)
        sections = [f"[{name}]\nmodel = {model.write(cache())}\n" for name, model in models.items()]
        preset = Path(server._folder.name) / "models.ini"
        preset.write_text("version = 1\n\n" + "\n".join(sections), encoding="utf-8")
        server._args += ["--models-preset", str(preset)]
        return server

    @property
    def url(self) -> str:
        """The server's address, without /v1."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that it has logged, over every restart."""
        path = self._log_path()
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # ---- the process ----

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._folder.cleanup()

    def start(self) -> None:
        """Start it, on the port it had before if it had one, and wait until it can serve."""
        before = len(self.log)
        command = [str(self._program), "--host", "127.0.0.1", "--port", str(self.port), "--offline", *self._args]
        with self._log_path().open("ab") as log:
            # a group of its own, so that a router's children end with it
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._await_health(before)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it as an operator would, and make sure."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # all ended; macOS says EPERM of those still to be waited for
            pass
        self._process.wait(PATIENCE)
        self._process = None

    def restart(self) -> None:
        """Start it again on the same port, ended or not."""
        self.stop()
        self.start()

    # ---- what it says of itself ----

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as response:
            return json.load(response)

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """The JSON that `body` is answered with."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)

    def busy_slots(self, model: str = "") -> int:
        """How many requests it works on; of a router, name the model."""
        slots = self.get(f"/slots?model={model}" if model else "/slots")
        return sum(slot["is_processing"] for slot in slots)

    def await_logged(self, text: str, since: int = 0) -> None:
        """Wait until it logs `text`, after the first `since` characters of its log.

        Some waits must not be on /slots: asking it often keeps the server from noticing that the
        client of a request without a stream has left.
        """
        wait_for(lambda: text in self.log[since:], f"{text!r} in llama-server's log", self._log_end)

    def _await_health(self, before: int) -> None:
        wait_for(lambda: self._is_up(before), "llama-server's being up", self._log_end)

    def _is_up(self, before: int) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise AssertionError(f"llama-server ended with {self._process.returncode}:\n{self._log_end()}")
        listening = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log[before:])
        if listening is None:
            return False
        self.port = int(listening[1])
        try:
            return bool(self.get("/health")["status"] == "ok")
        except urllib.error.HTTPError as exc:  # 503 while it loads
            exc.close()
            return False

    def _log_path(self) -> Path:
        return Path(self._folder.name) / "log"

    def _log_end(self) -> str:
        return "\n".join(self.log.splitlines()[-20:])


def wait_for(done: Callable[[], bool], what: str, explain: Callable[[], str] = str) -> None:
    """Wait until `done()`, by asking it again and again. Fails after PATIENCE, saying `what` was waited for."""
    until = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > until:
            raise AssertionError(f"waited {PATIENCE:g} s in vain for {what}\n{explain()}")
        time.sleep(0.01)
