from __future__ import annotations

import os
import select
import socket
import threading
import time
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

from portway.cache import flights
from portway.cache.flights import Crashed, Flights, Landed, Leader, Waiter
from portway.call import finish
from portway.errors import BackendError, ClientGone
from portway.watch import ClientWatch, NoClient

PATIENCE = 20.0  # seconds; no wait may take longer
KEY = b"k" * 32


class Client:
    """A client's connection and the watch over it; `leave` closes the client's side."""

    def __init__(self, test: unittest.TestCase) -> None:
        self.ours, self._theirs = socket.socketpair()
        test.addCleanup(self.ours.close)
        test.addCleanup(self._theirs.close)
        self.watch = ClientWatch(self.ours, lambda: bool(self.ours.recv(100)))

    def leave(self) -> None:
        self._theirs.close()


class Waiting(threading.Thread):
    """A waiter on a thread of its own. `outcome`: what wait() gave or raised; a leadership is kept as such."""

    def __init__(self, waiter: Leader[str] | Waiter[str], watch: Any = None) -> None:
        super().__init__(daemon=True)
        assert isinstance(waiter, Waiter)
        self.outcome: Any = None
        self._waiter = waiter
        self._watch = watch or NoClient()
        self.start()

    def run(self) -> None:
        try:
            self.outcome = finish(self._waiter.wait(self._watch, time.monotonic() + PATIENCE))
        except ClientGone as exc:
            self.outcome = exc

    def result(self) -> Any:
        self.join(PATIENCE)
        return self.outcome


class FlightsCase(unittest.TestCase):
    def setUp(self) -> None:
        self.flights: Flights[str] = Flights()
        self.descriptors = len(os.listdir("/dev/fd"))
        self.addCleanup(self.nothing_is_left)

    def nothing_is_left(self) -> None:
        self.assertEqual(0, len(self.flights))

    def lead(self) -> Leader[str]:
        place = self.flights.join(KEY)
        assert isinstance(place, Leader)
        return place

    def fail_with(self, leader: Leader[str], error: BaseException) -> None:
        with self.assertRaises(type(error)), leader:
            raise error

    def follow(self, count: int, watch: Any = None) -> list[Waiting]:
        return [Waiting(self.flights.join(KEY), watch) for _ in range(count)]

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what another thread is about to do and offers no event for."""
        end = time.monotonic() + PATIENCE
        while not holds():
            self.assertLess(time.monotonic(), end)
            threading.Event().wait(0.002)


class Sharing(FlightsCase):
    def test_the_first_one_runs_and_all_share(self):
        """Everybody who joined before the end gets what the leader published; later ones begin anew."""
        with self.lead() as leader:
            waiting = self.follow(49)
            self.assertEqual(1, len(self.flights))
            leader.publish("blue")
        self.assertEqual([Landed("blue")] * 49, [one.result() for one in waiting])
        with self.lead():
            self.assertEqual(1, len(self.flights))

    def test_50_at_once_run_once(self):
        """Whoever becomes the leader: one run, fifty answers."""
        runs: list[int] = []
        answers: list[str] = []
        barrier = threading.Barrier(50)
        joined = threading.Semaphore(0)

        def request() -> None:
            barrier.wait(PATIENCE)
            place = self.flights.join(KEY)
            joined.release()
            if isinstance(place, Waiter):
                outcome = finish(place.wait(NoClient(), time.monotonic() + PATIENCE))
                assert isinstance(outcome, Landed)
                answers.append(outcome.value)
                return
            with place:
                for _ in range(50):
                    joined.acquire(timeout=PATIENCE)
                runs.append(1)
                answers.append("blue")
                place.publish("blue")

        threads = [threading.Thread(target=request, daemon=True) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(([1], ["blue"] * 50), (runs, answers))

    def test_other_keys_are_other_flights(self):
        """What is not identical is not shared."""
        with self.lead() as leader, self.lead_other():
            self.assertEqual(2, len(self.flights))
            leader.publish("x")

    def lead_other(self) -> Leader[str]:
        place = self.flights.join(b"o" * 32)
        assert isinstance(place, Leader)
        return place

    def test_no_descriptor_is_left_open(self):
        """Whatever the end: published, failed, left."""
        for end in ("publish", "fail", "leave"):
            with self.subTest(end):
                leader = self.lead()
                waiting = self.follow(3)
                if end == "publish":
                    leader.publish("x")
                elif end == "fail":
                    self.fail_with(leader, ValueError("no"))
                if end == "fail":
                    self.until(lambda: any(one.outcome for one in waiting))  # noqa: B023
                    self.fail_with(next(one.outcome for one in waiting if one.outcome), ValueError("no"))
                if end == "leave":
                    waiter = self.flights.join(KEY)
                    assert isinstance(waiter, Waiter)
                    waiter.leave()
                    waiter.leave()  # once more does nothing
                    leader.publish("x")
                for one in waiting:
                    self.assertIsNotNone(one.result())
                self.assertEqual(self.descriptors, len(os.listdir("/dev/fd")))

    def test_too_many_run_alone(self):
        """The bound on waiters sends the next one off by itself; its flight is nobody's."""
        self.flights = Flights(max_waiters=2)
        leader = self.lead()
        waiting = self.follow(2)
        with self.flights.join(KEY) as alone:  # type: ignore[union-attr]
            self.assertFalse(alone.has_waiters())
            alone.publish("mine")
        leader.publish("ours")
        self.assertEqual([Landed("ours")] * 2, [one.result() for one in waiting])

    def test_without_descriptors_each_runs_alone(self):
        """A process that has no descriptor left still answers."""
        with self.lead() as leader, mock.patch.object(socket, "socketpair", side_effect=OSError(24, "Too many")):
            place = self.flights.join(KEY)
            self.assertIsInstance(place, Leader)
            leader.publish("x")

    def test_time_runs_out(self):
        """A waiter waits no longer than it may, and its flight goes on."""
        with self.lead() as leader:
            waiter = self.flights.join(KEY)
            assert isinstance(waiter, Waiter)
            self.assertIsNone(finish(waiter.wait(NoClient(), time.monotonic())))
            self.assertFalse(leader.has_waiters())
            with self.assertRaises(RuntimeError):
                finish(waiter.wait(NoClient(), time.monotonic()))
            leader.publish("x")


class Failing(FlightsCase):
    def test_one_waiter_succeeds_a_failed_leader(self):
        """Exactly one runs again, the others wait on and get its answer."""
        with self.assertRaises(BackendError), self.lead():
            waiting = self.follow(9)
            raise BackendError("busy", "no")
        self.until(lambda: any(one.outcome for one in waiting))
        successors = [one.outcome for one in waiting if one.outcome]
        self.assertEqual(1, len(successors))
        (successor,) = successors
        assert isinstance(successor, Leader)
        self.assertTrue(successor.has_waiters())
        with successor:
            successor.publish("second")
        results = [one.result() for one in waiting if one.outcome is not successor]
        self.assertEqual([Landed("second")] * 8, results)

    def test_a_second_failure_is_everybodys(self):
        """With the backend down not each of them tries in turn."""
        leader = self.lead()
        waiting = self.follow(5)
        second = BackendError("connect_failed", "still no")
        with self.assertRaises(BackendError), leader:
            raise BackendError("connect_failed", "no")
        self.until(lambda: any(one.outcome for one in waiting))
        successor = next(one.outcome for one in waiting if one.outcome)
        with self.assertRaises(BackendError), successor:
            raise second
        results = [one.result() for one in waiting if one.outcome is not successor]
        self.assertEqual([Crashed(second)] * 4, results)

    def test_a_mistake_in_the_leader_leaves_nobody_stuck(self):
        """Any exception makes way like a failure."""
        with self.assertRaises(ZeroDivisionError), self.lead():
            (waiting,) = self.follow(1)
            print(1 // 0)
        place = waiting.result()
        assert isinstance(place, Leader)
        with place:
            place.publish("x")

    def test_a_leader_that_only_leaves_is_no_failure(self):
        """Its client went or could not be written to: the next ones may still try, one after the other."""
        for reason in (ClientGone(), BrokenPipeError()):
            with self.subTest(reason=reason):
                place: Any = self.lead()
                waiting = self.follow(3)
                for left in (2, 1, 0):
                    try:
                        with place:
                            raise reason
                    except (ClientGone, BrokenPipeError):
                        pass
                    leading = place
                    self.until(lambda: any(one.outcome for one in waiting))  # noqa: B023
                    place = next(one.outcome for one in waiting if one.outcome)
                    self.assertIsNot(leading, place)
                    waiting = [one for one in waiting if one.outcome is not place]
                    self.assertEqual(left, len(waiting))
                with place:
                    place.publish("x")

    def test_what_can_not_be_shared_each_runs_alone(self):
        """A leader that ends well without having published sends everybody off at once, not one after the other."""
        with self.lead():
            waiting = self.follow(3)
        places = [one.result() for one in waiting]
        self.assertEqual([Leader] * 3, [type(place) for place in places])
        self.assertEqual([False] * 3, [place.has_waiters() for place in places])
        self.assertEqual(0, len(self.flights))

    def test_a_flight_without_anybody_is_gone(self):
        """If the last waiter leaves before it has taken over, nothing stays; a newcomer takes over at once."""
        leader = self.lead()
        waiter, other = self.flights.join(KEY), self.flights.join(KEY)
        assert isinstance(waiter, Waiter) and isinstance(other, Waiter)
        with self.assertRaises(ValueError), leader:
            raise ValueError
        newcomer = self.flights.join(KEY)
        assert isinstance(newcomer, Leader)
        self.assertTrue(newcomer.has_waiters())
        with self.assertRaises(ClientGone), newcomer:
            raise ClientGone
        line = other._line
        assert line is not None
        waiter.leave()
        self.assertEqual((1, False), (len(self.flights), line.waiters_end.fileno() < 0))
        other.leave()
        self.assertEqual((0, True), (len(self.flights), line.waiters_end.fileno() < 0))


class Leaving(FlightsCase):
    def setUp(self) -> None:
        super().setUp()
        self.backend, self.far = socket.socketpair()
        self.addCleanup(self.backend.close)
        self.addCleanup(self.far.close)

    def soon(self) -> float:
        return time.monotonic() + PATIENCE

    def test_a_waiters_client_leaves(self):
        """It hears of it at once; the others and the leader go on."""
        client = Client(self)
        with self.lead() as leader:
            (leaving,) = self.follow(1, client.watch)
            (staying,) = self.follow(1)
            client.leave()
            self.assertIsInstance(leaving.result(), ClientGone)
            self.assertTrue(leader.has_waiters())
            leader.publish("x")
        self.assertEqual(Landed("x"), staying.result())

    def test_the_leaders_client_leaves_and_somebody_waits(self):
        """The generation goes on: the leader goes on waiting for the backend, for every kind of wait."""
        client = Client(self)
        with self.assertRaises(ClientGone), self.lead() as leader:
            (waiting,) = self.follow(1)
            watch = leader.watch(client.watch)
            watch.phase = "prompt"
            client.leave()
            self.assertFalse(finish(watch.readable(self.backend, time.monotonic() + 0.01)))
            self.far.send(b"token")
            self.assertTrue(finish(watch.readable(self.backend, self.soon())))
            self.assertTrue(finish(watch.writable(self.backend, self.soon())))
            finish(watch.pause(time.monotonic() + 0.01))
            watch.phase = "answer"
            leader.publish("x")
        self.assertEqual(Landed("x"), waiting.result())
        self.assertEqual("prompt", client.watch.phase)  # in which it left, for the log

    def test_a_backends_failure_after_that_is_the_others(self):
        """For a leader without a client only its leaving counts; a mistake of ours is not lost in it."""
        for error, seen in ((BackendError("busy", "no"), ClientGone), (ZeroDivisionError(), ZeroDivisionError)):
            client = Client(self)
            client.leave()
            with self.assertRaises(seen), self.lead() as leader:
                (waiting,) = self.follow(1)
                self.assertFalse(finish(leader.watch(client.watch).readable(self.backend, time.monotonic())))
                raise error
            successor = waiting.result()
            self.assertIsInstance(successor, Leader)
            self.fail_with(successor, error)

    def test_each_kind_of_wait_notices_the_client(self):
        """Without waiters each raises ClientGone, with one each goes on."""
        waits: list[Callable[[Any], Any]] = [
            lambda watch: finish(watch.readable(self.backend, time.monotonic())),
            lambda watch: finish(watch.writable(self.far, time.monotonic())),
            lambda watch: finish(watch.pause(time.monotonic())),
        ]
        for wait in waits:
            client = Client(self)
            client.leave()
            with self.assertRaises(ClientGone), self.lead() as leader:
                with self.assertRaises(ClientGone):
                    wait(leader.watch(client.watch))
                (waiting,) = self.follow(1)
                wait(leader.watch(client.watch))
                leader.publish("x")
            self.assertEqual(Landed("x"), waiting.result())

    def test_a_heartbeat_that_can_not_be_sent_is_a_client_that_left(self):
        """The watch raises OSError then; the generation goes on for who waits."""
        gone = mock.Mock(
            readable=mock.AsyncMock(side_effect=BrokenPipeError), on_thread=mock.AsyncMock(), phase="prompt"
        )
        with self.assertRaises(BrokenPipeError), self.lead() as leader:
            (waiting,) = self.follow(1)
            watch = leader.watch(gone)
            self.assertFalse(finish(watch.readable(self.backend, time.monotonic())))
            leader.publish("x")
        self.assertEqual(Landed("x"), waiting.result())

    def test_then_the_last_waiter_leaves_too(self):
        """The leader without a client hears it at once and gives the generation up."""
        client, other = Client(self), Client(self)
        client.leave()
        with self.assertRaises(ClientGone), self.lead() as leader:
            (waiting,) = self.follow(1, other.watch)
            watch = leader.watch(client.watch)
            self.assertFalse(finish(watch.readable(self.backend, time.monotonic())))
            other.leave()
            started = time.monotonic()
            with mock.patch.object(flights, "LOOK_EVERY", PATIENCE):  # by the line, not by looking now and then
                finish(watch.readable(self.backend, self.soon()))
        self.assertLess(time.monotonic() - started, PATIENCE / 2)
        self.assertIsInstance(waiting.result(), ClientGone)

    def test_a_waiter_that_comes_after_that_counts(self):
        """The last one left and another came before the leader looked: it goes on, and does not spin."""
        client = Client(self)
        client.leave()
        with self.assertRaises(ClientGone), self.lead() as leader:
            first = self.flights.join(KEY)
            assert isinstance(first, Waiter)
            watch = leader.watch(client.watch)
            self.assertFalse(finish(watch.readable(self.backend, time.monotonic())))
            first.leave()
            (second,) = self.follow(1)
            with mock.patch.object(select, "poll", side_effect=select.poll) as poll:
                self.assertFalse(finish(watch.readable(self.backend, time.monotonic() + 0.05)))
            self.assertLess(poll.call_count, 10)
            leader.publish("x")
        self.assertEqual(Landed("x"), second.result())

    def test_the_leaders_phase_is_the_clients(self):
        """The log tells what was waited for, whoever waits."""
        client = Client(self)
        with self.lead() as leader:
            watch = leader.watch(client.watch)
            watch.phase = "prompt"
            self.assertEqual(("prompt", "prompt"), (client.watch.phase, watch.phase))


class Storm(FlightsCase):
    def test_any_order_of_events_leaves_nothing_behind(self):
        """Joining, failing, publishing and leaving from many threads: everybody comes to an end."""
        ended = threading.Semaphore(0)

        def request(number: int) -> None:
            for turn in range(40):
                place = self.flights.join(bytes([turn % 3]) * 32)
                if isinstance(place, Waiter):
                    if (number + turn) % 5 == 0:
                        place.leave()
                        continue
                    outcome = finish(place.wait(NoClient(), time.monotonic() + PATIENCE))
                    if not isinstance(outcome, Leader):
                        assert outcome is not None, "stuck"
                        continue
                    place = outcome
                try:
                    with place:
                        if (number + turn) % 4 == 0:
                            raise ValueError
                        place.publish("x")
                except ValueError:
                    continue
            ended.release()

        threads = [threading.Thread(target=request, args=(number,), daemon=True) for number in range(16)]
        for thread in threads:
            thread.start()
        for _ in threads:
            self.assertTrue(ended.acquire(timeout=PATIENCE))
        self.assertEqual(self.descriptors, len(os.listdir("/dev/fd")))


if __name__ == "__main__":
    unittest.main()
