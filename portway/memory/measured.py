"""What was measured of models: how much memory each took, how long its load. It outlives the daemon.

    memory   -> Measurements   what is known; guarded by whoever holds it (residency.py)
    the disk -> Notebook       ${XDG_STATE_HOME:-~/.local/state}/portway/measured.json, 0600

A model is told by its server's address, the server's name for it and its shape, so that another configuration of
the same finds it again. The file is a convenience: whatever is in it that is not understood is as if it were not
there, and a disk that takes nothing costs nothing but a word. It is read once, at the start, and written off the
requests' way.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from portway.memory.arbiter import Shape

FORMAT = 1
MAX_FILE = 256 * 1024  # bytes; a line a model comes nowhere near it
MAX_ENTRIES = 500
LIFETIME = 30 * 86_400.0  # seconds after which something is measured anew: servers and their settings change
REFRESH = 86_400.0  # seconds after which the same measure is worth writing down again
LARGEST = 2**50  # bytes
LONGEST = 1e5  # seconds


class Thing(NamedTuple):
    """What is measured: a model of the server at `url`, by the server's own name. shape: None for its load's time,
    which hardly depends on it."""

    url: str
    name: str
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """Bytes or seconds, and the time.time() of when."""

    value: float
    at: float


class Measurements:
    """What is known. Not for two threads at once."""

    def __init__(self, known: Mapping[Thing, Measure] | None = None, clock: Callable[[], float] = time.time) -> None:
        self._known = dict(known or {})
        self._clock = clock
        self._unsaved: dict[Thing, Measure] = {}

    def size(self, url: str, name: str, shape: Shape) -> int | None:
        """Bytes that it took in this very shape."""
        found = self._known.get(Thing(url, name, shape))
        return None if found is None else int(found.value)

    def load_time(self, url: str, name: str) -> float | None:
        """Seconds that its last load took."""
        found = self._known.get(Thing(url, name))
        return None if found is None else found.value

    def weigh(self, url: str, name: str, shape: Shape, size: int) -> None:
        """It takes so many bytes."""
        self._note(Thing(url, name, shape), size)

    def time(self, url: str, name: str, seconds: float) -> None:
        """Its load took so many seconds."""
        self._note(Thing(url, name), seconds)

    def unsaved(self) -> dict[Thing, Measure]:
        """What has been learnt since this was asked last."""
        new, self._unsaved = self._unsaved, {}
        return new

    def _note(self, thing: Thing, value: float) -> None:
        now, before = self._clock(), self._known.get(thing)
        if before is not None and before.value == value and 0 <= now - before.at < REFRESH:
            return
        self._known[thing] = self._unsaved[thing] = Measure(value, now)


# --- the file -------------------------------------------------------------------------------------


def default_path(environ: Mapping[str, str]) -> str:
    """${XDG_STATE_HOME:-~/.local/state}/portway/measured.json."""
    base = environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # unset, empty or relative: to be ignored, says the XDG specification
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "portway", "measured.json")


class Notebook:
    """The file at `path`. For one thread at a time."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    def read(self) -> dict[Thing, Measure]:
        """What stands in it, as far as that is ours, whole and not too old."""
        return self._current(_parsed(_content(self.path)))

    def add(self, new: Mapping[Thing, Measure]) -> None:
        """Write it down beside what is there, of another Portway perhaps, in one step. Raises OSError."""
        if not new:
            return
        text = _text(self._current({**self.read(), **new}))
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            os.makedirs(folder, 0o700, exist_ok=True)
        fresh = f"{self.path}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(fresh, flags, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask, and whoever left one
            file.write(text)
        os.replace(fresh, self.path)

    def _current(self, known: Mapping[Thing, Measure]) -> dict[Thing, Measure]:
        """Without what is too old, from the future, or too much."""
        now = self._clock()
        fresh = [(thing, one) for thing, one in known.items() if -REFRESH < now - one.at < LIFETIME]
        return dict(sorted(fresh, key=lambda pair: -pair[1].at)[:MAX_ENTRIES])


def _content(path: str) -> bytes:
    """Of the file, as far as it may be ours; nothing if there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(handle, MAX_FILE)  # at once, whatever it is: a pipe, too
    except OSError:
        return b""
    finally:
        os.close(handle)


def _parsed(content: bytes) -> dict[Thing, Measure]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("portway_measured") != FORMAT:
        return {}
    found = {}
    for entry in _entries(document.get("models")):
        thing = _thing(entry)
        at, size, seconds = (_number(entry.get(name)) for name in ("at", "bytes", "load_s"))
        if thing is None or at is None:
            continue
        if size is not None and 0 < size <= LARGEST and thing.shape is not None:
            found[thing] = Measure(int(size), at)
        elif seconds is not None and 0 < seconds <= LONGEST and thing.shape is None:
            found[thing] = Measure(seconds, at)
    return found


def _thing(entry: Mapping[str, Any]) -> Thing | None:
    url, name, shape = entry.get("url"), entry.get("model"), entry.get("shape")
    if not isinstance(url, str) or not isinstance(name, str):
        return None
    if shape is None:
        return Thing(url, name)
    if not isinstance(shape, dict):
        return None
    window, options = shape.get("num_ctx"), shape.get("options")
    if not isinstance(window, int | None) or not isinstance(options, dict | None):
        return None
    scalar = all(isinstance(value, int | float | str) for value in (options or {}).values())
    return Thing(url, name, Shape(window, None if options is None else tuple(options.items()))) if scalar else None


def _text(known: Mapping[Thing, Measure]) -> bytes:
    models = []
    for thing, one in known.items():
        entry: dict[str, Any] = {"url": thing.url, "model": thing.name}
        if thing.shape is None:
            entry["load_s"] = one.value
        else:
            options = None if thing.shape.options is None else dict(thing.shape.options)
            entry |= {"shape": {"num_ctx": thing.shape.num_ctx, "options": options}, "bytes": int(one.value)}
        models.append({**entry, "at": round(one.at, 3)})
    return json.dumps({"portway_measured": FORMAT, "models": models}, indent=1).encode()


def _entries(value: Any) -> Iterable[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and -1e18 < value < 1e18
    return value if good else None
