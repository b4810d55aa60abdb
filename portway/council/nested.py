"""A call within a call: what a pseudo-model asks of a model, and how that one's answer is told on.

Shared by council.py and cascade.py. Whoever is asked goes by its own chain, cooldown and time limits:
the Router sees a call like any other. Knows no sockets and starts no threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from portway.call import Call, Tally, Usage
from portway.errors import ClientError, PortwayError
from portway.wire.asked import integer
from portway.wire.events import DONE, SSEReader, dumps, loads, sse

if TYPE_CHECKING:
    from portway.call import Attempt
    from portway.config import Model

Json = dict[str, Any]


# --- asking ---------------------------------------------------------------------------------------


def refuse_others(call: Call, target: Model) -> None:
    """A pseudo-model answers a chat, with one answer."""
    kind = target.backend.kind
    if call.endpoint != "chat":
        what = "embeddings" if call.endpoint == "embeddings" else "plain completions"
        raise not_by(target, f"makes no {what}: a {kind} answers /v1/chat/completions", "model")
    if (integer(call.body, "n", least=1) or 1) > 1:
        raise not_by(target, "gives one answer; send n = 1", "n")


def not_by(target: Model, what: str, param: str) -> ClientError:
    """The 400 for what a pseudo-model can't do."""
    return ClientError(f"The {target.backend.kind} '{target.name}' {what}.", param=param, code="unsupported")


def within(call: Call, model: Model, body: Mapping[str, Any], seconds: float, *, stream: bool) -> Call:
    """The call to `model` for `body`, which must end within `seconds`, and within the model's own time."""
    total = max(0.01, min(seconds, model.timeouts.total))
    mine = {"stream", "stream_options"}
    asked = {**{key: value for key, value in body.items() if key not in mine}, "model": model.name}
    if stream:
        asked["stream"] = True
    return replace(
        call,
        body=asked,
        raw=dumps(asked),
        model=replace(model, timeouts=replace(model.timeouts, total=total)),
        stream=stream,
        include_usage=False,
    )


def chunks_of(pieces: Iterable[bytes]) -> Iterator[Json]:
    """The chunks of a stream as it comes."""
    reader = SSEReader()
    for piece in pieces:
        for data in reader.feed(piece):
            if data != DONE[6:-2]:
                yield loads(data)


# --- telling it on --------------------------------------------------------------------------------


class Retelling:
    """A stream under the pseudo-model's name: of its own words, then of another's chunks.

    The chunk that ends the answer is held until `end`, since what is known of the whole goes with it.
    """

    def __init__(self, call: Call, name: str) -> None:
        self._include_usage = call.include_usage
        self._own = {"id": call.id, "object": "chat.completion.chunk", "created": call.created, "model": name}
        self._has_role = False
        self._last: Json = {"index": 0, "delta": {}, "finish_reason": "stop"}
        self._reader = SSEReader()

    def say(self, **delta: str) -> bytes:
        """A chunk of our own."""
        return self._event([{"index": 0, "delta": self._with_role(delta), "finish_reason": None}])

    def say_last(self, finish_reason: str) -> None:
        """How our own words end."""
        self._last = {"index": 0, "delta": {}, "finish_reason": finish_reason}

    def tell(self, piece: bytes) -> bytes:
        """The events of another's piece; b"" if there is nothing in it to be told before the end."""
        events = b""
        for chunk in map(loads, (data for data in self._reader.feed(piece) if data != DONE[6:-2])):
            choices = chunk.get("choices") or []
            for choice in choices:
                choice["delta"] = self._with_role(choice.get("delta") or {})
            if any(choice.get("finish_reason") for choice in choices):
                self._last = choices[0]
            elif choices:
                events += self._event(choices)
        return events

    def end(self, usage: Usage | None, told: Mapping[str, Any]) -> bytes:
        """The last chunk, with what is told of the answer, and the end."""
        own = {"portway": told}
        if not self._include_usage or usage is None:
            return self._event([self._last], own) + DONE
        return self._event([self._last]) + self._event([], {"usage": usage.to_json(), **own}) + DONE

    def _with_role(self, delta: Json) -> Json:
        """The role stands in the first chunk, and nowhere else."""
        if self._has_role:
            return {key: value for key, value in delta.items() if key != "role"}
        self._has_role = True
        return {"role": "assistant", **delta}

    def _event(self, choices: list[Json], more: Mapping[str, Any] | None = None) -> bytes:
        return sse(dumps({**self._own, "choices": choices, **(more or {})}))


def document(call: Call, name: str, body: Mapping[str, Any], usage: Usage | None, told: Mapping[str, Any]) -> bytes:
    """A plain answer under the pseudo-model's name; of `body` its choices, and what stands beside them."""
    own = {"id": call.id, "object": "chat.completion", "created": call.created, "model": name}
    counted = {"usage": usage.to_json()} if usage is not None else {}
    beside = {key: value for key, value in body.items() if key not in own and key != "usage"}
    return dumps({**own, **beside, **counted, "portway": told})


def message(text: str, finish_reason: str) -> Json:
    """The body of a plain answer that is ours to word."""
    said = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": said, "finish_reason": finish_reason}]}


def content_of(part: Mapping[str, Any]) -> str:
    """The text of a message or a delta."""
    content = part.get("content")
    return content if isinstance(content, str) else ""


# --- what it cost, and how it ended ---------------------------------------------------------------


@dataclass(slots=True)
class Bill:
    """The tokens of all calls within one; a count that nobody gave stays unknown."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def add(self, tally: Tally) -> None:
        """One more of them."""
        self.prompt_tokens = _sum(self.prompt_tokens, tally.prompt_tokens)
        self.completion_tokens = _sum(self.completion_tokens, tally.completion_tokens)

    @property
    def usage(self) -> Usage | None:
        """None rather than a zero that would be believed."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return None
        return Usage(self.prompt_tokens, self.completion_tokens)


def _sum(one: int | None, other: int | None) -> int | None:
    return (one or 0) + (other or 0) if one is not None or other is not None else None


def fate(name: str, error: PortwayError | None, otherwise: str) -> str:
    """What became of one that was asked, in words that begin with its name."""
    words = error.message.rstrip(".") if error is not None else otherwise
    return words if words.startswith(f"{name} ") else f"{name}: {words}"


class PanelFailed(PortwayError):
    """None of those who were asked could answer, or not enough of them. Blames no target: each of them was
    blamed by the call within. attempts: for X-Portway-Attempts and the log. told: the body's `portway`."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        type: str = "api_error",
        attempts: list[Attempt],
        told: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        said = {"x-should-retry": "false", "X-Portway-Attempts": "; ".join(map(str, attempts)), **(headers or {})}
        super().__init__(message, status=status, type=type, code=code, headers=said)
        self.attempts = attempts
        self.told = told

    def envelope(self) -> dict[str, Any]:
        """OpenAI's, and beside it what became of each."""
        return {**super().envelope(), "portway": dict(self.told)}
