#!/usr/bin/env python3
"""The benchmark: what Portway adds to a request. `bench.py --help` says what can be asked; its parts: benchmark/."""

from __future__ import annotations

import sys
from pathlib import Path


def run() -> int:
    """Run it from wherever one stands. Returns the exit code."""
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts.benchmark.command import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
