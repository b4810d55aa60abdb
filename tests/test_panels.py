"""[models.NAME] with a `kind`: councils and cascades in the configuration."""

from __future__ import annotations

import json
import unittest

from portway import config
from portway.config import ConfigError
from portway.panels import Cascade, Council, Member

MODELS = """
[backends.o]
kind = "ollama"
url = "http://127.0.0.1:11434"
[models.a]
backend = "o"
model = "x"
aliases = ["first"]
[models.b]
backend = "o"
model = "y"
[models.e]
backend = "o"
model = "z"
capabilities = ["embedding"]
"""
COUNCIL = '[models.c]\nkind = "council"\n'
GOOD = COUNCIL + 'members = ["a", "b"]\nchairman = "b"\n'


def panel_of(text: str) -> Council | Cascade | None:
    return config.parse(MODELS + text, "m.toml", {}).models["c"].panel


def mistakes(text: str) -> list[str]:
    """Each mistake's line, without the name of the file."""
    try:
        config.parse(MODELS + text, "m.toml", {})
    except ConfigError as exc:
        return [str(mistake) for mistake in exc.mistakes]
    return []


class ValuesTest(unittest.TestCase):
    def test_council(self) -> None:
        """All that may be said of a council."""
        text = COUNCIL + (
            'members = ["a", { name = "b", params = { temperature = 0.2 } }, "a"]\nchairman = "b"\nquorum = 1\n'
            'on_partial = "fail"\nparallel = false\nmember_prompt = "x\\ny"\nchairman_prompt = "{responses}"\n'
            'timeouts = { total = "2m" }\naliases = ["wise"]\nflag = "w"\ndefault = true\n'
        )
        got = config.parse(MODELS + text, "m.toml", {})
        model = got.models["c"]
        members = (Member("a"), Member("b", {"temperature": 0.2}), Member("a"))
        self.assertEqual(Council(members, "b", 1, "fail", False, "x\ny", "{responses}"), model.panel)
        self.assertEqual(("council", 120.0, "w"), (model.backend.kind, model.timeouts.total, model.flag))
        self.assertIs(model, got.resolve("wise"))
        self.assertIs(model, got.resolve("flag:council"))
        self.assertEqual([model], got.chain(model))
        self.assertEqual(["o"], list(got.backends))

    def test_cascade(self) -> None:
        """All that may be said of a cascade."""
        got = panel_of('[models.c]\nkind = "cascade"\nmembers = ["a", "b"]\nmin_probability = 0.5\n')
        self.assertEqual(Cascade((Member("a"), Member("b")), 0.5), got)

    def test_quorum(self) -> None:
        """Half of the members, rounded up, unless told otherwise; all of them if none may fail."""
        for count, extra, needed in (
            (2, "", 1),
            (3, "", 2),
            (5, "", 3),
            (4, "quorum = 4", 4),
            (3, 'on_partial = "fail"', 3),
        ):
            panel = panel_of(f'{COUNCIL}members = {json.dumps(["a"] * count)}\nchairman = "b"\n{extra}\n')
            assert isinstance(panel, Council)
            self.assertEqual(needed, panel.needed)


class MistakesTest(unittest.TestCase):
    def check(self, text: str, *expected: str) -> None:
        """Each of `expected` is the beginning of a line that is said, and nothing else is said."""
        found = mistakes(text)
        self.assertEqual(len(expected), len(found), found)
        for line, start in zip(sorted(found), sorted(expected), strict=True):
            self.assertTrue(line.startswith(start), f"{line!r} does not begin with {start!r}")

    def test_each(self) -> None:
        """Each slip is told where it is, with what is allowed."""
        c = "models.c"
        table: dict[str, tuple[str, ...]] = {
            COUNCIL: (f"{c}.members: missing", f"{c}.chairman: missing"),
            '[models.c]\nkind = "counsil"\n': (
                f"{c}.kind: 'counsil' does not fit; allowed: council or cascade, or none; did",
            ),
            "[models.c]\nkind = 1\n": (f"{c}.kind: 1 is a whole number",),
            '[models.c]\nkind = ""\n': (f"{c}.kind: '' does not fit",),
            COUNCIL + 'members = ["a"]\nchairman = "b"': (f"{c}.members: 1 of them; allowed: 2 to 8",),
            COUNCIL + f'members = {json.dumps(["a"] * 9)}\nchairman = "b"': (
                f"{c}.members: 9 of them; allowed: 2 to 8",
            ),
            COUNCIL + 'members = ["a", "first"]\nchairman = "zz"': (
                f"{c}.members[1]: 'first' is no model; allowed: a, b, e or c; did you mean a?",
                f"{c}.chairman: 'zz' is no model",
            ),
            COUNCIL + 'members = ["a", { nam = "b" }]\nchairman = "b"': (
                f"{c}.members[1].name: missing",
                f"{c}.members[1].nam: unknown key",
            ),
            COUNCIL + 'members = ["a", { name = "b", params = { model = "x" } }]\nchairman = "b"': (
                f"{c}.members[1].params.model: belongs to the request",
            ),
            COUNCIL + 'members = "a"\nchairman = "b"': (f"{c}.members: text, and no list", f"{c}.members: 0 of them"),
            COUNCIL + 'members = ["a", 1]\nchairman = "b"': (f"{c}.members[1]: 1 is a whole number",),
            COUNCIL + 'members = ["a", "e"]\nchairman = "b"': (f"{c}.members[1]: 'e' only makes embeddings",),
            GOOD + "quorum = 3": (f"{c}.quorum: there are 2 members; allowed: 1 to 2",),
            GOOD + 'on_partial = "stop"': (f"{c}.on_partial: 'stop' does not fit",),
            GOOD + 'chairman_prompt = "Choose."': (f"{c}.chairman_prompt: {{responses}} does not stand in it once",),
            GOOD + 'member_prompt = "\\u0007"': (f"{c}.member_prompt: ",),
            GOOD + "min_probability = 0.5": (f"{c}.min_probability: unknown key",),
            '[models.c]\nkind = "cascade"\nmembers = ["a", "b"]\nmin_probability = 1': (
                f"{c}.min_probability: 1 is out",
            ),
            '[models.c]\nkind = "cascade"\nmembers = ["a", "b"]\nchairman = "a"': (f"{c}.chairman: unknown key",),
            GOOD + '[models.d]\nbackend = "o"\nmodel = "w"\nfallback = ["c"]': (
                "models.d.fallback[0]: 'c' is a council",
            ),
            GOOD + '[models.d]\nbackend = "o"\nmodel = "w"\nmembers = ["a"]': ("models.d.members: unknown key",),
        }
        for text, expected in table.items():
            with self.subTest(text):
                self.check(text, *expected)

    def test_not_a_models(self) -> None:
        """What is told a server, or kept of an answer, belongs to the members."""
        for line in (
            'keep_alive = "5m"',
            "num_ctx = 4096",
            'cache = "1d"',
            'backend = "o"',
            'model = "x"',
            "think = true",
            'fallback = ["a"]',
            "strict = true",
            "params = {}",
            "timeouts = { idle = 1 }",
        ):
            with self.subTest(line):
                key = "timeouts.idle" if line.startswith("timeouts") else line.split()[0]
                self.check(GOOD + line, f"models.c.{key}: unknown key")

    def test_cycles(self) -> None:
        """Nobody is a part of itself, also not by way of another; each cycle is told once."""
        itself = COUNCIL + 'members = ["a", "c"]\nchairman = "b"\n'
        self.check(itself, "models.c.members[1]: a cycle: c -> c")
        other = '[models.d]\nkind = "cascade"\nmembers = ["a", "c"]\n'
        self.check(
            COUNCIL + 'members = ["a", "b"]\nchairman = "d"\n' + other, "models.c.chairman: a cycle: c -> d -> c"
        )
        self.assertEqual([], mistakes(GOOD + other))

    def test_warnings(self) -> None:
        """A chairman that is all of the members, and a quorum without effect, are told."""
        text = COUNCIL + 'members = ["a", "a"]\nchairman = "a"\nquorum = 1\non_partial = "fail"\n'
        chairman, quorum = config.parse(MODELS + text, "m.toml", {}).warnings
        self.assertTrue(chairman.startswith("models.c.chairman: a is all of the members, too"))
        self.assertTrue(quorum.startswith("models.c.quorum: no effect"))
        self.assertEqual((), config.parse(MODELS + GOOD, "m.toml", {}).warnings)


if __name__ == "__main__":
    unittest.main()
