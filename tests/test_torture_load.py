"""Load, crashes, restarts and a machine that runs short, each for a moment; `scripts/torture.py` does it for longer."""

from __future__ import annotations

import unittest

from scripts.torture_rows import Row, World, crash, load, machine, soak


class TortureTest(unittest.TestCase):
    def assert_holds(self, row: Row) -> None:
        self.assertEqual((row.tries, ""), (row.held, "" if row.holds else row.note))
        self.assertGreater(row.tries, 0)

    def machine(self, fault: machine.Play) -> None:
        try:
            row = fault()
        except machine.NotHere as exc:
            self.skipTest(str(exc))
        self.assert_holds(row)

    def test_world(self) -> None:
        """The daemon that attacks are made on answers, and tells what it holds."""
        with World() as world:
            before = world.check()
            self.assertEqual(before.threads is None, world.settled(before).threads is None)

    def test_killed_backends(self) -> None:
        """No request is without an answer or a clear error, none answered twice, each in the log once."""
        self.assert_holds(load.fault_killed_backends(400, seed=3))

    def test_kill_9(self) -> None:
        """The cache is whole, every line of the log too, and the daemon starts again."""
        self.assert_holds(crash.fault_kill_9(3))

    def test_sigterm(self) -> None:
        """What is in flight comes to its end."""
        self.assert_holds(crash.fault_sigterm(1))

    def test_reload(self) -> None:
        """No request notices."""
        self.assert_holds(crash.fault_reload(8))

    def test_soak(self) -> None:
        """Too short for a slope, long enough for each kind of request."""
        self.assert_holds(soak.fault_soak(3.0))

    def test_disk_full(self) -> None:
        """Requests go on; later nothing is missing."""
        self.machine(machine.fault_disk_full)

    def test_no_file_may_grow(self) -> None:
        """The same where not even stderr can be written."""
        self.machine(machine.fault_no_file_may_grow)

    def test_no_descriptors(self) -> None:
        """Right answers or clear errors, and all is well again afterwards."""
        self.machine(machine.fault_no_descriptors)

    def test_no_threads(self) -> None:
        """Neither requests nor a reload are the end of the daemon."""
        self.machine(machine.fault_no_threads)

    def test_clock_jumps(self) -> None:
        """No limit, no age and no duration goes wrong by it."""
        self.machine(machine.fault_clock_jumps)


if __name__ == "__main__":
    unittest.main()
