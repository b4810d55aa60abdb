"""Waiting for a backend without losing sight of the client."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from portway.errors import ClientGone

if TYPE_CHECKING:
    import socket

_HANGUP = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere the end shows as readable


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
        self._poll.register(self._client_fd, select.POLLIN | _HANGUP)
        self._beat: Callable[[], None] | None = None
        self._every = 0.0
        self._beat_at = 0.0

    def begin(self, every: float, beat: Callable[[], None] | None) -> None:
        """A new request: call `beat` whenever the client has heard nothing for `every` seconds."""
        self.phase, self.waited = "waiting", 0.0
        self._beat, self._every = beat, every
        self.heard()

    def heard(self) -> None:
        """Something was sent to the client."""
        self._beat_at = time.monotonic() + self._every

    def readable(self, sock: socket.socket, until: float) -> bool:
        return self._wait(sock.fileno(), select.POLLIN, until)

    def writable(self, sock: socket.socket, until: float) -> bool:
        return self._wait(sock.fileno(), select.POLLOUT, until)

    def pause(self, until: float) -> None:
        self._wait(-1, 0, until)

    def _wait(self, fd: int, events: int, until: float) -> bool:
        if fd != self._fd or events != self._events:
            self._turn_to(fd, events)
        started = now = time.monotonic()
        while True:
            wake = min(until, self._beat_at) if self._beat else until
            ready = self._poll.poll(max(0, int((wake - now) * 1000) + 1) if wake > now else 0)
            now = time.monotonic()
            done = False
            for ready_fd, what in ready:
                if ready_fd == fd:
                    done = True
                else:
                    self._client_stirred(what)
            if done or now >= until:
                self.waited += now - started
                return done
            if self._beat and now >= self._beat_at:
                self._beat()
                self.heard()

    def _turn_to(self, fd: int, events: int) -> None:
        if self._fd >= 0:
            self._poll.unregister(self._fd)
        if fd >= 0:
            self._poll.register(fd, events)
        self._fd, self._events = fd, events

    def _client_stirred(self, what: int) -> None:
        """Bytes are the next request, sent ahead; an end, also of one direction only, is a client that left."""
        if what & select.POLLIN and self._read_ahead():
            return
        if what & (select.POLLIN | select.POLLERR | select.POLLHUP | select.POLLNVAL | _HANGUP):
            raise ClientGone

    def look_only_for_the_end(self) -> None:
        """Enough was read ahead: from now on only a hang-up is looked for."""
        self._poll.modify(self._client_fd, _HANGUP)

    def look_for_all(self) -> None:
        self._poll.modify(self._client_fd, select.POLLIN | _HANGUP)


class NoClient:
    """A Watch where no client waits: the daemon's own questions to a backend."""

    phase = "waiting"

    def readable(self, sock: socket.socket, until: float) -> bool:
        return _ready(sock, select.POLLIN, until)

    def writable(self, sock: socket.socket, until: float) -> bool:
        return _ready(sock, select.POLLOUT, until)

    def pause(self, until: float) -> None:
        time.sleep(max(0.0, until - time.monotonic()))


def _ready(sock: socket.socket, events: int, until: float) -> bool:
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(max(0, int((until - time.monotonic()) * 1000) + 1)))
