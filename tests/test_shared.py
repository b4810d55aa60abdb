"""Identical requests at the same time, through the daemon: one generation, an answer for each."""

from __future__ import annotations

import gc
import os
import threading
import time
import unittest
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from portway.answers import Found
from portway.cache import file as cache_file
from portway.call import Call, Served
from portway.routing import Router
from tests.cached import BROKEN, CachedCase, chat, choice, configured, facts_of, streamed, text_of, verdict
from tests.daemon import Daemon
from tests.doubles import LAST_CHUNK, Action, RawClient, chunk, json_reply, sse_body, stream_head
from tests.llama_server import wait_for
from tests.targets import CHAT, Target, chain, delta, finish


class FlightCase(CachedCase):
    """Requests for the same at the same time. The stand-in hangs until it is released."""

    SERVER = "[server]\nheartbeat = 0.05\n"

    @contextmanager
    def together(self, bodies: Iterable[Mapping[str, Any]], **headers: str) -> Iterator[list[RawClient]]:
        """Clients that have all sent their requests: the first one's hangs at the backend, the others wait for it."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with ExitStack() as stack:
            clients: list[RawClient] = []
            for body in bodies:
                client = stack.enter_context(self.daemon.client())
                client.request("POST", CHAT, body, named)
                clients.append(client)
                if len(clients) == 1:
                    self.await_phase("hang")
            wait_for(lambda: self.daemon.sharing == len(clients) - 1, "the others' waiting")
            yield clients


class AtOnce(FlightCase):
    def test_fifty_at_once_ask_once(self) -> None:
        """Plain, streamed and mixed; each gets the same text, under an id of its own."""
        for number, kind in enumerate(("plain", "streamed", "mixed")):
            with self.subTest(kind):
                self.backend.fail("/api/chat", "hang")
                before = self.asked
                forms = [kind == "streamed" or (kind == "mixed" and bool(place % 2)) for place in range(50)]
                bodies = [chat("three", stream=form, seed=number) for form in forms]
                with self.together(bodies) as clients:
                    self.backend.release()
                    answers = [client.response() for client in clients]
                self.assertEqual(before + 1, self.asked)
                self.assertEqual(1, len({text_of(answer) for answer in answers}))
                ids = {
                    streamed(answer.body)[0]["id"] if form else answer.json["id"]
                    for form, answer in zip(forms, answers, strict=True)
                }
                self.assertEqual(50, len(ids))
                self.assertEqual((200, "HIT"), verdict(self.post(bodies[0])))

    def test_who_waited_is_told_so(self) -> None:
        """An answer that no model had to work for is a HIT, of age 0."""
        self.backend.fail("/api/chat", "hang")
        with self.together([chat("three")] * 2) as clients:
            self.backend.release()
            answers = [client.response() for client in clients]
        told = [(answer.header("x-cache"), answer.header("age")) for answer in answers]
        self.assertEqual([("MISS", None), ("HIT", "0")], told)

    def test_who_waited_counts_as_helped(self) -> None:
        """`portway cache` tells the hit rate that X-Cache and the log tell."""
        self.assertTrue(self.cache.flush(10))  # else the file is not there yet, and nothing is counted
        self.backend.fail("/api/chat", "hang")
        with self.together([chat("three")] * 5) as clients:
            self.backend.release()
            answers = [client.response() for client in clients]
        answers += [self.post(chat("three")) for _ in range(2)]
        self.assertEqual(504, self.post(chat("three", seed=1), Cache_Control="only-if-cached").status)
        self.post(chat("three"), Cache_Control="no-cache")  # not looked up
        self.written()
        stats = self.cache.stats()
        assert stats is not None
        hits = sum(answer.header("x-cache") == "HIT" for answer in answers)
        self.assertEqual((6, 6, 2), (hits, stats.counts.hits, stats.counts.misses))

    def test_warnings_are_shared(self) -> None:
        """What could not be done for one could not be done for any of them."""
        self.backend.fail("/api/chat", "hang")
        with self.together([chat("three", logit_bias={"1": 2})] * 2) as clients:
            self.backend.release()
            told = [client.response().header("x-portway-warning") for client in clients]
        self.assertEqual(["ignored(logit_bias)"] * 2, told)

    def test_heartbeats_reach_who_waits(self) -> None:
        """A streaming client hears that somebody is there, and then from the stream itself who answers."""
        self.backend.fail("/api/chat", "hang")
        with self.together([chat("three", stream=True)] * 3) as clients:
            streams = [client.events(client.head()) for client in clients]
            self.assertEqual(["portway"] * 3, [next(stream).comment for stream in streams])
            self.backend.release()
            firsts = [next(event.json for event in stream if event.data) for stream in streams]
        facts = [{"served_by": "three", "cache": verdict} for verdict in ("MISS", "HIT", "HIT")]
        self.assertEqual(facts, [first["portway"] for first in firsts])

    def test_a_demoted_answer_is_shared_but_not_kept(self) -> None:
        """Who waits gets what the first one got, with the truth about it; later the model itself is asked again."""
        self.backend.fail("/api/chat", BROKEN)
        self.backend.fail("/api/chat", "hang")
        with self.together([chat(), chat(), chat(stream=True)]) as clients:
            self.backend.release()
            told = [facts_of(client.response()) for client in clients]
        self.assertEqual([("three", "MISS"), ("three", "HIT"), ("three", "HIT")], [each[:2] for each in told])
        self.assertEqual(1, len({attempts for _, _, attempts in told}))
        self.assertRegex(told[0][2], r"^nine=server_error\(.*\); three=ok$")
        self.assertEqual(("nine", "MISS", ""), facts_of(self.post(chat())))

    def test_without_fallback_nobody_gets_a_demoted_answer(self) -> None:
        """X-Portway-Fallback: off does not wait for a request that may fall back."""
        self.backend.fail("/api/chat", BROKEN)
        self.backend.fail("/api/chat", "hang")
        with self.together([chat()]) as (lenient,):
            strict = self.post(chat(), X_Portway_Fallback="off")
            self.assertEqual(("nine", "MISS", ""), facts_of(strict))
            self.backend.release()
            self.assertEqual("three", lenient.response().header("x-served-by"))

    def test_too_many_for_one_flight(self) -> None:
        """Who comes beyond the bound is answered by itself."""
        self.backend.fail("/api/chat", "hang", 2)
        bodies = [chat("three")] * 130
        with ExitStack() as stack:
            clients = [stack.enter_context(self.daemon.client()) for _ in bodies]
            for client, body in zip(clients, bodies, strict=True):
                client.request("POST", CHAT, body)
            wait_for(lambda: self.daemon.sharing == 128, "a full flight")
            self.assertTrue(self.backend.wait_for(lambda _: self.in_phase("hang") == 2))
            self.backend.release()
            self.assertEqual({200}, {client.response().status for client in clients})
        self.assertEqual(2, self.asked)

    def test_nothing_leaks(self) -> None:
        """After ten storms no request is under way, no flight is left, and no more descriptors are open than before."""
        toml = configured(self.backend.url)
        self.daemon.use(toml.replace('kind = "ollama"', 'kind = "ollama"\nmax_idle = 0'))
        self.post(chat("three"))
        before = len(os.listdir("/dev/fd"))
        for number in range(10):
            self.backend.fail("/api/chat", "hang")
            with self.together([chat("three", stream=bool(place % 2), seed=number) for place in range(9)]) as clients:
                for client in clients[::3]:
                    client.close()
                wait_for(lambda: self.daemon.sharing == 6, "their leaving")
                self.backend.release()
                kept = [client for place, client in enumerate(clients) if place % 3]
                self.assertEqual({200}, {client.response().status for client in kept})
        # beside the cache's readers: less than one for each storm is no leak, but other tests' daemons coming to rest
        bearable = before + cache_file.IDLE_READERS + 9
        wait_for(lambda: len(os.listdir("/dev/fd")) <= bearable, "their being closed")
        wait_for(lambda: self.daemon.flights == 0, "the last flight's end")
        wait_for(lambda: self.client.call("GET", "/health").json["in_flight"] == 1, "their end")


class Leaving(FlightCase):
    """What becomes of a flight when its members go, or fail."""

    def hang(self, kind: str = "hang") -> None:
        self.backend.fail("/api/chat", kind)

    def test_the_first_ones_leaving_does_not_cancel_the_others(self) -> None:
        """Before the answer or in the middle of it, plain or streamed: it goes on, once, and is kept."""
        for number, (kind, stream) in enumerate(
            [("hang", False), ("hang", True), ("hang_mid_stream", False), ("hang_mid_stream", True)]
        ):
            with self.subTest(kind, stream=stream):
                self.hang(kind)
                before = self.asked
                body = chat("three", stream=stream, seed=number)
                with self.together([body, body, {**body, "stream": not stream}]) as clients:
                    if stream and kind == "hang_mid_stream":
                        events = clients[0].events(clients[0].head())
                        next(event for event in events if event.data)
                    clients[0].close()
                    self.backend.release()
                    answers = [client.response() for client in clients[1:]]
                self.assertEqual([(200, "HIT")] * 2, [(each.status, facts_of(each)[1]) for each in answers])
                self.assertEqual(1, len({text_of(answer) for answer in answers}))
                self.assertEqual((200, "HIT"), verdict(self.post(body)))
                self.assertEqual(before + 1, self.asked)

    def test_when_all_have_left_the_generation_stops(self) -> None:
        """The last one's leaving reaches the backend, whether the first one left before or after it."""
        for number, order in enumerate(((0, 1, 2), (2, 1, 0))):
            with self.subTest(order):
                self.hang("hang_mid_stream")
                bodies = [chat("three", stream=bool(place % 2), seed=number) for place in range(3)]
                with self.together(bodies) as clients:
                    for place in order:
                        self.assertEqual(number, self.left)
                        clients[place].close()
                        waiting = sum(client.sock.fileno() >= 0 for client in clients[1:])
                        wait_for(lambda: self.daemon.sharing == waiting, "its leaving")  # noqa: B023
                    self.assertTrue(self.backend.wait_for(lambda _: self.left == number + 1))  # noqa: B023
                wait_for(lambda: self.daemon.flights == 0, "the flight's end")
                self.assertEqual("MISS", self.post(bodies[0]).header("x-cache"))

    def test_a_client_that_does_not_read_keeps_nobody_waiting(self) -> None:
        """The first one's connection is full: the others get the whole answer, and so does that one once it reads."""
        texts = ["x" * 1_000_000] * 7
        events = sse_body([delta(role="assistant"), *(delta(content=text) for text in texts), finish()])
        whole = json_reply({"choices": [choice(text="".join(texts))]})
        replies: list[tuple[bool, list[Action]]] = [
            (True, [stream_head(), *map(chunk, events), LAST_CHUNK]),
            (False, [whole]),
        ]
        for stream, reply in replies:
            with self.subTest(stream=stream):
                self._one_does_not_read(stream, reply, "".join(texts))

    def _one_does_not_read(self, stream: bool, reply: list[Action], text: str) -> None:
        gate = threading.Event()
        with ExitStack() as stack:
            target = stack.enter_context(Target([gate, *reply]))
            toml = chain(target.url, models={"first": 'cache = "1h"\n'})
            daemon = stack.enter_context(Daemon(toml, cache=self.cache))
            clients = [stack.enter_context(daemon.client()) for _ in range(2)]
            clients[0].request("POST", CHAT, chat("first", stream=stream, seed=stream))
            wait_for(lambda: len(target.asked) == 1, "the first one")
            clients[1].request("POST", CHAT, chat("first", seed=stream))
            wait_for(lambda: daemon.sharing == 1, "the second one's waiting")
            gate.set()
            answers = [clients[1].response()]
            wait_for(lambda: daemon.writing == 1, "a full connection")
            answers.append(clients[0].response())
            self.assertEqual([(200, "HIT"), (200, "MISS")], list(map(verdict, answers)))
            self.assertEqual([text, text], list(map(text_of, answers)))

    def test_the_first_one_leaves_while_its_connection_is_full(self) -> None:
        """However it goes, the stream goes on for those who wait for the same."""
        for number, leave in enumerate((RawClient.half_close, RawClient.reset)):
            gate = threading.Event()
            texts = ["x" * 1_000_000] * 7
            head = [stream_head(), *map(chunk, sse_body([delta(content=text) for text in texts], done=False))]
            reply: list[Action] = [*head, gate, *map(chunk, sse_body([finish()])), LAST_CHUNK]
            with self.subTest(leave.__name__), ExitStack() as stack:
                target = stack.enter_context(Target(reply))
                toml = chain(target.url, models={"first": 'cache = "1h"\n'})
                daemon = stack.enter_context(Daemon(toml, cache=self.cache))
                clients = [stack.enter_context(daemon.client()) for _ in range(2)]
                clients[0].request("POST", CHAT, chat("first", stream=True, seed=number))
                clients[0].head()
                clients[1].request("POST", CHAT, chat("first", seed=number))
                wait_for(lambda: daemon.sharing == 1, "the second one's waiting")  # noqa: B023
                wait_for(lambda: daemon.owed > 0, "a full connection")  # noqa: B023
                leave(clients[0])
                gate.set()
                answer = clients[1].response()
                self.assertEqual((200, "HIT"), verdict(answer))
                self.assertEqual("".join(texts), text_of(answer))
                self.assertEqual(1, len(target.asked))

    @contextmanager
    def _full(self, reply: list[Action]) -> Iterator[tuple[Daemon, RawClient]]:
        """A daemon, and a client that has read nothing but the head of a stream."""
        with Target(reply) as target:
            toml = chain(target.url, models={"first": 'cache = "1h"\n'}, rest="[server]\nheartbeat = 600\n")
            with Daemon(toml, cache=self.cache) as daemon, daemon.client() as client:
                client.request("POST", CHAT, chat("first", stream=True))
                wait_for(lambda: daemon.writing == 1, "a full connection")
                yield daemon, client

    def test_what_is_owed_is_paid_as_soon_as_it_is_taken(self) -> None:
        """The first one reads again: it has not to wait until the model goes on."""
        gate = threading.Event()
        events = sse_body([delta(content="x" * 7_000_000)], done=False)  # one piece: no other one pays for it
        reply: list[Action] = [stream_head(), *map(chunk, events), gate, *map(chunk, sse_body([finish()])), LAST_CHUNK]
        with self._full(reply) as (daemon, client), daemon.client() as other:
            other.request("POST", CHAT, chat("first"))
            wait_for(lambda: daemon.owed > 0, "what comes next is not held up")
            pieces = client.pieces(client.head())
            seen = 0
            while seen < 7_000_000:
                seen += len(next(pieces))
            wait_for(lambda: not daemon.owed, "the rest's being noted as paid")
            self.assertEqual(1, daemon.sharing)  # the model has not gone on
            gate.set()
            self.assertIn(b"[DONE]", b"".join(pieces))
            self.assertEqual((200, "HIT"), verdict(other.response()))

    def test_without_others_nothing_is_owed(self) -> None:
        """A stream is held back at its source as long as its only client does not read."""
        gate = threading.Event()
        events = sse_body([delta(content="x" * 1_000_000)] * 7, done=False)
        reply: list[Action] = [stream_head(), *map(chunk, events), gate, *map(chunk, sse_body([finish()])), LAST_CHUNK]
        with self._full(reply) as (daemon, client):
            self.assertEqual((0, 0), (daemon.owed, daemon.ended))
            gate.set()
            self.assertEqual("x" * 7_000_000, text_of(client.response()))

    def test_nothing_follows_what_is_cut_off(self) -> None:
        """The daemon ends while a client does not read: that one gets no error in the middle of an event."""
        events = sse_body([delta(content="x" * 1_000_000)] * 7)
        with self._full([stream_head(), *map(chunk, events), LAST_CHUNK]) as (daemon, client):
            daemon.stop()
            seen = b""
            while data := client.sock.recv(65_536):
                seen += data
            self.assertGreater(len(seen), 65_536)
            self.assertNotIn(b"error", seen)

    def test_an_answer_ends_with_its_request(self) -> None:
        """No cycle keeps what was sent to a client that has gone, until some later collection."""
        events = sse_body([delta(content="x" * 1_000_000)] * 7)
        gc.collect()
        gc.disable()
        try:
            with self._full([stream_head(), *map(chunk, events), LAST_CHUNK]) as (daemon, client):
                client.reset()
                wait_for(lambda: not daemon.writing, "its end")
                wait_for(lambda: not any(isinstance(each, Found) for each in gc.get_objects()), "nothing's being kept")
        finally:
            gc.enable()


class Failing(CachedCase):
    """A flight whose leader's backend fails. The backends are scripted, so that they fail when a test says so."""

    @contextmanager
    def together(self, target: Target, forms: Iterable[bool]) -> Iterator[list[RawClient]]:
        toml = chain(target.url, models={"first": 'cache = "1h"\n'}, rest="[cooldown]\nfailures = 1000\n")
        with ExitStack() as stack:
            daemon = stack.enter_context(Daemon(toml, cache=self.cache))
            clients: list[RawClient] = []
            for form in forms:
                client = stack.enter_context(daemon.client())
                client.request("POST", CHAT, chat("first", stream=form))
                clients.append(client)
                wait_for(lambda: len(target.asked) + daemon.sharing == len(clients), "its place")
            yield clients

    def test_one_takes_over(self) -> None:
        """The first one fails, one of the others asks again, and all of these get its answer."""
        gate, again = threading.Event(), threading.Event()
        error = json_reply({"error": {"message": "no"}}, 500)
        with Target([gate, error], [again, json_reply({"choices": [choice()]})]) as target:
            with self.together(target, [False] * 10) as clients:
                gate.set()
                wait_for(lambda: len(target.asked) == 2, "the second try")
                self.assertEqual(502, clients[0].response().status)
                again.set()
                answers = [client.response() for client in clients[1:]]
            self.assertEqual([200] * 9, [answer.status for answer in answers])
            self.assertEqual(8, sum(answer.header("x-cache") == "HIT" for answer in answers))
            self.assertEqual(2, len(target.asked))

    def test_who_takes_over_has_the_time_of_its_own_request(self) -> None:
        """It has waited for a part of it, and its client would not wait for as long again."""
        began: list[tuple[float, float]] = []

        async def serve(router: Router, call: Call, *args: Any, **named: Any) -> Served:
            began.append((time.monotonic(), named["deadline"] - call.model.timeouts.total))
            return await original(router, call, *args, **named)

        original = Router.serve
        self.enterContext(mock.patch.object(Router, "serve", serve))
        gate = threading.Event()
        bad, good = json_reply({"error": {"message": "no"}}, 500), json_reply({"choices": [choice()]})
        with Target([gate, bad], then=good) as target, self.together(target, [False] * 2) as clients:
            waits = time.monotonic()
            wait_for(lambda: time.monotonic() > waits, "a clock that has moved on")
            gate.set()
            self.assertEqual([502, 200], [client.response().status for client in clients])
        (_, first_came), (takes_over, second_came) = began
        self.assertLess(first_came, second_came)
        self.assertLessEqual(second_came, waits)
        self.assertLess(waits, takes_over)

    def test_a_failure_counts_as_no_help(self) -> None:
        """Whoever shares a failure got nothing out of the cache."""
        self.assertTrue(self.cache.flush(10))
        gate = threading.Event()
        bad = json_reply({"error": {"message": "no"}}, 500)
        with Target([gate, bad], then=bad) as target, self.together(target, [False] * 3) as clients:
            gate.set()
            self.assertEqual({502}, {client.response().status for client in clients})
        self.assertTrue(self.cache.flush(10))
        stats = self.cache.stats()
        assert stats is not None
        self.assertEqual((0, 3), (stats.counts.hits, stats.counts.misses))

    def test_a_second_failure_is_everybodys(self) -> None:
        """A backend that is down is asked twice, and everybody is told all about it, streaming or not."""
        gate = threading.Event()
        error = json_reply({"error": {"message": "no"}}, 500)
        with Target([gate, error], then=error) as target:
            with self.together(target, [False, True] * 5) as clients:
                gate.set()
                answers = [client.response() for client in clients]
            self.assertEqual(2, len(target.asked))
            for answer in answers:
                self.assertEqual((502, "server_error"), (answer.status, answer.json["error"]["code"]))
                self.assertTrue((answer.header("x-portway-attempts") or "").startswith("first=server_error("))
                self.assertEqual("false", answer.header("x-should-retry"))

    def test_a_stream_that_breaks_for_its_client_is_begun_again_for_the_others(self) -> None:
        """What the first one got can't be taken back; who waited has got nothing yet and need not see it."""
        gate, more = threading.Event(), threading.Event()
        broken: list[Action] = [
            gate,
            stream_head(),
            *map(chunk, sse_body([delta(content="Hel")], done=False)),
            more,
            LAST_CHUNK,
        ]
        good = [stream_head(), *map(chunk, sse_body([delta(content="Hello."), finish()])), LAST_CHUNK]
        with Target(broken, good) as target, self.together(target, [True] * 3) as clients:
            gate.set()
            events = clients[0].events(clients[0].head())
            self.assertEqual("Hel", next(events).json["choices"][0]["delta"]["content"])
            more.set()
            self.assertIn("error", [event.json for event in events][-1])
            answers = [client.response() for client in clients[1:]]
            self.assertEqual([200, 200], [answer.status for answer in answers])
            self.assertEqual({"Hello."}, {text_of(answer) for answer in answers})

    def test_what_is_too_long_to_be_shared(self) -> None:
        """Then everybody asks for himself, at once."""
        gate = threading.Event()
        events = sse_body([delta(content="x" * 5_000_000), delta(content="y" * 5_000_000), finish()])
        long: list[Action] = [gate, stream_head(), *map(chunk, events), LAST_CHUNK]
        again = threading.Event()
        hello = sse_body([delta(content="Hello."), finish()])
        short: list[Action] = [again, stream_head(), *map(chunk, hello), LAST_CHUNK]
        with Target(long, then=short) as target, self.together(target, [True] * 3) as clients:
            gate.set()
            first = clients[0].response()
            wait_for(lambda: len(target.asked) == 3, "the others' own requests")
            again.set()
            answers = [first, *(client.response() for client in clients[1:])]
            self.assertEqual([10_000_000, 6, 6], [len(text_of(answer)) for answer in answers])


if __name__ == "__main__":
    unittest.main()
