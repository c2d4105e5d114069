"""Runs every primitive's cases, and a network, through a sanitized build of the CUDA kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dense_ext.backends.cuda import STORAGE_DTYPES

from ..emulator import Emulator
from ..emulator.build import build
from ..sanitizers import ADDRESS, run_cases, train_a_network


def run_sanitized(
    primitives: str = "", without: torch.dtype | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the cases of the primitives with this prefix of their name through a build with these options.

    A dtype that the build is ``without`` does not run.
    """
    namespace = options.setdefault("namespace", "dense_ext_sanitized")
    library = build(flags=ADDRESS.flags, **options)
    return ADDRESS.run(__name__, str(library), namespace, primitives, str(without))


def main(library: str, namespace: str, primitives: str, without: str = "") -> None:
    gpu = Emulator(Path(library), namespace)
    gpu.reset(multiprocessors=1)  # so that a block has several tiles
    dtypes = [dtype for dtype in STORAGE_DTYPES if str(dtype) != without]
    run_cases(gpu.backend, dtypes, primitives)
    if not primitives:
        train_a_network(gpu.backend, dtypes[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
