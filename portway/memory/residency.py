"""Which models are in memory: every attempt takes a place here first, and gives it back at its end.

    router --place--> take: it is there, go        (about a microsecond)
                      else look at the backends, then enter the ledger (arbiter.py): go, wait, make room, give up
    monitor           compares what is loaded with what each model's keep_alive says, and repairs it

What is decided is decided under one lock, `_lock`, which guards the ledger, the tickets and the tables beside them;
questions, unloading and waiting are done outside it. A request waits on a socket of its ticket, through its
Watch, so that its client's leaving and its heartbeats are seen. A backend that can't be asked, or does not tell,
is served as if there were no arbiter.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from portway.call import finish
from portway.errors import BackendError, ClientError, NoThread
from portway.memory import footprint, refusals
from portway.memory import machine as memory
from portway.memory.arbiter import (
    LEAVING,
    LOADED,
    LOADING,
    Action,
    Budget,
    Clear,
    Go,
    Lane,
    Ledger,
    Need,
    Refuse,
    Resident,
    Runner,
    Seen,
    Shape,
    Wish,
)
from portway.memory.budget import budget_of, is_here
from portway.memory.measured import Measure, Measurements, Notebook, Thing
from portway.memory.resident import Engine, await_gone, engine_of, shape_of
from portway.watch import NoClient

if TYPE_CHECKING:
    from portway.call import Answer, Tally, Watch
    from portway.config import Config, Model

GLANCE = 1.0  # seconds a look may take on a request's way; it is answered from memory, in milliseconds
FRESH = 1.0  # seconds a look at the backends is believed; one is taken before each load
DEAF = 5.0  # seconds before a backend that did not answer is asked again
MUTE = 60.0  # seconds before one that does not tell what it has loaded is asked again
UNLOADING = 30.0  # seconds a backend may take to unload; it is a second, but for one that ends an answer first
SPARED = 5.0  # seconds before something that could not be unloaded is tried again
RECENT = 600.0  # seconds after the last request for which the backends are still looked at
IMPATIENT = 1.0  # seconds between two looks as long as requests wait
TOLERANCE = 10.0  # seconds by which an expires_at may differ from what keep_alive says
FOR_EVER = 1e8  # seconds; Ollama says "for ever" by a year far away
SLOWEST = 150e6  # bytes a second that a first load is assumed to manage: a slow disk
WINDOW = 4096  # tokens, where neither the configuration nor the server says: Ollama's default
_GONE = ("connect_failed", "connection_lost")  # what means that there is no server
_SILENT = ("connect_timeout", "answer_timeout")  # and what, that it does not answer now

Others = Callable[[], Iterable["Model"]]  # who comes after a target in its chain; seldom asked for


# --- what the router holds ------------------------------------------------------------------------


class Place:
    """A request's use of its model, and, once it holds one, the Answer (call.py) that comes of it. Left at the end of
    `with`, or, once it holds an answer, when that is closed."""

    tally: Tally
    warnings: list[str]
    piece: Callable[[], Coroutine[Any, Any, bytes]]  # the answer's own
    whole: Callable[[], Coroutine[Any, Any, bytes]]
    _answer: Answer
    _holds = False
    _left = False

    def __init__(self, residency: Residency, wish: Wish) -> None:
        self.wish = wish
        self._residency = residency

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._holds:
            self.leave()

    def hold(self, answer: Answer) -> Answer:
        """The same answer, whose close() also gives the place back."""
        self._answer, self._holds = answer, True
        self.tally, self.warnings, self.piece, self.whole = answer.tally, answer.warnings, answer.piece, answer.whole
        return self

    def began(self) -> None:
        """The first content is in: the model is loaded, by whomever."""
        resident = self.wish.resident
        if resident is not None and (resident.status == LOADING or resident.shape.options != self.wish.shape.options):
            self._residency.began(self.wish)

    def leave(self, load_s: float | None = None) -> None:
        """The request is over. load_s: what the backend says of its load."""
        if not self._left:
            self._left = True
            self._residency.release(self.wish, load_s)

    async def close(self) -> None:
        """See Answer.close."""
        try:
            await self._answer.close()
        finally:
            self.leave(self.tally.load_s)


class Free:
    """The place of a request about which there is nothing to arrange."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def hold(self, answer: Answer) -> Answer:
        """The same answer, as it is."""
        return answer

    def began(self) -> None:
        """Nobody wants to know."""


_FREE = Free()


async def anywhere(_target: Model, _watch: Watch, _until: float, _others: Others = tuple) -> Free:
    """Residency.place where there is no arbiter."""
    return _FREE


# --- what it is decided by ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seat:
    """A logical model as the ledger sees it. engine: None = its backend is not looked at. present: None = unknown."""

    model: Model
    engine: Engine | None
    runner: Runner
    shape: Shape
    need: Need | None = None
    present: bool | None = None
    measured: bool = False


@dataclass(slots=True)
class _Hearing:
    """How well a backend can be asked. Times are time.monotonic()."""

    ask_at: float = -math.inf  # not before then
    looked_at: float = -math.inf
    problem: str = ""


class _Ticket:
    """One wish that may have to wait. Its fields are guarded by Residency's lock; a byte in `ear` says: look again."""

    __slots__ = ("_mouth", "action", "ear", "wish")

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.action: Action | None = None
        self.ear: socket.socket | None = None
        self._mouth: socket.socket | None = None

    def open(self) -> socket.socket:
        """What to wait on. Called under the lock: making a pair of sockets waits for nobody."""
        if self.ear is None:
            self.ear, self._mouth = socket.socketpair()
            self.ear.setblocking(False)
            self._mouth.setblocking(False)
        return self.ear

    def ring(self) -> None:
        """Wake it, if it waits."""
        try:
            if self._mouth is not None:
                self._mouth.send(b".")
        except OSError:
            return  # it has left, or was rung for often enough

    def silence(self) -> None:
        """Forget the rings so far."""
        try:
            if self.ear is not None:
                self.ear.recv(4096)
        except OSError:
            return

    def close(self) -> None:
        for end in (self.ear, self._mouth):
            if end is not None:
                end.close()


# --- the arbiter ----------------------------------------------------------------------------------


class Residency:
    """Places for requests, by one configuration after the other: what is known outlives a reload.

    say: told of what the monitor repairs and of preloading that failed. read: what the machine has. notebook: where
    what was measured outlives the daemon.
    """

    def __init__(
        self,
        config: Config,
        *,
        read: Callable[[], memory.Reading] = memory.read,
        say: Callable[[str], None] = lambda _text: None,
        notebook: Notebook | None = None,
    ) -> None:
        self._read = read
        self._say = say
        self._notebook = notebook
        self._unwritten: dict[Thing, Measure] = {}  # what the notebook has not taken yet; the monitor's
        self._lock = threading.Lock()  # guards all below but the two events
        self._ledger = Ledger()
        self._tickets: dict[Wish, _Ticket] = {}
        self._engines: dict[str, Engine] = {}
        self._hearing: dict[str, _Hearing] = {}
        self._measured = Measurements(notebook.read() if notebook else None)
        self._held: dict[str, float] = {}  # backend -> seconds a place was last held, roughly
        self._reading = memory.Reading()
        self._used_at = -math.inf
        self._asleep = False  # the monitor sees no reason to look by itself
        self._poke = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._seats: Mapping[str, Seat] = {}  # read without the lock; replaced whole
        self._config = config
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """Go on by another configuration. What is loaded stays known, but behind a backend that has moved."""
        with self._lock:
            before = {name: self._config.backends.get(name) for name in self._engines}
            self._config = config
            rule = config.memory
            self._ledger.min_stay, self._ledger.patience = rule.min_stay, rule.patience
            self._ledger.lanes = {b.name: Lane(b.max_parallel, b.max_queue) for b in config.backends.values()}
            gone = [n for n, backend in before.items() if not rule.enabled or config.backends.get(n) != backend]
            dropped = [self._engines.pop(name) for name in gone]
            for name in gone:
                self._ledger.forget(name)
            seen = [b for b in config.backends.values() if rule.enabled and (b.kind == "ollama" or is_here(b))]
            for backend in seen:
                if backend.name not in self._engines:
                    self._engines[backend.name] = engine_of(backend)
            self._hearing = {name: self._hearing.get(name, _Hearing()) for name in self._engines}
            self._learn()
            self._set_budget()
        for engine in dropped:
            engine.close()
        self._poke.set()

    def start(self) -> None:
        """Watch over what is loaded, and load what is to be there from the start, each on a thread."""
        self._thread = threading.Thread(target=self._monitor, name="portway-residency", daemon=True)
        self._thread.start()
        if any(model.preload for model in self._config.models.values()):
            threading.Thread(target=self._preload, name="portway-preload", daemon=True).start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the monitor; what is loaded stays as it is."""
        self._stopping.set()
        self._poke.set()
        if self._thread is not None:
            self._thread.join(timeout)
        if self._thread is None or not self._thread.is_alive():
            self.save()
        with self._lock:
            engines = list(self._engines.values())
        for engine in engines:
            engine.close()

    # --- for the router

    async def place(self, target: Model, watch: Watch, until: float, others: Others = tuple) -> Place | Free:
        """A place for one attempt at `target`; waits for it until then at most. others: gives the members of
        the chain that come after it. Raises BackendError `queue_full`, `does_not_fit`, `no_room` or `cold`, and
        ClientGone."""
        seat = self._seats.get(target.name)
        if seat is None:
            return _FREE
        now = self._used_at = time.monotonic()
        if self._asleep:
            self._poke.set()
        model = seat.model
        wish = Wish(model.name, seat.runner, seat.shape, seat.need, model.keep_alive, now)
        with self._lock:
            taken = self._ledger.take(wish, now)
        if not taken:
            try:
                await watch.on_thread()
            except NoThread as exc:
                raise BackendError("no_room", "no thread is left to wait for a place", retry_after=1.0) from exc
            wish = self._arrange(seat, watch, until, others)
            place = Place(self, wish)
            try:
                await watch.on_loop()
            except BaseException:
                place.leave()
                raise
            return place
        return Place(self, wish)

    def began(self, wish: Wish) -> None:
        """A request's first content is in. Others may wait for the end of its load."""
        with self._lock:
            now = time.monotonic()
            if wish.loads:
                self._time(wish, now - wish.granted_at)
            self._ledger.began(wish, now)
            rung = self._turn(now)
        _ring(rung)
        self._poke.set()  # its size can be measured now

    def release(self, wish: Wish, load_s: float | None = None) -> None:
        """A request is over, and whoever waited for that has its turn."""
        with self._lock:
            now = time.monotonic()
            self._ledger.release(wish, now)
            if wish.loads and load_s:
                self._time(wish, load_s)
            rung = self._turn(now) if self._ledger.waiting else []
            if rung:
                backend = wish.runner.backend
                self._held[backend] = 0.7 * self._held.get(backend, 0.0) + 0.3 * (now - wish.granted_at)
        _ring(rung)
        if wish.keep_alive == 0:
            self._poke.set()

    # --- for people

    def load(self, model: Model, watch: Watch, until: float) -> None:
        """Load a model, making room as for a request. Raises as `place`, and what the backend says."""
        with finish(self.place(model, watch, until)) as place:
            seat = self._seats.get(model.name)
            if seat is None or seat.engine is None:
                raise BackendError("unsupported", f"backend {model.backend.name} can't be told to load a model")
            seat.engine.load(model, watch, until)
            place.began()

    def unload(self, model: Model, watch: Watch, until: float) -> bool:
        """Unload a model that nobody uses; False if it was not loaded. Raises ClientError 409 if it is in use."""
        seat = self._seats.get(model.name)
        if seat is None or seat.engine is None:
            raise BackendError("unsupported", f"backend {model.backend.name} can't be told to unload a model")
        self._look(model.backend.name, seat.engine, watch)
        with self._lock:
            if problem := self._hearing[model.backend.name].problem:
                raise BackendError("unsupported", f"nothing can be unloaded at backend {model.backend.name}: {problem}")
            resident = self._ledger.residents.get(self._seats[model.name].runner)
            if resident is None:
                return False
            if resident.fixed:
                raise refusals.fixed(model.name, model.backend.name)
            if resident.users or resident.status in (LOADING, LEAVING):
                message = f"{model.name} is in use: {resident.users} requests, {resident.status}."
                raise ClientError(message, status=409, code="model_in_use")
            self._ledger.leaving(resident)
        if not self._unload(resident, watch, until):
            raise BackendError("busy", f"backend {model.backend.name} has not unloaded {model.model} yet")
        return True

    # --- one request that can't just go

    def _arrange(self, seat: Seat, watch: Watch, until: float, others: Others) -> Wish:
        """What `place` does if the model is not simply there. The wish, granted."""
        if seat.engine is not None:
            # of a request's time only a small part: a server that does not answer now is for its attempt to find out
            self._look_around(watch, min(GLANCE, max(0.0, until - time.monotonic()) / 4))
            seat = self._seats.get(seat.model.name, seat)
        if seat.model.prefer_warm:
            self._refuse_cold(seat, until, others)
        ticket = _Ticket(_wish(seat, time.monotonic()))
        with self._lock:
            rung = self._enter(ticket)
        _ring(rung)
        try:
            self._follow(ticket, watch, until)
        except BaseException:
            self._abandon(ticket)
            raise
        finally:
            ticket.close()
        return ticket.wish

    def _enter(self, ticket: _Ticket) -> list[_Ticket]:
        """Under the lock. Whom to wake; raises queue_full."""
        wish, now = ticket.wish, time.monotonic()
        full = self._ledger.is_full(wish.runner.backend)
        self._tickets[wish] = ticket
        rung = self._hand_out(self._ledger.enter(wish, now))
        if ticket.action is None and full:
            del self._tickets[wish]
            self._ledger.leave(wish)
            raise self._queue_full(wish)
        return rung

    def _follow(self, ticket: _Ticket, watch: Watch, until: float) -> None:
        """Do what the ledger says until it says go."""
        while True:
            with self._lock:
                action, ticket.action = ticket.action, None
                ear, retry_at = ticket.open() if action is None else None, ticket.wish.retry_at
                if isinstance(action, Go | Refuse):
                    del self._tickets[ticket.wish]
            if isinstance(action, Go):
                return
            if isinstance(action, Refuse):
                raise refusals.does_not_fit(ticket.wish, action)
            if isinstance(action, Clear):
                self._clear(ticket, action, watch, until)
            elif ear is not None:
                self._wait(ticket, ear, watch, min(until, retry_at), until)

    def _wait(self, ticket: _Ticket, ear: socket.socket, watch: Watch, wake_at: float, until: float) -> None:
        if finish(watch.readable(ear, wake_at)):
            ticket.silence()
            return
        now = time.monotonic()
        with self._lock:
            if ticket.action is not None:
                return
            if now >= until:
                raise refusals.no_room(ticket.wish, now, self._held.get(ticket.wish.runner.backend, 5.0))
            rung = self._turn(now)
        _ring(rung)

    def _abandon(self, ticket: _Ticket) -> None:
        """It left while it waited, or just as it was given something: that goes to the next one."""
        wish = ticket.wish
        with self._lock:
            now = time.monotonic()
            if self._tickets.pop(wish, None) is None:
                return
            if isinstance(ticket.action, Go):
                self._ledger.release(wish, now)
            if isinstance(ticket.action, Clear):
                for victim in ticket.action.victims:
                    self._ledger.kept(victim)
            self._ledger.leave(wish)
            rung = self._turn(now)
        _ring(rung)

    def _clear(self, ticket: _Ticket, action: Clear, watch: Watch, until: float) -> None:
        """Unload what stands in the way of a wish; then the ledger decides anew."""
        left = list(action.victims)
        try:
            while left:
                self._unload(left[0], watch, until)
                left.pop(0)
        finally:
            with self._lock:
                for victim in left[1:]:
                    self._ledger.kept(victim)
                if left:  # its client has gone: it wants nothing more
                    self._ledger.leave(ticket.wish)
                self._ledger.cleared(ticket.wish)
                rung = self._turn(time.monotonic())
            _ring(rung)

    def _unload(self, resident: Resident, watch: Watch, until: float) -> bool:
        """Unload what the ledger has as leaving, and tell it what came of that."""
        backend = resident.runner.backend
        engine = self._engines.get(backend)
        gone, spared = False, 0.0  # who leaves in the middle says nothing against trying again
        try:
            told = resident.told or resident.runner.name
            if engine is not None and not engine.is_busy(told, watch):
                engine.unload(told, watch)
                gone = await_gone(engine, resident.runner.name, watch, min(until, time.monotonic() + UNLOADING))
            spared = SPARED
        except BackendError as exc:
            gone, spared = exc.reason in _GONE, SPARED
            if gone or exc.reason in _SILENT:
                self._hard_of_hearing(backend, exc)
        finally:
            with self._lock:
                now = time.monotonic()
                if gone:
                    self._ledger.left(resident, now)
                else:
                    self._ledger.stayed(resident, now + spared, now)
                rung = self._turn(now)
            _ring(rung)
        return gone

    # --- under the lock

    def _turn(self, now: float) -> list[_Ticket]:
        return self._hand_out(self._ledger.turn(now))

    def _hand_out(self, served: Iterable[tuple[Wish, Action]]) -> list[_Ticket]:
        tickets = []
        for wish, action in served:
            ticket = self._tickets[wish]
            ticket.action = action
            tickets.append(ticket)
        return tickets

    def _learn(self) -> None:
        """Make the seats anew from the configuration and from what the backends have said so far."""
        seats = {}
        counted = set()
        for model in self._config.models.values():
            backend = model.backend
            engine = self._engines.get(backend.name)
            if engine is None and backend.max_parallel is None:
                continue
            seats[model.name] = self._seat(model, engine)
            hearing = self._hearing.get(backend.name)
            if engine is not None and is_here(backend) and hearing is not None and not hearing.problem:
                counted.add(backend.name)
        self._seats = seats
        self._ledger.counted = frozenset(counted)

    def _seat(self, model: Model, engine: Engine | None) -> Seat:
        if engine is None:
            return Seat(model, None, Runner(model.backend.name, model.model), Shape())
        known = engine.known(model)
        runner, shape = Runner(model.backend.name, known.runner), shape_of(model, known)
        if (size := self._measured.size(model.backend.url, runner.name, shape)) is not None:
            return Seat(model, engine, runner, shape, footprint.measured(size), known.present, measured=True)
        if not known.present or known.elsewhere:
            return Seat(model, engine, runner, shape, None, known.present)
        window = shape.num_ctx or model.num_ctx or known.window or WINDOW
        need = footprint.need_of(
            weights=known.weights, said=model.size, name=model.model, window=window, per_token=known.per_token
        )
        return Seat(model, engine, runner, shape, need, known.present)

    def _merge(self, backend: str, engine: Engine, seen: Sequence[Seen], began: float) -> list[_Ticket]:
        """What a look has shown. Whom to wake."""
        now, configured = time.monotonic(), self._config.backends.get(backend)
        if configured is None:
            return []  # it was taken out of the configuration meanwhile
        if not engine.measures:  # a size from the configuration is better than an estimate
            self._learn()  # by now it is known which names stand for the same
            seats = [seat for seat in self._seats.values() if seat.runner.backend == backend]
            said = {seat.runner.name: seat.model.size for seat in seats if seat.model.size is not None}
            seen = [one._replace(size=said.get(one.name) or one.size) for one in seen]
        self._ledger.merge(backend, seen, began, now)
        if engine.measures:
            for resident in self._ledger.residents.values():
                if resident.runner.backend == backend and resident.status == LOADED and resident.is_weighed:
                    self._measured.weigh(configured.url, resident.runner.name, resident.shape, resident.size)
        self._learn()
        return self._turn(now)

    def _time(self, wish: Wish, seconds: float) -> None:
        backend = self._config.backends.get(wish.runner.backend)
        if backend is not None:  # else it was taken out of the configuration meanwhile
            self._measured.time(backend.url, wish.runner.name, seconds)

    def _set_budget(self) -> None:
        """As of now. Not while anything loads: it counts in full, and has not taken its memory yet."""
        counted = [r for r in self._ledger.residents.values() if r.runner.backend in self._ledger.counted]
        if self._config.memory.budget is not None or all(r.status != LOADING for r in counted):
            resident = sum(r.size for r in counted)
            self._ledger.budget = budget_of(self._config.memory, self._reading, resident)

    # --- looking

    def _look_around(self, watch: Watch, seconds: float = math.inf) -> None:
        """Before a load: what this machine and all backends have now, as far as they say so within `seconds`."""
        until = time.monotonic() + seconds
        reading = self._read() if self._config.memory.budget is None else memory.Reading()
        with self._lock:
            engines = list(self._engines.items())
        for name, engine in engines:
            hearing = self._hearing.get(name)
            if hearing is not None and time.monotonic() - hearing.looked_at > FRESH:
                self._look(name, engine, watch, until)
        with self._lock:
            self._reading = reading
            self._set_budget()

    def _look(self, backend: str, engine: Engine, watch: Watch, until: float = math.inf) -> None:
        """Ask one backend, unless it is known not to answer."""
        hearing = self._hearing.get(backend)
        began = time.monotonic()
        if hearing is None or began < hearing.ask_at:
            return
        models = [model for model in self._config.models.values() if model.backend.name == backend]
        try:
            seen = engine.look(models, watch, until)
        except BackendError as exc:
            self._hard_of_hearing(backend, exc)
            return
        with self._lock:
            hearing.looked_at = began
            if seen is None:
                hearing.ask_at = began + MUTE
                hearing.problem = "it does not tell what it has loaded"
                seen = []
            else:
                hearing.problem = ""
            rung = self._merge(backend, engine, seen, began)
        _ring(rung)

    def _hard_of_hearing(self, backend: str, error: BackendError) -> None:
        """A backend did not answer. Is there none, then what it had is gone; else it may only be busy."""
        with self._lock:
            hearing = self._hearing.get(backend)
            if hearing is None:
                return
            now = time.monotonic()
            hearing.ask_at = now + DEAF
            if error.reason in _GONE:
                hearing.problem = error.message
                self._ledger.forget(backend)
            self._learn()
            rung = self._turn(now)
        _ring(rung)

    # --- refusals

    def _refuse_cold(self, seat: Seat, until: float, others: Others) -> None:
        """Raise `cold` if loading would take too long and another member is warm."""
        with self._lock:
            now = time.monotonic()
            if self._is_warm(seat, now):
                return
            takes = self._measured.load_time(seat.model.backend.url, seat.runner.name)
            if takes is None:
                takes = seat.need.size / SLOWEST if seat.need is not None else math.inf
            if takes <= min(seat.model.timeouts.first_token, until - now):
                return
            seats = [self._seats[other.name] for other in others() if other.name in self._seats]
            warm = next((other.model.name for other in seats if self._is_warm(other, now)), None)
        if warm is not None:
            raise refusals.cold(takes, warm)

    def _is_warm(self, seat: Seat, now: float) -> bool:
        resident = self._ledger.residents.get(seat.runner)
        if resident is None or now >= resident.expires_at:
            return False
        return resident.status == LOADED and resident.shape.serves(seat.shape)

    def _queue_full(self, wish: Wish) -> BackendError:
        """Under the lock."""
        backend = wish.runner.backend
        held = self._held.get(backend, 1.0)
        return refusals.queue_full(backend, self._ledger.lanes[backend], self._ledger.queued(backend), held)

    # --- the monitor

    def _monitor(self) -> None:
        """On a thread of its own, until stop(): look, compare, repair; never load."""
        while not self._stopping.is_set():
            wait = self._until_next_round()
            self._asleep = wait is None
            self._poke.wait(wait)
            self._poke.clear()
            self._asleep = False
            if not self._stopping.is_set():
                self.check()
                self.save()

    def _until_next_round(self) -> float | None:
        """Seconds; None = not before something is used."""
        with self._lock:
            now = time.monotonic()
            if self._ledger.waiting:
                return IMPATIENT
            dues = [due for resident in self._ledger.residents.values() if (due := self._due(resident)) is not None]
            if now - self._used_at < RECENT:
                dues.append(now + self._config.memory.check)
        return max(0.05, min(dues) - now) if dues else None

    def check(self) -> None:
        """One round: look at each backend, unload what outstayed or is too much, correct what another client has
        changed."""
        watch = NoClient()
        with self._lock:
            engines = list(self._engines.items()) if time.monotonic() - self._used_at < RECENT else []
            overdue = {r.runner.backend for r in self._ledger.residents.values() if self._is_overdue(r)}
            engines += [(n, e) for n, e in self._engines.items() if n in overdue and (n, e) not in engines]
        for name, engine in engines:
            self._look(name, engine, watch)
        with self._lock:
            outstayed = [r for r in self._ledger.residents.values() if self._is_overdue(r)]
            for resident in outstayed:
                self._ledger.leaving(resident)
            surplus = self._ledger.surplus(time.monotonic())
            for resident in surplus:
                self._ledger.leaving(resident)
            off = [r for r in self._ledger.residents.values() if self._is_off(r)]
        for resident in (*outstayed, *surplus):
            if self._unload(resident, watch, time.monotonic() + UNLOADING):
                why = "as memory.budget is exceeded" if resident in surplus else "idle for longer than its keep_alive"
                self._say(f"unloaded {resident.told}, {why}")
        for resident in off:
            self._repair(resident, watch)

    def save(self) -> None:
        """Write down what was measured. A disk that does not take it is told of once, and tried again."""
        if self._notebook is None:
            return
        with self._lock:
            new = self._measured.unsaved()
        told = bool(self._unwritten)
        self._unwritten |= new
        try:
            self._notebook.add(self._unwritten)
        except OSError as exc:
            if not told:
                self._say(f"{self._notebook.path}: what was measured can't be kept: {exc.strerror or exc}")
        else:
            self._unwritten = {}

    def _due(self, resident: Resident) -> float | None:
        """Under the lock: when it is to be unloaded, where its server does not do so by itself."""
        seat, engine = self._seats.get(resident.last), self._engines.get(resident.runner.backend)
        if seat is None or engine is None or engine.expires or resident.fixed:
            return None
        keep_alive = seat.model.keep_alive
        if keep_alive is None or keep_alive < 0 or resident.users or resident.status != LOADED:
            return None
        return max(resident.used_at + keep_alive, resident.spared_until)

    def _is_overdue(self, resident: Resident) -> bool:
        """Under the lock."""
        due = self._due(resident)
        return due is not None and time.monotonic() >= due and not self._ledger.is_awaited(resident.runner)

    def _is_off(self, resident: Resident) -> bool:
        """Under the lock: whether a server that drops models by itself has been told something else by another
        client. One that is about to go is let go: telling it anything might load it again."""
        seat = self._seats.get(resident.last)
        if seat is None or resident.left is None or resident.users or resident.status != LOADED:
            return False
        keep_alive = seat.model.keep_alive
        if keep_alive is None or seat.shape != resident.shape or resident.left < TOLERANCE:
            return False
        if keep_alive < 0 or resident.left > FOR_EVER:
            return (keep_alive < 0) is not (resident.left > FOR_EVER)
        return abs(resident.used_at + keep_alive - time.monotonic() - resident.left) > TOLERANCE

    def _repair(self, resident: Resident, watch: Watch) -> None:
        """Tell the policy anew."""
        seat = self._seats.get(resident.last)
        if seat is None or seat.engine is None:
            return
        try:
            seat.engine.keep(seat.model, watch)
        except BackendError as exc:
            self._say(f"{resident.told}: its keep_alive could not be corrected: {exc.message}")
            return
        with self._lock:
            resident.used_at = resident.changed_at = time.monotonic()
            resident.left = None
        self._say(f"corrected the keep_alive of {resident.told}, which another client had changed")

    def _preload(self) -> None:
        for model in [model for model in self._config.models.values() if model.preload]:
            if self._stopping.is_set():
                return
            try:
                self.load(model, NoClient(), time.monotonic() + model.timeouts.load)
            except BackendError as exc:
                self._say(f"{model.name} could not be loaded at the start: {exc.message}")

    # --- for the report

    def snapshot(self) -> Snapshot:
        """What is known now, each part a copy."""
        with self._lock:
            return Snapshot(
                config=self._config,
                now=time.monotonic(),
                reading=self._reading,
                budget=self._ledger.budget,
                counted=self._ledger.counted,
                residents=[replace(resident) for resident in self._ledger.residents.values()],
                waiting=[replace(wish) for wish in self._ledger.waiting],
                in_flight=dict(self._ledger.in_flight),
                seats=dict(self._seats),
                kinds={name: engine.kind for name, engine in self._engines.items()},
                problems={name: hearing.problem for name, hearing in self._hearing.items() if hearing.problem},
                load_times={
                    seat.runner: seconds
                    for seat in self._seats.values()
                    if (seconds := self._measured.load_time(seat.model.backend.url, seat.runner.name)) is not None
                },
            )

    def fit_together(self, models: Iterable[Model]) -> bool | None:
        """Whether all of them can be in memory at once; None = there is no telling. For a council's members."""
        snapshot = self.snapshot()
        sizes: dict[Runner, int] = {}
        shapes: dict[Runner, Shape] = {}
        for model in models:
            seat = snapshot.seats.get(model.name)
            if seat is None or seat.need is None or seat.runner.backend not in snapshot.counted:
                return None
            if not shapes.setdefault(seat.runner, seat.shape).serves(seat.shape):
                return False  # one of them would reload the other's
            sizes[seat.runner] = max(sizes.get(seat.runner, 0), seat.need.size)
        limit = snapshot.budget.now
        return None if limit is None else sum(sizes.values()) <= limit

    def refresh(self, watch: Watch) -> None:
        """Look at everything now, for somebody who wants to see it. Loads nothing."""
        self._look_around(watch)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a Residency knew at one moment, `now`."""

    config: Config
    now: float
    reading: memory.Reading
    budget: Budget
    counted: frozenset[str]
    residents: list[Resident]
    waiting: list[Wish]
    in_flight: Mapping[str, int]
    seats: Mapping[str, Seat]
    kinds: Mapping[str, str]
    problems: Mapping[str, str]
    load_times: Mapping[Runner, float]


def _wish(seat: Seat, now: float) -> Wish:
    return Wish(seat.model.name, seat.runner, seat.shape, seat.need, seat.model.keep_alive, now)


def _ring(tickets: Iterable[_Ticket]) -> None:
    for ticket in tickets:
        ticket.ring()
