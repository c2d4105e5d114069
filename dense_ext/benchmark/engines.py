"""Inference engines as peers: ONNX Runtime, OpenVINO and PyTorch's own AOTInductor, on a CPU."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..eligibility import fused_export
from .errors import UnavailableError

Run = Callable[[Tensor], Tensor]


def _onnxruntime(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    engine = _imported("onnxruntime")
    _imported("onnxscript")
    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    assert program is not None  # as it is with dynamo=True
    model = program.model_proto.SerializeToString()
    options = engine.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = engine.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (name,) = (taken.name for taken in session.get_inputs())
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def _openvino(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    engine = _imported("openvino")
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }
    model = engine.convert_model(network, example_input=images)
    compiled = engine.Core().compile_model(model, "CPU", config)
    return lambda batch: torch.from_numpy(compiled([batch.numpy()])[0])


@torch.no_grad()
def _aotinductor(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    with (
        tempfile.TemporaryDirectory() as folder,
        torch._inductor.config.patch(freezing=True),
        fused_export(),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        program = torch.export.export(network, (images,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/network.pt2")
        run: Run = torch._inductor.aoti_load_package(package)
        return run


# Engine -> what makes it, the dtypes that it computes in, and its package.
_ENGINES: dict[str, tuple[Callable[[nn.Module, Tensor, torch.dtype], Run], tuple[torch.dtype, ...], str]] = {
    "onnxruntime": (_onnxruntime, (torch.float32,), "onnxruntime"),
    "openvino": (_openvino, (torch.float32, torch.bfloat16), "openvino"),
    "aotinductor": (_aotinductor, (torch.float32, torch.bfloat16), "torch"),
}
ENGINES = tuple(_ENGINES)


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed: pip install '.[engines]'") from error


def check(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UnavailableError if the engine is not measured here, with the reason."""
    if device.type != "cpu":
        raise UnavailableError(f"{engine} is measured on a CPU")
    _, dtypes, package = _ENGINES[engine]
    if dtype not in dtypes:
        raise UnavailableError(f"{engine} does not compute in {str(dtype).removeprefix('torch.')} on a CPU")
    _imported(package)


class Engine(nn.Module):
    """A network that an inference engine runs; the first call translates it, for the size of its images.

    Args:
        name: one of ``ENGINES``.
        network: float32, on a CPU, in evaluation mode.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.name, self.network = name, network
        self.run: Run | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.run is None:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            with torch.autocast("cpu", enabled=False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporters
                self.run = _ENGINES[self.name][0](self.network, images, dtype)
        return self.run(images)
