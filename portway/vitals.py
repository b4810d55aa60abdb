"""What the daemon says of itself: GET /health, and the gauges of GET /metrics. Asks no backend."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from portway import __version__
from portway.memory import api as residency_api
from portway.metrics import Reading

if TYPE_CHECKING:
    from portway.cache.store import Cache
    from portway.memory.residency import Residency
    from portway.routing import Cooling
    from portway.state import State
    from portway.telemetry import Log
    from portway.workers import InFlight


BRIEF = {"status": "ok", "version": __version__}  # what anybody may know


class Serving(Protocol):
    """What of the server is worth telling."""

    in_flight: InFlight

    @property
    def queued(self) -> int:
        """How many requests wait for their turn."""
        ...

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        ...


class Vitals:
    """Reads the daemon's parts. log, cache: None = there is none."""

    def __init__(
        self, server: Serving, cooling: Cooling, residency: Residency, log: Log | None, cache: Cache | None
    ) -> None:
        self._server = server
        self._cooling = cooling
        self._residency = residency
        self._log = log
        self._cache = cache
        self._started = time.monotonic()
        self._started_at = time.time()

    def health(self, state: State) -> dict[str, Any]:
        """For /health, the configuration's own part left out."""
        cooling = sorted(self._cooling.cooling().items())
        return {
            **BRIEF,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "in_flight": self._server.in_flight.count,
            "connections": self._server.connections,
            "unreachable": {name: error.message for name, error in state.catalogue.problems().items()},
            "cooling": [{"backend": b, "model": model, "seconds": round(left, 1)} for (b, model), left in cooling],
            "memory": residency_api.health(self._residency),
            "log": self._log_health(),
            "cache": self._cache_health(),
        }

    def readings(self) -> list[Reading]:
        """For /metrics: numbers that are read at each scrape."""
        server = self._server
        return [
            Reading("in_flight", "Requests under way.", lambda: server.in_flight.count),
            Reading("queue", "Requests that wait for their turn.", lambda: server.queued),
            Reading("backend_queue", "Requests that wait for memory or a backend.", self._waiting, ("backend",)),
            Reading("loaded_model_bytes", "What each loaded model takes.", self._loaded, ("backend", "model")),
            Reading("connections", "Open client connections.", lambda: server.connections),
            Reading("cooling_targets", "Targets that are skipped for a while.", lambda: len(self._cooling.cooling())),
            Reading("log_dropped_total", "Log lines lost.", self._log_dropped, kind="counter"),
            Reading("cache_dropped_total", "Answers not stored.", self._cache_dropped, kind="counter"),
            Reading("build_info", "The version that runs.", lambda: {(__version__,): 1}, ("version",)),
            Reading("start_time_seconds", "When it was started, in Unix time.", lambda: self._started_at),
        ]

    def _log_health(self) -> dict[str, Any] | None:
        return {"dropped": self._log.dropped, "problem": self._log.problem} if self._log else None

    def _cache_health(self) -> dict[str, Any] | None:
        cache = self._cache
        if cache is None:
            return None
        return {"dropped": cache.dropped, "problem": cache.problem or None, "notice": cache.notice or None}

    def _waiting(self) -> dict[tuple[str, ...], float]:
        """By backend, of all that are configured."""
        snapshot = self._residency.snapshot()
        waiting = Counter(wish.runner.backend for wish in snapshot.waiting)
        return {(name,): float(waiting[name]) for name in snapshot.config.backends}

    def _loaded(self) -> dict[tuple[str, ...], float]:
        """By the backends' own names of the models: whatever is loaded, configured or not."""
        residents = self._residency.snapshot().residents
        return {(each.runner.backend, each.told or each.runner.name): float(each.size) for each in residents}

    def _log_dropped(self) -> float:
        return self._log.dropped if self._log else 0

    def _cache_dropped(self) -> float:
        return self._cache.dropped if self._cache else 0
