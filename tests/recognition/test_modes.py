"""Recognised networks in common modes: compiled, exported, sliced, in 16 bits, under torch.func."""

from __future__ import annotations

import copy
import cProfile
import functools
import gc
import io

import pytest
import torch
from torch import Tensor, nn

import dense_ext
from dense_ext.benchmark.memory import saved_bytes
from dense_ext.recognise import Recognised, recognise

from ..helpers import Calls, assert_equal, assert_trains_alike, randomize, second_derivative, twin
from .styles import STYLES, CatFunctional, Classifier, OneForward, layers

FLAG = True
KINDS = ["module_list", "newest_first", "functional_transition", "settings_read_in_forward", "plain_layers"]


def images(*size: int) -> Tensor:
    return torch.randn(*(size or (2, 3, 8, 8)), dtype=torch.float64)


@functools.cache
def recognised(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return twin(randomize(STYLES[kind]()).double(), dense_ext.swap)


def pair(kind: str = "functional_transition") -> tuple[nn.Module, nn.Module]:
    """A swapped network and its original, in float64."""
    pair = copy.deepcopy(recognised(kind))
    torch.manual_seed(1)
    return pair


# How a network is written concerns tracing. What follows it takes longest, and one network is enough for it.
@pytest.mark.parametrize(
    ("kind", "compiler"), [(KINDS[0], "aot_eager"), *((kind, "eager") for kind in KINDS[1:])]
)
def test_compiles_without_a_graph_break(kind: str, compiler: str) -> None:
    ours, eager = pair(kind)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=compiler)
    x = images()
    for model in (compiled, eager):
        model(x).square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert_equal(a.grad, b.grad, name)
    for (name, a), b in zip(ours.named_buffers(), eager.buffers(), strict=True):
        assert_equal(a, b, name)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_the_operators_of_its_original(kind: str) -> None:
    ours, eager = (model.eval() for model in pair(kind))
    x = images()
    program = torch.export.export(ours, (x,))
    assert "dense_ext" not in str(program.graph)
    assert_equal(program.module()(x), eager(x).detach(), "exported")
    traced = torch.jit.trace(ours, x)
    assert "dense_ext" not in str(traced.inlined_graph)
    assert_equal(traced(x), eager(x), "traced")


def test_scripts_its_original() -> None:
    ours, eager = (model.eval() for model in pair("nested_sequentials"))
    scripted = torch.jit.script(ours)
    assert "dense_ext" not in str(scripted.inlined_graph)
    x = images()
    assert_equal(scripted(x), eager(x), "scripted")
    assert any(isinstance(module, Recognised) for module in ours.modules())


def test_called_by_keyword() -> None:
    ours, eager = pair("module_list")
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    assert_equal(ours.body(x=x), eager.body(x=x), "output")
    with pytest.raises(TypeError):
        ours.body(images=x)


def test_torch_func_and_second_derivatives() -> None:
    ours, eager = (model.eval() for model in pair())
    x, tangent = images(), images()
    for model in (ours, eager):
        model.zero_grad()
    jvps = [torch.func.jvp(model, (x,), (tangent,))[1] for model in (ours, eager)]
    assert_equal(*jvps, "jvp")
    assert_equal(second_derivative(ours, x), second_derivative(eager, x), "second derivative")


def test_save_and_load() -> None:
    ours, _ = pair()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = images()
    with Calls() as calls:
        assert torch.equal(loaded.eval()(x), ours.eval()(x))
    assert calls.names.count("dense_block") == 4
    ours.load_state_dict(copy.deepcopy(ours).state_dict())


def test_a_slice_is_the_originals() -> None:
    block = randomize(nn.Sequential(*layers(CatFunctional))).double()
    ours, eager = twin(block, dense_ext.swap)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    assert type(ours[:2]) is nn.Sequential
    assert_equal(ours[:2](x), eager[:2](x), "two layers")
    assert_equal(ours(x), eager(x), "all layers")


@pytest.mark.parametrize("kind", ["functional_transition", "newest_first", "only_the_new_features"])
def test_autocast_is_no_less_exact(kind: str) -> None:
    ours, eager = pair(kind)
    exact = copy.deepcopy(eager)
    x = images(4, 3, 16, 16)
    expected = exact(x).detach()
    ratios = []
    for model in (ours.float(), eager.float()):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x.float())
        assert y.dtype == torch.bfloat16
        ratios.append(((y.double() - expected).norm() / expected.norm()).item())
    # Both round activations to 8 bits some tens of times; a factor of two allows for the chance of one draw.
    assert ratios[0] <= 2 * ratios[1]


@pytest.mark.parametrize(
    ("kind", "most"), [("plain_layers", 0.25), ("module_list", 0.2), ("newest_first", 0.3)]
)
def test_keeps_a_fraction_of_what_eager_keeps(kind: str, most: float) -> None:
    """In a deeper block, eager keeps each layer's input three to five times; fused keeps one buffer."""
    style = type(STYLES[kind]().body[0]) if kind != "module_list" else CatFunctional
    body = nn.Sequential(*layers(style, 12))
    ours, eager = twin(Classifier(body, 6 + 12 * 4), dense_ext.swap)
    x = torch.randn(2, 3, 16, 16)
    kept = [saved_bytes(model, lambda model=model: model(x).sum()) for model in (ours, eager)]
    assert kept[0] < most * kept[1]


@pytest.mark.parametrize(
    ("kind", "copies"),
    [
        ("module_list", 0),  # flattened, which copes with any layout
        ("functional_transition", 0),
        ("view_of_the_features", 1),
        ("in_place_on_the_features", 1),
        # A view behind a pool. For eager's layout, the last part needs it in its input, too.
        ("one_forward_for_all", 3),
        ("segmentation", 1),  # returns feature maps
    ],
)
def test_only_a_network_that_relies_on_the_layout_gets_copies(kind: str, copies: int) -> None:
    ours, _ = pair(kind)
    found = [module.returns_copy for module in ours.modules() if isinstance(module, Recognised)]
    assert found == [False] * (len(found) - copies) + [True] * copies


def test_swap_again_changes_the_options_and_restored_gives_the_original() -> None:
    ours, eager = pair()
    dense_ext.swap(ours, recompute="block")
    rows = dense_ext.report(ours).rows
    assert {row.recompute for row in rows if row.kind != "transition"} == {"block"}
    with dense_ext.restored(ours):
        assert not any(isinstance(module, Recognised) for module in ours.modules())
    assert_trains_alike(ours, eager, images(), steps=1)


def test_recognition_can_be_left_out() -> None:
    model = OneForward()
    with pytest.raises(ValueError, match=r"contains no dense block that dense_ext knows$"):
        dense_ext.swap(model, recognise=False)
    with pytest.raises(ValueError, match=r"knows$"):
        dense_ext.swap(model, recompute="auto", input_shape=(1, 3, 8, 8))


def test_report_says_why_a_block_is_not_recognised() -> None:
    block = nn.Sequential(*layers(CatFunctional))
    block[1].conv2 = nn.Conv2d(8, 4, 3, padding=1, groups=2, bias=False)
    model = nn.Sequential(Classifier(nn.Sequential(*layers(CatFunctional)), 18), Classifier(block, 18))
    with pytest.warns(UserWarning, match=r"1\.body: 1\.conv2 has groups 2, expected 1"):
        dense_ext.swap(model)
    rows = {row.name: row for row in dense_ext.report(model).rows}
    assert rows["0.body"].runs == "fused"
    assert (rows["1.body"].runs, rows["1.body"].detail) == (
        "eager",
        "1.conv2 has groups 2, expected 1",
    )


def test_a_model_on_the_meta_device_is_recognised() -> None:
    with torch.device("meta"):
        model = OneForward()
    dense_ext.swap(model)
    model.to_empty(device="cpu")
    assert sum(isinstance(module, Recognised) for module in model.modules()) == 3


def test_leaves_nothing_behind() -> None:
    """Recognition changes no generators, modes, buffers or gradients."""
    model = OneForward()
    model.dense1.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    with torch.no_grad():
        dense_ext.swap(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Branches(nn.Module):
    """Branches side by side, joined: not dense."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


def test_a_network_without_dense_blocks_is_an_error_that_says_why() -> None:
    message = r"Sequential contains no dense block that dense_ext knows or recognises \(0, 2: a has no norm"
    with pytest.raises(ValueError, match=message):
        dense_ext.swap(nn.Sequential(Branches(), nn.Conv2d(8, 3, 1), Branches()))


def test_swaps_while_profiled() -> None:
    model = STYLES["functional_transition"]()
    with cProfile.Profile() as profile:
        ours = dense_ext.swap(model)
    assert {row.runs for row in dense_ext.report(ours).rows} == {"fused"}
    names = {getattr(entry.code, "co_name", "") for entry in profile.getstats()}
    assert {"recognise", "swap"} <= names  # the profiler went on afterwards


def test_code_that_the_garbage_collector_calls_is_no_part_of_a_forward() -> None:
    calls: list[str] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        calls.append(phase if FLAG else "")

    gc.callbacks.append(watch)
    threshold = gc.get_threshold()
    try:
        gc.set_threshold(1)
        plan = recognise(nn.Sequential(*layers(CatFunctional)))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(watch)
    assert calls
    assert not any("watch" in name or name == "FLAG" for _, name, _ in plan.guards.variables)
