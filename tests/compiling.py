"""Compiles csrc for tests, with the tests' own options, into build/; only changed files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
STABLE_HEADERS = ROOT / "tests" / "stable.h"
COMPILER = os.environ.get("CXX", "g++")
# The same as setup.py's, for every source that uses the stable ABI.
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# -Og compiles twice as fast as -O2, and most of what tests compile runs for a moment.
FLAGS = (
    "-std=c++20",
    "-Og",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-ftrivial-auto-var-init=pattern",  # makes the use of uninitialised registers visible
)


def compiler_with(flags: Sequence[str]) -> list[str]:
    """The compiler's command line: these flags and those that it always gets."""
    return [COMPILER, *FLAGS, *flags]


def compile_source(
    source: Path,
    command: Sequence[str],
    namespace: str,
    folders: Sequence[Path],
    results: Path,
) -> Path:
    """Compile a source; returns the object file. Its name is a hash of its inputs, so that builds share it.

    Its inputs are the source and the headers that it includes, not those beside it: a source that does not
    read the header in which a test plants a fault is not compiled again.

    Args:
        source: a C++ file.
        command: the compiler with its options.
        namespace: the namespace of the ops, for a source that registers some.
        folders: the include folders, besides PyTorch's.
        results: the folder for object files.
    """
    options = list(command)
    if b"DENSE_EXT_NAMESPACE" in source.read_bytes():
        options.append(f"-DDENSE_EXT_NAMESPACE={namespace}")
    including = [f"-I{folder}" for folder in (TORCH / "include", *folders)]
    if b"torch/csrc/stable/library.h" in source.read_bytes():
        including += ["-include", str(_precompiled(command, results))]
    target = results / f"{source.stem}-{_key(options, _with_headers(source, folders))}.o"
    _make(target, [*options, *including, "-x", "c++", "-c", str(source)])
    return target


def _precompiled(command: Sequence[str], results: Path) -> Path:
    """PyTorch's stable headers, compiled with these options: they take a second of every source otherwise.

    Returns what to include. The compiler reads the file of that name that ends in ``.gch`` in its place.
    """
    header = results / f"stable-{_key(command, [STABLE_HEADERS])}.h"
    _make(
        header.with_suffix(".h.gch"),
        [*command, f"-I{TORCH / 'include'}", "-x", "c++-header", str(STABLE_HEADERS)],
    )
    return header


def _key(options: Sequence[str], paths: Sequence[Path]) -> str:
    """A hash of a compiler's inputs."""
    key = hashlib.sha256(" ".join((*options, torch.__version__)).encode())
    for path in paths:
        key.update(path.read_bytes())
    return key.hexdigest()[:16]


def _with_headers(source: Path, folders: Sequence[Path]) -> list[Path]:
    """A source and the headers that it includes by a name in quotes, whatever the conditions around them."""
    found = [source]
    for path in found:  # which grows
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            places = (folder / name for folder in (path.parent, *folders))
            header = next((place.resolve() for place in places if place.exists()), None)
            if header is None:
                raise LookupError(f"{path.name} includes {name}, which is in none of the folders")
            if header not in found:
                found.append(header)
    return found


def link(name: str, objects: Sequence[Path], command: Sequence[str], results: Path) -> Path:
    """Link these objects into a library of this name, in its own folder."""
    files = [str(path) for path in objects]
    folder = results / hashlib.sha256(" ".join(files).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    libraries = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    _make(folder / name, [*command, "-shared", *files, *libraries])
    return folder / name


def _make(target: Path, command: list[str]) -> None:
    """Run the compiler unless its result exists; other processes that want it wait."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")  # so that an interruption leaves no broken result
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(target)


def plant(folder: Path, file: str, text: str, replacement: str) -> Path:
    """A copy of csrc in which a text that occurs once in a file is replaced by another."""
    shutil.copytree(CSRC, folder)
    path = folder / file
    source = path.read_text()
    if source.count(text) != 1:  # not an AssertionError, which a fault raises too
        raise LookupError(f"{file} has changed: plant the fault anew")
    path.write_text(source.replace(text, replacement))
    return folder


def leave_out_dtypes(header: Path, *names: str) -> None:
    """Leave types of scalars out of the header of a copy of csrc that chooses one: each takes as long."""
    others = rf"    case ScalarType::({'|'.join(names)}):\n      return body\(.*\);\n"
    source, left_out = re.subn(others, "", header.read_text())
    if left_out != len(names):
        raise LookupError(f"{header.name} has changed: leave dtypes out anew")
    header.write_text(source)
