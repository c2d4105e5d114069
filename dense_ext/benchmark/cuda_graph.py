"""A step recorded as one CUDA graph and replayed, so that launching its kernels costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # calls; lets libraries choose algorithms and take their workspace outside the recording


class GraphedStep:
    """Calls a step; from the fourth call on by replaying what was recorded.

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
