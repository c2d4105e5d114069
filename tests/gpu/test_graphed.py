"""make_graphed with true CUDA graphs; tests/test_graphed.py has what needs none."""

from __future__ import annotations

import pytest
import torch

import dense_ext

from ..graphs import assert_trains_alike
from ..helpers import small_densenet


@pytest.fixture
def on_gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    return device


# cuDNN's stem may take another algorithm, and steps of training multiply the difference in rounding.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_trains_as_without(
    on_gpu: torch.device, backend: str, dtype: torch.dtype, tolerance: float, accumulate: bool
) -> None:
    """Under autocast and not, for two shapes, with gradients accumulated over two calls and not."""
    model = dense_ext.swap(small_densenet().float().to(on_gpu), recompute="bottleneck", backend=backend)
    sizes = (32, 32, 40, 40, 36, 32)  # nothing is recorded for one of them
    batches = [torch.randn(4, 3, size, size, device=on_gpu) for size in sizes]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        assert_trains_alike(
            model,
            lambda m: dense_ext.make_graphed(m, batches[0], batches[2]),
            batches,
            accumulate,
            tolerance,
        )


def test_evaluation(on_gpu: torch.device, backend: str) -> None:
    model = dense_ext.swap(small_densenet().float().to(on_gpu).eval(), backend=backend)
    first, second = torch.randn(2, 4, 3, 32, 32, device=on_gpu)
    call = dense_ext.make_graphed(model, first)
    with torch.no_grad():
        expected = [model(first), model(second)]
        found = [call(first), call(second)]
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_fused_dropout_is_refused(on_gpu: torch.device, backend: str) -> None:
    model = dense_ext.swap(small_densenet(drop_rate=0.3).float().to(on_gpu), backend=backend)
    with pytest.raises(ValueError, match="random numbers on the CPU"):
        dense_ext.make_graphed(model, torch.randn(2, 3, 32, 32, device=on_gpu))
