"""A bounded pool of threads that ends the ones it has no work for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

IDLE = 60.0  # seconds after which a thread without work ends


class Workers:
    """Runs jobs on at most `limit` threads; more jobs wait their turn.

    `_idle` counts threads that wait for a job and are not promised to one yet. The lock guards
    `_count`, the number of threads; nothing is waited for under it.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._count = 0

    @property
    def are_short(self) -> bool:
        """Whether jobs wait because every thread is busy: nobody should hold one without need."""
        return self._count >= self._limit and not self._jobs.empty()

    @property
    def waiting(self) -> int:
        """Jobs that no thread has taken yet."""
        return self._jobs.qsize()

    @property
    def count(self) -> int:
        """Threads alive."""
        return self._count

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` on a thread of the pool. It must not raise."""
        self._jobs.put(job)
        if self._idle.acquire(blocking=False):
            return
        with self._lock:
            if self._count >= self._limit:
                return
            self._count += 1
            number = self._count
        threading.Thread(target=self._run, name=f"portway-{self._name}-{number}", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                self._idle.release()
                try:
                    job = self._jobs.get(timeout=IDLE)
                except Empty:
                    if self._idle.acquire(blocking=False):
                        break  # nobody was promised this thread
                    job = self._jobs.get()  # somebody was: the job is there, or about to be
            job()
        with self._lock:
            self._count -= 1


class InFlight:
    """Counts the requests under way. The condition guards `count`."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self.count -= 1
            if not self.count:
                self._changed.notify_all()

    def wait_for_none(self, timeout: float) -> bool:
        """Until the last one has ended, for `timeout` seconds at most; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.count, timeout)
