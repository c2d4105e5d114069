"""Which modules a fused call stands for, and whether they are now what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
# Of a plain convolution, by its class and size: stride 1, same size, one group.
_PLAIN = {
    (kind, size): ((size,) * d, (1,) * d, (size // 2,) * d, (1,) * d, 1, "zeros")
    for kind, d in ((nn.Conv2d, 2), (nn.Conv3d, 3))
    for size in (1, 3)
}
_AVERAGE = {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False, "divisor_override": None}
_MAXIMUM = {
    "kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False,
}  # fmt: skip
_POOLS: dict[type[nn.Module], dict[str, Any]] = {
    nn.AvgPool2d: _AVERAGE, nn.AvgPool3d: _AVERAGE, nn.MaxPool2d: _MAXIMUM, nn.MaxPool3d: _MAXIMUM,
}  # fmt: skip
# What stands for the classes of `Fused.parts` in a network for volumes.
_OF_VOLUMES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: nn.BatchNorm3d, nn.Conv2d: nn.Conv3d, nn.AvgPool2d: nn.AvgPool3d,
    nn.MaxPool2d: nn.MaxPool3d,
}  # fmt: skip
_VOLUMES = frozenset(_OF_VOLUMES.values())


class Fused:
    """A module, or a mixin for one, that stands for its inner modules where they are what it expects.

    They are looked at when a network is swapped and again at every call, since anybody may exchange
    them at any time.
    """

    # The inner modules' classes by name, in the order they run, for images; and those of a norm's own
    # children.
    parts: ClassVar[Mapping[str, type[nn.Module]]]
    parts_of_norm: ClassVar[Mapping[str, type[nn.Module]]] = {}
    backend: str
    _modules: dict[str, Any]

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Why a module's own forward has to run rather than the fused operator, or None."""
        raise NotImplementedError

    def unfusable(self) -> str | None:
        """Why the module's own forward has to run at present, or None."""
        return self.why_not(self)

    @classmethod
    def reason(cls, modules: Mapping[str, Any], names: Iterable[str]) -> str | None:
        """Why modules have to be called one by one, or None; ``names`` is how they are called, in order."""
        if list(modules) != list(names):
            return f"its children are {', '.join(modules) or 'none'}, expected {', '.join(names)}"
        of_three = "conv2" if "conv2" in modules else "conv1"
        parts = cls.parts
        if not _VOLUMES.isdisjoint([type(module) for module in modules.values()]):
            parts = {name: _OF_VOLUMES.get(part, part) for name, part in parts.items()}
        for name, module in modules.items():
            expected = parts[name]
            if type(module) is not expected:
                return f"{name} is {type(module).__name__}, not {expected.__name__}"
            if listened_to(module):
                return f"{name} {LISTENED_TO}"
            if expected in (nn.Conv2d, nn.Conv3d):
                wrong = _conv_reason(module, 3 if name == of_three else 1)
            elif expected in _POOLS:
                wrong = _pool_reason(module)
            else:
                wrong = cls._own_reason(module) if module._modules or cls.parts_of_norm else None
            if wrong:
                return f"{name} {wrong}"
        return None

    @classmethod
    def _own_reason(cls, module: nn.Module) -> str | None:
        """Of a norm's or activation's own children."""
        expected = cls.parts_of_norm if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)) else {}
        found = {name: type(child) for name, child in module._modules.items()}
        if found != expected:
            shown = (", ".join(f"{n} ({t.__name__})" for n, t in of.items()) for of in (found, expected))
            return "has {}, expected {}".format(*(text or "nothing inside" for text in shown))
        return next(
            (f"has {name} that {LISTENED_TO}" for name, m in module.named_children() if listened_to(m)), None
        )


LISTENED_TO = "carries a hook or a forward of its own, which a fused call would pass over"


def listened_to(module: nn.Module) -> bool:
    """Whether a call of ``module`` does something beside its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _conv_reason(conv: Any, size: int) -> str | None:
    """What is other than in a plain convolution without bias."""
    settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    plain = _PLAIN[type(conv), size]
    if settings != plain:
        pairs = zip(_CONV, settings, plain, strict=True)
        return next(f"has {name} {got}, expected {right}" for name, got, right in pairs if got != right)
    return None if conv._parameters.get("bias") is None else "has a bias, expected none"


def _pool_reason(pool: nn.Module) -> str | None:
    for name, right in _POOLS[type(pool)].items():
        got = getattr(pool, name)
        if got != right and not (isinstance(got, tuple) and set(got) == {right}):
            return f"has {name} {got}, expected {right}"
    return None
