"""The planner's estimates equal a training step's measured memory, and its choices follow from them."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from monai.networks.nets import DenseNet
from torch import nn

import dense_ext
from dense_ext import schedule
from dense_ext.backends import BACKENDS, select
from dense_ext.backends.table import PRIMITIVES, THROUGH_NORM
from dense_ext.backends.triton import TritonBackend
from dense_ext.benchmark.memory import step_peaks, tracked_networks
from dense_ext.benchmark.networks import torchvision_twin
from dense_ext.benchmark.step import sgd_step
from dense_ext.memory import (
    Estimate,
    Planner,
    TrackedStep,
    device_memory,
    estimate,
    largest,
    parse_bytes,
)
from dense_ext.memory.step import OPTIMIZERS
from dense_ext.models import MODELS
from dense_ext.schedule import RECOMPUTE

from .helpers import small_densenet

# The parts that are allocated before a step; the measured peak does not include them.
BEFORE = ("parameters", "gradients", "optimizer state", "input")

# Models and images whose peaks occur in different parts of the step.
CASES: dict[str, tuple[str, tuple[int, int, int, int], dict[str, Any]]] = {
    "third block": ("densenet121", (4, 3, 64, 64), {"block_config": (2, 2, 12, 2)}),
    "last block": ("densenet169", (2, 3, 64, 64), {"block_config": (2, 2, 2, 12)}),
    "densenet_bc_100_12": ("densenet_bc_100_12", (2, 3, 32, 32), {}),
    "densenet_bc_40_12": ("densenet_bc_40_12", (4, 3, 32, 32), {}),
    "no bottleneck": ("densenet_40_12", (2, 3, 32, 32), {}),
    "dropout": ("densenet_bc_40_12", (4, 3, 24, 32), {"drop_rate": 0.1}),
    "stem": ("densenet121", (2, 3, 96, 96), {"block_config": (1, 1), "growth_rate": 8}),
    "head": ("densenet121", (8, 3, 32, 32), {"block_config": (2,), "num_init_features": 64,
                                             "num_classes": 20000}),
}  # fmt: skip


def measured(model: nn.Module, shape: tuple[int, ...], channels_last: bool = True, dtype: Any = None) -> int:
    """The allocator's peak above what was allocated before the step."""
    images = torch.randn(shape)
    if channels_last:
        images = images.contiguous(memory_format=schedule.channels_last(images))
    step = sgd_step(model, dtype or torch.float32, torch.device("cpu"))
    return step_peaks(step, images, torch.zeros(shape[0], dtype=torch.long))["peak_bytes"]


def over_before(found: Estimate) -> int:
    return found.peak - sum(found.parts.get(part, 0) for part in BEFORE)


@pytest.mark.parametrize("case", CASES)
def test_estimate_is_the_measured_peak(case: str, recompute: str) -> None:
    name, shape, options = CASES[case]
    model = MODELS[name](recompute=recompute, **options)
    found = estimate(model, shape, recompute=recompute, optimizer="none")
    assert over_before(found) == pytest.approx(measured(model, shape), rel=0.05)


@pytest.mark.skipif("cpu" not in dense_ext.available_backends("cpu"), reason="it is not built")
@pytest.mark.parametrize(
    ("blocks", "growth_rate", "side"), [((2, 12), 32, 32), ((1, 1), 8, 48)], ids=["last block", "stem"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_estimate_for_volumes(
    blocks: tuple[int, ...], growth_rate: int, side: int, dtype: torch.dtype, recompute: str
) -> None:
    model = DenseNet(3, 1, 2, block_config=blocks, growth_rate=growth_rate)
    shape = (2, 1, side, side - 8, side + 8)
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    found = estimate(model, shape, dtype=dtype, recompute=recompute, optimizer="none", backend="cpu")
    dense_ext.swap(model, recompute=recompute, backend="cpu")
    assert over_before(found) == pytest.approx(measured(model, shape, dtype=dtype), rel=0.05)


def test_volumes_whose_memory_is_not_known_are_refused() -> None:
    model = DenseNet(3, 1, 2, block_config=(2,))
    with pytest.raises(ValueError, match="cpu backend alone, not for reference"):
        estimate(model, (1, 1, 32, 32, 32), backend="reference")


@pytest.mark.parametrize("backend", dense_ext.available_backends("cpu"))
@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    # For contiguous bfloat16 images, oneDNN copies the first convolution's gradient into its own layout.
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
)
def test_estimate_on_each_backend(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("PyTorch's convolutions in bfloat16 unfold their input where oneDNN has none")
    for case in ("stem", "densenet_bc_40_12"):
        name, shape, options = CASES[case]
        model = MODELS[name](backend=backend, **options)
        found = estimate(
            model, shape, dtype=dtype, optimizer="none", backend=backend, channels_last=channels_last
        )
        expected = measured(model, shape, channels_last, dtype)
        assert over_before(found) == pytest.approx(expected, rel=0.05), case


class Idle(TritonBackend):
    """A GPU backend that runs anywhere and computes nothing, so that only the schedule takes memory."""

    def unavailable_reason(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return None


for name in (*PRIMITIVES, *THROUGH_NORM):
    setattr(Idle, name, lambda self, *tensors: None)


@pytest.fixture
def idle_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the Triton backend by one that runs anywhere and does nothing."""
    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS, "triton", Idle())
        select.cache_clear()
        yield
    select.cache_clear()


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose backends are asked")


@no_gpu
@pytest.mark.usefixtures("idle_kernels")
def test_estimate_for_an_absent_gpu(recompute: str) -> None:
    for case in ("stem", "densenet_bc_40_12"):
        name, shape, options = CASES[case]
        model = MODELS[name](recompute=recompute, backend="triton", **options)
        found = estimate(model, shape, recompute=recompute, optimizer="none", device="cuda")
        assert over_before(found) == pytest.approx(measured(model, shape), rel=0.05), case


@no_gpu
def test_backends_assumed_for_an_absent_gpu() -> None:
    def backend(**options: Any) -> str:
        return Planner("densenet_bc_40_12", (3, 32, 32), device="cuda", **options).backend

    assert backend() == backend(dtype=torch.bfloat16) == "triton"
    assert [backend(backend=name) for name in ("triton", "cuda", "reference")] == [
        "triton",
        "cuda",
        "reference",
    ]
    assert backend(dtype=torch.float64) == "reference"
    with pytest.raises(RuntimeError, match="cuda: "):
        backend(backend="cuda", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="runs on the CPU, not on cuda"):
        backend(backend="cpu")


def test_estimate_of_mixed_policies() -> None:
    policies = ("none", "block", "bottleneck")
    name, shape, _ = CASES["densenet_bc_40_12"]
    model = MODELS[name]()
    blocks = [m for m in model.modules() if isinstance(m, dense_ext.DenseBlock)]
    for block, policy in zip(blocks, policies, strict=True):
        block.recompute = policy
    found = estimate(model, shape, recompute=policies, optimizer="none")
    assert over_before(found) == pytest.approx(measured(model, shape), rel=0.05)
    assert tuple(found.recompute.values()) == policies


def test_memory_held_before_a_step_is_counted_exactly() -> None:
    model = MODELS["densenet_bc_40_12"]()
    parameters = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    for optimizer, states in (("none", 0), ("sgd", 0), ("momentum", 1), ("adamw", 2)):
        parts = estimate(model, (4, 3, 32, 32), optimizer=optimizer).parts
        assert parts["parameters"] == parameters + buffers
        assert parts["gradients"] == parameters
        assert parts.get("optimizer state", 0) == states * parameters
        assert parts["input"] == 4 * 3 * 32 * 32 * 4
    model.features.conv0.weight.requires_grad_(False)
    frozen = estimate(model, (4, 3, 32, 32)).parts["gradients"]
    assert frozen == parameters - model.features.conv0.weight.nbytes


def test_parts_add_up_and_nothing_is_touched() -> None:
    model = MODELS["densenet_bc_40_12"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = estimate(model, (4, 3, 32, 32))
    assert sum(found.parts.values()) == found.peak
    assert found.point.startswith("backward, ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_name_a_meta_model_and_torchvision_agree() -> None:
    shape = (4, 3, 64, 64)
    by_name = estimate("densenet121", shape)
    with torch.device("meta"):
        model = MODELS["densenet121"]()
    assert estimate(model, shape) == by_name
    assert estimate(torchvision_twin(model), shape) == by_name


def test_largest_batch_fits_and_one_more_does_not(recompute: str) -> None:
    planner = Planner("densenet_bc_40_12", (3, 32, 32))
    largest = planner.largest_batch("1GiB", recompute)
    assert planner.estimate(largest, recompute).peak <= 2**30 < planner.estimate(largest + 1, recompute).peak
    assert planner.largest_batch(1000, recompute) == 0


def test_choice_is_the_cheapest_mixture_that_fits() -> None:
    planner, batch = Planner("densenet_bc_40_12", (3, 32, 32)), 64
    peaks = {m: planner.estimate(batch, m).peak for m in itertools.product(RECOMPUTE, repeat=3)}
    none = peaks["none", "none", "none"]
    assert planner.choose(batch, none).recompute == dict.fromkeys(
        ("denseblock1", "denseblock2", "denseblock3"), "none"
    )
    tighter = planner.choose(batch, none - 1)
    assert tighter.peak < none
    assert "none" in tighter.recompute.values()  # not every block has to recompute
    assert planner.choose(batch, min(peaks.values())).peak == min(peaks.values())
    assert planner.choose(batch, min(peaks.values()) - 1) is None


def test_peers_are_tracked() -> None:
    """The tracked peak is the allocator's measured one, and the networks are not changed."""
    shape = (4, 3, 32, 32)
    model = dense_ext.DenseNet(12, (3, 2), 24, num_classes=10, small_inputs=True)
    for name, make in tracked_networks(model).items():
        network = make()
        tensors = [*network.parameters()] * 3 + [*network.buffers()]  # also gradients and momentum
        before = sum(t.nbytes for t in tensors) + 4 * 3 * 32 * 32 * 4
        values = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        peak = TrackedStep(network, shape[1:]).peak(shape[0])
        assert all(torch.equal(tensor, values[key]) for key, tensor in network.state_dict().items())
        assert peak - before == pytest.approx(measured(network, shape), rel=0.05), name


def test_a_tracked_step_includes_gradients_and_the_optimizers_state() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 100_000))
    parameters, largest = sum(p.nbytes for p in network.parameters()), network[3].weight.nbytes
    peak = {o: TrackedStep(network, (3, 4, 4), optimizer=o).peak(2) for o in OPTIMIZERS}
    assert peak["none"] > 3 * parameters  # the parameters, their gradients and the new gradients
    assert peak["sgd"] == peak["none"]
    assert peak["momentum"] == peak["none"] + parameters
    assert peak["adamw"] == pytest.approx(4 * parameters + 2 * largest, rel=1e-3)  # two temporaries


# --- the search for the largest number that fits --------------------------------------------------------


@pytest.mark.parametrize("first", [1, 7, 64, 5000])
def test_search_on_a_line_with_a_kink(first: int) -> None:
    looked: list[int] = []

    def peak(batch: int) -> int:
        looked.append(batch)
        return max(10_000 + 130 * batch, 30_000 + 100 * batch, 150 * batch)

    for budget in (30_000, 30_099, 30_100, 99_999, 100_000, 1_000_000):
        looked.clear()
        found = largest(peak, budget, first)
        assert len(looked) <= 6
        assert found == sum(peak(batch) <= budget for batch in range(1, 10_000))


SHAPES: dict[str, Callable[[int], float]] = {
    "line": lambda n: 7 * n,
    "parabola": lambda n: n * n,
    "flat, then a step": lambda n: 10 if n < 40 else 10**6,
    "out of memory": lambda n: n if n < 30 else math.inf,
    "all but flat": lambda n: 1000 + n / 1000,
    "steep at first": lambda n: 100 * math.log(n + 1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [1, 3, 64, 1000])
@pytest.mark.parametrize("at_most", [1, 50, 10**6])
def test_search_on_other_curves(shape: str, first: int, at_most: int) -> None:
    for budget in (0, 5, 10, 99, 100, 450, 1001):
        looked: list[int] = []

        def nbytes(n: int, looked: list[int] = looked) -> float:
            looked.append(n)
            return SHAPES[shape](n)

        n = largest(nbytes, budget, first, at_most)
        assert n == 0 or SHAPES[shape](n) <= budget
        assert n == at_most or SHAPES[shape](n + 1) > budget
        assert len(set(looked)) == len(looked) <= 40
        assert min(looked) >= 1
        assert max(looked) <= at_most


# --- sizes and bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), ("4096", 4096), (10**9, 10**9), (" 2mib ", 2**21)],
)
def test_sizes(size: int | str, nbytes: int) -> None:
    assert parse_bytes(size) == nbytes


@pytest.mark.parametrize("size", ["", "GiB", "-1GB", "1e9", "8 GX", "0", 0, -5, "0.1B"])
def test_bad_sizes(size: int | str) -> None:
    with pytest.raises(ValueError, match=r"memory size|unit must be one of"):
        parse_bytes(size)
    with pytest.raises(TypeError, match="must be bytes or a string"):
        parse_bytes(1.5)  # type: ignore[arg-type]


def test_memory_of_a_device() -> None:
    assert device_memory(torch.device("cpu")) > 2**20
    with pytest.raises(ValueError, match="memory of meta is not known"):
        device_memory(torch.device("meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet50"}, "model must be one of"),
        ({"model": nn.Linear(2, 2)}, "Linear is not and does not contain a DenseNet"),
        ({"input_shape": (3, 32, 32)}, r"must be \[N, C, H, W\]"),
        ({"input_shape": (1, 4, 32, 32)}, "images of 3 channels"),
        ({"input_shape": (0, 3, 32, 32)}, "batch must be at least 1"),
        ({"input_shape": (1, 3, 0, 32)}, "not empty"),
        ({"input_shape": (1, 3, 3, 3)}, "too small for the network: forward, transition2"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"recompute": "some"}, "recompute must be one of"),
        ({"recompute": ("none", "block")}, "2 entries, expected 3"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"backend": "abacus"}, "backend must be one of"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(**{"model": "densenet_bc_40_12", "input_shape": (1, 3, 32, 32), **arguments})


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module or a name"):
        estimate(7, (1, 3, 32, 32))  # type: ignore[arg-type]


# --- swap ---------------------------------------------------------------------------------------------


def policies(model: nn.Module) -> list[str]:
    return [row.recompute for row in dense_ext.report(model).rows if row.kind == "dense block"]


def test_swap_chooses_what_fits() -> None:
    shape = (64, 3, 64, 64)
    planner = Planner(small_densenet(), shape[1:], optimizer="adamw", channels_last=False)
    for memory in ("1TiB", planner.estimate(64, "none").peak - 1):
        model = dense_ext.swap(small_densenet(), recompute="auto", input_shape=shape, memory=memory)
        choice = planner.choose(64, memory)
        assert choice is not None
        assert policies(model) == list(choice.recompute.values())
    assert len(set(policies(model))) > 1
    assert model(torch.randn(2, 3, 64, 64).double()).shape == (2, 4)


def test_swap_sees_the_memory_format_of_images_with_one_channel() -> None:
    """Contiguous images are copied in front of the stem."""
    shape, options = (2, 1, 96, 96), {"block_config": (1, 1), "growth_rate": 8}

    def model() -> nn.Module:
        net = torchvision.models.DenseNet(num_classes=2, **options)
        net.features.conv0 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        return net

    planners = [Planner(model(), shape[1:], optimizer="adamw", channels_last=last) for last in (True, False)]
    peaks = [min(planner.estimate(2, policy).peak for policy in RECOMPUTE) for planner in planners]
    assert peaks[0] < peaks[1]
    between = peaks[1] - 1
    dense_ext.swap(model().to(memory_format=torch.channels_last), **fit(shape, between))
    with pytest.raises(ValueError, match="no recompute policy fits"):
        dense_ext.swap(model(), **fit(shape, between))


def fit(shape: tuple[int, ...], memory: int) -> dict[str, Any]:
    return {"recompute": "auto", "input_shape": shape, "memory": memory}


def test_swap_counts_in_the_dtype_of_autocast() -> None:
    """Autocast halves the bytes: a step that must recompute in float32 fits without."""
    shape, net = (32, 3, 128, 128), MODELS["densenet121"]()
    planner = Planner(net, shape[1:], optimizer="adamw", channels_last=False)
    memory, chosen = planner.estimate(32, "none").peak - 1, []
    for dtype in (None, torch.bfloat16):
        model = torchvision_twin(net, device="cpu")
        dense_ext.swap(model, recompute="auto", input_shape=shape, memory=memory, dtype=dtype)
        chosen.append(set(policies(model)))
    assert chosen[0] != {"none"}
    assert chosen[1] == {"none"}


def test_swap_takes_the_memory_of_the_device() -> None:
    model = dense_ext.swap(small_densenet(), recompute="auto", input_shape=(1, 3, 64, 64))
    assert set(policies(model)) == {"none"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recompute": "auto"}, "needs input_shape"),
        ({"recompute": "auto", "input_shape": (3, 64, 64)}, "needs input_shape"),
        ({"recompute": "block", "memory": "1GiB"}, 'go with recompute="auto"'),
        ({"input_shape": (1, 3, 64, 64)}, 'go with recompute="auto"'),
        ({"dtype": torch.bfloat16}, 'go with recompute="auto"'),
        ({"recompute": "auto", "input_shape": (1, 3, 64, 64), "memory": "much"}, "memory size"),
        ({"recompute": "auto", "input_shape": (1, 3, 64, 64), "memory": "1kB"}, "a batch of 0 fits"),
    ],
)
def test_swap_refuses_before_it_changes_anything(arguments: dict[str, Any], message: str) -> None:
    model = small_densenet()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        dense_ext.swap(model, **arguments)
    assert [type(m) for m in model.modules()] == classes


def test_swap_plans_only_models_it_can_fuse() -> None:
    model = small_densenet()
    model.features.denseblock1.denselayer1.relu1 = nn.GELU()
    with pytest.raises(ValueError, match=r'recompute="auto"\): left as they are: features.denseblock1'):
        dense_ext.swap(model, recompute="auto", input_shape=(1, 3, 64, 64))


def test_swap_plans_for_a_densenet_inside_a_model() -> None:
    """Its parameters are those of the whole model; the policies are the DenseNet's."""
    shape = (64, 3, 64, 64)
    wrapped = nn.Sequential(OrderedDict(backbone=small_densenet(), head=nn.Linear(4, 500).double()))
    alone, inside = (
        Planner(model, shape[1:], optimizer="adamw", channels_last=False)
        for model in (small_densenet(), wrapped)
    )
    assert inside.estimate(64).parts["parameters"] == alone.estimate(64).parts["parameters"] + 8 * 5 * 500
    memory = inside.estimate(64, "none").peak - 1
    dense_ext.swap(wrapped, recompute="auto", input_shape=shape, memory=memory)
    choice = inside.choose(64, memory)
    assert choice is not None
    assert policies(wrapped) == list(choice.recompute.values())
    two = nn.ModuleList([small_densenet(), small_densenet()])
    with pytest.raises(ValueError, match="ModuleList contains 2 DenseNets"):
        dense_ext.swap(two, recompute="auto", input_shape=shape)
