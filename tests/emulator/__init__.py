"""Runs the CUDA backend on the host; see README.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dense_ext.backends.cuda import CUDABackend

from .build import NAMESPACE, build

# The maximum shared memory per block of each kind of GPU; the kernels' choices depend on it.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}


class Emulator:
    """The kernels compiled for the host, and the emulator's controls.

    Attributes:
        backend: the CUDA backend, for tensors on the CPU.
        settings: the settings for the next launches; see Settings in emulator.h.
    """

    def __init__(self, library: Path, namespace: str = NAMESPACE) -> None:
        # A process can load only one module of a name. Python derives the init function from the part after
        # the last dot.
        spec = importlib.util.spec_from_file_location(f"{namespace}._emulator", library)
        assert spec is not None
        assert spec.loader is not None
        self._module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)
        self.backend = CUDABackend(library, namespace, device_type="cpu")
        self.settings = self._module.settings()

    def reset(self, **settings: object) -> None:
        """Restore the default settings except those given by name, and set the counters to zero."""
        self._module.reset()
        for name, value in settings.items():
            setattr(self.settings, name, getattr(self._module.Order, value) if name == "order" else value)

    @property
    def counters(self) -> Any:
        """The counters since the last reset; see Counters in emulator.h."""
        return self._module.counters()


_running: Emulator | None = None


def emulator() -> Emulator:
    """The emulator of this process, which is built first if necessary."""
    global _running
    if _running is None:
        _running = Emulator(build(flags=("-O2",)))
    return _running
