"""From a request's body to a Call, or to one clear 400 that names the field and the way out. Pure."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from portway.call import Call, Endpoint
from portway.errors import ClientError
from portway.routing import parts
from portway.wire import loads_object

if TYPE_CHECKING:
    from portway.config import Config, Model

_ID_PREFIX = {"chat": "chatcmpl-", "completions": "cmpl-", "embeddings": "embd-"}


def read_call(endpoint: Endpoint, raw: bytes, config: Config) -> Call:
    """The Call that `raw` asks for. Raises ClientError."""
    body = loads_object(raw)
    model = find_model(body.get("model"), config)
    stream = _flag(body, "stream") and endpoint != "embeddings"
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ClientError("stream_options must be an object.", param="stream_options")
    if b'"image_url"' in raw:
        _refuse_remote_images(body)
    return Call(
        endpoint=endpoint,
        body=body,
        raw=raw,
        model=model,
        stream=stream,
        include_usage=stream and options is not None and _flag(options, "include_usage"),
        id=_ID_PREFIX[endpoint] + os.urandom(12).hex(),
        created=int(time.time()),
    )


def find_model(name: object, config: Config) -> Model:
    """The logical model of that name or alias. Raises ClientError: 400 without a name, 404 for an unknown one."""
    if not isinstance(name, str) or not name:
        raise ClientError(f"model must name one of: {', '.join(config.models)}.", param="model")
    model = config.resolve(name)
    if model is None:
        near = config.near(name)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(config.models)}."
        raise ClientError(
            f"The model {name[:128]!r} does not exist. {hint}", status=404, code="model_not_found", param="model"
        )
    return model


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise ClientError(f"{key} must be true or false.", param=key)
    return bool(value)


def _refuse_remote_images(body: dict[str, Any]) -> None:
    """Some servers fetch such addresses themselves, from inside this network (unslothai/unsloth#11160)."""
    for part in parts(body):
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str) and not url.startswith("data:"):
            raise ClientError(
                "Images by address are not fetched; send the image itself as a data: URL.",
                param="messages",
                code="remote_image",
            )
