"""Ollama by its native API, since its /v1 can be told neither keep_alive nor num_ctx nor whether to think.

Chat and completions are always streamed from Ollama, also for a client that wants one document:
only so can a stalled answer be told from a long one, and does Ollama notice that its client left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from portway.backends.failures import in_stream
from portway.backends.transport import Patience, Pool, Reply
from portway.backends.upstream import broken_once_begun, error_of, request_head
from portway.call import Tally
from portway.errors import BackendError
from portway.wire.events import NDJSONReader, WireError, dumps, loads
from portway.wire.translate import (
    ChatStream,
    chat_request,
    embed_request,
    embed_response,
    generate_request,
    prompt_chars,
)

if TYPE_CHECKING:
    from portway.call import Answer, Call, Limits, Watch
    from portway.config import Backend, Model

PATHS: Mapping[str, str] = {"chat": "/api/chat", "completions": "/api/generate", "embeddings": "/api/embed"}


class OllamaBackend:
    """`open` a Call on one Ollama."""

    def __init__(self, backend: Backend) -> None:
        self._pool = Pool(backend)
        self._heads = {endpoint: request_head(backend, path) for endpoint, path in PATHS.items()}

    async def open(self, call: Call, target: Model, limits: Limits, watch: Watch) -> Answer:
        """Translate, send, and return once a successful answer's head is in. Raises BackendError,
        ClientError (the call itself can't be served by anybody) and ClientGone."""
        payload, warnings = _TRANSLATE[call.endpoint](call.body, target)
        body = dumps(payload)
        request = b"%s%d\r\n\r\n%s" % (self._heads[call.endpoint], len(body), body)
        patience = Patience(limits, plain=call.endpoint == "embeddings")
        watch.phase = "prompt"  # it queues, loads and reads the prompt without a word
        reply = await self._pool.exchange(request, limits, watch, patience)
        if reply.head.status != 200:
            raise await error_of(reply, target.model, target.backend)
        if call.endpoint == "embeddings":
            return EmbeddingAnswer(call, target, reply, warnings, len(payload["input"]))
        stream = ChatStream(call, target, prompt_chars(payload))
        return OllamaAnswer(stream, target, reply, Waiting(patience, watch), warnings)

    def close(self) -> None:
        """See Backend.close (call.py)."""
        self._pool.close()


_TRANSLATE: Mapping[str, Callable[[Any, Model], tuple[dict[str, Any], list[str]]]] = {
    "chat": chat_request,
    "completions": generate_request,
    "embeddings": embed_request,
}


class Waiting(NamedTuple):
    """Who must know that an answer has begun: how long to wait from now on, and what for."""

    patience: Patience
    watch: Watch


class OllamaAnswer:
    """An Answer (call.py) read from /api/chat's or /api/generate's lines."""

    def __init__(self, stream: ChatStream, target: Model, reply: Reply, waiting: Waiting, warnings: list[str]) -> None:
        self.tally: Tally = stream.tally
        self.warnings = warnings
        self._stream = stream
        self._target = target
        self._reply = reply
        self._waiting = waiting
        self._reader = NDJSONReader()
        self._begun = False  # a piece has been given
        self._answering = False  # content has come
        self._read = False  # a line has been read
        self._error: BackendError | None = None  # comes behind what has been given

    async def whole(self) -> bytes:
        """See Answer.whole."""
        await self._first()
        while not self._stream.done:
            await self._next()
        return dumps(self._stream.whole())

    async def piece(self) -> bytes:
        """See Answer.piece. A piece holds what one read gave: one write for all of it."""
        if not self._begun:
            piece = await self._first()
            self._begun = True
            return piece
        piece = b""
        self._waiting.patience.content()  # only now: the client may have taken its time over the last one
        try:
            while not piece and not self._stream.done:
                piece, _ = await self._next()
        except BackendError as exc:
            raise broken_once_begun(exc, self._target) from exc
        return piece

    async def close(self) -> None:
        """See Answer.close."""
        self._error = None
        if self._stream.done:
            await self._reply.settle()
        self._reply.close()

    async def _first(self) -> bytes:
        """All events up to the first read that brought content."""
        held, content = b"", False
        while not (content or self._stream.done):
            frames, content = await self._next()
            held += frames
        self._answering = True
        self._waiting.watch.phase = "answer"
        self._waiting.patience.content()
        return held

    async def _next(self) -> tuple[bytes, bool]:
        """(events, whether there was content) of what the next read brings. An error comes alone: what stands
        before it still counts."""
        if self._error is not None:
            raise self._error
        frames, content = b"", False
        try:
            lines = await self._lines()
            if lines and self._answering:  # empty lines, which some proxies ping with, are none
                self._waiting.patience.content()
            for line in lines:
                more, has_content = self._stream.feed(_object(line))
                frames += more
                content = content or has_content
                if self._stream.done:
                    break
        except BackendError as exc:
            if not frames:
                raise
            self._error = exc
        if self.tally.truncated and "prompt_truncated" not in self.warnings:
            self.warnings.append("prompt_truncated")
        return frames, content

    async def _lines(self) -> list[bytes]:
        """What one read brings."""
        try:
            data = await self._reply.read()
            lines = self._reader.feed(data) if data else [last for last in [self._reader.finish()] if last]
        except WireError as exc:
            raise BackendError("bad_answer", f"the answer is not what it should be: {exc}") from None
        self._read = self._read or bool(lines)
        if data or lines:
            return lines
        if not self._read:
            raise BackendError("empty_answer", "the answer has no body")
        raise BackendError("connection_lost", "the answer ended before it was complete")


class EmbeddingAnswer:
    """An Answer to an embeddings call: always whole. count: how many texts were sent."""

    def __init__(self, call: Call, target: Model, reply: Reply, warnings: list[str], count: int) -> None:
        self.tally = Tally()
        self.warnings = warnings
        self._call = call
        self._target = target
        self._reply = reply
        self._count = count

    async def whole(self) -> bytes:
        """See Answer.whole."""
        value = _object(await self._reply.read_all())
        if value.get("error"):
            raise in_stream(value["error"], model=self._target.model, backend=self._target.backend)
        body = embed_response(value, self._target.name, self._call.body.get("encoding_format"), self._count)
        self.tally.prompt_tokens = body.get("usage", {}).get("prompt_tokens")
        return dumps(body)

    async def piece(self) -> bytes:
        """Embeddings are not streamed."""
        raise BackendError("unsupported", "embeddings are not streamed")

    async def close(self) -> None:
        """See Answer.close."""
        self._reply.close()


def _object(raw: bytes) -> dict[str, Any]:
    """A line, or a whole answer. Raises BackendError."""
    if not raw.strip():
        raise BackendError("empty_answer", "the answer has no body")
    try:
        value = loads(raw)
    except WireError as exc:
        raise BackendError("bad_answer", f"the answer is {exc}") from None
    if not isinstance(value, dict):
        raise BackendError("bad_answer", "the answer is not a JSON object")
    return value
