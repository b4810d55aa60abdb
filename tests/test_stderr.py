"""stderr.py: a message is told as one, whatever is in it."""

import io
import unittest
from unittest import mock

from portway import stderr


class MessageTest(unittest.TestCase):
    def test_a_line(self):
        """It begins as all of ours do."""
        self.assertEqual("portway: ready \u2192 caf\u00e9\n", stderr.message("ready \u2192 caf\u00e9"))

    def test_further_lines(self):
        """None of them can be taken for another message, of ours or of anybody's."""
        text = "bad\nportway: all is well\n\n{}\r\nportway: again"
        expected = ["portway: bad", "  portway: all is well", "  {}\\r", "  portway: again"]
        self.assertEqual(expected, stderr.message(text).splitlines())

    def test_what_a_terminal_would_obey(self):
        """Escapes, a bell, C1 codes, overrides of direction and other alphabets' line ends are spelt out."""
        evil = "\x1b[2J\x07\x9b31m\u202e\u2028\x85\x0b\x0c\x00\ud800"
        told = stderr.message(evil)
        self.assertTrue(told.removesuffix("\n").isprintable())
        self.assertEqual(1, len(told.splitlines()))
        self.assertIn("\\x1b[2J\\x07\\x9b31m\\u202e\\u2028\\x85", told)

    def test_nobody_reads_it(self):
        """A closed pipe or a full disk is no failure of whoever had something to say."""
        broken = mock.Mock(spec=io.TextIOBase)
        broken.write.side_effect = OSError
        with mock.patch("sys.stderr", broken):
            stderr.say("x")
        broken.write.assert_called_once_with("portway: x\n")


if __name__ == "__main__":
    unittest.main()
