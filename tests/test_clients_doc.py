"""docs/clients.md says nothing that no test has seen, but for what it marks as not tested."""

import json
import re
import tomllib
import unittest

from portway import errors
from tests.clients_doc import DOCUMENT, blocks, sections
from tests.daemon import ROOT

# What other tests run. A block that is added to the document has to be added to one of them.
RUN = {
    "curl": ["sh"] * 4,  # test_curl.py
    "OpenAI SDK for Python": ["python"],  # test_sdk_python.py
    "OpenAI SDK for Node": ["js"],  # test_node.py
    "Vercel AI SDK": ["js"],
    "OpenCode": ["json", "sh"],  # test_opencode.py
}


class ClientsTest(unittest.TestCase):
    def test_every_block_is_run(self):
        """Each fenced block stands in a section whose blocks are run, or in the one that is marked."""
        found = {title: re.findall(r"^```(\w+)$", text, re.MULTILINE) for title, text in sections().items()}
        self.assertTrue(sections()["Others"].startswith("\nNot tested here"))
        del found["Others"]
        self.assertEqual(RUN, {title: languages for title, languages in found.items() if languages})

    def test_models_are_those_of_the_shipped_configuration(self):
        """Each model that is named comes with Portway, OpenCode's with its right window."""
        models = tomllib.loads((ROOT / "config" / "models.toml").read_text("utf-8"))["models"]
        named = re.findall(r"\b(?:fast|coder|think)-\d+b\b", DOCUMENT.read_text("utf-8"))
        self.assertEqual(set(), set(named) - set(models))
        (settings,) = map(json.loads, blocks("OpenCode", "json"))
        for name, model in settings["provider"]["portway"]["models"].items():
            self.assertEqual(models[name]["num_ctx"], model["limit"]["context"])

    def test_errors_have_these_statuses(self):
        """Each reason in the table of errors leads to the status in front of it."""
        seen = 0
        for statuses, codes in re.findall(r"^\| ([\d, ]+) \| .* \| (.*) \|$", sections()["Errors"], re.MULTILINE):
            for code in re.findall(r"`([a-z_]+)`", codes):
                if code in errors.FAILURES:
                    self.assertIn(str(errors.FAILURES[code].status), statuses, code)
                    seen += 1
        self.assertGreater(seen, 5)


if __name__ == "__main__":
    unittest.main()
