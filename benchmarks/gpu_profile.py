"""The kernels of a DenseNet-121's training step on this machine's GPU, with the time of each.

``python benchmarks/gpu_profile.py --what WHAT >> benchmarks/results/GPU/profiles.jsonl`` writes one line of
JSON: the time of a step as one CUDA graph, and by PyTorch's profiler each kernel's launches and microseconds
an image. The images have 224x224 pixels in channels_last memory, autocast to bfloat16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import sys
from functools import partial

import torch
import torchvision

import dense_ext
from dense_ext.benchmark.step import GraphedStep, sgd_step
from dense_ext.benchmark.timing import seconds_per_call

ROUNDS, REPLAYS = 7, 5


def short(name: str) -> str:
    """A kernel's name without namespaces and the types of its arguments."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|(\w+::)+|_GLOBAL__N_\w+", "", name)
    return re.sub(r"\([^()]*(\([^()]*\)[^()]*)*\)( \[clone.*)?$", "", name)[:200]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", required=True, help="what is new about the kernels, for the reader")
    parser.add_argument("--recompute", default="none", help="the policy (default: none)")
    parser.add_argument("--backend", default="cuda", help="dense_ext's (default: cuda)")
    parser.add_argument("--batch", type=int, default=256, help="images a step (default: 256)")
    options = parser.parse_args()
    device = torch.device("cuda")
    model = torchvision.models.densenet121().to(device, memory_format=torch.channels_last)
    dense_ext.swap(model, recompute=options.recompute, backend=options.backend)
    step = sgd_step(model, torch.bfloat16, device)
    images = torch.randn(options.batch, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (options.batch,), device=device)
    for _ in range(3):
        step(images, labels)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(images, labels)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.device_time > 0:
            of = kernels.setdefault(short(event.name), [0, 0.0])
            of[0], of[1] = of[0] + 1, of[1] + event.device_time / options.batch
    graphed = GraphedStep(step, device)
    for _ in range(5):
        graphed(images, labels)
    call = partial(graphed, images, labels)
    times = [1e3 * seconds_per_call(call, device, REPLAYS) for _ in range(ROUNDS)]
    slowest = sorted(kernels.items(), key=lambda item: -item[1][1])
    print(json.dumps({
        "what": f"DenseNet-121, {options.batch} images of 224x224, bfloat16, recompute {options.recompute}, "
        f"backend {options.backend}, one training step",
        "kernels_of": options.what,
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "python": platform.python_version(), "date": datetime.date.today().isoformat(),
        "graph_ms": times,
        "graph_us_per_image": statistics.median(times) * 1e3 / options.batch,
        "kernel_us_per_image": sum(of[1] for of in kernels.values()),
        "launches": sum(of[0] for of in kernels.values()),
        "us_per_image_by_kernel": {name: [count, round(us, 3)] for name, (count, us) in slowest},
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
