#!/usr/bin/env python3
"""Take each guard away, one at a time and in a copy, and see which test notices; likewise what makes Portway recover.

    guards.py                 all of them; some twenty minutes
    guards.py SSRF keys       those whose line has one of these words
    guards.py --table         the table that SECURITY.md quotes; nothing is run. docs/reliability.md has the recoveries'

A guard is a few words of the source that are replaced by others that let the attack through. It holds if the tests that
stand beside it pass as the source is, and fail without it. Exit code: 0 each was noticed; 1 one was not, or its words
are no longer in the source.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # from wherever one stands

from scripts.guard_list import GUARDS, Guard  # noqa: E402 - the clone's own
from scripts.recovery_list import RECOVERIES  # noqa: E402

COPIED = ("portway", "tests", "scripts", "config", "docs", "launchd", "examples", "pyproject.toml", "README.md")
PATIENCE = 180.0  # seconds for one guard's tests
END = 15.0  # seconds they have to end what they started, once that is over


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Take each guard away and see which test notices.")
    parser.add_argument("words", nargs="*", help="only guards whose line has one of these")
    parser.add_argument("--table", action="store_true", help="print the table of SECURITY.md and do nothing else")
    options = parser.parse_args(argv)
    if options.table:
        print("\n".join(table()))
        return 0
    chosen = [
        guard
        for guard in (*GUARDS, *RECOVERIES)
        if not options.words or any(word in _line(guard) for word in options.words)
    ]
    with tempfile.TemporaryDirectory(prefix="portway-guards-") as folder:
        copy = Path(folder) / "portway"
        _copy(copy)
        before: dict[tuple[str, ...], list[str]] = {}
        held = [_judge(guard, copy, before) for guard in chosen]
    print(f"{sum(held)} of {len(chosen)} guards: a test fails without them")
    return 0 if all(held) else 1


def table(guards: Iterable[Guard] = GUARDS, what: str = "guard") -> Iterator[str]:
    """The guards as Markdown: what is promised, and the test that fails without it."""
    yield f"| {what} | in | fails without it |"
    yield "|---|---|---|"
    for guard in guards:
        files = ", ".join(dict.fromkeys(f"`{file.removeprefix('portway/')}`" for file, _, _ in guard.edits))
        tests = ", ".join(f"`{test.removeprefix('tests.')}`" for test in guard.tests)
        yield f"| {guard.promise} | {files} | {tests} |"


def _line(guard: Guard) -> str:
    return " ".join((guard.promise, *(file for file, _, _ in guard.edits), *guard.tests))


def _copy(to: Path) -> None:
    to.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        elif source.exists():
            shutil.copy(source, to / name)


def _judge(guard: Guard, copy: Path, seen: dict[tuple[str, ...], list[str]]) -> bool:
    """Whether its tests pass with it and one fails without it; says so. seen: what failed as the source is."""
    started = time.monotonic()
    missing = [file for file, words, _ in guard.edits if (ROOT / file).read_text("utf-8").count(words) != 1]
    if missing:
        print(f"STALE     {guard.promise}: its words are not once in {', '.join(missing)}", flush=True)
        return False
    if guard.tests not in seen:
        seen[guard.tests] = _failures(guard.tests, copy)
    before = seen[guard.tests]
    _forget_compiled(copy)
    try:
        for file, words, others in guard.edits:
            _replace(copy / file, words, others)
        without = _failures(guard.tests, copy)
    finally:
        for file, _, _ in guard.edits:
            shutil.copy(ROOT / file, copy / file)
        _forget_compiled(copy)
    held = not before and bool(without)
    verdict = "noticed" if held else "BROKEN" if before else "UNNOTICED"
    told = ", ".join(before or without)
    print(f"{verdict:9} {guard.promise} -> {told or 'nothing failed'} ({time.monotonic() - started:.0f} s)", flush=True)
    return held


def _forget_compiled(copy: Path) -> None:
    """Python believes a compiled file whose source has the same size and the same second."""
    for folder in list(copy.rglob("__pycache__")):
        shutil.rmtree(folder)


def _replace(path: Path, words: str, others: str) -> None:
    path.write_text(path.read_text("utf-8").replace(words, others), "utf-8")


def _failures(tests: Iterable[str], copy: Path) -> list[str]:
    """The tests that fail in the copy; one that does not even end counts."""
    command = [sys.executable, "-B", "-m", "unittest", *tests]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(command, cwd=copy, stdout=said, stderr=said, start_new_session=True) as tested,
    ):
        try:
            code = tested.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return ["no end"]
        finally:
            _end(tested)
        said.seek(0)
        words = said.read()
    failed = re.findall(r"^(?:FAIL|ERROR): (\w+)", words, re.MULTILINE)
    return list(dict.fromkeys(failed)) or ([] if code == 0 else [words[-300:]])


def _end(tested: subprocess.Popen[bytes]) -> None:
    """With the processes that its tests have started: by themselves if they can, else all of its session's group."""
    try:
        tested.send_signal(signal.SIGINT)
        tested.wait(END)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(tested.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # none is left


if __name__ == "__main__":
    sys.exit(main())
