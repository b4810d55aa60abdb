"""What the cache may do with a request: look it up or not, under which key, and keep the answer or not.

Pure functions of a Call and the client's Cache-Control. Where answers lie is store.py's, what they
look like replay.py's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portway.call import Call, Served
    from portway.config import Model

KEY_VERSION = "portway-1"  # a change of what the key covers, or of what Portway makes of a request, raises it
SHAPELESS = frozenset(("model", "stream", "stream_options", "user", "metadata"))  # no part in what is answered
_ACTING = ("tools", "functions", "web_search_options")  # the answer depends on, or changes, the world outside


# --- what the client wants of the cache -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Control:
    """A request's Cache-Control (RFC 9111, section 5.2.1). max_age: seconds; None = any age will do."""

    no_cache: bool = False  # ask the model, keep the answer
    no_store: bool = False  # keep nothing of this request
    only_if_cached: bool = False  # a stored answer or 504
    max_age: float | None = None


_NOTHING_SAID = Control()


def parse_control(headers: Mapping[str, str]) -> Control:
    """The Control of a request. headers: by lower-case name. Unknown directives are ignored.

    `max-age=0` is `no_cache`, and so is a max-age that can't be read: the client wanted freshness.
    """
    header = headers.get("cache-control")
    if not header:
        return _NOTHING_SAID
    said = [_directive(part) for part in header.split(",")]
    names = {name for name, _ in said}
    ages = [_delta_seconds(value) for name, value in said if name == "max-age"]
    max_age = min(ages) if ages else None
    return Control("no-cache" in names or max_age == 0, "no-store" in names, "only-if-cached" in names, max_age)


def _directive(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    return name.strip().lower(), value.strip().strip('"')


def _delta_seconds(text: str) -> float:
    if not (text.isascii() and text.isdigit()):
        return 0.0
    return float(text[:12])  # RFC 9111, section 1.2.2: more than 2**31 means "for ever"


# --- whether to look, and where -------------------------------------------------------------------


def why_bypassed(call: Call, lifetime: float) -> str:
    """Why the cache has no part in `call`, in a word or two; "" if it has.

    lifetime: seconds for which the model's answers are kept, 0 = its cache is off.
    """
    if lifetime <= 0:
        return "off"
    body = call.body
    for name in _ACTING:
        if body.get(name):
            return name
    if body.get("n") not in (None, 1):
        return "n"
    return ""


def request_key(call: Call, target: Model) -> bytes:
    """32 bytes that are equal for two requests only if `target` would be asked the very same.

    The whole body counts, but for the short list of what shapes no answer: a parameter that nobody
    here knows yet can't be forgotten. Of the configuration, whatever is added to a request counts.
    """
    backend = target.backend
    serving = (backend.name, backend.kind, backend.url, target.model)
    injected = (target.num_ctx, target.think, target.params, target.max_tokens, target.merge_system)
    asked = {key: value for key, value in call.body.items() if key not in SHAPELESS}
    whole = (KEY_VERSION, call.endpoint, target.name, serving, injected, asked)
    # default=dict: params may be a read-only mapping
    return hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":"), default=dict).encode()).digest()


# --- whether to keep ------------------------------------------------------------------------------


def is_storable(call: Call, served: Served) -> bool:
    """Whether an answer that came to its end may be kept: by the model that was asked for, of the whole prompt.

    The first, cheap half of the rule; the other is what the answer says, replay.is_clean().
    """
    tally = served.answer.tally
    return (
        served.model.name == call.model.name
        and tally.finish_reason in ("stop", None)  # None: embeddings have none
        and not tally.tool_calls
        and not tally.truncated
    )
