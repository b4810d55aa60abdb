"""The benchmark on a tiny configuration: its answers have the shape they should have, and are plausible."""

from __future__ import annotations

import io
import json
import shutil
import sys
import unittest
from contextlib import redirect_stdout
from typing import ClassVar
from unittest import mock

from scripts.benchmark import command, native, peers, report
from scripts.benchmark.measure import Goal, Measurement, compare
from scripts.benchmark.native import Ask, Load, Shape
from scripts.benchmark.scenarios import QUICKLY, SCENARIOS, Effort
from scripts.benchmark.world import FAILING, PACED, PLAIN, TOOLS, World

TINY = Effort(rounds=1, seconds=0.1, many=50, entries=(1_100,), starts=1, processes=1)


@unittest.skipUnless(sys.platform.startswith("linux") and shutil.which("cc"), "needs Linux and a C compiler")
class NativeTest(unittest.TestCase):
    """The C programs, and what they measure."""

    world: World

    @classmethod
    def setUpClass(cls) -> None:
        cls.world = cls.enterClassContext(World())

    def ask(self, model: str, ask: Ask, shape: Shape, *, ollama: bool = False):
        return Load(self.world.tools, self.world.folder, self.world.direct(model, ollama=ollama), ask, shape).result()

    def test_they_are_compiled(self):
        """Else all that follows would be measured with something slow."""
        self.assertTrue(self.world.tools.native, self.world.tools.made_by)

    def test_count(self):
        """As many answers as asked for, on as many connections."""
        result = self.ask(PLAIN, Ask(), Shape(3, 5.0, count=30))
        self.assertEqual((30, 0, 0, 3), tuple(result[key] for key in ("answers", "errors", "unfinished", "opened")))
        self.assertEqual(30, result["whole"]["n"])
        self.assertLessEqual(result["whole"]["p50"], result["whole"]["p99"])

    def test_fresh_connections(self):
        """One for each request."""
        result = self.ask(PLAIN, Ask(), Shape(2, 5.0, count=20, fresh=True))
        self.assertEqual((20, 20), (result["answers"], result["opened"]))

    def test_large_body(self):
        """More than a socket takes at once."""
        self.assertEqual(5, self.ask(PLAIN, Ask(200 * 1024), Shape(2, 5.0, count=5))["answers"])

    def test_stamps(self):
        """Every chunk is seen and tells its age, in both protocols."""
        for ollama in (False, True):
            result = self.ask("text-1000-20", Ask(stream=True), Shape(2, 5.0, count=4), ollama=ollama)
            self.assertEqual((4, 80), (result["answers"], result["stamps"]))
            self.assertGreaterEqual(result["whole"]["p50"], 19_000)
            self.assertLess(result["ages"]["p50"], 5_000)

    def test_errors_count(self):
        """An answer that is none is no answer."""
        result = self.ask(FAILING, Ask(), Shape(1, 5.0, count=2))
        self.assertEqual((0, 2), (result["answers"], result["errors"]))
        self.assertIn("404", result["problem"])

    def test_they_are_no_bottleneck(self):
        """Several times as fast as Portway is, on the same machine at the same time."""
        direct = {"direct": self.world.direct(PLAIN), "portway": self.world.portway.target(f"openai-{PLAIN}")}
        measurement = compare(self.world, "", direct, Ask(), Shape(16, 0.3), rounds=2)
        self.assertEqual([], measurement.problems)
        self.assertLess(measurement.value("ratio.rate") or 1, 0.5)

    def test_portway_gives_the_same_answers(self):
        """Through every kind of backend, streamed and not, with tools, from the cache, demoted."""
        models = [f"{kind}-{name}" for kind in ("openai", "ollama") for name in (PLAIN, TOOLS)]
        for model in (*models, f"cached-{PLAIN}", "demoted"):
            for stream in (False, True):
                target = self.world.portway.target(model)
                ask = Ask(stream=stream, tools="tools" in model)
                result = Load(self.world.tools, self.world.folder, target, ask, Shape(1, 5.0, count=3)).result()
                self.assertEqual((3, 0), (result["answers"], result["errors"]), (model, stream, result["problem"]))
                if stream:
                    self.assertGreater(result["stamps"], 0, model)

    def test_a_paced_stream_is_paced(self):
        """100 chunks at 20 ms take 2 s."""
        result = self.ask(PACED, Ask(stream=True), Shape(1, 5.0, count=1))
        self.assertEqual(100, result["stamps"])
        self.assertAlmostEqual(2.0, result["seconds"], delta=0.3)

    def test_document(self):
        """The whole command: a table, and one JSON document as the last line."""
        said = io.StringIO()
        words = [
            f"--only={name}" for name in ("demotion", "cache", "entries", "models", "log", "ask", "process", "pinned")
        ]
        with mock.patch.object(command, "Effort", lambda: TINY), redirect_stdout(said):
            self.assertEqual(0, command.main(words), said.getvalue())
        document = json.loads(said.getvalue().splitlines()[-1])
        self.assertEqual([], document["failures"])
        self.assertIn("load average at the start", document["about"])
        for measurement in document["measurements"]:
            self.assertEqual([], measurement["problems"])
            for figures in measurement["targets"].values():
                self.assertGreater(figures["rate"], 0)


class FallbackTest(unittest.TestCase):
    """Without a compiler."""

    def test_it_works_and_says_so(self):
        """Slowly."""
        with mock.patch("shutil.which", return_value=None), World() as world:
            self.assertIn("PYTHON, AS THERE IS NO C COMPILER", world.tools.made_by)
            for ask, shape in (
                (Ask(), Shape(2, 5.0, count=10)),
                (Ask(stream=True), Shape(1, 5.0, count=2, fresh=True)),
            ):
                for target in (world.direct(PLAIN), world.portway.target(f"ollama-{PLAIN}")):
                    result = Load(world.tools, world.folder, target, ask, shape).result()
                    self.assertEqual((shape.count, 0), (result["answers"], result["errors"]))
                    self.assertEqual(32, result["stamps"] if ask.stream else 32)


class GoalTest(unittest.TestCase):
    """What is made of the figures."""

    figures: ClassVar = {"direct": {"p50_us": 50.0, "rate": 100.0}, "portway": {"p50_us": 120.0, "rate": 80.0}}

    def test_goals(self):
        """Added, ratio, a target's own, and one that is not known."""
        measurement = Measurement("", "whole", self.figures, notes={"rss_mb": 20})
        self.assertTrue(measurement.meets(Goal("added.p50_us", 70)))
        self.assertFalse(measurement.meets(Goal("added.p50_us", 69)))
        self.assertTrue(measurement.meets(Goal("ratio.rate", 0.8, at_least=True)))
        self.assertFalse(measurement.meets(Goal("portway.rate", 81, at_least=True)))
        self.assertTrue(measurement.meets(Goal("notes.rss_mb", 26)))
        self.assertIsNone(measurement.meets(Goal("portway.cpu_us", 1)))

    def test_who_held_things_up(self):
        """Load generator and upstream at their busiest, and how far they were ahead of Portway at the least."""
        figures = {"direct": {"rate": 100.0}, "portway": {"rate": 20.0, "load_busy": 0.25, "upstream_busy": 0.5}}
        slower = {"direct": {"rate": 60.0}, "portway": {"rate": 20.0, "load_busy": 0.125, "upstream_busy": 0.1}}
        against_itself = {"direct": {"rate": 21.0, "cpu_us": 1.0}, "portway": {"rate": 20.0}}
        about: dict[str, object] = {}
        hit = {"direct": {"rate": 10.0}, "portway": {"rate": 20.0}}  # asks nobody
        runs = (("a", figures), ("b", slower), ("c", against_itself), ("cache hit", hit))
        report.finish(about, [Measurement(name, "whole", each) for name, each in runs], 1.0)
        self.assertEqual("25% of a processor, in: a", about["load generator at its busiest"])
        self.assertEqual("50% of a processor, in: a", about["upstream at its busiest"])
        self.assertEqual("at least 3.0 times as many answers, in: b", about["without Portway between"])

    def test_what_is_known_of_a_python(self):
        """A build that says nothing may be optimized all the same."""
        said = {"CONFIG_ARGS": "'--enable-shared'", "PGO_PROF_USE_FLAG": "-fprofile-use", "CFLAGS": "-O2", "N": 1}
        for more, words in (
            ({}, ", built with optimizations unknown"),
            ({"CONFIG_ARGS": "'--enable-optimizations'"}, ", built with profile-guided optimization"),
            ({"PY_CORE_CFLAGS": "-O3 -fprofile-use"}, ", built with profile-guided optimization"),
            ({"Py_GIL_DISABLED": 1}, ", free-threaded, built with optimizations unknown"),
        ):
            variables = {**said, **more}
            with (
                mock.patch("sysconfig.get_config_vars", return_value=variables),
                mock.patch("sysconfig.get_config_var", variables.get),
            ):
                self.assertEqual(words, report._build())

    def test_against_litellm(self):
        """Rate, added time and memory, each by its own measure; nothing where it did not answer."""
        figures = {"direct": {"p50_us": 50.0, "rate": 1000.0}, "portway": {"p50_us": 100.0, "rate": 800.0}}
        figures["LiteLLM"] = {"p50_us": 5050.0, "rate": 8.0, "answers": 5.0}
        measurement = Measurement("", "whole", figures, notes={"portway_rss_mb": 25.0, "LiteLLM_rss_mb": 330.0})
        peers._against_litellm(measurement)
        found = [measurement.value(goal.key) for goal in measurement.goals]
        self.assertEqual([100.0, 100.0, 13.2], found)
        self.assertTrue(all(measurement.meets(goal) for goal in measurement.goals))
        del figures["LiteLLM"]["answers"]
        without = Measurement("", "whole", figures)
        peers._against_litellm(without)
        self.assertEqual(((), {}), (without.goals, without.notes))

    def test_names(self):
        """The quick ones are some of all."""
        self.assertLess(set(QUICKLY), set(SCENARIOS))

    def test_bodies(self):
        """A body has the size that was asked for, whoever is asked."""
        for size in (2048, 200 * 1024):
            (request,) = native.requests(native.Target(1, "m"), Ask(size))
            self.assertEqual(size, len(request.partition(b"\r\n\r\n")[2]))
