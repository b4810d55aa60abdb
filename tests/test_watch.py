"""watch.py: one wait that sees the backend, the client, the limit and the moment for a heartbeat."""

import os
import select
import socket
import struct
import threading
import time
import unittest
from collections.abc import Callable
from unittest import mock

from portway import watch
from portway.call import finish
from portway.errors import ClientGone
from portway.watch import ClientWatch, NoClient

LONG = 10.0  # seconds; nothing here takes so long
SHORT = 0.02  # seconds; a limit that passes


def later(seconds: float = LONG) -> float:
    return time.monotonic() + seconds


class WatchCase(unittest.TestCase):
    def setUp(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname())  # the client's own end
            self.ours, _ = listener.accept()
        self.backend, self.upstream = socket.socketpair()
        for sock in (self.client, self.ours, self.backend, self.upstream):
            self.addCleanup(sock.close)
        self.ahead = b""
        self.watch = ClientWatch(self.ours, self.read_ahead)

    def read_ahead(self) -> bool:
        data = self.ours.recv(100, socket.MSG_DONTWAIT)
        self.ahead += data
        return bool(data)

    def reset(self) -> None:
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()


class Waiting(WatchCase):
    def test_until_there_is_something(self):
        """readable() is True for bytes and for the end, writable() for room."""
        self.backend.send(b"x")
        self.assertTrue(finish(self.watch.readable(self.upstream, later())))
        self.upstream.recv(1)
        self.backend.close()
        self.assertTrue(finish(self.watch.readable(self.upstream, later())))
        self.assertTrue(finish(self.watch.writable(self.ours, later())))

    def test_until_the_time_is_over(self):
        """False, not sooner than that."""
        for wait in (self.watch.readable, NoClient().readable):
            until = later(SHORT)
            self.assertFalse(finish(wait(self.upstream, until)))
            self.assertGreaterEqual(time.monotonic(), until)

    def test_without_room(self):
        """writable() is False as long as nothing is read on the other side."""
        self.upstream.setblocking(False)
        with self.assertRaises(BlockingIOError):
            while True:
                self.upstream.send(bytes(65536))
        for wait in (self.watch.writable, NoClient().writable):
            self.assertFalse(finish(wait(self.upstream, later(SHORT))))

    def test_a_time_that_is_past(self):
        """Does not wait, but still sees what is there."""
        for wait in (self.watch.readable, NoClient().readable):
            started = time.monotonic()
            self.assertFalse(finish(wait(self.upstream, started - 5)))
            self.assertFalse(finish(wait(self.upstream, started)))
            self.assertLess(time.monotonic() - started, 1.0)
        self.backend.send(b"x")
        for wait in (self.watch.readable, NoClient().readable):
            self.assertTrue(finish(wait(self.upstream, time.monotonic() - 5)))

    def test_a_time_that_never_comes(self):
        """poll() takes 24 days at most; more is no error."""
        self.backend.send(b"x")
        for seconds in (1e9, 1e300):
            self.assertTrue(finish(self.watch.readable(self.upstream, later(seconds))))
            self.assertTrue(finish(NoClient().readable(self.upstream, later(seconds))))

    def test_the_rounding(self):
        """Up, so that the last fraction of a millisecond is slept through and not polled through."""
        milliseconds = [watch._milliseconds(s) for s in (-1.0, 0.0, 1e-9, 0.0005, 0.001, 0.0015, 1.0, 1e12)]
        self.assertEqual([0, 0, 1, 1, 2, 2, 1001, 2**31 - 1], milliseconds)

    def test_it_polls_twice_at_most_for_a_plain_wait(self):
        """No busy loop at the end of it."""
        polls = Polls(self.watch)
        finish(self.watch.readable(self.upstream, later(SHORT)))
        self.assertLessEqual(polls.count, 2)

    def test_a_pause(self):
        """Waits for the time alone; the upstream that was looked at before does not end it."""
        self.backend.send(b"x")
        self.assertTrue(finish(self.watch.readable(self.upstream, later())))
        polls = Polls(self.watch)
        for pause in (self.watch.pause, NoClient().pause):
            until = later(SHORT)
            finish(pause(until))
            self.assertGreaterEqual(time.monotonic(), until)
            finish(pause(until - 5))
        self.assertLessEqual(polls.count, 3)

    def test_the_time_spent_waiting_is_counted(self):
        """All of it, also where the wait ends with the client; a new request begins at nothing."""
        finish(self.watch.readable(self.upstream, later(SHORT)))
        self.assertGreaterEqual(self.watch.waited, SHORT)
        self.watch.begin(0.0, None)
        self.assertEqual(("waiting", 0.0), (self.watch.phase, self.watch.waited))
        leaving = threading.Timer(SHORT, self.client.close)
        leaving.start()
        with self.assertRaises(ClientGone):
            finish(self.watch.readable(self.upstream, later()))
        self.assertGreaterEqual(self.watch.waited, SHORT / 2)

    def test_one_upstream_after_the_other(self):
        """Also where the next one gets the number of the one before, closed meanwhile."""
        fresh: list[socket.socket] = []
        for _ in range(3):
            number = self.upstream.fileno()
            self.assertFalse(finish(self.watch.readable(self.upstream, later(0))))
            self.upstream.close()
            self.backend.close()
            self.backend, self.upstream = socket.socketpair()
            fresh += [self.backend, self.upstream]
            if number == self.upstream.fileno():
                self.assertFalse(finish(self.watch.readable(self.upstream, later(0))))
            self.backend.send(b"x")
            self.assertTrue(finish(self.watch.readable(self.upstream, later())))
            self.assertTrue(finish(self.watch.writable(self.upstream, later())))
            self.upstream.recv(1)
        for sock in fresh:
            sock.close()

    def test_the_same_number_on_another_socket(self):
        """dup2() puts a new socket where the old one was: it is the new one that is watched."""
        self.assertFalse(finish(self.watch.readable(self.upstream, later(0))))
        other, theirs = socket.socketpair()
        with other, theirs:
            os.dup2(other.fileno(), self.upstream.fileno())
            theirs.send(b"x")
            self.assertTrue(finish(self.watch.readable(self.upstream, later())))


class Polls:
    """Counts a ClientWatch's polls."""

    def __init__(self, of: ClientWatch) -> None:
        self.count = 0
        self._real = of._poll
        of._poll = self._poll  # type: ignore[method-assign]

    def _poll(self, sock: socket.socket | None, events: int, until: float) -> bool:
        self.count += 1
        return self._real(sock, events, until)


class Leaving(WatchCase):
    def leaves(self, leave: Callable[[], object], wait: Callable[[], object] | None = None) -> None:
        """`leave` ends the wait, whether it happened before or comes in the middle."""
        leave()
        with self.assertRaises(ClientGone):
            (wait or (lambda: finish(self.watch.readable(self.upstream, later()))))()

    def test_by_closing(self):
        """In every kind of wait."""
        self.leaves(self.client.close)
        self.leaves(lambda: None, lambda: finish(self.watch.pause(later())))
        self.leaves(lambda: self.upstream.setblocking(False))

    def test_by_half_closing(self):
        """A client that ended its side has left; the servers behind see it so too."""
        self.leaves(lambda: self.client.shutdown(socket.SHUT_WR))

    def test_by_a_reset(self):
        """ClientGone, not the OSError of a read: that would look like the backend's."""
        self.leaves(self.reset)

    def test_by_a_reset_behind_bytes(self):
        """The next request was on its way already."""
        self.client.send(b"GET")
        self.leaves(self.reset)

    def test_in_the_middle_of_a_wait(self):
        """At once."""
        for leave in (lambda: self.client.shutdown(socket.SHUT_WR), self.client.close):
            threading.Timer(SHORT, leave).start()
            started = time.monotonic()
            with self.assertRaises(ClientGone):
                finish(self.watch.readable(self.upstream, later()))
            self.assertLess(time.monotonic() - started, LONG / 2)

    def test_although_the_answer_is_there(self):
        """Nobody wants it any more."""
        self.backend.send(b"x")
        self.leaves(self.client.close)

    def test_without_pollrdhup(self):
        """macOS has none: the end shows as readable, and a reset as an error."""
        with mock.patch.object(watch, "HANGUP", 0):
            self.watch = ClientWatch(self.ours, self.read_ahead)
            self.client.send(b"GET")
            self.assertFalse(finish(self.watch.readable(self.upstream, later(SHORT))))
            self.assertEqual(b"GET", self.ahead)
            self.leaves(lambda: self.client.shutdown(socket.SHUT_WR))
            self.leaves(self.reset)

    def test_when_our_own_end_was_closed(self):
        """The daemon's end closes the clients' connections: their requests end."""
        self.leaves(self.ours.close)


class ReadingAhead(WatchCase):
    def test_the_next_request_is_taken(self):
        """It does not end the wait, and the end behind it does."""
        self.client.send(b"GET /")
        self.assertFalse(finish(self.watch.readable(self.upstream, later(SHORT))))
        self.assertEqual(b"GET /", self.ahead)
        self.client.send(b" HTTP/1.1")
        self.client.close()
        with self.assertRaises(ClientGone):
            finish(self.watch.readable(self.upstream, later()))
        self.assertEqual(b"GET / HTTP/1.1", self.ahead)

    def test_with_the_answer_at_the_same_time(self):
        """Both are seen."""
        self.client.send(b"GET")
        self.backend.send(b"x")
        self.assertTrue(finish(self.watch.readable(self.upstream, later())))

    def test_a_false_alarm(self):
        """A client that stirred without a byte is still there."""
        calls: list[int] = []

        def nothing() -> bool:
            calls.append(1)
            self.ours.recv(100)
            raise BlockingIOError

        self.watch = ClientWatch(self.ours, nothing)
        self.client.send(b"x")
        self.assertFalse(finish(self.watch.readable(self.upstream, later(SHORT))))
        self.assertEqual([1], calls)

    @unittest.skipUnless(hasattr(select, "POLLRDHUP"), "the end stands behind the unread bytes here")
    def test_enough_is_enough(self):
        """From then on bytes wait in the kernel, without a busy loop; the end is still seen."""
        self.watch.look_only_for_the_end()
        self.client.send(b"x" * 50)
        polls = Polls(self.watch)
        self.assertFalse(finish(self.watch.readable(self.upstream, later(SHORT))))
        self.assertEqual(b"", self.ahead)
        self.assertLessEqual(polls.count, 2)
        self.client.shutdown(socket.SHUT_WR)
        with self.assertRaises(ClientGone):
            finish(self.watch.readable(self.upstream, later()))

    def test_bytes_are_welcome_again(self):
        """With the next request."""
        self.watch.look_only_for_the_end()
        self.client.send(b"x")
        self.watch.look_for_all()
        finish(self.watch.readable(self.upstream, later(SHORT)))
        self.assertEqual(b"x", self.ahead)

    def test_enough_is_enough_without_pollrdhup(self):
        """Nothing is looked for, and that is no busy loop either."""
        with mock.patch.object(watch, "HANGUP", 0):
            self.watch = ClientWatch(self.ours, self.read_ahead)
            self.watch.look_only_for_the_end()
            self.client.send(b"x")
            polls = Polls(self.watch)
            self.assertFalse(finish(self.watch.readable(self.upstream, later(SHORT))))
            self.assertLessEqual(polls.count, 2)


class Clock:
    """time.monotonic(), and a poll that lets the time pass. ready_at: when what is waited for comes."""

    def __init__(self, test: unittest.TestCase, of: ClientWatch) -> None:
        self.now = 1000.0
        of._poll = self._poll  # type: ignore[method-assign, assignment]
        patch = mock.patch("time.monotonic", side_effect=lambda: self.now)
        patch.start()
        test.addCleanup(patch.stop)
        self.ready_at: float | None = None

    def _poll(self, _sock: socket.socket | None, _events: int, until: float) -> bool:
        if self.ready_at is not None and self.ready_at <= max(self.now, until):
            self.now = max(self.now, self.ready_at)
            self.ready_at = None
            return True
        self.now = max(self.now, until)
        return False


class Heartbeats(WatchCase):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock(self, self.watch)
        self.beats: list[float] = []

    async def beat(self) -> None:
        self.beats.append(round(self.clock.now - 1000.0, 1))

    def test_at_the_right_moments(self):
        """Each interval of silence, until the limit; and a limit that falls on a beat comes first."""
        self.watch.begin(15.0, self.beat)
        self.assertFalse(finish(self.watch.readable(self.upstream, 1050.0)))
        self.assertEqual([15.0, 30.0, 45.0], self.beats)
        self.watch.begin(5.0, self.beat)
        self.assertFalse(finish(self.watch.readable(self.upstream, self.clock.now + 5.0)))
        self.assertEqual(3, len(self.beats))

    def test_across_waits(self):
        """What counts is the client's silence, not the length of one wait."""
        self.watch.begin(10.0, self.beat)
        for until in (1004.0, 1008.0, 1012.0, 1016.0):
            finish(self.watch.readable(self.upstream, until))
        self.assertEqual([10.0], self.beats)

    def test_after_something_was_sent(self):
        """The silence begins anew."""
        self.watch.begin(10.0, self.beat)
        finish(self.watch.readable(self.upstream, 1008.0))
        self.watch.heard()
        finish(self.watch.pause(1020.0))
        self.assertEqual([18.0], self.beats)

    def test_not_when_the_answer_is_there(self):
        """An overdue beat would only send the headers too early."""
        self.watch.begin(10.0, self.beat)
        self.clock.now = 1015.0
        self.clock.ready_at = 1015.0
        self.assertTrue(finish(self.watch.readable(self.upstream, 1050.0)))
        self.assertEqual([], self.beats)

    def test_none_without_an_interval(self):
        """A plain answer has no place for them."""
        self.watch.begin(0.0, None)
        self.assertFalse(finish(self.watch.readable(self.upstream, 1100.0)))
        self.assertEqual([], self.beats)

    def test_one_that_takes_its_time(self):
        """A client that reads slowly delays its beat: the limit stays where it is."""

        async def slow() -> None:
            await self.beat()
            self.clock.now += 8.0

        self.watch.begin(10.0, slow)
        self.assertFalse(finish(self.watch.readable(self.upstream, 1020.0)))
        self.assertEqual([10.0], self.beats)
        self.assertLess(self.clock.now, 1021.0)

    def test_one_that_fails(self):
        """The client left: the beat says so."""

        async def gone() -> None:
            raise ClientGone

        self.watch.begin(10.0, gone)
        with self.assertRaises(ClientGone):
            finish(self.watch.readable(self.upstream, 1050.0))
        self.assertAlmostEqual(10.0, self.watch.waited, places=1)


if __name__ == "__main__":
    unittest.main()
