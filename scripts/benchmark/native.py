"""The load generator and the upstream as commands: C through the system's compiler, else Python.

The C programs need Linux (epoll, timerfd). What they do and what they print stands at their heads; slow.py does the
same at a tenth of the speed, so that figures taken with it say little of a fast proxy, and the output says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GRACE = 45.0  # seconds that a load may take beyond its own; load.c gives its last answers 30


@dataclass(frozen=True, slots=True)
class Tools:
    """load, upstream: commands without their arguments. made_by: the compiler, or why there is none."""

    load: tuple[str, ...]
    upstream: tuple[str, ...]
    made_by: str
    native: bool


def build(folder: Path) -> Tools:
    """Both programs, compiled into `folder`; the Python ones where that can't be done."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    slow = (sys.executable, str(HERE / "slow.py"))
    if compiler is None or not sys.platform.startswith("linux"):
        why = "no C compiler" if compiler is None else "no epoll on this system"
        return Tools((*slow, "load"), (*slow, "upstream"), f"PYTHON, AS THERE IS {why.upper()}: SLOW", native=False)
    for name in ("load", "upstream"):
        command = [compiler, "-O2", "-Wall", "-o", str(folder / name), str(HERE / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            why = f"PYTHON, AS {compiler} FAILED: SLOW. {done.stderr[:200]}"
            return Tools((*slow, "load"), (*slow, "upstream"), why, native=False)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False)
    return Tools((str(folder / "load"),), (str(folder / "upstream"),), version.stdout.splitlines()[0], native=True)


# --- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """Who is asked, and how. model: as this one knows it. cpu_of: its process, if its processor time is to be told."""

    port: int
    model: str
    path: str = "/v1/chat/completions"
    headers: tuple[str, ...] = ()
    cpu_of: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of each target alike. size: bytes of the body. unique: no two prompts are the same.
    prompts: so many different ones, in turn."""

    size: int = 2048
    stream: bool = False
    unique: bool = False
    prompts: int = 1
    tools: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """How hard it is asked. count: answers at most, 0 = as many as fit `seconds`. fresh: a connection for each."""

    connections: int = 1
    seconds: float = 0.4
    count: int = 0
    fresh: bool = False
    ramp_ms: int = 0


_TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def requests(target: Target, ask: Ask) -> list[bytes]:
    """The requests as bytes, each `ask.size` of body but for the model's name."""
    return [_request(target, ask, number) for number in range(ask.prompts)]


def _request(target: Target, ask: Ask, number: int) -> bytes:
    mark = "#" * 16 if ask.unique else f"{number:016d}"
    asked: dict[str, Any] = {"model": target.model, "stream": ask.stream}
    if ask.tools:
        asked["tools"] = _TOOLS
    asked["messages"] = [{"role": "system", "content": "Answer."}, {"role": "user", "content": mark}]
    missing = ask.size - len(json.dumps(asked, separators=(",", ":")))
    text = ("The quick brown fox jumps over the lazy dog. " * (missing // 45 + 1))[: max(0, missing)]
    asked["messages"][1]["content"] = mark + text
    body = json.dumps(asked, separators=(",", ":")).encode()
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"Host: 127.0.0.1:{target.port}",
        "Accept: application/json",
        "User-Agent: bench",
        "Content-Type: application/json",
        *target.headers,
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


# --- asking ---------------------------------------------------------------------------------------


class LoadFailed(Exception):
    """The load generator could not do its work. str() says why."""


class Load:
    """A run of the load generator, in the background until `result`."""

    def __init__(self, tools: Tools, folder: Path, target: Target, ask: Ask, shape: Shape) -> None:
        file = folder / f"requests-{target.port}-{os.getpid()}.bin"
        file.write_bytes(b"".join(b"%d\n%b" % (len(each), each) for each in requests(target, ask)))
        numbers: Sequence[float] = (shape.connections, shape.seconds, shape.count, int(shape.fresh), shape.ramp_ms)
        command = [*tools.load, str(target.port), str(file), *map(str, numbers)]
        self._timeout = shape.seconds + shape.ramp_ms / 1000 + GRACE
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(self) -> dict[str, Any]:
        """What it printed (see load.c). Raises LoadFailed."""
        try:
            out, err = self._process.communicate(timeout=self._timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise LoadFailed("the load generator did not end") from None
        if self._process.returncode or not out:
            raise LoadFailed(f"the load generator ended with {self._process.returncode}: {err[-300:]}")
        result: dict[str, Any] = json.loads(out)
        result["problem"] = err.strip()
        return result
