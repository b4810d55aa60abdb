"""What is measured. Each scenario takes the world and how thorough to be, and gives its measurements.

The goals beside them are what the project wants to reach on a machine with two processors; whether they are met
stands in the report. `direct` is always the upstream itself, asked the same by the same load generator.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from scripts.benchmark.filling import fill
from scripts.benchmark.measure import Goal, Measurement, compare, summary
from scripts.benchmark.native import Ask, Load, Shape, Target, requests
from scripts.benchmark.world import FLOOD, PACED, PLAIN, ROOT, SLOW, TOOLS, Portway, World, memory

LARGE = 200 * 1024  # bytes of body
STREAMS = 1000  # open at once
# of the goals' rates at the rate that the upstream itself had where they were set: a faster machine is asked for more
SHARE_OF_DIRECT = 15_000 / 130_000
PINNED_SHARE = 25_000 / 130_000
FLAT = 1.25  # times the time of a hit among the fewest entries
WARM = 2000  # requests after which every thread and buffer of 16 connections is there
CHUNKS_OF_SLOW = 50  # what the upstream sends for the model SLOW
LATE_US = 100_000  # a chunk is late when the next one is already due


@dataclass(frozen=True, slots=True)
class Effort:
    """How thorough. seconds: of one round. many: requests after which memory is looked at again."""

    rounds: int = 7
    seconds: float = 0.6
    many: int = 100_000
    entries: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    starts: int = 9
    processes: int = 40


QUICK = Effort(rounds=3, seconds=0.25, many=5_000, entries=(1_000, 20_000), starts=3, processes=10)

Scenario = Callable[[World, Effort], Iterator[Measurement]]


# --- plain answers --------------------------------------------------------------------------------


def plain(world: World, effort: Effort) -> Iterator[Measurement]:
    """A 2 KB body on kept connections. `portway` looks into the cache, finds nothing and stores each answer, as
    every prompt is another one; `uncached` is a model without a cache."""
    targets = {
        "direct": world.direct(PLAIN),
        "portway": world.portway.target(f"cached-{PLAIN}"),
        "uncached": world.portway.target(f"openai-{PLAIN}"),
    }
    goals = {
        1: (Goal("added.p50_us", 60), Goal("added.p99_us", 400)),
        16: (Goal("portway.rate", 15_000, at_least=True), Goal("ratio.rate", SHARE_OF_DIRECT, at_least=True)),
        64: (Goal("portway.rate", 15_000, at_least=True),),
    }
    for connections, wanted in goals.items():
        name = f"plain, 2 KB, {_counted(connections, 'connection')}"
        shape = Shape(connections, effort.seconds)
        yield compare(world, name, targets, Ask(unique=True), shape, rounds=effort.rounds, goals=wanted)


def pinned(world: World, effort: Effort) -> Iterator[Measurement]:
    """The same with the daemon kept on one processor: `portway` stores each answer, `uncached` none."""
    with world.start("pinned") as daemon:
        daemon.keep_on_one_processor()
        targets = {
            "direct": world.direct(PLAIN),
            "portway": daemon.target(f"cached-{PLAIN}"),
            "uncached": daemon.target(f"openai-{PLAIN}"),
        }
        goals = (Goal("portway.rate", 25_000, at_least=True), Goal("ratio.rate", PINNED_SHARE, at_least=True))
        name = "plain, 2 KB, 16 connections, on one processor"
        yield compare(
            world, name, targets, Ask(unique=True), Shape(16, effort.seconds), rounds=effort.rounds, goals=goals
        )


def large(world: World, effort: Effort) -> Iterator[Measurement]:
    """A 200 KB body."""
    limits = {"openai": 150.0, "ollama": 800.0}
    for connections in (1, 16, 64):
        for kind, limit in limits.items():
            targets = _pair(world, PLAIN, kind)
            goals = (Goal("added.p50_us", limit),) if connections == 1 else ()
            name = f"plain, 200 KB, {kind}, {_counted(connections, 'connection')}"
            shape = Shape(connections, effort.seconds)
            yield compare(world, name, targets, Ask(LARGE), shape, rounds=effort.rounds, goals=goals)


def fresh(world: World, effort: Effort) -> Iterator[Measurement]:
    """A new connection for each request."""
    for size, label in ((2048, "2 KB"), (LARGE, "200 KB")):
        for connections in (1, 16, 64):
            name = f"plain, {label}, new connections, {connections} at once"
            shape = Shape(connections, effort.seconds, fresh=True)
            yield compare(world, name, _pair(world, PLAIN), Ask(size), shape, rounds=effort.rounds)


def translated(world: World, effort: Effort) -> Iterator[Measurement]:
    """A plain answer put together from Ollama's stream of 16 lines."""
    for connections in (1, 16, 64):
        name = f"plain, 2 KB, ollama, {_counted(connections, 'connection')}"
        shape = Shape(connections, effort.seconds)
        yield compare(world, name, _pair(world, PLAIN, "ollama"), Ask(), shape, rounds=effort.rounds)


# --- streams --------------------------------------------------------------------------------------


def first(world: World, effort: Effort) -> Iterator[Measurement]:
    """Time to the first chunk with text."""
    for size, label in ((2048, "2 KB"), (LARGE, "200 KB")):
        for kind in ("openai", "ollama"):
            yield compare(
                world,
                f"stream, first chunk, {label}, {kind}",
                _pair(world, PLAIN, kind),
                Ask(size, stream=True),
                Shape(1, effort.seconds),
                what="first",
                rounds=effort.rounds,
                goals=(Goal("added.p50_us", 90),) if size == 2048 else (),
            )


def paced(world: World, effort: Effort) -> Iterator[Measurement]:
    """How long a chunk is on its way: 1 and 50 streams of 100 chunks, 20 ms apart."""
    for kind in ("openai", "ollama"):
        for streams in (1, 50):
            goals = (Goal("added.p50_us", 50), Goal("added.p99_us", 500)) if streams == 50 else ()
            shape = Shape(streams, 1.0, count=streams, ramp_ms=20 if streams == 50 else 0)
            yield compare(
                world,
                f"stream, each chunk, {kind}, {_counted(streams, 'stream')} at 20 ms",
                _pair(world, PACED, kind),
                Ask(stream=True),
                shape,
                what="ages",
                rounds=max(1, effort.rounds // 3),
                goals=goals,
            )


def flood(world: World, effort: Effort) -> Iterator[Measurement]:
    """One stream of 20,000 chunks, as fast as it is read."""
    goals = {
        "openai": (Goal("ratio.rate", 0.7, at_least=True), Goal("portway.rate", 150_000, at_least=True)),
        "ollama": (Goal("portway.rate", 80_000, at_least=True),),
    }
    for kind, wanted in goals.items():
        yield compare(
            world,
            f"stream, flood, {kind}",
            _pair(world, FLOOD, kind),
            Ask(stream=True),
            Shape(1, 30.0, count=2),
            what="ages",
            rounds=effort.rounds,
            goals=wanted,
        )


def thousand(world: World, _effort: Effort) -> Iterator[Measurement]:
    """1,000 open streams of 50 chunks, 100 ms apart. The default of server.max_requests is lower: it is raised here."""
    shape = Shape(STREAMS, 10.0, count=STREAMS, ramp_ms=1000)
    for kind in ("openai", "ollama"):
        with world.start(f"thousand-{kind}", f"[server]\nmax_requests = {STREAMS + 100}\n") as daemon:
            measurement = Measurement(f"stream, {STREAMS:,} open at 100 ms, {kind}", "ages", {})
            measurement.goals = (Goal("notes.portway_lost", 0), Goal("notes.portway_max_us", LATE_US))
            _open_many(world, measurement, "direct", world.direct(SLOW, ollama=kind == "ollama"), shape)
            _open_many(world, measurement, "portway", daemon.target(f"{kind}-{SLOW}"), shape)
            yield measurement


def _open_many(world: World, measurement: Measurement, name: str, target: Target, shape: Shape) -> None:
    """One run; its process is looked at when all streams are open."""
    load = Load(world.tools, world.folder, target, Ask(stream=True), shape)
    time.sleep(shape.ramp_ms / 1000 + 2)
    if target.cpu_of:
        measurement.notes |= memory(target.cpu_of)
    result = load.result()
    measurement.figures[name] = summary([result], "ages")
    measurement.notes[f"{name}_lost"] = STREAMS * CHUNKS_OF_SLOW - result["stamps"]
    measurement.notes[f"{name}_max_us"] = result["ages"]["max"] if result["ages"] else None
    if result["errors"] or result["unfinished"]:
        measurement.problems.append(f"{name}: {result['errors']} errors, {result['unfinished']} unfinished")


def tools(world: World, effort: Effort) -> Iterator[Measurement]:
    """A tool call in the answer, plain and streamed."""
    for kind in ("openai", "ollama"):
        for stream in (False, True):
            name = f"tool call, {kind}, {'streamed' if stream else 'plain'}"
            ask, shape = Ask(stream=stream, tools=True), Shape(1, effort.seconds)
            yield compare(world, name, _pair(world, TOOLS, kind), ask, shape, rounds=effort.rounds)


# --- Portway's own --------------------------------------------------------------------------------


def demotion(world: World, effort: Effort) -> Iterator[Measurement]:
    """What one failed attempt adds: a first target that answers 404. Here `direct` is Portway without it."""
    targets = {"direct": world.portway.target(f"openai-{PLAIN}"), "portway": world.portway.target("demoted")}
    yield compare(world, "demotion, one step", targets, Ask(), Shape(1, effort.seconds), rounds=effort.rounds)


def cache(world: World, effort: Effort) -> Iterator[Measurement]:
    """A hit, plain and streamed, at the socket."""
    for stream in (False, True):
        targets = {"direct": world.direct(PLAIN), "portway": world.portway.target(f"cached-{PLAIN}")}
        goals = (Goal("portway.p50_us", 120),)
        name = f"cache hit, {'streamed' if stream else 'plain'}"
        for connections in (1, 16):
            yield compare(
                world,
                f"{name}, {_counted(connections, 'connection')}",
                targets,
                Ask(stream=stream, prompts=10),
                Shape(connections, effort.seconds),
                rounds=effort.rounds,
                goals=goals if connections == 1 else (),
            )


def entries(world: World, effort: Effort) -> Iterator[Measurement]:
    """Hits on 1,000 prompts in a cache with many other answers."""
    ask = Ask(prompts=1000)
    fewest = 0.0
    for count in effort.entries:
        name = f"entries-{count}"
        extra = '[cache]\nmax_size = "8GB"\n'
        with world.start(name, extra) as daemon:
            _warm(world, daemon.target(f"cached-{PLAIN}"), ask)
        fill(world.folder / name / ".cache" / "portway" / "cache.sqlite3", count - ask.prompts)
        with world.start(name, extra) as daemon:
            time.sleep(0.3)  # its first look at the file, and for what has expired
            idle = memory(daemon.pid)
            measurement = compare(
                world,
                f"cache hit among {count:,} entries",
                {"direct": world.direct(PLAIN), "portway": daemon.target(f"cached-{PLAIN}")},
                ask,
                Shape(1, effort.seconds),
                rounds=effort.rounds,
                goals=(Goal("portway.p50_us", 120), Goal("notes.times_fewest", FLAT)),
            )
            p50 = measurement.figures["portway"]["p50_us"]
            fewest = fewest or p50
            used = memory(daemon.pid)
            measurement.notes |= {"idle_rss_mb": idle["rss_mb"], "rss_mb": used["rss_mb"]}
            measurement.notes |= {"start_s": round(daemon.start_s, 3), "times_fewest": round(p50 / fewest, 2)}
            yield measurement


def models(world: World, effort: Effort) -> Iterator[Measurement]:
    """With 8 and with 800 more models configured."""
    for count in (8, 800):
        with world.start(f"models-{count}", models=count) as daemon:
            measurement = compare(
                world,
                f"plain, 2 KB, {count} more models",
                {"direct": world.direct(PLAIN), "portway": daemon.target(f"openai-{PLAIN}")},
                Ask(),
                Shape(1, effort.seconds),
                rounds=effort.rounds,
            )
            measurement.notes |= {**memory(daemon.pid), "start_s": round(daemon.start_s, 3)}
            yield measurement


def log(world: World, effort: Effort) -> Iterator[Measurement]:
    """Log and metrics on and off; `direct` is off, with the metrics taken out. The processor time is what tells."""
    with world.start("unlogged", "[log]\nenabled = false\n", metrics=False) as daemon:
        targets = {"direct": daemon.target(f"openai-{PLAIN}"), "portway": world.portway.target(f"openai-{PLAIN}")}
        for connections in (1, 16):
            yield compare(
                world,
                f"log and metrics on against off, {_counted(connections, 'connection')}",
                targets,
                Ask(),
                Shape(connections, effort.seconds),
                rounds=2 * effort.rounds,
                goals=(Goal("ratio.p50_us", 1.05), Goal("ratio.cpu_us", 1.05)),
            )


def ask(world: World, effort: Effort) -> Iterator[Measurement]:
    """`ask` on a hit as a whole process, against the Python that does nothing."""
    home = world.folder / "ask"
    environ = {"PATH": os.defpath, "HOME": str(home), "PORTWAY_URL": f"http://127.0.0.1:{world.portway.port}"}
    install = [sys.executable, "-I", "-S", str(ROOT / "portway"), "ask-install", "--bin", str(home)]
    subprocess.run(install, env=environ, check=True, capture_output=True, timeout=60)
    commands = {
        "direct": [sys.executable, "-I", "-c", "pass"],
        "python -I -S -c pass": [sys.executable, "-I", "-S", "-c", "pass"],  # without site-packages, as ask runs
        "portway": [str(home / "ask"), "-n", "--hit", "What is the time?"],
    }
    for command in commands.values():
        _run_for(command, environ)
    time.sleep(0.5)  # the answer is stored
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(effort.processes):
        for name, command in commands.items():
            times[name].append(_run_for(command, environ))
    figures = {
        name: {
            "p50_us": round(statistics.median(each) * 1e6, 1),
            "p99_us": round(max(each) * 1e6, 1),
            "rate": round(1 / statistics.median(each), 2),
            "answers": len(each),
        }
        for name, each in times.items()
    }
    yield Measurement("ask on a hit, against python3 -I -c pass", "process", figures, (Goal("ratio.p50_us", 1.6),))


def process(world: World, effort: Effort) -> Iterator[Measurement]:
    """Cold start to the first answer; memory, idle and after many requests: of a model without a cache, and of one
    whose every answer is stored."""
    yield _cold_start(world, effort)
    for model in (f"openai-{PLAIN}", f"cached-{PLAIN}"):
        yield _grown(world, effort, model)
    yield _after_large(world, effort)


def _cold_start(world: World, effort: Effort) -> Measurement:
    starts = []
    for number in range(effort.starts):
        with Portway(world.folder, world.upstream, f"start-{number}") as daemon:
            daemon.wait_until_up()
            Load(world.tools, world.folder, daemon.target(f"openai-{PLAIN}"), Ask(), Shape(count=1, seconds=5)).result()
            starts.append(time.perf_counter() - daemon.started)
    notes = {"start_s": round(statistics.median(starts), 4), "slowest_s": round(max(starts), 4)}
    return Measurement("cold start to the first answer", "process", {}, (Goal("notes.start_s", 0.15),), dict(notes))


def _grown(world: World, effort: Effort, model: str) -> Measurement:
    with world.start(f"process-{model}") as daemon:
        target = daemon.target(model)
        Load(world.tools, world.folder, target, Ask(), Shape(count=1, seconds=5)).result()
        idle = memory(daemon.pid)["rss_mb"] or 0.0
        _ask_many(world, target, WARM)
        warm = memory(daemon.pid)["rss_mb"] or 0.0
        figures = {"portway": _ask_many(world, target, effort.many)}
        time.sleep(1.0)  # the log and the cache have written what they have
        after = memory(daemon.pid)
    notes: dict[str, float | None] = {"requests": effort.many, "idle_rss_mb": idle, "warm_rss_mb": warm}
    notes |= {"rss_after_mb": after["rss_mb"], "peak_rss_mb": after["peak_mb"], "threads": after["threads"]}
    notes["grown_mb"] = round((after["rss_mb"] or 0.0) - warm, 2)
    goals = (Goal("notes.idle_rss_mb", 26), Goal("notes.grown_mb", 2))
    return Measurement(f"memory, {model}, 16 connections", "whole", figures, goals, notes)


def _after_large(world: World, effort: Effort) -> Measurement:
    """What prompts of 200 KB on many connections, all of which stay open, leave behind."""
    with world.start("process-large") as daemon:
        target = daemon.target(f"openai-{PLAIN}")
        idle = memory(daemon.pid)["rss_mb"] or 0.0
        load = Load(world.tools, world.folder, target, Ask(LARGE), Shape(64, 600.0, count=effort.many // 50))
        figures = {"portway": summary([load.result()], "whole")}
        time.sleep(1.0)
        after = memory(daemon.pid)
    notes = {"idle_rss_mb": idle, "rss_after_mb": after["rss_mb"], "peak_rss_mb": after["peak_mb"]}
    return Measurement("memory after prompts of 200 KB, 64 connections", "whole", figures, (), notes)


def capacity(world: World, effort: Effort) -> Iterator[Measurement]:
    """What the load generator and the upstream can do with each other: several times what is measured between."""
    target = {"direct": world.direct(PLAIN)}
    yield compare(world, "capacity, plain", target, Ask(), Shape(16, effort.seconds), rounds=effort.rounds)
    shape = Shape(4, 30.0, count=8)
    stream = {"direct": world.direct(FLOOD)}
    yield compare(world, "capacity, chunks", stream, Ask(stream=True), shape, what="ages", rounds=effort.rounds)


SCENARIOS: Mapping[str, Scenario] = {
    "capacity": capacity,
    "plain": plain,
    "pinned": pinned,
    "large": large,
    "fresh": fresh,
    "translated": translated,
    "first": first,
    "paced": paced,
    "flood": flood,
    "thousand": thousand,
    "tools": tools,
    "demotion": demotion,
    "cache": cache,
    "entries": entries,
    "models": models,
    "log": log,
    "ask": ask,
    "process": process,
}
QUICKLY = ("capacity", "plain", "pinned", "translated", "first", "flood", "cache", "demotion", "ask", "process")


def _pair(world: World, model: str, kind: str = "openai") -> dict[str, Target]:
    return {
        "direct": world.direct(model, ollama=kind == "ollama"),
        "portway": world.portway.target(f"{kind}-{model}"),
    }


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _warm(world: World, target: Target, ask: Ask) -> None:
    """Have every prompt's answer stored."""
    Load(world.tools, world.folder, target, ask, Shape(1, 30.0, count=len(requests(target, ask)))).result()


def _ask_many(world: World, target: Target, count: int) -> dict[str, float]:
    shape = Shape(16, 600.0, count=count)
    return summary([Load(world.tools, world.folder, target, Ask(unique=True), shape).result()], "whole")


def _run_for(command: list[str], environ: Mapping[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environ, check=True, capture_output=True, timeout=60)
    return time.perf_counter() - started
