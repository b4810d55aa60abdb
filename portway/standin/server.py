"""A stand-in for Ollama: its native protocol on a real socket, with no language model behind it.

The demo, the tests and the stress run talk to it. It says that it is a stand-in in every answer and
in its Server header, can be told to be slow or to fail (standin_faults), sees its clients leave, and
keeps its models in a memory with a budget (standin_memory). It knows nothing of Portway's own work.

    StandIn                          this module: life, misbehaviour, what was seen; the command line
      Exchange       standin_exchange   one request, from its route to its last byte
        Order        standin_protocol   what it asks, or Ollama's own words why not
        Speech       standin_speech     the answer in lines; its text: standin_answers
        Wire         standin_wire       bytes, waits, the client's leaving
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Self

from portway.standin import faults, protocol
from portway.standin.answers import StandInModel
from portway.standin.exchange import Exchange, Request
from portway.standin.faults import Fault
from portway.standin.memory import Memory
from portway.standin.wire import SERVER, Bell, Wire, somebody_is_there

__all__ = ["DEFAULT_MODELS", "Fault", "Memory", "Request", "StandIn", "StandInModel", "main"]

MAX_BODY = 64 * 1024 * 1024  # bytes
KEPT_REQUESTS = 10_000  # the oldest records go, so that a long run does not grow
STOP_PATIENCE = 5.0  # seconds that stop() waits for requests in hand, all of which have been woken

_TEXT = ("completion", "tools")
DEFAULT_MODELS = (
    StandInModel("qwen3.5:9b", 6_600_000_000, (*_TEXT, "thinking", "vision"), 262144, "qwen35", "9.7B"),
    StandInModel("llama3.2:3b", 2_000_000_000, _TEXT, 131072, "llama", "3.2B"),
    StandInModel("gemma3:1b", 815_000_000, ("completion",), 32768, "gemma3", "999.89M"),
    StandInModel("qwen3-coder:30b", 18_600_000_000, (*_TEXT, "insert"), 262144, "qwen3moe", "30.5B"),
    StandInModel("nomic-embed-text", 274_000_000, ("embedding",), 2048, "nomic-bert", "137M", "F16", 768),
)


class StandIn:
    """The server. Use it as a context manager, or start() and stop() it.

    token_delay, load_delay, first_token_delay: seconds. budget: bytes; evict as in Memory. memory:
    one shared with other stand-ins, in place of budget, evict and clock. parallel: how many requests
    a model answers at once (None = any number; Ollama's default is 1). max_queue: how many may wait for
    a model. legacy_tool_calls: without ids and with index 0 each, as older releases sent them.
    """

    def __init__(  # noqa: PLR0913 - each is one thing a test sets by its name
        self,
        models: Iterable[StandInModel] = DEFAULT_MODELS,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token_delay: float = 0.0,
        load_delay: float = 0.0,
        first_token_delay: float = 0.0,
        budget: int | None = None,
        evict: bool = False,
        clock: Callable[[], float] = time.monotonic,
        memory: Memory | None = None,
        parallel: int | None = None,
        max_queue: int = 512,
        legacy_tool_calls: bool = False,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.host = host
        self.port = port
        self.token_delay = token_delay
        self.load_delay = load_delay
        self.first_token_delay = first_token_delay
        self.memory = memory if memory is not None else Memory(budget, evict, clock)
        self.parallel = parallel
        self.max_queue = max_queue
        self.legacy_tool_calls = legacy_tool_calls
        self.owner = f"stand-in-{id(self):x}"  # its name in a shared memory
        self._script = faults.Script()
        self._listening: _Listening | None = None
        self._changed = threading.Condition()  # guards what follows; notified on every change
        self._requests: deque[Request] = deque(maxlen=KEPT_REQUESTS)
        self._connections: dict[socket.socket, int] = {}  # open ones -> number
        self._accepted = itertools.count()
        self._hanging: set[Bell] = set()
        self._queued = 0

    # --- life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens, once started."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Listen; a port of 0 becomes a real one and stays the same from then on. Raises OSError."""
        if self._listening is None:
            self._listening = _Listening(self)
            self.port = self._listening.port

    def stop(self) -> None:
        """Stop listening, end every connection and everything that hangs, unload all."""
        self.refuse()
        self.memory.forget(self.owner)

    def refuse(self) -> None:
        """From now on connections are refused, and those that are open end; start() undoes it."""
        listening, self._listening = self._listening, None
        if listening is None:
            return
        listening.close()
        with self._changed:
            for sock in self._connections:
                _shut(sock)
            self._changed.wait_for(lambda: not self._connections, STOP_PATIENCE)
        listening.stopping.close()

    # --- misbehaving

    def fail(self, key: str, fault: Fault | str, times: int | None = 1) -> None:
        """Let the next `times` requests (None = all) for a model fail so; faults queue up in order.
        key: a model's name, a path such as "/api/tags", or "*". A fault may be told by name."""
        self._script.add(key, faults.named(fault) if isinstance(fault, str) else fault, times)

    def heal(self, key: str | None = None) -> None:
        """Forget the faults that are left for `key`, or all of them."""
        self._script.clear(key)

    def release(self) -> None:
        """Let the requests that hang now go on with their answers."""
        with self._changed:
            for bell in self._hanging:
                bell.ring()

    # --- what was seen

    @property
    def requests(self) -> list[Request]:
        """The requests so far, oldest first (KEPT_REQUESTS of them at most)."""
        with self._changed:
            return list(self._requests)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        with self._changed:
            return len(self._connections)

    @property
    def in_flight(self) -> int:
        """How many requests are in hand."""
        with self._changed:
            return sum(request.ended is None for request in self._requests)

    def wait_for(self, predicate: Callable[[StandIn], bool], timeout: float = 5.0) -> bool:
        """Wait until `predicate(standin)` holds; False if it doesn't within `timeout` seconds. It is
        looked at whenever a connection or a request comes, moves on or ends."""
        with self._changed:
            return self._changed.wait_for(lambda: predicate(self), timeout)

    # --- for the connections and requests

    def find(self, name: str) -> StandInModel | None:
        """A model by its name, where "x", "x:latest" and "library/x" are the same."""
        wanted = protocol.full_name(name).lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
        return next((m for m in self.models.values() if protocol.full_name(m.name).lower() == wanted), None)

    def connection_opened(self, sock: socket.socket) -> None:
        """Count a connection among the open ones."""
        with self._changed:
            self._connections[sock] = next(self._accepted)
            self._changed.notify_all()

    def connection_closed(self, sock: socket.socket) -> None:
        """And no longer."""
        with self._changed:
            del self._connections[sock]
            self._changed.notify_all()

    def admit(self, request: Request, sock: socket.socket) -> None:
        """Record a request that has come on a connection, and tell it how to fail, if it has to."""
        model = self.find(request.model)
        request.fault = self._script.take(model.name if model else request.model, request.path, "*")
        with self._changed:
            request.connection = self._connections[sock]
            self._requests.append(request)
            self._changed.notify_all()

    def note(self, request: Request, **changes: Any) -> None:
        """Change a record; whoever waits for something looks again."""
        with self._changed:
            for name, value in changes.items():
                setattr(request, name, value)
            self._changed.notify_all()

    def hang(self, request: Request, wire: Wire) -> None:
        """Wait for release(); raises ClientLeft or Stopped."""
        bell = Bell()
        with self._changed:  # at once, so that whoever sees the request hang can release it
            self._hanging.add(bell)
            request.phase = "hang"
            self._changed.notify_all()
        try:
            wire.wait(None, bell)
        finally:
            with self._changed:
                self._hanging.discard(bell)
            bell.close()

    def enter_queue(self) -> bool:
        """Take a place among those that wait for a model; False if none is free."""
        with self._changed:
            if self._queued >= self.max_queue:
                return False
            self._queued += 1
            return True

    def leave_queue(self) -> None:
        """Give the place back."""
        with self._changed:
            self._queued -= 1


# --- the HTTP server -------------------------------------------------------------------------


class _Listening:
    """One period of listening: the socket, the thread that accepts, and the bell that ends both."""

    def __init__(self, standin: StandIn) -> None:
        self.stopping = Bell()
        self._server = _Server(standin, self.stopping)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._accept, name="standin-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.stopping.ring()
        self._thread.join(STOP_PATIENCE)

    def _accept(self) -> None:
        with self._server:
            while somebody_is_there(self._server.socket, self.stopping):
                self._server.handle_request()


class _Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True
    timeout = 0  # handle_request() is called when somebody is there

    def __init__(self, standin: StandIn, stopping: Bell) -> None:
        self.standin = standin
        self.stopping = stopping
        super().__init__((standin.host, standin.port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the resolver for the host's name

    def process_request(self, request: Any, client_address: Any) -> None:
        self.standin.connection_opened(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.standin.connection_closed(request)


class _Handler(BaseHTTPRequestHandler):
    """Requests off the socket; what is answered is Exchange's matter."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            pass  # the client left between two requests, or within one

    def serve(self) -> None:
        started = time.monotonic()
        body = self._read_body()
        if body is None:
            self.close_connection = True
            return
        request = Request(
            method=self.command,
            path=self.path.partition("?")[0],
            headers=list(self.headers.items()),
            body=body,
            json=_parsed(body),
            connection=-1,
            started=started,
        )
        self.server.standin.admit(request, self.connection)
        wire = Wire(self.connection, self.server.stopping)
        if not Exchange(self.server.standin, request, wire).run():
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = serve  # noqa: N815 - http.server's names

    def _read_body(self) -> bytes | None:
        """The body; None if it is cut off or too large."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self._read_chunks()
        said = self.headers.get("Content-Length", "0")
        if not said.isdecimal() or int(said) > MAX_BODY:
            return None
        body = self.rfile.read(int(said))
        return body if len(body) == int(said) else None

    def _read_chunks(self) -> bytes | None:
        body = bytearray()
        while (size := int(self.rfile.readline(1024).split(b";")[0] or b"-1", 16)) > 0:
            body += self.rfile.read(size)
            self.rfile.readline(1024)
            if len(body) > MAX_BODY:
                return None
        while self.rfile.readline(65536) not in (b"\r\n", b"\n", b""):
            pass  # trailers
        return None if size < 0 else bytes(body)

    def version_string(self) -> str:
        return SERVER

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: StandIn.requests is the log."""


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was faster


# --- on its own ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """`portway standin ..`: serve until SIGTERM or Ctrl-C. Returns the exit code."""
    options = _parser().parse_args(argv)
    standin = StandIn(
        options.model or DEFAULT_MODELS,
        host=options.host,
        port=options.port,
        token_delay=options.token_delay,
        load_delay=options.load_delay,
        first_token_delay=options.first_token_delay,
        budget=options.budget,
        evict=options.evict,
        parallel=options.parallel,
    )
    for key, fault, times in options.fail:
        standin.fail(key, fault, times)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    try:
        standin.start()
    except OSError as exc:
        print(f"portway standin: cannot listen on {standin.url}: {exc.strerror}", file=sys.stderr)
        return 1
    print(f"listening on {standin.url}", flush=True)
    over.wait()
    standin.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="portway standin", description="A stand-in for Ollama, without any model.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 = any free one (default)")
    parser.add_argument(
        "--model",
        type=parse_model,
        action="append",
        metavar="NAME=SIZE[,CAPABILITY..]",
        help="as qwen3.5:9b=6.6GB,tools,thinking; repeatable",
    )
    parser.add_argument("--token-delay", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--first-token-delay", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--load-delay", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--budget", type=parse_size, metavar="SIZE", help="memory for the models, as 10GB")
    parser.add_argument("--evict", action="store_true", help="make room within the budget, as Ollama does")
    parser.add_argument("--parallel", type=int, metavar="N", help="answers at once for each model")
    parser.add_argument(
        "--fail",
        type=parse_failure,
        action="append",
        default=[],
        metavar="MODEL=FAULT[*TIMES]",
        help=f"a status, or one of: {', '.join([*faults.KINDS, *faults.PRESETS])}",
    )
    return parser


def parse_size(text: str) -> int:
    """Bytes of "6.6GB", "512MiB" or "1000". Raises ArgumentTypeError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 6.6GB")
    return round(float(match[1]) * units[match[2].upper()])


def parse_model(text: str) -> StandInModel:
    """The model of "NAME=SIZE[,CAPABILITY..]"; unless told otherwise it does completion and tools."""
    name, _, rest = text.partition("=")
    size, *capabilities = rest.split(",")
    if "embedding" not in capabilities:
        capabilities = ["completion", *(capabilities or ["tools"])]
    return StandInModel(name, parse_size(size or "1GB"), tuple(dict.fromkeys(capabilities)))


def parse_failure(text: str) -> tuple[str, Fault, int | None]:
    """What "MODEL=FAULT[*TIMES]" says to StandIn.fail(); without TIMES, for ever. Raises ArgumentTypeError."""
    key, _, rest = text.rpartition("=")
    name, _, times = rest.partition("*")
    try:
        return key or "*", faults.named(name), int(times) if times else None
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
