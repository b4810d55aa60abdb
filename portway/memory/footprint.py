"""How much memory a model takes: from what is known of it, else estimated. Pure; sizes are bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from portway.memory.arbiter import Need

CACHE_VALUE = 2  # bytes of one number in the KV cache: f16, unless a server is told otherwise
# Bytes a token of the window takes, times the root of the weights' bytes, where nothing else is known: 100 KB for
# a model of 5 GB, 200 KB for one of 18 GB, which is what those with grouped attention take, or more.
PER_TOKEN = 1.5
USUAL_BITS = 4.8  # a weight, of a name that does not say it: Q4_K_M, what Ollama and most others give

_PARAMETERS = re.compile(r"(?<![a-z0-9.])(?:([0-9]+)x)?([0-9]+(?:\.[0-9]+)?)(b|m)(?![a-z0-9])")
_BITS: tuple[tuple[str, float], ...] = (  # a part of a name, and the bits of a weight that it means
    ("bf16", 16.0), ("fp16", 16.0), ("f16", 16.0), ("f32", 32.0), ("fp8", 8.5), ("mxfp4", 4.25), ("int8", 8.5),
    ("8bit", 8.5), ("4bit", 4.5), ("q8", 8.5), ("q6", 6.6), ("q5", 5.7), ("q4", 4.8), ("q3", 3.9), ("q2", 3.0),
    ("iq4", 4.4), ("iq3", 3.5), ("iq2", 2.6), ("iq1", 1.8),
)  # fmt: skip


def need_of(*, weights: int | None, said: int | None, name: str, window: int, per_token: float | None) -> Need | None:
    """What a model takes before it was ever measured; None = there is no telling.

    weights: of its file, as the backend says. said: by the configuration, for all of it. per_token: bytes a
    token of the window takes, None = not known.
    """
    if said is not None:
        return Need(said, said, shown(said))
    sure = weights or 0
    size = weights or estimated_weights(name)
    if size is None:
        return None
    context = int(window * (PER_TOKEN * size**0.5 if per_token is None else per_token))
    if not context:
        return Need(size, sure, shown(size))
    return Need(size + context, sure, f"{shown(size)} + {shown(context)} for {window} tokens")


def measured(size: int) -> Need:
    """What it took the last time."""
    return Need(size, size, f"{shown(size)}, as measured")


def estimated_weights(name: str) -> int | None:
    """From a name like qwen2.5-7b-instruct-q4_k_m; None if it has no number of parameters."""
    lower = name.lower()
    found = _PARAMETERS.search(lower)
    if found is None:
        return None
    count = float(found[2]) * (1e9 if found[3] == "b" else 1e6)
    if found[1]:
        count *= int(found[1]) * 0.85  # the experts of a mixture share the rest
    bits = next((bits for part, bits in sorted(_BITS, key=lambda pair: -len(pair[0])) if part in lower), USUAL_BITS)
    return int(count * bits / 8)


def per_token(info: Mapping[str, Any]) -> float | None:
    """Bytes of the KV cache for one token, from Ollama's model_info (GGUF's metadata); None if it does not say.
    Of a model with sliding windows it is more than it takes."""
    arch = info.get("general.architecture")
    layers, width = _count(info.get(f"{arch}.block_count")), _count(info.get(f"{arch}.embedding_length"))
    heads = info.get(f"{arch}.attention.head_count")
    most = max(map(_count, heads), default=0) if isinstance(heads, list) else _count(heads)
    kv_heads = info.get(f"{arch}.attention.head_count_kv", heads)
    in_all = sum(map(_count, kv_heads)) if isinstance(kv_heads, list) else layers * _count(kv_heads)
    if not most or not in_all or not width:
        return None
    key = _count(info.get(f"{arch}.attention.key_length")) or width / most
    value = _count(info.get(f"{arch}.attention.value_length")) or width / most
    return in_all * (key + value) * CACHE_VALUE


def _count(value: Any) -> int:
    """A number of something; 0 for what is none."""
    return value if isinstance(value, int) and value > 0 else 0


def shown(count: float) -> str:
    """Bytes as people say them: "18.6 GB", a GB being 1024 MB as in the configuration."""
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GB"
