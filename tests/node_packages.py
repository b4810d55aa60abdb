"""The packages of tests/node, installed once from its lock file and kept outside the checkout.

    with Workshop() as workshop:
        workshop.write("hello.mjs", "console.log('hi')")
        workshop.run("hello.mjs")

A test that needs them is skipped where they are not installed, and fails in CI.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

from tests.build_llama_server import cache

SOURCE = Path(__file__).resolve().parent / "node"
PATIENCE = 120.0  # seconds that a program may take; the slowest one here, tsc, takes a few
INSTALL = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")


def packages() -> Path:
    """The folder with node_modules. With PORTWAY_INSTALL_NODE_PACKAGES=1 they are installed if need be.

    Otherwise the test is skipped, in CI failed.
    """
    if shutil.which("node") is None:
        raise _missing("no node: these tests run clients that are written for it")
    folder = installed()
    if folder.exists():
        return folder
    if os.environ.get("PORTWAY_INSTALL_NODE_PACKAGES") == "1":
        install(folder)
        return folder
    raise _missing("the packages of tests/node are not installed: PORTWAY_INSTALL_NODE_PACKAGES=1 has that done")


def installed() -> Path:
    """Where this lock file's packages are kept, installed or not."""
    lock = (SOURCE / "package-lock.json").read_bytes()
    return cache() / f"node-{hashlib.sha256(lock).hexdigest()[:16]}"


def install(folder: Path) -> None:
    """Install to `folder`, whole or not at all. Raises RuntimeError with npm's words."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    print("installing the packages of tests/node, once", file=sys.stderr)
    # beside `folder`, so that the last step is a rename; two installations at a time disturb nobody
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="install-") as name:
        made = Path(name) / "made"
        made.mkdir()
        for file in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / file, made)
        done = subprocess.run(INSTALL, cwd=made, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"`{' '.join(INSTALL)}` failed:\n{done.stdout}{done.stderr}")
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise


def _missing(what: str) -> Exception:
    if os.environ.get("CI") == "true":
        return AssertionError(what)
    return unittest.SkipTest(what)


class Workshop:
    """A folder of its own in which scripts find the packages. Use it as a context manager."""

    def __init__(self) -> None:
        self._packages = packages()
        self._folder = tempfile.TemporaryDirectory(prefix="portway-node-")
        self.path = Path(self._folder.name)
        (self.path / "node_modules").symlink_to(self._packages / "node_modules")
        (self.path / "package.json").write_text('{"type": "module"}\n', encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def write(self, name: str, text: str) -> None:
        """Put a file there."""
        (self.path / name).write_text(text, encoding="utf-8")

    def start(self, *args: str, environ: Mapping[str, str] | None = None) -> Program:
        """Start node in the folder with these arguments."""
        return Program(("node", *args), self.path, {**os.environ, **(environ or {})})

    def run(self, *args: str, environ: Mapping[str, str] | None = None) -> str:
        """What node prints with these arguments; it must end well."""
        with self.start(*args, environ=environ) as program:
            return program.rest()


class Program:
    """A running program whose words can be waited for. It ends with the `with` block, at the latest after PATIENCE.

    `environ` is all of its environment.
    """

    def __init__(self, command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
        self._command = " ".join(command)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see __exit__
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self._limit = threading.Timer(PATIENCE, self._process.kill)
        self._limit.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._limit.cancel()
        self._errors.close()

    def await_line(self, word: str) -> None:
        """Wait until it has written this line. Lines before it are passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.rstrip("\n") == word:
                return
        self._fail(f"it ended without having said {word!r}")

    def rest(self) -> str:
        """End its input and wait for its end, which must be a good one. Returns what it writes until then."""
        output, _ = self._process.communicate()
        if self._process.returncode != 0:
            self._fail(f"it ended with {self._process.returncode}:\n{output}")
        return output

    def errors(self) -> str:
        """What it has written to stderr so far."""
        self._errors.seek(0)
        return self._errors.read()

    def _fail(self, what: str) -> NoReturn:
        raise AssertionError(f"`{self._command}`: {what}\n{self.errors()}")
