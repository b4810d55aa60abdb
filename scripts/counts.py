#!/usr/bin/env python3
"""What a request costs in counts, which are stable where clocks are not: counts.py [--record] [--where CASE].

For each case, per request: system calls (strace), instructions of Python's interpreter, blocks of memory that stay,
and the most bytes that are in use during one, its log line included. They are compared with counts.json, by Python
version; what has grown by more than 10% fails the build. --record writes the file anew, with every Python 3.11 or newer
that is found here; --where shows the functions in which a case's instructions are.

The daemon runs in a process of its own with next to nothing around it, on one connection, so that each request
takes the same way. Its log and its cache are on, and what their threads do counts. Without strace, or where it may
not look at another process, system calls are not counted, which is said.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
BASELINE = Path(__file__).with_name("counts.json")
CHILD = Path(__file__).with_name("counts_child.py")
TOLERANCE = 0.10
# where 10% is next to nothing
SLACK = {"syscalls": 1.0, "instructions": 50.0, "kept_blocks": 2.0, "peak_bytes": 8192.0}
WARM_UP = 30  # requests before the count begins
REQUESTS = 200
REQUESTS_KEPT = 1000  # for what stays: a table that grows once must not look like a leak
LATER = 10_000  # numbers of prompts that were not used before
SINGLES = 5  # requests that are looked at one by one
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
IN_PATH = [f"python3.{minor}" for minor in range(11, 20)]

# case -> (model, streamed, whether each prompt is another one)
CASES = {
    "plain": ("openai", False, False),
    "translated": ("ollama", False, False),
    "stream": ("openai", True, False),
    "translated stream": ("ollama", True, False),
    "hit": ("cached", False, False),
    "stored": ("cached", False, True),
}


def main(argv: Sequence[str]) -> int:
    """Count, compare, say so. Returns the exit code: 1 if something has grown."""
    asked = _read(argv)
    if asked.where:
        for place, count in counted("instructions", asked.where)["where"]:
            print(f"{count:10.1f}  {place}")
        return 0
    if asked.record:
        return record(pythons())
    found = {case: _all_counts(case) for case in CASES}
    print(json.dumps(found, indent=1))
    baseline = _baseline().get(VERSION)
    if baseline is None:
        print(f"there is no baseline for Python {VERSION}; --record makes one", file=sys.stderr)
        return 0
    if grown(found, baseline):  # a busy machine has more to count, never less
        found = lower(found, {case: _all_counts(case) for case in CASES})
    problems = grown(found, baseline)
    for line in (*fallen(found, baseline), *problems):
        print(line, file=sys.stderr)
    return 1 if problems else 0


def record(programs: Sequence[str]) -> int:
    """Write counts.json anew with these Pythons. Returns the exit code."""
    for program in programs:
        print(program, file=sys.stderr)
        done = subprocess.run([program, __file__], stdout=subprocess.PIPE, text=True, check=False)
        version = subprocess.run([program, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
        minor = ".".join(version.split()[1].split(".")[:2])
        baseline = {**_baseline(), minor: json.loads(done.stdout)}
        BASELINE.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def pythons() -> list[str]:
    """Of each minor version from 3.11 on that is found here the newest, beginning with this one."""
    newest: dict[int, tuple[int, str]] = {}
    here = Path.home().glob(".pyenv/versions/*/bin/python3")
    for program in (*map(str, here), *filter(None, map(shutil.which, IN_PATH))):
        ask = [program, "-c", "import sys; print(*sys.version_info[1:3])"]
        answer = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()
        if len(answer) == 2 and int(answer[0]) >= 11:
            newest[int(answer[0])] = max(newest.get(int(answer[0]), (-1, "")), (int(answer[1]), program))
    newest[sys.version_info.minor] = (0, sys.executable)
    return [program for _, (_, program) in sorted(newest.items())]


def _baseline() -> dict[str, Any]:
    return dict(json.loads(BASELINE.read_text(encoding="utf-8"))) if BASELINE.exists() else {}


Found = dict[str, dict[str, float]]  # by case, then by name


def grown(found: Found, before: Found) -> list[str]:
    """A line for each count that is more than 10% above what it was."""
    return [f"{what} has grown from {was:.1f} to {now:.1f}" for what, was, now in _beyond(before, found)]


def lower(one: Found, other: Found) -> Found:
    """Of each count the lower one; both have the same."""
    return {case: {name: min(count, other[case][name]) for name, count in one[case].items()} for case in one}


def fallen(found: Found, before: Found) -> list[str]:
    """A line for each count that is so far below that it could grow unseen."""
    down = _beyond(found, before)
    return [f"{what} fell from {was:.1f} to {now:.1f}: --record would keep it there" for what, now, was in down]


def _beyond(low: Found, high: Found) -> Iterator[tuple[str, float, float]]:
    """What is more than TOLERANCE higher, and by more than next to nothing."""
    for case, counts in high.items():
        for name, count in counts.items():
            other = low.get(case, {}).get(name)
            if other is not None and count > other * (1 + TOLERANCE) and count > other + SLACK[name]:
                yield f"{case}: {name}", other, count


def _all_counts(case: str) -> dict[str, float]:
    counts = {
        "instructions": counted("instructions", case)["instructions"],
        **counted("memory", case),
    }
    if case == "stored":  # how many answers a transaction takes along is a matter of time
        return counts
    if shutil.which("strace") is None:
        _say_once("strace is not installed: system calls are not counted")
    else:
        counts |= counted("syscalls", case)
    return counts


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def counted(what: str, case: str) -> dict[str, Any]:
    """The counts of `what` (instructions, memory, syscalls) per request of `case`."""
    with (
        tempfile.TemporaryDirectory(prefix="portway-counts-") as folder,
        Child("upstream", folder, "0") as upstream,
        Child(what, folder, str(upstream.says())) as daemon,
    ):
        return _count(what, case, daemon, Path(folder))


def _count(what: str, case: str, daemon: Child, folder: Path) -> dict[str, Any]:
    with socket.create_connection(("127.0.0.1", daemon.says()), 10) as client:
        _ask(client, case, range(WARM_UP))
        daemon.tell("begin")
        if what == "syscalls":
            return _traced(client, case, daemon.pid, folder / "strace")
        requests = REQUESTS_KEPT if what == "memory" else REQUESTS
        _ask(client, case, range(WARM_UP, WARM_UP + requests))
        result: dict[str, Any] = daemon.tell(f"end {requests}")
        if what == "memory":
            result["peak_bytes"] = statistics.median(_peak(client, case, daemon, number) for number in range(SINGLES))
        return result


def _peak(client: socket.socket, case: str, daemon: Child, number: int) -> int:
    """Bytes that one request needs by itself: of many, the log's queue holds an unknown number."""
    daemon.tell("begin")
    _ask(client, case, range(LATER + number, LATER + number + 1))
    peak: int = daemon.tell("end 1")["peak_bytes"]
    return peak


def _traced(client: socket.socket, case: str, pid: int, out: Path) -> dict[str, Any]:
    """System calls per request, but for those by which threads wait and wake each other: these vary with the
    machine, and a wait of ours shows in the others. Nothing if strace is not let."""
    command = ["strace", "-f", "-c", "-o", str(out), "-p", str(pid)]
    attached, said = os.pipe()
    with subprocess.Popen(command, stderr=said) as tracer:
        os.close(said)
        words = os.read(attached, 256).decode(errors="replace")  # "Process N attached with M threads"
        if "attached" in words:
            _ask(client, case, range(WARM_UP, WARM_UP + REQUESTS))
        tracer.terminate()
    os.close(attached)
    if "attached" not in words:
        _say_once(f"system calls are not counted: {words.strip()}")
        return {}
    rows = [line.split() for line in out.read_text().splitlines()]
    calls = {row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit()}
    waits = ("total", "futex", "clock_nanosleep", "restart_syscall")
    return {"syscalls": round(sum(count for name, count in calls.items() if name not in waits) / REQUESTS, 2)}


def _ask(client: socket.socket, case: str, numbers: range) -> None:
    model, stream, unique = CASES[case]
    for number in numbers:
        content = f"question {number if unique else 0:06d} " + "x" * 1800
        asked = {"model": model, "stream": stream, "messages": [{"role": "user", "content": content}]}
        body = json.dumps(asked).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        _read_answer(client)


def _read_answer(client: socket.socket) -> None:
    data = b""
    while True:
        part = client.recv(65_536)
        if not part:
            raise ConnectionError("the daemon closed the connection")
        data += part
        head, end, body = data.partition(b"\r\n\r\n")
        if not end:
            continue
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the daemon answered {data[:300]!r}")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(body) == int(length) if length else body.endswith(b"0\r\n\r\n"):
            return


class Child:
    """A process of counts_child.py, which ends with its stdin."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, str(CHILD), *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def says(self) -> Any:
        """The next line of its output, which is JSON."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"a process ended: {self._process.args!r}")
        return json.loads(line)

    def tell(self, words: str) -> Any:
        """What it says to that."""
        if self._process.stdin:
            self._process.stdin.write(words + "\n")
            self._process.stdin.flush()
        return self.says()


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="counts.py", description="Counts per request, against counts.json.")
    parser.add_argument("--record", action="store_true", help="write counts.json anew, with every Python that is here")
    parser.add_argument("--where", choices=CASES, metavar="CASE", help=f"the functions of one of: {', '.join(CASES)}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
