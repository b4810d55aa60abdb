"""A client that sees every byte of an answer, and takes nothing on trust.

`Client.ask` reads one answer exactly as its framing says, to its last byte. What is more, or less, or no HTTP, is
`Broken`: whoever asks is to call it what it is. Nothing here knows Portway.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

PATIENCE = 30.0  # seconds that any single byte may keep us waiting
RECEIVE = 65_536


class Broken(Exception):
    """What came is no HTTP answer, or not the whole of one. `begun`: its status line was there."""

    def __init__(self, what: str, *, begun: bool = False) -> None:
        super().__init__(what)
        self.begun = begun


@dataclass(slots=True)
class Reply:
    """One whole answer. first, last: seconds until its first byte and its last one. Headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    first: float = 0.0
    last: float = 0.0
    comments: int = 0  # of a stream: heartbeats
    events: list[Any] = field(default_factory=list)  # of a stream: its data, parsed; "[DONE]" as that

    @property
    def is_stream(self) -> bool:
        """Whether it is an event stream."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def json(self) -> Any:
        """Its body. Raises Broken."""
        try:
            return json.loads(self.body)
        except ValueError as exc:
            raise Broken(f"{exc}: {self.body[:200]!r}", begun=True) from None

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """Of a stream: its events that are neither an error nor [DONE]."""
        return [event for event in self.events if isinstance(event, dict) and "error" not in event]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The envelopes in it."""
        if self.is_stream:
            return [event["error"] for event in self.events if isinstance(event, dict) and "error" in event]
        return [self.json["error"]] if self.status >= 400 and isinstance(self.json, dict) else []

    @property
    def text(self) -> str:
        """What the model said."""
        if self.is_stream:
            choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
            return "".join(choice["delta"].get("content") or "" for choice in choices)
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def is_done(self) -> bool:
        """Of a stream: whether it says that all went well, and says it last."""
        return self.events[-1:] == ["[DONE]"]

    def told(self, header: str, key: str) -> Any:
        """A fact that stands in `header`, or, where a heartbeat had sent the head before it was known, under
        `key` in the `portway` of an event."""
        if header in self.headers or not self.comments:
            return self.headers.get(header)
        found = [event["portway"] for event in self.events if isinstance(event, dict) and "portway" in event]
        return next((fields[key] for fields in found if key in fields), None)


class Client:
    """One connection to 127.0.0.1:`port`; `ask` as often as it is kept. on_event: called when some of a stream's
    data has come."""

    def __init__(self, port: int, patience: float = PATIENCE, on_event: Callable[[], None] | None = None) -> None:
        self._on_event = on_event
        self.sock = socket.create_connection(("127.0.0.1", port), patience)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._started = 0.0
        self._first = 0.0
        self.is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self.is_open = False
        self.sock.close()

    def ask(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Reply:
        """One request and its whole answer. Raises Broken, and OSError where the connection breaks."""
        self.send(method, path, body, headers)
        return self.read(method)

    def chat(
        self, model: str, text: str, *, stream: bool = False, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> Reply:
        """One chat completion."""
        return self.ask("POST", "/v1/chat/completions", chat_body(model, text, stream=stream, **fields), headers)

    def send(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> None:
        """The request alone."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        self._started, self._first = time.monotonic(), 0.0
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + data)

    def read(self, method: str = "POST") -> Reply:
        """The whole answer to what was sent last."""
        head = self._until(b"\r\n\r\n")
        status, headers = _read_head(head)
        body = b"" if method == "HEAD" or status in (204, 304) else self._body(headers)
        reply = Reply(status, headers, body, self._first, time.monotonic() - self._started)
        if reply.is_stream:
            read_events(reply)
        if headers.get("connection", "").lower() == "close":
            self._see_it_close()
        elif self.surplus():
            raise Broken(f"more came than the answer: {self._rest[:200]!r}", begun=True)
        return reply

    def surplus(self) -> bytes:
        """What has come beyond the last answer; b"" if nothing."""
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        if not self._rest and poller.poll(0):
            try:
                self._rest = self.sock.recv(RECEIVE, socket.MSG_DONTWAIT)
            except OSError:
                self.is_open = False
            if not self._rest:
                self.is_open = False
        return self._rest

    def begin(self) -> bytes:
        """Wait for the first bytes of an answer, which `read` then reads with the rest."""
        if not self._rest:
            self._more(b"an answer")
        return self._rest

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"]))
        if headers.get("connection", "").lower() != "close":
            raise Broken("nothing says where the body ends", begun=True)
        while self._more(b"the end"):
            pass
        body, self._rest = self._rest, b""
        return body

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self._until(b"\r\n")
            try:
                size = int(line, 16)
            except ValueError:
                raise Broken(f"no size of a chunk: {line[:80]!r}", begun=True) from None
            data = self._exactly(size + 2)
            if data[-2:] != b"\r\n":
                raise Broken(f"a chunk has another end: {data[-80:]!r}", begun=True)
            if not size:
                return
            yield data[:-2]

    def _until(self, end: bytes) -> bytes:
        while end not in self._rest:
            if not self._more(end):
                raise Broken(f"the connection ended after {self._rest[-200:]!r}", begun=end != b"\r\n\r\n")
        found, _, self._rest = self._rest.partition(end)
        return found

    def _exactly(self, count: int) -> bytes:
        while len(self._rest) < count:
            if not self._more(b"the rest"):
                raise Broken(f"the body is cut off after {self._rest[-200:]!r}", begun=True)
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    def _more(self, what: bytes) -> bool:
        """Receive something; False at the connection's end."""
        try:
            data = self.sock.recv(RECEIVE)
        except TimeoutError:
            waited = time.monotonic() - self._started
            raise Broken(f"nothing came after {waited:.1f} s, waiting for {what!r}", begun=bool(self._rest)) from None
        self._first = self._first or time.monotonic() - self._started
        self._rest += data
        self.is_open = bool(data)
        if self._on_event and b"data: {" in self._rest:
            self._on_event()
        return bool(data)

    def _see_it_close(self) -> None:
        try:
            more = self._rest or self.sock.recv(RECEIVE)
        except OSError:
            more = b""  # reset: it is closed
        if more:
            raise Broken(f"more came than the answer: {more[:200]!r}", begun=True)
        self.close()


def chat_body(model: str, text: str, *, stream: bool = False, **fields: Any) -> dict[str, Any]:
    """A chat completion's request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream, **fields}


def _read_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if version != "HTTP/1.1" or not rest[:3].isdecimal():
        raise Broken(f"no HTTP answer: {first[:200]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name.lower() in headers:
            raise Broken(f"no header, or one that was there already: {line[:200]!r}", begun=True)
        headers[name.lower()] = value.strip()
    return int(rest[:3]), headers


def read_events(reply: Reply) -> None:
    """Take a stream's body apart. Raises Broken if anything stands there that is neither event nor heartbeat."""
    rest = reply.body
    while rest:
        if rest.startswith(b":"):
            _, end, rest = rest.partition(b"\n")
            reply.comments += 1
            continue
        frame, end, rest = rest.partition(b"\n\n")
        if not frame.startswith(b"data: ") or b"\n" in frame or not end:
            raise Broken(f"no event: {frame[:200]!r}", begun=True)
        if reply.is_done or reply.errors:
            raise Broken(f"an event after the last one: {frame[:200]!r}", begun=True)
        data = frame.removeprefix(b"data: ")
        try:
            reply.events.append("[DONE]" if data == b"[DONE]" else json.loads(data))
        except ValueError as exc:
            raise Broken(f"{exc}: {data[:200]!r}", begun=True) from None
