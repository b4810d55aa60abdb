"""What the daemon says on stderr, and so in the journal. Nothing that is told there can pass for another message."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One message. What a server or a client had a part in stays inside it: see `message`."""
    try:
        sys.stderr.write(message(text))
        sys.stderr.flush()
    except OSError:
        pass  # nobody reads it, or its disk is full: no reason to fail whoever had something to say


def message(text: str) -> str:
    """`text` as it is written: its first line begins with `portway: `, each further one with two blanks, and
    all of it is `printable`."""
    first, *rest = text.split("\n")
    lines = [f"portway: {first}", *(f"  {line}" for line in rest if line)]
    return "".join(f"{printable(line)}\n" for line in lines)


def printable(line: str) -> str:
    """A line as a terminal may be given it: what it would obey, or could not show, stands there as an escape."""
    return line if line.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
