"""Ollama by its native API, since its /v1 can be told neither keep_alive nor num_ctx nor whether to think.

Chat and completions are always streamed from Ollama, also for a client that wants one document:
only so can a stalled answer be told from a long one, and does Ollama notice that its client left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

    def open(self, call: Call, target: Model, limits: Limits, watch: Watch) -> Answer:
        """Translate, send, and return once a successful answer's head is in. Raises BackendError,
        ClientError (the call itself can't be served by anybody) and ClientGone."""
        payload, warnings = _TRANSLATE[call.endpoint](call.body, target)
        body = dumps(payload)
        request = b"%s%d\r\n\r\n%s" % (self._heads[call.endpoint], len(body), body)
        patience = Patience(limits, plain=call.endpoint == "embeddings")
        watch.phase = "prompt"  # it queues, loads and reads the prompt without a word
        reply = self._pool.exchange(request, limits, watch, patience)
        if reply.head.status != 200:
            raise error_of(reply, target.model, target.backend)
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

    def whole(self) -> bytes:
        """See Answer.whole."""
        for _ in self._pieces():
            pass
        return dumps(self._stream.whole())

    def pieces(self) -> Iterator[bytes]:
        """See Answer.pieces. A piece holds what one read gave: one write for all of it."""
        return broken_once_begun((piece for piece in self._pieces() if piece), self._target)

    def close(self) -> None:
        """See Answer.close."""
        if self._stream.done:
            self._reply.settle()
        self._reply.close()

    def _pieces(self) -> Iterator[bytes]:
        """What each read gave, from the first content on; b"" where it was nothing to be seen."""
        stream, held, content = self._stream, b"", False
        for lines in self._lines():
            frames, has_content, error = self._feed(lines)
            held += frames
            content = content or has_content
            if content or stream.done:
                self._waiting.watch.phase = "answer"
                if self.tally.truncated:
                    self.warnings.append("prompt_truncated")
                yield held
                self._waiting.patience.content()  # only now: the client may have taken its time over it
                held = b""
            if error:
                raise error
            if stream.done:
                return

    def _feed(self, lines: list[bytes]) -> tuple[bytes, bool, BackendError | None]:
        """(events, whether there was content, error): as far as a line that is an error; what stands before
        it still counts."""
        frames, content = b"", False
        try:
            for line in lines:
                more, has_content = self._stream.feed(_object(line))
                frames += more
                content = content or has_content
                if self._stream.done:
                    break
        except BackendError as exc:
            return frames, content, exc
        return frames, content, None

    def _lines(self) -> Iterator[list[bytes]]:
        reader = NDJSONReader()
        begun = False
        try:
            while data := self._reply.read():
                if lines := reader.feed(data):
                    begun = True
                    yield lines
            if last := reader.finish():
                begun = True
                yield [last]
        except WireError as exc:
            raise BackendError("bad_answer", f"the answer is not what it should be: {exc}") from None
        if not begun:
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

    def whole(self) -> bytes:
        """See Answer.whole."""
        value = _object(self._reply.read_all())
        if value.get("error"):
            raise in_stream(value["error"], model=self._target.model, backend=self._target.backend)
        body = embed_response(value, self._target.name, self._call.body.get("encoding_format"), self._count)
        self.tally.prompt_tokens = body.get("usage", {}).get("prompt_tokens")
        return dumps(body)

    def pieces(self) -> Iterator[bytes]:
        """Embeddings are not streamed."""
        raise BackendError("unsupported", "embeddings are not streamed")

    def close(self) -> None:
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
