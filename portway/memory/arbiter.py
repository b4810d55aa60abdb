"""Which model may be in memory when: the rules, with no thread, no socket and no clock of their own.

A `Ledger` knows what is loaded, who uses it and who waits. `decide` says what one wish gets now; `turn`
goes through all that wait and gives each its due. Whoever holds a Ledger (residency.py) guards it with one
lock, does the unloading it orders, and tells it what came of that. Sizes are bytes, times seconds.

    wish --enter--> waiting --turn--> Go      the request may be sent: its model is there, or it loads it
                                      Clear   unload these first, then it is decided anew
                                      Refuse  it can never fit
                                      (Wait   it stays where it is)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BIG = 1024**3  # bytes; what is smaller is loaded in no time, and need not wait for another load's end
DOUBT = 2.0  # seconds after a load was given up within which its server has let go of the memory
SERVERS_OWN = 300.0  # seconds; how long a server keeps what it was told nothing about (Ollama's default)

# what a model in memory is doing
LOADING = "loading"
LOADED = "loaded"
LEAVING = "leaving"  # it is being unloaded
DOUBTFUL = "doubtful"  # its load was given up, or its server can't be asked: it counts, but nobody relies on it


class Runner(NamedTuple):
    """One loaded thing: `name` is what the backend tells its loaded models apart by, not a logical name."""

    backend: str
    name: str


class Shape(NamedTuple):
    """What a runner was started with; another one means to load it anew. None = not known, or the server's own."""

    num_ctx: int | None = None
    options: tuple[tuple[str, Any], ...] | None = None

    def serves(self, wanted: Shape) -> bool:
        """Whether a runner of this shape is used as it is for a request that wants `wanted`."""
        if self is wanted:  # mostly: it was loaded for this very model
            return True
        window = wanted.num_ctx is None or self.num_ctx in (None, wanted.num_ctx)
        return window and (self.options is None or wanted.options is None or self.options == wanted.options)


class Need(NamedTuple):
    """What a model takes. sure: the part that is known and not estimated. words: the same for people."""

    size: int
    sure: int
    words: str


class Budget(NamedTuple):
    """Bytes for models. now: what there is at present, None = not known. ceiling: what there can ever be.
    firm: `now` holds whatever the machine says, as the user has set it; else a load may exceed it once it is alone."""

    now: int | None = None
    ceiling: int | None = None
    firm: bool = False


class Lane(NamedTuple):
    """How many requests a backend gets at once, and how many may wait for it. None = any number."""

    max_parallel: int | None = None
    max_queue: int | None = None


@dataclass(slots=True, eq=False)
class Wish:
    """One request that wants a model. need: None = unknown, so nothing is arbitrated. since: when it came.

    The rest is the ledger's. why, retry_at: what it waits for, and when it is worth another look even
    if nothing happens. loads: granted, and it is the one that loads.
    """

    name: str
    runner: Runner
    shape: Shape
    need: Need | None
    keep_alive: float | None
    since: float
    why: str = ""
    retry_at: float = math.inf
    clearing: bool = False
    loads: bool = False
    granted_at: float = 0.0
    resident: Resident | None = None


@dataclass(slots=True, eq=False)
class Resident:
    """What is in memory, or on its way in or out.

    keep_alive: the policy of who used it last; left: seconds the server itself said it would still stay,
    of a model that Portway has not used. ours: Portway has used it since it was loaded. fixed: it can't be unloaded.
    """

    runner: Runner
    size: int
    shape: Shape
    status: str = LOADED
    users: int = 0
    keep_alive: float | None = None
    left: float | None = None
    ours: bool = False
    fixed: bool = False
    loaded_at: float = -math.inf
    used_at: float = -math.inf
    changed_at: float = -math.inf
    spared_until: float = -math.inf  # unloading it failed: not again before then
    expires_at: float = math.inf  # when its server drops it by itself
    told: str = ""  # the backend's own name for it
    last: str = ""  # the logical name that used it last

    @property
    def rank(self) -> float:
        """Who goes first: the shortest keep_alive."""
        if self.keep_alive is None:
            return SERVERS_OWN if self.left is None else self.left
        return self.keep_alive if self.keep_alive >= 0 else math.inf

    @property
    def is_weighed(self) -> bool:
        """Whether its size is that of a shape that is known."""
        return self.ours and self.size > 0 and self.shape.options is not None

    def is_there_for(self, wish: Wish) -> bool:
        """Whether the wish need not load anything."""
        return self.status in (LOADED, LOADING) and self.shape.serves(wish.shape)


class Seen(NamedTuple):
    """What a backend says of one thing it has loaded. left: seconds until it drops it; None = it does not."""

    name: str
    size: int | None
    num_ctx: int | None = None
    left: float | None = None
    loading: bool = False
    fixed: bool = False
    told: str = ""


# --- what a wish gets -----------------------------------------------------------------------------


class Go(NamedTuple):
    """The request may be sent. load: it loads its model by that."""

    load: bool


class Clear(NamedTuple):
    """Unload these, whoever has asked for it; then it is decided anew."""

    victims: tuple[Resident, ...]


class Refuse(NamedTuple):
    """It can never fit. beside: bytes of what can't be unloaded."""

    need: Need
    limit: int
    beside: int


class Wait(NamedTuple):
    """Not yet. plan: what would have to go; for_memory: an old wish of this kind goes before younger ones."""

    why: str
    retry_at: float = math.inf
    plan: tuple[Runner, ...] = ()
    for_memory: bool = False


Action = Go | Clear | Refuse | Wait


@dataclass(slots=True)
class Ahead:
    """What those before a wish leave to it. reserved: bytes that are spoken for. blocked: runners that get no
    new requests, so that an old wish has its turn. wanted: runners that others wait for, which are there.
    clearing: somebody is unloading to make room."""

    reserved: int = 0
    blocked: set[Runner] = field(default_factory=set)
    wanted: set[Runner] = field(default_factory=set)
    clearing: bool = False


class Ledger:
    """What is known. Not safe for threads by itself: its owner has the lock.

    min_stay: how long a model stays at least once it is loaded. patience: how long requests for what is
    loaded go before one that would have to swap it.
    """

    def __init__(self, min_stay: float = 0.0, patience: float = 0.0) -> None:
        self.min_stay = min_stay
        self.patience = patience
        self.budget = Budget()
        self.counted: frozenset[str] = frozenset()  # backends in this machine's memory
        self.lanes: dict[str, Lane] = {}
        self.residents: dict[Runner, Resident] = {}
        self.waiting: list[Wish] = []  # in the order they came
        self.in_flight: dict[str, int] = {}
        self._removed: dict[Runner, float] = {}  # when; a look that began before does not bring it back
        self._looked: dict[str, float] = {}  # backend -> when the newest look at it began

    # --- the requests

    def take(self, wish: Wish, now: float) -> bool:
        """The short way for what is there and may be used at once; whether that was so."""
        resident = self.residents.get(wish.runner)
        if self.waiting or resident is None or now >= resident.expires_at or not resident.is_there_for(wish):
            return False
        if self._has_no_place(wish.runner.backend):
            return False
        self._use(resident, wish, now)
        return True

    def enter(self, wish: Wish, now: float) -> list[tuple[Wish, Action]]:
        """A new wish behind all others: what each of them gets now. If it is not among these, it waits."""
        self.waiting.append(wish)
        return self.turn(now)

    def is_full(self, backend: str) -> bool:
        """Whether nobody more may wait for this backend."""
        most = self.lanes.get(backend, Lane()).max_queue
        return most is not None and self.queued(backend) >= most

    def queued(self, backend: str) -> int:
        """How many wait for it."""
        return sum(wish.runner.backend == backend for wish in self.waiting)

    def is_awaited(self, runner: Runner) -> bool:
        """Whether a waiting wish is for it."""
        return any(wish.runner == runner for wish in self.waiting)

    def turn(self, now: float) -> list[tuple[Wish, Action]]:
        """Give all that wait what they can have; those that got something, with what it is."""
        ahead = self._ahead()
        served: list[tuple[Wish, Action]] = []
        for wish in list(self.waiting):
            if wish.clearing:
                continue
            action = self.decide(wish, now, ahead)
            self._note(wish, action, now)
            if isinstance(action, Wait):
                self._step_back(wish, action, ahead, now)
                continue
            served.append((wish, action))
            if isinstance(action, Clear):
                ahead.clearing = True
                ahead.reserved += _size(wish)
                continue
            self.waiting.remove(wish)
            if isinstance(action, Go):
                self._grant(wish, now, load=action.load)
        return served

    def began(self, wish: Wish, now: float) -> None:
        """Its first content is in: what it may have loaded is loaded, and has the shape that it asked for."""
        resident = wish.resident
        if resident is None:
            return
        if resident.status == LOADING:
            resident.status, resident.loaded_at, resident.changed_at = LOADED, now, now
        if resident.shape.options is None:  # another client had loaded it; its server loads anew where that differs
            window = resident.shape.num_ctx if wish.shape.num_ctx is None else wish.shape.num_ctx
            resident.shape = Shape(window, wish.shape.options)

    def release(self, wish: Wish, now: float) -> None:
        """It is over, well or not."""
        backend = wish.runner.backend
        self.in_flight[backend] -= 1
        resident = wish.resident
        if resident is None:
            return
        resident.users -= 1
        resident.used_at = resident.changed_at = now
        if resident.users:
            return
        if resident.status == LOADING:
            resident.status = DOUBTFUL
        if resident.keep_alive is not None and resident.keep_alive >= 0:
            resident.expires_at = now + resident.keep_alive

    def leave(self, wish: Wish) -> None:
        """It waits no longer: its client has gone, or its time is over."""
        if wish in self.waiting:
            self.waiting.remove(wish)

    def cleared(self, wish: Wish) -> None:
        """What it was to unload is gone, or could not be unloaded: it waits again, and is decided anew."""
        wish.clearing = False

    # --- unloading

    def leaving(self, resident: Resident) -> None:
        """It is being unloaded from now on: nobody gets it any more."""
        resident.status = LEAVING

    def left(self, resident: Resident, now: float) -> None:
        """It is gone."""
        if self.residents.get(resident.runner) is resident:
            del self.residents[resident.runner]
            self._removed[resident.runner] = now

    def stayed(self, resident: Resident, until: float, now: float) -> None:
        """It could not be unloaded, or nobody knows: it still counts, and is left alone `until` then."""
        if resident.status == LEAVING:
            resident.status, resident.spared_until, resident.changed_at = DOUBTFUL, until, now

    def surplus(self, now: float) -> tuple[Resident, ...]:
        """What should go where a budget that was set is exceeded all the same, since an estimate was too low or
        another client has loaded something: of what is idle, and Portway's, whoever goes first. Not where the budget
        follows the machine: there the only model of a small one would go after each answer."""
        counted = [r for r in self.residents.values() if r.runner.backend in self.counted]
        over = sum(r.size for r in counted) - (self.budget.now or 0)
        if not self.budget.firm or over <= 0 or self.waiting or any(r.status in (LOADING, LEAVING) for r in counted):
            return ()
        idle = [r for r in counted if r.ours and not r.fixed and not r.users and r.status == LOADED]
        return _plan([r for r in idle if max(r.loaded_at + self.min_stay, r.spared_until) <= now], over, now)

    # --- what the backends say

    def merge(self, backend: str, seen: Iterable[Seen], began: float, now: float) -> None:
        """A look at a backend that began then. What we know better, since it is in use or has changed
        meanwhile, stays as it is; a look that was overtaken by another says nothing."""
        if began < self._looked.get(backend, -math.inf):
            return
        self._looked[backend] = began
        found = {Runner(backend, one.name): one for one in seen}
        for runner, resident in list(self.residents.items()):
            if runner.backend == backend and runner not in found and self._is_gone(resident, began, now):
                del self.residents[runner]
        for runner, one in found.items():
            if self._removed.get(runner, -math.inf) < began:
                self._see(runner, one, began, now)
        self._removed = {runner: at for runner, at in self._removed.items() if at > now - 60.0}

    def kept(self, resident: Resident) -> None:
        """It was to be unloaded, and nobody has told its server yet: it stays."""
        if resident.status == LEAVING:
            resident.status = LOADED

    def forget(self, backend: str) -> None:
        """Its server is gone, and so is what it had; what is in use will say so itself."""
        for runner, resident in list(self.residents.items()):
            if runner.backend == backend and not resident.users and resident.status != LEAVING:
                del self.residents[runner]

    def _is_gone(self, resident: Resident, began: float, now: float) -> bool:
        if resident.users or resident.status == LEAVING or resident.changed_at >= began:
            return False  # what loads and has no user is another client's: its load has failed
        # a load that was given up is not listed either, as long as its server winds it up
        return resident.status != DOUBTFUL or now >= resident.changed_at + DOUBT

    def _see(self, runner: Runner, one: Seen, began: float, now: float) -> None:
        resident = self.residents.get(runner)
        if resident is None:
            resident = Resident(runner, one.size or 0, Shape(one.num_ctx), changed_at=began, told=one.told)
            resident.status = LOADING if one.loading else LOADED
            self.residents[runner] = resident
        resident.fixed, resident.left, resident.told = one.fixed, one.left, one.told or resident.told
        if resident.status in (LOADING, DOUBTFUL) and resident.users and not one.loading:
            resident.size = max(resident.size, one.size or 0)
            return  # whether it is the one that is being loaded is for its request to say
        if resident.status == LEAVING or resident.changed_at > began:
            return
        if one.size:
            resident.size = one.size
        resident.status = LOADING if one.loading else LOADED
        resident.expires_at = math.inf if one.left is None else now + one.left
        if one.num_ctx is not None and resident.shape.num_ctx not in (None, one.num_ctx):
            resident.shape, resident.ours = Shape(one.num_ctx), False  # another client has loaded it anew

    # --- deciding

    def decide(self, wish: Wish, now: float, ahead: Ahead) -> Action:
        """What `wish` gets now, if those before it leave `ahead` to it. Changes nothing."""
        if self._has_no_place(wish.runner.backend):
            return Wait(f"a place at {wish.runner.backend}")
        resident = self.residents.get(wish.runner)
        if resident is not None and resident.is_there_for(wish):
            if wish.runner in ahead.blocked:
                return Wait("an older request's turn")
            return Go(load=False)
        if wish.need is None or wish.runner.backend not in self.counted:
            return Go(load=True)
        return self._decide_load(wish, wish.need, now, ahead)

    def _has_no_place(self, backend: str) -> bool:
        lane = self.lanes.get(backend)
        if lane is None or lane.max_parallel is None:
            return False
        return self.in_flight.get(backend, 0) >= lane.max_parallel

    def _decide_load(self, wish: Wish, need: Need, now: float, ahead: Ahead) -> Action:
        others = [r for r in self.residents.values() if r.runner != wish.runner and r.runner.backend in self.counted]
        beside = sum(r.size for r in others if r.fixed)
        if (refusal := self._refusal(need, beside)) is not None:
            return refusal
        limit = self.budget.now
        if limit is None:
            return Go(load=True)
        if (why := self._why_not_anew(wish, now, ahead)) is not None:
            return why
        over = sum(r.size for r in others) + ahead.reserved + need.size - limit
        loading = ahead.clearing or any(r.status == LOADING and r.size >= BIG for r in others)
        if over <= 0:
            return Wait("another load's end", for_memory=True) if loading and need.size >= BIG else Go(load=True)
        if loading or ahead.reserved:
            return Wait("another load's end", for_memory=True)
        return self._make_room(wish, over, [r for r in others if not r.fixed], now, ahead)

    def _refusal(self, need: Need, beside: int) -> Refuse | None:
        """Only what is sure can lead to it: an estimate that is too high must not keep a model from ever being tried.
        What can't be unloaded only counts against a budget that was set; else it may not even be in this memory."""
        ceiling = self.budget.ceiling
        if ceiling is None:
            return None
        beside = beside if self.budget.firm else 0
        return Refuse(need, ceiling, beside) if need.sure + beside > ceiling else None

    def _why_not_anew(self, wish: Wish, now: float, ahead: Ahead) -> Wait | None:
        """Its runner is there, but in another shape or in doubt: whether it may be loaded anew."""
        mine = self.residents.get(wish.runner)
        if mine is None or (mine.status == DOUBTFUL and not mine.users):
            return None
        if mine.status == LEAVING:
            return Wait("its unloading", for_memory=True)
        return self._why_not_now((mine,), wish, now, ahead)

    def _make_room(self, wish: Wish, over: int, movable: list[Resident], now: float, ahead: Ahead) -> Action:
        """Unload what has to go, or wait until it may. Where nothing more can go the load goes ahead: what
        could be refused has been."""
        gone_soon = sum(r.size for r in movable if r.status == LEAVING)
        plan = _plan([r for r in movable if r.status != LEAVING], over - gone_soon, now)
        if not plan:
            return Wait("another's unloading", for_memory=True) if gone_soon else Go(load=True)
        return self._why_not_now(plan, wish, now, ahead) or Clear(plan)

    def _why_not_now(self, plan: tuple[Resident, ...], wish: Wish, now: float, ahead: Ahead) -> Wait | None:
        """Why these can't be unloaded for `wish` yet; None = they can."""
        runners = tuple(r.runner for r in plan)
        busy = [r for r in plan if r.users or r.status == LOADING]
        if busy:
            return Wait(f"{_named(busy)} to be idle", plan=runners, for_memory=True)
        stays = max(max(r.loaded_at + self.min_stay, r.spared_until) for r in plan)
        if stays > now:
            return Wait(f"{_named(plan)}, which can't be unloaded yet", stays, runners, for_memory=True)
        wanted = [r for r in plan if r.runner in ahead.wanted]
        if wanted and not self._is_old(wish, now):
            return Wait(f"requests for {_named(wanted)}", wish.since + self.patience, runners, for_memory=True)
        return None

    # --- keeping order

    def _ahead(self) -> Ahead:
        ahead = Ahead()
        for wish in self.waiting:
            resident = self.residents.get(wish.runner)
            if wish.clearing:
                ahead.clearing = True
                ahead.reserved += _size(wish)
            elif resident is not None and resident.is_there_for(wish):
                ahead.wanted.add(wish.runner)
        return ahead

    def _step_back(self, wish: Wish, action: Wait, ahead: Ahead, now: float) -> None:
        """An old wish that waits for memory has what it needs kept for it."""
        if action.for_memory and self._is_old(wish, now):
            ahead.reserved += _size(wish)
            ahead.blocked.update(action.plan)

    def _is_old(self, wish: Wish, now: float) -> bool:
        return now >= wish.since + self.patience

    def _note(self, wish: Wish, action: Action, now: float) -> None:
        if isinstance(action, Clear):
            wish.clearing = True
            wish.why = f"the unloading of {_named(action.victims)}"
            for victim in action.victims:
                self.leaving(victim)
        elif isinstance(action, Wait):
            ages = wish.since + self.patience if action.for_memory and not self._is_old(wish, now) else math.inf
            wish.why, wish.retry_at = action.why, min(action.retry_at, ages)

    def _grant(self, wish: Wish, now: float, *, load: bool) -> None:
        resident = self.residents.get(wish.runner)
        if resident is None:
            resident = self.residents[wish.runner] = Resident(wish.runner, _size(wish), wish.shape, LOADING)
        elif load:
            resident.size = _size(wish) or resident.size
            resident.shape, resident.status = wish.shape, LOADING
        wish.loads = load
        self._use(resident, wish, now)

    def _use(self, resident: Resident, wish: Wish, now: float) -> None:
        backend = wish.runner.backend
        self.in_flight[backend] = self.in_flight.get(backend, 0) + 1
        resident.users += 1
        resident.keep_alive, resident.ours = wish.keep_alive, True
        resident.changed_at = now
        resident.expires_at = math.inf
        resident.last = wish.name
        wish.resident, wish.granted_at = resident, now


def _plan(movable: list[Resident], over: int, now: float) -> tuple[Resident, ...]:
    """Who has to go so that `over` bytes become free, or all of them if that is not enough: idle ones
    first, then by keep_alive; none that is not needed for it."""
    order = sorted(movable, key=lambda r: (r.users > 0, r.spared_until > now, r.rank, r.used_at, r.runner))
    chosen: list[Resident] = []
    for resident in order:
        if sum(r.size for r in chosen) >= over:
            break
        if resident.size:
            chosen.append(resident)
    for resident in reversed(chosen[:-1]):
        if sum(r.size for r in chosen) - resident.size >= over:
            chosen.remove(resident)
    return tuple(chosen)


def _size(wish: Wish) -> int:
    return wish.need.size if wish.need is not None else 0


def _named(residents: Iterable[Resident]) -> str:
    return ", ".join(sorted(r.told or r.runner.name for r in residents))
