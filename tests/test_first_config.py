"""portway init: what it chooses, that what it writes is right, and that it overwrites nothing."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import tempfile
import tomllib
import unittest
from pathlib import Path
from unittest import mock

from portway import cli, config
from portway.commands import first_config
from portway.commands.first_config import GIB, LADDER, Found, choose, explain, write_down
from portway.standin.answers import StandInModel
from portway.standin.server import StandIn

CHAT = frozenset({"completion", "tools"})


def found(name, size, capabilities=CHAT, context=131072, per_token=65536):
    return Found(name, size, first_config.family(name, ""), frozenset(capabilities), context, per_token)


def parsed(memory, models=()):
    """What is chosen for so many GiB, checked as `portway check` does."""
    return config.parse(write_down(memory * GIB, choose(memory * GIB, models), first_config.OLLAMA), "init", {})


def billions(name):
    """Of parameters, by a model's name."""
    size = re.search(r":([0-9]+)b", name)
    return int(size[1]) if size else 5


class LadderTest(unittest.TestCase):
    def test_every_rung(self):
        """Each rung, with nothing pulled, is a valid configuration without a warning, and its everyday model fits."""
        for memory in LADDER:
            with self.subTest(memory=memory):
                loaded = parsed(memory)
                self.assertEqual((), loaded.warnings)
                everyday = loaded.flagged("default")
                self.assertTrue(everyday.name.startswith("fast-"))
                self.assertGreaterEqual(len(loaded.chain(everyday)), 2)

    def test_a_council(self):
        """Where one thinks there is a council under it, with the everyday model as its members; else there is none."""
        for memory in LADDER:
            models = parsed(memory).models
            thinkers = [name for name in models if name.startswith("think-")]
            self.assertEqual(bool(thinkers), "council" in models)
            if thinkers:
                panel = models["council"].panel
                self.assertEqual(
                    [parsed(memory).flagged("default").name] * 2, [member.name for member in panel.members]
                )
                self.assertEqual(thinkers, [panel.chairman])

    def test_what_does_not_fit_is_said(self):
        """No model is over the budget but the coder of a 24 GB machine, which says so; none exceeds the machine."""
        for memory in LADDER:
            room = first_config.budget(memory * GIB)
            choices = choose(memory * GIB, [])
            over = [each.place.name for each in choices if each.footprint.total > room]
            self.assertEqual(["coder-30b"] if memory == 24 else [], over)
            self.assertTrue(all(each.footprint.total <= memory * GIB - first_config.SYSTEM_ALONE for each in choices))
            text = write_down(memory * GIB, choices, first_config.OLLAMA)
            self.assertEqual(len(over), text.count("close other programs first"))

    def test_budget(self):
        """Of 24 GB 8 to 12 are left for models, as it is on a Mac in use; and more memory never leaves less."""
        self.assertTrue(8 * GIB <= first_config.budget(24 * GIB) <= 12 * GIB)
        budgets = [first_config.budget(memory * GIB) for memory in range(1, 200)]
        self.assertEqual(sorted(budgets), budgets)
        self.assertTrue(all(budget <= 0.75 * memory * GIB for memory, budget in enumerate(budgets, 1)))

    def test_between_the_rungs(self):
        """A machine between two rungs gets the lower one; one that tells a little less than it has, its own."""
        self.assertEqual(parsed(24).models.keys(), parsed(32).models.keys())
        self.assertEqual(
            [each.place.model for each in choose(24 * GIB, [])],
            [each.place.model for each in choose(int(22.4 * GIB), [])],
        )

    def test_too_small(self):
        """A machine that holds no model gets an error that says how much it takes."""
        with self.assertRaisesRegex(first_config.InitError, "8 GB are the least"):
            choose(4 * GIB, [])

    def test_shared_weights(self):
        """Two names for the same weights have the same window, or Ollama would load them anew at each switch."""
        models = parsed(24).models
        self.assertEqual(models["fast-9b"].model, models["think-9b"].model)
        self.assertEqual(models["fast-9b"].num_ctx, models["think-9b"].num_ctx)
        self.assertNotIn("fast-9b", models["think-9b"].fallback)


class PulledTest(unittest.TestCase):
    def test_recommended_and_there(self):
        """The recommended model is taken by what it really is."""
        models = parsed(24, [found("qwen3.5:9b", 6_600_000_000, {"completion", "thinking"}, 8192)]).models
        self.assertEqual(("qwen3.5:9b", 8192), (models["fast-9b"].model, models["fast-9b"].num_ctx))
        self.assertEqual(8192, models["think-9b"].num_ctx)

    def test_another_is_preferred(self):
        """A model that is there takes the place of one that would have to be fetched; its name says its size."""
        models = parsed(
            24, [found("mistral:7b", 4_400_000_000), found("nomic-embed-text", 274_000_000, {"embedding"})]
        ).models
        self.assertEqual("mistral:7b", models["fast-7b"].model)
        self.assertTrue(models["fast-7b"].default)
        self.assertIsNone(models["fast-7b"].think)
        self.assertEqual("7b", models["fast-7b"].flag)
        self.assertNotIn("think-7b", models)  # it can't
        self.assertEqual(("fast-7b", "fast-3b"), models["coder-30b"].fallback)

    def test_what_does_not_suit(self):
        """An embedding model, a coder, and one that is far too small or too large don't become the everyday model."""
        for unfit in (
            found("embedder:9b", 6_600_000_000, {"embedding"}),
            found("some-coder:9b", 6_600_000_000),
            found("tiny:1b", 700_000_000),
            found("huge:70b", 40_000_000_000),
            found("greedy:9b", 6_600_000_000, per_token=2_000_000),
        ):
            with self.subTest(unfit=unfit.name):
                self.assertEqual("qwen3.5:9b", parsed(24, [unfit]).flagged("default").model)

    def test_never_a_warning(self):
        """Whatever is there, on whatever machine: a valid configuration, no warning, no window beyond the model's."""
        chance = random.Random(4)
        names = (
            "qwen3:8b llama3.1:8b gemma3:4b granite4:3b granite3.3:8b llama3.2:1b llama3.2:3b qwen3:4b gemma3:1b "
            "qwen3-coder:30b devstral:24b gpt-oss:20b phi4:14b x/y:3b my.model nomic-embed-text "
            "qwen3.5:4b qwen3.5:9b qwen3.5:27b llama3.3:70b deepseek-r1:8b"
        ).split()
        kinds = [{"completion"}, CHAT, {"completion", "thinking"}, {"embedding"}]
        for _ in range(300):
            there = [
                found(name, int(billions(name) * chance.uniform(0.5e9, 1.1e9)), chance.choice(kinds),
                      chance.choice([4096, 32768, None]), chance.choice([None, 32768, 200_000]))
                for name in chance.sample(names, chance.randrange(len(names)))
            ]  # fmt: skip
            memory = chance.choice([*LADDER, 12, 36, 64, 128])
            with self.subTest(memory=memory, there=there):
                loaded = parsed(memory, there)
                self.assertEqual((), loaded.warnings)
                for model in loaded.models.values():
                    own = next((each for each in there if each.name == model.model), None)
                    if own is not None and own.context_length:
                        self.assertLessEqual(model.num_ctx, own.context_length)

    def test_one_family(self):
        """An everyday model of a fallback's own family gets another fallback: a chain in one family breaks as one."""
        loaded = parsed(8, [found("llama3.2:3b", 2_000_000_000)])
        families = {model.family for model in loaded.chain(loaded.flagged("default"))}
        self.assertEqual({"llama", "gemma"}, families)


class OllamaTest(unittest.TestCase):
    def test_asked(self):
        """What Ollama has is asked without loading anything; cloud models, which have no weights here, are left out."""
        models = [StandInModel("qwen3.5:9b", 6_600_000_000, ("completion", "thinking")), StandInModel("big:cloud", 400)]
        with StandIn(models) as standin:
            there = first_config.pulled(standin.url) or []
            self.assertEqual(0, standin.memory.stats().loads)
        self.assertEqual(["qwen3.5:9b"], [model.name for model in there])
        self.assertEqual("qwen", there[0].family)
        self.assertIn("thinking", there[0].capabilities)

    def test_not_there(self):
        """Without Ollama nothing is known, and that is no error."""
        with StandIn() as standin:
            url = standin.url
        self.assertIsNone(first_config.pulled(url))

    def test_address(self):
        """Ollama's own variable says where it is; what makes no address is left alone."""
        for given, url in {
            "": first_config.OLLAMA,
            "0.0.0.0:11500": "http://127.0.0.1:11500",
            "box.lan": "http://box.lan:11434",
            "http://127.0.0.1:1/": "http://127.0.0.1:1",
            "https://x/y z": first_config.OLLAMA,
        }.items():
            self.assertEqual(url, first_config.ollama_url({"OLLAMA_HOST": given}))


class CommandTest(unittest.TestCase):
    def setUp(self):
        self.home = Path(self.enterContext(tempfile.TemporaryDirectory()))
        standin = self.enterContext(StandIn([StandInModel("granite4:3b", 2_100_000_000)]))
        environ = {"HOME": str(self.home), "OLLAMA_HOST": standin.url, "PATH": os.defpath}
        self.enterContext(mock.patch.dict("os.environ", environ, clear=True))
        self.own = self.home / ".config" / "portway" / "models.toml"

    def run_init(self, *words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(["init", *words])
        return status, out.getvalue(), err.getvalue()

    def test_writes(self):
        """It writes the user's own file, for its owner alone, shows the arithmetic and what to fetch."""
        status, out, err = self.run_init("--memory", "24GB")
        self.assertEqual((0, ""), (status, err))
        self.assertEqual(0o600, self.own.stat().st_mode & 0o777)
        self.assertIn("for models    10.8 GB", out)
        self.assertIn("6.1 GB + 512 MB for 16384 tokens = 6.6 GB: fits, 4.2 GB left (not pulled)", out)
        self.assertIn("  ollama pull qwen3.5:9b\n", out)
        self.assertNotIn("ollama pull granite4:3b\n", out)
        self.assertIn(str(self.own), out)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual(0, cli.main(["check"]))
        self.assertNotIn("warning", said.getvalue())
        self.assertEqual("granite4:3b", tomllib.loads(self.own.read_text())["models"]["fast-3b"]["model"])

    def test_never_overwrites(self):
        """A file that is there stays as it is, also if it is a broken link."""
        self.own.parent.mkdir(parents=True)
        self.own.write_text("mine")
        status, _, err = self.run_init("--memory", "24GB")
        self.assertEqual(1, status)
        self.assertIn("--force", err)
        self.assertEqual("mine", self.own.read_text())
        self.own.unlink()
        self.own.symlink_to("nowhere")
        self.assertEqual(1, self.run_init("--memory", "24GB")[0])
        self.assertTrue(self.own.is_symlink())

    def test_force(self):
        """--force replaces it and keeps the old one beside it."""
        self.own.parent.mkdir(parents=True)
        self.own.write_text("mine")
        self.assertEqual(0, self.run_init("--memory", "16GB", "--force")[0])
        self.assertIn("[models.", self.own.read_text())
        self.assertEqual("mine", Path(f"{self.own}.old").read_text())
        self.assertEqual(["models.toml", "models.toml.old"], sorted(os.listdir(self.own.parent)))

    def test_output(self):
        """--output writes elsewhere; this machine's memory is what it is for if none is told."""
        with mock.patch.object(os, "sysconf", {"SC_PHYS_PAGES": 4 * 1024**2, "SC_PAGE_SIZE": 4096}.get):
            status, out, _ = self.run_init("--output", str(self.home / "x" / "m.toml"))
        self.assertEqual(0, status)
        self.assertIn("memory        16.0 GB", out)
        self.assertTrue((self.home / "x" / "m.toml").exists())
        self.assertFalse(self.own.exists())

    def test_refused(self):
        """What can't be done is a line on stderr, and nothing is written."""
        for words in (("--memory", "lots"), ("--memory", "4GB"), ("--memory", "24GB", "--output", "/proc/none/m.toml")):
            status, _, err = self.run_init(*words)
            self.assertEqual(1, status)
            self.assertRegex(err, r"\Aportway init: .+\n\Z")
        self.assertFalse(self.own.exists())

    def test_without_ollama(self):
        """Without Ollama it says that these are recommendations."""
        lines = list(explain(24 * GIB, choose(24 * GIB, []), "http://127.0.0.1:9", None))
        self.assertTrue(any("No Ollama answers at http://127.0.0.1:9" in line for line in lines))


if __name__ == "__main__":
    unittest.main()
