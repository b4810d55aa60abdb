"""Where the answer to a call comes from: the cache, an identical call under way, or a target.

`Answers.find` is the one place that knows the order; what it yields is read the same way whatever it
is. A cache that is slow or broken is a miss (cache.py), so nothing here can fail that the target does
not fail by itself. Knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from portway import replay
from portway.cache_rules import Control, is_storable, request_key, why_bypassed
from portway.errors import ClientError, PortwayError
from portway.flights import Crashed, Flights, Landed, Leader
from portway.wire import WireError

if TYPE_CHECKING:
    from portway.cache import Cache, Entry
    from portway.call import Call, Served, Watch
    from portway.routing import Router

MAX_KEPT = 4 * 1024 * 1024  # bytes of a stream kept for the cache and for those who wait


@dataclass(slots=True)
class Facts:
    """What the client is told of its answer. cache: HIT, MISS or BYPASS. age: seconds, of a stored one."""

    served_by: str
    cache: str
    attempts: str = ""
    warnings: tuple[str, ...] = ()
    age: int | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """An answer for everybody who waits for the same one. document: see replay.py."""

    document: bytes
    served_by: str
    attempts: str
    warnings: tuple[str, ...]


class Found:
    """An answer, whole in the cache or on its way from a target. Read it by `pieces` or by `body`."""

    def __init__(self, call: Call, facts: Facts, *, served: Served | None = None, document: bytes = b"") -> None:
        self.facts = facts
        self.served = served
        self.document = document
        self.kept: list[bytes] | None = None  # a stream's pieces, for who comes after; None = not kept
        self.leader: Leader[Shared] | None = None
        self._call = call
        self._kept_bytes = 0

    def body(self) -> bytes:
        """The plain answer."""
        if self.served is None:
            return replay.replay(self.document, self._call, self.facts.served_by)
        return self.served.whole or b""

    def pieces(self) -> Iterator[bytes]:
        """The stream, as Answer.pieces has it."""
        if self.served is None:
            yield replay.replay(self.document, self._call, self.facts.served_by)
            return
        self._keep(self.served.first)
        yield self.served.first
        for piece in self.served.rest:
            self._keep(piece)
            yield piece

    def late_warnings(self) -> list[str]:
        """Those that have come up since the answer began."""
        warnings = self.served.answer.warnings if self.served else []
        return [warning for warning in warnings if warning not in self.facts.warnings]

    def is_awaited(self) -> bool:
        """Whether somebody else waits for it, so that it is to be read on when its client has left."""
        return self.leader is not None and self.leader.has_waiters()

    def close(self) -> None:
        """Of the answer nothing more is read."""
        if self.served is not None:
            self.served.answer.close()

    def _keep(self, piece: bytes) -> None:
        if self.kept is not None:
            self._kept_bytes += len(piece)
            if self._kept_bytes > MAX_KEPT:
                self.kept = None
            else:
                self.kept.append(piece)


class Answers:
    """Finds answers by one configuration; `cache` and `flights` outlive it. cache: None = there is none."""

    def __init__(self, router: Router, cache: Cache | None, flights: Flights[Shared]) -> None:
        self._router = router
        self._cache = cache
        self._flights = flights

    @contextmanager
    def find(self, call: Call, control: Control, watch: Watch, *, fallback: bool) -> Iterator[Found]:
        """The answer, to be read and closed within. Raises what Router.serve does, and ClientError 504
        where the client wants a stored answer or none."""
        cache = self._cache
        bypass = why_bypassed(call, call.model.cache) if cache else "off"
        if cache is None or bypass or control.no_store:
            _refuse_if_only_cached(control)
            yield _Asked(self._router, call, watch, fallback).found("BYPASS")
            return
        key = request_key(call, call.model)
        seen = cache.puts
        oldest = _shorter(call.model.cache, control.max_age)
        stored = None if control.no_cache else cache.get(key, call.model.name, oldest)
        if stored is not None:
            yield _told_again(call, stored)
            return
        _refuse_if_only_cached(control)
        asked = _Asked(self._router, call, watch, fallback)
        if control.no_cache:
            found = asked.found("MISS", keep=True)
            yield found
            _store(cache, key, call, found)
            return
        # without fallback nobody may get a demoted answer from another's call
        place = self._flights.join(key if fallback else key + b"!")
        if not isinstance(place, Leader):
            outcome = place.wait(watch, time.monotonic() + call.model.timeouts.total)
            if not isinstance(outcome, Leader):
                yield _shared(call, outcome)
                return
            place = outcome
        with place as leader:
            if cache.puts != seen and (stored := cache.get(key, call.model.name, call.model.cache)):
                leader.publish(Shared(stored.document, stored.served_by, "", _split(stored.warning)))
                yield _told_again(call, stored)
                return
            found = _Asked(self._router, call, leader.watch(watch), fallback).found("MISS", keep=True)
            found.leader = leader
            yield found
            _store(cache, key, call, found)
            _publish(leader, found)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A call that a target has to answer."""

    router: Router
    call: Call
    watch: Watch
    fallback: bool

    def found(self, verdict: str, *, keep: bool = False) -> Found:
        served = self.router.serve(self.call, self.watch, fallback=self.fallback)
        attempts = "; ".join(map(str, served.attempts)) if len(served.attempts) > 1 else ""
        facts = Facts(served.model.name, verdict, attempts, tuple(served.answer.warnings))
        found = Found(self.call, facts, served=served)
        found.kept = [] if keep and self.call.stream else None
        return found


def _refuse_if_only_cached(control: Control) -> None:
    if control.only_if_cached:
        raise ClientError(
            "There is no stored answer, and Cache-Control: only-if-cached wants no other.",
            status=504,
            type="api_error",
            code="not_cached",
        )


def _shorter(lifetime: float, max_age: float | None) -> float:
    return lifetime if max_age is None else min(lifetime, max_age)


def _told_again(call: Call, entry: Entry) -> Found:
    facts = Facts(entry.served_by, "HIT", warnings=_split(entry.warning), age=int(entry.age()))
    return Found(call, facts, document=entry.document)


def _shared(call: Call, outcome: Landed[Shared] | Crashed | None) -> Found:
    if isinstance(outcome, Landed):
        value = outcome.value
        facts = Facts(value.served_by, "HIT", value.attempts, value.warnings, age=0)
        return Found(call, facts, document=value.document)
    if outcome is None:
        seconds = call.model.timeouts.total
        raise PortwayError(
            f"An identical request was under way and did not end within {seconds:g} s.",
            status=504,
            type="api_error",
            code="total_timeout",
            headers={"x-should-retry": "false"},
        )
    raise _again(outcome.error)


def _again(error: BaseException) -> BaseException:
    """Another's error for one more client: a copy, since raising an error changes it."""
    if not isinstance(error, PortwayError):
        return RuntimeError(f"an identical request failed: {error!r}")
    copy = error.__class__.__new__(error.__class__)
    copy.__dict__.update(error.__dict__)
    copy.args = error.args
    return copy


def _store(cache: Cache, key: bytes, call: Call, found: Found) -> None:
    served = found.served
    if served is None or not is_storable(call, served):
        return
    warning = "; ".join(served.answer.warnings)
    name = served.model.name
    if served.whole is not None:
        cache.put(key, partial(replay.clean_plain, served.whole), model=name, size=len(served.whole), warning=warning)
    elif found.kept is not None:
        size = sum(map(len, found.kept))
        make = partial(replay.clean_stream, found.kept, served.answer.tally)
        cache.put(key, make, model=name, size=size, warning=warning)


def _publish(leader: Leader[Shared], found: Found) -> None:
    """Whatever came: also a demoted answer, or one that was cut short, is what the others would have got."""
    served = found.served
    if served is None or not leader.has_waiters():
        return
    try:
        if served.whole is not None:
            document = replay.plain_document(served.whole)
        elif found.kept is not None:
            document = replay.stream_document(found.kept, served.answer.tally)
        else:
            return
    except WireError:
        return  # one of those who wait asks for itself
    leader.publish(Shared(document, found.facts.served_by, found.facts.attempts, tuple(served.answer.warnings)))


def _split(warning: str) -> tuple[str, ...]:
    return tuple(warning.split("; ")) if warning else ()
