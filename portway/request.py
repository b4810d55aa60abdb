"""From a request's body to a Call, or to one clear 400 that names the field and the way out. Pure.

Only what Portway itself depends on is checked; everything else is the backend's to judge.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from random import getrandbits
from typing import TYPE_CHECKING, Any

from portway.call import Call, Endpoint
from portway.errors import ClientError
from portway.wire.asked import boolean, wrong
from portway.wire.events import loads_object

if TYPE_CHECKING:
    from portway.config import Config, Model
    from portway.keys import Key

_ID_PREFIX: Mapping[str, str] = {"chat": "chatcmpl-", "completions": "cmpl-", "embeddings": "embd-"}
_PROMPT = ("messages", "input", "prompt")  # where content stands that some servers fetch by its address


def read_call(endpoint: Endpoint, raw: bytes, config: Config, key: Key | None = None) -> Call:
    """The Call that `raw` asks for, with the client's key. Raises ClientError."""
    body = loads_object(raw)
    model = find_model(body.get("model"), config, key)
    stream = boolean(body, "stream") and endpoint != "embeddings"
    include_usage = "stream_options" in body and _include_usage(body["stream_options"])
    if endpoint == "chat":
        _check_messages(body.get("messages"))
    if b'url"' in raw or (b"\\" in raw and b"\\u" in raw):  # a key may be written with escapes
        _refuse_addresses(body)
    return Call(
        endpoint=endpoint,
        body=body,
        raw=raw,
        model=model,
        stream=stream,
        include_usage=stream and include_usage,
        id=f"{_ID_PREFIX[endpoint]}{getrandbits(96):024x}",  # no secret; urandom() is a system call
        created=int(time.time()),
    )


def find_model(name: object, config: Config, key: Key | None = None) -> Model:
    """The logical model of that name or alias. Raises ClientError: 400 without a name, 404 for an unknown one,
    403 for one that is not for this key, which is told of its own models alone."""
    names = key.models if key is not None and key.models else tuple(config.models)
    if not isinstance(name, str) or not name:
        raise ClientError(f"model must name one of: {', '.join(names)}.", param="model")
    model = config.resolve(name)
    if model is None:
        near = [other for other in config.near(name) if config.names[other] in names]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names)}."
        raise ClientError(
            f"The model {name[:128]!r} does not exist. {hint}", status=404, code="model_not_found", param="model"
        )
    if key is not None:
        key.check_model(model.name)
    return model


def has_images(body: Mapping[str, Any]) -> bool:
    """Whether any message carries an image."""
    return any(part.get("type") == "image_url" for part in _parts(body))


def prompt_chars(body: Mapping[str, Any]) -> int:
    """Characters of text in the prompt: messages' texts, or `prompt` and `suffix`. Images do not count."""
    texts = [body.get("prompt"), body.get("suffix")]
    texts += [message.get("content") for message in _messages(body)]
    texts += [part.get("text") for part in _parts(body)]
    return sum(len(text) for text in texts if isinstance(text, str))


def _include_usage(options: Any) -> bool:
    if not isinstance(options, dict | None):
        raise wrong("stream_options", "an object")
    include = (options or {}).get("include_usage")
    if not isinstance(include, bool | None):
        raise wrong("stream_options.include_usage", "true or false")
    return bool(include)


def _check_messages(messages: Any) -> None:
    """llama-server answers 500 to what fails here, as if it were at fault: that would cost a target its good name."""
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise wrong(f"messages[{index}]", "an object")
        if not isinstance(message.get("role"), str):
            raise wrong(f"messages[{index}].role", "a string")


def _refuse_addresses(body: Mapping[str, Any]) -> None:
    """Some servers would fetch such an address, from inside this network (unslothai/unsloth#11160), or read
    such a file. Looked for are the members `url` and `.._url` of all content, however deep, but for the sources
    that an earlier answer cites."""
    rest = [item for key in _PROMPT for item in _content(body.get(key))]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += value
        elif isinstance(value, dict):
            rest += [item for key, item in value.items() if key != "annotations"]
            for key, item in value.items():
                if (key == "url" or key.endswith("_url")) and isinstance(item, str) and item[:5].lower() != "data:":
                    raise ClientError(
                        "Images are not fetched from an address; send the image itself as a data: URL.",
                        param="messages",
                        code="remote_image",
                    )


def _content(value: Any) -> list[Any]:
    """What a message or an input holds, apart from what the model itself has said and done."""
    items = value if isinstance(value, list) else [value]
    return [item["content"] if isinstance(item, dict) and "content" in item else item for item in items]


def _parts(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The content parts of all messages, whatever else stands there."""
    for message in _messages(body):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                yield part


def _messages(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            yield message
