"""Estimates the memory of a training step before it runs.

:func:`estimate` follows one step of dense_ext through its schedule. It returns the peak memory, the point in
the step where the peak occurs, and a breakdown. :class:`Planner` does so for any batch size and recompute
policies, and finds those that fit a budget. :class:`TrackedStep` is for networks that dense_ext does not run.
It uses PyTorch's memory tracker on fake tensors.
"""

from .plan import Estimate, Planner, estimate
from .search import largest
from .tracker import TrackedStep
from .units import device_memory, parse_bytes

__all__ = [
    "Estimate", "Planner", "TrackedStep", "device_memory", "estimate", "largest", "parse_bytes"
]  # fmt: skip
