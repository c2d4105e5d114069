"""Tests the measuring code: its counts against independent counts, its results against known values."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import torchvision
from PIL import Image
from torchvision.models import densenet121

import dense_ext
from dense_ext.benchmark import family, networks, peers, results, timing
from dense_ext.benchmark.errors import UsageError
from dense_ext.benchmark.memory import allocation_levels, saved_bytes, step_peaks
from dense_ext.benchmark.results import Measurement, PeerLabel
from dense_ext.benchmark.step import sgd_step
from dense_ext.benchmark.suites import Options, quick
from dense_ext.benchmark.suites.speed import DISAGREES, LOSS_TOLERANCE, StepSuite, mark_disagreement
from dense_ext.files import write_atomically
from dense_ext.memory import TrackedStep
from dense_ext.schedule import RECOMPUTE
from dense_ext.training import images

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
SAME = ("imagenet_top1_percent", "parameters", "forward_flops_per_image")  # of a network, whatever runs it


def small_model() -> dense_ext.DenseNet:
    return dense_ext.DenseNet(4, (2, 3), 8, num_classes=5, small_inputs=True)


def write_images(folder: Path, classes: int = 2, count: int = 10, size: int = 12) -> Path:
    """Write images of noise, with a different brightness for each class."""
    torch.manual_seed(0)
    for label, i in itertools.product(range(classes), range(count)):
        pixels = (torch.rand(size, size, 3) * 100 + 120 * label).to(torch.uint8).numpy()
        path = folder / f"class{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


# --- memory -------------------------------------------------------------------------------------------


def eager_densenet_bytes(batch: int, size: int) -> int:
    """The bytes that torchvision's DenseNet-121 must keep in float32, counted from its shapes.

    A norm keeps its input, and the mean and deviation of its batch. The in-place ReLU keeps its output,
    which the convolution after it keeps too.
    """
    pixels = batch * (size // 2) ** 2
    floats = batch * 3 * size**2 + 2 * 64 * pixels + 2 * 64  # image; first convolution and ReLU
    pixels //= 4
    indices = 64 * pixels  # max pool, int64
    channels = 64
    for i, layers in enumerate((6, 12, 24, 16)):
        for _ in range(layers):
            floats += 2 * (channels + 128) * pixels + 2 * (channels + 128)
            channels += 32
        floats += 2 * channels * pixels + 2 * channels  # the norm after the block
        if i < 3:
            channels //= 2
            floats += channels * pixels  # the average pool's input
            pixels //= 4
    floats += batch * (channels + 1000) + 1  # classifier's input, log softmax, the loss's weight
    return 4 * floats + 8 * (indices + batch)


def densenet121_bytes(batch: int, **options: bool) -> int:
    with FakeTensorMode():
        network = densenet121(**options)
        x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.long)
        return saved_bytes(network, lambda: nn.functional.cross_entropy(network(x), labels))


def test_counting_saved_bytes_keeps_none() -> None:
    """Not even those that a node's own output would keep alive, as ReLU's does."""
    network, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)), torch.randn(1000, 3)
    left = allocation_levels(lambda: saved_bytes(network, lambda: network(x).sum()))[-1]
    assert left == 0


def test_saved_bytes_are_those_counted_from_the_shapes() -> None:
    assert densenet121_bytes(8) == eager_densenet_bytes(8, 224)
    assert densenet121_bytes(8) / 8e6 == pytest.approx(130.4, abs=0.05)


def test_memory_efficient_saves_what_is_known_of_it() -> None:
    assert densenet121_bytes(8, memory_efficient=True) / 8e6 == pytest.approx(62.9, abs=0.05)


def test_a_storage_counts_once_and_parameters_do_not() -> None:
    layer = nn.Linear(3, 5, bias=False)
    x = torch.randn(7, 3)

    def forward() -> torch.Tensor:
        y = layer(x)  # saves x and the weight
        return (y * y.view(7, 5)[:, :2].sum()).exp().sum()  # saves y twice, the sum, the exponential

    assert saved_bytes(layer, forward) == 4 * (7 * 3 + 7 * 5 + 1 + 7 * 5)


def test_real_and_fake_tensors_count_alike() -> None:
    def count() -> int:
        network, x = networks.plain(small_model()), torch.randn(2, 3, 16, 16)
        return saved_bytes(network, lambda: network(x).sum())

    with FakeTensorMode():
        fake = count()
    assert count() == fake


@pytest.mark.parametrize("policy", [None, *RECOMPUTE])
def test_saved_bytes_are_what_stays_allocated(policy: str | None) -> None:
    """The allocator's count after a forward, also for modules that hide saved tensors from the hooks."""
    model, labels = small_model(), torch.arange(4)
    peer = peers.EAGER["eager-cl"] if policy is None else peers.OURS[policy]
    step = sgd_step(peer.build(model, CPU), torch.float32, CPU)
    x = peer.images(torch.randn(4, 3, 16, 16))
    saved = saved_bytes(step.model, lambda: step.loss(x, labels))
    loss_bytes = torch.float32.itemsize
    live = allocation_levels(lambda: step.loss(x, labels))[-1] - loss_bytes
    assert saved == pytest.approx(live + x.nbytes + labels.nbytes, abs=1024)


def test_peak_holds_what_is_saved() -> None:
    network, x, labels = networks.plain(small_model()), torch.randn(4, 3, 16, 16), torch.arange(4)
    step = sgd_step(network, torch.float32, CPU)
    saved = saved_bytes(network, lambda: step.loss(x, labels))
    peak = step_peaks(step, x, labels)["peak_bytes"]
    # Besides the saved tensors there are gradients, at most one for each activation.
    assert saved - x.nbytes < peak < 2 * saved


def test_ours_keeps_an_eighth_of_eager() -> None:
    rows = list(family._rows("densenet121", None, lambda text: None))
    eager, memory_efficient, none, bottleneck, block = (row.measures["saved_bytes_per_image"] for row in rows)
    assert eager / bottleneck > 8
    assert memory_efficient > none > bottleneck > block
    assert {row.measures["parameters"] for row in rows} == {7_978_856}


def test_the_family_is_what_torchvision_says_of_its_weights() -> None:
    committed = results.read_results(ROOT / "benchmarks" / "results" / "family.json")
    rows = [(str(row.case["model"]), row.measures) for row in committed.measured("imagenet_top1_percent")]
    known = dict(rows)
    assert all(known[name][same] == row[same] for name, row in rows for same in SAME), "whatever runs it"
    assert sorted(known) == sorted([*family.RESNETS, *(f"densenet{n}" for n in (121, 161, 169, 201))])
    for name, row in known.items():
        meta = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].meta
        assert row["imagenet_top1_percent"] == meta["_metrics"]["ImageNet-1K"]["acc@1"]
        assert row["parameters"] == meta["num_params"]
        # torchvision counts a multiplication with its addition once.
        assert row["forward_flops_per_image"] == pytest.approx(2e9 * meta["_ops"], rel=1e-3)


def test_what_a_step_holds_is_its_peak() -> None:
    """Of eager, whose peak is tracked here; less by what backward has beside the activations."""

    def counted(name: str, size: int | None) -> dict[str, dict[str, float]]:
        return {row.peer: row.measures for row in family._rows(name, size, lambda text: None)}

    (row,) = counted("resnet18", 64).values()
    assert "imagenet_top1_percent" not in row
    peak = TrackedStep(torchvision.models.resnet18(), (3, 64, 64)).peak(family.STEP_BATCH)
    assert 0.95 * peak < row["step_bytes"] <= peak
    ours = counted("densenet_bc_40_12", None)
    planned = dense_ext.memory.estimate("densenet_bc_40_12", (family.STEP_BATCH, 3, 32, 32))
    step = ours["dense_ext-bottleneck"]["step_bytes"]
    assert step == planned.peak < ours["eager-cl"]["step_bytes"] / 4


@pytest.mark.parametrize("policy", RECOMPUTE)
def test_ours_grows_by_a_straight_line(policy: str) -> None:
    depths = (4, 8, 16, 32)
    (eager_slope, eager_r2), (slope, r2) = (
        quick.straight_line(
            depths, [quick.block_bytes(peer, layers, CPU, torch.float32, "auto") for layers in depths]
        )
        for peer in peers.choose(["eager-cl"], [policy])
    )
    assert r2 > 0.999
    assert eager_r2 < 0.99
    assert eager_slope > 8 * slope


def test_straight_line() -> None:
    assert quick.straight_line([1, 2, 4], [5, 8, 14]) == pytest.approx((3, 1))
    assert quick.straight_line([1, 2, 3], [1, 4, 1])[1] == pytest.approx(0)


# --- networks and arithmetic --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["densenet_bc_100_12", "densenet121"])
def test_the_twin_has_the_same_weights_and_outputs(name: str) -> None:
    model = dense_ext.models.MODELS[name](num_classes=3)
    twin = networks.with_weights(networks.torchvision_twin(model), model.state_dict(), CPU).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(networks.plain(model.eval())(x), twin(x))


def test_no_twin_without_bottleneck() -> None:
    with pytest.raises(UsageError, match="no DenseNet without bottleneck"):
        networks.torchvision_twin(dense_ext.densenet_40_12())


def test_flops() -> None:
    def convolution() -> nn.Module:
        return nn.Conv2d(3, 8, 3, padding=1, bias=False)

    forward = networks.flops_per_image(convolution, (3, 10, 10), backward=False)
    assert forward == 2 * 10 * 10 * 8 * 3 * 9
    # The images need no gradient, so the first convolution has only a weight gradient.
    assert networks.flops_per_image(convolution, (3, 10, 10), backward=True) == 2 * forward


# --- images -------------------------------------------------------------------------------------------


def test_a_batch_is_noise_and_the_same_for_every_peer() -> None:
    chosen = peers.choose(["eager"], ["none"])
    suite = StepSuite(Options(size=24, batch=4), chosen, results.new_results("step", {}))
    (first, labels), (second, _) = (suite.batch(suite.cases()[0], peer) for peer in chosen)
    assert torch.equal(first, second)
    assert first.shape == (4, 3, 24, 24)
    assert first.std() > 0.2
    assert not torch.equal(first[0], first[1])
    assert labels.tolist() == [0, 1, 2, 3]


def test_folder_split_by_class(tmp_path: Path) -> None:
    data = images.folder_data(write_images(tmp_path), 8)
    again = images.folder_data(tmp_path, 8)
    assert data.test.indices == again.test.indices  # type: ignore[attr-defined]
    assert sorted(label for _, label in data.test) == [0, 0, 1, 1]  # type: ignore[attr-defined]
    assert len(data.training) == 16  # type: ignore[arg-type]


def test_folder_with_parts_of_different_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "train", classes=2)
    write_images(tmp_path / "val", classes=3)
    with pytest.raises(UsageError, match=r"train and val in .* have different classes"):
        images.folder_data(tmp_path, 8)


# --- timing and results -------------------------------------------------------------------------------


def test_rates_are_of_the_fastest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product takes 2 operations for each multiply-add; a copy reads and writes each byte."""
    seconds = iter([4.0, 0.5, 3.0, 9.0] + [1.0] * 56)
    monkeypatch.setattr(timing, "seconds_per_call", lambda call, device: call() is not None and next(seconds))
    assert timing.matmul_rate(CPU, torch.float32) == 2 * 1024**3 / 0.5
    assert timing.copy_bandwidth(CPU) == 2 * 4 * 2**26 / 1.0


def test_rounds_begin_with_another_each() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    rows = {name: Measurement({}, name) for name in calls}
    timing.interleave([(rows[name], call) for name, call in calls.items()], CPU, 3, lambda text: None)
    assert "".join(order) == "abcbcacab"
    assert [len(row.seconds) for row in rows.values()] == [3, 3, 3]


def test_a_call_that_fails_has_no_turn_any_more() -> None:
    order: list[str] = []

    def second_fails() -> None:
        order.append("b")
        if order.count("b") == 2:
            raise RuntimeError("worn out")

    calls = {"a": lambda: order.append("a"), "b": second_fails}
    rows = {name: Measurement({}, name) for name in calls}
    timing.interleave([(rows[name], call) for name, call in calls.items()], CPU, 3, lambda text: None)
    assert "".join(order) == "abbaa"
    assert [len(row.seconds) for row in rows.values()] == [3, 0]
    assert [row.failure for row in rows.values()] == [None, "RuntimeError: worn out"]


def test_speeds_compare_with_the_fastest_eager_peer() -> None:
    modes = {"eager": "eager", "eager-cl": "eager", "compile": "compile", "dense_ext-none": "eager"}
    measured = results.new_results("quick", {})
    measured.peers = {
        name: PeerLabel(name, name.startswith("dense_ext"), mode) for name, mode in modes.items()
    }
    measured.work = {"matmul_flops_per_second": {"float32": 1000}}
    samples = {"eager": [4.0], "eager-cl": [2.0, 1.0, 4.0], "compile": [], "dense_ext-none": [0.5, 1.0, 2.0]}
    rows = {
        name: Measurement({"dtype": "float32"}, name, measures={"flops": 500}, seconds=seconds)
        for name, seconds in samples.items()
    }
    measured.rows = list(rows.values())
    assert measured.ratios(rows["dense_ext-none"]) == {"fastest eager": 2}
    assert rows["eager-cl"].median == 2
    assert measured.matmul_share(rows["eager"]) == 0.125
    rows["compile"].seconds.append(1.25)
    assert measured.ratios(rows["dense_ext-none"]) == {"fastest eager": 2, "fastest other": 1.25}
    rows["eager"].seconds.clear()
    rows["eager-cl"].seconds.clear()
    assert measured.ratios(rows["dense_ext-none"]) == {"fastest other": 1.25}
    rows["compile"].seconds.clear()
    assert measured.references() == {}


@pytest.mark.parametrize("losses", [[2.0, 1.9 * 1.01], [math.nan, 1.9]])
def test_no_speed_without_agreement(losses: list[float]) -> None:
    known = {"eager": PeerLabel("eager", ours=False), "dense_ext-none": PeerLabel("dense_ext", ours=True)}

    def marked(losses: list[float]) -> Measurement:
        ours = Measurement({}, "dense_ext-none", values=losses, seconds=[1.0])
        mark_disagreement(
            [Measurement({}, "eager", values=[2.0, 1.9]), ours], known, LOSS_TOLERANCE["float32"]
        )
        return ours

    wrong = marked(losses)
    assert (wrong.failure or "").startswith(DISAGREES)
    assert wrong.seconds == []
    assert marked([2.0, 1.9001]).failure is None


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    written = results.new_results("quick", {"rounds": 3})
    written.peers = {"eager": PeerLabel("eager", ours=False)}
    written.rows = [Measurement({"batch": 1}, "eager", measures={"flops": 2}, seconds=[0.5], values=[1.0])]
    results.write_json(path, written)
    assert results.read_results(path) == written


@pytest.mark.parametrize(
    ("names", "policies", "message"),
    [
        (["eager", "quick"], [], "peers must be among eager, .*; got 'quick'"),
        (["eager"], ["all"], "recompute must be among none, bottleneck, block; got 'all'"),
        (["eager", "eager"], [], "peers names one twice"),
        ([], ["none"], "peers must name at least one"),
    ],
)
def test_peers_are_checked(names: list[str], policies: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        peers.choose(names, policies)


def test_json_of_what_is_not_finite(tmp_path: Path) -> None:
    """Losses may be NaN, which not every JSON reader accepts."""
    path = tmp_path / "results.json"
    results.write_json(path, {"losses": [math.nan, 1.5, math.inf], "options": {"depths": (1, 2)}})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "losses": [None, 1.5, None], "options": {"depths": [1, 2]},
    }  # fmt: skip


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
