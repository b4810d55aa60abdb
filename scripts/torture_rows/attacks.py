"""Attacks on a running daemon, each a bounded function from its address to a Row: how often tried, how often held.

    attack_framing(world) -> Row("request framing and smuggling", tries=170, held=170)

What is sent stands in attack_cases.py. Nothing here knows more of the daemon than its port, except for what a
`World` may say of itself beyond that. The tests call the same functions and want `held == tries`.
"""

from __future__ import annotations

import json
import random
import resource
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, Self
from urllib.parse import quote

from scripts.torture_rows import Row
from scripts.torture_rows import attack_cases as given

PATIENCE = 10.0  # seconds that any one answer may take
REFUSALS = (400, 413, 431, 501, 505)
GIGABYTE = 1024**3


class World(Protocol):
    """A running daemon with models. It may say more of itself in attributes that `of` reads: header_timeout,
    body_timeout, max_body (as configured), flood (a model whose stream does not end by itself)."""

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        ...

    def check(self) -> Any:
        """Assert that it answers a normal request; returns what it then has of threads, descriptors and memory."""
        ...


class Cases:
    """Counts the cases of one attack."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tries = 0
        self._held = 0
        self._note = ""

    def judge(self, case: str, *, held: bool, seen: object = "") -> None:
        """Count one case."""
        self._tries += 1
        self._held += held
        if not held and not self._note:
            self._note = f"{case}: {seen}"[:300]

    def row(self) -> Row:
        """All of them."""
        return Row(self._name, self._tries, self._held, self._note)

    def not_tried(self, why: str) -> Row:
        """The row of an attack that can't be made here."""
        return Row(self._name, 0, 0, f"not tried: {why}")


def of(world: World, name: str, default: Any) -> Any:
    """What the world says of itself under that name."""
    return getattr(world, name, default)


# --- a client that sends bytes as they are --------------------------------------------------------


class Answer(NamedTuple):
    """One answer. Header names are lower-case, as often as they came; `body` without its chunked coding."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first such header's value."""
        return next((value for key, value in self.headers if key == name), None)

    @property
    def code(self) -> str | None:
        """`code` of the error in OpenAI's envelope; None for any other body."""
        try:
            error = json.loads(self.body)["error"]
            return error["code"] if set(error) == {"message", "type", "param", "code"} else None
        except (ValueError, KeyError, TypeError):
            return None


class Broken(Exception):
    """The server's bytes are no answer, or none came."""


class Connection:
    """A connection that is opened again whenever the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sock: socket.socket | None = None
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it, if it is open."""
        if self._sock is not None:
            self._sock.close()
        self._sock, self._buffer = None, b""

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        if self._sock is None:
            self._sock = connect(self._port)
        self._sock.sendall(data)

    def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
        """The answer to one request. headers: None in place of a value leaves out a usual one."""
        fields: dict[str, str] = {"Host": f"127.0.0.1:{self._port}"}
        if body or method == "POST":
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [
            f"{method} {path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in {**fields, **(headers or {})}.items()),
        ]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return self.answer(to_head=method == "HEAD")

    def answer(self, *, to_head: bool = False) -> Answer:
        """The next answer, 1xx left out. Raises Broken."""
        while True:
            answer, self._buffer = _cut_answer(self._buffer, to_head=to_head)
            if answer is None:
                self._buffer += self._more()
            elif answer.status >= 200:
                if answer.header("connection") == "close":
                    self.close()
                return answer

    def _more(self) -> bytes:
        data = self._sock.recv(65_536) if self._sock is not None else b""
        if not data:
            raise Broken(f"the connection ended behind {self._buffer[:200]!r}")
        return data


def connect(port: int) -> socket.socket:
    """A connection to the daemon."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _cut_answer(data: bytes, *, to_head: bool = False) -> tuple[Answer | None, bytes]:
    """(the first answer in `data`, the rest); None while it is not all there. Strict: Raises Broken."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None, data
    line, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = line.partition(" ")
    if version != "HTTP/1.1" or not status[:3].isdigit() or any("\n" in each or ":" not in each for each in lines):
        raise Broken(f"no answer: {head[:200]!r}")
    headers = [(name.lower(), value.strip()) for name, _, value in (each.partition(":") for each in lines)]
    fields = dict(headers)
    bare = to_head or int(status[:3]) in (204, 304) or int(status[:3]) < 200
    if bare:
        return Answer(int(status[:3]), headers, b""), rest
    if fields.get("transfer-encoding") == "chunked":
        body, behind = _cut_chunks(rest)
        return (None, data) if body is None else (Answer(int(status[:3]), headers, body), behind)
    length = int(fields.get("content-length", -1))
    if length < 0:  # up to the end of the connection
        return Answer(int(status[:3]), headers, rest), b""
    return (None, data) if len(rest) < length else (Answer(int(status[:3]), headers, rest[:length]), rest[length:])


def _cut_chunks(data: bytes) -> tuple[bytes | None, bytes]:
    body = b""
    while True:
        size, end, data = data.partition(b"\r\n")
        if not end:
            return None, b""
        count = int(size, 16)
        if len(data) < count + 2:
            return None, b""
        body, data = body + data[:count], data[count + 2 :]
        if not count:
            return body, data


def converse(port: int, data: bytes, *, quiet: float = PATIENCE) -> tuple[list[Answer], bool]:
    """Send all of `data`, as far as it is taken, and read until the server ends the connection: its answers, and
    whether it did end it. After `quiet` seconds without a word it is told that no more will come. Raises Broken
    for bytes that are no answer."""
    seen, ended = b"", False
    until = time.monotonic() + quiet + PATIENCE
    with connect(port) as sock:
        sock.setblocking(False)
        poller = select.poll()
        poller.register(sock, select.POLLIN | select.POLLOUT)
        while not ended and time.monotonic() < until:
            stirred = poller.poll(quiet * 1000)
            if not stirred and quiet < PATIENCE:
                sock.shutdown(socket.SHUT_WR)
            for _, what in stirred:
                if what & select.POLLOUT and data:
                    data = _send_some(sock, data)
                if not data:
                    poller.modify(sock, select.POLLIN)
                if what & ~select.POLLOUT:
                    more = _receive_some(sock)
                    ended = not more
                    seen += more
    return read_answers(seen), ended


def _send_some(sock: socket.socket, data: bytes) -> bytes:
    try:
        return data[sock.send(data[:1_048_576]) :]
    except BlockingIOError:
        return data
    except OSError:
        return b""  # it wants no more


def _receive_some(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65_536)
    except OSError:
        return b""


def read_answers(data: bytes) -> list[Answer]:
    """All that a connection brought. Raises Broken."""
    found = []
    while data:
        answer, data = _cut_answer(data)
        if answer is None:
            raise Broken(f"half an answer: {data[:200]!r}")
        found.append(answer)
    return found


def a_model(port: int) -> str:
    """The name of a model that can chat: the first that is listed."""
    with Connection(port) as connection:
        return str(json.loads(connection.ask("GET", "/v1/models").body)["data"][0]["id"])


# --- DNS rebinding and web pages ------------------------------------------------------------------


def attack_dns_rebinding(world: World) -> Row:
    """A name that is not ours, on every path by every method; a Host that is empty or there twice."""
    cases = Cases("DNS rebinding: a foreign Host, on every path and method")
    with Connection(world.port) as connection:
        for host, path, method in _product(given.FOREIGN_HOSTS, given.PATHS, given.METHODS):
            _expect(cases, connection, method, path, {"Host": host}, 403, "host_not_allowed")
        for host, path, method in _product(("", "  "), given.PATHS, given.METHODS):
            _expect(cases, connection, method, path, {"Host": host}, 400, "bad_http")
        for path, method in _product(given.PATHS, given.METHODS):
            twice = f"localhost\r\nHost: {given.FOREIGN_HOSTS[0]}"
            _expect(cases, connection, method, path, {"Host": twice}, 400, "bad_http")
        for host in given.OWN_HOSTS:
            _expect(cases, connection, "GET", "/health", {"Host": host}, 200)
    return cases.row()


def attack_web_pages(world: World) -> Row:
    """A page of another site: with Origin, by what Sec-Fetch-Site says, by a preflight, by a form."""
    cases = Cases("web pages: foreign Origin, Sec-Fetch-Site, preflights, forms")
    own = f"http://127.0.0.1:{world.port}"
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with Connection(world.port) as connection:
        for origin, path, method in _product(given.FOREIGN_ORIGINS, given.PATHS, given.METHODS):
            extra = wish if method == "OPTIONS" else {}
            _expect(cases, connection, method, path, {"Origin": origin, **extra}, 403, "origin_not_allowed")
        for site, path, method in _product(given.FOREIGN_SITES, given.PATHS, given.METHODS):
            _expect(cases, connection, method, path, {"Sec-Fetch-Site": site}, 403, "origin_not_allowed")
        for site, path in _product(given.FOREIGN_SITES, given.PATHS):  # an Origin that looks like ours proves nothing
            _expect(cases, connection, "POST", path, {"Origin": own, "Sec-Fetch-Site": site}, 403, "origin_not_allowed")
        for kind, path in _product(given.FORM_TYPES, ("/v1/chat/completions", "/portway/unload")):
            for mark in ({"Origin": own}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Mode": "cors"}):
                headers = {"Content-Type": kind, **mark}
                _expect(cases, connection, "POST", path, headers, 415, "unsupported_media_type")
        for kind in given.FORM_TYPES:  # cron's `curl -d`
            _expect(cases, connection, "POST", "/v1/embeddings", {"Content-Type": kind}, 400)
    return cases.row()


def _product(*lists: Sequence[str]) -> Iterator[tuple[str, ...]]:
    if not lists:
        yield ()
        return
    for first in lists[0]:
        for rest in _product(*lists[1:]):
            yield (first, *rest)


def _expect(
    cases: Cases,
    connection: Connection,
    method: str,
    path: str,
    headers: Mapping[str, str],
    status: int,
    code: str | None = None,
    body: bytes = b"",
) -> None:
    """One request that must be answered so; whatever is refused shows no page anything by CORS."""
    case = f"{method} {path[:60]} {dict(headers)}"[:200]
    try:
        answer = connection.ask(method, path, headers, body)
    except (OSError, Broken) as exc:
        connection.close()
        cases.judge(case, held=False, seen=exc)
        return
    held = answer.status == status and (code is None or method == "HEAD" or answer.code == code)
    held = held and not (status >= 400 and any(name.startswith("access-control") for name, _ in answer.headers))
    cases.judge(case, held=held, seen=(answer.status, answer.code))


# --- framing ---------------------------------------------------------------------------------------

SENTINEL = b"GET /v1/models/sentinel HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def attack_framing(world: World) -> Row:
    """Bytes that two readers could take for different requests: answered right, or one refusal and the end."""
    cases = Cases("request framing and smuggling")
    for framing in given.framings():
        try:
            answers, ended = converse(world.port, framing.data + SENTINEL)
        except (OSError, Broken) as exc:
            cases.judge(framing.name, held=False, seen=exc)
            continue
        seen = [answer.status for answer in answers]
        cases.judge(framing.name, held=ended and is_right(framing, answers), seen=(seen, ended))
    return cases.row()


def is_right(framing: given.Framing, answers: Sequence[Answer]) -> bool:
    """Whether these are the answers to it, the sentinel's behind them unless the connection was closed before."""
    if not answers or any(b"smuggled" in answer.body for answer in answers):
        return False
    last = answers[-1]
    if not framing.answers:
        return len(answers) == 1 and last.status in REFUSALS and last.header("connection") == "close"
    statuses = tuple(answer.status for answer in answers)
    reached_sentinel = b"sentinel" in last.body and last.status == 404
    return statuses == framing.answers + ((404,) if reached_sentinel else ()) and last.header("connection") == "close"


def attack_garbage(world: World, tries: int = 400, seed: int = 1) -> Row:
    """Requests with bytes changed at random, from a seed: an answer in order or the end, in time, nothing smuggled."""
    cases = Cases("requests with bytes changed at random")
    chance = random.Random(seed)  # noqa: S311 - to be repeatable
    whole = [framing.data for framing in given.framings() if framing.answers]
    for number in range(tries):
        data = _mutated(chance.choice(whole), chance)
        try:
            answers, ended = converse(world.port, data + SENTINEL * 2, quiet=0.5)  # it may be half a request now
            statuses = [answer.status for answer in answers]
            held = ended and all(status in (200, 403, 404, 405, 408, 415, *REFUSALS) for status in statuses)
            cases.judge(f"seed {seed}, number {number}", held=held, seen=(statuses, ended, data[:200]))
        except (OSError, Broken) as exc:
            cases.judge(f"seed {seed}, number {number}", held=False, seen=(exc, data[:200]))
    world.check()
    return cases.row()


def _mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(3):
            case 0:
                changed[at:at] = chance.choice((b"\r\n", b"\n", b"\r", b" ", b"\0", b":", b";", b",", b"\x80", b"0"))
            case 1:
                del changed[at : at + chance.randint(1, 3)]
            case _:
                changed[at : at + 1] = bytes([chance.randrange(256)])
    return bytes(changed)


# --- too slow, too many, too much ------------------------------------------------------------------


def attack_slow_heads(world: World, count: int = 200) -> Row:
    """Heads that come a byte at a time: others are answered meanwhile, and the slow ones end in time."""
    begun = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: "
    return _slow(Cases("slowloris: heads a byte at a time"), world, count, begun, of(world, "header_timeout", 10.0))


def attack_slow_bodies(world: World, count: int = 200) -> Row:
    """The same with bodies."""
    begun = given.POST + b"Content-Length: 60000\r\n\r\n{"
    return _slow(Cases("slowloris: bodies a byte at a time"), world, count, begun, of(world, "body_timeout", 60.0))


def _slow(cases: Cases, world: World, count: int, begun: bytes, timeout: float) -> Row:
    with ExitStack() as stack:
        started = time.monotonic()
        slow = {stack.enter_context(connect(world.port)) for _ in range(count)}
        for sock in slow:
            sock.setblocking(False)
            sock.send(begun)
        while slow and time.monotonic() < started + timeout + PATIENCE:
            world.check()
            time.sleep(timeout / 20)
            for sock in list(slow):
                if (data := _drip(sock)) is not None:
                    slow.discard(sock)
                    early = time.monotonic() - started < timeout * 0.9
                    cases.judge("ended", held=data[9:12] in (b"408", b"") and not early, seen=(data[:60], early))
        for _ in slow:
            cases.judge("still open", held=False, seen=f"after {timeout + PATIENCE:g} s")
    world.check()
    return cases.row()


def _drip(sock: socket.socket) -> bytes | None:
    """Send one byte; what the server said if it has ended the connection, else None."""
    try:
        sock.send(b"x")
    except OSError:
        pass  # it has ended; what it said before may still be there
    try:
        data = sock.recv(4096)
    except BlockingIOError:
        return None
    except OSError:
        return b""
    return data


def attack_idle_connections(world: World, count: int = 10_000) -> Row:
    """Connections on which nothing happens: all stay, cost no thread, and each is answered in the end."""
    cases = Cases(f"{count:,} idle connections")
    if problem := _room_for(count):
        return cases.not_tried(problem)
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(world.port)) for _ in range(count)]
        world.check()
        for sock in idle:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for sock in idle:
            cases.judge("idle", held=_receive_some(sock)[:12] == b"HTTP/1.1 200")
    world.check()
    return cases.row()


def _room_for(count: int) -> str:
    """Raise our own limit of descriptors; why it can't be, or ""."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError):
        return f"{count:,} connections need more descriptors than the {hard:,} that are allowed here"
    return ""


def attack_unread_answers(world: World, count: int = 20, requests: int = 20_000) -> Row:
    """Requests without end on connections that never read an answer: they stall themselves and nobody else."""
    cases = Cases("answers that are never read")
    with ExitStack() as stack:
        deaf = [stack.enter_context(connect(world.port)) for _ in range(count)]
        for sock in deaf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            left = given.OK * requests
            while left and (rest := _send_some(sock, left)) != left:
                left = rest
        _others_are_served(cases, world)
    return cases.row()


def attack_unread_streams(world: World, count: int = 4) -> Row:
    """Streams that are never read: each stalls for itself; others are served meanwhile."""
    cases = Cases("streams that are never read")
    flood = of(world, "flood", None)
    if flood is None:
        return cases.not_tried("this world has no model that floods")
    body = json.dumps({"model": flood, "stream": True, "messages": [{"role": "user", "content": "go on"}]}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(connect(world.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(request)
            cases.judge("the stream began", held=sock.recv(12) == b"HTTP/1.1 200")
        _others_are_served(cases, world)
    return cases.row()


def _others_are_served(cases: Cases, world: World, count: int = 20) -> None:
    for _ in range(count):
        started = time.monotonic()
        world.check()
        cases.judge("another client", held=time.monotonic() - started < PATIENCE, seen="it had to wait")


def attack_huge_bodies(world: World) -> Row:
    """A body that is too large: 413 before it is read, whether it says its size or not."""
    cases = Cases("a 1 GB body: 413 before it is read")
    most = of(world, "max_body", 32 * 1024**2)
    for path in ("/v1/chat/completions", "/v1/embeddings", "/portway/load", "/nowhere"):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
        answers, ended = converse(world.port, head + b"Content-Length: %d\r\n\r\n" % GIGABYTE)
        cases.judge(f"{path}, announced", held=ended and [a.code for a in answers] == ["body_too_large"], seen=answers)
        with connect(world.port) as sock:
            sent = _pour(sock, head + b"Transfer-Encoding: chunked\r\n\r\n", most + 64 * 1024**2)
            said = _receive_some(sock)
        held = said[9:12] == b"413" and sent < most + 32 * 1024**2
        cases.judge(f"{path}, chunked", held=held, seen=(sent, said[:60]))
    world.check()
    return cases.row()


def _pour(sock: socket.socket, head: bytes, most: int) -> int:
    """Send chunks until the server says something or takes no more; how many bytes it took."""
    piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    sock.sendall(head)
    sent = 0
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    while sent < most and not poller.poll(0):
        try:
            sock.sendall(piece)
        except OSError:
            break
        sent += len(piece)
    return sent


def attack_hostile_json(world: World) -> Row:
    """JSON that is none, that nests too deep, that says things twice: a clear 400, or it does no harm."""
    cases = Cases("hostile JSON: depth, numbers, duplicates, encodings")
    model = a_model(world.port).encode()
    with Connection(world.port) as connection:
        for body in given.bodies(model):
            started = time.monotonic()
            try:
                answer = connection.ask("POST", "/v1/chat/completions", {}, body.data)
            except (OSError, Broken) as exc:
                connection.close()
                cases.judge(body.name, held=False, seen=exc)
                continue
            right = answer.status == body.status if body.status else answer.status < 500
            clear = answer.status == 200 or b'"message"' in answer.body
            quick = time.monotonic() - started < PATIENCE / 2
            cases.judge(body.name, held=right and clear and quick, seen=(answer.status, answer.body[:120]))
    world.check()
    return cases.row()


# --- injection, SSRF, routes ------------------------------------------------------------------------

_EVIL = "x\r\nX-Evil: 1\r\n\r\nHTTP/1.1 200 OK\r\n\r\n\x1b[2J\u010a\u010dy"


def attack_header_injection(world: World) -> Row:
    """Line ends and escapes in everything that a client names: no answer gets a header or a line of the client's."""
    cases = Cases("header injection by names, fields and headers")
    model = a_model(world.port)
    messages = [{"role": "user", "content": "hi"}]
    bodies: dict[str, dict[str, Any]] = {
        "the model": {"model": _EVIL, "messages": messages},
        "an alias": {"model": f"flag:{_EVIL}", "messages": messages},
        "a field": {"model": model, "messages": messages, _EVIL: 1},
        "a role": {"model": model, "messages": [{"role": _EVIL, "content": "hi"}]},
        "a tool": {"model": model, "messages": messages, "tool_choice": _EVIL},
        "an effort": {"model": model, "messages": messages, "reasoning_effort": _EVIL},
        "reasoning": {"model": model, "messages": messages, "reasoning": {_EVIL: 1}},
    }
    with Connection(world.port) as connection:
        for name, body in bodies.items():
            for stream in (False, True):
                data = json.dumps({**body, "stream": stream}).encode()
                _clean(cases, connection, name, "POST", "/v1/chat/completions", {}, data)
        for path in (f"/v1/models/{quote(_EVIL)}", f"/{quote(_EVIL)}", f"/v1/models/x?{quote(_EVIL)}"):
            _clean(cases, connection, path, "GET", path, {}, b"")
        for header in ("X-Portway-Fallback", "Cache-Control", "X-Portway-Client", "User-Agent", "Origin"):
            _clean(cases, connection, header, "GET", "/v1/models", {header: "a\x85b\xadX-Evil: 1"}, b"")
    return cases.row()


def _clean(
    cases: Cases, connection: Connection, case: str, method: str, path: str, headers: Mapping[str, str], body: bytes
) -> None:
    try:
        answer = connection.ask(method, path, headers, body)
    except (OSError, Broken) as exc:
        connection.close()
        cases.judge(case, held=False, seen=exc)
        return
    odd = [name for name, value in answer.headers if name == "x-evil" or not (value.isprintable() and value.isascii())]
    cases.judge(case, held=not odd and answer.status != 500, seen=(answer.status, answer.headers))


def attack_remote_images(world: World) -> Row:
    """Addresses that a model server would fetch from inside this network: refused, with what to send instead."""
    cases = Cases("SSRF: http(s), file and other image addresses")
    model = a_model(world.port)
    with Connection(world.port) as connection:
        for address in given.REMOTE:
            for path, body in _with_address(model, address):
                for data in _spellings(body):
                    answer = connection.ask("POST", path, {}, data)
                    held = answer.status == 400 and answer.code == "remote_image" and b"data: URL" in answer.body
                    cases.judge(f"{path} {data[:160]!r}", held=held, seen=(answer.status, answer.body[:100]))
    return cases.row()


def _with_address(model: str, address: str) -> Iterator[tuple[str, dict[str, Any]]]:
    parts: Iterable[dict[str, Any]] = (
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "image_url": address},
        {"type": "input_image", "image_url": address},
        {"type": "video_url", "video_url": {"url": address}},
        {"type": "audio_url", "audio_url": {"url": address}},
        {"type": "file", "file": {"file_url": address}},
        {"type": "tool_result", "content": [{"type": "image_url", "image_url": {"url": address}}]},
    )
    for part in parts:
        messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}]
        yield "/v1/chat/completions", {"model": model, "messages": messages}
        yield "/v1/embeddings", {"model": model, "input": "x", "messages": messages}
        yield "/v1/embeddings", {"model": model, "input": [part]}


def _spellings(body: dict[str, Any]) -> Iterator[bytes]:
    plain = json.dumps(body)
    yield plain.encode()
    yield plain.replace("url", "\\u0075rl").encode()


def attack_foreign_paths(world: World) -> Row:
    """What the servers behind have, and Portway has not: 404, whoever asks and however it is written."""
    cases = Cases("paths that are not in the route table")
    with Connection(world.port) as connection:
        for path in given.FOREIGN_PATHS:
            for method in ("GET", "POST", "DELETE", "PUT"):
                try:
                    answer = connection.ask(method, path, {}, b"{}" if method == "POST" else b"")
                except (OSError, Broken) as exc:
                    connection.close()
                    cases.judge(f"{method} {path}", held=False, seen=exc)
                    continue
                known = path.startswith(("/v1/models/", "/models/"))  # there {id} may be anything
                held = answer.code in (("model_not_found", "method_not_allowed") if known else ("not_found",))
                cases.judge(f"{method} {path}", held=held, seen=(answer.status, answer.body[:100]))
    return cases.row()


Attack = Callable[[World], Row]
ATTACKS: tuple[Attack, ...] = (
    attack_dns_rebinding,
    attack_web_pages,
    attack_framing,
    attack_garbage,
    attack_slow_heads,
    attack_slow_bodies,
    attack_idle_connections,
    attack_unread_answers,
    attack_unread_streams,
    attack_huge_bodies,
    attack_hostile_json,
    attack_header_injection,
    attack_remote_images,
    attack_foreign_paths,
)
