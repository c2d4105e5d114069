"""Runs compiled kernels under the compiler's sanitizers: every primitive's cases and sizes, and a network.

A sanitizer ends the process at the first error, so it gets its own process.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import dense_ext
from dense_ext.backends.base import Backend

from .backends import put_in_place
from .compiling import COMPILER, ROOT
from .primitives import test_batch_norm
from .primitives.common import ConvolutionTests, MakeCase, VolumeTests
from .primitives.groups import GROUPS
from .primitives.harness import ALIGNED, GUARD, Maker, check_values

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sanitizer:
    """One of the compiler's sanitizers.

    Attributes:
        flags: the compiler flags to build a library with it.
        runtime: the libraries that the process must load before all others.
        options: the environment variables for these libraries.
    """

    flags: tuple[str, ...]
    runtime: tuple[str, ...]
    options: dict[str, str]

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a module that loads a library built with this sanitizer."""
        environment = {**os.environ, **self.options, "LD_PRELOAD": " ".join(map(_found, self.runtime))}
        return subprocess.run(
            [sys.executable, "-m", program, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=_fix_addresses,
        )

    def is_here(self) -> bool:
        """Whether there is a compiler with this sanitizer."""
        return shutil.which(COMPILER) is not None and all(
            os.path.isabs(_found(name)) for name in self.runtime
        )


# Undefined behaviour ends the program with a message and a location, like an invalid access.
ADDRESS = Sanitizer(
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    ("libasan.so", "libstdc++.so"),
    {
        # Python does not free all memory at exit; fibers have no fake stacks.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
)
# No report is suppressed. PyTorch and Python are not built with the sanitizer, so their calls into the C
# library are not checked.
THREAD = Sanitizer(
    ("-fsanitize=thread",),
    ("libtsan.so",),
    {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
)


def _found(library: str) -> str:
    """The path of the compiler's library of this name, or the bare name if it has none."""
    return subprocess.check_output([COMPILER, f"-print-file-name={library}"], text=True).strip()


def _fix_addresses() -> None:
    """Disable the randomisation of addresses, with which ThreadSanitizer may fail to start."""
    no_randomness = 0x0040000  # ADDR_NO_RANDOMIZE
    ctypes.CDLL(None).personality(no_randomness)


def run_cases(
    backend: Backend, dtypes: Sequence[torch.dtype], primitives: str = "", guard: int = GUARD
) -> None:
    """Run the cases of the primitives whose names begin with this prefix.

    They have small sizes and unaligned slices with a ``guard``, and one size with several tiles. Dtypes whose
    tensors and operands have equal widths have equal addresses, so they take the cases in turn.
    """
    volumes = [group for group in GROUPS if backend.takes_volumes and issubclass(group, VolumeTests)]
    cases: list[tuple[MakeCase, Any, int]] = [
        *((case, size, guard) for group in GROUPS for case in group.cases for size in group.sizes),
        *((case, size, guard) for group in volumes for case in group.cases for size in group.volumes),
        *((case, group.large, ALIGNED) for group in GROUPS for case in group.cases),
        *((case, size, 0) for case in test_batch_norm.CASES for size in test_batch_norm.CHANNELS),
    ]
    widths: dict[tuple[int, bool], list[torch.dtype]] = {}
    for dtype in dtypes:
        widths.setdefault((dtype.itemsize, backend.rounds_operands(dtype)), []).append(dtype)

    def check(make: MakeCase, maker: Maker, size: Any) -> None:
        case = make(maker, size)
        if case.primitive.startswith(primitives):
            print(case.primitive, maker.dtype, maker.weights or "", size, flush=True)
            check_values(backend, case)

    for types in widths.values():
        for n, (make, size, around) in enumerate(cases):
            torch.backends.cudnn.allow_tf32 = around == ALIGNED  # tests both ways of multiplying float32
            check(make, Maker(types[n % len(types)], CPU, guard=around), size)
    if torch.bfloat16 in dtypes and backend.takes_weights(torch.float32, torch.bfloat16):
        convolutions = [group for group in GROUPS if issubclass(group, ConvolutionTests)]
        mixed = [(case, s) for group in convolutions for case in group.cases for s in group.sizes_of_mixed()]
        for make, size in mixed:
            check(make, Maker(torch.float32, CPU, guard=guard, weights=torch.bfloat16), size)


def train_a_network(backend: Backend, dtype: torch.dtype) -> None:
    """Run two steps of a whole swapped DenseNet with ``recompute="block"``."""
    from .helpers import small_densenet  # imported late, since it imports torchvision

    put_in_place(backend)
    model = dense_ext.swap(small_densenet(growth_rate=6).to(dtype), recompute="block", backend=backend.name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        print("a training step", flush=True)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 33, 32, dtype=dtype)).float().square().sum().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())


def assert_passed(ran: subprocess.CompletedProcess[str]) -> None:
    """Assert that a run of all cases and the network found no error."""
    assert ran.returncode == 0, f"after {ran.stdout.splitlines()[-1:]}:\n{ran.stderr}"
    assert ran.stdout.splitlines()[-1:] == ["a training step"], ran.stderr
