"""What is measured: a training step or a forward, also recorded as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WARM_UP = 3  # calls; lets libraries choose algorithms and take their workspace outside the recording


class Step:
    """A training step, or without an optimizer a forward without gradients; not synchronised.

    Args:
        model: float32 parameters, in the mode to run it in.
        dtype: other than float32 the forward runs under autocast to it; float16 scales the loss.
        device: the model's.
        optimizer: over the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.optimizer: Any = optimizer
        self.scaler = GradScaler(device.type, enabled=dtype == torch.float16)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss_and_logits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy and the logits [N, classes], with their graph."""
        with self._autocast():
            logits = self.model(images)
            return F.cross_entropy(logits, labels), logits

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss_and_logits(images, labels)[0]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss before the step's update, detached; without an optimizer the logits."""
        if self.optimizer is None:
            with torch.no_grad(), self._autocast():
                logits: Tensor = self.model(images)
                return logits
        self.optimizer.zero_grad()
        loss, _ = self.loss_and_logits(images, labels)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def sgd_step(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Step:
    """The step that is measured: SGD with learning rate 0.01 and momentum 0.9."""
    return Step(model, dtype, device, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))


class GraphedStep:
    """Calls a step; from the fourth call on by replaying what was recorded: launching costs nothing.

    The first calls run as without a graph, on the stream that records, and return their own results.
    A replay computes on the tensors of the recording: every call must be given the same ones, and
    its result is overwritten by the next.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Any], device: torch.device) -> None:
        self.step, self.calls = step, 0
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        if self.calls < _WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.result = self.step(images, labels)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.calls == _WARM_UP:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.result = self.step(images, labels)
            self.graph.replay()
        self.calls += 1
        return self.result


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
