"""The operators' backward through PyTorch's own operators.

The kernels compute one gradient at a time, and it cannot be differentiated again. A backward with
``create_graph=True`` (gradient penalties, Hessian-vector products) or ``is_grads_batched=True`` therefore
runs here. It starts from the same saved tensors, recomputes each layer, and lets autograd differentiate it.
The result is a function of X, the parameters and the gradient, and part of the graph that made them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Arguments, BlockOptions
from .schedule import dropout_mask, nhwc


@contextmanager
def _recording(x: Tensor) -> Iterator[bool]:
    """Record operations for autograd, without autocast; yields whether the result is differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        yield again


def _inputs(tensors: Sequence[Tensor], again: bool) -> list[Tensor]:
    """The tensors as inputs of a layer; if the result is differentiated again, they stay in their graph.

    In that case they are views, because X depends on the parameters too. A gradient with respect to a
    parameter itself would also flow through X, back into the block whose backward is running.
    """
    return [t.view_as(t) for t in tensors] if again else [t.detach().requires_grad_() for t in tensors]


def _activations(x: Tensor, args: Arguments) -> Iterator[Any]:
    """For each norm of an operator, a function that applies the norm and the ReLU to its input."""
    running = iter(zip(args.running_means, args.running_vars, strict=True))

    def activation(weight: Tensor, bias: Tensor, eps: float, statistics: Any) -> Any:
        def apply(x: Tensor) -> Tensor:
            mean, var = statistics or (None, None)
            return F.relu(F.batch_norm(x, mean, var, weight, bias, statistics is None, 0.0, eps))

        return apply

    for weight, bias, eps, batch in zip(*args[:2], args.eps, args.batch_stats, strict=True):
        yield activation(weight, bias, eps, None if batch else next(running))


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    convolution = F.conv3d if x.dim() == 5 else F.conv2d
    return convolution(x, weight, padding=weight.shape[-1] // 2)


def _gradients(y: Tensor, inputs: Sequence[Tensor], grad: Tensor, again: bool) -> list[Tensor | None]:
    """The gradient of each input, None for inputs that need none."""
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
    return [next(found) if t.requires_grad else None for t in inputs]


def dense_block_backward(
    grad: Tensor, out: Tensor, args: Arguments, options: BlockOptions, in_channels: int
) -> Any:
    """The gradients of :func:`dense_ext.ops._dense_block_formula`.

    Args:
        grad: [N, Ct, H, W], the gradient of ``out``.
        out: X; part of the graph that made it if the result is differentiated again.
        args, options: the operator's arguments.
        in_channels: c0, the number of channels of the block's input.

    Returns:
        The gradients of the input [N, c0, H, W], of each norm's weight and bias, and of each convolution's
        weight; None where not needed.
    """
    with _recording(out) as again:
        (x,) = _inputs([out], again)
        groups = [_inputs(group, again) for group in args[:3]]
        args = args._replace(norm_weights=groups[0], norm_biases=groups[1], conv_weights=groups[2])
        convs, activations = args.conv_weights, list(_activations(x, args))
        per_layer = 2 if convs[0].shape[-1] == 1 else 1
        sizes = [in_channels, *[convs[-1].shape[0]] * (len(convs) // per_layer)]
        ends = list(itertools.accumulate(sizes))
        g = list(grad.split(sizes, 1))
        found: list[list[Tensor | None]] = [[None] * len(convs) for _ in groups]
        for layer in reversed(range(len(sizes) - 1)):
            own = slice(layer * per_layer, (layer + 1) * per_layer)
            y = source = x.narrow(1, 0, ends[layer])
            for activation, weight in zip(activations[own], convs[own], strict=True):
                y = _convolve(activation(y), weight)
            if options.drop_rate > 0:
                mask = dropout_mask(options.dropout_seeds, layer, options.drop_rate, nhwc(y))
                y = y * mask.movedim(-1, 1)
            inputs = [source, *(t for group in groups for t in group[own])]
            of_source, *of_parameters = _gradients(y, inputs, g[layer + 1], again)
            for group, i in zip(found, range(0, 3 * per_layer, per_layer), strict=True):
                group[own] = of_parameters[i : i + per_layer]
            if of_source is not None:
                parts = of_source.split(sizes[: layer + 1], 1)
                g[: layer + 1] = [a + b for a, b in zip(g, parts, strict=False)]
        return g[0], *found


def pooling_backward(grad: Tensor, x: Tensor, args: Arguments) -> Any:
    """The gradients of a transition's or the stem's backward.

    Args:
        grad: the gradient of the operator's output.
        x: the operator's input [N, C, H, W].
        args: the operator's arguments; the stem has no convolution.
    """
    with _recording(x) as again:
        (x,) = _inputs([x], again)
        groups = [_inputs(group, again) for group in args[:3]]
        args = args._replace(norm_weights=groups[0], norm_biases=groups[1], conv_weights=groups[2])
        (activation,), volumes = _activations(x, args), x.dim() == 5
        y = activation(x)
        if args.conv_weights:
            pool = F.avg_pool3d if volumes else F.avg_pool2d
            y = pool(_convolve(y, args.conv_weights[0]), 2)
        else:
            y = (F.max_pool3d if volumes else F.max_pool2d)(y, 3, 2, 1)
        of_x, *rest = _gradients(y, [x, *(t for group in groups for t in group)], grad, again)
        return of_x, rest[:1], rest[1:2], rest[2:]
