"""Stored answers: cache/store.py with its file, whatever state that is in."""

from __future__ import annotations

import io
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from contextlib import closing, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

from portway.cache import file as cache_file
from portway.cache import replay
from portway.cache import store as cache
from portway.cache.file import CacheFile, Counts, Row
from portway.cache.store import Cache, Entry
from portway.commands import cache as cache_cli
from tests.llama_server import wait_for

PATIENCE = 20.0  # seconds; no wait may take longer
ROOT = str(Path(__file__).resolve().parent.parent)


def key_of(number: int) -> bytes:
    return sha256(str(number).encode()).digest()


class InFolder(unittest.TestCase):
    """A temporary folder, a cache in it, and what it said."""

    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.folder, "deep", "portway", "cache.sqlite3")
        self.enterContext(mock.patch.object(cache, "RETRY_AFTER", 0.05))
        self.said: list[str] = []
        self.spoke = threading.Condition()

    def say(self, text: str) -> None:
        with self.spoke:
            self.said.append(text)
            self.spoke.notify_all()

    def wait_for_word(self, word: str) -> None:
        with self.spoke:
            heard = self.spoke.wait_for(lambda: any(word in text for text in self.said), PATIENCE)
        self.assertTrue(heard, f"{word!r} was not said: {self.said}")

    def a_cache(self, **options: Any) -> Cache:
        made = Cache(self.path, say=self.say, **options)
        self.addCleanup(made.close, PATIENCE)
        self.assertTrue(made.flush(PATIENCE) or made.problem)
        return made

    def put(self, made: Cache, number: int, text: str = "x", model: str = "fast-9b") -> None:
        document = text.encode()
        made.put(key_of(number), lambda: document, model=model, size=len(document))

    def fill(self, made: Cache, numbers: range, text: str = "x") -> None:
        for number in numbers:
            self.put(made, number, text)
        self.assertTrue(made.flush(PATIENCE))

    def found(self, made: Cache, *numbers: int) -> list[int]:
        return [number for number in numbers if made.get(key_of(number), "fast-9b") is not None]


class Storing(InFolder):
    def test_what_was_put_is_found(self):
        """At once, from the file, and by the next Cache; with its words and its age."""
        made = self.a_cache()
        self.assertIsNone(made.get(key_of(1), "fast-9b"))
        made.put(key_of(1), lambda: b'{"a":1}', model="fast-9b", size=7, warning="seed ignored")
        at_once = made.get(key_of(1), "fast-9b")
        self.assertTrue(made.flush(PATIENCE))
        made.close()
        later = self.a_cache().get(key_of(1), "fast-9b")
        for entry in (at_once, later):
            assert entry is not None
            self.assertEqual((b'{"a":1}', "fast-9b", "seed ignored"), (entry.document, entry.served_by, entry.warning))
            self.assertLess(entry.age(), PATIENCE)
        self.assertEqual(at_once, later)

    def test_a_large_document_is_packed_and_comes_back(self):
        """What compresses takes less room, and reads the same."""
        made = self.a_cache()
        text = "a long answer " * 5000
        self.fill(made, range(1), text)
        entry = made.get(key_of(0), "fast-9b")
        assert entry is not None
        self.assertEqual(text.encode(), entry.document)
        stats = made.stats()
        assert stats is not None
        self.assertLess(stats.models["fast-9b"].size, len(text) // 10)

    def test_an_answer_that_is_not_to_be_kept_is_not(self):
        """A document that is None, or can't be made, is a miss before and after the writer has seen it."""
        made = self.a_cache()
        made.put(key_of(1), lambda: None, model="fast-9b", size=1)
        made.put(key_of(2), lambda: replay.clean_plain(b"no JSON"), model="fast-9b", size=1)
        self.assertEqual([], self.found(made, 1, 2))
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual([], self.found(made, 1, 2))

    def test_a_newer_answer_replaces_the_older(self):
        """One key has one entry, also while both wait."""
        made = self.a_cache()
        for text in ("one", "two"):
            self.put(made, 1, text)
        self.put(made, 1, "three")
        self.assertTrue(made.flush(PATIENCE))
        entry, stats = made.get(key_of(1), "fast-9b"), made.stats()
        assert entry is not None and stats is not None
        self.assertEqual((b"three", 1), (entry.document, stats.entries))

    def test_age_is_the_readers_business(self):
        """max_age passes over an older entry, and counts a miss; a clock set back makes none older."""
        made = self.a_cache()
        self.put(made, 1)
        for _ in range(2):  # as it waits, and as it is stored
            with mock.patch.object(time, "time", return_value=time.time() + 100):
                self.assertIsNotNone(made.get(key_of(1), "fast-9b", 200))
                self.assertIsNone(made.get(key_of(1), "fast-9b", 50))
            self.assertTrue(made.flush(PATIENCE))
        self.assertEqual(0.0, Entry(b"", "m", time.time() + 100).age())

    def test_two_keys_that_share_their_first_bytes_are_told_apart(self):
        """The whole key is compared."""
        made = self.a_cache()
        near, far = b"a" * 8 + b"1" * 24, b"a" * 8 + b"2" * 24
        made.put(near, lambda: b"{}", model="m", size=2)
        self.assertTrue(made.flush(PATIENCE))
        self.assertIsNotNone(made.get(near, "m"))
        self.assertIsNone(made.get(far, "m"))

    def test_only_the_owner_may_read_it(self):
        """0600 for the file, -wal and -shm, 0700 for a folder that was made; rights that are too wide are narrowed."""
        made = self.a_cache()
        self.fill(made, range(3))
        modes = {name: os.stat(self.path + name).st_mode & 0o777 for name in ("", "-wal", "-shm")}
        self.assertEqual({"": 0o600, "-wal": 0o600, "-shm": 0o600}, modes)
        self.assertEqual(0o700, os.stat(os.path.dirname(self.path)).st_mode & 0o777)
        made.close()
        os.chmod(self.path, 0o644)
        self.a_cache()
        self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)

    def test_where_it_lies(self):
        """$XDG_CACHE_HOME if it is absolute, else ~/.cache."""
        self.assertEqual("/x/portway/cache.sqlite3", cache_file.default_path({"XDG_CACHE_HOME": "/x", "HOME": "/h"}))
        self.assertEqual(
            "/h/.cache/portway/cache.sqlite3", cache_file.default_path({"XDG_CACHE_HOME": "x", "HOME": "/h"})
        )

    def test_a_path_with_odd_characters(self):
        """What means something in a URI means nothing in a file's name."""
        self.path = os.path.join(self.folder, "a?b#c%41", "cache.sqlite3")
        made = self.a_cache()
        self.fill(made, range(1))
        self.assertEqual([0], self.found(made, 0))
        self.assertTrue(os.path.exists(self.path))

    def test_what_is_put_last_is_in_the_file_after_close(self):
        """close() writes what waits, even if the file had not been opened yet."""
        made = Cache(self.path, say=self.say)
        for number in range(50):
            self.put(made, number)
        made.close(PATIENCE)
        self.assertEqual(list(range(50)), self.found(self.a_cache(), *range(50)))
        self.put(made, 99)
        self.assertEqual([], self.found(made, 99))

    def test_close_before_the_writer_has_begun(self):
        """Also then what was put is written."""
        gate, run = threading.Event(), Cache._run

        def late(made: Cache) -> None:
            gate.wait(PATIENCE)
            run(made)

        with mock.patch.object(Cache, "_run", late):
            made = Cache(self.path, say=self.say)
        self.put(made, 1)
        made.close(0)
        gate.set()
        made.close(PATIENCE)
        self.assertEqual([1], self.found(self.a_cache(), 1))

    def test_many_threads(self):
        """Looking up and storing at the same time, from many threads, finds everything and raises nothing."""
        self.enterContext(mock.patch.object(cache, "MAX_WAITING", 1000))
        made = self.a_cache()
        failed: list[int] = []

        def work(base: int) -> None:
            for number in range(base, base + 100):
                self.put(made, number, str(number))
                entry = made.get(key_of(number), "fast-9b")
                if entry is None or entry.document != str(number).encode():
                    failed.append(number)

        threads = [threading.Thread(target=work, args=(base * 1000,)) for base in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual([], failed)
        self.assertTrue(made.flush(PATIENCE))
        stats = made.stats()
        assert stats is not None
        self.assertEqual((800, 0), (stats.entries, made.dropped))


class Gathering(InFolder):
    """When the writer writes. Left to itself it would wait for hours here."""

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(cache, "GATHER", 10_000.0))
        self.enterContext(mock.patch.object(cache, "NOTES_DELAY", 10_000.0))

    def in_file(self) -> int:
        with closing(sqlite3.connect(self.path)) as db:
            (count,) = db.execute("SELECT count(*) FROM answers").fetchone()
        return int(count)

    def settle(self, made: Cache) -> None:
        """Wait until the writer has seen all there is and waits."""
        waits, wait = threading.Semaphore(0), made._changed.wait

        def told(timeout: float | None = None) -> bool:
            if threading.current_thread() is made._writer:
                waits.release()
            return wait(timeout)

        with mock.patch.object(made._changed, "wait", told):
            with made._changed:
                made._changed.notify_all()
            self.assertTrue(waits.acquire(timeout=PATIENCE))

    def wait_for_file(self, entries: int) -> None:
        until = time.monotonic() + PATIENCE
        while self.in_file() != entries and time.monotonic() < until:
            time.sleep(0.005)
        self.assertEqual(entries, self.in_file())

    def test_answers_gather_and_are_found_meanwhile(self):
        """Nothing is written yet, everything is there; flush() does not wait."""
        made = self.a_cache()
        for number in range(20):
            self.put(made, number)
        self.settle(made)
        self.assertEqual((list(range(20)), 0), (self.found(made, *range(20)), self.in_file()))
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual((list(range(20)), 20), (self.found(made, *range(20)), self.in_file()))

    def test_many_are_enough(self):
        """A full batch is written at once, again and again."""
        with mock.patch.object(cache, "BATCH", 5):
            made = self.a_cache()
            for total in (5, 10):
                for number in range(total - 5, total - 1):
                    self.put(made, number)
                self.settle(made)
                self.put(made, total - 1)
                self.wait_for_file(total)
            self.put(made, 10)
            self.assertEqual([10], self.found(made, 10))

    def test_close_does_not_wait(self):
        """What has gathered is written."""
        made = self.a_cache()
        self.fill(made, range(1))
        self.put(made, 1)
        made.close(PATIENCE)
        self.assertEqual(2, self.in_file())

    def test_gathering_ends(self):
        """After GATHER it is written by itself, and the next one, too."""
        with mock.patch.object(cache, "GATHER", 0.01):
            made = self.a_cache()
            for number in range(3):
                self.put(made, number)
                self.wait_for_file(number + 1)

    def test_the_writer_takes_no_more_than_its_share(self):
        """After a write it rests for as long as its share demands, whatever comes; then what comes is dropped, and
        counted. flush() and close() wait for no rest."""
        self.enterContext(mock.patch.object(cache, "SHARE", 1e-9))
        self.enterContext(mock.patch.object(cache, "BATCH", 5))
        self.enterContext(mock.patch.object(cache, "MAX_WAITING", 20))
        made = self.a_cache()  # with its first look at the file it has worked
        for number in range(30):
            self.put(made, number)
        self.settle(made)
        self.assertEqual((list(range(20)), 10), (self.found(made, *range(30)), made.dropped))
        self.assertEqual(0, self.in_file())
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual(20, self.in_file())
        for number in range(40, 45):
            self.put(made, number)
        self.settle(made)
        self.assertEqual(20, self.in_file())
        made.close(PATIENCE)
        self.assertEqual(25, self.in_file())


class Bounds(InFolder):
    def test_the_least_recently_used_make_room(self):
        """What was looked up stays, what was not goes, and the file stays near its bound."""
        made = self.a_cache(max_size=1024 * 1024)
        blob = os.urandom(4000).hex()
        self.fill(made, range(20), blob)
        for number in range(20, 1000, 20):
            self.assertIsNotNone(made.get(key_of(0), "fast-9b"), f"forgotten before {number}")
            self.fill(made, range(number, number + 20), blob)
        stats = made.stats()
        assert stats is not None
        self.assertEqual([0], self.found(made, 0, 1, 2))
        self.assertEqual([999], self.found(made, 999))
        self.assertLess(os.path.getsize(self.path), 1024 * 1024 * 1.25)
        self.assertGreater(stats.entries, 60)
        self.assertEqual(1000 - stats.entries, stats.counts.evictions)

    def test_old_entries_are_deleted(self):
        """What is older than the lifetime leaves the file by itself."""
        self.fill(self.a_cache(), range(600))
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1000), "fast-9b", time.time() - 90, "", b"{}")])
        with (
            mock.patch.object(time, "time", return_value=time.time() + 100),
            closing(sqlite3.connect(self.path)) as db,
        ):
            made = Cache(self.path, lifetime=150, say=self.say)
            self.addCleanup(made.close)
            left = 601
            while left > 600:
                made.flush(PATIENCE)
                (left,) = db.execute("SELECT count(*) FROM answers").fetchone()
        self.assertEqual([0], self.found(made, 0, 1000))

    def test_the_bounds_may_change(self):
        """A smaller size counts from the next write on, a shorter lifetime at once."""
        made = self.a_cache()
        self.fill(made, range(300), os.urandom(2000).hex())
        made.limit(200_000, 3600)
        self.fill(made, range(300, 301))
        stats = made.stats()
        assert stats is not None
        self.assertLess(stats.entries, 100)
        self.assertEqual([300], self.found(made, 300))
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1000), "fast-9b", time.time() - 90, "", b"{}")])
        made.limit(200_000, 60)
        with closing(sqlite3.connect(self.path)) as db:
            query = "SELECT count(*) FROM answers WHERE key = ?"
            wait_for(lambda: not db.execute(query, (key_of(1000),)).fetchone()[0], "its being deleted")
        self.assertEqual([300], self.found(made, 300))

    def test_the_queue_is_bounded(self):
        """What comes while the writer is far behind is dropped and counted; nobody waits."""
        self.enterContext(mock.patch.object(cache, "WRITE_PATIENCE", 0.01))
        with mock.patch.object(cache, "MAX_WAITING", 5), closing(self.locked_out()):
            made = self.a_cache()
            with mock.patch.object(cache, "MAX_WAITING_BYTES", 10):
                self.put(made, 0, "x" * 6)
                self.put(made, 0, "y" * 6)  # takes the place of the one before
                self.put(made, 1, "z" * 6)
            self.assertEqual((1, [0]), (made.dropped, self.found(made, 0, 1)))
            for number in range(8):
                self.put(made, number)
            self.assertEqual((4, [0, 1, 2, 3, 4]), (made.dropped, self.found(made, *range(8))))

    def test_one_answer_must_not_take_the_whole_file(self):
        """An eighth is the most."""
        made = self.a_cache(max_size=80_000)
        self.put(made, 1, "x" * 10_001)
        self.assertEqual((1, []), (made.dropped, self.found(made, 1)))

    def locked_out(self) -> sqlite3.Connection:
        """A connection that nobody else gets past, on a file of ours."""
        CacheFile(self.path, 5).close()
        db = sqlite3.connect(self.path, isolation_level=None)
        db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchone()
        db.execute("BEGIN EXCLUSIVE")
        return db


class Counting(InFolder):
    def test_hits_misses_and_stores_are_kept_by_model(self):
        """They outlive the daemon."""
        made = self.a_cache()
        self.put(made, 1)
        self.put(made, 2, model="embed")
        for number, model in ((1, "fast-9b"), (1, "fast-9b"), (7, "fast-9b"), (2, "embed")):
            made.get(key_of(number), model)
        self.assertTrue(made.flush(PATIENCE))
        made.close()
        stats = self.a_cache().stats()
        assert stats is not None
        self.assertEqual(Counts(hits=2, misses=1, stores=1), stats.models["fast-9b"].counts)
        self.assertEqual(Counts(hits=3, misses=1, stores=2), stats.counts)
        self.assertEqual((2, 0.75), (stats.entries, stats.counts.hit_rate))
        assert stats.oldest is not None
        self.assertLess(time.time() - stats.oldest, PATIENCE)
        self.assertIsNone(Counts().hit_rate)

    def test_counts_outlive_a_failure_to_write_them(self):
        """They are written once the file can be written again."""
        self.enterContext(mock.patch.object(cache, "WRITE_PATIENCE", 0.01))
        made = self.a_cache()
        self.fill(made, range(1))
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            self.assertEqual([0], self.found(made, 0, 1))
            made.flush(0)
            self.wait_for_word("locked")
        self.wait_for_word("works again")
        self.assertTrue(made.flush(PATIENCE))
        stats = made.stats()
        assert stats is not None
        self.assertEqual(Counts(hits=1, misses=1, stores=1), stats.counts)

    def test_uses_outlive_a_failure_to_write_them(self):
        """What was looked up meanwhile is not forgotten for that, as far as there is room to remember it."""
        self.enterContext(mock.patch.object(cache, "WRITE_PATIENCE", 0.01))
        self.enterContext(mock.patch.object(cache, "MAX_USED", 2))
        made = self.a_cache()
        self.fill(made, range(4))
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("UPDATE answers SET used_at = 1")
            db.execute("BEGIN IMMEDIATE")
            self.assertEqual([3, 2, 1], self.found(made, 3, 2, 1))
            made.flush(0)
            self.wait_for_word("locked")
        self.wait_for_word("works again")
        self.assertTrue(made.flush(PATIENCE))
        with closing(sqlite3.connect(self.path)) as db:
            used = {key for (key,) in db.execute("SELECT key FROM answers WHERE used_at > 1")}
        self.assertEqual({key_of(3), key_of(2)}, used)

    def test_an_answer_that_is_replaced_while_it_is_written(self):
        """The newer one is not lost with the older one's leaving the queue."""
        made = self.a_cache()
        write, replaced = CacheFile.write, threading.Event()

        def slow(file: CacheFile, rows: Any, *rest: Any) -> None:
            write(file, rows, *rest)
            if rows and not replaced.is_set():
                self.put(made, 1, "newer")
                replaced.set()

        with mock.patch.object(CacheFile, "write", slow):
            self.put(made, 1, "older")
            self.assertTrue(replaced.wait(PATIENCE))
            self.assertTrue(made.flush(PATIENCE))
        made.close()
        entry = self.a_cache().get(key_of(1), "fast-9b")
        assert entry is not None
        self.assertEqual(b"newer", entry.document)

    def test_puts_tells_whether_a_miss_may_be_out_of_date(self):
        """It changes with each answer that is handed in, and with nothing else."""
        made = self.a_cache()
        before = made.puts
        made.get(key_of(1), "fast-9b")
        self.assertEqual(before, made.puts)
        self.put(made, 1)
        self.assertNotEqual(before, made.puts)

    def test_looking_up_writes_nothing(self):
        """A hit is only noted; the file has it with the next write."""
        made = self.a_cache()
        self.fill(made, range(1))
        size = os.path.getsize(self.path + "-wal")
        for _ in range(100):
            made.get(key_of(0), "fast-9b")
        self.assertEqual(size, os.path.getsize(self.path + "-wal"))
        self.assertTrue(made.flush(PATIENCE))
        self.assertLess(size, os.path.getsize(self.path + "-wal"))


class Trouble(InFolder):
    def test_kill_9_in_the_middle_of_writing(self):
        """Everything that was reported as stored is there, and the file is whole."""
        program = (
            "import sys\nfrom tests.test_cache import *\n"
            f"made = Cache({self.path!r})\n"
            "for number in range(100_000):\n"
            "    made.put(key_of(number), lambda: b'x' * 2000, model='fast-9b', size=2000)\n"
            "    if number % 7 == 0:\n"
            "        assert made.flush(20)\n"
            "        print(number, flush=True)\n"
        )
        child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        with child, child.stdout:
            last = -1
            while last < 1000:
                last = int(child.stdout.readline())
            child.kill()
            last = (
                [last] + [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
            )[-1]
        self.assertEqual(-signal.SIGKILL, child.returncode)
        made = self.a_cache()
        self.assertEqual(list(range(last + 1)), self.found(made, *range(last + 1)))
        self.assertEqual("", made.problem)
        with closing(sqlite3.connect(self.path)) as db:
            self.assertEqual("ok", db.execute("PRAGMA integrity_check").fetchone()[0])

    def test_a_file_of_a_newer_version_is_left_alone(self):
        """The cache is off, says so, and takes nothing in; the file's bytes are as they were."""
        CacheFile(self.path, 5).close()
        with closing(sqlite3.connect(self.path)) as db:
            db.execute(f"PRAGMA user_version = {len(cache_file.MIGRATIONS) + 1}")
        before = Path(self.path).read_bytes()
        made = self.a_cache()
        self.put(made, 1)
        self.assertIn("newer Portway", made.problem)
        self.assertEqual([], self.found(made, 1))
        made.close()
        self.assertEqual(before, Path(self.path).read_bytes())
        self.assertEqual([made.problem], self.said)

    def test_another_programs_database_is_left_alone(self):
        """A path given by mistake costs nobody's data."""
        os.makedirs(os.path.dirname(self.path))
        with closing(sqlite3.connect(self.path)) as db:
            db.execute("CREATE TABLE theirs (a)")
        before = Path(self.path).read_bytes()
        made = self.a_cache()
        self.assertIn("another program", made.problem)
        made.close()
        self.assertEqual(before, Path(self.path).read_bytes())

    def test_a_file_that_is_no_database_is_set_aside(self):
        """It is kept, a new one begun at once, and that is said."""
        os.makedirs(os.path.dirname(self.path))
        Path(self.path).write_bytes(b"not a database " * 1000)
        made = self.a_cache()
        self.fill(made, range(3))
        self.assertEqual([0, 1, 2], self.found(made, 0, 1, 2))
        (kept,) = cache_file.aside(self.path)
        self.assertEqual(b"not a database " * 1000, Path(kept).read_bytes())
        self.assertEqual(("", [made.notice]), (made.problem, self.said))
        self.assertIn(kept, made.notice)

    def test_what_belongs_to_a_corrupt_file_goes_with_it(self):
        """A write-ahead log of the old file must not get into the new one."""
        os.makedirs(os.path.dirname(self.path))
        for suffix in ("", "-wal", "-shm"):
            Path(self.path + suffix).write_bytes(b"old" + suffix.encode())
        kept = cache_file.set_aside(self.path)
        self.assertEqual([kept, f"{kept}-shm", f"{kept}-wal"], cache_file.aside(self.path))
        self.assertEqual(b"old-wal", Path(f"{kept}-wal").read_bytes())
        self.assertEqual(3, len(os.listdir(os.path.dirname(self.path))))

    def test_a_trouble_is_said_once_however_long_it_lasts(self):
        """Each new try that fails for the same reason is no news."""
        for name in ("RETRY_AFTER", "RETRY_AT_MOST"):
            self.enterContext(mock.patch.object(cache, name, 0.01))
        made = Cache("/dev/null/cache.sqlite3", say=self.say)
        self.addCleanup(made.close)
        wait_for(lambda: made._failures > 5, "some tries")
        self.assertEqual([made.problem], self.said)

    def test_a_slow_disk_is_left_alone_for_a_while(self):
        """The look-up that it kept waiting is answered all the same; then there is no cache but in memory."""
        made = self.a_cache()
        self.fill(made, range(2))
        with mock.patch.object(cache, "SLOW", -1.0):
            self.assertEqual([0], self.found(made, 0))
            self.assertEqual([], self.found(made, 1))
            self.put(made, 2)
            self.assertEqual([2], self.found(made, 2))
            self.wait_for_word("can't be used: a look-up took 0.0 s")
        self.assertGreater(made._retry_at - time.monotonic(), cache.RETRY_AT_MOST / 2)
        made._retry_at = 0.0
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual([0, 1, 2], self.found(made, 0, 1, 2))

    def test_who_looks_up_does_not_wait_for_the_file(self):
        """Whatever others do with it, a look-up fails within milliseconds, and is a miss."""
        CacheFile(self.path, 5).close()
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchone()
            db.execute("BEGIN EXCLUSIVE")
            asked = self.enterContext(mock.patch.object(sqlite3, "connect", side_effect=sqlite3.connect))
            with closing(cache_file.Readers(self.path)) as readers, self.assertRaises(sqlite3.OperationalError):
                readers.find(key_of(1))
            self.assertLessEqual(asked.call_args.kwargs["timeout"], 0.01)

    def test_a_file_that_becomes_corrupt_is_set_aside(self):
        """A look-up that meets torn pages is a miss; the next answers go to a new file."""
        first = self.a_cache()
        self.fill(first, range(300), os.urandom(1000).hex())
        first.close()
        with open(self.path, "r+b") as file:
            file.seek(cache_file.PAGE)
            file.write(os.urandom(os.path.getsize(self.path) - cache_file.PAGE))
        made = self.a_cache()
        self.found(made, *range(300))
        self.wait_for_word("corrupt")
        self.fill(made, range(1000, 1003))
        self.assertEqual([1000, 1001, 1002], self.found(made, 1000, 1001, 1002))
        self.assertEqual(1, len(cache_file.aside(self.path)))

    def test_a_damaged_document_is_a_miss(self):
        """It does not stop the cache, and the next answer takes its place."""
        made = self.a_cache()
        self.fill(made, range(2), "text " * 1000)
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute("UPDATE answers SET document = x'00' WHERE key = ?", (key_of(1),))
        self.assertEqual([0], self.found(made, 0, 1))
        self.assertEqual("", made.problem)
        self.fill(made, range(1, 2))
        self.assertEqual([1], self.found(made, 1))

    def test_a_locked_file_costs_a_request_no_time(self):
        """While another process holds it there is no cache but in memory; then everything is stored."""
        program = (
            "import sqlite3, sys\n"
            f"db = sqlite3.connect({self.path!r}, isolation_level=None)\n"
            "db.execute('PRAGMA locking_mode = EXCLUSIVE').fetchone()\ndb.execute('BEGIN EXCLUSIVE')\n"
            "print('locked', flush=True)\nsys.stdin.read()\n"
        )
        CacheFile(self.path, 5).close()
        with (
            subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder,
            mock.patch.object(cache, "WRITE_PATIENCE", 0.01),
        ):
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdout.readline()
            made = self.a_cache()
            self.put(made, 1)
            self.assertIn("locked", made.problem)
            started = time.monotonic()
            self.assertEqual([1], self.found(made, *range(500)))
            self.assertLess(time.monotonic() - started, 2.0)  # 500 waits of 5 ms would be 2.5 s
            self.assertFalse(made.flush(0.05))
            holder.stdin.close()
        self.wait_for_word("works again")
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual("", made.problem)
        made.close()
        self.assertEqual([1], self.found(self.a_cache(), 1))

    def test_a_full_disk(self):
        """Requests go on, `problem` says why, and when there is room again all is stored."""
        program = (
            "import resource\nfrom tests.test_cache import *\n"
            f"made = Cache({self.path!r}, say=print)\nassert made.flush(20)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))\n"
            "blob = os.urandom(1000)\n"
            "for number in range(500):\n"
            "    made.put(key_of(number), lambda: blob, model='fast-9b', size=1000)\n"
            "assert not made.flush(1)\n"
            "assert 'disk' in made.problem, made.problem\n"
            "assert made.get(key_of(499), 'fast-9b') is not None\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
            "assert made.flush(20) and not made.problem\n"
            "made.close()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertIn("works again", done.stdout)
        self.assertEqual(list(range(500)), self.found(self.a_cache(), *range(500)))

    def test_a_folder_that_may_not_be_written(self):
        """Also root is somebody else here, so that the rights count."""
        os.mkdir(os.path.join(self.folder, "closed"))
        program = (
            "import os, tempfile\nfrom tests.test_cache import *\n"
            f"os.chmod({self.folder!r}, 0o755)\nos.chmod({self.folder!r} + '/closed', 0o555)\n"
            "if os.getuid() == 0: os.seteuid(65534)\n"
            f"made = Cache({self.folder!r} + '/closed/cache.sqlite3', say=print)\nmade.flush(20)\n"
            "made.put(key_of(1), lambda: b'{}', model='m', size=2)\n"
            "assert made.get(key_of(1), 'm') is not None\n"
            "assert made.problem.endswith('Permission denied'), made.problem\nmade.close()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        self.assertEqual((0, ""), (done.returncode, done.stderr))

    def test_off_is_seen_by_a_cache_that_nobody_uses(self):
        """What was stored must not come out of it hours later, only because nobody asked in between."""
        self.enterContext(mock.patch.object(cache, "LOOK_EVERY", 0.02))
        self.enterContext(mock.patch.object(cache, "RETRY_AFTER", 0.02))
        made = self.a_cache()
        self.fill(made, range(1))
        with redirect_stdout(io.StringIO()):
            cache_cli.main(["off"], self.path)
            wait_for(lambda: made.is_off, "its being seen")
            self.assertEqual([], self.found(made, 0))
            cache_cli.main(["on"], self.path)
        wait_for(lambda: not made.is_off, "its end")
        self.assertEqual([0], self.found(made, 0))

    def test_a_folder_that_comes_later(self):
        """A path through a file can't be; once it can, the cache works by itself."""
        Path(self.folder, "deep").write_text("in the way", encoding="utf-8")
        made = self.a_cache()
        self.assertIn("can't be used", made.problem)
        self.put(made, 1)
        os.unlink(os.path.join(self.folder, "deep"))
        self.wait_for_word("works again")
        self.assertTrue(made.flush(PATIENCE))
        self.assertTrue(os.path.exists(self.path))

    def test_a_file_that_is_removed_is_begun_anew(self):
        """Deleting it is a way to purge, with the daemon running."""
        made = self.a_cache()
        self.fill(made, range(3))
        for suffix in ("", "-wal", "-shm"):
            os.unlink(self.path + suffix)
        self.fill(made, range(10, 12))
        self.assertEqual([10, 11], self.found(made, 0, 1, 2, 10, 11))
        self.assertTrue(os.path.exists(self.path))

    def test_a_mistake_in_portway_only_ends_the_cache(self):
        """The writer's death shows, and requests go on."""
        made = self.a_cache()
        died = threading.Event()
        with mock.patch.object(threading, "excepthook", lambda _: died.set()):
            made.put(key_of(1), lambda: bytes(1 // 0), model="m", size=1)
            self.assertTrue(died.wait(PATIENCE))
            made._writer.join(PATIENCE)
        self.assertIn("stopped", made.problem)
        self.put(made, 2)
        self.assertEqual([], self.found(made, 1, 2))


if __name__ == "__main__":
    unittest.main()
