"""A line of ask's own in Portway's log, where the daemon can't know how an `ask` ended.

It has written one for each request that reached it, with the exit code that it expects. It writes none when it
does not run, and it does not see what becomes of an answer: that it had no code block, or no reader. The line
has all fields that the daemon's have, `endpoint` says "ask", and `id` is the answer's.
"""

from __future__ import annotations

import fcntl
import os
import time

from portway.ask.client import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from portway.ask.command import Errand

PATIENCE = 0.1  # seconds to wait for whoever writes just now
EVERY = 0.005  # seconds between two tries


def log_path(environ: Mapping[str, str]) -> str:
    """Where the daemon's log is, unless its configuration says otherwise; telemetry.py has the same."""
    base = environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local", "share")
    return os.path.join(base, "portway", "log.jsonl")


def note(errand: Errand, exit_code: int, error: str, environ: Mapping[str, str]) -> None:
    """Append the line, if there is a log: who never ran the daemon, or wants no log, gets none from here.
    What goes wrong is nobody's business: how `ask` ended is said by its exit code."""
    try:
        _append(log_path(environ), dumps(_line(errand, exit_code, error)).encode() + b"\n")
    except OSError:
        pass


def _line(errand: Errand, exit_code: int, error: str) -> dict[str, Any]:
    """The fields of telemetry.line, in its order. It is no answer, so `served_by` and the counts are left out."""
    seconds = time.monotonic() - errand.started
    return {
        "ts": _utc(time.time() - seconds),
        "id": errand.id or None,
        "client": "ask",
        "key": None,
        "endpoint": "ask",
        "model": None if errand.model.startswith("flag:") else errand.model[:128] or None,
        "served_by": None,
        "local": None,
        "stream": errand.stream,
        "status": 0,
        "exit_code": exit_code,
        "error": error,
        "cache_hit": None,
        "demoted": False,
        "attempts": [],
        "prompt_hash": None,
        "prompt_chars": None,
        "response_chars": 0,
        "prompt_tokens": None,
        "completion_tokens": None,
        "truncated": False,
        "cancelled_in": None,
        "latency_s": round(seconds, 6),
        **dict.fromkeys(("queue_s", "load_s", "ttft_s", "decode_tps", "overhead_ms", "saved_usd")),
    }


def _utc(ts: float) -> str:
    seconds, milliseconds = divmod(int(ts * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03d}Z"


def _append(path: str, line: bytes) -> None:
    """In one write, to the file that is at `path` now: see telemetry.LogFile for who else is at work there."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if _locked(file) and os.path.samestat(os.fstat(file), os.stat(path)):  # else it was rotated meanwhile
                end = os.fstat(file).st_size
                half = end and os.pread(file, 1, end - 1) != b"\n"  # somebody was killed in the middle of a line
                os.write(file, b"\n" + line if half else line)
                return
        finally:
            os.close(file)  # which unlocks it
        time.sleep(EVERY)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
