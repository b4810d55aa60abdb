"""Random traffic against the arbiter: its rules alone, move by move, and whole, with stand-ins that share a memory.

What must hold whatever comes: what is loaded never exceeds the budget, nothing in use is unloaded, nothing is
loaded twice, and each request is answered or refused, so that nobody starves and nothing locks up. The rules
are driven without threads, by a seed; where hypothesis is installed it looks for seeds that break them, too.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import unittest
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from portway import config
from portway.backends.ollama import OllamaBackend
from portway.call import Call, Limits, finish
from portway.errors import BackendError, ClientGone
from portway.memory import machine as memory
from portway.memory.arbiter import (
    DOUBTFUL,
    LEAVING,
    LOADING,
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
from portway.memory.residency import Residency
from portway.standin.server import Memory, StandIn, StandInModel
from portway.watch import ClientWatch
from portway.wire.events import DONE, dumps
from tests.blocking import close, read
from tests.hypotheses import given_seeds

GB = 1024**3
SEEDS = range(int(os.environ.get("PORTWAY_SEEDS", "150")))


class Machine:
    """A ledger, and the servers that it believes in, which do what they are told. Time is a number."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        pick = self.random
        self.budget = pick.randint(4, 24) * GB
        self.ledger = Ledger(min_stay=pick.choice([0.0, 3.0]), patience=pick.choice([0.0, 5.0]))
        self.ledger.budget = Budget(self.budget, self.budget, firm=True)
        self.ledger.counted = frozenset({"one", "two"})
        for backend in ("one", "two"):
            self.ledger.lanes[backend] = Lane(pick.choice([None, 1, 2]), None)
        self.sizes = {Runner(pick.choice(["one", "two"]), f"m{n}"): pick.randint(1, 30) * GB // 2 for n in range(5)}
        self.loaded: dict[Runner, tuple[Shape, int]] = {}  # what truly takes memory
        self.running: list[Wish] = []
        self.clearing: list[tuple[Wish, list[Resident]]] = []
        self.waited: dict[Wish, float] = {}
        self.outcomes: list[str] = []

    def run(self, moves: int) -> None:
        """Random moves; then nothing new comes, and all that is left has to end."""
        for _ in range(moves):
            self.random.choice([self.ask, self.ask, self.step, self.step, self.leave, self.look, self.wait])()
            self.check()
        for _ in range(60 * (1 + len(self.ledger.waiting)) + 10 * len(self.running)):
            self.step()
            self.wait()
            self.check()
        if self.ledger.waiting or self.running or self.clearing:
            raise AssertionError(f"starved: {[(wish.runner, wish.why) for wish in self.ledger.waiting]}")

    def ask(self) -> None:
        runner = self.random.choice(sorted(self.sizes))
        size = self.sizes[runner]
        shape = Shape(self.random.choice([2048, 2048, 4096]), ())
        wish = Wish("x", runner, shape, Need(size, size, "size"), self.random.choice([0.0, 30.0, -1.0, None]), self.now)
        self.give(self.ledger.enter(wish, self.now))

    def step(self) -> None:
        """Something that is under way goes on: an unloading, or a request."""
        work: list[Callable[[], None]] = []
        work += [lambda item=item: self.unload(*item) for item in self.clearing]  # type: ignore[misc]
        work += [lambda wish=wish: self.end(wish) for wish in self.running]  # type: ignore[misc]
        if work:
            self.random.choice(work)()

    def unload(self, wish: Wish, victims: list[Resident]) -> None:
        victim = victims.pop(0)
        if self.random.random() < 0.9:
            self.loaded.pop(victim.runner, None)
            self.ledger.left(victim, self.now)
        else:
            self.ledger.stayed(victim, self.now + 5.0, self.now)
        if not victims:
            self.clearing.remove((wish, victims))
            self.ledger.cleared(wish)
        self.turn()

    def end(self, wish: Wish) -> None:
        if self.random.random() < 0.8:
            self.ledger.began(wish, self.now)
        elif wish.resident is not None and wish.resident.users == 1 and wish.resident.status == LOADING:
            self.loaded.pop(wish.runner, None)  # its load was given up
        self.running.remove(wish)
        self.ledger.release(wish, self.now)
        self.turn()

    def leave(self) -> None:
        """A client that waits goes away."""
        idle = [wish for wish in self.ledger.waiting if not wish.clearing]
        if idle:
            self.ledger.leave(self.random.choice(idle))
            self.turn()

    def look(self) -> None:
        """The backends are asked; some drop what nobody uses by themselves."""
        for runner in list(self.loaded):
            users = any(wish.runner == runner for wish in self.running)
            if not users and self.random.random() < 0.2:
                del self.loaded[runner]
        for backend in ("one", "two"):
            seen = [
                Seen(runner.name, size, shape.num_ctx)
                for runner, (shape, size) in self.loaded.items()
                if runner.backend == backend and not self.is_loading(runner)
            ]
            self.ledger.merge(backend, seen, self.now, self.now)
        self.turn()

    def is_loading(self, runner: Runner) -> bool:
        resident = self.ledger.residents.get(runner)
        return resident is not None and resident.status == LOADING

    def wait(self) -> None:
        self.now += self.random.choice([0.1, 1.0, 10.0])
        self.turn()

    def turn(self) -> None:
        self.give(self.ledger.turn(self.now))

    def give(self, served: list[tuple[Wish, Any]]) -> None:
        for wish, action in served:
            match action:
                case Go(load):
                    self.start(wish, load=load)
                case Clear(victims):
                    if any(victim.users for victim in victims):
                        raise AssertionError("something in use is to be unloaded")
                    self.clearing.append((wish, list(victims)))
                case Refuse(need):
                    if need.size <= self.budget:
                        raise AssertionError("refused although it fits")
                    self.outcomes.append("refused")

    def start(self, wish: Wish, *, load: bool) -> None:
        """The request goes out. Its server loads if what it has is not what is wanted, whatever we believe."""
        there = self.loaded.get(wish.runner)
        if there is None or there[0].num_ctx != wish.shape.num_ctx:
            if there is not None and not load:
                raise AssertionError("a reload that the ledger did not know of")
            if any(other.runner == wish.runner for other in self.running) and there is not None:
                raise AssertionError("loaded anew while in use")
            self.loaded[wish.runner] = (wish.shape, self.sizes[wish.runner])
        self.running.append(wish)
        self.outcomes.append("served")

    def check(self) -> None:
        taken = sum(size for _, size in self.loaded.values())
        if taken > self.budget:
            raise AssertionError(f"over the budget: {taken / GB:.1f} of {self.budget / GB:.1f} GB")
        if self.ledger.surplus(self.now) and all(r.size for r in self.ledger.residents.values()):
            raise AssertionError("more is to go, although all fits")
        lanes = {backend: sum(w.runner.backend == backend for w in self.running) for backend in ("one", "two")}
        for backend, count in lanes.items():
            most = self.ledger.lanes[backend].max_parallel
            if most is not None and count > most:
                raise AssertionError("more at once than max_parallel")
        users = {runner: resident.users for runner, resident in self.ledger.residents.items()}
        for wish in self.running:
            if wish.resident is not self.ledger.residents.get(wish.runner) or users[wish.runner] < 1:
                raise AssertionError("in use, and the ledger has forgotten it")
            if wish.resident is not None and wish.resident.status in (LEAVING, DOUBTFUL):
                raise AssertionError("in use, and on its way out")


class RulesTest(unittest.TestCase):
    def test_any_seed(self) -> None:
        """Whatever the traffic, the rules hold, and all of it ends."""
        outcomes: set[str] = set()
        for seed in SEEDS:
            with self.subTest(seed=seed):
                machine = Machine(seed)
                machine.run(120)
                outcomes.update(machine.outcomes)
        self.assertEqual({"served", "refused"}, outcomes)

    @given_seeds
    def test_seeds_that_hypothesis_finds(self, seed: int) -> None:
        """Likewise, for seeds of hypothesis' choice."""
        Machine(seed).run(60)


class Storm:
    """Clients that never stop asking for what is loaded, and one that wants something else. Time is a number."""

    LASTS = 4.0  # seconds that each request takes
    SWAP = 1.0  # and each unloading

    def __init__(self, seed: int) -> None:
        pick = random.Random(seed)
        self.now = 0.0
        self.ledger = Ledger(min_stay=pick.choice([0.0, 6.0]), patience=pick.choice([0.0, 3.0, 10.0]))
        self.ledger.budget = Budget(10 * GB, 10 * GB, firm=True)
        self.ledger.counted = frozenset({"one"})
        lane = pick.choice([None, 4])
        self.ledger.lanes["one"] = Lane(lane, None)
        self.rate = [1, 2] if lane is None else [0, 0, 0, 0, 0, 0, 0, 1]  # of a full lane the queue would only grow
        self.sizes = {"often": 6 * GB, "too": pick.choice([2, 6]) * GB, "once": pick.choice([5, 9]) * GB}
        self.random = pick
        self.ends: list[tuple[float, Wish]] = []
        self.gone: list[tuple[float, Wish, Resident]] = []

    def waits(self) -> float:
        """Seconds until the one that asks once, after ten seconds of storm, is served."""
        once: Wish | None = None
        for tick in range(2000):
            self.now = tick / 4
            self.go_on()
            for _ in range(self.random.choice(self.rate)):
                self.ask(self.random.choice(["often", "often", "too"]))
            if once is None and self.now >= 10.0:
                once = self.ask("once")
            if once is not None and once not in self.ledger.waiting:
                return self.now - once.since
        raise AssertionError(f"it starves: {once and once.why}")

    def ask(self, name: str) -> Wish:
        size = self.sizes[name]
        wish = Wish(name, Runner("one", name), Shape(2048, ()), Need(size, size, ""), 60.0, self.now)
        self.give(self.ledger.enter(wish, self.now))
        return wish

    def give(self, served: list[tuple[Wish, Any]]) -> None:
        for wish, action in served:
            if isinstance(action, Go):
                self.ends.append((self.now + self.LASTS, wish))
                self.ledger.began(wish, self.now)
            elif isinstance(action, Clear):
                self.gone += [(self.now + self.SWAP, wish, victim) for victim in action.victims]

    def go_on(self) -> None:
        for due, wish in [pair for pair in self.ends if pair[0] <= self.now]:
            self.ends.remove((due, wish))
            self.ledger.release(wish, self.now)
        for due, wish, victim in [each for each in self.gone if each[0] <= self.now]:
            self.gone.remove((due, wish, victim))
            self.ledger.left(victim, self.now)
            if all(other is not wish for _, other, _ in self.gone):
                self.ledger.cleared(wish)
        self.give(self.ledger.turn(self.now))


class StarvationTest(unittest.TestCase):
    def test_a_storm_does_not_keep_another_waiting(self) -> None:
        """However often what is loaded is asked for, another one waits no longer than for its patience and for what
        was under way then; also where the storm is for two that take turns themselves."""
        for seed in SEEDS:
            with self.subTest(seed=seed):
                storm = Storm(seed)
                rules = storm.ledger
                turns = 3  # the storm's own swaps may come first, each with its patience and its stay
                most = turns * (rules.patience + rules.min_stay + storm.LASTS + storm.SWAP)
                self.assertLessEqual(storm.waits(), most)


class Client(threading.Thread):
    """Asks one model once, and may leave before it has an answer. `outcome` is what came of it."""

    def __init__(self, residency: Residency, backend: OllamaBackend, model: config.Model, until: float) -> None:
        super().__init__(daemon=True)
        self.outcome = "nothing"
        self._residency = residency
        self._backend = backend
        self._model = model
        self._until = until
        self._ours, self._theirs = socket.socketpair()

    def hang_up(self) -> None:
        """The client goes away, wherever its request is."""
        self._theirs.close()

    def run(self) -> None:
        watch = ClientWatch(self._ours, lambda: bool(self._ours.recv(1)))
        try:
            self.outcome = self._ask(watch)
        except BackendError as exc:
            self.outcome = exc.reason
        except ClientGone:
            self.outcome = "gone"
        finally:
            self._ours.close()
            self._theirs.close()

    def _ask(self, watch: ClientWatch) -> str:
        limits = Limits(5.0, 20.0, 20.0, 20.0, self._until, self._until)
        with finish(self._residency.place(self._model, watch, self._until)) as place:
            answer = place.hold(finish(self._backend.open(chat(self._model), self._model, limits, watch)))
            try:
                return "served" if read(answer, place).endswith(DONE) else "cut"
            finally:
                close(answer)


class WholeTest(unittest.TestCase):
    """The arbiter with its threads and sockets, before stand-ins that know nothing of each other."""

    def test_traffic(self) -> None:
        """Two servers, one memory: never too much in it, and every request ends as it should."""
        outcomes: set[str] = set()
        for seed in range(6):
            with self.subTest(seed=seed):
                found, _ = self.traffic(random.Random(seed))
                outcomes |= found
        self.assertLessEqual({"served", "gone", "does_not_fit"}, outcomes)

    def test_without_it(self) -> None:
        """The same traffic with the arbiter switched off: so the test can tell."""
        overcommits = sum(self.traffic(random.Random(seed), enabled=False)[1] for seed in range(6))
        self.assertGreater(overcommits, 0)

    def traffic(self, pick: random.Random, *, enabled: bool = True) -> tuple[set[str], int]:
        """30 clients: (what they got, how often there was too much in memory)."""
        budget = pick.randint(6, 12) * GB
        shared = Memory(budget)
        names = [f"m{n}" for n in range(5)]
        sizes = {name: pick.choice([1, 3, 4, 5, 6]) * GB for name in names} | {"giant": 40 * GB}
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(
                    StandIn([StandInModel(m, sizes[m]) for m in held], memory=shared, load_delay=0.01)
                )
                for name, held in {"one": names[:3], "two": [*names[3:], "giant"]}.items()
            }
            text = toml(servers, budget, pick.choice(["", "max_parallel = 1\n"]))
            parsed = config.parse(f"[memory]\nenabled = {str(enabled).lower()}\n{text}", "models.toml", {})
            residency = Residency(parsed, read=memory.Reading)
            stack.callback(residency.stop)
            residency.start()
            backends = {name: OllamaBackend(backend) for name, backend in parsed.backends.items()}
            until = time.monotonic() + 30.0
            models = [parsed.models[pick.choice([*names, "giant"])] for _ in range(30)]
            clients = [Client(residency, backends[model.backend.name], model, until) for model in models]
            for client in clients:
                client.start()
                if pick.random() < 0.2:
                    pick.choice(clients).hang_up()
            for client in clients:
                client.join(40.0)
            for backend in backends.values():
                backend.close()
            outcomes = [client.outcome for client in clients]
            stats = shared.stats()
            if not enabled:
                return set(outcomes), stats.overcommits
            self.assertEqual(0, stats.overcommits, outcomes)
            self.assertLessEqual(stats.peak, budget)
            self.assertLessEqual(set(outcomes), {"served", "gone", "does_not_fit"}, outcomes)
            for model, outcome in zip(models, outcomes, strict=True):
                if model.name == "giant":
                    self.assertIn(outcome, ("does_not_fit", "gone"))
            snapshot = residency.snapshot()
            self.assertEqual([], snapshot.waiting)
            self.assertEqual({}, residency._tickets)
            self.assertEqual({0}, {resident.users for resident in snapshot.residents} | {0})
            self.assertEqual({0}, set(snapshot.in_flight.values()) | {0})
        return set(outcomes), stats.overcommits


def toml(servers: dict[str, StandIn], budget: int, lane: str) -> str:
    """All models of some stand-ins, under their own names."""
    text = f"budget = {budget}\nmin_stay = 0\npatience = 0.05\n"
    for name, server in servers.items():
        text += f'[backends.{name}]\nkind = "ollama"\nurl = "{server.url}"\n{lane}'
        for model in server.models:
            text += f'[models.{model}]\nbackend = "{name}"\nmodel = "{model}"\nnum_ctx = 2048\n'
    return text


def chat(model: config.Model) -> Call:
    """A short question."""
    body = {"model": model.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}
    return Call("chat", body, dumps(body), model, stream=True, include_usage=False, id="x", created=0)


if __name__ == "__main__":
    unittest.main()
