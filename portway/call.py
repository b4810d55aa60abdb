"""One request on its way: what is asked, what is measured, and the two seams it passes.

`Watch` is how a backend waits: it is handed in by whoever holds the client's connection, so
that every wait also sees the client leave. `Answer` is how a backend answers. Neither knows
a socket of the other side, and nothing here knows HTTP.

Whatever may have to wait is a coroutine. On the daemon's loop (loop.py) its waits suspend it; with a
Watch whose waits block it never suspends, and `finish` runs it like a function.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import socket

    from portway.config import Model

T = TypeVar("T")

Endpoint = Literal["chat", "completions", "embeddings"]
ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions", "embeddings")

# waiting: for a connection or for the backend to begin; loading: it says that it loads the model;
# prompt: it has the request, nothing has come yet (Ollama loads within this one too); answer: it answers
PHASES = ("waiting", "loading", "prompt", "answer")


@dataclass(slots=True)
class Call:
    """What the client asks, once parsed.

    body: the JSON object as sent; a backend copies before it changes anything.
    raw: the same as bytes, so that what need not change can be relayed as it came.
    model: the logical model that was asked for. id, created: the answer's own. fallback: whether
    others may answer in its place; a pseudo-model hands it on to those it asks.
    """

    endpoint: Endpoint
    body: dict[str, Any]
    raw: bytes
    model: Model
    stream: bool
    include_usage: bool
    id: str
    created: int
    fallback: bool = True


class Limits(NamedTuple):
    """One attempt's limits. Times are seconds, the last two time.monotonic() values.

    answer_by: until then the first content must be in, so that time is left for the targets behind
    this one. deadline: the whole request's end.
    """

    connect: float
    load: float
    first_token: float
    idle: float
    answer_by: float
    deadline: float


MOST = 2**63  # what a backend counts is below that; an integer of 400 digits, which JSON may hold, is no float


@dataclass(slots=True)
class Tally:
    """What is known of an answer; None = the backend did not say. Times are seconds."""

    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    content_chars: int = 0
    reasoning_chars: int = 0
    tool_calls: int = 0
    load_s: float | None = None
    decode_s: float | None = None
    truncated: bool = False  # the backend chopped the prompt in spite of truncate: false


@dataclass(slots=True)
class Attempt:
    """One target that was tried or skipped. `reason` is "ok" or a key of errors.FAILURES."""

    model: str
    reason: str
    seconds: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        """The form of X-Portway-Attempts: `fast-9b=first_token_timeout(120.0s)`."""
        if self.reason == "ok":
            return f"{self.model}=ok"
        inside = f"{self.detail}, {self.seconds:.1f}s" if self.detail else f"{self.seconds:.1f}s"
        return f"{self.model}={self.reason}({inside})"


class Watch(Protocol):
    """How a backend waits without losing sight of the client.

    phase: what is being waited for, one of PHASES; the backend says it, the log tells it when the
    client leaves.
    """

    phase: str

    async def readable(self, sock: socket.socket, until: float) -> bool:
        """Wait until `sock` can be read, or has failed: True; False once time.monotonic() passes
        `until`. Raises ClientGone as soon as the client is seen to have left."""
        ...

    async def writable(self, sock: socket.socket, until: float) -> bool:
        """The same for writing."""
        ...

    async def send(self, sock: socket.socket, data: bytes | memoryview) -> int:
        """sock.send(data), which does not wait for the socket; on the loop maybe for others who send, too. What it
        raises is the socket's."""
        ...

    async def pause(self, until: float) -> None:
        """Wait for nothing but the time; raises ClientGone like the others."""
        ...

    async def on_thread(self, *, for_good: bool = False) -> None:
        """From here on waits block: to be awaited before anything that can do nothing else. for_good: to the
        request's end; what runs coroutines by `finish` can't have them come back. Raises NoThread."""
        ...

    async def on_loop(self) -> None:
        """What could only block is over, unless that was for good: waits need no thread, where there is a loop."""
        ...


def pieces_of(served: Served) -> Iterator[bytes]:
    """All pieces of a stream, where waits block."""
    yield served.first
    while served.piece is not None and (piece := finish(served.piece())):
        yield piece


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine whose waits block to its end, on this thread."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise RuntimeError("a coroutine that was to block has suspended")


@dataclass(frozen=True, slots=True)
class Usage:
    """OpenAI's usage object from what a backend counted."""

    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, int]:
        """As it stands in an answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Answer(Protocol):
    """One backend's answer to a Call, already under the logical name that serves it.

    Read it by `piece`, or by `whole`; then, always, `close`.
    """

    tally: Tally
    warnings: list[str]  # X-Portway-Warning's words; may grow until the answer has ended

    async def piece(self) -> bytes:
        """The next complete server-sent events, ready to send; b"" behind the last ones. The first piece
        ends with the first content (text, reasoning or tool call): what comes before it, role-only
        frames, is held until then, so that whoever asks for the first piece may still turn to another
        target. The last piece ends with `data: [DONE]`. Raises BackendError; after the first piece only
        `stream_broken`, `idle_timeout` or `total_timeout`."""
        ...

    async def whole(self) -> bytes:
        """The answer as one JSON document. Raises BackendError."""
        ...

    async def close(self) -> None:
        """Give the connection back if the answer was read to its end, else close it, which is
        how a backend learns that nobody listens any more."""
        ...


class Composed:
    """Base of an Answer in which several models had a part: what the client is told of it beyond the
    target's name. Both may change until the answer's first piece, or the whole of it, is there."""

    @property
    def served_by(self) -> str:
        """X-Served-By's value."""
        raise NotImplementedError

    @property
    def headers(self) -> Mapping[str, str]:
        """Further headers."""
        raise NotImplementedError

    @property
    def hosts(self) -> Sequence[str]:
        """Where those who had a part in it run; empty if that is not known."""
        raise NotImplementedError


class Backend(Protocol):
    """One kind of server behind Portway."""

    async def open(self, call: Call, target: Model, limits: Limits, watch: Watch) -> Answer:
        """Send `call` to `target` and return once the answer's head is in. Raises BackendError
        (also for what this kind can't do: reason `unsupported`) and ClientGone."""
        ...

    def close(self) -> None:
        """Close idle connections; answers in flight end by themselves."""
        ...


@dataclass(slots=True)
class Served:
    """Who answers, and after which attempts.

    A stream has its `first` piece, read before the target was settled on; `piece` gives the others, as
    Answer.piece does. A plain answer is `whole`. queued: seconds spent waiting for a place in memory or at
    a backend.
    """

    model: Model
    answer: Answer
    attempts: list[Attempt]
    first: bytes = b""
    piece: Callable[[], Coroutine[Any, Any, bytes]] | None = None
    queued: float = 0.0
    whole: bytes | None = None

    @property
    def hosts(self) -> Sequence[str]:
        """Where the answer was made: its backend's host, or those of all who had a part in it."""
        if isinstance(self.answer, Composed):
            return self.answer.hosts
        return (self.model.backend.host,)
