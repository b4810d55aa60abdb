"""llama-swap's words, and what they mean: what it has, what runs, how big that is, who uses it. Pure.

    GET /v1/models    its models, aliases, selectors and peers, each entry with its kind in meta.llamaswap
    GET /running      what runs, and by which command
    GET /api/events   server-sent events; among the first ones the requests that it works on

Read in its source and seen on the wire (0bdb372, August 2026); releases before that say less, and a field that is
missing means only that.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from portway.wire.events import WireError, loads

OWNER = "llama-swap"  # owned_by of each of its models
THERE = ("ready", "starting", "stopping")  # states in which a model takes memory
ELSEWHERE = ("peer", "selector", "profile")  # kinds of an entry that is never loaded here under its own name


class Entry(NamedTuple):
    """One name that it answers to. real: what /running calls it. elsewhere: nothing is loaded under that name."""

    name: str
    real: str
    elsewhere: bool = False


class Command(NamedTuple):
    """What a server's command line says of its model. weights: bytes; window: tokens."""

    weights: int | None = None
    window: int | None = None


def is_swap(listed: Iterable[Mapping[str, Any]]) -> bool:
    """Whether such a list is llama-swap's. The newer ones tell each model's status like llama-server's router."""
    return any(entry.get("owned_by") == OWNER for entry in listed)


def names(listed: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """Every name in its list, the aliases that it only mentions included."""
    found = []
    for each in listed:
        name, own = str(each.get("id")), _own(each)
        real = str(own["modelID"]) if own.get("type") == "alias" and own.get("modelID") else name
        elsewhere = own.get("type") in ELSEWHERE
        found += [Entry(str(known), real, elsewhere) for known in (name, *aliases_of(each))]
    return found


def aliases_of(entry: Mapping[str, Any]) -> Sequence[Any]:
    """What else an entry of its list answers to."""
    aliases = _own(entry).get("aliases")
    return aliases if isinstance(aliases, list) else []


def _own(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = entry.get("meta")
    own = meta.get("llamaswap") if isinstance(meta, dict) else None
    return own if isinstance(own, dict) else {}


def requests_for(model: str, data: bytes) -> bool | None:
    """Whether an event of /api/events says that somebody uses a model; None if it says nothing about that."""
    try:
        event = loads(data)
        snapshot = loads(event["data"].encode()) if event.get("type") == "inflight" else None
    except (WireError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(snapshot, dict) or snapshot.get("operation") != "snapshot":
        return None
    requests = snapshot.get("requests")
    return any(isinstance(each, dict) and each.get("model") == model for each in requests or ())


# --- how a server was started ---------------------------------------------------------------------


def read_command(command: Any) -> Command:
    """Of llama-server's command line, as text or as a list; all unknown of another program's. The model's file is
    on this machine if the server is."""
    words = command if isinstance(command, list) else _words(command)
    path, window = _option(words, "--model", "-m"), _option(words, "--ctx-size", "-c")
    tokens = int(window) if window and window.isascii() and window.isdigit() and len(window) < 10 else 0
    return Command(file_size(path) if path else None, tokens or None)  # 0 is "what the model was trained for"


def _words(command: Any) -> list[str]:
    try:
        return shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []


def _option(words: Sequence[Any], *names: str) -> str | None:
    """The last value of an option, as the last one counts."""
    found = None
    for word, value in zip(words, [*words[1:], None], strict=False):
        name, equals, glued = str(word).partition("=")
        if name in names and (equals or value is not None):
            found = glued if equals else str(value)
    return found


def file_size(path: str) -> int | None:
    """Of a model's file, or of all its parts: NAME-00001-of-00003.gguf is the first of three."""
    part = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path)
    paths = [path] if part is None else [f"{part[1]}-{n:05}-of-{part[2]}.gguf" for n in range(1, int(part[2]) + 1)]
    try:
        return sum(map(os.path.getsize, paths)) or None
    except (OSError, ValueError):
        return None
