"""Follows a training step's memory through forward and backward.

This mirrors :mod:`dense_ext.schedule`, :mod:`dense_ext.transition` and :mod:`dense_ext.ops`. It holds the
same buffers, in the same order and for the same time, but only their sizes. As in autograd, each part's
forward puts a backward on a tape. That backward takes the gradient of the part's output and returns that of
its input. The letters are the schedule's: M pixels, C channels read, K growth rate, B bottleneck channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from ..backends.base import Backend, accumulate_dtype
from .network import BlockShape, Network, TransitionShape
from .timeline import Held, Timeline

# The purposes for which memory is held, in the order of a report.
PARTS = (
    "parameters", "gradients", "optimizer state", "input", "stem", "concat buffers", "kept bottlenecks",
    "transitions", "head", "gradient buffers", "statistics", "weight copies", "new gradients", "scratch",
)  # fmt: skip

# The number of values that an optimizer keeps for each trainable parameter.
OPTIMIZERS = {"none": 0, "sgd": 0, "momentum": 1, "adamw": 2}

Backward = Callable[[Held], Held]


@dataclass(frozen=True)
class Setting:
    """The setting in which a step runs.

    Args:
        network: the model's shape.
        dtype: the dtype in which convolutions compute. If the parameters are wider, autocast narrows them.
        optimizer: a key of ``OPTIMIZERS``.
        device: the type of the device that runs the step.
        backends: the backend that runs each primitive, by the primitive's name.
        channels_last: whether the images or the first convolution's weight are in channels_last memory.
    """

    network: Network
    dtype: torch.dtype
    optimizer: str
    device: str
    backends: Mapping[str, Backend]
    channels_last: bool

    @property
    def autocast(self) -> bool:
        return self.network.parameter_dtype.itemsize > self.dtype.itemsize

    @property
    def pools_in_float32(self) -> bool:
        """Whether autocast computes pools in float32, as it does for volumes on a CPU."""
        return self.autocast and self.network.dimensions == 3 and self.device == "cpu"

    def weight_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a block's convolution weights beside activations of ``dtype``."""
        takes = self.backends["bn_relu_conv1x1_forward"].takes_weights(dtype, self.dtype)
        return self.dtype if takes else dtype

    @property
    def converts_images(self) -> bool:
        """Whether images are copied to channels_last memory in front of the first convolution."""
        return self.device == "cpu" and not self.channels_last

    @property
    def stem_is_channels_last(self) -> bool:
        """Whether the first convolution writes channels_last memory."""
        return self.channels_last or self.converts_images


class Block:
    """A dense block between its forward and its backward."""

    def __init__(self, step: Step, shape: BlockShape, policy: str, x: Held) -> None:
        self.step, self.shape, self.policy = step, shape, policy
        self.sizes, self.pixels, self.dtype = step.sizes, step.pixels, step.dtype
        self.weights = step.setting.weight_dtype(self.dtype)
        t = step.timeline
        self.out = self.buffer()
        stats = 2 * (shape.out_channels + shape.layers * shape.bottleneck)
        copies = step.weight_copy(shape.conv_weights, self.weights)
        self.saved = [copies, t.hold("statistics", stats * step.wide)]
        if policy == "none":
            z = self.pixels * shape.bottleneck * self.dtype.itemsize
            self.saved.append(t.hold("kept bottlenecks", shape.layers * z))
        self.run_forward(policy == "none")
        self.saved.append(t.keep(x if policy == "block" else self.out))
        self.recomputed: Held | None = None

    def buffer(self) -> Held:
        """Hold the memory for X."""
        elements = self.pixels * self.shape.out_channels
        return self.step.timeline.hold("concat buffers", elements * self.dtype.itemsize)

    def bottleneck(self, buffers: int) -> AbstractContextManager[None]:
        """A context in which this many buffers [N, H, W, B] are held."""
        return self.step.scratch(buffers * self.pixels * self.shape.bottleneck, self.dtype)

    def dropout(self, buffers: int) -> AbstractContextManager[None]:
        """A context in which this many buffers [N, H, W, K] are held, if the layers have dropout."""
        elements = buffers * self.pixels * self.shape.growth_rate if self.shape.drops else 0
        return self.step.scratch(elements, self.dtype)

    def primitive(self, name: str, in_channels: int, out_channels: int) -> None:
        """Call a primitive on the block's pixels."""
        self.step.primitive(name, self.sizes, in_channels, out_channels, self.dtype)

    def run_forward(self, keeps_bottleneck: bool) -> None:
        shape = self.shape
        b, k = shape.bottleneck, shape.growth_rate
        with self.bottleneck(0 if keeps_bottleneck else 1):
            for c in shape.read_channels:
                if b:
                    self.primitive("bn_relu_conv1x1_forward", c, b)
                self.primitive("bn_relu_conv3x3_forward", b or c, k)
                with self.dropout(1):
                    pass  # the mask

    def output(self) -> Held:
        """X for a backward: the kept one, or one that the first caller recomputes for all."""
        if self.policy != "block":
            return self.out
        if self.recomputed is None:
            self.recomputed = self.buffer()
            self.run_forward(keeps_bottleneck=False)
        return self.recomputed

    def backward(self, grad: Held) -> Held:
        """The block's backward; it accumulates in place into ``grad``, which is G."""
        t, shape, step = self.step.timeline, self.shape, self.step
        x = self.output()
        new = step.new_gradients(shape.conv_weights, 2 * shape.norm_channels, self.weights)
        with self.bottleneck(1 if self.policy == "none" else 2):
            for c in reversed(shape.read_channels):
                self.layer_backward(c)
            nbytes = self.pixels * shape.in_channels * self.dtype.itemsize
            grad_x = t.hold("gradient buffers", nbytes)
            self.primitive("affine_gradient", shape.in_channels, shape.in_channels)
        if self.policy == "block":
            t.release(x)
        t.release(grad, *self.saved)
        step.accumulate(new, shape.conv_weights, self.weights)
        return grad_x

    def layer_backward(self, c: int) -> None:
        k, b = self.shape.growth_rate, self.shape.bottleneck
        if b and self.policy != "none":
            self.primitive("bn_relu_conv1x1_forward", c, b)
        # Without a bottleneck, the gradient at the norm's output.
        with self.step.scratch(0 if b else self.pixels * c, self.dtype):
            with self.dropout(2):
                pass  # the mask, and the convolution's gradient
            with self.dropout(1):  # the convolution's gradient
                self.primitive("bn_relu_conv3x3_backward", b or c, k)
            if not b:
                self.primitive("scaled_accumulate", c, c)
        if b:
            self.primitive("bn_relu_conv1x1_backward", c, b)


class Step:
    """One training step on images [N, C, H, W] or volumes [N, C, D, H, W]; :meth:`run` follows it.

    Args:
        setting: the setting in which the step runs.
        input_shape: the shape of the images or volumes.
        policies: the recompute policy of each block, in order.
    """

    def __init__(self, setting: Setting, input_shape: Sequence[int], policies: Sequence[str]) -> None:
        self.setting, self.network = setting, setting.network
        self.policies = dict(zip((b.name for b in setting.network.blocks), policies, strict=True))
        self.batch, _, *self.sides = input_shape
        self.timeline = Timeline()
        self.dtype = setting.dtype  # of the activations at the current point of the forward
        self.wide = accumulate_dtype(setting.dtype).itemsize  # of statistics and sums
        self.tape: list[tuple[str, Backward]] = []
        self.block_pixels: dict[str, int] = {}  # M of each block, once it has run

    @property
    def sizes(self) -> tuple[int, ...]:
        """[N, H, W] or [N, D, H, W] at the current point of the forward."""
        return (self.batch, *self.sides)

    @property
    def pixels(self) -> int:
        """M at the current point of the forward."""
        return math.prod(self.sizes)

    def resize(self, sides: Sequence[int]) -> None:
        """Continue with images of another size.

        Raises:
            ValueError: the images would be empty.
        """
        if min(sides) < 1:
            raise ValueError(
                f"the images are too small for the network: {self.timeline.point} needs larger ones"
            )
        self.sides = list(sides)

    def run(self) -> Timeline:
        """Follow the step from its images to the optimizer's update.

        Gradients are held throughout the step, as they are if they are zeroed or accumulated in place.
        """
        t, network = self.timeline, self.network
        t.hold("parameters", network.parameter_bytes + network.buffer_bytes)
        t.hold("gradients", network.trainable_bytes)
        t.hold("optimizer state", OPTIMIZERS[self.setting.optimizer] * network.trainable_bytes)
        t.hold("input", self.pixels * network.in_channels * network.parameter_dtype.itemsize)
        self.forward()
        grad = t.hold("head", 0)  # of the loss
        for name, backward in reversed(self.tape):
            t.point = f"backward, {name}"
            grad = backward(grad)
        if self.setting.optimizer != "none":
            # By default PyTorch updates all parameters at once on a GPU, with one temporary for each
            # parameter. Elsewhere it updates one after another, with two temporaries at a time.
            t.point = "optimizer step"
            at_once = self.setting.device == "cuda"
            t.need("scratch", network.trainable_bytes if at_once else 2 * network.largest_bytes)
        return t

    def forward(self) -> None:
        t = self.timeline
        t.point = "forward, stem"
        x = self.convolution()
        if self.network.pools:
            x = self.pool(x)
        block = None
        for shape in self.network.parts:
            t.point = f"forward, {shape.name}"
            if isinstance(shape, BlockShape):
                self.block_pixels[shape.name] = self.pixels
                block = Block(self, shape, self.policies[shape.name], x)
                self.tape.append((shape.name, block.backward))
                y = block.out
            else:
                y = self.transition(shape, x, block)
            t.release(x)  # frees x unless a backward keeps it
            x = y
        t.point = "forward, head"
        self.head(x)

    # --- used by all parts --------------------------------------------------------------------

    @contextmanager
    def scratch(self, elements: int, dtype: torch.dtype) -> Iterator[None]:
        """A context in which scratch memory for this many elements of ``dtype`` is held."""
        held = self.timeline.hold("scratch", elements * dtype.itemsize)
        yield
        self.timeline.release(held)

    def primitive(
        self, name: str, sizes: tuple[int, ...], in_channels: int, out_channels: int, dtype: torch.dtype
    ) -> None:
        """Call a primitive on activations of ``dtype``: count the scratch memory of its backend."""
        backend = self.setting.backends[name]
        nbytes = backend.scratch_bytes(name, sizes, in_channels, out_channels, dtype)
        self.timeline.need("scratch", nbytes)

    def narrows(self, weights: torch.dtype) -> bool:
        """Whether autocast casts parameters to this dtype."""
        return weights.itemsize < self.network.parameter_dtype.itemsize

    def weight_copy(self, elements: int, dtype: torch.dtype) -> Held:
        """Hold the copies of weights that autocast makes in ``dtype``."""
        return self.timeline.hold("weight copies", elements * dtype.itemsize if self.narrows(dtype) else 0)

    def new_gradients(self, convs: int, norms: int, weights: torch.dtype) -> Held:
        """Hold a part's parameter gradients until they are added to the step's.

        Args:
            convs, norms: their elements.
            weights: the dtype in which the convolutions take their weights.
        """
        norms *= self.network.parameter_dtype.itemsize
        return self.timeline.hold("new gradients", convs * weights.itemsize + norms)

    def accumulate(self, new: Held, convs: int, weights: torch.dtype) -> None:
        """Add a part's gradients to the step's; under autocast they are widened, at most all at once."""
        if self.narrows(weights):
            self.timeline.need("new gradients", convs * self.network.parameter_dtype.itemsize)
        self.timeline.release(new)

    def pooled(self, part: str, y: Held, elements: int) -> Held:
        """A pool's output y: itself, or a copy in float32 where autocast pools in it."""
        if not self.setting.pools_in_float32 or self.dtype == torch.float32:
            return y
        t, dtype = self.timeline, self.dtype
        self.dtype = torch.float32
        wide = t.hold(part, elements * self.dtype.itemsize)
        t.release(y)

        def backward(grad: Held) -> Held:
            narrow = t.hold("gradient buffers", elements * dtype.itemsize)
            t.release(grad)
            return narrow

        self.tape.append((t.point.removeprefix("forward, "), backward))
        return wide

    # --- stem, transition, head ---------------------------------------------------------------

    def convolution(self) -> Held:
        """The first convolution."""
        t, network, dtype = self.timeline, self.network, self.dtype
        elements = self.pixels * network.in_channels
        copied = self.setting.autocast or self.setting.converts_images
        saved = [t.hold("stem", elements * dtype.itemsize if copied else 0)]
        reach = 2 * network.padding - network.kernel_size
        self.resize([(n + reach) // network.stride + 1 for n in self.sides])
        elements = self.pixels * network.channels
        weights = network.in_channels * network.channels * network.kernel_size**network.dimensions
        saved.append(self.weight_copy(weights, dtype))

        def backward(grad: Held) -> Held:
            new = self.new_gradients(weights, 0, dtype)
            if not self.setting.stem_is_channels_last:
                t.need("scratch", elements * dtype.itemsize)  # the gradient in the images' format
            t.release(grad, *saved)
            self.accumulate(new, weights, dtype)
            return t.hold("stem", 0)  # the images need no gradient

        self.tape.append(("stem", backward))
        return t.hold("stem", elements * dtype.itemsize)

    def pool(self, x: Held) -> Held:
        """The stem's norm, ReLU and max pool."""
        t, channels, dtype = self.timeline, self.network.channels, self.dtype
        sizes, pixels = self.sizes, self.pixels
        statistics = t.hold("statistics", 2 * channels * self.wide)
        # The operator works in channels_last memory, on a copy if the convolution wrote contiguous memory.
        copy = 0 if self.setting.stem_is_channels_last else pixels * channels
        self.resize([(n - 1) // 2 + 1 for n in self.sides])
        elements = self.pixels * channels
        y = t.hold("stem", elements * dtype.itemsize)
        with self.scratch(copy, dtype):
            self.primitive("channel_stats", sizes, channels, channels, dtype)
            self.primitive("bn_relu_maxpool_forward", sizes, channels, channels, dtype)

        def backward(grad: Held) -> Held:
            with self.scratch(copy, dtype):
                grad_x = t.hold("gradient buffers", pixels * channels * dtype.itemsize)
                self.primitive("bn_relu_maxpool_backward", sizes, channels, channels, dtype)
                self.primitive("affine_gradient", sizes, channels, channels, dtype)
            t.release(grad, x, statistics)
            return grad_x

        self.tape.append(("stem", backward))
        return self.pooled("stem", y, elements)

    def transition(self, shape: TransitionShape, x: Held, block: Block | None) -> Held:
        """A transition after ``block``. It does not save its input if the block keeps only its own input."""
        t, c, k, dtype = self.timeline, shape.in_channels, shape.out_channels, self.dtype
        sizes, pixels = self.sizes, self.pixels
        self.resize([n // 2 for n in self.sides])
        saved = [self.weight_copy(c * k, dtype)]
        elements = self.pixels * k
        y = t.hold("transitions", elements * dtype.itemsize)
        saved.append(t.hold("statistics", 2 * c * self.wide))
        self.primitive("channel_stats", sizes, c, c, dtype)
        self.primitive("bn_relu_pool_conv1x1_forward", sizes, c, k, dtype)
        if block is None or block.policy != "block":
            saved.append(t.keep(x))

        def backward(grad: Held) -> Held:
            if block is not None:
                block.output()
            grad_x = t.hold("gradient buffers", pixels * c * dtype.itemsize)
            new = self.new_gradients(c * k, 2 * c, dtype)
            self.primitive("bn_relu_pool_conv1x1_backward", sizes, c, k, dtype)
            self.primitive("affine_gradient", sizes, c, c, dtype)
            t.release(grad, *saved)
            self.accumulate(new, c * k, dtype)
            return grad_x

        self.tape.append((shape.name, backward))
        return self.pooled("transitions", y, elements)

    def head(self, x: Held) -> None:
        """Norm, ReLU in place, average pool, classifier and loss, all with PyTorch's own operators."""
        t, channels = self.timeline, self.network.blocks[-1].out_channels
        nbytes = self.pixels * channels * self.dtype.itemsize
        activation = t.hold("head", nbytes)
        features = sum(k for _, k in self.network.head)
        weights = sum(c * k for c, k in self.network.head)
        dtype = self.setting.dtype  # in which the classifier computes
        vector = t.hold("head", self.batch * channels * self.dtype.itemsize)  # the pooled features
        copies = self.weight_copy(weights, dtype)
        t.hold("head", self.batch * features * dtype.itemsize)  # the logits, which the caller keeps
        # Autocast computes the loss in float32.
        loss_bytes = self.batch * features * (self.wide if self.setting.autocast else dtype.itemsize)
        probabilities = t.hold("head", loss_bytes)

        def backward(grad: Held) -> Held:
            of_probabilities = t.hold("head", loss_bytes)
            of_logits = t.hold("head", loss_bytes)
            t.release(grad, of_probabilities, probabilities)
            new = self.new_gradients(weights, features, dtype)
            t.release(of_logits, vector, copies)
            self.accumulate(new, weights, dtype)
            pooled = t.hold("head", nbytes)
            masked = t.hold("head", nbytes)
            t.release(pooled, activation)
            grad_x = t.hold("gradient buffers", nbytes)
            t.release(masked, x)
            return grad_x

        self.tape.append(("head", backward))
