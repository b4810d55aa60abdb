"""Which model is in memory when: the rules one by one, then with threads before stand-ins that share a memory."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
import unittest
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar
from unittest import mock

from portway import config
from portway.backends.ollama import OllamaBackend
from portway.call import Call, Limits, finish
from portway.call import Served as Answered
from portway.errors import BackendError, ClientError, ClientGone
from portway.memory import api as residency_api
from portway.memory import machine as memory
from portway.memory.arbiter import (
    DOUBTFUL,
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
    Runner,
    Seen,
    Shape,
    Wish,
)
from portway.memory.budget import budget_of
from portway.memory.residency import Place, Residency
from portway.routing import Cooling, Router
from portway.standin.server import Memory, StandIn, StandInModel
from portway.watch import ClientWatch, NoClient
from portway.wire.events import dumps
from tests.blocking import close, read
from tests.llama_server import wait_for

GB = 1024**3
SOON = 10.0  # seconds; nothing here takes that long unless it is broken


# --- the rules ------------------------------------------------------------------------------------


class Rules(unittest.TestCase):
    """A ledger with 10 GB and two backends, at second 0."""

    def setUp(self) -> None:
        self.ledger = Ledger()
        self.ledger.budget = Budget(10 * GB, 10 * GB, firm=True)
        self.ledger.counted = frozenset({"one", "two"})

    def wish(self, name: str, size: float, *, keep_alive: float | None = 60.0, at: float = 0.0, **more: Any) -> Wish:
        backend = more.pop("backend", "one")
        need = Need(int(size * GB), int(more.pop("sure", size) * GB), f"{size} GB")
        return Wish(name, Runner(backend, name), Shape(more.pop("num_ctx", 2048), ()), need, keep_alive, at)

    def enter(self, wish: Wish, now: float | None = None) -> Action | None:
        """What the wish itself gets; None = it waits."""
        return dict(self.ledger.enter(wish, wish.since if now is None else now)).get(wish)

    def loaded(self, name: str, size: float, *, now: float = 0.0, **more: Any) -> Wish:
        """A model that was used and is idle."""
        wish = self.wish(name, size, at=now, **more)
        self.assertEqual(Go(load=True), self.enter(wish))
        self.ledger.began(wish, now)
        self.ledger.release(wish, now)
        return wish

    def statuses(self) -> dict[str, str]:
        return {runner.name: resident.status for runner, resident in self.ledger.residents.items()}

    def victims(self, action: Action | None) -> list[str]:
        assert isinstance(action, Clear), action
        return [victim.runner.name for victim in action.victims]


class RulesTest(Rules):
    def test_join(self) -> None:
        """A second request for a model that is loading goes with the first one, and it counts as loaded once."""
        first, second = self.wish("a", 6), self.wish("a", 6)
        self.assertEqual([Go(load=True), Go(load=False)], [self.enter(first), self.enter(second)])
        self.assertEqual(2, self.ledger.residents[first.runner].users)
        self.ledger.began(second, 3.0)
        self.assertEqual({"a": LOADED}, self.statuses())

    def test_the_shortest_keep_alive_goes(self) -> None:
        """What has to go goes by keep_alive, and nothing goes that need not; for ever is last."""
        self.loaded("forever", 3, keep_alive=-1.0)
        self.loaded("long", 3, keep_alive=900.0, backend="two")
        self.loaded("short", 3, keep_alive=30.0)
        self.assertEqual(["short"], self.victims(self.enter(self.wish("b", 4))))
        self.setUp()
        self.loaded("small", 1, keep_alive=30.0)
        self.loaded("large", 8, keep_alive=900.0)
        self.assertEqual(["large"], self.victims(self.enter(self.wish("b", 8))))

    def test_what_is_used_stays(self) -> None:
        """A model with a request in flight is waited for, and unloaded once it is idle."""
        busy, other = self.wish("a", 6, keep_alive=0.0), self.wish("b", 6)
        self.assertEqual(Go(load=True), self.enter(busy))
        self.ledger.began(busy, 0.0)
        self.assertIsNone(self.enter(other))
        self.assertEqual("a to be idle", other.why)
        self.ledger.release(busy, 1.0)
        [(wish, action)] = self.ledger.turn(1.0)
        self.assertIs(other, wish)
        self.assertEqual(["a"], self.victims(action))
        self.assertEqual({"a": LEAVING}, self.statuses())
        self.ledger.left(self.ledger.residents[busy.runner], 2.0)
        self.ledger.cleared(other)
        self.assertEqual([(other, Go(load=True))], self.ledger.turn(2.0))

    def test_what_leaves_is_no_longer_used(self) -> None:
        """A request for a model that is being unloaded waits, and loads it again."""
        self.loaded("a", 6)
        self.enter(self.wish("b", 6))
        again = self.wish("a", 6)
        self.assertIsNone(self.enter(again))
        self.assertEqual("its unloading", again.why)

    def test_never(self) -> None:
        """What can't fit is refused at once; what only may not fit by an estimate is tried, alone."""
        refused = self.enter(self.wish("a", 11))
        self.assertIsInstance(refused, Refuse)
        self.assertEqual([], self.ledger.waiting)
        self.loaded("b", 1)
        maybe = self.wish("c", 12, sure=9)
        self.assertEqual(["b"], self.victims(self.enter(maybe)))
        self.ledger.left(next(iter(self.ledger.residents.values())), 0.0)
        self.ledger.cleared(maybe)
        self.assertEqual([(maybe, Go(load=True))], self.ledger.turn(0.0))

    def test_what_cannot_be_unloaded(self) -> None:
        """It takes its part of a budget that was set; of the machine's own only as long as that helps."""
        self.ledger.merge("two", [Seen("llama", 6 * GB, fixed=True)], 0.0, 0.0)
        refused = self.enter(self.wish("a", 5))
        assert isinstance(refused, Refuse)
        self.assertEqual(6 * GB, refused.beside)
        self.ledger.budget = Budget(10 * GB, 10 * GB)
        self.assertEqual(Go(load=True), self.enter(self.wish("a", 5)))

    def test_the_machine_s_own_measure(self) -> None:
        """When other programs have the memory, idle models go; then the load goes ahead."""
        self.ledger.budget = Budget(2 * GB, 20 * GB)
        self.ledger.merge("one", [Seen("a", 3 * GB)], 0.0, 0.0)
        wish = self.wish("b", 6)
        self.assertEqual(["a"], self.victims(self.enter(wish)))
        self.ledger.left(self.ledger.residents[Runner("one", "a")], 0.0)
        self.ledger.cleared(wish)
        self.assertEqual([(wish, Go(load=True))], self.ledger.turn(0.0))
        self.assertIsInstance(self.enter(self.wish("c", 21)), Refuse)

    def test_min_stay(self) -> None:
        """A model that was just loaded stays for a while, and the time to look again is known."""
        self.ledger.min_stay = 10.0
        self.loaded("a", 6)
        wish = self.wish("b", 6, at=4.0)
        self.assertIsNone(self.enter(wish))
        self.assertEqual(10.0, wish.retry_at)
        self.assertEqual([], self.ledger.turn(9.9))
        self.assertEqual(["a"], self.victims(dict(self.ledger.turn(10.0))[wish]))

    def test_the_loaded_model_first(self) -> None:
        """Requests that wait for the loaded model go before a swap, but not for ever."""
        self.ledger.patience = 5.0
        self.ledger.lanes["one"] = Lane(1)
        self.loaded("a", 6)
        running, swap = self.wish("a", 6), self.wish("b", 6, backend="two", at=1.0)
        self.enter(running)
        self.enter(swap)
        next_one = self.wish("a", 6, at=2.0)
        self.assertIsNone(self.enter(next_one))
        self.ledger.release(running, 3.0)
        self.assertEqual([(next_one, Go(load=False))], self.ledger.turn(3.0))
        late = self.wish("a", 6, at=4.0)
        self.assertIsNone(self.enter(late))
        self.assertEqual([], self.ledger.turn(6.0))
        self.ledger.release(next_one, 7.0)
        self.assertEqual([swap], [wish for wish, _ in self.ledger.turn(7.0)])

    def test_an_old_wish_blocks_what_it_waits_for(self) -> None:
        """Once a swap is due, the model that has to go gets no new requests; others do."""
        self.ledger.patience = 5.0
        self.loaded("keep", 1)
        busy = self.loaded("a", 6)
        busy = self.wish("a", 6)
        self.enter(busy)
        self.enter(self.wish("b", 8, at=0.0))
        self.assertEqual(Go(load=False), self.enter(self.wish("a", 6, at=4.0)))
        self.assertIsNone(self.enter(self.wish("a", 6, at=5.0)))
        self.assertEqual(Go(load=False), self.enter(self.wish("keep", 1, at=5.0)))

    def test_an_old_wish_has_its_room_kept(self) -> None:
        """Younger ones neither take the memory that an old one waits for, nor unload what it will unload."""
        self.loaded("idle", 3)
        busy = self.wish("a", 6)
        self.enter(busy)
        self.ledger.began(busy, 0.0)
        self.assertIsNone(self.enter(self.wish("old", 9)))
        self.assertIsNone(self.enter(self.wish("fits", 1)))
        self.assertIsNone(self.enter(self.wish("young", 4)))
        self.assertEqual({"idle": LOADED, "a": LOADED}, self.statuses())

    def test_the_room_that_is_being_made(self) -> None:
        """Nobody takes it who asked later, not even a small one that would fit beside what is still there."""
        busy = self.wish("a", 6)
        self.enter(busy)
        self.ledger.began(busy, 0.0)
        old, small = self.wish("old", 9.5), self.wish("small", 0.8)
        self.assertEqual([None, None], [self.enter(old), self.enter(small)])
        self.ledger.release(busy, 1.0)
        [(wish, action)] = self.ledger.turn(1.0)
        self.assertIs(old, wish)
        self.assertEqual(["a"], self.victims(action))
        self.assertEqual([], self.ledger.turn(1.0))

    def test_what_another_client_loads(self) -> None:
        """It is not unloaded before it is there, however small it is."""
        self.ledger.merge("one", [Seen("theirs", GB // 2, loading=True)], 0.0, 0.0)
        wish = self.wish("a", 9.8)
        self.assertIsNone(self.enter(wish))
        self.assertEqual("theirs to be idle", wish.why)

    def test_what_another_client_failed_to_load(self) -> None:
        """It is forgotten, and keeps nobody from loading any longer."""
        self.ledger.merge("one", [Seen("theirs", 6 * GB, loading=True)], 0.0, 0.0)
        wish = self.wish("a", 3)
        self.assertIsNone(self.enter(wish))
        self.assertEqual("another load's end", wish.why)
        self.ledger.merge("one", [], 1.0, 1.0)
        self.assertEqual({}, self.statuses())
        self.assertEqual([(wish, Go(load=True))], self.ledger.turn(1.0))

    def test_the_short_way(self) -> None:
        """Whoever finds its model there goes at once; but not past those that wait."""
        self.loaded("a", 4)
        self.assertTrue(self.ledger.take(self.wish("a", 4), 0.0))
        self.loaded("c", 1)
        self.assertIsNone(self.enter(self.wish("b", 9)))
        self.assertFalse(self.ledger.take(self.wish("c", 1), 0.0))

    def test_what_is_leaving_anyway(self) -> None:
        """Nothing more is unloaded if what is on its way out makes room enough."""
        leaver = self.loaded("leaver", 6)
        self.loaded("idle", 3, backend="two")
        self.ledger.leaving(self.ledger.residents[leaver.runner])
        wish = self.wish("b", 6)
        self.assertIsNone(self.enter(wish))
        self.assertEqual("another's unloading", wish.why)
        self.ledger.left(self.ledger.residents[leaver.runner], 1.0)
        self.assertEqual([(wish, Go(load=True))], self.ledger.turn(1.0))

    def test_one_big_load_at_a_time(self) -> None:
        """Another big load waits for the end of the first; a small one does not."""
        first, second, small = self.wish("a", 3), self.wish("b", 3), self.wish("c", 0.3)
        self.assertEqual(Go(load=True), self.enter(first))
        self.assertIsNone(self.enter(second))
        self.assertEqual(Go(load=True), self.enter(small))
        self.ledger.began(first, 1.0)
        self.assertEqual([(second, Go(load=True))], self.ledger.turn(1.0))

    def test_another_window(self) -> None:
        """Another num_ctx loads the model anew, so it waits until nobody uses it; the server's own fits any."""
        self.ledger.patience = 60.0
        first = self.wish("a", 6)
        self.enter(first)
        self.ledger.began(first, 0.0)
        other, any_window = self.wish("a", 6.5, num_ctx=4096), self.wish("a", 6, num_ctx=None)
        self.assertIsNone(self.enter(other))
        self.assertEqual(Go(load=False), self.enter(any_window))
        self.ledger.release(first, 1.0)
        self.assertEqual([], self.ledger.turn(1.0))
        self.ledger.release(any_window, 1.0)
        self.assertEqual([(other, Go(load=True))], self.ledger.turn(1.0))
        self.assertEqual(4096, self.ledger.residents[first.runner].shape.num_ctx)

    def test_places_of_a_backend(self) -> None:
        """No more at once than max_parallel, first come first served; who leaves makes room for the next."""
        self.ledger.lanes["one"] = Lane(1, 2)
        wishes = [self.wish("a", 1) for _ in range(3)]
        self.assertEqual([Go(load=True), None, None], [self.enter(wish) for wish in wishes])
        self.assertTrue(self.ledger.is_full("one"))
        self.ledger.leave(wishes[1])
        self.assertFalse(self.ledger.is_full("one"))
        self.ledger.release(wishes[0], 1.0)
        self.assertEqual([wishes[2]], [wish for wish, _ in self.ledger.turn(1.0)])

    def test_unknown_sizes(self) -> None:
        """Nothing is arbitrated for what nobody knows the size of, nor for what is elsewhere."""
        self.loaded("a", 9)
        unknown = self.wish("b", 1)
        unknown.need = None
        self.assertEqual(Go(load=True), self.enter(unknown))
        self.assertEqual(Go(load=True), self.enter(self.wish("c", 99, backend="far")))

    def test_a_look(self) -> None:
        """What others load is noticed, and what is gone is forgotten; what is in use stays known."""
        used = self.wish("used", 0.5)
        self.enter(used)
        self.loaded("idle", 0.5)
        self.ledger.merge("one", [Seen("theirs", 2 * GB, 512, 40.0, told="theirs:latest")], 1.0, 1.0)
        self.assertEqual({"used": LOADING, "theirs": LOADED}, self.statuses())
        theirs = self.ledger.residents[Runner("one", "theirs")]
        self.assertEqual((2 * GB, 512, 40.0, False), (theirs.size, theirs.shape.num_ctx, theirs.rank, theirs.ours))

    def test_looks_that_come_late(self) -> None:
        """A look that began before something changed says nothing about that, nor one that was overtaken."""
        gone = self.loaded("a", 1, now=5.0)
        self.ledger.merge("one", [], 4.0, 6.0)
        self.assertEqual({"a": LOADED}, self.statuses())
        self.ledger.left(self.ledger.residents[gone.runner], 7.0)
        self.ledger.merge("one", [Seen("a", GB)], 6.5, 8.0)
        self.assertEqual({}, self.statuses())
        self.ledger.merge("one", [Seen("b", GB)], 10.0, 10.0)
        self.ledger.merge("one", [Seen("b", GB)], 20.0, 20.0)
        self.ledger.merge("one", [], 15.0, 21.0)
        self.assertEqual({"b": LOADED}, self.statuses())

    def test_a_load_that_was_given_up(self) -> None:
        """Its memory counts until its server has had the time to let go of it."""
        wish = self.wish("a", 6, at=5.0)
        self.enter(wish)
        self.ledger.release(wish, 6.0)
        self.assertEqual({"a": DOUBTFUL}, self.statuses())
        self.ledger.merge("one", [], 7.0, 7.0)
        self.assertEqual({"a": DOUBTFUL}, self.statuses())
        self.ledger.merge("one", [], 8.5, 8.5)
        self.assertEqual({}, self.statuses())

    def test_a_load_that_was_given_up_and_is_asked_for_again(self) -> None:
        """It need not wait for its own doubtful rest."""
        self.ledger.min_stay = 60.0
        wish = self.wish("a", 6, at=5.0)
        self.enter(wish)
        self.ledger.began(wish, 5.0)
        self.ledger.release(wish, 5.0)
        resident = self.ledger.residents[wish.runner]
        self.ledger.leaving(resident)
        self.ledger.stayed(resident, 11.0, 6.0)
        self.assertEqual(Go(load=True), self.enter(self.wish("a", 6, at=7.0)))

    def test_what_could_not_be_unloaded(self) -> None:
        """It is left alone for a while, and something else goes."""
        self.loaded("a", 4, keep_alive=1.0)
        self.loaded("b", 4, keep_alive=2.0)
        wish = self.wish("c", 5)
        self.assertEqual(["a"], self.victims(self.enter(wish)))
        self.ledger.stayed(self.ledger.residents[Runner("one", "a")], 5.0, 0.0)
        self.ledger.cleared(wish)
        self.assertEqual(["b"], self.victims(dict(self.ledger.turn(0.1))[wish]))

    def test_surplus(self) -> None:
        """Where a budget that was set is exceeded, idle models of ours go: no others, none too early, and no more
        than needed; never where the budget follows the machine."""
        self.ledger.min_stay = 10.0
        first, second = self.loaded("a", 4, keep_alive=1.0), self.loaded("b", 4, keep_alive=2.0, backend="two")
        self.ledger.merge("one", [Seen("a", 7 * GB, 2048)], 1.0, 1.0)
        self.assertEqual((), self.ledger.surplus(9.0))
        self.assertEqual(["a"], [r.runner.name for r in self.ledger.surplus(10.0)])
        using = self.wish("a", 4, at=10.0)
        self.assertEqual(Go(load=False), self.enter(using))
        self.assertEqual(["b"], [r.runner.name for r in self.ledger.surplus(10.0)])
        self.ledger.residents[second.runner].ours = False
        self.assertEqual((), self.ledger.surplus(10.0))
        self.ledger.release(using, 11.0)
        self.ledger.budget = Budget(10 * GB, 10 * GB)
        self.assertEqual((), self.ledger.surplus(11.0))
        self.ledger.budget = Budget(11 * GB, 11 * GB, firm=True)
        self.assertEqual((), self.ledger.surplus(11.0))
        self.ledger.budget = Budget(10 * GB, 10 * GB, firm=True)
        self.assertEqual(1, len(self.ledger.surplus(11.0)))
        waits = self.wish("c", 9, at=11.0)
        self.ledger.waiting.append(waits)  # it makes its own room
        self.assertEqual((), self.ledger.surplus(11.0))
        self.ledger.leave(waits)
        self.ledger.leaving(self.ledger.residents[first.runner])
        self.assertEqual((), self.ledger.surplus(11.0))

    def test_what_another_client_loaded_and_we_use(self) -> None:
        """By then it has the shape that we asked for: its server loads it anew where that differs."""
        self.ledger.merge("one", [Seen("a", 3 * GB, 2048)], 0.0, 0.0)
        resident = self.ledger.residents[Runner("one", "a")]
        self.assertEqual((Shape(2048), False), (resident.shape, resident.is_weighed))
        wish = self.wish("a", 1, num_ctx=None)
        self.enter(wish)
        self.assertFalse(resident.is_weighed)
        self.ledger.began(wish, 1.0)
        self.assertEqual((Shape(2048, ()), True), (resident.shape, resident.is_weighed))

    def test_expired(self) -> None:
        """What its server has dropped by now is not taken for loaded without a look."""
        self.loaded("a", 1, keep_alive=5.0)
        self.assertTrue(self.ledger.take(self.wish("a", 1), 4.0))
        self.setUp()
        self.loaded("a", 1, keep_alive=5.0)
        self.assertFalse(self.ledger.take(self.wish("a", 1), 5.0))

    def test_budgets(self) -> None:
        """The user's own holds; the machine's is what others leave; a card apart or nothing known: none."""
        auto = config.Memory(reserve=2 * GB)
        reading = memory.Reading(24 * GB, 8 * GB)
        self.assertEqual(Budget(5 * GB, 5 * GB, firm=True), budget_of(config.Memory(budget=5 * GB), reading, 0))
        self.assertEqual(Budget(12 * GB, 22 * GB), budget_of(auto, reading, 6 * GB))
        self.assertEqual(Budget(22 * GB, 22 * GB), budget_of(auto, memory.Reading(24 * GB), 0))
        self.assertEqual(Budget(0, 22 * GB), budget_of(auto, memory.Reading(24 * GB, GB), 0))
        self.assertEqual(Budget(), budget_of(auto, memory.Reading(24 * GB, 8 * GB, apart=True), 0))
        self.assertEqual(Budget(), budget_of(auto, memory.Reading(), 0))


# --- with threads ---------------------------------------------------------------------------------


class Served(unittest.TestCase):
    """Two stand-ins for Ollama that share 10 GB and know nothing of each other."""

    memory_options = 'budget = "10GB"\nmin_stay = 0\npatience = 0\n'
    models: ClassVar[Mapping[str, str]] = {}  # further options of a model
    backends: ClassVar[Mapping[str, str]] = {}

    def setUp(self) -> None:
        self.memory = Memory(10 * GB)
        sizes: dict[str, dict[str, float]] = {"one": {"a": 6, "b": 5, "embed": 0.3}, "two": {"c": 6, "giant": 20}}
        self.standins = {
            name: self.enterContext(StandIn([self.model(m, size) for m, size in models.items()], memory=self.memory))
            for name, models in sizes.items()
        }
        self.config = config.parse(self.toml(self.memory_options), "models.toml", {})
        self.said: list[str] = []
        self.residency = Residency(self.config, read=memory.Reading, say=self.said.append)
        self.addCleanup(self.residency.stop)

    def model(self, name: str, size: float) -> StandInModel:
        kind = ("embedding",) if name == "embed" else ("completion", "tools")
        return StandInModel(name, int(size * GB), kind)

    def toml(self, memory_options: str) -> str:
        text = f"[memory]\n{memory_options}"
        for name, standin in self.standins.items():
            text += f'[backends.{name}]\nkind = "ollama"\nurl = "{standin.url}"\n{self.backends.get(name, "")}\n'
            for model in standin.models:
                more = self.models.get(model, 'keep_alive = "5m"')
                text += f'[models.{model}]\nbackend = "{name}"\nmodel = "{model}"\nnum_ctx = 512\n{more}\n'
        return text + self.models.get("", "")

    def place(self, name: str, watch: Any = None, seconds: float = SOON, others: tuple[str, ...] = ()) -> Any:
        models = self.config.models
        until = time.monotonic() + seconds
        chain = [models[other] for other in others]
        return finish(self.residency.place(models[name], watch or NoClient(), until, lambda: chain))

    def ask(self, name: str, watch: Any = None, *, load: bool = False) -> bytes:
        """A whole streamed answer, by way of a place. load: no question, the model is only loaded."""
        target = self.config.models[name]
        if load:
            self.residency.load(target, NoClient(), time.monotonic() + SOON)
            return b""
        call = chat(target)
        until = time.monotonic() + SOON
        backend = OllamaBackend(target.backend)
        self.addCleanup(backend.close)
        with finish(self.residency.place(target, watch or NoClient(), until)) as place:
            limits = Limits(SOON, SOON, SOON, SOON, until, until)
            answer = place.hold(finish(backend.open(call, target, limits, watch or NoClient())))
            try:
                return read(answer, place)
            finally:
                close(answer)

    def refused(self, reason: str, name: str, **more: Any) -> BackendError:
        with self.assertRaises(BackendError) as caught, self.place(name, **more):
            pass
        self.assertEqual(reason, caught.exception.reason)
        return caught.exception

    def in_memory(self) -> set[str]:
        return {resident.model.name for resident, _ in self.memory.residents()}

    def known(self) -> dict[str, str]:
        residents = self.residency.snapshot().residents
        return {resident.runner.name.removesuffix(":latest"): resident.status for resident in residents}

    def paths(self, name: str) -> list[str]:
        return [request.path for request in self.standins[name].requests]

    def settle(self) -> None:
        """A request's end counts only after its answer."""
        for standin in self.standins.values():
            self.assertTrue(standin.wait_for(lambda s: s.in_flight == 0))

    def in_thread(self, name: str, watch: Any = None) -> Asking:
        asking = Asking(lambda: self.ask(name, watch))
        asking.start()
        self.addCleanup(asking.join, SOON)
        return asking

    def await_waiting(self, count: int) -> None:
        wait_for(lambda: len(self.residency.snapshot().waiting) == count, f"{count} that wait")


class Asking(threading.Thread):
    """A function on a thread, and what came of it."""

    def __init__(self, run: Any) -> None:
        super().__init__(daemon=True)
        self._run_it = run
        self.result: Any = None

    def run(self) -> None:
        try:
            self.result = self._run_it()
        except (BackendError, ClientError, ClientGone) as exc:
            self.result = exc

    def outcome(self) -> Any:
        self.join(SOON)
        assert not self.is_alive(), "it has not ended"
        return self.result


class ThreadsTest(Served):
    def test_across_backends(self) -> None:
        """A model behind one server makes room for one behind another, which could not know of it."""
        for name in ("a", "c", "b"):
            self.assertIn(b"[DONE]", self.ask(name))
            self.assertEqual({name}, self.in_memory())
        self.assertEqual(0, self.memory.stats().overcommits)
        self.assertEqual([3, 2], [self.memory.stats().loads, self.memory.stats().unloads])

    def test_it_waits_for_what_is_used(self) -> None:
        """A request waits until the model in its way is idle, and its client's heartbeats go on meanwhile."""
        beaten = threading.Event()
        ours, _theirs = self.pair()
        watch = ClientWatch(ours, lambda: True)

        async def beat() -> None:
            beaten.set()

        watch.begin(0.001, beat)
        with self.place("a"):
            self.residency.load(self.config.models["a"], NoClient(), time.monotonic() + SOON)
            waiting = self.in_thread("c", watch)
            self.await_waiting(1)
            self.assertTrue(beaten.wait(SOON))
            self.assertEqual({"a"}, self.in_memory())
        self.assertIn(b"[DONE]", waiting.outcome())
        self.assertEqual({"c"}, self.in_memory())

    def test_a_waiting_client_leaves(self) -> None:
        """It is forgotten at once, and does not keep the others waiting."""
        ours, theirs = self.pair()
        with self.place("a"):
            leaver = self.in_thread("c", ClientWatch(ours, lambda: bool(ours.recv(1))))
            self.await_waiting(1)
            theirs.close()
            self.assertIsInstance(leaver.outcome(), ClientGone)
            self.assertEqual([], self.residency.snapshot().waiting)
        self.assertNotIn("/api/chat", self.paths("two"))

    def test_it_leaves_just_then(self) -> None:
        """A client that leaves at the moment in which it is given a place takes nothing with it."""
        with self.place("a") as held:
            held.began()
            watch = Then(held.leave, ClientGone())
            with self.assertRaises(ClientGone), self.place("c", watch):
                pass
        self.assertEqual([0], [resident.users for resident in self.residency.snapshot().residents])
        self.assertEqual({0}, set(self.residency.snapshot().in_flight.values()))
        self.ask("b")

    def test_it_is_given_a_place_at_the_last_moment(self) -> None:
        """What came together with the end of its time is still had."""
        with self.place("a") as held:
            held.began()
            with self.place("c", Then(held.leave, None), seconds=0.0) as place:
                self.assertTrue(place.wish.loads)

    def test_one_load_for_all(self) -> None:
        """Requests for a model that is being loaded join its load."""
        first = self.place("a")
        second = self.place("a")
        self.assertEqual([True, False], [first.wish.loads, second.wish.loads])
        self.assertEqual({"a": LOADING}, self.known())
        second.began()
        self.assertEqual({"a": LOADED}, self.known())
        first.leave()
        first.leave()  # twice is once
        self.assertEqual([1], [resident.users for resident in self.residency.snapshot().residents])
        second.leave()

    def test_it_never_fits(self) -> None:
        """A model that is larger than the budget is refused at once, with the arithmetic and a way out."""
        error = self.refused("does_not_fit", "giant")
        self.assertRegex(error.message, r"^giant needs 20\.0 GB \+ .* for 512 tokens; the budget is 10\.0 GB$")
        self.assertIn("backends.two.local", error.way_out)
        self.assertEqual("no", error.failure.cools)
        self.assertNotIn("/api/chat", self.paths("two"))

    def test_it_waits_no_longer_than_its_share(self) -> None:
        """A request whose time is over is refused, so that the next of its chain has its turn."""
        with self.place("a") as place:
            place.began()
            error = self.refused("no_room", "c", seconds=0.05)
        self.assertIn("a:latest to be idle", error.message)
        self.assertIsNotNone(error.retry_after)
        self.assertEqual([], self.residency.snapshot().waiting)

    def test_another_client_s_model(self) -> None:
        """What another client has loaded is noticed before a load, and makes room like any other."""
        other = self.config.models["b"]
        theirs = Residency(self.config, read=memory.Reading)
        self.addCleanup(theirs.stop)
        theirs.load(other, NoClient(), time.monotonic() + SOON)
        self.assertEqual({}, self.known())
        self.ask("c")
        self.assertEqual(({"c"}, 0), (self.in_memory(), self.memory.stats().overcommits))

    def test_what_its_server_dropped(self) -> None:
        """A model that went by itself is seen to have gone, and costs nothing."""
        self.ask("a")
        self.settle()
        self.standins["one"].memory.unload(self.standins["one"].owner, self.standins["one"].models["a"])
        self.residency._hearing["one"].looked_at = -math.inf
        self.residency.refresh(NoClient())
        self.assertEqual({}, self.known())

    def test_measured(self) -> None:
        """What a model really takes replaces the estimate."""
        before = self.residency._seats["a"].need
        self.assertIsNone(before)
        self.residency.refresh(NoClient())
        estimated = self.residency._seats["a"]
        assert estimated.need is not None
        self.assertGreater(estimated.need.size, 6 * GB)
        self.ask("a")
        self.residency._hearing["one"].looked_at = -math.inf
        self.residency.refresh(NoClient())
        measured = self.residency._seats["a"]
        self.assertEqual((Need(6 * GB, 6 * GB, "6.0 GB, as measured"), True), (measured.need, measured.measured))

    def test_measured_of_another_client(self) -> None:
        """Also what another client had loaded is measured once we have used it."""
        theirs = Residency(self.config, read=memory.Reading)
        self.addCleanup(theirs.stop)
        theirs.load(self.config.models["a"], NoClient(), time.monotonic() + SOON)
        self.residency.refresh(NoClient())
        self.assertFalse(self.residency._seats["a"].measured)
        self.ask("a")
        self.settle()
        self.residency.check()
        self.assertTrue(self.residency._seats["a"].measured)

    def test_a_server_that_is_away(self) -> None:
        """Requests go on as without an arbiter, what it had is forgotten, and it is told."""
        self.ask("a")
        self.standins["one"].stop()
        self.residency._hearing["one"].looked_at = -math.inf
        with self.place("b"):
            self.assertEqual({"b"}, set(self.known()))
        self.assertIn("one", residency_api.health(self.residency)["unasked"])
        self.ask("c")
        self.assertEqual({"c"}, self.in_memory())

    def test_an_answer_that_fails(self) -> None:
        """The place of a request that fails is free again."""
        self.residency.refresh(NoClient())
        self.standins["one"].fail("a", "500")
        with self.assertRaises(BackendError):
            self.ask("a")
        self.assertEqual({0}, {resident.users for resident in self.residency.snapshot().residents})

    def test_an_unloading_that_fails(self) -> None:
        """Is the model still there, then it still counts, and the request that needed its room gives up in time."""
        self.ask("a")
        self.standins["one"].fail("a", "500", times=None)
        error = self.refused("no_room", "c", seconds=0.3)
        self.assertIn("a", error.message)
        self.assertEqual({"a"}, self.in_memory())
        self.assertEqual(0, self.memory.stats().overcommits)

    def test_a_server_that_has_just_gone(self) -> None:
        """What is to be unloaded there is gone with it; nobody waits for that."""
        self.ask("a")
        self.settle()
        self.standins["one"].stop()
        for hearing in self.residency._hearing.values():
            hearing.looked_at = time.monotonic()  # it is not looked at before
        with self.place("c", seconds=2.0) as place:
            self.assertTrue(place.wish.loads)

    def test_a_server_that_fails_is_not_asked_at_once_again(self) -> None:
        """It would cost each load the time of that question."""
        self.standins["one"].fail("/api/ps", "500", times=None)
        for _ in range(3):
            self.residency.refresh(NoClient())
        self.assertEqual(1, self.paths("one").count("/api/ps"))

    def test_a_backend_that_goes_while_it_is_asked(self) -> None:
        """What is no longer configured leaves nothing behind."""
        engine, look = self.residency._engines["one"], self.residency._engines["one"].look
        now = self.config
        left = replace(now, backends={"two": now.backends["two"]}, models={"c": now.models["c"]})

        def then(*words: Any) -> Any:
            seen = look(*words)
            self.residency.adopt(left)
            return seen

        self.ask("a")
        self.settle()
        self.residency._hearing["one"].looked_at = -math.inf
        with mock.patch.object(engine, "look", then):
            self.residency.refresh(NoClient())
        self.assertEqual({}, self.known())

    def test_what_it_has_is_listed_once(self) -> None:
        """Which weights a name stands for is asked for once, and not at each look."""
        for _ in range(3):
            self.residency._hearing["one"].looked_at = -math.inf
            self.residency.refresh(NoClient())
        self.assertEqual((1, 3), tuple(map(self.paths("one").count, ("/api/tags", "/api/ps"))))

    def test_a_server_that_does_not_answer(self) -> None:
        """A request waits only a moment for what it has loaded, and goes on."""
        self.standins["one"].fail("/api/ps", "hang", times=None)
        with mock.patch("portway.memory.residency.GLANCE", 0.05):
            started = time.monotonic()
            with self.place("c"):
                self.assertLess(time.monotonic() - started, 2.0)
        self.standins["one"].release()

    def test_reload(self) -> None:
        """What is loaded stays known under a new configuration, but behind a server that has moved."""
        self.ask("b")
        self.residency.adopt(self.config)
        self.assertEqual({"b": LOADED}, self.known())
        moved = self.toml(self.memory_options).replace(self.standins["one"].url, "http://127.0.0.1:9")
        self.residency.adopt(config.parse(moved, "models.toml", {}))
        self.assertEqual({}, self.known())

    def test_off(self) -> None:
        """memory.enabled = false: nothing is asked, nothing waits."""
        off = Residency(config.parse(self.toml("enabled = false\n"), "models.toml", {}), read=memory.Reading)
        self.addCleanup(off.stop)
        place = finish(off.place(self.config.models["giant"], NoClient(), 0.0))
        self.assertNotIsInstance(place, Place)
        self.assertEqual([], self.paths("two"))
        self.assertEqual("off", residency_api.health(off)["budget"])

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        return ours, theirs


class TightTest(Served):
    memory_options = 'budget = "6500MB"\nmin_stay = 0\npatience = 0\n'

    def test_it_leaves_while_others_are_unloaded(self) -> None:
        """What has been told to go is in doubt, what has not stays loaded; neither is lost."""
        self.ask("b")
        self.ask("embed", load=True)
        with self.assertRaises(ClientGone), self.place("c", Then(lambda: None, ClientGone())):
            pass
        self.assertEqual({"b": DOUBTFUL, "embed": LOADED}, self.known())
        self.assertIn(b"[DONE]", self.ask("c"))

    def test_the_machine_is_not_measured_while_something_loads(self) -> None:
        """What loads counts in full and has not taken its memory yet, so the sum would be too high."""
        auto = config.parse(self.toml(""), "models.toml", {})
        readings = [memory.Reading(24 * GB, 10 * GB)]
        residency = Residency(auto, read=lambda: readings[-1])
        self.addCleanup(residency.stop)
        residency.refresh(NoClient())
        self.assertEqual(8 * GB, residency.snapshot().budget.now)
        place = finish(residency.place(auto.models["a"], NoClient(), time.monotonic() + SOON))
        readings.append(memory.Reading(24 * GB, 9 * GB))
        residency.refresh(NoClient())
        self.assertEqual(8 * GB, residency.snapshot().budget.now)
        place.began()
        residency.refresh(NoClient())
        self.assertEqual(13, (residency.snapshot().budget.now or 0) // GB)
        assert isinstance(place, Place)
        place.leave()


class Then(NoClient):
    """A Watch whose first wait ends after something has happened: with an error, or as if time were over."""

    def __init__(self, happens: Callable[[], object], error: Exception | None) -> None:
        self._happens = happens
        self._error = error
        self._happened = False

    async def readable(self, sock: socket.socket, until: float) -> bool:
        if self._happened:
            return await super().readable(sock, until)
        self._happened = True
        self._happens()
        if self._error is not None:
            raise self._error
        return False


class QueueTest(Served):
    backends: ClassVar = {"one": "max_parallel = 1\nmax_queue = 1"}

    def test_full(self) -> None:
        """Beyond max_queue a request is refused with a time to come back; who waited is served."""
        with self.place("a"):
            waiting = self.in_thread("a")
            self.await_waiting(1)
            error = self.refused("queue_full", "a")
            self.assertEqual(429, error.status)
            self.assertGreaterEqual(error.retry_after or 0.0, 1.0)
        self.assertIn(b"[DONE]", waiting.outcome())

    def test_it_leaves_just_then(self) -> None:
        """A place that is given to a client that leaves in this moment goes to the next one."""
        with self.place("a") as held:
            held.began()
            with self.assertRaises(ClientGone), self.place("a", Then(held.leave, ClientGone())):
                pass
        self.assertEqual({0}, set(self.residency.snapshot().in_flight.values()))
        self.assertIn(b"[DONE]", self.ask("a"))

    def test_first_come_first_served(self) -> None:
        """Places are given in the order in which they were asked for."""
        held = self.place("a")
        self.residency.adopt(
            config.parse(self.toml(self.memory_options).replace("max_queue = 1", "max_queue = 9"), "models.toml", {})
        )
        order: list[int] = []
        threads = []
        for number in range(4):
            threads.append(Asking(lambda number=number: self.take_turn(number, order)))
            threads[-1].start()
            self.await_waiting(number + 1)
        held.leave()
        for thread in threads:
            thread.outcome()
        self.assertEqual([0, 1, 2, 3], order)

    def take_turn(self, number: int, order: list[int]) -> None:
        with self.place("a"):
            order.append(number)


class WarmTest(Served):
    models: ClassVar = {
        "a": 'keep_alive = "5m"\nprefer_warm = true\nfallback = ["c", "b"]\ntimeouts = { first_token = 5 }',
        "c": 'keep_alive = "5m"',
    }

    def test_a_warm_one_answers(self) -> None:
        """Loading 6 GB would take longer than first_token, so a loaded member of the chain answers."""
        self.assertIn(b"[DONE]", self.ask("c"))
        error = self.refused("cold", "a", others=("c", "b"))
        self.assertIn("c is loaded", error.message)

    def test_its_share_of_the_time(self) -> None:
        """What takes longer than this attempt's share takes too long, whatever first_token says."""
        self.residency.refresh(NoClient())
        a = self.config.models["a"]
        self.residency._measured.time(a.backend.url, self.residency._seats["a"].runner.name, 3.0)
        self.ask("c")
        self.settle()
        self.refused("cold", "a", seconds=2.0, others=("c",))
        with self.place("a", seconds=4.0, others=("c",)) as place:
            self.assertTrue(place.wish.loads)

    def test_nobody_is_warm(self) -> None:
        """Then it is loaded after all; and it is warm from then on."""
        with self.place("a", others=("c", "b")) as place:
            place.began()
        with self.place("a", others=("c", "b")):
            pass
        self.assertEqual({"a": LOADED}, self.known())

    def test_a_load_that_was_measured(self) -> None:
        """What took a moment the last time is loaded, whatever is warm."""
        self.residency.refresh(NoClient())
        a = self.config.models["a"]
        self.residency._measured.time(a.backend.url, self.residency._seats["a"].runner.name, 1.0)
        self.ask("c")
        with self.place("a", others=("c",)) as place:
            self.assertTrue(place.wish.loads)


class Routed(Served):
    """The router takes a place for each attempt."""

    def serve(self, name: str) -> Answered:
        backends = {name: OllamaBackend(backend) for name, backend in self.config.backends.items()}
        for backend in backends.values():
            self.addCleanup(backend.close)
        router = Router(self.config, backends, Cooling(self.config.cooldown), place=self.residency.place)
        return finish(router.serve(chat(self.config.models[name]), NoClient()))

    def attempts(self, served: Answered) -> list[tuple[str, str]]:
        return [(attempt.model, attempt.reason) for attempt in served.attempts]


class RouterTest(Routed):
    models: ClassVar = {
        "giant": 'fallback = ["a"]',
        "a": 'prefer_warm = true\nfallback = ["c"]\ntimeouts = { first_token = 5 }',
    }

    def test_it_falls_back(self) -> None:
        """What can't fit is skipped at once, and the next one answers."""
        served = self.serve("giant")
        self.assertEqual([("giant", "does_not_fit"), ("a", "ok")], self.attempts(served))
        close(served.answer)

    def test_a_warm_one(self) -> None:
        """The attempts say that the one that was asked for was cold."""
        self.ask("c")
        served = self.serve("a")
        self.assertEqual([("a", "cold"), ("c", "ok")], self.attempts(served))
        close(served.answer)

    def test_a_stream_holds_its_place(self) -> None:
        """A model is in use until its answer has been closed, and not only until it begins; from its first content on
        it counts as loaded."""
        served = self.serve("b")
        self.assertEqual("loaded", self.known()["b"])
        waiting = self.in_thread("c")
        self.await_waiting(1)
        self.assertEqual({"b"}, self.in_memory())
        close(served.answer)
        self.assertIn(b"[DONE]", waiting.outcome())


class FullTest(Routed):
    """A backend whose queue is full, in a chain, where there is memory for all."""

    memory_options = 'budget = "40GB"\n'
    backends: ClassVar = {"one": "max_parallel = 1\nmax_queue = 1"}
    models: ClassVar = {"b": 'fallback = ["c"]'}

    def test_it_goes_down_the_chain(self) -> None:
        """Whoever would wait behind too many is served by the next member, and what was tried says so."""
        with self.place("b") as place:
            place.began()
            waiting = self.in_thread("b")
            self.await_waiting(1)
            served = self.serve("b")
            self.assertEqual([("b", "queue_full"), ("c", "ok")], self.attempts(served))
            finish(served.answer.close())
        self.assertIn(b"[DONE]", waiting.outcome())


def chat(target: config.Model) -> Call:
    """A short question, streamed. llama-server is to answer it: a model of random weights may end at once."""
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": target.name, "messages": messages, "stream": True, "max_tokens": 5, "ignore_eos": True}
    return Call("chat", body, dumps(body), target, stream=True, include_usage=False, id="x", created=0)


def post(url: str, body: object) -> Any:
    """The JSON that `body` is answered with."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SOON) as response:
        return json.load(response)


if __name__ == "__main__":
    unittest.main()
