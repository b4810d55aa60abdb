"""Answers as documents: one form for what was streamed and what was not, made and told again.

A document is OpenAI's plain answer without the members that belong to one request (id, object,
created, model), as bytes of JSON. A plain answer is told again by putting these before it, unread; a
stream as the events a backend would have sent, reasoning and text in a chunk each. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from portway.call import Usage
from portway.wire.events import DONE, SSEReader, WireError, dumps, loads, sse

if TYPE_CHECKING:
    from portway.call import Call, Tally

Json = dict[str, Any]

_OWN = ("id", "object", "created", "model")  # of the request, not of the answer
# One of these with a plain value, at whatever depth: within a text no quotation mark stands without a backslash.
_OWN_MEMBER = re.compile(rb'"(?:id|object|created|model)"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[\w.+-]+)\s*,?\s*')
_REASONING = ("reasoning_content", "reasoning")
_TEXTS = ("content", *_REASONING, "refusal", "text")  # what a stream sends a piece at a time
_OBJECTS = {"chat": "chat.completion", "completions": "text_completion"}


# --- making a document ----------------------------------------------------------------------------


def plain_document(raw: bytes) -> bytes:
    """The document of a plain answer. Raises WireError if that is no JSON object."""
    return _without_own(raw, _object(raw))


def stream_document(pieces: Iterable[bytes], tally: Tally) -> bytes:
    """The document of a stream, from its server-sent events; comments among them are skipped.

    tally: has the token counts of a stream whose client did not ask for them.
    Raises WireError if the stream has no end or is not what OpenAI's API sends.
    """
    return dumps(_assembled(pieces, tally))


def clean_plain(raw: bytes) -> bytes | None:
    """plain_document, or None if the answer is not to be kept."""
    body = _object(raw)
    return _without_own(raw, body) if _is_clean(body) else None


def clean_stream(pieces: Iterable[bytes], tally: Tally) -> bytes | None:
    """stream_document, or None if the answer is not to be kept."""
    body = _assembled(pieces, tally)
    return dumps(body) if _is_clean(body) else None


def _object(raw: bytes) -> Json:
    body = loads(raw)
    if not isinstance(body, dict):
        raise WireError("the answer is not a JSON object")
    return body


def _without_own(raw: bytes, body: Json) -> bytes:
    """`raw` with the _OWN members cut out, which takes 3 us where to write `body` anew takes 13. That can be done if
    as many are found as there are at the top: then there are no others."""
    own = [type(body[name]) for name in _OWN if name in body]
    rest, found = _OWN_MEMBER.subn(b"", raw)
    if found != len(own) or dict in own or list in own:
        return dumps({name: value for name, value in body.items() if name not in _OWN})
    return rest.strip()[:-1].rstrip().removesuffix(b",") + b"}"  # a comma is left if the last member was cut out


def _is_clean(body: Json) -> bool:
    """Whether it is one whole answer: a text that ended by itself and calls no tool, or vectors."""
    choices = body.get("choices")
    if body.get("error"):
        return False
    if choices is None:
        return bool(body.get("data"))
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return False
    choice = choices[0]
    message = choice.get("message", choice)
    if not isinstance(message, dict) or message.get("tool_calls") or message.get("function_call"):
        return False
    text = message.get("content", message.get("text"))
    return choice.get("finish_reason") == "stop" and isinstance(text, str) and bool(text.strip())


def _assembled(pieces: Iterable[bytes], tally: Tally) -> Json:
    reader = SSEReader()
    assembly = _Assembly()
    for piece in pieces:
        for data in reader.feed(piece):
            if data == b"[DONE]":
                return assembly.document(tally)
            assembly.add(loads(data))
    raise WireError("the stream has no end")


class _Assembly:
    """Puts a stream's chunks together. What is not known keeps the last value that says anything."""

    def __init__(self) -> None:
        self._top: Json = {}
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: Any) -> None:
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise WireError("a chunk is not part of an answer")
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            raise WireError("the choices are not a list")
        for choice in choices:
            index = choice.get("index", 0) if isinstance(choice, dict) else None
            if not isinstance(index, int):
                raise WireError("a choice is not what it should be")
            self._choices.setdefault(index, _Choice()).add(choice)
        for key, value in chunk.items():
            if key not in _OWN and key != "choices" and value is not None:
                self._top[key] = value

    def document(self, tally: Tally) -> Json:
        usage = {} if "usage" in self._top else _usage(tally)
        choices = [choice.whole(index) for index, choice in sorted(self._choices.items())]
        return {"choices": choices, **self._top, **usage}


class _Choice:
    """One choice of a stream: its message if it has deltas, else its text. Each member's values are
    only collected, and joined at the end: a long answer must not be copied for every token."""

    def __init__(self) -> None:
        self._message: dict[str, list[Any]] = {}
        self._rest: dict[str, list[Any]] = {}

    def add(self, choice: Json) -> None:
        delta = choice.get("delta")
        if isinstance(delta, dict):
            _collect(self._message, delta)
        _collect(self._rest, {key: value for key, value in choice.items() if key not in ("index", "delta")})

    def whole(self, index: int) -> Json:
        message = {"role": "assistant", "content": "", **_joined(self._message)} if self._message else None
        return {"index": index, **({"message": message} if message else {}), **_joined(self._rest)}


def _collect(into: dict[str, list[Any]], part: Json) -> None:
    for key, value in part.items():
        values = into.setdefault(key, [])
        if value is not None:
            values.append(value)


def _joined(parts: dict[str, list[Any]]) -> Json:
    return {key: _join(key, values) for key, values in parts.items()}


def _join(key: str, values: list[Any]) -> Any:
    """Texts and lists grow and objects (logprobs) merge; the rest is said once, and the last word counts."""
    if key in _TEXTS and all(isinstance(value, str) for value in values):
        return "".join(values) if values else None
    if values and all(isinstance(value, list) for value in values):
        return list(chain.from_iterable(values))
    if values and all(isinstance(value, dict) for value in values):
        parts: dict[str, list[Any]] = {}
        for value in values:
            _collect(parts, value)
        return _joined(parts)
    return values[-1] if values else None


def _usage(tally: Tally) -> Json:
    """Left out where a count is not known: a zero would be believed."""
    prompt, completion = tally.prompt_tokens, tally.completion_tokens
    if prompt is None or completion is None:
        return {}
    return {"usage": Usage(prompt, completion).to_json()}


# --- telling it again -----------------------------------------------------------------------------


def replay(document: bytes, call: Call, name: str) -> bytes:
    """The answer to `call`: one JSON document, or every event of a stream in one piece.

    name: the logical model that answered. id and created are the call's own.
    """
    if call.endpoint == "embeddings":
        return b'{"object":"list","model":%s,%s' % (dumps(name), document[1:])
    if call.stream:
        return _events(loads(document), call, name)
    own = {"id": call.id, "object": _OBJECTS[call.endpoint], "created": call.created, "model": name}
    return b"%s,%s" % (dumps(own)[:-1], document[1:])


def _events(body: Json, call: Call, name: str) -> bytes:
    """Members beside the choices: short ones (system_fingerprint) stand in each chunk, objects
    (timings) in the last one, as servers do it."""
    usage = body.pop("usage", None)
    choices = body.pop("choices")
    kind = _OBJECTS[call.endpoint] + (".chunk" if call.endpoint == "chat" else "")
    base = {"id": call.id, "object": kind, "created": call.created, "model": name}
    base |= {key: value for key, value in body.items() if not isinstance(value, dict | list)}
    last = {key: value for key, value in body.items() if isinstance(value, dict | list)}
    no_usage = {"usage": None} if call.include_usage else {}
    shape = _chat_chunks if call.endpoint == "chat" else _text_chunks
    chunks = [{**base, "choices": [part], **no_usage} for choice in choices for part in shape(choice)]
    if call.include_usage and usage is not None:
        chunks.append({**base, "choices": [], "usage": usage})
    chunks[-1] |= last
    return b"".join([*(sse(dumps(chunk)) for chunk in chunks), DONE])


def _chat_chunks(choice: Json) -> list[Json]:
    """Role, reasoning, text with its log probabilities, finish reason: a chunk each."""
    index, message, logprobs = choice.get("index", 0), choice.get("message") or {}, choice.get("logprobs")
    reasoning = {key: message[key] for key in _REASONING if message.get(key)}
    said = {key: value for key, value in message.items() if value and key != "role" and key not in _REASONING}
    deltas: list[Json] = [{"role": message.get("role", "assistant"), "content": ""}]
    deltas += [delta for delta in (reasoning, said) if delta]
    parts = [{"index": index, "delta": delta, "finish_reason": None} for delta in deltas]
    if logprobs:
        parts[-1]["logprobs"] = logprobs
    return [*parts, {**_ending(choice), "delta": {}}]


def _text_chunks(choice: Json) -> list[Json]:
    index, empty = choice.get("index", 0), {"text": "", "logprobs": None}
    reasoning = {key: choice[key] for key in _REASONING if choice.get(key)}
    parts = [{"index": index, **empty, **reasoning, "finish_reason": None}] if reasoning else []
    if choice.get("text"):
        said = {"text": choice["text"], "logprobs": choice.get("logprobs")}
        parts.append({"index": index, **said, "finish_reason": None})
    return [*parts, {**_ending(choice), **empty}]


def _ending(choice: Json) -> Json:
    """The last chunk's choice: the finish reason, and what a server says of a choice beside it."""
    shown = ("message", "text", "logprobs", *_REASONING)
    return {key: value for key, value in choice.items() if key not in shown}
