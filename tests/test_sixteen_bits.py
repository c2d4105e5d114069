"""In 16 bits no tensor of a swapped network has a larger error than eager's, except by chance.

In a single tensor of a single draw, the errors of two equally exact programs may differ much. In a whole
network most of an error comes not from rounding but from ReLU masks, maxima and signs that flip; then
either error may be many times the other. Here no mask depends on rounding, and the test compares each
tensor's mean error over several draws.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics

import pytest
import torch
from torch import Tensor, nn

import dense_ext

from .helpers import eager_block, eager_transition

SEEDS = 6
# Larger than a normalised value times its weight, so that ReLU passes all pixels of a channel or none.
BIAS = 8.0


def network(dtype: torch.dtype) -> nn.Module:
    """Two blocks with a transition between them in float64, with values that ``dtype`` represents."""
    parts = nn.Sequential(
        eager_block(2, 16, 8, bn_size=4), eager_transition(32, 16), eager_block(2, 16, 8, bn_size=4)
    )
    for module in parts.modules():
        if isinstance(module, nn.BatchNorm2d):
            opened = torch.rand_like(module.bias) < 0.75
            module.bias.data.copy_(torch.where(opened, BIAS, -BIAS))
    parts.load_state_dict({k: v.to(dtype).to(v.dtype) for k, v in parts.state_dict().items()})
    return parts


def train(model: nn.Module, x: Tensor, weights: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The output and all gradients, by name; ``autocast`` is to bfloat16."""
    leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(leaf)
    (y.double() * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    return {"output": y.detach(), "input": leaf.grad, **grads}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The L2 distance of each tensor from the expected one."""
    return {name: (found[name].double() - exact[name]).norm().item() for name in exact}


@functools.cache
def draw(dtype: torch.dtype, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """An eager network, its training data, and the results in float64.

    In float32 it is for autocast to bfloat16, which rounds the weights too.
    """
    torch.manual_seed(seed)
    exact = network(torch.bfloat16 if dtype == torch.float32 else dtype)
    eager = copy.deepcopy(exact).to(dtype, memory_format=torch.channels_last)
    x, weights = torch.randn(2, 16, 16, 16).to(dtype), torch.randn(2, 32, 8, 8)
    return eager, (x, weights), train(exact, x.double(), weights)


@functools.cache
def errors_of_eager(dtype: torch.dtype, seed: int) -> dict[str, float]:
    eager, data, truth = draw(dtype, seed)
    return errors(train(copy.deepcopy(eager), *data, autocast=dtype == torch.float32), truth)


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32 under autocast": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_no_tensor_has_a_larger_error_than_eagers(backend: str, dtype: torch.dtype) -> None:
    logarithms: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        eager, data, truth = draw(dtype, seed)
        theirs, ours = errors_of_eager(dtype, seed), copy.deepcopy(eager)
        for part in ours:
            dense_ext.swap(part)
        found = train(ours, *data, autocast=dtype == torch.float32)
        for name, mine in errors(found, truth).items():
            if mine > 0 < theirs[name]:
                logarithms.setdefault(name, []).append(math.log(mine / theirs[name]))
    assert logarithms.keys() == truth.keys()
    means = {name: statistics.mean(values) for name, values in logarithms.items()}
    # For equally exact programs, about one mean in several hundred is three standard errors above 0.
    above = {
        name: math.exp(mean)
        for name, mean in means.items()
        if mean > 3 * statistics.stdev(logarithms[name]) / math.sqrt(len(logarithms[name]))
    }
    assert not above, f"times eager's error: {above}"
    assert statistics.mean(means.values()) <= 0, "all tensors together"
