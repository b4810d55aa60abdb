"""What came of a run: a table for people, a document for programs, docs/performance.md."""

from __future__ import annotations

import os
import platform
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmark.measure import Measurement
from scripts.benchmark.native import Tools
from scripts.benchmark.world import ROOT

HEADINGS = ("measurement", "who", "p50 us", "p99 us", "per s", "CPU us", "added p50", "added p99", "x direct")

QUIET = 0.25  # of each processor, over the last minute: what may go on beside a measurement

INTRODUCTION = """\
# Performance

This page is written by the benchmark; do not edit it. To repeat it on your machine, with nothing else running, a C
compiler and Linux:

```sh
python3 scripts/bench.py {words}
```

`--quick` takes a minute, `--only NAME` one scenario, `--peers` adds what is installed of nginx, haproxy, LiteLLM and
Portkey (their commands `nginx`, `haproxy`, `litellm` and `gateway` on PATH), `--write FILE` writes this page.

Load generator and upstream are C programs of one thread each on the same machine, so that all three share its
processors; `direct` is the upstream asked without anything between. Everybody is asked the same, in turn, in short
rounds; a figure is the median of its rounds. "added" is a figure less that of `direct`; "x direct" the ratio of the
rates. Times are microseconds. What each measurement does stands in `scripts/benchmark/scenarios.py`.
"""


def rows(measurement: Measurement) -> Iterable[Sequence[str]]:
    """A line for each target, as HEADINGS has them."""
    document = measurement.document()
    for name, figures in measurement.figures.items():
        added = document["added"].get(name, {})
        yield (
            measurement.name,
            name,
            *(_number(figures.get(key)) for key in ("p50_us", "p99_us", "rate", "cpu_us")),
            *(_number(added.get(key)) for key in ("p50_us", "p99_us", "rate_ratio")),
        )


def lines(measurement: Measurement) -> Iterable[str]:
    """For the terminal, as soon as it is known."""
    for row in rows(measurement):
        yield "{:<44} {:>9} {:>10} {:>10} {:>10} {:>8} {:>10} {:>10} {:>8}".format(*row)
    for text in remarks(measurement):
        yield f"    {text}"


def remarks(measurement: Measurement) -> Iterable[str]:
    """Goals, notes and problems."""
    for goal in measurement.goals:
        verdict = {True: "met", False: "MISSED", None: "not known"}[measurement.meets(goal)]
        sign = ">=" if goal.at_least else "<="
        yield f"goal {goal.key} {sign} {goal.limit:g}: {verdict} ({_number(measurement.value(goal.key))})"
    if measurement.notes:
        yield ", ".join(f"{name} {_number(value)}" for name, value in measurement.notes.items())
    yield from (f"PROBLEM {text}" for text in dict.fromkeys(measurement.problems))


def document(measurements: Sequence[Measurement], about: dict[str, Any]) -> dict[str, Any]:
    """The whole run."""
    return {"about": about, "measurements": [measurement.document() for measurement in measurements]}


def markdown(measurements: Sequence[Measurement], about: dict[str, Any], words: Sequence[str]) -> str:
    """docs/performance.md."""
    parts = [INTRODUCTION.format(words=" ".join(words)), "| | |\n|---|---|"]
    parts[-1] += "".join(f"\n| {name} | {value} |" for name, value in about.items())
    parts.append("\n## Goals\n\n| measurement | figure | goal | is | |\n|---|---|---|---|---|")
    parts[-1] += "".join(f"\n| {' | '.join(row)} |" for each in measurements for row in _goal_rows(each))
    parts.append("\n## Figures\n\n| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    parts[-1] += "".join(f"\n| {' | '.join(row)} |" for each in measurements for row in rows(each))
    noted = [each for each in measurements if each.notes or each.problems]
    parts.append("\n## Notes\n")
    for each in noted:
        said = [text for text in remarks(each) if not text.startswith("goal ")]
        parts.append(f"- {each.name}: {'; '.join(said)}")
    return "\n".join(parts) + "\n"


def _goal_rows(measurement: Measurement) -> Iterable[Sequence[str]]:
    for goal in measurement.goals:
        verdict = {True: "met", False: "**missed**", None: "not known"}[measurement.meets(goal)]
        limit = f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
        yield measurement.name, goal.key, limit, _number(measurement.value(goal.key)), verdict


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def about(tools: Tools) -> dict[str, Any]:
    """The machine, the programs and what else went on, at the start."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "python": f"{platform.python_implementation()} {platform.python_version()}{_build()}",
        "its speed": _speed(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "processors": os.cpu_count(),
        "load average at the start": _load_average() + _warning(),
        "load generator and upstream": tools.made_by,
    }


def _build() -> str:
    """What is known of it: one without profile-guided optimization is a fifth slower. Builds say so by what they were
    configured with, or by a compiler's flag; some that are (Debian's) keep neither, so that silence means nothing."""
    said = [str(value) for name, value in sysconfig.get_config_vars().items() if name != "PGO_PROF_USE_FLAG"]
    guided = any("--enable-optimizations" in text or "-fprofile-use" in text for text in said)
    threads = ", free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return f"{threads}, built {'with profile-guided optimization' if guided else 'with optimizations unknown'}"


def _speed() -> str:
    """How fast the interpreter is by itself, whatever its build: a fixed piece of work, the best of ten."""
    times = []
    for _ in range(10):
        started = time.perf_counter()
        total = 0
        for number in range(200_000):
            total += number & 7
        times.append(time.perf_counter() - started)
    return f"{min(times) * 1000:.1f} ms for a loop of 200,000 rounds"


def finish(about: dict[str, Any], measurements: Sequence[Measurement], seconds: float) -> None:
    """What is only known at the end: among it, whether those who measure were ever what held things up."""
    for role, name in (("load_busy", "load generator"), ("upstream_busy", "upstream")):
        shares = [(figures[role], each.name) for each, figures in _through_portway(measurements) if role in figures]
        if shares:
            share, where = max(shares)
            about[f"{name} at its busiest"] = f"{share:.0%} of a processor, in: {where}"
    ratios = [
        (direct["rate"] / figures["rate"], each.name)
        for each, figures in _through_portway(measurements)
        if (direct := each.figures.get("direct")) and "cpu_us" not in direct  # else it is a Portway, too
        if each.what == "whole" and figures["rate"] and not each.name.startswith("cache hit")  # which ask nobody
    ]
    if ratios:
        about["without Portway between"] = "at least {:.1f} times as many answers, in: {}".format(*min(ratios))
    about["load average at the end"] = f"{_load_average()} (the benchmark's own load included)"
    about["seconds"] = round(seconds)


def _through_portway(measurements: Sequence[Measurement]) -> Iterable[tuple[Measurement, dict[str, float]]]:
    return [(each, each.figures["portway"]) for each in measurements if "portway" in each.figures]


def _warning() -> str:
    busy = os.getloadavg()[0] > QUIET * (os.cpu_count() or 1)
    return ": THE MACHINE IS NOT QUIET, SO TIMES AND RATES MEAN LITTLE" if busy else ""


def _load_average() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
