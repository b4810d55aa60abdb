"""Ollama by its native API, since its /v1 can be told neither keep_alive nor num_ctx nor whether to think.

Chat and completions are always streamed from Ollama, also for a client that wants one document:
only so can a stalled answer be told from a long one, and does Ollama notice that its client left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from portway.call import Tally
from portway.errors import BackendError
from portway.translate import ChatStream, chat_request, embed_request, embed_response, generate_request, prompt_chars
from portway.transport import Patience, Pool, Reply
from portway.upstream import error_of, request_head
from portway.wire import NDJSONReader, WireError, dumps, loads

if TYPE_CHECKING:
    from portway.call import Answer, Call, Limits, Watch
    from portway.config import Backend, Model

PATHS = {"chat": "/api/chat", "completions": "/api/generate", "embeddings": "/api/embed"}


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
        patience = Patience(limits, plain=call.endpoint == "embeddings")
        watch.phase = "prompt"
        request = b"%s%d\r\n\r\n%s" % (self._heads[call.endpoint], len(body), body)
        reply = self._pool.exchange(request, limits, watch, patience)
        if reply.head.status != 200:
            raise error_of(reply, target.model, target.backend)
        if call.endpoint == "embeddings":
            return EmbeddingAnswer(call, target, reply, warnings, payload["input"])
        return OllamaAnswer(call, target, reply, patience, warnings, prompt_chars(payload))

    def close(self) -> None:
        self._pool.close()


_TRANSLATE = {"chat": chat_request, "completions": generate_request, "embeddings": embed_request}


class OllamaAnswer:
    """An Answer (call.py) read from /api/chat's or /api/generate's lines."""

    def __init__(
        self, call: Call, target: Model, reply: Reply, patience: Patience, warnings: list[str], prompt_chars: int
    ) -> None:
        self.warnings = warnings
        self._call = call
        self._reply = reply
        self._patience = patience
        self._stream = ChatStream(call, target, prompt_chars)
        self.tally: Tally = self._stream.tally
        self._committed = False

    def whole(self) -> bytes:
        """See Answer.whole."""
        for _ in self._pieces():
            pass
        return dumps(self._stream.whole())

    def pieces(self) -> Iterator[bytes]:
        """See Answer.pieces. A piece holds what one read gave: one write for all of it."""
        for piece in self._pieces():
            self._committed = True
            yield piece

    def close(self) -> None:
        """See Answer.close."""
        if self._stream.done:
            self._reply.settle()
        self._reply.close()

    def _pieces(self) -> Iterator[bytes]:
        stream = self._stream
        held = b""
        content = False
        for lines in self._lines():
            for line in lines:
                frames, has_content = self._feed(line)
                held += frames
                content = content or has_content
            if content or stream.done:
                self._patience.content()
                if self.tally.truncated:
                    self.warnings.append("prompt_truncated")
                yield held
                held = b""
            if stream.done:
                return

    def _feed(self, line: bytes) -> tuple[bytes, bool]:
        try:
            value = loads(line)
        except WireError as exc:
            raise self._broken("bad_answer", f"a line of the answer is {exc}") from None
        if not isinstance(value, dict):
            raise self._broken("bad_answer", "a line of the answer is not a JSON object")
        try:
            return self._stream.feed(value)
        except BackendError as exc:
            raise self._broken(exc.reason, exc.message, exc) from None

    def _lines(self) -> Iterator[list[bytes]]:
        reader = NDJSONReader()
        try:
            while data := self._reply.read():
                if lines := reader.feed(data):
                    yield lines
            last = reader.finish()
            yield [last] if last else []
        except WireError as exc:
            raise self._broken("bad_answer", f"the answer is not what it should be: {exc}") from None
        except BackendError as exc:
            if exc.reason in ("connection_lost", "bad_answer"):
                raise self._broken(exc.reason, exc.message, exc) from exc
            raise
        raise self._broken("connection_lost", "the answer ended before it was complete")

    def _broken(self, reason: str, message: str, error: BackendError | None = None) -> BackendError:
        """Before the commit the error as it is, after it always `stream_broken`."""
        if self._committed:
            return BackendError("stream_broken", message, detail=reason)
        return error or BackendError(reason, message)


class EmbeddingAnswer:
    """An Answer to an embeddings call: always whole."""

    def __init__(self, call: Call, target: Model, reply: Reply, warnings: list[str], inputs: Any) -> None:
        self.tally = Tally()
        self.warnings = warnings
        self._call = call
        self._target = target
        self._reply = reply
        self._count = len(inputs) if isinstance(inputs, list) else 1

    def whole(self) -> bytes:
        """See Answer.whole."""
        try:
            value = loads(self._reply.read_all())
        except WireError as exc:
            raise BackendError("bad_answer", f"the answer is {exc}") from None
        if not isinstance(value, dict):
            raise BackendError("bad_answer", "the answer is not a JSON object")
        body = embed_response(value, self._target.name, self._call.body.get("encoding_format"), self._count)
        self.tally.prompt_tokens = value.get("prompt_eval_count")
        return dumps(body)

    def pieces(self) -> Iterator[bytes]:
        """Embeddings are not streamed."""
        raise BackendError("unsupported", "embeddings are not streamed")

    def close(self) -> None:
        self._reply.close()
