"""Compiles csrc for tests: what has changed, into build/, with options of their own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "g++")
# As setup.py's, for every source of the stable ABI.
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-ftrivial-auto-var-init=pattern",  # registers begin with a value that shows
)


def compiler_with(flags: Sequence[str]) -> list[str]:
    """The compiler with these flags beside those it always gets."""
    return [COMPILER, *FLAGS, *flags]


def compile_source(
    source: Path,
    command: Sequence[str],
    namespace: str,
    headers: Sequence[Path],
    folders: Sequence[Path],
    results: Path,
) -> Path:
    """The object file, whose name is of all that went into it, so that builds share what they can.

    Args:
        source: a C++ file.
        command: the compiler with its options.
        namespace: of the ops, for a source that has some.
        headers: those it may include.
        folders: where it finds them, beside PyTorch's.
        results: where object files go.
    """
    options = list(command)
    if b"DENSE_EXT_NAMESPACE" in source.read_bytes():
        options.append(f"-DDENSE_EXT_NAMESPACE={namespace}")
    key = hashlib.sha256(" ".join((*options, torch.__version__)).encode())
    for path in (*headers, source):
        key.update(path.read_bytes())
    target = results / f"{source.stem}-{key.hexdigest()[:16]}.o"
    including = [f"-I{folder}" for folder in (TORCH / "include", *folders)]
    _make(target, [*options, *including, "-x", "c++", "-c", str(source)])
    return target


def link(name: str, objects: Sequence[Path], command: Sequence[str], results: Path) -> Path:
    """The library of this name with these objects, in a folder of its own."""
    files = [str(path) for path in objects]
    folder = results / hashlib.sha256(" ".join(files).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    libraries = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    _make(folder / name, [*command, "-shared", *files, *libraries])
    return folder / name


def _make(target: Path, command: list[str]) -> None:
    """Run the compiler if its result is not there, so that an interrupted or parallel run does no harm."""
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(target)


def plant(folder: Path, file: str, text: str, replacement: str) -> Path:
    """A copy of csrc with a text of one of its files, where it occurs once, replaced by another."""
    shutil.copytree(CSRC, folder)
    path = folder / file
    source = path.read_text()
    if source.count(text) != 1:  # no AssertionError: that is what a fault raises
        raise LookupError(f"{file} has changed: plant the fault anew")
    path.write_text(source.replace(text, replacement))
    return folder
