"""The documents tell all of the public surface, and nothing that is not there."""

import json
import re
import unittest
from pathlib import Path

from portway import cli, proxy, telemetry
from portway.ask import manual as ask_help
from portway.call import PHASES
from portway.errors import FAILURES
from scripts import guards
from scripts.guard_list import GUARDS
from scripts.recovery_list import RECOVERIES
from scripts.torture_rows import report

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
PACKAGE = ROOT / "portway"
SOURCE = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}


def section(title):
    """A section of the reference."""
    return re.split(r"^## ", REFERENCE.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


class ReferenceTest(unittest.TestCase):
    def test_every_route(self):
        """Each route stands in the table with its method, and no other does."""
        routes = {
            f"{method} {'' if path.startswith(('/health', '/metrics', '/portway/')) else '/v1'}{path}"
            for path, methods in proxy.ROUTES.items()
            for method in methods
        }
        self.assertEqual(routes, set(re.findall(r"^\| `((?:GET|POST) [^`]+)`", section("Routes"), re.MULTILINE)))

    def test_every_reason(self):
        """Each way of failing stands in the table with the status it leads to, and no other does."""
        rows = re.findall(r"^\| `([a-z_]+)` \|.*\| ([^|]*) \|$", section("Reasons"), re.MULTILINE)
        self.assertEqual(set(FAILURES), {reason for reason, _ in rows})
        for reason, status in rows:
            if status.isdigit():
                self.assertEqual(FAILURES[reason].status, int(status), reason)

    def test_every_consequence(self):
        """What the table says of fallback and cooldown is what errors.FAILURES does."""
        falls = {
            "yes": "yes",
            "yes, once": "once",
            "no": "no",
            "only behind another backend": "other_backend",
            "only with a larger window": "larger_window",
        }
        cools = {
            "no": "no",
            "": "no",
            "short, after repeated failures": "short",
            "after repeated failures": "count",
            "as Retry-After says": "told",
            "long, at once": "long",
        }
        form = r"^\| `([a-z_]+)` \|[^|]*\| ?([^|]*) \| ?([^|]*?) ?\|[^|]*\|$"
        rows = re.findall(form, section("Reasons"), re.MULTILINE)
        self.assertEqual(len(FAILURES), len(rows))
        for reason, next_one, cooldown in rows:
            with self.subTest(reason):
                if reason not in ("idle_timeout", "stream_broken"):  # after a stream's content nothing falls back
                    self.assertEqual(FAILURES[reason].falls_back, falls[next_one])
                self.assertEqual(FAILURES[reason].cools, cools[cooldown])

    def test_every_code_of_our_own(self):
        """Each code that an error of Portway's own carries is listed."""
        codes = {code for text in SOURCE.values() for code in re.findall(r'\bcode="([a-z_]+)"', text)}
        missing = [code for code in codes if f"`{code}`" not in REFERENCE]
        self.assertEqual([], missing)

    def test_every_warning(self):
        """Each word of X-Portway-Warning is listed."""
        words = {
            word for text in SOURCE.values() for word in re.findall(r'append\("([a-z_]+(?:\([a-z_.]+\))?)"\)', text)
        }
        listed = section("Warnings")
        self.assertGreater(len(words), 4)
        for word in words:
            self.assertIn("`ignored(NAME)`" if word.startswith("ignored(") else f"`{word}`", listed)

    def test_every_header(self):
        """Each header that Portway speaks of its own is listed, in README's table or in the reference."""
        headers = {name.lower() for text in SOURCE.values() for name in re.findall(r'"(X-[A-Z][A-Za-z-]+)"', text)}
        self.assertIn("x-served-by", headers)
        told = (REFERENCE + README).lower()
        self.assertEqual([], [name for name in sorted(headers) if name not in told])

    def test_every_log_field(self):
        """Each field of a log line is listed, and no other is."""
        record = telemetry.Record(0.0, 0.0)
        fields = set(json.loads(telemetry.line(record, telemetry.Price())))
        table = section("The log").split("|---|---|\n")[1]
        listed = {
            name
            for row in table.splitlines()
            if row.startswith("|")
            for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])
        }
        self.assertEqual(fields, listed)

    def test_every_phase(self):
        """Each phase in which a client can leave is named."""
        for phase in PHASES:
            self.assertIn(f"`{phase}`", section("The log"))

    def test_every_command(self):
        """Each command of `portway` and each exit code is named."""
        for name in re.findall(r"^  ([a-z][a-z-]+)  ", cli.HELP, re.MULTILINE):
            self.assertIn(name, section("Commands"))
        for code in re.findall(r"^  (\d+) ", cli.HELP, re.MULTILINE):
            self.assertRegex(section("Commands"), rf"\b{code}\b")


class ReadmeTest(unittest.TestCase):
    def test_the_guards_are_where_they_are_said_to_be(self):
        """Each guard's words stand in the source once, so that scripts/guards.py can take it away."""
        for guard in (*GUARDS, *RECOVERIES):
            for file, words, _ in guard.edits:
                self.assertEqual(1, (ROOT / file).read_text("utf-8").count(words), (guard.promise, file))

    def test_what_held(self):
        """README quotes the table that scripts/torture.py wrote, whole and as it is."""
        written = (ROOT / "docs" / "reliability.md").read_text("utf-8")
        table = written.split("## The table\n\n")[1].split("\n\n")[0]
        self.assertGreater(len(table.splitlines()), 3)
        self.assertIn(f"\n\n{report.MARK}\n{table}\n\n", README)

    def test_the_two_commands(self):
        """README's two commands are those that CI runs."""
        self.assertIn("python3 -m portway demo", README)
        self.assertIn("python3 -m unittest", README)
        self.assertIn("-m unittest", (ROOT / ".ci" / "run").read_text("utf-8"))

    def test_links(self):
        """Each file that README and the documents point to is there."""
        for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
            for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
                if "://" not in target:
                    self.assertTrue((document.parent / target).exists(), f"{document.name}: {target}")

    def test_every_option_of_ask_is_in_its_manual(self):
        """The manual of `ask` names each option it understands."""
        for option in ("--strict", "--no-cache", "--refresh", "--schema", "--last", "--show-thinking", "--completion"):
            self.assertIn(option, ask_help.manual())

    def test_the_design_names_every_file(self):
        """docs/design.md has a line for each module."""
        design = (ROOT / "docs" / "design.md").read_text("utf-8")
        self.assertEqual([], [name for name in SOURCE if "__" not in name and f"`{name}`" not in design])


class SecurityTest(unittest.TestCase):
    def test_every_recovery(self):
        """docs/reliability.md has the table of what makes Portway recover, each once."""
        said = (ROOT / "docs" / "reliability.md").read_text("utf-8")
        self.assertIn("\n".join(guards.table(RECOVERIES, "promise")), said)
        self.assertEqual(len(RECOVERIES), len({each.promise for each in RECOVERIES}))

    def test_every_guard(self):
        """SECURITY.md has the table that scripts/guards.py makes: each guard once, with the tests that notice."""
        said = (ROOT / "SECURITY.md").read_text("utf-8")
        self.assertIn("\n".join(guards.table()), said)
        self.assertEqual(len(GUARDS), len({guard.promise for guard in GUARDS}))

    def test_every_test(self):
        """Each test that is named is there."""
        for guard in (*GUARDS, *RECOVERIES):
            for name in guard.tests:
                module, *path = name.removeprefix("tests.").split(".")
                text = (ROOT / "tests" / f"{module}.py").read_text("utf-8")
                for part in path:
                    self.assertRegex(text, rf"(class|def) {part}\b", name)


if __name__ == "__main__":
    unittest.main()
