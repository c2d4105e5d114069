"""torch.fx and tools built on it: the graphs of a swapped network are the original's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.feature_extraction import create_feature_extractor

import dense_ext

from ..helpers import assert_equal, assert_same_state
from .common import FUSED, UNFUSED, fused_calls, images, swapped_and_eager

NODES = ["features.denseblock1", "features.denseblock2"]
# Makes torchvision's blocks and transitions, and their subclasses, leaves: calls of whole modules.
WHOLE = {"leaf_modules": [_DenseBlock, _Transition]}


def _nodes(graph: torch.fx.Graph) -> list[tuple[str, str, str]]:
    return [(node.op, node.name, str(node.target)) for node in graph.nodes]


def test_symbolic_trace() -> None:
    ours, eager = swapped_and_eager()
    traced, original = torch.fx.symbolic_trace(ours), torch.fx.symbolic_trace(eager)
    assert _nodes(traced.graph) == _nodes(original.graph)
    x = images()
    assert fused_calls(lambda: assert_equal(traced(x), eager(x), "output")) == UNFUSED
    assert fused_calls(lambda: ours(x)) == FUSED


def test_feature_extractor_after_the_swap() -> None:
    ours, eager = swapped_and_eager()
    extracted, expected = (create_feature_extractor(m, ["features.norm5"])(images(1)) for m in (ours, eager))
    assert list(extracted) == list(expected)
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor, original = (create_feature_extractor(m, ["features.norm5"]) for m in (ours, eager))
    assert _nodes(extractor.graph) == _nodes(original.graph)
    assert fused_calls(lambda: extractor(x)) == UNFUSED
    assert_equal(extractor(x)["features.norm5"], original(x)["features.norm5"], "features")


def test_feature_extractor_of_whole_blocks() -> None:
    """Blocks and transitions that are leaves stay fused, whether the swap comes first or last."""
    ours, eager = swapped_and_eager()
    later = copy.deepcopy(eager)
    after = create_feature_extractor(ours, NODES, tracer_kwargs=WHOLE)
    before = dense_ext.swap(create_feature_extractor(later, NODES, tracer_kwargs=WHOLE))
    original = create_feature_extractor(eager, NODES, tracer_kwargs=WHOLE)
    x = images()
    models: list[Any] = [after.train(), before.train(), original.train()]
    for model in models:
        sum(y.square().sum() for y in model(x).values()).backward()
    for model in models[:2]:
        assert fused_calls(lambda model=model: model(x)) == {"dense_block": 2, "transition": 1}
    models[2](x)
    for model in models[:2]:
        assert_same_state(model, models[2])


def test_feature_extractor_before_the_swap() -> None:
    """Without leaves, the graph has no blocks that could be swapped."""
    _, eager = swapped_and_eager()
    extractor = create_feature_extractor(eager, ["features.norm5"])
    with pytest.raises(ValueError, match="contains no dense block"):
        dense_ext.swap(extractor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch.*")
def test_fx_quantization() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.use_deterministic_algorithms(False)  # PyTorch's 8-bit operators have no deterministic version
    x = images().float()
    prepared, converted = [], []
    for model in swapped_and_eager():
        ready = prepare_fx(model.float(), get_default_qconfig_mapping(), (x,))
        prepared.append((_nodes(ready.graph), ready(x)))
        converted.append(convert_fx(ready)(x))
    assert prepared[0][0] == prepared[1][0]
    assert torch.equal(prepared[0][1], prepared[1][1])
    assert torch.equal(converted[0], converted[1])


def test_dynamic_quantization() -> None:
    """It quantizes the linear layer of a copy, before or after the swap."""
    ours, eager = (model.float() for model in swapped_and_eager())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        first, original = (
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in (ours, eager)
        )
    x = images().float()
    for model in (first, dense_ext.swap(copy.deepcopy(original))):
        assert fused_calls(lambda model=model: model(x)) == FUSED
        # The features differ by rounding, which may move the 8-bit input of the classifier by one step.
        step = original(x).abs().max() / 127
        assert (model(x) - original(x)).abs().max() <= step
