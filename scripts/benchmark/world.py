"""The processes of a benchmark: the upstream, Portway, and what is known of each from outside.

Everything listens on 127.0.0.1, lives in one temporary folder (HOME and the XDG folders too), and is ended by the
pid with which it was started.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from scripts.benchmark.native import Target, Tools, build

ROOT = Path(__file__).resolve().parent.parent.parent
START = 120.0  # seconds until a process must answer; LiteLLM needs more than ten
END = 10.0  # seconds a process has between SIGTERM and SIGKILL

# What the upstream makes of a model's name stands in upstream.c: KIND-GAP-COUNT.
PLAIN = "text-0-16"
PACED = "text-20000-100"
SLOW = "text-100000-50"
FLOOD = "text-0-20000"
TOOLS = "tools-0-1"
FAILING = "fail-0-1"


# Portway that counts nothing: the metrics have no switch, as nobody needs one.
UNMEASURED = """\
import sys
sys.path.insert(0, {root!r})
from portway.metrics import Metrics
Metrics.observe = lambda self, record: None
from portway.cli import main
sys.exit(main())
"""


class Process:
    """A process of ours, ended with the block."""

    def __init__(self, command: Sequence[str], folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        own = {"HOME": str(folder), "XDG_DATA_HOME": "", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **own},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def wait_for(self, pattern: str) -> str:
        """The first group of `pattern` as soon as its output has it. Raises RuntimeError."""
        until = time.monotonic() + START
        while time.monotonic() < until:
            if found := re.search(pattern, self.log.read_text(errors="replace")):
                return found[1]
            self.check()
            time.sleep(0.005)
        raise RuntimeError(f"{self.name} did not start in {START:g} s:\n{self.log.read_text()[-2000:]}")

    def check(self) -> None:
        """Raises RuntimeError if it has ended."""
        if self._process.poll() is not None:
            said = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} ended with {self._process.returncode}:\n{said}")

    def end(self) -> None:
        """SIGTERM, and SIGKILL to whoever does not mind it. The upstream ends with its stdin."""
        if self._process.stdin:
            self._process.stdin.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Portway(Process):
    """`portway serve`, isolated as a service would run it. extra: more of its configuration."""

    def __init__(
        self,
        folder: Path,
        upstream: int,
        name: str = "portway",
        extra: str = "",
        models: int = 0,
        metrics: bool = True,
    ) -> None:
        home = folder / name
        home.mkdir(exist_ok=True)
        file = home / "models.toml"
        file.write_text(configuration(upstream, extra, models), encoding="utf-8")
        self.port = free_port()
        self.start_s = 0.0  # seconds until it accepted connections
        self.started = time.perf_counter()
        program = [str(ROOT / "portway")] if metrics else ["-c", UNMEASURED.format(root=str(ROOT))]
        command = [sys.executable, "-I", "-S", *program, "serve", "--config", str(file)]
        super().__init__([*command, "--port", str(self.port)], home, name)

    def wait_until_up(self) -> float:
        """Seconds from the start until it accepts connections."""
        until = self.started + START
        while time.perf_counter() < until:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                self.check()
                time.sleep(0.001)
            else:
                return time.perf_counter() - self.started
        raise RuntimeError(f"{self.name} does not listen:\n{self.log.read_text()[-2000:]}")

    def keep_on_one_processor(self) -> None:
        """Each of its threads on the last one there is; Linux alone can."""
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {max(os.sched_getaffinity(0))})

    def target(self, model: str, *headers: str) -> Target:
        """One of `configuration`'s models."""
        return Target(self.port, model, headers=headers, cpu_of=self.pid)


def configuration(upstream: int, extra: str = "", models: int = 0) -> str:
    """A models.toml: NAME behind either kind of backend (openai-NAME, ollama-NAME), NAME with its answers kept
    (cached-NAME), one that always falls back (demoted), and `models` more."""
    parts = [
        extra,
        f'[backends.openai]\nkind = "openai"\nurl = "http://127.0.0.1:{upstream}/v1"\n',
        f'[backends.ollama]\nkind = "ollama"\nurl = "http://127.0.0.1:{upstream}"\n',
        f'[models.demoted]\nbackend = "openai"\nmodel = "{FAILING}"\nfallback = ["openai-{PLAIN}"]\n',
        f'[models.cached-{PLAIN}]\nbackend = "openai"\nmodel = "{PLAIN}"\ncache = "30d"\nflag = "hit"\n',
    ]
    for kind in ("openai", "ollama"):
        names = (PLAIN, PACED, SLOW, FLOOD, TOOLS)
        parts += [f'[models.{kind}-{name}]\nbackend = "{kind}"\nmodel = "{name}"\n' for name in names]
    parts += [f'[models.spare-{n}]\nbackend = "openai"\nmodel = "text-0-{n}"\n' for n in range(models)]
    return "\n".join(parts)


class World:
    """Where a benchmark takes place: a folder, the programs, an upstream and one Portway that serves by default."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="portway-bench-")))
        self.tools: Tools = build(self.folder)
        self.upstream = 0
        self.upstream_pid = 0

    def __enter__(self) -> Self:
        try:
            server = self._stack.enter_context(Process(self.tools.upstream, self.folder, "upstream"))
            self.upstream, self.upstream_pid = int(server.wait_for(r"^(\d+)\n")), server.pid
            self.portway = self.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str = "portway", extra: str = "", models: int = 0, *, metrics: bool = True) -> Portway:
        """One more Portway, which ends with this world if nobody ends it before."""
        daemon = self._stack.enter_context(Portway(self.folder, self.upstream, name, extra, models, metrics))
        daemon.start_s = daemon.wait_until_up()
        return daemon

    def direct(self, model: str, *, ollama: bool = False) -> Target:
        """The upstream itself."""
        return Target(self.upstream, model, "/api/chat" if ollama else "/v1/chat/completions")


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- what the system knows of a process -----------------------------------------------------------


def cpu_seconds(pid: int) -> float | None:
    """Processor time of all its threads; None where the system has no such clock (Linux: CPUCLOCK_SCHED of a pid)."""
    if not sys.platform.startswith("linux"):
        return None
    return time.clock_gettime((~pid << 3) | 2)


def memory(pid: int) -> dict[str, float | None]:
    """Its memory now and at most, in MB, and its threads."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return {"rss_mb": None, "peak_mb": None, "threads": None}
    return {
        "rss_mb": _field(status, "VmRSS") / 1024,
        "peak_mb": _field(status, "VmHWM") / 1024,
        "threads": _field(status, "Threads"),
    }


def _field(status: str, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    return float(found[1]) if found else 0.0
