"""The counts per request that CI compares: they are stable, and what has grown is found."""

from __future__ import annotations

import io
import json
import unittest
from contextlib import redirect_stderr, redirect_stdout
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


class CountedTest(unittest.TestCase):
    """The counting itself, on the cheapest case."""

    def test_instructions_are_stable(self):
        """Two runs differ by far less than the tolerance, and tell where the instructions are."""
        first, second = (counts.counted("instructions", "hit") for _ in range(2))
        self.assertGreater(first["instructions"], 500)
        self.assertAlmostEqual(1.0, first["instructions"] / second["instructions"], delta=0.03)
        self.assertTrue(any("proxy.py" in place for place, _ in first["where"]), first["where"])

    def test_nothing_is_kept(self):
        """A request leaves next to nothing behind."""
        self.assertLess(counts.counted("memory", "hit")["kept_blocks"], 3)

    def test_the_command_fails_when_something_has_grown(self):
        """With the case, on stderr."""
        said = io.StringIO()
        found = {"instructions": 10.0, "syscalls": 1.0, "kept_blocks": 0.0, "peak_bytes": 1.0}
        baseline = json.dumps({counts.VERSION: {"hit": {"instructions": 1.0, "syscalls": 20.0}}})
        with (
            mock.patch.object(counts, "CASES", {"hit": counts.CASES["hit"]}),
            mock.patch.object(counts, "counted", lambda _what, _case: found),
            mock.patch.object(
                counts, "BASELINE", mock.Mock(**{"exists.return_value": True, "read_text.return_value": baseline})
            ),
            mock.patch.dict(counts.SLACK, {"instructions": 0.0}),
            redirect_stderr(said),
            redirect_stdout(io.StringIO()),
        ):
            self.assertEqual(1, counts.main([]))
        self.assertEqual("hit: instructions has grown from 1.0 to 10.0\n", said.getvalue())
