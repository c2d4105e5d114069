"""In float64 a swapped model equals its eager original in all its state, step after step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.densenet import DenseNet

import dense_ext
from dense_ext.batch_norm import update_running_stats
from dense_ext.modules import FusedDenseBlock

from .helpers import (
    assert_equal,
    assert_same_state,
    assert_trains_alike,
    eager_block,
    eager_transition,
    randomize,
    small_densenet,
    twin,
)

pytestmark = pytest.mark.usefixtures("two_threads")


def images(batch: int = 2, height: int = 75, width: int = 53) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


@pytest.mark.each_pair
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bn_size", [1, 3])
def test_swapped_densenet_trains_as_eager(backend: str, recompute: str, batch: int, bn_size: int) -> None:
    ours, eager = twin(small_densenet(bn_size=bn_size), lambda m: dense_ext.swap(m, recompute=recompute))
    assert all(row.runs == "fused" for row in dense_ext.report(ours).rows)
    assert_trains_alike(ours, eager, images(batch))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_input_and_weights(backend: str, memory_format: torch.memory_format) -> None:
    ours, eager = twin(small_densenet(), dense_ext.swap)
    ours.to(memory_format=memory_format)
    assert_trains_alike(ours, eager, images().to(memory_format=memory_format))


def test_densenet121s_widths_train_as_eager(backend: str) -> None:
    """Its growth rate and channels, in few of its layers."""
    ours, eager = twin(randomize(DenseNet(32, (2, 3, 2, 2), 64, num_classes=10)).double(), dense_ext.swap)
    assert_trains_alike(ours, eager, images(2, 64, 96), steps=2)


def test_eval_mode(backend: str, recompute: str) -> None:
    ours, eager = twin(small_densenet().eval(), lambda m: dense_ext.swap(m, recompute=recompute))
    assert_trains_alike(ours, eager, images(), steps=1)
    with torch.no_grad():
        x = images(1)
        assert_equal(ours(x), eager(x), "inference")


def test_inference_mode(backend: str) -> None:
    ours, eager = twin(small_densenet().eval(), dense_ext.swap)
    x = images(1)
    with torch.inference_mode():
        assert_equal(ours(x), eager(x), "inference")


def test_no_grad_in_training_mode_updates_the_statistics(backend: str, recompute: str) -> None:
    ours, eager = twin(small_densenet(), lambda m: dense_ext.swap(m, recompute=recompute))
    x = images()
    with torch.no_grad():
        assert_equal(ours(x), eager(x), "output")
    assert_same_state(ours, eager)


def test_statistics_are_updated_once_per_step(backend: str, recompute: str) -> None:
    model = dense_ext.swap(small_densenet(), recompute=recompute)
    model(images()).sum().backward()
    counters = {k: v.item() for k, v in model.named_buffers() if k.endswith("num_batches_tracked")}
    assert set(counters.values()) == {1}, counters


def freeze_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def freeze_some_norms(model: nn.Module) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms[::3]:
        norm.eval()


def freeze_weights(model: nn.Module) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)


def cumulative_momentum(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def individual_norms(model: nn.Module) -> None:
    for i, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        module.momentum, module.eps = 0.01 * (i % 4 + 1), 10.0 ** -(2 + i % 4)


def shared_counter(model: nn.Module) -> None:
    """The cumulative average depends on how many of the norms have counted before."""
    cumulative_momentum(model)
    counter = torch.tensor(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = counter


def shared_statistics(model: nn.Module) -> None:
    """Norms of as many channels share their running statistics, but not their counters."""
    first: dict[int, nn.BatchNorm2d] = {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            other = first.setdefault(module.num_features, module)
            module.running_mean, module.running_var = other.running_mean, other.running_var


def another_number_of_features(model: nn.Module) -> None:
    """PyTorch does not read the attribute."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_features = 1


def statistics_as_parameters(model: nn.Module, requires_grad: bool = False) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name in ("running_mean", "running_var"):
                value = module._buffers.pop(name)
                assert value is not None
                module.register_parameter(name, nn.Parameter(value, requires_grad))


@pytest.mark.each_pair
@pytest.mark.parametrize(
    "change",
    [
        another_number_of_features,
        statistics_as_parameters,
        freeze_norms,
        freeze_some_norms,
        freeze_weights,
        cumulative_momentum,
        individual_norms,
        shared_counter,
        shared_statistics,
    ],
)
def test_settings_of_norms_and_weights(backend: str, recompute: str, change: object) -> None:
    model = small_densenet()
    change(model)  # type: ignore[operator]
    ours, eager = twin(model, lambda m: dense_ext.swap(m, recompute=recompute))
    assert_trains_alike(ours, eager, images())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_running_variance_stays_infinite(momentum: float | None, dtype: torch.dtype) -> None:
    """And the output in evaluation mode stays finite."""
    block = eager_block().float()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
            module.num_batches_tracked.fill_(2)
            module.running_var[0] = torch.inf
            module.running_mean, module.running_var = (
                statistic.to(dtype) for statistic in (module.running_mean, module.running_var)
            )
    ours, _ = twin(block, dense_ext.swap)
    with torch.no_grad():
        ours(torch.randn(2, 6, 8, 6))
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var.dtype == dtype
                assert module.running_var[0] == torch.inf
                assert module.running_var[1:].isfinite().all()
        assert ours.float().eval()(torch.randn(2, 6, 8, 6)).isfinite().all()


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_in_16_bits_are_rounded_once(momentum: float | None) -> None:
    norm = nn.BatchNorm2d(50, momentum=momentum)
    stats = torch.rand(2, 50)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.to(torch.bfloat16)
    factor = 0.25 if momentum is None else momentum
    norm.num_batches_tracked.fill_(3)
    expected = [
        (factor * new.double() + (1 - factor) * old.double()).to(torch.bfloat16)
        for new, old in zip(
            (stats[0], stats[1] * (9 / 8)), (norm.running_mean, norm.running_var), strict=True
        )
    ]
    update_running_stats([norm], stats, [0], 9)
    assert torch.equal(norm.running_mean, expected[0])
    assert torch.equal(norm.running_var, expected[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_beside_frozen_norms(backend: str, recompute: str, value: float) -> None:
    """The gradient of a frozen norm's input does not depend on that input, so only its ReLU sees it."""
    if backend not in ("cpu", "reference"):
        pytest.skip("on a GPU 0*x is added to the gradient")
    ours, eager = twin(eager_block().eval(), lambda m: dense_ext.swap(m, recompute=recompute))
    x = torch.randn(2, 6, 8, 6, dtype=torch.float64)
    x[0, 0, 4, 2] = value
    gradients = []
    for model in (ours, eager):
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        gradients.append({"x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}})
    for name, expected in gradients[1].items():
        got = gradients[0][name]
        assert torch.equal(got.isfinite(), expected.isfinite()), name
        assert_equal(got.where(got.isfinite(), 0), expected.where(expected.isfinite(), 0), name)


def replace_norms(model: nn.Module, **options: bool) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, nn.BatchNorm2d(child.num_features, **options).double())
    return model


@pytest.mark.each_pair
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_norms_without_parameters_or_statistics(
    backend: str, options: dict[str, bool], training: bool
) -> None:
    model = replace_norms(small_densenet(), **options).train(training)
    ours, eager = twin(model, dense_ext.swap)
    assert_trains_alike(ours, eager, images())


def test_stop_tracking_but_keep_the_buffers(backend: str) -> None:
    model = small_densenet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    ours, eager = twin(model, dense_ext.swap)
    assert_trains_alike(ours, eager, images())


@pytest.mark.parametrize(("eps", "training"), [(0.0, True), (-1e-3, True), (-1e-3, False)])
def test_an_eps_that_is_not_positive_is_refused(eps: float, training: bool) -> None:
    for part in (eager_block(), eager_transition()):
        for model in twin(part.train(training), dense_ext.swap):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = eps
            with pytest.raises(ValueError, match=r"eps .*must be (positive|non-negative)"):
                model(torch.randn(2, 6, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_that_require_a_gradient_are_refused(training: bool) -> None:
    for part in (eager_block(), eager_transition()):
        statistics_as_parameters(part, requires_grad=True)
        for model in twin(part.train(training), dense_ext.swap):
            with pytest.raises(RuntimeError, match="running"):
                model(torch.randn(2, 6, 4, 4, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_one_running_statistic_alone_is_refused(missing: str, training: bool) -> None:
    for part in (eager_block(), eager_transition()):
        for model in twin(part.train(training), dense_ext.swap):
            for name, module in model.named_modules():
                if name.endswith(("layer2.norm1", "norm")):
                    setattr(module, missing, None)
            with pytest.raises((ValueError, RuntimeError), match=r"running_(mean|var)"):
                model(torch.randn(2, 6, 4, 4, dtype=torch.float64))


@pytest.mark.each_pair
@pytest.mark.parametrize("size", [(1, 2), (2, 1), (1, 1), (5, 7)])
def test_block_of_odd_sizes(backend: str, recompute: str, size: tuple[int, int]) -> None:
    ours, eager = twin(eager_block(), lambda m: dense_ext.swap(m, recompute=recompute))
    assert_trains_alike(ours, eager, torch.randn(3, 6, *size, dtype=torch.float64))


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (5, 7), (4, 6)])
def test_transition_of_odd_sizes(backend: str, size: tuple[int, int]) -> None:
    transition = eager_transition()
    ours, eager = twin(nn.Sequential(eager_block(2, 2, 2), transition), dense_ext.swap)
    assert_trains_alike(ours, eager, torch.randn(2, 2, *size, dtype=torch.float64))


def test_many_layers(backend: str) -> None:
    ours, eager = twin(eager_block(layers=30, channels=3, growth_rate=2), dense_ext.swap)
    assert_trains_alike(ours, eager, torch.randn(2, 3, 6, 6, dtype=torch.float64), steps=2)


def test_empty_batch(backend: str, recompute: str) -> None:
    ours, eager = twin(small_densenet(), lambda m: dense_ext.swap(m, recompute=recompute))
    assert_trains_alike(ours, eager, images(batch=0), steps=1)


def test_bits_are_equal_run_to_run(backend: str, recompute: str) -> None:
    model = dense_ext.swap(small_densenet().float(), recompute=recompute)
    x = images().float()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    first = gradients()
    for again in (gradients(), gradients()):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_policy_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    model = small_densenet().to(dtype)
    x = images().to(dtype)
    results = []
    for policy in ("none", "bottleneck", "block"):
        ours, _ = twin(model, lambda m, p=policy: dense_ext.swap(m, recompute=p))
        ours(x).square().sum().backward()
        results.append([p.grad for p in ours.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class TestDropout:
    def test_every_policy_has_the_same_dropout(self, backend: str) -> None:
        x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
        results = []
        for policy in ("none", "bottleneck", "block"):
            torch.manual_seed(1)
            block = dense_ext.swap(eager_block(drop_rate=0.3), recompute=policy)
            torch.manual_seed(3)
            leaf = x.clone().requires_grad_()
            y = block(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in block.parameters())])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert_equal(a, b, "dropout by policy")

    def test_distribution_and_scale(self, backend: str) -> None:
        block = eager_block(layers=1, growth_rate=8, drop_rate=0.3)
        kept = dense_ext.swap(eager_block(layers=1, growth_rate=8))
        kept.load_state_dict(block.state_dict())
        dense_ext.swap(block)
        x = torch.randn(4, 6, 32, 32, dtype=torch.float64)
        dropped, full = block(x)[:, 6:], kept(x)[:, 6:]
        zero = dropped == 0
        # 32768 Bernoulli draws: four standard deviations of the dropped fraction are 0.0101.
        assert abs(zero.double().mean().item() - 0.3) < 0.0101
        assert_equal(dropped[~zero], full[~zero] / 0.7, "kept elements")

    def test_new_mask_each_step_and_reproducible(self, backend: str) -> None:
        block = dense_ext.swap(eager_block(drop_rate=0.5))
        x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
        torch.manual_seed(5)
        first, second = block(x), block(x)
        torch.manual_seed(5)
        assert torch.equal(block(x), first)
        assert not torch.equal(first, second)

    def test_gradient_is_that_of_the_masked_function(self, backend: str, recompute: str) -> None:
        block = dense_ext.swap(eager_block(2, 3, 2, 1, drop_rate=0.4), recompute=recompute)

        def function(x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(7)
            return block(x)  # type: ignore[no-any-return]

        x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (x,))

    def test_off_in_eval(self, backend: str) -> None:
        ours, eager = twin(eager_block(drop_rate=0.4).eval(), dense_ext.swap)
        assert_trains_alike(ours, eager, torch.randn(2, 6, 5, 5, dtype=torch.float64), steps=1)

    def test_everything_dropped(self, backend: str) -> None:
        block = dense_ext.swap(eager_block(drop_rate=1.0))
        x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
        y = block(x)
        assert torch.count_nonzero(y[:, 6:]) == 0
        y.sum().backward()
        assert torch.isfinite(x.grad).all()


class TestWithoutBottleneck:
    def test_block_equals_eager(self, backend: str, recompute: str) -> None:
        block = dense_ext.DenseBlock(3, 6, 5, bn_size=None, recompute=recompute)
        ours = randomize(block).double()
        eager = dense_ext.modules.EagerDenseBlock()
        for name, layer in twin(ours, lambda _: None)[0].items():
            eager[name] = layer
        assert isinstance(ours, FusedDenseBlock)
        assert_trains_alike(ours, eager, torch.randn(2, 6, 7, 5, dtype=torch.float64))


class TestStatisticsOfATransition:
    """Within one call of a Sequential, a block passes its output's statistics to the transition after it."""

    @pytest.mark.parametrize(
        ("between", "calls"),
        [([], 0), ([nn.ReLU(inplace=True)], 1), ([nn.Softplus()], 1), ([nn.Identity()], 1)],
        ids=["nothing", "written", "another tensor", "seen by others"],
    )
    def test_taken_again_where_needed(self, between: list[nn.Module], calls: int) -> None:
        """``calls`` counts the transition's channel_stats; the block takes its own inside of one call."""
        if "cpu" not in dense_ext.available_backends("cpu"):
            pytest.skip("counts the C++ backend's calls")
        ours, eager = twin(nn.Sequential(eager_block(), *between, eager_transition(21, 4)), dense_ext.swap)
        x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
        with torch.profiler.profile() as profile:
            y = ours(x)
        assert sum(event.name == "dense_ext::channel_stats" for event in profile.events()) == calls
        assert_equal(y.detach(), eager(x).detach(), "transition")

    def test_not_known_where_no_layer_took_them(self, backend: str) -> None:
        block, transition = eager_block(), eager_transition(21, 4)
        for layer in block.values():
            layer.norm1.eval()  # norm2 still uses the batch's statistics
        ours, eager = twin(nn.Sequential(block, transition), lambda m: [dense_ext.swap(part) for part in m])
        assert_trains_alike(ours, eager, torch.randn(2, 6, 8, 8, dtype=torch.float64))
