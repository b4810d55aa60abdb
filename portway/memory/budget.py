"""How much memory there is for models, and whose models take of it. Pure; sizes are bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portway.memory.arbiter import Budget

if TYPE_CHECKING:
    from portway.config import Backend
    from portway.config import Memory as Rule
    from portway.memory.machine import Reading


def budget_of(rule: Rule, reading: Reading, resident: int) -> Budget:
    """Bytes for models. resident: what those that are loaded take now.

    Without a budget of the user's it follows the machine: what others do not use is for models, so that idle
    ones go when memory gets short; but only what exceeds the machine itself is ever refused, since what is
    short now may be free soon, and a number that is wrong must not keep anybody from trying.
    """
    if rule.budget is not None:
        return Budget(rule.budget, rule.budget, firm=True)
    if reading.total is None or reading.apart:
        return Budget()
    ceiling = max(0, reading.total - rule.reserve)
    if reading.available is None:
        return Budget(ceiling, ceiling)
    return Budget(max(0, min(ceiling, reading.available + resident - rule.reserve)), ceiling)


def is_here(backend: Backend) -> bool:
    """Whether a backend's models live in this machine's memory: as configured, else by its address."""
    if backend.local is not None:
        return backend.local
    return backend.host in ("localhost", "::1") or backend.host.startswith("127.")
