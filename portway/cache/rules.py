"""What the cache may do with a request: look it up or not, under which key, and keep the answer or not.

Pure functions of a Call and the client's Cache-Control. Where answers lie is store.py's, what they
look like replay.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from portway.wire.digest import LONG, digest, is_plain_chat

if TYPE_CHECKING:
    from portway.call import Call, Served
    from portway.config import Model

KEY_VERSION = "portway-4"  # a change of what the key covers, or of what Portway makes of a request, raises it
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
    return _key(_seed(target), call)


class Keys:
    """request_key for the models of one configuration: what of a key is the model's own is made once."""

    def __init__(self) -> None:
        self._seeds: dict[str, tuple[Model, bytes]] = {}

    def of(self, call: Call, target: Model) -> bytes:
        """request_key(call, target)."""
        known = self._seeds.get(target.name)
        if known is None or known[0] is not target:
            known = self._seeds[target.name] = (target, _seed(target))
        return _key(known[1], call)


def _seed(target: Model) -> bytes:
    backend = target.backend
    serving = (backend.name, backend.kind, backend.url, target.model)
    injected = (target.num_ctx, target.think, target.params, target.max_tokens, target.merge_system)
    # default=dict: params may be a read-only mapping
    return json.dumps((KEY_VERSION, target.name, serving, injected), sort_keys=True, default=dict).encode()


def _key(seed: bytes, call: Call) -> bytes:
    """Of a 2 KB body in 4 us, where to hash json.dumps(sort_keys=True) of it takes 6; of 200 KB in 180 us instead of
    565, of which the hash is 170."""
    body = call.body
    parts: list[str] = [call.endpoint]
    for name in sorted(body):
        if name not in SHAPELESS:
            parts.append(f'"{len(name)}:{name}')
            value = body[name]
            if name != "messages" or not _spell_chat(value, parts):
                _spell(value, parts)
    return digest(parts, seed)


def _spell_chat(messages: Any, parts: list[str]) -> bool:
    """Messages of a role and a text each, as in most chats: the lengths of all texts and then the texts, with no
    function for each of them. False if they are something else."""
    if not is_plain_chat(messages):
        return False
    texts = list(chain.from_iterable(map(_ROLE_AND_CONTENT, messages)))
    if not _STR.issuperset(map(type, texts)):
        return False
    parts.append(f"m{','.join(map(str, map(len, texts)))}:")
    parts += texts
    return True


_STR = {str}
_ROLE_AND_CONTENT = itemgetter("role", "content")


def _spell(value: Any, parts: list[str]) -> None:
    """Add texts that join to nothing but this JSON value: members in order of their names, each text behind its
    length, so that none has to be searched for what would need escaping."""
    kind = type(value)
    if kind is str:
        if len(value) > LONG:
            parts += (f'"{len(value)}:', value)
        else:
            parts.append(f'"{len(value)}:{value}')
    elif kind is list:
        parts.append(f"[{len(value)}")
        for item in value:
            _spell(item, parts)
    elif kind is dict:
        parts.append(f"{{{len(value)}")
        for name in sorted(value):
            parts.append(f'"{len(name)}:{name}')
            _spell(value[name], parts)
    else:
        parts.append(f"={value!r},")


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
