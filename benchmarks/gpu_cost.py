"""Estimates the cost of a dense layer's kernels on GPUs from their machine code; needs no GPU.

``python benchmarks/gpu_cost.py`` reads the sm_90 code of ``dense_ext/_cuda.so`` and of the Triton kernels,
which it compiles, and writes ``results/gpu_cost.md``. It counts the instructions of each of a kernel's loops
and multiplies them by the loop's iterations in a training step, at 224 pixels in bfloat16. It then computes
three times: to issue the instructions, at four per cycle and multiprocessor; to multiply on tensor cores; to
move the bytes. The largest of the three is a lower bound.

The script counts and measures nothing. It assumes that both sides of a branch run and that nothing waits.
``ASSUMPTIONS`` lists all assumptions, and the page repeats them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from cuda_resources import compiler_of, cuobjdump, demangled

from dense_ext.backends import CUDA

RESULT = Path(__file__).with_name("results") / "gpu_cost.md"
BATCH = 256  # images
WARPS = 8  # a turn of a loop counts for so many; of fewer or more warps, for a part or a multiple
BYTES = 2  # per element


class Chip(NamedTuple):
    """A GPU's rates.

    Attributes:
        multiprocessors: their number.
        clock: cycles per second.
        bandwidth: bytes of device memory per second.
        flop: FLOP per cycle of one multiprocessor, by mma.sync.
    """

    multiprocessors: int
    clock: float
    bandwidth: float
    flop: float


CHIPS = {
    # NVIDIA A100 Tensor Core GPU Architecture (whitepaper); bandwidth: datasheet of the 80 GB SXM card.
    "A100": Chip(108, 1.41e9, 2.04e12, 2048),
    # NVIDIA H100 Tensor Core GPU Architecture (whitepaper), and datasheet. wgmma computes 4096 FLOP per
    # cycle; mma.sync was measured to reach some 62 % of that (arXiv:2402.13499).
    "H100": Chip(132, 1.755e9, 3.35e12, 2540),
    "H200": Chip(132, 1.755e9, 4.8e12, 2540),  # NVIDIA H200 datasheet
    "RTX 4090": Chip(128, 2.52e9, 1.008e12, 512),  # NVIDIA Ada GPU Architecture (whitepaper), appendix A
    # Bandwidth: NVIDIA DGX B200 datasheet. The rest is a guess; mma.sync's rate is that of H100.
    "B200": Chip(148, 1.85e9, 8.0e12, 2540),
}

# The page's assumptions. Each can be wrong.
ASSUMPTIONS = """\
- **Code.** Every chip runs the sm_90 code (CUDA C++: sm_90a). The code for other chips differs.
- **Instructions.** Only loops that multiply or load tiles count, and both sides of a branch count.
  Instructions that a block executes once, reductions, launches and all other kernels do not count.
- **Issuing** an instruction takes a quarter of a cycle: each of a multiprocessor's four schedulers always
  finds a warp that can continue, at any occupancy. Barriers, latencies and bank conflicts cost nothing.
- **Multiplying** runs at the data sheets' rate for dense bfloat16. H100 and H200 take 1.6 times as long,
  as others measured for `mma.sync`. B200 takes as many cycles as H100, which is a guess. Triton's code has
  `wgmma` where that is faster, so its number may be too high.
- **Bytes.** Each activation and gradient is moved once, at the data sheets' bandwidth. Blocks share data
  through the L2 cache. Weights and sums do not count.
- **Clocks** and multiprocessors are those of the data sheets; the clock is the highest, all the time.
  B200's are a guess.
- **Overlap.** The three overlap completely. So the largest is a lower bound of the time, not a forecast."""

# Growth rate K, layers of each block, channels of the stem (Huang et al., 2017, table 1). B is 4 K.
NETWORKS = {
    "DenseNet-121": (32, (6, 12, 24, 16), 64),
    "DenseNet-169": (32, (6, 12, 32, 32), 64),
    "DenseNet-201": (32, (6, 12, 48, 32), 64),
    "DenseNet-161": (48, (6, 12, 36, 24), 96),
}
# How often each forward kernel runs in a step: once more for z if z is not kept, and for the whole block if X
# is not kept.
FORWARDS = {
    "none": {"1x1 forward": 1, "3x3 forward": 1},
    "bottleneck": {"1x1 forward": 2, "3x3 forward": 1},
    "block": {"1x1 forward": 3, "3x3 forward": 2},
}

CLASSES = {
    "copies": r"LDGSTS",
    "global": r"LDG|STG|LD\.|ST\.",
    "shared": r"LDS|STS|LDSM|STSM",
    "products": r"HMMA|HGMMA|WARPGROUP",
    "float32": r"F(FMA|ADD|MUL|SEL|SETP|MNMX|CHK)|MUFU|F2FP|H(FMA|ADD|MUL)",
    "barriers": r"BAR|DEPBAR|LDGDEPBAR|WARPSYNC|SYNCS",
    "branches": r"BRA|BSSY|BSYNC|EXIT|CALL|RET|NOP",
    "predicates": r"I?SETP|U?ISETP|U?PLOP|P2R|R2P",
    "addresses": "",  # and all others
}


def up(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Layer:
    """A dense layer.

    Attributes:
        size: the height and width of its activations, in pixels.
        c: the channels that it reads.
        b: the channels of its bottleneck.
        k: the channels that it adds.
    """

    size: int
    c: int
    b: int
    k: int

    @property
    def pixels(self) -> int:
        return BATCH * self.size**2


def layers(network: str) -> Iterator[Layer]:
    """A network's dense layers."""
    k, blocks, c = NETWORKS[network]
    for i, count in enumerate(blocks):
        for layer in range(count):
            yield Layer(56 >> i, c + layer * k, 4 * k, k)
        c = (c + count * k) // 2


# --- machine code ------------------------------------------------------------------------------------------

Instruction = tuple[int, str]  # address and text


def functions(cubin: Path) -> dict[str, list[Instruction]]:
    """The kernels in a file for one chip, by their short names."""
    command = [cuobjdump(), "-sass", str(cubin)]
    text = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if "Function :" in line:
            code = found.setdefault(line.split()[-1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?);", line):
            code.append((int(match[1], 16), match[2]))
    return dict(zip(demangled(list(found)), found.values(), strict=True))


def cuda_functions(library: Path, source: str) -> dict[str, list[Instruction]]:
    """A library's sm_90a kernels from one source file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [cuobjdump(), "-arch", "sm_90a", "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for cubin in Path(folder).iterdir():
            if f"_{source}_cu_".encode() in cubin.read_bytes():
                return functions(cubin)
    raise LookupError(f"{library} has no code of {source} for sm_90a")


@cache
def triton_functions(kernel: str) -> dict[str, list[Instruction]]:
    """A kernel in Triton's table, compiled for sm_90."""
    import torch

    from dense_ext.backends.triton.ahead import compile_row
    from dense_ext.backends.triton.configs import SHIPPED, read_rows

    chosen = [row for row in read_rows(SHIPPED) if (row.kernel, row.architecture) == (kernel, "sm_90")]
    (row,) = (row for row in chosen if row.precision == "16bit")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compile_row(row, torch.bfloat16)[0].asm["cubin"])
        file.flush()
        return functions(Path(file.name))


def class_of(text: str) -> str:
    """The class of an instruction."""
    name = re.sub(r"^@!?U?P\w+ ", "", text)
    return next(kind for kind, pattern in CLASSES.items() if re.match(pattern, name))


Mix = Counter[str]


def main_loops(code: Sequence[Instruction]) -> list[Mix]:
    """The instructions in one iteration of each main loop, and of each loop inside or around it.

    A main loop multiplies, copies, or arrives at a barrier of warps with other roles. The loops are in the
    order in which they begin. A loop counts without the loops inside it.
    """
    code = [(at, text) for at, text in code if not text.startswith("NOP")]
    # Behind the kernel lies what a warp runs whose lanes have parted. It jumps back, but is no loop.
    parted = [int(match[1], 16) for _, text in code if (match := re.search(r"BRA\.DIV.*(0x[0-9a-f]+)", text))]
    code = [(at, text) for at, text in code if at < min(parted, default=at + 1)]
    spans = set()
    for at, text in code:
        target = re.search(r"\bBRA\b.*(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            spans.add((int(target[1], 16), at))
    ordered = sorted(spans, key=lambda span: (span[0], -span[1]))
    mixes = [Mix() for _ in ordered]
    chosen: set[tuple[int, int]] = set()  # the outermost loops
    for at, text in code:
        around = [i for i, (begin, end) in enumerate(ordered) if begin <= at <= end]
        if around:
            kind = class_of(text)
            mixes[around[-1]][kind] += 1
            if kind in ("products", "copies") or "BAR.ARV" in text:
                chosen.add(ordered[around[0]])
    return [
        mix
        for (begin, end), mix in zip(ordered, mixes, strict=True)
        if any(first <= begin and end <= last for first, last in chosen)
    ]


# --- kernels -----------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """One launch of a kernel.

    Attributes:
        turns: the iterations of each main loop by all warps of all blocks together, in the loops' order.
        products: the multiplications.
        elements: the elements that must be moved.
    """

    turns: Sequence[float]
    products: float
    elements: float


def work_1x1(layer: Layer, turns: Sequence[float], backward: bool) -> Work:
    elements = layer.pixels * (3 * layer.c + 2 * layer.b if backward else layer.c + layer.b)
    return Work([t * WARPS for t in turns], (1 + backward) * layer.pixels * layer.c * layer.b, elements)


def work_3x3(layer: Layer, turns: Sequence[float], backward: bool) -> Work:
    passes = 1 + backward
    products = passes * 9 * layer.pixels * layer.b * layer.k
    return Work([t * WARPS for t in turns], products, passes * layer.pixels * (layer.b + layer.k))


def cuda_1x1_forward(layer: Layer) -> Work:
    """The loops: tiles of 128 x 128, steps through C, and pivots, which only the first tile chooses."""
    tiles = up(layer.pixels, 128) * up(layer.b, 128)
    return work_1x1(layer, (tiles, tiles * up(layer.c, 32), 0), False)


def cuda_1x1_backward(layer: Layer) -> Work:
    """The loops: tiles of the producers, and of the consumers.

    For K = 32 as many producers as consumers take two tiles in a turn; for K = 48, half as many take one.
    """
    tiles = up(layer.pixels, 32) * up(layer.c, 64)
    return work_1x1(layer, (tiles / 2, tiles), True)


class Patches(NamedTuple):
    """The patches of a 3x3 kernel in the CUDA backend.

    Attributes:
        number: how many there are.
        rows: their lines.
        width: their columns, over all images side by side.
    """

    number: int
    rows: int
    width: int


def patches(size: int, slots: int, stack: int, bordered: int) -> Patches:
    """The patches that csrc/cuda/patch.cuh chooses."""
    found = []
    for most in range(stack, min(slots // 16, size + stack - 1) + 1, stack):
        down = up(size, most)
        rows = up(size, down)
        lines = up(rows, stack) * stack
        longest, wide = bordered // (lines + 2), slots // 16 // lines * 16
        across = up(size, min(wide, longest - 2))
        columns = up(size, across)
        images = min(wide // columns, (longest - 1) // (columns + 1), BATCH) if across == 1 else 1
        chosen = Patches(up(BATCH, images) * down * across, rows, images * columns)
        found.append((chosen.number, (rows + 2) * (images * (columns + 1) + 1), chosen))
    return min(found)[2]


def cuda_3x3_forward(layer: Layer) -> Work:
    """The loops: chunks of the producers, their weight by elements and by units; chunks of the consumers'
    weight, by elements and by units, and their patches, chunks, columns of taps, and pivots.

    For K = 32 the weight stays in shared memory. For K = 48 it does not fit: the producers load it again for
    each patch, by units, as it is in channels_last memory. There are half as many producers as consumers.
    """
    slots, stack, bordered, out = (512, 4, 736, 32) if layer.k == 32 else (256, 2, 360, 48)
    count, chunks = patches(layer.size, slots, stack, bordered).number * up(layer.k, out), up(layer.b, 32)
    weight = 0 if layer.k == 32 else chunks * up(9 * out * 32 // 8, 32 * WARPS // 2)
    turns = (chunks / 2, 0, weight / 2, 0, 0, 0, 1, chunks, 3 * chunks, 0)
    return work_3x3(layer, [count * t for t in turns], False)


def cuda_3x3_backward(layer: Layer) -> Work:
    """The loops: the weight; patches of dW, by 16 columns and by three lines; patches of the data gradient,
    columns of taps, for K = 32 their depth, and later pieces of K; patches of the producers, and marks of
    slots.

    There are four warps of each role, but eight of dW.
    """
    slots, stack, bordered = (256, 4, 336) if layer.k == 32 else (128, 2, 200)
    patch = patches(layer.size, slots, stack, bordered)
    across = up(patch.width, 16)
    four = 4 / WARPS
    weight = [1, across, across * up(patch.rows + 2, 3)]
    depth = (four * 3 * 2,) if layer.k == 32 else ()
    data, producers = (four, four * 3, *depth, 0), (four, four * slots / 128)
    turns = (0, *weight, *data, *producers)
    return work_3x3(layer, [patch.number * up(layer.b, 32) * t for t in turns], True)


def triton_1x1_forward(layer: Layer) -> Work:
    """The loops: as in CUDA C++, without pivots."""
    tiles = up(layer.pixels, 128) * up(layer.b, 128)
    return work_1x1(layer, (tiles, tiles * up(layer.c, 32)), False)


def triton_1x1_backward(layer: Layer) -> Work:
    return work_1x1(layer, (up(layer.pixels, 64) * up(layer.c, 128),), True)


def triton_3x3_forward(layer: Layer) -> Work:
    """The loops: tiles of 62 pixels, and steps through B for each line of taps."""
    tiles = up(layer.pixels, 62) * up(layer.k, 32)
    return work_3x3(layer, (tiles, tiles * 3 * up(layer.b, 64)), False)


def triton_3x3_backward(layer: Layer) -> Work:
    """The loops: programs, data gradient by taps, weight gradient by three taps."""
    tiles = up(layer.pixels, 64) * up(layer.b, 64)
    steps = up(layer.k, 32)
    return work_3x3(layer, (tiles, tiles * 9 * steps, tiles * 3 * steps), True)


class Kernel(NamedTuple):
    """A kernel of a backend.

    Attributes:
        source: the CUDA backend's file, or the name in Triton's table.
        config: the end of the CUDA kernel's name, by K.
        work: the launch for a layer.
    """

    source: str
    config: dict[int, str]
    work: Callable[[Layer], Work]


KERNELS = {
    ("1x1 forward", "cuda"): Kernel("bn_relu_conv1x1", {32: "128", 48: "128"}, cuda_1x1_forward),
    ("1x1 backward", "cuda"): Kernel("bn_relu_conv1x1", {32: "128", 48: "192"}, cuda_1x1_backward),
    ("3x3 forward", "cuda"): Kernel("bn_relu_conv3x3", {32: "32, 4, 1", 48: "48, 2, 1"}, cuda_3x3_forward),
    ("3x3 backward", "cuda"): Kernel("bn_relu_conv3x3", {32: "32, 4", 48: "64, 2"}, cuda_3x3_backward),
    ("1x1 forward", "triton"): Kernel("bn_relu_conv1x1_forward", {}, triton_1x1_forward),
    ("1x1 backward", "triton"): Kernel("bn_relu_conv1x1_backward_fused", {}, triton_1x1_backward),
    ("3x3 forward", "triton"): Kernel("bn_relu_conv3x3_forward", {}, triton_3x3_forward),
    ("3x3 backward", "triton"): Kernel("bn_relu_conv3x3_backward", {}, triton_3x3_backward),
}


def mixes_of(what: str, backend: str, k: int, library: Path) -> list[Mix]:
    """A kernel's main loops, for the growth rate ``k``."""
    kernel = KERNELS[what, backend]
    if backend == "triton":
        (code,) = triton_functions(kernel.source).values()
    else:
        kind = what.split()[1]
        name = f"{kind}_kernel<{kind.title()}<Arithmetic<BFloat16, false>, {kernel.config[k]}, true>>"
        code = cuda_code(library, kernel.source)[name]
    found = main_loops(code)
    expected = len(kernel.work(Layer(56, 64, 4 * k, k)).turns)
    if len(found) != expected:
        raise ValueError(f"{what}, {backend}: found {len(found)} loops, expected {expected}")
    return found


@cache
def cuda_code(library: Path, source: str) -> dict[str, list[Instruction]]:
    return cuda_functions(library, source)


# --- the page ----------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """The warp instructions, multiplications and bytes of a kernel per image."""

    instructions: float
    products: float
    bytes: float

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, chip: Chip) -> tuple[float, float, float]:
        """Microseconds to issue the instructions, to multiply and to move the bytes."""
        cycles = chip.multiprocessors * chip.clock / 1e6
        issue, multiply = self.instructions / 4 / cycles, 2 * self.products / chip.flop / cycles
        return issue, multiply, self.bytes / chip.bandwidth * 1e6


def cost(what: str, backend: str, network: str, library: Path) -> Cost:
    """The cost of one pass through all dense layers of a network."""
    mixes = mixes_of(what, backend, NETWORKS[network][0], library)
    total = Cost(0, 0, 0)
    for layer in layers(network):
        work = KERNELS[what, backend].work(layer)
        instructions = sum(t * mix.total() for t, mix in zip(work.turns, mixes, strict=True))
        total += Cost(instructions / BATCH, work.products / BATCH, BYTES * work.elements / BATCH)
    return total


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*names: str, texts: int) -> list[str]:
    return [row(*names), "|" + " --- |" * texts + " ---: |" * (len(names) - texts)]


def counts(library: Path, backends: Sequence[str]) -> list[str]:
    """The rows of the table of instructions, for a growth rate of 32."""
    lines = []
    for what, backend in KERNELS:
        if backend in backends:
            for i, mix in enumerate(mixes_of(what, backend, 32, library)):
                lines.append(row(what, backend, i + 1, mix.total(), *(mix[kind] for kind in CLASSES)))
    return lines


def times(library: Path) -> Iterator[str]:
    """The rows of the table of kernels."""
    for network in NETWORKS:
        for what, backend in KERNELS:
            if backend == "triton" and NETWORKS[network][0] != 32:
                continue  # for B beyond 128, the table has other kernels
            found = cost(what, backend, network, library)
            cells = []
            for chip in CHIPS.values():
                each = found.times(chip)
                cells.append(" / ".join(f"{t:.1f}" for t in each) + f" **{max(each):.0f}**")
            yield row(network, what, backend, f"{found.instructions / 1e3:.0f}", *cells)


def steps(library: Path) -> Iterator[str]:
    """The rows of the table of steps; each kernel runs on the backend with the lower bound."""
    for network, (k, _, _) in NETWORKS.items():
        for policy, forwards in FORWARDS.items():
            cells = []
            for chip in CHIPS.values():
                total = 0.0
                for what in dict.fromkeys(name for name, _ in KERNELS):
                    backends = ("cuda", "triton") if k == 32 else ("cuda",)
                    bounds = [max(cost(what, b, network, library).times(chip)) for b in backends]
                    total += forwards.get(what, 1) * min(bounds)
                cells.append(f"{total:.0f}")
            yield row(network, policy, *cells)


def page(library: Path) -> str:
    """The text of ``results/gpu_cost.md``."""
    import triton

    lines = [
        "# Estimated cost of a dense layer's kernels",
        "",
        "Nothing here was measured. The numbers are counted from the machine code and the launches of a",
        f"training step, at 224 pixels in bfloat16 with batch {BATCH}. nvcc {compiler_of(library)}, Triton",
        f"{triton.__version__}. The assumptions:",
        "",
        *ASSUMPTIONS.splitlines(),
        "",
        "## Instructions of one warp per iteration of each main loop, without the loops inside it (K = 32)",
        "",
        *head("kernel", "backend", "loop", "all", *CLASSES, texts=2),
        *counts(library, ("cuda", "triton")),
        "",
        "## Microseconds per image: to issue the instructions / to multiply / to move the bytes",
        "",
        "One pass through all dense layers of the network. The largest of the three, in bold, is a lower",
        "bound. `thousand` are thousands of warp instructions per image.",
        "",
        *head("network", "kernel", "backend", "thousand", *CHIPS, texts=3),
        *times(library),
        "",
        "## Lower bounds of all dense layers in a training step, by recompute policy",
        "",
        "Microseconds per image; each kernel runs on the backend with the lower bound.",
        "",
        *head("network", "recompute", *CHIPS, texts=2),
        *steps(library),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if CUDA.library.path is None:
        sys.exit(str(CUDA.library))
    RESULT.write_text(page(CUDA.library.path))
    print(f"wrote {RESULT}")
