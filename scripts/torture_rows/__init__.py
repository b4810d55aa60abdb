"""What every row of the torture table has in common: Row, the result, and World, the Portway that is tortured.

A module beside this one has functions `attack_NAME(world: World) -> Row` or `fault_NAME(world: World) -> Row`;
scripts/torture.py runs them and makes the table. A row that does not hold says in `note` what was seen instead.

Everything listens on 127.0.0.1, lives in one temporary folder, and is ended by the pid with which it was started.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from scripts.torture_rows.saboteur import Action, Saboteur
from scripts.torture_rows.speech import Speech, chunked

ROOT = Path(__file__).resolve().parent.parent.parent
# `portway` as a service runs it. $PORTWAY_TORTURED is another one to torture: a zipapp, or a changed copy
PROGRAM = (sys.executable, "-I", "-S", os.environ.get("PORTWAY_TORTURED") or str(ROOT / "portway"))
PATIENCE = 30.0  # seconds that anything may take here
WRITING = 2.0  # seconds that the log may take for one write; who reads meanwhile sees a part of it
END = 10.0  # seconds a process has between SIGTERM and SIGKILL
SETTLED = 10.0  # seconds that threads and descriptors have to go back to what they were


@dataclass(frozen=True, slots=True)
class Row:
    """One attack or fault. tries: how often it was tried, 0 = it can't be here, and `note` says why; held: how often
    all was as it should be."""

    name: str
    tries: int
    held: int
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it held each time that it was tried."""
        return self.tries == self.held


class Counts(NamedTuple):
    """What a process holds. None where the system doesn't tell (no /proc); rss is in bytes."""

    threads: int | None
    fds: int | None
    rss: int | None


class Answer(NamedTuple):
    """A whole HTTP answer; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Its body."""
        return json.loads(self.body)


class Process:
    """A process of ours: started with `command`, its output in a file, ended with the block."""

    def __init__(self, command: Sequence[str], folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = list(command)
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PORTWAY_")},
            **dict.fromkeys(("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), ""),
            "HOME": str(folder),
        }
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        """Start it; its output begins anew."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=self._environ,
            )

    @property
    def pid(self) -> int:
        """Its number, while it runs and after."""
        return self._running.pid

    @property
    def said(self) -> str:
        """What it has written since it was started."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str) -> str:
        """The first group of `pattern` as soon as its output has it. Raises RuntimeError."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if found := re.search(pattern, self.said):
                return found[1]
            if self._process is None or self._process.poll() is not None:
                break
            time.sleep(0.005)
        raise RuntimeError(f"{self.name} did not start:\n{self.said[-2000:]}")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait until it has ended by itself. Its exit code. Raises subprocess.TimeoutExpired."""
        return self._running.wait(timeout)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def end(self) -> None:
        """SIGTERM, and SIGKILL to whoever does not mind it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END)
            except subprocess.TimeoutExpired:
                self.kill()

    def counts(self) -> Counts:
        """What it holds now."""
        return counts(self.pid)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process


class StandInProcess(Process):
    """`portway standin` as a process of its own. It keeps the port that it got at its first start."""

    def __init__(self, folder: Path, name: str, *args: str) -> None:
        self._args = args
        self.port = 0
        super().__init__([], folder, name)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, again on the same port if it had one, and wait until it listens."""
        self._command = [*PROGRAM, "standin", "--port", str(self.port), *self._args]
        super().start()
        self.port = int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)"))


class PortwayProcess(Process):
    """`portway serve`, isolated as a service would run it, with a home of its own in `folder`/`name`.

    toml: its models.toml; write to `configuration` to change it. limits: words in front of the command, as
    ["prlimit", "--nofile=64"]. program: what is run instead of `python -I -S portway`, up to its arguments.
    """

    def __init__(
        self,
        folder: Path,
        toml: str,
        name: str = "portway",
        *,
        limits: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.home = folder / name
        self.home.mkdir(exist_ok=True)
        self.configuration = self.home / "models.toml"
        self.configuration.write_text(toml, encoding="utf-8")
        self.log_file = self.home / ".local" / "share" / "portway" / "log.jsonl"  # where its requests' lines go
        self.cache_file = self.home / ".cache" / "portway" / "cache.sqlite3"
        self.port = 0
        super().__init__([], self.home, name)
        self._begin = [*limits, *program]

    def start(self) -> None:
        """Start it, again on the same port if it had one, and wait until it listens."""
        self._command = [*self._begin, "serve", "--config", str(self.configuration), "--port", str(self.port)]
        super().start()
        self.port = int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)"))

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its log of requests so far. Raises ValueError if one is not whole, nor is just being written."""
        if not self.log_file.exists():
            return []
        until = time.monotonic() + WRITING
        while (text := self.log_file.read_bytes()) and not text.endswith(b"\n"):
            if time.monotonic() >= until:
                raise ValueError(f"the log's last line is not whole: {text[-80:]!r}")
            time.sleep(0.005)
        return [json.loads(line) for line in text.splitlines()]

    def call(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None, timeout: float = 30
    ) -> Answer:
        """One request on a connection of its own, and its whole answer. Raises OSError, http.client.HTTPException."""
        return call(self.port, method, path, body, headers, timeout)

    def chat(self, model: str, text: str = "say something", **fields: Any) -> Answer:
        """The whole answer to one chat completion, streamed or not."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return self.call("POST", "/v1/chat/completions", body)

    def health(self) -> dict[str, Any]:
        """What it says of itself."""
        return dict(self.call("GET", "/health").json)


class World:
    """A running daemon over two stand-ins, each a process of its own: `models[0]` falls back to `models[1]`.

        with World() as world:
            attack(world.port)
            world.check()

    `extra` is more of its models.toml. After an attack `check` says whether all is as before. header_timeout,
    body_timeout (seconds) and max_body (bytes) are as configured; `flood` is a model whose stream never ends.
    """

    models = ("ours-a", "ours-b")
    header_timeout = 1.0
    body_timeout = 1.0
    max_body = 4 * 1024**2
    flood = "flood"

    def __init__(self, extra: str = "", *, limits: Sequence[str] = ()) -> None:
        self._extra = extra
        self._limits = limits
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="portway-torture-")))
            self.standins = [
                self._stack.enter_context(StandInProcess(self.folder, name, "--model", "model-a=1GB,tools"))
                for name in ("standin-a", "standin-b")
            ]
            endless = self._stack.enter_context(Saboteur("endless"))
            endless.fail(self.flood, _endlessly)
            toml = chain_toml([standin.url for standin in self.standins]) + self._more(endless) + self._extra
            self.portway = self._stack.enter_context(PortwayProcess(self.folder, toml, limits=self._limits))
            self.check()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _more(self, endless: Saboteur) -> str:
        times = f"header_timeout = {self.header_timeout}\nbody_timeout = {self.body_timeout}\n"
        return (
            f"[server]\n{times}max_body = {self.max_body}\n"
            f'[backends.endless]\nkind = "openai"\nurl = "{endless.url}"\n'
            f'[models.{self.flood}]\nbackend = "endless"\nmodel = "{self.flood}"\n'
        )

    @property
    def port(self) -> int:
        """Where the daemon listens, on 127.0.0.1."""
        return self.portway.port

    def check(self) -> Counts:
        """Ask for an answer, plain and streamed; what the daemon holds. Raises AssertionError if it isn't right."""
        plain = self.portway.chat(self.models[0])
        hold(plain.status == 200, plain)
        hold(plain.headers.get("x-served-by") == self.models[0], plain)
        hold(plain.json["choices"][0]["message"]["content"] != "", plain)
        streamed = self.portway.chat(self.models[0], stream=True)
        hold(streamed.status == 200, streamed)
        hold(streamed.body.endswith(b"data: [DONE]\n\n"), streamed)
        return self.portway.counts()

    def settled(self, before: Counts) -> Counts:
        """Wait until the daemon holds no more threads and descriptors than `before`, at most SETTLED seconds;
        what it holds then. Raises AssertionError if it goes on holding more."""

        def is_back() -> bool:
            now = self.portway.counts()
            return (now.threads or 0) <= (before.threads or 0) and (now.fds or 0) <= (before.fds or 0)

        wait_for(is_back, lambda: f"it held {before} before, and now {self.portway.counts()}", SETTLED)
        return self.portway.counts()


def _endlessly(say: Speech) -> Iterator[Action]:
    """A stream as fast as it is read."""
    yield say.until("after")
    more = chunked([say.content("x" * 8000)] * 8)
    while True:
        yield more


def chain_toml(urls: Sequence[str]) -> str:
    """A models.toml: World.models, one behind each of two stand-ins; the first falls back to the second."""
    first, second = World.models
    return f"""
[memory]
enabled = false
[backends.one]
kind = "ollama"
url = "{urls[0]}"
[backends.two]
kind = "ollama"
url = "{urls[1]}"
[models.{first}]
backend = "one"
model = "model-a"
fallback = ["{second}"]
[models.{second}]
backend = "two"
model = "model-a"
"""


def hold(true: bool, seen: object) -> None:
    """Raises AssertionError, with what was `seen`, if something is not `true`; python -O leaves it in."""
    if not true:
        raise AssertionError(str(seen)[:2000])


def call(
    port: int,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = PATIENCE,
) -> Answer:
    """One request to 127.0.0.1:`port` on a connection of its own. Raises OSError, http.client.HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        kind = {"Content-Type": "application/json"} if body is not None else {}
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {**kind, **(headers or {})})
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, fields, response.read())
    finally:
        connection.close()


def counts(pid: int) -> Counts:
    """What a process holds, as /proc tells it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        fds = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - the names alone, without a Path for each
    except OSError:
        return Counts(None, None, None)
    found = {name: int(value) for name, value in re.findall(r"^(Threads|VmRSS):\s+(\d+)", status, re.MULTILINE)}
    return Counts(found.get("Threads"), fds, found.get("VmRSS", 0) * 1024)


def open_files(pid: int) -> list[str]:
    """What each descriptor of a process is; [] where the system doesn't tell."""
    found = []
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found.append(str(descriptor.readlink()))
            except FileNotFoundError:
                pass  # closed meanwhile
    except OSError:
        return []
    return found


def wait_for(done: Callable[[], bool], what: Callable[[], str], timeout: float = PATIENCE) -> None:
    """Wait until `done()`, by asking it again and again. Raises AssertionError with `what()`."""
    until = time.monotonic() + timeout
    while not done():
        if time.monotonic() > until:
            raise AssertionError(what())
        time.sleep(0.01)
