"""The tests that every primitive has to pass, whose cases and sizes its test file gives; random blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from dense_ext import schedule
from dense_ext.backends.base import Backend, accumulate_dtype
from dense_ext.schedule import Block, Dropout, Layer, Norm

from .harness import ALIGNED, Case, Maker, check_op, check_repeats, check_values, skip_unless_volumes

Size = tuple[int, ...]
MakeCase = Callable[..., Case]
MakeMaker = Callable[..., Maker]


class PrimitiveTests:
    """Base of a primitive's test class.

    ``cases`` are functions of a Maker and a size. ``sizes`` are tested in a dtype of every width;
    ``small`` and ``large`` are used in other tests. A size begins with the number of images.
    """

    cases: ClassVar[tuple[MakeCase, ...]]
    sizes: ClassVar[list[Size]]
    small: ClassVar[Size]
    large: ClassVar[Size]

    def test_values(
        self, backend: Backend, maker: MakeMaker, dtype: torch.dtype, case: MakeCase, size: Size
    ) -> None:
        check_values(backend, case(maker(dtype), size))

    def test_aligned(self, backend: Backend, maker: MakeMaker, dtype: torch.dtype, case: MakeCase) -> None:
        """Pixels are aligned to 16 bytes, as in a model, so that accesses can be 16 bytes wide."""
        channels = (-(-c // ALIGNED) * ALIGNED for c in self.small[3:])
        check_values(backend, case(maker(dtype, guard=ALIGNED), (*self.small[:3], *channels)))

    def test_tf32(self, backend: Backend, maker: MakeMaker, case: MakeCase) -> None:
        """Products may round float32 to tf32 if PyTorch's own convolutions may."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            check_values(backend, case(maker(torch.float32), self.small))

    def test_threads(
        self, backend: Backend, maker: MakeMaker, threads: int, case: MakeCase, quick: bool
    ) -> None:
        for size in (self.small,) if quick else (self.small, self.large):
            first = case(maker(torch.float32), size)
            check_values(backend, first)
            check_repeats(backend, case(maker(torch.float32), size), first)

    def test_no_pixels(self, backend: Backend, maker: MakeMaker, case: MakeCase) -> None:
        empty = case(maker(torch.float32), (0, *self.small[1:]))
        for name, output in empty.run(backend).items():
            assert not output.any(), f"{name} is not zero"

    def test_nan_and_infinity(
        self, backend: Backend, maker: MakeMaker, dtype: torch.dtype, case: MakeCase
    ) -> None:
        check_values(backend, case(maker(dtype, special=True), self.small))

    def test_activation_at_zero(self, backend: Backend, maker: MakeMaker, case: MakeCase) -> None:
        """No gradient passes where scale*x + shift is zero."""
        zero = case(maker(torch.float32), self.small)
        for name in {"scale", "shift"} & zero.arguments.keys():
            zero.arguments[name].zero_()
        check_values(backend, zero)

    def test_op(self, backend: Backend, maker: MakeMaker, case: MakeCase) -> None:
        check_op(backend, case(maker(torch.float32), self.small))


class VolumeTests:
    """Base of the test class of a primitive with windows; ``volumes`` are sizes [N, D, H, W, ...]."""

    volumes: ClassVar[list[Size]]

    @pytest.mark.each_value
    def test_volumes(self, backend: Backend, maker: MakeMaker, dtype: torch.dtype, case: MakeCase) -> None:
        skip_unless_volumes(backend)
        for size in self.volumes:
            check_values(backend, case(maker(dtype), size))


class ConvolutionTests:
    """Base of the test class of a layer's convolution."""

    cases: ClassVar[tuple[MakeCase, ...]]
    small: ClassVar[Size]
    large: ClassVar[Size]
    volumes: ClassVar[list[Size]] = []

    @classmethod
    def sizes_of_mixed(cls) -> list[Size]:
        """The sizes for float32 activations beside weights in bfloat16."""
        return [cls.small, cls.large, *cls.volumes]

    @pytest.mark.parametrize("special", [False, True], ids=["finite", "NaN and infinity"])
    def test_float32_beside_weights_in_bfloat16(
        self, backend: Backend, maker: MakeMaker, case: MakeCase, special: bool
    ) -> None:
        if not backend.takes_weights(torch.float32, torch.bfloat16):
            pytest.skip(f"{backend.name} takes weights of the activations' dtype")
        for size in [self.small] if special else self.sizes_of_mixed():
            check_values(backend, case(maker(torch.float32, weights=torch.bfloat16, special=special), size))
        check_op(backend, case(maker(torch.float32, weights=torch.bfloat16), self.small))


class OptionalOutputTests:
    """Base of the test class of a primitive with optional outputs; ``optional_cases`` pass None for them."""

    optional_cases: ClassVar[tuple[MakeCase, ...]]
    small: ClassVar[Size]

    def test_without_optional_outputs(
        self, backend: Backend, maker: MakeMaker, optional_case: MakeCase
    ) -> None:
        check_values(backend, optional_case(maker(torch.float32), self.small))


def block_of(
    c0: int,
    layers: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    frozen: Callable[[int], bool] = lambda norm: True,
    eps: Callable[[int], float] = lambda norm: 1e-3,
    dimensions: int = 2,
) -> Block:
    """A random block of plain layers.

    Args:
        c0: the channels of its input.
        layers: B and K of each layer.
        dtype, device: of the weights.
        frozen: whether a norm uses running statistics, by its number.
        eps: of a norm, by its number.
        dimensions: 2 for images, 3 for volumes.
    """
    generator, wide = torch.Generator().manual_seed(0), accumulate_dtype(dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def norm(channels: int, number: int) -> Norm:
        mean, var, weight, bias = random(4, channels).to(device, wide)
        running = (mean, var.square() + 0.5) if frozen(number) else None
        return Norm(weight, bias, eps(number), running)

    made, channels = [], c0
    for width, growth in layers:
        norms = [norm(channels, 2 * len(made)), norm(width, 2 * len(made) + 1)]
        first = random(channels, width, *[1] * dimensions).transpose(0, 1)  # not the usual strides
        last = random(growth, width, *[3] * dimensions)
        last = last.contiguous(memory_format=schedule.channels_last(last))
        convs = [weight.to(device, dtype) for weight in (first, last)]
        made.append(Layer(norms, convs, [], [Dropout(0.0)] * 2))
        channels += growth
    return Block(made, c0)
