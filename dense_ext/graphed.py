"""Runs a model's forward and backward as CUDA graphs, so that the host launches two graphs, not every kernel.

With small batches or fast kernels a step takes as long as Python needs to launch its kernels. A CUDA graph
records the launches once, with the addresses of the tensors, and replays them in one call. So everything
that a replay uses must stay where it was, and what a replay computes must not depend on the host.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .casting import copies

# Runs before recording: they let libraries choose algorithms and take their workspace.
_WARM_UP = 3

# Attributes of these types may be set anew, if to the same value; those of others must be the same object.
_PLAIN = (int, float, str)

Run = Callable[[], Sequence[Tensor | None]]


class _Call(NamedTuple):
    """What a call must share with a recording to be served by it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    needs_gradient: bool  # of the input
    training: bool
    gradients: bool  # whether autograd is on
    autocast: torch.dtype | None

    @staticmethod
    def of(x: Tensor, model: nn.Module) -> _Call:
        on = torch.is_autocast_enabled(x.device.type)
        return _Call(
            tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad and torch.is_grad_enabled(),
            model.training, torch.is_grad_enabled(), torch.get_autocast_dtype(x.device.type) if on else None,
        )  # fmt: skip


def make_graphed(model: nn.Module, *samples: Tensor) -> GraphedModel:
    """Record a model's forward and backward as CUDA graphs; returns what to call in the model's place.

    .. code-block:: python

        model = dense_ext.swap(torchvision.models.densenet121()).cuda().train()
        graphed = dense_ext.make_graphed(model, images)  # in the autocast context of the calls, if any
        for images, labels in loader:
            loss = F.cross_entropy(graphed(images), labels)
            loss.backward()

    The model itself stays as it is: train, save and load it as before. Loss, optimizer and gradient scaler
    run outside the graphs. A replay runs none of the model's Python, so hooks inside it are not called.
    Running statistics, counters and gradients are those of as many calls of the model.

    Each sample's shape, memory format and dtype gets a recording of its own, in the present training mode.
    In training mode it has a backward pass; in eval mode it serves calls under ``torch.no_grad()``. Any
    other call runs the model without a graph, for example a smaller last batch.

    Args:
        model: on one GPU; takes a tensor and returns one. In training mode, not wrapped for several
            processes.
        samples: inputs, of the shapes that calls will have.

    Raises:
        ValueError: no sample is given, a sample is not on a GPU, the model draws random numbers on the CPU
            (as fused dropout does for its masks, which a graph would repeat), it is wrapped for several
            processes, it does not return one tensor, or it trains and nothing requires a gradient.
    """
    if not samples:
        raise ValueError("make_graphed needs a sample input of each shape")
    for sample in samples:
        if sample.device.type != "cuda":
            raise ValueError(f"CUDA graphs run on a GPU, but the sample is on {sample.device}")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(f"make_graphed can't record {type(model).__name__}; record the model inside it")
    return GraphedModel(model, samples)


class GraphedModel:
    """A model and the recordings of its calls; :func:`make_graphed` makes it."""

    def __init__(self, model: nn.Module, samples: Sequence[Tensor]) -> None:
        self.model = model
        self._recordings: dict[_Call, _Recording] = {}
        self._warned = False
        for sample in samples:
            call = _call_of_sample(sample, model)
            if call not in self._recordings:
                self._recordings[call] = _Recording(model, sample, call)

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output; it is a tensor of its own, which later calls don't touch.

        Raises:
            RuntimeError: in backward, if the graph was called again in the meantime, or backward ran before.
        """
        recording = self._recordings.get(_Call.of(x, self.model))
        if recording is None:
            return self.model(x)
        if not recording.holds():
            if not self._warned:
                warnings.warn(
                    "dense_ext: the model runs without its CUDA graph, since its parameters, buffers or "
                    "attributes changed after make_graphed; call it again",
                    stacklevel=2,
                )
                self._warned = True
            return self.model(x)
        if not recording.call.gradients:
            return recording.forward(x)
        return _Replay.apply(recording, x, *recording.parameters)


def _call_of_sample(sample: Tensor, model: nn.Module) -> _Call:
    call = _Call.of(sample, model)
    if not model.training:
        return call._replace(gradients=False, needs_gradient=False)
    return call._replace(gradients=True, needs_gradient=sample.requires_grad)


class _Recording:
    """A forward pass, and in training a backward pass, that were recorded for one kind of call."""

    def __init__(self, model: nn.Module, sample: Tensor, call: _Call) -> None:
        self.model, self.call = model, call
        self.parameters = [p for p in model.parameters() if p.requires_grad] if call.gradients else []
        if call.gradients and not (self.parameters or call.needs_gradient):
            raise ValueError("the model is in training mode, but nothing requires a gradient")
        self.calls = 0  # of forward
        self.backwards = True  # whether the last call's backward pass has run
        self._x = sample.detach().clone(memory_format=torch.preserve_format)
        self._x.requires_grad_(call.needs_gradient)
        self._y = self._x  # until it is computed
        with torch.cuda.device(sample.device):
            self._record()
        self._modules = list(model.modules())
        self._tensors, self._attributes = self._present_state()

    def _record(self) -> None:
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        random = torch.random.get_rng_state()
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Without autocast's cache, as a cast that an earlier call made would not be recorded.
        dtype = self.call.autocast
        autocast = torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False)
        try:
            with autocast, torch.set_grad_enabled(self.call.gradients):
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UP):
                        self._run_forward()
                        self._gy = torch.zeros_like(self._y)
                        if self.call.gradients:
                            self._run_backward()
                if not torch.equal(random, torch.random.get_rng_state()):
                    raise ValueError(
                        "the model draws random numbers on the CPU, for example for the masks of fused "
                        "dropout; a CUDA graph would use the same ones in every call"
                    )
                torch.cuda.current_stream().wait_stream(stream)
                (self._out,), self._replay_forward = record(self._run_forward, pool, stream)
                if self.call.gradients:
                    self._grads, self._replay_backward = record(self._run_backward, pool, stream)
            # Its autograd graph would keep nodes that belong to the recording's stream.
            self._y = self._out
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _run_forward(self) -> Sequence[Tensor]:
        y = self.model(self._x)
        if not isinstance(y, Tensor):
            raise ValueError(f"make_graphed records models that return one tensor, got {type(y).__name__}")
        self._y = y
        return [y.detach()]

    def _run_backward(self) -> Sequence[Tensor | None]:
        inputs = [self._x] if self.call.needs_gradient else []
        return torch.autograd.grad(self._y, [*inputs, *self.parameters], self._gy, allow_unused=True)

    def _present_state(self) -> tuple[list[object], list[object]]:
        """Where the model's tensors are, and its modules' attributes, such as a norm's momentum.

        Each call looks at them, so over a flat list: ``Module.parameters()`` takes ten times as long.
        """
        places: list[object] = []
        attributes: list[object] = []
        for module in self._modules:
            attributes += module.__dict__.values()
            attributes += module._modules.values()
            for tensors in (module._parameters, module._buffers):
                places += [(id(t), t.data_ptr(), t.requires_grad) for t in tensors.values() if t is not None]
        return places, attributes

    def holds(self) -> bool:
        """Whether what was recorded is still what the model would do."""
        tensors, attributes = self._present_state()
        if tensors != self._tensors or len(attributes) != len(self._attributes):
            return False
        pairs = zip(attributes, self._attributes, strict=True)
        return all(map(operator.is_, attributes, self._attributes)) or all(
            now is then or (type(now) in _PLAIN and now == then) for now, then in pairs
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self._x.copy_(x)
            self._replay_forward()
            self.calls, self.backwards = self.calls + 1, False
            return self._out.clone(memory_format=torch.preserve_format)

    def backward(self, call: int, gy: Tensor) -> list[Tensor | None]:
        if call != self.calls:
            raise RuntimeError(
                "a CUDA graph keeps one call's activations: run backward before the model is called again"
            )
        if self.backwards:
            raise RuntimeError("a CUDA graph runs backward once for each forward pass")
        self.backwards = True
        self._gy.copy_(gy)
        self._replay_backward()
        # Copies: the next replay overwrites its own results, and someone may hold these.
        return copies(self._grads)


def record(run: Run, pool: Any, stream: torch.cuda.Stream) -> tuple[Sequence[Any], Callable[[], None]]:
    """Record what ``run`` launches; returns its results, which a replay overwrites, and the replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        results = run()
    return results, graph.replay


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, x: Tensor, *parameters: Tensor) -> Tensor:
        y = recording.forward(x)
        ctx.recording, ctx.call = recording, recording.calls
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        recording: _Recording = ctx.recording
        grads = recording.backward(ctx.call, gy)
        if not recording.call.needs_gradient:
            grads = [None, *grads]
        return None, *grads
