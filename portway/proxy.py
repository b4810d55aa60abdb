"""The daemon: HTTP, guards, the route table, the one request pipeline, the relay to the client.

    accept -> park -> worker: read a whole request -> guards -> ROUTES -> pipeline
                                                                  read_call -> Router.serve -> relay

One thread accepts and holds the connections on which nothing happens; a connection gets a worker
thread when bytes are there and keeps it only while a whole request is being answered, so that
neither idle nor slow clients can use the workers up. A worker waits for a backend in one poll() that
also sees its client leave and the moment for a heartbeat (`ClientWatch`).
"""

from __future__ import annotations

import errno
import os
import select
import selectors
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from portway.answers import Facts, Found, Shared
from portway.cache.flights import Flights
from portway.cache.rules import parse_control
from portway.cache.store import Cache
from portway.config import ConfigError, ConfigWatcher
from portway.errors import ClientError, ClientGone, PortwayError, Stopping
from portway.memory import api as residency_api
from portway.memory.residency import Residency
from portway.metrics import CONTENT_TYPE, Metrics
from portway.request import find_model, read_call
from portway.routing import ChainExhausted, Cooling
from portway.state import State, open_cache, open_log
from portway.telemetry import Log, Price, Record
from portway.vitals import Vitals
from portway.watch import ClientWatch
from portway.wire.events import DONE, dumps, loads_object, sse
from portway.wire.http1 import MAX_HEAD, BadMessage, Incoming, RequestHead, as_client_error, parse_request
from portway.workers import InFlight, Workers

if TYPE_CHECKING:
    from portway.call import Attempt, Endpoint
    from portway.config import Config

RECEIVE = 65_536  # bytes asked of one recv()
LINGER = 0.25  # seconds a worker stays with a connection after an answer; the next request often follows at once
SETTLE_MS = 10  # how long a worker waits for the rest of a request; most clients send head and body in two writes
SWEEP = 1.0  # seconds between two looks for connections that have waited too long
MAX_PIPELINED = 262_144  # bytes read ahead while an answer is under way
WATCH_CONFIG = 1.0  # seconds between two looks at the configuration file
CLOSE_ASIDE = 2.0  # seconds given to the log's last lines at the end, and to the cache's last answers
LAST_WORDS = 1.0  # seconds for cut requests to tell their clients and the log
FRESH = 0.5  # seconds for which a connection without a request makes no room for others
GOODBYE = 1.0  # seconds for a refused client to read why before its connection is reset

# --- the routes -----------------------------------------------------------------------------------

# path without /v1 -> method -> Handler's method. "{id}" takes the rest of the path.
ROUTES: Mapping[str, Mapping[str, str]] = {
    "/chat/completions": {"POST": "post_chat"},
    "/completions": {"POST": "post_completions"},
    "/embeddings": {"POST": "post_embeddings"},
    "/models": {"GET": "get_models"},
    "/models/{id}": {"GET": "get_model"},
    "/health": {"GET": "get_health"},
    "/metrics": {"GET": "get_metrics"},
    "/portway/residency": {"GET": "get_residency"},
    "/portway/load": {"POST": "post_load"},
    "/portway/unload": {"POST": "post_unload"},
}


def route(method: str, path: str) -> tuple[str, str]:
    """The name of the Handler's method for a request, and the path's {id}. Raises ClientError 404, 405."""
    bare = path[3:] if path.startswith("/v1/") else path
    methods, rest = ROUTES.get(bare), ""
    if methods is None and bare.startswith("/models/"):
        methods, rest = ROUTES["/models/{id}"], unquote(bare[8:])
    if methods is None:
        known = ", ".join(f"/v1{known}" for known in ROUTES)
        raise ClientError(f"There is no {path[:128]!r} here. There are: {known}.", status=404, code="not_found")
    name = methods.get("GET" if method == "HEAD" else method)
    if name is None:
        allowed = ", ".join(sorted({*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))
        raise ClientError(
            f"{path[:128]} takes {allowed}, not {method[:32]}.",
            status=405,
            code="method_not_allowed",
            headers={"Allow": allowed},
        )
    return name, rest


# --- the relay ------------------------------------------------------------------------------------


class EventStream:
    """A streamed answer on its way to the client. Its head goes out with the first piece, or with the
    first heartbeat; then the facts that no header can carry any more travel in a chunk's `portway`."""

    def __init__(self, handler: Handler) -> None:
        self.started = False
        self.ttft: float | None = None  # time.monotonic() of the first content
        self._handler = handler
        self._chunked = handler.head.minor == 1

    def beat(self) -> None:
        """A comment, so that the client knows that somebody is there. One newline only: a blank line
        makes some SDKs dispatch an empty event (openai-python#2722), and openai-go dies of it."""
        try:
            self._write(b": portway\n", {})
        except OSError as exc:
            raise ClientGone from exc

    def relay(self, found: Found) -> None:
        """Send the whole answer. Raises BackendError if it breaks; OSError if the client does, unless
        somebody else waits for the same answer: then it is read to its end without this client."""
        headers = headers_of(found.facts)
        for piece in found.pieces():
            if found.has_client:
                try:
                    self._relay(piece, found, headers)
                except OSError as exc:
                    found.client_left(exc)
            self._handler.watch.heard()

    def _relay(self, piece: bytes, found: Found, headers: Mapping[str, str]) -> None:
        """Send one piece, with the facts that no header could carry."""
        last = piece.endswith(DONE)
        if self.ttft is None:
            self.ttft = time.monotonic()
            if self.started:
                piece = _with_field(piece, piece.find(b"data: {"), _as_field(found.facts))
        if last and (late := found.late_warnings()):
            piece = _with_field(piece, piece.rfind(b"data: {"), {"warnings": late})
        self._write(piece, headers, last=last)

    def fail(self, error: PortwayError) -> None:
        """End with the error's envelope as the last event, without [DONE], which would say that all went well."""
        envelope = error.envelope()
        if isinstance(error, ChainExhausted):
            envelope["portway"] = {"attempts": _joined(error.attempts)}
        self._write(sse(dumps(envelope)), {}, last=True)

    def _write(self, piece: bytes, headers: Mapping[str, str], *, last: bool = False) -> None:
        if self._chunked:
            piece = b"%x\r\n%b\r\n%b" % (len(piece), piece, b"0\r\n\r\n" if last else b"")
        if not self.started:
            self.started = True
            kind = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            coding = {"Transfer-Encoding": "chunked"} if self._chunked else {}
            self._handler.keep_alive &= self._chunked
            piece = self._handler.head_bytes(200, {**kind, **coding, **headers}) + piece
        self._handler.send(piece)


def _as_field(facts: Facts) -> dict[str, Any]:
    """The facts as a chunk's `portway`."""
    field: dict[str, Any] = {"served_by": facts.served_by, "cache": facts.cache}
    if facts.attempts:
        field["attempts"] = facts.attempts
    if facts.warnings:
        field["warnings"] = list(facts.warnings)
    return field


def headers_of(facts: Facts) -> dict[str, str]:
    """The facts as headers."""
    headers = {"X-Served-By": facts.served_by, "X-Cache": facts.cache}
    if facts.attempts:
        headers["X-Portway-Attempts"] = facts.attempts
    if facts.warnings:
        headers["X-Portway-Warning"] = "; ".join(facts.warnings)
    if facts.age is not None:
        headers["Age"] = str(facts.age)
    return {**headers, **facts.headers}


def _joined(attempts: list[Attempt]) -> str:
    return "; ".join(str(attempt) for attempt in attempts)


def _with_field(piece: bytes, at: int, facts: Mapping[str, Any]) -> bytes:
    """The piece with `"portway":facts` in the event that begins at `at`; every event is a JSON object."""
    if at < 0:
        return piece
    at += len(b"data: {")
    return b'%b"portway":%b,%b' % (piece[:at], dumps(facts), piece[at:])


# --- one connection -------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One client connection: reads requests as they come in, serves each on a worker.

    Between requests, and while one comes in slowly, it is parked at the server and has no thread.
    """

    server: Server
    head: RequestHead

    def setup(self) -> None:
        """No buffered files: requests are read, and answers written, in whole."""
        self.connection: socket.socket = self.request
        self.keep_alive = True
        self.expires = time.monotonic() + self.server.daemon.state.config.server.idle_timeout
        self._buffer = b""
        self._reading: Incoming | None = None
        self.watch = ClientWatch(self.connection, self.read_ahead)

    def handle(self) -> None:
        """Nothing has come yet."""
        self.server.park(self)

    def finish(self) -> None:
        """The connection outlives the constructor."""

    # reading

    def work(self) -> None:
        """On a worker thread: serve what is there, then park or close."""
        try:
            while (incoming := self._whole_request()) is not None:
                self._serve(incoming)
                if not self.keep_alive:
                    break
                self._linger()
            if self.keep_alive and time.monotonic() < self.expires:
                self.server.park(self)
            else:
                self.time_out()
        except (OSError, ClientGone):
            self.close()  # the client's end; there is nobody to tell
        except Exception as exc:  # noqa: BLE001 - a bug of ours must not cost a thread
            self.server.daemon.unforeseen(exc)
            self.close()

    def close(self) -> None:
        """The connection's end, from our side."""
        self.server.forget(self)
        self.connection.close()

    def cut(self) -> None:
        """End the request under way, if there is one, with `Stopping`. Any thread."""
        self.watch.stop()
        try:
            self.connection.shutdown(socket.SHUT_RD)  # wakes the worker's wait; it can still write
        except OSError:
            pass  # it has just ended by itself

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a further request has come in."""
        poller = select.poll()
        poller.register(self.connection, select.POLLIN)
        return not self._buffer and self._reading is None and not poller.poll(0)

    def time_out(self) -> None:
        """Close; with a 408 if it took too long in the middle of a request."""
        if self.keep_alive and (self._buffer or self._reading):
            error = ClientError("The request did not come in in time.", status=408, code="request_timeout")
            try:
                self.connection.setblocking(False)
                self.connection.send(_plain_head(408) + dumps(error.envelope()))
            except OSError:
                pass  # it does not read either
        self.close()

    def read_ahead(self) -> bool:
        """Take what the client sends while its request is under way; False once it has ended its side."""
        data = self.connection.recv(RECEIVE, socket.MSG_DONTWAIT)
        self._buffer += data
        if len(self._buffer) > MAX_PIPELINED:
            self.watch.look_only_for_the_end()
        return bool(data)

    def _linger(self) -> None:
        """Wait a little for the next request where it is cheapest, in recv(), before parking."""
        if self._buffer or self.server.workers.are_short:
            return
        try:
            data = self.connection.recv(RECEIVE)
        except BlockingIOError:
            return
        if not data:
            raise ClientGone
        self._buffer = data

    def _whole_request(self) -> Incoming | None:
        """The next request with its body; None if it is not all in yet, or has taken too long."""
        while True:
            incoming = self._reading = self._reading or self._begin()
            if incoming is not None:
                try:
                    self._buffer = incoming.feed(self._buffer)
                except BadMessage as exc:
                    incoming.refuse(as_client_error(exc))
                if incoming.complete:
                    self._reading = None
                    return incoming
            if time.monotonic() >= self.expires or not self._more():
                return None

    def _more(self) -> bool:
        """Read what has come in, or comes in within SETTLE_MS; False if nothing does."""
        try:
            data = self.connection.recv(RECEIVE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            poller = select.poll()
            poller.register(self.connection, select.POLLIN)
            if not poller.poll(SETTLE_MS):
                return False
            data = self.connection.recv(RECEIVE, socket.MSG_DONTWAIT)
        if not data:
            raise ClientGone
        self._buffer += data
        return True

    def _begin(self) -> Incoming | None:
        """The head of the next request, if it is all there."""
        config = self.server.daemon.state.config.server
        if self._buffer[:2] == b"\r\n":
            self._buffer = self._buffer[2:]  # RFC 9112 section 2.2: one empty line before a request is let pass
        end = self._buffer.find(b"\r\n\r\n")
        now = time.monotonic()
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                return Incoming.broken(BadMessage(f"the head is longer than {MAX_HEAD} bytes", 431))
            if not self._buffer:
                self.expires = now + config.idle_timeout
            elif self.expires > now + config.header_timeout:
                self.expires = now + config.header_timeout
            return None
        head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
        self.expires = now + config.body_timeout
        try:
            incoming = Incoming(parse_request(head), config.max_body)
        except BadMessage as exc:
            return Incoming.broken(exc)
        self._admit(incoming)
        return incoming

    def _admit(self, incoming: Incoming) -> None:
        """Check the head before the body is read."""
        try:
            incoming.cors = self.server.daemon.state.guards.check(incoming.head)
        except ClientError as exc:
            incoming.refuse(exc)
        if incoming.head.headers.get("expect", "").lower() == "100-continue" and not incoming.complete:
            if incoming.refusal:
                incoming.give_up()  # the client waits for a word before it sends its body
            elif not self._buffer:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    # answering

    def _serve(self, incoming: Incoming) -> None:
        """Answer one request, whatever becomes of it, and write it down."""
        self.head = incoming.head
        self.keep_alive = incoming.head.keep_alive and not incoming.poisoned
        self._cors = incoming.cors
        self._record = Record(time.time(), time.monotonic(), _client(self.head), self.head.path)
        self._stream: EventStream | None = None
        self.watch.begin(0.0, None)
        self.watch.look_for_all()
        with self.server.in_flight:
            try:
                self._dispatch(incoming)
            except PortwayError as exc:
                self._fail(exc)
            except BlockingIOError:
                self._client_left("stalled")  # it is there and does not read
            except (ClientGone, OSError):
                self._client_left(self.watch.phase)
            except Exception as exc:  # noqa: BLE001 - the last resort: logged with its id, never shown
                self._fail(self.server.daemon.unforeseen(exc))
            finally:
                self._write_down()
        self.expires = time.monotonic() + self.server.daemon.state.config.server.idle_timeout
        if incoming.poisoned:
            self._say_goodbye()

    def _client_left(self, phase: str) -> None:
        self._record.cancelled_in = phase
        self._record.exit_code = 130 if _is_ask(self.head) else None
        self.keep_alive = False

    def _write_down(self) -> None:
        """The request's line in the log. Whoever only asks how we are, again and again, is not worth one."""
        self._record.finish(time.monotonic(), self.watch.waited)
        if self._record.status == 200 and self.head.path.endswith(_UNLOGGED):
            return
        daemon = self.server.daemon
        daemon.metrics.observe(self._record)
        if daemon.log:
            daemon.log.record(self._record)

    def _dispatch(self, incoming: Incoming) -> None:
        if incoming.refusal:
            raise incoming.refusal
        if self.server.draining:
            raise Stopping
        head = incoming.head
        if head.method == "OPTIONS":
            self.respond(204, {"Allow": "GET, HEAD, OPTIONS, POST", **(_PREFLIGHT if self._cors else {})}, b"")
            return
        name, rest = route(head.method, head.path)
        if name != "get_health":
            self.server.daemon.state.guards.check_key(head)
        getattr(self, name)(rest if head.method != "POST" else incoming.body)

    def post_chat(self, raw: bytes) -> None:
        """POST /v1/chat/completions."""
        self._complete("chat", raw)

    def post_completions(self, raw: bytes) -> None:
        """POST /v1/completions."""
        self._complete("completions", raw)

    def post_embeddings(self, raw: bytes) -> None:
        """POST /v1/embeddings."""
        self._complete("embeddings", raw)

    def _complete(self, endpoint: Endpoint, raw: bytes) -> None:
        """The pipeline: call -> found in the cache, or served by some target -> relayed."""
        state = self.server.daemon.state
        call = read_call(endpoint, raw, state.config)
        self._record.begin(call)
        stream = self._stream = EventStream(self) if call.stream else None
        self.watch.begin(state.config.server.heartbeat, stream.beat if stream else None)
        control = parse_control(self.head.headers)
        with state.answers.find(call, control, self.watch, fallback=self._may_fall_back()) as found:
            try:
                if stream:
                    stream.relay(found)
                else:
                    self._respond_with(found)
            finally:
                found.close()
                self._record.found(found, stream.ttft if stream else None)

    def _respond_with(self, found: Found) -> None:
        body = found.body()
        if found.has_client:
            try:
                self.respond(200, headers_of(found.facts), body)
            except OSError as exc:
                found.client_left(exc)

    def _may_fall_back(self) -> bool:
        wish = self.head.headers.get("x-portway-fallback", "on").lower()
        if wish not in ("on", "off"):
            raise ClientError("X-Portway-Fallback is on or off.", param="X-Portway-Fallback")
        return wish == "on"

    def get_models(self, _rest: str) -> None:
        """GET /v1/models."""
        state = self.server.daemon.state
        state.catalogue.refresh_soon()
        cards = [state.card(model) for model in state.config.models.values()]
        self.respond(200, {}, dumps({"object": "list", "data": cards}))

    def get_model(self, name: str) -> None:
        """GET /v1/models/{id}; an alias is one, too."""
        state = self.server.daemon.state
        self.respond(200, {}, dumps(state.card(find_model(name, state.config))))

    def get_health(self, _rest: str) -> None:
        """GET /health."""
        self.respond(200, {}, dumps(self.server.daemon.health()))

    def get_metrics(self, _rest: str) -> None:
        """GET /metrics, for Prometheus."""
        self.respond(200, {"Content-Type": CONTENT_TYPE}, self.server.daemon.metrics.render())

    def get_residency(self, _rest: str) -> None:
        """GET /portway/residency."""
        self.respond(200, {}, dumps(residency_api.overview(self.server.daemon.residency, self.watch)))

    def post_load(self, raw: bytes) -> None:
        """POST /portway/load."""
        self.respond(200, {}, dumps(residency_api.load(self.server.daemon.residency, loads_object(raw), self.watch)))

    def post_unload(self, raw: bytes) -> None:
        """POST /portway/unload."""
        self.respond(200, {}, dumps(residency_api.unload(self.server.daemon.residency, loads_object(raw), self.watch)))

    # writing

    def send(self, data: bytes) -> None:
        """All of it, or OSError; a client that does not read fails it after server.write_timeout."""
        self.connection.sendall(data)

    def respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """A whole answer in one write."""
        self._record.status = status
        kind = {"Content-Type": "application/json", "Content-Length": str(len(body))} if status != 204 else {}
        head = self.head_bytes(status, {**kind, **headers})
        self.send(head if self.head.method == "HEAD" else head + body)

    def head_bytes(self, status: int, headers: Mapping[str, str]) -> bytes:
        """The head of the answer to the present request."""
        self._record.status = status
        lines = [self.server.status_line(status)]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        lines += [f"{name}: {value}\r\n" for name, value in self._cors.items()]
        if not self.keep_alive:
            lines.append("Connection: close\r\n")
        elif self.head.minor == 0:
            lines.append("Connection: keep-alive\r\n")
        lines.append("\r\n")
        return "".join(lines).encode("latin-1", "replace")

    def _fail(self, error: PortwayError) -> None:
        """The error as the rest of a begun stream, else as an answer of its own."""
        self._record.failed(error)
        if _is_ask(self.head):
            self._record.exit_code = self._exit_code_of_ask(error)
        try:
            if self._stream and self._stream.started:
                self._stream.fail(error)
                return
            headers = dict(error.headers)
            body = dumps(error.envelope())
            if isinstance(error, ChainExhausted):
                headers["X-Portway-Attempts"] = _joined(error.attempts)
                body = error.body or body
            self.respond(error.status, headers, body)
        except OSError:
            self.keep_alive = False

    def _exit_code_of_ask(self, error: PortwayError) -> int:
        """What `ask` will make of this error, by the rules in its manual, for the log."""
        if isinstance(error, ChainExhausted):
            return 1 if self._may_fall_back() else 4
        return 2 if error.code == "model_not_found" else 1

    def _say_goodbye(self) -> None:
        """Let a client that is still sending read the refusal: closing at once would reset it unread."""
        self.connection.shutdown(socket.SHUT_WR)
        poller = select.poll()
        poller.register(self.connection, select.POLLIN)
        until = time.monotonic() + GOODBYE
        while (left := until - time.monotonic()) > 0 and poller.poll(int(left * 1000) + 1):
            if not self.connection.recv(RECEIVE, socket.MSG_DONTWAIT):
                return


_UNLOGGED = ("/health", "/metrics")


def _is_ask(head: RequestHead) -> bool:
    return head.headers.get("x-portway-client") == "ask"


def _client(head: RequestHead) -> str:
    """Who asks, for the log: what the client calls itself."""
    return head.headers.get("x-portway-client") or head.headers.get("user-agent", "")


_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS, POST",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Max-Age": "600",
}


def _plain_head(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase
    return f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n".encode()


# --- the server -----------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Accepts, holds the connections without a request, and hands those with one to the workers.

    All of `_parked` and the selector belong to the thread in serve_forever; other threads hand
    connections to it through `_arrivals` and wake it up.
    """

    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, daemon: Daemon) -> None:
        config = daemon.state.config.server
        self.daemon = daemon
        self.draining = False
        self.in_flight = InFlight()
        self.workers = Workers(config.max_requests, "worker")
        self._limit = config.max_connections
        self._send_timeout = struct.pack("ll", int(config.write_timeout), int(config.write_timeout % 1 * 1e6))
        self._linger = struct.pack("ll", 0, int(LINGER * 1e6))
        self._open: set[Handler] = set()
        self._parked: dict[int, Handler] = {}
        self._arrivals: deque[Handler] = deque()
        self._wake, self._woken = socket.socketpair()
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._status_lines: dict[int, tuple[int, str]] = {}
        self._selector = selectors.DefaultSelector()
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        super().__init__((config.host, config.port), Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's getfqdn(), which may ask a name server that is not there."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def serve_forever(self, poll_interval: float = SWEEP) -> None:
        """The accepting thread's loop, until shutdown()."""
        self.socket.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self.socket, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        swept = time.monotonic()
        try:
            while not self._stopping.is_set():
                for key, _ in self._selector.select(poll_interval):
                    self._stirred(key.fileobj, key.data)
                if time.monotonic() - swept >= SWEEP:
                    self._sweep()
                    swept = time.monotonic()
        finally:
            self._stopped.set()

    def shutdown(self) -> None:
        """Stop accepting; requests in flight go on."""
        self._stopping.set()
        self._wake_up()
        self._stopped.wait(5)

    def cut(self) -> int:
        """Have every request under way end with an error now. How many there are."""
        count = self.in_flight.count
        for handler in list(self._open):
            handler.cut()
        return count

    def server_close(self) -> None:
        """Close the listener and every connection that is left."""
        self.socket.close()
        for handler in list(self._open):
            handler.connection.close()
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A new connection. Its Handler parks itself here until there is something to read."""
        request.setblocking(True)  # macOS lets it inherit the listener's non-blocking mode
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, self._send_timeout)
        request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, self._linger)
        if len(self._open) >= self._limit and not self._evict(1):
            request.close()
            return
        self.finish_request(request, client_address)

    def get_request(self) -> tuple[Any, Any]:
        """Accept; when descriptors run out, at the cost of the connections that have been idle longest."""
        try:
            return super().get_request()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE) and not self._evict(16):
                time.sleep(0.05)  # every descriptor is in use for a request; the listener stays readable
            raise

    def park(self, handler: Handler) -> None:
        """Hold a connection until bytes come, or until it `expires`. Any thread."""
        self._open.add(handler)
        self._arrivals.append(handler)
        self._wake_up()

    def forget(self, handler: Handler) -> None:
        """The connection is closing. Any thread."""
        self._open.discard(handler)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._open)

    def status_line(self, status: int) -> str:
        """The first lines of every answer, made anew once a second for the Date."""
        second = int(time.time())
        made = self._status_lines.get(status)
        if made is None or made[0] != second:
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
            line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nServer: portway\r\nDate: {date}\r\n"
            made = self._status_lines[status] = (second, line)
        return made[1]

    def _stirred(self, source: Any, handler: Handler | None) -> None:
        if source is self.socket:
            self._accept()
        elif handler is not None:
            if self._is_parked(handler):  # else it was evicted by an accept() that came first in this round
                self._unpark(handler)
                self.workers.submit(handler.work)
        else:
            self._take_arrivals()

    def _accept(self) -> None:
        try:
            request, client_address = self.get_request()
        except OSError:
            return  # it has gone again, or there was no descriptor for it
        self.process_request(request, client_address)

    def _take_arrivals(self) -> None:
        try:
            self._woken.recv(4096)
        except BlockingIOError:
            return
        while self._arrivals:
            handler = self._arrivals.popleft()
            self._parked[handler.connection.fileno()] = handler
            self._selector.register(handler.connection, selectors.EVENT_READ, handler)

    def _is_parked(self, handler: Handler) -> bool:
        return self._parked.get(handler.connection.fileno()) is handler

    def _unpark(self, handler: Handler) -> None:
        self._selector.unregister(handler.connection)
        del self._parked[handler.connection.fileno()]

    def _sweep(self) -> None:
        now = time.monotonic()
        for handler in [handler for handler in self._parked.values() if handler.expires <= now]:
            self._unpark(handler)
            handler.time_out()

    def _evict(self, count: int) -> bool:
        """Close connections that have been idle longest, to make room; whether there were any. One on which a
        request has come, or which is so new that one is on its way, is not idle: it would be reset unread."""
        latest = time.monotonic() + self.daemon.state.config.server.idle_timeout - FRESH
        longest_first = sorted(self._parked.values(), key=lambda handler: handler.expires)
        idle = (handler for handler in longest_first if handler.expires <= latest and handler.is_idle)
        victims = list(islice(idle, count))
        for handler in victims:
            self._unpark(handler)
            handler.close()
        return bool(victims)

    def _wake_up(self) -> None:
        try:
            self._wake.send(b"\0", socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass  # it has been woken often enough
        except OSError:
            pass  # it is closed: the daemon has ended


# --- the daemon -----------------------------------------------------------------------------------


class Daemon:
    """The running program: the present State, the server, and what outlives both."""

    def __init__(
        self,
        config: Config,
        *,
        say: Callable[[str], None] | None = None,
        log: Log | None = None,
        cache: Cache | None = None,
    ) -> None:
        self._say = say or _to_stderr
        self.log = log
        self.cache = cache
        self.residency = Residency(config, say=self._say)
        self._flights: Flights[Shared] = Flights()
        self._cooling = Cooling(config.cooldown)
        self._problem: str | None = None  # why the newest configuration is not in force
        self.state = self._build(config)
        self._server = Server(self)
        self._vitals = Vitals(self._server, self._cooling, self.residency, log, cache)
        self.metrics = Metrics(config.models, self._vitals.readings())
        self._thread = threading.Thread(target=self._server.serve_forever, name="portway-accept", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Its address without /v1."""
        host = self.state.config.server.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> None:
        """Accept connections, on a thread of its own."""
        self._thread.start()
        self.residency.start()
        self._look_around_soon()

    def stop(self, drain: float | None = None) -> bool:
        """Take no more, let requests in flight end for `drain` seconds (default: server.drain), close.
        Whether all of them ended."""
        self._server.draining = True
        seconds = self.state.config.server.drain if drain is None else drain
        ended = self._server.in_flight.wait_for_none(seconds)
        if not ended:
            self._say(f"{self._server.cut()} requests were cut: they did not end within {seconds:g} s")
            self._server.in_flight.wait_for_none(LAST_WORDS)
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        self.residency.stop()
        self.state.close()
        return ended

    def use(self, config: Config) -> None:
        """Serve by another configuration from the next request on. The address stays the one it listens on."""
        server = replace(config.server, host=self.state.config.server.host, port=self.state.config.server.port)
        config = replace(config, server=server)
        self.residency.adopt(config)
        old, self.state = self.state, self._build(config)
        if self.log:
            self.log.price = Price(config.price.input, config.price.output)
        self._problem = None
        self.metrics.use(config.models)
        old.close()
        self._look_around_soon()

    def serves_other_than(self, config: Config) -> bool:
        """Whether `config` would change anything: the file may have been written while we started."""
        return replace(config, server=self.state.config.server) != self.state.config

    def refuse(self, problem: str) -> None:
        """A new configuration is invalid: the old one stays, and /health says why."""
        self._problem = problem
        self._say(f"the configuration was not reloaded; the old one stays in force. {problem}")

    def health(self) -> dict[str, Any]:
        """GET /health: what is known; nobody is asked."""
        return {"config": {"path": self.state.config.path, "problem": self._problem}, **self._vitals.health(self.state)}

    def unforeseen(self, exc: Exception) -> PortwayError:
        """A bug of ours: its trace goes to stderr under an id, and only the id to the client."""
        name = os.urandom(6).hex()
        self._say(f"unforeseen error {name}\n{''.join(traceback.format_exception(exc))}")
        return PortwayError(
            f"An error inside Portway; its log says more under {name}.", status=500, type="api_error", code="internal"
        )

    def _build(self, config: Config) -> State:
        return State.of(config, self._cooling, self.cache, self._flights, self.residency)

    def _look_around_soon(self) -> None:
        try:
            threading.Thread(target=self._look_around, name="portway-catalogue", daemon=True).start()
        except RuntimeError as exc:  # the system has none left; GET /v1/models asks again
            self._say(f"the backends were not asked for their models: {exc}")

    def _look_around(self) -> None:
        """Ask the backends what they have, and say what is missing."""
        catalogue = self.state.catalogue
        catalogue.refresh()
        for line in catalogue.missing():
            self._say(line)


def _to_stderr(text: str) -> None:
    try:
        print(f"portway: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # it is a file on the disk that is full, say: nobody can be told


def serve(config: Config, *, config_path: str | None, environ: Mapping[str, str]) -> int:
    """Serve until SIGTERM or SIGINT; reload on SIGHUP and when the file has changed. The exit code."""
    log, cache = open_log(config, environ), open_cache(config, environ)
    try:
        daemon = Daemon(config, log=log, cache=cache)
    except OSError as exc:
        _to_stderr(_cannot_listen(config.server.host, config.server.port, exc))
        return 1
    for warning in config.warnings:
        _to_stderr(f"warning: {warning}")
    events: SimpleQueue[str] = SimpleQueue()  # its put() may be called from a signal handler
    signal.signal(signal.SIGTERM, lambda *_: events.put("stop"))
    signal.signal(signal.SIGINT, lambda *_: events.put("stop"))
    signal.signal(signal.SIGHUP, lambda *_: events.put("reload"))
    daemon.start()
    _to_stderr(f"listening on {daemon.url}/v1, configured by {config.path}")
    _attend(daemon, ConfigWatcher(config_path, environ), events)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    daemon.stop()
    for aside in (log, cache):
        if aside:
            aside.close(CLOSE_ASIDE)
    return 0


def _cannot_listen(host: str, port: int, exc: OSError) -> str:
    from portway.commands.holder import describe  # seldom needed

    holder = describe(host, port) if exc.errno == errno.EADDRINUSE else ""
    return f"can't listen on {host}:{port}: {exc.strerror}; stop {holder or 'what does'}, or change server.port"


def _attend(daemon: Daemon, watcher: ConfigWatcher, events: SimpleQueue[str]) -> None:
    """Until "stop": reload when told to and when the file has changed."""
    event = "start"
    while event != "stop":
        try:
            new = watcher.reload() if event else watcher.poll()
        except ConfigError as exc:
            daemon.refuse(str(exc))
        else:
            if new is not None and (event != "start" or daemon.serves_other_than(new)):
                daemon.use(new)
                _to_stderr(f"configuration reloaded from {new.path}")
        try:
            event = events.get(timeout=WATCH_CONFIG)
        except Empty:
            event = ""
