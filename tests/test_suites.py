"""Every suite at a tiny size: its rows, its exit code, and its file, validated by the schema."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dense_ext
from dense_ext.cli import main, output

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jsonschema")

import jsonschema

from dense_ext.backends.table import primitive_of
from dense_ext.benchmark import kernelbench, peers, suites
from dense_ext.benchmark.errors import UnavailableError
from dense_ext.benchmark.memory import saved_bytes, step_peaks
from dense_ext.benchmark.networks import small_densenet
from dense_ext.benchmark.results import Measurement, PeerLabel, new_results, read_results
from dense_ext.benchmark.step import GraphedStep, sgd_step
from dense_ext.benchmark.suites.speed import mark_disagreement

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "dense_ext" / "benchmark" / "results.schema.json").read_text())
pytestmark = pytest.mark.usefixtures("tiny_model", "one_thread", "known_rates")

SMALL = ["--size", "8", "--batch", "2", "--rounds", "3", "--recompute", "bottleneck"]


def run(suite: str, out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a suite; returns its result, which is validated by the schema."""
    assert main(["bench", "--suite", suite, *SMALL, *arguments, "--out", str(out)]) == code
    results = json.loads((out / f"{suite}.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert str(out) not in json.dumps(results)
    return results


def by_peer(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault(row["peer"], []).append(row)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").rglob("*.json")), ids=str)
def test_committed_results_are_what_the_schema_says(path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)


def test_schema_refuses_a_row_with_an_unknown_measure() -> None:
    row = {"case": {"model": "tiny"}, "peer": "eager", "failure": None, "measures": {}, "seconds": []}
    validator = jsonschema.Draft202012Validator({"$ref": "#/$defs/row", "$defs": SCHEMA["$defs"]})
    validator.validate(row)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**row, "measures": {"speed": 1}})


def bytes_needed(model: dense_ext.DenseNet, batch: int, peer: str) -> int:
    """The peak memory of training: a step's peak, parameters, gradients, momentum, buffers and images."""
    network = peers.PEERS[peer].build(model, torch.device("cpu"))
    step = sgd_step(network, torch.float32, torch.device("cpu"))
    images, labels = torch.randn(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.long)
    peak = step_peaks(step, peers.PEERS[peer].images(images), labels)["peak_bytes"]
    held = 3 * sum(p.nbytes for p in network.parameters()) + sum(b.nbytes for b in network.buffers())
    return peak + held + images.nbytes


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kept = suites.memory.MemorySuite.cases
    monkeypatch.setattr(suites.memory.MemorySuite, "cases", lambda *of: kept(*of)[:2])
    results = run("memory", tmp_path, "--model", "tiny", "--peers", "eager-cl", "--budget", "0.003")
    assert "largest batch that fits" in capsys.readouterr().out
    rows = by_peer(results)
    eager, ours = rows["eager-cl"], rows["dense_ext-bottleneck"]
    for (search, *_), peer in ((eager, "eager-cl"), (ours, "dense_ext-bottleneck")):
        model, batch = dense_ext.models.MODELS["tiny"](), search["measures"]["largest_batch"]
        assert search["case"]["model"] == "tiny"
        assert bytes_needed(model, batch, peer) <= 3e6 < bytes_needed(model, batch + 1, peer)
    assert 0 < eager[0]["measures"]["largest_batch"] < ours[0]["measures"]["largest_batch"]
    assert [row["case"]["depth"] for row in eager[1:]] == [22, 40]
    for a, b in zip(eager[1:], ours[1:], strict=True):
        assert a["measures"]["saved_bytes"] > 4 * b["measures"]["saved_bytes"]
        assert a["measures"]["lasting_bytes"] == b["measures"]["lasting_bytes"]
        assert a["measures"]["peak_bytes"] > b["measures"]["peak_bytes"]
    assert {p.name for p in tmp_path.iterdir()} == {"memory.json", "memory-depth.png"}


def test_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shallow(self: suites.memory.PaperSuite, dtype: str) -> list[suites.base.Case]:
        return [self.case("depth", depth, 12, 2, dtype) for depth in (10, 16, 22)]

    monkeypatch.setattr(suites.memory.PaperSuite, "cases", shallow)
    rows = by_peer(run("paper", tmp_path, "--peers", "eager-cl", "--budget", "0.003"))
    deepest = {peer: rows[peer][0]["measures"]["deepest"] for peer in rows}
    assert deepest["dense_ext-bottleneck"] > deepest["eager-cl"] > 22
    for peer, depth in deepest.items():
        needed = [bytes_needed(small_densenet(d, 12), 2, peer) for d in (depth, depth + 6)]
        assert needed[0] <= 3e6 < needed[1]


def test_step(tmp_path: Path) -> None:
    arguments = ("--model", "tiny", "--dtype", "float32,bfloat16", "--peers", "eager,timm,graph")
    results = run("step", tmp_path, *arguments)
    rows = by_peer(results)
    assert list(rows) == ["eager", "timm", "graph", "dense_ext-bottleneck"]
    for peer in ("eager", "timm", "dense_ext-bottleneck"):
        assert [row["case"]["dtype"] for row in rows[peer]] == ["float32", "bfloat16"]
        assert all(len(row["seconds"]) == 3 and row["failure"] is None for row in rows[peer])
    assert {row["failure"] for row in rows["graph"]} == {"CUDA graphs need a GPU"}
    assert rows["dense_ext-bottleneck"][0]["served_by"]
    measures = [rows[peer][0]["measures"] for peer in ("eager", "dense_ext-bottleneck")]
    assert measures[0]["flops"] == measures[1]["flops"] > 0
    assert measures[0]["saved_bytes"] > 3 * measures[1]["saved_bytes"]


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from monai.networks.nets import DenseNet

    def shallow(classes: int) -> torch.nn.Module:
        return DenseNet(3, 1, classes, init_features=16, growth_rate=8, block_config=(4, 3))

    (network,) = suites.own_networks.VolumeSuite.networks
    monkeypatch.setattr(suites.own_networks.VolumeSuite, "networks", (replace(network, build=shallow),))
    arguments = ("--size", "24", "--peers", "eager-cl,memory-efficient,compile")
    rows = by_peer(run("volumes", tmp_path, *arguments))
    assert list(rows) == ["eager-cl", "dense_ext-bottleneck"], "what MONAI's network has"
    (eager,), (ours,) = rows.values()
    assert ours["served_by"] == ["cpu"]
    assert len(ours["seconds"]) == 3
    assert eager["measures"]["saved_bytes"] > 3 * ours["measures"]["saved_bytes"]
    assert eager["measures"]["flops"] == ours["measures"]["flops"] > 0
    assert "2 volumes of 24x24x24" in capsys.readouterr().out
    assert (tmp_path / "volumes-throughput.png").exists()


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("volumes", ["--peers", "timm"], "volumes has eager, eager-cl, graph, graph-cl; got none"),
        ("volumes", ["--size", "8"], "volumes of side 8 are too small"),
        ("kernelbench", ["--peers", "timm"], "kernelbench has eager, eager-cl, compile, "),
        ("kernelbench", ["--size", "8"], "images of side 8 are too small for 15: DenseNet-121"),
        ("kernelbench", ["--model", "densenet121"], "has networks of its own"),
        ("recognised", ["--size", "8"], "images of side 8 are too small for DenseNet-121 of plain layers"),
    ],
)
def test_own_networks_that_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suite: str, options: list[str], message: str
) -> None:
    assert main(["bench", "--suite", suite, *options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_volumes_without_monai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets.densenet", None)
    assert main(["bench", "--suite", "volumes", "--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


def test_kernelbench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem, sizes = suites.speed.Network, ((3, 3), (8, 8))
    problems = (
        problem("transition", lambda _: kernelbench.Shrink(4, 8), *sizes, channels=4),
        problem("block", lambda _: kernelbench.ListedBlock(2, 4, 4), *sizes, channels=4),
        problem("network", lambda classes: kernelbench.PlainDenseNet((2, 2), 4, classes), *sizes),
    )
    monkeypatch.setattr(suites.own_networks.KernelBenchSuite, "networks", problems)
    results = run("kernelbench", tmp_path, "--size", "16", "--peers", "eager,eager-cl,memory-efficient")
    rows = by_peer(results)
    assert list(rows) == ["eager", "eager-cl", "dense_ext-bottleneck"], "what runs such networks"
    assert results["peers"]["dense_ext-bottleneck"]["label"] == "dense_ext", "nothing is kept for backward"
    for i, posed in enumerate(problems):
        torch.manual_seed(suites.base.SEED)
        network, generator = posed.build(10).train(), torch.Generator().manual_seed(suites.base.SEED)
        with torch.no_grad():
            expected = network(torch.randn(2, posed.channels, 16, 16, generator=generator)).norm()
        for peer in rows:
            row = rows[peer][i]
            assert row["case"] == {"model": posed.label, "batch": 2, "size": 16, "dtype": "float32"}
            assert row["values"] == pytest.approx([float(expected)] * 2, rel=1e-5)
            assert len(row["seconds"]) == 3
            assert row["measures"].keys() == {"peak_bytes", "flops"}
        assert rows["dense_ext-bottleneck"][i]["served_by"] == ["cpu"]
    printed = capsys.readouterr().out
    assert "transition, 2 x 16x16" in printed
    assert "H100" not in printed
    assert (tmp_path / "kernelbench-throughput.png").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "batch"), [("float32", None), ("float32", 2), ("bfloat16", None)])
def test_published_times_stand_beside_what_a_gpu_was_measured_on(
    device: str, dtype: str, batch: int | None
) -> None:
    results = new_results("kernelbench", {"device": device, "dtypes": [dtype], "rounds": 1})
    results.machine["gpu"] = {"name": "a GPU"}
    results.peers, results.work = KNOWN, {"matmul_flops_per_second": {dtype: 1e12}}
    for problem in suites.own_networks.KernelBenchSuite.networks:
        case = problem.case(dtype, gpu=True, batch=batch).as_json()
        results.rows += [
            Measurement(case, peer, measures={"flops": 1e9}, seconds=[seconds])
            for peer, seconds in (("eager", 0.006), ("ours", 0.003))
        ]
    table = suites.own_networks.KernelBenchSuite.tables(results)["problems"]
    published = [(row[1:4], row[4:]) for row in table.rows]
    assert all(measured == ["3", "6", "2.00"] for measured, _ in published)
    expected = [["7.33", "3.15"], ["7.47", "4.62"], ["6.68", "8.93"], ["10.4", "21.8"]]
    same = device == "cuda" and dtype == "float32" and batch is None
    assert [times for _, times in published] == (expected if same else [[]] * 4)


def test_kernelbenchs_networks_have_its_size() -> None:
    """On the meta device: parameters, counted by hand, and what comes out."""
    for problem, outputs in zip(suites.own_networks.KernelBenchSuite.networks, [
        (128, 64, 128, 128), (10, 224, 224, 224), (10, 10), (10, 10),
    ], strict=True):  # fmt: skip
        with torch.device("meta"):
            network = problem.build(10)
            (_, batch), (_, size) = problem.batch, problem.size
            images = torch.empty(batch, problem.channels, size, size)
            assert network(images).shape == outputs
    for name, blocks, convolutions in (
        ("15", kernelbench.DENSENET_121, 62),
        ("16", kernelbench.DENSENET_201, 102),
    ):
        (problem,) = (p for p in suites.own_networks.KernelBenchSuite.networks if p.label.startswith(name))
        with torch.device("meta"):
            network = problem.build(10)
        kinds = [type(module) for module in network.modules()]
        assert kinds.count(torch.nn.Conv2d) == convolutions == sum(blocks) + 4
        assert kinds.count(torch.nn.Dropout) == sum(blocks)


@pytest.mark.parametrize("build", [
    lambda: kernelbench.ListedBlock(2, 4, 4), lambda: kernelbench.PlainDenseNet((2, 2), 4),
    lambda: kernelbench.JoinedDenseNet(2, 4),
])  # fmt: skip
def test_recognition_alone_serves_kernelbenchs_networks(build: Callable[[], torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="contains no dense block that dense_ext knows"):
        dense_ext.swap(build(), recognise=False)
    dense_ext.swap(build(), strict=True)


def test_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (
        lambda classes: kernelbench.PlainDenseNet((5, 3), 8, classes),
        lambda classes: kernelbench.JoinedDenseNet(3, 8, classes),
    )
    suite = suites.own_networks.RecognisedSuite
    networks = tuple(
        replace(network, build=build) for network, build in zip(suite.networks, small, strict=True)
    )
    monkeypatch.setattr(suite, "networks", networks)
    results = run("recognised", tmp_path, "--size", "32", "--batch", "4", "--peers", "eager-cl")
    rows = by_peer(results)
    assert list(rows) == ["eager-cl", "dense_ext-bottleneck"]
    for eager, ours in zip(rows["eager-cl"], rows["dense_ext-bottleneck"], strict=True):
        assert ours["served_by"] == ["cpu"]
        assert len(ours["seconds"]) == 3
        assert eager["measures"]["saved_bytes"] > 1.5 * ours["measures"]["saved_bytes"]
    table = suite.tables(read_results(tmp_path / "recognised.json"))["speed"]
    assert [row[0] for row in table.rows[::2]] == ["DenseNet-121 of plain layers, 4 x 32x32, float32",
                                                   "DenseNet-BC-40-12, 4 x 32x32, float32"]  # fmt: skip
    assert "PyTorch" in table.caption


def test_inference(tmp_path: Path) -> None:
    rows = by_peer(run("inference", tmp_path, "--model", "tiny", "--peers", "eager-cl"))
    eager, ours = (rows[peer][0] for peer in ("eager-cl", "dense_ext-bottleneck"))
    assert eager["values"] == pytest.approx(ours["values"], rel=1e-5)
    assert eager["measures"].keys() == {"peak_bytes", "flops"}


def test_inference_engines(tmp_path: Path) -> None:
    """They compute what eager does; how much memory they take is not known."""
    engines = {"onnxruntime": ["float32"], "openvino": ["float32", "bfloat16"]}
    for engine in engines:
        pytest.importorskip(engine)
    names = ",".join(("eager", *engines))
    arguments = ("--model", "tiny", "--batch", "2", "--dtype", "float32,bfloat16", "--peers", names)
    rows = by_peer(run("inference", tmp_path, *arguments))
    for engine, dtypes in engines.items():
        for row, expected in zip(rows[engine], rows["eager"], strict=True):
            dtype = row["case"]["dtype"]
            if dtype in dtypes:
                assert row["values"] == pytest.approx(
                    expected["values"], rel=0.02 if dtype != "float32" else 1e-4
                )
                assert row["measures"].keys() == {"flops"}
                assert len(row["seconds"]) == 3
            else:
                assert row["failure"] == f"{engine} does not compute in {dtype} on a CPU"


@pytest.mark.usefixtures("compiled_fast")
def test_a_program_compiled_ahead_of_time(tmp_path: Path) -> None:
    name = "dense_ext-none-aotinductor"
    rows = by_peer(run("inference", tmp_path, "--model", "tiny", "--batch", "1", "--peers", f"eager,{name}"))
    for row, expected in zip(rows[name], rows["eager"], strict=True):
        assert row["values"] == pytest.approx(expected["values"], rel=1e-4)
        assert len(row["seconds"]) == 3


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "aotinductor", "dense_ext-none-aotinductor"])
def test_some_peers_do_not_train(name: str) -> None:
    peer, model = peers.PEERS[name], small_densenet(10, 12)
    with pytest.raises(UnavailableError, match="is for inference"):
        peer.build(model, torch.device("cpu"))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_that_are_not_there(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.PEERS[engine]
    with pytest.raises(UnavailableError, match="is measured on a CPU"):
        peer.check(torch.device("cuda"), torch.float32)
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(UnavailableError, match=rf"{engine} is not installed: pip install '\.\[engines\]'"):
        peer.check(torch.device("cpu"), torch.float32)


def test_inference_runs_what_is_the_same_once() -> None:
    chosen = peers.choose(
        ["eager-cl", "memory-efficient-cl", "compile", "budget", "timm-cl"], ["block", "none"]
    )
    chosen.append(peers.PEERS["dense_ext-none-cpu"])
    assert [(peer.name, peer.label) for peer in peers.for_inference(chosen)] == [
        ("eager-cl", "eager, channels_last"),
        ("compile", "torch.compile"),
        ("timm-cl", "timm, channels_last"),
        ("dense_ext-block", "dense_ext"),
        ("dense_ext-none-cpu", "dense_ext, cpu"),
    ]


def cannot_run(row: dict[str, Any], device: torch.device) -> str | None:
    """The reason why a float32 row of the primitives suite must have failed, or None."""
    if row["peer"] == "aten":
        return None
    primitive = primitive_of(row["case"]["primitive"])
    return dense_ext.backends.BACKENDS[row["peer"]].unavailable_reason(primitive, device, torch.float32)


def test_primitives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run("primitives", tmp_path, "--model", "tiny", "--json")
    assert json.loads(capsys.readouterr().out) == results
    rows = by_peer(results)
    assert list(rows) == ["aten", *dense_ext.backends.BACKENDS]
    for row in results["rows"]:
        assert row["failure"] == cannot_run(row, torch.device("cpu"))
        if row["failure"] is None:
            assert len(row["seconds"]) == 3
            assert row["measures"]["relative_error"] < 1e-5
    assert (tmp_path / "primitives-roofline-float32.png").exists()


def test_rows_that_disagree_have_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(suites.speed.LOSS_TOLERANCE, "float32", -1.0)
    results = run("step", tmp_path, "--model", "tiny", "--peers", "eager", code=1)
    assert "not the eager network's" in capsys.readouterr().err
    rows = by_peer(results)
    assert rows["dense_ext-bottleneck"][0]["failure"].startswith("disagrees: ")
    assert rows["dense_ext-bottleneck"][0]["seconds"] == []
    assert len(rows["eager"][0]["seconds"]) == 3


KNOWN = {"ours": PeerLabel("dense_ext", ours=True), "eager": PeerLabel("eager", ours=False)}


@pytest.mark.parametrize("value", [2.0 * 1.01, math.nan])
def test_disagreement(value: float) -> None:
    rows = [Measurement({}, peer, values=[v]) for peer, v in (("eager", 2.0), ("ours", value))]
    mark_disagreement(rows, KNOWN, 1e-3)
    assert [row.failure is None for row in rows] == [True, False]


def test_rows_with_nothing_to_compare_with_have_no_speed() -> None:
    ours = Measurement({}, "ours", values=[2.0], seconds=[1.0])
    eager = Measurement({}, "eager", "out of memory")
    mark_disagreement([ours], KNOWN, 1e-3)
    assert ours.failure is None, "eager is still to come"
    mark_disagreement([ours, replace(eager, values=[2.0])], KNOWN, 1e-3)
    assert ours.failure is None, "it failed after its values were known"
    mark_disagreement([ours, eager], KNOWN, 1e-3)
    assert ours.failure is not None
    assert ours.failure.startswith("nothing to compare with")
    assert ours.seconds == []


def test_an_interrupted_suite_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, calls = suites.speed.interleave, itertools.count()

    def interrupted(*arguments: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        sample(*arguments)

    monkeypatch.setattr(suites.speed, "interleave", interrupted)
    arguments = ("--model", "tiny", "--dtype", "float32,bfloat16", "--peers", "eager")
    results = run("step", tmp_path, *arguments, code=130)
    assert results["interrupted"]
    assert [len(row["seconds"]) for row in results["rows"]] == [3, 3, 0, 0]


def test_a_killed_suite_has_left_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setattr(output, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(suites.speed, "interleave", killed)
    with pytest.raises(Killed):
        run("step", tmp_path, "--model", "tiny", "--peers", "eager")
    left = json.loads((tmp_path / "step.json").read_text())
    jsonschema.validate(left, SCHEMA)
    assert left["interrupted"]
    assert [row["peer"] for row in left["rows"]] == ["eager"]


def test_a_failing_peer_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate more than there is")

    monkeypatch.setattr(peers, "timm_twin", full)
    rows = by_peer(run("step", tmp_path, "--model", "tiny", "--peers", "timm,eager"))
    assert rows["timm"][0]["failure"] == "out of memory"
    assert len(rows["dense_ext-bottleneck"][0]["seconds"]) == 3


def test_a_missing_timm_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    rows = by_peer(run("step", tmp_path, "--model", "tiny", "--peers", "timm,eager"))
    assert rows["timm"][0]["failure"].startswith("timm is not installed")


def test_quick_run_with_a_failing_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--model", "tiny", *SMALL, "--no-depth"]
    assert main([*arguments, "--peers", "graph,eager", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "quick.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert {row["failure"] for row in by_peer(results)["graph"]} == {"CUDA graphs need a GPU"}
    assert [row["peer"] for row in results["rows"] if row["seconds"]] == ["eager", "dense_ext-bottleneck"]
    assert "not measured" in capsys.readouterr().out


def test_quick_counts_memory_on_other_images_than_it_times(tmp_path: Path) -> None:
    """Unless it is told the batch or the size."""
    arguments = ["bench", "--model", "tiny", "--device", "cpu", "--rounds", "1", "--recompute", "none"]
    assert main([*arguments, "--peers", "eager", "--no-depth", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "quick.json").read_text())["rows"]
    assert all(row["measures"]["peak_bytes"] > 0 for row in rows)
    cases = [(row["case"]["batch"], row["case"]["size"], len(row["seconds"])) for row in rows]
    assert cases == [(8, 32, 0)] * 2 + [(16, 32, 1)] * 2


# --- peers ---------------------------------------------------------------------------------------------


def losses(peer: peers.Peer) -> list[float]:
    torch.manual_seed(0)
    model, device = small_densenet(10, 12), torch.device("cpu")
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    step = sgd_step(peer.build(model, device), torch.float32, device)
    return [float(step(peer.images(x), labels)) for _ in range(2)]


def test_every_peer_does_the_same_step() -> None:
    expected = losses(peers.PEERS["eager"])
    served = (None, *dense_ext.available_backends("cpu"))
    for name, peer in peers.PEERS.items():
        if peer.mode == "eager" and peer.network.backend in served:
            assert losses(peer) == pytest.approx(expected, rel=1e-5), name


def test_compiled_within_a_budget() -> None:
    """The second compilation keeps less for backward, so it must not reuse the first one's code."""
    torch.manual_seed(0)
    device, x, labels = torch.device("cpu"), torch.randn(4, 3, 8, 8), torch.arange(4)
    saved = {}
    for name in ("compile-cl", "budget-cl"):
        model = dense_ext.DenseNet(8, (2,), 16, num_classes=5, small_inputs=True)
        peer = peers.PEERS[name]
        step = sgd_step(peer.build(model, device), torch.float32, device)
        saved[name] = saved_bytes(step.model, lambda step=step, peer=peer: step.loss(peer.images(x), labels))
    assert saved["budget-cl"] < saved["compile-cl"]


class Recording:
    """Replaces torch.cuda's stream, graph and their contexts, and records the order of events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self.events.append(name)

    @contextmanager
    def context(self, name: str) -> Iterator[None]:
        self.events.append(name)
        yield


def test_a_graph_is_recorded_once_after_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recording()
    for name, stand_in in {
        "Stream": lambda device: seen, "CUDAGraph": lambda: seen, "current_stream": lambda: seen,
        "stream": lambda stream: seen.context("eager"), "graph": lambda graph, stream: seen.context("record"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls = itertools.count(1)
    step = GraphedStep(lambda images, labels: next(calls), torch.device("cpu"))
    x = torch.zeros(1)
    assert [step(x, x) for _ in range(6)] == [1, 2, 3, 4, 4, 4]
    ran = [event for event in seen.events if event != "wait_stream"]
    assert ran == ["eager"] * 3 + ["record", "replay", "replay", "replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("peer", ["graph-cl", "dense_ext-none-graph", "dense_ext-block-graph"])
def test_graphed_training_is_the_plain_one(peer: str) -> None:
    device = torch.device("cuda")
    model, labels = small_densenet(10, 12), torch.arange(4, device=device)
    x = peers.PEERS[peer].images(torch.randn(4, 3, 8, 8, device=device))
    plain, recorded = (
        sgd_step(peers.PEERS[peer].build(model, device), torch.float32, device) for _ in range(2)
    )
    graphed = GraphedStep(recorded, device)
    expected = [float(plain(x, labels)) for _ in range(8)]
    assert [float(graphed(x, labels)) for _ in range(8)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("suite", ["memory", "step", "inference", "primitives"])
def test_suites_on_a_gpu(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = suites.memory.MemorySuite.cases
    monkeypatch.setattr(suites.memory.MemorySuite, "cases", lambda *of: cases(*of)[:1])
    model = () if suite == "memory" else ("--model", "tiny")
    chosen = ("--device", "cuda", "--dtype", "float32", "--peers", "eager-cl,graph-cl", "--budget", "0.01")
    rows = run(suite, tmp_path, *model, *chosen)["rows"]
    for row in rows:
        assert row["failure"] == (cannot_run(row, torch.device("cuda")) if suite == "primitives" else None)
        assert suite != "memory" or row["measures"].keys() & {"reserved_bytes", "largest_batch"}


def test_all_peers() -> None:
    every = peers.choose(["all"], ["none"])
    assert [peer.name for peer in every] == list(peers.PEERS)
    assert len({peer.label for peer in every}) == len(every)
    for backend in dense_ext.backends.BACKENDS:
        assert f"dense_ext-block-{backend}-graph" in peers.PEERS
    with pytest.raises(UnavailableError, match="CUDA graphs need a GPU"):
        peers.PEERS["graph"].check(torch.device("cpu"), torch.float32)
