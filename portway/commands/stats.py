"""`portway stats`: what the log says all together, per model. It only reads.

A million lines take seconds, not minutes: blocks of lines are parsed as one JSON array each, and
several processes share large logs. A line that is no line of ours is counted and skipped. How the
log is written, and which files it is made of, is telemetry.py's.
"""

from __future__ import annotations

import calendar
import gzip
import json
import os
import re
import signal
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from portway.telemetry import iso_time, log_path, old_files, undisturbed

OK = 0
USAGE = 2
BLOCK = 1 << 16  # bytes parsed at once: what they become stays in the processor's cache, a third quicker than 1 MB
SHARE = 16 << 20  # bytes of a file that one process takes on at once
COLUMNS = 12  # of the sparkline
NO_MODEL = "-"  # the row of requests that name no model: the list of models, /health, refusals
LAST_LOOK = 60.0  # seconds by which a file's own time may lag behind its last line's

HELP = """\
usage: portway stats [--since WHEN] [--model NAME] [--json] [--log FILE]
                     [--config FILE]

Says what the log says all together: per model its requests, how often the cache
answered, how often another model had to, errors, how long answers and first
words took, tokens a second, the share served locally, and what that saved. If
Portway runs and has trouble with its log or its cache, it says so.

Options:
  --since WHEN   only what came since then: 45m, 12h, 7d, 4w, or a date like
                 2026-11-01 or 2026-11-01T08:30 (UTC)
  --model NAME   only requests for this logical model
  --json         print one JSON document instead of a table
  --log FILE     read this log, with its rotated files, instead of
                 ${XDG_DATA_HOME:-~/.local/share}/portway/log.jsonl
  --config FILE  the configuration that says where log and Portway are
"""


Health = Mapping[str, Any]  # what GET /health says


def main(
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    log: str = "",
    health: Callable[[], Health | None] = lambda: None,
) -> int:
    """Do what `argv`, the words behind `portway stats`, ask for. Returns the exit code.

    log: the configured log's path, "" = the usual place. health: asks the daemon that writes it.
    """
    environ = os.environ if environ is None else environ
    if "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return OK
    try:
        options = read_options(argv, time.time())
    except ValueError as exc:
        print(f"portway stats: {exc}\n\n{HELP}", end="", file=sys.stderr)
        return USAGE
    path = os.path.abspath(os.path.expanduser(options.log or log)) if options.log or log else log_path(environ)
    report = summarize(path, options.since, options.model)
    told = None if options.log else health()
    if options.as_json:
        print(json.dumps({**as_json(report, path, options), "daemon": _beside(told)}, indent=2))
    else:
        print("\n".join([*as_table(report, path, options, bars=_can_show_bars()), *_troubles(told)]))
    return OK


# --- The options -----------------------------------------------------------------------------


class Options(NamedTuple):
    """since: a line's `ts` at the earliest, "" = all. model: None = all. log: "" = the usual place."""

    since: str = ""
    model: str | None = None
    as_json: bool = False
    log: str = ""


def read_options(words: Iterable[str], now: float) -> Options:
    """Raises ValueError, which says what can't be understood. now: time.time()."""
    since, model, log, as_json = "", None, "", False
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--json" and not equals:
            as_json = True
            continue
        if name not in ("--since", "--model", "--log"):
            raise ValueError(f"unknown argument {word!r}")
        given = value if equals else next(rest, "")
        if not given:
            raise ValueError(f"{name} needs a value")
        if name == "--since":
            since = _moment(given, now)
        elif name == "--model":
            model = given
        else:
            log = given
    return Options(since, model, as_json, log)


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _moment(text: str, now: float) -> str:
    """When `--since` means, as `ts` in the log; a date is the beginning of what it leaves open."""
    if match := re.fullmatch(r"([0-9]{1,6})([smhdw])", text):
        return iso_time(max(0.0, now - int(match[1]) * _UNITS[match[2]]))
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"):
        try:
            time.strptime(text.removesuffix("Z"), form)
        except ValueError:
            continue
        return text.removesuffix("Z")
    raise ValueError(f"--since {text}: neither a time span like 45m, 12h, 7d, 4w nor a date like 2026-11-01")


# --- What is counted -------------------------------------------------------------------------


@dataclass(slots=True)
class Figures:
    """One model's lines, added up. Times are seconds.

    looked_up: requests for which the cache was asked. answered: without an error. placed: of these, how
    many it is known of where they were answered. hours: requests by the `ts` of their hour.
    """

    requests: int = 0
    answered: int = 0
    errors: int = 0
    cancelled: int = 0
    demoted: int = 0
    looked_up: int = 0
    hits: int = 0
    placed: int = 0
    local: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    saved_usd: float = 0.0
    latency: array[float] = field(default_factory=lambda: array("d"))
    ttft: array[float] = field(default_factory=lambda: array("d"))
    speed: array[float] = field(default_factory=lambda: array("d"))
    hours: Counter[str] = field(default_factory=Counter)

    def add(self, line: Mapping[str, Any]) -> None:
        """One line. Raises TypeError if it is none of ours."""
        get = line.get
        if not get("exit_code"):
            self.latency.append(line.get("latency_s") or 0.0)
            self.answered += 1
            self._add_answer(get)
        elif get("cancelled_in"):
            self.cancelled += 1
        else:
            self.errors += 1
        self.requests += 1
        if get("demoted"):
            self.demoted += 1
        cache_hit = get("cache_hit")
        if cache_hit is not None:
            self.looked_up += 1
            if cache_hit:
                self.hits += 1

    def _add_answer(self, get: Callable[[str], Any]) -> None:
        if (ttft := get("ttft_s")) is not None:
            self.ttft.append(ttft)
        if (speed := get("decode_tps")) is not None:
            self.speed.append(speed)
        if (tokens := get("completion_tokens")) is not None:
            self.completion_tokens += tokens
        if (tokens := get("prompt_tokens")) is not None:
            self.prompt_tokens += tokens
        if (saved := get("saved_usd")) is not None:
            self.saved_usd += saved
        if get("cache_hit"):
            self.placed += 1
            self.local += 1
        elif (local := get("local")) is not None:
            self.placed += 1
            if local:
                self.local += 1

    def merge(self, other: Figures) -> None:
        """Add up with what has been counted elsewhere."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency += other.latency
        self.ttft += other.ttft
        self.speed += other.speed
        self.hours.update(other.hours)


_SUMS = (
    *("requests", "answered", "errors", "cancelled", "demoted", "looked_up", "hits", "placed", "local"),
    *("prompt_tokens", "completion_tokens", "saved_usd"),
)


@dataclass(slots=True)
class Report:
    """What a log, or a part of it, says. broken: lines that can't be read, and files that end too early.
    not_running: how often `ask` found no daemon."""

    models: dict[str, Figures] = field(default_factory=dict)
    broken: int = 0
    not_running: int = 0

    def add(self, lines: Iterable[Mapping[str, Any]], since: str, model: str | None) -> None:
        """Count those lines that came `since` then, for `model`."""
        models = self.models
        for line in lines:
            try:
                ts, name = line["ts"], line["model"] or NO_MODEL
                if ts < since or (model is not None and name != model):
                    continue
                if line["endpoint"] == "ask":  # beside the daemon's line, or where there was no daemon
                    self.not_running += line["error"] == "not_running"
                    continue
                figures = models.get(name)
                if figures is None:
                    figures = models[name] = Figures()
                figures.hours[ts[:13]] += 1
                figures.add(line)
            except (KeyError, TypeError, AttributeError):
                self.broken += 1

    def merge(self, other: Report) -> None:
        """Add up with what has been counted elsewhere."""
        self.broken += other.broken
        self.not_running += other.not_running
        for name, figures in other.models.items():
            self.models.setdefault(name, Figures()).merge(figures)

    def total(self) -> Figures:
        """All models as one; what names no model is left out."""
        total = Figures()
        for name, figures in self.models.items():
            if name != NO_MODEL:
                total.merge(figures)
        return total


# --- Reading ---------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Lines that begin in bytes `start` to `end` of a file; end None = to its end, as compressed files are read."""

    path: str
    start: int
    end: int | None


def summarize(path: str, since: str = "", model: str | None = None) -> Report:
    """What the log at `path` and its rotated files say. A log that is not there says nothing."""
    if not os.path.isdir(os.path.dirname(path)):
        return Report()
    with undisturbed(path):
        pieces = list(_pieces([*old_files(path), path], since))
        workers = min(len(pieces), os.cpu_count() or 1)
        jobs = [(piece, since, model) for piece in pieces]
        if workers < 2:
            return _merged(map(_summarize_piece, jobs))
        return _summarize_together(jobs, workers)


def read(paths: Iterable[str], since: str = "") -> Iterator[dict[str, Any]]:
    """The lines of files, oldest file first as given, that came `since` then; broken ones are left out."""
    for piece in _pieces(paths, since):
        for block in _blocks(piece):
            for line in parse(block)[0]:
                if str(line.get("ts", "")) >= since:
                    yield line


def parse(block: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a block, and how many of it are broken."""
    count = block.count(b"\n")
    if count == block.count(b'"ts":') and block.endswith(b"}\n"):
        try:  # as one array, they take half the time
            lines = json.loads(b"[%b]" % block[:-1].replace(b"\n", b","))
        except (ValueError, RecursionError):
            return _parse_each(block)
        # as many objects as lines, each with a `ts` of its own: so none holds another, and none was cut in two
        if len(lines) == count and all(type(line) is dict and "ts" in line for line in lines):
            return lines, 0
    return _parse_each(block)


def _parse_each(block: bytes) -> tuple[list[dict[str, Any]], int]:
    lines, broken = [], 0
    for text in block.splitlines():
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(line, dict):
            lines.append(line)
        elif line is not None or text.strip():
            broken += 1
    return lines, broken


Job = tuple[Piece, str, str | None]  # with `since` and `model`


def _summarize_piece(job: Job) -> Report:
    piece, since, model = job
    report = Report()
    try:
        for block in _blocks(piece):
            lines, broken = parse(block)
            report.broken += broken
            report.add(lines, since, model)
    except (OSError, EOFError, zlib.error):  # unreadable, or compressed and damaged
        report.broken += 1
    for figures in report.models.values():
        figures.latency = array("d", sorted(figures.latency))  # sorted pieces are quickly made one
        figures.ttft = array("d", sorted(figures.ttft))
        figures.speed = array("d", sorted(figures.speed))
    return report


def _summarize_together(jobs: Iterable[Job], workers: int) -> Report:
    import multiprocessing  # these are slow to import, and small logs do without
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")  # fork() and threads don't go together
    with ProcessPoolExecutor(workers, context, initializer=_leave_interrupts_to_the_parent) as pool:
        return _merged(pool.map(_summarize_piece, jobs))


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _merged(reports: Iterable[Report]) -> Report:
    merged = Report()
    for report in reports:
        merged.merge(report)
    return merged


def _pieces(paths: Iterable[str], since: str) -> Iterator[Piece]:
    """What is to be read of the files that are there; one that was closed before `since` is not."""
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        if iso_time(status.st_mtime + LAST_LOOK) < since:
            continue
        if path.endswith(".gz"):
            yield Piece(path, 0, None)
            continue
        for start in range(0, status.st_size, SHARE):
            yield Piece(path, start, min(start + SHARE, status.st_size))


def _blocks(piece: Piece) -> Iterator[bytes]:
    """Whole lines, about BLOCK bytes at once. The last line of a file may lack its end."""
    opened: Any = gzip.open(piece.path) if piece.path.endswith(".gz") else open(piece.path, "rb")  # noqa: SIM115
    with opened as file:
        place = 0
        if piece.start:  # the line under way belongs to the piece before
            file.seek(piece.start - 1)
            place = piece.start - 1 + len(file.readline())
        while piece.end is None or place < piece.end:
            size = BLOCK if piece.end is None else min(BLOCK, piece.end - place)
            block = file.read(size)
            if not block:
                return
            if not block.endswith(b"\n"):
                block += file.readline()
            place += len(block)
            yield block


# --- Showing ---------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest of the sorted `values` that at least `share` of them do not exceed; None of none."""
    if not values:
        return None
    return values[max(0, -int(-len(values) * share // 1) - 1)]


def as_json(report: Report, path: str, options: Options) -> dict[str, Any]:
    """The report with numbers as they are. Times in seconds; None = nothing to go by."""
    return {
        "log": path,
        "since": options.since or None,
        "broken_lines": report.broken,
        "ask_found_no_daemon": report.not_running,
        "total": _numbers(report.total()),
        "models": {name: _numbers(figures) for name, figures in _ranked(report)},
        "without_model": report.models[NO_MODEL].requests if NO_MODEL in report.models else 0,
    }


def _numbers(figures: Figures) -> dict[str, Any]:
    latency, ttft, speed = sorted(figures.latency), sorted(figures.ttft), sorted(figures.speed)
    return {
        "requests": figures.requests,
        "answered": figures.answered,
        "errors": figures.errors,
        "cancelled": figures.cancelled,
        "demoted": figures.demoted,
        "demotion_rate": _rate(figures.demoted, figures.requests),
        "cache_lookups": figures.looked_up,
        "cache_hits": figures.hits,
        "hit_rate": _rate(figures.hits, figures.looked_up),
        "latency_s": {name: quantile(latency, share) for name, share in _QUANTILES},
        "ttft_s": {name: quantile(ttft, share) for name, share in _QUANTILES},
        "tokens_per_s": quantile(speed, 0.5),
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.completion_tokens,
        "local_rate": _rate(figures.local, figures.placed),
        "saved_usd": round(figures.saved_usd, 6),
    }


_QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


def _rate(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _ranked(report: Report) -> list[tuple[str, Figures]]:
    """The models, the most asked for first."""
    named = [item for item in report.models.items() if item[0] != NO_MODEL]
    return sorted(named, key=lambda item: (-item[1].requests, item[0]))


def as_table(report: Report, path: str, options: Options, *, bars: bool) -> list[str]:
    """The report as lines of text. bars: whether block characters can be shown."""
    total = report.total()
    since = f" since {options.since[:16]}Z" if options.since else ""
    wanted = f" for {_harmless(options.model)}" if options.model is not None else ""
    lines = [f"No requests{wanted}{since} in {path}"]
    if not os.path.exists(path) and not report.models:
        lines = [f"No log yet at {path}; `portway serve` writes one."]
    if total.requests:
        lines = [f"{total.requests:,} requests{wanted}{since}, by {path}", "", *_table(report, total, bars=bars)]
        lines += ["", "Answers and first words in p50/p95/p99; tok/s is the median; saved is in US dollars."]
    if NO_MODEL in report.models and options.model is None:
        lines.append(f"{report.models[NO_MODEL].requests:,} more requests named no model.")
    if report.not_running:
        lines.append(f"{report.not_running:,} times `ask` found no Portway running.")
    if report.broken:
        lines.append(f"{report.broken:,} lines could not be read.")
    return lines


def _beside(told: Health | None) -> dict[str, Any] | None:
    """Of the daemon's health what is beside its requests: log and cache. None = no daemon answers."""
    return None if told is None else {part: told.get(part) for part in ("log", "cache")}


def _troubles(told: Health | None) -> Iterator[str]:
    """What is missing in the figures, and why, as far as the running daemon knows."""
    for part, things in (("log", "lines were lost"), ("cache", "answers were not stored")):
        state = (told or {}).get(part) or {}
        if problem := state.get("problem"):
            yield f"Now: {_harmless(problem)}."
        if dropped := state.get("dropped"):
            yield f"{dropped:,} {things} since Portway was started."
        if notice := state.get("notice"):
            yield f"Note: {_harmless(notice)}."


def _table(report: Report, total: Figures, *, bars: bool) -> list[str]:
    ranked = _ranked(report)
    rows = [(_harmless(name), figures) for name, figures in ranked]
    if len(rows) > 1:
        rows.append(("all", total))
    head = ["model", "requests", "cached", "demoted", "errors", "answer", "first word", "tok/s", "local", "saved"]
    cells = [head, *([name, *_cells(_numbers(figures))] for name, figures in rows)]
    if bars:
        shown = ["when", *_sparklines([figures for _, figures in rows])]
        cells = [[*row[:2], bar.ljust(COLUMNS), *row[2:]] for row, bar in zip(cells, shown, strict=True)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    return [_joined(row, widths) for row in cells]


def _joined(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *padded[1:]])


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    speed = numbers["tokens_per_s"]
    return [
        f"{numbers['requests']:,}",
        _percent(numbers["hit_rate"]),
        _percent(numbers["demotion_rate"]),
        _percent(_rate(numbers["errors"], numbers["requests"])),
        _durations(numbers["latency_s"].values()),
        _durations(numbers["ttft_s"].values()),
        "-" if speed is None else f"{speed:.0f}",
        _percent(numbers["local_rate"]),
        f"{numbers['saved_usd']:,.2f}",
    ]


def _percent(rate: float | None) -> str:
    """0% and 100% only where it is none and all."""
    if rate is None:
        return "-"
    if 0 < rate < 0.0995:
        return f"{max(rate * 100, 0.1):.1f}%"
    return f"{min(rate * 100, 99.9):.1f}%" if 0.995 <= rate < 1 else f"{rate * 100:.0f}%"


def _durations(seconds: Iterable[float | None]) -> str:
    known = [_duration(value) for value in seconds if value is not None]
    return "/".join(known) or "-"


def _duration(seconds: float) -> str:
    if seconds < 0.01:
        return f"{seconds * 1000:.1f}ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    return f"{seconds:.1f}s" if seconds < 100 else f"{seconds:.0f}s"


def _sparklines(figures: Sequence[Figures]) -> list[str]:
    """Requests over time as rows of bars, one scale of time for all; a row's highest bar is its busiest time."""
    counted = [_by_hour(each) for each in figures]
    hours = [hour for row in counted for hour in row]
    if not hours:
        return [""] * len(counted)
    start, width = min(hours), max(hours) - min(hours) + 1
    rows = []
    for row in counted:
        columns = [0] * COLUMNS
        for hour, count in row.items():
            columns[(hour - start) * COLUMNS // width] += count
        rows.append("".join(_bar(count, max(columns)) for count in columns))
    return rows


def _bar(count: int, top: int) -> str:
    return chr(0x2581 + (count * 8 - 1) // top) if count else " "


def _by_hour(figures: Figures) -> dict[int, int]:
    """Requests by hours since 1970."""
    counted = {}
    for text, count in figures.hours.items():
        try:
            counted[calendar.timegm(time.strptime(text, "%Y-%m-%dT%H")) // 3600] = count
        except ValueError:
            continue  # no time of ours
    return counted


def _can_show_bars() -> bool:
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return sys.stdout.isatty() and encoding == "utf8"


def _harmless(text: str | None) -> str:
    """A name out of a file, as a terminal may be given it."""
    return "".join(char if char.isprintable() else "?" for char in text or "")
