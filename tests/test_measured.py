"""What was measured of models outlives the daemon: the file, whatever becomes of it, and what is made of it."""

from __future__ import annotations

import json
import os
import signal
import stat
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

from portway import config
from portway.memory import machine as memory
from portway.memory.arbiter import Shape
from portway.memory.measured import (
    LIFETIME,
    MAX_ENTRIES,
    MAX_FILE,
    Measure,
    Measurements,
    Notebook,
    Thing,
    default_path,
)
from portway.memory.residency import Residency
from portway.standin.server import Memory, StandIn, StandInModel
from portway.watch import NoClient
from tests.daemon import DaemonProcess
from tests.llama_server import wait_for

GB = 1024**3
NOW = 1_800_000_000.0
SHAPE = Shape(512, (("num_gpu", 99), ("use_mmap", False)))
SIZE, LOAD = Thing("http://one", "sha256:a", SHAPE), Thing("http://one", "sha256:a")
KNOWN = {SIZE: Measure(6 * GB, NOW), LOAD: Measure(2.5, NOW)}


class FileTest(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "state" / "portway" / "measured.json"
        self.now = NOW
        self.notebook = Notebook(str(self.path), clock=lambda: self.now)

    def write(self, document: object) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(document if isinstance(document, str) else json.dumps(document))

    def test_there_and_back(self) -> None:
        """What was written is read again, with its shape."""
        self.notebook.add(KNOWN)
        self.assertEqual(KNOWN, self.notebook.read())

    def test_for_its_owner_only(self) -> None:
        """0600 in a folder with 0700, whatever the umask; nothing else is left there."""
        before = os.umask(0)
        try:
            self.path.parent.mkdir(parents=True, mode=0o700)
            left = Path(f"{self.path}.{os.getpid()}")  # by one that was killed while it wrote
            left.write_text("x" * 9999)
            self.notebook.add(KNOWN)
        finally:
            os.umask(before)
        self.assertEqual(KNOWN, self.notebook.read())
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (self.path, self.path.parent)]
        self.assertEqual([0o600, 0o700], modes)
        self.assertEqual([self.path], list(self.path.parent.iterdir()))

    def test_its_folder(self) -> None:
        """It is made for its owner only, as well."""
        self.notebook.add(KNOWN)
        self.assertEqual(0o700, stat.S_IMODE(self.path.parent.stat().st_mode))

    def test_nothing_to_write(self) -> None:
        """Without anything new no file is made."""
        self.notebook.add({})
        self.assertFalse(self.path.parent.exists())

    def test_two_of_them(self) -> None:
        """Another Portway's lines stay, and the newer of two about the same counts."""
        self.notebook.add(KNOWN)
        other = {Thing("http://two", "b"): Measure(1.0, NOW), LOAD: Measure(9.0, NOW + 1)}
        Notebook(str(self.path), clock=lambda: NOW + 1).add(other)
        self.assertEqual({**KNOWN, **other}, self.notebook.read())

    def test_it_ages(self) -> None:
        """After a month it is measured anew; what comes from the future was written by a clock that was wrong."""
        self.notebook.add(KNOWN)
        self.now = NOW + LIFETIME + 1
        self.assertEqual({}, self.notebook.read())
        self.now = NOW - 2 * 86_400
        self.assertEqual({}, self.notebook.read())

    def test_bounded(self) -> None:
        """The newest lines are kept, and no more than some hundred."""
        things = {Thing("http://one", f"m{number}"): Measure(1.0, NOW - number) for number in range(MAX_ENTRIES + 9)}
        self.notebook.add(things)
        kept = self.notebook.read()
        self.assertEqual(MAX_ENTRIES, len(kept))
        self.assertIn(Thing("http://one", "m0"), kept)
        self.assertLess(self.path.stat().st_size, MAX_FILE)

    def test_not_ours(self) -> None:
        """What is damaged, foreign, or by a hand that wished for more is as if it were not there."""
        entry = {"url": "http://one", "model": "a", "at": NOW}
        documents: list[object] = [
            "",
            "{",
            "null",
            "[" * 100_000,
            "\0\x7f" * 999,
            " " * (MAX_FILE + 1),
            "9" * 5000,
            {},
            {"portway_measured": 2, "models": [{**entry, "load_s": 1}]},
            {"portway_measured": 1, "models": {"a": 1}},
        ]
        entries: list[Any] = [
            7,
            {},
            entry,
            {**entry, "load_s": True},
            {**entry, "load_s": -1},
            {**entry, "load_s": 10**400},
            {**entry, "load_s": "1"},
            {**entry, "load_s": 1, "at": "now"},
            {**entry, "url": None, "load_s": 1},
            {**entry, "model": ["a"], "load_s": 1},
            {**entry, "bytes": GB},
            {**entry, "bytes": 2**55, "shape": {"num_ctx": 512, "options": {}}},
            {**entry, "bytes": 0, "shape": {"num_ctx": 512, "options": {}}},
            {**entry, "bytes": GB, "shape": 512},
            {**entry, "bytes": GB, "shape": {"num_ctx": "512", "options": {}}},
            {**entry, "bytes": GB, "shape": {"num_ctx": 512, "options": [1]}},
            {**entry, "bytes": GB, "shape": {"num_ctx": 512, "options": {"num_gpu": {}}}},
        ]
        documents += [{"portway_measured": 1, "models": [each]} for each in entries]
        for document in documents:
            with self.subTest(str(document)[:60]):
                self.write(document)
                self.assertEqual({}, self.notebook.read())
        self.notebook.add(KNOWN)
        self.assertEqual(KNOWN, self.notebook.read())

    def test_no_number_that_json_has_not(self) -> None:
        """NaN and Infinity, which Python's json takes, are no measures."""
        for number in ("NaN", "Infinity", "1e999"):
            models = f'[{{"url": "http://one", "model": "a", "at": {NOW}, "load_s": {number}}}]'
            self.write(f'{{"portway_measured": 1, "models": {models}}}')
            self.assertEqual({}, self.notebook.read())

    def test_no_file(self) -> None:
        """A pipe in its place is not waited for, a folder is told of, a link's target is left alone."""
        self.path.parent.mkdir(parents=True)
        os.mkfifo(self.path)
        self.assertEqual({}, self.notebook.read())
        self.path.unlink()
        self.path.mkdir()
        self.assertEqual({}, self.notebook.read())
        with self.assertRaises(OSError):
            self.notebook.add(KNOWN)
        self.path.rmdir()
        target = self.folder / "target"
        target.write_text("precious")
        self.path.symlink_to(target)
        self.notebook.add(KNOWN)
        self.assertEqual(("precious", KNOWN), (target.read_text(), self.notebook.read()))

    def test_where(self) -> None:
        """$XDG_STATE_HOME if it is absolute, else ~/.local/state."""
        self.assertEqual("/s/portway/measured.json", default_path({"XDG_STATE_HOME": "/s", "HOME": "/h"}))
        self.assertEqual("/h/.local/state/portway/measured.json", default_path({"XDG_STATE_HOME": "s", "HOME": "/h"}))


class MeasurementsTest(unittest.TestCase):
    def test_what_is_worth_writing(self) -> None:
        """What is new or has changed, and once a day what has not, so that it does not grow old."""
        now = [NOW]
        measured = Measurements(KNOWN, clock=lambda: now[0])
        measured.weigh(*SIZE[:2], SHAPE, 6 * GB)
        self.assertEqual({}, measured.unsaved())
        measured.time(*LOAD[:2], 3.0)
        self.assertEqual({LOAD: Measure(3.0, NOW)}, measured.unsaved())
        self.assertEqual({}, measured.unsaved())
        now[0] += 86_401
        measured.weigh(*SIZE[:2], SHAPE, 6 * GB)
        self.assertEqual({SIZE: Measure(6 * GB, NOW + 86_401)}, measured.unsaved())
        self.assertEqual((6 * GB, 3.0), (measured.size(*SIZE[:2], SHAPE), measured.load_time(*LOAD[:2])))

    def test_each_shape_and_server_has_its_own(self) -> None:
        """Another window takes other memory; another server's model is another one."""
        measured = Measurements(KNOWN)
        self.assertIsNone(measured.size("http://one", "sha256:a", Shape(1024, SHAPE.options)))
        self.assertIsNone(measured.size("http://two", "sha256:a", SHAPE))
        self.assertIsNone(measured.load_time("http://two", "sha256:a"))


class RestartTest(unittest.TestCase):
    """A Residency after another one, and a daemon after one that was killed."""

    def setUp(self) -> None:
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = f"{self.folder}/portway/measured.json"
        model = StandInModel("a", 6 * GB)
        self.standin = self.enterContext(StandIn([model], memory=Memory(10 * GB)))
        self.said: list[str] = []

    def toml(self, url: str = "") -> str:
        return (
            f'[memory]\nbudget = "10GB"\n[backends.one]\nkind = "ollama"\nurl = "{url or self.standin.url}"\n'
            '[models.a]\nbackend = "one"\nmodel = "a"\nnum_ctx = 512\nkeep_alive = "5m"\n'
        )

    def residency(self, url: str = "") -> Residency:
        parsed = config.parse(self.toml(url), "models.toml", {})
        made = Residency(parsed, read=memory.Reading, say=self.said.append, notebook=Notebook(self.path))
        self.addCleanup(made.stop)
        return made

    def use(self, residency: Residency) -> None:
        """Load the model and measure it."""
        residency.load(residency.snapshot().config.models["a"], NoClient(), time.monotonic() + 10)
        residency.check()

    def test_it_is_known_again(self) -> None:
        """The next one knows the size and the time before anything was loaded."""
        before = self.residency()
        self.use(before)
        before.save()
        after = self.residency()
        after.refresh(NoClient())
        seat = after.snapshot().seats["a"]
        self.assertEqual((6 * GB, True), (seat.need and seat.need.size, seat.measured))
        self.assertIn(seat.runner, after.snapshot().load_times)

    def test_saved_at_the_end(self) -> None:
        """What the monitor had no round for is written when the daemon stops."""
        before = self.residency()
        self.use(before)
        self.assertFalse(os.path.exists(self.path))
        before.stop()
        self.assertTrue(Notebook(self.path).read())

    def test_not_of_another_server(self) -> None:
        """A backend whose address is another one has its models measured anew."""
        before = self.residency()
        self.use(before)
        before.save()
        with StandIn([StandInModel("a", 6 * GB)]) as other:
            after = self.residency(other.url)
            after.refresh(NoClient())
            self.assertFalse(after.snapshot().seats["a"].measured)

    def test_a_reload_of_another_server(self) -> None:
        """The same without a restart."""
        residency = self.residency()
        self.use(residency)
        with StandIn([StandInModel("a", 6 * GB)]) as other:
            residency.adopt(config.parse(self.toml(other.url), "models.toml", {}))
            residency.refresh(NoClient())
            self.assertFalse(residency.snapshot().seats["a"].measured)

    def test_a_disk_that_refuses(self) -> None:
        """It is told of once, costs nothing, and what it did not take is written when it does."""
        blocker = Path(self.folder, "portway")
        blocker.write_text("")
        residency = self.residency()
        self.use(residency)
        residency.save()
        residency.save()
        self.assertEqual(1, len([line for line in self.said if "can't be kept" in line]))
        blocker.unlink()
        residency.save()
        self.assertEqual(2, len(Notebook(self.path).read()))

    def test_killed(self) -> None:
        """A daemon that is killed has lost nothing of it, and the next one tells the measured size."""
        environ = {"XDG_STATE_HOME": self.folder}
        with DaemonProcess(self.toml(), environ) as daemon:
            with daemon.client() as client:
                self.assertEqual(200, client.call("POST", "/portway/load", b'{"model": "a"}').status)
            wait_for(lambda: len(Notebook(self.path).read()) == 2, "its writing down what it measured")
            daemon.send(signal.SIGKILL)
            daemon.wait()
        self.standin.memory.unload(self.standin.owner, self.standin.models["a"])
        with DaemonProcess(self.toml(), environ) as daemon, daemon.client() as client:
            [model] = client.call("GET", "/portway/residency").json["models"]
        self.assertEqual((6 * GB, True, False), (model["size"], model["measured"], model["loaded"]))
        self.assertGreater(model["load_s"], 0)


if __name__ == "__main__":
    unittest.main()
