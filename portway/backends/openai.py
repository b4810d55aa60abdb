"""Backends that speak OpenAI's API: llama-server, llama-swap, vLLM, LM Studio, a cloud.

A request goes through as it came but for what Portway owns: the model's name, the model's `params`
where the client is silent, and `stream_options.include_usage`. An answer comes back as it is but
for the model's name, one id and one `created` a stream, and thinking, which stands under both its
names and never in the text. Bytes that need no change are not parsed: a request is spliced, and a
stream's chunks, once their shape is known, are only searched for what would make them special.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from portway.backends.failures import in_stream
from portway.backends.transport import Patience, Pool, Reply
from portway.backends.upstream import MAX_ERROR, broken_once_begun, error_of, request_head
from portway.call import MOST, Tally
from portway.errors import BackendError
from portway.wire.events import DONE, SSEReader, WireError, dumps, loads, sse
from portway.wire.think_tags import OPEN, ThinkTags

if TYPE_CHECKING:
    from portway.call import Answer, Call, Limits, Watch
    from portway.config import Backend, Model

PATHS: Mapping[str, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
}
LOADING_PAUSE = 0.25  # seconds between two questions to a server that says "Loading model"; it offers no event
LOADING_AGAIN = 10.0  # seconds after which a client may ask again for a model that is still being loaded
MAX_HELD = 1_048_576  # bytes of a stream's events before the first content
BATCH = 8192  # bytes of relayed chunks that are counted at once: 0.1 ms, in which other streams' chunks wait


class OpenAIBackend:
    """`open` a Call on one server."""

    def __init__(self, backend: Backend) -> None:
        self._pool = Pool(backend)
        self._heads = {endpoint: request_head(backend, path) for endpoint, path in PATHS.items()}

    async def open(self, call: Call, target: Model, limits: Limits, watch: Watch) -> Answer:
        """Send it and return once a successful answer's head is in. Raises BackendError, ClientGone."""
        body, warnings = request_body(call, target)
        request = b"%s%d\r\n\r\n%s" % (self._heads[call.endpoint], len(body), body)
        if not call.stream:
            watch.phase = "prompt"  # of a plain answer there is nothing to see before its end
        started = time.monotonic()
        load_until = min(started + limits.load, limits.answer_by)
        while True:
            patience = Patience(limits, plain=not call.stream)
            reply = await self._pool.exchange(request, limits, watch, patience)
            if reply.head.status == 200:
                watch.phase = "prompt"
                if call.stream:
                    return StreamAnswer(call, target, reply, patience, warnings)
                return WholeAnswer(call, target, reply, warnings)
            error = await error_of(reply, target.model, target.backend)
            if error.reason != "loading_timeout":
                raise error
            now = time.monotonic()
            if now >= load_until:
                message = f"still loading its model after {now - started:.1f} s"
                raise BackendError("loading_timeout", message, retry_after=LOADING_AGAIN)
            watch.phase = "loading"
            await watch.pause(min(now + LOADING_PAUSE, load_until))

    def close(self) -> None:
        """See Backend.close (call.py)."""
        self._pool.close()


# --- the request ----------------------------------------------------------------------------------

_MODEL_KEY = b'"model"'
# an object's first member; there is no other of that name in a request, wire/events.py saw to that
_FIRST_MODEL = re.compile(rb'(?:\xef\xbb\xbf)?[ \t\n\r]*\{[ \t\n\r]*"model"[ \t\n\r]*:[ \t\n\r]*("(?:[^"\\]|\\.)*")')
_MODEL_MEMBER = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_ESCAPED_KEY = b"\\u006"  # how each letter of "model" begins when written as an escape
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")  # the last one is llama-server's own


def request_body(call: Call, target: Model) -> tuple[bytes, list[str]]:
    """(the client's body with Portway's changes, warnings); the client's own bytes wherever that is possible."""
    asked = call.body
    warnings: list[str] = []
    changes: dict[str, Any] = {}
    if target.params:
        changes = {key: value for key, value in target.params.items() if asked.get(key) is None}
    if call.stream:
        changes |= _usage_wanted(asked.get("stream_options"))
    if call.endpoint == "chat":
        if target.think is not None:
            changes |= _thinking(asked, target)
        if target.merge_system:
            changes |= _merged(asked["messages"])
    if call.endpoint != "embeddings" and target.max_tokens is not None:
        capped = _capped({**asked, **changes}, target.max_tokens)
        if any(asked.get(key) is not None for key in capped):
            warnings.append("capped(max_tokens)")
        changes |= capped
    for key in changes:
        if key in asked:
            return dumps({**asked, **changes, "model": target.model}), warnings
    member = _FIRST_MODEL.match(call.raw) or only_model(call.raw)
    return splice(call.raw, member, asked, target.model, changes), warnings


def splice(
    raw: bytes, member: re.Match[bytes] | None, body: dict[str, Any], model: str, additions: dict[str, Any]
) -> bytes:
    """`raw`, which is `body`, with another model and with members that it lacks, else untouched. member: where the
    model stands; if that can't be told the whole body is written anew."""
    if member is None or not isinstance(body.get("model"), str):
        return dumps({**body, **additions, "model": model})
    start, end = member.span(1)
    first = raw.index(b"{") + 1  # after a byte order mark, maybe
    more = dumps(additions)[1:-1] + b"," if additions else b""
    return b"".join((b"{", more, raw[first:start], _quoted(model), memoryview(raw)[end:]))  # one copy of a long prompt


def only_model(raw: bytes) -> re.Match[bytes] | None:
    """The model's member, if `"model"` stands once and no key is written with escapes. The searches are those that cost
    least in a long text: a backslash is found by memchr, and rfind(), which looks for the first byte first, takes a
    fifth of find() or count()."""
    at = raw.rfind(_MODEL_KEY)
    if at < 0 or raw.rfind(_MODEL_KEY, 0, at) >= 0 or _has_escaped_key(raw):
        return None
    return _MODEL_MEMBER.match(raw, at)


@lru_cache(maxsize=256)
def _quoted(name: str) -> bytes:
    return dumps(name)


def _has_escaped_key(raw: bytes) -> bool:
    return b"\\" in raw and _ESCAPED_KEY in raw


def _usage_wanted(options: Any) -> dict[str, Any]:
    """Usage is always asked for, so that it is known."""
    options = options or {}
    return {} if options.get("include_usage") else {"stream_options": {**options, "include_usage": True}}


def _thinking(asked: Mapping[str, Any], target: Model) -> dict[str, Any]:
    """How the configured `think` is told: a level is OpenAI's reasoning_effort, on and off are the
    chat template's enable_thinking (llama-server, vLLM). A client that says either itself is left alone."""
    think = target.think
    if think is None or asked.get("reasoning_effort") is not None or asked.get("chat_template_kwargs") is not None:
        return {}
    if isinstance(think, str):
        return {"reasoning_effort": think}
    return {"chat_template_kwargs": {**target.params.get("chat_template_kwargs", {}), "enable_thinking": think}}


def _merged(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """All system messages as one first one, for templates that refuse a later or a second one."""
    system = [message for message in messages if message["role"] in ("system", "developer")]
    if not system or (len(system) == 1 and messages[0] is system[0]):
        return {}
    others = [message for message in messages if message["role"] not in ("system", "developer")]
    text = "\n\n".join(_text(message.get("content")) for message in system)
    return {"messages": [{"role": "system", "content": text}, *others]}


def _text(content: Any) -> str:
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _capped(body: Mapping[str, Any], most: int) -> dict[str, int]:
    """`max_tokens` of the model, where more is asked for (-1: no limit) or nothing is said."""
    said = {key: body[key] for key in _LIMITS if body.get(key) is not None}
    if not said:
        return {"max_tokens": most}
    numbers = {key: value for key, value in said.items() if isinstance(value, int | float)}
    return {key: most for key, value in numbers.items() if not 0 <= value <= most}


# --- the answer -----------------------------------------------------------------------------------


class WholeAnswer:
    """An Answer (call.py) of an OpenAI server in one document."""

    def __init__(self, call: Call, target: Model, reply: Reply, warnings: list[str]) -> None:
        self.tally = Tally()
        self.warnings = warnings
        self._call = call
        self._target = target
        self._reply = reply

    async def whole(self) -> bytes:
        """See Answer.whole."""
        raw = await self._reply.read_all()
        body = _document(raw, self._target)
        changed = False
        if self._call.endpoint != "embeddings":
            changed = read_whole(body, self.tally, chat=self._call.endpoint == "chat")
        elif not isinstance(body.get("data"), list):
            raise BackendError("bad_answer", "the answer has no `data`")
        elif _is_wider(body["data"], self._call.body.get("dimensions")):
            self.warnings.append("ignored(dimensions)")
        if not read_usage(body, self.tally):
            del body["usage"]
            changed = True
        if changed:
            return dumps({**body, "model": self._target.name})
        return splice(raw, only_model(raw), body, self._target.name, {})

    async def piece(self) -> bytes:
        """It was not asked for as a stream."""
        raise BackendError("unsupported", "this answer is not streamed")

    async def close(self) -> None:
        """See Answer.close."""
        self._reply.close()


class StreamAnswer:
    """An Answer (call.py) of an OpenAI server as a stream."""

    def __init__(self, call: Call, target: Model, reply: Reply, patience: Patience, warnings: list[str]) -> None:
        self.tally = Tally()
        self.warnings = warnings
        self._target = target
        self._reply = reply
        self._patience = patience
        self._relay = _Relay(call, target, self.tally)
        self._reader = SSEReader()
        self._tail = b""  # what came behind the last whole event, not yet looked at
        self._begun = False  # a piece has been given
        self._error: BackendError | None = None  # comes behind what has been given

    async def whole(self) -> bytes:
        """It was asked for as a stream."""
        raise BackendError("unsupported", "this answer is streamed")

    async def piece(self) -> bytes:
        """See Answer.piece. A piece holds every event that one read gave: one write for all of them."""
        if self._relay.ended:
            return b""
        if not self._begun:
            piece = await self._first()
            self._begun = True
            return piece
        self._patience.content()  # only now: the client may have taken its time over the last one
        try:
            while not (piece := await self._next()):
                pass
        except BackendError as exc:
            raise broken_once_begun(exc, self._target) from exc
        return piece

    async def close(self) -> None:
        """See Answer.close; also completes the tally with what was relayed unread."""
        self._error = None
        if self._relay.ended:
            await self._reply.settle()
        self._reply.close()
        self._relay.count()

    async def _first(self) -> bytes:
        """All events up to the first read that brought content."""
        if "event-stream" not in self._reply.head.headers.get("content-type", "event-stream").lower():
            raise await self._not_a_stream()
        held = b""
        while True:
            held += await self._next()
            if held and (self._relay.content or self._relay.ended):
                return held
            if len(held) > MAX_HELD:
                raise BackendError("bad_answer", f"more than {MAX_HELD} bytes of events without any content")

    async def _next(self) -> bytes:
        """What the next read brings, as the client gets it. An error comes alone: what stands before it counts."""
        if self._error is not None:
            raise self._error
        try:
            data = self._tail + await self._reply.read()
        except BackendError as exc:  # behind a whole answer a connection that breaks has ended
            if exc.reason != "connection_lost" or not self._relay.finished:
                raise
            data = self._tail
        end = data.rfind(b"\n\n") + 2
        if end > 1 and not self._reader.pending and (block := self._relay.block(data[:end])):
            self._tail = data[end:]
            return block
        self._tail = b""
        frames, self._error = self._relay.frames(self._events(data))
        return frames if frames or self._error is None else await self._next()

    def _events(self, data: bytes) -> list[bytes]:
        """The data of the events that one read brought; at the end of the connection [DONE] if it is due."""
        try:
            if data:
                return self._reader.feed(data)
            if last := self._reader.finish():
                return [last]
        except WireError as exc:
            raise BackendError("bad_answer", f"the stream is not what it should be: {exc}") from None
        if self._relay.finished:  # some servers end without [DONE]
            return [b"[DONE]"]
        if not self._relay.begun:
            raise BackendError("empty_answer", "the stream is empty")
        raise BackendError("connection_lost", "the stream ended before the answer did")

    async def _not_a_stream(self) -> BackendError:
        kind = self._reply.head.headers.get("content-type", "")
        raw = await self._reply.read_all(MAX_ERROR)
        if raw.lstrip()[:1] in (b"", b"{"):
            _document(raw, self._target)  # an error, most likely
        return BackendError("bad_answer", f"not an event stream but {kind[:60]}")


def _is_wider(data: list[Any], dimensions: Any) -> bool:
    """Whether the first vector is longer than was asked for: llama-server ignores `dimensions`."""
    first = data[0].get("embedding") if data and isinstance(data[0], dict) else None
    if not isinstance(dimensions, int) or not isinstance(first, list | str):
        return False
    return (len(first) if isinstance(first, list) else len(first) * 3 // 16) > dimensions  # base64 of 4 bytes each


class _Relay:
    """Turns upstream chunks into what the client gets."""

    def __init__(self, call: Call, target: Model, tally: Tally) -> None:
        self.begun = False  # any chunk has been seen
        self.content = False  # the first content has been seen
        self.ended = False  # [DONE] has been seen
        self._call = call
        self._target = target
        self._tally = tally
        self._chat = call.endpoint == "chat"
        self._count = _expected(call.body.get("n"))
        self._finished: set[int] = set()  # the choices with a finish_reason
        self._tags: dict[int, ThinkTags] = {}  # of the choices whose text may still begin with a tag
        self._settled: set[int] = set()  # the choices whose text can't any more
        self._id: Any = None
        self._created: Any = None
        self._learned = False
        self._needles: tuple[bytes, ...] = ()
        self._null_usage = False
        self._old_model = self._new_model = b""
        self._kept: list[bytes] = []
        self._kept_bytes = 0

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish_reason: the answer is whole, [DONE] or not."""
        return len(self._finished) >= self._count

    def frames(self, events: list[bytes]) -> tuple[bytes, BackendError | None]:
        """The frames of some events, as far as one that is an error; what stands before it still counts."""
        frames = []
        error = None
        try:
            for data in events:
                if data == b"[DONE]":
                    frames.append(self.end())
                    break
                frames.append(self.block(sse(data)) or self.frame(data))
        except BackendError as exc:
            error = exc
        return b"".join(frames), error

    def block(self, data: bytes) -> bytes | None:
        """What one read brought, if that is nothing but whole chunks like the ones before, which only need the
        model's name; None if it must be taken apart. Chunks are not parsed, nor even told from one another: each
        thing that makes them ordinary stands there as often as there are chunks. A needle cannot stand inside
        a JSON string: there each quote has a backslash before it."""
        needles = self._needles
        if not needles or data[:7] != b"data: {" or data[-3:] != b"}\n\n":
            return None
        count = data.count(b"\n\n")
        if data.count(b"\n") != 2 * count or (count > 1 and data.count(b"}\n\ndata: {") != count - 1):
            return None
        for needle in needles:
            if data.count(needle) != count:
                return None
        if b'"error"' in data or b'"reasoning' in data or (b'"usage"' in data) is not self._null_usage:
            return None
        if not (data.isascii() or _is_utf8(data)):
            return None
        self._kept.append(data)
        self._kept_bytes += len(data)
        if self._kept_bytes >= BATCH:
            self.count()
        return data.replace(self._old_model, self._new_model)

    def frame(self, data: bytes) -> bytes:
        """The frame of any chunk; b"" if the client should not see it. Raises BackendError."""
        chunk = _document(data, self._target)
        self.begun = True
        choices = _choices(chunk)
        for choice in choices:
            self._look_at(choice)
        if self.content and not self._learned:
            self._name(chunk)
            self._learn(data, chunk)
        if self._tally.reasoning_chars or data.find(b'"reasoning') >= 0:
            add_reasoning_alias(chunk, "delta")
        is_counted = read_usage(chunk, self._tally)
        if chunk.get("usage") is not None and not (self._call.include_usage and is_counted):
            if not choices:
                return b""
            del chunk["usage"]
        return sse(dumps(self._own(chunk)))

    def end(self) -> bytes:
        """What [DONE] leads to. Raises BackendError if that is no end of an answer."""
        frames = b""
        for index, tags in self._tags.items():
            thought, text = tags.flush()
            if thought or text:  # a beginning of a tag, which now is none
                choice = {"index": index, "delta": _delta(thought, text), "finish_reason": None}
                self.content = count_choice(choice, self._tally)
                chunk = {"object": "chat.completion.chunk", "choices": [choice]}
                add_reasoning_alias(chunk, "delta")
                frames += sse(dumps(self._own(chunk)))
        if self._chat and not self.content and not _may_be_empty(self._tally):
            raise BackendError("empty_answer", "the answer is empty")
        self.ended = True
        return frames + DONE

    def count(self) -> None:
        """Add what the chunks hold that `block` relayed unread."""
        kept, self._kept, self._kept_bytes = self._kept, [], 0
        try:
            self._count_all(b"".join(kept))  # at once: most of what it costs does not depend on how much it is
        except WireError:
            for block in kept:
                try:
                    self._count_all(block)
                except WireError:
                    continue  # it was relayed as it came, and what it is does not count any more

    def _count_all(self, block: bytes) -> None:
        chunks = loads(b"[%b]" % block[6:-2].replace(b"\n\ndata: ", b","))
        for chunk in chunks:
            try:
                for choice in _choices(chunk):
                    count_choice(choice, self._tally)
            except BackendError:
                continue  # likewise

    def _look_at(self, choice: dict[str, Any]) -> None:
        index = choice.get("index")
        index = index if isinstance(index, int) else 0
        delta = choice.get("delta")
        if self._chat and index not in self._settled and isinstance(delta, dict) and not self._is_plain(delta, index):
            self._segregate(delta, index, is_last=bool(choice.get("finish_reason")))
        if count_choice(choice, self._tally):
            self.content = True
        if choice.get("finish_reason"):
            self._finished.add(index)

    def _is_plain(self, delta: dict[str, Any], index: int) -> bool:
        """Whether it is as most answers begin: there is no text yet, or one that begins with a word, so that no tag
        can come any more."""
        if index in self._tags or not _is_content_alone(delta):
            return False
        content = delta["content"]
        if not content:  # "", or null as llama-server has it beside the role
            return True
        if not isinstance(content, str) or content[0] == "<" or content[0].isspace():
            return False
        self._settled.add(index)
        return True

    def _segregate(self, delta: dict[str, Any], index: int, *, is_last: bool) -> None:
        """Take thinking out of the text, where a server without a reasoning parser leaves it."""
        content = delta.get("content")
        tags = self._tags.setdefault(index, ThinkTags())
        if isinstance(content, str):
            thought, text = tags.split(content)
        elif content:  # a list of parts, say: nothing to split
            thought, text = tags.flush()
            tags.settled = True
        else:
            thought, text = "", ""
        # thinking or a tool call of its own: the server takes the text apart by itself
        by_itself = any(delta.get(key) for key in ("reasoning_content", "reasoning", "tool_calls"))
        if by_itself or is_last:
            held_thought, held_text = tags.flush()
            thought, text = thought + held_thought, text + held_text
        if thought:
            delta["reasoning_content"] = thought + (delta.get("reasoning_content") or "")
        if text or isinstance(content, str):
            delta["content"] = text
        if by_itself or tags.settled:
            self._settled.add(index)
            self._tags.pop(index)

    def _name(self, chunk: Mapping[str, Any]) -> None:
        """The stream's one id and time are its first chunk's."""
        if self._id is None:
            self._id, self._created = chunk.get("id") or self._call.id, chunk.get("created") or self._call.created

    def _own(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """The chunk under the stream's one id and time, and the name of the model that serves."""
        self._name(chunk)
        chunk["id"], chunk["created"], chunk["model"] = self._id, self._created, self._target.name
        return chunk

    def _learn(self, data: bytes, chunk: dict[str, Any]) -> None:
        """Take the needles for `block` from the first chunk with content, once no tag can come any more."""
        if self._count > 1 or (self._chat and not self._settled):
            return
        self._learned = True
        self._null_usage = "usage" in chunk and chunk["usage"] is None
        if chunk.get("id") != self._id or chunk.get("created") != self._created:
            return
        members = {"model": chunk.get("model"), "id": self._id, "created": self._created, "finish_reason": None}
        if self._null_usage:
            members["usage"] = None
        colon = b'": ' if b'"model": ' in data else b'":'
        needles = [b'"%b%b%b' % (key.encode(), colon, dumps(value)) for key, value in members.items()]
        needles.append(b'"delta"' if self._chat else b'"text"')  # else a chunk of two choices makes up for one without
        needles[2] += data[data.find(needles[2]) + len(needles[2]) :][:1]  # 12 must not be found in 123
        if all(needle in data for needle in needles):
            self._needles = tuple(needles)
            self._old_model = needles[0]
            self._new_model = b'"model":' + dumps(self._target.name)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _expected(n: Any) -> int:
    """How many choices a request leads to."""
    return n if isinstance(n, int) and n > 1 else 1


# --- what stands in an answer ---------------------------------------------------------------------

_CONTENT = ("content", "reasoning_content", "reasoning", "tool_calls", "function_call", "refusal", "audio", "images")


def read_whole(body: dict[str, Any], tally: Tally, *, chat: bool) -> bool:
    """Count a plain answer's choices; whether any was changed. Raises BackendError if it answers nothing.

    A legacy completion may be empty: the text to fill in between two others often is.
    """
    choices = _choices(body)
    if not choices:
        raise BackendError("bad_answer", "the answer has no `choices`")
    changed = content = False
    for choice in choices:
        if chat and _segregate_whole(choice):
            changed = True
        if count_choice(choice, tally):
            content = True
    if chat and not content and not _may_be_empty(tally):
        raise BackendError("empty_answer", "the answer is empty")
    if tally.reasoning_chars:
        changed = add_reasoning_alias(body, "message") or changed
    return changed


def read_usage(body: Mapping[str, Any], tally: Tally) -> bool:
    """Take the token counts from an answer's or a chunk's usage. False if there is one that is none: counts that are
    all zero, which some servers send where they did not count."""
    timings = body.get("timings")
    if timings and isinstance(timings, dict):
        took = timings.get("predicted_ms")
        if isinstance(took, int | float) and 0 <= took < MOST:
            tally.decode_s = took / 1000
    usage = body.get("usage")
    if usage and isinstance(usage, dict):
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if prompt == 0 and not completion and not usage.get("total_tokens"):
            return False
        if isinstance(prompt, int) and 0 <= prompt < MOST:
            tally.prompt_tokens = prompt
        if isinstance(completion, int) and 0 <= completion < MOST:
            tally.completion_tokens = completion
    return True


def count_choice(choice: Mapping[str, Any], tally: Tally) -> bool:
    """Count one choice of a chunk or an answer; whether it carries content."""
    part = choice.get("delta") or choice.get("message") or _NOTHING
    content, text, reason = part.get("content"), choice.get("text"), choice.get("finish_reason")
    if isinstance(content, str):
        tally.content_chars += len(content)
    if reason and isinstance(reason, str):
        tally.finish_reason = reason
    if (content or not text) and _is_content_alone(part):
        return bool(content)
    tally.content_chars += _length(text) + _length(part.get("refusal"))
    tally.reasoning_chars += _length(part.get("reasoning_content") or part.get("reasoning"))
    tally.tool_calls += sum(1 for call in _list(part.get("tool_calls")) if isinstance(call, dict) and call.get("id"))
    return bool(text) or any(part.get(key) for key in _CONTENT)


_NOTHING: Mapping[str, Any] = {}


def _is_content_alone(part: Mapping[str, Any]) -> bool:
    """Whether a message has a content and nothing else but its role."""
    return "content" in part and len(part) == 1 + ("role" in part)


def add_reasoning_alias(body: Mapping[str, Any], part: str) -> bool:
    """Give reasoning under both of its names, `reasoning_content` and `reasoning`; whether any was there."""
    changed = False
    for choice in _list(body.get("choices")):
        message = choice.get(part)
        text = message.get("reasoning_content") or message.get("reasoning") if isinstance(message, dict) else None
        if text:
            message["reasoning_content"] = message["reasoning"] = text
            changed = True
    return changed


def _document(raw: bytes, target: Model) -> dict[str, Any]:
    """An answer or a chunk of one. Raises BackendError, also for an error that came with status 200."""
    if not raw or raw.isspace():
        raise BackendError("empty_answer", "the answer has no body")
    try:
        body = loads(raw)
    except WireError as exc:
        raise BackendError("bad_answer", f"the answer is {exc}") from None
    if not isinstance(body, dict):
        raise BackendError("bad_answer", "the answer is not a JSON object")
    error = body if body.get("object") == "error" else body.get("error")  # older vLLMs have no envelope
    if error:
        raise in_stream(error, model=target.model, backend=target.backend)
    return body


def _choices(body: Any) -> list[dict[str, Any]]:
    """The choices, each with objects where texts are found. Raises BackendError for another shape."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if choices is None:
        return []
    if not isinstance(choices, list):
        raise BackendError("bad_answer", "`choices` is not a list")
    for choice in choices:
        if not isinstance(choice, dict):
            raise BackendError("bad_answer", "`choices` holds something else")
        if not (isinstance(choice.get("delta"), _OBJECT) and isinstance(choice.get("message"), _OBJECT)):
            raise BackendError("bad_answer", "a choice is not what it should be")
    return choices


_OBJECT = (dict, type(None))


def _segregate_whole(choice: dict[str, Any]) -> bool:
    """The same as _Relay does, for a plain answer; whether there was anything to do."""
    message = choice.get("message") or {}
    content = message.get("content")
    if not isinstance(content, str) or not content.lstrip().startswith(OPEN):
        return False
    if message.get("reasoning_content") or message.get("reasoning"):  # the server takes it apart by itself
        return False
    tags = ThinkTags()
    thought, text = tags.split(content)
    rest = tags.flush()
    message.update(_delta(thought + rest[0], text + rest[1]))
    return True


def _delta(thought: str, text: str) -> dict[str, str]:
    return {"reasoning_content": thought, "content": text} if thought else {"content": text}


def _may_be_empty(tally: Tally) -> bool:
    """Whether the finish reason explains an answer without content."""
    return tally.finish_reason in ("length", "content_filter")


def _length(text: Any) -> int:
    return len(text) if isinstance(text, str) else 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
