"""Why a request gets no place in memory, in words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portway.errors import BackendError
from portway.memory.footprint import shown

if TYPE_CHECKING:
    from portway.memory.arbiter import Lane, Refuse, Wish

SOONEST, LATEST = 1.0, 60.0  # seconds in Retry-After


def does_not_fit(wish: Wish, refusal: Refuse) -> BackendError:
    """It never can, with the arithmetic."""
    backend = wish.runner.backend
    beside = f", of which {shown(refusal.beside)} can't be unloaded" if refusal.beside else ""
    return BackendError(
        "does_not_fit",
        f"{wish.name} needs {refusal.need.words}; the budget is {shown(refusal.limit)}{beside}",
        detail=f"{shown(refusal.need.size)} of {shown(refusal.limit)}",
        way_out=f"ask a smaller model, raise memory.budget, or set backends.{backend}.local = false if that server "
        "runs on another machine",
    )


def queue_full(backend: str, lane: Lane, queued: int, held: float) -> BackendError:
    """Too many wait already. held: seconds that a place is held, roughly."""
    return BackendError(
        "queue_full",
        f"{lane.max_queue} requests wait for {backend} already",
        detail=f"{lane.max_queue} waiting",
        retry_after=_bounded(held * (queued + 1) / (lane.max_parallel or 1)),
    )


def no_room(wish: Wish, now: float, held: float) -> BackendError:
    """Its time was over before what it waited for."""
    why = wish.why or "its turn"
    return BackendError(
        "no_room",
        f"waited {now - wish.since:.1f} s for {why}",
        detail=f"waited for {why}",
        retry_after=_bounded(held),
    )


def cold(takes: float, warm: str) -> BackendError:
    """Loading it takes so many seconds, and `warm` is loaded."""
    return BackendError(
        "cold",
        f"skipped, as loading it takes about {takes:.0f} s, and {warm} is loaded",
        detail=f"load {takes:.0f}s",
    )


def fixed(name: str, backend: str) -> BackendError:
    """It can't be unloaded at all."""
    return BackendError(
        "unsupported",
        f"{name} can't be unloaded: the server of backend {backend} has that one model for as long as it runs",
        way_out="stop that server; one that unloads is llama-server without --model (a router), or llama-swap",
    )


def _bounded(seconds: float) -> float:
    return min(LATEST, max(SOONEST, seconds))
