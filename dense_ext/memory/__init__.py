"""What a training step will need, before it runs.

:func:`estimate` follows one step of dense_ext through its schedule and says where its memory peaks and
what for; :class:`Planner` does so for any batch and policy, and finds what fits a budget.
:class:`TrackedStep` is for networks that dense_ext does not run: PyTorch's tracker on fake tensors.
"""

from .plan import Estimate, Planner, estimate
from .search import largest
from .tracker import TrackedStep
from .units import device_memory, parse_bytes

__all__ = [
    "Estimate", "Planner", "TrackedStep", "device_memory", "estimate", "largest", "parse_bytes"
]  # fmt: skip
