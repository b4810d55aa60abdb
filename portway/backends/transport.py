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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from portway.errors import BackendError, ClientGone, NoThread, Stopping, let_go
from portway.loop import POLLIN, POLLOUT
from portway.watch import NoClient
from portway.wire.http1 import MAX_HEAD, BadMessage, ChunkedDecoder, Heads, ResponseHead, parse_response

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
GLANCE = 0.1  # seconds between two looks for an early answer, while a server does not take the rest of a request
KEEP_ALIVE_MARGIN = 1.0  # seconds before the end of `Keep-Alive: timeout=5` at which we stop trusting it


class Patience:
    """How long one attempt may keep its reader waiting, and what it is called when it does not.

    Before the first content: `first_token` from the start, and `answer_by`. After it: `idle` since the
    last content (`content()` says so each time; a server's pings are none), and the deadline. `plain`
    is for an answer in one piece, of which nothing can be known but whether it came by `answer_by`.
    """

    __slots__ = ("_heard", "_limits", "_started", "plain")

    def __init__(self, limits: Limits, *, plain: bool = False) -> None:
        self._limits = limits
        self.plain = plain
        self._started = time.monotonic()
        self._heard: float | None = None  # when the last content came

    def content(self) -> None:
        """Content is in."""
        self._heard = time.monotonic()

    def last_call(self, until: float) -> None:
        """Nothing more is needed; wait until then at most."""
        self._limits = self._limits._replace(deadline=min(until, self._limits.deadline))
        self._heard = time.monotonic()

    def until(self) -> float:
        """When the present wait must end, as time.monotonic() counts."""
        limits = self._limits
        if self._heard is not None:
            return min(self._heard + limits.idle, limits.deadline)
        if self.plain:
            return limits.answer_by
        return min(self._started + limits.first_token, limits.answer_by)

    def expired(self) -> BackendError:
        """The error for the limit that has passed."""
        limits = self._limits
        waited = time.monotonic() - self._started
        if self._heard is None:
            reason = "answer_timeout" if self.plain else "first_token_timeout"
            return BackendError(reason, f"no answer within {waited:.1f} s")
        if time.monotonic() >= limits.deadline:
            return BackendError("total_timeout", f"the answer was not complete after {waited:.1f} s")
        return BackendError("idle_timeout", f"the answer stopped for {limits.idle:g} s")


class Reply:
    """An answer whose head is in. Read it with `read` or `read_all`, then `close`."""

    __slots__ = ("_buffer", "_chunks", "_closed", "_complete", "_connection", "_left", "_patience", "_watch", "head")

    def __init__(
        self,
        connection: _Connection,
        head: ResponseHead,
        length: int | None,
        buffer: bytes,
        watch: Watch,
        patience: Patience,
    ) -> None:
        self.head = head
        self._connection = connection
        self._buffer = buffer  # received, not decoded
        self._watch = watch
        self._patience = patience
        self._chunks = ChunkedDecoder() if head.chunked else None
        self._left = length
        self._complete = length == 0
        self._closed = False

    async def read(self) -> bytes:
        """The next bytes of the body, as many as are there; b"" at its end.

        Raises BackendError (`connection_lost` when it ends before its end) and ClientGone.
        """
        while not self._complete:
            data, self._buffer = self._buffer, b""
            if not data:
                data = await self._connection.receive(self._watch, self._patience)
                if not data:
                    self._at_eof()
                    break
            payload = self._decode(data)
            if payload:
                return payload
        return b""

    async def read_all(self, limit: int = MAX_PLAIN) -> bytes:
        """The rest of the body. Raises like `read`, and `bad_answer` past `limit` bytes."""
        left = self._left
        if left is not None:
            if left > limit:
                raise _too_long(limit)
            if left == len(self._buffer):  # all of it came with the head
                data, self._buffer = self._buffer, b""
                self._left, self._complete = 0, True
                return data
        parts: list[bytes] = []
        size = 0
        while part := await self.read():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise _too_long(limit)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def settle(self, seconds: float = SETTLE) -> None:
        """The answer is whole; read the body's closing bytes if they are there or come at once, so
        that the connection can be kept. The client has all that it needs: it may leave meanwhile."""
        self._patience.last_call(time.monotonic() + seconds)
        while True:
            try:
                while await self.read():
                    pass
            except BackendError:
                pass  # the connection is not kept, that is all
            except (ClientGone, Stopping):
                try:
                    await self._watch.on_thread()
                except NoThread:
                    return  # nor then
                self._watch = NoClient()
                continue
            return

    def close(self) -> None:
        """Back to the pool if the body was read to its end, else closed: that cancels it. Once and for all:
        a connection in the pool twice would give one client another's answer."""
        if self._closed:
            return
        self._closed = True
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


def _too_long(limit: int) -> BackendError:
    return BackendError("bad_answer", f"the answer is longer than {limit} bytes")


# --- the pool -------------------------------------------------------------------------------------


class Pool:
    """The connections to one backend.

    Idle ones lie in a deque, used last in, first out; its append and pop are atomic, so no lock.
    """

    def __init__(self, backend: Backend) -> None:
        self._dialer = _Dialer(backend)
        self._max_idle = backend.max_idle
        self._idle: deque[_Connection] = deque()
        self.heads = Heads(parse_response)
        self._closed = False
        self.keeps_streams = False  # whether the server has shown that it keeps a connection after a stream

    async def exchange(self, request: bytes, limits: Limits, watch: Watch, patience: Patience) -> Reply:
        """Send one request and return once its answer's head is in.

        A pooled connection that the server has closed meanwhile is replaced; nothing is ever sent
        twice that may have been worked on (see `_Connection.ask`). Raises BackendError and ClientGone.
        """
        connection = self._take()
        if connection is not None:
            try:
                return await connection.ask(request, watch, patience)
            except _Stale:
                pass  # a fresh one can't be
        return await _Connection(self, await self._dialer.dial(limits, watch)).ask(request, watch, patience)

    def give_back(self, connection: _Connection) -> None:
        """Keep it for the next request; one that must rest first behind those that need not."""
        if len(self._idle) >= self._max_idle:
            connection.close()
        elif connection.rests_until:
            self._idle.appendleft(connection)
        else:
            self._idle.append(connection)
        if self._closed:  # asked last, so that none slips in behind close()
            self.close()

    def close(self) -> None:
        """Close the idle connections; those in use are closed as they come back."""
        self._closed = True
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                return  # another thread took the last one

    def _take(self) -> _Connection | None:
        now = time.monotonic()
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.rests_until > now:
                self._idle.append(connection)
                return None
            is_open = connection.is_open()
            if connection.streamed:
                self.keeps_streams = is_open
            if is_open and now < connection.usable_until:
                return connection
            connection.close()


# --- one connection -------------------------------------------------------------------------------


class _Stale(Exception):
    """A pooled connection was closed by the server before it read our request."""


class _Reset(BackendError):
    """The connection broke under a send or a receive."""

    def __init__(self, exc: OSError) -> None:
        why = str(exc.strerror or exc)
        super().__init__("connection_lost", f"the connection broke: {why}", detail=why)


class _Connection:
    """A connected socket that carries one exchange at a time."""

    __slots__ = (
        "_is_tls",
        "_pending",
        "_poller",
        "_pool",
        "_reused",
        "_sent_all",
        "_sock",
        "rests_until",
        "streamed",
        "usable_until",
    )

    def __init__(self, pool: Pool, sock: socket.socket) -> None:
        self._pool = pool
        self._sock = sock
        self._is_tls = hasattr(sock, "pending")
        # how many bytes the TLS layer holds decrypted: poll() does not know of them
        self._pending: Callable[[], int] = getattr(sock, "pending", int)
        self._poller = select.poll()
        self._poller.register(sock, POLLIN)
        self._reused = False
        self._sent_all = False  # else the server takes what it reads next for the rest of the last request
        self.usable_until = 0.0  # how long the server keeps it, as far as it says
        # it is too soon to tell if the server keeps it. llama-server promises to, behind a stream, and then
        # closes; a request that meets that end is read and dropped without an answer
        self.rests_until = 0.0
        self.streamed = False  # its last answer was a stream

    async def ask(self, request: bytes, watch: Watch, patience: Patience) -> Reply:
        """Send, then read the answer's head. Closes itself, whatever it raises.

        Raises _Stale when a reused connection turns out reset before a single byte of an answer.
        A reset then means that the server's kernel threw our bytes away unread, so that sending
        them again is safe. A clean end instead means that the program did read them: then the
        request may have been worked on, and it is an error.
        """
        try:
            try:
                await self._send(request, watch, patience)
                data = await self.receive(watch, patience)
            except _Reset as exc:
                data = self._last_words()
                if not data:
                    raise self._ended(was_reset=True) from exc
            if not data:
                raise self._ended(was_reset=self._reused and await self._is_reset(watch))
            return await self._reply(data, watch, patience)
        except BaseException:
            self.close()
            raise

    async def receive(self, watch: Watch, patience: Patience) -> bytes:
        """What has come in; b"" at the connection's end. Raises BackendError and ClientGone."""
        while True:
            if not (self._is_tls and self._pending()) and not await watch.readable(self._sock, _in_time(patience)):
                raise patience.expired()
            try:
                return self._sock.recv(RECEIVE)
            except OSError as exc:
                wanted = _wanted(exc, POLLIN)
                if not wanted:
                    raise _Reset(exc) from exc
            if wanted == POLLOUT and not await watch.writable(self._sock, _in_time(patience)):
                raise patience.expired()

    def release(self, head: ResponseHead) -> None:
        """Lay it in the pool, for as long as the server says that it keeps it."""
        if not self._sent_all:
            self.close()
            return
        now = time.monotonic()
        self.usable_until = now + MAX_IDLE_AGE
        self.rests_until = 0.0
        if "keep-alive" in head.headers:
            seconds = _keep_alive_timeout(head.headers["keep-alive"]) - KEEP_ALIVE_MARGIN
            self.usable_until = now + min(MAX_IDLE_AGE, seconds)
        self.streamed = "event-stream" in head.headers.get("content-type", "")
        if self.streamed and not self._pool.keeps_streams:
            self.rests_until = now + REST
        self._reused = True
        self._pool.give_back(self)

    def is_open(self) -> bool:
        """Whether the server still keeps this idle connection open: nothing is there to be read."""
        return not self._poller.poll(0) and not (self._is_tls and self._pending())

    def close(self) -> None:
        self._sock.close()

    async def _send(self, request: bytes, watch: Watch, patience: Patience) -> None:
        """All of it, or as much as the server wants: one that refuses a large request (400, 401, 413)
        answers before it has read it, and then closes or just reads no more."""
        until = _in_time(patience)
        self._sent_all = False
        view: memoryview | bytes = request
        while True:
            wanted = POLLOUT
            try:  # a stream's request goes out at once: to wait for others made its chunks later, and no more of them
                sent = await watch.send(self._sock, view) if patience.plain else self._sock.send(view)
                if sent == len(view):
                    self._sent_all = True
                    return
                view = memoryview(view)[sent:]
            except OSError as exc:
                wanted = _wanted(exc, POLLOUT)
                if not wanted:
                    raise _Reset(exc) from exc
            if self._is_answered():
                return
            wait = watch.writable if wanted == POLLOUT else watch.readable
            await wait(self._sock, min(until, time.monotonic() + GLANCE))
            until = _in_time(patience)

    def _is_answered(self) -> bool:
        """Whether something has come in. Under TLS that may be a session ticket, which is no answer."""
        return not self._is_tls and bool(self._poller.poll(0))

    def _last_words(self) -> bytes:
        """What came before the connection broke under our sending: it may be a refusal."""
        try:
            return self._sock.recv(RECEIVE)
        except OSError:
            return b""

    def _ended(self, *, was_reset: bool) -> Exception:
        """The exception for a connection that ended without a byte of an answer."""
        if self.streamed:
            self._pool.keeps_streams = False
        if self._reused and was_reset:
            return _Stale()
        how = "reset" if was_reset else "closed"
        return BackendError("connection_lost", f"the connection was {how} before an answer", detail=how)

    async def _is_reset(self, watch: Watch) -> bool:
        """Whether a reset follows, or soon follows, the end that was just read: the server had closed
        before our request reached it."""
        await _on_thread(watch)
        poller = select.poll()
        poller.register(self._sock, 0)  # Linux reports errors unasked; elsewhere this only waits
        poller.poll(RESET_MS)
        await watch.on_loop()
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    async def _rest_of_head(self, data: bytes, watch: Watch, patience: Patience) -> bytes:
        """`data` and what comes behind it, up to the end of a head at least."""
        while b"\r\n\r\n" not in data:
            if len(data) > MAX_HEAD:
                raise BackendError("bad_answer", f"the answer's head is longer than {MAX_HEAD} bytes")
            more = await self.receive(watch, patience)
            if not more:
                raise BackendError("connection_lost", "the connection was closed inside the answer's head")
            data += more
        return data

    async def _reply(self, data: bytes, watch: Watch, patience: Patience) -> Reply:
        """What begins with `data`, or at the end of that."""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                data = await self._rest_of_head(data, watch, patience)
                end = data.find(b"\r\n\r\n")
            if end > MAX_HEAD:
                raise BackendError("bad_answer", f"the answer's head is longer than {MAX_HEAD} bytes")
            try:
                head, length = self._pool.heads.read(data[:end])
            except BadMessage as exc:
                raise BackendError("bad_answer", f"the answer is not HTTP: {exc}") from exc
            data = data[end + 4 :]
            if head.status >= 200:
                if length is None or head.status in (204, 304):
                    length = head.length
                return Reply(self, head, length, data, watch, patience)
            if head.status == 101:
                raise BackendError("bad_answer", "the server changes to a protocol that nobody asked for")
            # 100 Continue and 103 Early Hints: the real head follows


async def _on_thread(watch: Watch) -> None:
    """For what takes some milliseconds: without a thread the others wait so long."""
    try:
        await watch.on_thread()
    except NoThread:
        return


def _in_time(patience: Patience) -> float:
    """When the next wait must end. Raises BackendError when it is over already, however much there is to
    be read: a server that never stops sending must not outlast its limits."""
    until = patience.until()
    if time.monotonic() >= until:
        raise patience.expired()
    return until


def _verifying() -> ssl.SSLContext:
    import ssl  # seldom needed: local servers speak plain HTTP

    return ssl.create_default_context()


def _wanted(exc: OSError, usual: int) -> int:
    """What a socket must wait for before the call can be made again, 0 if it has failed. A TLS socket
    may want the other direction than the call's own."""
    if isinstance(exc, BlockingIOError):
        return usual
    name = type(exc).__name__  # of the ssl module, which is imported only where it is needed
    return {"SSLWantReadError": POLLIN, "SSLWantWriteError": POLLOUT}.get(name, 0)


def _keep_alive_timeout(value: str) -> float:
    """Seconds in `Keep-Alive: timeout=5, max=100`; MAX_IDLE_AGE if it has none."""
    for word in value.split(","):
        name, _, number = word.strip().partition("=")
        if name.lower() == "timeout" and number.isascii() and number.isdigit():
            return float(number)
    return MAX_IDLE_AGE


# --- a new connection -----------------------------------------------------------------------------


class _Dialer:
    """Makes connections to one backend: finds its addresses, connects, shakes hands."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._tls: ssl.SSLContext | None = None

    async def dial(self, limits: Limits, watch: Watch) -> socket.socket:
        """A connected socket, non-blocking. Raises BackendError and ClientGone.

        Each address gets its share of the time, so that a dead one does not hide a live one. The
        error is the first address's: the others are alternatives to it.
        """
        until = min(time.monotonic() + limits.connect, limits.answer_by)
        addresses = await self._addresses(watch, until)
        first: BackendError | None = None
        for left, (family, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
            now = time.monotonic()
            try:
                return await self._open(family, address, watch, now + (until - now) / left)
            except BackendError as exc:
                let_go(exc)
                first = first or exc
        raise first or self._unreachable("the name has no address")

    async def _open(self, family: int, address: Any, watch: Watch, until: float) -> socket.socket:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as exc:
            raise self._failed(exc) from exc
        try:
            await self._connect(sock, address, watch, until)
            return await self._secure(sock, watch, until) if self._backend.scheme == "https" else sock
        except BaseException:
            sock.close()
            raise

    async def _connect(self, sock: socket.socket, address: Any, watch: Watch, until: float) -> None:
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(address)
        except OSError as exc:
            raise self._failed(exc) from exc
        if code == errno.EINPROGRESS:
            if not await watch.writable(sock, until):
                raise BackendError("connect_timeout", self._said("did not answer in time"))
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise self._failed(OSError(code, os.strerror(code)))

    async def _secure(self, sock: socket.socket, watch: Watch, until: float) -> socket.socket:
        """TLS over `sock`, verified against the system's certificates or SSL_CERT_FILE's."""
        try:
            if self._tls is None:
                await _on_thread(watch)  # the module takes 15 ms, and the system's certificates are read from files
                try:
                    self._tls = _verifying()
                finally:
                    await watch.on_loop()
            secure = self._tls.wrap_socket(sock, server_hostname=self._backend.host, do_handshake_on_connect=False)
        except OSError as exc:
            raise self._failed(exc) from exc
        try:
            await self._shake_hands(secure, watch, until)
        except BaseException:
            secure.close()  # it has taken the descriptor over from `sock`
            raise
        return secure

    async def _shake_hands(self, secure: ssl.SSLSocket, watch: Watch, until: float) -> None:
        while True:
            try:
                secure.do_handshake()
            except OSError as exc:
                wanted = _wanted(exc, POLLIN)
                if not wanted:
                    raise self._failed(exc) from exc
            else:
                return
            wait = watch.readable if wanted == POLLIN else watch.writable
            if not await wait(secure, until):
                raise BackendError("connect_timeout", self._said("did not finish the TLS handshake in time"))

    async def _addresses(self, watch: Watch, until: float) -> list[tuple[int, Any]]:
        """Where to connect to. "localhost" is both loopbacks, whatever the resolver makes of it:
        servers listen on one of them and resolvers prefer either (llama-swap#84)."""
        host, port = self._backend.host, self._backend.port
        if host == "localhost":
            return [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port))]
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                socket.inet_pton(family, host)
            except OSError:
                continue
            return [(family, (host, port))]
        return await self._resolve(host, port, watch, until)

    async def _resolve(self, host: str, port: int, watch: Watch, until: float) -> list[tuple[int, Any]]:
        """getaddrinfo() can't be given a limit, so a thread asks it and a socket says when it knows."""
        found: list[tuple[int, Any]] = []
        problem: list[OSError | UnicodeError] = []

        def ask() -> None:
            try:
                infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                found.extend((family, address) for family, _, _, _, address in infos)
            except (OSError, UnicodeError) as exc:  # UnicodeError: no host name at all ("a..b")
                problem.append(exc)
            finally:
                there.close()

        try:
            here, there = socket.socketpair()
        except OSError as exc:
            raise self._failed(exc) from exc
        with here:
            try:
                threading.Thread(target=ask, name=f"portway-resolve-{host}", daemon=True).start()
            except RuntimeError as exc:
                there.close()
                raise self._unreachable(f"no thread to look up its name: {exc}") from exc
            if not await watch.readable(here, until):
                raise BackendError("connect_timeout", self._said("has a name that did not resolve in time"))
        if problem:
            raise self._failed(problem[0]) from problem[0]
        return found

    def _failed(self, exc: OSError | UnicodeError) -> BackendError:
        return self._unreachable(_in_words(exc), getattr(exc, "errno", None))

    def _unreachable(self, why: str, code: int | None = None) -> BackendError:
        way_out = f"start {self._backend.name}, or correct backends.{self._backend.name}.url"
        if code == errno.EHOSTUNREACH and not self._backend.host.startswith("127."):
            # macOS 15+ blocks Python under launchd from the LAN with this very errno
            way_out += "; on macOS allow Local Network access for the program that runs Portway"
        return BackendError("connect_failed", self._said(f"can't be reached: {why}"), detail=why, way_out=way_out)

    def _said(self, what: str) -> str:
        return f"backend {self._backend.name} ({self._backend.url}) {what}"


def _in_words(exc: OSError | UnicodeError) -> str:
    """What went wrong, without the ssl module's line numbers."""
    if untrusted := getattr(exc, "verify_message", ""):
        return f"its certificate is not trusted: {untrusted} (SSL_CERT_FILE can name further authorities)"
    if isinstance(exc, OSError) and (reason := getattr(exc, "reason", None)):
        return f"TLS failed: {reason.lower().replace('_', ' ')}"
    return str(getattr(exc, "strerror", None) or exc)
