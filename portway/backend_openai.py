"""Backends that speak OpenAI's API: llama-server, llama-swap, vLLM, LM Studio, a cloud.

A request goes through as it came but for what Portway owns: the model's name, the model's `params`
where the client is silent, and `stream_options.include_usage`. An answer comes back as it is but
for the model's name, one id and one `created` a stream, and `reasoning` beside `reasoning_content`.
Bytes that need no change are not parsed: a request is spliced, and a stream's chunks, once their
shape is known from the first one, are only searched for what would make them special.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from portway.call import Tally
from portway.errors import BackendError
from portway.failures import classify, in_stream, is_loading, read_error
from portway.transport import Patience, Pool, Reply
from portway.upstream import MAX_ERROR, error_of, request_head
from portway.wire import DONE, SSEReader, WireError, dumps, loads, sse

if TYPE_CHECKING:
    from portway.call import Call, Limits, Watch
    from portway.config import Backend, Model

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
LOADING_PAUSE = 0.25  # seconds between two questions to a server that says "Loading model"; it offers no event
MAX_KEPT = 4 * 1024 * 1024  # bytes of relayed chunks kept for counting after the end
MAY_BE_EMPTY = ("length", "content_filter")  # finish reasons that explain an answer without content

_MODEL_MEMBER = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')
_ESCAPED_KEY = b"\\u006"  # how each letter of "model" begins when written as an escape


class OpenAIBackend:
    """`open` a Call on one server."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._pool = Pool(backend)
        self._heads = {endpoint: request_head(backend, path) for endpoint, path in PATHS.items()}

    def open(self, call: Call, target: Model, limits: Limits, watch: Watch) -> OpenAIAnswer:
        """Send it and return once a successful answer's head is in. Raises BackendError, ClientGone."""
        body = request_body(call, target)
        request = b"%s%d\r\n\r\n%s" % (self._heads[call.endpoint], len(body), body)
        load_until = min(time.monotonic() + limits.load, limits.answer_by)
        while True:
            patience = Patience(limits, plain=not call.stream)
            reply = self._pool.exchange(request, limits, watch, patience)
            if reply.head.status == 200:
                watch.phase = "prompt"
                return OpenAIAnswer(call, target, reply, patience)
            error = error_of(reply, target.model, target.backend)
            if not is_loading(reply.head.status, error.message):
                raise error
            if time.monotonic() >= load_until:
                raise BackendError("loading_timeout", f"still loading after {limits.load:g} s", retry_after=10)
            watch.phase = "loading"
            watch.pause(min(time.monotonic() + LOADING_PAUSE, load_until))

    def close(self) -> None:
        self._pool.close()


# --- the request ----------------------------------------------------------------------------------


def request_body(call: Call, target: Model) -> bytes:
    """The client's body with Portway's changes; the client's own bytes wherever that is possible."""
    changes: dict[str, Any] = {key: value for key, value in target.params.items() if key not in call.body}
    if call.stream and call.endpoint != "embeddings":
        options = call.body.get("stream_options")
        if not (isinstance(options, dict) and options.get("include_usage") is True):
            changes["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    if target.think is not None and call.endpoint == "chat":
        changes.update(_thinking(call.body, target.think))
    changes.update(_ceiling(call.body, target.max_tokens))
    if any(key in call.body for key in changes):
        return dumps({**call.body, **changes, "model": target.model})
    return splice(call.raw, call.body, target.model, changes)


def splice(raw: bytes, body: dict[str, Any], model: str, additions: dict[str, Any]) -> bytes:
    """`raw` with another model and with members that it lacks, else untouched.

    Only where the model's one member can be told from the bytes: `"model"` stands once, and no
    key is written with escapes. Else the whole body is written anew.
    """
    found = _MODEL_MEMBER.search(raw) if raw.count(b'"model"') == 1 and _ESCAPED_KEY not in raw else None
    start = raw.find(b"{")
    if found is None:
        return dumps({**body, **additions, "model": model})
    added = dumps(additions)[1:-1] + b"," if additions else b""
    return b"%s%s%s\"model\":%s%s" % (
        raw[: start + 1],
        added,
        raw[start + 1 : found.start()],
        dumps(model),
        raw[found.end() :],
    )


def _thinking(body: dict[str, Any], think: bool | str) -> dict[str, Any]:
    """How the configured `think` is told: a level is OpenAI's reasoning_effort, on and off are the
    chat template's enable_thinking (llama-server, vLLM). A client that says either itself is left alone."""
    if "reasoning_effort" in body or "chat_template_kwargs" in body:
        return {}
    if isinstance(think, str):
        return {"reasoning_effort": think}
    return {"chat_template_kwargs": {"enable_thinking": think}}


def _ceiling(body: dict[str, Any], most: int | None) -> dict[str, Any]:
    """`max_tokens` of the model, where the client asks for more or says nothing."""
    if most is None:
        return {}
    key = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    asked = body.get(key)
    return {} if isinstance(asked, int) and asked <= most else {key: most}


# --- the answer -----------------------------------------------------------------------------------


class OpenAIAnswer:
    """An Answer (call.py) read from an OpenAI server."""

    def __init__(self, call: Call, target: Model, reply: Reply, patience: Patience) -> None:
        self.tally = Tally()
        self.warnings: list[str] = []
        self._call = call
        self._target = target
        self._reply = reply
        self._patience = patience
        self._relay = _Relay(call, target, self.tally)
        self._committed = False
        self._ended = False

    def whole(self) -> bytes:
        """The plain answer with the logical model's name. Raises BackendError."""
        raw = self._reply.read_all()
        try:
            body = loads(raw)
        except WireError as exc:
            raise BackendError("bad_answer", f"the answer is {exc}") from None
        if not isinstance(body, dict):
            raise BackendError("bad_answer", "the answer is not a JSON object")
        if body.get("error") and not body.get("choices"):
            raise in_stream(body["error"], model=self._target.model, backend=self._target.backend)
        if self._call.endpoint != "embeddings":
            read_whole(body, self.tally, empty_ok="suffix" in self._call.body)
        elif not isinstance(body.get("data"), list):
            raise BackendError("bad_answer", "the answer has no `data`")
        read_usage(body, self.tally)
        if add_reasoning_alias(body, "message"):
            return dumps({**body, "model": self._target.name})
        return splice(raw, body, self._target.name, {})

    def pieces(self) -> Iterator[bytes]:
        """See Answer.pieces. A piece holds every event that one read gave: one write for all of them."""
        if "event-stream" not in self._reply.head.headers.get("content-type", ""):
            raise self._not_a_stream()
        held: list[bytes] = []
        for events in self._events():
            frames = self._frames(events)
            held.append(frames)
            if self._committed or self._relay.content or self._ended:
                self._patience.content()
                self._committed = True
                piece = b"".join(held)
                held.clear()
                if piece:
                    yield piece
            if self._ended:
                return

    def close(self) -> None:
        """See Answer.close; also completes the tally with what was relayed unread."""
        if self._ended:
            self._reply.settle()
        self._reply.close()
        self._relay.count()

    def _events(self) -> Iterator[list[bytes]]:
        """The data of the events, as they come; at the end of the connection [DONE] if it is due."""
        reader = SSEReader()
        try:
            while data := self._reply.read():
                if events := reader.feed(data):
                    yield events
            last = reader.finish()
            yield [last] if last else []
        except WireError as exc:
            raise self._broken("bad_answer", f"the stream is not what it should be: {exc}") from None
        except BackendError as exc:
            if exc.reason in ("connection_lost", "bad_answer"):
                raise self._broken(exc.reason, exc.message) from exc
            raise
        if self._relay.finished:  # some servers end without [DONE]
            yield [b"[DONE]"]
        raise self._broken("connection_lost", "the stream ended before the answer did")

    def _frames(self, events: list[bytes]) -> bytes:
        relay = self._relay
        frames = []
        for data in events:
            if data == b"[DONE]":
                relay.check_end()
                self._ended = True
                frames.append(DONE)
                break
            try:
                frames.append(relay.quick(data) or relay.frame(data))
            except BackendError as exc:
                raise self._broken(exc.reason, exc.message, exc) from None
        return b"".join(frames)

    def _broken(self, reason: str, message: str, error: BackendError | None = None) -> BackendError:
        """Before the commit the error as it is, after it always `stream_broken`."""
        if self._committed:
            return BackendError("stream_broken", message, detail=reason)
        return error or BackendError(reason, message)

    def _not_a_stream(self) -> BackendError:
        raw = self._reply.read_all(MAX_ERROR)
        message, type = read_error(raw)
        if message:
            return classify(500, message, model=self._target.model, backend=self._target.backend, type=type)
        kind = self._reply.head.headers.get("content-type", "no content type")
        return BackendError("bad_answer", f"not an event stream but {kind[:60]}")


class _Relay:
    """Turns one upstream chunk into what the client gets."""

    def __init__(self, call: Call, target: Model, tally: Tally) -> None:
        self._call = call
        self._name = target.name
        self._target = target
        self._tally = tally
        self._id: Any = None
        self._created: Any = None
        self._needles: tuple[bytes, ...] = ()
        self._old_model = self._new_model = b""
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self.content = False  # the first content has been seen
        self.finished = False  # a finish_reason has been seen

    def quick(self, data: bytes) -> bytes | None:
        """The frame of a chunk that is like the ones before it and only needs the model's name;
        None if it must be looked at. The needles cannot stand inside a JSON string: there each
        quote has a backslash before it."""
        for needle in self._needles:
            if needle not in data:
                return None
        if not self._needles or b'"error"' in data or b'"usage":{' in data or b'"reasoning' in data:
            return None
        if self._kept_bytes < MAX_KEPT:
            self._kept.append(data)
            self._kept_bytes += len(data)
        return b"data: %s\n\n" % data.replace(self._old_model, self._new_model, 1)

    def frame(self, data: bytes) -> bytes:
        """The frame of any chunk; b"" if the client should not see it. Raises BackendError."""
        try:
            chunk = loads(data)
        except WireError as exc:
            raise BackendError("bad_answer", f"a chunk is {exc}") from None
        if not isinstance(chunk, dict):
            raise BackendError("bad_answer", "a chunk is not a JSON object")
        if chunk.get("error"):
            raise in_stream(chunk["error"], model=self._target.model, backend=self._target.backend)
        choices = chunk.get("choices") or []
        had_content = self.content
        for choice in choices:
            self._look_at(choice)
        if self.content and not had_content:
            self._learn(data, chunk)
        read_usage(chunk, self._tally)
        if not self._call.include_usage and "usage" in chunk:
            if not choices:
                return b""
            del chunk["usage"]
        return sse(dumps(self._own(chunk)))

    def check_end(self) -> None:
        """[DONE] has come. Raises BackendError if that is no end of an answer."""
        if self._tally.finish_reason not in MAY_BE_EMPTY and not self.content and "suffix" not in self._call.body:
            raise BackendError("empty_answer", "the answer is empty")

    def count(self) -> None:
        """Add the characters of the chunks that `quick` relayed unread."""
        kept, self._kept = self._kept, []
        for data in kept:
            for choice in loads(data).get("choices") or []:
                count_choice(choice, self._tally)

    def _look_at(self, choice: dict[str, Any]) -> None:
        if count_choice(choice, self._tally):
            self.content = True
        if choice.get("finish_reason"):
            self.finished = True

    def _own(self, chunk: dict[str, Any]) -> dict[str, Any]:
        if self._id is None:
            self._id, self._created = chunk.get("id") or self._call.id, chunk.get("created") or self._call.created
        add_reasoning_alias(chunk, "delta")
        chunk["id"], chunk["created"], chunk["model"] = self._id, self._created, self._name
        return chunk

    def _learn(self, data: bytes, chunk: dict[str, Any]) -> None:
        """Take the needles for `quick` from the first chunk with content."""
        self._own(dict(chunk, choices=[]))
        if chunk.get("id") != self._id or chunk.get("created") != self._created:
            return
        needles = []
        for key, value in (("id", self._id), ("created", self._created), ("model", None), ("finish_reason", None)):
            needle = _member(data, key, chunk.get("model") if key == "model" else value)
            if needle is None:
                return
            needles.append(needle)
        self._old_model = needles[2]
        self._new_model = b'"model":' + dumps(self._name)
        self._needles = tuple(needles)


def _member(data: bytes, key: str, value: Any) -> bytes | None:
    """`"key":value` as it stands in `data`, with or without a space; None if it is not there."""
    for colon in (b":", b": "):
        needle = dumps(key) + colon + dumps(value)
        if needle in data:
            return needle
    return None


def read_usage(body: dict[str, Any], tally: Tally) -> None:
    """Take the token counts from an answer's or a chunk's usage."""
    usage = body.get("usage")
    if isinstance(usage, dict):
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(prompt, int):
            tally.prompt_tokens = prompt
        if isinstance(completion, int):
            tally.completion_tokens = completion
    timings = body.get("timings")
    if isinstance(timings, dict) and isinstance(timings.get("predicted_ms"), (int, float)):
        tally.decode_s = timings["predicted_ms"] / 1000


def read_whole(body: dict[str, Any], tally: Tally, *, empty_ok: bool) -> None:
    """Count a plain answer's choices. Raises BackendError if it answers nothing."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BackendError("bad_answer", "the answer has no `choices`")
    content = [count_choice(choice, tally) for choice in choices]
    if not any(content) and tally.finish_reason not in MAY_BE_EMPTY and not empty_ok:
        raise BackendError("empty_answer", "the answer is empty")


def count_choice(choice: Any, tally: Tally) -> bool:
    """Count one choice of a chunk or an answer; whether it carries content."""
    part = choice.get("delta") or choice.get("message") or {} if isinstance(choice, dict) else None
    if not isinstance(part, dict):
        raise BackendError("bad_answer", "a choice is not what it should be")
    text = part.get("content") or choice.get("text") or ""
    reasoning = part.get("reasoning_content") or part.get("reasoning") or ""
    calls = part.get("tool_calls") or []
    refusal = part.get("refusal") or ""
    tally.content_chars += len(text) + len(refusal)
    tally.reasoning_chars += len(reasoning)
    tally.tool_calls += sum(1 for call in calls if isinstance(call, dict) and call.get("id"))
    tally.finish_reason = choice.get("finish_reason") or tally.finish_reason
    return bool(text or reasoning or calls or refusal)


def add_reasoning_alias(body: dict[str, Any], part: str) -> bool:
    """Give reasoning under both of its names, `reasoning_content` and `reasoning`; whether any was there."""
    changed = False
    for choice in body.get("choices") or []:
        message = choice.get(part)
        if isinstance(message, dict):
            text = message.get("reasoning_content") or message.get("reasoning")
            if text:
                message["reasoning_content"] = message["reasoning"] = text
                changed = True
    return changed
