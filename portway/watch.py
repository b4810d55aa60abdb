"""Waiting for a backend without losing sight of the client."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from portway.errors import ClientGone, Stopping

if TYPE_CHECKING:
    import socket

_HANGUP = getattr(select, "POLLRDHUP", 0)  # an end that is seen without reading; Linux alone has it
_LONGEST = 2**31 - 1  # milliseconds that poll() takes at most: 24 days


class ClientWatch:
    """The Watch (call.py) of one client connection: a poll() on the client and on what is waited for.

    phase: what is being waited for, for the log. waited: seconds spent waiting, so that the rest of
    a request's time is known to be our own.
    """

    def __init__(self, client: socket.socket, read_ahead: Callable[[], bool]) -> None:
        self.phase = "waiting"
        self.waited = 0.0
        self._read_ahead = read_ahead  # takes the client's bytes; False once it has ended its side
        self._client_fd = client.fileno()
        self._fd = -1
        self._events = 0
        self._poll = select.poll()
        self._poll.register(self._client_fd, select.POLLIN)
        self._beat: Callable[[], None] | None = None
        self._every = 0.0
        self._beat_at = 0.0
        self._stopping = False

    def stop(self) -> None:
        """The daemon ends: the wait that sees the client's end next raises Stopping. Any thread."""
        self._stopping = True

    def begin(self, every: float, beat: Callable[[], None] | None) -> None:
        """A new request: call `beat` whenever the client has heard nothing for `every` seconds."""
        self.phase, self.waited = "waiting", 0.0
        self._beat, self._every = beat, every
        self.heard()

    def heard(self) -> None:
        """Something was sent to the client."""
        self._beat_at = time.monotonic() + self._every

    def readable(self, sock: socket.socket, until: float) -> bool:
        """See Watch.readable."""
        return self._wait(sock.fileno(), select.POLLIN, until)

    def writable(self, sock: socket.socket, until: float) -> bool:
        """See Watch.writable."""
        return self._wait(sock.fileno(), select.POLLOUT, until)

    def pause(self, until: float) -> None:
        """See Watch.pause."""
        self._wait(-1, 0, until)

    def look_only_for_the_end(self) -> None:
        """Enough was read ahead: from now on only a hang-up is looked for. Where there is no POLLRDHUP it
        is not seen before something is written: it stands behind the bytes that are left unread."""
        self._poll.modify(self._client_fd, _HANGUP)

    def look_for_all(self) -> None:
        """Bytes are welcome again."""
        self._poll.modify(self._client_fd, select.POLLIN)

    def _wait(self, fd: int, events: int, until: float) -> bool:
        if fd != self._fd or events != self._events:
            self._turn_to(fd, events)
        started = now = time.monotonic()
        try:
            while True:
                wake = min(until, self._beat_at) if self._beat else until
                ready = self._poll.poll(_milliseconds(wake - now))
                now = time.monotonic()
                if self._sees(ready, fd):
                    return True
                if now >= until:
                    return False
                if self._beat and now >= self._beat_at:
                    self._beat()
                    self.heard()
                    now = time.monotonic()
        finally:
            self.waited += time.monotonic() - started

    def _turn_to(self, fd: int, events: int) -> None:
        if self._fd >= 0:
            self._poll.unregister(self._fd)
        if fd >= 0:
            self._poll.register(fd, events)
        self._fd, self._events = fd, events

    def _sees(self, ready: list[tuple[int, int]], fd: int) -> bool:
        """Whether `fd` is among those that are ready. Raises ClientGone if the client is, for good."""
        found = False
        for ready_fd, what in ready:
            if ready_fd == fd:
                found = True
            else:
                self._client_stirred(what)
        return found

    def _client_stirred(self, what: int) -> None:
        """Bytes are the next request, sent ahead; an end, also of one direction only, is a client that left."""
        if self._stopping:
            raise Stopping
        if not what & select.POLLIN:
            raise ClientGone
        try:
            is_there = self._read_ahead()
        except BlockingIOError:
            return  # a false alarm
        except OSError as exc:  # else its reset would look like the backend's
            raise ClientGone from exc
        if not is_there:
            raise ClientGone


class NoClient:
    """A Watch where no client waits: the daemon's own questions to a backend."""

    phase = "waiting"

    def readable(self, sock: socket.socket, until: float) -> bool:
        """See Watch.readable."""
        return _ready(sock, select.POLLIN, until)

    def writable(self, sock: socket.socket, until: float) -> bool:
        """See Watch.writable."""
        return _ready(sock, select.POLLOUT, until)

    def pause(self, until: float) -> None:
        """See Watch.pause."""
        time.sleep(max(0.0, until - time.monotonic()))


def _ready(sock: socket.socket, events: int, until: float) -> bool:
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(_milliseconds(until - time.monotonic())))


def _milliseconds(seconds: float) -> int:
    """For poll(): rounded up, so that it never returns too early, over and over, at the end of a wait."""
    return min(int(seconds * 1000) + 1, _LONGEST) if seconds > 0 else 0
