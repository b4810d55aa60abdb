"""GET /metrics: counters and histograms per model in Prometheus' text format, version 0.0.4.

`observe` is on the request path and costs microseconds; `render` asks nobody but what it was given
to read. Labels are bounded: a configured model or "other", never what a client wrote. What a line of
the log says is telemetry.py's; nothing here knows HTTP.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Literal

from portway.telemetry import Record, failure_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"  # the model of a request that names none that is configured

# Upper bounds in seconds. From a cache hit to the longest answer, from a warm model to one that is
# loaded first, and from nothing to what would be a bug.
LATENCY = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 600.0)
TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 300.0)
OVERHEAD = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)


@dataclass(frozen=True, slots=True)
class Reading:
    """A number that somebody else keeps, read at each scrape.

    name: without `portway_`; a counter's ends with _total. read: a number; with `labels` one for each
    combination of their values.
    """

    name: str
    help: str
    read: Callable[[], float | Mapping[tuple[str, ...], float]]
    labels: tuple[str, ...] = ()
    kind: Literal["gauge", "counter"] = "gauge"


class Metrics:
    """What has happened since the start. Any thread may call anything.

    models: the configured ones. readings: numbers of others, at the end of the page.
    """

    def __init__(self, models: Iterable[str], readings: Sequence[Reading] = ()) -> None:
        self._readings = tuple(readings)
        self._lock = threading.Lock()  # guards _series and all that is in it
        self._series: dict[str, _Series] = {OTHER: _Series()}
        self.use(models)

    def use(self, models: Iterable[str]) -> None:
        """Another configuration: new models begin at 0, and those that are gone keep what they have counted,
        as counters must; configurations change too seldom for that to grow."""
        with self._lock:
            for model in models:
                if model not in self._series:
                    self._series[model] = _Series()

    def observe(self, record: Record) -> None:
        """Count a finished request."""
        model, started, first, ended, waited, prompt_tokens, completion_tokens = _NUMBERS(record)
        labels = _labels(*_NAMES(record))
        latency = ended - started
        with self._lock:
            series = self._series.get(model) or self._series[OTHER]
            series.requests[labels] += 1
            if not model:
                return  # a list of models, /health: their times would only blur the others'
            series.latency.add(latency)
            if first is not None:
                series.ttft.add(first - started)
            if waited is not None:
                series.overhead.add(latency - waited)
            if prompt_tokens:
                series.prompt_tokens += prompt_tokens
            if completion_tokens:
                series.completion_tokens += completion_tokens

    def render(self) -> bytes:
        """The whole page, as CONTENT_TYPE says."""
        with self._lock:
            series = {model: each.copy() for model, each in self._series.items()}
        lines = [*_requests(series), *_tokens(series), *_histograms(series)]
        for reading in self._readings:
            lines += _reading(reading)
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


_NUMBERS = attrgetter("model", "started", "first", "ended", "waited", "prompt_tokens", "completion_tokens")
_NAMES = attrgetter("cancelled_in", "status", "error", "cache_hit", "model", "served_by")
_Key = tuple[str, str, bool]  # status, cache, demoted; a NamedTuple would cost a fifth of observe()


@lru_cache(maxsize=256)  # most requests end alike
def _labels(
    cancelled_in: str | None, status: int, error: str, cache_hit: bool | None, model: str, served_by: str
) -> _Key:
    """Bounded, too: a stream that broke has sent its 200, and counts as what it became."""
    ended = "cancelled" if cancelled_in else _CLASSES.get(failure_of(cancelled_in, status, error), "5xx")
    return ended, _CACHE[cache_hit], bool(served_by) and served_by != model


_CLASSES = {0: "2xx", 4: "4xx"}
_CACHE = {None: "none", True: "hit", False: "miss"}


class _Series:
    """One model's numbers."""

    __slots__ = ("completion_tokens", "latency", "overhead", "prompt_tokens", "requests", "ttft")

    def __init__(self) -> None:
        self.requests: Counter[_Key] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.latency = _Histogram(LATENCY)
        self.ttft = _Histogram(TTFT)
        self.overhead = _Histogram(OVERHEAD)

    def copy(self) -> _Series:
        twin = _Series()
        twin.requests = self.requests.copy()
        twin.prompt_tokens, twin.completion_tokens = self.prompt_tokens, self.completion_tokens
        twin.latency, twin.ttft, twin.overhead = self.latency.copy(), self.ttft.copy(), self.overhead.copy()
        return twin


class _Histogram:
    """How many values fell between which bounds; the last count is of those beyond all."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """A value below 0 is a clock's imprecision."""
        self.counts[bisect_left(self.bounds, value)] += 1
        if value > 0.0:
            self.sum += value

    def copy(self) -> _Histogram:
        twin = _Histogram(self.bounds)
        twin.counts, twin.sum = self.counts.copy(), self.sum
        return twin


# --- The page's lines ------------------------------------------------------------------------


def _requests(series: Mapping[str, _Series]) -> Iterator[str]:
    yield from _head("requests_total", "counter", "Requests, by how they ended.")
    for model, each in series.items():
        for (status, cache, demoted), count in sorted(each.requests.items()):
            labels = {"model": model, "status": status, "cache": cache, "demoted": str(demoted).lower()}
            yield _sample("requests_total", labels, count)


def _tokens(series: Mapping[str, _Series]) -> Iterator[str]:
    yield from _head("tokens_total", "counter", "Tokens, as far as the backends count them.")
    for model, each in series.items():
        yield _sample("tokens_total", {"model": model, "kind": "prompt"}, each.prompt_tokens)
        yield _sample("tokens_total", {"model": model, "kind": "completion"}, each.completion_tokens)


def _histograms(series: Mapping[str, _Series]) -> Iterator[str]:
    name = "request_duration_seconds"
    yield from _head(name, "histogram", "From a request's arrival to its answer's end.")
    for model, each in series.items():
        yield from _histogram(name, model, each.latency)
    name = "time_to_first_token_seconds"
    yield from _head(name, "histogram", "From a request's arrival to its stream's first content.")
    for model, each in series.items():
        yield from _histogram(name, model, each.ttft)
    name = "overhead_seconds"
    yield from _head(name, "histogram", "Portway's own share of a request's duration.")
    for model, each in series.items():
        yield from _histogram(name, model, each.overhead)


def _histogram(name: str, model: str, histogram: _Histogram) -> Iterator[str]:
    total = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        yield _sample(f"{name}_bucket", {"model": model, "le": _number(bound)}, total)
    yield _sample(f"{name}_sum", {"model": model}, histogram.sum)
    yield _sample(f"{name}_count", {"model": model}, total)


def _reading(reading: Reading) -> Iterator[str]:
    yield from _head(reading.name, reading.kind, reading.help)
    value = reading.read()
    if isinstance(value, Mapping):
        for texts, each in value.items():
            yield _sample(reading.name, dict(zip(reading.labels, texts, strict=True)), each)
    else:
        yield _sample(reading.name, {}, value)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    yield f"# HELP portway_{name} {escaped}"
    yield f"# TYPE portway_{name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"portway_{name}{{{inside}}} {_number(value)}" if labels else f"portway_{name} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    """As Go reads it: +Inf, -Inf, NaN, else as Python writes it."""
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(str(value), str(value))
