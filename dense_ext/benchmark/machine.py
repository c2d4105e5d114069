"""What was measured on: the machine, its rates, and the versions of the software."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from .timing import best_seconds

_PACKAGES = ("torch", "torchvision", "timm", "monai", "triton", "numpy", "scikit-learn")


def versions() -> dict[str, str | None]:
    """Versions of dense_ext, Python and the packages it works with; None where not installed."""
    found: dict[str, str | None] = {"dense_ext": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """The git commit dense_ext runs from, with "+" if files differ from it; None if not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def _cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_hertz() -> float | None:
    """The mean of the cores' clocks at this moment, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    clocks = [float(line.partition(":")[2]) * 1e6 for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _gpu_clocks() -> dict[str, float | None]:
    """The first GPU's clocks at this moment and the most they may be; None where the driver is silent."""
    names = {"gpu_hertz": "clocks.sm", "gpu_memory_hertz": "clocks.mem", "gpu_max_hertz": "clocks.max.sm"}
    command = [
        "nvidia-smi",
        "-i",
        "0",
        f"--query-gpu={','.join(names.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        values: list[float | None] = [float(text) * 1e6 for text in printed.split(",")]
    except (OSError, ValueError, subprocess.CalledProcessError):
        values = [None] * len(names)
    return dict(zip(names, values, strict=True))


def machine() -> dict[str, Any]:
    """CPU, cores, threads, memory in bytes, and the GPU if there is one."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": pages,
        "load_average": os.getloadavg()[0],
        "clocks": {"cpu_hertz": _cpu_hertz()},
        "gpu": None,
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
        found["clocks"] |= _gpu_clocks()
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a square matrix product in operations per second, 2 per multiply-add.

    Of 1024x1024 matrices on a CPU, 8192x8192 on a GPU.
    """
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / best_seconds(lambda: torch.mm(a, b, out=out), device)


def copy_bandwidth(device: torch.device) -> float:
    """Best rate of copying 256 MiB (2 GiB on a GPU): bytes read plus bytes written, per second."""
    count = 2**29 if device.type == "cuda" else 2**26
    source = torch.zeros(count, device=device)
    target = torch.zeros(count, device=device)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)
