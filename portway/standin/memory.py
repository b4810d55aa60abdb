"""The memory that the stand-in's models live in: who is loaded, who has to wait, who has to go.

It decides and counts and never waits: a request that can't have its model yet is told so, and hears
of every change by a Bell. Several stand-ins may share one Memory, as several engines share a machine;
each of them, like a real one, evicts only its own models and is blind to the others'.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from portway.standin.answers import StandInModel
from portway.standin.wire import Bell

KEEP_ALIVE = 300.0  # seconds; Ollama's own default


@dataclass(slots=True, eq=False)
class Resident:
    """One loaded model. Sizes are bytes, times are seconds of the memory's clock."""

    owner: str
    model: StandInModel
    num_ctx: int
    size: int
    keep_alive: float  # math.inf = for ever
    loading: bool = True
    users: int = 1
    variant: tuple[object, ...] = ()
    expires_at: float | None = None  # None until its first use is over; moves at the end of each


@dataclass(frozen=True, slots=True)
class Stats:
    """What has happened so far. `overcommits` counts the loads that left more resident than the
    budget; a reload counts as an unload and a load too. peak, resident: bytes."""

    loads: int
    unloads: int
    reloads: int
    overcommits: int
    peak: int
    resident: int


@dataclass(slots=True)
class _Counts:
    loads: int = 0
    unloads: int = 0
    reloads: int = 0
    overcommits: int = 0
    peak: int = 0


@dataclass(slots=True)
class Memory:
    """`budget` bytes (None = no limit) for the models of one or more stand-ins.

    evict: make room like Ollama, the shortest keep_alive first, idle ones only; without it a load
    that doesn't fit goes ahead. Either way a model that can't fit alone is loaded, and counted.
    """

    budget: int | None = None
    evict: bool = False
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)  # guards all below
    _residents: list[Resident] = field(default_factory=list)
    _counts: _Counts = field(default_factory=_Counts)
    _bells: set[Bell] = field(default_factory=set)

    # --- for one request, in this order: claim until it is given, loaded if it has to load, release

    def claim(
        self,
        owner: str,
        model: StandInModel,
        num_ctx: int,
        keep_alive: float | None = None,
        parallel: int | None = None,
        variant: tuple[object, ...] = (),
    ) -> Resident | None:
        """A use of the model, or None: wait for a change and ask again.

        keep_alive: seconds; None leaves what was said earlier, unless it has to load. parallel: how
        many may use it at once. variant: what else makes it load anew, beside num_ctx. If `loading`
        is set, the caller is the one to load it, and calls loaded() when the time is over, or abandon().
        """
        with self._lock:
            self._expire()
            mine = [r for r in self._residents if r.owner == owner]
            found = next((r for r in mine if r.model.runner == model.runner), None)
            if found is not None and found.loading:
                return None
            if found is not None and (found.num_ctx, found.variant) == (num_ctx, variant):
                return self._join(found, keep_alive, parallel)
            if any(r.loading or (r is found and r.users) for r in mine):
                return None  # one load at a time, and none of a model in use
            kept = KEEP_ALIVE if keep_alive is None else keep_alive
            fresh = Resident(owner, model, num_ctx, model.resident_bytes(num_ctx), kept, variant=variant)
            if not self._make_room(mine, found, fresh.size):
                return None
            return self._begin_load(fresh, found)

    def loaded(self, resident: Resident) -> None:
        """The load is over; others may join."""
        self._change(lambda: setattr(resident, "loading", False))

    def abandon(self, resident: Resident) -> None:
        """The load was given up: the client left, or it failed."""
        self._change(lambda: self._remove(resident))

    def release(self, resident: Resident) -> None:
        """One user less; the last one starts the clock of keep_alive."""
        with self._lock:
            resident.users -= 1
            if not resident.users and resident in self._residents:
                resident.expires_at = self.clock() + resident.keep_alive
            self._expire()
        self._ring()

    # --- for everybody

    def unload(self, owner: str, model: StandInModel) -> None:
        """Unload a model as soon as nobody uses it."""
        with self._lock:
            for resident in self._residents:
                if (resident.owner, resident.model.runner) == (owner, model.runner):
                    resident.keep_alive, resident.expires_at = 0.0, self.clock()
            self._expire()
        self._ring()

    def forget(self, owner: str) -> None:
        """The owner's process ended, and its models with it."""
        with self._lock:
            for resident in [r for r in self._residents if r.owner == owner]:
                self._remove(resident)
        self._ring()

    def residents(self, owner: str | None = None) -> list[tuple[Resident, float]]:
        """What is loaded, of one owner or of all, each with the seconds until it expires."""
        with self._lock:
            self._expire()
            now = self.clock()
            return [
                (r, r.keep_alive if r.expires_at is None else r.expires_at - now)
                for r in self._residents
                if owner in (None, r.owner)
            ]

    def stats(self) -> Stats:
        """The counters as they are now."""
        with self._lock:
            self._expire()
            counts = self._counts
            return Stats(
                counts.loads, counts.unloads, counts.reloads, counts.overcommits, counts.peak, self._resident()
            )

    def watch(self, bell: Bell) -> None:
        """Ring `bell` at every change, until unwatch()."""
        with self._lock:
            self._bells.add(bell)

    def unwatch(self, bell: Bell) -> None:
        """No longer."""
        with self._lock:
            self._bells.discard(bell)

    # --- under the lock

    def _join(self, found: Resident, keep_alive: float | None, parallel: int | None) -> Resident | None:
        if parallel is not None and found.users >= parallel:
            return None
        found.users += 1
        if keep_alive is not None:
            found.keep_alive = keep_alive
        return found

    def _make_room(self, mine: list[Resident], found: Resident | None, size: int) -> bool:
        """Evict until `size` fits; False = what would have to go is in use."""
        others = sorted((r for r in mine if r is not found), key=lambda r: (r.keep_alive, r.model.name))
        while self.evict and self.budget is not None and others and sum(r.size for r in others) + size > self.budget:
            idle = next((r for r in others if not r.users), None)
            if idle is None:
                return False
            others.remove(idle)
            self._remove(idle)
        return True

    def _begin_load(self, fresh: Resident, found: Resident | None) -> Resident:
        counts = self._counts
        if found is not None:
            self._remove(found)
            counts.reloads += 1
        self._residents.append(fresh)
        counts.loads += 1
        counts.peak = max(counts.peak, self._resident())
        if self.budget is not None and self._resident() > self.budget:
            counts.overcommits += 1
        return fresh

    def _expire(self) -> None:
        now = self.clock()
        for resident in list(self._residents):
            if not resident.users and resident.expires_at is not None and resident.expires_at <= now:
                self._remove(resident)

    def _remove(self, resident: Resident) -> None:
        if resident in self._residents:
            self._residents.remove(resident)
            self._counts.unloads += 1

    def _resident(self) -> int:
        return sum(r.size for r in self._residents)

    # --- around it

    def _change(self, change: Callable[[], None]) -> None:
        with self._lock:
            change()
        self._ring()

    def _ring(self) -> None:
        with self._lock:
            bells = list(self._bells)
        for bell in bells:
            bell.ring()
