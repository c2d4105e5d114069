"""Draws networks, changes and calls with hypothesis: fused and eager give the same results, or both raise.

``make fuzz CASES=10000 SEED=1`` draws many cases; the test suite draws few, always the same. A failure prints
the smallest failing case as an expression, and `compare(Case(...))` runs it.
"""

from __future__ import annotations

import os
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from .campaign.calls import UNFUSED, Call, calls
from .campaign.changes import SEEN, Change, changes, norm_vectors_dense
from .campaign.networks import Images, Network, Options, images_for, networks, options
from .helpers import RELATIVE

CASES = int(os.environ.get("CASES", "0")) if settings.get_current_profile_name() == "fuzz" else 0
SEED = int(os.environ.get("SEED", "0"))
# The number of cases per test. A run of many cases reports progress, and assigns processes, by tests.
CHUNK = 100
CHUNKS = range(max(1, CASES // CHUNK))


@dataclass(frozen=True)
class Case:
    """A network, the changes before and after its parts are fused, and the calls that follow."""

    network: Network = field(default_factory=Network)
    options: Options = field(default_factory=Options)
    images: Images = field(default_factory=Images)
    training: bool = True
    before: tuple[Change, ...] = ()
    after: tuple[Change, ...] = ()
    calls: tuple[Call, ...] = (Call(),)

    def run(self, fused: bool) -> dict[str, Any]:
        """The results to compare, by name; or the class of the error that was raised."""
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
                # Where the original's forward runs in both, it needs them in both.
                if not fused or any(call.surroundings in UNFUSED for call in self.calls):
                    norm_vectors_dense(model)
                x = self.images.make()
                for i, call in enumerate(self.calls):
                    found.update({f"call {i}: {k}": v for k, v in call.run(model, x).items()})
            except Exception as error:
                # After an error in a checkpointed forward PyTorch's hooks stay until its frames are gone.
                traceback.clear_frames(error.__traceback__)
                return {"error": error.with_traceback(None)}
        found["input gradient"] = x.grad
        found.update({f"hook saw {i}": value for i, value in enumerate(SEEN)})
        for name, parameter in model.named_parameters():
            found[name] = parameter.detach()
            found[f"gradient of {name}"] = parameter.grad
        return {**found, **{f"buffer {name}": b for name, b in model.named_buffers()}}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A strategy for cases, each with images that suit its network."""
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
    """Raise AssertionError if the fused network differs from the eager one."""
    if _eager_is_wrong(case):
        return
    expected, actual = case.run(fused=False), case.run(fused=True)
    if "error" in expected or "error" in actual:
        if not _known(case, str(expected.get("error", "")), str(actual.get("error", ""))):
            both = [repr(found.get("error", "no error")) for found in (expected, actual)]
            assert ("error" in expected) == ("error" in actual), "eager: {}; fused: {}".format(*both)
        return
    assert list(actual) == list(expected)
    tensors = [t for t in expected.values() if isinstance(t, Tensor) and t.is_floating_point()]
    # A gradient that is only rounding is compared relative to the size of the others.
    largest = max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)
    # Parts that a forward of the user calls, not the fused features, may return channels_last memory.
    called_by_user = case.network.library.startswith("recognised") or any(
        change.what == "patched_child" for change in (*case.before, *case.after)
    )
    for name, right in expected.items():
        if called_by_user and "memory format" in name:
            continue
        assert_same(name, actual[name], right, 1e-3 * largest)


def _eager_is_wrong(case: Case) -> bool:
    """PyTorch's batch norm with a backward hook is wrong for a single image that is not contiguous."""
    hooks = any("gradient" in change.what for change in (*case.before, *case.after))
    return hooks and case.images.batch == 1 and case.images.layout != "contiguous"


def _known(case: Case, eager: str, fused: str) -> bool:
    """Whether a difference of two errors is known and allowed; an empty string means no error."""
    written = "modified by an inplace operation"
    if not fused:
        # Eager saves or returns other tensors, and so may detect a write that has no effect here. PyTorch's
        # second derivative of a batch norm without a weight fails. The first convolution may read a copy of
        # its input, which is then not the inference tensor itself.
        others = (
            "is a view and is being modified inplace",
            "Expected a proper Tensor but got None",
            "Inference tensors cannot be saved for backward",
        )
        return any(text in eager for text in (written, *others))
    # A block called on its own, or by a class that dense_ext does not know, saves its output, as documented.
    # The last error is PyTorch's own; eager raises it too for channels_last images: for a batch of gradients
    # of GroupNorm.
    alone = any(call.part == "children one by one" for call in case.calls)
    written_by_hook = any(change.what.startswith("write_into") for change in (*case.before, *case.after))
    alone |= case.network.library.startswith("recognised") and written_by_hook
    return (alone and written in fused) or "NYI: querying is_contiguous inside of vmap" in fused


def assert_same(name: str, found: Any, right: Any, least: float) -> None:
    """Assert equality; tensors may differ by RELATIVE of their largest value, or of ``least`` if larger."""
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
