"""torch.distributed.pipelining: two stages in two processes on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline

from ..helpers import assert_equal
from ..processes import needs_gloo, run_in_processes
from .common import FusedCalls, images, swapped_and_eager

SECOND = {"features.denseblock2": SplitPoint.BEGINNING}


def _loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


class _Tail(nn.Module):
    """The second stage of the network, split by hand."""

    def __init__(self, model: nn.Module, start: int) -> None:
        super().__init__()
        self.features, self.classifier = model.features[start:], model.classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.features(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _by_hand(model: nn.Module, rank: int) -> PipelineStage:
    start = list(dict(model.features.named_children())).index("denseblock2")
    part = _Tail(model, start) if rank else model.features[:start]
    return PipelineStage(part, rank, 2, torch.device("cpu"))


def _train(rank: int, *, traced: bool) -> None:
    """Run a step of this process's stage, and compare output and gradients with eager's."""
    torch.manual_seed(0)
    ours, eager = swapped_and_eager()
    x, target = images(4), torch.randn(4, 3, dtype=torch.float64)
    if traced:
        pipe = pipeline(ours, (x[:2],), split_spec=SECOND)
        stage = pipe.build_stage(rank, torch.device("cpu"))
    else:
        stage = _by_hand(ours, rank)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=_loss, scale_grads=False)
    with FusedCalls() as calls:
        y = schedule.step(target=target) if rank else schedule.step(x)
    # The first stage has the stem, a block and a transition; the second has a block.
    parts = {"dense_block"} if rank else {"dense_block", "stem", "transition"}
    assert set(calls.counts) == (set() if traced else parts)
    expected = eager(x)
    _loss(expected, target).backward()
    if rank:
        assert_equal(y.detach(), expected.detach(), "output")
    gradients = [p.grad for name, p in eager.named_parameters() if _second(name) == bool(rank)]
    for gradient, other in zip((p.grad for p in stage.submod.parameters()), gradients, strict=True):
        assert_equal(gradient, other, f"gradient of stage {rank}")


def _second(name: str) -> bool:
    return name.startswith(("features.denseblock2", "features.norm5", "classifier"))


@needs_gloo
def test_pipelining(tmp_path: Path) -> None:
    run_in_processes([partial(_train, traced=traced) for traced in (True, False)], 2, tmp_path)
