"""Test and measure on this machine's GPU, the most telling first: ``python benchmarks/gpu.py --out DIR``.

Needs the checkout, PyTorch with Triton, torchvision and pytest; nothing is installed or downloaded.
Where there is nvcc and Ninja, the CUDA kernels are compiled for this GPU first; else a library that is
there already serves. Every part runs in a process of its own with a time limit, logs to
``DIR/PART.log`` and keeps what it measured when the limit ends it. ``DIR/summary.txt`` says how each
part went.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ["none", "bottleneck", "block"]
OTHERS = "densenet169,densenet201,densenet161"
PEERS = [
    "eager-cl",
    "compile-cl",
    "memory-efficient-cl",
    "dense_ext-none-graph",
    "dense_ext-none-cuda-graph",
    "dense_ext-bottleneck-graph",
]

PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda"]
SUITE = ["benchmarks/gpu.py", "--suite"]
# The tests compile a few hundred variants of the kernels, each process its own: side by side.
PRIMITIVES = sorted(path for path in (ROOT / "tests" / "primitives").glob("test_*.py"))
TESTS = [
    *([*PYTEST, str(path.relative_to(ROOT)), "-k", which] for path in PRIMITIVES
      for which in (("backward", "not backward") if "bn_relu" in path.name else ("",))),
    [*PYTEST, "tests/gpu"],
]  # fmt: skip
# In CUDA's toolkit. Races in shared memory and accesses out of bounds, on the smallest shapes.
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
SANITIZED = [*PYTEST, "tests/primitives", "-k", "cuda and (test_op or optional)"]

# Part, seconds it may take, and its commands after the interpreter; about eight minutes, as most
# take less.
PARTS: list[tuple[str, int, list[list[str]]]] = [
    ("machine", 20, [[*SUITE, "machine"]]),
    ("build", 90, [["setup.py", "build_ext", "--inplace"]]),
    ("tests", 150, TESTS),
    ("step", 110, [[*SUITE, "step", "--model", "densenet121", "--batch", "256"]]),
    ("primitives", 70, [[*SUITE, "primitives", "--model", f"densenet121,{OTHERS}", "--batch", "256"]]),
    ("inference", 50, [[*SUITE, "inference", "--model", "densenet121", "--batch", "256"]]),
    ("memory", 40, [[*SUITE, "memory"]]),
    ("step_others", 60, [[*SUITE, "step", "--model", OTHERS, "--batch", "128"]]),
    ("memcheck", 40, [SANITIZED]),
    ("racecheck", 40, [SANITIZED]),
]


def run_part(name: str, seconds: int, commands: list[list[str]], out: Path) -> str:
    """Run a part's commands side by side; how they went, a line each."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for the tests' deterministic mode
    wrapper: list[str] = []
    if name in ("memcheck", "racecheck"):
        if SANITIZER is None:
            return f"{name}: there is no compute-sanitizer"
        wrapper = [SANITIZER, "--tool", name, "--error-exitcode", "9"]
    if name == "build":
        environment |= {"DENSE_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": _capability()}
    started, running = time.monotonic(), []
    for number, command in enumerate(commands):
        if SUITE[0] in command:
            command = [*command, "--out", str(out), "--name", name]
        log = out / (f"{name}.log" if len(commands) == 1 else f"{name}-{number}.log")
        with log.open("w") as file:
            process = subprocess.Popen(
                [*wrapper, sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        running.append((process, log))
    lines = []
    for process, log in running:
        code = _wait(process, started + seconds - time.monotonic(), seconds)
        last = ["", *log.read_text().strip().splitlines()][-1]
        lines.append(f"{log.stem}: exit {code}, {time.monotonic() - started:.0f} s: {last}")
    return "\n".join(lines)


def _capability() -> str:
    """The GPU's, as nvcc is to be told."""
    import torch

    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"


def _wait(process: subprocess.Popen[bytes], remaining: float, seconds: int) -> str:
    """The exit code; a process that takes longer than what remains is ended."""
    try:
        return str(process.wait(max(remaining, 0.1)))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # a suite writes what it has
    try:
        return f"{process.wait(15)}, ended after {seconds} s"
    except subprocess.TimeoutExpired:
        process.kill()
        return f"killed after {seconds} s"


def run_suite(
    name: str, models: tuple[str, ...], batch: int | None, path: Path, device: str = "cuda"
) -> None:
    """Fill one result file, in this process."""
    import torch

    from dense_ext.backends import unavailable_reasons
    from dense_ext.benchmark import peers
    from dense_ext.benchmark.results import new_results, write_json
    from dense_ext.benchmark.suites import SUITES, SuiteOptions
    from dense_ext.benchmark.tables import tables

    if name == "machine":
        print(torch.__version__, torch.cuda.get_device_name(), unavailable_reasons("cuda", torch.bfloat16))
        return
    options = SuiteOptions(models, batch, None, ("bfloat16",), device, "auto", 5, int(8e9), None)
    results = new_results(name, options.as_json())
    suite = SUITES[name](options, peers.choose(PEERS, POLICIES), results)
    try:
        suite.run(lambda what: print(f"{time.strftime('%X')} {what}"))
        results["interrupted"] = False
    except KeyboardInterrupt:
        print("ended early")
    finally:
        write_json(path, results)
    for table in tables(results):
        print(f"\n{table.title}\n" + "\t".join(table.header))
        for row in table.rows:
            print("\t".join(row))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--suite", help="run one suite in this process instead")
    parser.add_argument("--name", help="with --suite: of the result file")
    parser.add_argument("--model", default="", help="with --suite: networks, separated by commas")
    parser.add_argument("--batch", type=int, help="with --suite: images a step")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.suite:
        models = tuple(filter(None, options.model.split(",")))
        run_suite(options.suite, models, options.batch, options.out / f"{options.name}.json")
        return 0
    lines = []
    for name, seconds, commands in PARTS:
        lines += run_part(name, seconds, commands, options.out).splitlines()
        print("\n".join(lines[-len(commands) :]), flush=True)
        (options.out / "summary.txt").write_text("\n".join(lines) + "\n")
    checked = [line for line in lines if line.startswith(("machine", "tests", "memcheck", "racecheck"))]
    checked = [line for line in checked if "there is no" not in line]
    return 0 if all(": exit 0," in line for line in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
