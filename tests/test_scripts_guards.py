"""scripts/guards.py leaves nothing running behind."""

import os
import select
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from scripts import guards

HANGS = """
import subprocess, sys, unittest

class T(unittest.TestCase):
    def test_it(self):
        # what it starts holds the pipe's other end open for as long as it runs
        subprocess.Popen([sys.executable, "-c", "import os; f = open('fifo', 'w'); print('up', file=f, flush=True); "
                          "import signal; signal.pause()"])
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pause()
"""


class GuardsTest(unittest.TestCase):
    def test_tests_without_an_end(self) -> None:
        """They are ended, and what they started is, too."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "hangs.py").write_text(HANGS)
            fifo = os.open(_fifo(folder / "fifo"), os.O_RDONLY | os.O_NONBLOCK)
            with mock.patch.multiple(guards, PATIENCE=3.0, END=0.1):
                self.assertEqual(["no end"], guards._failures(["hangs"], folder))
            self.addCleanup(os.close, fifo)
            self.assertTrue(_nobody_writes(fifo))


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _nobody_writes(fifo: int) -> bool:
    """Within ten seconds; what was written is left out."""
    poll = select.poll()
    poll.register(fifo, select.POLLIN)
    while poll.poll(10_000):
        if not os.read(fifo, 100):
            return True
    return False
