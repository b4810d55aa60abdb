"""Scripted peers for tests, on raw sockets: a server that plays exact bytes, a client that reads them.

Nothing here understands Portway. `ScriptedServer` is a backend reduced to what it sends and when;
`RawClient` is a client that sees every byte. Every wait is bounded, and nothing sleeps.
"""

from __future__ import annotations

import itertools
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

PATIENCE = 10.0  # seconds; no wait in a test may take longer than this


# --- what a server can be told to do ---------------------------------------------------------


class Close:
    """Close the connection in an orderly way (FIN)."""


class Reset:
    """Abort the connection (RST)."""


class Hang:
    """Do nothing until ScriptedServer.release(), the peer's leaving, or the end of the server."""


class HalfClose:
    """Send FIN but go on reading."""


@dataclass(frozen=True)
class Bytewise:
    """Send `data` one byte a time, each in a packet of its own as far as the kernel goes along."""

    data: bytes


@dataclass(frozen=True)
class OnAccept:
    """A step that is played as soon as a connection is accepted, before any request is read."""

    actions: Sequence[Action]


CLOSE = Close()
RESET = Reset()
HANG = Hang()
HALF_CLOSE = HalfClose()

# An Event is waited for, which is how a test decides when the next piece is sent.
Action = bytes | Bytewise | threading.Event | Close | Reset | Hang | HalfClose
Step = bytes | Sequence[Action] | OnAccept | Callable[["ScriptedRequest"], "bytes | Sequence[Action]"]


# --- replies ---------------------------------------------------------------------------------


def http_reply(
    body: bytes,
    *,
    status: int = 200,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
    keep_alive: bool = True,
) -> bytes:
    """One whole response with a Content-Length."""
    fields = {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
    return _head(status, fields, keep_alive) + body


def json_reply(
    obj: Any, status: int = 200, headers: Mapping[str, str] | None = None, *, keep_alive: bool = True
) -> bytes:
    """One whole response that carries `obj` as JSON."""
    return http_reply(json.dumps(obj).encode(), status=status, headers=headers, keep_alive=keep_alive)


def sse_body(
    payloads: Iterable[Mapping[str, Any] | bytes],
    *,
    done: bool = True,
    comments: Sequence[str] = (),
    crlf: bool = False,
) -> list[bytes]:
    """The events of a stream, one item each. A payload that is bytes is taken as it is, as a whole frame.

    comments: comment frames (`: text`) ahead of the first event. done: end with `data: [DONE]`.
    """
    end = b"\r\n\r\n" if crlf else b"\n\n"
    events = [b": " + comment.encode() + end for comment in comments]
    events += [p if isinstance(p, bytes) else b"data: " + json.dumps(p).encode() + end for p in payloads]
    if done:
        events.append(b"data: [DONE]" + end)
    return events


def sse_reply(
    payloads: Iterable[Mapping[str, Any] | bytes],
    done: bool = True,
    *,
    keep_alive: bool = True,
    comments: Sequence[str] = (),
    chunk_sizes: int | Sequence[int] | None = None,
    crlf: bool = False,
    finish: bool = True,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A whole event stream in chunked coding.

    chunk_sizes: None = a chunk an event; a number or a list = the body cut into such chunks (a list
    is repeated). finish: send the last, empty chunk; without it the stream is cut off.
    """
    events = sse_body(payloads, done=done, comments=comments, crlf=crlf)
    return _stream_reply("text/event-stream", events, keep_alive, chunk_sizes, finish, headers)


def ndjson_reply(
    lines: Iterable[Mapping[str, Any] | bytes],
    *,
    keep_alive: bool = True,
    chunk_sizes: int | Sequence[int] | None = None,
    finish: bool = True,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A whole NDJSON stream in chunked coding, as Ollama sends it. bytes are taken as they are."""
    parts = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    return _stream_reply("application/x-ndjson", parts, keep_alive, chunk_sizes, finish, headers)


def stream_head(
    content_type: str = "text/event-stream", headers: Mapping[str, str] | None = None, *, keep_alive: bool = True
) -> bytes:
    """The head of a chunked response; go on with chunk(..) and LAST_CHUNK."""
    return _head(200, {"Content-Type": content_type, "Transfer-Encoding": "chunked", **(headers or {})}, keep_alive)


def chunk(data: bytes) -> bytes:
    """One chunk of chunked coding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def _stream_reply(
    content_type: str,
    parts: Sequence[bytes],
    keep_alive: bool,
    chunk_sizes: int | Sequence[int] | None,
    finish: bool,
    headers: Mapping[str, str] | None,
) -> bytes:
    pieces = parts if chunk_sizes is None else _cut(b"".join(parts), chunk_sizes)
    body = b"".join(chunk(piece) for piece in pieces if piece)
    return stream_head(content_type, headers, keep_alive=keep_alive) + body + (LAST_CHUNK if finish else b"")


def _cut(data: bytes, sizes: int | Sequence[int]) -> list[bytes]:
    pieces: list[bytes] = []
    start = 0
    for size in itertools.cycle([sizes] if isinstance(sizes, int) else sizes):
        if start >= len(data):
            return pieces
        pieces.append(data[start : start + size])
        start += size
    return pieces


def _head(status: int, fields: Mapping[str, str], keep_alive: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Status'}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    if not keep_alive:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# --- the server ------------------------------------------------------------------------------


@dataclass
class ScriptedRequest:
    """One request as it came. `raw` is head and body byte for byte; `body` is without chunked coding."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    raw: bytes
    connection: int
    at: float  # time.monotonic() when it was complete

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """The first such header's value."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass
class ScriptedConnection:
    """One accepted connection. `closed` is set once the peer closed or reset it, or a step did;
    `closed_at` says when."""

    number: int
    sock: socket.socket
    closed: threading.Event = field(default_factory=threading.Event)
    closed_at: float = 0.0  # time.monotonic()
    error: str = ""  # "" = FIN, else the OSError's name


class ScriptedServer:
    """A server on 127.0.0.1 that answers the n-th request with the n-th step of a script.

    A step is bytes, or a list of actions (bytes, Bytewise, Event, CLOSE, RESET, HANG, HALF_CLOSE), or
    OnAccept([...]), or a function of the request. When the script has run out, `then` is played
    for every further request (unless told otherwise a 500 that says so). Steps are taken in the
    order in which requests arrive, over all connections. Use it as a context manager.
    """

    def __init__(self, script: Iterable[Step] = (), *, then: Step | None = None) -> None:
        self._script: list[Step] = list(script)
        self._then = then if then is not None else json_reply({"error": {"message": "the script has run out"}}, 500)
        self._state = threading.Condition()  # guards everything below; notified on every change
        self._requests: list[ScriptedRequest] = []
        self._connections: list[ScriptedConnection] = []
        self._released = False
        self._stopped = False
        self._waiting: set[threading.Event] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, name="scripted-accept", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, *steps: Step) -> None:
        """Append to the script."""
        with self._state:
            self._script.extend(steps)

    @property
    def requests(self) -> list[ScriptedRequest]:
        """The complete requests so far."""
        with self._state:
            return list(self._requests)

    @property
    def connections(self) -> int:
        """How many connections were accepted so far."""
        with self._state:
            return len(self._connections)

    def connection(self, index: int) -> ScriptedConnection:
        """The index-th connection (0 = first), which must exist."""
        with self._state:
            return self._connections[index]

    def wait_requests(self, count: int, timeout: float = PATIENCE) -> list[ScriptedRequest]:
        """Wait until `count` requests are in and return all; AssertionError when they don't come."""
        with self._state:
            if not self._state.wait_for(lambda: len(self._requests) >= count, timeout):
                raise AssertionError(f"{len(self._requests)} of {count} requests within {timeout} s")
            return list(self._requests)

    def wait_connections(self, count: int, timeout: float = PATIENCE) -> None:
        """Wait until `count` connections were accepted; AssertionError when they weren't."""
        with self._state:
            if not self._state.wait_for(lambda: len(self._connections) >= count, timeout):
                raise AssertionError(f"{len(self._connections)} of {count} connections within {timeout} s")

    def wait_closed(self, index: int = 0, timeout: float = PATIENCE) -> float:
        """Wait until the peer closed connection `index`; returns when, as time.monotonic()."""
        self.wait_connections(index + 1, timeout)
        connection = self.connection(index)
        if not connection.closed.wait(timeout):
            raise AssertionError(f"connection {index} still open after {timeout} s")
        return connection.closed_at

    def release(self) -> None:
        """Let everything that hangs, now and later, go on to its next action."""
        with self._state:
            self._released = True
            self._state.notify_all()

    def stop(self) -> None:
        """Stop listening and drop every connection."""
        with self._state:
            self._stopped = True
            for event in self._waiting:
                event.set()
            connections = list(self._connections)
            self._state.notify_all()
        _shut(self._listener)  # wakes accept(), which close() alone does not everywhere
        self._listener.close()
        for connection in connections:
            _shut(connection.sock)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._state:
                if self._stopped:
                    sock.close()
                    return
                connection = ScriptedConnection(len(self._connections), sock)
                self._connections.append(connection)
                self._state.notify_all()
            arrived: queue.SimpleQueue[ScriptedRequest | None] = queue.SimpleQueue()
            for work in (self._read, self._play_all):
                threading.Thread(target=work, args=(connection, arrived), daemon=True).start()

    # A connection has two threads, so that the peer's leaving is seen, and timed, while a step is played.

    def _read(self, connection: ScriptedConnection, arrived: queue.SimpleQueue[ScriptedRequest | None]) -> None:
        reader = _Reader(connection.sock)
        try:
            while (request := _read_request(reader, connection)) is not None:
                with self._state:
                    self._requests.append(request)
                    self._state.notify_all()
                arrived.put(request)
        except OSError as exc:
            connection.error = type(exc).__name__
        connection.closed_at = time.monotonic()
        connection.closed.set()
        with self._state:
            self._state.notify_all()
        arrived.put(None)

    def _play_all(self, connection: ScriptedConnection, arrived: queue.SimpleQueue[ScriptedRequest | None]) -> None:
        try:
            with self._state:
                opening = self._script.pop(0) if self._script and isinstance(self._script[0], OnAccept) else None
            if isinstance(opening, OnAccept):
                self._play(connection, opening.actions)
            while (request := arrived.get()) is not None:
                self._play(connection, self._next_actions(request))
        except OSError:
            pass  # the peer left, or the connection was closed by an earlier action: nothing to play to
        finally:
            connection.sock.close()

    def _next_actions(self, request: ScriptedRequest) -> Sequence[Action]:
        with self._state:
            step = self._script.pop(0) if self._script else self._then
        if isinstance(step, OnAccept):
            step = step.actions
        elif callable(step):
            step = step(request)
        return [step] if isinstance(step, bytes) else step

    def _play(self, connection: ScriptedConnection, actions: Sequence[Action]) -> None:
        sock = connection.sock
        for action in actions:
            match action:
                case bytes():
                    sock.sendall(action)
                case Bytewise():
                    for index in range(len(action.data)):
                        sock.sendall(action.data[index : index + 1])
                case threading.Event():
                    self._await(action)
                case Hang():
                    self._hang(connection)
                case HalfClose():
                    sock.shutdown(socket.SHUT_WR)
                case Close():
                    _shut(sock)
                case Reset():
                    # A recv() in progress would hold the socket open and the RST back; SHUT_RD ends it
                    # without a word to the peer.
                    _shut(sock, socket.SHUT_RD)
                    connection.closed.wait(PATIENCE)
                    _reset(sock)

    def _hang(self, connection: ScriptedConnection) -> None:
        with self._state:
            self._state.wait_for(lambda: self._released or self._stopped or connection.closed.is_set(), PATIENCE)

    def _await(self, event: threading.Event) -> None:
        with self._state:
            if self._stopped:
                return
            self._waiting.add(event)
        event.wait(PATIENCE)
        with self._state:
            self._waiting.discard(event)


def _read_request(reader: _Reader, connection: ScriptedConnection) -> ScriptedRequest | None:
    """The next request, or None at the end of the connection (also in the middle of a request)."""
    reader.mark()
    line = reader.line()
    if line is None:
        return None
    method, _, rest = line.decode("latin-1").partition(" ")
    path, _, version = rest.partition(" ")
    headers = _read_headers(reader)
    if headers is None or not version:
        return None
    if any(name.lower() == "expect" for name, _ in headers):
        connection.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    pieces = list(_body_pieces(reader, headers, until_close=False))
    if pieces and pieces[-1] is None:
        return None
    body = b"".join(piece for piece in pieces if piece is not None)
    return ScriptedRequest(method, path, headers, body, reader.marked(), connection.number, time.monotonic())


# --- the client ------------------------------------------------------------------------------


@dataclass
class RawResponse:
    """One whole response. `complete` is False when the connection ended before the body did."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    complete: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """The first such header's value."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass(frozen=True)
class SseEvent:
    """One event (`data` joined by newlines) or one comment line (`comment`, without the colon and space)."""

    data: str | None = None
    comment: str | None = None

    @property
    def json(self) -> Any:
        assert self.data is not None
        return json.loads(self.data)


class RawClient:
    """A client on one raw connection. `where` is a port, "http://host:port.." or (host, port).

    Every read is bounded by `timeout` seconds and raises TimeoutError. Use it as a context manager.
    """

    def __init__(self, where: int | str | tuple[str, int], timeout: float = PATIENCE) -> None:
        self.sock = socket.create_connection(_address(where), timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = _Reader(self.sock)
        self._method = "GET"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send one request in one piece. A body that is not bytes goes as JSON."""
        self._method = method
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        host, port = self.sock.getpeername()[:2]
        fields = {"Host": f"{host}:{port}"}
        if body is not None:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(raw))}
        fields |= headers or {}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + raw)

    def head(self) -> RawResponse:
        """Read a response's head, 1xx included; its body is empty as yet. ConnectionError at the end."""
        line = self._reader.line()
        if line is None:
            raise ConnectionError("the server closed the connection before a response")
        version, status, *reason = line.decode("latin-1").split(" ", 2)
        if not version.startswith("HTTP/1."):
            raise ConnectionError(f"not HTTP: {line!r}")
        headers = _read_headers(self._reader)
        if headers is None:
            raise ConnectionError("the server closed the connection within the response's head")
        return RawResponse(int(status), reason[0] if reason else "", headers)

    def response(self) -> RawResponse:
        """Read one full response; 1xx ones are passed over."""
        response = self.head()
        while 100 <= response.status < 200:
            response = self.head()
        if self._method == "HEAD" or response.status in (204, 304):
            return response
        pieces = list(_body_pieces(self._reader, response.headers, until_close=True))
        response.complete = not (pieces and pieces[-1] is None)
        response.body = b"".join(piece for piece in pieces if piece is not None)
        return response

    def call(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> RawResponse:
        """request() and response() in one."""
        self.request(method, path, body, headers)
        return self.response()

    def pieces(self, head: RawResponse) -> Iterator[bytes]:
        """The body behind `head`, decoded, as it arrives. ConnectionError when it is cut off."""
        for piece in _body_pieces(self._reader, head.headers, until_close=True):
            if piece is None:
                raise ConnectionError("the body was cut off")
            yield piece

    def events(self, head: RawResponse) -> Iterator[SseEvent]:
        """The server-sent events behind `head`, each as soon as it is complete; comments too."""
        data: list[str] = []
        for line in _lines(self.pieces(head)):
            if line.startswith(":"):
                yield SseEvent(comment=line[1:].removeprefix(" "))
            elif line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            elif not line and data:
                yield SseEvent(data="\n".join(data))
                data = []

    def at_end(self) -> bool:
        """Wait for the next byte or the end of the connection; True at the end (FIN or RST)."""
        try:
            return self._reader.at_end()
        except ConnectionError:
            return True

    def half_close(self) -> None:
        """Send FIN, but go on reading."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Abort the connection (RST)."""
        _reset(self.sock)

    def close(self) -> None:
        self.sock.close()


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode()


# --- HTTP, as little as both need ------------------------------------------------------------


class _Reader:
    """Buffered reading from a socket. Everything returns None at the end of the connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._seen = bytearray()

    def mark(self) -> None:
        """From here on keep what is consumed, for marked()."""
        self._seen.clear()

    def marked(self) -> bytes:
        return bytes(self._seen)

    def line(self) -> bytes | None:
        """A line without its CRLF."""
        while (end := self._buffer.find(b"\n")) < 0:
            if not self._fill():
                return None
        return self._take(end + 1).rstrip(b"\r\n")

    def some(self, most: int) -> bytes | None:
        """Between 1 and `most` bytes."""
        if not self._buffer and not self._fill():
            return None
        return self._take(min(most, len(self._buffer)))

    def at_end(self) -> bool:
        return not self._buffer and not self._fill()

    def _fill(self) -> bool:
        data = self._sock.recv(65536)
        self._buffer += data
        return bool(data)

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._seen += data
        return data


def _read_headers(reader: _Reader) -> list[tuple[str, str]] | None:
    headers = []
    while line := reader.line():
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name, value.strip()))
    return None if line is None else headers


def _body_pieces(reader: _Reader, headers: Sequence[tuple[str, str]], *, until_close: bool) -> Iterator[bytes | None]:
    """The body's pieces as they arrive; a None at the end says that it was cut off."""
    fields = {name.lower(): value for name, value in headers}
    if "chunked" in fields.get("transfer-encoding", "").lower():
        yield from _chunked_pieces(reader)
    elif "content-length" in fields:
        yield from _counted_pieces(reader, int(fields["content-length"]))
    elif until_close:
        while (piece := reader.some(65536)) is not None:
            yield piece


def _chunked_pieces(reader: _Reader) -> Iterator[bytes | None]:
    while (line := reader.line()) is not None:
        size = int(line.split(b";")[0], 16)
        if size:
            yield from _counted_pieces(reader, size)
        end = reader.line()
        while not size and end:  # trailers
            end = reader.line()
        if end is None:
            break
        if not size:
            return
    yield None


def _counted_pieces(reader: _Reader, count: int) -> Iterator[bytes | None]:
    while count:
        piece = reader.some(count)
        if piece is None:
            yield None
            return
        count -= len(piece)
        yield piece


def _address(where: int | str | tuple[str, int]) -> tuple[str, int]:
    if isinstance(where, int):
        return "127.0.0.1", where
    if isinstance(where, str):
        host, _, port = where.removeprefix("http://").split("/")[0].rpartition(":")
        return host, int(port)
    return where


def _shut(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        pass  # the peer was faster, or it is a listener on a system where those can't be shut down


def _reset(sock: socket.socket) -> None:
    """Close with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
