"""HTTP/1.1 messages without any I/O: heads in both directions, the chunked coding, a request's body.

Strict where a request comes in, since two readers who disagree on where a message ends are how
requests are smuggled (RFC 9112 sections 2.2, 3, 5, 6, 7.1, 11.2; cpython#150499 is what the
standard library's own server lets through). Answers of backends are read with the same code;
servers on this machine that break these rules are broken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

from portway.errors import ClientError

H = TypeVar("H")

MAX_HEAD = 65_536  # bytes of one head, or of one body's trailers; the OpenAI SDKs send about 1 KB
MAX_FIELDS = 128  # header fields of one head
MAX_UNREAD = 65_536  # bytes of a refused request's body that are read, so that its connection can live on
MAX_CHUNK_LINE = 1024  # bytes of a chunk's size line with its extensions
MAX_EXTENSIONS = 65_536  # bytes of all chunk extensions of one body; nobody uses any (CVE-2023-39326)

_TOKEN = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TEXT = bytes(b for b in range(256) if b == 0x09 or (b >= 0x20 and b != 0x7F))  # what a field's value may hold
_TARGET = bytes(set(range(0x21, 0x7F)) - {ord("#")})  # a fragment stays with the client
_HEX = b"0123456789abcdefABCDEF"
_FIELD = re.compile(rb"[%b]+:[^\x00-\x08\x0a-\x1f\x7f]*" % re.escape(_TOKEN))
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
# fields whose repetition makes a message mean two things
_SINGLE = frozenset(
    ("host", "content-length", "transfer-encoding", "content-type", "authorization", "origin", "expect")
)


class BadMessage(ValueError):
    """Bytes that are not the HTTP/1.1 they should be. `status` is what a server answers them with."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


# --- heads ----------------------------------------------------------------------------------------


class RequestHead(NamedTuple):
    """A request's head. Header names are lower-case; repeated fields are joined by ", "."""

    method: str
    path: str  # as sent, without the query
    query: str
    minor: int  # HTTP/1.minor
    headers: dict[str, str]
    length: int | None  # Content-Length
    chunked: bool
    keep_alive: bool


NO_HEAD = RequestHead("GET", "", "", 1, {}, None, False, False)  # of a request whose own can't be read


class ResponseHead(NamedTuple):
    """An answer's head. `length` None without `chunked` means: until the connection closes."""

    status: int
    headers: dict[str, str]
    length: int | None
    chunked: bool
    keep_alive: bool


def parse_request(head: bytes) -> RequestHead:
    """Read a request's head: everything up to and without the empty line. Raises BadMessage."""
    if len(head) > MAX_HEAD:
        raise head_too_long()
    line, _, block = head.partition(b"\r\n")
    method, path, query, minor = _request_line(line)
    headers = _fields(block)
    length, chunked = _framing(headers, minor)
    if not headers.get("host") and (minor or "host" in headers):
        raise BadMessage("the Host header is missing or empty")
    return RequestHead(method, path, query, minor, headers, length, chunked, _keeps_alive(headers, minor))


def head_too_long() -> BadMessage:
    """What is said of a head beyond MAX_HEAD, whether its end is in or not."""
    return BadMessage(f"the head is longer than {MAX_HEAD} bytes", 431)


def parse_response(head: bytes) -> ResponseHead:
    """Read the head of an answer to anything but HEAD. Raises BadMessage."""
    line, _, block = head.partition(b"\r\n")
    found = _STATUS_LINE.fullmatch(line)
    if found is None:
        raise BadMessage(f"not an HTTP/1.1 status line: {line[:60]!r}")
    minor, status = int(found[1]), int(found[2])
    headers = _fields(block)
    length, chunked = _framing(headers, minor)
    if status < 200 or status in (204, 304):
        length, chunked = 0, False
    ends_by_itself = chunked or length is not None
    return ResponseHead(status, headers, length, chunked, ends_by_itself and _keeps_alive(headers, minor))


_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,18})(?=\r\n|\Z)")
MAX_KINDS = 256  # kinds of heads remembered
MAX_KIND = 4096  # bytes of a head that is


class Heads(Generic[H]):
    """Reads heads, each kind of them once: those of one client's requests, or of one server's answers, differ
    in nothing but the Content-Length. make: parse_request, parse_response, or what is made of what they return;
    whatever it raises is not remembered. One look-up instead of 20 us.

    A head with exactly one Content-Length line is what it is with another number there: if it had a second
    one, or were broken elsewhere, `make` would raise.
    """

    def __init__(self, make: Callable[[bytes], H]) -> None:
        self._make = make
        self._kinds: dict[bytes, H] = {}

    def read(self, head: bytes) -> tuple[H, int | None]:
        """(the kind, made with a Content-Length of 0 if there is one written as usual; the real one, None where there
        is none so written: then the kind's own counts). Raises what `make` does."""
        found = _LENGTH.search(head)
        if found is None:
            length, kind = None, head
        else:
            start, end = found.span(1)
            length, kind = int(found[1]), b"%b0%b" % (head[:start], head[end:])
        made = self._kinds.get(kind)
        if made is None:
            made = self._make(kind)
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            if len(kind) <= MAX_KIND:
                self._kinds[kind] = made
        return made, length


def _request_line(line: bytes) -> tuple[str, str, str, int]:
    parts = line.split(b" ")
    if len(parts) != 3 or not parts[0] or parts[0].translate(None, _TOKEN):
        raise BadMessage("the request line is not `METHOD /path HTTP/1.1`")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadMessage("only HTTP/1.1 and HTTP/1.0 are spoken here", 505 if version[:5] == b"HTTP/" else 400)
    if target[:1] != b"/" or target.translate(None, _TARGET):
        raise BadMessage("the request target must be a path")
    path, _, query = target.decode("ascii").partition("?")
    return method.decode("ascii"), path, query, version[7] - 48


def _fields(block: bytes) -> dict[str, str]:
    """Header fields, CRLF between them. What each line must be is checked for all at once, in C:
    text but for the line ends, and names that are tokens."""
    if not block:
        return {}
    lines = block.decode("latin-1").split("\r\n")
    if block.translate(None, _TEXT) != b"\r\n" * (len(lines) - 1):
        raise BadMessage("a control character or a bare CR or LF in the head")
    if len(lines) > MAX_FIELDS:
        raise BadMessage(f"more than {MAX_FIELDS} header fields", 431)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not (colon and name):
            raise BadMessage(f"not a header field: {line[:60]!r}")
        key = name.lower()
        if key not in headers:
            headers[key] = value.strip(" \t")
        elif key in _SINGLE:
            raise BadMessage(f"two {key} headers")
        else:
            headers[key] += ", " + value.strip(" \t")
    if "".join(headers).encode("latin-1").translate(None, _TOKEN):
        raise BadMessage("a header name with a character that none may have")
    return headers


def _framing(headers: dict[str, str], minor: int) -> tuple[int | None, bool]:
    """Content-Length and whether the body is chunked (RFC 9112 section 6)."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        if length is not None:
            raise BadMessage("both Content-Length and Transfer-Encoding")
        if minor == 0:
            raise BadMessage("Transfer-Encoding in HTTP/1.0")
        if coding.lower() != "chunked":
            raise BadMessage("the only transfer coding spoken here is chunked", 501)
        return None, True
    if length is None:
        return None, False
    if not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise BadMessage("Content-Length is not a number")
    return int(length), False


def field_lines(headers: Mapping[str, str]) -> list[str]:
    """Header fields as they are sent, each with its line end. A value stays on its line, whatever it holds."""
    return [f"{name}: {value if value.isprintable() else _on_one_line(value)}\r\n" for name, value in headers.items()]


def _on_one_line(value: str) -> str:
    return "".join(char if char.isprintable() else " " for char in value)


def _keeps_alive(headers: dict[str, str], minor: int) -> bool:
    words = [word.strip(" \t") for word in headers.get("connection", "").lower().split(",")]
    return "close" not in words and (minor == 1 or "keep-alive" in words)


# --- the chunked coding ---------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def plain_size(line: bytes) -> int:
    """A chunk's size, as far as its line has nothing but that; else 0."""
    return 0 if not line or len(line) > 15 or line.translate(None, _HEX) else int(line, 16)


_SIZE, _DATA_END, _TRAILER = range(3)  # what the next line of the coding is


class ChunkedDecoder:
    """Takes the chunked coding off, however the bytes are cut (RFC 9112 section 7.1).

    `done` is set when the last chunk and its trailer section were read; `rest` then holds what
    came behind them. Extensions and trailers are checked and dropped.
    """

    __slots__ = ("_expected", "_extensions", "_left", "_tail", "_trailers", "done", "rest")

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._expected = _SIZE
        self._left = 0  # bytes of the present chunk's data that are still to come
        self._tail = b""  # the start of a line whose end is not in yet
        self._extensions = 0  # bytes of them so far
        self._trailers = 0  # bytes of them so far

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises BadMessage."""
        if self._tail:
            data, self._tail = self._tail + data, b""
        parts: list[bytes] = []
        pos = 0
        while not self.done:
            if self._expected == _SIZE:
                pos = self._whole_chunks(data, pos, parts)
            if self._left:
                part = data[pos : pos + self._left]
                parts.append(part)
                pos += len(part)
                self._left -= len(part)
                if self._left:
                    break
            end = data.find(b"\r\n", pos)
            if end < 0:
                self._keep(data[pos:])
                break
            self._line(data[pos:end])
            pos = end + 2
        else:
            self.rest = data[pos:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _whole_chunks(self, data: bytes, pos: int, parts: list[bytes]) -> int:
        """Take the chunks that are in from end to end; where the next one begins. A token of a stream is one of them:
        this loop makes 3 us of 9."""
        while (end := data.find(b"\r\n", pos)) > 0:
            size = plain_size(data[pos:end])
            start, stop = end + 2, end + 2 + size
            if not size or data[stop : stop + 2] != b"\r\n":
                break  # the last one, one with extensions or in pieces, or a mistake
            parts.append(data[start:stop])
            pos = stop + 2
        return pos

    def _line(self, line: bytes) -> None:
        if self._expected == _SIZE:
            self._left = self._size(line)
            self._expected = _DATA_END if self._left else _TRAILER
        elif self._expected == _DATA_END:
            if line:
                raise BadMessage("a chunk is not as long as its size says")
            self._expected = _SIZE
        elif line:
            self._trailers += len(line) + 2
            if self._trailers > MAX_HEAD:
                raise BadMessage("the trailers are too long", 431)
            if not _FIELD.fullmatch(line):
                raise BadMessage(f"not a trailer field: {line[:60]!r}")
        else:
            self.done = True

    def _size(self, line: bytes) -> int:
        size = line
        if b";" in line:
            size = line.partition(b";")[0].rstrip(b" \t")
            self._extensions += len(line) - len(size)
        if not 0 < len(size) <= 15 or size.translate(None, _HEX):
            raise BadMessage("not a chunk size")
        if len(line) > MAX_CHUNK_LINE or self._extensions > MAX_EXTENSIONS:
            raise BadMessage("the chunk extensions are too long")
        if line.translate(None, _TEXT):
            raise BadMessage("a control character in a chunk extension")
        return int(size, 16)

    def _keep(self, tail: bytes) -> None:
        """Wait for the rest of a line; what no rest can make right is refused at once."""
        if b"\n" in tail:
            raise BadMessage("a bare LF in the chunked coding")
        if self._expected == _DATA_END:
            if tail not in (b"", b"\r"):
                raise BadMessage("a chunk is not as long as its size says")
        elif self._expected == _SIZE:
            if len(tail) > MAX_CHUNK_LINE + 1:  # its CR may be in
                raise BadMessage("the chunk extensions are too long")
        elif self._trailers + len(tail) > MAX_HEAD:
            raise BadMessage("the trailers are too long", 431)
        self._tail = tail


# --- a request's body -----------------------------------------------------------------------------


class Request:
    """A whole request. refusal, poisoned: see Incoming. envelope: what its head says, if whoever reads it knows."""

    __slots__ = ("body", "cors", "envelope", "head", "poisoned", "refusal")

    def __init__(
        self,
        head: RequestHead,
        cors: Mapping[str, str],
        body: bytes,
        refusal: ClientError | None = None,
        poisoned: bool = False,
        envelope: Any = None,
    ) -> None:
        self.head = head
        self.cors = cors
        self.body = body
        self.refusal = refusal
        self.poisoned = poisoned
        self.envelope = envelope


class Incoming:
    """A request while its body comes in.

    refusal: what it is answered with instead of being served. poisoned: where the next request
    begins is not known, so that the connection closes after the answer. complete: nothing more is
    waited for. cors: the answer's CORS headers.
    """

    def __init__(self, head: RequestHead, max_body: int) -> None:
        self.head = head
        self.cors: dict[str, str] = {}
        self.refusal: ClientError | None = None
        self.poisoned = False
        self.complete = not head.chunked and not head.length
        self._limit = max_body
        self._parts: list[bytes] = []
        self._size = 0
        self._decoder = ChunkedDecoder() if head.chunked else None
        if head.length and head.length > max_body:
            self.refuse(_too_large(max_body))

    @classmethod
    def broken(cls, problem: BadMessage) -> Incoming:
        """A request whose head could not be read."""
        incoming = cls(NO_HEAD, 0)
        incoming.refuse(as_client_error(problem))
        incoming.poisoned = True
        return incoming

    @property
    def body(self) -> bytes:
        """What has come in so far; nothing of a refused one."""
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def request(self) -> Request:
        """What it has come to, once it is complete."""
        return Request(self.head, self.cors, self.body, self.refusal, self.poisoned)

    def refuse(self, error: ClientError) -> None:
        """Answer with `error`: once the body is in if it is known to be small, else at once, and close."""
        self.refusal = self.refusal or error
        self._parts.clear()
        small = self.head.length is not None and self.head.length <= MAX_UNREAD
        if not small:
            self.give_up()

    def give_up(self) -> None:
        """Wait for no more of the body: answer now, then close."""
        if not self.complete:
            self.complete = self.poisoned = True

    def feed(self, data: bytes) -> bytes:
        """Take the body's bytes; what is left belongs to the next request. Raises BadMessage."""
        if self.complete or not data:
            return data
        if self._decoder is not None:
            part = self._decoder.feed(data)
            self.complete, rest = self._decoder.done, self._decoder.rest
        else:
            missing = (self.head.length or 0) - self._size
            part, rest = (data, b"") if len(data) <= missing else (data[:missing], data[missing:])
            self.complete = len(part) == missing
        self._size += len(part)
        if self._size > self._limit:
            self.refuse(_too_large(self._limit))
        elif not self.refusal:
            self._parts.append(part)
        return rest


def _too_large(limit: int) -> ClientError:
    return ClientError(
        f"The request body is larger than server.max_body ({limit} bytes).", status=413, code="body_too_large"
    )


def as_client_error(problem: BadMessage) -> ClientError:
    """How a server answers bytes that it can't read."""
    return ClientError(f"Not a proper HTTP request: {problem}.", status=problem.status, code="bad_http")
