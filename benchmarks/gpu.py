"""Test and measure on this machine's GPU, the most telling first: ``python benchmarks/gpu.py --out DIR``.

Needs the checkout, PyTorch with Triton, torchvision and pytest; nothing is installed or downloaded.
Where there is nvcc and Ninja, the CUDA kernels are compiled for this GPU first; else a library that is
there already serves. Every part runs in processes of its own within a time limit, and keeps what it
measured when the limit ends it; the whole ends after ``--seconds``. ``DIR`` gets a JSON file for each
suite and ``log.txt``: how each part went, and all that it printed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from glob import glob
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TO_END = 10  # seconds that an interrupted command has to write what it has
OTHERS = "densenet169,densenet201,densenet161"
POLICIES = ["none", "bottleneck", "block"]
# Parts that run only where --only names them: this one needs MONAI.
ON_REQUEST = ("volumes",)
# Graphs are not for the suite `memory`, whose steps run without. A row of eager's comes first, as the
# others' values are compared with it, and what is compiled comes last, as it takes longest.
EAGER = ["eager-cl", "memory-efficient-cl"]
GRAPHS = ["graph-cl", "dense_ext-none-graph", "dense_ext-bottleneck-graph"]
PEERS = {
    "step": ["eager-cl", *GRAPHS, "compile-cl"],
    "step_others": [*EAGER, *GRAPHS],
    "inference": ["eager-cl", *GRAPHS, "compile-cl"],
    "memory": EAGER,
    "kernelbench": ["eager", "eager-cl", "compile"],
    "volumes": ["eager-cl", "graph-cl"],
}

PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda"]
SUITE = ["benchmarks/gpu.py", "--suite"]


def toolkit(program: str) -> str | None:
    """A program of CUDA's toolkit, from where setup.py takes nvcc."""
    home = [f"{os.environ['CUDA_HOME']}/bin"] if os.environ.get("CUDA_HOME") else []
    torch = importlib.util.find_spec("torch")
    packages = glob(f"{Path(torch.origin).parent}/../nvidia/*/bin") if torch and torch.origin else []
    places = [*home, *os.get_exec_path(), "/usr/local/cuda/bin", *packages]
    return shutil.which(program, path=os.pathsep.join(places))


NVCC = toolkit("nvcc")
NINJA = importlib.util.find_spec("ninja") or shutil.which("ninja")
# Races in shared memory and accesses out of bounds, on the smallest shapes.
SANITIZER = toolkit("compute-sanitizer")
SANITIZED = [*PYTEST, "tests/primitives", "-k", "cuda and (test_aligned or optional)"]


def tests(backend: str) -> list[list[str]]:
    """A backend's tests in several processes: a kernel that fails takes the GPU from its process.

    Triton's compile a few hundred variants: side by side.
    """
    files = sorted(path.relative_to(ROOT) for path in (ROOT / "tests" / "primitives").glob("test_*.py"))
    found = [[*PYTEST, "tests/gpu", "-k", backend]]
    for file in files:
        parts = (" and backward", " and not backward") if "bn_relu" in file.name else ("",)
        found += [[*PYTEST, str(file), "-k", backend + part] for part in parts]
    return found


@dataclass(frozen=True)
class Part:
    """Commands after the interpreter, run side by side, and the seconds they may take."""

    name: str
    seconds: int
    commands: list[list[str]]


def suite(name: str, seconds: int, kind: str, *options: str) -> Part:
    """A part that fills ``DIR/NAME.json``."""
    return Part(name, seconds, [[*SUITE, kind, *options]])


def parts() -> list[Part]:
    """In the order of what they tell; most take less than they may."""
    network = ("--model", "densenet121", "--batch")
    found = [suite("machine", 60, "machine")]
    if NVCC or (ROOT / "dense_ext" / "_cuda.so").exists():
        found.append(Part("tests_cuda", 60, tests("cuda")))
    if NVCC and NINJA:
        found.insert(0, Part("build", 120, [["setup.py", "build_ext", "--inplace"]]))
    found += [
        suite("step", 160, "step", *network, "256"),
        *(
            suite(f"primitives_{backend}", 60, "primitives", *network, "64", "--backend", backend)
            for backend in ("cuda", "triton")
        ),
        Part("tests_triton", 150, tests("triton")),
        suite("inference", 90, "inference", *network, "256"),
        suite("memory", 60, "memory"),
        suite("step_others", 60, "step", "--model", OTHERS, "--batch", "128"),
        suite("kernelbench", 90, "kernelbench"),
        suite("volumes", 90, "volumes"),
    ]
    if SANITIZER:
        found += [Part(tool, 90, [SANITIZED]) for tool in ("memcheck", "racecheck")]
    return found


def run_part(part: Part, seconds: float, out: Path) -> list[str]:
    """Run a part's commands within ``seconds``; how they went, a line each.

    Those that take longer are interrupted, for a suite writes what it has, and killed after TO_END.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for the tests' deterministic mode
    if len(part.commands) > 1:
        environment["OMP_NUM_THREADS"] = "1"
    program = ["timeout", "--signal=INT", f"--kill-after={TO_END}", str(seconds)]
    if part.name in ("memcheck", "racecheck"):
        program += [str(SANITIZER), "--tool", part.name, "--error-exitcode", "9"]
        # Each tensor by itself, or an access beyond its end would find the next one's memory.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if part.name == "build":
        environment |= {"DENSE_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": _capability()}
    processes, started, took = [], time.monotonic(), {}
    for number, command in enumerate(part.commands):
        if SUITE[0] in command:
            command = [*command, "--out", str(out), "--name", part.name]
        with (out / f"{part.name}-{number}.log").open("w") as file:
            processes.append(subprocess.Popen(
                [*program, sys.executable, *command], cwd=ROOT, env=environment, stdout=file,
                stderr=subprocess.STDOUT, preexec_fn=_heed_interrupts,
                start_new_session=True,  # so that what it starts can be ended with it
            ))  # fmt: skip
    try:
        while len(took) < len(processes):
            for number, process in enumerate(processes):
                if number not in took and process.poll() is not None:
                    took[number] = time.monotonic() - started
            time.sleep(0.05)
    finally:
        for process in processes:
            process.terminate()  # if it runs still: `timeout` passes it on, and waits for what it started
        for process in processes:
            process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        limit = {124: f"ended after {seconds:.0f} s", -9: f"killed after {seconds:.0f} s"}
        ends = [limit.get(p.returncode, f"exit {p.returncode}") if n in took else "interrupted"
                for n, p in enumerate(processes)]  # fmt: skip
        lines = [_merge_log(part, n, how, took.get(n, 0), out) for n, how in enumerate(ends)]
    return lines


def _heed_interrupts() -> None:
    """Take an interrupt also where a shell that put this program in the background had it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _merge_log(part: Part, number: int, how: str, seconds: float, out: Path) -> str:
    """Put what a command printed behind ``log.txt``; how it went, in a line."""
    command, path = part.commands[number], out / f"{part.name}-{number}.log"
    text = path.read_text(errors="replace")
    if how == "exit 0" and command[:2] == PYTEST[:2] and not re.search(r"\b\d+ passed\b", text):
        how = "no test ran"
    which = f" {' '.join(command[len(PYTEST) :])}" if len(part.commands) > 1 else ""
    line = f"{part.name}{which}: {how}, {seconds:.0f} s: {['', *text.strip().splitlines()][-1]}"
    with (out / "log.txt").open("a") as log:
        log.write(f"=== {line}\n{text}\n")
    path.unlink()
    return line


def _capability() -> str:
    """The GPU's, as nvcc is to be told."""
    import torch

    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"


def run_suite(
    kind: str,
    name: str,
    models: tuple[str, ...],
    batch: int | None,
    path: Path,
    device: str = "cuda",
    backend: str = "auto",
) -> None:
    """Fill one result file, in this process; it is written as it grows, for a kernel may hang."""
    import torch

    from dense_ext.backends import unavailable_reasons
    from dense_ext.benchmark import peers
    from dense_ext.benchmark.kinds import tables_of
    from dense_ext.benchmark.results import new_results, saving, write_json
    from dense_ext.benchmark.suites import SUITES, Options

    if kind == "machine":
        print(torch.__version__, torch.cuda.get_device_name(), unavailable_reasons("cuda", torch.bfloat16))
        return
    options = Options(
        models=models, batch=batch, dtypes=(SUITES[kind].gpu_dtype,), device=device, backend=backend,
        rounds=5, budget=2 * 10**9,
    )  # fmt: skip
    results = new_results(kind, options.as_json())
    chosen = sorted(
        peers.choose(PEERS.get(name, EAGER), POLICIES), key=lambda peer: peer.mode in peers.COMPILED
    )
    measured = SUITES[kind](options, chosen, results)
    try:
        measured.run(saving(lambda what: print(f"{time.strftime('%X')} {what}"), results, path, 5))
        results.interrupted = False
    except KeyboardInterrupt:
        print("ended early")
    finally:
        write_json(path, results)
    for table in tables_of(results):
        print(f"\n{table.title}\n" + "\t".join(table.header))
        for row in table.rows:
            print("\t".join(row))


def ended_well(part: Part, log: Path) -> list[str]:
    """What the log says of a part whose commands all succeeded when it last ran; empty for others."""
    lines = log.read_text().splitlines() if log.exists() else []
    own = [line.removeprefix("=== ") for line in lines if re.match(rf"=== {part.name}[: ]", line)]
    last = own[-len(part.commands) :]
    return last if all(": exit 0," in line for line in last) else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--seconds", type=int, default=470, help="all of it may take (default: 470)")
    parser.add_argument("--only", help="run these parts, separated by commas, in this order")
    parser.add_argument("--resume", action="store_true", help="pass over what succeeded into --out before")
    parser.add_argument("--suite", help="run one suite in this process instead")
    parser.add_argument("--name", help="with --suite: of the result file")
    parser.add_argument("--model", default="", help="with --suite: networks, separated by commas")
    parser.add_argument("--batch", type=int, help="with --suite: images a step")
    parser.add_argument("--backend", default="auto", help="with --suite: dense_ext's")
    options = parser.parse_args()
    _heed_interrupts()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.suite:
        models = tuple(filter(None, options.model.split(",")))
        path = out / f"{options.name}.json"
        run_suite(options.suite, options.name, models, options.batch, path, backend=options.backend)
        return 0
    known = {part.name: part for part in parts()}
    chosen = options.only.split(",") if options.only else [name for name in known if name not in ON_REQUEST]
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--only takes some of {', '.join(known)}; got {', '.join(unknown)}")
    end, lines = time.monotonic() + options.seconds, []
    done = {name: ended_well(known[name], out / "log.txt") for name in chosen} if options.resume else {}
    try:
        for part in map(known.__getitem__, chosen):
            seconds = min(part.seconds, end - time.monotonic() - TO_END)
            new = done.get(part.name)
            if not new:
                new = run_part(part, seconds, out) if seconds > 15 else [f"{part.name}: no time is left"]
            lines += new
            print("\n".join(new), flush=True)
    except KeyboardInterrupt:
        return 130
    # Sanitizers come last, and count where there was time for them.
    checks = [line for line in lines if line.startswith(("memcheck", "racecheck")) and "no time" not in line]
    checks += [line for line in lines if line.startswith(("build", "machine", "tests"))]
    return 0 if all(": exit 0," in line for line in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
