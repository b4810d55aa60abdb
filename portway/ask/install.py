"""Puts an `ask` into a folder of PATH that starts as fast as Python can.

The script that pip makes starts a Python that first looks through site-packages and runs every .pth
file there: several times what asking costs, and a way in for whatever else is installed. This one
starts `python -I -S`, and finds Portway by the absolute path of where it is now.
"""

from __future__ import annotations

import os
import py_compile
import shlex
import sys
from collections.abc import Mapping

# all that `ask` consists of, as paths in the package
MODULES = (
    "__init__.py",
    *(f"ask/{name}.py" for name in ("__init__", "command", "client", "journal", "manual", "terminal")),
)
MARK = "# Written by `portway ask-install`"
SHEBANG_MAX = 127  # bytes; Linux cut longer ones before 5.1, and macOS has its own limit

_SCRIPT = """\
{start}
{mark}: run that again after Portway or Python has moved.
import sys

sys.path.append({home!r})  # at the end: what Python brings itself is found first

from portway.ask.command import run

run()
"""


class CannotInstall(Exception):
    """There is something in the way. str() says what."""


def install(bin_dir: str, environ: Mapping[str, str], *, python: str = sys.executable) -> str:
    """Write `bin_dir`/ask and return its path. Raises CannotInstall, or OSError.

    It replaces an earlier one of its own, and nothing else. From a zipapp the modules that it needs
    are copied to ${XDG_DATA_HOME:-~/.local/share}/portway/ask: unpacking a zip takes longer than asking.
    """
    path = os.path.join(os.path.abspath(os.path.expanduser(bin_dir)), "ask")
    _check_is_ours(path)
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if not os.path.isdir(home):
        home = _unpack(_data_dir(environ))
    _compile(home)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fresh = f"{path}.{os.getpid()}"
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(_SCRIPT.format(start=_start(python), mark=MARK, home=home))
    os.chmod(fresh, 0o755)  # noqa: S103 - a command is for all to run; there is no secret in it
    os.replace(fresh, path)
    return path


def is_on_path(path: str, environ: Mapping[str, str]) -> bool:
    """Whether a shell finds this very file when `ask` is typed."""
    import shutil

    found = shutil.which("ask", path=environ.get("PATH", ""))
    return found is not None and os.path.realpath(found) == os.path.realpath(path)


def _check_is_ours(path: str) -> None:
    if not os.path.lexists(path):
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            ours = MARK in file.read(2048)
    except OSError as exc:
        raise CannotInstall(f"{path}: {exc.strerror}") from None
    if not ours:
        raise CannotInstall(f"{path} is another program's; move it away, or choose another folder")


def _start(python: str) -> str:
    """The script's first lines. A path that no #! line can hold is left to the shell, in a line that
    Python takes for a string.
    """
    line = f"#!{python} -IS"
    if " " not in python and len(os.fsencode(line)) <= SHEBANG_MAX:
        return line
    return f"#!/bin/sh\n''''exec {shlex.quote(python)} -IS \"$0\" \"$@\" # '''"


def _data_dir(environ: Mapping[str, str]) -> str:
    data = environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):
        data = os.path.expanduser("~/.local/share")
    return os.path.join(data, "portway", "ask")


def _unpack(target: str) -> str:
    """Copy the modules out of the zipapp that this runs from."""
    from pkgutil import get_data

    os.makedirs(os.path.join(target, "portway", "ask"), 0o700, exist_ok=True)
    for module in MODULES:
        source = get_data("portway", module)
        if source is None:
            raise CannotInstall(f"{module} is not in {sys.argv[0]}")
        with open(os.path.join(target, "portway", module), "wb") as file:
            file.write(source)
    return target


def _compile(home: str) -> None:
    """So that not even the first `ask` has to; and one that may not write there never has to."""
    for module in MODULES:
        try:
            py_compile.compile(os.path.join(home, "portway", module), quiet=1)
        except OSError:
            return  # read-only, then: compiled each time
