"""Tools that inspect a network or transform its calls: explanations, torch.func, counters, profilers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.flop_counter import FlopCounterMode

from ..helpers import assert_equal
from .common import FUSED, UNFUSED, fused_calls, images, says_unfused, swapped_and_eager


class TestGradCAM:
    @staticmethod
    def _map(model: nn.Module, layer: str, x: Tensor) -> Tensor:
        library = pytest.importorskip("pytorch_grad_cam")
        with library.GradCAM(model, [model.get_submodule(layer)]) as cam:
            return torch.from_numpy(cam(input_tensor=x.clone(), targets=None))

    @pytest.mark.parametrize("layer", ["features.denseblock2", "features.transition1"])
    def test_grad_cam_of_whole_parts(self, layer: str) -> None:
        ours, eager = swapped_and_eager()
        x = images()
        maps: list[Tensor] = []
        assert fused_calls(lambda: maps.append(self._map(ours, layer, x))) == FUSED
        assert maps[0].abs().max() > 0
        # The library computes its maps in float32.
        assert_equal(maps[0], self._map(eager, layer, x), "map", 2**-20)

    def test_grad_cam_of_the_last_norm(self) -> None:
        """The network's own ReLU afterwards writes in place into the output that the hook has received."""
        ours, eager = swapped_and_eager()
        x, layer = images(), "features.norm5"
        assert_equal(self._map(ours, layer, x), self._map(eager, layer, x), "map", 2**-20)

    def test_grad_cam_inside_a_block(self) -> None:
        ours, eager = swapped_and_eager()
        x, layer = images(), "features.denseblock2.denselayer2.conv2"
        with says_unfused("features.denseblock2"):
            found = self._map(ours, layer, x)
        assert_equal(found, self._map(eager, layer, x), "map", 2**-20)
        assert fused_calls(lambda: ours(x)) == FUSED


class TestCaptum:
    @staticmethod
    def _integrated_gradients(attr: Any, model: Any, x: Tensor) -> Tensor:
        return attr.IntegratedGradients(model).attribute(x, target=1, n_steps=4)  # type: ignore[no-any-return]

    @staticmethod
    def _layer_grad_cam(attr: Any, model: Any, x: Tensor) -> Tensor:
        return attr.LayerGradCam(model, model.features.denseblock2).attribute(x, target=1)  # type: ignore[no-any-return]

    @staticmethod
    def _layer_activation(attr: Any, model: Any, x: Tensor) -> Tensor:
        return attr.LayerActivation(model, model.features.transition1).attribute(x)  # type: ignore[no-any-return]

    @pytest.mark.parametrize("method", ["_integrated_gradients", "_layer_grad_cam", "_layer_activation"])
    def test_captum(self, method: str) -> None:
        attr = pytest.importorskip("captum.attr")
        ours, eager = swapped_and_eager()
        x = images()
        function: Callable[..., Tensor] = getattr(self, method)
        found: list[Tensor] = []
        counts = fused_calls(lambda: found.append(function(attr, ours, x)))
        assert set(counts) == set(FUSED)
        assert counts["dense_block"] == 2 * counts["stem"]
        assert_equal(found[0].detach(), function(attr, eager, x).detach(), "attribution")

    def test_captum_with_hooks_inside(self) -> None:
        """Guided backpropagation hooks every ReLU."""
        attr = pytest.importorskip("captum.attr")
        ours, eager = swapped_and_eager()
        x = images()
        with pytest.warns(UserWarning, match="runs its original forward") as caught:
            found = attr.GuidedBackprop(ours).attribute(x, target=1)
        said = [w for w in caught if "runs its original forward" in str(w.message)]
        assert len(said) == 4
        with warnings.catch_warnings():  # captum warns that it sets hooks
            warnings.simplefilter("ignore")
            expected = attr.GuidedBackprop(eager).attribute(x, target=1)
        assert_equal(found, expected, "attribution")
        assert fused_calls(lambda: ours(x)) == FUSED


@pytest.mark.filterwarnings("ignore:.*runs its original forward")
def test_expanded_weights() -> None:
    """PyTorch's own gradients per sample, for which weights are of a class that refuses most functions."""
    ours, eager = swapped_and_eager()
    x = images(32)
    for model in (ours, eager):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        call_for_per_sample_grads(model)(x).square().sum().backward()  # type: ignore[no-untyped-call]
    for (name, ours_p), eager_p in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if eager_p.requires_grad:
            assert_equal(ours_p.grad_sample, eager_p.grad_sample, name)  # type: ignore[attr-defined]


class TestFunc:
    def test_functional_call(self) -> None:
        ours, eager = swapped_and_eager()
        x = images()
        weights = {name: p.detach() * 1.5 for name, p in eager.named_parameters()}
        y: list[Tensor] = []
        assert fused_calls(lambda: y.append(torch.func.functional_call(ours, weights, (x,)))) == FUSED
        assert_equal(y[0], torch.func.functional_call(eager, weights, (x,)), "output")

    def test_gradient_per_sample(self) -> None:
        results: list[dict[str, Tensor]] = []
        ours, eager = swapped_and_eager()
        x = images()

        def per_sample(model: nn.Module) -> None:
            def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
                return torch.func.functional_call(model, weights, (image[None],)).square().sum()  # type: ignore[no-any-return]

            weights = {name: p.detach() for name, p in model.named_parameters()}
            results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x))

        assert fused_calls(lambda: per_sample(ours)) == UNFUSED
        per_sample(eager)
        for name, gradient in results[0].items():
            assert_equal(gradient, results[1][name], f"gradient of {name}")

    def test_jvp(self) -> None:
        ours, eager = swapped_and_eager()
        x, direction = images(), images()
        found, expected = (torch.func.jvp(model, (x,), (direction,))[1] for model in (ours, eager))
        assert_equal(found.detach(), expected.detach(), "derivative")
        assert fused_calls(lambda: torch.func.jvp(ours, (x,), (direction,))) == UNFUSED


def test_flop_counter() -> None:
    """Its global hooks make the original's operators run, which it can count."""
    counts = []
    for model in swapped_and_eager():
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counts.append(counter.get_flop_counts())
    assert counts[0]["Global"] == counts[1]["Global"]
    assert counts[0]["DenseNet.features.denseblock2"] == counts[1]["DenseNet.features.denseblock2"]
    assert counter.get_total_flops() > 0


def test_profiler() -> None:
    ours, _ = swapped_and_eager()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(images()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert names >= {f"dense_ext::{name}" for name in FUSED}
    assert names >= {f"dense_ext::{name}_backward" for name in ("stem", "transition")}
    assert any(name.startswith("dense_ext::dense_block_backward") for name in names)
