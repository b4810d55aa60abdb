"""The command line: which rows there are, how often each is tried, and what becomes of them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.torture_rows import ROOT, Row, World, crash, load, machine, matrix, report, soak

ATTACKS = "scripts.torture_rows.attacks"


@dataclass(frozen=True, slots=True)
class Effort:
    """How often, and for how long (seconds)."""

    requests: int = 20_000
    kills: int = 50
    stops: int = 20
    reloads: int = 100
    soak: float = 180.0


QUICK = Effort(requests=2000, kills=5, stops=3, reloads=20, soak=25.0)

Rows = Callable[[Effort], Iterator[Row]]


# --- the rows ---------------------------------------------------------------------------------------


def _faults(_: Effort) -> Iterator[Row]:
    yield from matrix.Matrix(matrix.cells()).run()


def _heartbeats(_: Effort) -> Iterator[Row]:
    """The same faults where a stream's client waits, with heartbeats; one row for all of them."""
    rows = matrix.Matrix(matrix.waiting_cells(), matrix.HEARTBEAT).run()
    notes = [f"{row.name}: {row.note}" for row in rows if not row.holds]
    tries, held = sum(row.tries for row in rows), sum(row.held for row in rows)
    yield Row("the waits among them once more, with heartbeats", tries, held, "; ".join(notes))


def _machine(fault: Callable[[], Row]) -> Rows:
    def rows(_: Effort) -> Iterator[Row]:
        try:
            yield fault()
        except machine.NotHere as exc:
            yield Row(_title(fault.__name__), 0, 0, f"not tried: {exc}")

    return rows


def _attack(attack: Callable[[World], Any]) -> Rows:
    """An attack on a daemon of its own, which must be as well as before."""

    def rows(_: Effort) -> Iterator[Row]:
        with World() as world:
            row = attack(world)
            world.check()
            if "unforeseen" in world.portway.said:
                yield Row(row.name, row.tries, min(row.held, row.tries - 1), world.portway.said[-500:])
            else:
                yield Row(row.name, row.tries, row.held, row.note)

    return rows


def _load(*makers: Callable[[Effort], Row]) -> Rows:
    return lambda effort: (make(effort) for make in makers)


def groups() -> Mapping[str, Mapping[str, Rows]]:
    """Title of a part of the table -> name for --only -> what makes its rows."""
    attacks: dict[str, Rows] = {}
    if importlib.util.find_spec(ATTACKS):
        module = importlib.import_module(ATTACKS)
        attacks = {
            name.removeprefix("attack_"): _attack(getattr(module, name))
            for name in vars(module)
            if name.startswith("attack_") and callable(getattr(module, name))
        }
    faults: dict[str, Rows] = {"faults": _faults, "heartbeats": _heartbeats}
    exhausted = {fault.__name__.removeprefix("fault_"): _machine(fault) for fault in machine.FAULTS}
    loads: dict[str, Rows] = {
        "killed_backends": _load(lambda effort: load.fault_killed_backends(effort.requests)),
        "kill_9": _load(lambda effort: crash.fault_kill_9(effort.kills)),
        "sigterm": _load(lambda effort: crash.fault_sigterm(effort.stops)),
        "reload": _load(lambda effort: crash.fault_reload(effort.reloads)),
        "soak": _load(lambda effort: soak.fault_soak(effort.soak)),
    }
    found = {
        "Attacks": attacks,
        "Backends that fail": faults,
        "A machine that runs short": exhausted,
        "Load, crashes and restarts": loads,
    }
    return {title: rows for title, rows in found.items() if rows}


def _title(name: str) -> str:
    return name.removeprefix("fault_").removeprefix("attack_").replace("_", " ")


# --- running them -----------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Torture, and report. The last line of stdout is one JSON document. Returns the exit code: 0 all held, 1 not."""
    options = _read(argv)
    effort = QUICK if options.quick else Effort()
    if options.soak is not None:
        effort = replace(effort, soak=options.soak)
    started = time.monotonic()
    found: dict[str, list[Row]] = {}
    for title, rows in groups().items():
        for name, make in rows.items():
            if not options.only or name in options.only:
                print(f"{title}: {name}", flush=True)
                for row in _all_of(name, make, effort):
                    found.setdefault(title, []).append(row)
                    print(report.line(row), flush=True)
    about = {**report.about(), "seconds": round(time.monotonic() - started)}
    if options.write:
        options.write.write_text(report.markdown(found, about, argv), encoding="utf-8")
        if options.write.resolve() == report.PAGE:
            readme = ROOT / "README.md"
            readme.write_text(report.quoted(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    document = report.document(found, about)
    print(json.dumps(document))
    return 0 if document["held"] else 1


def _all_of(name: str, make: Rows, effort: Effort) -> Iterator[Row]:
    """Its rows. What could not even be tried to its end, is one that does not hold."""
    try:
        yield from make(effort)
    except Exception as exc:  # noqa: BLE001 - whatever it was: the other rows are still to be tried
        yield Row(_title(name), 1, 0, f"{type(exc).__name__}: {exc}")


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torture.py", description="Attacks, faults and load on a Portway of its own, all of it on loopback."
    )
    names = [name for rows in groups().values() for name in rows]
    parser.add_argument("--quick", action="store_true", help="a part of it: about two minutes")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument(
        "--soak", type=_seconds, metavar="SECONDS", help="how long the soak lasts (180; 3600 is an hour)"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the table there; docs/reliability.md is quoted in README"
    )
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 86400")
    return seconds
