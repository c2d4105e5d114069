"""Dense blocks, transitions and the stem as modules, with torchvision's parameter names.

``FusedDenseBlock`` and ``FusedTransition`` are mixins that replace a module's ``forward`` by one fused
operator. ``FusedFeatures`` is the Sequential around them and fuses the stem too. If the gate in
:mod:`dense_ext.eligibility` gives a reason against fusing, the original class's forward runs instead.

A block's backward reads its output X, so nothing may write into X. Inside :class:`FusedFeatures`, the next
transition gets X together with the block's information about it (:class:`ops.Carried`). Code that may write
into X, or that relies on the memory layout of eager's result, gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.jit import is_scripting  # type: ignore[attr-defined]  # absent from torch's stubs

from . import ops, packing  # ops registers the operators
from .arguments import Arguments, BlockOptions, TransitionOptions
from .backends.base import accumulate_dtype
from .batch_norm import (
    ONE_STATISTIC,
    affine_parameters,
    constant,
    update_running_stats,
    uses_batch_stats,
    values_per_channel,
)
from .casting import cast
from .checks import check_batch, check_input, check_options, check_parameters
from .eligibility import (
    Fused,
    has_hooks,
    input_reason,
    interference,
    mode_reason,
    names_of,
    readable,
    vouched,
)
from .schedule import norm_starts
from .supported import layers_reason
from .synchronised import group_of


def read_arguments(
    where: str,
    x: Tensor,
    norms: Sequence[nn.BatchNorm2d],
    convs: Sequence[nn.Conv2d],
    backend: str,
    activation: str = "relu",
    conv_dtype: torch.dtype | None = None,
) -> Arguments:
    """Read an operator's arguments from the modules, and check them against x.

    Under autocast the convolutions' weights are cast to ``conv_dtype``, or to x's dtype.
    """
    dtype, batch_stats = accumulate_dtype(x.dtype), [uses_batch_stats(norm) for norm in norms]
    group = sync_group(norms)
    check_batch(where, x, any(batch_stats) and not group)
    weights, biases = zip(*(affine_parameters(norm, dtype, x.device) for norm in norms), strict=True)
    conv_weights = [constant(conv, "weight") for conv in convs]
    conv_weights = [weight.unsqueeze(2) if weight.dim() == 3 else weight for weight in conv_weights]
    biases_of_convs = [constant(conv, "bias") for conv in convs]
    conv_biases = []
    if any([bias is not None for bias in biases_of_convs]):  # noqa: C419  # compiled
        conv_biases = [
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(conv_weights, biases_of_convs, strict=True)
        ]
    conv_dtype = conv_dtype or x.dtype
    if ops.autocast_enabled(x):
        conv_weights = cast(conv_weights, conv_dtype)
    running = [norm for norm, batch in zip(norms, batch_stats, strict=True) if not batch]
    # No walrus here, since torch.compile cannot trace one in a comprehension.
    means = [mean for mean in [constant(norm, "running_mean") for norm in running] if mean is not None]
    variances = [var for var in [constant(norm, "running_var") for norm in running] if var is not None]
    if not len(means) == len(variances) == len(running):
        raise ValueError(f"{where}: {ONE_STATISTIC}")
    if torch.is_grad_enabled():
        statistics = [constant(norm, name) for norm in norms for name in ("running_mean", "running_var")]
        if any([t is not None and t.requires_grad for t in statistics]):  # noqa: C419  # compiled
            raise RuntimeError(
                f"{where}: batch norm gives its running statistics no gradient, but one requires it"
            )
    groups = (list(weights), list(biases), conv_weights, conv_biases, means, variances)
    names = (
        "norm weight", "norm bias", "convolution weight", "convolution bias", "running mean",
        "running variance",
    )  # fmt: skip
    for name, parameters in zip(names, groups, strict=True):
        expected = conv_dtype if name == "convolution weight" else x.dtype
        check_parameters(where, name, parameters, x, expected)
    counts = torch.ops.dense_ext.gather_counts(x, group) if group else None
    eps = [norm.eps for norm in norms]
    # As PyTorch does; a frozen norm's may be zero from PyTorch 2.14 on.
    if any([not (e > 0 or (e == 0 and not batch)) for e, batch in zip(eps, batch_stats, strict=True)]):  # noqa: C419  # compiled
        raise ValueError(f"{where}: the eps of a batch norm must be positive, got {min(eps)}")
    return Arguments(*groups, eps, batch_stats, activation, group, counts, backend)


def sync_group(norms: Sequence[nn.Module]) -> str:
    """The name of the process group that shares the norms' batch statistics; "" for this process alone."""
    synchronised = [norm for norm in norms if isinstance(norm, nn.SyncBatchNorm) and norm.training]
    return group_of(synchronised[0]) if synchronised else ""


def as_image(x: Tensor, conv: nn.Module) -> Tensor:
    """Signals [N, C, L] for a Conv1d as images of one row [N, C, 1, L]; other inputs as they are.

    Raises:
        ValueError: x is not a batch of signals.
    """
    if not isinstance(conv, nn.Conv1d):
        return x
    if x.dim() != 3:
        raise ValueError(f"input must be 3-D [N, {conv.in_channels}, L], got shape {tuple(x.shape)}")
    return x.unsqueeze(2)


def hooked(module: nn.Module) -> bool:
    """Whether a hook may write into the module's output, or rely on the memory layout of what it sees.

    That is what the module reads and returns, and the gradients of both. FSDP's hooks do neither.
    """
    groups = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    for hook in [hook for hooks in groups for hook in hooks.values()]:
        function = getattr(hook, "func", hook)  # unwraps a functools.partial
        if not str(getattr(function, "__module__", "")).startswith("torch.distributed."):
            return True
    return False


def _has_forward_hook(module: nn.Module) -> bool:
    return any([len(inner._forward_hooks) > 0 for inner in module.modules()])  # noqa: C419  # compiled


def _takes_channels_last(x: Any, convs: Sequence[nn.Module]) -> bool:
    """Whether contiguous images may be converted to channels_last memory in front of these modules.

    They have to be plain convolutions on a CPU: from such images, PyTorch's compute the same in less time,
    and write channels_last memory. Images that need a gradient get one in their own memory format.
    """
    if not convs or not isinstance(x, Tensor) or input_reason(x) is not None or x.dim() not in (4, 5):
        return False
    if x.device.type != "cpu" or not x.is_contiguous() or ops.is_channels_last(x) or x.requires_grad:
        return False
    for conv in convs:
        if type(conv) not in (nn.Conv2d, nn.Conv3d) or interference(conv) is not None:
            return False
        weight = constant(conv, "weight")
        # From a weight in channels_last memory, the convolution writes it anyway.
        if not isinstance(weight, Tensor) or not vouched(weight):
            return False
        if not weight.is_contiguous() or weight.stride(1) == 1:
            return False
    return True


def _folds_stem(x: Any, norm: nn.Module) -> bool:
    """Whether the compiler runs a stem better: it folds a frozen norm into the convolution in front."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and packing.wanted([norm])


def own_memory(x: Tensor) -> Tensor:
    """``x`` for code that may write into it: a copy if a backward will read x itself."""
    return x.clone() if x.requires_grad else x


def contiguous_in_eager(x: Tensor) -> bool:
    """Whether eager's results for x are contiguous; else they are in channels_last memory.

    What matters is the order of x's strides: a slice of channels_last images counts as channels_last.
    """
    return x.is_contiguous() or suggest_memory_format(x) is torch.contiguous_format


def finished(part: Any, out: Tensor, x: Tensor) -> Tensor:
    """What a call of a part with the input x returns, given what the fused operator has computed."""
    if part.returns_copy or hooked(part):
        contiguous = contiguous_in_eager(x)
        return out.clone(memory_format=torch.contiguous_format if contiguous else torch.preserve_format)
    return out


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would convolve x, or None if it leaves x unchanged."""
    if x.dtype == torch.float64 or not ops.autocast_enabled(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _weights_dtype(x: Tensor, backend: str) -> torch.dtype:
    """The dtype of a block's weights: autocast's where the backend's products round x to it, else x's.

    A transition always takes x's. It rounds after its pool, where eager's roundings have been averaged out.
    """
    dtype = autocast_dtype(x)
    if dtype in (None, x.dtype) or not ops.takes_weights(x.device.type, x.dtype, dtype, backend):
        return x.dtype
    return dtype


def _autocast_pools_in_float32(x: Tensor) -> bool:
    """Whether autocast is on and computes pools of x in float32, as it does for volumes on a CPU."""
    return x.dim() == 5 and x.device.type == "cpu" and autocast_dtype(x) is not None


def _as_autocast_concatenates(x: Tensor) -> Tensor:
    """``x`` in the dtype that eager's concatenation with autocast features has: the wider of the two."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(torch.promote_types(x.dtype, dtype))


def run_dense_block(
    x: Tensor,
    norms: Sequence[Any],
    convs: Sequence[Any],
    recompute: str,
    backend: str,
    *,
    drop_rates: Sequence[float],
    drops_channels: bool = False,
    activation: str = "relu",
    reorder: Callable[[Arguments], Arguments] | None = None,
    update: Callable[[Tensor, Sequence[int], Any], None] | None = None,
) -> tuple[Tensor, ops.Carried]:
    """Run the operator of a dense block, and update its norms' running statistics.

    Args:
        x: [N, c0, H, W].
        norms, convs: the norms and convolutions of all layers in the order they run, one or two per layer.
        recompute, backend: as for :class:`DenseBlock`.
        drop_rates: the dropout probability after each convolution of a layer; 0 in eval mode.
        drops_channels: whether dropout drops whole channels of an image.
        activation: what follows each norm, as :func:`dense_ext.activations.activation` takes it.
        reorder: changes the operator's arguments before it runs.
        update: called instead of updating the norms, with the batch statistics, the index of each norm's
            first channel in them, and the number of values per channel.

    Returns:
        X [N, Ct, H, W], and the block's information about X for a transition.
    """
    check_input("dense block", x, norms[0], isinstance(convs[0], nn.Conv3d))
    per_layer = len(drop_rates)
    plain = per_layer == 2 and activation == "relu" and not any(drop_rates) and reorder is None
    if plain and packing.wanted(norms) and (out := _run_packed(x, norms, convs, backend)) is not None:
        return out, ops.NOTHING_CARRIED
    x = _as_autocast_concatenates(x)
    args = read_arguments("dense block", x, norms, convs, backend, activation, _weights_dtype(x, backend))
    if reorder is not None:
        args = reorder(args)
    seeds = torch.randint(2**63 - 1, (len(norms),), device="cpu") if any(drop_rates) else None
    # Without a backward there is no reason to keep z.
    recompute = recompute if torch.is_grad_enabled() else "bottleneck"
    options = BlockOptions(
        per_layer, convs[-1].dilation[0], seeds, list(drop_rates), drops_channels, recompute
    )
    out, stats, _ = ops.CALLS["dense_block"](x, *args, *options)
    bottlenecks = [weight.shape[0] for weight in args.conv_weights[::2]] if per_layer == 2 else []
    starts = norm_starts(out.shape[1], bottlenecks, len(norms) // per_layer)
    if update is None:
        update_running_stats(norms, stats, starts, _count(x, args))
    else:
        update(stats, starts, _count(x, args))
    of_x = any(args.batch_stats[::per_layer])  # whether X's statistics were computed
    known = stats[:, : out.shape[1]] if of_x else None
    return out, ops.Carried(known, args.group, ops.block_node(out))


def _run_packed(x: Tensor, norms: Sequence[Any], convs: Sequence[Any], backend: str) -> Tensor | None:
    """A frozen block's X, computed with packed weights; None if they are not for this call."""
    last = convs[1]
    if not ops.packs("frozen_blocks", x.device.type, x.dtype, backend):
        return None
    if (tuple(last.kernel_size), tuple(last.dilation)) != ((3, 3), (1, 1)):
        return None
    packed = _packed("dense block", x, norms, convs, backend, torch.ops.dense_ext.pack_dense_block)
    if packed is None:
        return None
    widths, growth = [[len(constant(conv, "weight")) for conv in convs[i::2]] for i in (0, 1)]
    return torch.ops.dense_ext.packed_dense_block(x, packed, widths, growth)


def _run_packed_transition(x: Tensor, norm: Any, conv: Any, backend: str) -> Tensor | None:
    """A frozen transition's output, computed with packed weights; None if they are not for this call."""
    if not ops.packs("frozen_transitions", x.device.type, x.dtype, backend):
        return None
    packed = _packed("transition", x, [norm], [conv], backend, torch.ops.dense_ext.pack_transition)
    if packed is None:
        return None
    return torch.ops.dense_ext.packed_transition(x, packed, len(constant(conv, "weight")))


def _packed(
    where: str,
    x: Tensor,
    norms: Sequence[Any],
    convs: Sequence[Any],
    backend: str,
    pack: Callable[..., Tensor],
) -> Tensor | None:
    """A frozen part's weights, packed anew by ``pack`` if they changed; None if not for this call."""
    # The dtype to compute in. An input that is wider than autocast's is rare: it runs unpacked.
    dtype = autocast_dtype(x) or constant(convs[0], "weight").dtype
    if x.dim() != 4 or x.dtype != dtype or constant(convs[0], "bias") is not None:
        return None
    # A graph packs them itself, from its constants.
    keeps = not torch.compiler.is_compiling()
    if keeps and (found := packing.find(norms, convs, dtype)) is not None:
        return found
    watched = packing.watch(norms, convs, dtype) if keeps else None
    args = read_arguments(where, x, norms, convs, backend)
    if any(args.batch_stats) or args.conv_biases:
        return None
    packed = pack(*args)
    if keeps:
        packing.keep(norms, watched, packed)
    return packed


def _count(x: Tensor, args: Arguments) -> Any:
    """The number of values per channel from which batch statistics were computed."""
    return values_per_channel(x) if args.counts is None else args.counts.sum()


def run_transition(
    input: Tensor,
    norm: Any,
    conv: Any,
    backend: str,
    carried: ops.Carried,
    *,
    pool: str = "average",
    drop_rate: float = 0.0,
    drops_channels: bool = False,
    activation: str = "relu",
    shows_activation: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the operator of a transition, and update its norm's running statistics.

    Args:
        input: [N, C, H, W].
        norm, conv: the transition's norm and convolution.
        backend: as for :class:`DenseBlock`.
        carried: the information about ``input`` from the block, if one has just made it.
        pool: "average" or "max".
        drop_rate: the dropout probability between convolution and pool; 0 in eval mode.
        drops_channels, activation: as for :func:`run_dense_block`.
        shows_activation: whether to return what the convolution reads too.

    Returns:
        [N, K, H//2, W//2], and the activation [N, C, H, W] or None.
    """
    volumes = isinstance(conv, nn.Conv3d)
    window = [1, 2] if isinstance(conv, nn.Conv1d) else [2, 2, 2] if volumes else [2, 2]
    check_input("transition", input, norm, volumes, window)
    plain = pool == "average" and activation == "relu" and not (drop_rate or shows_activation)
    if plain and window == [2, 2] and packing.wanted([norm]):
        out = _run_packed_transition(input, norm, conv, backend)
        if out is not None:
            return out, None
    x = _as_autocast_concatenates(input)
    args = read_arguments("transition", x, [norm], [conv], backend, activation)
    seed = torch.randint(2**63 - 1, (), device="cpu") if drop_rate else None
    options = TransitionOptions(pool, window, seed, drop_rate, drops_channels, None)
    if x is not input or carried.group != args.group:
        carried = ops.NOTHING_CARRIED
    y, stats = ops.run_transition(x, args, options, carried)
    shown = ops.run_activation(x, args, stats, carried) if shows_activation else None
    update_running_stats([norm], stats, [0], _count(x, args))
    return y.float() if _autocast_pools_in_float32(y) else y.to(autocast_dtype(y) or y.dtype), shown


def run_stem(
    x: Tensor, norm: Any, volumes: bool, backend: str, *, shows_activation: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run the operator of a stem, and update its norm's running statistics.

    Args:
        x: [N, C, H, W], or [N, C, D, H, W] for volumes.
        norm: the stem's norm.
        volumes: whether x is for volumes.
        backend: as for :class:`DenseBlock`.
        shows_activation: whether to return what the pool reads too.

    Returns:
        [N, C, (H-1)//2 + 1, (W-1)//2 + 1], and the activation [N, C, H, W] or None.
    """
    check_input("stem", x, norm, volumes)
    args = read_arguments("stem", x, [norm], [], backend)
    y, stats = ops.CALLS["stem"](x, *args)
    shown = ops.run_activation(x, args, stats, ops.NOTHING_CARRIED) if shows_activation else None
    update_running_stats([norm], stats, [0], _count(x, args))
    return y.float() if _autocast_pools_in_float32(y) else y, shown


def runs_fused(module: Any, part: type[Fused], x: Tensor) -> bool:
    """Whether a call of a module would do nothing but run the fused operator of such a part."""
    kind: Any = type(module)
    # A user's subclass may have a forward of its own.
    fused = isinstance(module, part) and kind.forward is kind.fused_forward
    return fused and interference(module, module.original) is None and module.why_not_fused(x) is None


def _relies_on_layout(module: nn.Module) -> bool:
    """Whether a module has its own code or hooks, or draws random numbers, which fill memory in its order."""
    draws = isinstance(module, (nn.Dropout, nn.AlphaDropout))
    return draws or has_hooks(module) or not type(module).__module__.startswith("torch.nn.")


def may_need_layout(child: nn.Module, x: Tensor) -> bool:
    """Whether a module that reads ``x`` may make views of x, write to it or rely on its memory layout.

    What made a part run its original forward may do so.
    """
    if isinstance(child, Fused):
        # With a hook of its own, its result and its gradients have the layout of its input.
        return hooked(child) or child.why_not_fused(x) is not None
    return any([_relies_on_layout(module) for module in child.modules()])  # noqa: C419  # compiled


class DenseLayer(nn.Module):
    """One dense layer, run eagerly: BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution, dropout.

    Inside a :class:`DenseBlock`, the block's fused operator uses the layer's parameters, and the layer's own
    forward does not run.

    Args:
        num_input_features: C, the number of channels that the layer reads.
        growth_rate: K, the number of channels that it adds.
        bn_size: the bottleneck has ``bn_size * growth_rate`` channels. None makes a layer without a
            bottleneck: BN, ReLU, 3x3 convolution, dropout.
        drop_rate: the probability of dropping an output element in training.

    Shapes: a tensor [N, C, H, W] or a list of tensors with C channels in all -> [N, K, H, W].
    Source: arXiv 1608.06993, section 3; parameter names as in torchvision.
    """

    __constants__: ClassVar = ["has_bottleneck"]

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int | None = 4, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        inner = growth_rate if bn_size is None else bn_size * growth_rate
        self.has_bottleneck = bn_size is not None
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        if bn_size is None:
            self.conv1 = nn.Conv2d(num_input_features, growth_rate, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(num_input_features, inner, kernel_size=1, bias=False)
            self.norm2 = nn.BatchNorm2d(inner)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(inner, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    def forward(self, input: Tensor) -> Tensor:
        if not is_scripting() and isinstance(input, list):
            input = torch.cat(input, 1)
        x = self.conv1(self.relu1(self.norm1(input)))
        if self.has_bottleneck:
            x = self.conv2(self.relu2(self.norm2(x)))
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


class EagerDenseBlock(nn.ModuleDict):
    """Dense layers run one by one, each on the concatenation of all features before it.

    A fused block computes the same.
    """

    _version = 2

    def forward(self, init_features: Tensor) -> Tensor:
        features = init_features
        for layer in self.values():
            features = torch.cat([features, layer(features)], 1)
        return features


class FusedDenseBlock(Fused):
    """Mixin that runs a module's children, which are dense layers, as one operator.

    Each child has norm1, conv1 (1x1), norm2, conv2 (3x3), or only norm1 and conv1 (3x3); for dropout it also
    has a ``drop_rate``. The attributes ``recompute`` and ``backend`` may be changed at any time.
    """

    parts: ClassVar = {
        "norm1": nn.BatchNorm2d, "relu1": nn.ReLU, "conv1": nn.Conv2d,
        "norm2": nn.BatchNorm2d, "relu2": nn.ReLU, "conv2": nn.Conv2d,
    }  # fmt: skip
    layer_type: ClassVar[type[nn.Module]] = DenseLayer
    recompute: str

    @staticmethod
    def inner(layer: Any) -> dict[str, Any]:
        """A layer's modules by the names in ``parts``."""
        return layer._modules

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        children, names, layers = module._modules, list(cls.parts), {}
        if not children:
            return "it has no layers"
        for name, layer in children.items():
            if type(layer) is not cls.layer_type:
                return "{} is {}, not {}".format(name, *names_of(type(layer), cls.layer_type))
            if (reason := interference(layer)) is not None:
                return f"{name} {reason}"
            layers[name] = inner = cls.inner(layer)
            if reason := cls.reason(inner, names if "conv2" in inner else names[: len(names) // 2]):
                return f"{name}: {reason}"
        rates = {getattr(layer, "drop_rate", 0.0) for layer in children.values()}
        if len(rates) > 1:
            return "its layers have different drop rates"
        if any(rates) and len({layer.training for layer in children.values()}) > 1:
            return "some layers apply dropout and some do not"
        return layers_reason([
            [(f"{name}: {part}", module) for part, module in inner.items() if part[:4] in ("norm", "conv")]
            for name, inner in layers.items()
        ])  # fmt: skip

    def forward(self, init_features: Tensor) -> Tensor:
        if not is_scripting():
            return self.run_or_fall_back(init_features)
        return self.original_forward(init_features)

    fused_forward = forward

    def run_or_fall_back(self, x: Tensor) -> Tensor:
        """The block's output, from the fused operator or the original's forward."""
        if self.why_eager(x) is not None:
            return self.run_original(x)
        return finished(self, self.run(x)[0], x)

    def run(self, init_features: Tensor) -> tuple[Tensor, ops.Carried]:
        """Run the fused operator: returns X [N, Ct, H, W], and the block's information about X."""
        first, *_ = self._modules.values()
        inner = [self.inner(layer) for layer in self._modules.values()]
        names = ("1", "2") if "conv2" in inner[0] else ("1",)
        norms = [modules["norm" + i] for modules in inner for i in names]
        convs = [modules["conv" + i] for modules in inner for i in names]
        drop_rate = getattr(first, "drop_rate", 0.0) if first.training else 0.0
        drop_rates = [0.0] * (len(names) - 1) + [drop_rate]
        return run_dense_block(
            init_features, norms, convs, self.recompute, self.backend, drop_rates=drop_rates
        )


class DenseBlock(FusedDenseBlock, EagerDenseBlock):
    """A dense block as one fused operator over one preallocated buffer.

    Args:
        num_layers: L, the number of layers.
        num_input_features: c0, the number of channels of the input.
        growth_rate: K, the number of channels that each layer adds.
        bn_size: the bottleneck's channels as a multiple of K; None for layers without a bottleneck.
        drop_rate: the dropout probability after each layer in training.
        recompute: what backward recomputes. ``"none"`` keeps every activation it needs; ``"bottleneck"``
            recomputes the bottlenecks and keeps only the output buffer; ``"block"`` recomputes the whole
            block and keeps only its input.
        backend: a name from :func:`dense_ext.available_backends`, or ``"auto"``.

    Shapes: [N, c0, H, W] -> [N, c0 + L*K, H, W] in channels_last memory.

    Raises:
        ValueError: recompute or backend is unknown, num_layers is below 1, or drop_rate is outside [0, 1].
            In forward: the input has another rank, number of channels or device, an empty height or width,
            or, in training, one value per channel.
        TypeError: in forward, the input is not floating or not of the parameters' dtype.
        RuntimeError: in forward, the requested backend cannot run here.

    Source: arXiv 1608.06993, section 3; memory after arXiv 1707.06990.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        *,
        recompute: str = "bottleneck",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(recompute, backend)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate must be a probability, got {drop_rate}")
        self.recompute, self.backend = recompute, backend
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                num_input_features + i * growth_rate, growth_rate, bn_size, drop_rate
            )


class FusedTransition(Fused):
    """Mixin that runs a module's norm, relu, conv (1x1) and pool (2x2 average) as one operator."""

    parts: ClassVar = {"norm": nn.BatchNorm2d, "relu": nn.ReLU, "conv": nn.Conv2d, "pool": nn.AvgPool2d}

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return cls.reason(module._modules, cls.parts)

    def forward(self, input: Tensor) -> Tensor:
        if not is_scripting():
            return self.run_or_fall_back(input)
        return self.original_forward(input)

    fused_forward = forward

    def run_or_fall_back(self, x: Tensor) -> Tensor:
        """The transition's output, from the fused operator or the original's forward."""
        return finished(self, self.run(x), x) if self.why_eager(x) is None else self.run_original(x)

    def run(self, input: Tensor, carried: ops.Carried = ops.NOTHING_CARRIED) -> Tensor:
        """Run the fused operator. ``carried`` comes from the block, if one has just made ``input``."""
        norm, conv = self._modules["norm"], self._modules["conv"]
        return run_transition(input, norm, conv, self.backend, carried)[0]


class Transition(FusedTransition, nn.Sequential):
    """BN, ReLU, 1x1 convolution and 2x2 average pool between two dense blocks, as one fused operator.

    The pool runs before the convolution: the two commute, and pooling first takes a quarter of the work.

    Args:
        num_input_features: C, the number of channels of the input.
        num_output_features: K, the number of channels of the output.
        backend: a name from :func:`dense_ext.available_backends`, or ``"auto"``.

    Shapes: [N, C, H, W] -> [N, K, H//2, W//2] in channels_last memory.

    Raises: as :class:`DenseBlock`; also ValueError in forward if height or width is below 2.
    """

    def __init__(self, num_input_features: int, num_output_features: int, *, backend: str = "auto") -> None:
        super().__init__()
        check_options("none", backend)
        self.backend = backend
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


class FusedFeatures(Fused, nn.Sequential):
    """A DenseNet's ``features``: a Sequential that also runs the stem as one fused operator.

    The stem is a norm, a ReLU and a max pool in a row. The children stay unchanged, so calling them one by
    one, as an encoder does, returns the intermediate results. Inside, activations are in channels_last
    memory. For contiguous images the features returned are contiguous, as in eager PyTorch.
    """

    parts: ClassVar = {"norm0": nn.BatchNorm2d, "relu0": nn.ReLU, "pool0": nn.MaxPool2d}
    backend = "auto"

    @classmethod
    def stem(cls, features: nn.Module) -> slice:
        """The indices of the children that form the stem, which ends with the first max pool."""
        for i, child in enumerate(features._modules.values()):
            if isinstance(child, (nn.MaxPool2d, nn.MaxPool3d)) and i + 1 >= len(cls.parts):
                return slice(i + 1 - len(cls.parts), i + 1)
        return slice(0, 0)

    @classmethod
    def has_stem(cls, features: nn.Module) -> bool:
        """Whether the children include a stem."""
        return cls.stem(features).stop > 0

    def runs_stem(self) -> bool:
        """Whether there is a stem that could be fused when the network was swapped or built."""
        return self.part_name is not None and self.has_stem(self)

    @classmethod
    def inspected(cls, module: Any) -> list[Any]:
        return list(module._modules.values())[cls.stem(module)]

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        stem = cls.inspected(module)
        if not stem:
            return "it has no norm, ReLU and max pool in a row"
        return cls.reason(dict(zip(cls.parts, stem, strict=True)), cls.parts)

    def __getitem__(self, idx: Any) -> Any:
        found: Any = super().__getitem__(idx)
        if isinstance(idx, slice):
            found.backend = self.backend
        return found

    def forward(self, input: Tensor) -> Tensor:
        if not is_scripting():
            return self.run_or_fall_back(input)
        return self.original_forward(input)

    def run_or_fall_back(self, x: Tensor) -> Tensor:
        """The features. The stem, each block and each transition run fused if the gate allows it."""
        if mode_reason() is not None or self.original.forward is not type(self).known_forward:
            return self.run_original(x)
        children, stem = list(self._modules.values()), self.stem(self)
        fused = [i for i, child in enumerate(children) if isinstance(child, Fused)]
        first = min([*range(stem.start, stem.stop), *fused], default=0)
        behind = max([stem.stop, *[i + 1 for i in fused]])
        watched = any([_has_forward_hook(child) for child in children[behind:]])  # noqa: C419  # compiled
        contiguous: bool | None = None  # whether the first fused part's input is contiguous in eager
        if _takes_channels_last(x, children[:first]):
            # So that the first fused part gets channels_last memory: converting the images costs less.
            x, contiguous = ops.dense_channels_last(x), True
        carried: ops.Carried | None = None  # set while x is a block's X that nothing else has received
        i = 0
        while i < len(children):
            child = children[i]
            if 0 < i == behind and isinstance(x, Tensor) and x.dim() in (4, 5):
                before = x
                if contiguous and (watched or not ops.is_dense(x)):
                    # So that the last norm's output, which hooks may see, shares memory with the features.
                    x = x.contiguous()
                elif not ops.is_dense(x):
                    x = ops.dense_channels_last(x)
                carried = carried if x is before else None
            if contiguous is None and (isinstance(child, Fused) or i == stem.start < stem.stop):
                # As in eager, only an input in channels_last memory gives features in channels_last memory.
                contiguous = isinstance(x, Tensor) and (x.is_contiguous() or not ops.is_dense(x))
            if i == stem.start < stem.stop and not _folds_stem(x, child) and self.why_not_fused(x) is None:
                volumes = isinstance(children[stem.stop - 1], nn.MaxPool3d)
                (x, _), i = run_stem(x, child, volumes, self.backend), stem.stop
                continue
            if carried is not None and runs_fused(child, FusedTransition, x):
                x, carried = child.run(x, carried), None
            else:
                before, whole = x, runs_fused(child, FusedDenseBlock, x)
                if contiguous and not whole and isinstance(x, Tensor) and may_need_layout(child, x):
                    x = x.contiguous()
                if carried is not None and x is before and not self._only_reads(child):
                    x = own_memory(x)
                carried = None
                if whole:
                    x, carried = child.run(x)
                else:
                    x = child(x if isinstance(child, Fused) else readable(x, child))
            i += 1
        if carried is not None:
            x = own_memory(x)
        return x.contiguous() if contiguous and isinstance(x, Tensor) else x

    @classmethod
    def _only_reads(cls, child: nn.Module) -> bool:
        """Whether a child is known not to write into its input."""
        norms = (nn.BatchNorm2d, nn.BatchNorm3d, cls.parts["norm0"])
        return type(child) in norms and interference(child) is None
