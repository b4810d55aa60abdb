"""Hypothesis where it is installed: `@given_seeds` runs a test with seeds of its choice, else skips it.

How many examples a test is given is bounded, and they are the same every time; PORTWAY_FUZZ=20000 asks for that
many, other ones each time.
"""

from __future__ import annotations

import os
import unittest
from collections.abc import Callable
from typing import Any


def effort(examples: int) -> Any:
    """hypothesis.settings for a test that is given so many examples in CI. Raises ImportError."""
    import hypothesis

    asked = os.environ.get("PORTWAY_FUZZ", "")
    number = int(asked) if asked.isdigit() else examples
    return hypothesis.settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=not asked,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def given_seeds(test: Callable[..., None]) -> Any:
    """The test with its last argument, a seed, chosen."""
    try:
        import hypothesis
    except ImportError:
        return unittest.skip("hypothesis is not installed")(test)
    return effort(100)(hypothesis.given(hypothesis.strategies.integers(0, 2**32))(test))
