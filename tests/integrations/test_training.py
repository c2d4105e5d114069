"""Tools that run or change training: Lightning, Accelerate, PEFT, pruning, checkpointing, offloading."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.densenet import _DenseBlock

import dense_ext

from ..helpers import assert_equal, assert_same_state, assert_trains_alike
from .common import FUSED, UNFUSED, fused_calls, images, says_unfused, swapped_and_eager

BLOCKS = ("features.denseblock1", "features.denseblock2")
TWO_STEPS = Counter({name: 2 * count for name, count in FUSED.items()})


def _data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)
    return DataLoader(TensorDataset(x, torch.tensor([0, 1, 2, 0])), batch_size=2)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning.*", "ignore::DeprecationWarning")
def test_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Training(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    ours, eager = swapped_and_eager()
    for model, expected in ((ours, TWO_STEPS), (eager, UNFUSED)):
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        assert fused_calls(lambda m=model, t=trainer: t.fit(Training(m.train()), _data())) == expected
        trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert_same_state(ours, eager)
    # The swapped network loads the eager network's checkpoint.
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    Training(ours).load_state_dict(saved)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    library = pytest.importorskip("accelerate")
    yield library
    library.state.AcceleratorState._reset_state(reset_partial_state=True)
    library.state.GradientState._reset_state()


def test_accelerate(accelerate: Any) -> None:
    ours, eager = swapped_and_eager()
    accelerator = accelerate.Accelerator(cpu=True)

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model, optimizer, data = accelerator.prepare(model.train(), optimizer, _data())
        for x, label in data:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), label))
            optimizer.step()

    assert fused_calls(lambda: train(ours)) == TWO_STEPS
    train(eager)
    assert_same_state(ours, eager)


def test_accelerate_offloads_weights(accelerate: Any) -> None:
    """Its hooks load the weights of single convolutions, so these modules must be called."""
    ours, eager = swapped_and_eager()
    x = images()
    expected = eager(x)
    accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    with torch.no_grad(), says_unfused(*BLOCKS, "features.transition1", "features"):
        y = ours(x)
    assert_equal(y, expected.detach(), "output")


class TestPEFT:
    @staticmethod
    def _lora(model: nn.Module, targets: str) -> Any:
        peft = pytest.importorskip("peft")
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config).double()

    def test_lora_of_the_classifier(self) -> None:
        ours, eager = (self._lora(model, ".*classifier") for model in swapped_and_eager())
        assert fused_calls(lambda: ours(images())) == FUSED
        assert_trains_alike(ours, eager, images())

    def test_lora_of_convolutions(self) -> None:
        ours, eager = (self._lora(m, r".*denseblock2\..*conv1") for m in swapped_and_eager())
        with says_unfused(BLOCKS[1]):
            assert fused_calls(lambda: ours(images())) == {"stem": 1, "dense_block": 1, "transition": 1}
        assert_trains_alike(ours, eager, images())
        merged, original = (model.merge_and_unload().eval() for model in (ours, eager))
        assert fused_calls(lambda: merged(images())) == FUSED
        x = images()
        assert_equal(merged(x), original(x), "output after the merge")

    def test_swap_after_lora(self) -> None:
        _, eager = swapped_and_eager()
        eager = self._lora(eager, r".*denseblock2\..*conv1")
        ours = copy.deepcopy(eager)
        with pytest.warns(
            UserWarning, match=r"left as they are: \S*denseblock2: .* conv1 is peft\.\S*Conv2d"
        ):
            dense_ext.swap(ours)
        assert_trains_alike(ours, eager, images())


class TestPruning:
    def test_pruning_after_the_swap(self) -> None:
        ours, eager = swapped_and_eager()
        convs = [m.features.denseblock1.denselayer1.conv2 for m in (ours, eager)]
        for conv in convs:
            prune.l1_unstructured(conv, "weight", amount=0.5)
        with says_unfused(BLOCKS[0]):
            assert fused_calls(lambda: ours(images())) == {"stem": 1, "dense_block": 1, "transition": 1}
        assert_trains_alike(ours, eager, images())
        for conv in convs:
            prune.remove(conv, "weight")
        assert fused_calls(lambda: ours(images())) == FUSED
        assert_trains_alike(ours, eager, images())

    def test_swap_after_pruning(self) -> None:
        ours, eager = swapped_and_eager()
        dense_ext.restore(ours)
        for model in (ours, eager):
            prune.l1_unstructured(model.features.denseblock1.denselayer1.conv2, "weight", amount=0.5)
        with pytest.warns(UserWarning, match=r"left as they are: features.denseblock1: .* carries a hook"):
            dense_ext.swap(ours)
        prune.remove(ours.features.denseblock1.denselayer1.conv2, "weight")
        dense_ext.swap(ours)
        assert fused_calls(lambda: ours(images())) == FUSED
        prune.remove(eager.features.denseblock1.denselayer1.conv2, "weight")
        assert_trains_alike(ours, eager, images())


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, _DenseBlock)


def _wrap(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=_is_block)
    return model


def _wrap_swapped(model: nn.Module) -> nn.Module:
    return _wrap(dense_ext.swap(model))


def _swap_wrapped(model: nn.Module) -> nn.Module:
    return dense_ext.swap(_wrap(model))


@pytest.mark.parametrize(
    ("change", "fused"),
    [(_wrap_swapped, FUSED), (_swap_wrapped, FUSED - Counter({"stem": 1}))],
    ids=["swap first", "swap last"],
)
def test_activation_checkpointing(change: Callable[[nn.Module], nn.Module], fused: Counter[str]) -> None:
    """Each block is checkpointed: it runs again in backward, but updates its running statistics only once.

    Eager's checkpointed blocks update them twice, so the test compares with eager without checkpointing.
    """
    _, eager = swapped_and_eager()
    ours = change(copy.deepcopy(eager)).train()
    assert_trains_alike(ours, eager.train(), images())
    assert fused_calls(lambda: ours(images())) == fused


def test_checkpoint_of_features() -> None:
    ours, eager = swapped_and_eager()
    x = images().requires_grad_()
    for model in (ours.train(), eager.train()):
        features = checkpoint(model.features, x, use_reentrant=False)
        features.square().sum().backward()
    assert_same_state(ours, eager)
    assert fused_calls(lambda: checkpoint(ours.features, x, use_reentrant=False)) == FUSED


def test_checkpoint_that_ends_with_a_part() -> None:
    """It recomputes only what backward needs: eager's last norm then counts a second step, a part none."""
    ours, eager = swapped_and_eager()
    x, steps = images(), []
    for model in (ours.train(), eager.train()):
        y = checkpoint(model.features[:5], x, use_reentrant=False)
        model.features[5:](y).square().sum().backward()
        steps.append(model.features.denseblock1.denselayer2.norm2.num_batches_tracked.item())
    assert steps == [1, 2]
    for (name, found), expected in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if found.grad is not None or expected.grad is not None:
            assert_equal(found.grad, expected.grad, name)
    assert fused_calls(lambda: checkpoint(ours.features[:5], x, use_reentrant=False)) == Counter(
        {"stem": 1, "dense_block": 1}
    )


@pytest.mark.parametrize("recompute", ["none", "bottleneck", "block"])
def test_save_on_cpu(recompute: str) -> None:
    ours, eager = swapped_and_eager()
    dense_ext.swap(ours, recompute=recompute)

    def saving(model: nn.Module) -> None:
        forward = model.forward

        def wrapped(x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return forward(x)

        model.forward = wrapped  # type: ignore[method-assign]

    saving(ours)
    saving(eager)
    assert fused_calls(lambda: ours(images())) == FUSED
    assert_trains_alike(ours.train(), eager.train(), images())
