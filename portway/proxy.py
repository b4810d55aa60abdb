"""The daemon: HTTP, guards, the route table, the one request pipeline, the relay to the client.

    accept -> a client stirs -> a whole request -> guards -> ROUTES -> pipeline
                                                                       read_call -> Answers.find -> relay

One thread runs all of it (loop.py): a connection on which nothing happens costs a descriptor, and a
request a coroutine, which waits for its backend while the loop goes on looking at its client
(`ClientWatch`). What can only block (a council, a place in memory that is not free) takes a worker.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import socketserver
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from portway import stderr
from portway.answers import MAX_KEPT, Found, Shared, fields_of
from portway.cache.flights import Flights
from portway.cache.rules import Control, parse_control
from portway.cache.store import Cache
from portway.call import ENDPOINTS, Endpoint
from portway.config import ConfigError, is_loopback
from portway.errors import ClientError, ClientGone, PortwayError, Stopping, let_go
from portway.fields import Mistake
from portway.loop import HANGUP, POLLIN, POLLOUT, Loop, Task
from portway.memory import api as residency_api
from portway.memory.measured import Notebook
from portway.memory.residency import Residency
from portway.metrics import CONTENT_TYPE, Metrics
from portway.quotas import Quotas, spent
from portway.request import find_model, read_call
from portway.routing import ChainExhausted, Cooling
from portway.state import State, adjust, left_for_the_start
from portway.telemetry import Log, Record
from portway.vitals import BRIEF, Vitals
from portway.watch import ClientWatch
from portway.wire.events import DONE, dumps, loads_object, sse
from portway.wire.http1 import (
    MAX_HEAD,
    NO_HEAD,
    BadMessage,
    Heads,
    Incoming,
    Request,
    RequestHead,
    as_client_error,
    head_too_long,
    parse_request,
)
from portway.workers import InFlight, Workers

if TYPE_CHECKING:
    from portway.cache.flights import Leader
    from portway.call import Attempt
    from portway.config import Config

RECEIVE = 65_536  # bytes asked of one recv()
ACCEPT = 64  # connections taken at one go
SWEEP = 1.0  # seconds between two looks for connections that have waited too long
MAX_PIPELINED = 262_144  # bytes read ahead while an answer is under way
LARGE = 1_048_576  # bytes of a request that is read on a worker
LAST_WORDS = 1.0  # seconds for cut requests to tell their clients and the log
FRESH = 0.5  # seconds for which a connection without a request makes no room for others
GOODBYE = 1.0  # seconds for a refused client to read why before its connection is reset

# --- the routes -----------------------------------------------------------------------------------

# path without /v1 -> method -> the pipeline's endpoint, or Handler's method. "{id}" takes the rest of the path.
ROUTES: Mapping[str, Mapping[str, str]] = {
    "/chat/completions": {"POST": "chat"},
    "/completions": {"POST": "completions"},
    "/embeddings": {"POST": "embeddings"},
    "/models": {"GET": "get_models"},
    "/models/{id}": {"GET": "get_model"},
    "/health": {"GET": "get_health"},
    "/metrics": {"GET": "get_metrics"},
    "/portway/residency": {"GET": "get_residency"},
    "/portway/load": {"POST": "post_load"},
    "/portway/unload": {"POST": "post_unload"},
}


class Envelope(NamedTuple):
    """All that a request's head says, read once for all requests with such a head (http1.Heads).

    endpoint: of the pipeline; None = Handler has a method of that `name`. rest: the path's {id}. fallback: whether
    others may answer for the model.
    """

    head: RequestHead
    cors: Mapping[str, str]
    endpoint: Endpoint | None
    name: str
    rest: str
    control: Control
    fallback: bool
    client: str


def read_envelope(head: RequestHead, cors: Mapping[str, str]) -> Envelope:
    """Raises ClientError 404, 405, 400."""
    name, rest = route(head.method, head.path) if head.method != "OPTIONS" else ("options", "")
    wish = head.headers.get("x-portway-fallback", "on").lower()
    if wish not in ("on", "off"):
        raise ClientError("X-Portway-Fallback is on or off.", param="X-Portway-Fallback")
    endpoint = next((each for each in ENDPOINTS if each == name), None)
    return Envelope(head, cors, endpoint, name, rest, parse_control(head.headers), wish == "on", _client(head))


def route(method: str, path: str) -> tuple[str, str]:
    """What serves a request, as ROUTES has it, and the path's {id}. Raises ClientError 404, 405."""
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
        self.ended = False
        self.ttft: float | None = None  # time.monotonic() of the first content
        self._handler = handler
        self._chunked = handler.head.minor == 1

    async def beat(self) -> None:
        """A comment, so that the client knows that somebody is there. One newline only: a blank line
        makes some SDKs dispatch an empty event (openai-python#2722), and openai-go dies of it."""
        if self.ended:
            return
        try:
            await self._write(b": portway\n")
        except OSError as exc:
            raise ClientGone from exc

    async def relay(self, found: Found) -> None:
        """Send the whole answer. Raises BackendError if it breaks; ClientGone or OSError if the client does, unless
        somebody else waits for the same answer: then it is read to its end without this client."""
        fields = found.facts.fields()
        while piece := await found.piece():
            if found.has_client:
                try:
                    await self._relay(piece, found, fields)
                except (ClientGone, OSError) as exc:
                    found.client_left(exc)
            self._handler.watch.heard()

    async def _relay(self, piece: bytes, found: Found, fields: bytes) -> None:
        """Send one piece, with the facts that no header could carry."""
        last = piece.endswith(DONE)
        if self.ttft is None:
            self.ttft = time.monotonic()
            if self.started:
                piece = _with_field(piece, piece.find(b"data: {"), found.facts.to_json())
        if last and (late := found.late_warnings()):
            piece = _with_field(piece, piece.rfind(b"data: {"), {"warnings": late})
        await self._write(piece, fields, last=last)

    async def fail(self, error: PortwayError) -> None:
        """End with the error's envelope as the last event, without [DONE], which would say that all went well."""
        if self.ended:
            return
        envelope = error.envelope()
        if isinstance(error, ChainExhausted):
            envelope["portway"] = {"attempts": _joined(error.attempts)}
        await self._write(sse(dumps(envelope)), last=True)

    async def _write(self, piece: bytes, fields: bytes = b"", *, last: bool = False) -> None:
        self.ended = last
        if self._chunked:
            piece = b"%x\r\n%b\r\n%b" % (len(piece), piece, b"0\r\n\r\n" if last else b"")
        if not self.started:
            self.started = True
            self._handler.keep_alive &= self._chunked
            kind = _CHUNKED_EVENTS if self._chunked else _EVENTS
            piece = self._handler.head_bytes(200, kind + fields) + piece
        await self._handler.send(piece)


_EVENTS = b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
_CHUNKED_EVENTS = _EVENTS + b"Transfer-Encoding: chunked\r\n"


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
    """One client connection: reads requests as they come in, serves one after the other.

    All of it runs on the loop's thread, but for the rest of a request that has moved to a worker; as long
    as `task.busy`, nothing but the request under way touches it.
    """

    server: Server
    head: RequestHead

    def setup(self) -> None:
        """No buffered files: requests are read, and answers written, in whole."""
        self.connection: socket.socket = self.request
        self.keep_alive = True
        self.expires = time.monotonic() + self.server.daemon.state.config.server.idle_timeout
        self.waiting: Request | None = None  # for its turn: too many are under way
        self._closed = False
        self._gone = False  # it was seen to leave while its request was under way
        self._leaving = False  # it was told why, and is given time to read that
        self._answered = False  # its request was dealt with to the end, whatever came of it
        self._buffer = b""
        self._leader: Leader[Shared] | None = None  # of others who may wait for the answer under way
        self._owed = bytearray()  # what the client has not taken of an answer that others wait for
        self._is_writing = False  # the answer under way waits for the client to take more
        self._torn = False  # what was being written is cut off: nothing can follow
        self._reading: Incoming | None = None
        self.began = 0.0  # time.monotonic() when the request that is coming in began to; 0.0 = nothing of it is here
        self.task = Task(self.server.loop, moving=self._look_away, returning=self._look_back, ended=self._ended)
        self.watch = ClientWatch(self.connection, self.read_ahead, self.task)

    def handle(self) -> None:
        """Nothing has come yet."""
        self.server.loop.attach(self.connection, self.stirred)

    def finish(self) -> None:
        """The connection outlives the constructor."""

    # on the loop: what the client does

    def stirred(self, events: int) -> None:
        """It has sent something, or it has gone."""
        if self.task.busy:
            self._guarded(self._stirred_meanwhile, events)
            return
        try:
            if self._receive():
                self._go_on()
                if self._is_coming_in and time.monotonic() >= self.expires and not self.waiting:
                    self.time_out()  # it drips: the next sweep would come too late
        except Exception as exc:  # noqa: BLE001 - see _lost
            self._lost(exc)

    def _stirred_meanwhile(self, events: int) -> None:
        """It is not idle: its request is under way. While that sends, it is not disturbed: what has stirred will do so
        again in the next round."""
        if self.task.is_sending:
            return
        try:
            if events & POLLOUT:
                self._pay_some()
            if events != POLLOUT:
                self.watch.client_stirred(events)
        except (ClientGone, Stopping) as exc:
            self._gone = True
            self._look_away()
            self.task.throw(exc)

    def _receive(self) -> bool:
        """Take what has come; False if that was nothing. Raises ClientGone at its end, or Stopping if that was us."""
        try:
            data = self.connection.recv(RECEIVE)
        except BlockingIOError:
            return False
        if not data:
            raise Stopping if self.watch.is_stopping else ClientGone
        if self._leaving:
            return False  # unread: it is to see our last words before its connection is reset
        self._buffer = self._buffer + data if self._buffer else data
        if self.waiting and len(self._buffer) > MAX_PIPELINED:
            self.server.loop.watch_for(self.connection, HANGUP)
        return True

    def read_ahead(self) -> bool:
        """Take what the client sends while its request is under way; False once it has ended its side."""
        data = self.connection.recv(RECEIVE)
        self._buffer += data
        if len(self._buffer) > MAX_PIPELINED:
            self.watch.look_only_for_the_end()
            self._look_for_more()
        return bool(data)

    def _look_away(self) -> None:
        """The loop no longer looks at the client."""
        self.server.loop.detach(self.connection)

    def _look_back(self) -> None:
        """The loop looks at it again, in the middle of a request."""
        self.server.loop.attach(self.connection, self.stirred, self._of_interest)

    def _look_for_more(self) -> None:
        """Something else is looked for from now on."""
        if self.task.on_loop and not self._gone:
            self.server.loop.watch_for(self.connection, self._of_interest)

    @property
    def _of_interest(self) -> int:
        return (HANGUP if self.watch.is_sated else POLLIN) | (POLLOUT if self._owed else 0)

    def _look_again(self) -> None:
        """It does, and at all that it sends."""
        if self.task.on_loop:
            if self.watch.is_sated:
                self.watch.look_for_all()
                self.server.loop.watch_for(self.connection, POLLIN)
        else:
            self.watch.look_for_all()
            self.task.on_loop = True
            self.server.loop.attach(self.connection, self.stirred)

    # from one request to the next

    def _go_on(self) -> None:
        """Serve what has come in, one request after the other, until one takes its time."""
        while (self._buffer or self._reading) and not (self.task.busy or self.waiting or self._closed or self._leaving):
            request = self._next()
            if request is None:
                return
            if self.server.is_full() or self.server.backlog:
                self.waiting, self.began = request, time.monotonic()
                self.server.backlog.append(self)
                return
            self.serve(request)

    def serve(self, request: Request) -> None:
        """Begin to answer; mostly it then waits for a backend."""
        self.server.in_flight.begin()
        try:
            self.task.start(self._serve(request))
        finally:
            if not self.task.busy:
                self._settle()

    def take_turn(self, request: Request) -> None:
        """Its request has waited long enough."""
        self._guarded(self._serve_and_go_on, request)

    def _serve_and_go_on(self, request: Request) -> None:
        self.serve(request)
        self._go_on()

    def _ended(self) -> None:
        """The request under way has come to its end."""
        self._guarded(self._settle_and_go_on)
        self.server.take_turns()

    def _settle_and_go_on(self) -> None:
        self._settle()
        self._go_on()

    def _guarded(self, step: Callable[..., None], *args: object) -> None:
        """Take a step; an error that leaves it costs the connection, and no more."""
        try:
            step(*args)
        except Exception as exc:  # noqa: BLE001 - see _lost
            self._lost(exc)

    def _lost(self, exc: Exception) -> None:
        """The client's end, and there is nobody to tell; ours; or a bug of ours, which must not cost the loop."""
        if isinstance(exc, Stopping):
            self.break_off(exc)
        elif isinstance(exc, OSError | ClientGone):
            self._never_came_in()
        else:
            self.server.daemon.unforeseen(exc)
        self.close()

    def _settle(self) -> None:
        """After an answer: close, or be ready for the next request."""
        self.server.in_flight.end()
        self.began = 0.0
        if self._leaving:
            self._say_goodbye()
        elif self._gone or not (self.keep_alive and self._answered):
            self.close()
        else:
            self.expires = time.monotonic() + self.server.daemon.state.config.server.idle_timeout
            self._look_again()

    def _say_goodbye(self) -> None:
        """Let a client that is still sending read the refusal: closing at once would reset it unread."""
        self.connection.shutdown(socket.SHUT_WR)
        self.expires = time.monotonic() + GOODBYE
        self._look_again()

    def close(self) -> None:
        """The connection's end, from our side."""
        if not self._closed:
            self._closed = True
            self._look_away()
            self.server.forget(self)
            self.waiting = None
            self._owed = bytearray()
            self.connection.close()

    def cut(self) -> None:
        """End the request under way, if there is one, with `Stopping`. Any thread."""
        self.watch.stop()
        try:
            self.connection.shutdown(socket.SHUT_RD)  # wakes its wait; it can still write
        except OSError:
            pass  # it has just ended by itself

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way or waits for its turn."""
        return not (self.task.busy or self.waiting)

    def began_by(self, moment: float) -> bool:
        """Whether a part of a request has been there since then."""
        return self._is_coming_in and self.began <= moment

    @property
    def is_silent(self) -> bool:
        """Whether nothing of a further request has come."""
        poller = select.poll()
        poller.register(self.connection, select.POLLIN)
        return not self._is_coming_in and not poller.poll(0)

    def time_out(self) -> None:
        """Close; with a 408 if it took too long in the middle of a request."""
        self.break_off(ClientError("The request did not come in in time.", status=408, code="request_timeout"))

    def break_off(self, error: PortwayError) -> None:
        """Close; with `error` if a request was coming in."""
        if self.keep_alive and self._is_coming_in:
            try:
                self.connection.send(_plain_head(error.status) + dumps(error.envelope()))
            except OSError:
                pass  # it does not read either
            self._never_came_in(error)
        self.close()

    @property
    def _is_coming_in(self) -> bool:
        """Whether there is a part of a request, or one that waits for its turn."""
        return not (self.task.busy or self._leaving) and bool(self._buffer or self._reading or self.waiting)

    def _never_came_in(self, error: PortwayError | None = None) -> None:
        """The log's line of a request of which not all came, or whose turn did not: `error` says why, None = its
        client left."""
        if not self._is_coming_in:
            return
        coming = self.waiting or self._reading
        self.head = coming.head if coming else NO_HEAD
        now = time.monotonic()
        self._record = Record(time.time() - (now - self.began), self.began, _client(self.head), self.head.path)
        if error is None:
            self._client_left("waiting" if self.waiting else "request")
        else:
            self._record.status = error.status
            self._failed(error)
        self._write_down(None)

    def _next(self) -> Request | None:
        """The next request with its body; None if it is not all in yet."""
        if self._reading is None:
            request = self._begin()
            if request is not None:
                return request
        incoming = self._reading
        if incoming is None:
            return None
        try:
            self._buffer = incoming.feed(self._buffer)
        except BadMessage as exc:
            incoming.refuse(as_client_error(exc))
        if not incoming.complete:
            return None
        self._reading = None
        return incoming.request()

    def _begin(self) -> Request | None:
        """The next request, if it is all there and well; else `_reading` has what there is of it, if its head is in."""
        buffer = self._buffer
        if (empty := _EMPTY_LINES.match(buffer)) is not None:
            buffer = self._buffer = buffer[empty.end() :]
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            self._wait_for_head()
            return None
        daemon = self.server.daemon
        try:
            envelope, length = daemon.heads.read(buffer[:end])
        except (BadMessage, ClientError):
            envelope, length = None, None  # once more, slowly, for what is to be said of it
        if length is None:
            length = (envelope and envelope.head.length) or 0
        rest = end + 4 + length
        config = daemon.state.config.server
        if envelope is None or envelope.head.chunked or len(buffer) < rest or length > config.max_body:
            self._buffer = buffer[end + 4 :]
            self.began = time.monotonic()
            self.expires = self.began + config.body_timeout
            self._reading = self._admitted(buffer[:end], config.max_body)
            return None
        self._buffer = buffer[rest:]
        return Request(envelope.head, envelope.cors, buffer[end + 4 : rest], envelope=envelope)

    def _wait_for_head(self) -> None:
        config, now = self.server.daemon.state.config.server, time.monotonic()
        if len(self._buffer) > MAX_HEAD:
            self._reading = Incoming.broken(head_too_long())
        elif not self._buffer:
            self.expires = now + config.idle_timeout
        elif not self.began:
            self.expires, self.began = now + config.header_timeout, now

    def _admitted(self, head: bytes, max_body: int) -> Incoming:
        """Check the head before the body is read."""
        try:
            incoming = Incoming(parse_request(head), max_body)
        except BadMessage as exc:
            return Incoming.broken(exc)
        try:
            incoming.cors = self.server.daemon.state.guards.check(incoming.head)
        except ClientError as exc:
            incoming.refuse(exc)
        if incoming.head.headers.get("expect", "").lower() == "100-continue" and not incoming.complete:
            if incoming.refusal:
                incoming.give_up()  # the client waits for a word before it sends its body
            elif not self._buffer:
                self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return incoming

    # answering

    async def _serve(self, request: Request) -> None:
        """Answer one request, whatever becomes of it, and write it down."""
        head = self.head = request.head
        self.keep_alive = head.keep_alive and not request.poisoned
        self._cors = request.cors
        client = request.envelope.client if request.envelope is not None else _client(head)
        self._record = Record(time.time(), time.monotonic(), client, head.path)
        self._stream: EventStream | None = None
        self._answered = self._torn = False
        self.watch.begin(0.0, None)
        try:
            await self._dispatch(request)
        except PortwayError as exc:
            await self._fail(exc)
            let_go(exc)
        except (ClientGone, OSError) as exc:
            is_there = isinstance(exc, BlockingIOError)  # and does not read
            self._client_left("stalled" if is_there else self.watch.phase)
            let_go(exc)
        except Exception as exc:  # noqa: BLE001 - the last resort: logged with its id, never shown
            await self._fail(self.server.daemon.unforeseen(exc))
        finally:
            self._write_down(self.watch.waited)
        self._leaving, self._answered = request.poisoned, True

    def _client_left(self, phase: str) -> None:
        self._record.cancelled_in = phase
        self._record.exit_code = 130 if _is_ask(self.head) else None
        self.keep_alive = False

    def _write_down(self, waited: float | None) -> None:
        """The request's line in the log. Whoever only asks how we are, again and again, is not worth one."""
        record = self._record
        del self._record  # a connection holds nothing of its last request while it idles
        record.finish(time.monotonic(), waited)
        if record.status == 200 and self.head.path.endswith(_UNLOGGED):
            return
        if self.task.on_loop:
            self.server.loop.put_off(partial(self.server.daemon.note, record))
        else:
            self.server.daemon.note(record)

    def _dispatch(self, request: Request) -> Coroutine[Any, Any, None]:
        """What serves the request. Raises what keeps it from being served."""
        if request.refusal:
            raise request.refusal
        if self.server.draining:
            raise Stopping
        self.envelope = envelope = request.envelope or read_envelope(request.head, request.cors)
        daemon = self.server.daemon
        self._key = daemon.state.guards.admit(envelope.head, envelope.name, daemon.quotas)
        if self._key is not None:
            self._record.key = self._key.name
        if envelope.endpoint is not None:
            return self._complete(envelope.endpoint, request.body)
        serve: Callable[[Any], Coroutine[Any, Any, None]] = getattr(self, envelope.name)
        return serve(envelope.rest if envelope.head.method != "POST" else request.body)

    async def options(self, _rest: str) -> None:
        """OPTIONS, on any path: a preflight mostly."""
        headers = {"Allow": "GET, HEAD, OPTIONS, POST", **(_PREFLIGHT if self._cors else {})}
        await self.respond(204, fields_of(headers), b"")

    async def _complete(self, endpoint: Endpoint, raw: bytes) -> None:
        """The pipeline: call -> found in the cache, or served by some target -> relayed."""
        state = self.server.daemon.state
        is_large = len(raw) > LARGE
        if is_large:
            await self.watch.on_thread()  # what takes its time to be read must not keep the others waiting
        call = read_call(endpoint, raw, state.config, self._key)
        if is_large:
            await self.watch.on_loop()
        self._record.begin(call)
        if call.stream:
            self._stream = EventStream(self)
            self.watch.begin(state.config.server.heartbeat, self._stream.beat)
        envelope = self.envelope
        try:
            await state.answers.find(call, envelope.control, self.watch, self._relay, fallback=envelope.fallback)
        finally:
            self._leader = None
        if self._owed:
            await self.send(b"")

    async def _relay(self, found: Found) -> None:
        """Send what was found, as a stream or whole."""
        stream = self._stream
        if found.leader is not None:
            self._leader = found.leader
            found.leader.when_joined(partial(self.server.loop.post, self._joined))
        try:
            if stream is not None:
                await stream.relay(found)
            elif found.has_client:
                try:
                    await self.respond(200, found.facts.fields(), found.body())
                except (ClientGone, OSError) as exc:
                    found.client_left(exc)
        finally:
            if found.served is not None:
                await found.served.answer.close()
            self._record.found(found, stream.ttft if stream is not None else None)
            if self._key is not None:
                self.server.daemon.quotas.spend(self._key, spent(found))

    async def get_models(self, _rest: str) -> None:
        """GET /v1/models."""
        state = self.server.daemon.state
        state.catalogue.refresh_soon()
        models = [model for model in state.config.models.values() if self._key is None or self._key.knows(model.name)]
        cards = [state.card(model) for model in models]
        await self.respond(200, b"", dumps({"object": "list", "data": cards}))

    async def get_model(self, name: str) -> None:
        """GET /v1/models/{id}; an alias is one, too."""
        state = self.server.daemon.state
        await self.respond(200, b"", dumps(state.card(find_model(name, state.config, self._key))))

    async def get_health(self, _rest: str) -> None:
        """GET /health. To a client without a key, where there are keys, it tells no more than that all is well."""
        knows = self.server.daemon.state.guards.may_know_all(self.head)
        await self.respond(200, b"", dumps(self.server.daemon.health() if knows else BRIEF))

    async def get_metrics(self, _rest: str) -> None:
        """GET /metrics, for Prometheus."""
        self.server.loop.catch_up()  # what was put off counts, too
        await self.watch.on_thread()
        await self.respond(200, b"", self.server.daemon.metrics.render(), kind=CONTENT_TYPE.encode())

    async def get_residency(self, _rest: str) -> None:
        """GET /portway/residency."""
        await self.watch.on_thread(for_good=True)
        await self.respond(200, b"", dumps(residency_api.overview(self.server.daemon.residency, self.watch)))

    async def post_load(self, raw: bytes) -> None:
        """POST /portway/load."""
        await self.watch.on_thread(for_good=True)
        await self.respond(
            200, b"", dumps(residency_api.load(self.server.daemon.residency, loads_object(raw), self.watch))
        )

    async def post_unload(self, raw: bytes) -> None:
        """POST /portway/unload."""
        await self.watch.on_thread(for_good=True)
        await self.respond(
            200, b"", dumps(residency_api.unload(self.server.daemon.residency, loads_object(raw), self.watch))
        )

    # writing

    async def send(self, data: bytes, *, together: bool = False) -> None:
        """All of it, or OSError; a client that does not read fails it after server.write_timeout. While others
        wait for the same answer, what it does not take is owed to it, up to MAX_KEPT. together: with what others send
        in the same round of the loop; a stream's chunks wait for nobody."""
        if self._owed:
            self._owed += data
            del self._owed[: self._sent(self._owed)]
            if not self._may_owe(len(self._owed)):
                owed, self._owed = self._owed, bytearray()
                await self._send_rest(memoryview(owed))
            return
        if together:
            try:
                sent = await self.watch.send(self.connection, data)
            except BlockingIOError:
                sent = 0
        else:
            sent = self._sent(data)
        if sent < len(data):
            await self._send_rest(memoryview(data)[sent:])

    async def _send_rest(self, view: memoryview) -> None:
        """What the client has not taken at once."""
        until = time.monotonic() + self.server.write_timeout
        try:
            while view:
                if self._may_owe(len(view)):
                    self._owed += view
                    self._look_for_more()
                    return
                if await self._takes_more(until):
                    view = view[self._sent(view) :]
                    until = time.monotonic() + self.server.write_timeout
                elif time.monotonic() >= until:
                    raise BlockingIOError(errno.EAGAIN, "the client does not read")
        except BaseException:
            self._torn = True
            raise

    async def _takes_more(self, until: float) -> bool:
        self._is_writing = self.task.on_loop
        try:
            return await self.watch.client_writable(until)
        finally:
            self._is_writing = False

    def _may_owe(self, size: int) -> bool:
        """Whether the client is to get so many bytes later, since others wait for what comes behind them."""
        return size <= MAX_KEPT and self._leader is not None and self._leader.has_waiters()

    def _joined(self) -> None:
        """On the loop: one more waits for the answer under way."""
        if self._is_writing:
            self.task.wake(ready=False)

    def _pay_some(self) -> None:
        """The client takes more of what is owed to it."""
        try:
            del self._owed[: self._sent(self._owed)]
        except OSError as exc:
            raise ClientGone from exc
        if not self._owed:
            self._look_for_more()

    def _sent(self, data: bytes | bytearray | memoryview) -> int:
        """How much of it the client has taken at once."""
        try:
            return self.connection.send(data)
        except BlockingIOError:
            return 0

    def respond(
        self, status: int, fields: bytes, body: bytes, kind: bytes = b"application/json"
    ) -> Coroutine[Any, Any, None]:
        """A whole answer in one write. fields: further header fields, as `fields_of` makes them."""
        if status != 204:
            fields = b"Content-Type: %b\r\nContent-Length: %d\r\n%b" % (kind, len(body), fields)
        head = self.head_bytes(status, fields)
        return self.send(head if self.head.method == "HEAD" else head + body, together=True)

    def head_bytes(self, status: int, fields: bytes) -> bytes:
        """The head of the answer to the present request."""
        self._record.status = status
        if self._cors:
            fields += fields_of(self._cors)
        if not self.keep_alive:
            fields += b"Connection: close\r\n"
        elif self.head.minor == 0:
            fields += b"Connection: keep-alive\r\n"
        return b"%b%b\r\n" % (self.server.status_line(status), fields)

    async def _fail(self, error: PortwayError) -> None:
        """The error as the rest of a begun stream, else as an answer of its own."""
        self._failed(error)
        if self._torn:
            self.keep_alive = False
            return
        try:
            if self._stream and self._stream.started:
                await self._stream.fail(error)
                return
            headers = dict(error.headers)
            body = dumps(error.envelope())
            if isinstance(error, ChainExhausted):
                headers["X-Portway-Attempts"] = _joined(error.attempts)
                body = error.body or body
            await self.respond(error.status, fields_of(headers), body)
        except (OSError, ClientGone, Stopping):
            self.keep_alive = False

    def _failed(self, error: PortwayError) -> None:
        self._record.failed(error)
        if _is_ask(self.head):
            self._record.exit_code = self._exit_code_of_ask(error)

    def _exit_code_of_ask(self, error: PortwayError) -> int:
        """What `ask` will make of this error, by the rules in its manual, for the log."""
        if isinstance(error, ChainExhausted):
            return 1 if self.envelope.fallback else 4
        return 2 if error.code == "model_not_found" else 1


_UNLOGGED = ("/health", "/metrics")

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")  # RFC 9112 section 2.2: before a request they are let pass


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
    """Accepts connections, and holds them. All of it belongs to the loop's thread, but where it says "any thread"."""

    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, daemon: Daemon) -> None:
        config = daemon.state.config.server
        self.daemon = daemon
        self.draining = False
        self.in_flight = InFlight()
        self.workers = Workers(config.max_requests, "worker")
        self.loop = Loop(self.workers)
        self.backlog: deque[Handler] = deque()  # whose requests wait for their turn
        self.write_timeout = config.write_timeout
        self._max_requests = config.max_requests
        self._limit = config.max_connections
        self._open: set[Handler] = set()
        self._deaf = False  # no descriptor is left to accept with
        self._status_lines: dict[int, tuple[int, bytes]] = {}
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        super().__init__((config.host, config.port), Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's getfqdn(), which may ask a name server that is not there."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def serve_forever(self, poll_interval: float = SWEEP) -> None:
        """The loop, until shutdown()."""
        self.socket.setblocking(False)
        self.loop.attach(self.socket, self._accept)
        self.loop.run(self._sweep, poll_interval, self.daemon.unforeseen)

    def shutdown(self) -> None:
        """Stop accepting; requests on workers go on. Any thread."""
        self.loop.stop(5)

    def cut(self) -> int:
        """Have every request under way end with an error now. How many there are. Any thread."""
        count = self.in_flight.count
        for handler in list(self._open):
            handler.cut()
        return count

    def server_close(self) -> None:
        """Close the listener and every connection that is left. After shutdown()."""
        self.socket.close()
        for handler in list(self._open):
            if handler.is_idle or handler.waiting:
                handler.break_off(Stopping())
            handler.connection.close()
        self.loop.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A new connection. Its Handler attaches itself to the loop."""
        try:
            request.setblocking(False)
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:  # macOS: of a client that has reset its connection already
            request.close()
            return
        if len(self._open) >= self._limit and not self._evict(1):
            request.close()
            return
        self.finish_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """See process_request."""
        self._open.add(Handler(request, client_address, self))

    def forget(self, handler: Handler) -> None:
        """Its connection is closing."""
        self._open.discard(handler)
        if handler.waiting:
            self.backlog.remove(handler)
        if self._deaf:
            self._listen_again()

    @property
    def queued(self) -> int:
        """How many requests wait for their turn, or for a worker. Any thread."""
        return len(self.backlog) + self.workers.waiting

    @property
    def connections(self) -> int:
        """How many clients are connected. Any thread."""
        return len(self._open)

    def is_full(self) -> bool:
        """Whether as many requests are under way as may be."""
        return self.in_flight.count >= self._max_requests

    def take_turns(self) -> None:
        """Serve who waits, as far as there is room."""
        while self.backlog and not self.is_full():
            handler = self.backlog.popleft()
            request, handler.waiting = handler.waiting, None
            if request is not None:
                handler.take_turn(request)

    def status_line(self, status: int) -> bytes:
        """The first lines of every answer, made anew once a second for the Date."""
        second = int(time.time())
        made = self._status_lines.get(status)
        if made is None or made[0] != second:
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
            line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nServer: portway\r\nDate: {date}\r\n"
            made = self._status_lines[status] = (second, line.encode())
        return made[1]

    def _accept(self, _events: int) -> None:
        for _ in range(ACCEPT):
            try:
                request, client_address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE) and not self._evict(16):
                    self._deaf = True  # every descriptor is in use for a request: until one of them ends
                    self.loop.watch_for(self.socket, 0)
                return
            self.process_request(request, client_address)

    def _listen_again(self) -> None:
        self._deaf = False
        self.loop.watch_for(self.socket, POLLIN)

    def _sweep(self) -> None:
        now = time.monotonic()
        for handler in [handler for handler in self._open if handler.is_idle and handler.expires <= now]:
            handler.time_out()
        if self._deaf:
            self._listen_again()  # the descriptor may be another's that has ended

    def _evict(self, count: int) -> bool:
        """Close connections that have been idle longest, to make room; whether there were any. One on which a
        request has come, or which is so new that one is on its way, is not idle: it would be reset unread."""
        latest = time.monotonic() + self.daemon.state.config.server.idle_timeout - FRESH
        longest_first = sorted((each for each in self._open if each.is_idle), key=lambda handler: handler.expires)
        victims = list(islice((each for each in longest_first if each.expires <= latest and each.is_silent), count))
        if not victims:  # else some clients that never send the end of their requests would keep out all others
            slow = [each for each in longest_first if each.began_by(time.monotonic() - FRESH)]
            victims = sorted(slow, key=lambda handler: handler.began)[:count]
        for handler in victims:
            handler.time_out()
        return bool(victims)


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
        notebook: Notebook | None = None,
    ) -> None:
        self._say = say or stderr.say
        self.log = log
        self.cache = cache
        self.residency = Residency(config, say=self._say, notebook=notebook)
        self._flights: Flights[Shared] = Flights()
        self._cooling = Cooling(config.cooldown)
        self.quotas = Quotas()
        self._problem: str | None = None  # why the newest configuration is not in force
        self.state = self._build(config)
        self.heads = self._fresh_heads()
        self._server = Server(self)
        self._vitals = Vitals(self._server, self._cooling, self.residency, log, cache)
        self.metrics = Metrics(config.models, self._vitals.readings())
        self._thread = threading.Thread(target=self._server.serve_forever, name="portway-loop", daemon=True)

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
        """Serve by another configuration from the next request on. The address stays the one it listens on.

        Raises ConfigError for one that would leave an address open to everybody that others can reach.
        """
        if not config.server.api_keys and not is_loopback(self.state.config.server.host):
            problem = f"empty, while it listens on {self.state.config.server.host}, which other machines can reach"
            raise ConfigError(config.path, [Mistake("server.api_keys", problem, "a key, or a restart on loopback")])
        server = replace(config.server, host=self.state.config.server.host, port=self.state.config.server.port)
        config = replace(config, server=server)
        self.residency.adopt(config)
        self.quotas.adopt(config.server.api_keys)
        old, self.state = self.state, self._build(config)
        self.heads = self._fresh_heads()
        adjust(config, self.log, self.cache)
        if waiting := left_for_the_start(old.config, config):
            self._say(f"{', '.join(waiting)}: taken over at the next start, not before")
        self._problem = None
        self.metrics.use(config.models)
        old.close()
        self._look_around_soon()

    def serves_other_than(self, config: Config) -> bool:
        """Whether `config` would change anything: the file may have been written while we started."""
        return replace(config, server=self.state.config.server) != self.state.config

    def refuse(self, problem: str) -> None:
        """A new configuration is invalid: the old one stays, and /health says why."""
        self._say(f"the configuration was not reloaded; the old one stays in force. {problem}")
        self._problem = problem

    def health(self) -> dict[str, Any]:
        """GET /health: what is known; nobody is asked."""
        return {"config": {"path": self.state.config.path, "problem": self._problem}, **self._vitals.health(self.state)}

    def note(self, record: Record) -> None:
        """Count a request that is over, and write it down. A mistake of ours in that is told, and is no matter of
        whoever has it done: of the next request, or of one for /metrics."""
        try:
            self.metrics.observe(record)
            if self.log is not None:
                self.log.record(record)
        except Exception as exc:  # noqa: BLE001 - told, with its trace
            self.unforeseen(exc)

    def unforeseen(self, exc: Exception) -> PortwayError:
        """A bug of ours: its trace goes to stderr under an id, and only the id to the client."""
        name = os.urandom(6).hex()
        self._say(f"unforeseen error {name}\n{''.join(traceback.format_exception(exc))}")
        return PortwayError(
            f"An error inside Portway; its log says more under {name}.", status=500, type="api_error", code="internal"
        )

    def _fresh_heads(self) -> Heads[Envelope]:
        """Of requests that may be served by the present configuration; others are not remembered."""
        guards = self.state.guards

        def read(head: bytes) -> Envelope:
            parsed = parse_request(head)
            return read_envelope(parsed, guards.check(parsed))

        return Heads(read)

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
