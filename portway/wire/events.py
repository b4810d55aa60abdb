"""JSON text, server-sent events and NDJSON as bytes: pure, incremental, bounded.

The two readers are fed whatever a socket gave and return what is complete by then. They split
whole buffers with bytes methods, so a token costs no Python loop over its bytes; how the input is
cut never changes what comes out. Nothing here knows HTTP, models or sockets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from json import encoder
from typing import Any, NoReturn

from portway.errors import ClientError

MAX_DEPTH = 200  # nesting of a request body; deeper is an attack on the parser's stack, not a request
MAX_EVENT = 16 * 1024 * 1024  # bytes of one event or line; base64 images never travel in this direction

DONE = b"data: [DONE]\n\n"  # how OpenAI ends a stream that went well
_DONE_DATA = b"[DONE]"
_BOM = b"\xef\xbb\xbf"


class WireError(ValueError):
    """A server's bytes are not what they claim to be: cut off, over the bound, or not JSON."""


# --- JSON -----------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity: Python reads them, JSON (RFC 8259, section 6) has no such thing."""
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    """1e999 would become inf, which no backend could be sent."""
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. A name that stands in it twice means one thing here and another in whatever reads it next."""
    value = dict(members)
    if len(value) != len(members):
        raise ValueError("a name stands twice in one object")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
_FAST_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # no call a float: embeddings hold a million


def _encoder(escape: Callable[[str], str]) -> Callable[[Any], str]:
    """Compact JSON of a value without cycles, each text by `escape`.

    As JSONEncoder.encode has it, but for what that makes anew for each call and that is half the time of a small one:
    the encoder in C, which is no public name. Where there is none, or another, it is JSONEncoder's own way.
    """
    whole = json.JSONEncoder(ensure_ascii=escape is encoder.encode_basestring_ascii, separators=(",", ":"))
    try:
        make = encoder.c_make_encoder  # type: ignore[attr-defined]
        parts = make(None, whole.default, escape, None, ":", ",", False, False, True)
    except (AttributeError, TypeError):
        return whole.encode
    return lambda value: "".join(parts(value, 0))


_encode = _encoder(encoder.encode_basestring)
_encode_ascii = _encoder(encoder.encode_basestring_ascii)


def loads_object(data: bytes) -> dict[str, Any]:
    """A request body as a dict. Raises ClientError (400) that says what is wrong and where.

    Strict UTF-8 JSON with an object at the top, and no name twice in an object. One leading byte order mark is
    skipped (RFC 8259, section 8.1, allows that; PowerShell writes it). No message quotes the body.
    """
    data = data.removeprefix(_BOM)
    if not data or data.isspace():
        raise ClientError("The request body is empty; a JSON object is needed.")
    try:
        value = _decoded(_DECODER, data.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise ClientError(f"The request body is not UTF-8: byte {exc.start} ({exc.reason}).") from None
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno}, column {exc.colno} (character {exc.pos})"
        raise ClientError(f"The request body is not valid JSON: {exc.msg}, at {where}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as exc:  # ours, or int() past sys.get_int_max_str_digits(); neither knows its position
        problem = "a number has too many digits" if "digits" in str(exc) else str(exc)
        raise ClientError(f"The request body is not valid JSON: {problem}.") from None
    if not isinstance(value, dict):
        raise ClientError("The request body must be a JSON object ({...}).")
    if _may_be_deep(data) and _deeper_than(value, MAX_DEPTH):
        raise _too_deep()
    return value


def _decoded(decoder: json.JSONDecoder, text: str) -> Any:
    """decoder.decode(text). Its two searches for white space cost as much as a small document: they are left
    out where there is none."""
    if text[:1] in ("{", "["):
        try:
            value, end = decoder.scan_once(text, 0)  # type: ignore[attr-defined]
        except StopIteration:
            end = -1  # decode() says where
        if end == len(text):
            return value
    return decoder.decode(text)


def _too_deep() -> ClientError:
    return ClientError(f"The request body is nested too deeply; at most {MAX_DEPTH} levels are read.")


def _may_be_deep(data: bytes) -> bool:
    """Whether there are enough brackets for it. To take some away finds them by memchr(), in 0.2 us for a chat of
    2 KB and in 6 for a prompt of 200 KB; count() looks at each byte, and takes 2 and 190."""
    most, enough = len(data) - MAX_DEPTH // 2, MAX_DEPTH // 2
    return len(data.replace(b"{", b"", enough)) <= most or len(data.replace(b"[", b"", enough)) <= most


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether containers nest deeper than `limit`, level by level, so without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def loads(data: bytes) -> Any:
    """A server's JSON text. Raises WireError, whatever is wrong with it."""
    try:
        return _decoded(_FAST_DECODER, data.decode("utf-8"))
    except RecursionError:
        raise WireError("JSON nested too deeply") from None
    except ValueError as exc:  # JSONDecodeError and UnicodeDecodeError are ValueErrors too
        raise WireError(f"not JSON: {exc}") from None


def dumps(value: Any) -> bytes:
    """Compact UTF-8 JSON. Lone surrogates, legal as escapes in JSON but not in UTF-8, stay escapes."""
    try:
        return _encode(value).encode("utf-8")
    except UnicodeEncodeError:
        return _encode_ascii(value).encode("ascii")


# --- server-sent events ---------------------------------------------------------------------------


def sse(data: bytes) -> bytes:
    """One event. `data` is JSON text, so it holds no line end."""
    return b"data: " + data + b"\n\n"


class SSEReader:
    """Server-sent events as the HTML standard's "event stream interpretation" reads them.

    Only the `data` field matters here; `event`, `id`, `retry`, comments and events without data
    are dropped. `limit`: bytes of one event, fields and comments included.
    """

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self._limit = limit
        self._rest = bytearray()  # the event under way, line ends already \n
        self._after_cr = False  # the last byte was \r: a \n that follows belongs to it
        self._started = False  # past the place where a byte order mark may stand

    @property
    def pending(self) -> bool:
        """Whether an event is under way: what comes next belongs to it."""
        return bool(self._rest) or self._after_cr

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that `data` completes. Raises WireError past the limit."""
        data = self._plain_line_ends(data)
        if not self._started:
            data = self._skip_mark(data)
        rest = self._rest
        if rest:
            if b"\n\n" not in data and not (data[:1] == b"\n" and rest[-1:] == b"\n"):
                rest += data  # append only: one huge event must not be copied at every feed
                _bound(len(rest) - rest.endswith(b"\n"), self._limit)  # that \n may be half of the end
                return []
            data = bytes(rest) + data
            rest.clear()
        *frames, tail = data.split(b"\n\n")
        if len(data) > self._limit:
            _bound(max(len(tail) - tail.endswith(b"\n"), *map(len, frames), 0), self._limit)
        rest += tail
        events = []
        for frame in frames:
            # nearly every event is one line of data; the others take the long way
            plain = frame.startswith(b"data: ") and b"\n" not in frame
            if payload := frame[6:] if plain else _data_of(frame):
                events.append(payload)
        return events

    def finish(self) -> bytes | None:
        """At the stream's end: None if it ended between events, or the last event's data if only
        the blank line after it is missing (some servers). Raises WireError if it was cut off."""
        rest = bytes(self._rest)
        self._rest.clear()
        lines = [line for line in rest.split(b"\n") if line and not line.startswith(b":")]
        if not lines:
            return None
        payload = _data_of(rest)
        if payload == _DONE_DATA or _is_whole(payload):
            return payload
        raise WireError("the stream was cut off inside an event")

    def _plain_line_ends(self, data: bytes) -> bytes:
        if self._after_cr and data:
            self._after_cr = False
            if data[:1] == b"\n":
                data = data[1:]
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _skip_mark(self, data: bytes) -> bytes:
        """Drop a leading byte order mark; with fewer than three bytes it may still be one coming."""
        data = bytes(self._rest) + data
        self._rest.clear()
        if len(data) < len(_BOM) and _BOM.startswith(data):
            self._rest += data
            return b""
        self._started = True
        return data.removeprefix(_BOM)


def _data_of(frame: bytes) -> bytes:
    """The data lines of one event, joined by line feeds; one space after the colon is not part of it."""
    lines = []
    for line in frame.split(b"\n"):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines)


# --- NDJSON ---------------------------------------------------------------------------------------


class NDJSONReader:
    """JSON values one a line, as Ollama streams them. Blank lines are skipped. `limit`: bytes of a line."""

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self._limit = limit
        self._rest = bytearray()  # the line under way

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without white space around them. Raises WireError past the limit."""
        rest = self._rest
        if rest:
            if b"\n" not in data:
                rest += data  # append only: one huge line must not be copied at every feed
                _bound(len(rest), self._limit)
                return []
            data = bytes(rest) + data
            rest.clear()
        *lines, tail = data.split(b"\n")
        if len(data) > self._limit:
            _bound(max(map(len, (*lines, tail))), self._limit)
        rest += tail
        return [line for raw in lines if (line := raw.strip())]

    def finish(self) -> bytes | None:
        """At the stream's end: None if it ended after a line, or the last line if only its line end
        is missing (some servers). Raises WireError if it was cut off."""
        rest = bytes(self._rest).strip()
        self._rest.clear()
        if not rest:
            return None
        if _is_whole(rest):
            return rest
        raise WireError("the stream was cut off inside a line")


def _bound(size: int, limit: int) -> None:
    if size > limit:
        raise WireError(f"one event is larger than {limit} bytes")


def _is_whole(text: bytes) -> bool:
    """Whether `text` is a whole JSON object. Only an object shows its own end: 12 may be a cut 123."""
    if not text.startswith(b"{"):
        return False
    try:
        loads(text)
    except WireError:
        return False
    return True
