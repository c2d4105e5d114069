"""Bad input is refused before anything is written; the message names the argument and what was expected."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dense_ext

from .helpers import assert_same_state, small_densenet


def block() -> nn.Module:
    return dense_ext.DenseBlock(2, 6, 4)


def transition() -> nn.Module:
    return dense_ext.Transition(6, 3)


def stem() -> nn.Module:
    return dense_ext.DenseNet(4, (1,), 6).features[1:4]


def refuses(module: nn.Module, x: Tensor, error: type[Exception], message: str) -> None:
    """Assert that ``module(x)`` raises and changes no state of the module."""
    before = copy.deepcopy(module)
    with pytest.raises(error, match=message):
        module(x)
    assert_same_state(module, before, relative=0.0)


KINDS = pytest.mark.parametrize(
    ("make", "where"),
    [(block, "dense block"), (transition, "transition"), (stem, "stem")],
    ids=["block", "transition", "stem"],
)


@KINDS
class TestInput:
    def test_rank(self, make: Callable[[], nn.Module], where: str) -> None:
        refuses(make(), torch.randn(6, 8, 8), ValueError, rf"{where}: input must be 4-D .*\(6, 8, 8\)")

    def test_channels(self, make: Callable[[], nn.Module], where: str) -> None:
        message = rf"{where}: input \(2, 5, 8, 8\) has 5 channels, expected 6"
        refuses(make(), torch.randn(2, 5, 8, 8), ValueError, message)

    def test_integers(self, make: Callable[[], nn.Module], where: str) -> None:
        message = rf"{where}: input \(2, 6, 8, 8\) has dtype torch.int64, expected one of float64"
        refuses(make(), torch.ones(2, 6, 8, 8, dtype=torch.int64), TypeError, message)

    def test_another_dtype_than_the_parameters(self, make: Callable[[], nn.Module], where: str) -> None:
        message = (
            rf"{where}: norm weight \(6,\) has dtype torch.float32, expected torch.float64 like the input"
        )
        refuses(make(), torch.randn(2, 6, 8, 8, dtype=torch.float64), TypeError, message)

    def test_another_device_than_the_parameters(self, make: Callable[[], nn.Module], where: str) -> None:
        message = rf"{where}: norm weight \(6,\) is on cpu, expected meta like the input \(2, 6, 8, 8\)"
        refuses(make(), torch.randn(2, 6, 8, 8, device="meta"), ValueError, message)

    @pytest.mark.parametrize("size", [(0, 8), (8, 0)])
    def test_empty_image(self, make: Callable[[], nn.Module], where: str, size: tuple[int, int]) -> None:
        refuses(make(), torch.randn(2, 6, *size), ValueError, rf"{where}: input .* is too small, expected")

    def test_not_a_tensor(self, make: Callable[[], nn.Module], where: str) -> None:
        with pytest.raises(TypeError, match=rf"{where}: input must be a torch.Tensor, got list"):
            make()([1.0])


@pytest.mark.parametrize("make", [block, stem], ids=["block", "stem"])
def test_one_value_per_channel_in_training(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(1, 6, 1, 1)
    message = r"expected more than 1 value per channel when training, got input \(1, 6, 1, 1\)"
    refuses(make(), x, ValueError, message)
    assert torch.isfinite(make().eval()(x)).all()


def test_transition_needs_a_window() -> None:
    refuses(transition(), torch.randn(2, 6, 1, 4), ValueError, "transition: .* too small, .* at least 2")


def test_mixed_dtypes_inside_a_block() -> None:
    model = block()
    model.denselayer1.conv2.double()
    message = r"convolution weight \(4, 16, 3, 3\) has dtype torch.float64, expected torch.float32"
    refuses(model, torch.randn(2, 6, 4, 4), TypeError, message)


def test_float32_norms_beside_half_precision_are_eagers_mixed_precision(backend: str) -> None:
    model = dense_ext.swap(small_densenet().bfloat16())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    y = model.features(torch.randn(2, 3, 40, 40).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model.features.denseblock1.denselayer1.norm1.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"drop_rate": 1.5}, "drop_rate must be a probability, got 1.5"),
        ({"recompute": "sometimes"}, "recompute must be one of"),
        ({"backend": "tpu"}, "backend must be one of"),
    ],
)
def test_block_construction(arguments: dict[str, object], message: str) -> None:
    options = {"num_layers": 2, "num_input_features": 6, "growth_rate": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        dense_ext.DenseBlock(**options)  # type: ignore[arg-type]
