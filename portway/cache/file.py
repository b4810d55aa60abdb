"""The cache's SQLite file: its schema, its rights, and what can be done to it.

One `CacheFile` is one connection with one owner at a time: the daemon's writer thread, or
`portway cache`. `Readers` are the connections for looking up. Errors of SQLite and of the operating
system pass through; `describe` puts them into words. Nothing here knows threads' business,
requests or HTTP.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple, TypeVar

T = TypeVar("T")

APPLICATION_ID = 0x50575943  # "PWYC": how a file says that it is this cache and nobody else's data
WAL_LIMIT = 16 * 1024 * 1024  # bytes that the -wal file keeps after a checkpoint
PAGE = 8192  # bytes; with 4096 the file is a fifth larger, as few answers fill such a page well
PAGE_CACHE = 256  # KB a connection; the operating system's cache is the real one
AGAIN = 0.002  # seconds between two tries where SQLite itself does not wait
READ_PATIENCE = 0.005  # seconds; whoever looks up would sooner ask the model than wait
IDLE_READERS = 8  # look-ups take microseconds: more are seldom under way at once
COMPRESS_FROM = 2048  # bytes; below it half of so little is not worth the 10 us that every look-up would pay
# bytes after which a write() leaves the rest as it is: under a flood time is dearer than room
COMPRESS_AT_ONCE = 65_536
ROW_OVERHEAD = 160  # bytes that a row takes beside its document, with its share of the indexes
STEP = 256  # rows deleted at once, so that no transaction of ours keeps others waiting for long


class Unusable(Exception):
    """The file is not to be used, and waiting will not change that. str() follows "the cache's file"."""


class Row(NamedTuple):
    """What is kept of an answer. stored_at: time.time(). warning: X-Portway-Warning's value, or ""."""

    key: bytes
    model: str
    stored_at: float
    warning: str
    document: bytes


class Stored(NamedTuple):
    """What a look-up gives of a Row."""

    model: str
    stored_at: float
    warning: str
    document: bytes


@dataclass(slots=True)
class Counts:
    """What happened to one model's entries since the file was made, or last purged whole."""

    hits: int = 0
    misses: int = 0
    stores: int = 0
    evictions: int = 0

    def add(self, other: Counts) -> None:
        """Take another's counts in."""
        self.hits += other.hits
        self.misses += other.misses
        self.stores += other.stores
        self.evictions += other.evictions

    @property
    def hit_rate(self) -> float | None:
        """0.0 to 1.0; None if nothing was looked up."""
        looked_up = self.hits + self.misses
        return self.hits / looked_up if looked_up else None


@dataclass(frozen=True, slots=True)
class ModelStats:
    """One model's share. size: bytes of its documents as they are stored."""

    entries: int
    size: int
    counts: Counts


@dataclass(frozen=True, slots=True)
class Stats:
    """The whole file. size: bytes on disk, the -wal file included. oldest: time.time(), None if empty."""

    models: Mapping[str, ModelStats]
    size: int
    oldest: float | None

    @property
    def entries(self) -> int:
        """All models' together."""
        return sum(model.entries for model in self.models.values())

    @property
    def counts(self) -> Counts:
        """All models' together."""
        total = Counts()
        for model in self.models.values():
            total.add(model.counts)
        return total


def default_path(environ: Mapping[str, str]) -> str:
    """${XDG_CACHE_HOME:-~/.cache}/portway/cache.sqlite3."""
    base = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # unset, empty or relative: to be ignored, says the XDG specification
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".cache")
    return os.path.join(base, "portway", "cache.sqlite3")


# --- schema ---------------------------------------------------------------------------------------


def m001_answers(db: sqlite3.Connection) -> None:
    """Answers by the first 8 bytes of their key, so that a look-up is one walk down one tree; and what
    each model has, kept by triggers, so that it is right whoever writes and needs no counting."""
    db.execute(
        "CREATE TABLE answers (id INTEGER PRIMARY KEY, key BLOB NOT NULL, model TEXT NOT NULL, size INTEGER NOT NULL,"
        " stored_at REAL NOT NULL, used_at REAL NOT NULL, warning TEXT NOT NULL, packed INTEGER NOT NULL,"
        " document BLOB NOT NULL)"
    )
    db.execute("CREATE INDEX answers_stored ON answers (stored_at)")
    db.execute("CREATE INDEX answers_used ON answers (used_at)")
    db.execute(
        "CREATE TABLE models (name TEXT PRIMARY KEY, entries INTEGER NOT NULL DEFAULT 0, size INTEGER NOT NULL"
        " DEFAULT 0, hits INTEGER NOT NULL DEFAULT 0, misses INTEGER NOT NULL DEFAULT 0, stores INTEGER NOT NULL"
        " DEFAULT 0, evictions INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID"
    )
    db.execute(
        "CREATE TRIGGER answers_added AFTER INSERT ON answers BEGIN"
        " INSERT INTO models (name, entries, size) VALUES (new.model, 1, new.size) ON CONFLICT (name)"
        " DO UPDATE SET entries = entries + 1, size = size + excluded.size; END"
    )
    db.execute(
        "CREATE TRIGGER answers_removed AFTER DELETE ON answers BEGIN"
        " UPDATE models SET entries = entries - 1, size = size - old.size WHERE name = old.model; END"
    )


def m002_as_they_come(db: sqlite3.Connection) -> None:
    """Answers one behind the other, found by a narrow index. By their keys each lay on a page of its own, and to
    store one cost 8 KB, twice; now a batch shares its pages. What was there goes: keys have another form since.
    Only what goes is counted by a trigger, whoever deletes; what comes, write() counts by the batch."""
    db.execute("DROP TABLE answers")
    db.execute("UPDATE models SET entries = 0, size = 0")
    db.execute(
        "CREATE TABLE answers (id INTEGER PRIMARY KEY, hash INTEGER NOT NULL, key BLOB NOT NULL, model TEXT NOT NULL,"
        " size INTEGER NOT NULL, stored_at REAL NOT NULL, used_at REAL NOT NULL, warning TEXT NOT NULL, packed INTEGER"
        " NOT NULL, document BLOB NOT NULL)"
    )
    db.execute("CREATE UNIQUE INDEX answers_hash ON answers (hash)")
    db.execute("CREATE INDEX answers_stored ON answers (stored_at)")
    db.execute("CREATE INDEX answers_used ON answers (used_at)")
    db.execute(
        "CREATE TRIGGER answers_removed AFTER DELETE ON answers BEGIN"
        " INSERT INTO models (name, entries, size) VALUES (old.model, -1, -old.size) ON CONFLICT (name)"
        " DO UPDATE SET entries = entries - 1, size = size - old.size; END"
    )


# PRAGMA user_version counts them
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (m001_answers, m002_as_they_come)

# Each step of a statement gives the interpreter away and has to get it back, so that many rows go into one; but
# to make them must not hold up who answers: 16 take 0.2 ms.
_ROWS_AT_ONCE = (16, 4, 1)
_COLUMNS = "hash, key, model, size, stored_at, used_at, warning, packed, document"
_PLACES = f"({', '.join('?' * 9)})"
_INSERT = {
    count: f"INSERT OR REPLACE INTO answers ({_COLUMNS}) VALUES {', '.join([_PLACES] * count)}"  # noqa: S608
    for count in _ROWS_AT_ONCE
}
_USED = {
    count: f"UPDATE answers SET used_at = max(used_at, ?) WHERE hash IN ({', '.join('?' * count)})"  # noqa: S608
    for count in _ROWS_AT_ONCE
}
_COUNT = (
    "INSERT INTO models (name, entries, size, hits, misses, stores, evictions) VALUES (?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (name) DO UPDATE SET entries = entries + excluded.entries, size = size + excluded.size,"
    " hits = hits + excluded.hits, misses = misses + excluded.misses, stores = stores + excluded.stores,"
    " evictions = evictions + excluded.evictions"
)
_BYTES_USED = (
    "SELECT page_size * (page_count - freelist_count) FROM pragma_page_size, pragma_page_count, pragma_freelist_count"
)
_EVICTED = "SELECT model, count(*) FROM (SELECT model FROM answers ORDER BY used_at LIMIT ?) GROUP BY model"
_EVICT = "DELETE FROM answers WHERE id IN (SELECT id FROM answers ORDER BY used_at LIMIT ?)"
_SELECT = "SELECT model, stored_at, warning, packed, document FROM answers WHERE hash = ? AND key = ?"


# --- writing --------------------------------------------------------------------------------------


class CacheFile:
    """The file, open for writing. patience: seconds to wait for another process's transaction.

    Makes the file (0600) and its folder (0700) if need be. Raises Unusable, sqlite3.Error, OSError.
    """

    def __init__(self, path: str, patience: float) -> None:
        _make_private(path)
        self._path = path
        self._db = _connect(path, patience)
        try:
            _prepare(self._db, patience)
            self._db.execute("PRAGMA recursive_triggers = ON")  # a row that is replaced is counted as one that goes
            self._inode = os.stat(path).st_ino
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the connection; what was written is in the file."""
        self._db.close()

    def is_in_place(self) -> bool:
        """Whether the path still leads to this file: it may have been removed, which is a fine way to purge."""
        try:
            return os.stat(self._path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def write(
        self,
        rows: Iterable[Row] = (),
        used: Iterable[bytes] = (),
        counts: Mapping[str, Counts] | None = None,
        max_size: int | None = None,
    ) -> None:
        """All of it in one transaction, or none of it. Rows replace those with their keys.

        used: keys that were looked up since the last time. max_size: bytes that the file may have in
        use; the least recently used rows make room.
        """
        totals = {model: replace(each) for model, each in (counts or {}).items()}
        came: dict[str, list[int]] = {}  # model -> sizes
        with _transaction(self._db) as db:
            for hashes in _portions(map(_hash, used)):
                db.execute(_USED[len(hashes)], (time.time(), *hashes))
            for values in _portions(_values(rows)):
                for _, _, model, size, *_ in values:
                    came.setdefault(model, []).append(size)
                db.execute(_INSERT[len(values)], tuple(chain.from_iterable(values)))
            if max_size is not None:
                for model, count in self._evict(max_size).items():
                    totals.setdefault(model, Counts()).evictions += count
            for name in totals.keys() | came.keys():
                each, sizes = totals.get(name, Counts()), came.get(name, [])
                counted = (each.hits, each.misses, each.stores + len(sizes), each.evictions)
                db.execute(_COUNT, (name, len(sizes), sum(sizes), *counted))

    def purge(self, model: str | None = None, before: float | None = None) -> int:
        """Delete all rows, or those of `model`, or those stored before then (time.time()). Returns how
        many, and gives their room back to the disk. All rows: the counts begin anew, too."""
        conditions = ["model = ?"] * (model is not None) + ["stored_at < ?"] * (before is not None)
        values = [value for value in (model, before) if value is not None]
        query = f"SELECT id FROM answers WHERE {' AND '.join(conditions) or '1'}"  # noqa: S608 - fixed texts
        found = self._db.execute(query, values).fetchall()
        for start in range(0, len(found), STEP):
            with _transaction(self._db) as db:
                db.executemany("DELETE FROM answers WHERE id = ?", found[start : start + STEP])
        if not values:
            self._db.execute("DELETE FROM models WHERE entries = 0")
        self._db.executescript("PRAGMA incremental_vacuum")  # execute() would give back one page only
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return len(found)

    def expire(self, before: float) -> int:
        """Delete up to STEP rows stored before then, and give some room back to the disk if much is
        free. Returns how many rows."""
        query = "DELETE FROM answers WHERE id IN (SELECT id FROM answers WHERE stored_at < ? LIMIT ?)"
        with _transaction(self._db) as db:
            count = db.execute(query, (before, STEP)).rowcount
        if _pragma(self._db, "freelist_count") * 4 > _pragma(self._db, "page_count"):
            self._db.executescript(f"PRAGMA incremental_vacuum({STEP})")
        return count

    def stats(self) -> Stats:
        """What the file holds, without reading its rows."""
        query = "SELECT name, entries, size, hits, misses, stores, evictions FROM models ORDER BY name"
        rows = self._db.execute(query)
        models = {name: ModelStats(entries, size, Counts(*rest)) for name, entries, size, *rest in rows}
        (oldest,) = self._db.execute("SELECT min(stored_at) FROM answers").fetchone()
        return Stats(models, _size_of(self._path) + _size_of(self._path + "-wal"), oldest)

    def _evict(self, allowed: int) -> dict[str, int]:
        """Delete the least recently used rows until no more than `allowed` bytes are in use: as many as
        that takes on an average, and again, as a page is free once it is empty. Returns model -> rows."""
        evicted: dict[str, int] = {}
        while (over := self._used() - max(0, allowed)) > 0:
            entries, size = self._db.execute("SELECT sum(entries), sum(size) FROM models").fetchone()
            count = min(STEP, over // (size // entries + ROW_OVERHEAD) + 1) if entries else STEP
            for model, rows in self._db.execute(_EVICTED, (count,)):
                evicted[model] = evicted.get(model, 0) + rows
            if not self._db.execute(_EVICT, (count,)).rowcount:
                break
        return evicted

    def _used(self) -> int:
        """Bytes of the pages in use; no page is read for it."""
        (used,) = self._db.execute(_BYTES_USED).fetchone()
        return int(used)


_Values = tuple[int, bytes, str, int, float, float, str, bool, bytes]  # of a row, as _INSERT takes them


def _values(rows: Iterable[Row]) -> Iterator[_Values]:
    """The documents compressed, as long as that does not take too long."""
    left = COMPRESS_AT_ONCE
    for key, model, stored_at, warning, document in rows:
        kept, packed = document, False
        if left > 0 and len(document) >= COMPRESS_FROM:
            left -= len(document)
            packed, kept = _pack(document)
        yield _hash(key), key, model, len(kept), stored_at, stored_at, warning, packed, kept


def _portions(things: Iterable[T]) -> Iterator[Sequence[T]]:
    """All of them, as many at once as there is a statement for."""
    most, *fewer = _ROWS_AT_ONCE
    things = iter(things)
    while len(portion := tuple(islice(things, most))) == most:
        yield portion
    for count in fewer:
        while len(portion) >= count:
            yield portion[:count]
            portion = portion[count:]


class _transaction:  # noqa: N801 - used as a keyword would be
    """BEGIN IMMEDIATE to COMMIT; ROLLBACK after an error."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:  # after a full disk or an I/O error SQLite has rolled back by itself
                self._db.execute("ROLLBACK")


def _make_private(path: str) -> None:
    """The file with rights for its owner alone; SQLite gives the -wal and -shm files the same."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):  # one that is there already may be anybody's, and stays as it is
        os.makedirs(folder, mode=0o700, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(handle).st_mode & 0o077:
            os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


def _prepare(db: sqlite3.Connection, patience: float) -> None:
    """Check that the file is ours, or make it so. The pragmas before WAL count for a new file only."""
    version = _pragma(db, "user_version")
    if version > len(MIGRATIONS):
        known = len(MIGRATIONS)
        raise Unusable(f"was written by a newer Portway (format {version}; this one knows {known}) and is left alone")
    is_empty = _pragma(db, "schema_version") == 0
    if not is_empty and _pragma(db, "application_id") != APPLICATION_ID:
        raise Unusable("is a database of another program and is left alone")
    if is_empty:
        db.execute(f"PRAGMA page_size = {PAGE}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _write_ahead(db, patience)
    # what is purged must not stay readable; from the start, as pages keep copies of what was moved between them
    db.execute("PRAGMA secure_delete = ON").fetchone()
    db.execute("PRAGMA synchronous = NORMAL")  # in WAL mode: a crash loses nothing, a power cut the last moments
    db.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}").fetchone()
    if version < len(MIGRATIONS):
        with _transaction(db):
            for migrate in MIGRATIONS[_pragma(db, "user_version") :]:  # asked again: another may have been first
                migrate(db)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _write_ahead(db: sqlite3.Connection, patience: float) -> None:
    """WAL mode. Of several who open a new file at once SQLite turns some away without waiting, as it does for
    no other statement: so it is tried again."""
    until = time.monotonic() + patience
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as exc:
            if _code(exc) != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
            time.sleep(AGAIN)
        else:
            return


# --- looking up -----------------------------------------------------------------------------------


class Readers:
    """Connections for looking up, as many as are used at once. Threads come and go, so a connection
    belongs to a look-up, not to a thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()  # guards the two below
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    def find(self, key: bytes) -> Stored | None:
        """The answer under `key`. Raises sqlite3.Error; zlib.error if it is damaged."""
        with self._lock:
            db = self._idle.pop() if self._idle else None
        if db is None:
            db = _connect(self._path, READ_PATIENCE)
        try:
            row = db.execute(_SELECT, (_hash(key), key)).fetchone()
        except BaseException:
            db.close()
            raise
        self._put_back(db)
        if row is None:
            return None
        model, stored_at, warning, packed, document = row
        return Stored(model, stored_at, warning, zlib.decompress(document) if packed else document)

    def close(self) -> None:
        """Close all connections; one that is in use is closed after its look-up."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for db in idle:
            db.close()

    def _put_back(self, db: sqlite3.Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < IDLE_READERS:
                self._idle.append(db)
                return
        db.close()


# --- what has gone wrong --------------------------------------------------------------------------


def is_corrupt(error: Exception) -> bool:
    """Whether the file's content is at fault, so that waiting will not help."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def describe(error: Exception) -> str:
    """The error in words that follow "the cache's file"."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, OSError):
        return f"can't be used: {error.strerror or type(error).__name__}"
    words = {
        sqlite3.SQLITE_BUSY: "is locked by another process",
        sqlite3.SQLITE_LOCKED: "is locked by another process",
        sqlite3.SQLITE_FULL: "can't grow: the disk is full",
        sqlite3.SQLITE_READONLY: "can't be written: it is read-only",
        sqlite3.SQLITE_CANTOPEN: "can't be opened",
        sqlite3.SQLITE_IOERR: "can't be written or read: disk I/O error (is the disk full?)",
    }
    return words.get(_code(error), f"can't be used: {error}")


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 = none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def set_aside(path: str) -> str:
    """Rename a corrupt file and what belongs to it, and keep them. Returns the new name. Raises OSError."""
    moved = f"{path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
    os.rename(path, moved)
    for suffix in ("-wal", "-shm"):
        if os.path.exists(path + suffix):
            os.rename(path + suffix, moved + suffix)
    return moved


def aside(path: str) -> list[str]:
    """The files that were set aside and are still there."""
    folder, name = os.path.split(path)
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(os.path.join(folder, other) for other in names if other.startswith(name + ".corrupt-"))


# --- small parts ----------------------------------------------------------------------------------


def _connect(path: str, patience: float) -> sqlite3.Connection:
    """mode=rw: a file that is missing must not be made here, with anybody's rights."""
    escaped = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    uri = f"file:{escaped}?mode=rw"
    db = sqlite3.connect(uri, timeout=patience, isolation_level=None, check_same_thread=False, uri=True)
    try:
        db.execute(f"PRAGMA cache_size = -{PAGE_CACHE}")
    except BaseException:
        db.close()
        raise
    return db


def _pragma(db: sqlite3.Connection, name: str) -> int:
    (value,) = db.execute(f"PRAGMA {name}").fetchone()
    return int(value)


def _hash(key: bytes) -> int:
    """Two keys that share it (one pair in 2**64) replace each other; none is taken for the other."""
    return int.from_bytes(key[:8], "big", signed=True)


def _pack(document: bytes) -> tuple[bool, bytes]:
    """Level 1: text and vectors shrink to half, 2 KB in 36 us, and a look-up unpacks them in 12."""
    packed = zlib.compress(document, 1)
    return (True, packed) if len(packed) < 0.8 * len(document) else (False, document)


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
