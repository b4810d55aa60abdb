"""What a model takes in memory, for people: its weights and its context, by the daemon's own arithmetic (footprint.py).

Pure. What is measured once a model has been loaded is better than all of this, and is the daemon's matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from portway.memory.footprint import PER_TOKEN, per_token, shown

SHORT = 4096  # tokens; what a server takes that is told no window
gb = shown


class Footprint(NamedTuple):
    """Bytes. known: the context's part follows from the model's own numbers, and is no rule of thumb."""

    weights: int
    context: int
    num_ctx: int
    known: bool

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.context

    def __str__(self) -> str:
        if not self.context:
            return gb(self.weights)
        sign = "" if self.known else "~"
        return f"{gb(self.weights)} + {sign}{gb(self.context)} for {self.num_ctx} tokens = {gb(self.total)}"


def footprint(
    size: int, num_ctx: int | None, info: Mapping[str, Any] | None = None, each: float | None = None
) -> Footprint:
    """Of a model with a file of `size` bytes. info: /api/show's model_info. each: its context's bytes for each token,
    if they are known otherwise."""
    known = context_bytes(info or {}) if each is None else each
    window = num_ctx or SHORT
    rough = PER_TOKEN * size**0.5
    return Footprint(size, int(window * (rough if known is None else known)), window, known is not None)


def context_bytes(info: Mapping[str, Any]) -> float | None:
    """What a token of context takes, from a model's own numbers; None if some are missing."""
    return per_token(info)


def read_size(text: str) -> int | None:
    """Bytes of "24GB" or "16384MB", as memory is sold: powers of 1024. None if it is no size."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*([MGT])(?:I?B)?", text.strip().upper())
    return round(float(found[1]) * 1024 ** {"M": 2, "G": 3, "T": 4}[found[2]]) if found else None
