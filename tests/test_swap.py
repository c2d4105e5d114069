"""A swap: what it keeps, what it refuses and why, and undoing it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import densenet121
from torchvision.models.densenet import DenseNet, _DenseBlock, _Transition

import dense_ext
from dense_ext.backends import select, unavailable_reasons

from .helpers import assert_equal, assert_same_state, assert_trains_alike, small_densenet, twin


def images() -> Tensor:
    return torch.randn(2, 3, 40, 40, dtype=torch.float64)


def test_keeps_everything_the_user_holds() -> None:
    model = small_densenet()
    model.features.denseblock2.eval()
    model.features.denseblock1.denselayer1.conv1.weight.requires_grad_(False)
    before = {
        "keys": list(model.state_dict()),
        "parameters": [id(p) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "modules": [id(m) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "repr_of_children": [repr(m) for m in model.modules() if not list(m.children())],
    }
    assert dense_ext.swap(model) is model
    assert list(model.state_dict()) == before["keys"]
    assert [id(p) for p in model.parameters()] == before["parameters"]
    assert [id(b) for b in model.buffers()] == before["buffers"]
    assert [id(m) for m in model.modules()] == before["modules"]
    assert [m.training for m in model.modules()] == before["training"]
    assert [p.requires_grad for p in model.parameters()] == before["requires_grad"]
    assert isinstance(model.features.denseblock1, _DenseBlock)
    assert isinstance(model.features.transition1, _Transition)


def test_restore_undoes_it_exactly() -> None:
    model = small_densenet()
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    dense_ext.swap(model)
    assert [type(m) for m in model.modules()] != classes
    assert dense_ext.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(m.__dict__) for m in model.modules()] == attributes


def test_restore_after_training_keeps_the_weights(backend: str) -> None:
    ours, eager = twin(small_densenet(), dense_ext.swap)
    assert_trains_alike(ours, eager, images(), steps=2)
    dense_ext.restore(ours)
    assert_same_state(ours, eager)
    assert_trains_alike(ours, eager, images(), steps=1)


def test_swapping_again_changes_the_options() -> None:
    model = dense_ext.swap(small_densenet(), recompute="none", backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_ext.swap(model, recompute="block")
    blocks = [row for row in dense_ext.report(model).rows if row.kind == "dense block"]
    assert {row.recompute for row in blocks} == {"block"}
    assert model.features.backend == "auto"


def test_report_after_the_swap_gives_the_reason_against_the_stem() -> None:
    model = small_densenet()
    model.features.pool0 = nn.MaxPool2d(3, 1, 1)
    with pytest.warns(UserWarning, match="features: pool0 has stride 1, expected 2"):
        dense_ext.swap(model)
    reasons = {row.name: row.detail for row in dense_ext.report(model).rows}
    assert reasons["features"] == "pool0 has stride 1, expected 2"


def test_memory_efficient_models_can_be_swapped(backend: str) -> None:
    eager = small_densenet()
    ours = DenseNet(5, (2, 3, 1, 2), 8, 3, 0.0, num_classes=4, memory_efficient=True).double()
    ours.load_state_dict(eager.state_dict())
    assert_trains_alike(dense_ext.swap(ours), eager, images())


def test_model_that_contains_a_densenet(backend: str) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = small_densenet(), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))  # type: ignore[no-any-return]

    ours, eager = twin(Detector(), dense_ext.swap)
    assert {r.name for r in dense_ext.report(ours).rows} >= {
        "backbone.features",
        "backbone.features.denseblock1",
    }
    assert_trains_alike(ours, eager, images())


class TestCopies:
    """Copies of a swapped model are independent and compute the same."""

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copy(self, backend: str, how: str) -> None:
        model = dense_ext.swap(small_densenet(), recompute="none")
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
        assert_trains_alike(other, dense_ext.restore(model), images())

    def test_state_dict_goes_both_ways(self, backend: str) -> None:
        ours, eager = dense_ext.swap(small_densenet()), small_densenet()
        eager.load_state_dict(ours.state_dict())
        x = images()
        assert_equal(ours(x), eager(x), "output")

    def test_moving_to_another_dtype(self, backend: str) -> None:
        ours, eager = twin(small_densenet(), dense_ext.swap)
        ours.float()
        ours.double()
        eager.float()
        eager.double()
        assert_trains_alike(ours, eager, images(), steps=1)

    def test_data_parallel_replicas(self, backend: str) -> None:
        model = dense_ext.swap(small_densenet()).eval()
        replica = model._replicate_for_data_parallel()
        for name, child in model.features.named_children():
            assert type(child._replicate_for_data_parallel()) is type(child), name
        assert type(replica) is type(model)


def _group_norm(model: nn.Module) -> None:
    model.features.denseblock2.denselayer1.norm1 = nn.GroupNorm(1, 9).double()


def _dilated(model: nn.Module) -> None:
    model.features.denseblock2.denselayer1.conv2 = nn.Conv2d(
        15, 5, 3, padding=2, dilation=2, bias=False
    ).double()


def _activation(model: nn.Module) -> None:
    model.features.denseblock2.denselayer1.relu1 = nn.SiLU()


def _sync_norm(model: nn.Module) -> None:
    block = model.features.denseblock2
    block.denselayer1 = nn.SyncBatchNorm.convert_sync_batchnorm(block.denselayer1)


def _hook(model: nn.Module) -> None:
    model.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda *_: None)


def _subclass(model: nn.Module) -> None:
    class Mine(_DenseBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model.features.denseblock2.__class__ = Mine


def _narrower(model: nn.Module) -> None:
    layer = model.features.denseblock2.denselayer2
    layer.norm1, layer.conv1 = nn.BatchNorm2d(15).double(), nn.Conv2d(15, 15, 1, bias=False).double()


def _drop_rates(model: nn.Module) -> None:
    model.features.denseblock2.denselayer1.drop_rate = 0.5


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (_group_norm, "denselayer1: norm1 is GroupNorm, not BatchNorm2d"),
            (_dilated, r"denselayer1: conv2 has padding \(2, 2\), expected \(1, 1\)"),
            (_activation, "denselayer1: relu1 is SiLU, not ReLU"),
            (_sync_norm, "its norms take statistics over different processes"),
            (_hook, "denselayer1: norm1 carries a hook"),
            (_subclass, "Mine is a subclass with its own forward"),
            (_narrower, "denselayer2: norm1 has 15 channels, expected 14"),
            (_drop_rates, "its layers have different drop rates"),
        ],
        ids=lambda value: getattr(value, "__name__", "reason"),
    )
    def test_block_stays_as_it_is_with_a_reason(
        self, change: Callable[[nn.Module], None], reason: str
    ) -> None:
        model = small_densenet()
        change(model)
        original = type(model.features.denseblock2)
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=r"strict=True.*features\.denseblock2: .*" + reason):
            dense_ext.swap(model, strict=True)
        assert [type(m) for m in model.modules()] == classes
        with pytest.warns(UserWarning, match=r"features\.denseblock2: .*" + reason) as caught:
            dense_ext.swap(model)
        assert len(caught) == 1
        assert type(model.features.denseblock2) is original
        rows = {row.name: row for row in dense_ext.report(model).rows}
        assert rows["features.denseblock2"].runs == "eager"
        assert rows["features.denseblock1"].runs == "fused"
        assert str(rows["features.denseblock2"].detail) in str(dense_ext.report(model))

    def test_stem_and_transition(self) -> None:
        model = small_densenet()
        model.features.pool0 = nn.MaxPool2d(2)
        model.features.transition1.pool = nn.AvgPool2d(3)
        with pytest.warns(
            UserWarning,
            match=r"features: pool0 has kernel_size 2, .*; features\.transition1: pool has kernel_size 3",
        ):
            dense_ext.swap(model)
        runs = {row.name: row.runs for row in dense_ext.report(model).rows}
        assert runs["features"] == runs["features.transition1"] == "eager"

    def test_children_called_one_by_one(self) -> None:
        """Encoders built on DenseNet call its children one by one and need relu0's output."""

        class Encoder(DenseNet):
            def forward(self, x: Tensor) -> list[Tensor]:
                features = self.features
                half = features.relu0(features.norm0(features.conv0(x)))
                return [half, features.denseblock1(features.pool0(half))]

        torch.manual_seed(0)
        ours, eager = twin(Encoder(5, (2, 3), 8, 3).double(), dense_ext.swap)
        x = images()
        for a, b in zip(ours(x), eager(x), strict=True):
            assert_equal(a, b, "feature")

    def test_not_a_module(self) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            dense_ext.swap("densenet121")

    def test_no_dense_block(self) -> None:
        with pytest.raises(ValueError, match="Linear contains no dense block"):
            dense_ext.swap(nn.Linear(2, 2))

    def test_unknown_options(self) -> None:
        model = small_densenet()
        with pytest.raises(ValueError, match=r"recompute must be one of .*got 'everything'"):
            dense_ext.swap(model, recompute="everything")
        with pytest.raises(ValueError, match=r"backend must be one of .*got 'metal'"):
            dense_ext.swap(model, backend="metal")
        assert type(model.features.denseblock1) is _DenseBlock


class TestBackendChoice:
    def test_context_and_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = dense_ext.swap(small_densenet())

        def served() -> set[str]:
            return {row.detail for row in dense_ext.report(model).rows}

        with dense_ext.use_backend("reference"):
            assert served() == {"reference"}
        monkeypatch.setenv("DENSE_EXT_BACKEND", "reference")
        assert served() == {"reference"}
        monkeypatch.setenv("DENSE_EXT_BACKEND", "nonsense")
        with pytest.raises(ValueError, match="got 'nonsense'"):
            model(images())

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match="backend must be one of"), dense_ext.use_backend("metal"):
            pass

    def test_named_backend_that_cannot_run_says_why(self) -> None:
        """A backend requested by name fails on a device without kernels, for which meta is an example."""
        x = torch.empty(2, 3, 4, 4, device="meta")
        with pytest.raises(RuntimeError, match=r"no backend runs channel_stats .* on meta .*cpu:"):
            select("cpu", x.device.type, x.dtype)
        reasons = unavailable_reasons(x.device)
        assert "meta" in str(reasons["cpu"])
        assert reasons["reference"] is None

    def test_reference_runs_every_dtype(self) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert "reference" in dense_ext.available_backends("cpu", dtype)
            assert "reference" in dense_ext.available_backends(dtype=dtype)


def test_report_before_the_swap() -> None:
    report = dense_ext.report(densenet121())
    assert len(report.rows) == 8
    assert {row.runs for row in report.rows} == {"eager"}
    assert {row.detail for row in report.rows} == {"not swapped"}
    assert "features.denseblock4" in str(report)


class Scripted(nn.Module):
    """A network with a module of TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_DenseBlock(2, 6, 2, 4, 0.0), nn.BatchNorm2d(14))
        self.last = torch.jit.script(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x)).mean((2, 3))


def test_a_network_with_a_module_of_torchscript() -> None:
    ours, eager = twin(Scripted().double(), lambda m: dense_ext.swap(m, strict=True))
    assert_trains_alike(ours, eager, torch.randn(2, 6, 5, 4, dtype=torch.float64), steps=1)
    assert ours.last.training
