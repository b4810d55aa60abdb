"""SHA-256 of texts: in one go if they are short, and without copying those that are long."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

LONG = 8192  # characters from which a text is hashed by itself: to copy 200 KB takes as long as to hash it


def digest(texts: Sequence[str], start: bytes = b"") -> bytes:
    """32 bytes: of `start` and the texts, one behind the other. Lone surrogates, which JSON may hold, are texts too."""
    if max(map(len, texts), default=0) <= LONG:
        return hashlib.sha256(start + _utf8("".join(texts))).digest()
    sha = hashlib.sha256(start)
    done = 0
    for at, text in enumerate(texts):
        if len(text) > LONG:
            sha.update(_utf8("".join(texts[done:at])))
            sha.update(_utf8(text))
            done = at + 1
    sha.update(_utf8("".join(texts[done:])))
    return sha.digest()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
