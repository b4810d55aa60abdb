"""What the stand-in's models say: pure functions from a request to an answer, the same every time.

There is no language model here, and every answer says so. Text follows from the messages and the
seed, tokens are pieces of words, vectors are sums of hashed words. Nothing here knows HTTP, or time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MESSAGE_TOKENS = 4  # every message costs this beside its words, as a chat template's markers do
START_TOKENS = 3  # and so does the start of the answer
IMAGE_TOKENS = 256
NUM_KEEP = 5  # how many tokens Ollama keeps at the front of a prompt it chops

_CLOSINGS = (
    "Ask again and I will say the same.",
    "Another seed would end this differently.",
    "A real model would be more interesting here.",
    "Everything else on the way to me was real.",
)
_THOUGHTS = (
    "This is a stand-in's reasoning: there is none, but it arrives where a model's would. ",
    "First I count the messages that were sent. ",
    "Then I look for the last question among them. ",
    "Finally I put both into one honest sentence. ",
)
_EFFORT = {"low": 1, "medium": 2, "high": 3, "max": 4}  # sentences of reasoning
_LEAN_DEPTH = 4  # below this many levels an instance of a schema holds only what is required
_MAX_DEPTH = 16  # a schema that requires itself has no instance; this ends the search


@dataclass(frozen=True, slots=True)
class StandInModel:
    """One model that the stand-in plays.

    capabilities: of completion, tools, thinking, vision, insert, embedding. context_length: tokens.
    kv_bytes_per_token: what a token of num_ctx adds to `size_bytes` once the model is loaded.
    native: its template is llama.cpp's matter, not Ollama's, which shows on the wire: tool calls come
    on the last line, format "json" is ignored, one message that is too long is always refused.
    chops: it cuts an overlong prompt even where `truncate: false` asks for an error.
    blob: models with the same blob share what is loaded; "" = one of its own.
    """

    name: str
    size_bytes: int = 1_000_000_000
    capabilities: tuple[str, ...] = ("completion", "tools")
    context_length: int = 32768
    family: str = "standin"
    parameter_size: str = "1B"
    quantization: str = "Q4_K_M"
    embedding_length: int = 64
    kv_bytes_per_token: int = 0
    native: bool = False
    chops: bool = False
    blob: str = ""

    @property
    def runner(self) -> str:
        """What Ollama tells loaded models apart by."""
        return self.blob or self.name

    def resident_bytes(self, num_ctx: int) -> int:
        """What it takes in memory with this context."""
        return self.size_bytes + num_ctx * self.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class Ask:
    """One valid request to generate.

    messages: as sent, `content` always a string. For /api/generate `prompt` and `suffix` are set
    and the messages are what they amount to. think: False, True or a level. format: None, "json"
    or a JSON schema. limit: num_predict, None = no limit. top_logprobs: None = none asked.
    """

    messages: Sequence[Mapping[str, Any]]
    think: bool | str = False
    tools: Sequence[Mapping[str, Any]] = ()
    format: Any = None
    limit: int | None = None
    stop: Sequence[str] = ()
    seed: int = 0
    top_logprobs: int | None = None
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer in tokens. `done_reason` is "stop" or "length"; a stop is a token, too."""

    thinking: Sequence[str]
    content: Sequence[str]
    tool_calls: Sequence[Mapping[str, Any]]
    done_reason: str

    @property
    def eval_count(self) -> int:
        """What the answer cost, in tokens."""
        calls = sum(len(tokens(json.dumps(call))) for call in self.tool_calls)
        return len(self.thinking) + len(self.content) + calls + (self.done_reason == "stop")


def reply(model: StandInModel, ask: Ask) -> Reply:
    """The answer to `ask`: reasoning if it thinks, then tool calls, JSON, a filling or a text."""
    thoughts = "".join(_THOUGHTS[: _EFFORT.get(str(ask.think), 2)]) if ask.think else ""
    thought = _until_stop(thoughts, ask.stop)
    stopped = len(thought) < len(thoughts)
    calls = [] if stopped else _tool_calls(ask)
    thinking = tokens(thought)
    content = [] if stopped or calls else tokens(_until_stop(_text(model, ask), ask.stop))
    if ask.limit is None or len(thinking) + len(content) <= ask.limit:
        return Reply(thinking, content, calls, "stop")
    room = max(0, ask.limit - len(thinking))
    return Reply(thinking[: ask.limit], content[:room], calls if room else (), "length")


# --- tokens ----------------------------------------------------------------------------------


def tokens(text: str) -> list[str]:
    """The text in pieces, which joined give the text: a token is at most six characters of a word,
    with the space in front of it."""
    return re.findall(r"\s*\S{1,6}|\s+", text)


def prompt_tokens(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> int:
    """What a prompt costs: its words' tokens, MESSAGE_TOKENS for each message, START_TOKENS once."""
    return START_TOKENS + sum(_message_tokens(m) for m in messages) + sum(len(tokens(json.dumps(t))) for t in tools)


def fit(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], num_ctx: int) -> tuple[Any, int]:
    """Chop an overlong prompt as Ollama does: the oldest messages go, system messages and the last
    stay; if that is not enough, half of the context is cut away. Returns messages and their tokens."""
    kept = list(messages)
    for start in range(len(messages)):
        system = [m for m in messages[:start] if m.get("role") == "system"]
        kept = [*system, *messages[start:]]
        count = prompt_tokens(kept, tools)
        if count <= num_ctx:
            return kept, count
    return kept, num_ctx - max((num_ctx - NUM_KEEP) // 2, 1)


def _message_tokens(message: Mapping[str, Any]) -> int:
    words = len(tokens(str(message.get("content") or ""))) + len(tokens(str(message.get("thinking") or "")))
    calls = sum(len(tokens(json.dumps(call))) for call in message.get("tool_calls") or ())
    return MESSAGE_TOKENS + words + calls + IMAGE_TOKENS * len(message.get("images") or ())


# --- text ------------------------------------------------------------------------------------


def _text(model: StandInModel, ask: Ask) -> str:
    if ask.suffix:
        return _filling(ask)
    if ask.format == "json" and not model.native:
        return json.dumps({"stand_in": True, "model": model.name, "question": _question(ask)})
    if isinstance(ask.format, dict):
        return json.dumps(instance(ask.format))
    last = ask.messages[-1]
    words = sum(len(str(m.get("content") or "").split()) for m in ask.messages)
    sentences = [
        f"I am the Portway stand-in, playing {model.name}; no model is running here.",
        f'The tool answered: "{_short(last.get("content"))}".'
        if last.get("role") == "tool"
        else f'You asked: "{_question(ask)}".',
        f"This request carried {_count(len(ask.messages), 'message')} with {_count(words, 'word')},",
        "and that is all I know of our conversation: I keep nothing between requests.",
        _CLOSINGS[_hash(_question(ask), str(ask.seed))[0] % len(_CLOSINGS)],
    ]
    images = sum(len(m.get("images") or ()) for m in ask.messages)
    if images:
        sentences.insert(2, f"I was also sent {_count(images, 'image')}, which I cannot see.")
    return " ".join(sentences)


def _filling(ask: Ask) -> str:
    before = len(str(ask.messages[-1].get("content") or "").split())
    return f" # filled in by the stand-in, after {_count(before, 'word')} and before {len(ask.suffix.split())}\n"


def _question(ask: Ask) -> str:
    asked = [m for m in ask.messages if m.get("role") == "user"] or [ask.messages[-1]]
    return _short(asked[-1].get("content"))


def _short(text: object, most: int = 12) -> str:
    words = str(text or "").split()
    shown = " ".join(words[:most])[:120]
    return shown + (" .." if len(words) > most else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _until_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min((end for stop in stops if stop and (end := text.find(stop)) >= 0), default=None)]


# --- tools, schemas --------------------------------------------------------------------------


def _tool_calls(ask: Ask) -> list[dict[str, Any]]:
    """One call for each time the last message names a tool that is offered, in that order."""
    last = ask.messages[-1]
    offered = {str(tool["function"]["name"]): tool["function"] for tool in ask.tools if _is_function(tool)}
    if last.get("role") != "user" or not offered:
        return []
    longest_first = sorted(offered, key=len, reverse=True)
    names = re.findall("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in longest_first), str(last["content"]))
    return [
        {"index": index, "name": name, "arguments": instance(offered[name].get("parameters") or {"type": "object"})}
        for index, name in enumerate(names)
    ]


def _is_function(tool: Mapping[str, Any]) -> bool:
    function = tool.get("function")
    return isinstance(function, Mapping) and bool(function.get("name"))


def instance(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """A small valid instance of a JSON schema: objects, arrays, strings, numbers, enum, const, default,
    anyOf, oneOf, allOf and local $ref; what else a schema may demand is not looked at."""
    root = schema if root is None else root
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return None
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    if "$ref" in schema:
        return instance(_resolve(root, str(schema["$ref"])), root, depth + 1)
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return instance(schema[key][0], root, depth + 1)
    if schema.get("allOf"):
        return _all_of(schema["allOf"], root, depth)
    kind = schema.get("type") or ("object" if "properties" in schema else "string")
    return _typed(kind[0] if isinstance(kind, list) else kind, schema, root, depth)


def _typed(kind: str, schema: Mapping[str, Any], root: Any, depth: int) -> Any:
    match kind:
        case "object":
            properties = schema.get("properties") or {}
            wanted = schema.get("required") or ([] if depth > _LEAN_DEPTH else list(properties))
            return {name: instance(properties.get(name, {}), root, depth + 1) for name in wanted}
        case "array":
            least = int(schema.get("minItems") or 0)
            return [instance(schema.get("items") or {}, root, depth + 1) for _ in range(least)]
        case "integer" | "number":
            return _number(schema, whole=kind == "integer")
        case "boolean":
            return True
        case "null":
            return None
    least, most = int(schema.get("minLength") or 0), int(schema.get("maxLength") or 1000)
    return "stand-in".ljust(least, ".")[:most]


def _number(schema: Mapping[str, Any], *, whole: bool) -> int | float:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    value: int | float = max(low, 0) if schema.get("maximum", 0) >= 0 else schema["maximum"]
    if value == schema.get("exclusiveMinimum"):
        value += 1 if whole else 0.5
    return math.ceil(value) if whole else value


def _all_of(schemas: Sequence[Any], root: Any, depth: int) -> Any:
    parts = [instance(schema, root, depth + 1) for schema in schemas]
    if all(isinstance(part, dict) for part in parts):
        return {name: value for part in parts for name, value in part.items()}
    return parts[0]


def _resolve(root: Any, ref: str) -> Any:
    found = root
    for step in ref.removeprefix("#").strip("/").split("/"):
        if step:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


# --- numbers ---------------------------------------------------------------------------------


def logprobs(token: str, top: int) -> dict[str, Any]:
    """Ollama's object for one token: invented, but the same each time. top: how many alternatives."""
    logprob = -(_hash(token)[0] % 20 + 1) / 100
    first = {"token": token, "logprob": logprob, "bytes": list(token.encode())}
    others = [
        {"token": f" alt{rank}", "logprob": logprob - rank, "bytes": list(f" alt{rank}".encode())}
        for rank in range(1, top)
    ]
    return {**first, "top_logprobs": [first, *others]} if top else first


def embedding(text: str, length: int, dimensions: int | None = None) -> list[float]:
    """A unit vector that texts with common words share in part. dimensions: cut to so many."""
    total = [1e-3] * length  # so that a text without words has a direction too
    for word in text.lower().split():
        total = [a + b for a, b in zip(total, _word_vector(word, length), strict=True)]
    cut = total[:dimensions] if dimensions and 0 < dimensions < length else total
    norm = math.sqrt(sum(value * value for value in cut)) or 1.0
    return [value / norm for value in cut]


def digest(model: StandInModel) -> str:
    """A model's digest as Ollama shows it: 64 hexadecimal digits."""
    return _hash(model.runner).hex()


def _word_vector(word: str, length: int) -> list[float]:
    digest = b"".join(_hash(word, str(block)) for block in range(math.ceil(length / 32)))
    return [byte / 127.5 - 1 for byte in digest[:length]]


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()
