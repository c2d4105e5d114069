"""The suites of ``dense-ext bench``: each fills a result file's rows, a row per case and peer."""

from __future__ import annotations

from .base import Suite, SuiteOptions
from .memory import MemorySuite, PaperSuite
from .primitives import PrimitiveSuite
from .speed import WRONG, InferenceSuite, StepSuite
from .volumes import VolumeSuite

SUITES: dict[str, type[Suite]] = {
    suite.name: suite
    for suite in (MemorySuite, StepSuite, InferenceSuite, VolumeSuite, PrimitiveSuite, PaperSuite)
}

__all__ = ["SUITES", "WRONG", "Suite", "SuiteOptions"]
