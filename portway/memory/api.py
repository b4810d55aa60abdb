"""What people ask of the arbiter, as JSON: what is loaded, what would fit; load this, unload that. Knows no HTTP.

GET /portway/residency   -> overview(..)
POST /portway/load       {"model": NAME} -> load(..), once it is loaded
POST /portway/unload     {"model": NAME} -> unload(..), once it is gone
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from portway.errors import BackendError, PortwayError
from portway.memory.arbiter import LOADED, Resident
from portway.memory.residency import FOR_EVER
from portway.request import find_model

if TYPE_CHECKING:
    from portway.call import Watch
    from portway.config import Model
    from portway.memory.residency import Residency, Seat, Snapshot


def overview(residency: Residency, watch: Watch) -> dict[str, Any]:
    """All that is known. The backends are asked, at most once a second; nothing is loaded or woken."""
    residency.refresh(watch)
    return described(residency.snapshot())


def load(residency: Residency, body: Any, watch: Watch) -> dict[str, Any]:
    """Load a model, making room as a request would. Raises PortwayError and ClientGone."""
    model = _model(residency, body)
    started = time.monotonic()
    try:
        residency.load(model, watch, started + model.timeouts.load)
    except BackendError as error:
        raise _told(error) from error
    return {"model": model.name, "loaded": True, "seconds": round(time.monotonic() - started, 3)}


def unload(residency: Residency, body: Any, watch: Watch) -> dict[str, Any]:
    """Unload a model that nobody uses; `unloaded` is false if it was not loaded. Raises likewise."""
    model = _model(residency, body)
    try:
        unloaded = residency.unload(model, watch, time.monotonic() + model.timeouts.load)
    except BackendError as error:
        raise _told(error) from error
    return {"model": model.name, "unloaded": unloaded}


def health(residency: Residency) -> dict[str, Any]:
    """For /health: from what is known, nobody is asked. unasked: backend -> why its memory is not minded."""
    snapshot = residency.snapshot()
    return {**_memory(snapshot), "loaded": len(snapshot.residents), "waiting": len(snapshot.waiting),
            "unasked": dict(snapshot.problems)}  # fmt: skip


def described(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as JSON. Sizes are bytes, times seconds; null = not known, or for ever where a time is meant."""
    return {
        "memory": _memory(snapshot),
        "backends": {name: _backend(snapshot, name) for name in snapshot.config.backends},
        "loaded": [_resident(snapshot, resident) for resident in sorted(snapshot.residents, key=lambda r: -r.size)],
        "waiting": [
            {"model": wish.name, "seconds": round(snapshot.now - wish.since, 1), "for": wish.why}
            for wish in snapshot.waiting
        ],
        "models": [_listed(snapshot, model) for model in snapshot.config.models.values()],
    }


def _memory(snapshot: Snapshot) -> dict[str, Any]:
    rule, budget, reading = snapshot.config.memory, snapshot.budget, snapshot.reading
    resident = sum(r.size for r in snapshot.residents if r.runner.backend in snapshot.counted)
    if not rule.enabled:
        how = "off"
    elif rule.budget is not None:
        how = "set"
    else:
        how = "auto" if budget.now is not None else "unknown"
    return {
        "budget": how,
        "limit": budget.now,
        "ceiling": budget.ceiling,
        "resident": resident,
        "total": reading.total,
        "available": reading.available,
        "graphics_apart": reading.apart,
    }


def _backend(snapshot: Snapshot, name: str) -> dict[str, Any]:
    backend = snapshot.config.backends[name]
    return {
        "server": snapshot.kinds.get(name),
        "counted": name in snapshot.counted,
        "problem": snapshot.problems.get(name),
        "in_flight": snapshot.in_flight.get(name, 0),
        "waiting": sum(wish.runner.backend == name for wish in snapshot.waiting),
        "max_parallel": backend.max_parallel,
        "max_queue": backend.max_queue,
    }


def _resident(snapshot: Snapshot, resident: Resident) -> dict[str, Any]:
    names = [name for name, seat in snapshot.seats.items() if _is_for(seat, resident)]
    return {
        "backend": resident.runner.backend,
        "model": resident.told or resident.runner.name,
        "names": names,
        "size": resident.size,
        "num_ctx": resident.shape.num_ctx,
        "status": resident.status,
        "in_flight": resident.users,
        "expires_in": _expires_in(snapshot, resident),
        "fixed": resident.fixed,
    }


def _is_for(seat: Seat, resident: Resident) -> bool:
    return seat.runner == resident.runner and resident.shape.serves(seat.shape)


def _expires_in(snapshot: Snapshot, resident: Resident) -> float | None:
    """Until it is unloaded, if nobody uses it any more."""
    until = resident.expires_at - snapshot.now
    if until == math.inf and resident.keep_alive is not None and resident.keep_alive >= 0:
        until = resident.keep_alive
    return round(max(0.0, until), 1) if until < FOR_EVER else None


def _listed(snapshot: Snapshot, model: Model) -> dict[str, Any]:
    seat = snapshot.seats.get(model.name)
    need = seat.need if seat else None
    resident = next((r for r in snapshot.residents if seat and _is_for(seat, r)), None)
    return {
        "name": model.name,
        "backend": model.backend.name,
        "model": model.model,
        "size": need.size if need else None,
        "words": need.words if need else None,
        "measured": bool(seat and seat.measured),
        "present": seat.present if seat else None,
        "loaded": resident is not None and resident.status == LOADED,
        "load_s": snapshot.load_times.get(seat.runner) if seat else None,
        **_fit(snapshot, seat),
    }


def _fit(snapshot: Snapshot, seat: Seat | None) -> dict[str, Any]:
    """Whether it fits alone, and beside what `ask` means without a flag. null = there is no telling."""
    budget = snapshot.budget
    limit = budget.now if budget.firm else budget.ceiling
    usual = snapshot.seats.get(default.name) if (default := snapshot.config.flagged("default")) else None
    fit: dict[str, Any] = {"fits": None, "beside": usual.model.name if usual else None, "fits_beside": None}
    if limit is None or seat is None or seat.need is None or seat.runner.backend not in snapshot.counted:
        return fit
    fit["fits"] = seat.need.size <= limit
    if usual is not None and usual.need is not None and usual.runner.backend in snapshot.counted:
        both = seat.need.size + (0 if usual.runner == seat.runner else usual.need.size)
        fit["fits_beside"] = both <= limit and (usual.runner != seat.runner or usual.shape.serves(seat.shape))
    return fit


def _told(error: BackendError) -> PortwayError:
    """The same for who asked for it himself, and not by way of a chain: its way out, and when to come again."""
    text = error.message.rstrip(".") + "."
    wait = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    return PortwayError(
        f"{text} Way out: {error.way_out}." if error.way_out else text,
        status=error.status,
        type=error.type,
        code=error.code,
        headers=wait,
    )


def _model(residency: Residency, body: Any) -> Model:
    name = body.get("model") if isinstance(body, Mapping) else None
    return find_model(name, residency.snapshot().config)
