"""The machine, and the versions of the software on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .backends.cpu import instruction_set
from .version import __version__

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
    """The git commit dense_ext runs from, with "+" if its files differ from it; None if not a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpuinfo(key: str) -> list[str]:
    """What the system says of each core."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def machine() -> dict[str, Any]:
    """CPU, cores, threads, memory in bytes, and the GPU if there is one."""
    clocks = [float(megahertz) * 1e6 for megahertz in _cpuinfo("cpu MHz")]
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": next(iter(_cpuinfo("model name")), platform.processor() or platform.machine()),
        "cpu_capability": instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg()[0],
        "clocks": {"cpu_hertz": sum(clocks) / len(clocks) if clocks else None},  # of the cores, now
        "gpu": None,
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
    return found
