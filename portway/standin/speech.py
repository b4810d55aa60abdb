"""One generated answer of the stand-in in Ollama's lines, streamed or whole. It knows no sockets."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from portway.standin import answers, protocol

Shape = Callable[..., dict[str, Any]]  # a message's fields -> where chat or generate has them


def chat_shape(**said: Any) -> dict[str, Any]:
    """A piece of an answer where /api/chat has it."""
    return {"message": {"role": "assistant", "content": "", **said}}


def generate_shape(**said: Any) -> dict[str, Any]:
    """A piece of an answer where /api/generate has it."""
    return {"response": said.pop("content", ""), **said}


def line(order: protocol.Order, said: Mapping[str, Any], **end: Any) -> dict[str, Any]:
    """One line; with any `end` (done_reason, metrics) it is the last."""
    return {"model": order.named, "created_at": protocol.now(), **said, "done": bool(end), **end}


@dataclass(frozen=True, slots=True)
class Timing:
    """How long an answer took, in seconds."""

    total: float
    load: float

    def to_json(self) -> dict[str, int]:
        """The metrics of the last line with counts to be filled in; durations are in nanoseconds, and
        what follows the load is one tenth prompt."""
        total, load = int(self.total * 1e9), int(self.load * 1e9)
        prompt = (total - load) // 10
        return {
            "total_duration": total,
            "load_duration": load,
            "prompt_eval_count": 0,
            "prompt_eval_duration": prompt,
            "eval_count": 0,
            "eval_duration": total - load - prompt,
        }


class Speech:
    """The answer to an order. Raises Refused when the prompt does not fit and may not be chopped.

    legacy: tool calls without ids and with index 0 each. silent: a proper answer without any content.
    """

    def __init__(
        self,
        order: protocol.Order,
        ask: answers.Ask,
        num_ctx: int,
        shape: Shape,
        *,
        legacy: bool = False,
        silent: bool = False,
    ) -> None:
        self._order = order
        self._shape = shape
        self._legacy = legacy
        ask, self._prompt_tokens = _fitted(order, ask, num_ctx)
        if not order.shift:  # without context shift the answer ends where the context does
            room = num_ctx - self._prompt_tokens
            ask = replace(ask, limit=room if ask.limit is None else min(room, ask.limit))
        self._top_logprobs = ask.top_logprobs
        self._reply = answers.Reply([], [], [], "stop") if silent else answers.reply(order.model, ask)
        self._tool_calls = [self._tool_call(call) for call in self._reply.tool_calls]
        self._late_calls = self._tool_calls if order.model.native else []
        early = len(self._tool_calls) - len(self._late_calls)
        self.pieces = len(self._reply.thinking) + len(self._reply.content) + early

    def lines(self) -> Iterator[bytes]:
        """All lines but the last, one a piece."""
        for said, logprobs in self._said():
            yield _encoded(line(self._order, {**self._shape(**said), **logprobs}))

    def last_line(self, timing: Timing) -> bytes:
        """The line that says done."""
        said = {"tool_calls": self._late_calls} if self._late_calls else {}
        return _encoded(self._end(self._shape(**said), timing))

    def silence(self) -> bytes:
        """A line that has no content as yet."""
        return _encoded(line(self._order, self._shape()))

    def whole(self, timing: Timing) -> dict[str, Any]:
        """The one object of stream: false."""
        said: dict[str, Any] = {"content": "".join(self._reply.content)}
        if self._reply.thinking:
            said["thinking"] = "".join(self._reply.thinking)
        if self._tool_calls:
            said["tool_calls"] = self._tool_calls
        logprobs = [one for _, part in self._said() for one in part.get("logprobs", ())]
        return self._end({**self._shape(**said), **({"logprobs": logprobs} if logprobs else {})}, timing)

    def _said(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each piece's message fields, and its logprobs."""
        for token in self._reply.thinking:
            yield {"thinking": token}, self._logprobs(token)
        for call in self._tool_calls[len(self._late_calls) :]:
            yield {"tool_calls": [call]}, {}
        for token in self._reply.content:
            yield {"content": token}, self._logprobs(token)

    def _logprobs(self, token: str) -> dict[str, Any]:
        top = self._top_logprobs
        return {} if top is None else {"logprobs": [answers.logprobs(token, top)]}

    def _tool_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if self._legacy:
            return {"function": {**call, "index": 0}}
        fresh = secrets.token_hex(16) if self._order.model.native else f"call_{secrets.token_hex(4)}"
        return {"id": fresh, "function": dict(call)}

    def _end(self, said: Mapping[str, Any], timing: Timing) -> dict[str, Any]:
        counts = {"prompt_eval_count": self._prompt_tokens, "eval_count": self._reply.eval_count}
        numbers = {name: number for name, number in (timing.to_json() | counts).items() if number}  # Go omits zeros
        context = {"context": list(range(sum(counts.values())))} if self._order.context else {}
        return line(self._order, said, done_reason=self._reply.done_reason, **context, **numbers)


def _fitted(order: protocol.Order, ask: answers.Ask, num_ctx: int) -> tuple[answers.Ask, int]:
    """The prompt, chopped if need be and allowed, and its tokens."""
    count = answers.prompt_tokens(ask.messages, ask.tools) + len(answers.tokens(ask.suffix))
    if count <= num_ctx:
        return ask, count
    if not order.truncate and not order.model.chops:
        raise protocol.overflow(count, num_ctx)
    messages, fitting = answers.fit(ask.messages, ask.tools, num_ctx)
    kept = answers.prompt_tokens(messages, ask.tools)
    if kept > num_ctx and order.model.native:
        raise protocol.overflow(kept, num_ctx)
    return replace(ask, messages=messages), fitting


def _encoded(obj: Mapping[str, Any]) -> bytes:
    return protocol.encode(obj) + b"\n"
