"""The ways in which the stand-in can be told to misbehave, and when each of them strikes.

A Fault is told to a model (or a path, or everything) and used up by the requests in their order.
Nothing here decides what a right answer would have been.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from portway.standin.protocol import BUSY, encode
from portway.standin.wire import Wire

# kind -> what it does. "instead": the answer never begins. "within": while a stream is under way,
# after `after` pieces of content (for stream: false, within or instead of the one body).
# "over all": the answer is right, but slow or empty.
KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "reset": ("instead", "RST before any byte"),
        "close": ("instead", "FIN before any byte"),
        "status": ("instead", '`status` with `body`, or {"error": `error`}, and `headers`'),
        "garbage": ("instead", "bytes that are not HTTP"),
        "html": ("instead", "200 with an HTML page"),
        "empty": ("instead", "200 with no body at all"),
        "bad_json": ("instead", "200 application/json that is not JSON"),
        "wrong_length": ("instead", "a Content-Length larger than the body, then FIN"),
        "hang": ("instead", "nothing, not even a head; goes on when released"),
        "hang_after_headers": ("within", "the head, then nothing; goes on when released"),
        "hang_before_content": ("within", "the head and lines without content, then nothing; goes on when released"),
        "hang_mid_stream": ("within", "some content, then nothing; goes on when released"),
        "error_line": ("within", 'a line {"error": `error`}, then a proper end'),
        "eof": ("within", "a proper end of the stream, but no line says done"),
        "cut": ("within", "FIN between two lines, the chunked coding unfinished"),
        "reset_mid_stream": ("within", "RST between two lines"),
        "half_line": ("within", "half a line, then a proper end"),
        "half_utf8": ("within", "half of a character, then FIN"),
        "bad_line": ("within", "a line that is not JSON, then a proper end"),
        "empty_answer": ("over all", "a proper answer without content"),
        "slow_headers": ("over all", "the head byte by byte, `seconds` apart"),
        "slow_tokens": ("over all", "`seconds` before every token"),
        "slow_load": ("over all", "the model takes `seconds` to load"),
    }
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to fail; `kind` is a key of KINDS, which says what the other fields are for."""

    kind: str
    status: int = 500
    error: str = "an error was encountered while running the model: unexpected EOF"  # as when its runner dies
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 2  # pieces of content that still get through
    seconds: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of fault {self.kind!r}; there are: {', '.join(KINDS)}")

    @property
    def instead(self) -> bool:
        """It takes the answer's place."""
        return KINDS[self.kind][0] == "instead"

    @property
    def within(self) -> bool:
        """It strikes when the answer is under way."""
        return KINDS[self.kind][0] == "within"

    @property
    def hangs(self) -> bool:
        """It waits, and can be gone on from."""
        return self.kind.startswith("hang")

    @property
    def strikes_after(self) -> int:
        """How many pieces of content go out first; -1 = not even a line without content."""
        return {"hang_after_headers": -1, "hang_before_content": 0}.get(self.kind, self.after)


# What Portway calls a failure -> a fault that makes it fail so, for a command line.
PRESETS: Mapping[str, Fault] = MappingProxyType(
    {
        "connection_lost": Fault("reset"),
        "bad_answer": Fault("garbage"),
        "loading_timeout": Fault("slow_load", seconds=86400.0),
        "busy": Fault("status", status=503, error=BUSY),
        "rate_limited": Fault("status", status=429, error="too many requests", headers={"Retry-After": "2"}),
        "server_error": Fault("status", status=500, error="llama runner process has terminated: signal: killed"),
        "first_token_timeout": Fault("hang_before_content"),
        "idle_timeout": Fault("hang_mid_stream"),
        "model_not_found": Fault("status", status=404, error="model not found"),
        "backend_auth": Fault("status", status=401, error="unauthorized"),
        "context_length_exceeded": Fault("status", status=400, error="the input length exceeds the context length"),
        "bad_request": Fault("status", status=400, error="invalid options"),
        "template_error": Fault("status", status=500, error='template: :3:22: executing "" at <.Tools>: error'),
        "stream_broken": Fault("cut"),
    }
)


def named(text: str) -> Fault:
    """A fault by name: a key of KINDS or of PRESETS, or a bare HTTP status. Raises ValueError."""
    if text.isdecimal():
        return Fault("status", status=int(text), error=f"the stand-in was told to answer {text}")
    return PRESETS[text] if text in PRESETS else Fault(text)


class Script:
    """Which request fails how. A key is a model's name, a path ("/api/tags") or "*" for all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _faults
        self._faults: dict[str, deque[tuple[Fault, int | None]]] = {}

    def add(self, key: str, fault: Fault, times: int | None) -> None:
        """Append; times None = from then on always."""
        with self._lock:
            self._faults.setdefault(key, deque()).append((fault, times))

    def clear(self, key: str | None) -> None:
        """Forget what is left for `key`, or for all."""
        with self._lock:
            if key is None:
                self._faults.clear()
            else:
                self._faults.pop(key, None)

    def take(self, *keys: str) -> Fault | None:
        """The next fault for a request that goes by these keys, the first one that has any."""
        with self._lock:
            for key in keys:
                if waiting := self._faults.get(key):
                    fault, times = waiting.popleft()
                    if times is None or times > 1:
                        waiting.appendleft((fault, None if times is None else times - 1))
                    return fault
        return None


def play_instead(fault: Fault, wire: Wire) -> None:
    """Answer a request with nothing but the fault. Raises HungUp where the connection ends with it."""
    match fault.kind:
        case "reset":
            wire.reset()
        case "close":
            wire.hang_up()
        case "status":
            body = fault.body if fault.body is not None else encode({"error": fault.error})
            wire.respond(fault.status, "application/json; charset=utf-8", body, fault.headers)
        case "garbage":
            wire.send(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
            wire.hang_up()
        case "html":
            wire.respond(200, "text/html; charset=utf-8", b"<!doctype html><title>Sign in</title><p>Sign in first.")
        case "empty":
            wire.respond(200, "application/json; charset=utf-8", b"")
        case "bad_json":
            wire.respond(200, "application/json; charset=utf-8", b'{"model": oops')
        case "wrong_length":
            wire.respond(200, "application/json", b'{"model":"', {"Content-Length": "4096"})
            wire.hang_up()


def end_stream(fault: Fault, wire: Wire, line: bytes) -> None:
    """End a stream that is under way; `line` is the one that would have come next, with its newline.
    Hanging is not done here, since it can be gone on from."""
    match fault.kind:
        case "error_line":
            wire.chunk(encode({"error": fault.error}) + b"\n")
        case "bad_line":
            wire.chunk(b'{"model": oops\n')
        case "half_line":
            wire.chunk(line[: len(line) // 2])
        case "half_utf8":
            wire.chunk(_half_character(line))
            wire.hang_up()
        case "cut":
            wire.hang_up()
        case "reset_mid_stream":
            wire.reset()
    wire.finish()


def spoil_whole(fault: Fault, wire: Wire, answer: Mapping[str, Any]) -> None:
    """The same for the one body of stream: false."""
    body = encode(answer)
    match fault.kind:
        case "error_line":
            wire.respond(500, "application/json; charset=utf-8", encode({"error": fault.error}))
            return
        case "bad_line":
            wire.respond(200, "application/json; charset=utf-8", b'{"model": oops')
            return
        case "eof":  # Ollama's own form of it, when it stops a model that repeats itself
            never_done = {k: v for k, v in answer.items() if k in ("model", "created_at", "message", "response")}
            wire.respond(200, "application/json; charset=utf-8", encode({**never_done, "done": False}))
            return
        case "half_line":
            wire.respond(200, "application/json; charset=utf-8", body[: len(body) // 2])
            return
        case "half_utf8":
            half = _half_character(body)
        case _:
            half = body[: len(body) // 2]
    wire.respond(200, "application/json; charset=utf-8", half, {"Content-Length": str(len(body))})
    wire.reset() if fault.kind == "reset_mid_stream" else wire.hang_up()


def _half_character(data: bytes) -> bytes:
    """`data` up to where its text begins, and there the first byte of a two-byte character."""
    text = re.search(rb'"(content|response)":"', data)
    return data[: text.end() if text else 1] + "\u00e9".encode()[:1]
