"""Waiting for a backend without losing sight of the client."""

from __future__ import annotations

import select
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from portway.errors import ClientGone, Stopping
from portway.loop import HANGUP, POLLIN, POLLOUT

if TYPE_CHECKING:
    import socket

    from portway.loop import Task

_LONGEST = 2**31 - 1  # milliseconds that poll() takes at most: 24 days


class ClientWatch:
    """The Watch (call.py) of one client connection.

    On the loop the client is looked at all the time, and what it does comes by `client_stirred`; on a
    worker a wait is one poll() on the client and on what is waited for. phase: what is being waited for,
    for the log. waited: seconds spent waiting, so that the rest of a request's time is known to be our own.
    """

    def __init__(self, client: socket.socket, read_ahead: Callable[[], bool], task: Task | None = None) -> None:
        self.phase = "waiting"
        self.waited = 0.0
        self._client = client
        self._read_ahead = read_ahead  # takes the client's bytes; False once it has ended its side
        self._task = task  # None: all waits block
        self._mask = POLLIN  # what is looked for at the client while a worker waits
        self.is_sated = False  # enough was read ahead
        self._beat: Callable[[], Awaitable[None]] | None = None
        self._every = 0.0
        self._beat_at = 0.0
        self.is_stopping = False  # see `stop`
        self._stays = False  # on its worker, to the end of the request

    def stop(self) -> None:
        """The daemon ends: the wait that sees the client's end next raises Stopping. Any thread."""
        self.is_stopping = True

    def begin(self, every: float, beat: Callable[[], Awaitable[None]] | None) -> None:
        """A new request: call `beat` whenever the client has heard nothing for `every` seconds."""
        self.phase, self.waited, self._stays = "waiting", 0.0, False
        self._beat, self._every = beat, every
        if beat is not None:
            self.heard()

    def heard(self) -> None:
        """Something was sent to the client."""
        self._beat_at = time.monotonic() + self._every

    def readable(self, sock: socket.socket, until: float) -> Coroutine[Any, Any, bool]:
        """See Watch.readable."""
        return self._wait(sock, POLLIN, until)

    def writable(self, sock: socket.socket, until: float) -> Coroutine[Any, Any, bool]:
        """See Watch.writable."""
        return self._wait(sock, POLLOUT, until)

    def send(self, sock: socket.socket, data: bytes | memoryview) -> Coroutine[Any, Any, int]:
        """See Watch.send."""
        return self._task.send(sock, data) if self._task is not None and self._task.on_loop else _sent(sock, data)

    async def pause(self, until: float) -> None:
        """See Watch.pause."""
        await self._wait(None, 0, until)

    async def on_thread(self, *, for_good: bool = False) -> None:
        """See Watch.on_thread."""
        self._stays = self._stays or for_good
        if self._task is not None and self._task.on_loop:
            await self._task.move()

    async def on_loop(self) -> None:
        """See Watch.on_loop."""
        if self._task is not None and not self._task.on_loop and not self._stays:
            await self._task.come_back()

    async def client_writable(self, until: float) -> bool:
        """Wait until the client takes more, without a word to it meanwhile; False once it is `until`."""
        if self._task is not None and self._task.on_loop:
            # as another descriptor: the client's own is looked at for what it sends
            twin = self._client.dup()
            try:
                return await self._task.wait(twin, POLLOUT, until)
            finally:
                self._task.let_go(twin)
                twin.close()
        return self._poll(self._client, POLLOUT, until)

    def look_only_for_the_end(self) -> None:
        """Enough was read ahead: from now on only a hang-up is looked for. Where there is no POLLRDHUP it
        is not seen before something is written: it stands behind the bytes that are left unread."""
        self._mask, self.is_sated = HANGUP, True

    def look_for_all(self) -> None:
        """Bytes are welcome again."""
        self._mask, self.is_sated = POLLIN, False

    def client_stirred(self, what: int) -> None:
        """Bytes are the next request, sent ahead; an end, also of one direction only, is a client that
        left: raises ClientGone, or Stopping if it was us who ended it."""
        if self.is_stopping:
            raise Stopping
        if not what & POLLIN:
            raise ClientGone
        try:
            is_there = self._read_ahead()
        except BlockingIOError:
            return  # a false alarm
        except OSError as exc:  # else its reset would look like the backend's
            raise ClientGone from exc
        if not is_there:
            raise ClientGone

    async def _wait(self, sock: socket.socket | None, events: int, until: float) -> bool:
        task = self._task
        started = time.monotonic()
        try:
            while True:
                wake = until if self._beat is None or until < self._beat_at else self._beat_at
                if task is not None and task.on_loop:
                    ready = await task.wait(sock, events, wake)
                else:
                    ready = self._poll(sock, events, wake)
                if ready:
                    return True
                now = time.monotonic()
                if now >= until:
                    return False
                if self._beat is not None and now >= self._beat_at:
                    await self._beat()
                    self.heard()
        finally:
            self.waited += time.monotonic() - started

    def _poll(self, sock: socket.socket | None, events: int, until: float) -> bool:
        """One blocking wait, on a worker; also ends early, with False, when the client has sent something."""
        poller = select.poll()
        fd = -1
        client = self._client.fileno()
        if client < 0:
            raise ClientGone  # closed under our hands: the daemon ends, and did not wait for us
        if sock is self._client:
            poller.register(client, events)
            return bool(poller.poll(_milliseconds(until - time.monotonic())))
        poller.register(client, self._mask)
        if sock is not None:
            fd = sock.fileno()
            poller.register(fd, events)
        ready = dict(poller.poll(_milliseconds(until - time.monotonic())))
        if client in ready:
            self.client_stirred(ready[client])
        return fd in ready


class NoClient:
    """A Watch where no client waits: the daemon's own questions to a backend. Its waits block."""

    phase = "waiting"

    async def readable(self, sock: socket.socket, until: float) -> bool:
        """See Watch.readable."""
        return _ready(sock, POLLIN, until)

    async def writable(self, sock: socket.socket, until: float) -> bool:
        """See Watch.writable."""
        return _ready(sock, POLLOUT, until)

    def send(self, sock: socket.socket, data: bytes | memoryview) -> Coroutine[Any, Any, int]:
        """See Watch.send."""
        return _sent(sock, data)

    async def pause(self, until: float) -> None:
        """See Watch.pause."""
        time.sleep(max(0.0, until - time.monotonic()))

    async def on_thread(self, *, for_good: bool = False) -> None:
        """See Watch.on_thread."""

    async def on_loop(self) -> None:
        """See Watch.on_loop."""


async def _sent(sock: socket.socket, data: bytes | memoryview) -> int:
    return sock.send(data)


def _ready(sock: socket.socket, events: int, until: float) -> bool:
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(_milliseconds(until - time.monotonic())))


def _milliseconds(seconds: float) -> int:
    """For poll(): rounded up, so that it never returns too early, over and over, at the end of a wait."""
    return min(int(seconds * 1000) + 1, _LONGEST) if seconds > 0 else 0
