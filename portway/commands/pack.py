"""Portway as one file that any Python 3.11 or newer runs: out of a clone, a wheel or another such file.

The same sources give the same bytes, whoever builds and when: names are sorted, times and permissions
fixed. What it is used for is scripts/build_pyz.py's and service.py's matter.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

# -I and -S keep what else is installed on the machine, and the folder one stands in, out of the
# daemon. env needs -S to pass more than one word on; macOS and every current Linux have it.
SHEBANG = b"#!/usr/bin/env -S python3 -I -S\n"
MAIN = b"import sys\n\nfrom portway.__main__ import run\n\nsys.exit(run())\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold


def build(out: str) -> None:
    """Write the Portway that runs now to `out`, whole or not at all. Raises OSError."""
    archive = running_archive()
    fresh = f"{out}.{os.getpid()}"
    try:
        with open(fresh, "wb") as file:
            if archive is None:
                _write(file)
            else:
                with open(archive, "rb") as source:
                    file.write(source.read())
        os.chmod(fresh, 0o755)  # noqa: S103 - a program is for all to run; there is no secret in it
        os.replace(fresh, out)
    finally:
        if os.path.lexists(fresh):
            os.unlink(fresh)


def running_archive() -> str | None:
    """The file that Portway was imported from, if that is one file."""
    home = os.path.dirname(_package())
    return home if os.path.isfile(home) else None


def _write(file: BinaryIO) -> None:
    file.write(SHEBANG)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in _members():
            archive.writestr(_entry(name), content, zipfile.ZIP_DEFLATED, 9)


def _members() -> Iterator[tuple[str, bytes]]:
    package = _package()
    yield "__main__.py", MAIN
    yield "portway/models.toml", _contents(_configuration(package))
    for folder, folders, names in os.walk(package):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                inside = os.path.relpath(path, package).replace(os.sep, "/")
                yield f"portway/{inside}", _contents(path)


def _configuration(package: str) -> str:
    """The shipped one, in a wheel and in a clone."""
    packed = os.path.join(package, "models.toml")
    return packed if os.path.exists(packed) else os.path.join(os.path.dirname(package), "config", "models.toml")


def _contents(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.create_system = 3  # Unix, wherever it is built
    entry.external_attr = 0o644 << 16
    return entry


def _package() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
