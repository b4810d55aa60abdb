#!/usr/bin/env python3
"""Build Portway as one file that any Python 3.11 or newer runs: build_pyz.py [OUT=portway.pyz].

The same sources give the same bytes, whoever builds and when: names are sorted, times and
permissions fixed. The file is a zipapp, so `python3 -I -S portway.pyz serve` is all it takes;
its first line does the same when it is run as a program.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# -I and -S keep what else is installed on the machine, and the folder one stands in, out of the
# daemon. env needs -S to pass more than one word on; macOS and every current Linux have it.
SHEBANG = b"#!/usr/bin/env -S python3 -I -S\n"
MAIN = b"import sys\n\nfrom portway.__main__ import run\n\nsys.exit(run())\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold


def main(argv: list[str]) -> int:
    """Build what the command line asks for and say so. Returns the exit code."""
    if len(argv) > 1 or argv[:1] in (["-h"], ["--help"]):
        print("usage: build_pyz.py [OUT=portway.pyz]", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    out = Path(argv[0] if argv else "portway.pyz")
    build(out)
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")
    return 0


def build(out: Path) -> None:
    """Write the program to `out`."""
    with out.open("wb") as file:
        file.write(SHEBANG)
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in _members():
                archive.writestr(_entry(name), content, zipfile.ZIP_DEFLATED, 9)
    out.chmod(0o755)


def _members() -> Iterator[tuple[str, bytes]]:
    yield "__main__.py", MAIN
    yield "portway/models.toml", (ROOT / "config" / "models.toml").read_bytes()
    for path in sorted((ROOT / "portway").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_bytes()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.create_system = 3  # Unix, wherever it is built
    entry.external_attr = 0o644 << 16
    return entry


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
