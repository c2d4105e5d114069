"""Thousands of networks, changes and calls drawn by hypothesis: fused and eager find the same, or both raise.

``make fuzz CASES=10000 SEED=1`` draws many; the suite draws few, the same every time. A failure prints the
smallest case found, as an expression: `compare(Case(...))` runs it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from .campaign.calls import Call, calls
from .campaign.changes import SEEN, Change, changes, norm_vectors_dense
from .campaign.networks import Images, Network, Options, images_for, networks, options
from .helpers import RELATIVE

CASES = int(os.environ.get("CASES", "0")) if settings.get_current_profile_name() == "fuzz" else 0
SEED = int(os.environ.get("SEED", "0"))
# Cases that one test draws: what a run of many reports its progress by, and a process takes at a time.
CHUNK = 100
CHUNKS = range(max(1, CASES // CHUNK))


@dataclass(frozen=True)
class Case:
    """A network, what is changed before and after its parts are fused, and how it is then called."""

    network: Network = field(default_factory=Network)
    options: Options = field(default_factory=Options)
    images: Images = field(default_factory=Images)
    training: bool = True
    before: tuple[Change, ...] = ()
    after: tuple[Change, ...] = ()
    calls: tuple[Call, ...] = (Call(),)

    def run(self, fused: bool) -> dict[str, Any]:
        """What is to be equal, by name; an error's class where one is raised."""
        SEEN.clear()
        found: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = self.network.build().train(self.training)
                for change in self.before:
                    model = change.apply(model)
                if fused:
                    self.options.fuse(model)
                for change in self.after:
                    model = change.apply(model)
                if not fused:
                    norm_vectors_dense(model)
                x = self.images.make()
                for i, call in enumerate(self.calls):
                    found.update({f"call {i}: {k}": v for k, v in call.run(model, x).items()})
            except Exception as error:
                return {"error": error}
        found["input gradient"] = x.grad
        found.update({f"hook saw {i}": value for i, value in enumerate(SEEN)})
        for name, parameter in model.named_parameters():
            found[name] = parameter.detach()
            found[f"gradient of {name}"] = parameter.grad
        return {**found, **{f"buffer {name}": b for name, b in model.named_buffers()}}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases, each with images that suit its network."""
    network = draw(networks)
    return Case(
        network,
        draw(options),
        draw(images_for(network)),
        draw(st.booleans()),
        draw(changes),
        draw(changes),
        draw(calls),
    )


def compare(case: Case) -> None:
    """Raise AssertionError where the fused network differs from the eager one."""
    expected, actual = case.run(fused=False), case.run(fused=True)
    if "error" in expected or "error" in actual:
        if not _known(case, str(expected.get("error", "")), str(actual.get("error", ""))):
            both = [repr(found.get("error", "no error")) for found in (expected, actual)]
            assert ("error" in expected) == ("error" in actual), "eager: {}; fused: {}".format(*both)
        return
    assert list(actual) == list(expected)
    tensors = [t for t in expected.values() if isinstance(t, Tensor) and t.is_floating_point()]
    # A gradient that is zero but for rounding is compared with the others' size.
    largest = max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)
    for name, right in expected.items():
        assert_same(name, actual[name], right, 1e-3 * largest)


def _known(case: Case, eager: str, fused: str) -> bool:
    """Whether errors, empty where there is none, differ as they may."""
    written = "modified by an inplace operation"
    if not fused:  # what eager keeps or has as a view, and finds written into, is something else here
        return written in eager or "is a view and is being modified inplace" in eager
    # A block called by itself keeps what it returns, as documented. The last is PyTorch's own, and eager's
    # of channels_last images: GroupNorm's gradients in a batch.
    alone = any(call.part == "children one by one" for call in case.calls)
    return (alone and written in fused) or "NYI: querying is_contiguous inside of vmap" in fused


def assert_same(name: str, found: Any, right: Any, least: float) -> None:
    """Equal, tensors to RELATIVE of their largest value or of ``least``."""
    if not isinstance(right, Tensor) or not isinstance(found, Tensor):
        assert found is right or found == right, f"{name}: {found}, expected {right}"
        return
    assert found.dtype == right.dtype, f"{name}: {found.dtype}, expected {right.dtype}"
    assert found.shape == right.shape, f"{name}: {tuple(found.shape)}, expected {tuple(right.shape)}"
    if right.numel() == 0 or torch.equal(found, right):
        return
    found, right = found.detach(), right.detach()
    assert torch.equal(found.isfinite(), right.isfinite()), f"{name}: not finite in the same places"
    finite = right.isfinite()
    error = (found - right)[finite].abs().max().item() if finite.any() else 0.0
    bound = RELATIVE * max(right[finite].abs().max().item() if finite.any() else 0.0, least)
    assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.usefixtures("one_thread")
def test_fused_is_eager(chunk: int) -> None:
    number = min(CHUNK, CASES - chunk * CHUNK) if CASES else settings().max_examples

    @seed(SEED * 1_000_000 + chunk)
    @settings(max_examples=number)
    @given(case=cases())
    def fused_is_eager(case: Case) -> None:
        compare(case)

    fused_is_eager()
