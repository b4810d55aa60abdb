"""Ollama's request bodies as its server reads them, and the errors it answers in their own words.

Observed on Ollama 0.33: an answer's text, status and order of checks are the same where a client
could tell. Nothing here knows sockets, models' words or memory.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from portway.standin.answers import Ask, StandInModel

_UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LEVELS = ("high", "medium", "low", "max")
_GO_NAMES = {dict: "object", list: "array", str: "string", bool: "bool", int: "number", float: "number"}
_FOR_EVER = timedelta(seconds=9223372036)  # Go's longest duration, which "for ever" becomes

# field -> Go's type, as its JSON errors name them; null counts as absent everywhere
_CHAT = {
    "model": "string",
    "messages": "[]api.Message",
    "stream": "bool",
    "tools": "[]api.Tool",
    "options": "map[string]interface {}",
    "truncate": "bool",
    "shift": "bool",
    "logprobs": "bool",
    "top_logprobs": "int",
}
_GENERATE = {
    "model": "string",
    "prompt": "string",
    "suffix": "string",
    "system": "string",
    "stream": "bool",
    "raw": "bool",
    "images": "[]api.ImageData",
    "options": "map[string]interface {}",
    "truncate": "bool",
    "shift": "bool",
    "logprobs": "bool",
    "top_logprobs": "int",
}
_EMBED = {"model": "string", "options": "map[string]interface {}", "truncate": "bool", "dimensions": "int"}
_SHOW = {"model": "string", "name": "string", "verbose": "bool"}
_MESSAGE = {"role": "string", "content": "string", "thinking": "string", "tool_name": "string"}
_INTEGER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "num_keep", "num_predict", "seed", "top_k", "repeat_last_n")
_RUNNER_OPTIONS = ("num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
_FLOAT_OPTIONS = ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty")

NUM_CTX = 4096  # tokens, where a request says nothing
BUSY = "server busy, please try again.  maximum pending requests exceeded"

Find = Callable[[str], StandInModel | None]


class Refused(Exception):
    """A request that Ollama answers with `{"error": message}` and a status.

    late: the runner refused it, when the answer was to begin.
    """

    def __init__(self, status: int, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.late = late


@dataclass(frozen=True, slots=True)
class Order:
    """One request that needs a model: chat, generate or embed.

    named: the model as the client wrote it. ask: None = only load, or unload with keep_alive 0.
    keep_alive: seconds, math.inf = for ever, None = not said. variant: the options beside num_ctx that
    a loaded model is bound to. context: the answer ends with the dialog's tokens, as generate's does.
    inputs, dimensions: embed's own.
    """

    model: StandInModel
    named: str
    ask: Ask | None
    keep_alive: float | None
    num_ctx: int
    variant: tuple[object, ...] = ()
    stream: bool = True
    truncate: bool = True
    shift: bool = True
    context: bool = False
    inputs: Sequence[str] = ()
    dimensions: int | None = None

    @property
    def unloads(self) -> bool:
        """It asks for the model to be unloaded."""
        return self.ask is None and self.keep_alive == 0


def read_json(raw: bytes, request: str) -> dict[str, Any]:
    """The body as an object. Raises Refused as Go's decoder would complain."""
    if not raw.strip():
        raise Refused(400, "missing request body")
    try:
        body = json.loads(raw)
    except UnicodeDecodeError:
        raise Refused(400, "invalid character in string literal") from None
    except json.JSONDecodeError as exc:
        if exc.pos >= len(exc.doc.rstrip()) or exc.msg.startswith("Unterminated"):
            raise Refused(400, "unexpected EOF") from None
        wanted = "object key string" if exc.msg.startswith("Expecting property name") else "value"
        raise Refused(400, f"invalid character '{exc.doc[exc.pos]}' looking for beginning of {wanted}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"json: cannot unmarshal {_go_name(body)} into Go value of type api.{request}")
    return _whole_characters(body) if b"\\ud" in raw.lower() else body


def _whole_characters(body: dict[str, Any]) -> dict[str, Any]:
    """Go reads half of a surrogate pair, which JSON can hold and UTF-8 can't, as U+FFFD."""
    text = json.dumps(body, ensure_ascii=False)
    whole: dict[str, Any] = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return whole


def read_chat(raw: bytes, find: Find) -> Order:
    """POST /api/chat. Raises Refused."""
    body = read_json(raw, "ChatRequest")
    _check_fields(body, _CHAT, "ChatRequest")
    for message in body.get("messages") or ():
        _check_message(message)
    keep_alive, think = _common(body)
    named = body.get("model") or ""
    if not named:
        raise Refused(400, "model is required")
    model = _found(find, named, f"model '{named}' not found")
    messages = [_message(message) for message in body.get("messages") or ()]
    if not messages and keep_alive == 0:
        return Order(model, named, None, 0.0, 0)
    think = _thinks(model, named, think)
    _check_capabilities(model, named, "chat", tools=bool(body.get("tools")))
    ask = _ask(body, messages, think, tools=body.get("tools") or ()) if messages else None
    return _order(model, named, ask, keep_alive, body)


def read_generate(raw: bytes, find: Find) -> Order:
    """POST /api/generate. Raises Refused."""
    body = read_json(raw, "GenerateRequest")
    _check_fields(body, _GENERATE, "GenerateRequest")
    _check_base64(body.get("images") or ())
    keep_alive, think = _common(body)
    named = body.get("model") or ""
    model = _found(find, named, f"model '{named}' not found")
    prompt, suffix = body.get("prompt") or "", body.get("suffix") or ""
    if not prompt and keep_alive == 0:
        return Order(model, named, None, 0.0, 0)
    think = _thinks(model, named, think)
    _check_capabilities(model, named, "generate", insert=bool(suffix))
    messages = [{"role": "user", "content": prompt, "images": body.get("images") or []}]
    if body.get("system") and not body.get("raw") and not suffix:
        messages.insert(0, {"role": "system", "content": body["system"]})
    ask = _ask(body, messages, think, suffix=suffix) if prompt else None
    return replace(_order(model, named, ask, keep_alive, body), context=not body.get("raw"))


def read_embed(raw: bytes, find: Find) -> Order:
    """POST /api/embed. Raises Refused."""
    body = read_json(raw, "EmbedRequest")
    _check_fields(body, _EMBED, "EmbedRequest")
    keep_alive = None if body.get("keep_alive") is None else duration(body["keep_alive"])
    given = body.get("input")
    inputs = [] if given in (None, "") else [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not all(isinstance(text, str) for text in inputs):
        raise Refused(400, "invalid input type")
    named = body.get("model") or ""
    model = _found(find, named, f'model "{named}" not found, try pulling it first')
    order = _order(model, named, None, keep_alive, body)
    return replace(order, inputs=inputs, dimensions=body.get("dimensions") or None)


def read_show(raw: bytes, find: Find) -> StandInModel:
    """POST /api/show. Raises Refused."""
    body = read_json(raw, "ShowRequest")
    _check_fields(body, _SHOW, "ShowRequest")
    named = body.get("model") or body.get("name") or ""
    if not named:
        raise Refused(400, "model is required")
    return _found(find, named, f"model '{full_name(named)}' not found")


def duration(value: Any) -> float:
    """keep_alive in seconds; negative = for ever (math.inf). Raises Refused in Go's words."""
    if isinstance(value, str):
        value = _go_duration(value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        names = {dict: "map[string]interface {}", list: "[]interface {}", bool: "bool"}
        raise Refused(400, f"Unsupported type: '{names[type(value)]}'")
    return math.inf if value < 0 else float(value)


def full_name(name: str) -> str:
    """A model's name with its tag: "latest" if it says none."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def check_runner(order: Order) -> None:
    """What the runner won't do, once the model is loaded. Raises Refused."""
    model, ask = order.model, order.ask
    if ask is None:
        if order.inputs and "embedding" not in model.capabilities:
            raise Refused(501, "This server does not support embeddings. Start it with `--embeddings`")
        return
    if "vision" not in model.capabilities and any(message.get("images") for message in ask.messages):
        raise _no_images(model)
    if model.native and ask.tools:
        _check_native_tools(ask)


def admits(host: str | None, origin: str | None) -> bool:
    """Ollama's guard on a loopback port: only local names as Host, only local pages as Origin."""
    page = None if origin is None else urlsplit(origin).hostname
    return _is_local(urlsplit(f"//{host or ''}").hostname or "") and (origin is None or _is_local(page or "null"))


# --- answers ---------------------------------------------------------------------------------


def encode(obj: Any) -> bytes:
    """JSON as Go writes it: compact, UTF-8, with <, > and & escaped."""
    text = json.dumps(obj, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").encode()


def now() -> str:
    """created_at: UTC with nanoseconds."""
    seconds, nanos = divmod(time.time_ns(), 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanos:09d}Z"


def expiry(seconds: float) -> str:
    """expires_at, so many seconds from now; math.inf is Go's longest duration, some 292 years."""
    span = _FOR_EVER if math.isinf(seconds) else timedelta(seconds=seconds)
    return (datetime.now(UTC) + span).isoformat().replace("+00:00", "Z")


def overflow(count: int, num_ctx: int) -> Refused:
    """A prompt over the context under `truncate: false`: the runner's whole answer, as text in Ollama's."""
    inner = {
        "code": 400,
        "message": f"request ({count} tokens) exceeds the available context size ({num_ctx} tokens), try increasing it",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": count,
        "n_ctx": num_ctx,
    }
    return Refused(400, encode({"error": inner}).decode(), late=True)


def details(model: StandInModel) -> dict[str, Any]:
    """A model's `details`, as /api/tags, /api/ps and /api/show have them."""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.family,
        "families": [model.family],
        "parameter_size": model.parameter_size,
        "quantization_level": model.quantization,
    }


# --- the parts of a request ------------------------------------------------------------------


def _common(body: Mapping[str, Any]) -> tuple[float | None, bool | str | None]:
    """keep_alive and think, checked, and top_logprobs' bounds."""
    keep_alive = None if body.get("keep_alive") is None else duration(body["keep_alive"])
    think = body.get("think")
    allowed = '"high", "medium", "low", "max", true, or false'
    if isinstance(think, str) and think not in _LEVELS:
        raise Refused(400, f'invalid think value: "{think}" (must be {allowed})')
    if think is not None and not isinstance(think, bool | str):
        raise Refused(400, f"think must be a boolean or string ({allowed})")
    if not 0 <= (body.get("top_logprobs") or 0) <= 20:
        raise Refused(400, "top_logprobs must be between 0 and 20")
    return keep_alive, think


def _found(find: Find, named: str, otherwise: str) -> StandInModel:
    model = find(named)
    if model is None:
        raise Refused(404, otherwise)
    return model


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "role": str(message.get("role") or "").lower(), "content": message.get("content") or ""}


def _thinks(model: StandInModel, named: str, think: bool | str | None) -> bool | str:
    """A thinking model thinks unless told not to; another one must not be told to."""
    if "thinking" in model.capabilities:
        return True if think is None else think
    if think:
        raise Refused(400, f'"{named}" does not support thinking')
    return False


def _check_capabilities(
    model: StandInModel, named: str, verb: str, *, tools: bool = False, insert: bool = False
) -> None:
    if "completion" not in model.capabilities:
        raise Refused(400, f'"{named}" does not support {verb}')
    for wanted, capability in ((tools, "tools"), (insert, "insert")):
        if wanted and capability not in model.capabilities:
            raise Refused(400, f"registry.ollama.ai/library/{full_name(named)} does not support {capability}")


def _ask(
    body: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    think: bool | str,
    tools: Sequence[Mapping[str, Any]] = (),
    suffix: str = "",
) -> Ask:
    options = _options(body)
    limit = options.get("num_predict")
    return Ask(
        messages=messages,
        think=think,
        tools=tools,
        format=_format(body.get("format")),
        limit=None if limit is None or limit < 0 else max(1, int(limit)),  # 0 gives a token, too
        stop=options.get("stop") or (),
        seed=int(options.get("seed") or 0),
        top_logprobs=(body.get("top_logprobs") or 0) if body.get("logprobs") else None,
        suffix=suffix,
    )


def _order(
    model: StandInModel, named: str, ask: Ask | None, keep_alive: float | None, body: Mapping[str, Any]
) -> Order:
    options = _options(body)
    shift = body.get("shift") is not False
    return Order(
        model,
        named,
        ask,
        keep_alive,
        min(int(options.get("num_ctx") or NUM_CTX), model.context_length),
        variant=(shift, *(options.get(name) for name in _RUNNER_OPTIONS)),
        stream=body.get("stream") is not False,
        truncate=body.get("truncate") is not False,
        shift=shift,
    )


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in (body.get("options") or {}).items() if value is not None}
    for name, value in options.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _INTEGER_OPTIONS and not number:
            raise Refused(500, f'option "{name}" must be of type integer')
        if name in _FLOAT_OPTIONS and not number:
            raise Refused(500, f'option "{name}" must be of type float32')
        if name == "stop" and not isinstance(value, list):
            raise Refused(500, 'option "stop" must be of type array')
        if name == "stop" and not all(isinstance(item, str) for item in value):
            raise Refused(500, 'option "stop" must be of an array of strings')
    return options


def _format(value: Any) -> Any:
    if value in (None, "", "json") or isinstance(value, dict):
        return value or None
    raise Refused(500, f'invalid format: {json.dumps(value)}; expected "json" or a valid JSON Schema object')


# --- what is refused late, or of everybody ---------------------------------------------------


def _no_images(model: StandInModel) -> Refused:
    if model.native:
        hint = "if this is unexpected, you may need to provide the mmproj"
        return _nested(500, f"image input is not supported - hint: {hint}", "server_error")
    text = "Multimodal data provided, but model does not support multimodal requests."
    return _nested(400, text, "invalid_request_error")


def _check_native_tools(ask: Ask) -> None:
    for tool in ask.tools:
        if tool.get("type") != "function":
            raise _nested(500, "Failed to parse tools: Unsupported tool type", "server_error")
        if not ((tool.get("function") or {}).get("parameters") or {}).get("type"):
            cause = 'Unrecognized schema: {"type":"","properties":null}'
            text = f"Unable to generate parser for this template. Automatic parser generation failed: {cause}"
            raise _nested(400, text, "invalid_request_error")
    if ask.top_logprobs is not None:
        raise _nested(400, "logprobs is not supported with tools + stream", "invalid_request_error")


def _nested(status: int, message: str, kind: str) -> Refused:
    """The runner's JSON document as the text of Ollama's own."""
    inner = {"error": {"code": status, "message": message, "type": kind}}
    return Refused(status, encode(inner).decode(), late=True)


def _is_local(name: str) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith((".localhost", ".local", ".internal"))
    return address.is_loopback or address.is_private


# --- Go's complaints -------------------------------------------------------------------------


def _check_message(message: Any) -> None:
    if not isinstance(message, dict):
        raise _mismatch(message, "ChatRequest.messages", "api.Message")
    _check_fields(message, _MESSAGE, "ChatRequest.messages")
    _check_base64(message.get("images") or ())
    for call in message.get("tool_calls") or ():
        arguments = (call.get("function") or {}).get("arguments")
        if arguments is not None and not isinstance(arguments, dict):
            raise Refused(400, "Value looks like object, but can't find closing '}' symbol")


def _check_base64(images: Sequence[Any]) -> None:
    for image in images:
        try:
            base64.b64decode(image, validate=True)
        except (ValueError, TypeError):
            bad = re.search(r"[^A-Za-z0-9+/]", str(image))
            raise Refused(400, f"illegal base64 data at input byte {bad.start() if bad else len(image)}") from None


def _check_fields(body: Mapping[str, Any], fields: Mapping[str, str], prefix: str) -> None:
    for name, go_type in fields.items():
        value = body.get(name)
        if value is not None and not _is_a(value, go_type):
            raise _mismatch(value, f"{prefix}.{name}", go_type)


def _is_a(value: Any, go_type: str) -> bool:
    if go_type == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    wanted = {"string": str, "bool": bool}.get(go_type, list if go_type.startswith("[]") else dict)
    return isinstance(value, wanted)


def _mismatch(value: Any, field: str, go_type: str) -> Refused:
    return Refused(400, f"json: cannot unmarshal {_go_name(value)} into Go struct field {field} of type {go_type}")


def _go_name(value: Any) -> str:
    return _GO_NAMES.get(type(value), "null")


def _go_duration(text: str) -> float:
    """time.ParseDuration: "1h30m", "-1s", "0"."""
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if rest == "0":
        return 0.0
    total = 0.0
    while rest:
        number = re.match(r"\d+\.?\d*|\.\d+", rest)
        if number is None:
            break
        rest = rest[number.end() :]
        unit = re.match(r"[^.\d]*", rest)
        name = unit.group() if unit else ""
        if not name:
            raise Refused(400, f'time: missing unit in duration "{text}"')
        if name not in _UNITS:
            raise Refused(400, f'time: unknown unit "{name}" in duration "{text}"')
        total += float(number.group()) * _UNITS[name]
        rest = rest[len(name) :]
        if not rest:
            return sign * total
    raise Refused(400, f'time: invalid duration "{text}"')
