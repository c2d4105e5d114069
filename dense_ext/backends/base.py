"""The interface of a backend: the primitives of the dense-block schedule, and where it can run them.

Every primitive of every backend follows these conventions:

* Activations are NHWC *views* ``[N, H, W, C]`` with unit stride along C. The pixel stride may be
  larger than C (a slice of a wider concatenation buffer). H and W are dense: the strides are
  ``(H*W*s, W*s, s, 1)`` with ``s >= C``. M = N*H*W is the number of pixels. Some backends also take
  volumes ``[N, D, H, W, C]``; elsewhere :mod:`dense_ext.backends.general` runs them.
* Convolution weights and their gradients have PyTorch's shape ``[out, in, kh, kw]``, any strides,
  and the activations' dtype. A layer's may also have one that :meth:`Backend.takes_weights` allows.
* Per-channel vectors (``mean``, ``var``, ``scale``, ``shift``, ``weight``, ``bias``, ``u``, ``v``,
  ``sums``) are dense along channels and in the accumulation dtype: float64 for float64
  activations, else float32. ``var`` is the biased variance.
* A primitive writes into the tensors it is given, allocates only scratch memory, and returns nothing.
  Outputs never overlap inputs unless the docstring says so. Statistics are taken from the values as
  *stored*, that is, after rounding to the activations' dtype.
* Reductions run in a fixed order without atomics, so equal inputs give equal bits.

``u`` and ``v`` defer part of batch norm's backward as an affine function of x; see
:mod:`dense_ext.batch_norm` for the algebra.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

STORAGE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of channel sums and per-channel vectors for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gpu_unavailable_reason(device: int | None) -> str | None:
    """Why tensor-core kernels can't run on GPU ``device``, or None if they can.

    ``device`` None means the current GPU.
    """
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return "needs compute capability 8.0, this GPU has {}.{}".format(*capability)
    return None


def tf32_allowed(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` activations may use tf32, by PyTorch's setting for convolutions."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return dtype == torch.float32 and convolutions.fp32_precision == "tf32"


class FrozenBlocks(NamedTuple):
    """A dense block of bottlenecks whose norms all use their running statistics, in one call.

    The bits are those of :meth:`Backend.bn_scale_shift`, :meth:`Backend.bn_relu_conv1x1_forward` and
    :meth:`Backend.bn_relu_conv3x3_forward`, layer by layer.

    Attributes:
        forward: ``forward(x, in_channels, *parameters)`` writes the layers' channels of x [N, H, W, Ct]. Its
            first ``in_channels`` hold the block's input. The parameters are, for each norm in the order they
            run, its mean, variance, weight and bias [C] and its eps; and for each layer the weights
            [B, C, 1, 1] and [K, B, 3, 3]. Each is a list.
        pack: ``pack(packed, in_channels, *parameters)`` writes them into a vector in the accumulation dtype,
            in the order in which forward reads them.
        forward_packed: ``forward_packed(x, packed, widths, growth)`` returns X [N, Ct, H, W] in channels_last
            memory, from x [N, c0, H, W] and what ``pack`` wrote. The last two are B and K of each layer.
        packed_size: ``packed_size(shapes, dtype)`` is the vector's length, for convolutions [out, in, kh, kw]
            of these shapes and activations of ``dtype``.
    """

    forward: Callable[..., None]
    pack: Callable[..., None]
    forward_packed: Callable[..., Tensor]
    packed_size: Callable[[Sequence[Sequence[int]], torch.dtype], int]


class FrozenTransitions(NamedTuple):
    """A transition whose norm uses its running statistics, with packed weights.

    The bits are those of :meth:`Backend.bn_scale_shift` and :meth:`Backend.bn_relu_pool_conv1x1_forward`.

    Attributes:
        pack: ``pack(packed, mean, var, weight, bias, eps, conv)`` writes the norm's vectors [C] and the
            weight [K, C, 1, 1] into a vector, as for :class:`FrozenBlocks`.
        forward_packed: ``forward_packed(x, packed, out_channels)`` returns [N, K, H//2, W//2] in
            channels_last memory, from x [N, C, H, W].
        packed_size: as for :class:`FrozenBlocks`.
    """

    pack: Callable[..., None]
    forward_packed: Callable[..., Tensor]
    packed_size: Callable[[Sequence[Sequence[int]], torch.dtype], int]


class PlainBlocks(NamedTuple):
    """A dense block of plain bottleneck layers in one call, which saves most of the host's time for it.

    The bits are those of the primitives, called as :mod:`dense_ext.schedule` calls them.

    Attributes:
        forward: ``forward(x, z, stats, *parameters)`` writes the layers' channels of X [N, H, W, Ct], whose
            first c0 hold the block's input. It writes each layer's z, one after another, unless ``z`` is
            empty, and the batch statistics [2, Ct + L*B] that the norms use.
        backward: ``backward(grad, x, z, stats, grad_x, needs_conv_grad, *parameters)`` writes the gradient of
            the block's input [N, H, W, c0] and overwrites ``grad`` [N, H, W, Ct], which is G. It returns a
            list: the gradients of the norms' weights, those of their biases, and those of the convolutions
            that need one.

        The parameters are c0; each norm's weight and bias [C], its eps and whether it is frozen; the running
        mean and variance of the frozen norms; and each layer's weights [B, C, 1, 1] and [K, B, 3, 3]. All but
        the first are lists, in the order in which the layers run.
    """

    forward: Callable[..., None]
    backward: Callable[..., list[Tensor]]


class Backend(ABC):
    """One implementation of the primitives. Calls leave no state in the instance."""

    name: ClassVar[str]
    # Whether the primitives also take volumes, with 3x3x3 convolutions, 2x2x2 average pools and 3x3x3 maxima.
    takes_volumes: ClassVar[bool] = False
    # The largest M that one call may have.
    max_pixels: ClassVar[float] = math.inf
    # A frozen dense block in one call, if the backend has it.
    frozen_blocks: FrozenBlocks | None = None
    # The same of a transition.
    frozen_transitions: FrozenTransitions | None = None
    # A plain dense block in one call, if the backend has it.
    plain_blocks: PlainBlocks | None = None

    @abstractmethod
    def unavailable_reason(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why ``primitive`` can't run on tensors of ``dtype`` on ``device``, or None if it can."""

    def rounds_operands(self, dtype: torch.dtype) -> bool:
        """Whether matrix products take both factors rounded to ``dtype``, that of the activations.

        Otherwise they take them in the accumulation dtype. Sums are in the accumulation dtype either way.
        """
        return False

    def takes_weights(self, dtype: torch.dtype, weights: torch.dtype) -> bool:
        """Whether a layer's convolutions may have weights of another dtype than its activations, ``dtype``.

        If the two differ, products take both factors rounded to ``weights``, as under autocast.
        """
        return weights == dtype

    def scratch_bytes(
        self,
        primitive: str,
        sizes: Sequence[int],
        in_channels: int,
        out_channels: int,
        dtype: torch.dtype,
    ) -> int:
        """The peak bytes of scratch memory that a call of ``primitive`` takes from PyTorch's allocator.

        :mod:`dense_ext.memory` adds them to its plan. The default is none.

        Args:
            primitive: one of ``PRIMITIVES``.
            sizes: [N, H, W] or [N, D, H, W] of the tensor that the primitive normalises: x, or z for the 3x3
                convolution.
            in_channels: the channels of that tensor.
            out_channels: the channels that the primitive's forward writes.
            dtype: the activations' dtype.
        """
        return 0

    # --- per-channel vectors -------------------------------------------------------------

    @abstractmethod
    def channel_stats(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """``mean[c], var[c]`` = mean and biased variance of ``x[..., c]`` over the M pixels.

        Shapes: x [N, H, W, C]; mean, var [C] (written).
        """

    @abstractmethod
    def bn_scale_shift(
        self,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: Tensor,
        shift: Tensor,
    ) -> None:
        """``scale = weight / sqrt(var + eps)``, ``shift = bias - mean * scale``; all [C]."""

    @abstractmethod
    def bn_gradient(
        self,
        sums: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        eps: float,
        count: int,
        grad_weight: Tensor,
        grad_bias: Tensor,
        u: Tensor | None,
        v: Tensor | None,
    ) -> None:
        """Finish a batch norm's backward from its channel sums.

        ``sums[0] = sum g`` and ``sums[1] = sum g * (x - mean)``, where ``g`` is the gradient at the
        norm's output. Writes ``grad_bias = sums[0]`` and ``grad_weight = sums[1] * invstd``. The batch
        statistics contribute ``u*x + v`` to the gradient of x; this call *adds* its share to ``u`` and
        ``v`` (``count`` = M). They are None if the norm used running statistics: then the term is zero.

        Shapes: sums [2, C]; everything else [C].
        """

    # --- gradients without a convolution ---------------------------------------------------

    @abstractmethod
    def affine_gradient(self, grad: Tensor, x: Tensor, u: Tensor, v: Tensor, out: Tensor) -> None:
        """``out = grad + u*x + v``; grad, x, out [N, H, W, C]; ``out`` may be ``grad`` itself."""

    @abstractmethod
    def scaled_accumulate(self, grad: Tensor, scale: Tensor, out: Tensor) -> None:
        """``out += scale * grad``; grad, out [N, H, W, C]; scale [C]."""

    # --- the dense layer -----------------------------------------------------------------

    @abstractmethod
    def bn_relu_conv1x1_forward(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        z: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> None:
        """``z = relu(scale*x + shift) @ weight^T``; also z's channel statistics unless mean is None.

        Shapes: x [N, H, W, C]; weight [B, C, 1, 1]; z [N, H, W, B] (written); mean, var [B].
        """

    @abstractmethod
    def bn_relu_conv1x1_backward(
        self,
        grad_bn: Tensor,
        z: Tensor,
        z_scale: Tensor,
        z_u: Tensor,
        z_v: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        grad_x: Tensor,
        sums: Tensor,
        grad_weight: Tensor | None,
    ) -> None:
        """Backward of :meth:`bn_relu_conv1x1_forward`, accumulating into ``grad_x``.

        ``dz = z_scale*grad_bn + z_u*z + z_v`` is formed on the fly, where ``grad_bn`` is the gradient
        at the output of the norm that follows z. Then ``g = (dz @ weight) * (scale*x + shift > 0)``,
        ``grad_x += scale * g``, ``sums = [sum g, sum g*(x - mean)]`` and
        ``grad_weight = dz^T @ relu(scale*x + shift)`` unless None. ``grad_bn`` may be overwritten.

        Shapes: grad_bn, z [N, H, W, B]; z_* [B]; x, grad_x [N, H, W, C]; mean, scale, shift [C];
        weight, grad_weight [B, C, 1, 1]; sums [2, C] (written).
        """

    @abstractmethod
    def bn_relu_conv3x3_forward(
        self,
        z: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        y: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> None:
        """``y = conv3x3(relu(scale*z + shift), weight)``; the activation is padded with zeros.

        Also writes y's channel statistics unless mean is None.
        Shapes: z [N, H, W, B]; weight [K, B, 3, 3]; y [N, H, W, K] (written); mean, var [K].
        """

    @abstractmethod
    def bn_relu_conv3x3_backward(
        self,
        grad: Tensor,
        y: Tensor,
        u: Tensor,
        v: Tensor,
        z: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        grad_bn: Tensor,
        sums: Tensor,
        grad_weight: Tensor | None,
    ) -> None:
        """Backward of :meth:`bn_relu_conv3x3_forward`.

        ``dy = grad + u*y + v`` is formed on the fly. Then
        ``grad_bn = conv3x3^T(dy, weight) * (scale*z + shift > 0)`` (written),
        ``sums = [sum grad_bn, sum grad_bn*(z - mean)]`` and ``grad_weight`` unless None. ``grad`` may be
        overwritten.

        Shapes: grad, y [N, H, W, K]; u, v [K]; z, grad_bn [N, H, W, B]; mean, scale, shift [B];
        weight, grad_weight [K, B, 3, 3]; sums [2, B] (written).
        """

    # --- transition and stem -------------------------------------------------------------

    @abstractmethod
    def bn_relu_pool_conv1x1_forward(
        self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, y: Tensor
    ) -> None:
        """``y = avg_pool2x2(relu(scale*x + shift)) @ weight^T``.

        The pool and the 1x1 convolution commute; pooling first takes a quarter of the work. The last
        row or column of an odd size is ignored, as in ``nn.AvgPool2d(2)``.
        Shapes: x [N, H, W, C]; weight [K, C, 1, 1]; y [N, H//2, W//2, K] (written).
        """

    @abstractmethod
    def bn_relu_pool_conv1x1_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        grad_x: Tensor,
        sums: Tensor,
        grad_weight: Tensor | None,
    ) -> None:
        """Backward of :meth:`bn_relu_pool_conv1x1_forward`.

        ``g`` is the gradient at the norm's output. Writes ``grad_x = scale * g`` for every pixel, also
        those that no pooling window covers, ``sums = [sum g, sum g*(x - mean)]`` and ``grad_weight``
        unless None.
        Shapes: grad [N, H//2, W//2, K]; x, grad_x [N, H, W, C]; sums [2, C] (written).
        """

    @abstractmethod
    def bn_relu_maxpool_forward(self, x: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
        """The stem: ``y = max_pool(relu(scale*x + shift))`` with window 3, stride 2, padding 1.

        Shapes: x [N, H, W, C]; y [N, (H-1)//2 + 1, (W-1)//2 + 1, C] (written).
        """

    @abstractmethod
    def bn_relu_maxpool_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        grad_x: Tensor,
        sums: Tensor,
    ) -> None:
        """Backward of :meth:`bn_relu_maxpool_forward`; it finds each window's maximum again.

        Among equal maxima the first in row-major order takes the gradient, as in PyTorch. ``g`` is the
        gradient at the norm's output. Writes ``grad_x = scale * g`` and
        ``sums = [sum g, sum g*(x - mean)]``.
        Shapes: grad [N, (H-1)//2 + 1, (W-1)//2 + 1, C]; x, grad_x [N, H, W, C]; sums [2, C].
        """

    # --- backward through a batch norm that used the batch's statistics -------------------------

    def bn_relu_pool_conv1x1_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        norm_weight: Tensor,
        eps: float,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        grad_x: Tensor,
        grad_norm_weight: Tensor,
        grad_norm_bias: Tensor,
        grad_weight: Tensor | None,
    ) -> None:
        """:meth:`bn_relu_pool_conv1x1_backward`, :meth:`bn_gradient` and adding ``u*x + v``, in one call.

        Writes the gradients of x, of the norm's weight and bias [C], and of ``weight`` unless None.
        """
        sums = x.new_empty(2, x.shape[-1], dtype=mean.dtype)
        self.bn_relu_pool_conv1x1_backward(grad, x, mean, scale, shift, weight, grad_x, sums, grad_weight)
        self._finish(sums, x, mean, var, norm_weight, eps, grad_x, grad_norm_weight, grad_norm_bias)

    def bn_relu_maxpool_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        norm_weight: Tensor,
        eps: float,
        scale: Tensor,
        shift: Tensor,
        grad_x: Tensor,
        grad_norm_weight: Tensor,
        grad_norm_bias: Tensor,
    ) -> None:
        """:meth:`bn_relu_maxpool_backward`, :meth:`bn_gradient` and adding ``u*x + v``, in one call.

        Writes the gradients of x and of the norm's weight and bias [C].
        """
        sums = x.new_empty(2, x.shape[-1], dtype=mean.dtype)
        self.bn_relu_maxpool_backward(grad, x, mean, scale, shift, grad_x, sums)
        self._finish(sums, x, mean, var, norm_weight, eps, grad_x, grad_norm_weight, grad_norm_bias)

    def _finish(
        self,
        sums: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        norm_weight: Tensor,
        eps: float,
        grad_x: Tensor,
        grad_norm_weight: Tensor,
        grad_norm_bias: Tensor,
    ) -> None:
        u, v = x.new_zeros(2, x.shape[-1], dtype=mean.dtype)
        count = x.numel() // x.shape[-1]
        self.bn_gradient(sums, mean, var, norm_weight, eps, count, grad_norm_weight, grad_norm_bias, u, v)
        self.affine_gradient(grad_x, x, u, v, grad_x)
