"""What a backend of either kind says: one right answer in its parts, so that it can be broken between any two bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["ollama", "openai"]
KINDS: tuple[Kind, ...] = ("ollama", "openai")

LAST_CHUNK = b"0\r\n\r\n"
PROMPT_TOKENS, COMPLETION_TOKENS = 7, 4
FILLING = "and more "  # what an answer without an end goes on with
CREATED = 1_700_000_000


@dataclass(frozen=True, slots=True)
class Order:
    """What one request asks of a backend. text: the last message's; usage: a stream's usage is asked for."""

    kind: Kind
    model: str
    text: str
    stream: bool
    usage: bool = False

    @property
    def is_streamed(self) -> bool:
        """Whether its answer comes in parts: Portway has Ollama stream in any case."""
        return self.stream or self.kind == "ollama"


def read_order(path: str, body: Mapping[str, Any]) -> Order:
    """The Order of a request."""
    kind: Kind = "ollama" if path.startswith("/api/") else "openai"
    stream = bool(body.get("stream", kind == "ollama"))
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    return Order(kind, str(body["model"]), str(body["messages"][-1]["content"]), stream, usage)


def pieces(who: str, text: str) -> list[str]:
    """The pieces of what `who` answers to `text`. No two requests of different text have the same answer, nor two
    backends; some characters take two bytes."""
    return [who, " was asked: ", text, "; d\u00e9j\u00e0 vu."]


class Speech:
    """The right answer of `who` to an Order."""

    def __init__(self, order: Order, who: str) -> None:
        self.order = order
        self.texts = pieces(who, order.text)

    @property
    def opening(self) -> list[bytes]:
        """The parts without content that come first."""
        if self.order.kind == "ollama":
            return [self._line("")]
        return [self._event(self._chunk({"role": "assistant", "content": ""}))]

    @property
    def contents(self) -> list[bytes]:
        """The parts with content."""
        return [self.content(text) for text in self.texts]

    @property
    def closing(self) -> list[bytes]:
        """The parts that say that it was all."""
        if self.order.kind == "ollama":
            counts = {"prompt_eval_count": PROMPT_TOKENS, "eval_count": COMPLETION_TOKENS, "eval_duration": 1_000_000}
            return [self._line("", done=True, done_reason="stop", load_duration=1000, **counts)]
        end = [self._event(self._chunk({}, "stop"))]
        if self.order.usage:
            end.append(self._event({**self._chunk({}), "choices": [], "usage": _USAGE}))
        return [*end, b"data: [DONE]\n\n"]

    def content(self, text: str) -> bytes:
        """A part with this text in it."""
        if self.order.kind == "ollama":
            return self._line(text)
        return self._event(self._chunk({"content": text}))

    def silence(self) -> bytes:
        """A part that says nothing at all: a server's sign of life."""
        return b"\n" if self.order.kind == "ollama" else b": ping\n\n"

    def error(self, message: str, type: str = "server_error", code: int = 500) -> bytes:
        """A part that is an error, inside a 200."""
        body = error_body(self.order.kind, message, type, code)
        return body + b"\n" if self.order.kind == "ollama" else b"data: " + body + b"\n\n"

    def document(self, content: str | None = None) -> bytes:
        """The whole answer in one piece, for an openai backend that is not asked to stream."""
        message = {"role": "assistant", "content": "".join(self.texts) if content is None else content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return _dumps({**_envelope("chat.completion", self.order.model), "choices": [choice], "usage": _USAGE})

    def head(self, *fields: str, status: str = "200 OK") -> bytes:
        """The head of the answer, chunked unless `fields` has a length."""
        kind = "application/json"
        if self.order.is_streamed:
            kind = "application/x-ndjson" if self.order.kind == "ollama" else "text/event-stream"
        coding = [] if any(field.lower().startswith("content-length") for field in fields) else [_CHUNKED]
        return head_of(status, f"Content-Type: {kind}", *coding, *fields)

    def whole(self) -> bytes:
        """All of it."""
        if not self.order.is_streamed:
            return self.head(f"Content-Length: {len(self.document())}") + self.document()
        return self.head() + chunked([*self.opening, *self.contents, *self.closing]) + LAST_CHUNK

    def body(self) -> bytes:
        """All of it without any framing."""
        parts = [*self.opening, *self.contents, *self.closing]
        return b"".join(parts) if self.order.is_streamed else self.document()

    def until(self, place: str) -> bytes:
        """Its beginning, chunked: "before" any content, "inside" the first of it, "after" some of it."""
        return self.head() + self.parts_until(place)

    def rest_after(self) -> bytes:
        """What a stream goes on with after `until("after")`."""
        return chunked([*self.contents[2:], *self.closing]) + LAST_CHUNK

    def parts_until(self, place: str) -> bytes:
        """The same without the head."""
        if not self.order.is_streamed:
            return chunked([self.document()[: self._cut(place)]])
        first, second = self.contents[:2]
        parts = {"before": [], "inside": [first[: len(first) // 2]], "after": [first, second]}[place]
        return chunked([*self.opening, *parts])

    def raw_until(self, place: str) -> bytes:
        """The same without any framing."""
        if not self.order.is_streamed:
            return self.document()[: self._cut(place)]
        first, second = self.contents[:2]
        parts = {"before": [], "inside": [first[: len(first) // 2]], "after": [first, second]}[place]
        return b"".join([*self.opening, *parts])

    def _cut(self, place: str) -> int:
        """Where a document is cut: before its text, inside it, behind it."""
        document = self.document()
        text = document.index(b'"content"')
        return {"before": text, "inside": text + 14, "after": len(document) - 3}[place]

    def _line(self, text: str, **fields: Any) -> bytes:
        message = {"role": "assistant", "content": text}
        shape = {"model": self.order.model, "created_at": "2026-11-21T04:01:25Z", "message": message, "done": False}
        return _dumps({**shape, **fields}) + b"\n"

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**_envelope("chat.completion.chunk", self.order.model), "choices": [choice]}

    @staticmethod
    def _event(value: Mapping[str, Any]) -> bytes:
        return b"data: " + _dumps(value) + b"\n\n"


_CHUNKED = "Transfer-Encoding: chunked"
_USAGE = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": COMPLETION_TOKENS,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
}


def _envelope(object: str, model: str) -> dict[str, Any]:
    return {"id": "chatcmpl-torture", "object": object, "created": CREATED, "model": model}


def _dumps(value: object) -> bytes:
    """As servers do it: characters beyond ASCII as they are."""
    return json.dumps(value, ensure_ascii=False).encode()


def error_body(kind: Kind, message: str, type: str = "server_error", code: int = 500) -> bytes:
    """An error as either kind writes it."""
    error: object = message if kind == "ollama" else {"code": code, "message": message, "type": type}
    return _dumps({"error": error})


def chunked(parts: Iterable[bytes]) -> bytes:
    """Each part as a chunk."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part)


def head_of(status: str, *fields: str) -> bytes:
    """A response's head. status: as "200 OK"."""
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode("latin-1")


def response(status: str, kind: str, body: bytes, *fields: str) -> bytes:
    """A whole response with its length."""
    return head_of(status, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *fields) + body
