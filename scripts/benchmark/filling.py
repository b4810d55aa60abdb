"""A cache file with very many answers that nobody asks for."""

from __future__ import annotations

import os
import time
from pathlib import Path

from portway.cache.file import CacheFile, Row

BATCH = 20_000
DOCUMENT = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"%b"},"finish_reason":"stop"}]}'


def fill(path: Path, count: int) -> None:
    """Add `count` answers. Sorted by key, as the table is: so a million takes seconds, not minutes."""
    file = CacheFile(str(path), 5.0)
    now = time.time()
    document = DOCUMENT % (b"x" * 300)
    keys = sorted((os.urandom(32) for _ in range(max(0, count))), key=_row_id)
    for start in range(0, len(keys), BATCH):
        rows = [Row(key, "spare", now, "", document) for key in keys[start : start + BATCH]]
        file.write(rows)
    file.close()


def _row_id(key: bytes) -> int:
    return int.from_bytes(key[:8], "big", signed=True)
