"""OpenAI's API <-> Ollama's native one, both ways, without any I/O.

Requests: `chat_request`, `generate_request` and `embed_request` turn an OpenAI body into the payload
of /api/chat, /api/generate and /api/embed, and say in warnings what they could not carry over. Answers:
`ChatStream` turns Ollama's lines into OpenAI's chunks or one document; `embed_response` does the vectors.
The native API and not Ollama's own /v1, because /v1 drops keep_alive, num_ctx and think in silence.
Protocol facts are from Ollama's api/types.go, server/routes.go and llm/llama_server.go (0.33) and from
OpenAI's API reference. How a request is sent, and what follows from an error, is known elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import sys
from array import array
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import TYPE_CHECKING, Any

from portway import failures, wire
from portway.call import Tally, Usage
from portway.errors import BackendError, ClientError

if TYPE_CHECKING:
    from portway.call import Call
    from portway.config import Model

Payload = dict[str, Any]

# --- What is carried over, and what is only named in a warning ------------------------------------

# Fields that are one number in Ollama's options, by the same name.
_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repeat_penalty")
_INTEGERS = ("seed", "top_k", "repeat_last_n")
# Options of the runner: a change reloads the model, so they are the configuration's alone (models.NAME.params).
_RUNNER = ("num_gpu", "num_batch", "main_gpu", "use_mmap", "num_thread", "num_keep", "draft_num_predict")

_COMMON_FIELDS = frozenset(
    ("model", "stream", "max_tokens", "max_completion_tokens", "stop", "n", "reasoning_effort", "reasoning", "think")
    + ("logprobs", *_NUMBERS, *_INTEGERS)
)
_CHAT_FIELDS = _COMMON_FIELDS | {"messages", "tools", "tool_choice", "response_format", "top_logprobs"}
_COMPLETION_FIELDS = _COMMON_FIELDS | {"prompt", "suffix", "echo"}
_EMBED_FIELDS = frozenset(("model", "input", "dimensions", "encoding_format"))

# Fields that shape no answer: nothing is lost without them.
_SHAPELESS = frozenset(
    ("user", "metadata", "stream_options", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
    + ("service_tier", "store")
)
# Fields that Ollama has no form for, by the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "verbosity": ("medium",),
}
_MAX_WARNINGS = 16  # they travel in a header
_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]")

# reasoning_effort -> think: whether, and at which of Ollama's levels.
_EFFORTS: Mapping[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_REMOTE_URL = re.compile(r"(https?|file|ftp|blob):", re.IGNORECASE)


# --- Requests -------------------------------------------------------------------------------------


def chat_request(body: Payload, target: Model, stream_upstream: bool = True) -> tuple[Payload, list[str]]:
    """(the payload of POST /api/chat, warnings) for the body of a chat completion.

    Raises ClientError for what no backend could serve, BackendError("unsupported") for what this
    target can't. Upstream is streamed even when the client is not, so that its leaving is noticed.
    """
    _require(target, "completion", "chat", None)
    asked = _with_params(body, target)
    warnings = _ignored(asked, body, _CHAT_FIELDS)
    _one_answer(asked)
    if asked.get("functions") or asked.get("function_call"):
        raise _unsupported("functions", "'functions' was retired by OpenAI; send 'tools' instead.", "functions")
    messages = _messages(asked, target, warnings)
    payload = _payload(target, asked, warnings, stream_upstream)
    payload["messages"] = messages
    if tools := _tools(asked, target, warnings):
        payload["tools"] = tools
    if (form := _format(asked)) is not None:
        payload["format"] = form
    if _boolean(asked, "logprobs"):
        payload["logprobs"] = True
        if (top := _integer(asked, "top_logprobs", 0, 20)) is not None:
            payload["top_logprobs"] = top
    return payload, _listed(warnings)


def generate_request(body: Payload, target: Model, stream_upstream: bool = True) -> tuple[Payload, list[str]]:
    """(the payload of POST /api/generate, warnings) for the body of a legacy completion.

    The model's template is applied, as in Ollama's own /v1/completions: `raw` would also switch off
    the fill-in-the-middle form that `suffix` needs. Raises as chat_request does.
    """
    _require(target, "completion", "completion", None)
    asked = _with_params(body, target)
    warnings = _ignored(asked, body, _COMPLETION_FIELDS)
    _one_answer(asked)
    if _boolean(asked, "echo"):
        raise _unsupported("echo", "Ollama does not repeat the prompt (echo).", "echo")
    prompt = _prompt(asked)
    payload = _payload(target, asked, warnings, stream_upstream)
    payload["prompt"] = prompt
    if suffix := _string(asked, "suffix"):
        _require(target, "insert", "insert", "suffix")
        payload["suffix"] = suffix
    if (top := _integer(asked, "logprobs", 0, 20)) is not None:
        payload["logprobs"] = True
        payload["top_logprobs"] = top
    return payload, _listed(warnings)


def embed_request(body: Payload, target: Model) -> tuple[Payload, list[str]]:
    """(the payload of POST /api/embed, warnings) for the body of an embeddings request.

    encoding_format is checked here and applied on the way back. Raises as chat_request does.
    """
    _require(target, "embedding", "embedding", None)
    asked = _with_params(body, target)
    warnings = _ignored(asked, body, _EMBED_FIELDS)
    if asked.get("encoding_format") not in (None, "float", "base64"):
        raise ClientError("encoding_format must be 'float' or 'base64'.", param="encoding_format")
    payload = {"model": target.model, "input": _input(asked), "truncate": False, **_residency(target)}
    if (dimensions := _integer(asked, "dimensions", 1)) is not None:
        payload["dimensions"] = dimensions
    if options := _runner_options(target):
        payload["options"] = options
    return payload, _listed(warnings)


def prompt_chars(payload: Payload) -> int:
    """Characters of prompt text in a payload made here: what the server must read at least.

    Tool definitions, images and the template's own words are left out, so the truth is larger.
    """
    texts = [payload.get("prompt"), payload.get("suffix")]
    texts += [message.get(key) for message in payload.get("messages", ()) for key in ("content", "thinking")]
    return sum(len(text) for text in texts if isinstance(text, str))


# --- Requests: policy and options -----------------------------------------------------------------


def _with_params(body: Payload, target: Model) -> Payload:
    """The body with the model's params where the client is silent; OpenAI's null means absent."""
    return {**target.params, **{name: value for name, value in body.items() if value is not None}}


def _payload(target: Model, asked: Payload, warnings: list[str], stream: bool) -> Payload:
    """What /api/chat and /api/generate have in common.

    truncate and shift are off: an overlong prompt must be an error, and an answer that fills the
    window must end with "length"; both default to dropping old text in silence.
    """
    payload: Payload = {"model": target.model, "stream": stream, "truncate": False, "shift": False}
    payload |= _residency(target)
    if (think := _think(asked, target, warnings)) is not None:
        payload["think"] = think
    if options := _runner_options(target) | _sampling_options(asked, target, warnings):
        payload["options"] = options
    return payload


def _residency(target: Model) -> Payload:
    """keep_alive as a number of seconds, on every call: one without it leaves an earlier caller's value."""
    if target.keep_alive is None:
        return {}
    seconds = target.keep_alive
    return {"keep_alive": int(seconds) if seconds == int(seconds) else seconds}


def _runner_options(target: Model) -> Payload:
    options = {name: target.params[name] for name in _RUNNER if name in target.params}
    if target.num_ctx is not None:
        options["num_ctx"] = target.num_ctx
    return options


def _sampling_options(asked: Payload, target: Model, warnings: list[str]) -> Payload:
    options: Payload = {}
    for name in _NUMBERS:
        if (number := _number(asked, name)) is not None:
            options[name] = number
    for name in _INTEGERS:
        if (integer := _integer(asked, name)) is not None:
            options[name] = integer
    if stop := _stop(asked):
        options["stop"] = stop
    if (limit := _num_predict(asked, target, warnings)) is not None:
        options["num_predict"] = limit
    return options


def _num_predict(asked: Payload, target: Model, warnings: list[str]) -> int | None:
    """The answer's limit in tokens: the client's, under the model's ceiling."""
    name = "max_completion_tokens" if asked.get("max_completion_tokens") is not None else "max_tokens"
    wanted = _integer(asked, name, -1)
    if wanted == 0:
        raise ClientError(f"{name} must be at least 1.", param=name)
    if wanted is None or wanted == -1:  # -1: "no limit" to clients that grew up with llama.cpp
        return target.max_tokens
    if target.max_tokens is not None and wanted > target.max_tokens:
        warnings.append("capped(max_tokens)")
        return target.max_tokens
    return wanted


def _think(asked: Payload, target: Model, warnings: list[str]) -> bool | str | None:
    """Ollama's think: what the client asks, else what is configured; None = not sent.

    Without it a thinking model thinks. Sent as true or a level to a model that can't, it is a 400.
    """
    effort = _effort(asked, warnings)
    wanted = target.think if effort is None else effort
    if wanted and target.capabilities is not None and "thinking" not in target.capabilities:
        if effort:
            warnings.append("ignored(reasoning_effort)")
        return None
    if isinstance(effort, str) and not _takes_levels(target):
        warnings.append("clamped(reasoning_effort)")
        return True
    return wanted


def _effort(asked: Payload, warnings: list[str]) -> bool | str | None:
    """reasoning_effort, reasoning.effort or Ollama's own think, as a value of think; None = not asked."""
    reasoning = asked.get("reasoning")
    if not isinstance(reasoning, dict | None):
        raise _wrong("reasoning", "an object")
    named = (("reasoning_effort", asked.get("reasoning_effort")), ("reasoning.effort", (reasoning or {}).get("effort")))
    name, effort = next((pair for pair in named if pair[1] is not None), ("think", asked.get("think")))
    if effort is None or (name == "think" and isinstance(effort, bool)):
        return effort
    if not isinstance(effort, str):
        raise _wrong(name, "a string")
    known = _EFFORTS.get(effort.strip().lower())
    if known is None:
        warnings.append("clamped(reasoning_effort)")
        return "medium"
    return known


def _takes_levels(target: Model) -> bool:
    """Whether think may be a level: gpt-oss, or a model configured with one. To others Ollama before
    0.12 answers 400 to a level, while true always works."""
    return isinstance(target.think, str) or "gpt-oss" in f"{target.model} {target.family}".lower()


def _stop(asked: Payload) -> list[str]:
    stop = asked.get("stop")
    if isinstance(stop, str):
        stop = [stop]
    if stop is None:
        return []
    if not isinstance(stop, list) or not all(isinstance(word, str) for word in stop):
        raise _wrong("stop", "a string or a list of strings")
    return [word for word in stop if word]


def _format(asked: Payload) -> Any:
    """response_format as Ollama's format: "json", a JSON schema, or None."""
    asked_format = asked.get("response_format")
    if asked_format is None:
        return None
    kind = asked_format.get("type") if isinstance(asked_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return "json"
    if kind != "json_schema":
        message = "response_format.type must be 'text', 'json_object' or 'json_schema'."
        raise ClientError(message, param="response_format")
    wrapper = asked_format.get("json_schema")
    schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
    if not isinstance(schema, dict):
        raise _wrong("response_format.json_schema.schema", "an object")
    return schema


# --- Requests: tools ------------------------------------------------------------------------------


def _tools(asked: Payload, target: Model, warnings: list[str]) -> list[Payload]:
    """The tools to offer. Ollama has no tool_choice: "none" offers no tool, a named one offers only that."""
    tools = asked.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise _wrong("tools", "a list")
    for index, tool in enumerate(tools or ()):
        _check_tool(tool, f"tools[{index}]")
    choice = asked.get("tool_choice")
    if not tools or choice == "none":
        return []
    _require(target, "tools", "tools", "tools")
    if any(tool["function"].get("strict") for tool in tools):
        warnings.append("not_enforced(strict)")
    if choice in (None, "auto"):
        return tools
    warnings.append("not_enforced(tool_choice)")
    if choice == "required":
        return tools
    return _named_tool(choice, tools)


def _check_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict):
        raise _wrong(where, "an object")
    if tool.get("type", "function") != "function":
        raise _unsupported("tools", "Ollama knows only tools of the type 'function'.", f"{where}.type")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(f"{where}.function", "an object with a 'name'")


def _named_tool(choice: Any, tools: list[Payload]) -> list[Payload]:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "allowed_tools":
        return tools
    function = choice.get("function") if kind == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        message = "tool_choice must be 'none', 'auto', 'required' or name one of the tools."
        raise ClientError(message, param="tool_choice")
    return named


# --- Requests: messages ---------------------------------------------------------------------------


def _messages(asked: Payload, target: Model, warnings: list[str]) -> list[Payload]:
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        # Ollama would take an empty list as "load the model", or unload it where keep_alive is 0
        raise _wrong("messages", "a list of at least one message")
    names: dict[str, str] = {}  # tool call id -> the tool's name, for the results that follow
    translated = [_message(each, f"messages[{i}]", target, names, warnings) for i, each in enumerate(messages)]
    return _merged(translated) if target.merge_system else translated


def _message(message: Any, where: str, target: Model, names: dict[str, str], warnings: list[str]) -> Payload:
    if not isinstance(message, dict):
        raise _wrong(where, "an object")
    role = message.get("role")
    if role == "function" or message.get("function_call") is not None:
        raise _unsupported("functions", "'function_call' was retired by OpenAI; send 'tool_calls'.", where)
    if not isinstance(role, str) or role not in _ROLES:
        raise ClientError(f"{where}.role must be one of {', '.join(_ROLES)}.", param=f"{where}.role")
    text, images = _content(message.get("content"), f"{where}.content")
    translated: Payload = {"role": _ROLES[role], "content": text}
    if images:
        _require(target, "vision", "vision", f"{where}.content")
        translated["images"] = images
    if role == "assistant":
        _add_assistant(translated, message, where, names, warnings)
    elif role == "tool":
        _add_tool_result(translated, message, where, names)
    return translated


def _add_assistant(into: Payload, message: Payload, where: str, names: dict[str, str], warnings: list[str]) -> None:
    thinking = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thinking, str):  # others (OpenAI's own "reasoning" items) are opaque to any model
        into["thinking"] = thinking
    if not into["content"] and isinstance(message.get("refusal"), str):
        into["content"] = message["refusal"]
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _wrong(f"{where}.tool_calls", "a list")
    if calls:
        into["tool_calls"] = [
            _past_call(call, f"{where}.tool_calls[{index}]", names, warnings) for index, call in enumerate(calls)
        ]


def _past_call(call: Any, where: str, names: dict[str, str], warnings: list[str]) -> Payload:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise _wrong(f"{where}.function", "an object with a 'name'")
    translated: Payload = {"function": {"name": name, "arguments": _arguments(function.get("arguments"), warnings)}}
    if isinstance(call.get("id"), str):
        names[call["id"]] = name
        translated["id"] = call["id"]
    return translated


def _arguments(arguments: Any, warnings: list[str]) -> Payload:
    """A past call's arguments as the object that Ollama wants.

    Models do write broken JSON, and the agent's history then holds it for good: to refuse it would
    end that conversation. It is wrapped instead, so that the model still reads what it wrote.
    """
    if isinstance(arguments, dict):
        return arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        try:
            return wire.loads_object(arguments.encode("utf-8", "surrogatepass"))
        except ClientError:
            pass  # the wrapped form below is the answer to it
    warnings.append("wrapped(tool_calls.arguments)")
    return {"arguments": arguments}


def _add_tool_result(into: Payload, message: Payload, where: str, names: dict[str, str]) -> None:
    call_id = message.get("tool_call_id", "")
    if not isinstance(call_id, str):
        raise _wrong(f"{where}.tool_call_id", "a string")
    if call_id:
        into["tool_call_id"] = call_id
    name = names.get(call_id) or message.get("name")
    if isinstance(name, str):
        into["tool_name"] = name


def _content(content: Any, where: str) -> tuple[str, list[str]]:
    """(text, images as base64). Text parts are joined by a line end, as llama-server and vLLM do."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise _wrong(where, "a string or a list of parts")
    texts, images = [], []
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "refusal"):
            text = part.get(kind)
            if not isinstance(text, str):
                raise _wrong(f"{here}.{kind}", "a string")
            texts.append(text)
        elif kind == "image_url":
            images.append(_image(part.get("image_url"), f"{here}.image_url"))
        elif kind in ("input_audio", "file", "video_url"):
            raise _unsupported(kind, f"Ollama takes text and images only, no part of the type '{kind}'.", here)
        else:
            raise ClientError(f"{here}.type must be 'text' or 'image_url'.", param=f"{here}.type")
    return "\n".join(texts), images


def _image(image: Any, where: str) -> str:
    """The base64 text of a data: URL. Nothing is ever fetched: that would let a client send us anywhere."""
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise _wrong(f"{where}.url", "a string")
    if _REMOTE_URL.match(url):
        raise ClientError(f"{where}: images are not fetched; send a data: URL.", param=where)
    head = _DATA_URL.match(url)
    if head is None:
        raise ClientError(f"{where} must be a data: URL in base64 (data:image/png;base64,...).", param=where)
    data = url[head.end() :]
    try:
        empty = not base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise ClientError(f"{where} holds broken base64.", param=where) from None
    if empty:
        raise ClientError(f"{where} holds an empty image.", param=where)
    return data


def _merged(messages: list[Payload]) -> list[Payload]:
    """All system messages as one first one, for templates that refuse a later or a second one."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *others] if system else others


def _prompt(asked: Payload) -> str:
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and prompt:
        if not all(isinstance(one, str) for one in prompt):
            raise _unsupported("tokens", "Ollama takes the prompt as text, not as tokens.", "prompt")
        if len(prompt) > 1:
            raise _unsupported("prompts", "Ollama takes one prompt a request.", "prompt")
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise _wrong("prompt", "a string")
    if not prompt:  # Ollama would load or unload the model and answer nothing
        raise _unsupported("empty_prompt", "Ollama generates nothing from an empty prompt.", "prompt")
    return prompt


def _input(asked: Payload) -> str | list[str]:
    value = asked.get("input")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _wrong("input", "a string or a list of strings")
    if any(isinstance(one, int | list) for one in value):
        raise _unsupported("tokens", "Ollama takes the input as text, not as tokens.", "input")
    if not all(isinstance(one, str) for one in value):
        raise _wrong("input", "a string or a list of strings")
    return value


# --- Requests: what can't be had ------------------------------------------------------------------


def _require(target: Model, capability: str, detail: str, param: str | None) -> None:
    """Refuse what the target is known to lack; unknown capabilities are left for Ollama to judge."""
    if target.capabilities is not None and capability not in target.capabilities:
        raise _unsupported(detail, f"Model '{target.name}' does not support {detail}.", param)


def _one_answer(asked: Payload) -> None:
    count = _integer(asked, "n", 1)
    if count is not None and count > 1:
        raise _unsupported("n", "Ollama gives one answer a request (n = 1).", "n")


def _unsupported(detail: str, message: str, param: str | None) -> BackendError:
    return BackendError("unsupported", message, detail=detail, param=param)


def _ignored(asked: Payload, body: Payload, known: frozenset[str]) -> list[str]:
    """A warning for each field that would shape the answer and can't be carried over."""
    warnings = []
    for name, value in asked.items():
        ours = name in _RUNNER and body.get(name) is None  # from the configuration
        if not (ours or name in known or name in _SHAPELESS or value in _NEUTRAL.get(name, ())):
            warnings.append(f"ignored({_NO_NAME.sub('_', name)[:64] or '_'})")
    return warnings


def _listed(warnings: list[str]) -> list[str]:
    """Each once, and not more than a header should hold."""
    once = list(dict.fromkeys(warnings))
    if len(once) <= _MAX_WARNINGS:
        return once
    return [*once[: _MAX_WARNINGS - 1], f"ignored({len(once) - _MAX_WARNINGS + 1}_more)"]


# --- Requests: types ------------------------------------------------------------------------------


def _wrong(name: str, needed: str) -> ClientError:
    return ClientError(f"{name} must be {needed}.", param=name)


def _number(asked: Payload, name: str) -> int | float | None:
    value = asked.get(name)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise _wrong(name, "a number")


def _integer(asked: Payload, name: str, least: int | None = None, most: int | None = None) -> int | None:
    """An integer; 3.0 counts, since many clients know only one kind of number, but Ollama wants 3."""
    value = asked.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise _wrong(name, "an integer")
    if least is not None and value < least:
        raise _wrong(name, f"at least {least}")
    if most is not None and value > most:
        raise _wrong(name, f"at most {most}")
    return value


def _boolean(asked: Payload, name: str) -> bool:
    value = asked.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _wrong(name, "true or false")


def _string(asked: Payload, name: str) -> str:
    value = asked.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    raise _wrong(name, "a string")


# --- Answers --------------------------------------------------------------------------------------

_MARK = "\0"  # stands for the text in a rendered chunk; no configured name can hold it
_MARK_JSON = b'"\\u0000"'


def new_call_id() -> str:
    """An id for a tool call that came without one."""
    return "call_" + secrets.token_hex(12)


class ChatStream:
    """Ollama's lines -> OpenAI's answer to one chat or legacy completion.

    `feed` every line; where the client streams it returns the events to send, else `whole` gives
    the document at the end. What never changes in an answer's chunks is rendered once, so a token
    costs one JSON escape and one join. `tally` holds what is known so far; `done` turns true with
    Ollama's last line: a stream that ends before it was cut off.

    call: the request. target: the model that serves, whose logical name stands in the answer.
    prompt_chars: as prompt_chars() counts them; 0 = unknown. new_id: ids for tool calls without one.
    """

    def __init__(
        self, call: Call, target: Model, prompt_chars: int = 0, new_id: Callable[[], str] = new_call_id
    ) -> None:
        self.tally = Tally()
        self.done = False
        self._call = call
        self._target = target
        self._prompt_chars = prompt_chars
        self._new_id = new_id
        self._chat = call.endpoint == "chat"
        self._base = {
            "id": call.id,
            "object": ("chat.completion" if self._chat else "text_completion"),
            "created": call.created,
            "model": target.name,
        }
        self._begun = not self._chat  # the role was sent; legacy completions have none
        self._call_ids: set[str] = set()
        self._logprobs: list[Payload] = []  # of tokens whose text is still to come
        self._offset = 0  # characters before the next token, for legacy text_offset
        # for `whole`
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[Payload] = []
        self._all_logprobs: list[Payload] = []
        if call.stream:
            self._base["object"] += ".chunk" if self._chat else ""
            self._text_parts = self._event(self._text_choice(_MARK)).split(_MARK_JSON)
            self._reasoning_parts = self._event(self._reasoning_choice(_MARK)).split(_MARK_JSON)

    def feed(self, line: Payload) -> tuple[bytes, bool]:
        """(events to send, whether this line held content: text, reasoning or a tool call).

        Events are b"" where the client does not stream. The role is held until content or the end.
        Raises BackendError: an {"error"} line as failures.in_stream reads it, `bad_answer` for
        another shape, `empty_answer` for a chat answer that ended without any content.
        """
        if "error" in line:
            raise failures.in_stream(line["error"], model=self._target.model, backend=self._target.backend)
        source = line.get("message", {}) if self._chat else line
        if not isinstance(source, dict):
            raise _bad_answer("'message' is not an object")
        text = source.get("content" if self._chat else "response") or ""
        reasoning = source.get("thinking") or ""
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise _bad_answer("text is not a string")
        calls = source.get("tool_calls")
        if "logprobs" in line and not reasoning:  # OpenAI gives them for the content alone
            self._logprobs += _logprobs(line["logprobs"])
        content = bool(text or reasoning or calls)
        frames = self._begin() if content and not self._begun else b""
        if reasoning:
            frames += self._add_reasoning(reasoning)
        if text:
            frames += self._add_text(text)
        if calls:
            frames += self._add_calls(calls)
        if line.get("done"):
            frames += self._end(line)
        return frames, content

    def whole(self) -> Payload:
        """The chat.completion or text_completion object of what was fed."""
        text: str | None = "".join(self._text)
        reasoning = "".join(self._reasoning)
        finish = self.tally.finish_reason
        extra = {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}
        choice: Payload
        if self._chat:
            message = {"role": "assistant", "content": text, **extra}
            if self._tool_calls:
                message |= {"content": text or None, "tool_calls": self._tool_calls}
            choice = {"index": 0, "message": message}
        else:
            choice = {"index": 0, "text": text, **extra}
        choice |= {"logprobs": self._shaped(self._all_logprobs), "finish_reason": finish}
        usage = self._usage()
        return {**self._base, "choices": [choice], **({"usage": usage} if usage else {})}

    # the kinds of content

    def _begin(self) -> bytes:
        """The role, in a chunk of its own as OpenAI sends it."""
        self._begun = True
        if not self._call.stream:
            return b""
        return self._event({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def _add_text(self, text: str) -> bytes:
        self.tally.content_chars += len(text)
        if not self._call.stream:
            self._text.append(text)
            self._all_logprobs += self._logprobs
            self._logprobs = []
            return b""
        if self._logprobs:
            return self._event(self._text_choice(text, self._take_logprobs()))
        return _quoted(text).join(self._text_parts)

    def _add_reasoning(self, text: str) -> bytes:
        self.tally.reasoning_chars += len(text)
        if self._call.stream:
            return _quoted(text).join(self._reasoning_parts)
        self._reasoning.append(text)
        return b""

    def _add_calls(self, calls: Any) -> bytes:
        """Each call whole and with its own running index; Ollama counts from 0 on every line."""
        if not isinstance(calls, list):
            raise _bad_answer("'tool_calls' is not a list")
        frames = b""
        for call in calls:
            tool_call = self._tool_call(call)
            if self._call.stream:
                delta = {"tool_calls": [{"index": self.tally.tool_calls, **tool_call}]}
                frames += self._event({"index": 0, "delta": delta, "finish_reason": None})
            else:
                self._tool_calls.append(tool_call)
            self.tally.tool_calls += 1
        return frames

    def _tool_call(self, call: Any) -> Payload:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _bad_answer("a tool call without a name")
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = wire.dumps({} if arguments is None else arguments).decode("utf-8")
        call_id = call.get("id")
        if not isinstance(call_id, str) or not call_id or call_id in self._call_ids:
            call_id = self._new_id()
        self._call_ids.add(call_id)
        return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}

    # the end

    def _end(self, line: Payload) -> bytes:
        """Counts, finish reason, usage, [DONE]."""
        reason = line.get("done_reason")
        if reason in ("load", "unload"):  # it took the request for one to move the model, and answered nothing
            raise _bad_answer(f"the model was only told to {reason}")
        self._count(line)
        tally = self.tally
        if reason == "length":
            tally.finish_reason = "length"
        else:
            tally.finish_reason = "tool_calls" if tally.tool_calls else "stop"
        if self._chat and tally.finish_reason == "stop" and not self._begun:
            raise BackendError("empty_answer", f"Model '{self._target.name}' ended its answer without a word.")
        self.done = True
        if not self._call.stream:
            self._all_logprobs += self._logprobs
            return b""
        frames = b"" if self._begun else self._begin()
        frames += self._event(self._last_choice(tally.finish_reason))
        if self._call.include_usage and (usage := self._usage()):
            frames += wire.sse(wire.dumps({**self._base, "choices": [], "usage": usage}))
        return frames + wire.DONE

    def _count(self, line: Payload) -> None:
        """What the last line counts. Ollama omits zeros, so an absent eval_count is 0 if nothing was
        said, but an absent prompt_eval_count is unknown: no prompt has no tokens."""
        tally = self.tally
        tally.prompt_tokens = _count(line.get("prompt_eval_count"))
        tally.completion_tokens = _count(line.get("eval_count"))
        said = tally.content_chars or tally.reasoning_chars or tally.tool_calls
        if tally.completion_tokens is None and tally.prompt_tokens is not None and not said:
            tally.completion_tokens = 0
        tally.load_s = _seconds(line.get("load_duration"))
        tally.decode_s = _seconds(line.get("eval_duration"))
        tally.truncated = self._was_truncated()

    def _was_truncated(self) -> bool:
        """Whether the server chopped the prompt in spite of truncate: false, as some runners do.

        A token of real text is about 4 characters and hardly ever 8 on average, so a prompt of more
        than 8 * num_ctx characters can't have fitted; if no more than num_ctx tokens were counted
        for it, some of it was not read. It finds only the clear cases and, of ordinary text, no false ones.
        """
        window, counted = self._target.num_ctx, self.tally.prompt_tokens
        if window is None or counted is None:
            return False
        return self._prompt_chars / 8 > window >= counted

    def _usage(self) -> dict[str, int] | None:
        """OpenAI's usage, or None where a count is not known: a zero there would be believed."""
        prompt, completion = self.tally.prompt_tokens, self.tally.completion_tokens
        if prompt is None or completion is None:
            return None
        return Usage(prompt, completion).to_json()

    # the shapes

    def _event(self, choice: Payload) -> bytes:
        """One chunk as an event. With include_usage each but the last carries "usage": null, as OpenAI's do."""
        usage = {"usage": None} if self._call.include_usage else {}
        return wire.sse(wire.dumps({**self._base, "choices": [choice], **usage}))

    def _text_choice(self, text: str, logprobs: Payload | None = None) -> Payload:
        if not self._chat:
            return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}
        with_logprobs = {"logprobs": logprobs} if logprobs else {}
        return {"index": 0, "delta": {"content": text}, **with_logprobs, "finish_reason": None}

    def _reasoning_choice(self, text: str) -> Payload:
        """Both names that clients read: reasoning_content (llama.cpp, DeepSeek) and reasoning (vLLM, Ollama)."""
        reasoning = {"reasoning_content": text, "reasoning": text}
        if self._chat:
            return {"index": 0, "delta": reasoning, "finish_reason": None}
        return {"index": 0, "text": "", **reasoning, "logprobs": None, "finish_reason": None}

    def _last_choice(self, finish_reason: str) -> Payload:
        choice = self._text_choice("", self._take_logprobs())
        if self._chat:
            choice["delta"] = {}
        choice["finish_reason"] = finish_reason
        return choice

    def _take_logprobs(self) -> Payload | None:
        entries, self._logprobs = self._logprobs, []
        return self._shaped(entries)

    def _shaped(self, entries: list[Payload]) -> Payload | None:
        """Ollama's log probabilities in OpenAI's chat or legacy shape; None without any."""
        if not entries:
            return None
        if self._chat:
            return {"content": [_chat_logprob(entry) for entry in entries], "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in _logprobs(entry.get("top_logprobs"))} for entry in entries
            ],
            "text_offset": offsets,
        }


def _quoted(text: str) -> bytes:
    """`text` as JSON. A lone surrogate has no UTF-8 form, so such text is escaped whole."""
    try:
        return encode_basestring(text).encode("utf-8")
    except UnicodeEncodeError:
        return encode_basestring_ascii(text).encode("ascii")


def _logprobs(entries: Any) -> list[Payload]:
    """The well-formed ones of Ollama's {token, logprob, bytes, top_logprobs}."""
    if not isinstance(entries, list):
        return []
    return [
        entry
        for entry in entries
        if isinstance(entry, dict)
        and isinstance(entry.get("token"), str)
        and isinstance(entry.get("logprob"), int | float)
    ]


def _chat_logprob(entry: Payload) -> Payload:
    tops = [_token_logprob(top) for top in _logprobs(entry.get("top_logprobs"))]
    return {**_token_logprob(entry), "top_logprobs": tops}


def _token_logprob(entry: Payload) -> Payload:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry.get("bytes")}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _seconds(nanoseconds: Any) -> float | None:
    count = _count(nanoseconds)
    return None if count is None else count / 1e9


def _bad_answer(problem: str) -> BackendError:
    return BackendError("bad_answer", f"Ollama's answer has an unknown shape: {problem}.")


def embed_response(answer: Payload, name: str, encoding_format: str | None, count: int | None = None) -> Payload:
    """OpenAI's embeddings list from /api/embed's answer, under the logical name that served.

    encoding_format: "base64" = float32, little-endian, in base64 (what the SDKs ask for by default);
    else floats. count: how many inputs were sent. Raises BackendError("bad_answer") if the vectors are not
    as many, so that none is stored under another's text.
    """
    if "error" in answer:
        raise _bad_answer(f"error: {answer['error']}")
    vectors = answer.get("embeddings")
    if not isinstance(vectors, list) or not all(isinstance(vector, list) for vector in vectors):
        raise _bad_answer("'embeddings' is not a list of vectors")
    if count is not None and len(vectors) != count:
        raise _bad_answer(f"{len(vectors)} vectors for {count} inputs")
    encode = _float32_base64 if encoding_format == "base64" else list
    data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
    response: Payload = {"object": "list", "data": data, "model": name}
    if (tokens := _count(answer.get("prompt_eval_count"))) is not None:
        response["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return response


def _float32_base64(vector: list[Any]) -> str:
    try:
        floats = array("f", vector)
    except TypeError:
        raise _bad_answer("a vector holds something that is no number") from None
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode("ascii")
