"""No primitive accesses memory out of bounds or has undefined behaviour."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ..compiling import CSRC, leave_out_dtypes
from ..sanitizers import assert_passed
from .cases import run_sanitized


def test_every_primitive_and_a_network(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """In every size; a single access beyond a tensor or a shared array would end the program.

    float16 has the same addresses as bfloat16, and is compiled only with ``--exhaustive``.
    """
    if request.config.getoption("--exhaustive"):
        assert_passed(run_sanitized())
        return
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    leave_out_dtypes(copy / "cuda" / "tensor.cuh", "Half")
    assert_passed(run_sanitized(cuda=copy / "cuda", without=torch.float16))
