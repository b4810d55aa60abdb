"""Hypothesis where it is installed: `@given_seeds` runs a test with seeds of its choice, else skips it."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any


def given_seeds(test: Callable[..., None]) -> Any:
    """The test with its last argument, a seed, chosen."""
    try:
        import hypothesis
    except ImportError:
        return unittest.skip("hypothesis is not installed")(test)
    settings = hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
    return settings(hypothesis.given(hypothesis.strategies.integers(0, 2**32))(test))
