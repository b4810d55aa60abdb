"""The answers cache as the daemon uses it: look-ups that never wait, and one thread that writes.

Beside the request path, never in it: `get` costs one SELECT at most, `put` an entry in a queue, and
neither raises. What the file refuses (locked, full, read-only, corrupt, newer) becomes `problem`;
until it works again there is simply no cache. What an answer looks like is replay.py's, which
request may use the cache rules.py's, and the file file.py's.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from portway import stderr
from portway.cache.file import CacheFile, Counts, Readers, Row, Stats, Unusable, describe, is_corrupt, set_aside
from portway.wire.events import WireError

LIFETIME = 30 * 86_400.0  # seconds
MAX_SIZE = 512 * 1024 * 1024  # bytes of the file
MAX_WAITING = 512  # answers that may wait for the writer ...
MAX_WAITING_BYTES = 32 * 1024 * 1024  # ... and their bytes; what comes on top is dropped and counted
GATHER = 0.05  # seconds the writer lets answers gather; a kill -9 costs what came in the meantime ...
BATCH = 256  # ... unless there are so many
SHARE = 0.1  # of one processor, which the writer takes at most; a flood fills the queue, and its rest is dropped
MAX_USED = 10_000  # keys whose use is remembered until the next write
NOTES_DELAY = 5.0  # seconds after which uses and counts are written when no answer is
LOOK_EVERY = 15.0  # seconds between two looks whether the file is still there and not turned off; `off` promises 30
EXPIRE_EVERY = 600.0  # seconds
EXPIRE_STEP = 0.05  # seconds between two steps of one expiry, so that it never hogs the processor
SLOW = 0.5  # seconds of one look-up; a disk that needs them is left alone for RETRY_AT_MOST
RETRY_AFTER = 1.0  # seconds until a file that could not be used is tried again; doubled up to ...
RETRY_AT_MOST = 30.0
WRITE_PATIENCE = 2.0  # seconds the writer waits for another process's transaction
LARGEST_SHARE = 8  # an answer may take this part of the file at most
OFF_SUFFIX = ".off"  # `portway cache off` makes this file beside the cache's


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored answer. document: see replay.py. served_by: the logical model. stored_at: time.time().
    warning: X-Portway-Warning's value, or ""."""

    document: bytes
    served_by: str
    stored_at: float
    warning: str = ""

    def age(self) -> float:
        """Seconds since it was stored."""
        return max(0.0, time.time() - self.stored_at)


class TurnedOff(Unusable):
    """`portway cache off`."""

    def __str__(self) -> str:
        return "is turned off; `portway cache on` turns it on"


class _TooSlow(OSError):
    """A look-up kept a request waiting. Not raised: the writer is told."""


# Makes the document that is stored, or None if the answer is not to be kept. Raises WireError.
MakeDocument = Callable[[], bytes | None]


class _Waiting:
    """An answer that is not written yet. Its document is made by whoever needs it first: mostly the
    writer, so that no request pays for it."""

    __slots__ = ("_document", "_make", "_model", "_stored_at", "_warning", "size")

    def __init__(self, make: MakeDocument, model: str, size: int, warning: str) -> None:
        self.size = size
        self._make: MakeDocument | None = make
        self._model = model
        self._stored_at = time.time()
        self._warning = warning
        self._document: bytes | None = None

    def entry(self) -> Entry | None:
        """As `get` gives it; None if the answer is not to be kept."""
        document = self.document()
        return None if document is None else Entry(document, self._model, self._stored_at, self._warning)

    def row(self, key: bytes) -> Row | None:
        """As the file has it; likewise."""
        document = self.document()
        return None if document is None else Row(key, self._model, self._stored_at, self._warning, document)

    def document(self) -> bytes | None:
        """Likewise. Two threads may both make it: they make the same."""
        make = self._make
        if make is not None:
            self._document = _made(make)
            self._make = None
        return self._document


def _made(make: MakeDocument) -> bytes | None:
    try:
        return make()
    except WireError:
        return None


@dataclass(slots=True)
class _Work:
    """What the writer takes along at once."""

    answers: dict[bytes, _Waiting]
    used: set[bytes]
    counts: dict[str, Counts]


class Cache:
    """Stored answers by request key. Make one, `close` it at the end; all else may be called by any thread.

    path: the SQLite file. max_size: bytes it may have in use. lifetime: seconds after which entries
    are deleted. say: told once of each problem, and of its end; default a line on stderr.
    """

    def __init__(
        self,
        path: str,
        max_size: int = MAX_SIZE,
        lifetime: float = LIFETIME,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.path = os.path.abspath(path)
        self._max_size = max_size
        self._lifetime = lifetime
        self._say = say or stderr.say
        self.notice = ""  # what has happened to the file though it works now; "" = nothing
        self._lock = threading.Lock()  # guards everything down to the blank line; held for microseconds only
        self._changed = threading.Condition(self._lock)
        self._answers: dict[bytes, _Waiting] = {}
        self._bytes = 0  # of the answers that wait
        self._gathered_at = 0.0  # time.monotonic() until when more answers are waited for
        self._used: set[bytes] = set()
        self._counts: dict[str, Counts] = {}
        self._notes_due: float | None = None  # time.monotonic(); None = nothing noted
        self._puts = 0
        self._dropped = 0
        self._busy = True  # the writer is at work, or has not begun
        self._idle = False  # the writer waits for an answer, and has to be told of one
        self._hurry = False  # somebody waits for what there is to be written
        self._closing = False
        self._accepts = True
        self._readers: Readers | None = None  # None = the file can't be used now
        self._read_error: sqlite3.Error | _TooSlow | None = None  # for the writer to look into
        self._problem = ""
        self._is_off = False

        self._file: CacheFile | None = None  # this and the rest belong to the writer
        self._failures = 0  # in a row
        self._retry_at = 0.0
        self._rests_until = 0.0  # time.monotonic() before which the writer would take more than its share
        self._expire_at = 0.0
        self._look_at = 0.0
        self._writer = threading.Thread(target=self._run, name="portway-cache", daemon=True)
        self._writer.start()

    # on the request path

    @property
    def problem(self) -> str:
        """Why there is no cache now, in a sentence; "" = there is one."""
        return self._problem

    @property
    def is_off(self) -> bool:
        """Whether `portway cache off` has turned it off."""
        return self._is_off

    @property
    def puts(self) -> int:
        """How many answers were handed in. As long as it stands still, what was a miss is one."""
        return self._puts

    @property
    def dropped(self) -> int:
        """How many answers were not stored because the writer was too far behind."""
        return self._dropped

    def limit(self, max_size: int, lifetime: float) -> None:
        """Go by other bounds from the next write on."""
        with self._changed:
            self._max_size, self._lifetime = max_size, lifetime
            self._expire_at = 0.0
            self._changed.notify_all()

    def get(self, key: bytes, model: str, max_age: float | None = None, *, count: bool = True) -> Entry | None:
        """The entry, if there is one that is no older than max_age seconds (None = any age).

        model: the logical name that was asked for, under which the look-up is counted. count: False = the
        caller does that.
        """
        entry = self._waiting_entry(key) or self._stored_entry(key)
        if entry is not None and max_age is not None and entry.age() > max_age:
            entry = None
        if count:
            self.count(key, model, hit=entry is not None)
        return entry

    def count(self, key: bytes, model: str, *, hit: bool) -> None:
        """Count a look-up, as `get` does it by itself: for who learns only later whether it was a hit."""
        with self._lock:  # which is _changed's, too, without two calls of Python
            if self._readers is None:
                return
            counts = self._counts.get(model) or self._counts.setdefault(model, Counts())
            if hit:
                counts.hits += 1
                if len(self._used) < MAX_USED:
                    self._used.add(key)
            else:
                counts.misses += 1
            if self._notes_due is None:
                self._notes_due = time.monotonic() + NOTES_DELAY
                self._changed.notify_all()

    def put(self, key: bytes, make: MakeDocument, *, model: str, size: int, warning: str = "") -> None:
        """Hand an answer in: `get` finds it at once, the file has it soon after.

        make: gives its document, mostly on the writer's thread (see replay.clean_plain and
        clean_stream). model: who answered. size: bytes that `make` holds on to.
        """
        waiting = _Waiting(make, model, size, warning)
        with self._lock:
            self._puts += 1
            before = self._answers.get(key)
            total = self._bytes + size - (before.size if before else 0)
            full = len(self._answers) >= MAX_WAITING or total > MAX_WAITING_BYTES
            if full or not self._accepts or size > self._max_size // LARGEST_SHARE:
                self._dropped += 1
                return
            if not self._answers:
                self._gathered_at = time.monotonic() + GATHER
            self._answers[key] = waiting
            self._bytes = total
            if self._idle or len(self._answers) == BATCH:
                self._idle = False
                self._changed.notify_all()

    def _waiting_entry(self, key: bytes) -> Entry | None:
        waiting = self._answers.get(key)  # no lock: one look at a dict
        return waiting.entry() if waiting is not None else None

    def _stored_entry(self, key: bytes) -> Entry | None:
        readers = self._readers
        if readers is None:
            return None
        began = time.monotonic()
        try:
            found = readers.find(key)
        except sqlite3.Error as exc:
            self._reading_failed(readers, exc)
            return None
        except zlib.error:  # this one is damaged; the answer that follows the miss will replace it
            return None
        if (took := time.monotonic() - began) > SLOW:
            self._reading_failed(readers, _TooSlow(errno.ETIMEDOUT, f"a look-up took {took:.1f} s"))
        if found is None:
            return None
        return Entry(found.document, found.model, found.stored_at, found.warning)

    def _reading_failed(self, readers: Readers, error: sqlite3.Error | _TooSlow) -> None:
        """No more look-ups until the writer has looked at the file."""
        with self._changed:
            if self._readers is readers:  # else the writer has closed it in the meantime
                self._readers = None
                self._read_error = error
                self._notes_due = time.monotonic()
                self._changed.notify_all()
        readers.close()

    # for the commands, the tests and the end

    def stats(self) -> Stats | None:
        """What the file holds, up to a few seconds ago; None if it can't be read now."""
        if self._readers is None:
            return None
        try:
            with closing(CacheFile(self.path, WRITE_PATIENCE)) as file:
                return file.stats()
        except (sqlite3.Error, OSError, Unusable):
            return None

    def purge(self, model: str | None = None, older_than: float | None = None) -> int:
        """Delete all entries, or those of `model`, or those older than that many seconds. Returns how
        many. Raises sqlite3.Error, OSError, Unusable."""
        self.flush(WRITE_PATIENCE)
        with closing(CacheFile(self.path, WRITE_PATIENCE)) as file:
            return file.purge(model, None if older_than is None else time.time() - older_than)

    def flush(self, timeout: float) -> bool:
        """Wait until everything handed in so far is in the file, or known to be unfit; False after
        `timeout` seconds."""
        with self._changed:
            self._notes_due = time.monotonic()
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(self._is_idle, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, as far as the file lets it within `timeout` seconds, and end."""
        with self._changed:
            self._closing = True
            self._accepts = False
            self._changed.notify_all()
        self._writer.join(timeout)

    def _is_idle(self) -> bool:
        return not self._answers and self._notes_due is None and not self._busy

    # the writer's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._work()
        finally:
            self._stop()

    def _wait(self) -> bool:
        """Until there is something to do; False = nothing any more."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            while not self._closing and (left := self._due() - time.monotonic()) > 0:
                self._idle = not self._answers
                self._changed.wait(left)
            self._busy, self._idle = True, False
            can_write = self._file is not None or not self._failures
            return not self._closing or (can_write and bool(self._answers or self._used or self._counts))

    def _due(self) -> float:
        """time.monotonic() at which there is something to do."""
        if self._file is None:
            return self._retry_at
        if self._hurry:
            return 0.0
        due = min(self._expire_at, self._look_at)
        if self._notes_due is not None:
            due = min(due, self._notes_due)
        if self._answers:
            due = 0.0 if len(self._answers) >= BATCH else min(due, self._gathered_at)
        return max(due, self._rests_until)

    def _work(self) -> None:
        """One go at everything there is to do. After a failure all of it is there for the next one."""
        begun, busy = time.monotonic(), time.thread_time()
        work = self._take()
        self._look_at = time.monotonic() + LOOK_EVERY
        try:
            file = self._opened()
            rows = (row for key, waiting in work.answers.items() if (row := waiting.row(key)))
            if work.answers or work.used or work.counts:
                file.write(rows, work.used, work.counts, self._max_size)
            self._expire(file)
        except (sqlite3.Error, OSError, Unusable) as exc:
            self._give_back(work)
            self._failed(exc)
        else:
            self._succeeded(work)
        self._rests_until = begun + (time.thread_time() - busy) / SHARE

    def _take(self) -> _Work:
        """The answers stay where `get` finds them until they are written."""
        with self._changed:
            work = _Work(dict(self._answers), self._used, self._counts)
            self._used, self._counts, self._notes_due, self._hurry = set(), {}, None, False
            return work

    def _give_back(self, work: _Work) -> None:
        with self._changed:
            self._used |= work.used
            for model, counts in work.counts.items():
                self._counts.setdefault(model, Counts()).add(counts)
            if self._used or self._counts:
                self._notes_due = time.monotonic() + NOTES_DELAY

    def _opened(self) -> CacheFile:
        error, self._read_error = self._read_error, None
        if error is not None:
            raise error
        if os.path.exists(self.path + OFF_SUFFIX):
            raise TurnedOff
        if self._file is not None and not self._file.is_in_place():
            self._shut()
        if self._file is None:
            self._file = CacheFile(self.path, WRITE_PATIENCE)
        return self._file

    def _expire(self, file: CacheFile) -> None:
        now = time.monotonic()
        if now >= self._expire_at:
            more = file.expire(time.time() - self._lifetime)
            self._expire_at = now + (EXPIRE_STEP if more else EXPIRE_EVERY)

    def _succeeded(self, work: _Work) -> None:
        with self._changed:
            for key, waiting in work.answers.items():
                if self._answers.get(key) is waiting:
                    del self._answers[key]
                    self._bytes -= waiting.size
            if self._readers is None:
                self._readers = Readers(self.path)
            self._accepts = not self._closing
            recovered, self._problem = self._problem, ""
            self._is_off = False
        self._failures = 0
        if recovered:
            self._say("the cache works again")

    def _failed(self, error: Exception) -> None:
        self._shut()
        if is_corrupt(error) and self._set_aside():
            return
        rest = RETRY_AT_MOST if isinstance(error, _TooSlow) else RETRY_AFTER * 2.0 ** min(self._failures, 16)
        self._retry_at = time.monotonic() + min(rest, RETRY_AT_MOST)
        self._failures += 1
        before, problem = self._problem, f"the cache's file {self.path} {describe(error)}"
        with self._changed:
            self._problem = problem
            self._is_off = isinstance(error, TurnedOff)
            if isinstance(error, Unusable):
                self._forget()
        if problem != before:
            self._say(problem)

    def _set_aside(self) -> bool:
        """A corrupt file makes room for a new one, begun at once. False if it can't be moved."""
        try:
            kept = set_aside(self.path)
        except OSError:
            return False
        self.notice = f"the cache's file {self.path} was corrupt; it is kept as {kept}, and a new one begun"
        self._say(self.notice)
        return True

    def _forget(self) -> None:
        """Nothing that waits will ever be written. Called under the lock."""
        self._accepts = False
        self._answers.clear()
        self._used.clear()
        self._counts.clear()
        self._bytes = 0
        self._notes_due = None

    def _shut(self) -> None:
        with self._changed:
            readers, self._readers = self._readers, None
        if readers is not None:
            readers.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _stop(self) -> None:
        """The thread ends: at close(), or by a mistake in Portway, whose traceback goes to stderr."""
        self._shut()
        with self._changed:
            if not self._closing:
                self._problem = "the cache has stopped; stderr says why"
            self._forget()
            self._busy = False
            self._changed.notify_all()
