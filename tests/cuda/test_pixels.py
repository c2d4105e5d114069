"""More pixels than the kernels can number are refused; here their file takes no space on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dense_ext.backends.cuda import CUDABackend

from ..emulator import Emulator
from ..primitives import test_bn_relu_conv1x1 as conv1x1
from ..primitives.harness import Maker


def test_too_many_pixels_are_refused(gpu: Emulator, tmp_path: Path) -> None:
    pixels = CUDABackend.max_pixels + 1
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=pixels, dtype=torch.bfloat16)
    case = conv1x1.backward_case(Maker(torch.bfloat16, torch.device("cpu")), (1, 4, 4, 1, 1))
    for name, value in case.arguments.items():
        if isinstance(value, Tensor) and value.dim() == 4 and "weight" not in name:
            case.arguments[name] = memory.view(1, 1, pixels, 1)
    with pytest.raises(RuntimeError, match=f"takes up to {CUDABackend.max_pixels} pixels, got {pixels}"):
        case.run(gpu.backend)
