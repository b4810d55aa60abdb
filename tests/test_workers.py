"""workers.py: every job runs, on no more threads than allowed, and on all of them if there is need."""

import sys
import threading
import time
import unittest
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any
from unittest import mock

from portway.errors import NoThread
from portway.workers import InFlight, Workers

LONG = 10.0  # seconds; nothing here takes so long
SHORT = 0.02  # seconds; a wait that passes


class WorkersCase(unittest.TestCase):
    def setUp(self) -> None:
        self.release = threading.Event()
        self.addCleanup(self.release.set)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what another thread is about to do and offers no event for."""
        end = time.monotonic() + LONG
        while not holds():
            self.assertLess(time.monotonic(), end)
            threading.Event().wait(0.001)

    def busy(self, workers: Workers, count: int) -> None:
        """Occupy `count` threads until `release`."""
        started = threading.Semaphore(0)

        def job() -> None:
            started.release()
            self.release.wait(LONG)

        for _ in range(count):
            workers.submit(job)
            self.assertTrue(started.acquire(timeout=LONG))

    def runs(self, workers: Workers, what: Callable[[], None] = lambda: None) -> bool:
        """Whether a job handed over now is run soon."""
        ran = threading.Event()

        def job() -> None:
            what()
            ran.set()

        workers.submit(job)
        return ran.wait(LONG)


class Jobs(WorkersCase):
    def test_a_thread_is_made_when_it_is_needed_and_used_again(self):
        """Jobs one after the other need one."""
        workers = Workers(8, "test", idle=LONG)
        self.assertEqual(0, workers.count)
        threads: set[threading.Thread] = set()
        for _ in range(20):
            self.assertTrue(self.runs(workers, lambda: threads.add(threading.current_thread())))
            self.until(lambda: workers._spare == 1)
        self.assertEqual((1, 1), (workers.count, len(threads)))
        self.assertEqual(["portway-test"], [thread.name for thread in threads])

    def test_no_more_threads_than_the_limit(self):
        """What is beyond waits, is counted, and runs in its turn."""
        workers = Workers(3, "test", idle=LONG)
        self.busy(workers, 3)
        self.assertEqual((3, 0, False), (workers.count, workers.waiting, workers.are_short))
        ran: SimpleQueue[int] = SimpleQueue()
        for number in range(5):
            workers.submit(partial(ran.put, number))
        self.assertEqual((3, 5, True), (workers.count, workers.waiting, workers.are_short))
        self.assertTrue(ran.empty())
        self.release.set()
        self.assertEqual([0, 1, 2, 3, 4], sorted(ran.get(timeout=LONG) for _ in range(5)))
        self.until(lambda: workers._spare == 3)
        self.assertEqual((3, 0, False), (workers.count, workers.waiting, workers.are_short))

    def test_a_thread_without_work_holds_nothing(self):
        """Neither its last job nor what that was made of: it may wait for a minute."""

        class Thing:
            def work(self) -> None:
                pass

        workers, thing = Workers(1, "test"), Thing()
        gone = weakref.ref(thing)
        workers.submit(thing.work)
        del thing
        self.until(lambda: gone() is None)
        self.assertEqual(1, workers.count)

    def test_threads_without_work_end(self):
        """All of them, and the next job gets a new one."""
        workers = Workers(4, "test", idle=SHORT)
        self.busy(workers, 4)
        self.release.set()
        self.until(lambda: workers.count == 0)
        self.assertEqual(0, workers._spare)
        self.assertTrue(self.runs(workers))

    def test_no_job_waits_while_a_thread_may_be_made(self):
        """However submits race with threads that become idle, take each other's job, or end: as long as
        fewer jobs run than the limit allows, a new job runs although none of them ends."""
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-6)  # so that threads meet in the middle of what they do
        for idle in (0.0005, LONG) * 8:
            with self.subTest(idle):
                self._race(Workers(8, "test", idle=idle))

    def _race(self, workers: Workers) -> None:
        ran = threading.Semaphore(0)

        def feed() -> None:
            for _ in range(200):
                workers.submit(ran.release)

        feeders = [threading.Thread(target=feed) for _ in range(2)]
        for feeder in feeders:
            feeder.start()
        for _ in range(400):
            self.assertTrue(ran.acquire(timeout=LONG))
        self.release.clear()
        self.busy(workers, 7)  # waits in vain if a thread counts as idle that is not
        self.assertTrue(self.runs(workers))
        self.release.set()
        self.until(lambda: workers._spare == workers.count)

    def test_a_job_that_comes_while_its_thread_gives_up(self):
        """Between the end of its patience and its end: another one runs it."""
        workers = Workers(1, "test", idle=LONG)
        jobs = workers._jobs
        ran = threading.Event()

        class Late:
            """A queue whose second get() times out just as a job comes."""

            asked = 0
            put = jobs.put

            def get(self, timeout: float | None = None) -> Callable[[], None]:
                self.asked += 1
                if self.asked == 2:
                    workers.submit(ran.set)
                    raise Empty
                return jobs.get(timeout=timeout)

        workers._jobs = Late()  # type: ignore[assignment]
        self.assertTrue(self.runs(workers))
        self.assertTrue(ran.wait(LONG))
        self.until(lambda: workers._spare == workers.count == 1)


def fail() -> None:
    raise ValueError


class Trouble(WorkersCase):
    def setUp(self) -> None:
        super().setUp()
        self.raised: list[Any] = []
        patch = mock.patch("threading.excepthook", self.raised.append)
        patch.start()
        self.addCleanup(patch.stop)

    def has_raised(self, times: int) -> bool:
        return len(self.raised) == times

    def test_a_job_that_raises(self):
        """It is told, ends its thread, and costs the pool nothing."""
        workers = Workers(2, "test", idle=LONG)
        for turn in range(1, 11):
            workers.submit(fail)
            self.until(lambda: workers.count == 0)
            self.until(partial(self.has_raised, turn))
        self.assertIs(ValueError, self.raised[0].exc_type)
        self.busy(workers, 2)
        self.assertEqual((2, 0), (workers.count, workers.waiting))

    def test_a_job_that_raises_while_others_wait(self):
        """They get another thread."""
        workers = Workers(1, "test", idle=LONG)

        def fail_later() -> None:
            self.release.wait(LONG)
            fail()

        ran = threading.Semaphore(0)
        workers.submit(fail_later)
        for _ in range(3):
            workers.submit(fail)
            workers.submit(ran.release)
        self.release.set()
        for _ in range(3):
            self.assertTrue(ran.acquire(timeout=LONG))
        self.until(partial(self.has_raised, 4))
        self.assertEqual((1, 0), (workers.count, workers.waiting))

    def test_a_system_without_a_thread_left(self):
        """Where there is none at all, the job is refused, and forgotten; else it waits for one that there is."""
        workers = Workers(3, "test", idle=LONG)
        no_thread = mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread"))
        ran = threading.Semaphore(0)
        with no_thread, self.assertRaises(NoThread):
            workers.submit(lambda: self.fail("it was refused"))
        self.assertEqual((0, 0), (workers.count, workers.waiting))
        workers.submit(ran.release)
        self.assertTrue(ran.acquire(timeout=LONG))
        self.busy(workers, 1)
        with no_thread:
            workers.submit(ran.release)
        self.release.set()
        self.assertTrue(ran.acquire(timeout=LONG))
        self.until(lambda: workers._spare == workers.count)


class Counting(unittest.TestCase):
    def test_in_flight(self):
        """Counts those under way, and tells when the last one has ended."""
        in_flight = InFlight()
        self.assertTrue(in_flight.wait_for_none(0))
        in_flight.begin()
        in_flight.begin()
        self.assertEqual(2, in_flight.count)
        in_flight.end()
        self.assertFalse(in_flight.wait_for_none(SHORT))
        left = threading.Event()

        def wait() -> None:
            if in_flight.wait_for_none(LONG):
                left.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        in_flight.end()
        self.assertTrue(left.wait(LONG))
        waiting.join(LONG)
        self.assertEqual(0, in_flight.count)


if __name__ == "__main__":
    unittest.main()
