"""What came of it: lines for people, a document for programs, docs/reliability.md."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.guards import table
from scripts.recovery_list import RECOVERIES
from scripts.torture_rows import ROOT, Row

PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- made by scripts/torture.py --write docs/reliability.md -->"

INTRODUCTION = """\
# Reliability

This page is written by the command that tortures Portway; do not edit it. To repeat it:

```sh
python3 scripts/torture.py {words}
```

It needs Python and nothing else, uses loopback alone, starts a Portway of its own for everything it does, and ends by
itself. `--quick` takes about two minutes, `--only NAME` a part, `--soak 3600` soaks for an hour. What can't be tried on
a machine (a full disk needs Linux with user namespaces, real model servers have to be there) is said to be not tried.
The tests run the same code with fewer tries.

## What is asserted

**A backend that fails.** Each way to fail is played to streams and plain answers, behind an Ollama and behind an OpenAI
server, with a chain and without one. In each of these cells the client gets a right answer or one clear error, within
the time limits; `X-Served-By` is who really said it; which model is asked next, the status and the cooldown are what
the [table of reasons](reference.md#reasons) says, which is read from that page; the backend was asked once for each
attempt and never again; the same question asked once more is answered right, and out of the cache only if the first
answer was; each request's line in the log says the same. When all cells are through, the daemon has no thread,
descriptor, connection or place in a queue less or more than before.

**A machine that runs short.** While it has no room, no descriptor, no thread or another time of day, every request is
answered right or told clearly why not; when it is over nothing is missing in the log, the cache is whole, and nothing
needs a restart.

**Load.** Requests run over chains whose backends are killed and started again at random; each answer is compared word
by word with what that backend says to that question. `kill -9` and SIGTERM come while requests are in flight. The soak
lays a straight line through what the daemon holds (least squares), the first third left out.
"""

RECOVERING = """
## What holds it up

Each line was taken away in a copy of the source, and the test beside it failed: `python3 scripts/guards.py` does so
again for all of them, and for the guards in [SECURITY.md](../SECURITY.md).
"""

LIMITS = """
## What cannot be held

- A stream that has begun ends with its backend: what was sent can't be taken back, so the client gets an error as the
  last event, and no `[DONE]`. Plain answers fall back to the last byte.
- `kill -9` ends the requests in flight without a word, and loses the log's lines of the last 0.05 s and what the cache
  had not written yet. What was answered before that is in the log.
- A request that reaches a daemon between its last accept and its end is refused or reset by the system, unread.
- A backend that reads a request and then resets a connection that was used before is asked once more, as that is what
  its system does with a request that it never saw. One that closes it in an orderly way is not.
- While there is no descriptor left, a request may wait to be accepted, or be told that its backend can't be reached.
- A clock that is set forward by more than a model's `cache` ends its entries.
- A resolver that hangs holds a thread for each request that waits for a name, until it answers; addresses need none.
"""


def line(row: Row) -> str:
    """For the terminal."""
    verdict = "not tried" if not row.tries else "held" if row.holds else "FAILED"
    return f"  {verdict:<9} {row.held:>6,} of {row.tries:>6,}  {row.name}{f'  ({row.note})' if row.note else ''}"


def document(found: Mapping[str, Sequence[Row]], about: Mapping[str, Any]) -> dict[str, Any]:
    """The whole run."""
    rows = [row for part in found.values() for row in part]
    return {
        "held": bool(rows) and all(row.holds for row in rows),
        "tries": sum(row.tries for row in rows),
        "failed": [row.name for row in rows if not row.holds],
        "not_tried": [row.name for row in rows if not row.tries],
        "about": dict(about),
        "rows": [
            {"part": title, "name": row.name, "tries": row.tries, "held": row.held, "note": row.note}
            for title, part in found.items()
            for row in part
        ],
    }


def markdown(found: Mapping[str, Sequence[Row]], about: Mapping[str, Any], words: Sequence[str]) -> str:
    """docs/reliability.md."""
    parts = [INTRODUCTION.format(words=" ".join(words))]
    parts.append("## The table\n\n" + "\n".join(summary(found)) + "\n")
    for title, rows in found.items():
        lines = [f"| {_cell(row.name)} | {row.tries:,} | {_verdict(row)} | {_cell(row.note)} |" for row in rows]
        parts.append("\n".join([f"### {title}\n", "| what | tried | held | |", "|---|---|---|---|", *lines, ""]))
    parts.append("Where and when:\n\n| | |\n|---|---|")
    parts[-1] += "".join(f"\n| {name} | {value} |" for name, value in about.items())
    parts += [RECOVERING, *table(RECOVERIES, "promise"), LIMITS]
    return "\n".join(parts)


def quoted(readme: str, found: Mapping[str, Sequence[Row]]) -> str:
    """README with this run's summary behind MARK, in place of the one that stood there."""
    before, mark, after = readme.partition(MARK)
    return "\n".join([before + mark, *summary(found), after[after.index("\n\n") + 1 :]]) if mark else readme


def summary(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """A line for each part, as README quotes them."""
    lines = ["| | ways | tried | held |", "|---|---|---|---|"]
    for title, rows in found.items():
        tried = [row for row in rows if row.tries]
        tries, held = sum(row.tries for row in tried), sum(row.held for row in tried)
        lines.append(f"| {title} | {len(tried)} | {tries:,} | {'all' if held == tries else f'**{held:,}**'} |")
    return lines


def _verdict(row: Row) -> str:
    if not row.tries:
        return "not tried"
    return "all" if row.holds else f"**{row.held:,}**"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def about() -> dict[str, Any]:
    """When, what and where."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "processors": os.cpu_count(),
    }


def _commit() -> str:
    """The commit of the clone, and whether its files differ from it; "unknown" without one."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],  # noqa: S607 - the user's own git
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said.stdout.strip() or "unknown"
