"""The suites of ``dense-ext bench``: each fills a result's rows, a row per case and peer.

To add a suite, write its class and name it here.
"""

from __future__ import annotations

from .base import Options, Suite
from .memory import MemorySuite, PaperSuite
from .own_networks import KernelBenchSuite, RecognisedSuite, VolumeSuite
from .primitives import PrimitiveSuite
from .quick import QuickSuite
from .speed import InferenceSuite, StepSuite

SUITES: dict[str, type[Suite]] = {
    suite.name: suite
    for suite in (
        QuickSuite, MemorySuite, StepSuite, InferenceSuite, VolumeSuite, RecognisedSuite, KernelBenchSuite,
        PrimitiveSuite, PaperSuite,
    )
}  # fmt: skip

__all__ = ["SUITES", "Options", "Suite"]
