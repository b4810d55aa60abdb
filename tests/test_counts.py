"""The counts per request that CI compares: they are stable, and what has grown is found."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import unittest
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import ClassVar
from unittest import mock

from scripts import counts


class GrownTest(unittest.TestCase):
    """The comparison."""

    before: ClassVar = {"plain": {"instructions": 1000.0, "syscalls": 8.0, "kept_blocks": 0.0}}

    def test_within_tolerance(self):
        """A tenth more is let pass, and less is always fine."""
        for found in (1100.0, 1000.0, 1.0):
            self.assertEqual([], counts.grown({"plain": {"instructions": found}}, self.before))

    def test_beyond(self):
        """More than a tenth is named with both numbers."""
        (line,) = counts.grown({"plain": {"instructions": 1101.0}}, self.before)
        self.assertIn("plain: instructions has grown from 1000.0 to 1101.0", line)

    def test_slack(self):
        """Where a tenth is next to nothing, so much more is needed: not one system call in ten requests."""
        self.assertEqual([], counts.grown({"plain": {"syscalls": 9.0, "kept_blocks": 1.9}}, self.before))
        self.assertEqual(2, len(counts.grown({"plain": {"syscalls": 9.1, "kept_blocks": 2.1}}, self.before)))

    def test_new_case(self):
        """What has no baseline can't have grown."""
        self.assertEqual([], counts.grown({"new": {"instructions": 5.0}}, self.before))

    def test_a_busy_machine(self):
        """Of two runs each count's lower one is compared."""
        one, other = {"hit": {"instructions": 9.0, "syscalls": 3.0}}, {"hit": {"instructions": 8.0, "syscalls": 4.0}}
        self.assertEqual({"hit": {"instructions": 8.0, "syscalls": 3.0}}, counts.lower(one, other))

    def test_fallen(self):
        """What is so far below that it could grow by a tenth unseen is named too, and fails nothing."""
        (line,) = counts.fallen({"plain": {"instructions": 900.0, "syscalls": 7.5}}, self.before)
        self.assertEqual("plain: instructions fell from 1000.0 to 900.0: --record would keep it there", line)
        self.assertEqual([], counts.fallen({"plain": {"instructions": 950.0}, "new": {"syscalls": 1.0}}, self.before))


class RecordTest(unittest.TestCase):
    """Writing the file anew."""

    def test_each_python_has_its_own(self):
        """Its counts replace those of its version; other versions' stay."""
        with tempfile.TemporaryDirectory() as folder:
            file, program = Path(folder) / "counts.json", Path(folder) / "python"
            file.write_text('{"3.11": {"hit": {"syscalls": 1}}, "3.77": {"hit": {"syscalls": 2}}}')
            program.write_text(
                '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.77.5 || echo \'{"hit": {"syscalls": 3}}\'\n'
            )
            program.chmod(0o755)
            with mock.patch.object(counts, "BASELINE", file), redirect_stderr(io.StringIO()):
                self.assertEqual(0, counts.record([str(program)]))
            found = json.loads(file.read_text())
        self.assertEqual({"3.11": {"hit": {"syscalls": 1}}, "3.77": {"hit": {"syscalls": 3}}}, found)

    def test_every_version_that_is_here(self):
        """This one among them, each once."""
        found = counts.pythons()
        self.assertIn(sys.executable, found)
        self.assertEqual(len(found), len(set(found)))

    def test_all_cases_are_recorded(self):
        """counts.json has every case of each version."""
        baseline = json.loads(counts.BASELINE.read_text())
        self.assertTrue({"3.11", "3.12", "3.13"} <= baseline.keys())
        for version, cases in baseline.items():
            self.assertEqual(set(counts.CASES), set(cases), version)


class CountedTest(unittest.TestCase):
    """The counting itself, on the cheapest case."""

    def test_instructions_are_stable(self):
        """Two runs differ by far less than the tolerance, and tell where the instructions are."""
        first, second = (counts.counted("instructions", "hit") for _ in range(2))
        self.assertGreater(first["instructions"], 500)
        self.assertAlmostEqual(1.0, first["instructions"] / second["instructions"], delta=0.05)
        self.assertTrue(any("proxy.py" in place for place, _ in first["where"]), first["where"])

    def test_nothing_is_kept(self):
        """A request leaves next to nothing behind."""
        self.assertLess(counts.counted("memory", "hit")["kept_blocks"], 3)

    @unittest.skipUnless(shutil.which("strace"), "needs strace")
    def test_system_calls(self):
        """A hit needs a handful; or why they can't be counted is said."""
        said = io.StringIO()
        with redirect_stderr(said):
            counts._say_once.cache_clear()
            found = counts.counted("syscalls", "hit")
        if found:
            self.assertTrue(1 < found["syscalls"] < 30, found)
        else:
            self.assertIn("system calls are not counted", said.getvalue())

    def test_without_strace(self):
        """All else is counted, and it is said once."""
        said = io.StringIO()
        counted = mock.Mock(return_value={"instructions": 1.0, "kept_blocks": 0.0})
        with (
            mock.patch("shutil.which", return_value=None),
            mock.patch.object(counts, "counted", counted),
            redirect_stderr(said),
        ):
            counts._say_once.cache_clear()
            for case in ("plain", "hit"):
                self.assertEqual({"instructions", "kept_blocks"}, set(counts._all_counts(case)))
        self.assertEqual("strace is not installed: system calls are not counted\n", said.getvalue())
        self.assertEqual({"instructions", "memory"}, {call.args[0] for call in counted.call_args_list})

    def test_the_command_fails_when_something_has_grown(self):
        """With the case, on stderr."""
        said = io.StringIO()
        found = {"instructions": 10.0, "syscalls": 1.0, "kept_blocks": 0.0, "peak_bytes": 1.0}
        baseline = json.dumps({counts.VERSION: {"hit": {"instructions": 1.0, "syscalls": 1.0}}})
        with (
            mock.patch.object(counts, "CASES", {"hit": counts.CASES["hit"]}),
            mock.patch.object(counts, "counted", side_effect=lambda _what, _case: found) as counted,
            mock.patch.object(
                counts, "BASELINE", mock.Mock(**{"exists.return_value": True, "read_text.return_value": baseline})
            ),
            mock.patch.dict(counts.SLACK, {"instructions": 0.0}),
            redirect_stderr(said),
            redirect_stdout(io.StringIO()),
        ):
            self.assertEqual(1, counts.main([]))
        self.assertEqual("hit: instructions has grown from 1.0 to 10.0\n", said.getvalue())
        asked = [call.args for call in counted.call_args_list]
        self.assertEqual([2, 2], [asked.count((what, "hit")) for what in ("instructions", "memory")])
