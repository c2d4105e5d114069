"""The suites of ``dense-ext bench``: each fills a result's rows, a row per case and peer.

To add a suite, write its class and name it here.
"""

from __future__ import annotations

from .base import Options, Suite
from .kernelbench import KernelBenchSuite
from .memory import MemorySuite, PaperSuite
from .primitives import PrimitiveSuite
from .quick import QuickSuite
from .recognised import RecognisedSuite
from .speed import InferenceSuite, StepSuite
from .volumes import VolumeSuite

SUITES: dict[str, type[Suite]] = {
    suite.name: suite
    for suite in (
        QuickSuite, MemorySuite, StepSuite, InferenceSuite, VolumeSuite, RecognisedSuite, KernelBenchSuite,
        PrimitiveSuite, PaperSuite,
    )
}  # fmt: skip

__all__ = ["SUITES", "Options", "Suite"]
