"""One comparison: several targets asked the same in turn, in short rounds, so that what else the machine does
meanwhile hits all of them alike. A figure is the median of its rounds; its spread stands beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.benchmark.native import Ask, Load, Shape, Target
from scripts.benchmark.world import World, cpu_seconds

WARM_UP = Shape(seconds=0.15)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure must reach: at most `limit`, or at least. key: a path into the measurement, like added.p50_us."""

    key: str
    limit: float
    at_least: bool = False


@dataclass(slots=True)
class Measurement:
    """What came of one comparison. what: whole, first or ages (load.c); figures: by target, then by name."""

    name: str
    what: str
    figures: dict[str, dict[str, float]]
    goals: Sequence[Goal] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def value(self, key: str) -> float | None:
        """What stands under portway.p50_us, added.p50_us, ratio.rate and the like: `added` is Portway less direct,
        `ratio` Portway by direct, anything else a target's or a note's name."""
        whose, _, name = key.partition(".")
        if whose not in ("added", "ratio"):
            source = self.notes if whose == "notes" else self.figures.get(whose, {})
            return source.get(name)
        ours, base = self.figures.get("portway", {}).get(name), self.figures.get("direct", {}).get(name)
        if ours is None or base is None or (whose == "ratio" and not base):
            return None
        return ours - base if whose == "added" else ours / base

    def meets(self, goal: Goal) -> bool | None:
        """Whether it does; None if the figure is not known. Less than nothing added is noise, and no merit."""
        value = self.value(goal.key)
        if value is None or (goal.key.startswith("added.") and value < 0):
            return None
        return value >= goal.limit if goal.at_least else value <= goal.limit

    def document(self) -> dict[str, Any]:
        """For the JSON."""
        others = [name for name in self.figures if name != "direct"]
        added = {name: _difference(self.figures[name], self.figures.get("direct")) for name in others}
        goals = [
            {"key": g.key, "limit": g.limit, "at_least": g.at_least, "value": self.value(g.key), "met": self.meets(g)}
            for g in self.goals
        ]
        return {
            "name": self.name,
            "what": self.what,
            "targets": self.figures,
            "added": {name: each for name, each in added.items() if each},
            "goals": goals,
            "notes": self.notes,
            "problems": self.problems,
        }


def compare(
    world: World,
    name: str,
    targets: Mapping[str, Target],
    ask: Ask,
    shape: Shape,
    *,
    what: str = "whole",
    rounds: int = 5,
    goals: Sequence[Goal] = (),
) -> Measurement:
    """Ask each target in turn, `rounds` times."""
    runs: dict[str, list[dict[str, Any]]] = {each: [] for each in targets}
    for target in targets.values():
        _ask_once(world, target, ask, warm_up(shape))
    order = list(targets)
    for number in range(rounds):
        for each in order if number % 2 == 0 else reversed(order):  # nobody always comes behind the same one
            runs[each].append(_ask_once(world, targets[each], ask, shape))
    figures = {each: summary(results, what) for each, results in runs.items()}
    measurement = Measurement(name, what, figures, goals)
    for each, results in runs.items():
        measurement.problems += [f"{each}: {text}" for result in results if (text := _problem(result))]
    return measurement


def warm_up(shape: Shape) -> Shape:
    """A short run of the same shape: connections are made, code is warm. Long streams are asked for once."""
    count = min(shape.connections, shape.count) if shape.count else 0
    return Shape(shape.connections, WARM_UP.seconds, count, shape.fresh, shape.ramp_ms)


def _ask_once(world: World, target: Target, ask: Ask, shape: Shape) -> dict[str, Any]:
    pids = (target.cpu_of or 0, world.upstream_pid)
    before = [cpu_seconds(pid) for pid in pids]
    result = Load(world.tools, world.folder, target, ask, shape).result()
    used = [_difference_of(cpu_seconds(pid), was) for pid, was in zip(pids, before, strict=True)]
    result["load_busy"] = result["cpu"] / result["seconds"]
    if used[1] is not None:
        result["upstream_busy"] = used[1] / result["seconds"]
    if used[0] is not None and target.cpu_of and result["answers"]:
        result["cpu_us"] = used[0] * 1e6 / result["answers"]
    return result


def _difference_of(now: float | None, was: float | None) -> float | None:
    return None if now is None or was is None else now - was


def summary(results: Sequence[Mapping[str, Any]], what: str) -> dict[str, float]:
    """Medians over the rounds; p50_low and p50_high are the rounds' extremes."""
    timed = [result[what] for result in results if result[what]]
    figures: dict[str, float] = {"answers": sum(result["answers"] for result in results)}
    if timed:
        p50s = [each["p50"] for each in timed]
        figures["p50_us"] = statistics.median(p50s)
        figures["p50_low_us"], figures["p50_high_us"] = min(p50s), max(p50s)
        figures["p99_us"] = statistics.median(each["p99"] for each in timed)
        figures["max_us"] = max(each["max"] for each in timed)
    counted = "stamps" if what == "ages" else "answers"
    figures["rate"] = statistics.median(result[counted] / result["seconds"] for result in results)
    for name in ("cpu_us", "load_busy", "upstream_busy"):
        if all(name in result for result in results):
            figures[name] = statistics.median(result[name] for result in results)
    return {name: round(value, 2) for name, value in figures.items()}


def _problem(result: Mapping[str, Any]) -> str:
    bad = result["errors"] + result["unfinished"]
    said = " ".join(result["problem"].split())[:120]
    return f"{result['errors']} errors, {result['unfinished']} unfinished. {said}" if bad else ""


def _difference(ours: Mapping[str, float], base: Mapping[str, float] | None) -> dict[str, float]:
    if not base:
        return {}
    added = {name: round(ours[name] - base[name], 2) for name in ("p50_us", "p99_us") if name in ours and name in base}
    if base.get("rate"):
        added["rate_ratio"] = round(ours["rate"] / base["rate"], 4)
    return added
