"""The swapped DenseNets of all libraries: results, state, refusals, and the libraries' own tools."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch
import timm
import torch
from monai.data import MetaTensor
from monai.networks.nets import DenseNet as MonaiDenseNet
from timm.models.densenet import DenseNet as TimmDenseNet
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet
from torchxrayvision.models import DenseNet as XrayDenseNet

import dense_ext
from dense_ext.benchmark.memory import saved_bytes
from dense_ext.memory import estimate

from .helpers import assert_equal, assert_same_state, assert_trains_alike, randomize, twin

BLOCKS = (2, 3, 1, 2)
SHAPE = (2, 3, 40, 40)


def timm_net(growth_rate: int = 5, **options: Any) -> nn.Module:
    return TimmDenseNet(growth_rate, BLOCKS, num_classes=4, bn_size=3, **options)


def timm_deep_stem() -> nn.Module:
    return timm_net(growth_rate=8, stem_type="deep")


def monai_net(spatial_dims: int = 2, **options: Any) -> nn.Module:
    return MonaiDenseNet(
        spatial_dims, 3, 4, init_features=10, growth_rate=5, block_config=BLOCKS, bn_size=3, **options
    )


def xray_net(drop_rate: float = 0.0) -> nn.Module:
    return XrayDenseNet(5, BLOCKS, 10, 3, drop_rate, num_classes=4, in_channels=3)


def torchvision_net() -> nn.Module:
    return TorchvisionDenseNet(5, BLOCKS, 10, 3, num_classes=4)


NETWORKS = [timm_net, timm_deep_stem, monai_net, xray_net]
libraries = pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
# Where the stem has no part in what is tested.
other_libraries = pytest.mark.parametrize(
    "build", [timm_net, monai_net, xray_net], ids=lambda build: build.__name__
)


def images() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64)


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize(build()).double()


@libraries
def test_trains_like_the_original(build: Callable[[], nn.Module], recompute: str) -> None:
    ours, eager = twin(built(build), lambda m: dense_ext.swap(m, recompute=recompute, strict=True))
    assert {row.runs for row in dense_ext.report(ours).rows} == {"fused"}
    assert len(dense_ext.report(ours).rows) == 8
    assert_trains_alike(ours, eager, images())
    for model in (ours, eager):
        model.eval()
    x = images()
    assert_equal(ours(x), eager(x), "output in eval mode")


@libraries
def test_keeps_and_restores_the_users_objects(build: Callable[[], nn.Module]) -> None:
    ours, eager = twin(built(build), lambda m: None)
    held = [id(t) for t in (*ours.parameters(), *ours.buffers(), *ours.modules())]
    dense_ext.swap(ours)
    assert [id(t) for t in (*ours.parameters(), *ours.buffers(), *ours.modules())] == held
    assert list(ours.state_dict()) == list(eager.state_dict())
    for (name, module), original in zip(ours.named_modules(), eager.modules(), strict=True):
        assert isinstance(module, type(original)), name
    dense_ext.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in eager.modules()]
    assert [sorted(m.__dict__) for m in ours.modules()] == [sorted(m.__dict__) for m in eager.modules()]
    assert_trains_alike(ours, eager, images(), steps=1)


@libraries
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"]
)
def test_copies_are_swapped_too(
    build: Callable[[], nn.Module], how: Callable[[nn.Module], nn.Module]
) -> None:
    model = dense_ext.swap(built(build))
    other = how(model)
    assert {row.runs for row in dense_ext.report(other).rows} == {"fused"}
    x = images()
    assert_equal(other(x), model(x), "output")
    assert_same_state(other, model)


def _other_activation(block: Any) -> str:
    layer = block.denselayer1
    inner = getattr(layer, "layers", layer)._modules
    if "relu1" in inner:
        inner["relu1"] = nn.SiLU()
        return "relu1 is SiLU, not ReLU"
    inner["norm1"].act = nn.SiLU()
    return r"norm1 has drop \(Identity\), act \(SiLU\), expected drop \(Identity\), act \(ReLU\)"


def _one_more_module(block: Any) -> str:
    layer = block.denselayer1
    getattr(layer, "layers", layer).add_module("more", nn.Sequential(nn.Tanh()))
    return "its children are norm1, .*, more, expected norm1, "


def _other_layer(block: Any) -> str:
    original = type(block.denselayer1)

    class Scaled(original):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    block.denselayer1.__class__ = Scaled
    return f"denselayer1 is Scaled, not {original.__name__}"


def _hook(block: Any) -> str:
    block.denselayer1.register_forward_hook(lambda module, args, y: y * 2)
    return "denselayer1 carries a hook"


def _patched_forward(block: Any) -> str:
    layer = block.denselayer2
    conv = getattr(layer, "layers", layer).conv2
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)
    return "denselayer2: conv2 carries a forward of its own"


def _dilation(block: Any) -> str:
    layer = block.denselayer1
    getattr(layer, "layers", layer).conv2.padding = getattr(layer, "layers", layer).conv2.dilation = (2, 2)
    return r"conv2 has padding \(2, 2\), expected \(1, 1\)"


def _less(block: Any) -> str:
    layer = block.denselayer1
    inner = getattr(layer, "layers", layer)
    if "relu2" in inner._modules:
        inner.relu2 = nn.Identity()
        return "relu2 is Identity, not ReLU"
    inner.norm2.act = nn.Identity()
    return r"norm2 has drop \(Identity\), act \(Identity\), expected"


CHANGES = [_other_activation, _one_more_module, _other_layer, _hook, _patched_forward, _dilation, _less]


@other_libraries
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_swap_take_effect(
    build: Callable[[], nn.Module], change: Callable[[Any], str]
) -> None:
    ours, eager = twin(built(build), dense_ext.swap)
    reason = change(ours.features.denseblock2)
    change(eager.features.denseblock2)
    assert re.search(reason, ours.features.denseblock2.unfusable())
    with pytest.warns(
        UserWarning, match=rf"features\.denseblock2 runs its original forward: .*{reason}"
    ) as caught:
        assert_trains_alike(ours, eager, images(), steps=1)
    assert len(caught) == 1


@pytest.mark.each_value  # the test above has each library's reasons
@other_libraries
@pytest.mark.parametrize("change", CHANGES)
def test_parts_changed_before_the_swap_are_not_swapped(
    build: Callable[[], nn.Module], change: Callable[[Any], str]
) -> None:
    model = built(build)
    reason = change(model.features.denseblock2)
    with pytest.raises(ValueError, match=rf"features\.denseblock2: .*{reason}"):
        dense_ext.swap(model, strict=True)
    with pytest.warns(UserWarning, match=rf"features\.denseblock2: .*{reason}"):
        dense_ext.swap(model)
    rows = {row.name: row.runs for row in dense_ext.report(model).rows}
    assert rows.pop("features.denseblock2") == "eager"
    assert set(rows.values()) == {"fused"}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: timm_net(act_layer="silu"),
            r"denselayer1: norm1 has drop \(Identity\), act \(SiLU\), expected",
        ),
        (lambda: timm_net(norm_layer="groupnorm1"), "denselayer1: norm1 is .*, not BatchNormAct2d"),
        (
            lambda: timm_net(aa_layer=timm.layers.BlurPool2d, aa_stem_only=False),
            r"transition1.*: pool is BlurPool2d, not AvgPool2d",
        ),
        (lambda: monai_net(norm="instance"), "denselayer1: norm1 is InstanceNorm2d, not BatchNorm2d"),
        (lambda: monai_net(act="prelu"), "denselayer1: relu1 is PReLU, not ReLU"),
    ],
)
def test_variants_without_a_kernel_give_a_reason(build: Callable[[], nn.Module], reason: str) -> None:
    model = build()
    with pytest.warns(UserWarning, match=reason):
        dense_ext.swap(model)
    rows = dense_ext.report(model).rows
    assert [row.runs for row in rows if row.name == "features.denseblock1"] in (["eager"], ["fused"])
    assert all(row.detail != "not swapped" for row in rows)


@libraries
def test_a_transition_without_its_pool_keeps_the_resolution(build: Callable[[], nn.Module]) -> None:
    ours, eager = twin(built(build), dense_ext.swap)
    for model in (ours, eager):
        del model.features.transition1.pool
    assert "expected norm, " in ours.features.transition1.unfusable()
    with pytest.warns(UserWarning, match=r"features\.transition1 runs its original forward"):
        assert_trains_alike(ours, eager, images(), steps=1)


@libraries
def test_slices_of_the_features(build: Callable[[], nn.Module]) -> None:
    ours, eager = twin(built(build), lambda m: dense_ext.swap(m, backend="reference"))
    for part in (slice(5), slice(2, 5), slice(6, None)):
        ours_part, eager_part = ours.features[part], eager.features[part]
        assert ours_part.backend == "reference"
        x = torch.randn(2, next(eager_part.parameters()).shape[part.start == 0 or part.start is None], 24, 24)
        assert_equal(ours_part.eval()(x.double()), eager_part.eval()(x.double()), str(part))
        dense_ext.restore(ours_part)
        assert [type(m) for m in ours_part.modules()] == [type(m) for m in eager_part.modules()]


class TestTimm:
    def test_intermediates(self) -> None:
        """They include the stem's activation before its pool, which the fused stem does not compute."""
        ours, eager = twin(built(timm_net), dense_ext.swap)
        x = images()
        outputs, intermediates = ours.forward_intermediates(x)
        expected_outputs, expected = eager.forward_intermediates(x)
        assert_equal(outputs, expected_outputs, "output")
        for i, (a, b) in enumerate(zip(intermediates, expected, strict=True)):
            assert_equal(a, b, f"intermediate {i}")

    def test_feature_pyramid(self) -> None:
        torch.manual_seed(0)
        model = timm.create_model("densenet121", features_only=True)
        ours, eager = twin(randomize(model).double(), dense_ext.swap)
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        for i, (a, b) in enumerate(zip(ours(x), eager(x), strict=True)):
            assert_equal(a, b, f"feature {i}")

    def test_checkpointed_layers(self) -> None:
        ours, eager = twin(built(timm_net), dense_ext.swap)
        ours.set_grad_checkpointing()
        assert {row.runs for row in dense_ext.report(ours).rows} == {"fused"}
        assert_trains_alike(ours, eager, images(), steps=1)

    def test_dropout_in_layers(self) -> None:
        model = dense_ext.swap(built(lambda: timm_net(proj_drop_rate=0.5)))
        x = images()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


class TestMonai:
    def test_tensors_with_metadata(self) -> None:
        ours, eager = twin(built(monai_net), dense_ext.swap)
        x = MetaTensor(images())
        y = ours(x)
        assert isinstance(y, MetaTensor)
        assert_equal(y.as_tensor(), eager(x).as_tensor(), "output")
        y.sum().backward()
        assert all(p.grad is not None for p in ours.parameters())

    @pytest.mark.parametrize("frozen", ["denseblock1", "denseblock2"])
    def test_metadata_passes_no_statistics_on(self, frozen: str) -> None:
        """Results of operations on a MetaTensor carry all of its attributes."""
        ours, eager = twin(built(monai_net), dense_ext.swap)
        x = MetaTensor(images())
        for model in (ours, eager):
            getattr(model.features, frozen).eval()
        assert_equal(ours(x).as_tensor(), eager(x).as_tensor(), "output")

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_dropout_and_signals_are_recognised(self, dims: int) -> None:
        """Signals lose elements, others channels. A rate of almost 0 drops nothing, so that eager agrees."""

        def network(rate: float) -> nn.Module:
            torch.manual_seed(0)
            model = MonaiDenseNet(
                dims, 3, 4, init_features=10, growth_rate=5, block_config=(2, 3, 2), dropout_prob=rate
            )
            return randomize(model).double()

        x = torch.randn(2, 3, *{1: (64,), 2: (32, 40), 3: (16, 24, 16)}[dims], dtype=torch.float64)
        ours, eager = twin(network(1e-13), lambda m: dense_ext.swap(m, strict=True))
        assert {row.runs for row in dense_ext.report(ours).rows} == {"fused"}
        assert_trains_alike(ours, eager, x)
        swapped = [dense_ext.swap(network(rate), strict=True) for rate in (0.0, 0.4)]
        kept = [
            saved_bytes(model, lambda model=model: model(x).sum())  # type: ignore[misc]
            for model in swapped
        ]
        seeds = 2 * 8 * sum((2, 3, 2))  # of 64 bits, for both convolutions of each layer
        assert kept[1] == kept[0] + seeds
        block: Any = swapped[1].features.denseblock1
        added = block(torch.randn(30, 10, *[6] * dims, dtype=torch.float64))[:, 10:]
        dropped = (added == 0).flatten(2)
        assert 0.3 < dropped.double().mean() < 0.5
        assert torch.equal(dropped.all(2), dropped.any(2)) == (dims > 1)

    def test_layers_in_a_container_of_their_own_class(self) -> None:
        class Halved(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) / 2

        model = built(monai_net)
        model.features.denseblock1.denselayer1.layers.__class__ = Halved
        with pytest.raises(ValueError, match="denselayer1: its children are none, expected norm1, "):
            dense_ext.swap(model, strict=True)


class TestXray:
    def test_resizing_and_sigmoid(self) -> None:
        """The pretrained networks resize images and apply a sigmoid."""
        model = built(xray_net)
        model.input_resolution = 48
        ours, eager = twin(model, dense_ext.swap)
        x = 1024 * (2 * torch.rand(SHAPE, dtype=torch.float64) - 1)
        for m in (ours, eager):
            m.apply_sigmoid = True
        assert_equal(ours(x), eager(x), "probabilities")
        assert_equal(ours.features2(x), eager.features2(x), "features")

    def test_dropout_in_layers(self) -> None:
        model = dense_ext.swap(built(lambda: xray_net(drop_rate=0.5)))
        assert {row.runs for row in dense_ext.report(model).rows} == {"fused"}
        x = images()
        assert not torch.equal(model(x), model(x))

    def test_torchvision_network_in_data_parallel(self) -> None:
        """The library's CheXpert baseline wraps its network like this."""

        class Baseline(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = nn.DataParallel(torchvision_net())

            def forward(self, x: Tensor) -> Tensor:
                return self.model(x)

        ours, eager = twin(built(Baseline), dense_ext.swap)
        assert {row.runs for row in dense_ext.report(ours).rows} == {"fused"}
        assert_trains_alike(ours, eager, images(), steps=1)


def small_unet(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A U-Net around torchvision's DenseNet, which calls the stem's and the transitions' children by name."""
    small = {"out_channels": [3, 8, 16, 16, 16, 16], "num_init_features": 8, "growth_rate": 4}
    encoder = segmentation_models_pytorch.encoders.encoders["densenet121"]
    monkeypatch.setitem(encoder, "params", {**small, "block_config": (2, 2, 2, 2)})
    torch.manual_seed(0)
    model = segmentation_models_pytorch.Unet(
        "densenet121", encoder_weights=None, decoder_channels=(16, 16, 8, 8, 4)
    )
    return randomize(model).double()


def test_segmentation_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, eager = twin(small_unet(monkeypatch), lambda m: dense_ext.swap(m, strict=True))
    runs = [(row.kind, row.runs) for row in dense_ext.report(ours).rows]
    kinds = {"dense block": 4, "transition": 3, "stem": 1}
    assert sorted(runs) == sorted((kind, "fused") for kind, count in kinds.items() for _ in range(count))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_trains_alike(ours, eager, x, steps=1)
    kept = {"eager": saved_bytes(eager, lambda: eager(x).sum())}
    for recompute in ("bottleneck", "block"):
        dense_ext.swap(ours, recompute=recompute)
        kept[recompute] = saved_bytes(ours, lambda: ours(x).sum())
    assert kept["block"] < kept["bottleneck"] < kept["eager"]


def test_segmentation_encoder_of_known_classes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tracing, stems and transitions that are called child by child stay as they are."""
    reason = r"DenseNetEncoder\.forward calls its modules one by one"
    with pytest.warns(UserWarning, match=rf"transition1.*: {reason}"):
        ours, eager = twin(small_unet(monkeypatch), lambda m: dense_ext.swap(m, recognise=False))
    with pytest.raises(ValueError, match=reason):
        dense_ext.swap(ours, strict=True, recognise=False)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_trains_alike(ours, eager, x, steps=1)
    kept = {}
    for recompute in ("bottleneck", "block"):
        with pytest.warns(UserWarning, match=reason):
            dense_ext.swap(ours, recompute=recompute, recognise=False)
        kept[recompute] = saved_bytes(ours, lambda: ours(x).sum())
    assert kept["block"] <= kept["bottleneck"], "transitions called child by child keep the blocks' outputs"


def test_planner_takes_a_segmentation_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_unet(monkeypatch)
    shape = (2, 3, 64, 64)
    budget = 2 * estimate(model, shape, recompute="none").peak
    dense_ext.swap(model, recompute="auto", input_shape=shape, memory=budget)
    assert {row.runs for row in dense_ext.report(model).rows} == {"fused"}


@other_libraries
def test_keeps_as_little_as_in_torchvision(build: Callable[[], nn.Module], recompute: str) -> None:
    kept = []
    for make in (torchvision_net, build):
        model = dense_ext.swap(make(), recompute=recompute)
        kept.append(saved_bytes(model, lambda model=model: model(torch.randn(SHAPE)).sum()))  # type: ignore[misc]
    assert kept[0] == kept[1]


@other_libraries
def test_planner_knows_every_library(build: Callable[[], nn.Module]) -> None:
    shape = (4, 3, 64, 64)
    expected = estimate(torchvision_net(), shape, recompute="bottleneck").peak
    assert estimate(build(), shape, recompute="bottleneck").peak == expected
    model = build()
    budget = 2 * estimate(model, shape, recompute="none").peak
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_ext.swap(model, recompute="auto", input_shape=shape, memory=budget)
    blocks = [row for row in dense_ext.report(model).rows if row.kind == "dense block"]
    assert {row.recompute for row in blocks} == {"none"}


def test_planner_refuses_a_stem_it_does_not_follow() -> None:
    with pytest.raises(ValueError, match="does not follow a stem of several convolutions"):
        estimate(timm_deep_stem(), (4, 3, 64, 64))
