"""scripts/stress.py: what it reads of a machine, what it makes of a run, and a run itself on stand-ins."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import unittest
import xml.etree.ElementTree as ET
from pathlib import Path

from portway.standin.answers import StandInModel
from portway.standin.memory import Memory
from scripts import stress
from scripts.stress import Answer, Look, Process, Sample, Target, Told

# the processes of a Mac, as `ps -axo pid=,ppid=,rss=,comm=` prints them; a runner is a child of the server
PS = """\
    1     0  20480 /sbin/launchd
  501     1 149520 /Applications/Ollama.app/Contents/MacOS/Ollama
  502   501  61440 /Applications/Ollama.app/Contents/Resources/ollama
 7001   502 6912345 /Applications/Ollama.app/Contents/Resources/ollama
 7100   502  10240 /bin/sh
 7101  7100  20480 /Users/me/My Tools/some helper
 8000     1 544976 /Applications/Some App (Alpha).app/Contents/MacOS/Some App (Alpha)
"""
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               17490.
Pages active:                            468148.
Pages wired down:                        251554.
"Translation faults":                 880109291.
Pages occupied by compressor:            320058.
Pageins:                               10427527.
Pageouts:                                 34549.
Swapins:                                   1000.
Swapouts:                                  2000.
"""
VMSTAT = "nr_free_pages 4946213\npgpgin 100\npgpgout 2345\npswpin 1\npswpout 7\n"


SOURCES = Path(stress.__file__).resolve().parent.parent / "portway"
WIRED = any("Residency(" in path.read_text("utf-8") for path in SOURCES.rglob("*.py") if path.name != "residency.py")


def run(*argv):
    """(exit code, stdout's lines) of one run in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = stress.main(argv)
    return status, out.getvalue().splitlines()


class ReadingTest(unittest.TestCase):
    def test_macos(self):
        """Of a Mac's processes the servers' whole trees count, each process once."""
        processes = stress.parse_ps(PS)
        self.assertEqual(7, len(processes))
        self.assertEqual("some helper", processes[5].name)
        self.assertEqual((149520 + 61440 + 6912345 + 10240 + 20480) * 1024, stress.tree_rss(processes))
        self.assertEqual((34549, 2000 * 16384), stress.parse_vm_stat(VM_STAT))
        self.assertEqual((None, None), stress.parse_vm_stat(""))

    def test_linux(self):
        """So for /proc, where a process's name may hold blanks and parentheses."""
        page = os.sysconf("SC_PAGE_SIZE")
        self.assertEqual((2345, 7 * page), stress.parse_vmstat(VMSTAT))
        self.assertEqual((None, None), stress.parse_vmstat(""))
        rest = " ".join(str(number) for number in range(5, 24))
        with tempfile.TemporaryDirectory() as root:
            for pid, name, parent, pages in ((10, "ollama", 1, 100), (11, "od) d (x", 10, 50), (12, "bash", 1, 7)):
                (Path(root) / str(pid)).mkdir()
                (Path(root) / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} {rest} {pages} 9 9\n")
            (Path(root) / "uptime").write_text("1")
            processes = sorted(stress.read_processes(root))
        self.assertEqual(Process(11, 10, 50 * page, "od) d (x"), processes[1])
        self.assertEqual(150 * page, stress.tree_rss(processes))

    def test_no_server(self):
        """Without a model server there is nothing to count."""
        self.assertIsNone(stress.tree_rss([Process(1, 0, 5, "launchd")]))

    def test_this_machine(self):
        """This machine can be looked at, whatever it is."""
        look = stress.look_at_machine()
        self.assertTrue(look.free is None or 0 <= look.free <= 100)


class OptionsTest(unittest.TestCase):
    def test_mix(self):
        """A mix names models and how many clients each has."""
        self.assertEqual({"fast-9b": 4, "coder-30b": 1}, stress.parse_mix("fast-9b=4, coder-30b"))
        self.assertEqual("4 x fast-9b, 1 x coder-30b", str(stress.parse_mix("fast-9b=4,coder-30b=1")))
        for wrong in ("", "=3", "a=0", "a=x", "a=257", "a=1,,b=1"):
            with self.assertRaises(argparse.ArgumentTypeError, msg=wrong):
                stress.parse_mix(wrong)

    def test_refused(self):
        """What makes no sense ends with exit code 2 before anything is started."""
        for argv in (("--no-residency",), ("--url", "http://127.0.0.1:1"), ("--simulate", "--mix", "nobody=1")):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                self.assertEqual(2, run(*argv)[0])
            self.assertRegex(err.getvalue(), r"\Astress.py: .+\n\Z")
        for argv in (("--requests", "0"), ("--seconds", "1e9"), ("--seconds", "nan")):
            with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit):
                run("--simulate", *argv)


def told(looks, answers=()):
    return Told(list(answers), [Sample(float(at), look, 1) for at, look in enumerate(looks)])


REAL = Target("a machine", "", stress.look_at_machine)


class VerdictTest(unittest.TestCase):
    ANSWERED = Answer(0.0, "fast-9b", "fast-9b", True, 0.5, 1.0)

    def test_calm(self):
        """A run with answers, without swapping, is calm; pages that were out before it don't count."""
        document = stress.judge(told([Look(5, 60.0, 10, 10**12)] * 3, [self.ANSWERED]), REAL)
        self.assertEqual(
            ("calm", 1, 0), (document["verdict"], document["answered"], document["memory"]["swapped_out_bytes"])
        )

    def test_swapped(self):
        """What was swapped out during the run is thrashing."""
        document = stress.judge(told([Look(swapped=0), Look(swapped=10**9)], [self.ANSWERED]), REAL)
        self.assertEqual(("thrashed", ["1.0 GB were swapped out"]), (document["verdict"], document["why"]))

    def test_tight(self):
        """So is memory that is nearly used up in more than a quarter of the samples, and not in one of them."""
        self.assertEqual(
            "thrashed",
            stress.judge(told([Look(free=5.0)] * 2 + [Look(free=50.0)] * 2, [self.ANSWERED]), REAL)["verdict"],
        )
        self.assertEqual(
            "calm", stress.judge(told([Look(free=5.0)] + [Look(free=50.0)] * 9, [self.ANSWERED]), REAL)["verdict"]
        )

    def test_nothing_answered(self):
        """A run in which nothing was answered proves nothing."""
        failed = Answer(0.0, "fast-9b", "", False, None, 1.0, "502 connect_failed")
        document = stress.judge(told([Look()], [failed]), REAL)
        self.assertEqual(("nothing answered", 1), (document["verdict"], document["failed"]))
        self.assertEqual({"502 connect_failed": 1}, document["models"]["fast-9b"]["errors"])

    def test_overcommitted(self):
        """Each load that leaves more in memory than there is counts, also between two samples; so do too many loads."""
        shared = Memory(budget=10)
        resident = [shared.claim(owner, StandInModel("x", 6), 1) for owner in ("a", "b")]
        target = Target("stand-ins", "", Look, memory=shared)
        document = stress.judge(told([Look(6), Look(12)], [self.ANSWERED]), target)
        self.assertEqual("thrashed", document["verdict"])
        self.assertIn("1 of 2 loads left more in memory than there is", document["why"][0])
        self.assertEqual(
            (1, 1, 12), tuple(document["memory"][key] for key in ("overcommits", "samples_over_budget", "peak_bytes"))
        )
        self.assertNotIn(None, resident)
        many = Memory(budget=10)
        for _ in range(stress.MANY_LOADS + 1):
            each = many.claim("a", StandInModel("x", 6), 1)
            assert each is not None
            many.abandon(each)
        document = stress.judge(told([Look(6)], [self.ANSWERED]), Target("stand-ins", "", Look, memory=many))
        self.assertEqual(["9 loads for 1 requests"], document["why"])

    def test_demoted(self):
        """An answer by another model than the one asked is a demotion; one whose model isn't told is none."""
        answers = [self.ANSWERED, self.ANSWERED._replace(served_by="fast-3b"), self.ANSWERED._replace(served_by="")]
        self.assertEqual(1, stress.judge(told([Look()], answers), REAL)["demoted"])

    def test_quantiles(self):
        """Of nothing there is no quantile."""
        self.assertEqual(
            (None, 1.0, 3.0),
            (stress.quantile([], 0.5), stress.quantile([1.0], 0.95), stress.quantile([1.0, 2.0, 3.0], 0.95)),
        )


class DrawingTest(unittest.TestCase):
    def test_over_the_limit(self):
        """Moments over the budget stand out, and the scale is told."""
        looks = [Look(models=10**9 * number, budget=10 * 10**9) for number in range(20)]
        line = next(iter(list(stress.drawn(told(looks), REAL))[1:]))
        self.assertRegex(line, r"^models, GB +\|[^!]+[! ]+\| up to 19, of 10$")

    def test_nothing(self):
        """A run without a sample can be drawn, too."""
        self.assertEqual(1, len(list(stress.drawn(Told(), REAL))))
        ET.fromstring(stress.as_svg(Told(), REAL, {"verdict": "calm", "why": ["<nothing> & more"]}))


class RunTest(unittest.TestCase):
    def test_without_the_arbiter(self):
        """Without the arbiter two engines, blind to each other, load more than there is, several times."""
        with tempfile.TemporaryDirectory() as folder:
            svg = Path(folder) / "run.svg"
            status, lines = run(
                "--simulate", "--no-residency", "--requests", "24", "--seconds", "30", "--svg", str(svg)
            )
            drawing = ET.fromstring(svg.read_text())
        document = json.loads(lines[-1])
        self.assertEqual((1, "thrashed", False), (status, document["verdict"], document["residency"]))
        self.assertGreater(document["memory"]["overcommits"], 1)
        self.assertGreater(document["memory"]["peak_bytes"], document["memory"]["budget_bytes"])
        self.assertEqual((24, 24), (document["requests"], document["answered"]))
        self.assertTrue(any(line.startswith("models, GB") and "!" in line for line in lines))
        self.assertGreaterEqual(len(drawing.findall("{http://www.w3.org/2000/svg}polyline")), 3)

    @unittest.skipUnless(WIRED, "this Portway has no arbiter yet")
    def test_with_the_arbiter(self):
        """With it no moment is over the budget, and every request is answered."""
        status, lines = run("--simulate", "--requests", "24", "--seconds", "60", "--quiet")
        document = json.loads(lines[-1])
        self.assertEqual((0, "calm", True), (status, document["verdict"], document["residency"]), document)
        self.assertEqual(0, document["memory"]["overcommits"])
        self.assertEqual(0, document["memory"]["samples_over_budget"])
        self.assertLessEqual(document["memory"]["peak_bytes"], document["memory"]["budget_bytes"])
        self.assertEqual((24, 0), (document["answered"], document["failed"]))

    def test_what_fits(self):
        """Where all fits the same run is calm without the arbiter, too; so the verdict is about memory."""
        status, lines = run(
            "--simulate", "--no-residency", "--budget", "60GB", "--requests", "12", "--seconds", "30", "--quiet"
        )
        self.assertEqual((0, "calm"), (status, json.loads(lines[-1])["verdict"]))


if __name__ == "__main__":
    unittest.main()
