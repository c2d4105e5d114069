"""In 16 bits no tensor of a swapped network is further off float64 than eager's, but by luck.

Two equally exact programs differ much in a single tensor of a single draw. In a whole network most
of an error is not rounding but ReLU masks, maxima and the signs of few values' deviations that flip,
and then either is many times the other. Here no mask hangs on rounding, and what is judged is each
tensor's mean over several draws.
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
# A normalised value times its weight is below: a channel is open for every pixel, or for none.
BIAS = 8.0


def network(dtype: torch.dtype) -> nn.Module:
    """Two blocks and a transition between them in float64, of values that ``dtype`` represents."""
    parts = nn.Sequential(
        eager_block(2, 16, 8, bn_size=4), eager_transition(32, 16), eager_block(2, 16, 8, bn_size=4)
    )
    for module in parts.modules():
        if isinstance(module, nn.BatchNorm2d):
            opened = torch.rand_like(module.bias) < 0.75
            module.bias.data.copy_(torch.where(opened, BIAS, -BIAS))
    parts.load_state_dict({k: v.to(dtype).to(v.dtype) for k, v in parts.state_dict().items()})
    return parts


def train(model: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
    y = model(leaf)
    (y.double() * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    return {"output": y.detach(), "input": leaf.grad, **grads}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Each tensor's L2 distance."""
    return {name: (found[name].double() - exact[name]).norm().item() for name in exact}


@functools.cache
def draw(dtype: torch.dtype, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """An eager network, what it is trained with, and the results in float64."""
    torch.manual_seed(seed)
    exact = network(dtype)
    eager = copy.deepcopy(exact).to(dtype, memory_format=torch.channels_last)
    x, weights = torch.randn(2, 16, 16, 16).to(dtype), torch.randn(2, 32, 8, 8)
    return eager, (x, weights), train(exact, x.double(), weights)


@functools.cache
def errors_of_eager(dtype: torch.dtype, seed: int) -> dict[str, float]:
    eager, data, truth = draw(dtype, seed)
    return errors(train(copy.deepcopy(eager), *data), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_tensor_is_further_off_than_eagers(backend: str, dtype: torch.dtype) -> None:
    logarithms: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        eager, data, truth = draw(dtype, seed)
        theirs, ours = errors_of_eager(dtype, seed), copy.deepcopy(eager)
        for part in ours:
            dense_ext.swap(part)
        for name, mine in errors(train(ours, *data), truth).items():
            if mine > 0 < theirs[name]:
                logarithms.setdefault(name, []).append(math.log(mine / theirs[name]))
    assert logarithms.keys() == truth.keys()
    means = {name: statistics.mean(values) for name, values in logarithms.items()}
    # Of equally exact programs' means, one in some hundreds is three standard errors above 0.
    above = {
        name: math.exp(mean)
        for name, mean in means.items()
        if mean > 3 * statistics.stdev(logarithms[name]) / math.sqrt(len(logarithms[name]))
    }
    assert not above, f"times eager's error: {above}"
    assert statistics.mean(means.values()) <= 0, "all tensors together"
