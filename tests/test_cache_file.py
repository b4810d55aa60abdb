"""The cache's SQLite file by itself, and `portway cache`, which works on it."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import threading
import time
import unittest
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from portway.cache import file as cache_file
from portway.cache import store as cache
from portway.cache.file import CacheFile, Counts, Row, Unusable
from portway.commands import cache as cache_cli
from tests.test_cache import PATIENCE, InFolder, key_of


class Commands(InFolder):
    def run_cli(self, *words: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = cache_cli.main(words, self.path)
        return status, out.getvalue(), err.getvalue()

    def test_nothing_yet(self):
        """Asking makes no file."""
        status, out, _ = self.run_cli()
        self.assertEqual((0, f"{self.path}: nothing stored yet\n"), (status, out))
        self.assertEqual((0, "0 entries deleted\n", ""), self.run_cli("purge"))
        self.assertFalse(os.path.exists(self.path))

    def test_what_is_shown(self):
        """Entries, size, hit rate, age of the oldest; each model in a row."""
        made = self.a_cache()
        self.put(made, 1)
        self.found(made, 1, 2)
        made.close()
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(5), "embed", time.time() - 3 * 86_400, "", b"{}")])
        status, out, _ = self.run_cli()
        self.assertEqual(0, status)
        self.assertRegex(out, r"cache.sqlite3: 2 entries, [0-9.]+ KB on disk, the oldest 3 days old\n")
        self.assertIn("hit rate 50.0%: 1 of 2 look-ups\n", out)
        self.assertRegex(out, r"fast-9b +1 +1 B +1 +1 +50.0%\n")
        self.assertRegex(out, r"embed +1 +2 B +0 +0 +-\n")

    def test_what_a_program_is_told(self):
        """The same as one JSON document; of no file, too."""
        nothing = json.loads(self.run_cli("--json")[1])
        self.assertEqual([0, None, None], [nothing["total"][key] for key in ("entries", "oldest", "hit_rate")])
        self.assertFalse(nothing["off"])
        made = self.a_cache()
        self.put(made, 1)
        self.found(made, 1, 2, 3)
        made.close()
        self.run_cli("off")
        status, out, err = self.run_cli("--json")
        told = json.loads(out)
        self.assertEqual((0, ""), (status, err))
        self.assertEqual((self.path, True), (told["file"], told["off"]))
        counts = {"hits": 1, "misses": 2, "stores": 1, "evictions": 0, "hit_rate": 0.333333}
        self.assertEqual({"fast-9b": {"entries": 1, "size": 1, **counts}}, told["models"])
        self.assertEqual({"entries": 1, **counts}, {key: told["total"][key] for key in ("entries", *counts)})
        self.assertGreater(told["total"]["size"], 1000)
        self.assertLess(abs(told["total"]["oldest"] - time.time()), PATIENCE)

    def test_purge(self):
        """By model, by age, or all, which begins the counts anew and takes corrupt files along."""
        old = time.time() - 8 * 86_400
        with closing(CacheFile(self.path, 5)) as file:
            rows = [
                Row(key_of(number), "fast-9b", old + 2 * 86_400 * (number >= 3), "", b"secret") for number in range(600)
            ]
            file.write([*rows, Row(key_of(1000), "embed", time.time(), "", b"{}")])
        Path(self.path + ".corrupt-1").write_text("x", encoding="utf-8")
        self.assertEqual((0, "3 entries deleted\n", ""), self.run_cli("purge", "--older-than", "7d"))
        self.assertEqual((0, "1 entry deleted\n", ""), self.run_cli("purge", "--model=embed"))
        self.assertTrue(os.path.exists(self.path + ".corrupt-1"))
        status, out, _ = self.run_cli("purge")
        self.assertEqual((0, f"597 entries deleted\n{self.path}.corrupt-1 deleted\n"), (status, out))
        with closing(CacheFile(self.path, 5)) as file:
            self.assertEqual((0, {}), (file.stats().entries, file.stats().models))
        self.assertNotIn(b"secret", Path(self.path).read_bytes())
        self.assertEqual([], cache_file.aside(self.path))

    def test_nothing_of_what_was_purged_can_be_read(self):
        """Not in the free pages of a file in which other answers stay, nor in the write-ahead log; also where SQLite
        was not made to overwrite what it deletes, as Debian's is."""
        connect = cache_file._connect

        def plain(path: str, patience: float) -> sqlite3.Connection:
            db = connect(path, patience)
            db.execute("PRAGMA secure_delete = OFF").fetchone()
            return db

        self.enterContext(mock.patch.object(cache_file, "_connect", plain))
        with closing(CacheFile(self.path, 5)) as file:
            for number in range(300):
                text = b"secret-%d-%s" % (number, os.urandom(8)) if number % 2 else b"public"
                file.write([Row(key_of(number), "ab"[number % 2], time.time(), "", text)])
        self.assertEqual((0, "150 entries deleted\n", ""), self.run_cli("purge", "--model", "b"))
        files = [path for path in Path(self.path).parent.iterdir() if not path.name.endswith(".off")]
        self.assertIn(b"public", Path(self.path).read_bytes())
        self.assertEqual([], [path.name for path in files if b"secret" in path.read_bytes()])

    def test_a_running_cache_sees_a_purge(self):
        """What was deleted by another process is a miss."""
        made = self.a_cache()
        self.fill(made, range(3))
        self.assertEqual(0, self.run_cli("purge")[0])
        self.assertEqual([], self.found(made, 0, 1, 2))
        self.fill(made, range(3))
        self.assertEqual(3, made.purge(model="fast-9b"))
        self.assertEqual([], self.found(made, 0, 1, 2))

    def test_off_and_on(self):
        """Off, nothing is found or stored; on again, what was stored is back."""
        made = self.a_cache()
        self.fill(made, range(3))
        self.assertEqual(0, self.run_cli("off")[0])
        self.assertEqual(0o600, os.stat(self.path + cache.OFF_SUFFIX).st_mode & 0o777)
        made.flush(PATIENCE)
        self.assertIn("turned off", made.problem)
        self.put(made, 5)
        self.assertEqual([], self.found(made, 0, 5))
        self.assertIn("turned off", self.run_cli()[1])
        self.assertEqual(0, self.run_cli("on")[0])
        self.wait_for_word("works again")
        self.assertEqual([0], self.found(made, 0, 5))
        self.assertIn("not turned off", self.run_cli("on")[1])

    def test_what_is_not_understood(self):
        """Exit code 2 and a sentence; what the file refuses is 1."""
        for words in (
            ["clear"],
            ["purge", "--all"],
            ["purge", "--older-than", "7"],
            ["purge", "--model"],
            ["off", "x"],
        ):
            with self.subTest(words):
                status, out, err = self.run_cli(*words)
                self.assertEqual((2, ""), (status, out))
                self.assertIn("see `portway cache --help`", err)
        os.makedirs(os.path.dirname(self.path))
        Path(self.path).write_bytes(b"not a database " * 1000)
        status, _, err = self.run_cli()
        self.assertEqual(1, status)
        self.assertIn("not a database", err)
        self.assertEqual((0, cache_cli.HELP, ""), self.run_cli("--help"))


class Files(InFolder):
    def test_a_transaction_is_whole_or_not_at_all(self):
        """An error in the middle leaves nothing behind, and the file usable."""
        with closing(CacheFile(self.path, 5)) as file:
            nobody: Any = None
            bad = Row(key_of(2), nobody, time.time(), "", b"x")
            with self.assertRaises(sqlite3.IntegrityError):
                file.write([Row(key_of(1), "m", time.time(), "", b"x"), bad])
            self.assertEqual(0, file.stats().entries)
            file.write([Row(key_of(1), "m", time.time(), "", b"x")])
            self.assertEqual(1, file.stats().entries)

    def test_a_purge_gives_room_back(self):
        """The file shrinks on disk."""
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(number), "m", time.time(), "", os.urandom(5000)) for number in range(400)])
            before = file.stats().size
            self.assertEqual(400, file.purge())
            self.assertLess(file.stats().size, before / 10)

    def test_looking_up_makes_no_file(self):
        """One that was removed is the writer's to make, with the right rights."""
        path = os.path.join(self.folder, "none.sqlite3")
        with closing(cache_file.Readers(path)) as readers, self.assertRaises(sqlite3.OperationalError):
            readers.find(key_of(1))
        self.assertFalse(os.path.exists(path))

    def test_errors_in_words(self):
        """Each says what is wrong with the file."""
        self.assertEqual("is odd", cache_file.describe(Unusable("is odd")))
        self.assertIn("No space", cache_file.describe(OSError(28, "No space left on device")))

    def test_a_file_of_an_older_version_is_brought_up_to_date(self):
        """Each step that it lacks is taken once, in order, and its answers stay; by whoever opens it first."""
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1), "m", 1.0, "w", b"x")])
        taken: list[str] = []

        def further(db: sqlite3.Connection) -> None:
            db.execute("ALTER TABLE answers ADD COLUMN more TEXT NOT NULL DEFAULT ''")
            taken.append("further")

        def yet_further(db: sqlite3.Connection) -> None:
            db.execute("CREATE TABLE more (id INTEGER PRIMARY KEY)")
            taken.append("yet further")

        steps = (*cache_file.MIGRATIONS, further, yet_further)
        with mock.patch.object(cache_file, "MIGRATIONS", steps):
            for _ in range(2):
                CacheFile(self.path, 5).close()
            self.assertEqual(["further", "yet further"], taken)
            with closing(cache_file.Readers(self.path)) as readers:
                self.assertEqual(("m", 1.0, "w", b"x"), readers.find(key_of(1)))
        known = len(cache_file.MIGRATIONS)
        with self.assertRaisesRegex(Unusable, f"format {known + 2}; this one knows {known}"):
            CacheFile(self.path, 5)

    def test_a_look_up_that_outlives_the_others(self):
        """Its connection is closed behind it, and so is one too many."""
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1), "m", 1.0, "", b"x")])
        readers = cache_file.Readers(self.path)
        self.assertIsNotNone(readers.find(key_of(1)))
        self.assertEqual(1, len(readers._idle))
        with mock.patch.object(cache_file, "IDLE_READERS", 0):
            self.assertIsNotNone(readers.find(key_of(1)))
            self.assertEqual(0, len(readers._idle))
        self.assertIsNotNone(readers.find(key_of(1)))
        readers.close()
        self.assertEqual(0, len(readers._idle))
        self.assertIsNotNone(readers.find(key_of(1)))
        self.assertEqual(0, len(readers._idle))

    def test_a_step_that_fails_changes_nothing(self):
        """All of them are one transaction: the file stays what it was, and what it was can be used."""

        def m002_half(db: sqlite3.Connection) -> None:
            db.execute("CREATE TABLE half (a)")

        def m003_broken(db: sqlite3.Connection) -> None:
            db.execute("CREATE TABLE half (a)")

        CacheFile(self.path, 5).close()
        steps = (*cache_file.MIGRATIONS, m002_half, m003_broken)
        with mock.patch.object(cache_file, "MIGRATIONS", steps), self.assertRaises(sqlite3.OperationalError):
            CacheFile(self.path, 5)
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1), "m", 1.0, "", b"x")])
            self.assertEqual(1, file.stats().entries)

    def test_many_open_a_new_file_at_once(self):
        """One of them makes the tables, and all can write."""
        for number in range(20):
            with self.subTest(number):
                self.open_together(os.path.join(self.folder, f"{number}.sqlite3"))

    def open_together(self, path: str) -> None:
        go, failed = threading.Barrier(8), []

        def write(number: int) -> None:
            try:
                go.wait(PATIENCE)
                with closing(CacheFile(path, PATIENCE)) as file:
                    file.write([Row(key_of(number), "m", 1.0, "", b"x")])
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is shown
                failed.append(exc)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual([], failed)
        with closing(CacheFile(path, 5)) as file:
            self.assertEqual(8, file.stats().entries)

    def test_migrations_are_numbered(self):
        """m001, m002, ...: a file's user_version counts them."""
        numbers = [int(step.__name__[1:4]) for step in cache_file.MIGRATIONS]
        self.assertEqual(list(range(1, len(numbers) + 1)), numbers)
        with closing(CacheFile(self.path, 5)), closing(sqlite3.connect(self.path)) as db:
            self.assertEqual(len(numbers), db.execute("PRAGMA user_version").fetchone()[0])

    def test_any_number_of_rows(self):
        """However many there are, each is written once, and each that was used is younger then."""
        with closing(CacheFile(self.path, 5)) as file, closing(sqlite3.connect(self.path)) as db:
            for count in (*range(8), 15, 16, 17, 37, 64, 100):
                self.assertGreaterEqual(file.purge(), 0)
                keys = [key_of(number) for number in range(count)]
                file.write([Row(key, "m", 1000.0, "w", key * 2) for key in keys], max_size=10**9)
                rows = db.execute("SELECT key, model, stored_at, used_at, warning, document FROM answers").fetchall()
                self.assertEqual({(key, "m", 1000.0, 1000.0, "w", key * 2) for key in keys}, set(rows))
                self.assertEqual(count, len(rows))
                for used in (0, count // 2, count):
                    file.write(used=keys[:used])
                    fresh = db.execute("SELECT key FROM answers WHERE used_at > 1e9").fetchall()
                    self.assertEqual({(key,) for key in keys[:used]}, set(fresh))

    def test_what_a_model_has_is_right_whatever_happens(self):
        """Rows that replace each other, in one write too, rows that make room, that expire, that are purged."""
        with closing(CacheFile(self.path, 5)) as file, closing(sqlite3.connect(self.path)) as db:

            def check() -> None:
                query = "SELECT model, count(*), sum(size) FROM answers GROUP BY model"
                known = {name: (each.entries, each.size) for name, each in file.stats().models.items() if each.entries}
                self.assertEqual({name: tuple(rest) for name, *rest in db.execute(query)}, known)

            twins = [b"a" * 8 + bytes(24), b"a" * 8 + bytes(23) + b"1"]
            for models in (("a", "b"), ("b", "a"), ("c", "d"), ("d", "d")):
                file.write([Row(key, model, 5.0, "", b"x" * 9) for key, model in zip(twins, models, strict=True)])
                check()
            self.assertEqual(1, file.stats().entries)
            for start in range(0, 400, 100):
                rows = [Row(key_of(n), "ab"[n % 2], 10.0 + n, "", os.urandom(2000)) for n in range(start, start + 100)]
                file.write(rows, max_size=400_000)
                check()
            stats = file.stats()
            self.assertEqual((408, 400 - stats.entries + 1), (stats.counts.stores, stats.counts.evictions))
            self.assertGreater(stats.counts.evictions, 200)
            file.expire(350.0)
            check()
            self.assertGreater(stats.entries, file.stats().entries)
            self.assertGreater(file.purge("a"), 0)
            check()
            self.assertEqual(0, file.stats().models["a"].entries)

    def test_counts_are_the_callers(self):
        """What is given is only read: after a failure it is given again."""
        given = {"m": Counts(hits=1)}
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1), "m", 1.0, "", b"x")], counts=given, max_size=1)
            self.assertEqual({"m": Counts(hits=1)}, given)
            self.assertEqual(Counts(hits=1, stores=1, evictions=1), file.stats().counts)

    def test_a_flood_is_not_compressed(self):
        """Beyond so many bytes in one write documents stay as they are; what is small always does."""
        text = b"a text that would become smaller. " * 100
        with closing(CacheFile(self.path, 5)) as file, closing(sqlite3.connect(self.path)) as db:
            file.write([Row(key_of(number), "m", 1.0, "", text) for number in range(50)])
            packed = [bool(row[0]) for row in db.execute("SELECT packed FROM answers ORDER BY id")]
            first = -(-cache_file.COMPRESS_AT_ONCE // len(text))
            self.assertEqual([True] * first + [False] * (50 - first), packed)
            with closing(cache_file.Readers(self.path)) as readers:
                self.assertEqual({text}, {found.document for n in range(50) if (found := readers.find(key_of(n)))})
            file.write([Row(key_of(99), "m", 1.0, "", text[:1000]), Row(key_of(98), "m", 1.0, "", text)])
            self.assertEqual([(0,), (1,)], db.execute("SELECT packed FROM answers WHERE id > 50").fetchall())

    def test_a_file_of_the_first_version(self):
        """Its answers go, as nothing would find them; what was counted stays, and it serves on."""
        with closing(CacheFile(self.path, 5)), closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            for table in ("answers", "models"):
                db.execute(f"DROP TABLE {table}")
            cache_file.MIGRATIONS[0](db)
            db.execute("PRAGMA user_version = 1")
            values = (1, key_of(1), "m", 1, 1.0, 1.0, "", 0, b"x")
            db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            db.execute("UPDATE models SET hits = 7, stores = 3")
        made = self.a_cache()
        stats = made.stats()
        assert stats is not None
        self.assertEqual((0, 0), (stats.entries, stats.models["m"].size))
        self.assertEqual(Counts(hits=7, stores=3), stats.counts)
        self.fill(made, range(3))
        self.assertEqual([0, 1, 2], self.found(made, 0, 1, 2))


if __name__ == "__main__":
    unittest.main()
