"""OpenAI's messages -> Ollama's. Pure; the rest of a request is translate.py's."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Any

from portway.errors import ClientError
from portway.wire import events as wire
from portway.wire.asked import Payload, require, unsupported, wrong

if TYPE_CHECKING:
    from portway.config import Model

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_REMOTE_URL = re.compile(r"(https?|file|ftp|blob):", re.IGNORECASE)


def messages_for_ollama(asked: Payload, target: Model, warnings: list[str]) -> list[Payload]:
    """The body's messages as /api/chat wants them: text in one string, images beside it as base64,
    arguments as objects, tool results with the tool's name.

    Adds to `warnings` what had to be changed. Raises ClientError for a malformed message, named in
    `param` as messages[2].content[1].image_url, and BackendError("unsupported").
    """
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        # Ollama would take an empty list as "load the model", or unload it where keep_alive is 0
        raise wrong("messages", "a list of at least one message")
    names: dict[str, str] = {}  # tool call id -> the tool's name, for the results that follow
    translated = [_message(each, f"messages[{i}]", target, names, warnings) for i, each in enumerate(messages)]
    return _merged(translated) if target.merge_system else translated


def _message(message: Any, where: str, target: Model, names: dict[str, str], warnings: list[str]) -> Payload:
    if not isinstance(message, dict):
        raise wrong(where, "an object")
    role = message.get("role")
    if role == "function" or message.get("function_call") is not None:
        raise unsupported("functions", "'function_call' was retired by OpenAI; send 'tool_calls'.", where)
    if not isinstance(role, str) or role not in _ROLES:
        raise ClientError(f"{where}.role must be one of {', '.join(_ROLES)}.", param=f"{where}.role")
    text, images = _content(message.get("content"), f"{where}.content")
    translated: Payload = {"role": _ROLES[role], "content": text}
    if images:
        require(target, "vision", "vision", f"{where}.content")
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
        raise wrong(f"{where}.tool_calls", "a list")
    if calls:
        into["tool_calls"] = [
            _past_call(call, f"{where}.tool_calls[{index}]", names, warnings) for index, call in enumerate(calls)
        ]


def _past_call(call: Any, where: str, names: dict[str, str], warnings: list[str]) -> Payload:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise wrong(f"{where}.function", "an object with a 'name'")
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
    call_id = message.get("tool_call_id") or ""
    if not isinstance(call_id, str):
        raise wrong(f"{where}.tool_call_id", "a string")
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
        raise wrong(where, "a string or a list of parts")
    texts, images = [], []
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "refusal"):
            text = part.get(kind)
            if not isinstance(text, str):
                raise wrong(f"{here}.{kind}", "a string")
            texts.append(text)
        elif kind == "image_url":
            images.append(_image(part.get("image_url"), f"{here}.image_url"))
        elif kind in ("input_audio", "file", "video_url"):
            raise unsupported(kind, f"Ollama takes text and images only, no part of the type '{kind}'.", here)
        else:
            raise ClientError(f"{here}.type must be 'text' or 'image_url'.", param=f"{here}.type")
    return "\n".join(texts), images


def _image(image: Any, where: str) -> str:
    """The base64 text of a data: URL. Nothing is ever fetched: that would let a client send us anywhere."""
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise wrong(f"{where}.url", "a string")
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
