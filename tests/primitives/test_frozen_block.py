"""Frozen blocks in one call, and packed transitions, give the same bits as their primitives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dense_ext import schedule
from dense_ext.backends import CPU
from dense_ext.backends.base import STORAGE_DTYPES, FrozenBlocks, accumulate_dtype
from dense_ext.backends.cpu import CPUBackend
from dense_ext.ops import is_channels_last

from ..conftest import checked_backends
from .common import block_of

pytestmark = pytest.mark.skipif(CPU.library.path is None, reason="the C++ backend is not built")

# N, H, W, c0, and B and K of each layer. The wide images need several bands of lines.
SIZES = {
    "small": (2, 7, 7, 12, [(8, 4), (8, 4)]),
    "one pixel": (1, 1, 1, 3, [(5, 2)]),
    "one line": (3, 1, 9, 33, [(16, 7)]),
    "one column": (2, 5, 1, 4, [(4, 3), (6, 5)]),
    "ragged": (3, 13, 11, 30, [(48, 12), (20, 13), (129, 3)]),
    "many channels": (1, 6, 5, 300, [(130, 33)]),
    "wide": (2, 7, 600, 5, [(128, 4), (64, 8)]),
    "wider than a band": (1, 3, 2500, 3, [(128, 2)]),
    "many images": (40, 6, 5, 8, [(128, 8)]),
}
BANDED = ("wide", "wider than a band", "many images")


@pytest.fixture(autouse=True)
def only_on_a_cpu(request: pytest.FixtureRequest) -> None:
    if checked_backends(request.config) != ["cpu"]:
        pytest.skip("frozen blocks are of the C++ backend")


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def packed_block(run: FrozenBlocks, block: schedule.Block, dtype: torch.dtype) -> Tensor:
    """The packed weights of a block."""
    shapes = [conv.shape for layer in block.layers for conv in layer.convs]
    packed = torch.empty(run.packed_size(shapes, dtype), dtype=accumulate_dtype(dtype))
    run.pack(packed, block.in_channels, *schedule.plain_block(block).of_frozen)
    return packed


def check_bits(
    backend: CPUBackend, size: str, dtype: torch.dtype, weights: torch.dtype | None = None
) -> None:
    """Assert that a block's bits are those of the backend's primitives, and that it writes nothing else."""
    n, h, w, c0, layers = SIZES[size]
    block, run = block_of(c0, layers, weights or dtype), backend.frozen_blocks
    assert run is not None
    x = torch.randn(n, c0, h, w, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0, 0, 0] = float("inf")  # its neighbours become infinite or NaN, and no others
    widths, growth = map(list, zip(*layers, strict=True))
    # Channels of a wider buffer, so that a write beyond the block's own would be seen.
    wide = torch.full((n, h, w, block.out_channels + 5), 7.0, dtype=dtype)
    out = wide[..., : block.out_channels]
    out[..., :c0] = x.permute(0, 2, 3, 1)
    run.forward(out, c0, *schedule.plain_block(block).of_frozen)
    assert (wide[..., block.out_channels :] == 7).all()
    found = [out.permute(0, 3, 1, 2)]
    if weights is None:  # packed weights are for activations of their own dtype
        packed = packed_block(run, block, dtype)
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            found.append(run.forward_packed(image, packed, widths, growth))
            assert is_channels_last(found[-1])
    layer_by_layer = copy.copy(backend)
    layer_by_layer.frozen_blocks = None
    expected, _, _ = schedule.forward(layer_by_layer, block, x, keep_bottleneck=False)  # type: ignore[arg-type]
    for out in found:
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert expected.isfinite().any() or n * h * w == 1


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("storage", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_are_those_of_the_primitives(size: str, storage: torch.dtype) -> None:
    check_bits(CPU, size, storage)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", ["small", "ragged", "wide"])
def test_the_bits_beside_weights_in_bfloat16(size: str) -> None:
    if not CPU.takes_weights(torch.float32, torch.bfloat16):
        pytest.skip("this processor does not multiply bfloat16")
    check_bits(CPU, size, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "wrong", ["channels", "norms", "weight", "packed", "order", "sizes", "memory", "dtype"]
)
def test_bad_arguments_are_refused(wrong: str) -> None:
    block, run = block_of(6, [(8, 4)], torch.float32), CPU.frozen_blocks
    assert run is not None
    parameters = list(schedule.plain_block(block).of_frozen)
    packed = packed_block(run, block, torch.float32)
    x, image = torch.zeros(1, 3, 3, 10), torch.zeros(1, 6, 3, 3)
    calls = {
        "channels": lambda: run.forward(torch.zeros(1, 3, 3, 11), 6, *parameters),
        "norms": lambda: run.forward(x, 6, parameters[0][:1], *parameters[1:]),
        "weight": lambda: run.forward(x, 6, *parameters[:-1], [w.transpose(0, 1) for w in parameters[-1]]),
        "packed": lambda: run.forward_packed(image, packed[:-1], [8], [4]),
        "order": lambda: run.forward_packed(image, packed.roll(1), [8], [4]),
        "sizes": lambda: run.forward_packed(image, packed, [8, 8], [4]),
        "memory": lambda: run.pack(packed[:-1], 6, *parameters),
        "dtype": lambda: run.forward_packed(image, packed.double(), [8], [4]),
    }
    with pytest.raises(
        RuntimeError,
        match=r"expected|takes two norms|has two sizes|must be contiguous|other CPU instructions",
    ):
        calls[wrong]()
    assert not x.any()


# N, C, K, and height and width, or depth, height and width.
TRANSITIONS = [
    (2, 7, 5, 6, 4),
    (1, 3, 1, 2, 2),
    (3, 300, 70, 13, 11),
    (2, 40, 33, 3, 60),
    (2, 21, 9, 4, 5, 6),
]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("storage", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("size", TRANSITIONS, ids=str)
def test_a_packed_transition_has_the_bits_of_the_primitives(
    size: tuple[int, ...], storage: torch.dtype
) -> None:
    n, c, k, *pixels = size
    run, wide = CPU.frozen_transitions, accumulate_dtype(storage)
    assert run is not None
    generator = torch.Generator().manual_seed(1)
    mean, bias = (torch.randn(c, generator=generator, dtype=wide) for _ in range(2))
    var, weight = (torch.rand(c, generator=generator, dtype=wide) + 0.5 for _ in range(2))
    conv = torch.randn(k, c, *[1] * len(pixels), generator=generator).to(storage)
    x = torch.randn(n, *pixels, c + 3, generator=generator).to(storage)[..., :c]
    expected = torch.full((n, *(p // 2 for p in pixels), k + 2), 7.0, dtype=storage)
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    CPU.bn_scale_shift(mean, var, weight, bias, 1e-3, scale, shift)
    CPU.bn_relu_pool_conv1x1_forward(x, scale, shift, conv, expected[..., :k])
    packed = torch.empty(run.packed_size([conv.shape], storage), dtype=wide)
    run.pack(packed, mean, var, weight, bias, 1e-3, conv)
    for image in (x.movedim(-1, 1), x.movedim(-1, 1).contiguous()):
        y = run.forward_packed(image, packed, k)
        assert torch.equal(y.movedim(1, -1), expected[..., :k])
        assert is_channels_last(y)
    assert (expected[..., k:] == 7).all()
    assert not (expected[..., :k] == 7).all()


@pytest.mark.parametrize("wrong", ["statistics", "packed", "order", "dtype", "channels"])
def test_bad_arguments_of_a_transition_are_refused(wrong: str) -> None:
    run = CPU.frozen_transitions
    assert run is not None
    vector, conv, x = torch.ones(6), torch.ones(4, 6, 1, 1), torch.ones(1, 6, 4, 4)
    packed = torch.empty(run.packed_size([conv.shape], torch.float32))
    run.pack(packed, vector, vector, vector, vector, 0.0, conv)
    calls = {
        "statistics": lambda: run.pack(packed, vector[1:], vector, vector, vector, 0.0, conv),
        "packed": lambda: run.forward_packed(x, packed[:-1], 4),
        "order": lambda: run.forward_packed(x, packed.roll(1), 4),
        "dtype": lambda: run.forward_packed(x, packed.double(), 4),
        "channels": lambda: run.forward_packed(x, packed, 40),
    }
    with pytest.raises(RuntimeError, match=r"expected|must be contiguous|dtype|other CPU instructions"):
        calls[wrong]()


def test_packed_weights_are_as_large_as_the_weights() -> None:
    """Up to whole panels of columns, the norms' vectors, and Winograd's 16 points beside nine taps."""
    block, run = block_of(64, [(128, 32)] * 3, torch.float32), CPU.frozen_blocks
    assert run is not None
    packed = packed_block(run, block, torch.float32)
    convs = [weight for layer in block.layers for weight in layer.convs]
    weights = [w.numel() + (w.shape[2] == 3) * 16 * w.shape[0] * w.shape[1] for w in convs]
    channels = itertools.accumulate([32] * 2, initial=64)
    # And the number that tells their order.
    assert packed.numel() == 32 + sum(weights) + sum(2 * (c + 128) for c in channels)
