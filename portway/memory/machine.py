"""What this machine has of memory, and how much of it nobody uses.

Linux says it in /proc/meminfo, macOS by three small programs. Everything that reads their words is pure and
can be fed recorded ones. Of a graphics card with memory of its own nothing is known here but that it is there:
models then live in it, and no number of ours means anything. Sizes are bytes.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ASK = 2.0  # seconds one of macOS's programs may take; they take a few milliseconds
PROGRAMS: Mapping[str, Sequence[str]] = {
    "hw.memsize": ("/usr/sbin/sysctl", "-n", "hw.memsize"),
    "vm_stat": ("/usr/bin/vm_stat",),
    "memory_pressure": ("/usr/bin/memory_pressure", "-Q"),
}
OWN_MEMORY = 2 * 1024**3  # bytes from which a Linux graphics card counts as one with memory of its own


@dataclass(frozen=True, slots=True)
class Reading:
    """One look. available: what can be had without taking from anybody; None = not known. free_percent: what
    macOS itself calls free, which falls as pressure rises. apart: there is a card with memory of its own."""

    total: int | None = None
    available: int | None = None
    free_percent: int | None = None
    apart: bool = False


def read(platform: str = sys.platform) -> Reading:
    """Ask this machine. What it can't tell is None; nothing is raised."""
    if platform == "darwin":
        return _read_macos(_output)
    if platform.startswith("linux"):
        total, available = parse_meminfo(_text("/proc/meminfo"))
        return Reading(total, available, apart=has_card_apart())
    return Reading()


def _read_macos(output: Callable[[Sequence[str]], str]) -> Reading:
    total = parse_memsize(output(PROGRAMS["hw.memsize"]))
    used = parse_vm_stat(output(PROGRAMS["vm_stat"]))
    available = max(0, total - used) if total is not None and used is not None else None
    return Reading(total, available, parse_memory_pressure(output(PROGRAMS["memory_pressure"])))


# --- their words ----------------------------------------------------------------------------------


def parse_meminfo(text: str) -> tuple[int | None, int | None]:
    """(MemTotal, MemAvailable) of /proc/meminfo."""
    found = {name: int(count) * 1024 for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return found.get("MemTotal"), found.get("MemAvailable")


def parse_memsize(text: str) -> int | None:
    """`sysctl -n hw.memsize`."""
    word = text.strip()
    return int(word) if word.isascii() and word.isdigit() else None


def parse_vm_stat(text: str) -> int | None:
    """What programs hold, as Activity Monitor has it: their own pages, wired ones, and the compressor's. Pages of
    files, model weights among them until a card wires them, can be dropped at any time, and do not count."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = {name.strip('"'): int(count) for name, count in re.findall(r"^([^:\n]+):\s+(\d+)\.$", text, re.MULTILINE)}
    wanted = ("Anonymous pages", "Pages wired down", "Pages occupied by compressor")
    if page is None or not all(name in pages for name in wanted):
        return None
    own = max(0, pages["Anonymous pages"] - pages.get("Pages purgeable", 0))
    return (own + pages["Pages wired down"] + pages["Pages occupied by compressor"]) * int(page[1])


def parse_memory_pressure(text: str) -> int | None:
    """The percentage that `memory_pressure` calls free."""
    found = re.search(r"System-wide memory free percentage:\s*(\d{1,3})%", text)
    return int(found[1]) if found else None


# --- asking ---------------------------------------------------------------------------------------


def has_card_apart(root: str = "/") -> bool:
    """Whether a Linux machine has a graphics card that models live in."""
    if os.path.exists(os.path.join(root, "proc/driver/nvidia/version")):
        return True
    paths = glob.glob(os.path.join(root, "sys/class/drm/card*/device/mem_info_vram_total"))
    return any((parse_memsize(_text(path)) or 0) >= OWN_MEMORY for path in paths)


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _output(command: Sequence[str]) -> str:
    """What a program prints; "" if there is none, or it does not answer."""
    import subprocess  # macOS alone has to ask a program

    try:
        done = subprocess.run(command, capture_output=True, timeout=ASK, check=False, stdin=subprocess.DEVNULL)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("ascii", "replace")
