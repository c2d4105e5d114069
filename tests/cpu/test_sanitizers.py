"""No CPU kernel accesses memory out of bounds, has undefined behaviour, or has data races."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dense_ext.backends.base import STORAGE_DTYPES

from ..compiling import plant
from ..sanitizers import ADDRESS, THREAD, Sanitizer, assert_passed
from .cases import run_sanitized

# The split of the work over threads does not depend on the dtype; the networks run in all dtypes.
RUNS = {"address and undefined": (ADDRESS, STORAGE_DTYPES), "thread": (THREAD, [torch.float32])}


@pytest.fixture(autouse=True)
def skip_without(sanitizer: Sanitizer) -> None:
    """Skip if there is no compiler, or if it lacks the sanitizer's libraries."""
    if not sanitizer.is_here():
        pytest.skip(f"there is no compiler with {sanitizer.runtime[0]}")


@pytest.mark.parametrize(("sanitizer", "dtypes"), RUNS.values(), ids=list(RUNS))
def test_every_primitive_and_networks(sanitizer: Sanitizer, dtypes: Sequence[torch.dtype]) -> None:
    """In every size and on several threads; several networks run at a time."""
    assert_passed(run_sanitized(sanitizer, dtypes))


# Faults in channel_stats.cpp: the sanitizer, its message, the text that is replaced, and the replacement.
FAULTS = {
    "a pixel beyond the last": (
        ADDRESS,
        "AddressSanitizer: heap-buffer-overflow",
        "x.stride, tile.size());",
        "x.stride, tile.size() + 1);",
    ),
    "overflow": (
        ADDRESS,
        "signed integer overflow",
        "x.channels * int64_t{sizeof(T)};",
        "x.channels * INT64_MAX;",
    ),
    "a sum that threads share": (
        THREAD,
        "ThreadSanitizer: data race",
        "moments.add_rows(part,",
        "moments.add_rows(0,",
    ),
}


@pytest.mark.parametrize(("sanitizer", "says", "text", "replacement"), FAULTS.values(), ids=list(FAULTS))
def test_planted_fault(sanitizer: Sanitizer, says: str, text: str, replacement: str, tmp_path: Path) -> None:
    file = "channel_stats.cpp"
    csrc = plant(tmp_path / "csrc", f"cpu/{file}", text, replacement)
    ran = run_sanitized(sanitizer, [torch.float32], "channel_stats", csrc, file)
    assert ran.returncode != 0
    assert says in ran.stderr
    assert file in ran.stderr, "the report names the file"
