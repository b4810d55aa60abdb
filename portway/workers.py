"""A bounded pool of threads that ends the ones it has no work for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from portway.errors import NoThread

IDLE = 60.0  # seconds after which a thread without work ends


class Workers:
    """Runs jobs on at most `limit` threads; more jobs wait their turn.

    `_spare` is how many threads ask for a job less how many jobs are in the queue: below zero, jobs
    wait; above, threads. Which thread then gets which job does not matter. The lock guards it and
    `_count`, the number of threads, and jobs are put under it; nothing is waited for under it.
    """

    def __init__(self, limit: int, name: str, *, idle: float = IDLE) -> None:
        self._limit = limit
        self._name = name
        self._idle = idle
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._spare = 0
        self._count = 0

    @property
    def are_short(self) -> bool:
        """Whether jobs wait because every thread is busy: nobody should hold one without need."""
        return self._spare < 0

    @property
    def waiting(self) -> int:
        """Jobs that no thread has taken yet."""
        return max(0, -self._spare)

    @property
    def count(self) -> int:
        """Threads alive."""
        return self._count

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` on a thread of the pool. What it raises ends its thread, with a trace on stderr, and
        harms no other job. Raises NoThread where there is none, nor can be."""
        with self._lock:
            self._jobs.put(job)
            self._spare -= 1
            is_needed = self._add()
        if is_needed and not self._start() and self._withdraw():
            raise NoThread

    def _withdraw(self) -> bool:
        """Take back a job that no thread would ever take; whether there was one."""
        with self._lock:
            if self._count:
                return False  # it waits for one of those
            try:
                self._jobs.get_nowait()
            except Empty:
                return False
            self._spare += 1
            return True

    def _add(self) -> bool:
        """Under the lock: count one thread more, if jobs wait and there may be one; whether."""
        if self._spare >= 0 or self._count >= self._limit:
            return False
        self._count += 1
        self._spare += 1
        return True

    def _start(self) -> bool:
        try:
            threading.Thread(target=self._run, name=f"portway-{self._name}", daemon=True).start()
        except RuntimeError:  # the system has no thread left
            with self._lock:
                self._count -= 1
                self._spare -= 1
            return False
        return True

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                job()
                del job  # while it waits for the next one, nothing of this one is held
                with self._lock:
                    self._spare += 1
        finally:
            with self._lock:
                self._count -= 1
                is_needed = self._add()
            if is_needed:
                self._start()

    def _next(self) -> Callable[[], None] | None:
        """The next job; None if there was none for long enough."""
        try:
            return self._jobs.get(timeout=self._idle)
        except Empty:
            with self._lock:
                self._spare -= 1
            return None  # a job that came at this very moment gets another thread


class InFlight:
    """Counts the requests under way. Only the loop's thread counts; any thread may read, or wait for none."""

    def __init__(self) -> None:
        self.count = 0
        self._none: threading.Event | None = None  # to be told of it: somebody waits for none

    def begin(self) -> None:
        """One more."""
        self.count += 1

    def end(self) -> None:
        """One less."""
        self.count -= 1
        if not self.count and self._none is not None:
            self._none.set()

    def wait_for_none(self, timeout: float) -> bool:
        """Until the last one has ended, for `timeout` seconds at most; whether it has."""
        self._none = none = threading.Event()  # before the count is looked at: its end may come in between
        return not self.count or none.wait(timeout)
