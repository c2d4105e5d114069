"""Every command at a tiny size: its files, output and exit code."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dense_ext
from dense_ext.backends import unavailable_reasons
from dense_ext.cli import main

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("lightning")

from PIL import Image

from dense_ext.benchmark import family
from dense_ext.benchmark.suites import speed
from dense_ext.benchmark.suites.speed import LOSS_TOLERANCE
from dense_ext.training import trainer

from .helpers import run_python, torchrun

pytestmark = pytest.mark.usefixtures("one_thread", "known_rates")

TINY: dict[str, Any] = {
    "growth_rate": 12, "block_config": (4, 4), "num_init_features": 8, "small_inputs": True, "num_classes": 10
}  # fmt: skip
TINY_BENCH = ["--model", "tiny", "--size", "16", "--batch", "2", "--rounds", "2", "--no-depth"]
TINY_TRAIN = ["--model", "tiny", "--size", "8", "--batch", "8"]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a model named "tiny", which is large enough to learn digits."""

    def tiny(**options: Any) -> dense_ext.DenseNet:
        return dense_ext.DenseNet(**{**TINY, **options})

    monkeypatch.setitem(dense_ext.models.MODELS, "tiny", tiny)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of small images, one bright and one dark, in ``train`` and ``val``."""
    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    for part, label, i in itertools.product(("train", "val"), range(2), range(8)):
        pixels = (torch.rand(10, 10, 3) * 100 + 120 * label).to(torch.uint8).numpy()
        path = folder / part / f"class{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# --- the command itself -------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{dense_ext.__version__}\n"


@pytest.mark.parametrize("command", [[], ["info"], ["bench"], ["models"], ["train"], ["report"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert "Usage: dense-ext" in capsys.readouterr().out


# Package that may be missing -> a command that needs it, and the extra that has it.
OPTIONAL = {
    "torchvision": ("models", "bench"), "matplotlib": ("models", "bench"), "lightning": ("train", "train")
}  # fmt: skip
# Arguments: an output folder, then package=command pairs. Each command runs in a fork, without its package,
# of a process that has imported none of them, so that torch is imported once.
WITHOUT_PACKAGES = """
import os, sys
from dense_ext.cli import main
main(["bench", "--help"])
slow = {"torch._dynamo", "torchvision", "matplotlib", "sklearn", "lightning"}
print(sorted(slow & set(sys.modules)), flush=True)
out, *pairs = sys.argv[1:]
for pair in pairs:
    package, command = pair.split("=")
    if not os.fork():
        sys.modules[package] = None
        code = main([command, "--out", out])
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_help_imports_no_optional_package_and_a_missing_one_is_named(tmp_path: Path) -> None:
    pairs = [f"{package}={command}" for package, (command, _) in OPTIONAL.items()]
    arguments = [sys.executable, "-c", WITHOUT_PACKAGES, str(tmp_path / "out"), *pairs]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-4:] == ["[]", *["2"] * len(OPTIONAL)]
    assert done.stderr.splitlines() == [
        f"dense-ext: this command needs {package}: pip install 'dense_ext[{extra}]'"
        for package, (_, extra) in OPTIONAL.items()
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["bench", "--speed"], "No such option: --speed"),
        (["bench", "--batch", "many"], "Invalid value for '--batch'"),
        (["bench", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["bench", "--model", "resnet50"], "model must be one of densenet121, "),
        (["bench", "--model", "densenet_40_12"], "torchvision has no DenseNet without bottleneck layers"),
        (["bench", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16; got 'int8'"),
        (["bench", "--peers", "eager,fast"], "peers must be among eager, "),
        (["bench", "--recompute", "some"], "recompute must be among none, bottleneck, block; got 'some'"),
        (["bench", "--backend", "abacus"], "--backend: backend must be one of "),
        (["bench", "--device", "abacus"], "--device abacus: "),
        (["bench", "--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["bench", "--device", "cuda:99"], "--device cuda:99: torch sees "),
        (["bench", "--out", "/dev/null/run"], "/dev/null is not a folder"),
        (["bench", "--suite", "all"], "--suite must be one of quick, memory, "),
        (["bench", "--suite", "paper", "--model", "densenet121"], "networks of its own and takes no --model"),
        (["bench", "--suite", "step", "--model", "densenet121,resnet50"], "got 'resnet50'"),
        (["bench", "--model", "densenet121,densenet161"], "quick takes one --model and one --dtype"),
        (["bench", "--peers", "dense_ext-none-graph"], "peers must name at least one of eager, "),
        (["bench", "--budget", "0"], "--budget must be positive, got 0.0"),
        (["bench", "--compare", "a.json", "b.json"], "a.json can't be read: No such file"),
        (["models", "--out", "/dev/null/run"], "/dev/null is not a folder"),
        (["models", "--size", "8"], "--size must be at least 32, got 8"),
        (["train", "--out", "/dev/null/run"], "/dev/null is not a folder"),
        (["train", "--data", "nowhere"], "data folder nowhere does not exist"),
        (["train", "--lr", "0"], "--lr must be positive, got 0.0"),
        (["train", "--precision", "int8"], "--precision must be one of 32-true, bf16-mixed, 16-mixed; got "),
        (["train", "--strategy", "fast"], "You selected an invalid strategy name: `strategy='fast'`."),
        (["train", "--devices", "2", "--batch", "1"], "1 images a step are too few for 2 processes"),
        (["train", "--model", "resnet50"], "model must be one of densenet121, "),
        (["train", "--size", "4"], "--size 4 is too small for densenet_bc_40_12"),
        (["train", "--resume"], "nothing to resume"),
        (["train", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_bad_options(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("dense-ext: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- info ---------------------------------------------------------------------------------------------


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["machine"]["threads"] == torch.get_num_threads()
    rows = {(row["device"], row["dtype"]): row for row in found["backends"]}
    expected = unavailable_reasons("cpu", torch.float32)
    assert rows["cpu", "float32"]["backends"] == expected
    assert rows["cpu", "float32"]["auto"].split(",")[0] in expected


def test_info_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dense_ext", "info"], capture_output=True, text=True, check=True
    )
    assert f"│ {torch.__version__.partition('+')[0]}" in done.stdout
    assert "auto takes" in done.stdout


# --- bench --------------------------------------------------------------------------------------------


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = ["--recompute", "none", "--recompute", "bottleneck"]
    arguments = ["bench", *TINY_BENCH, *policies, "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "dense_ext, recompute bottleneck" in printed.out
    assert "GFLOP an image" in printed.out
    assert "quick.json" in printed.err

    results = read(tmp_path / "quick.json")
    assert not results["interrupted"]
    assert results["options"]["batch"] == 2
    torchvisions = ["eager", "eager-cl", "memory-efficient", "memory-efficient-cl"]
    assert list(results["peers"]) == [*torchvisions, "dense_ext-none", "dense_ext-bottleneck"]
    rows = {row["peer"]: row for row in results["rows"]}
    assert len(rows) == len(results["rows"]), "no row for the depth"
    saved = {name: row["measures"]["saved_bytes"] for name, row in rows.items()}
    assert saved["eager"] == saved["eager-cl"] > 4 * saved["dense_ext-bottleneck"]
    for name, row in rows.items():
        assert row["measures"]["peak_bytes"] > 0.5 * saved[name]
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
    losses = {name: row["values"] for name, row in rows.items()}
    assert losses["dense_ext-none"] == pytest.approx(losses["eager"], rel=LOSS_TOLERANCE["float32"])
    assert losses["eager"][1] != losses["eager"][0]
    assert rows["dense_ext-none"]["served_by"]
    assert str(tmp_path) not in (tmp_path / "quick.json").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"quick.json", "quick-memory.png", "quick-throughput.png"}
    assert is_png(tmp_path / "quick-memory.png")

    assert main(arguments) == 2
    assert "quick.json exists; pass --overwrite or another --out" in capsys.readouterr().err


def test_bench_keeps_what_was_measured_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "interleave", interrupt)
    options = ["--peers", "eager-cl", "--recompute", "none"]
    arguments = ["bench", *TINY_BENCH, *options, "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 130
    printed = capsys.readouterr()
    assert "interrupted: these are the results until then" in printed.err
    results = json.loads(printed.out)
    assert results == read(tmp_path / "quick.json")
    assert results["interrupted"]
    assert [row["peer"] for row in results["rows"] if row["measures"]] == ["eager-cl", "dense_ext-none"]
    assert not any(row["seconds"] for row in results["rows"])
    assert (tmp_path / "quick-memory.png").exists()


def test_bench_reports_no_speed_of_wrong_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LOSS_TOLERANCE, "float32", -1.0)
    out = tmp_path / "out"
    assert main(["bench", *TINY_BENCH, "--peers", "eager", "--recompute", "none", "--out", str(out)]) == 1
    printed = capsys.readouterr().err
    assert "dense_ext's results are not the eager network's: see the rows without speed" in printed
    eager, ours = read(out / "quick.json")["rows"]
    assert ours["failure"].startswith("disagrees: ")
    assert ours["seconds"] == []
    assert len(eager["seconds"]) == 2
    assert eager["measures"]["saved_bytes"] > ours["measures"]["saved_bytes"] > 0


# --- models -------------------------------------------------------------------------------------------


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    some = {name: dense_ext.models.MODELS[name] for name in ("densenet_bc_100_12", "densenet_40_12")}
    monkeypatch.setattr(family, "MODELS", some)
    monkeypatch.setattr(family, "RESNETS", ("resnet18",))
    assert main(["models", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "densenet_bc_100_12" in printed
    assert "ImageNet top-1 accuracy in % (torchvision's weights IMAGENET1K_V1)" in printed
    rows = read(tmp_path / "models.json")["rows"]
    sizes = {row["case"]["model"]: row["case"]["size"] for row in rows}
    assert sizes == {**dict.fromkeys(some, 32), "resnet18": 224}
    measures = {(row["case"]["model"], row["peer"]): row["measures"] for row in rows}
    eager = {name: measures[name, "eager-cl"] for name in sizes}
    assert eager["densenet_bc_100_12"]["parameters"] == 769_162  # arXiv 1608.06993, table 2: 0.8 M
    assert eager["densenet_40_12"]["parameters"] == 1_019_722  # 1.0 M
    counted = {peer for name, peer in measures if "saved_bytes_per_image" in measures[name, peer]
               and name == "densenet_40_12"}  # fmt: skip
    assert counted == {"eager-cl", "dense_ext-none", "dense_ext-bottleneck", "dense_ext-block"}
    (failed,) = (row for row in rows if row["failure"])
    assert failed["failure"] == "torchvision has no DenseNet without bottleneck layers"
    assert eager["resnet18"]["forward_flops_per_image"] == pytest.approx(2 * 1.814e9, rel=1e-3)
    saved = measures["densenet_bc_100_12", "dense_ext-bottleneck"]["saved_bytes_per_image"]
    assert eager["densenet_bc_100_12"]["saved_bytes_per_image"] > 8 * saved
    assert {name: row.get("imagenet_top1_percent") for name, row in eager.items()} == {
        **dict.fromkeys(some), "resnet18": 69.758
    }  # fmt: skip
    assert is_png(tmp_path / "models.png")
    assert is_png(tmp_path / "accuracy.png")


# --- train --------------------------------------------------------------------------------------------


def without_seconds(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What each network reached in each epoch, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        epochs = found.setdefault(row["peer"], [])
        epochs.append(row["measures"])
        assert row["case"]["epoch"] == len(epochs)
    return found


@pytest.mark.parametrize("stop", [3, 9])  # in the second epoch of the first network, and of the second
def test_resumed_training_is_the_uninterrupted_one(
    stop: int,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["train", "--data", str(pictures), *TINY_TRAIN, "--epochs", "3", "--peer"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*arguments, "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dense_ext: test accuracy ")
    assert "torchvision, eager: test accuracy " in printed

    step, calls = trainer.Classifier.training_step, itertools.count()

    def interrupted_step(self: trainer.Classifier, *batch: Any) -> Any:
        if next(calls) == stop:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Classifier, "training_step", interrupted_step)
        assert main([*arguments, "--out", str(parts)]) == 130
    assert read(parts / "train.json")["interrupted"]
    assert not (parts / "weights.pt").exists()
    torch.manual_seed(99)
    assert main([*arguments, "--out", str(parts), "--resume"]) == 0

    first, second = read(whole / "train.json"), read(parts / "train.json")
    assert without_seconds(first) == without_seconds(second)
    assert [len(history) for history in without_seconds(first).values()] == [3, 3]
    for name in ("checkpoint.ckpt", "peer.ckpt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (whole, parts))
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    assert is_png(parts / "curves.png")
    logged = [list(csv.DictReader(path.open())) for path in sorted(whole.glob("logs/*/*/metrics.csv"))]
    assert [[row["epoch"] for row in rows if row["test_loss"]] for rows in logged] == [["0", "1", "2"]] * 2


def test_several_processes_train_one_network(pictures: Path, tmp_path: Path) -> None:
    """Lightning's processes and torchrun's."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, pathlib, sys, torch.distributed as dist\n"
        "from dense_ext.training import trainer\n"
        "from dense_ext.cli import main\n"
        "def tell(self):\n"
        "    weights = [p.detach().double().sum().item() for p in self.parameters()]\n"
        "    text = json.dumps([weights, sorted(self.trainer.train_dataloader.sampler)])\n"
        "    pathlib.Path(__file__).with_name(f'process{dist.get_rank()}').write_text(text)\n"
        "trainer.Classifier.on_train_end = tell\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["train", "--data", pictures, "--model", "densenet_bc_40_12", "--size", "8", "--batch", "8",
                 "--epochs", "2", "--out"]  # fmt: skip
    printed = torchrun(program, *arguments, tmp_path / "torchrun")
    assert printed.count("dense_ext: test accuracy") == 1
    (weights, share), (other_weights, other_share) = (
        json.loads(p.read_text()) for p in tmp_path.glob("process*")
    )
    assert weights == other_weights
    assert sorted(share + other_share) == list(range(16))
    started = run_python("-m", "dense_ext", *arguments, tmp_path / "devices", "--devices", "2")
    assert started.count("dense_ext: test accuracy") == 1
    results = [read(tmp_path / name / "train.json") for name in ("torchrun", "devices")]
    assert without_seconds(results[0]) == without_seconds(results[1])
    assert [result["options"]["devices"] for result in results] == [2, 2]
    checkpoint = torch.load(tmp_path / "torchrun" / "checkpoint.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 * 16 // 8


def test_peers_start_from_the_same_weights_and_images(pictures: Path, tmp_path: Path) -> None:
    arguments = ["train", "--data", str(pictures), *TINY_TRAIN, "--epochs", "1", "--peer"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    ours, eager = without_seconds(read(tmp_path / "train.json")).values()
    # After two steps they differ only by rounding.
    assert ours[0]["training_loss"] == pytest.approx(eager[0]["training_loss"], rel=1e-3)


def test_a_training_is_never_lost(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--data", str(pictures), *TINY_TRAIN, "--epochs", "1"]
    out = ["--out", str(tmp_path)]
    assert main([*arguments, *out]) == 0
    before = (tmp_path / "checkpoint.ckpt").read_bytes()
    assert main([*arguments, *out]) == 2
    assert "train.json exists; pass --resume, --overwrite or another --out" in capsys.readouterr().err
    assert main([*arguments, *out, "--resume", "--lr", "0.5"]) == 2
    assert "was trained with learning_rate 0.05, not 0.5" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.ckpt").read_bytes() == before
    assert main([*arguments, *out, "--overwrite", "--precision", "bf16-mixed"]) == 0
    assert read(tmp_path / "train.json")["options"]["precision"] == "bf16-mixed"


def test_a_checkpoint_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "checkpoint.ckpt", tmp_path / "other.pt"
    torch.save({"weights": torch.ones(1)}, other)
    for content in (b"", b"junk", other.read_bytes()[:100], other.read_bytes()):
        path.write_bytes(content)
        assert main(["train", *TINY_TRAIN, "--resume", "--out", str(tmp_path)]) == 2
        assert "checkpoint.ckpt is no checkpoint" in capsys.readouterr().err
        assert path.read_bytes() == content
    assert {p.name for p in tmp_path.iterdir()} == {path.name, other.name}


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *TINY_TRAIN, "--batch", "32", "--epochs", "3", "--recompute", "none"]
    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    history = without_seconds(json.loads(capsys.readouterr().out))["dense_ext"]
    assert history[2]["test_accuracy"] > 0.8
    assert history[2]["training_loss"] < history[0]["training_loss"]
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    dense_ext.DenseNet(**TINY).load_state_dict(weights)
