"""Where the answer to a call comes from: the cache, an identical call under way, or a target.

`Answers.find` is the one place that knows the order; what it yields is read the same way whatever it
is. A cache that is slow or broken is a miss (cache/store.py), so nothing here can fail that the target does
not fail by itself. Knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from portway.cache import replay
from portway.cache.flights import Crashed, Flights, Landed, Leader
from portway.cache.rules import Control, Keys, is_storable, why_bypassed
from portway.call import Composed
from portway.errors import ClientError, PortwayError
from portway.wire.events import WireError
from portway.wire.http1 import field_lines

if TYPE_CHECKING:
    from portway.cache.store import Cache, Entry
    from portway.call import Attempt, Call, Served, Watch
    from portway.routing import Router

MAX_KEPT = 8 * 1024 * 1024  # bytes of a stream kept for the cache and for those who wait: some 40,000 tokens


@dataclass(slots=True)
class Facts:
    """What the client is told of its answer. cache: HIT, MISS or BYPASS. age: seconds, of a HIT."""

    served_by: str
    cache: str
    attempts: str = ""
    warnings: tuple[str, ...] = ()
    age: int | None = None
    headers: Mapping[str, str] | None = None  # further ones

    def to_json(self) -> dict[str, Any]:
        """As a chunk's `portway`."""
        told: dict[str, Any] = {"served_by": self.served_by, "cache": self.cache}
        if self.attempts:
            told["attempts"] = self.attempts
        if self.warnings:
            told["warnings"] = list(self.warnings)
        return told

    def fields(self) -> bytes:
        """As header fields."""
        if not (self.attempts or self.warnings or self.headers or self.age is not None):
            return _plain_fields(self.served_by, self.cache)
        headers = {"X-Served-By": self.served_by, "X-Cache": self.cache}
        if self.attempts:
            headers["X-Portway-Attempts"] = self.attempts
        if self.warnings:
            headers["X-Portway-Warning"] = "; ".join(self.warnings)
        if self.age is not None:
            headers["Age"] = str(self.age)
        return fields_of({**headers, **(self.headers or {})})


def fields_of(headers: Mapping[str, str]) -> bytes:
    """Header fields, each with its line end."""
    return "".join(field_lines(headers)).encode("latin-1", "replace")


@lru_cache(maxsize=256)
def _plain_fields(served_by: str, cache: str) -> bytes:
    return fields_of({"X-Served-By": served_by, "X-Cache": cache})


@dataclass(frozen=True, slots=True)
class Shared:
    """An answer for everybody who waits for the same one. document: see cache/replay.py."""

    document: bytes
    served_by: str
    attempts: Sequence[Attempt] = ()
    warnings: tuple[str, ...] = ()


class Found:
    """An answer, whole in the cache or on its way from a target. Read it by `piece` or by `body`; then close what
    `served` has.

    call: what was asked. served: who answers; None = nobody has to, `document` has the answer. attempts: all of
    them, for the log.
    """

    kept: list[bytes] | None = None  # a stream's pieces, for who comes after; None = not kept
    leader: Leader[Shared] | None = None
    _kept_bytes = 0
    _begun = False

    def __init__(
        self,
        call: Call,
        facts: Facts,
        attempts: Sequence[Attempt] = (),
        *,
        served: Served | None = None,
        document: bytes = b"",
    ) -> None:
        self.facts = facts
        self.attempts = attempts
        self.served = served
        self.document = document
        self.call = call

    def body(self) -> bytes:
        """The plain answer."""
        if self.served is None:
            return replay.replay(self.document, self.call, self.facts.served_by)
        return self.served.whole or b""

    async def piece(self) -> bytes:
        """The stream's next events, as Answer.piece has it."""
        served = self.served
        if served is not None and self._begun:
            piece = await served.piece() if served.piece is not None else b""
        elif served is not None:
            piece = served.first
        else:
            piece = b"" if self._begun else replay.replay(self.document, self.call, self.facts.served_by)
        self._begun = True
        if piece and served is not None:
            self._keep(piece)
        return piece

    def late_warnings(self) -> list[str]:
        """Those that have come up since the answer began."""
        warnings = self.served.answer.warnings if self.served else []
        return [warning for warning in warnings if warning not in self.facts.warnings]

    @property
    def has_client(self) -> bool:
        """False once its client has left, and it is read on for those who wait for the same."""
        return self.leader is None or self.leader.gone is None

    def client_left(self, error: Exception) -> None:
        """Its client can't be written to any more. Raises `error`, unless somebody else waits for the
        same: then the answer is to be read on to its end, and `find` raises it."""
        try:
            if self.leader is None:
                raise error
            self.leader.client_left(error)
        finally:
            del error  # see Leader.client_left

    def _keep(self, piece: bytes) -> None:
        if self.kept is not None:
            self._kept_bytes += len(piece)
            if self._kept_bytes > MAX_KEPT:
                self.kept = None
                if self.leader is not None:
                    self.leader.part()
            else:
                self.kept.append(piece)


Use = Callable[[Found], Awaitable[None]]


class Answers:
    """Finds answers by one configuration; `cache` and `flights` outlive it. cache: None = there is none."""

    def __init__(self, router: Router, cache: Cache | None, flights: Flights[Shared]) -> None:
        self._router = router
        self._cache = cache
        self._flights = flights
        self._keys = Keys()

    async def find(self, call: Call, control: Control, watch: Watch, use: Use, *, fallback: bool) -> None:
        """Find the answer and have `use` read and close it. Raises what Router.serve does, and ClientError
        504 where the client wants a stored answer or none; at the end, ClientGone or OSError if the client
        left while its answer was read on for others."""
        cache = self._cache
        lifetime = call.model.cache
        if lifetime <= 0 or cache is None or cache.is_off or control.no_store or why_bypassed(call, lifetime):
            _refuse_if_only_cached(control)
            found = _of(call, await self._router.serve(call, watch, fallback=fallback), "BYPASS")
            watch.phase = "answer"
            await use(found)
            return
        key = self._keys.of(call, call.model)
        search = _Search(self._router, cache, call, key, control, fallback)
        stored = None if control.no_cache else search.stored()
        if stored is not None:
            watch.phase = "answer"
            await use(stored)
            return
        if control.only_if_cached:
            search.missed()
        _refuse_if_only_cached(control)
        if control.no_cache:
            await search.of_target(watch, use)
        else:
            await search.with_others(self._flights, watch, use)


class _Search:
    """One call's way to an answer that may be kept."""

    def __init__(self, router: Router, cache: Cache, call: Call, key: bytes, control: Control, fallback: bool) -> None:
        self._router = router
        self._cache = cache
        self._call = call
        self._fallback = fallback
        self._key = key
        self._oldest = call.model.cache if control.max_age is None else min(call.model.cache, control.max_age)
        self._puts = cache.puts  # as long as it stands still, what was a miss is one
        self._deadline = time.monotonic() + call.model.timeouts.total  # also of one who waits, and then has to ask

    def stored(self) -> Found | None:
        """The cache's answer, which counts as a hit; None is no miss as long as another's may come."""
        entry = self._cache.get(self._key, self._call.model.name, self._oldest, count=False)
        if entry is None:
            return None
        self._count(hit=True)
        return _told_again(self._call, entry)

    def missed(self) -> None:
        """The cache did not help."""
        self._count(hit=False)

    def _count(self, *, hit: bool) -> None:
        self._cache.count(self._key, self._call.model.name, hit=hit)

    async def with_others(self, flights: Flights[Shared], watch: Watch, use: Use) -> None:
        """Another's answer to the same request, or a target's that others may share."""
        # without fallback nobody may get a demoted answer from another's call
        place = flights.join(self._key if self._fallback else self._key + b"!")
        if not isinstance(place, Leader):
            outcome = await place.wait(watch, self._deadline)
            if not isinstance(outcome, Leader):
                self._count(hit=isinstance(outcome, Landed))
                watch.phase = "answer"
                await use(_shared(self._call, outcome))
                return
            place = outcome
        with place as leader:
            found = self.stored() if self._cache.puts != self._puts else None
            if found is None:
                self.missed()
                await self.of_target(leader.watch(watch), use, leader)
            else:  # somebody else's came between our look and our turn
                leader.publish(_sharing(found, found.document))
                watch.phase = "answer"
                await use(found)

    async def of_target(self, watch: Watch, use: Use, leader: Leader[Shared] | None = None) -> None:
        """A target's answer, which is kept if it is fit for that, and told to those who wait."""
        call = self._call
        served = await self._router.serve(call, watch, fallback=self._fallback, deadline=self._deadline)
        found = _of(call, served, "MISS")
        watch.phase = "answer"
        found.kept = [] if call.stream else None
        found.leader = leader
        await use(found)
        _store(self._cache, self._key, call, found)
        if leader is not None:
            _publish(leader, found)


def _refuse_if_only_cached(control: Control) -> None:
    if control.only_if_cached:
        raise ClientError(
            "There is no stored answer, and Cache-Control: only-if-cached wants no other.",
            status=504,
            type="api_error",
            code="not_cached",
        )


# --- who has it -----------------------------------------------------------------------------------


def _of(call: Call, served: Served, verdict: str) -> Found:
    """A target's."""
    answer, attempts = served.answer, served.attempts
    facts = Facts(served.model.name, verdict, _told(attempts), tuple(answer.warnings))
    if isinstance(answer, Composed):
        facts.served_by, facts.headers = answer.served_by, answer.headers
    return Found(call, facts, attempts, served=served)


def _told_again(call: Call, entry: Entry) -> Found:
    """The cache's."""
    warnings = tuple(entry.warning.split("; ")) if entry.warning else ()
    return Found(call, Facts(entry.served_by, "HIT", "", warnings, int(entry.age())), document=entry.document)


def _shared(call: Call, outcome: Landed[Shared] | Crashed | None) -> Found:
    """Another's. A HIT, as every cache calls it that makes one request of many: no model worked for it."""
    if isinstance(outcome, Landed):
        value = outcome.value
        facts = Facts(value.served_by, "HIT", _told(value.attempts), value.warnings, age=0)
        return Found(call, facts, value.attempts, document=value.document)
    if isinstance(outcome, Crashed):
        raise _again(outcome.error)
    seconds = call.model.timeouts.total
    raise PortwayError(
        f"An identical request was under way and did not end within {seconds:g} s.",
        status=504,
        type="api_error",
        code="total_timeout",
        headers={"x-should-retry": "false"},
    )


def _again(error: BaseException) -> BaseException:
    """Another's error for one more client: a copy, since raising one writes into it where it was raised."""
    if not isinstance(error, PortwayError):
        mistake = RuntimeError("an identical request met with a mistake of Portway's")
        mistake.__cause__ = error
        return mistake
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


def _told(attempts: Sequence[Attempt]) -> str:
    """X-Portway-Attempts' value; one that went well at once is not worth telling."""
    return "; ".join(map(str, attempts)) if len(attempts) > 1 else ""


# --- who else gets it -----------------------------------------------------------------------------


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
    """Whatever came: also a demoted answer, or one that was cut short, is what the others would have got.
    What can't be told again each of them has to ask for."""
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
        return
    leader.publish(_sharing(found, document))


def _sharing(found: Found, document: bytes) -> Shared:
    warnings = (*found.facts.warnings, *found.late_warnings())
    return Shared(document, found.facts.served_by, found.attempts, warnings)
