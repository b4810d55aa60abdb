"""Connections to a backend: pooled, kept alive, raw.

A `Pool` per backend sends a request's bytes and hands back a `Reply` whose body is read piece by
piece. Every wait goes through a `Watch`, so that it also ends when the client leaves, and through
a `Patience`, so that it ends in time and says which limit it was. Knows HTTP/1.1 framing, no
JSON and no models. Errors of the operating system become BackendError here and nowhere else.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from portway.errors import BackendError, ClientGone
from portway.http1 import MAX_HEAD, BadMessage, ChunkedDecoder, ResponseHead, parse_response

if TYPE_CHECKING:
    import ssl

    from portway.call import Limits, Watch
    from portway.config import Backend

RECEIVE = 65_536  # bytes asked of one recv(); a local server's answer mostly comes in one
MAX_PLAIN = 256 * 1024 * 1024  # bytes of one plain answer; a batch of embeddings can be large
MAX_IDLE_AGE = 60.0  # seconds a pooled connection may lie unused
REST = 0.05  # seconds after a stream within which a server that closes the connection has done so
RESET_MS = 20  # how long a reset may lag behind the end of a connection
SETTLE = 0.05  # seconds given to the closing bytes behind a whole answer
KEEP_ALIVE_MARGIN = 1.0  # seconds before the end of `Keep-Alive: timeout=5` at which we stop trusting it


class Patience:
    """How long one attempt may keep its reader waiting, and what it is called when it does not.

    Before the first content: `first_token` from the start, and `answer_by`. After it (`content()`
    says so): `idle` since the last piece, and the deadline. `plain` is for an answer that comes in
    one piece, of which nothing can be known but whether it came by `answer_by`.
    """

    __slots__ = ("_limits", "_plain", "_seen_content", "_started")

    def __init__(self, limits: Limits, *, plain: bool = False) -> None:
        self._limits = limits
        self._plain = plain
        self._started = time.monotonic()
        self._seen_content = False

    def content(self) -> None:
        """The first content is in."""
        self._seen_content = True

    def last_call(self, until: float) -> None:
        """Nothing more is needed; wait until then at most."""
        self._limits = replace(self._limits, deadline=min(until, self._limits.deadline))
        self._seen_content = True

    def until(self) -> float:
        """When the present wait must end, as time.monotonic() counts."""
        limits = self._limits
        if self._seen_content:
            return min(time.monotonic() + limits.idle, limits.deadline)
        if self._plain:
            return limits.answer_by
        return min(self._started + limits.first_token, limits.answer_by)

    def expired(self) -> BackendError:
        """The error for the limit that has passed."""
        limits = self._limits
        waited = time.monotonic() - self._started
        if not self._seen_content:
            reason = "answer_timeout" if self._plain else "first_token_timeout"
            return BackendError(reason, f"no answer within {waited:.1f} s")
        if time.monotonic() >= limits.deadline:
            return BackendError("total_timeout", f"the answer was not complete after {waited:.1f} s")
        return BackendError("idle_timeout", f"the answer stopped for {limits.idle:g} s")


class Reply:
    """An answer whose head is in. Read it with `read` or `read_all`, then `close`."""

    __slots__ = ("_buffer", "_chunks", "_complete", "_connection", "_left", "_patience", "_watch", "head")

    def __init__(
        self, connection: _Connection, head: ResponseHead, buffer: bytes, watch: Watch, patience: Patience
    ) -> None:
        self.head = head
        self._connection = connection
        self._buffer = buffer  # received, not decoded
        self._watch = watch
        self._patience = patience
        self._chunks = ChunkedDecoder() if head.chunked else None
        self._left = head.length
        self._complete = head.length == 0

    def read(self) -> bytes:
        """The next bytes of the body, as many as are there; b"" at its end.

        Raises BackendError (`connection_lost` when it ends before its end) and ClientGone.
        """
        while not self._complete:
            data, self._buffer = self._buffer, b""
            if not data:
                data = self._connection.receive(self._watch, self._patience)
                if not data:
                    self._at_eof()
                    break
            payload = self._decode(data)
            if payload:
                return payload
        return b""

    def read_all(self, limit: int = MAX_PLAIN) -> bytes:
        """The rest of the body. Raises like `read`, and `bad_answer` past `limit` bytes."""
        first = self.read()
        if self._complete:
            return first
        parts, size = [first], len(first)
        while part := self.read():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise BackendError("bad_answer", f"the answer is longer than {limit} bytes")
        return b"".join(parts)

    def settle(self, seconds: float = SETTLE) -> None:
        """The answer is whole; read the body's closing bytes if they are there or come at once, so
        that the connection can be kept."""
        self._patience.last_call(time.monotonic() + seconds)
        try:
            while self.read():
                pass
        except (BackendError, ClientGone):
            return  # the connection is not kept, that is all

    def close(self) -> None:
        """Back to the pool if the body was read to its end, else closed: that cancels it."""
        if self._complete and self.head.keep_alive and not self._buffer:
            self._connection.release(self.head)
        else:
            self._connection.close()

    def _decode(self, data: bytes) -> bytes:
        if self._chunks is not None:
            try:
                payload = self._chunks.feed(data)
            except BadMessage as exc:
                raise BackendError("bad_answer", f"the answer's chunked coding is broken: {exc}") from exc
            if self._chunks.done:
                self._complete, self._buffer = True, self._chunks.rest
            return payload
        if self._left is None:
            return data
        payload, self._buffer = data[: self._left], data[self._left :]
        self._left -= len(payload)
        self._complete = self._left == 0
        return payload

    def _at_eof(self) -> None:
        if self._chunks is not None or self._left is not None:
            raise BackendError("connection_lost", "the connection was closed in the middle of the answer")
        self._complete = True


class Pool:
    """The connections to one backend.

    Idle ones lie in a deque, used last in, first out; its append and pop are atomic, so no lock.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._idle: deque[_Connection] = deque()
        self._tls: ssl.SSLContext | None = None
        self._closed = False
        self.keeps_streams = False  # whether the server has shown that it keeps a connection after a stream

    def exchange(self, request: bytes, limits: Limits, watch: Watch, patience: Patience) -> Reply:
        """Send one request and return once its answer's head is in.

        A pooled connection that the server has closed meanwhile is replaced; nothing is ever sent
        twice that may have been worked on (see `_Connection.send_request`). Raises BackendError
        and ClientGone.
        """
        while True:
            connection = self._take() or self._connect(limits, watch)
            try:
                head, rest = connection.send_request(request, watch, patience)
            except _Stale:
                connection.close()
                continue
            except BaseException:
                connection.close()
                raise
            return Reply(connection, head, rest, watch, patience)

    def give_back(self, connection: _Connection) -> None:
        """Keep it for the next request; one that must rest first behind those that need not."""
        if self._closed or len(self._idle) >= self._backend.max_idle:
            connection.close()
        elif connection.rests():
            self._idle.appendleft(connection)
        else:
            self._idle.append(connection)

    def close(self) -> None:
        """Close the idle connections; those in use are closed as they come back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> _Connection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.rests():
                self._idle.append(connection)
                return None
            usable = connection.is_usable()
            if connection.streamed:
                self.keeps_streams = usable
            if usable:
                return connection
            connection.close()

    def _connect(self, limits: Limits, watch: Watch) -> _Connection:
        until = min(time.monotonic() + limits.connect, limits.answer_by)
        error: BackendError | None = None
        for family, address in self._addresses(watch, until):
            try:
                return _Connection(self, self._open(family, address, watch, until))
            except BackendError as exc:
                error = exc
        raise error or self._unreachable("the name has no address")

    def _open(self, family: int, address: tuple[str, int], watch: Watch, until: float) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._connecting():
                code = sock.connect_ex(address)
                if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
                    if not watch.writable(sock, until):
                        raise BackendError("connect_timeout", self._said("did not answer in time"))
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
                return self._secure(sock, watch, until) if self._backend.scheme == "https" else sock
        except BaseException:
            sock.close()
            raise

    def _secure(self, sock: socket.socket, watch: Watch, until: float) -> socket.socket:
        import ssl  # 15 ms to import, and local servers speak plain HTTP

        if self._tls is None:
            self._tls = ssl.create_default_context()
        secure = self._tls.wrap_socket(sock, server_hostname=self._backend.host, do_handshake_on_connect=False)
        while True:
            try:
                secure.do_handshake()
            except ssl.SSLWantReadError:
                done = watch.readable(secure, until)
            except ssl.SSLWantWriteError:
                done = watch.writable(secure, until)
            else:
                return secure
            if not done:
                secure.close()
                raise BackendError("connect_timeout", self._said("did not finish the TLS handshake in time"))

    def _addresses(self, watch: Watch, until: float) -> list[tuple[int, tuple[str, int]]]:
        """Where to connect to. "localhost" is both loopbacks, whatever the resolver makes of it:
        servers listen on one of them and resolvers prefer either (llama-swap#84)."""
        host, port = self._backend.host, self._backend.port
        if host == "localhost":
            return [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port))]
        if ":" in host:
            return [(socket.AF_INET6, (host, port))]
        if host.replace(".", "").isdigit():
            return [(socket.AF_INET, (host, port))]
        return self._resolve(host, port, watch, until)

    def _resolve(self, host: str, port: int, watch: Watch, until: float) -> list[tuple[int, tuple[str, int]]]:
        """getaddrinfo() can't be given a limit, so a thread asks it and a socket says when it knows."""
        found: list[tuple[int, tuple[str, int]]] = []
        problem: list[OSError] = []
        here, there = socket.socketpair()

        def ask() -> None:
            try:
                for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                    found.append((family, (str(address[0]), port)))
            except OSError as exc:
                problem.append(exc)
            finally:
                there.close()

        with here:
            threading.Thread(target=ask, name=f"portway-resolve-{host}", daemon=True).start()
            if not watch.readable(here, until):
                raise BackendError("connect_timeout", self._said("has a name that did not resolve in time"))
        if problem:
            raise self._unreachable(str(problem[0].strerror or problem[0])) from problem[0]
        return found

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:  # ssl.SSLError is one
            raise self._unreachable(str(exc.strerror or exc), exc.errno) from exc

    def _unreachable(self, why: str, code: int | None = None) -> BackendError:
        way_out = f"start {self._backend.name}, or correct backends.{self._backend.name}.url"
        if code == errno.EHOSTUNREACH and not self._backend.host.startswith("127."):
            # macOS 15+ blocks Python under launchd from the LAN with this very errno
            way_out += "; on macOS allow Local Network access for the program that runs Portway"
        return BackendError("connect_failed", self._said(f"can't be reached: {why}"), detail=why, way_out=way_out)

    def _said(self, what: str) -> str:
        return f"backend {self._backend.name} ({self._backend.url}) {what}"


class _Stale(Exception):
    """A pooled connection was closed by the server before it read our request."""


class _Connection:
    __slots__ = ("_pool", "_rests_until", "_reused", "_sock", "_usable_until", "streamed")

    def __init__(self, pool: Pool, sock: socket.socket) -> None:
        self._pool = pool
        self._sock = sock
        self._reused = False
        self._usable_until = 0.0
        self._rests_until = 0.0
        self.streamed = False  # its last answer was a stream

    def rests(self) -> bool:
        """Whether it is too soon to tell if the server keeps it. llama-server promises to, behind a
        stream, and then closes; a request that meets that end is read and dropped without an answer."""
        return self._rests_until > time.monotonic()

    def is_usable(self) -> bool:
        """Whether the server still keeps this idle connection open: nothing is there to be read."""
        if time.monotonic() > self._usable_until:
            return False
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return not poller.poll(0)

    def send_request(self, request: bytes, watch: Watch, patience: Patience) -> tuple[ResponseHead, bytes]:
        """Send, then read the answer's head; also the bytes that came behind it.

        Raises _Stale when a reused connection turns out reset before a single byte of an answer.
        A reset then means that the server's kernel threw our bytes away unread, so that sending
        them again is safe. A clean end instead means that the program did read them: then the
        request may have been worked on, and it is an error.
        """
        try:
            self._send(request, watch, patience)
            data = self.receive(watch, patience)
        except _Reset as exc:
            if self._reused:
                raise _Stale from exc
            raise self._lost(exc) from exc
        if not data:
            if self._reused and self._is_reset():
                raise _Stale
            raise BackendError("connection_lost", "the connection was closed before an answer")
        return self._read_head(data, watch, patience)

    def receive(self, watch: Watch, patience: Patience) -> bytes:
        """What has come in; b"" at the connection's end. Raises BackendError and ClientGone."""
        sock = self._sock
        while True:
            until = patience.until()
            if not self._has_decrypted() and not watch.readable(sock, until):
                raise patience.expired()
            try:
                return sock.recv(RECEIVE)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as exc:
                if _wants_more(exc):
                    continue
                raise _Reset(str(exc.strerror or exc)) from exc

    def _is_reset(self) -> bool:
        """Whether a reset follows, or soon follows, the end that was just read: the server had closed
        before our request reached it."""
        poller = select.poll()
        poller.register(self._sock, 0)  # errors are reported unasked
        return bool(poller.poll(RESET_MS))

    def release(self, head: ResponseHead) -> None:
        """Lay it in the pool, for as long as the server says that it keeps it."""
        seconds = MAX_IDLE_AGE
        keep_alive = head.headers.get("keep-alive")
        if keep_alive is not None:
            seconds = min(seconds, _keep_alive_timeout(keep_alive) - KEEP_ALIVE_MARGIN)
        now = time.monotonic()
        self._usable_until = now + seconds
        self.streamed = "event-stream" in head.headers.get("content-type", "")
        self._rests_until = now + REST if self.streamed and not self._pool.keeps_streams else 0.0
        self._reused = True
        self._pool.give_back(self)

    def close(self) -> None:
        self._sock.close()

    def _has_decrypted(self) -> bool:
        pending = getattr(self._sock, "pending", None)  # only TLS sockets have one
        return pending is not None and pending() > 0

    def _send(self, request: bytes, watch: Watch, patience: Patience) -> None:
        view = memoryview(request)
        while view:
            try:
                sent = self._sock.send(view)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as exc:
                if not _wants_more(exc):
                    raise _Reset(str(exc.strerror or exc)) from exc
                sent = 0
            view = view[sent:]
            if view and not watch.writable(self._sock, patience.until()):
                raise patience.expired()

    def _read_head(self, data: bytes, watch: Watch, patience: Patience) -> tuple[ResponseHead, bytes]:
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD:
                    raise BackendError("bad_answer", f"the answer's head is longer than {MAX_HEAD} bytes")
                more = self.receive(watch, patience)
                if not more:
                    raise BackendError("connection_lost", "the connection was closed inside the answer's head")
                data += more
                continue
            try:
                head = parse_response(data[:end])
            except BadMessage as exc:
                raise BackendError("bad_answer", f"the answer is not HTTP: {exc}") from exc
            data = data[end + 4 :]
            if head.status >= 200:
                return head, data
            # 100 Continue and 103 Early Hints: the real head follows

    def _lost(self, exc: _Reset) -> BackendError:
        return BackendError("connection_lost", f"the connection was lost before an answer: {exc.detail}")


class _Reset(BackendError):
    """The connection broke under a send or a receive."""

    def __init__(self, why: str) -> None:
        super().__init__("connection_lost", f"the connection broke: {why}", detail=why)


def _wants_more(exc: OSError) -> bool:
    """Whether a TLS socket only says that it needs the network first (SSLWantRead, SSLWantWrite)."""
    return type(exc).__name__ in ("SSLWantReadError", "SSLWantWriteError")


def _keep_alive_timeout(value: str) -> float:
    """Seconds in `Keep-Alive: timeout=5, max=100`; MAX_IDLE_AGE if it has none."""
    for word in value.split(","):
        name, _, number = word.strip().partition("=")
        if name.lower() == "timeout" and number.isdigit():
            return float(number)
    return MAX_IDLE_AGE
