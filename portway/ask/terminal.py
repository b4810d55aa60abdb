"""Where `ask` writes: the answer on stdout, everything else on stderr, each fit for what it is.

A pipe gets the answer's text as it is, in UTF-8. A terminal gets nothing that it would obey: a
model's output is text, never a command to the screen. Nothing here knows HTTP or models.
"""

from __future__ import annotations

import os
import sys
from time import monotonic

TYPE_CHECKING = False  # typing itself is not imported: it would take longer than all of this
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

SPINNER_AFTER = 0.3  # seconds of waiting before it shows: an answer from the cache makes no flicker
SPINNER_EVERY = 0.1  # seconds between two of its pictures
LABEL_CHARS = 40  # a spinner that fills more than its line could not be erased

_PICTURES = "\u280b\u2819\u2839\u2838\u283c\u2834\u2826\u2827\u2807\u280f"
_ASCII_PICTURES = "|/-\\"
_ERASE_LINE = "\r\x1b[K"


class Terminal:
    """stdout and stderr of this process.

    answers_shown: stdout is a terminal, so a person reads along. spins: wait() has something to show.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        obeys_escapes = environ.get("TERM", "dumb") != "dumb"
        self.answers_shown = _is_terminal(sys.stdout)
        self._notes_shown = _is_terminal(sys.stderr)
        self._out_encoding = sys.stdout.encoding if self.answers_shown else "utf-8"
        self._err_encoding = sys.stderr.encoding if self._notes_shown else "utf-8"
        self._dims = self._notes_shown and obeys_escapes and not environ.get("NO_COLOR")
        self.spins = self._notes_shown and obeys_escapes
        self._started = monotonic()
        self._drawn_at = self._started + SPINNER_AFTER - SPINNER_EVERY
        self._drawn = 0
        self._out_at_start = True  # of a line
        self._err_at_start = True

    def answer(self, text: str) -> None:
        """A piece of the answer."""
        if not text:
            return
        self._settle()
        if not self._err_at_start and self.answers_shown:
            self._write_note("\n")
        self._out_at_start = text.endswith("\n")
        _write(1, (harmless(text) if self.answers_shown else text).encode(self._out_encoding, "replace"))

    def finish_line(self) -> None:
        """End the answer's last line, as a text file's last line ends."""
        if not self._out_at_start:
            self.answer("\n")

    def thinking(self, text: str) -> None:
        """A piece of the model's reasoning: dimmed, so that it is not taken for the answer."""
        if not text:
            return
        self._settle()
        shown = harmless(text) if self._notes_shown else text
        self._write_note(f"\x1b[2m{shown}\x1b[22m" if self._dims else shown)
        self._err_at_start = text.endswith("\n")

    def note(self, text: str) -> None:
        """A line of its own that is not part of the answer."""
        self.break_off()
        begin = "" if self._err_at_start else "\n"
        self._write_note(f"{begin}{harmless(text) if self._notes_shown else text}\n")

    def break_off(self) -> None:
        """Make room below whatever is on the screen; what went into a pipe is left as it is."""
        self.erase()
        if self.answers_shown:
            self.finish_line()

    def wait(self, label: str) -> None:
        """Show that time passes, if it is time for that. Call it often."""
        now = monotonic()
        if not self.spins or now - self._drawn_at < SPINNER_EVERY:
            return
        pictures = _PICTURES if _is_unicode(self._err_encoding) else _ASCII_PICTURES
        picture = pictures[self._drawn % len(pictures)]
        self._drawn_at, self._drawn = now, self._drawn + 1
        label = harmless(label)[:LABEL_CHARS]
        self._write_note(f"\r{picture} {label} {now - self._started:.0f}s\x1b[K", at_start=True)

    def erase(self) -> None:
        """Take the spinner off the screen; it may come back."""
        if self._drawn:
            self._drawn = 0
            self._write_note(_ERASE_LINE)

    def _settle(self) -> None:
        """Text is about to take the place of the spinner, for good."""
        self.erase()
        self.spins = False

    def _write_note(self, text: str, *, at_start: bool | None = None) -> None:
        self._err_at_start = text.endswith("\n") or text == _ERASE_LINE if at_start is None else at_start
        if not _is_unicode(self._err_encoding):
            text = text.replace("\u2192", "->")
        try:
            _write(2, text.encode(self._err_encoding, "replace"))
        except OSError:
            pass  # nobody reads what is beside the answer; the answer still counts


def harmless(text: str) -> str:
    r"""`text` as a terminal may be given it: ESC becomes a visible \u241b, and so on.

    Control characters move the cursor, rename the window, set the clipboard; bidirectional overrides
    show code in another order than it runs in. Tabs and line ends stay, a carriage return goes.
    """
    if text.isprintable() or text.replace("\n", "").isprintable():
        return text
    return text.translate(_replacements())


def _replacements() -> dict[int, str | None]:
    table: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20)}
    table |= {0x7F: "\u2421", 0x0A: "\n", 0x09: "\t", 0x0D: None}
    invisible = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    return table | {code: f"<{code:04X}>" for code in invisible}


def _is_terminal(stream: TextIO | None) -> bool:
    """None stands for a descriptor that was closed before the start."""
    return stream is not None and stream.isatty()


def _is_unicode(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8")


def _write(descriptor: int, data: bytes) -> None:
    """All of it, at once: a buffer would have to be emptied again at exit, into a pipe that may be closed."""
    while data:
        data = data[os.write(descriptor, data) :]
