"""`portway cache`: what the answers cache holds, how often it helps, emptying it, turning it off.

Works on the cache's file, whether a daemon runs or not; a daemon notices within seconds.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from portway.cache import file as cache_file
from portway.cache.file import CacheFile, Counts, Stats, Unusable
from portway.cache.store import OFF_SUFFIX

OK = 0
FAILED = 1
USAGE = 2

HELP = """\
usage: portway cache [--json] [--config FILE]
       portway cache purge [--model NAME] [--older-than AGE]
       portway cache off | on

Without a word more: how many answers are stored, how much room they take, how
often they were wanted, and how old the oldest one is.

  purge  delete all stored answers, or those of one model, or old ones; then
         nothing of them can be read in the file any more
  off    look nothing up and store nothing until `portway cache on`; what is
         stored stays. A running Portway follows within half a minute

Options:
  --json            print one JSON document instead
  --model NAME      only this logical model's answers
  --older-than AGE  only those stored longer ago: 90s, 45m, 12h, 7d, 2w
  --config FILE     the configuration that says where the cache is

For one model alone the configuration says it: cache = "off" under
[models.NAME]. For one request the client does: Cache-Control: no-cache asks
the model anew, no-store keeps nothing, only-if-cached asks no model at all.
"""

_PATIENCE = 5.0  # seconds to wait for a running daemon's transaction; those take milliseconds
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


class _UsageError(Exception):
    """The command line can't be understood. str() says why, in one line."""


def main(words: Sequence[str], path: str) -> int:
    """Run `portway cache WORDS...` on the cache's file at `path`. Returns the exit code."""
    try:
        return _run(list(words), os.path.abspath(path))
    except _UsageError as exc:
        print(f"portway cache: {exc}; see `portway cache --help`", file=sys.stderr)
        return USAGE
    except (sqlite3.Error, OSError, Unusable) as exc:
        print(f"portway cache: {path} {cache_file.describe(exc)}", file=sys.stderr)
        return FAILED


def _run(words: list[str], path: str) -> int:
    if "--help" in words or "-h" in words:
        print(HELP, end="")
        return OK
    match words:
        case []:
            return _show(path)
        case ["--json"]:
            return _show_json(path)
        case ["purge", *options]:
            return _purge(path, *_purge_options(options))
        case ["off"]:
            return _turn_off(path)
        case ["on"]:
            return _turn_on(path)
        case [word, *_] if word in ("off", "on"):
            raise _UsageError(f"{word} takes nothing more; for one model, set cache in [models.NAME]")
        case [word, *_]:
            raise _UsageError(f"unknown word {word!r}")
    raise AssertionError("not reached")


# --- the commands ---------------------------------------------------------------------------------


def _show(path: str) -> int:
    if os.path.exists(path + OFF_SUFFIX):
        print("The cache is turned off; `portway cache on` turns it on.")
    if not os.path.exists(path):
        print(f"{path}: nothing stored yet")
        return OK
    with closing(CacheFile(path, _PATIENCE)) as file:
        stats = file.stats()
    for line in _report(path, stats):
        print(line)
    return OK


def _show_json(path: str) -> int:
    """Sizes are bytes, `oldest` a Unix time; null = nothing to go by."""
    stats = Stats({}, 0, None)
    if os.path.exists(path):
        with closing(CacheFile(path, _PATIENCE)) as file:
            stats = file.stats()
    models = {
        name: {"entries": model.entries, "size": model.size, **_counted(model.counts)}
        for name, model in stats.models.items()
    }
    total = {"entries": stats.entries, "size": stats.size, "oldest": stats.oldest, **_counted(stats.counts)}
    is_off = os.path.exists(path + OFF_SUFFIX)
    print(json.dumps({"file": path, "off": is_off, "total": total, "models": models}, indent=2))
    return OK


def _counted(counts: Counts) -> dict[str, Any]:
    rate = counts.hit_rate
    return {**asdict(counts), "hit_rate": None if rate is None else round(rate, 6)}


def _report(path: str, stats: Stats) -> Iterator[str]:
    oldest = "" if stats.oldest is None else f", the oldest {_ago(time.time() - stats.oldest)} old"
    entries = f"{stats.entries:,} {'entry' if stats.entries == 1 else 'entries'}"
    yield f"{path}: {entries}, {_bytes(stats.size)} on disk{oldest}"
    counts = stats.counts
    yield f"hit rate {_percent(counts.hit_rate)}: {counts.hits:,} of {counts.hits + counts.misses:,} look-ups"
    yield f"{counts.stores:,} stored in all, {counts.evictions:,} made room for newer ones"
    for aside in cache_file.aside(path):
        yield f"kept because it was corrupt: {aside}"
    if stats.models:
        width = max(len("model"), *map(len, stats.models))
        yield ""
        yield f"{'model':{width}}  {'entries':>9}  {'size':>9}  {'hits':>9}  {'misses':>9}  hit rate"
        for name, model in stats.models.items():
            looked_up = f"{model.counts.hits:>9,}  {model.counts.misses:>9,}  {_percent(model.counts.hit_rate):>8}"
            yield f"{name:{width}}  {model.entries:>9,}  {_bytes(model.size):>9}  {looked_up}"


def _purge(path: str, model: str | None, older_than: float | None) -> int:
    removed = 0
    if os.path.exists(path):
        with closing(CacheFile(path, _PATIENCE)) as file:
            removed = file.purge(model, None if older_than is None else time.time() - older_than)
    print(f"{removed:,} {'entry' if removed == 1 else 'entries'} deleted")
    if model is None and older_than is None:
        for aside in cache_file.aside(path):  # copies of answers, too
            os.unlink(aside)
            print(f"{aside} deleted")
    return OK


def _turn_off(path: str) -> int:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    os.close(os.open(path + OFF_SUFFIX, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    print("The cache is off. What is stored stays; `portway cache purge` deletes it.")
    return OK


def _turn_on(path: str) -> int:
    try:
        os.unlink(path + OFF_SUFFIX)
    except FileNotFoundError:
        print("The cache was not turned off here; the configuration may say so.")
        return OK
    print("The cache is on.")
    return OK


# --- options and figures --------------------------------------------------------------------------


def _purge_options(words: Sequence[str]) -> tuple[str | None, float | None]:
    model: str | None = None
    older_than: float | None = None
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in ("--model", "--older-than"):
            raise _UsageError(f"unknown option {name!r}")
        given = value if equals else next(rest, "")
        if not given:
            raise _UsageError(f"{name} needs a value")
        if name == "--model":
            model = given
        else:
            older_than = _age(given)
    return model, older_than


def _age(text: str) -> float:
    parts = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    if parts is None:
        raise _UsageError(f"--older-than {text}: not an age like 90s, 45m, 12h, 7d or 2w")
    return int(parts[1]) * _UNITS[parts[2]]


def _ago(seconds: float) -> str:
    for name, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{max(0.0, seconds):.0f} seconds"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GB"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
