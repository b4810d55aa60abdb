"""routing.py with made-up backends and a clock of its own: the chain, its time, cooldown, words."""

from __future__ import annotations

import dataclasses
import json
import time
import unittest
from collections.abc import AsyncIterator
from typing import Any

from portway import config
from portway.call import Answer, Call, Endpoint, Limits, Served, Tally, Watch, finish
from portway.errors import FAILURES, BackendError, ClientError, ClientGone
from portway.routing import SHORT, ChainExhausted, Cooling, Router
from portway.watch import NoClient
from tests.blocking import rest

TOML = """
[backends.a]
kind = "ollama"
url = "http://127.0.0.1:1"
[backends.b]
kind = "openai"
url = "http://127.0.0.1:2"
[models.first]
backend = "a"
model = "big"
fallback = ["second", "third"]
timeouts = { total = 90 }
[models.second]
backend = "b"
model = "small"
[models.third]
backend = "a"
model = "tiny"
"""
CONFIG = config.parse(TOML, "models.toml", {})
FIRST, SECOND, THIRD = CONFIG.models.values()
DONE = b"data: [DONE]\n\n"

Outcome = BackendError | Exception | list[bytes | Exception]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class MadeUpAnswer:
    def __init__(self, outcome: list[bytes | Exception]) -> None:
        self.tally = Tally()
        self.warnings: list[str] = []
        self.closed = 0
        self._outcome = iter(outcome)

    async def piece(self) -> bytes:
        piece = next(self._outcome, b"")
        if isinstance(piece, Exception):
            raise piece
        return piece

    async def whole(self) -> bytes:
        return b"".join([piece async for piece in self._all()])

    async def _all(self) -> AsyncIterator[bytes]:
        while piece := await self.piece():
            yield piece

    async def close(self) -> None:
        self.closed += 1


class MadeUp:
    """A backend that does what is told of each model: raise at once, or answer with pieces."""

    def __init__(self, **outcomes: Outcome) -> None:
        self.outcomes = outcomes
        self.opened: list[tuple[str, Limits, str]] = []
        self.answers: list[MadeUpAnswer] = []

    async def open(self, _call: Call, target: config.Model, limits: Limits, watch: Watch) -> Answer:
        self.opened.append((target.name, limits, watch.phase))
        watch.phase = "prompt"
        outcome = self.outcomes[target.name]
        if isinstance(outcome, Exception):
            raise outcome
        self.answers.append(MadeUpAnswer(outcome))
        return self.answers[-1]

    def close(self) -> None:
        """Nothing to close."""

    @property
    def asked(self) -> list[str]:
        return [name for name, _, _ in self.opened]


def call(endpoint: Endpoint = "chat", *, stream: bool = True, **fields: Any) -> Call:
    body = {"model": "first", "messages": [{"role": "user", "content": "hi"}], **fields}
    return Call(endpoint, body, json.dumps(body).encode(), FIRST, stream, False, "id", 1)


def incapable(model: config.Model) -> config.Model:
    return dataclasses.replace(model, capabilities=frozenset())


def incapable_but_second(model: config.Model) -> config.Model:
    return model if model.name == "second" else incapable(model)


class RouterTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.cooling = Cooling(config.Cooldown(), self.clock)

    def serve(self, backend: MadeUp, asked: Call | None = None, **kwargs: Any) -> Served:
        router = Router(CONFIG, {"a": backend, "b": backend}, self.cooling, **kwargs)
        return finish(router.serve(asked or call(), NoClient()))

    def failing(self, *reasons: str, **kwargs: Any) -> ChainExhausted:
        self.setUp()
        names = ("first", "second", "third")
        outcomes: dict[str, Outcome] = {
            n: BackendError(r, f"{r} it is.", **kwargs) for n, r in zip(names, reasons, strict=True)
        }
        with self.assertRaises(ChainExhausted) as caught:
            self.serve(MadeUp(**outcomes))
        return caught.exception

    def test_every_reason(self):
        """Each reason leads to what its row says: the next one or the end, and the client's status."""
        nexts = {"yes": ["first", "second"], "once": ["first", "second"], "no": ["first"]}
        nexts |= {"other_backend": ["first", "second"], "larger_window": ["first", "second"]}
        for reason, failure in FAILURES.items():
            with self.subTest(reason):
                self.setUp()
                backend = MadeUp(first=BackendError(reason, "x"), second=[b"x" + DONE], third=[])
                if failure.falls_back == "no":
                    with self.assertRaises(ChainExhausted) as caught:
                        self.serve(backend)
                    self.assertEqual((failure.status, reason), (caught.exception.status, caught.exception.code))
                else:
                    served = self.serve(backend)
                    self.assertEqual(["first", "second"], [attempt.model for attempt in served.attempts])
                self.assertEqual(nexts[failure.falls_back], backend.asked)

    def test_what_was_begun_is_closed(self):
        """An answer that failed before its first piece is closed, once; one that is served is its taker's."""
        for stream in (False, True):
            backend = MadeUp(first=[BackendError("server_error", "x")], second=[b"x", DONE])
            served = self.serve(backend, call(stream=stream))
            self.assertEqual([1, 0], [answer.closed for answer in backend.answers])
            self.assertEqual((b"x", None) if stream else (b"", b"x" + DONE), (served.first, served.whole))

    def test_phase_starts_anew(self):
        """Each target is first waited for, whatever the one before it was at."""
        backend = MadeUp(first=BackendError("server_error", "x"), second=[DONE])
        self.serve(backend)
        self.assertEqual(["waiting", "waiting"], [phase for _, _, phase in backend.opened])

    def test_shares_of_the_time(self):
        """What is left is divided among those still to come; the deadline is one for all."""
        backend = MadeUp(**{name: BackendError("server_error", "x") for name in CONFIG.models})
        with self.assertRaises(ChainExhausted):
            self.serve(backend)
        limits = [each for _, each, _ in backend.opened]
        self.assertEqual(1, len({each.deadline for each in limits}))
        left = [round(each.deadline - each.answer_by, 1) for each in limits]
        self.assertEqual([60.0, 45.0, 0.0], left)

    def test_after_the_deadline(self):
        """When an attempt has used up all of the time nobody else is asked."""

        class Slow(MadeUp):
            async def open(self, *args: Any) -> Answer:
                while time.monotonic() < args[2].deadline:
                    pass
                return await super().open(*args)

        short = dataclasses.replace(FIRST, timeouts=dataclasses.replace(FIRST.timeouts, total=0.01))
        backend = Slow(first=BackendError("first_token_timeout", "x"), second=[DONE])
        with self.assertRaises(ChainExhausted) as caught:
            self.serve(backend, dataclasses.replace(call(), model=short))
        self.assertEqual((["first"], 504), (backend.asked, caught.exception.status))

    def test_the_client(self):
        """Neither a client that leaves nor one that asks for nonsense is a target's failure, nor a fallback."""
        for exc in (ClientGone(), ClientError("nonsense")):
            backend = MadeUp(first=exc, second=[DONE])
            with self.assertRaises(type(exc)):
                self.serve(backend)
            self.assertEqual(["first"], backend.asked)
            self.assertEqual({}, self.cooling._table)

    def test_chains(self):
        """Embeddings, strict models and who wants none have no chain."""
        bad = BackendError("server_error", "x")
        for asked, kwargs in ((call("embeddings", stream=False), {}), (call(), {"fallback": False})):
            backend = MadeUp(first=bad)
            router = Router(CONFIG, {"a": backend, "b": backend}, self.cooling)
            with self.assertRaises(ChainExhausted):
                finish(router.serve(asked, NoClient(), **kwargs))
            self.assertEqual(["first"], backend.asked)

    def test_a_stream_that_breaks_counts(self):
        """Beginning to answer is no success yet: three streams that break are three failures in a row."""
        broken: list[bytes | Exception] = [b"x", BackendError("stream_broken", "x")]
        for count in range(3):
            self.assertEqual({}, self.cooling.cooling(), count)
            served = self.serve(MadeUp(first=broken))
            with self.assertRaises(BackendError):
                list(rest(served))
        self.assertEqual({("a", "big"): 30.0}, self.cooling.cooling())

    def test_a_stream_that_ends_well_clears(self):
        """After a whole stream, in one piece or in several, the count begins anew."""
        whole: tuple[list[bytes | Exception], ...] = ([b"x", b"y" + DONE], [b"x" + DONE])
        for pieces in whole:
            for _ in range(2):
                self.cooling.failed(FIRST, BackendError("server_error", "x"))
            served = self.serve(MadeUp(first=pieces))
            for piece in rest(served):
                if piece.endswith(DONE):
                    break  # as whoever relays it does
            self.assertEqual({}, self.cooling._table)

    def test_deadline_counts_for_nothing(self):
        """A stream that ran into the request's own deadline is not its target's failure."""
        served = self.serve(MadeUp(first=[b"x", BackendError("total_timeout", "x")]))
        with self.assertRaises(BackendError):
            list(rest(served))
        self.assertEqual({}, self.cooling._table)

    def test_words(self):
        """What was said is said once, with who, and every way out."""
        error = self.failing("connect_failed", "connect_failed", "server_error", way_out="start it")
        self.assertEqual(
            "first could not answer, nor could a fallback. first, second: connect_failed it is; "
            "third: server_error it is. Way out: start it.",
            error.message,
        )
        error = self.failing("server_error", "busy", "first_token_timeout")
        self.assertIn(
            "Way out: see the log of the server of [backends.a]; or try again later; or raise "
            "models.third.timeouts.first_token and models.first.timeouts.total.",
            error.message,
        )

    def test_retry_after(self):
        """The soonest of what is known, where it is a matter of time."""
        self.assertEqual(
            "7", self.failing("busy", "rate_limited", "server_error", retry_after=7.4).headers["Retry-After"]
        )
        self.assertEqual("1", self.failing("busy", "busy", "busy", retry_after=0.0).headers["Retry-After"])
        self.assertNotIn("Retry-After", self.failing("server_error", "busy", "busy", retry_after=7.0).headers)
        self.assertNotIn("Retry-After", self.failing("busy", "busy", "busy").headers)

    def test_all_are_passed_over(self):
        """When nobody could even be tried, the first one's reason is the client's."""
        with self.assertRaises(ChainExhausted) as caught:
            self.serve(MadeUp(), call(tools=[{}]), complete=incapable)
        self.assertEqual((400, "unsupported"), (caught.exception.status, caught.exception.code))
        self.assertEqual(["unsupported"] * 3, [attempt.reason for attempt in caught.exception.attempts])

    def test_a_last_resort_needs_that_nobody_was_tried(self):
        """Who is cooling stays so while another could be asked, and is asked when the others can't do it."""
        for _ in range(3):
            self.cooling.failed(SECOND, BackendError("server_error", "x"))
        backend = MadeUp(
            first=BackendError("server_error", "x"), second=[DONE], third=BackendError("server_error", "x")
        )
        with self.assertRaises(ChainExhausted):
            self.serve(backend)
        self.assertEqual(["first", "third"], backend.asked)
        only = MadeUp(second=[DONE])
        self.assertEqual("second", self.serve(only, call(tools=[{}]), complete=incapable_but_second).model.name)


class CoolingTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.cooling = Cooling(config.Cooldown(failures=2, seconds=30.0, longest=100.0), self.clock)

    def note(self, reason: str = "server_error", count: int = 1, target: config.Model = FIRST, **kwargs: Any) -> None:
        for _ in range(count):
            self.cooling.failed(target, BackendError(reason, "x", **kwargs), "me")

    def left(self, target: config.Model = FIRST) -> float | None:
        return self.cooling.cooling().get((target.backend.name, target.model))

    def test_how_long(self):
        """By the rule of each reason: after so many, for a short time, at once for long, or as told."""
        cases: list[tuple[str, float | None, float | None, float | None]] = [
            ("server_error", None, None, 30.0),
            ("connect_failed", None, None, SHORT),
            ("connection_lost", None, None, SHORT),
            ("backend_auth", None, 100.0, 100.0),
            ("busy", 7.0, 7.0, 7.0),
            ("rate_limited", 7000.0, 100.0, 100.0),
            ("busy", None, None, 30.0),
            ("bad_request", None, None, None),
            ("loading_timeout", 10.0, None, None),
            ("model_not_found", None, None, None),
        ]
        for reason, told, after_one, after_two in cases:
            with self.subTest(reason, told=told):
                self.setUp()
                self.note(reason, retry_after=told)
                self.assertEqual(after_one, self.left())
                self.note(reason, retry_after=told)
                self.assertEqual(after_two, self.left())

    def test_every_round_doubles(self):
        """A probe that fails doubles the time, up to the longest; a success ends that."""
        self.note(count=2)
        for seconds in (30.0, 60.0, 100.0, 100.0):
            self.assertEqual(seconds, self.left())
            self.clock.now += seconds
            self.assertIsNone(self.cooling.claim(FIRST, "me"))
            self.note()
        self.cooling.succeeded(FIRST)
        self.note()
        self.assertIsNone(self.left())
        self.note()
        self.assertEqual(30.0, self.left())

    def test_a_burst_is_one_round(self):
        """Twenty requests that fail together are no reason for twenty doublings."""
        self.note(count=20)
        self.assertEqual(30.0, self.left())
        self.clock.now += 10
        self.note()  # it had begun before, or was the last resort
        self.assertEqual(30.0, self.left())

    def test_the_later_end_counts(self):
        """A shorter cooldown never cuts a longer one short."""
        self.note("backend_auth")
        self.note("busy", retry_after=1.0)
        self.assertEqual(100.0, self.left())

    def test_claims(self):
        """One claims at a time after the end; all are told how long before it."""
        self.assertIsNone(self.cooling.claim(FIRST, "me"))
        self.note(count=2)
        self.clock.now += 12
        self.assertEqual(18.0, self.cooling.claim(FIRST, "me"))
        self.assertIsNone(self.cooling.claim(SECOND, "me"))
        self.clock.now += 18
        self.assertIsNone(self.cooling.claim(FIRST, "me"))
        self.assertEqual(0.0, self.cooling.claim(FIRST, "you"))

    def test_how_a_claim_ends(self):
        """Leaving frees the place for the next probe, answering opens it to all; another's leaving does nothing."""
        self.note(count=2)
        self.clock.now += 30
        self.assertIsNone(self.cooling.claim(FIRST, "me"))
        self.cooling.leave(FIRST, "you")
        self.assertEqual(0.0, self.cooling.claim(FIRST, "you"))
        self.cooling.leave(FIRST, "me")
        self.assertIsNone(self.cooling.claim(FIRST, "you"))
        self.note("model_not_found")  # says nothing of how it fares
        self.assertEqual(0.0, self.cooling.claim(FIRST, "me"))
        self.cooling.failed(FIRST, BackendError("model_not_found", "x"), "you")
        self.assertIsNone(self.cooling.claim(FIRST, "me"))
        self.cooling.answers(FIRST)
        self.assertIsNone(self.cooling.claim(FIRST, "me"))
        self.assertIsNone(self.cooling.claim(FIRST, "you"))
        # the count was kept: a break after the beginning is one more; and its place as a probe is free again
        self.cooling.failed(FIRST, BackendError("stream_broken", "x"))
        self.assertEqual(60.0, self.left())
        self.clock.now += 60
        self.assertIsNone(self.cooling.claim(FIRST, "you"))

    def test_targets(self):
        """A target is a physical model behind a backend: another name of it shares its fate, another model does not."""
        self.note(count=2)
        self.assertEqual(30.0, self.cooling.claim(dataclasses.replace(FIRST, name="alias", think=True), "me"))
        self.assertIsNone(self.cooling.claim(THIRD, "me"))

    def test_least_recently_failed(self):
        """Of those that are cooling, the one whose last failure is longest ago."""
        for target in (THIRD, FIRST, SECOND):
            self.clock.now += 1
            self.note(count=2, target=target)
        self.assertEqual(THIRD, self.cooling.least_recently_failed([FIRST, SECOND, THIRD]))
        self.note(target=THIRD)
        self.clock.now += 1
        self.note(target=FIRST)
        self.assertEqual(SECOND, self.cooling.least_recently_failed([FIRST, SECOND]))

    def test_adopt(self):
        """Another configuration brings its rule; what is known of unchanged backends stays."""
        self.note(count=2)
        self.note(count=2, target=SECOND)
        moved = config.parse(
            TOML.replace("127.0.0.1:1", "127.0.0.1:9") + "[cooldown]\nfailures = 1\n", "models.toml", {}
        )
        self.cooling.adopt(moved)
        self.assertEqual({("b", "small"): 30.0}, self.cooling.cooling())
        self.assertEqual(1, self.cooling.rule.failures)
