"""One thread that runs many coroutines, each until it has to wait for a socket or for the time.

    start ──> runs on the loop's thread ──wait──> the loop polls ──> runs on ..
                      └──move──> runs on a worker thread, where every wait blocks ──come_back──> runs on ..

What tasks send by `Task.send` in one round of the loop goes out together, once all have had their turn: a peer
that is sent two things is woken once, and to wake it takes longer than to send.

A request needs no thread while it waits, and none while it works, unless it comes to something that can
only block: then its coroutine moves. What a coroutine waits for it says through its Task; who holds one
waits through a Watch (watch.py), which knows both ways. Knows no HTTP.

Only `post` and `stop` may be called from other threads.
"""

from __future__ import annotations

import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import TYPE_CHECKING, Any, Final, Protocol

from portway.errors import NoThread

if TYPE_CHECKING:
    from portway.workers import Workers

POLLIN: Final = 1  # as select.POLLIN and select.EPOLLIN on every system
POLLOUT: Final = 4
HANGUP: Final = getattr(select, "POLLRDHUP", 0)  # an end that is seen without reading; Linux alone has it
# things put off; who only asks for stored answers gives no moment of rest, and one of so many waits for all
# their lines: with 32 the slowest hundredth of hits took 0.47 ms, with 8 it takes 0.21
MAX_PUT_OFF = 8
TOGETHER = 16  # events of a round for which a send waits: what comes first in a long round is not to wait for all of it
REST = 0.001  # seconds without a task or an event after which what was put off is done
_NEVER = float("inf")
_MOVE = object()  # what a coroutine yields to be moved to a thread, or back; else it yields None


class Task:
    """Runs one coroutine after the other. busy: it has one. on_loop: the loop runs it, else a worker does.
    is_sending: it goes on within this round, and nothing must end its wait.

    moving, returning: called on the loop just before the coroutine goes to a worker, or goes on on the loop.
    ended: called on the loop when a coroutine has ended, but for one that ends within `start`.
    """

    __slots__ = (
        "_coroutine",
        "_count",
        "_error",
        "_loop",
        "_starting",
        "busy",
        "ended",
        "entry",
        "is_sending",
        "moving",
        "on_loop",
        "returning",
        "until",
    )

    def __init__(
        self,
        loop: Loop,
        *,
        moving: Callable[[], None],
        ended: Callable[[], None],
        returning: Callable[[], None] = lambda: None,
    ) -> None:
        self.busy = False
        self.on_loop = True
        self.is_sending = False
        self.until = _NEVER
        self.moving = moving
        self.returning = returning
        self.ended = ended
        self._loop = loop
        self._coroutine: Coroutine[Any, Any, None] | None = None
        self.entry: _Entry | None = None  # what it waits for; the loop's
        self._count = 0  # what the socket has taken, or said, of what was held back
        self._error: Exception | None = None
        self._starting = False

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it, at once and until it waits; afterwards `busy` says whether it does. Raises what it raises."""
        self._coroutine, self.busy, self.on_loop = work, True, True
        self._loop.tasks.add(self)
        self._starting = True
        try:
            self.wake(None)
        finally:
            self._starting = False

    # A generator that is awaited as a coroutine would be: whoever waits is resumed through every frame on the way.

    @coroutine
    def wait(self, sock: socket.socket | None, events: int, until: float) -> Generator[object, bool, bool]:
        """Until `sock` is ready: True; False once time.monotonic() passes `until`. sock: None = for the time alone."""
        self._loop.expect(self, sock, events, until)
        return (yield None)

    @coroutine
    def send(self, sock: socket.socket, data: bytes | memoryview) -> Generator[object, bool, int]:
        """sock.send(data), once those have had their turn who are awake in the same round. Only on the loop."""
        if not self._loop.holds_back:
            return sock.send(data)
        self._loop.hold_back(self, sock, data)
        yield None
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._count
        finally:
            del error  # whose traceback has this frame: a cycle, and the data in it

    @coroutine
    def move(self) -> Generator[object, bool, None]:
        """Go on, on a worker. Only on the loop. Raises NoThread, still on the loop, if there is none."""
        yield _MOVE

    @coroutine
    def come_back(self) -> Generator[object, bool, None]:
        """Go on, on the loop. Only on a worker."""
        yield _MOVE

    def let_go(self, sock: socket.socket) -> None:
        """Before a socket is closed that was waited for on the loop and will not be again."""
        self._loop.detach(sock)

    def throw(self, error: BaseException) -> None:
        """End its wait with `error`. Only while it waits on the loop."""
        self.wake(None, error)

    # of the loop

    def send_now(self, sock: socket.socket, data: bytes | memoryview) -> None:
        """Send what was held back, and keep what comes of it for `was_sent`."""
        try:
            self._count = sock.send(data)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is the matter of who sends
            self._error = exc

    def was_sent(self) -> None:
        """Go on behind what was held back."""
        self.is_sending = False
        self.wake(None)

    def wake(self, ready: bool | None, error: BaseException | None = None) -> None:
        """End its wait, and run it until the next one. ready: None = it waits for nothing that could be."""
        entry = self.entry
        if entry is not None:
            self.entry = None
            if entry.others:
                entry.drop(self)
            else:
                entry.task = None
        self.until = _NEVER
        work = self._coroutine
        assert work is not None  # noqa: S101 - for the type checker
        try:
            wanted = work.send(ready) if error is None else work.throw(error)
        except StopIteration:
            self._end(tell=not self._starting)
            return
        except BaseException:  # a mistake: whoever holds the task must not take it for one that goes on
            self._end(tell=not self._starting)
            raise
        if wanted is _MOVE:
            self._loop.tasks.discard(self)
            self.on_loop = False
            self.moving()
            try:
                self._loop.workers.submit(self._run_on_a_worker)
            except NoThread as exc:
                self._come_back(None, exc)

    def _run_on_a_worker(self) -> None:
        work = self._coroutine
        assert work is not None  # noqa: S101 - for the type checker
        after: Callable[[], None] = self._end_told
        try:
            work.send(True)  # its waits block from now on: it yields only to come back
            after = self._go_on
        except StopIteration:
            pass
        finally:
            self._loop.post(after)

    def _go_on(self) -> None:
        """On the loop again."""
        self._come_back(True)

    def _come_back(self, value: bool | None, error: BaseException | None = None) -> None:
        self.on_loop = True
        self._loop.tasks.add(self)
        try:
            self.returning()
        except OSError as exc:
            value, error = None, exc
        self.wake(value, error)

    def _end_told(self) -> None:
        self._end(tell=True)

    def _end(self, *, tell: bool) -> None:
        self._loop.tasks.discard(self)
        self._coroutine, self.busy = None, False
        if tell:
            self.ended()


class _Entry:
    """A registered descriptor: who is told of it. stirred: a client's, always; task: who waits for it now.
    others: further ones who do, for the same; each has its turn as long as there is something to be read:
    identical requests share one line (cache/flights.py). made_in: which round of the loop."""

    __slots__ = ("made_in", "mask", "others", "sock", "stirred", "task")

    def __init__(
        self, sock: socket.socket, mask: int, made_in: int, stirred: Callable[[int], None] | None = None
    ) -> None:
        self.sock = sock
        self.made_in = made_in
        self.mask = mask
        self.stirred = stirred
        self.task: Task | None = None
        self.others: tuple[Task, ...] = ()

    def drop(self, task: Task) -> None:
        """It waits no longer."""
        if self.task is not task:
            self.others = tuple(other for other in self.others if other is not task)
        elif self.others:
            self.task, *others = self.others
            self.others = tuple(others)
        else:
            self.task = None


class Loop:
    """See above. workers: where coroutines go that move.

    A descriptor stays registered between two waits for it, since a pooled connection is waited for again
    and again; one that stirs while nobody waits is let go then. `tasks` are those that run here.
    """

    def __init__(self, workers: Workers, poller: Poller | None = None) -> None:
        self.workers = workers
        self.tasks: set[Task] = set()
        self._poller = poller or _best_poller()
        self._entries: dict[int, _Entry] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._rounds = 0
        self._put_off: deque[Callable[[], None]] = deque()
        self.holds_back = False  # who sends now is not the last one awake in this round
        self._held_back: deque[tuple[Task, socket.socket, bytes | memoryview]] = deque()
        self._sent: deque[Task] = deque()  # who has sent, and does not know yet
        self._mouth, self._ear = socket.socketpair()
        self._mouth.setblocking(False)
        self._ear.setblocking(False)
        self._next = _NEVER  # no task's `until` is earlier
        self._stopping = False
        self._stopped = threading.Event()
        self.attach(self._ear, self._hear)

    # any thread

    def post(self, what: Callable[[], None]) -> None:
        """Have it called on the loop's thread, soon."""
        self._posted.append(what)
        self._ring()

    def _ring(self) -> None:
        try:
            self._mouth.send(b"\0")
        except OSError:
            return  # woken often enough already; or closed: the daemon has ended

    def stop(self, timeout: float) -> None:
        """End `run`, and wait for that."""
        self._stopping = True
        self.post(lambda: None)
        self._stopped.wait(timeout)

    # the loop's thread

    def run(self, sweep: Callable[[], None], every: float, report: Callable[[Exception], object]) -> None:
        """Until `stop`; `sweep` is called `every` so many seconds. What is called may raise nothing: if it does all
        the same, `report` is told, and the loop goes on, since all that is served hangs on it."""
        now = time.monotonic()
        due = now + every
        try:
            while not self._stopping:
                try:
                    now = self._round(now, due)
                    if now >= due:
                        due = now + every
                        sweep()
                except Exception as exc:  # noqa: BLE001 - reported
                    report(exc)
                    now = time.monotonic()
            self._send()
            self.catch_up()
        finally:
            self._stopped.set()

    def _round(self, now: float, until: float) -> float:
        """Wait, until then at most, and deal with what has happened. now: time.monotonic(); returns it anew."""
        self.holds_back = False
        if self._held_back or self._sent:
            self._send()  # what a mistake has left of the last round
        left = min(self._next, until, now + REST if self._put_off else until) - now
        ready = self._poller.poll(max(0.0, left))
        self._rounds += 1
        behind, waited = len(ready), 0
        for fd, events in ready:
            behind -= 1
            self.holds_back = behind > 0
            self._deal_with(fd, events)
            if self._held_back:
                waited += 1
                if not behind or waited >= TOGETHER:
                    waited = 0
                    self._send()
        now = time.monotonic()
        if now >= self._next:
            self._expire(now)
        if self._put_off and (self.tasks or not ready or len(self._put_off) >= MAX_PUT_OFF):
            self.catch_up()
        return now

    def _deal_with(self, fd: int, events: int) -> None:
        entry = self._entries.get(fd)
        if entry is None or entry.made_in == self._rounds:
            return  # closed by what came before it in this very round, and its number maybe another's already
        if entry.task is not None:
            entry.task.wake(True)
        elif entry.stirred is not None:
            entry.stirred(events)
        else:
            self._forget(fd)

    def hold_back(self, task: Task, sock: socket.socket, data: bytes | memoryview) -> None:
        """What `task` sends; it has to suspend next."""
        task.is_sending = True
        self._held_back.append((task, sock, data))

    def _send(self) -> None:
        """Send what was held back, and only then have its tasks go on: one that is told raises nothing, but if it
        does, the others have their turn in the next round."""
        while self._held_back:
            task, sock, data = self._held_back.popleft()
            task.send_now(sock, data)
            self._sent.append(task)
        while self._sent:
            self._sent.popleft().was_sent()

    def catch_up(self) -> None:
        """Do what was put off; what puts off more has its turn the next time."""
        for _ in range(len(self._put_off)):
            self._put_off.popleft()()

    def put_off(self, what: Callable[[], None]) -> None:
        """Have it called while the tasks that there are wait for others, or else after a moment of rest: what must
        be done, but not before an answer or the next request. When `run` has ended it is called at once, and where
        many have been put off it is called all the same."""
        if self._stopped.is_set():
            what()
        else:
            self._put_off.append(what)

    def attach(self, sock: socket.socket, stirred: Callable[[int], None], mask: int = POLLIN) -> None:
        """Call `stirred` with the events whenever something comes in, until `detach`."""
        fd = sock.fileno()
        self._register(fd, mask)
        self._entries[fd] = _Entry(sock, mask, self._rounds, stirred)

    def watch_for(self, sock: socket.socket, mask: int) -> None:
        """Look for other events on an attached socket."""
        entry = self._entries[sock.fileno()]
        if entry.mask != mask:
            self._poller.modify(sock.fileno(), mask)
            entry.mask = mask

    def detach(self, sock: socket.socket) -> None:
        """No more of it. To be called before it is closed; a socket that never was attached may be."""
        fd = sock.fileno()
        entry = self._entries.get(fd)
        if entry is not None and entry.sock is sock:
            self._forget(fd)

    def expect(self, task: Task, sock: socket.socket | None, events: int, until: float) -> None:
        """What `task` waits for; it has to suspend next."""
        entry = None
        if sock is not None:
            fd = sock.fileno()
            entry = self._entries.get(fd)
            if entry is None or entry.sock is not sock:  # new, or its number was another's, which is closed
                self._register(fd, events)
                entry = self._entries[fd] = _Entry(sock, events, self._rounds)
            elif entry.mask != events:
                self._poller.modify(fd, events)
                entry.mask = events
            if entry.task is None:
                entry.task = task
            else:
                entry.others += (task,)
        task.entry, task.until = entry, until
        self._next = min(self._next, until)

    def close(self) -> None:
        """After the end of `run`."""
        self._poller.close()
        self._mouth.close()
        self._ear.close()

    def _forget(self, fd: int) -> None:
        del self._entries[fd]
        try:
            self._poller.unregister(fd)
        except OSError:
            return  # another thread, whose connection it was last, has just closed it

    def _register(self, fd: int, mask: int) -> None:
        try:
            self._poller.register(fd, mask)
        except FileExistsError:
            self._poller.modify(fd, mask)

    def _expire(self, now: float) -> None:
        """Wake those whose time is over."""
        for task in [task for task in self.tasks if task.until <= now]:
            if task.until <= now:  # else one before it has woken or ended it
                task.wake(ready=False)
        self._next = min((task.until for task in self.tasks), default=_NEVER)

    def _hear(self, _events: int) -> None:
        try:
            self._ear.recv(4096)
        except OSError:
            return
        try:
            while self._posted:
                self._posted.popleft()()
        finally:
            if self._posted:  # behind one that has raised
                self._ring()


# --- what the system offers -----------------------------------------------------------------------


class Poller(Protocol):
    """What the loop needs of epoll or its like."""

    def register(self, fd: int, eventmask: int, /) -> None:
        """Look for these events. May raise FileExistsError if it does already."""
        ...

    def modify(self, fd: int, eventmask: int, /) -> None:
        """Look for others."""
        ...

    def unregister(self, fd: int, /) -> None:
        """Look no more."""
        ...

    def poll(self, timeout: float, /) -> list[tuple[int, int]]:
        """(descriptor, events) of those that are ready, for `timeout` seconds at most."""
        ...

    def close(self) -> None:
        """Let go of all."""
        ...


class SelectorPoller:
    """The standard library's selector, for systems without epoll. A mask of nothing is not looked at."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, eventmask: int, /) -> None:
        """See Poller.register."""
        if not eventmask & (POLLIN | POLLOUT):
            return
        try:
            self._selector.register(fd, _selected(eventmask))
        except KeyError as exc:
            raise FileExistsError from exc

    def modify(self, fd: int, eventmask: int, /) -> None:
        """See Poller.modify."""
        self.unregister(fd)
        self.register(fd, eventmask)

    def unregister(self, fd: int, /) -> None:
        """See Poller.unregister."""
        try:
            self._selector.unregister(fd)
        except KeyError:
            return

    def poll(self, timeout: float, /) -> list[tuple[int, int]]:
        """See Poller.poll."""
        return [(key.fd, _polled(events)) for key, events in self._selector.select(timeout)]

    def close(self) -> None:
        """See Poller.close."""
        self._selector.close()


def _best_poller() -> Poller:
    return select.epoll() if hasattr(select, "epoll") else SelectorPoller()


def _selected(mask: int) -> int:
    return (selectors.EVENT_READ if mask & POLLIN else 0) | (selectors.EVENT_WRITE if mask & POLLOUT else 0)


def _polled(events: int) -> int:
    return (POLLIN if events & selectors.EVENT_READ else 0) | (POLLOUT if events & selectors.EVENT_WRITE else 0)
