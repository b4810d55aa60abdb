"""Every way in which a backend can fail, and what docs/reference.md says must come of it.

A Fault says how a backend plays it (`act`) and for which reason the attempt then fails: of a stream, of a plain answer
behind Ollama (which is streamed upstream, so that much is known of it), of a plain answer behind an openai backend
(which comes in one piece). What follows from a reason, status, next of the chain and cooldown, is read from the
reference's own table. matrix.py makes the requests and judges them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from scripts.torture_rows import ROOT
from scripts.torture_rows.saboteur import Act, Action, Drip, Pause, Step
from scripts.torture_rows.speech import FILLING, KINDS, LAST_CHUNK, Kind, Speech, chunked, error_body, head_of, response

CLOSE, RESET, HANG, SEEN, KILL = Step
RETRY_AFTER = 7  # seconds that a busy backend asks for, where it does


# --- what follows from a reason ---------------------------------------------------------------------


class Consequence(NamedTuple):
    """A row of the reference's table of reasons, in its own words. status: 0 = the backend's own, or none."""

    falls_back: str
    cools: str
    status: int


def contract() -> Mapping[str, Consequence]:
    """The table of docs/reference.md: reason -> what follows."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").split("\n## Reasons\n", 1)[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_]+)` \|[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    return {
        reason: Consequence(falls.strip(), cools.strip(), int(status) if status.strip().isdigit() else 0)
        for reason, falls, cools, status in rows
    }


# --- a fault ----------------------------------------------------------------------------------------

RIGHT = ""  # as a reason: nothing fails, the answer is right


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to fail.

    stream, ollama, openai: the reason for which the attempt fails when the client streams, and when it doesn't and
    this kind of backend answers; RIGHT = it does not. late: a stream has begun by then, so that its client gets an
    error as its last event. where: "answer", or what else fails: "refused", "full" (a port that takes no connection),
    "name", "no name", "tls", "certificate", "process". limit: the time limit that ends it; "" = none, it is known at
    once. verbatim: an openai backend's own body is forwarded. again: it can't be healed, and the next request fails
    likewise. never_says: what must not stand in the client's error.
    """

    what: str
    act: Act
    stream: str
    ollama: str
    openai: str
    late: bool = False
    where: str = "answer"
    limit: str = ""
    kinds: Sequence[Kind] = KINDS
    status: int = 0
    retry_after: int | None = None
    verbatim: bool = False
    again: bool = False
    never_says: str = ""

    def reason(self, kind: Kind, *, stream: bool) -> str:
        """Why the attempt fails."""
        return self.stream if stream else {"ollama": self.ollama, "openai": self.openai}[kind]


def _always(what: str, act: Act, reason: str, *, limit: str = "", where: str = "answer", **more: object) -> Fault:
    return Fault(what, act, reason, reason, reason, limit=limit, where=where, **more)  # type: ignore[arg-type]


def _silent(what: str, act: Act) -> Fault:
    """Nothing comes before the first content's time is over."""
    first = "first_token_timeout"
    return Fault(what, act, first, first, "answer_timeout", limit="first_token")


def _late(what: str, act: Act, ollama: str = "connection_lost", openai: str = "connection_lost") -> Fault:
    """It strikes after content: a stream breaks, a plain answer falls back."""
    return Fault(what, act, "stream_broken", ollama, openai, late=True)


# --- acts -------------------------------------------------------------------------------------------


def _right(say: Speech) -> Sequence[Action]:
    return [say.whole()]


def _then(place: str, *rest: Action) -> Act:
    """The answer up to a place, and what comes then; after content, once the client has it."""
    return lambda say: [*_begun(say, place), *rest]


def _begun(say: Speech, place: str) -> Sequence[Action]:
    return [say.until(place), *([SEEN] if place == "after" else [])]


def _only(*actions: Action) -> Act:
    return lambda _say: actions


def _slow_head(gap: float) -> Act:
    def act(say: Speech) -> Sequence[Action]:
        head, _, body = say.whole().partition(b"\r\n\r\n")
        return [Drip(head + b"\r\n\r\n", gap, 4), body]

    return act


def _half_a_chunk(place: str) -> Act:
    """A chunk says that it is longer than what comes of it."""
    return _then(place, b"400\r\nnot so much", CLOSE)


def _no_size(place: str) -> Act:
    return _then(place, b"what\r\n", CLOSE)


def _half_a_character(place: str) -> Act:
    """A whole part, but for its text: half of a character. Then all ends as it should."""

    def act(say: Speech) -> Sequence[Action]:
        broken = say.content("\u00e9").replace("\u00e9".encode(), "\u00e9".encode()[:1])
        if not say.order.is_streamed:
            document = say.document("\u00e9").replace("\u00e9".encode(), "\u00e9".encode()[:1])
            return [say.head(f"Content-Length: {len(document)}"), document]
        return [*_begun(say, place), chunked([broken, *say.closing]) + LAST_CHUNK]

    return act


def _character_in_two(say: Speech) -> Sequence[Action]:
    """Each chunk ends inside a character, where there is one, and comes by itself."""
    body = say.body()
    cuts = [0, *(at + 1 for at, byte in enumerate(body) if byte == 0xC3), len(body)]
    parts = [body[start:end] for start, end in pairwise(cuts)]
    steps: list[Action] = [say.head()]
    for part in parts:
        steps += [chunked([part]), Pause(0.02)]
    return [*steps, LAST_CHUNK]


def _too_long_a_length(say: Speech) -> Sequence[Action]:
    body = say.body()
    return [say.head(f"Content-Length: {len(body) + 100}"), body, CLOSE]


def _too_short_a_length(place: str) -> Act:
    def act(say: Speech) -> Sequence[Action]:
        return [say.head(f"Content-Length: {len(say.raw_until(place))}"), say.body(), CLOSE]

    return act


def _lengths(*values: str) -> Act:
    return lambda say: [say.head(*(f"Content-Length: {value}" for value in values)), say.body(), CLOSE]


def _error_inside(place: str, message: str, type: str = "server_error", code: int = 500) -> Act:
    def act(say: Speech) -> Sequence[Action]:
        if not say.order.is_streamed:
            return [response("200 OK", "application/json", error_body("openai", message, type, code))]
        return [*_begun(say, place), chunked([say.error(message, type, code)]) + LAST_CHUNK]

    return act


def _no_content(say: Speech) -> Sequence[Action]:
    if not say.order.is_streamed:
        body = say.document("")
        return [say.head(f"Content-Length: {len(body)}"), body]
    return [say.head(), chunked([*say.opening, *say.closing]) + LAST_CHUNK]


def _no_end(place: str) -> Act:
    """The answer stops, and all is closed as if it were whole. A document then has no length of its own."""

    def act(say: Speech) -> Sequence[Action]:
        if say.order.is_streamed:
            return [*_begun(say, place), LAST_CHUNK, CLOSE]
        return [head_of("200 OK", "Content-Type: application/json"), say.raw_until(place), CLOSE]

    return act


def _never_ends(say: Speech) -> Sequence[Action]:
    if not say.order.is_streamed:
        return [say.head(), *[step for _ in range(300) for step in (chunked([b" "]), Pause(0.2))]]
    more: Sequence[Action] = (chunked([say.content(FILLING)]), Pause(0.2))
    return [say.until("after"), *[step for _ in range(300) for step in more]]


def _pings(place: str) -> Act:
    def act(say: Speech) -> Sequence[Action]:
        sign = chunked([say.silence() if say.order.is_streamed else b" "])
        return [say.until(place), *[step for _ in range(300) for step in (sign, Pause(0.2))]]

    return act


def _early_hints(say: Speech) -> Sequence[Action]:
    return [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n", say.whole()]


def _byte_by_byte(say: Speech) -> Sequence[Action]:
    return [Drip(say.whole(), 0.0)]


def _refusal(status: str, message: str, type: str = "server_error", *fields: str) -> Act:
    code = int(status[:3])

    def act(say: Speech) -> Sequence[Action]:
        return [response(status, "application/json", error_body(say.order.kind, message, type, code), *fields)]

    return act


def _loads_for_a_while() -> Act:
    """To the first two who ask: "Loading model"; then a right answer."""
    asked: dict[str, int] = {}

    def act(say: Speech) -> Sequence[Action]:
        asked[say.order.model] = asked.get(say.order.model, 0) + 1
        return _LOADING(say) if asked[say.order.model] <= 2 else [say.whole()]

    return act


_LOADING = _refusal("503 Service Unavailable", "Loading model", "unavailable_error")
_PAGE = b"<!doctype html><html><head><title>Sign in</title></head><body><p>Sign in first.</body></html>"
_OVERFLOW = "request (3623 tokens) exceeds the available context size (2048 tokens), try increasing it"
_BUSY = "server busy, please try again. maximum pending requests exceeded"
_AFTER = f"Retry-After: {RETRY_AFTER}"
INVALID = "invalid_request_error"


# --- the faults -------------------------------------------------------------------------------------

CONNECTING: Mapping[str, Fault] = {
    "refused": _always("connection refused", _right, "connect_failed", where="refused"),
    "full": _always("connection never made", _right, "connect_timeout", where="full", limit="connect"),
    "name": _always("a name that does not resolve", _right, "connect_failed", where="name", again=True),
    "no-name": _always("a name that can't be one", _right, "connect_failed", where="no name", again=True),
    "tls-plain": _always(
        "TLS, and the server speaks none",
        _only(b"HTTP/1.1 400 Bad Request\r\n\r\n", CLOSE),
        "connect_failed",
        where="tls",
        again=True,
    ),
    "tls-closed": _always("TLS, closed in the handshake", _only(CLOSE), "connect_failed", where="tls", again=True),
    "tls-reset": _always("TLS, reset in the handshake", _only(RESET), "connect_failed", where="tls", again=True),
    "tls-hangs": _always(
        "TLS, and the handshake hangs", _only(HANG), "connect_timeout", where="tls", limit="connect", again=True
    ),
    "tls-untrusted": _always(
        "TLS, and nobody vouches for the certificate", _right, "connect_failed", where="certificate", again=True
    ),
}

BEFORE_THE_BODY: Mapping[str, Fault] = {
    "reset": _always("reset before a byte", _only(RESET), "connection_lost"),
    "closed": _always("closed before a byte", _only(CLOSE), "connection_lost"),
    "silence": _silent("hangs before a byte", _only(HANG)),
    "slow-head": _always("a head that takes its time", _slow_head(0.01), RIGHT),
    "endless-head": _silent("a head that takes too long", _slow_head(0.5)),
    "half-head": _always("closed inside the head", _only(b"HTTP/1.1 200 OK\r\nContent-Ty", CLOSE), "connection_lost"),
    "garbage": _always("no HTTP at all", _only(b"\x16\x03\x01 garbage\r\n\r\n", CLOSE), "bad_answer"),
    "huge-head": _always(
        "a head of a megabyte", _only(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20 + b"\r\n\r\n", CLOSE), "bad_answer"
    ),
    "early-hints": _always("100 and 103 in front of the answer", _early_hints, RIGHT),
    "byte-by-byte": _always("an answer byte by byte", _byte_by_byte, RIGHT),
}

IN_THE_BODY: Mapping[str, Fault] = {
    "hangs-before": _silent("hangs before the first content", _then("before", HANG)),
    "hangs-inside": _silent("hangs inside the first content", _then("inside", HANG)),
    "hangs-after": Fault(
        "hangs after the first content",
        _then("after", HANG),
        "idle_timeout",
        "idle_timeout",
        "answer_timeout",
        late=True,
        limit="idle",
    ),
    "pings-before": _silent("signs of life, and no content", _pings("before")),
    "pings-after": Fault(
        "signs of life after the first content",
        _pings("after"),
        "idle_timeout",
        "idle_timeout",
        "answer_timeout",
        late=True,
        limit="idle",
    ),
    "never-ends": Fault(
        "an answer that never ends",
        _never_ends,
        "total_timeout",
        "total_timeout",
        "answer_timeout",
        late=True,
        limit="total",
    ),
    "reset-before": _always("reset before the first content", _then("before", RESET), "connection_lost"),
    "closed-before": _always("closed before the first content", _then("before", CLOSE), "connection_lost"),
    "closed-inside": _always("closed inside the first content", _then("inside", CLOSE), "connection_lost"),
    "reset-after": _late("reset after the first content", _then("after", RESET)),
    "closed-after": _late("closed after the first content", _then("after", CLOSE)),
    "half-chunk-before": _always("half a chunk before any content", _half_a_chunk("before"), "connection_lost"),
    "half-chunk-after": _late("half a chunk after content", _half_a_chunk("after")),
    "no-size-before": _always("chunked coding that is none", _no_size("before"), "bad_answer"),
    "no-size-after": _late("the same after content", _no_size("after"), "bad_answer", "bad_answer"),
    "half-character-before": _always("half a UTF-8 character as content", _half_a_character("before"), "bad_answer"),
    "half-character-after": _late(
        "half a UTF-8 character after content", _half_a_character("after"), "bad_answer", "bad_answer"
    ),
    "character-in-two": _always("chunks that end inside characters", _character_in_two, RIGHT),
    "long-length": Fault("Content-Length larger than the answer", _too_long_a_length, RIGHT, RIGHT, "connection_lost"),
    "short-length": _always("Content-Length smaller than it", _too_short_a_length("inside"), "bad_answer"),
    "two-lengths": _always("two Content-Lengths", _lengths("10", "20"), "bad_answer"),
    "no-length": _always("a Content-Length that is no number", _lengths("1e3"), "bad_answer"),
    "html": _always("200 with an HTML page", _only(response("200 OK", "text/html", _PAGE)), "bad_answer"),
    "not-json": _always(
        "200 that is no JSON", _only(response("200 OK", "application/json", b'{"model": oops')), "bad_answer"
    ),
    "error-before": _always("200 with an error inside", _error_inside("before", "the runner died"), "server_error"),
    "error-after": _late(
        "an error inside, after content", _error_inside("after", "the runner died"), "server_error", "server_error"
    ),
    "overflow-inside": _always(
        "200 with an overlong prompt's 400 inside",
        _error_inside("before", _OVERFLOW, "exceed_context_size_error", 400),
        "context_length_exceeded",
    ),
    "empty": _always("200 with nothing", _only(response("200 OK", "application/json", b"")), "empty_answer"),
    "no-content": _always("200 with an answer that says nothing", _no_content, "empty_answer"),
    "no-end-before": Fault(
        "the end of the stream before any content",
        _no_end("before"),
        "connection_lost",
        "connection_lost",
        "bad_answer",
    ),
    "no-end-after": _late("the end of the stream without the answer's", _no_end("after"), openai="bad_answer"),
}

STATUSES: Mapping[str, Fault] = {
    "400": _always(
        "400", _refusal("400 Bad Request", "temperature: not so hot", INVALID), "bad_request", verbatim=True, status=400
    ),
    "400-overflow": _always(
        "400, the prompt is too long",
        _refusal("400 Bad Request", _OVERFLOW, "exceed_context_size_error"),
        "context_length_exceeded",
    ),
    "401": _always("401", _refusal("401 Unauthorized", "Invalid API Key"), "backend_auth"),
    "403": _always("403", _refusal("403 Forbidden", "forbidden"), "backend_auth"),
    "404": _always("404, no such model", _refusal("404 Not Found", "model 'x' not found"), "model_not_found"),
    "404-path": _always("404, no such path", _refusal("404 Not Found", "File Not Found"), "unsupported"),
    "408": _always("408", _refusal("408 Request Timeout", "request timeout"), "server_error"),
    "413": _always(
        "413", _refusal("413 Content Too Large", "too much of it", INVALID), "bad_request", verbatim=True, status=413
    ),
    "422": _always(
        "422", _refusal("422 Unprocessable Content", "no such thing", INVALID), "bad_request", verbatim=True, status=422
    ),
    "429": _always("429", _refusal("429 Too Many Requests", "slow down"), "rate_limited"),
    "429-after": _always(
        "429 with Retry-After",
        _refusal("429 Too Many Requests", "slow down", "x", _AFTER),
        "rate_limited",
        retry_after=RETRY_AFTER,
    ),
    "500": _always("500", _refusal("500 Internal Server Error", "CUDA error: out of memory"), "server_error"),
    "500-template": _always(
        "500, the chat template refuses",
        _refusal("500 Internal Server Error", "Jinja Exception: Conversation roles must alternate"),
        "template_error",
    ),
    "502": _always("502", _refusal("502 Bad Gateway", "bad gateway"), "server_error"),
    "502-page": _always(
        "502 with an HTML page", _only(response("502 Bad Gateway", "text/html", _PAGE)), "server_error", never_says="<"
    ),
    "503": _always("503", _refusal("503 Service Unavailable", _BUSY), "busy"),
    "503-after": _always(
        "503 with Retry-After",
        _refusal("503 Service Unavailable", _BUSY, "x", _AFTER),
        "busy",
        retry_after=RETRY_AFTER,
    ),
    "504": _always("504", _refusal("504 Gateway Timeout", "gateway timeout"), "server_error"),
    "529": _always("529", _refusal("529 Site Overloaded", "overloaded"), "busy"),
    "307": _always(
        "307 to another address",
        _only(response("307 Temporary Redirect", "text/plain", b"", "Location: http://x/")),
        "bad_answer",
    ),
    "loading": _always('"Loading model" for too long', _LOADING, "loading_timeout", limit="load", kinds=("openai",)),
    "loading-first": _always('"Loading model" for a while', _loads_for_a_while(), RIGHT, kinds=("openai",)),
}

KILLED: Mapping[str, Fault] = {
    "killed-before": _always(
        "its process killed before any content", _then("before", KILL), "connection_lost", where="process"
    ),
    "killed-after": Fault(
        "its process killed in the middle of the answer",
        _then("after", KILL),
        "stream_broken",
        "connection_lost",
        "connection_lost",
        late=True,
        where="process",
    ),
}

FAULTS: Mapping[str, Fault] = {**CONNECTING, **BEFORE_THE_BODY, **IN_THE_BODY, **STATUSES, **KILLED}
