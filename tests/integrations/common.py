"""Shared by the tests of other tools: a small network, and recording which operators run."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.densenet import DenseNet

import dense_ext

from ..helpers import randomize, twin

ROOT = Path(__file__).resolve().parent.parent.parent

# The error allowed in float32, relative to the largest value. It is the unit roundoff times the longest sums
# of the ten consecutive operators of `tiny_densenet` (3 * 49 for conv0, at most 8 * 9 for others), for both
# programs.
FLOAT32 = 2 * 2**-24 * (3 * 49 + 9 * 8 * 9)

# The parts of `tiny_densenet`, each called once.
FUSED = Counter({"stem": 1, "dense_block": 2, "transition": 1})
UNFUSED: Counter[str] = Counter()


def tiny_densenet(layers: int = 2) -> nn.Module:
    """A torchvision DenseNet of two blocks in float64."""
    return randomize(DenseNet(4, (layers, layers), 8, 2, 0.0, num_classes=3)).double()


def swapped_and_eager(layers: int = 2) -> tuple[nn.Module, nn.Module]:
    """Two equal networks in eval mode, of which the first is swapped."""
    return twin(tiny_densenet(layers).eval(), dense_ext.swap)


def images(n: int = 2) -> Tensor:
    """Images in float64."""
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


class FusedCalls(TorchDispatchMode):
    """Counts the calls of fused forward operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        # Once per process a block of one pixel runs, to calibrate the counts of an exclusive gradient.
        if func.namespace == "dense_ext" and "backward" not in str(func) and args[0].numel() > 1:
            self.counts[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def fused_calls(function: Callable[[], object]) -> Counter[str]:
    """The fused operators that run during a call, with their numbers."""
    with FusedCalls() as mode:
        function()
    return mode.counts


def in_graph(nodes: Iterable[Any]) -> Counter[str]:
    """The fused operators in a graph, with their numbers."""
    targets = [str(node.target) for node in nodes if node.op == "call_function"]
    return Counter(t.split(".")[1] for t in targets if t.startswith("dense_ext."))


@contextlib.contextmanager
def says_unfused(*parts: str) -> Iterator[None]:
    """Assert that exactly these parts warn that they run their original forward."""
    with pytest.warns(UserWarning, match="runs its original forward") as caught:
        yield
    said = [re.match(r"dense_ext: (\S+) runs its original forward", str(w.message)) for w in caught]
    assert sorted(match.group(1) for match in said if match) == sorted(parts)


# The first lines of a program, which make importing dense_ext fail.
_WITHOUT = "import sys; sys.modules['dense_ext'] = None\n"


def run_elsewhere(program: str, *arguments: object, without_dense_ext: bool = True) -> None:
    """Run a program in its own process, by default in one that can't import dense_ext."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    text = (_WITHOUT if without_dense_ext else "") + program
    command = [sys.executable, "-c", text, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
