"""Who listens on a port: the process's id and name, where the system tells.

Linux says it in /proc, macOS through lsof. Only one's own processes can be seen without being root, and
a name is a program and its script, never a whole command line: that may hold a key. Opens no connection.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

PATIENCE = 2.0  # seconds for all of it: whoever asks has an error to report, and this is a courtesy
MAX_NAME = 80  # characters of a name

_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp
_ANY = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


class Holder(NamedTuple):
    """A process that listens."""

    pid: int
    command: str


def who_listens(host: str, port: int) -> Holder | None:
    """Who keeps (host, port) from being listened on; None if nobody does, or the system doesn't tell.

    A host that is a name counts as every address: nothing is resolved.
    """
    if sys.platform == "darwin":
        return from_lsof(host, port, _output)
    return from_proc(host, port) if os.path.isdir("/proc/self/fd") else None


def describe(host: str, port: int) -> str:
    """As "pid 4711 (ollama)", or "" if who it is can't be told."""
    holder = who_listens(host, port)
    return f"pid {holder.pid} ({holder.command})" if holder else ""


# --- Linux -----------------------------------------------------------------------------------


def from_proc(
    host: str, port: int, root: str = "/proc", *, clock: Callable[[], float] = time.monotonic
) -> Holder | None:
    """The same by what stands under `root`."""
    until = clock() + PATIENCE
    wanted = {f"socket:[{inode}]" for inode in _listening(host, port, root)}
    if not wanted:
        return None
    for pid in sorted(int(name) for name in _names(root) if name.isdigit()):
        if clock() > until:
            return None
        if wanted & set(_open_files(os.path.join(root, str(pid), "fd"))):
            return Holder(pid, _command(os.path.join(root, str(pid))))
    return None


def _listening(host: str, port: int, root: str) -> Iterator[str]:
    """The inodes of the sockets that listen there."""
    for table in ("tcp", "tcp6"):
        for line in _lines(os.path.join(root, "net", table))[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTEN:
                address, _, its_port = fields[1].partition(":")
                if int(its_port, 16) == port and _meet(host, _address(address)):
                    yield fields[9]


def _address(text: str) -> str:
    """As "0100007F" -> "127.0.0.1": each four bytes stand there as one number of this machine's byte order."""
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    raw = b"".join(words)
    if raw.startswith(b"\0" * 10 + b"\xff\xff"):
        raw = raw[12:]  # IPv4 in IPv6's clothes
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _open_files(folder: str) -> Iterator[str]:
    for name in _names(folder):
        try:
            yield os.readlink(os.path.join(folder, name))
        except OSError:
            continue  # closed meanwhile


def _command(folder: str) -> str:
    try:
        with open(os.path.join(folder, "cmdline"), "rb") as file:
            words = os.fsdecode(file.read(4096)).split("\0")
    except OSError:
        return "?"
    return name_of([word for word in words if word]) or "?"


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # another user's, or it has ended
        return []


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


# --- macOS -----------------------------------------------------------------------------------


def from_lsof(host: str, port: int, output: Callable[[Sequence[str]], str]) -> Holder | None:
    """The same by what lsof says; `output` runs a command and returns what it prints, "" if it can't."""
    said = output(["/usr/sbin/lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-F", "pcn"])
    for holder, address in _read_lsof(said.splitlines()):
        if _meet(host, address):
            words = output(["/bin/ps", "-ww", "-o", "command=", "-p", str(holder.pid)]).split()
            return Holder(holder.pid, name_of(words) or holder.command)
    return None


def _read_lsof(lines: Iterable[str]) -> Iterator[tuple[Holder, str]]:
    """Each listening socket with its process. lsof -F prints a field a line: p4711, cOllama, f3, n127.0.0.1:11434."""
    pid, command = 0, "?"
    for line in lines:
        kind, value = line[:1], line[1:]
        if kind == "p" and value.isdigit():
            pid, command = int(value), "?"
        elif kind == "c":
            command = re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), value)  # "LM\x20Studio"
        elif kind == "n" and pid:
            address = value.rpartition(":")[0].strip("[]")
            yield Holder(pid, _shown(command)), "::" if address == "*" else address


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - fixed programs of the system's, with a number
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE / 2, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


# --- both ------------------------------------------------------------------------------------


def _meet(ours: str, theirs: str) -> bool:
    """Whether one of two listeners on the same port keeps the other from it."""
    if theirs == ours or theirs in _ANY or ours in _ANY:
        return True
    return not re.fullmatch(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:.]*", ours.lower())  # a name


def name_of(words: Sequence[str]) -> str:
    """The program of a command line, and its script or subcommand: "ollama serve", "python3 portway.pyz"."""
    if not words:
        return ""
    program = os.path.basename(words[0])
    rest = list(words[1:])
    if re.match(r"python", program, re.IGNORECASE):
        while rest and re.fullmatch(r"-[A-Zabdimqsuvx]+", rest[0]):
            del rest[0]
    if rest and not rest[0].startswith("-"):  # a value behind an option may be a key, and is not shown
        program += f" {os.path.basename(rest[0].rstrip('/'))}"
    return _shown(program)


def _shown(text: str) -> str:
    """Printable, whatever a process calls itself."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 3]}..."
