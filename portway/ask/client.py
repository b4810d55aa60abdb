"""One HTTP request and its answer, and JSON, for a process that lives 15 ms.

`socket` and `json` are left out for what they import (enum, selectors, re): together they take as
long as the rest of the process. Below them are `_socket` and `_json`, which do all the work anyway.
This is no general client: one request a connection, no redirects, no proxies, no cookies.
"""

from __future__ import annotations

import _socket

try:
    from _json import encode_basestring_ascii as _quote
except ImportError:  # not CPython
    from json.encoder import encode_basestring_ascii as _quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, NoReturn, Self

    Scan = Callable[[str, int], tuple[Any, int]]

CONNECT_TIMEOUT = 5.0  # seconds; the daemon is on this machine, or at least in this house
TICK = 0.1  # seconds between two calls of `tick` while nothing comes in
RECEIVE = 65_536  # bytes asked of one recv()
MAX_LINE = 65_536  # bytes of one header or chunk size line; a longer one is no HTTP


class Unreachable(Exception):
    """Nothing answers at the address. str() says why, in the system's words."""


class Broken(Exception):
    """The answer is no HTTP, or ends before its end. str() is a sentence that says which."""


# --- JSON ------------------------------------------------------------------------------------


def dumps(value: Any) -> str:
    """`value` (of dict, list, str, bool, int, float, None) as compact ASCII JSON."""
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, dict):
        return "{" + ",".join([f"{_quote(name)}:{dumps(item)}" for name, item in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ",".join([dumps(item) for item in value]) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError."""
    text = text.strip(" \t\r\n")
    try:
        value, end = _scanner()(text, 0)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (StopIteration, SystemError):  # SystemError: Python 3.11's can't complain without json.decoder
        end = -1
    if end != len(text):
        import json

        return json.loads(text)  # which says what is wrong, and where
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _Context:
    """What the scanner reads its settings from, as json.JSONDecoder has them."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_refuse_constant)


def _scanner() -> Scan:
    try:
        from _json import make_scanner
    except ImportError:  # not CPython
        import json

        return json.JSONDecoder().raw_decode
    return make_scanner(_Context)  # type: ignore[arg-type] # it takes whatever has these attributes


# --- HTTP ------------------------------------------------------------------------------------


class Address:
    """An API's base URL, taken apart. Raises ValueError. A path may end with or without /v1."""

    def __init__(self, url: str) -> None:
        scheme, separator, rest = url.partition("://")
        if not separator or scheme.lower() not in ("http", "https") or not url.isprintable() or " " in url:
            raise ValueError("not an http:// or https:// address")
        self.url = url
        self.secure = scheme.lower() == "https"
        self.authority, _, path = rest.partition("/")
        path = path.partition("?")[0].strip("/")
        self.path = "/" + (path if path == "v1" or path.endswith("/v1") else f"{path}/v1".lstrip("/"))
        host, port = _split_authority(self.authority)
        if not host.isascii() or not host:
            raise ValueError("without a host name (in ASCII)")
        if not (port.isascii() and port.isdigit() and int(port) <= 65535) and port:
            raise ValueError(f"{port!r} is not a port")
        self.host = host
        self.port = int(port) if port else (443 if self.secure else 80)


def _split_authority(authority: str) -> tuple[str, str]:
    """Host and port; "[::1]:11436" is how an IPv6 address has both."""
    if authority.startswith("["):
        host, _, rest = authority[1:].partition("]")
        return host, rest.removeprefix(":")
    host, _, port = authority.partition(":")
    return host, port


class Exchange:
    """A request and its answer on a connection of their own. Leaving the `with` block closes it,
    which is also how a generation is cancelled. `tick` is called all the while something is awaited.

    No time limit is set on the answer: the daemon has one for each request, and ends it with an error.
    """

    status: int
    headers: dict[str, str]  # of the answer; names are lower-case

    def __init__(self, address: Address, tick: Callable[[], None] | None) -> None:
        self._address = address
        self._tick = tick or _nothing
        self._timeout = TICK if tick else None
        self._buffer = b""
        self._socket = _connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> None:
        """Send the request and read the answer's head. Raises Broken."""
        lines = [f"{method} {self._address.path}{path} HTTP/1.1", f"Host: {self._address.authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        try:
            self._socket.sendall("\r\n".join(lines).encode("latin-1") + body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all was sent; the reason may still be there to be read
        self._socket.settimeout(self._timeout)
        self._read_head()
        while self.status < 200:
            self._read_head()

    def body(self) -> Iterator[bytes]:
        """The answer's body as it comes in. Raises Broken if it ends early."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            yield from self._chunks()
        elif "content-length" in self.headers:
            yield from self._exactly(_number(self.headers["content-length"], 10))
        else:
            yield self._buffer
            while data := self._receive():
                yield data

    def whole_body(self) -> bytes:
        """The answer's body, all of it. Raises Broken."""
        return b"".join(self.body())

    def _read_head(self) -> None:
        version, _, status = self._line().partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdigit():
            raise Broken("what answers there is no HTTP server")
        self.status = int(status[:3])
        self.headers = {}
        while line := self._line():
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()

    def _chunks(self) -> Iterator[bytes]:
        while size := _number(self._line().partition(";")[0].strip(), 16):
            yield from self._exactly(size)
            self._line()
        while self._line():
            pass  # trailers

    def _exactly(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, in the pieces in which they come."""
        while count:
            data = self._buffer or self._more()
            piece, self._buffer = data[:count], data[count:]
            count -= len(piece)
            yield piece

    def _line(self) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE:
                raise Broken("what answers there is no HTTP server")
            self._buffer += self._more()
        line, self._buffer = self._buffer[:end], self._buffer[end + 1 :]
        return line.decode("latin-1").rstrip("\r")

    def _more(self) -> bytes:
        data = self._receive()
        if not data:
            raise Broken("the connection was closed in the middle of the answer")
        return data

    def _receive(self) -> bytes:
        """What is there, b"" at the end."""
        while True:
            try:
                data = self._socket.recv(RECEIVE)
            except TimeoutError:
                self._tick()
            except OSError as exc:
                raise Broken(f"the connection broke: {exc.strerror or exc}") from None
            else:
                self._tick()
                return data


def _nothing() -> None:
    """Stands in for a tick that nobody wants."""


def _number(text: str, base: int) -> int:
    digits = "0123456789abcdefABCDEF"[: 10 if base == 10 else None]
    if not text or text.strip(digits):
        raise Broken("what answers there is no HTTP server")
    return int(text, base)


def _connect(address: Address) -> _socket.socket:
    """Try each of the host's addresses: `localhost` has two, and a server often listens on one."""
    reason = ""
    try:
        # bytes: a str would be taken through the idna codec, whose import takes milliseconds
        found = _socket.getaddrinfo(address.host.encode(), address.port, 0, _socket.SOCK_STREAM)
    except OSError as exc:
        raise Unreachable(exc.strerror or str(exc)) from None
    for family, kind, protocol, _, where in found:
        sock = _socket.socket(family, kind, protocol)
        try:
            sock.settimeout(CONNECT_TIMEOUT)
            sock.connect(where)
            sock.settimeout(None)
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)
            return _secure(sock, address.host) if address.secure else sock
        except OSError as exc:
            reason = exc.strerror or str(exc)
            sock.close()
    raise Unreachable(reason)


def _secure(sock: _socket.socket, host: str) -> _socket.socket:
    import socket
    import ssl

    wrapped = socket.socket(fileno=sock.detach())
    return ssl.create_default_context().wrap_socket(wrapped, server_hostname=host)
