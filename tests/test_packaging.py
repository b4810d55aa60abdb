"""Portway as it is handed out: run from a clone, as one file, as a wheel."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import unittest
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import ClassVar
from unittest import mock

from portway import __main__, __version__
from portway.commands import pack

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "portway").rglob("*.py"))


def run(*command: str | Path, cwd: str | Path = "/", env: Mapping[str, str] | None = None) -> str:
    """What a program prints on stdout; it must exit with 0."""
    clean = {"HOME": "/nonexistent", "PATH": os.defpath, **(env or {})}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{command} exited with {done.returncode}:\n{done.stderr}")
    return done.stdout


class CloneTest(unittest.TestCase):
    """A clone, with nothing installed."""

    def test_folder(self) -> None:
        """The folder itself can be run from anywhere, isolated from all that is installed."""
        self.assertEqual(f"portway {__version__}\n", run(sys.executable, "-I", "-S", ROOT / "portway", "--version"))

    def test_module(self) -> None:
        """So can the module, from the clone's folder, and it finds the shipped configuration."""
        said = run(sys.executable, "-m", "portway", "check", cwd=ROOT)
        self.assertTrue(said.startswith(str(ROOT / "config" / "models.toml")), said)

    def test_old_python(self) -> None:
        """A Python that is too old can read the first two files, and is told what is needed."""
        for name in ("__init__.py", "__main__.py"):
            ast.parse((ROOT / "portway" / name).read_text(encoding="utf-8"), feature_version=(3, 4))
        said = io.StringIO()
        with mock.patch.object(sys, "version_info", (3, 9, 6, "final", 0)), redirect_stderr(said):
            self.assertEqual(1, __main__.run())
        self.assertIn("needs Python 3.11 or newer", said.getvalue())
        self.assertIn("3.9.6", said.getvalue())

    def test_standard_library_only(self) -> None:
        """Portway and its scripts import nothing that does not come with Python."""
        known = sys.stdlib_module_names | {"portway", "scripts"}
        for path in (*MODULES, *(ROOT / "scripts").rglob("*.py")):
            # torture.py plays with a real llama-server where there is one, which the tests know to find
            own = {"tests"} if path.parent.name == "torture_rows" else set()
            with self.subTest(path=path.name):
                self.assertEqual(set(), set(imported(path)) - known - own)


def imported(path: Path) -> Iterator[str]:
    """The top-level names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


class PyzTest(unittest.TestCase):
    """portway.pyz."""

    folder: ClassVar[Path]
    pyz: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.pyz = cls.folder / "portway.pyz"
        pack.build(str(cls.pyz))

    def test_reproducible(self) -> None:
        """Two builds are the same, byte for byte, whenever they are made."""
        again = self.folder / "again.pyz"
        with mock.patch("time.time", return_value=2_000_000_000.0):
            pack.build(str(again))
        self.assertEqual(self.pyz.read_bytes(), again.read_bytes())

    def test_content(self) -> None:
        """It holds the package, the shipped configuration, the way in, and nothing else."""
        with zipfile.ZipFile(self.pyz) as archive:
            expected = {path.relative_to(ROOT).as_posix() for path in MODULES}
            self.assertEqual(expected | {"__main__.py", "portway/models.toml"}, set(archive.namelist()))
            shipped = (ROOT / "config" / "models.toml").read_bytes()
            self.assertEqual(shipped, archive.read("portway/models.toml"))

    def test_isolated(self) -> None:
        """It runs without site-packages and finds the configuration inside itself."""
        said = run(sys.executable, "-I", "-S", self.pyz, "check")
        self.assertIn(f"{self.pyz}/portway/models.toml: ok", said)

    def test_program(self) -> None:
        """It is a program, under the python3 that is first on PATH."""
        programs = self.folder / "bin"
        programs.mkdir()
        (programs / "python3").symlink_to(sys.executable)
        path = f"{programs}{os.pathsep}{os.defpath}"
        self.assertEqual(f"portway {__version__}\n", run(self.pyz, "--version", env={"PATH": path}))

    def test_command(self) -> None:
        """The one command that builds it says what it made."""
        out = self.folder / "made.pyz"
        said = run(sys.executable, ROOT / "scripts" / "build_pyz.py", out)
        self.assertTrue(said.startswith(f"{out}: "), said)
        self.assertEqual(self.pyz.read_bytes(), out.read_bytes())


class MetadataTest(unittest.TestCase):
    """pyproject.toml."""

    def setUp(self) -> None:
        self.project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def test_promises(self) -> None:
        """No dependencies, the Python that the start asks for, and a command that exists."""
        self.assertEqual([], self.project["dependencies"])
        self.assertEqual(">=3.11", self.project["requires-python"])
        module, _, function = self.project["scripts"]["portway"].partition(":")
        self.assertTrue(callable(getattr(importlib.import_module(module), function)))


@unittest.skipUnless(importlib.util.find_spec("hatchling"), "hatchling, which builds the packages, is not installed")
class DistributionTest(unittest.TestCase):
    """The wheel and the sdist."""

    folder: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        run(sys.executable, "-m", "hatchling", "build", "--directory", cls.folder, cwd=ROOT)

    def test_wheel(self) -> None:
        """The wheel holds the package, the shipped configuration and the command, and no tests."""
        (wheel,) = self.folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
            self.assertEqual({path.relative_to(ROOT).as_posix() for path in MODULES} | {"portway/models.toml"}, names)
            info = f"portway-{__version__}.dist-info"
            self.assertIn("portway = portway.cli:main", archive.read(f"{info}/entry_points.txt").decode())
            self.assertNotIn("Requires-Dist", archive.read(f"{info}/METADATA").decode())
            self.assertIn(f"{info}/licenses/LICENSE", archive.namelist())

    def test_sdist(self) -> None:
        """The sdist has all that a clone has for building, testing and reading."""
        (sdist,) = self.folder.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        wanted = {"pyproject.toml", "LICENSE", "README.md", "config/models.toml", "scripts/build_pyz.py", ".ci/run"}
        wanted |= {path.relative_to(ROOT).as_posix() for path in (*MODULES, *(ROOT / "tests").glob("*.py"))}
        self.assertEqual(set(), wanted - names)
