"""HTTP/1.1 messages without any I/O: heads in both directions, the chunked coding, a request's body.

Strict where a request comes in, since two readers who disagree on where a message ends are how
requests are smuggled (RFC 9112 sections 2.2, 3, 5, 6, 7.1, 11.2; cpython#150499 is what the
standard library's own server lets through). Answers of backends are read with the same code;
servers on this machine that break these rules are broken.
"""

from __future__ import annotations

from dataclasses import dataclass

from portway.errors import ClientError

MAX_HEAD = 65_536  # bytes of one head; the OpenAI SDKs send about 1 KB
MAX_FIELDS = 128  # header fields of one head
MAX_UNREAD = 65_536  # bytes of a refused request's body that are read, so that its connection can live on
MAX_CHUNK_LINE = 1024  # bytes of a chunk's size line with its extensions

_TOKEN = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_FIELD_BYTES = bytes(b for b in range(256) if b in (0x09, 0x0D, 0x0A) or (b >= 0x20 and b != 0x7F))
_TARGET_BYTES = bytes(range(0x21, 0x7F))
_HEX = b"0123456789abcdefABCDEF"
# fields whose repetition makes a message mean two things
_SINGLE = frozenset(
    ("host", "content-length", "transfer-encoding", "content-type", "authorization", "origin", "expect", "date")
)


class BadMessage(ValueError):
    """Bytes that are not the HTTP/1.1 they should be. `status` is what a server answers them with."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's head. Header names are lower-case; repeated fields are joined by ", "."""

    method: str
    path: str  # as sent, without the query
    query: str
    minor: int  # HTTP/1.minor
    headers: dict[str, str]
    length: int | None  # Content-Length
    chunked: bool
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """An answer's head. `length` None without `chunked` means: until the connection closes."""

    status: int
    headers: dict[str, str]
    length: int | None
    chunked: bool
    keep_alive: bool


def parse_request(head: bytes) -> RequestHead:
    """Read a request's head: everything up to and without the empty line. Raises BadMessage."""
    line, _, block = head.partition(b"\r\n")
    method, path, query, minor = _request_line(line)
    headers = _fields(block)
    length, chunked = _framing(headers, minor)
    connection = headers.get("connection", "").lower()
    keep_alive = connection == "keep-alive" if minor == 0 else "close" not in _words(connection)
    if minor and "host" not in headers:
        raise BadMessage("the Host header is missing")
    return RequestHead(method, path, query, minor, headers, length, chunked, keep_alive)


def parse_response(head: bytes, *, to_head: bool = False) -> ResponseHead:
    """Read an answer's head. `to_head`: it answers a HEAD request and has no body. Raises BadMessage."""
    line, _, block = head.partition(b"\r\n")
    if line[:7] != b"HTTP/1." or line[7:8] not in b"01" or line[8:9] != b" " or not line[9:12].isdigit():
        raise BadMessage(f"not an HTTP/1.1 status line: {line[:60]!r}")
    minor, status = int(line[7:8]), int(line[9:12])
    headers = _fields(block)
    length, chunked = _framing(headers, minor)
    if to_head or status < 200 or status in (204, 304):
        length, chunked = 0, False
    words = _words(headers.get("connection", "").lower())
    keep_alive = "close" not in words and (minor == 1 or "keep-alive" in words)
    return ResponseHead(status, headers, length, chunked, keep_alive and (chunked or length is not None))


def _request_line(line: bytes) -> tuple[str, str, str, int]:
    parts = line.split(b" ")
    if len(parts) != 3 or not parts[0] or parts[0].translate(None, _TOKEN):
        raise BadMessage("the request line is not `METHOD /path HTTP/1.1`")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadMessage("only HTTP/1.1 and HTTP/1.0 are spoken here", 505 if version[:5] == b"HTTP/" else 400)
    if target[:1] != b"/" or target.translate(None, _TARGET_BYTES):
        raise BadMessage("the request target must be a path")
    path, _, query = target.decode("ascii").partition("?")
    return method.decode("ascii"), path, query, version[7] - 48


def _fields(block: bytes) -> dict[str, str]:
    """Header fields, CRLF between them. One pass of C code checks the bytes; the rest is splitting."""
    if not block:
        return {}
    lines = block.split(b"\r\n")
    if block.count(b"\r") != len(lines) - 1 or block.count(b"\n") != len(lines) - 1:
        raise BadMessage("a bare CR or LF in the head")
    if block.translate(None, _FIELD_BYTES):
        raise BadMessage("a control character in the head")
    if len(lines) > MAX_FIELDS:
        raise BadMessage(f"more than {MAX_FIELDS} header fields", 431)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name.translate(None, _TOKEN):
            raise BadMessage(f"not a header field: {line[:60]!r}")
        key = name.decode("ascii").lower()
        text = value.strip(b" \t").decode("latin-1")
        if key in headers:
            if key in _SINGLE:
                raise BadMessage(f"two {key} headers")
            text = f"{headers[key]}, {text}"
        headers[key] = text
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


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",")]


class ChunkedDecoder:
    """Takes the chunked coding off, however the bytes are cut (RFC 9112 section 7.1).

    `done` is set when the last chunk and its trailer section were read; `rest` then holds what
    came behind them. Extensions and trailers are read and dropped.
    """

    __slots__ = ("_left", "_tail", "_trailer", "done", "rest")

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._tail = b""  # the start of a line whose end is not in yet
        self._left = 0  # bytes of the present chunk that are still to come, its CRLF included
        self._trailer = -1  # bytes of trailers read; -1 = the last chunk is not in yet

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises BadMessage."""
        if self._tail:
            data, self._tail = self._tail + data, b""
        parts: list[bytes] = []
        pos = 0
        while not self.done:
            if self._left:
                pos = self._chunk(data, pos, parts)
                if self._left:
                    break
                continue
            end = data.find(b"\r\n", pos)
            if end < 0:
                self._keep(data[pos:])
                return b"".join(parts)
            self._line(data[pos:end])
            pos = end + 2
        if self.done:
            self.rest = data[pos:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk(self, data: bytes, pos: int, parts: list[bytes]) -> int:
        """Move chunk data from `data[pos:]` into `parts`; the position behind it."""
        end = pos + self._left
        if self._left > 2:
            part = data[pos : end - 2]
            if part:
                parts.append(part)
        ending = data[max(pos, end - 2) : end]
        if ending and ending != b"\r\n"[2 - min(2, self._left) :][: len(ending)]:
            raise BadMessage("a chunk is longer than its size says")
        self._left = max(0, end - len(data))
        return min(end, len(data))

    def _line(self, line: bytes) -> None:
        if self._trailer >= 0:
            self._trailer += len(line) + 2
            if not line:
                self.done = True
            elif self._trailer > MAX_HEAD:
                raise BadMessage("the trailers are too long", 431)
            return
        size, _, extension = line.partition(b";")
        size = size.rstrip(b" \t") if extension else size
        if len(line) > MAX_CHUNK_LINE or not 0 < len(size) <= 15 or size.translate(None, _HEX):
            raise BadMessage("not a chunk size")
        if line.translate(None, _FIELD_BYTES) or b"\n" in line or b"\r" in line:
            raise BadMessage("a control character in a chunk extension")
        count = int(size, 16)
        if count:
            self._left = count + 2
        else:
            self._trailer = 0

    def _keep(self, tail: bytes) -> None:
        if len(tail) > (MAX_CHUNK_LINE if self._trailer < 0 else MAX_HEAD):
            raise BadMessage("a chunk's line is too long")
        if b"\n" in tail:
            raise BadMessage("a bare LF in the chunked coding")
        self._tail = tail


class Incoming:
    """A request while its body comes in."""

    def __init__(self, head: RequestHead, max_body: int) -> None:
        self.head = head
        self.cors: dict[str, str] = {}
        self.refusal: ClientError | None = None
        self.poisoned = False  # where the next request begins is not known: close after the answer
        self._limit = max_body
        self._parts: list[bytes] = []
        self._size = 0
        self._decoder = ChunkedDecoder() if head.chunked else None
        self.complete = not head.chunked and not head.length
        if head.length and head.length > max_body:
            self.refuse(_too_large(max_body))

    @classmethod
    def broken(cls, problem: BadMessage) -> Incoming:
        """A request whose head could not be read."""
        incoming = cls(RequestHead("GET", "", "", 1, {}, None, False, False), 0)
        incoming.refuse(as_client_error(problem))
        incoming.poisoned = True
        return incoming

    @property
    def body(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def refuse(self, error: ClientError) -> None:
        """Answer with `error`; at once, and then close, unless little of the body is left to be read."""
        self.refusal = self.refusal or error
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
        self._parts.append(part)
        if self._size > self._limit:
            self._parts.clear()
            self.complete = False
            self.refuse(_too_large(self._limit))
        return rest


def _too_large(limit: int) -> ClientError:
    return ClientError(
        f"The request body is larger than server.max_body ({limit} bytes).", status=413, code="body_too_large"
    )


def as_client_error(problem: BadMessage) -> ClientError:
    return ClientError(f"Not a proper HTTP request: {problem}.", status=problem.status, code="bad_http")
