#!/usr/bin/env python3
"""Fire several models' prompts at Portway at once and watch the machine: does it thrash?

    stress.py                         at the Portway that runs here, with its own models
    stress.py --simulate              at stand-ins that share a memory with a budget; nothing real is loaded
    stress.py --simulate --no-residency   the same without Portway's arbiter, to see the difference

It samples the memory of the model servers (the whole process tree), the system's pressure, pageouts and swap,
the time to the first token and demotions, draws them over time, and ends with one line of JSON and a verdict.
Exit code: 0 it did not thrash, 1 it did, or nothing was answered, 2 usage. It ends within --seconds and a minute.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone, with nothing installed

from portway import config
from portway.memory import machine as memory
from portway.proxy import Daemon
from portway.standin.answers import StandInModel
from portway.standin.memory import Memory
from portway.standin.server import StandIn, parse_size

URL = "http://127.0.0.1:11436"
MIX = "fast-9b=3,coder-30b=1"
SIMULATED_MIX = f"{MIX},heavy=1"  # two that take turns behind one engine, beside the other's
SERVERS = re.compile(r"ollama|llama-server|llama-swap|lm studio|lms$|vllm", re.IGNORECASE)
TOKENS = 64  # of each answer; enough to hold a model while others ask for theirs
ANSWER_PATIENCE = 60.0  # seconds beyond --seconds that the last answers have
SWAPPED = 256 * 1024**2  # bytes swapped out in one run that are no chance
STALL = 10  # percent of memory that macOS or Linux call free, below which it is tight
MANY_LOADS = 8  # below which loads are no thrashing, however few the requests
WIDTH = 60  # columns of a drawing
RAMP = " .:-=+*#%@"

# what --simulate plays: two engines of one machine, each of which sees only its own models. 20 GB hold the coder
# or the everyday models, never both; a load takes as long as it takes to see what it does to the others.
SIMULATED = {
    "one": (StandInModel("qwen3.5:9b", 6_600_000_000), StandInModel("granite4:3b", 2_100_000_000)),
    "two": (StandInModel("qwen3-coder:30b", 18_600_000_000), StandInModel("gpt-oss:20b", 13_800_000_000)),
}
SIMULATED_BUDGET = 20_000_000_000
QUICK = "min_stay = 1\npatience = 2\ncheck = 1"  # a load takes 0.15 s here, and no minute
SIMULATED_CONFIG = """
[memory]
{memory}
[backends.one]
kind = "ollama"
url = "{one}"
[backends.two]
kind = "ollama"
url = "{two}"
[models.fast-9b]
backend = "one"
model = "qwen3.5:9b"
family = "qwen"
keep_alive = "15m"
num_ctx = 4096
fallback = ["fast-3b"]
[models.fast-3b]
backend = "one"
model = "granite4:3b"
family = "granite"
keep_alive = "5m"
num_ctx = 4096
[models.coder-30b]
backend = "two"
model = "qwen3-coder:30b"
family = "qwen"
keep_alive = "15m"
num_ctx = 4096
fallback = ["fast-9b", "fast-3b"]
[models.heavy]
backend = "two"
model = "gpt-oss:20b"
family = "gpt"
keep_alive = "15m"
num_ctx = 4096
fallback = ["fast-9b"]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, draw, judge. Returns the exit code."""
    options = _parser().parse_args(argv)
    options.mix = options.mix or parse_mix(SIMULATED_MIX if options.simulate else MIX)
    with ExitStack() as stack:
        try:
            target = simulated(stack, options) if options.simulate else running(options)
        except Unusable as exc:
            print(f"stress.py: {exc}", file=sys.stderr)
            return 2
        print(f"{target.what}; {options.mix}; up to {options.requests} requests in {options.seconds:g} s", flush=True)
        told = drive(target, options)
    document = judge(told, target)
    if not options.quiet:
        for line in drawn(told, target):
            print(line)
    if options.svg:
        Path(options.svg).write_text(as_svg(told, target, document), encoding="utf-8")
        print(f"drawn in {options.svg}")
    print(f"{document['verdict']}: {'; '.join(document['why'])}")
    print(json.dumps(document, separators=(",", ":")))
    return 0 if document["verdict"] == "calm" else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stress.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mix", type=parse_mix, metavar="NAME=N,..", help=f"clients for each model ({MIX})")
    parser.add_argument("--requests", type=_bounded(1, 100_000, int), default=60, metavar="N", help="in all (60)")
    parser.add_argument("--seconds", type=_bounded(1, 3600, float), default=120.0, metavar="S", help="at most (120)")
    parser.add_argument("--every", type=_bounded(0.01, 60, float), default=0.0, metavar="S", help="between two samples")
    parser.add_argument("--url", default=URL, help=f"of a running Portway ({URL})")
    parser.add_argument("--key", default="env:PORTWAY_API_KEY", help="its key, as env:NAME")
    parser.add_argument("--simulate", action="store_true", help="with stand-ins and a daemon of its own")
    parser.add_argument("--no-residency", action="store_true", help="with --simulate: without Portway's arbiter")
    parser.add_argument("--budget", type=parse_size, default=SIMULATED_BUDGET, help="with --simulate: memory (20GB)")
    parser.add_argument("--svg", metavar="FILE", help="draw into FILE as well")
    parser.add_argument("--quiet", action="store_true", help="the verdict alone")
    return parser


class Mix(dict[str, int]):
    """Model -> how many clients ask it at the same time."""

    def __str__(self) -> str:
        return ", ".join(f"{clients} x {name}" for name, clients in self.items())


def parse_mix(text: str) -> Mix:
    """The clients of "fast-9b=4,coder-30b=1". Raises ArgumentTypeError."""
    mix = Mix()
    for part in text.split(","):
        name, _, clients = part.strip().partition("=")
        if not name or not (clients or "1").isdecimal() or not 1 <= int(clients or 1) <= 256:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=N with 1 to 256 clients")
        mix[name] = mix.get(name, 0) + int(clients or 1)
    return mix


def _bounded(low: float, high: float, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low:g} to {high:g}")
        return value

    return read


class Unusable(Exception):
    """There is nothing to put under stress. str() says why."""


# --- what is put under stress ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask, and how to look at what it does. memory: the stand-ins' own; None = a real machine's."""

    what: str
    url: str
    look: Callable[[], Look]
    residency: bool | None = None
    memory: Memory | None = None
    key: str | None = None


class Look(NamedTuple):
    """One look. Bytes, but free (percent), pageouts and swapped (bytes since boot); None = can't be seen."""

    models: int | None = None
    free: float | None = None
    pageouts: int | None = None
    swapped: int | None = None
    budget: int | None = None


def running(options: argparse.Namespace) -> Target:
    """The Portway that runs, as it is configured."""
    if options.no_residency:
        raise Unusable("--no-residency needs --simulate: a running Portway's configuration is not changed from here")
    name = options.key.removeprefix("env:")
    key = os.environ.get(name) if options.key.startswith("env:") else options.key
    connection = _connect(options.url, 5.0)
    try:
        connection.request("GET", "/health")
        version = json.loads(connection.getresponse().read()).get("version")
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as exc:
        raise Unusable(f"no Portway answers at {options.url} ({exc}); start it, or try --simulate") from None
    finally:
        connection.close()
    return Target(f"Portway {version} at {options.url}", options.url, look_at_machine, key=key)


def simulated(stack: ExitStack, options: argparse.Namespace) -> Target:
    """A daemon in this process, before two stand-ins that share one memory."""
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="portway-stress-"))
    shared = Memory(budget=options.budget, evict=True)
    one, two = (
        stack.enter_context(StandIn(models, memory=shared, load_delay=0.15, token_delay=0.002, parallel=4))
        for models in SIMULATED.values()
    )
    switch = "enabled = false" if options.no_residency else f"budget = {options.budget}\n{QUICK}"
    text = SIMULATED_CONFIG.format(memory=switch, one=one.url, two=two.url)
    parsed = config.parse(text, f"{home}/models.toml", {})
    unknown = [name for name in options.mix if parsed.resolve(name) is None]
    if unknown:
        raise Unusable(f"--simulate has no {', '.join(unknown)}; it has {', '.join(parsed.models)}")
    daemon = Daemon(replace(parsed, server=replace(parsed.server, port=0)), say=lambda _: None)
    daemon.start()
    stack.callback(daemon.stop, 5.0)
    has = not options.no_residency
    what = f"a simulation with {options.budget / 1e9:.1f} GB for models, {'with' if has else 'without'} the arbiter"
    return Target(what, daemon.url, lambda: look_at_stand_in(shared), residency=has, memory=shared)


# --- driving it ------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What came of one request. Seconds since the start; ttft: until the first content, None = none came."""

    at: float
    model: str
    served_by: str
    ok: bool
    ttft: float | None
    seconds: float
    error: str = ""


class Sample(NamedTuple):
    """One look, and what the clients had at that moment."""

    at: float
    look: Look
    waiting: int


@dataclass(slots=True)
class Told:
    """All that was seen. `lock` guards both lists and `waiting`."""

    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def drive(target: Target, options: argparse.Namespace) -> Told:
    """Ask with every client at once until the requests or the seconds are used up."""
    told, over = Told(), threading.Event()
    started = time.monotonic()
    numbers = count()
    every = options.every or (0.02 if target.memory else 0.5)

    def sample() -> None:
        ended = False
        while not ended:
            ended = (
                over.wait(every) if told.samples else False
            )  # once more at the end: what a short run did shows there
            look = target.look()
            with told.lock:
                told.samples.append(Sample(time.monotonic() - started, look, told.waiting))

    def ask(model: str) -> None:
        while (number := next(numbers)) < options.requests and time.monotonic() - started < options.seconds:
            with told.lock:
                told.waiting += 1
            answer = ask_once(target, model, number, started, options.seconds + ANSWER_PATIENCE)
            with told.lock:
                told.waiting -= 1
                told.answers.append(answer)

    clients = [
        threading.Thread(target=ask, args=(name,), daemon=True) for name, n in options.mix.items() for _ in range(n)
    ]
    sampler = threading.Thread(target=sample, name="stress-sampler", daemon=True)
    sampler.start()
    for client in clients:
        client.start()
    for client in clients:
        client.join(max(0.0, started + options.seconds + ANSWER_PATIENCE - time.monotonic()))
    over.set()
    sampler.join(10.0)
    with told.lock:
        return Told(list(told.answers), list(told.samples), told.waiting)


def ask_once(target: Target, model: str, number: int, started: float, end: float) -> Answer:
    """One streamed request, whatever comes of it."""
    began = time.monotonic()
    prompt = f"Request {number}: explain in a few sentences why the sky is blue on day {number * 7919 % 1000}."
    body = {"model": model, "stream": True, "max_tokens": TOKENS, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Portway-Client": "stress"}
    if target.key:
        headers["Authorization"] = f"Bearer {target.key}"
    connection = _connect(target.url, max(1.0, started + end - began))
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        served_by, ttft, error = _read(connection.getresponse(), began)
    except (OSError, http.client.HTTPException) as exc:
        served_by, ttft, error = "", None, str(exc) or type(exc).__name__
    finally:
        connection.close()
    return Answer(began - started, model, served_by, not error, ttft, time.monotonic() - began, error)


def _read(answer: http.client.HTTPResponse, began: float) -> tuple[str, float | None, str]:
    """(who answered, seconds to the first content, what went wrong) of a stream."""
    if answer.status != 200:
        return "", None, f"{answer.status} {_code(answer.read(65_536))}"
    served_by, ttft, done = answer.headers.get("X-Served-By", ""), None, False
    for line in answer:
        if not line.startswith(b"data: "):
            continue  # a comment of a heartbeat, or an empty line
        if line.startswith(b"data: [DONE]"):
            done = True
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            return served_by, ttft, str(chunk["error"].get("code"))
        served_by = served_by or chunk.get("portway", {}).get("served_by", "")
        if ttft is None and _has_content(chunk):
            ttft = time.monotonic() - began
    return served_by, ttft, "" if done else "the stream had no end"


def _has_content(chunk: Mapping[str, Any]) -> bool:
    deltas = [choice.get("delta", {}) for choice in chunk.get("choices", ())]
    return any(delta.get("content") or delta.get("reasoning_content") for delta in deltas)


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "no reason told"


def _connect(url: str, patience: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=patience)


# --- looking at the machine ------------------------------------------------------------------


def look_at_stand_in(shared: Memory) -> Look:
    """The stand-ins' memory is all there is to a simulated machine."""
    return Look(models=shared.stats().resident, budget=shared.budget)


def look_at_machine() -> Look:
    """This machine, by /proc or by macOS's programs."""
    if sys.platform == "darwin":
        processes = parse_ps(_output("/bin/ps", "-axo", "pid=,ppid=,rss=,comm="))
        pageouts, swapped = parse_vm_stat(_output("/usr/bin/vm_stat"))
    else:
        processes = list(read_processes("/proc"))
        pageouts, swapped = parse_vmstat(_text(Path("/proc/vmstat")))
    reading = memory.read()
    free = float(reading.free_percent) if reading.free_percent is not None else None
    if free is None and reading.total and reading.available is not None:
        free = 100 * reading.available / reading.total
    return Look(models=tree_rss(processes), free=free, pageouts=pageouts, swapped=swapped)


class Process(NamedTuple):
    """rss: bytes."""

    pid: int
    parent: int
    rss: int
    name: str


def tree_rss(processes: Iterable[Process]) -> int | None:
    """Bytes of the model servers and all that they have started; None if there are none. Ollama's runners are
    other processes than the server, and hold the models."""
    processes = list(processes)
    children: dict[int, list[Process]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    todo = [process for process in processes if SERVERS.match(process.name)]
    counted: dict[int, int] = {}
    while todo:
        process = todo.pop()
        if process.pid not in counted:
            counted[process.pid] = process.rss
            todo += children.get(process.pid, [])
    return sum(counted.values()) if counted else None


def parse_ps(text: str) -> list[Process]:
    """`ps -axo pid=,ppid=,rss=,comm=`, with KiB and a program's path, which may have blanks in it."""
    rows = re.findall(r"^\s*(\d+)\s+(\d+)\s+(\d+)\s+(.+?)\s*$", text, re.MULTILINE)
    return [Process(int(pid), int(parent), int(rss) * 1024, name.rpartition("/")[2]) for pid, parent, rss, name in rows]


def read_processes(root: str) -> Iterator[Process]:
    """The same from Linux's /proc."""
    page = os.sysconf("SC_PAGE_SIZE")
    for folder in Path(root).iterdir():
        stat = _text(folder / "stat") if folder.name.isdecimal() else ""
        found = re.fullmatch(r"(\d+) \((.*)\) \S (\d+) (.*)\n?", stat, re.DOTALL)  # a name may hold anything
        if found is not None:
            yield Process(int(found[1]), int(found[3]), int(found[4].split()[19]) * page, found[2])


def parse_vmstat(text: str) -> tuple[int | None, int | None]:
    """(pages written out, bytes swapped out) of /proc/vmstat since boot."""
    values = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    swapped = values.get("pswpout")
    return _whole(values.get("pgpgout")), None if swapped is None else int(swapped) * os.sysconf("SC_PAGE_SIZE")


def parse_vm_stat(text: str) -> tuple[int | None, int | None]:
    """(pageouts, bytes swapped out) of macOS's vm_stat since boot."""
    page = re.search(r"page size of (\d+) bytes", text)
    values = {name: int(number) for name, number in re.findall(r"^([A-Z]\w+):\s+(\d+)\.?$", text, re.MULTILINE)}
    swapped = values.get("Swapouts")
    return values.get("Pageouts"), int(page[1]) * swapped if page and swapped is not None else None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""  # it has ended


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


# --- the verdict -----------------------------------------------------------------------------


def judge(told: Told, target: Target) -> dict[str, Any]:
    """The JSON document: what was asked and answered, what memory did, and whether that was thrashing."""
    why = [*_swapping(told.samples), *_overcommitted(told, target)]
    answered = sum(answer.ok for answer in told.answers)
    failed = len(told.answers) - answered + told.waiting
    verdict = "thrashed" if why else "calm" if answered else "nothing answered"
    if not why:
        calm = "no swapping" if target.memory is None else "no moment over the budget"
        why = [f"{answered} answered, {failed} failed, {calm}"]
    return {
        "verdict": verdict,
        "why": why,
        "simulated": target.memory is not None,
        "residency": target.residency,
        "requests": len(told.answers) + told.waiting,
        "answered": answered,
        "failed": failed,
        "demoted": sum(_demoted(answer) for answer in told.answers),
        "seconds": round(max((sample.at for sample in told.samples), default=0.0), 2),
        "models": {name: _of_model(name, told.answers) for name in sorted({each.model for each in told.answers})},
        "memory": _of_memory(told.samples, target),
    }


def _demoted(answer: Answer) -> bool:
    return answer.ok and answer.served_by not in ("", answer.model)


def _swapping(samples: Sequence[Sample]) -> Iterator[str]:
    swapped = [sample.look.swapped for sample in samples if sample.look.swapped is not None]
    if swapped and swapped[-1] - swapped[0] > SWAPPED:
        yield f"{(swapped[-1] - swapped[0]) / 1e9:.1f} GB were swapped out"
    free = [sample.look.free for sample in samples if sample.look.free is not None]
    tight = sum(percent < STALL for percent in free)
    if free and tight > len(free) / 4:
        yield f"less than {STALL} % of the memory was free in {100 * tight // len(free)} % of the samples"


def _overcommitted(told: Told, target: Target) -> Iterator[str]:
    """The stand-ins count each load, so that no moment between two samples is missed."""
    if target.memory is None or target.memory.budget is None:
        return
    stats = target.memory.stats()
    if stats.overcommits:
        over = (stats.peak - target.memory.budget) / 1e9
        moments = sum((sample.look.models or 0) > target.memory.budget for sample in told.samples)
        yield (
            f"{stats.overcommits} of {stats.loads} loads left more in memory than there is, by up to {over:.1f} GB, "
            f"and so did {moments} of {len(told.samples)} samples"
        )
    if stats.loads > max(MANY_LOADS, len(told.answers) / 3):
        yield f"{stats.loads} loads for {len(told.answers)} requests"


def _of_model(name: str, answers: Iterable[Answer]) -> dict[str, Any]:
    own = [answer for answer in answers if answer.model == name]
    ttfts = sorted(answer.ttft for answer in own if answer.ttft is not None)
    errors: dict[str, int] = {}
    for answer in own:
        if not answer.ok:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    return {
        "requests": len(own),
        "answered": sum(answer.ok for answer in own),
        "demoted": sum(_demoted(answer) for answer in own),
        "ttft_p50_s": quantile(ttfts, 0.5),
        "ttft_p95_s": quantile(ttfts, 0.95),
        "errors": errors,
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The value below which `share` of them lie; None of nothing."""
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None


def _of_memory(samples: Sequence[Sample], target: Target) -> dict[str, Any]:
    def grown(name: str) -> int | None:
        values = [getattr(sample.look, name) for sample in samples if getattr(sample.look, name) is not None]
        return values[-1] - values[0] if values else None

    peak = max((sample.look.models for sample in samples if sample.look.models is not None), default=None)
    free = min((sample.look.free for sample in samples if sample.look.free is not None), default=None)
    document: dict[str, Any] = {
        "peak_bytes": peak,
        "least_free_percent": None if free is None else round(free, 1),
        "pageouts": grown("pageouts"),
        "swapped_out_bytes": grown("swapped"),
        "samples": len(samples),
    }
    if target.memory is not None:
        stats = target.memory.stats()
        document |= {"peak_bytes": stats.peak, "budget_bytes": target.memory.budget, "loads": stats.loads}
        document["samples_over_budget"] = sum(
            (each.look.models or 0) > (target.memory.budget or math.inf) for each in samples
        )
        document |= {"unloads": stats.unloads, "overcommits": stats.overcommits}
    return document


# --- drawing ---------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Points over time; limit: a line that they should stay under."""

    name: str
    points: Sequence[tuple[float, float]]
    limit: float | None = None


def curves(told: Told) -> list[Curve]:
    """What can be drawn of a run."""
    samples = told.samples
    budget = next((sample.look.budget for sample in samples if sample.look.budget), None)
    first_out = next((sample.look.pageouts for sample in samples if sample.look.pageouts is not None), 0) or 0
    first_swap = next((sample.look.swapped for sample in samples if sample.look.swapped is not None), 0) or 0
    answers = sorted(told.answers)
    demoted = [answer for answer in answers if _demoted(answer)]
    drawn = [
        Curve("models, GB", _points(samples, lambda look: look.models, 1e9), budget / 1e9 if budget else None),
        Curve("memory free, %", _points(samples, lambda look: look.free, 1)),
        Curve("paged out, pages", [(at, value - first_out) for at, value in _points(samples, lambda x: x.pageouts, 1)]),
        Curve(
            "swapped out, GB",
            [(at, value - first_swap / 1e9) for at, value in _points(samples, lambda x: x.swapped, 1e9)],
        ),
        Curve("waiting clients", [(sample.at, float(sample.waiting)) for sample in samples]),
        Curve("first token, s", [(each.at + each.ttft, each.ttft) for each in answers if each.ttft is not None]),
        Curve("demotions", [(each.at, float(number)) for number, each in enumerate(demoted, 1)]),
    ]
    return [curve for curve in drawn if curve.points]


def _points(samples: Iterable[Sample], of: Callable[[Look], float | None], unit: float) -> list[tuple[float, float]]:
    return [(sample.at, value / unit) for sample in samples if (value := of(sample.look)) is not None]


def drawn(told: Told, target: Target) -> Iterator[str]:
    """A line for each curve, darker where it is higher; "!" where it is over its limit."""
    end = max((sample.at for sample in told.samples), default=0.0)
    yield f"{target.what}: {end:.1f} s from left to right"
    for curve in curves(told):
        top = max(value for _, value in curve.points)
        yield f"{curve.name:17}|{_row(curve, end, top)}| up to {top:.4g}" + (
            f", of {curve.limit:.4g}" if curve.limit is not None else ""
        )


def _row(curve: Curve, end: float, top: float) -> str:
    columns = [-1.0] * WIDTH
    for at, value in curve.points:
        column = min(WIDTH - 1, int(at / end * WIDTH)) if end else 0
        columns[column] = max(columns[column], value)
    cells = []
    for value in columns:
        if curve.limit is not None and value > curve.limit:
            cells.append("!")
        else:
            cells.append(RAMP[round(max(0.0, value) / top * (len(RAMP) - 1))] if top > 0 else " ")
    return "".join(cells)


def as_svg(told: Told, target: Target, document: Mapping[str, Any]) -> str:
    """The same as one SVG: a panel for each curve."""
    end = max((sample.at for sample in told.samples), default=0.0) or 1.0
    shown, width, height = curves(told), 800, 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(shown) + 60}" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="15">{escape(target.what)}</text>',
        f'<text x="10" y="40">{escape(document["verdict"] + ": " + "; ".join(document["why"]))}</text>',
    ]
    for index, curve in enumerate(shown):
        parts += _panel(curve, end, 60 + index * height, width, height)
    return "\n".join([*parts, "</svg>", ""])


def _panel(curve: Curve, end: float, y: int, width: int, height: int) -> Iterator[str]:
    left, right, low, high = 130, width - 20, y + height - 20, y + 10
    top = max([value for _, value in curve.points] + ([curve.limit] if curve.limit is not None else [])) or 1.0

    def place(at: float, value: float) -> str:
        return f"{left + (right - left) * min(at, end) / end:.1f},{low - (low - high) * max(0.0, value) / top:.1f}"

    yield f'<text x="10" y="{y + height / 2:.0f}">{escape(curve.name)}</text>'
    yield f'<text x="{left - 6}" y="{high + 6}" text-anchor="end">{top:.4g}</text>'
    yield f'<text x="{left - 6}" y="{low}" text-anchor="end">0</text>'
    yield f'<path d="M{left},{high}V{low}H{right}" fill="none" stroke="#999"/>'
    line = " ".join(place(at, value) for at, value in curve.points)
    yield f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>'
    if curve.limit is not None:
        limit = f"{place(0, curve.limit)} {place(end, curve.limit)}"
        yield f'<polyline points="{limit}" fill="none" stroke="#d62728" stroke-dasharray="5,4"/>'


if __name__ == "__main__":
    sys.exit(main())
