#!/usr/bin/env python3
"""Torture Portway: attacks, faults, load. `torture.py --help` says what can be asked; its parts: torture_rows/."""

from __future__ import annotations

import sys
from pathlib import Path


def run() -> int:
    """Run it from wherever one stands. Returns the exit code."""
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts.torture_rows.command import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
