#!/usr/bin/env python3
"""Build Portway as one file that any Python 3.11 or newer runs: build_pyz.py [OUT=portway.pyz].

The file is a zipapp, so `python3 -I -S portway.pyz serve` is all it takes; its first line does the same
when it is run as a program. How it is made is portway/commands/pack.py's.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Build what the command line asks for and say so. Returns the exit code."""
    if len(argv) > 1 or argv[:1] in (["-h"], ["--help"]):
        print("usage: build_pyz.py [OUT=portway.pyz]", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    sys.path.insert(0, str(ROOT))  # this clone's Portway, whatever else is installed
    from portway.commands import pack

    out = Path(argv[0] if argv else "portway.pyz")
    pack.build(str(out))
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
