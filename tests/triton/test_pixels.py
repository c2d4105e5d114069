"""Every primitive refuses more pixels than 32-bit indices can count; the tensors here take no memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import dense_ext
from dense_ext.backends import BACKENDS, select
from dense_ext.backends.triton import TritonBackend, launch

from ..primitives.common import MakeCase, Size
from ..primitives.groups import GROUPS
from ..primitives.harness import Maker

CPU = torch.device("cpu")
MAX_PIXELS = TritonBackend.max_pixels
CASES = [(case, group.small) for group in GROUPS for case in group.cases]


def many(x: Tensor, images: int) -> Tensor:
    """``images`` images in the memory of one."""
    return x.as_strided((images, *x.shape[1:]), (0, *x.stride()[1:]))


@pytest.mark.parametrize(("make", "size"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_too_many_pixels_are_refused(make: MakeCase, size: Size) -> None:
    _, h, w, *_ = size
    images = MAX_PIXELS // (h * w) + 1
    case = make(Maker(torch.float32, CPU), size)
    for name, value in case.arguments.items():
        if isinstance(value, Tensor) and value.dim() == 4 and "weight" not in name:
            case.arguments[name] = many(value, images)
    with pytest.raises(ValueError, match=rf"takes up to {MAX_PIXELS} pixels, got {images * h * w} "):
        case.run(BACKENDS["triton"])


def test_the_maximum_number_of_pixels_is_accepted() -> None:
    x = torch.empty(1).expand(1, 1, MAX_PIXELS, 1)
    assert launch.pixels_of(x) == MAX_PIXELS


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the Triton backend available and preferred here."""
    monkeypatch.setattr(TritonBackend, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr(dense_ext.backends.preference, "order", lambda *_: ("triton", "reference"))
    select.cache_clear()
    yield
    select.cache_clear()


@pytest.mark.usefixtures("triton_everywhere")
def test_auto_takes_a_backend_for_that_many_pixels() -> None:
    assert {b.name for b in select("auto", "cpu", torch.float32, MAX_PIXELS).table.values()} == {"triton"}
    assert {b.name for b in select("auto", "cpu", torch.float32, MAX_PIXELS + 1).table.values()} == {
        "reference"
    }


@pytest.mark.usefixtures("triton_everywhere")
def test_a_backend_requested_by_name_gives_its_reason() -> None:
    block = dense_ext.DenseBlock(1, 2, 1, backend="triton").eval()
    message = rf"channel_stats .* \(triton: takes up to {MAX_PIXELS} pixels, got {2**31}\)"
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        block(torch.empty(1, 2, 1, 1).expand(2**11, 2, 2**10, 2**10))
