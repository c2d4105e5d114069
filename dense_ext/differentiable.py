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

from . import activations
from .arguments import TRAINABLE_LISTS, Arguments, BlockOptions, PoolingOptions, TransitionOptions
from .autograd import grouped
from .backends.base import accumulate_dtype
from .schedule import Dropout, nhwc


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
    """For each norm of an operator, a function that applies the norm and the activation to its input."""
    if args.counts is not None:
        raise NotImplementedError(
            "dense_ext cannot differentiate twice, or a batch of gradients at once, through statistics that "
            "several processes share (SyncBatchNorm)"
        )
    running = iter(zip(args.running_means, args.running_vars, strict=True))
    activated = activations.activation(args.activation).forward

    def activation(weight: Tensor, bias: Tensor, eps: float, statistics: Any) -> Any:
        def apply(x: Tensor) -> Tensor:
            # Written out, because PyTorch's batch norm on a CPU computes wrong gradients for a single image
            # whose strides are not those of its memory format.
            wide = x.to(accumulate_dtype(x.dtype))
            if statistics is None:
                var, mean = torch.var_mean(wide, (0, *range(2, x.dim())), correction=0)
            else:
                mean, var = statistics
            scale = weight * (var + eps).rsqrt()
            shape = (1, -1, *[1] * (x.dim() - 2))
            normed = wide * scale.view(shape) + (bias - mean * scale).view(shape)
            return activated(normed.to(x.dtype))

        return apply

    for weight, bias, eps, batch in zip(*args[:2], args.eps, args.batch_stats, strict=True):
        yield activation(weight, bias, eps, None if batch else next(running))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    convolution = F.conv3d if x.dim() == 5 else F.conv2d
    bias = None if bias is None else bias.to(x.dtype)
    padding = [dilation * (length // 2) for length in weight.shape[2:]]
    return convolution(x, weight.to(x.dtype), bias, padding=padding, dilation=dilation)


def _drop(y: Tensor, rate: float, channels: bool, seed: Any) -> Tensor:
    """``y`` [N, K, H, W] after dropout."""
    if rate == 0:
        return y
    return y * Dropout(rate, channels, int(seed)).mask(nhwc(y)).movedim(-1, 1)


def _with_inputs(args: Arguments, again: bool) -> tuple[Arguments, list[list[Tensor]]]:
    """The arguments with their trainable tensors as inputs of a layer, and these."""
    groups = [_inputs(group, again) for group in args.tensors[:TRAINABLE_LISTS]]
    return Arguments._make([*groups, *args[TRAINABLE_LISTS:]]), groups


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
        args, groups = _with_inputs(args, again)
        convs, activated = args.conv_weights, list(_activations(x, args))
        per_layer = options.convs_per_layer
        sizes = [in_channels, *[conv.shape[0] for conv in convs[per_layer - 1 :: per_layer]]]
        ends = list(itertools.accumulate(sizes))
        g = list(grad.split(sizes, 1))
        found: list[list[Tensor | None]] = [[None] * len(group) for group in groups]
        for layer in reversed(range(len(sizes) - 1)):
            own = slice(layer * per_layer, (layer + 1) * per_layer)
            y = source = x.narrow(1, 0, ends[layer])
            for which, i in enumerate(range(own.start, own.stop)):
                dilation = options.dilation if which == per_layer - 1 else 1
                y = _convolve(activated[i](y), convs[i], args.bias(i), dilation)
                if options.dropout_seeds is not None:
                    seed = options.dropout_seeds[i]
                    y = _drop(y, options.drop_rates[which], options.drops_channels, seed)
            inputs = [source, *(t for group in groups for t in group[own])]
            of_source, *of_parameters = _gradients(y, inputs, g[layer + 1], again)
            each = grouped(of_parameters, [len(group[own]) for group in groups])
            for group, gradients in zip(found, each, strict=True):
                group[own] = gradients
            if of_source is not None:
                parts = of_source.split(sizes[: layer + 1], 1)
                g[: layer + 1] = [a + b for a, b in zip(g, parts, strict=False)]
        return g[0], *found


def pooling_backward(grad: Tensor, x: Tensor, args: Arguments, options: PoolingOptions) -> Any:
    """The gradients of the backward of a transition, of the stem, or of norm and activation alone.

    Args:
        grad: the gradient of the operator's output.
        x: the operator's input [N, C, H, W].
        args, options: the operator's arguments.
    """
    with _recording(x) as again:
        (x,) = _inputs([x], again)
        args, groups = _with_inputs(args, again)
        (activated,), volumes = _activations(x, args), x.dim() == 5
        average, maximum = (F.avg_pool3d, F.max_pool3d) if volumes else (F.avg_pool2d, F.max_pool2d)
        y = activated(x)
        if isinstance(options, TransitionOptions):
            y = _convolve(y, args.conv_weights[0], args.bias(0))
            y = _drop(y, options.drop_rate, options.drops_channels, options.dropout_seed)
            y = (maximum if options.pool == "max" else average)(y, options.pool_window)
        elif options is None:
            y = maximum(y, 3, 2, 1)
        of_x, *rest = _gradients(y, [x, *(t for group in groups for t in group)], grad, again)
        return of_x, *grouped(rest, list(map(len, groups)))
