"""Thinking that a server left in the text: <think>..</think> at its very start. Pure, incremental.

Ollama splits thinking off by itself, except where it does not: /api/generate for models that bring a
Jinja template, and a model that thinks although it was told not to. Only a tag that opens the answer
counts; one further in is text like any other.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class ThinkTags:
    """`split` each piece of text, `flush` at the end; how the text is cut never changes the sums.

    `opened`: the tag was there. `settled`: what comes from here on is all answer, so nothing needs
    to be split any more.
    """

    def __init__(self) -> None:
        self.settled = False
        self.opened = False
        self._closed = False
        self._held = ""  # may yet become a tag

    def split(self, text: str) -> tuple[str, str]:
        """(thinking, answer) of what `text` settles."""
        if self.settled:
            return "", text
        text, self._held = self._held + text, ""
        if self._closed:
            return "", self._answer(text)
        if not self.opened:
            start = text.lstrip()
            if OPEN.startswith(start[: len(OPEN)]) and len(start) < len(OPEN):
                self._held = text
                return "", ""
            if not start.startswith(OPEN):
                self.settled = True
                return "", text
            self.opened = True
            text = start[len(OPEN) :]
        thinking, closed, rest = text.partition(CLOSE)
        if closed:
            self._closed = True
            return thinking, self._answer(rest)
        keep = _beginning_of(CLOSE, text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], ""

    def flush(self) -> tuple[str, str]:
        """(thinking, answer) of what was held back when the text ended."""
        held, self._held = self._held, ""
        return (held, "") if self.opened else ("", held)

    def _answer(self, text: str) -> str:
        """The white space between the tag and the answer belongs to neither."""
        text = text.lstrip()
        self.settled = bool(text)
        return text


def _beginning_of(tag: str, text: str) -> int:
    """How many of the last characters of `text` may be the first of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
