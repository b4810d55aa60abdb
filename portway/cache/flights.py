"""Single flight: identical requests at the same time run once.

The first to `join` a key is its `Leader` and runs the request; the others are `Waiter`s and get what
it publishes. A leader that fails makes way for one of the waiters; if that one fails too, the rest
share its failure. A leader whose client leaves goes on as long as anybody waits.

Waiting is by socket, so that a waiter goes on watching its own client. A flight with waiters has one
pair of sockets, the leader's end and the waiters' end. The leader closes its end to say "look again",
which all waiters see at once; the last waiter closes theirs, by which a leader without a client
learns that nobody waits any more. What is published is the caller's business.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from portway.errors import ClientGone, PortwayError

if TYPE_CHECKING:
    from portway.call import Watch

T = TypeVar("T")

# The leader's own client has left: it was seen, or it could not be written to. A backend's OSError never comes
# this far: backends/transport.py makes it a BackendError.
_LEFT = (ClientGone, OSError)

MAX_WAITERS = 128  # of one flight. Whoever comes on top runs alone
LOOK_EVERY = 1.0  # seconds; between two leaders there may be waiters but no line yet to hear them on
SUCCESSORS = 1  # failures in a row that lead to another try; the next one is everybody's


@dataclass(frozen=True, slots=True)
class Landed(Generic[T]):
    """The flight has brought an answer."""

    value: T


@dataclass(frozen=True, slots=True)
class Crashed:
    """The flight has failed for good, with this error."""

    error: BaseException


class _Apart:
    """The flight has brought nothing that could be shared."""


class Flights(Generic[T]):
    """The flights under way. One lock guards the table and each flight; nothing is waited for under it."""

    def __init__(self, max_waiters: int = MAX_WAITERS) -> None:
        self._max_waiters = max_waiters
        self._lock = threading.Lock()
        self._table: dict[bytes, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._table)

    def join(self, key: bytes) -> Leader[T] | Waiter[T]:
        """A place in the flight for `key`. Too many waiters already, or no socket left to wait on, is
        no reason to fail: then the caller leads a flight of its own."""
        with self._lock:
            flight = self._table.get(key)
            if flight is None:
                flight = self._table[key] = _Flight(self._lock, self._table, key)
                return Leader(flight)
            if not flight.has_leader:
                flight.has_leader = True
                return Leader(flight)
            line = flight.open_line() if flight.waiters < self._max_waiters else None
            if line is None:
                return Leader(_Flight(self._lock, {}, key))
            flight.waiters += 1
            joined = flight.joined
        if joined is not None:
            joined()
        return Waiter(flight, line)


class Leader(Generic[T]):
    """Runs the request, `with` this around it.

    An error that leaves the block is the flight's; one of _LEFT only means that this leader went: a
    waiter takes its place, and it does not count as a failure. gone: how its own client left while
    others waited; the block goes on without that client, and raises this at its end.
    """

    def __init__(self, flight: _Flight[T]) -> None:
        self.gone: Exception | None = None
        self._flight = flight
        self._ended = False

    def has_waiters(self) -> bool:
        """Whether anybody waits for what this leader does."""
        return not self._ended and self._flight.waiters > 0

    def when_joined(self, tell: Callable[[], None]) -> None:
        """Have `tell` called each time that one more waits; by any thread."""
        self._flight.joined = tell

    def watch(self, watch: Watch) -> Watch:
        """`watch`, but the client's leaving counts only once nobody else waits."""
        return _LeaderWatch(watch, self, self._flight)

    def client_left(self, error: Exception) -> None:
        """The leader's client has gone, as `error` says. Raises it, unless somebody else waits."""
        try:
            if not self.has_waiters():
                raise error
            self.gone = error.with_traceback(None)  # else it would hold this very frame
        finally:
            del error  # whose traceback has this frame: a cycle, and all of the answer in it

    def publish(self, value: T) -> None:
        """Give all waiters their answer. What the cache should have must be there before."""
        self._ended = True
        self._flight.end(Landed(value))

    def part(self) -> None:
        """What comes of this can't be shared: nobody is to wait for it any longer."""
        self._ended = True
        self._flight.end(_Apart())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not self._ended:
            self._ended = True
            if error is None and self.gone is None:
                self.part()
            else:
                counts = isinstance(error, Exception) and not isinstance(error, _LEFT)
                self._flight.fail(error if counts else None)
        if self.gone is not None and (error is None or isinstance(error, (PortwayError, *_LEFT))):
            raise self.gone  # a mistake of ours goes its own way, to stderr


class Waiter(Generic[T]):
    """Waits for what the leader does. `wait` is called once; a waiter that never waits must `leave`."""

    def __init__(self, flight: _Flight[T], line: _Line) -> None:
        self._flight = flight
        self._line: _Line | None = line

    async def wait(self, watch: Watch, until: float) -> Landed[T] | Crashed | Leader[T] | None:
        """What the flight came to; a Leader if this waiter now has to run it; None once
        time.monotonic() passes `until`. Raises ClientGone, as `watch` does."""
        try:
            while self._line is not None:
                if not await watch.readable(self._line.waiters_end, until):
                    return None
                line, self._line = self._line, None
                place = self._flight.look(line)
                if not isinstance(place, _Line):
                    return place
                self._line = place
            raise RuntimeError("a waiter waits once")
        finally:
            self.leave()

    def leave(self) -> None:
        """Wait no longer."""
        line, self._line = self._line, None
        if line is not None:
            self._flight.leave(line)


class _Line:
    """The sockets between one leader and its waiters. `waiting`: how many hold on to waiters_end."""

    __slots__ = ("leader_end", "waiters_end", "waiting")

    def __init__(self) -> None:
        self.leader_end, self.waiters_end = socket.socketpair()
        self.leader_end.setblocking(False)
        self.waiters_end.setblocking(False)
        self.waiting = 0


class _Flight(Generic[T]):
    """One key's state, guarded by the lock of all flights. Each method but open_line takes it; each
    decides under it which sockets have to be closed, and closes them outside."""

    def __init__(self, lock: threading.Lock, table: dict[bytes, _Flight[T]], key: bytes) -> None:
        self._lock = lock
        self._table = table
        self._key = key
        self._outcome: Landed[T] | Crashed | _Apart | None = None
        self._failures = 0
        self._line: _Line | None = None  # the present leader's
        self.has_leader = True
        self.joined: Callable[[], None] | None = None  # the present leader's wish
        self.waiters = 0

    def open_line(self) -> _Line | None:
        """The line to the present leader, for one more who waits. None if there is no descriptor left.
        Called under the lock: making a pair of sockets waits for nobody."""
        line = self._line
        if line is None:
            try:
                line = self._line = _Line()
            except OSError:
                return None
        line.waiting += 1
        return line

    def end(self, outcome: Landed[T] | _Apart) -> None:
        """It has come to this, for everybody."""
        with self._lock:
            self._outcome = outcome
            self.joined = None
            self._remove()
            line = self._take_line()
        self._hang_up(line)

    def fail(self, error: BaseException | None) -> None:
        """The leader is gone. `error`: why, if that counts as a failure."""
        with self._lock:
            self.has_leader = False
            self.joined = None
            if error is not None:
                self._failures += 1
                if self._failures > SUCCESSORS:
                    self._outcome = Crashed(error)
            if self._outcome is not None or not self.waiters:
                self._remove()
            line = self._take_line()
        self._hang_up(line)

    def look(self, line: _Line) -> Landed[T] | Crashed | Leader[T] | _Line:
        """What a waiter finds after its leader has hung up `line`: how it ended, that it leads now, or the
        line to the waiter that was quicker. Without a descriptor for that, or apart, it leads alone."""
        with self._lock:
            line.waiting -= 1
            following = self.open_line() if self._outcome is None and self.has_leader else None
            leads = self._outcome is None and not self.has_leader
            if leads:
                self.has_leader = True
            if following is None:
                self.waiters -= 1
            unused = self._is_unused(line)
        if unused:
            line.waiters_end.close()
        if following is not None:
            return following
        if leads:
            return Leader(self)
        if isinstance(self._outcome, Landed | Crashed):
            return self._outcome
        return Leader(_Flight(self._lock, {}, self._key))

    def leave(self, line: _Line) -> None:
        """A waiter goes. The last one tells the leader, or takes a flight without a leader along."""
        with self._lock:
            line.waiting -= 1
            self.waiters -= 1
            if not self.waiters and not self.has_leader:
                self._remove()
            last = not self.waiters
            unused = self._is_unused(line)
        if unused:
            line.waiters_end.close()
        elif last:
            _nudge(line.waiters_end)

    def leader_end(self) -> socket.socket | None:
        """Where the leader hears that the last waiter went; None if nobody waits on a line yet."""
        line = self._line
        return None if line is None else line.leader_end

    def _take_line(self) -> _Line | None:
        line, self._line = self._line, None
        return line

    def _is_unused(self, line: _Line) -> bool:
        return line.waiting == 0 and line is not self._line

    def _remove(self) -> None:
        if self._table.get(self._key) is self:
            del self._table[self._key]

    def _hang_up(self, line: _Line | None) -> None:
        """Wake who waits on it. The flight has let go of it, so nobody joins it any more."""
        if line is None:
            return
        line.leader_end.close()
        with self._lock:
            unused = line.waiting == 0
        if unused:
            line.waiters_end.close()


class _LeaderWatch:
    """A Watch (call.py) that outlives the leader's client while others wait."""

    def __init__(self, client: Watch, leader: Leader[Any], flight: _Flight[Any]) -> None:
        self._client = client
        self._leader = leader
        self._flight = flight

    @property
    def phase(self) -> str:
        return self._client.phase

    @phase.setter
    def phase(self, phase: str) -> None:
        if self._leader.gone is None:  # else the client's phase stays the one in which it left
            self._client.phase = phase

    async def readable(self, sock: socket.socket, until: float) -> bool:
        if self._leader.gone is None:
            try:
                return await self._client.readable(sock, until)
            except _LEFT as exc:
                self._leader.client_left(exc)
        return await self._wait(sock, select.POLLIN, until)

    async def writable(self, sock: socket.socket, until: float) -> bool:
        if self._leader.gone is None:
            try:
                return await self._client.writable(sock, until)
            except _LEFT as exc:
                self._leader.client_left(exc)
        return await self._wait(sock, select.POLLOUT, until)

    def send(self, sock: socket.socket, data: bytes | memoryview) -> Coroutine[Any, Any, int]:
        return self._client.send(sock, data)  # who sends is not disturbed; without a client it is on its worker

    async def pause(self, until: float) -> None:
        if self._leader.gone is None:
            try:
                return await self._client.pause(until)
            except _LEFT as exc:
                self._leader.client_left(exc)
        await self._wait(None, 0, until)
        return None

    async def on_thread(self, *, for_good: bool = False) -> None:
        await self._client.on_thread(for_good=for_good)

    async def on_loop(self) -> None:
        if self._leader.gone is None:  # else nobody on the loop looks at who waits
            await self._client.on_loop()

    async def _wait(self, sock: socket.socket | None, event: int, until: float) -> bool:
        await self.on_thread()
        while True:
            left = until - time.monotonic()
            poll = select.poll()
            if sock is not None:
                poll.register(sock, event)
            end = self._flight.leader_end()
            if end is not None:
                poll.register(end, select.POLLIN)
            ready = {handle for handle, _ in poll.poll(max(0.0, min(left, LOOK_EVERY)) * 1000)}
            if end is not None and end.fileno() in ready:
                _drain(end)
            if not self._flight.waiters:
                raise ClientGone
            if sock is not None and sock.fileno() in ready:
                return True
            if left <= 0:
                return False


def _nudge(sock: socket.socket) -> None:
    """One byte, if the other end is still there; more than one is no more news."""
    try:
        sock.send(b".")
    except OSError:
        return


def _drain(sock: socket.socket) -> None:
    try:
        sock.recv(4096)
    except OSError:
        return
