"""What the daemon says of itself: GET /health, and the gauges of GET /metrics. Asks no backend."""

from __future__ import annotations

import time
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
    from portway.workers import InFlight, Workers


class Serving(Protocol):
    """What of the server is worth telling."""

    in_flight: InFlight
    workers: Workers

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

    def health(self, state: State) -> dict[str, Any]:
        """For /health, the configuration's own part left out."""
        cooling = sorted(self._cooling.cooling().items())
        return {
            "status": "ok",
            "version": __version__,
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
            Reading("queue", "Requests that wait for a thread.", lambda: server.workers.waiting),
            Reading("loaded_model", "Bytes of each model in memory.", self._loaded),
            Reading("connections", "Open client connections.", lambda: server.connections),
            Reading("cooling_targets", "Targets that are skipped for a while.", lambda: len(self._cooling.cooling())),
            Reading("log_dropped_total", "Log lines lost.", self._log_dropped, kind="counter"),
            Reading("cache_dropped_total", "Answers not stored.", self._cache_dropped, kind="counter"),
        ]

    def _log_health(self) -> dict[str, Any] | None:
        return {"dropped": self._log.dropped, "problem": self._log.problem} if self._log else None

    def _cache_health(self) -> dict[str, Any] | None:
        cache = self._cache
        if cache is None:
            return None
        return {"dropped": cache.dropped, "problem": cache.problem or None, "notice": cache.notice or None}

    def _loaded(self) -> dict[str, float]:
        """By the backends' own names of the models: whatever is loaded, configured or not."""
        residents = self._residency.snapshot().residents
        return {resident.told or resident.runner.name: float(resident.size) for resident in residents}

    def _log_dropped(self) -> float:
        return self._log.dropped if self._log else 0

    def _cache_dropped(self) -> float:
        return self._cache.dropped if self._cache else 0
