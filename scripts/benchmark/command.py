"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmark import report
from scripts.benchmark.measure import Measurement
from scripts.benchmark.native import LoadFailed
from scripts.benchmark.peers import peers
from scripts.benchmark.scenarios import QUICK, QUICKLY, SCENARIOS, Effort
from scripts.benchmark.world import World


def main(argv: Sequence[str]) -> int:
    """Measure and report. The last line of stdout is one JSON document. Returns the exit code: 1 if an answer was
    wrong or a process failed, 0 otherwise; goals that are missed are no failure."""
    asked = _read(argv)
    all_of_them = {**SCENARIOS, "peers": peers}
    names = asked.only or [*(QUICKLY if asked.quick else SCENARIOS), *(["peers"] if asked.peers else [])]
    effort = QUICK if asked.quick else Effort()
    measurements: list[Measurement] = []
    failures: list[str] = []
    started = time.monotonic()
    with World() as world:
        about = report.about(world.tools)
        for name, value in about.items():
            print(f"{name}: {value}")
        print(next(iter(_heading())), flush=True)
        for name in names:
            try:
                for measurement in all_of_them[name](world, effort):
                    measurements.append(measurement)
                    print("\n".join(report.lines(measurement)), flush=True)
            except (LoadFailed, RuntimeError) as exc:
                failures.append(f"{name}: {exc}")
                print(f"FAILED {failures[-1]}", flush=True)
    report.finish(about, measurements, time.monotonic() - started)
    for name in list(about)[-5:]:
        print(f"{name}: {about[name]}")
    if asked.write:
        asked.write.write_text(report.markdown(measurements, about, argv), encoding="utf-8")
    print(json.dumps({**report.document(measurements, about), "failures": failures}))
    return 1 if failures else 0


def _heading() -> Sequence[str]:
    return ["{:<44} {:>9} {:>10} {:>10} {:>10} {:>8} {:>10} {:>10} {:>8}".format(*report.HEADINGS)]


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py", description="What Portway adds to a request, measured against the same upstream without it."
    )
    parser.add_argument("--quick", action="store_true", help="a part of it, with few rounds: about a minute")
    names = [*SCENARIOS, "peers"]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--peers", action="store_true", help="also nginx, haproxy, LiteLLM, Portkey, as installed")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the report there, as docs/performance.md is")
    return parser.parse_args(argv)
