"""Whether a council's members fit in memory at once, as the arbiter knows it."""

import unittest

from portway import config
from portway.memory import machine as memory
from portway.memory.residency import Residency
from portway.standin.server import StandIn, StandInModel
from portway.watch import NoClient

MODELS = {
    "a": 'model = "a"\nsize = "6GB"\nnum_ctx = 1024',
    "b": 'model = "b"\nsize = "5GB"',
    "c": 'model = "c"\nsize = "3GB"',
    "again": 'model = "a"\nsize = "6GB"\nnum_ctx = 2048',
    "larger": 'model = "a"\nsize = "8GB"\nnum_ctx = 1024',
}


class FitTogetherTest(unittest.TestCase):
    def setUp(self):
        standin = self.enterContext(StandIn([StandInModel(name) for name in "abc"]))
        toml = f'[memory]\nbudget = "10GB"\n[backends.o]\nkind = "ollama"\nurl = "{standin.url}"\n'
        toml += "".join(f'[models.{name}]\nbackend = "o"\n{keys}\n' for name, keys in MODELS.items())
        self.config = config.parse(toml, "models.toml", {})
        self.residency = Residency(self.config, read=memory.Reading)
        self.addCleanup(self.residency.stop)

    def fit(self, *names):
        return self.residency.fit_together([self.config.models[name] for name in names])

    def test_before_the_backend_was_asked(self):
        """Nothing is known of what it has, so there is no telling."""
        self.assertIsNone(self.fit("a", "c"))

    def test_the_sum_against_the_budget(self):
        """Two that fit, two that do not; one model twice counts once, and once more for another window never fits."""
        self.residency.refresh(NoClient())
        self.assertIs(True, self.fit("a", "c"))
        self.assertIs(False, self.fit("a", "b"))
        self.assertIs(True, self.fit("a", "a"))
        self.assertIs(False, self.fit("a", "again"))

    def test_two_names_that_say_two_sizes(self):
        """Of one model the larger one counts, in any order."""
        self.residency.refresh(NoClient())
        self.assertIs(True, self.fit("a", "larger"))
        for names in (("a", "larger", "c"), ("larger", "a", "c")):
            self.assertIs(False, self.fit(*names))


if __name__ == "__main__":
    unittest.main()
