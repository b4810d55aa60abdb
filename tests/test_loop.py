"""loop.py: tasks that wait for sockets and time, on every kind of poller; and the daemon on the portable one."""

from __future__ import annotations

import functools
import gc
import json
import os
import select
import selectors
import socket
import tempfile
import threading
import time
import unittest
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from portway import loop as loops
from portway.errors import ClientGone, NoThread
from portway.loop import POLLIN, POLLOUT, Loop, Poller, SelectorPoller, Task
from portway.telemetry import Log
from portway.workers import Workers
from tests.daemon import Daemon
from tests.doubles import HANG, Action, RawClient
from tests.llama_server import wait_for
from tests.targets import CHAT, MESSAGES, Target, answer, ask, begun, chain, ended, frames, next_json, part, text_of

T = TypeVar("T")
LONG = 10.0  # seconds; nothing here takes so long
SHORT = 0.03  # seconds; a wait that passes
NEVER = float("inf")


def later(seconds: float = LONG) -> float:
    return time.monotonic() + seconds


def poller_of(kind: type[selectors.BaseSelector]) -> SelectorPoller:
    """A SelectorPoller over another selector than this system's best one."""
    with mock.patch.object(selectors, "DefaultSelector", kind):
        return SelectorPoller()


POLLERS: dict[str, Callable[[], Poller]] = {
    "the system's": loops._best_poller,
    "default selector": SelectorPoller,
    "poll": lambda: poller_of(selectors.PollSelector),
}


class Counted:
    """A Poller that counts its polls."""

    def __init__(self, of: Poller) -> None:
        self.polls = 0
        self.register, self.modify, self.unregister, self.close = of.register, of.modify, of.unregister, of.close
        self._poll = of.poll

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self.polls += 1
        return self._poll(timeout)


class Running:
    """A loop on a thread of its own."""

    def __init__(self, test: unittest.TestCase, poller: Poller) -> None:
        self.poller = Counted(poller)
        self.workers = Workers(4, "test")
        self.loop = Loop(self.workers, self.poller)
        self.sweeps = 0
        self.reported: list[Exception] = []
        self.events: list[tuple[str, bool]] = []  # what befell the tasks, and whether on the loop's thread
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        test.addCleanup(self.stop)

    def _run(self) -> None:
        self.loop.run(self._sweep, 60.0, self.reported.append)

    def _sweep(self) -> None:
        self.sweeps += 1

    def stop(self) -> None:
        self.loop.stop(LONG)
        self.thread.join(LONG)
        self.loop.close()

    def call(self, what: Callable[[], T]) -> T:
        """What it returns when it is called on the loop's thread."""
        done = threading.Event()
        found: list[T] = []

        def act() -> None:
            try:
                found.append(what())
            finally:
                done.set()

        self.loop.post(act)
        if not done.wait(LONG):
            raise AssertionError("the loop does not call what is posted")
        return found[0]

    def note(self, what: str) -> None:
        self.events.append((what, threading.current_thread() is self.thread))

    def start(self, work: Callable[[Task], Coroutine[Any, Any, object]]) -> Job:
        """Run `work(task)` as a task; returns once it waits or has ended."""
        return self.call(lambda: Job(self, work))


class Job:
    """A task, and what became of it."""

    def __init__(self, running: Running, work: Callable[[Task], Coroutine[Any, Any, object]]) -> None:
        self.task = Task(
            running.loop,
            moving=lambda: running.note("moving"),
            returning=lambda: running.note("returning"),
            ended=self._ended,
        )
        self.results: list[object] = []
        self.is_over = threading.Event()
        self._running = running
        self.task.start(self._work(work))
        if not self.task.busy:
            self.is_over.set()

    async def _work(self, work: Callable[[Task], Coroutine[Any, Any, object]]) -> None:
        try:
            self.results.append(await work(self.task))
        except ClientGone as exc:
            self.results.append(exc)

    def _ended(self) -> None:
        self._running.note("ended")
        self.is_over.set()

    def result(self) -> object:
        """What it came to; waits for that."""
        if not self.is_over.wait(LONG):
            raise AssertionError("the task has not ended")
        (result,) = self.results
        return result


def each_poller(test: Callable[[Any, Running], None]) -> Callable[[Any], None]:
    """Run a test once with a loop on each kind of poller."""

    @functools.wraps(test)
    def run(self: LoopCase) -> None:
        for name, make in POLLERS.items():
            with self.subTest(name):
                running = Running(self, make())
                test(self, running)

    del run.__dict__["__wrapped__"]  # else unittest takes the second parameter for one that is missing
    return run


class LoopCase(unittest.TestCase):
    def pair(self) -> tuple[socket.socket, socket.socket]:
        """What the loop waits for, and the other end."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
            self.addCleanup(sock.close)
        return ours, theirs

    def fill(self, sock: socket.socket) -> None:
        """Send until there is no room."""
        with self.assertRaises(BlockingIOError):
            while True:
                sock.send(bytes(65_536))

    def empty(self, sock: socket.socket) -> None:
        with self.assertRaises(BlockingIOError):
            while True:
                sock.recv(1_048_576)


class Waiting(LoopCase):
    @each_poller
    def test_for_bytes(self, running: Running) -> None:
        """A task ends its wait when something comes in, and not before; again and again on one socket."""
        ours, theirs = self.pair()

        async def read(task: Task) -> bytes:
            data = b""
            while len(data) < 3:
                self.assertTrue(await task.wait(ours, POLLIN, later()))
                data += ours.recv(1)
            return data

        job = running.start(read)
        self.assertTrue(job.task.busy)
        self.assertFalse(job.is_over.is_set())
        for byte in (b"a", b"b", b"c"):
            theirs.send(byte)
        self.assertEqual(b"abc", job.result())
        self.assertFalse(job.task.busy)
        self.assertEqual([("ended", True)], running.events)
        self.assertEqual(0, running.workers.count)

    @each_poller
    def test_for_room(self, running: Running) -> None:
        """The other direction, then the first one again: what is looked for changes with the wait."""
        ours, theirs = self.pair()
        self.fill(ours)

        async def write_and_read(task: Task) -> list[bool]:
            return [await task.wait(ours, events, later()) for events in (POLLOUT, POLLIN, POLLOUT)]

        job = running.start(write_and_read)
        self.assertFalse(job.is_over.wait(SHORT))
        self.empty(theirs)
        self.assertFalse(job.is_over.wait(SHORT))
        theirs.send(b"x")
        self.assertEqual([True] * 3, job.result())

    @each_poller
    def test_for_an_end(self, running: Running) -> None:
        """A peer that leaves ends the wait for bytes."""
        ours, theirs = self.pair()
        job = running.start(lambda task: task.wait(ours, POLLIN, later()))
        theirs.close()
        self.assertIs(True, job.result())

    @each_poller
    def test_for_the_time(self, running: Running) -> None:
        """With a socket or without one: False, and not too early."""
        ours, _theirs = self.pair()
        for sock in (ours, None):
            until = later(SHORT)

            async def wait(task: Task, sock: socket.socket | None = sock, until: float = until) -> tuple[bool, bool]:
                return await task.wait(sock, POLLIN, until), time.monotonic() >= until

            self.assertEqual((False, True), running.start(wait).result())

    @each_poller
    def test_for_a_time_that_is_past(self, running: Running) -> None:
        """Ends at once; for one that never comes it does not end."""
        self.assertIs(False, running.start(lambda task: task.wait(None, 0, time.monotonic() - 5)).result())
        ours, theirs = self.pair()
        job = running.start(lambda task: task.wait(ours, POLLIN, NEVER))
        theirs.send(b"x")
        self.assertIs(True, job.result())

    @each_poller
    def test_many_times(self, running: Running) -> None:
        """Of 300 tasks with their own ends in any order none ends too early, and none is lost."""
        started = time.monotonic()
        ends = [started + SHORT + (number * 37 % 300) * 0.001 for number in range(300)]

        async def sleep(task: Task, until: float) -> tuple[bool, bool]:
            return await task.wait(None, 0, until), time.monotonic() >= until

        jobs = [running.start(lambda task, until=until: sleep(task, until)) for until in ends]  # type: ignore[misc]
        for job in jobs:
            self.assertEqual((False, True), job.result())
        self.assertEqual(set(), running.loop.tasks)
        self.assertLess(running.poller.polls, 1200)  # each post is one, each end one or two

    @each_poller
    def test_an_earlier_end_than_the_others(self, running: Running) -> None:
        """It counts although the loop already sleeps until a later one."""
        slow = running.start(lambda task: task.wait(None, 0, later()))
        self.assertIs(False, running.start(lambda task: task.wait(None, 0, later(SHORT))).result())
        self.assertFalse(slow.is_over.is_set())

    @each_poller
    def test_many_for_one_socket(self, running: Running) -> None:
        """Identical requests wait for one line: its end wakes each of them, but for one whose time was over."""
        ours, theirs = self.pair()
        patient = [running.start(lambda task: task.wait(ours, POLLIN, later())) for _ in range(5)]
        hasty = running.start(lambda task: task.wait(ours, POLLIN, later(SHORT)))
        patient += [running.start(lambda task: task.wait(ours, POLLIN, later())) for _ in range(5)]
        thrown = patient.pop(0)  # the first one: another takes its place
        running.call(lambda: thrown.task.throw(ClientGone()))
        self.assertIs(False, hasty.result())
        theirs.close()
        self.assertEqual([True] * 9, [job.result() for job in patient])
        self.assertIsInstance(thrown.result(), ClientGone)

    @each_poller
    def test_one_that_does_not_wait(self, running: Running) -> None:
        """It ends within `start`, and is not told to have ended."""

        async def work(_task: Task) -> int:
            return 5

        job = running.start(work)
        self.assertEqual((5, False, []), (job.result(), job.task.busy, running.events))

    @each_poller
    def test_one_work_after_another(self, running: Running) -> None:
        """A task is used again, also from within `ended`."""
        ours, theirs = self.pair()
        again = threading.Event()

        async def read(task: Task) -> None:
            await task.wait(ours, POLLIN, later())
            ours.recv(1)

        def once_more() -> None:
            task.ended = again.set
            task.start(read(task))

        task = Task(running.loop, moving=lambda: None, ended=once_more)
        running.call(lambda: task.start(read(task)))
        theirs.send(b"1")
        wait_for(lambda: task.ended == again.set and task.busy, "the second work")
        theirs.send(b"2")
        self.assertTrue(again.wait(LONG))


class Thrown(LoopCase):
    @each_poller
    def test_into_a_wait(self, running: Running) -> None:
        """It ends with that error, and what it waited for no longer wakes it."""
        ours, theirs = self.pair()
        job = running.start(lambda task: task.wait(ours, POLLIN, later()))
        running.call(lambda: job.task.throw(ClientGone()))
        self.assertIsInstance(job.result(), ClientGone)
        theirs.send(b"x")
        self.assertIs(True, running.start(lambda task: task.wait(ours, POLLIN, later())).result())
        self.assertEqual([("ended", True)] * 1, running.events[:1])

    @each_poller
    def test_it_goes_on(self, running: Running) -> None:
        """One that catches it may wait again, for the same socket."""
        ours, theirs = self.pair()

        async def stubborn(task: Task) -> bool:
            try:
                await task.wait(ours, POLLIN, later())
            except ClientGone:
                return await task.wait(ours, POLLIN, later())
            raise AssertionError

        job = running.start(stubborn)
        running.call(lambda: job.task.throw(ClientGone()))
        self.assertFalse(job.is_over.is_set())
        theirs.send(b"x")
        self.assertIs(True, job.result())


class Moving(LoopCase):
    @each_poller
    def test_to_a_worker(self, running: Running) -> None:
        """The rest runs there and may block; before, `moving`, and after, `ended`, are called on the loop."""
        may_end, threads = threading.Event(), []

        async def work(task: Task) -> bool:
            threads.append(threading.current_thread())
            await task.wait(None, 0, later(SHORT))
            await task.move()
            threads.append(threading.current_thread())
            return may_end.wait(LONG)

        job = running.start(work)
        wait_for(lambda: len(threads) == 2, "its being moved")
        self.assertEqual([("moving", True)], running.events)
        self.assertEqual((True, False), (job.task.busy, job.task.on_loop))
        self.assertNotIn(job.task, running.loop.tasks)
        self.assertIs(False, running.start(lambda task: task.wait(None, 0, later(SHORT))).result())  # it blocks nobody
        may_end.set()
        self.assertIs(True, job.result())
        self.assertIs(running.thread, threads[0])
        self.assertIsNot(running.thread, threads[1])
        self.assertEqual(("ended", True), running.events[-1])

    @each_poller
    def test_coming_back(self, running: Running) -> None:
        """What came to a worker can go on on the loop, is told so there, and waits there again."""
        ours, theirs = self.pair()
        on_loop: list[bool] = []

        async def work(task: Task) -> bool:
            await task.move()
            on_loop.append(threading.current_thread() is running.thread)
            await task.come_back()
            on_loop.append(threading.current_thread() is running.thread)
            ready = await task.wait(ours, POLLIN, later())
            on_loop.append(threading.current_thread() is running.thread)
            return ready

        job = running.start(work)
        wait_for(lambda: len(on_loop) == 2, "its coming back")
        theirs.send(b"x")
        self.assertTrue(job.result())
        self.assertEqual([False, True, True], on_loop)
        self.assertEqual([("moving", True), ("returning", True), ("ended", True)], running.events)

    @each_poller
    def test_at_once(self, running: Running) -> None:
        """A work that moves before it has waited is one that is busy after `start`."""

        async def work(task: Task) -> str:
            await task.move()
            return threading.current_thread().name

        job = running.start(work)
        self.assertEqual("portway-test", job.result())
        self.assertEqual([("moving", True), ("ended", True)], running.events)

    @each_poller
    def test_from_within_an_error(self, running: Running) -> None:
        """One whose wait was ended by an error can still move."""

        async def work(task: Task) -> bool:
            try:
                await task.wait(None, 0, later())
            except ClientGone:
                await task.move()
            return threading.current_thread() is running.thread

        job = running.start(work)
        running.call(lambda: job.task.throw(ClientGone()))
        self.assertIs(False, job.result())

    @each_poller
    def test_without_a_thread(self, running: Running) -> None:
        """It is told so on the loop, where it can go on, and ends like any other; also before it has waited."""
        ours, theirs = self.pair()

        def work(first: float) -> Callable[[Task], Coroutine[Any, Any, bool]]:
            async def moves(task: Task) -> bool:
                if first:
                    await task.wait(None, 0, later(first))
                try:
                    await task.move()
                except NoThread:
                    return task.on_loop and await task.wait(ours, POLLIN, later())
                return False

            return moves

        with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
            job = running.start(work(SHORT))
            wait_for(lambda: ("returning", True) in running.events, "its coming back")
            theirs.send(b"x")
            self.assertIs(True, job.result())
            self.assertIs(True, running.start(work(0.0)).result())
        self.assertEqual([("moving", True), ("returning", True), ("ended", True)], running.events[:3])


class Trouble(LoopCase):
    @each_poller
    def test_closed_by_another_thread(self, running: Running) -> None:
        """A pooled connection that stirs, and that a worker closes before the loop lets it go, costs nothing."""
        ours, theirs = self.pair()
        self.assertIs(False, running.start(lambda task: task.wait(ours, POLLIN, later(SHORT))).result())
        poll = running.poller.poll

        def poll_and_close(timeout: float) -> list[tuple[int, int]]:
            ready = poll(timeout)
            if any(fd == number for fd, _ in ready):
                ours.close()
            return ready

        number = ours.fileno()
        running.call(lambda: setattr(running.poller, "poll", poll_and_close))  # between two polls
        theirs.send(b"x")
        wait_for(lambda: ours.fileno() < 0, "its being closed")
        self.assertIs(False, running.start(lambda task: task.wait(None, 0, later(SHORT))).result())
        self.assertEqual([], running.reported)

    @each_poller
    def test_a_number_that_is_another_socket_s_by_then(self, running: Running) -> None:
        """An event of a socket that was closed in this very round is not told to who has got its number since."""
        first, first_end = self.pair()
        second, _ = self.pair()
        third, third_end = self.pair()
        stirred: list[str] = []

        def on_first(_events: int) -> None:
            stirred.append("first")
            running.loop.detach(first)
            running.loop.detach(second)
            os.dup2(third.fileno(), number)  # closes the second one, and takes its number
            running.loop.attach(second, lambda _events: stirred.append("third"))

        def attach() -> None:
            running.loop.attach(first, on_first)
            running.loop.attach(second, lambda _events: stirred.append("second"))

        number = second.fileno()
        poll = running.poller.poll

        def both_at_once(timeout: float) -> list[tuple[int, int]]:
            ready = dict(poll(timeout))
            return [(first.fileno(), POLLIN), (number, POLLIN)] if first.fileno() in ready else list(ready.items())

        running.call(attach)
        running.call(lambda: setattr(running.poller, "poll", both_at_once))
        first_end.send(b"x")
        wait_for(lambda: bool(stirred), "the first one's being told")
        self.assertIs(False, running.start(lambda task: task.wait(None, 0, later(SHORT))).result())
        self.assertEqual(["first"], stirred)
        third_end.send(b"x")
        wait_for(lambda: "third" in stirred, "its own event")
        running.call(lambda: running.loop.detach(second))

    @each_poller
    def test_a_mistake(self, running: Running) -> None:
        """What raises is reported, and everything else goes on."""
        mistake = RuntimeError("a mistake")

        def fail() -> None:
            raise mistake

        running.loop.post(fail)
        wait_for(lambda: bool(running.reported), "the report")
        self.assertEqual([mistake], running.reported)
        self.assertIs(False, running.start(lambda task: task.wait(None, 0, later(SHORT))).result())

    @each_poller
    def test_a_mistake_keeps_nothing_behind_it_waiting(self, running: Running) -> None:
        """What was posted together with it is called."""
        busy, gate, called = threading.Event(), threading.Event(), threading.Event()
        ours, theirs = self.pair()

        def keep_busy(_events: int) -> None:
            running.loop.detach(ours)
            busy.set()
            gate.wait(LONG)

        def fail() -> None:
            raise RuntimeError("a mistake")

        running.call(lambda: running.loop.attach(ours, keep_busy))
        theirs.send(b"x")
        self.assertTrue(busy.wait(LONG))
        running.loop.post(fail)
        running.loop.post(called.set)
        gate.set()
        self.assertTrue(called.wait(LONG))

    @each_poller
    def test_a_mistake_of_a_task(self, running: Running) -> None:
        """It has ended then, and whoever holds it knows, wherever it was made."""

        async def at_once(_task: Task) -> None:
            raise RuntimeError("a mistake")

        async def after_a_wait(task: Task) -> None:
            await task.wait(None, 0, later(SHORT))
            raise RuntimeError("a mistake")

        async def back_from_a_worker(task: Task) -> None:
            await task.move()
            await task.come_back()
            raise RuntimeError("a mistake")

        async def thrown(task: Task) -> None:
            await task.wait(None, 0, later())

        for number, work in enumerate((after_a_wait, back_from_a_worker), 1):
            job = running.start(work)
            self.assertTrue(job.is_over.wait(LONG), work.__name__)
            self.assertEqual((False, number), (job.task.busy, len(running.reported)))
        job = running.start(thrown)
        running.loop.post(lambda: job.task.throw(RuntimeError("a mistake")))
        self.assertTrue(job.is_over.wait(LONG))
        task = Task(running.loop, moving=lambda: None, ended=lambda: None)

        def start() -> None:
            with self.assertRaises(RuntimeError):
                task.start(at_once(task))

        running.call(start)
        self.assertEqual((False, set()), (task.busy, running.loop.tasks))

    @each_poller
    def test_two_whose_time_is_over_at_once(self, running: Running) -> None:
        """One that ends the other's wait meanwhile does not have it woken twice."""
        until = later(SHORT)
        jobs: list[Job] = []

        async def work(task: Task) -> bool:
            ready = await task.wait(None, 0, until)
            for other in jobs:
                if other.task is not task and other.task.busy:
                    other.task.throw(ClientGone())
            return ready

        running.call(lambda: jobs.extend(Job(running, work) for _ in range(2)))
        results = [job.result() for job in jobs]
        self.assertEqual({False, True}, {isinstance(result, ClientGone) for result in results})
        self.assertEqual([], running.reported)


class Attached(LoopCase):
    @each_poller
    def test_it_is_told_each_time(self, running: Running) -> None:
        """Until it is detached; with nothing to look for it is told nothing."""
        ours, theirs = self.pair()
        told: list[bytes] = []
        running.call(lambda: running.loop.attach(ours, lambda _events: told.append(ours.recv(10))))
        theirs.send(b"a")
        wait_for(lambda: told == [b"a"], "the first byte")
        running.call(lambda: running.loop.watch_for(ours, 0))
        theirs.send(b"b")
        self.passes(running)
        running.call(lambda: running.loop.watch_for(ours, POLLIN))
        wait_for(lambda: told == [b"a", b"b"], "the second byte")
        running.call(lambda: running.loop.detach(ours))
        running.call(lambda: running.loop.detach(ours))  # twice is once
        theirs.send(b"c")
        self.passes(running)
        self.assertEqual([b"a", b"b"], told)

    def passes(self, running: Running) -> None:
        """The loop has gone round several times."""
        for _ in range(5):
            running.call(lambda: None)

    @each_poller
    def test_one_closed_by_another_in_the_same_round(self, running: Running) -> None:
        """What was ready with it is not told of any more."""
        first, second = self.pair(), self.pair()
        told: list[int] = []

        def end_the_other(number: int) -> None:
            told.append(number)
            for ours, _ in (first, second):
                running.loop.detach(ours)

        def attach_both() -> None:
            for number, (ours, theirs) in enumerate((first, second)):
                theirs.send(b"x")
                running.loop.attach(ours, lambda _events, number=number: end_the_other(number))  # type: ignore[misc]

        running.call(attach_both)
        wait_for(lambda: bool(told), "one of them")
        self.passes(running)
        self.assertEqual(1, len(told))

    @each_poller
    def test_a_pooled_connection_that_its_server_closes(self, running: Running) -> None:
        """Nobody waits for it: it is let go of, without a busy loop, and what is asked of it later is answered."""
        ours, theirs = self.pair()
        theirs.send(b"x")
        self.assertIs(True, running.start(lambda task: task.wait(ours, POLLIN, later())).result())
        ours.recv(1)
        theirs.close()
        self.passes(running)
        before = running.poller.polls
        self.assertFalse(threading.Event().wait(SHORT))
        self.assertLessEqual(running.poller.polls - before, 1)
        self.assertIs(True, running.start(lambda task: task.wait(ours, POLLIN, later())).result())


class Last:
    """A Poller that tells of these descriptors behind all others, so that a test knows the order of a round."""

    def __init__(self, of: Poller, last: set[int]) -> None:
        self.register, self.modify, self.unregister, self.close = of.register, of.modify, of.unregister, of.close
        self._poll = of.poll
        self._last = last

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        return sorted(self._poll(timeout), key=lambda each: each[0] in self._last)


class Crowd:
    """Tasks that all wake in one round; then each takes its turn and sends b"hello" to a peer of its own."""

    def __init__(
        self,
        case: LoopCase,
        running: Running,
        count: int,
        turn: Callable[[Crowd, int], None] = lambda *_: None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self.bells = [case.pair() for _ in range(count)]
        self.lines = [case.pair() for _ in range(count)]
        self.sent: list[object] = [None] * count
        self._turn = turn
        self.jobs = [running.start(functools.partial(self._work, number=number)) for number in range(count)]
        running.call(lambda: [before(), *(theirs.send(b"x") for _, theirs in self.bells)])

    async def _work(self, task: Task, number: int) -> object:
        await task.wait(self.bells[number][0], POLLIN, later())
        self._turn(self, number)
        try:
            self.sent[number] = await task.send(self.lines[number][0], b"hello")
        except OSError as exc:
            self.sent[number] = type(exc)
        if self.sent[number] is BrokenPipeError:
            raise RuntimeError("a mistake")
        return self.sent[number]

    def wait(self) -> None:
        """Until all have ended."""
        for job in self.jobs:
            if not job.is_over.wait(LONG):
                raise AssertionError("a task has not ended")

    @property
    def arrived(self) -> int:
        """How many peers have something to read."""
        return len(select.select([theirs for _, theirs in self.lines], [], [], 0)[0])


class SendingTogether(LoopCase):
    @each_poller
    def test_once_all_have_had_their_turn(self, running: Running) -> None:
        """Then all of it goes out, and each hears how much its socket took."""
        seen: list[int] = []
        crowd = Crowd(self, running, 4, lambda crowd, _number: seen.append(crowd.arrived))
        crowd.wait()
        self.assertEqual([5] * 4, crowd.sent)
        self.assertEqual([b"hello"] * 4, [theirs.recv(10) for _, theirs in crowd.lines])
        self.assertEqual([0] * 4, seen)

    @each_poller
    def test_so_many_wait_for_one_another(self, running: Running) -> None:
        """No more: those behind them have their turn after these have sent."""
        seen: list[int] = []
        with mock.patch.object(loops, "TOGETHER", 2):
            Crowd(self, running, 5, lambda crowd, _number: seen.append(crowd.arrived)).wait()
        self.assertEqual([0, 0, 2, 2, 4], seen)

    @each_poller
    def test_alone(self, running: Running) -> None:
        """Who is the only one does not wait at all."""
        ours, theirs = self.pair()
        job = running.start(lambda task: task.send(ours, b"hello"))
        self.assertFalse(job.task.busy)
        self.assertEqual((5, b"hello"), (job.result(), theirs.recv(10)))
        with mock.patch.object(running.loop, "hold_back", side_effect=AssertionError):
            crowd = Crowd(self, running, 1)
            crowd.wait()
        self.assertEqual([5], crowd.sent)

    @each_poller
    def test_what_a_socket_does_not_take(self, running: Running) -> None:
        """Is told where it was sent, as the socket tells it, and is no matter of the others'."""
        crowd = Crowd(self, running, 4, self._trouble)
        crowd.wait()
        self.assertEqual([5, BlockingIOError, OSError, 5], crowd.sent)
        self.assertEqual([b"hello"] * 2, [crowd.lines[number][1].recv(10) for number in (0, 3)])
        self.assertEqual([], running.reported)

    def _trouble(self, crowd: Crowd, number: int) -> None:
        if number == 1:
            self.fill(crowd.lines[1][0])
        elif number == 2:
            crowd.lines[2][0].close()

    @each_poller
    def test_a_mistake_of_one(self, running: Running) -> None:
        """Costs no other its turn, whether it was held back or was the last one."""
        for mistaken in range(3):
            crowd = Crowd(self, running, 3, lambda crowd, number, bad=mistaken: self._break(crowd, number, bad))  # type: ignore[misc]
            crowd.wait()
            self.assertEqual([5, 5], [count for count in crowd.sent if count is not BrokenPipeError])
            self.assertEqual(["a mistake"] * (mistaken + 1), list(map(str, running.reported)))

    def _break(self, crowd: Crowd, number: int, mistaken: int) -> None:
        if number == mistaken:
            crowd.lines[number][1].close()

    @each_poller
    def test_whatever_else_there_is_in_a_round(self, running: Running) -> None:
        """Counts, too: behind many who send nothing it is sent before they all have had their turn."""
        seen: list[int] = []
        bell, line, others = self.pair(), self.pair(), [self.pair() for _ in range(4)]

        async def work(task: Task) -> int:
            await task.wait(bell[0], POLLIN, later())
            return await task.send(line[0], b"hello")

        def stirred(_events: int, ours: socket.socket) -> None:
            ours.recv(1)
            seen.append(len(select.select([line[1]], [], [], 0)[0]))

        def all_at_once() -> None:
            for ours, theirs in others:
                running.loop.attach(ours, functools.partial(stirred, ours=ours))
                theirs.send(b"x")
            bell[1].send(b"x")

        job = running.start(work)
        running.loop._poller = Last(running.loop._poller, {ours.fileno() for ours, _ in others})
        with mock.patch.object(loops, "TOGETHER", 3):
            running.call(all_at_once)
            self.assertEqual(5, job.result())
            wait_for(lambda: len(seen) == 4, "the others' turn")
        self.assertEqual([0, 0, 1, 1], seen)

    @each_poller
    def test_what_no_socket_should_say(self, running: Running) -> None:
        """Is the matter of who sends, like all that it says: no request is lost for it."""

        def turn(crowd: Crowd, number: int) -> None:
            if number == 1:
                crowd.lines[1] = mock.Mock(**{"send.side_effect": MemoryError}), crowd.lines[1][1]

        crowd = Crowd(self, running, 3, turn)
        crowd.wait()
        self.assertEqual([5, None, 5], crowd.sent)
        self.assertEqual([MemoryError], list(map(type, running.reported)))

    @each_poller
    def test_after_a_mistake_in_the_middle_of_a_round(self, running: Running) -> None:
        """Who is woken by the time is not held back for those who had their turn no more."""
        first, second, line = self.pair(), self.pair(), self.pair()

        def stirred(_events: int) -> None:
            for ours, _ in (first, second):
                running.loop.detach(ours)
            raise RuntimeError("a mistake")

        def begin() -> None:
            for ours, theirs in (first, second):
                running.loop.attach(ours, stirred)
                theirs.send(b"x")

        async def work(task: Task) -> int:
            await task.wait(None, 0, later(SHORT))
            return await task.send(line[0], b"hello")

        with mock.patch.object(running.loop, "hold_back", side_effect=AssertionError):
            job = running.start(work)
            running.call(begin)
            self.assertEqual(5, job.result())
        self.assertEqual(["a mistake"], list(map(str, running.reported)))

    @each_poller
    def test_a_mistake_in_the_last_round(self, running: Running) -> None:
        """What was held back in it is sent before the loop ends."""
        last = self.pair()

        def stirred(_events: int) -> None:
            running.loop._stopping = True
            raise RuntimeError("a mistake")

        def turn(crowd: Crowd, _number: int) -> None:
            seen.append(crowd.arrived)

        seen: list[int] = []
        running.loop._poller = Last(running.loop._poller, {last[0].fileno()})
        running.call(lambda: running.loop.attach(last[0], stirred))
        crowd = Crowd(self, running, 2, turn, before=lambda: last[1].send(b"x"))
        running.thread.join(LONG)
        self.assertEqual(([5, 5], [0, 0], 1), (crowd.sent, seen, len(running.reported)))
        self.assertEqual([b"hello"] * 2, [theirs.recv(10) for _, theirs in crowd.lines])

    @each_poller
    def test_nothing_of_it_stays(self, running: Running) -> None:
        """What could not be sent is gone with who sent it, not with the next collection of garbage."""
        gc.disable()
        self.addCleanup(gc.enable)
        held: list[weakref.ref[memoryview]] = []
        bells, lines = [self.pair() for _ in range(3)], [self.pair() for _ in range(3)]

        async def work(task: Task, number: int) -> None:
            await task.wait(bells[number][0], POLLIN, later())
            data = memoryview(b"hello")
            held.append(weakref.ref(data))
            try:
                await task.send(lines[number][0], data)
            except OSError:
                return

        jobs = [running.start(functools.partial(work, number=number)) for number in range(3)]
        for ours, _ in lines:
            ours.close()
        running.call(lambda: [theirs.send(b"x") for _, theirs in bells])
        for job in jobs:
            job.result()
        running.call(lambda: None)
        self.assertEqual([None] * 3, [each() for each in held])

    @each_poller
    def test_nobody_disturbs_it(self, running: Running) -> None:
        """Who is held back is known to be, as long as that lasts."""
        seen: list[int] = []

        def turn(crowd: Crowd, _number: int) -> None:
            seen.append(sum(job.task.is_sending for job in crowd.jobs))

        crowd = Crowd(self, running, 3, turn)
        crowd.wait()
        self.assertEqual([0, 1, 2], seen)
        self.assertEqual([False] * 3, [job.task.is_sending for job in crowd.jobs])


class Descriptors(LoopCase):
    @each_poller
    def test_a_number_used_again(self, running: Running) -> None:
        """A socket that takes the number of a closed one is waited for as itself, as often as that happens."""
        for _ in range(5):
            ours, theirs = self.pair()
            number = ours.fileno()
            self.assertIs(False, running.start(lambda task, s=ours: task.wait(s, POLLIN, later(0.001))).result())  # type: ignore[misc]
            ours.close()  # without a word to the loop, as a pooled connection is
            theirs.close()
            ours, theirs = self.pair()
            if ours.fileno() != number:
                os.dup2(ours.fileno(), number)
                ours = socket.socket(fileno=number)
                self.addCleanup(ours.close)
            job = running.start(lambda task, s=ours: task.wait(s, POLLIN, later()))  # type: ignore[misc]
            self.assertFalse(job.is_over.is_set())
            theirs.send(b"x")
            self.assertIs(True, job.result())
            ours.close()
            theirs.close()

    @each_poller
    def test_a_number_used_again_by_a_client(self, running: Running) -> None:
        """The same where the new one is attached, and the other way round."""
        told = threading.Event()
        ours, _theirs = self.pair()
        number = ours.fileno()
        self.assertIs(False, running.start(lambda task: task.wait(ours, POLLIN, later(0.001))).result())
        ours.close()
        client, theirs = self.renumbered(number)
        running.call(lambda: running.loop.detach(client))  # which never was attached
        running.call(lambda: running.loop.attach(client, lambda _events: told.set()))
        running.call(lambda: running.loop.detach(ours))  # the old one, which has no number any more
        theirs.send(b"x")
        self.assertTrue(told.wait(LONG))
        running.call(lambda: running.loop.detach(client))
        client.close()
        ours, theirs = self.renumbered(number)
        job = running.start(lambda task: task.wait(ours, POLLIN, later()))
        theirs.send(b"x")
        self.assertIs(True, job.result())

    def renumbered(self, number: int) -> tuple[socket.socket, socket.socket]:
        """A new pair whose first socket has this number."""
        ours, theirs = self.pair()
        if ours.fileno() == number:
            return ours, theirs
        os.dup2(ours.fileno(), number)
        moved = socket.socket(fileno=number)
        self.addCleanup(moved.close)
        moved.setblocking(False)
        return moved, theirs

    def test_none_is_left(self) -> None:
        """After its end a loop has closed its own."""
        before = len(os.listdir("/dev/fd"))
        for make in POLLERS.values():
            running = Running(self, make())
            running.start(lambda task: task.wait(None, 0, later(0.001))).result()
            running.stop()
        self.assertEqual(before, len(os.listdir("/dev/fd")))


class Posting(LoopCase):
    @each_poller
    def test_from_many_threads(self, running: Running) -> None:
        """All of it is called, on the loop's thread, in each thread's own order; more than the line holds at once."""
        called: list[tuple[int, int]] = []
        here: set[bool] = set()

        def note(who: int, turn: int) -> None:
            called.append((who, turn))
            here.add(threading.current_thread() is running.thread)

        def post(who: int) -> None:
            for turn in range(2000):
                running.loop.post(functools.partial(note, who, turn))

        held = threading.Event()

        self.addCleanup(held.set)

        def hold() -> None:
            held.wait(6 * LONG)

        running.loop.post(hold)  # meanwhile the line fills up
        threads = [threading.Thread(target=post, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        self.assertFalse(any(thread.is_alive() for thread in threads), "posting waits for the loop")
        held.set()
        wait_for(lambda: len(called) == 8000, "all that was posted")
        self.assertEqual({True}, here)
        for who in range(4):
            self.assertEqual(list(range(2000)), [turn for name, turn in called if name == who])

    @each_poller
    def test_from_within(self, running: Running) -> None:
        """What is posted on the loop's own thread is called too."""
        done = threading.Event()
        running.call(lambda: running.loop.post(done.set))
        self.assertTrue(done.wait(LONG))

    def test_after_the_end(self) -> None:
        """Nothing happens, and nobody is harmed: a worker may end its request then."""
        running = Running(self, SelectorPoller())
        running.stop()
        running.loop.post(lambda: None)

    @each_poller
    def test_stop_waits_for_nobody(self, running: Running) -> None:
        """A loop with tasks that wait for long ends at once."""
        running.start(lambda task: task.wait(None, 0, later(60)))
        started = time.monotonic()
        running.loop.stop(LONG)
        running.thread.join(LONG)
        self.assertLess(time.monotonic() - started, LONG / 2)

    def test_the_sweep(self) -> None:
        """It comes at its intervals, whether anything happens or not."""
        swept = threading.Semaphore(0)
        reported: list[Exception] = []
        loop = Loop(Workers(1, "test"))
        thread = threading.Thread(target=loop.run, args=(swept.release, 0.005, reported.append), daemon=True)
        thread.start()
        for _ in range(5):
            self.assertTrue(swept.acquire(timeout=LONG))
        loop.stop(LONG)
        thread.join(LONG)
        loop.close()

    def test_no_sweep_between_them(self) -> None:
        """However often something happens."""
        now = 0.0
        swept: list[float] = []

        class Hasty(SelectorPoller):
            """Time passes in no time."""

            def poll(self, _timeout: float, /) -> list[tuple[int, int]]:
                nonlocal now
                now += 0.25
                loop._stopping = now >= 10.0
                return []

        loop = Loop(Workers(1, "test"), Hasty())
        with mock.patch("time.monotonic", side_effect=lambda: now):
            loop.run(lambda: swept.append(now), 1.0, self.fail)
        self.assertEqual([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], swept)
        loop.close()


class PuttingOff(LoopCase):
    """What must be done, but not before an answer or the next request."""

    @each_poller
    def test_while_a_task_waits(self, running: Running) -> None:
        """At the end of a round in which a task has begun to wait, not within it, and without another poll."""
        ours, theirs = self.pair()
        told: list[object] = []

        async def work(task: Task) -> bool:
            running.loop.put_off(lambda: told.append(running.poller.polls))
            told.append(running.poller.polls)
            return await task.wait(ours, POLLIN, later())

        with mock.patch.object(loops, "REST", LONG):
            job = running.start(work)
            wait_for(lambda: len(told) == 2, "what was put off")
            self.assertEqual(told[0], told[1])
            self.assertTrue(job.task.busy)
            theirs.send(b"x")
            self.assertIs(True, job.result())

    @each_poller
    def test_with_nothing_to_do(self, running: Running) -> None:
        """After a moment of rest, each once and in order; an event comes first."""
        told: list[int] = []

        def put_off() -> None:
            for number in range(3):
                running.loop.put_off(functools.partial(told.append, number))

        with mock.patch.object(loops, "REST", 0.2):
            running.call(put_off)
            running.call(lambda: self.assertEqual([], told))  # an event, and no rest
            wait_for(lambda: len(told) == 3, "what was put off")
        running.call(lambda: None)
        self.assertEqual([0, 1, 2], told)

    @each_poller
    def test_what_puts_off_more(self, running: Running) -> None:
        """That has its turn in the next round: what waits is not kept waiting for ever."""
        ours, theirs = self.pair()
        rounds: list[int] = []

        def again() -> None:
            rounds.append(running.poller.polls)
            running.loop.put_off(again)

        job = running.start(lambda task: task.wait(ours, POLLIN, later()))
        running.call(lambda: running.loop.put_off(again))
        theirs.send(b"x")
        self.assertIs(True, job.result())
        self.assertEqual(len(rounds), len(set(rounds)))
        running.call(running.loop._put_off.clear)

    @each_poller
    def test_without_a_moment_of_rest(self, running: Running) -> None:
        """When one event follows the other and none waits, so many are put off and no more."""
        ours, theirs = self.pair()
        told: list[int] = []
        most: list[int] = []

        def stirred(_events: int) -> None:  # never read, so that each round has an event
            if len(most) < 500:
                running.loop.put_off(lambda: told.append(1))
                most.append(len(running.loop._put_off))
            else:
                running.loop.detach(ours)

        running.call(lambda: running.loop.attach(ours, stirred))
        theirs.send(b"x")
        wait_for(lambda: len(told) == 500, "all that was put off")
        self.assertEqual(loops.MAX_PUT_OFF, max(most))

    @each_poller
    def test_a_mistake_costs_no_other(self, running: Running) -> None:
        """It is reported, and the next one is called all the same."""
        told: list[int] = []

        def put_off() -> None:
            running.loop.put_off(lambda: told.append(1 // 0))
            running.loop.put_off(lambda: told.append(2))

        running.call(put_off)
        wait_for(lambda: told == [2], "the second one")
        self.assertIsInstance(running.reported[0], ZeroDivisionError)

    def test_at_the_end(self) -> None:
        """Nothing is left over."""
        running, told = Running(self, loops._best_poller()), list[int]()
        with mock.patch.object(loops, "REST", LONG):
            running.call(lambda: running.loop.put_off(lambda: told.append(1)))
            running.loop.stop(LONG)
        running.thread.join(LONG)
        self.assertEqual([1], told)
        running.loop.put_off(lambda: told.append(2))  # while the daemon closes what is left
        self.assertEqual([1, 2], told)


class PollerTest(LoopCase):
    """What loop.py asks of a poller, of each kind."""

    def test_registering_twice(self) -> None:
        """Is told, so that it can be changed instead."""
        for name, make in POLLERS.items():
            with self.subTest(name):
                poller = make()
                ours, theirs = self.pair()
                poller.register(ours.fileno(), POLLIN)
                with self.assertRaises(FileExistsError):
                    poller.register(ours.fileno(), POLLIN)
                self.assertEqual([], poller.poll(0))
                poller.modify(ours.fileno(), POLLOUT)
                self.assertEqual([(ours.fileno(), POLLOUT)], poller.poll(0))
                poller.modify(ours.fileno(), POLLIN | POLLOUT)
                theirs.send(b"x")
                self.assertEqual([(ours.fileno(), POLLIN | POLLOUT)], poller.poll(0))
                poller.unregister(ours.fileno())
                self.assertEqual([], poller.poll(0))
                poller.close()

    def test_nothing_to_look_for(self) -> None:
        """Bytes that wait are no news then; afterwards they are."""
        for name, make in POLLERS.items():
            with self.subTest(name):
                poller = make()
                ours, theirs = self.pair()
                theirs.send(b"x")
                poller.register(ours.fileno(), POLLIN)
                poller.modify(ours.fileno(), 0)
                self.assertEqual([], poller.poll(0))
                poller.modify(ours.fileno(), POLLIN)
                self.assertEqual([(ours.fileno(), POLLIN)], poller.poll(0))
                poller.unregister(ours.fileno())
                poller.close()

    @unittest.skipUnless(hasattr(select, "epoll"), "no epoll here")
    def test_the_best_one(self) -> None:
        """epoll where there is one, else the standard library's choice."""
        best = loops._best_poller()
        self.assertIsInstance(best, select.epoll)
        best.close()
        with mock.patch.object(select, "epoll", create=True):
            del select.epoll
            other = loops._best_poller()
        self.assertIsInstance(other, SelectorPoller)
        other.close()


class PortableTest(unittest.TestCase):
    """The daemon as it runs on a system without epoll and without POLLRDHUP: macOS."""

    def setUp(self) -> None:
        for patch in (
            mock.patch.object(loops, "_best_poller", SelectorPoller),
            mock.patch("portway.proxy.HANGUP", 0),
            mock.patch("portway.watch.HANGUP", 0),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def daemon(self, first: Target, rest: str = "", kind: str = "openai") -> Daemon:
        daemon = self.enterContext(Daemon(chain(first.url, kinds=[kind], rest=rest)))
        self.assertIsInstance(daemon._daemon._server.loop._poller, SelectorPoller)
        return daemon

    def client(self, daemon: Daemon) -> RawClient:
        return self.enterContext(daemon.client())

    def test_plain_and_streamed(self) -> None:
        """Many answers over one connection, to the client and to the backend."""
        for kind in ("openai", "ollama"):
            with self.subTest(kind):
                script = [answer(kind, "a"), answer(kind, "b", stream=True)] * 5
                with Target(*script) as first:
                    client = self.client(self.daemon(first, kind=kind))
                    for _ in range(5):
                        self.assertEqual("a", ask(client).json["choices"][0]["message"]["content"])
                        self.assertEqual("b", text_of(frames(ask(client, stream=True).body)))

    def test_many_clients(self) -> None:
        """At once, each with its own answer."""
        with Target(then=answer("openai", "a")) as first:
            daemon = self.daemon(first)
            clients = [self.client(daemon) for _ in range(30)]
            for client in clients:
                client.request("POST", CHAT, {"model": "first", "messages": MESSAGES})
            self.assertEqual([200] * 30, [client.response().status for client in clients])

    def test_who_leaves(self) -> None:
        """In each way, while a plain answer and a stream are waited for: upstream is closed."""
        for leave in (RawClient.close, RawClient.reset, RawClient.half_close):
            scripts: tuple[list[Action], ...] = ([HANG], [begun("openai", "a"), HANG])
            for script in scripts:
                with self.subTest(leave.__name__, begun=len(script) > 1), Target(script) as first:
                    client = self.client(self.daemon(first))
                    stream = len(script) > 1
                    client.request("POST", CHAT, {"model": "first", "messages": MESSAGES, "stream": stream})
                    wait_for(lambda: bool(first.asked), "the request")
                    if stream:
                        next_json(client.events(client.head()))
                    leave(client)
                    first.wait_closed(first.asked[0].connection)

    def test_the_next_request_ahead(self) -> None:
        """It is kept and answered next; much of it, too, which is not all taken at once."""
        gate = threading.Event()
        with Target([gate, answer("openai", "one")], answer("openai", "two")) as first:
            client = self.client(self.daemon(first, "[server]\nmax_body = 2000000\n"))
            client.request("POST", CHAT, {"model": "first", "messages": MESSAGES})
            wait_for(lambda: bool(first.asked), "the request")
            large = [{"role": "user", "content": "x" * 1_000_000}]
            sending = threading.Thread(
                target=client.request, args=("POST", CHAT, {"model": "first", "messages": large}), daemon=True
            )
            sending.start()
            gate.set()
            said = [client.response().json["choices"][0]["message"]["content"] for _ in range(2)]
            sending.join(LONG)
        self.assertEqual(["one", "two"], said)

    def test_too_late(self) -> None:
        """Half a request is 408 after its time, and an idle connection is closed."""
        with Target() as first:
            daemon = self.daemon(first, "[server]\nheader_timeout = 0.1\nidle_timeout = 0.3\n")
            half, idle = self.client(daemon), self.client(daemon)
            half.send(b"GET /v1/mod")
            self.assertEqual(408, half.response().status)
            self.assertTrue(half.at_end())
            self.assertTrue(idle.at_end())

    def test_heartbeats(self) -> None:
        """A client that hears nothing is told that somebody is there."""
        gate = threading.Event()
        with Target([gate, answer("openai", "a", stream=True)]) as first:
            client = self.client(self.daemon(first, "[server]\nheartbeat = 0.02\n"))
            client.request("POST", CHAT, {"model": "first", "messages": MESSAGES, "stream": True})
            events = client.events(client.head())
            self.assertEqual(["portway"] * 3, [next(events).comment for _ in range(3)])
            gate.set()
            said = [event.data for event in events if event.data]
        self.assertEqual("[DONE]", said[-1])

    def test_a_slow_reader(self) -> None:
        """It gets all of a stream that is larger than what the sockets hold, and delays nobody else."""
        text = "x" * 50_000
        script: list[Action] = [begun("openai", "first"), *[part("openai", text)] * 400, ended("openai")]
        with Target(script, answer("openai", "quick")) as first:
            daemon = self.daemon(first)
            slow = self.client(daemon)
            slow.request("POST", CHAT, {"model": "first", "messages": MESSAGES, "stream": True})
            head = slow.head()
            self.assertEqual("quick", ask(self.client(daemon)).json["choices"][0]["message"]["content"])
            chunks = [json.loads(event.data) for event in slow.events(head) if event.data not in (None, "[DONE]")]
        self.assertEqual(len("first") + 400 * len(text), len(text_of(chunks)))

    def test_a_slow_reader_of_whole_answers(self) -> None:
        """Who asks for several before it reads the first gets all of them, one behind the other, also where there is
        no room at all for the next one at first."""

        async def send(_task: Task, sock: socket.socket, data: bytes) -> int:
            if data.startswith(b"HTTP/"):
                raise BlockingIOError
            return sock.send(data)

        self.enterContext(mock.patch.object(Task, "send", send))
        text = "x" * 6_000_000
        with Target(then=answer("openai", text)) as first:
            client = self.client(self.daemon(first))
            for _ in range(3):
                client.request("POST", CHAT, {"model": "first", "messages": MESSAGES})
            wait_for(lambda: len(first.asked) == 1, "the first request")
            said = [client.response().json["choices"][0]["message"]["content"] for _ in range(3)]
        self.assertEqual([text] * 3, said)

    def test_one_that_does_not_read(self) -> None:
        """After server.write_timeout it is given up, and the backend with it."""
        script: list[Action] = [begun("openai", "first"), *[part("openai", "x" * 50_000)] * 1000, HANG]
        with Target(script) as first:
            client = self.client(self.daemon(first, "[server]\nwrite_timeout = 0.2\n"))
            client.request("POST", CHAT, {"model": "first", "messages": MESSAGES, "stream": True})
            client.head()
            first.wait_closed(first.asked[0].connection)


class AnsweredTogether(unittest.TestCase):
    """Two clients whose answers come in within one round of the loop."""

    def setUp(self) -> None:
        self.gate, self.go = threading.Event(), threading.Event()
        self.target = self.enterContext(Target(then=[self.gate, answer("openai", "hello")]))
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = Path(folder) / "log.jsonl"
        self.log = Log(str(self.path))
        self.addCleanup(self.log.close, LONG)
        self.daemon = self.enterContext(Daemon(chain(self.target.url), log=self.log))
        self.server = self.daemon._daemon._server
        self.addCleanup(self.go.set)
        self.clients = [self.enterContext(self.daemon.client()) for _ in range(2)]
        self.ask()
        wait_for(lambda: len(self.target.asked) == 2, "both requests")

    def ask(self) -> None:
        for client in self.clients:
            client.request("POST", CHAT, {"model": "first", "messages": MESSAGES})

    def in_one_round(self, meanwhile: Callable[[], object] = lambda: None) -> mock.Mock:
        """Both answers come in, and then what happens meanwhile, before the loop looks again. Gives what is called to
        hold something back."""
        backends = [entry.sock for entry in self.server.loop._entries.values() if entry.task is not None]
        return self.holding(self.gate.set, backends, meanwhile)

    def holding(
        self, begin: Callable[[], object], on: list[socket.socket], meanwhile: Callable[[], object] = lambda: None
    ) -> mock.Mock:
        is_held = threading.Event()

        def hold() -> None:
            is_held.set()
            self.go.wait(LONG)

        self.server.loop.post(hold)
        self.assertTrue(is_held.wait(LONG))
        begin()
        wait_for(lambda: len(select.select(on, [], [], 0)[0]) == 2, "what comes in twice")
        meanwhile()
        clients = {handler.connection.fileno() for handler in self.server._open}
        self.server.loop._poller = Last(self.server.loop._poller, clients)
        watched = mock.patch.object(self.server.loop, "hold_back", wraps=self.server.loop.hold_back)
        held_back = self.enterContext(watched)
        self.go.set()
        return held_back

    def leave(self) -> None:
        self.clients[1].close()
        at_daemon = [handler.connection for handler in self.server._open]
        wait_for(lambda: bool(select.select(at_daemon, [], [], 0)[0]), "the end of a client")

    def lines(self) -> list[tuple[int, str | None]]:
        wait_for(lambda: self.log.written == 2, "two lines in the log")
        lines = map(json.loads, self.path.read_text().splitlines())
        return [(line["status"], line["cancelled_in"]) for line in lines]

    def said(self) -> list[str]:
        return [client.response().json["choices"][0]["message"]["content"] for client in self.clients]

    def test_answers(self) -> None:
        """The first of both is held back for the other."""
        held_back = self.in_one_round()
        self.assertEqual(["hello", "hello"], self.said())
        ((_task, sock, _data),) = [call.args for call in held_back.call_args_list]
        self.assertIn(sock.getpeername()[1], [client.sock.getsockname()[1] for client in self.clients])

    def test_requests(self) -> None:
        """Likewise, and the connections go on."""
        self.gate.set()
        self.assertEqual(["hello", "hello"], self.said())
        at_daemon = [handler.connection for handler in self.server._open]
        held_back = self.holding(self.ask, at_daemon)
        self.assertEqual(["hello", "hello"], self.said())
        peers = [call.args[1].getpeername()[1] for call in held_back.call_args_list]
        self.assertIn(self.target.port, peers)

    def test_on_a_worker(self) -> None:
        """There nothing is held back, whatever the loop is about to do meanwhile."""

        def render() -> bytes:
            self.server.loop.holds_back = True
            return b"numbers"

        self.enterContext(mock.patch.object(self.daemon._daemon.metrics, "render", render))
        held_back = self.enterContext(mock.patch.object(self.server.loop, "hold_back"))
        with self.daemon.client() as client:
            self.assertEqual(b"numbers", client.call("GET", "/metrics").body)
        held_back.assert_not_called()

    def test_a_client_that_leaves_in_the_same_round(self) -> None:
        """Its answer is sent all the same: it is no client that left before it had one."""
        self.in_one_round(self.leave)
        self.assertEqual("hello", self.clients[0].response().json["choices"][0]["message"]["content"])
        self.assertEqual([(200, None)] * 2, self.lines())
        wait_for(lambda: self.daemon.connections == 1, "the end of its connection")

    def test_a_daemon_that_ends_in_the_same_round(self) -> None:
        """The answers that are there are sent, and not the word that it ends."""
        self.in_one_round(self.server.cut)
        self.assertEqual([200, 200], [client.response().status for client in self.clients])
        self.assertEqual([(200, None)] * 2, self.lines())


if __name__ == "__main__":
    unittest.main()
