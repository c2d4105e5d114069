"""The minimum bytes and FLOPs of the primitives: compared with counts by hand and by PyTorch's counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dense_ext
from dense_ext.backends import BACKENDS
from dense_ext.backends.base import Backend
from dense_ext.backends.table import PRIMITIVES, TABLE, primitive_of
from dense_ext.benchmark.suites.primitives import (
    PrimitiveCase,
    backend_error,
    model_cases,
    unfused,
    unfused_error,
)

CPU = torch.device("cpu")
MODULES = ("bn_relu_conv1x1", "bn_relu_conv3x3", "bn_relu_pool_conv1x1", "bn_relu_maxpool")


def small(bottleneck: bool = True, small_inputs: bool = False) -> Callable[[], dense_ext.DenseNet]:
    return lambda: dense_ext.DenseNet(
        4, (3, 2), 6, bn_size=2 if bottleneck else None, num_classes=5, small_inputs=small_inputs
    )


CASES = [*model_cases(small(), 2, 32), *model_cases(small(False, True), 2, 8)]
IDS = [f"{case.primitive}-{case.where}" for case in CASES]


def test_every_primitive_has_its_cases() -> None:
    assert {primitive_of(case.primitive) for case in CASES} == set(PRIMITIVES)
    where = {case.where for case in CASES}
    assert {"stem", "block 1, layer 1", "block 1, layer 3", "block 2, layer 2", "transition 1"} <= where


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_cases_have_the_arguments_of_the_interface(case: PrimitiveCase) -> None:
    code = getattr(Backend, case.primitive).__code__
    names = set(code.co_varnames[1 : code.co_argcount])
    assert set(case.tensors(torch.float32, CPU)) == names


def test_shapes_are_those_of_densenet121() -> None:
    cases = {(c.primitive, c.where): c for c in model_cases(dense_ext.densenet121, 2, 224)}
    last = cases["bn_relu_conv1x1_backward", "block 4, layer 16"]
    assert last.shapes["x"] == (2, 7, 7, 992)
    assert last.shapes["z"] == (2, 7, 7, 128)
    assert last.widths == {"x": 1024, "grad_x": 1024}
    x, grad_x = (last.tensors(torch.bfloat16, CPU)[name] for name in ("x", "grad_x"))
    assert x.stride() == grad_x.stride() == (49 * 1024, 7 * 1024, 1024, 1)
    assert cases["bn_relu_maxpool_forward", "stem"].shapes["y"] == (2, 56, 56, 64)
    assert cases["bn_relu_pool_conv1x1_forward", "transition 1"].shapes["weight"] == (128, 256, 1, 1)


def test_minimum_bytes_by_hand() -> None:
    m, c, b = 2 * 5 * 7, 12, 8
    shapes = {
        "x": (2, 5, 7, c), "scale": (c,), "shift": (c,), "weight": (b, c, 1, 1), "z": (2, 5, 7, b),
        "mean": (b,), "var": (b,),
    }  # fmt: skip
    once, convolution = m * c + b * c + m * b, TABLE["bn_relu_conv1x1_forward"]
    assert convolution.minimum_bytes(shapes, torch.float32) == 4 * (once + 2 * c + 2 * b)
    assert convolution.minimum_bytes(shapes, torch.bfloat16) == 2 * once + 4 * (2 * c + 2 * b)
    assert convolution.minimum_bytes(shapes, torch.float64) == 8 * (once + 2 * c + 2 * b)
    without = {**shapes, "mean": None, "var": None}
    assert convolution.minimum_bytes(without, torch.float32) == 4 * (once + 2 * c)
    # Reads grad and out, and writes out.
    added = {"grad": (2, 5, 7, c), "scale": (c,), "out": (2, 5, 7, c)}
    assert TABLE["scaled_accumulate"].minimum_bytes(added, torch.float16) == 2 * 3 * m * c + 4 * c


@pytest.mark.parametrize("case", [c for c in CASES if "conv" in c.primitive], ids=lambda c: c.primitive)
def test_flops_are_those_pytorch_counts(case: PrimitiveCase) -> None:
    """PyTorch counts the convolution alone; the transition pools first, so it has a quarter of the pixels."""
    weight = case.shapes["weight"]
    out, channels, size, _ = weight
    pixels = case.shapes["grad" if "pool" in case.primitive and "backward" in case.primitive else
                         "y" if "pool" in case.primitive or "3x3" in case.primitive else "z"][:3]  # fmt: skip
    backward = case.primitive.endswith("backward")
    conv = nn.Conv2d(channels, out, size, padding=size // 2, bias=False)
    x = torch.randn(pixels[0], channels, *pixels[1:], requires_grad=backward)
    y = conv(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward() if backward else conv(x)
    assert TABLE[case.primitive].flops(case.shapes) == counter.get_total_flops()
    if backward:
        without = {**case.shapes, "grad_weight": None}
        assert 2 * TABLE[case.primitive].flops(without) == TABLE[case.primitive].flops(case.shapes)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_and_unfused_aten_compute_the_cases(case: PrimitiveCase, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype, CPU)
    tolerance = 8 * torch.finfo(dtype).eps  # one store; for PyTorch's modules, one per step
    for name in dense_ext.available_backends("cpu", dtype):
        assert backend_error(name, case, tensors) < tolerance
    assert unfused_error(case, tensors) < tolerance


@pytest.mark.parametrize("primitive", MODULES)
def test_unfused_forward_is_the_fused_one(primitive: str) -> None:
    """With the batch's statistics as scale and shift, both compute the same."""
    case = next(c for c in CASES if c.primitive == f"{primitive}_forward")
    tensors = case.tensors(torch.float64, CPU)
    (expected,) = unfused(case.primitive, tensors)()
    x = tensors["z" if primitive == "bn_relu_conv3x3" else "x"]
    var, mean = torch.var_mean(x, (0, 1, 2), correction=0)
    scale = tensors["scale"] / (var + 1e-5).sqrt()
    tensors |= {"scale": scale, "shift": tensors["shift"] - mean * scale}
    getattr(BACKENDS["reference"], case.primitive)(**tensors)
    got = tensors["z" if primitive == "bn_relu_conv1x1" else "y"]
    torch.testing.assert_close(got.permute(0, 3, 1, 2), expected)
