"""Deploying a swapped network: compiling, exporting and converting it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

import dense_ext

from ..helpers import RELATIVE, assert_equal, assert_same_state
from .common import (
    FLOAT32,
    FUSED,
    UNFUSED,
    fused_calls,
    images,
    in_graph,
    run_elsewhere,
    swapped_and_eager,
)

# Loads a saved model and compares its output. Arguments: format, model file, file with input and output.
_LOAD_AND_COMPARE = """
import sys, torch
what, model, expected = sys.argv[1:]
x, y = torch.load(expected)
if what == "export":
    served = torch.export.load(model).module()
elif what == "script":
    served = torch.jit.load(model)
elif what == "aoti":
    import torch._inductor.config
    # It compiles nothing. Otherwise it would compile and load a program for each kind of instructions first.
    torch._inductor.config.cpp.vec_isa_ok = False
    served = torch._inductor.aoti_load_package(model)
with torch.no_grad():
    error = (served(x) - y).abs().max() / y.abs().max()
assert error <= 1e-9, error
"""


def _served_elsewhere(
    what: str, model: Path, x: Tensor, y: Tensor, before: str = "", without_dense_ext: bool = True
) -> None:
    expected = model.with_name("expected.pt")
    torch.save((x, y), expected)
    run_elsewhere(before + _LOAD_AND_COMPARE, what, model, expected, without_dense_ext=without_dense_ext)


def _export(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (x,))


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> None:
        torch._dynamo.reset()

    @staticmethod
    def _backend(graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
        def compile_nothing(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        return compile_nothing

    def test_compile_after_the_swap(self) -> None:
        ours, eager = swapped_and_eager()
        graphs: list[torch.fx.GraphModule] = []
        compiled = torch.compile(ours.train(), fullgraph=True, backend=self._backend(graphs))
        eager.train()
        x = images()
        for model in (compiled, eager):
            model(x).square().sum().backward()
        assert [in_graph(graph.graph.nodes) for graph in graphs] == [FUSED]
        assert_same_state(ours, eager)

    def test_swap_after_compile(self) -> None:
        eager, ours = swapped_and_eager()
        dense_ext.restore(eager)
        graphs: list[torch.fx.GraphModule] = []
        compiled = torch.compile(ours, fullgraph=True, backend=self._backend(graphs))
        x = images()
        compiled(x)
        dense_ext.swap(ours)
        assert_equal(compiled(x), eager(x), "output")
        assert [in_graph(graph.graph.nodes) for graph in graphs] == [UNFUSED, FUSED]


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_export_loads_without_dense_ext(self, tmp_path: Path, strict: bool) -> None:
        ours, eager = swapped_and_eager()
        x = images()
        program, original = (torch.export.export(m, (x,), strict=strict) for m in (ours, eager))
        assert [n.target for n in program.graph.nodes] == [n.target for n in original.graph.nodes]
        if not strict:
            torch.export.save(program, tmp_path / "model.pt2")
            _served_elsewhere("export", tmp_path / "model.pt2", x, eager(x).detach())

    def test_export_for_training(self) -> None:
        ours, eager = swapped_and_eager()
        x = images()
        exported = torch.export.export(ours.train(), (x,)).module()
        exported(x).square().sum().backward()
        eager.train()(x).square().sum().backward()
        expected = dict(eager.named_parameters())
        for name, parameter in exported.named_parameters():
            assert_equal(parameter.grad, expected[name].grad, f"gradient of {name}")

    def test_fused_export(self, tmp_path: Path) -> None:
        ours, eager = swapped_and_eager()
        x = images()
        with dense_ext.fused_export():
            program = _export(ours, x)
        assert in_graph(program.graph.nodes) == FUSED
        torch.export.save(program, tmp_path / "model.pt2")
        y = eager(x).detach()
        _served_elsewhere("export", tmp_path / "model.pt2", x, y, "import dense_ext\n", False)


@pytest.mark.usefixtures("compiled_fast")
class TestAOTInductor:
    def test_aotinductor_loads_without_dense_ext(self, tmp_path: Path) -> None:
        ours, eager = swapped_and_eager(layers=1)
        x = images()
        package = torch._inductor.aoti_compile_and_package(
            _export(ours, x), package_path=str(tmp_path / "model.pt2")
        )
        _served_elsewhere("aoti", Path(package), x, eager(x).detach())

    @pytest.mark.parametrize("freezing", [False, True], ids=["", "freezing"])
    def test_aotinductor_with_fused_operators(self, freezing: bool, tmp_path: Path) -> None:
        ours, eager = swapped_and_eager(layers=1)
        x = images()
        expected = eager(x).detach()
        # Inductor's freezing has no float64 convolutions.
        dtype, relative = (torch.float32, FLOAT32) if freezing else (torch.float64, RELATIVE)
        ours, x = ours.to(dtype), x.to(dtype)
        with torch._inductor.config.patch(freezing=freezing), dense_ext.fused_export():
            program = _export(ours, x)
            with torch.no_grad():
                path = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(tmp_path / "model.pt2")
                )
        served = torch._inductor.aoti_load_package(path)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), profile() as profiled:
                assert_equal(served(x).double(), expected, mode.__name__, relative)
            ran = {event.name for event in profiled.events()}
            assert (
                ("dense_ext::packed_dense_block" in ran) == freezing == ("dense_ext::dense_block" not in ran)
            )
            assert not any("::pack_" in name for name in ran)


class TestTorchScript:
    def test_script_loads_without_dense_ext(self, tmp_path: Path) -> None:
        ours, eager = swapped_and_eager()
        x = images()
        scripted = torch.jit.script(ours)
        assert str(scripted.inlined_graph).count("dense_ext::") == 0
        scripted.save(str(tmp_path / "model.pt"))
        _served_elsewhere("script", tmp_path / "model.pt", x, eager(x).detach())

    def test_trace_loads_without_dense_ext(self, tmp_path: Path) -> None:
        ours, eager = swapped_and_eager()
        x = images()
        traced, original = torch.jit.trace(ours, x), torch.jit.trace(eager, x)
        kinds = [[n.kind() for n in t.inlined_graph.nodes()] for t in (traced, original)]
        assert kinds[0] == kinds[1]
        traced.save(str(tmp_path / "model.pt"))
        _served_elsewhere("script", tmp_path / "model.pt", x, eager(x).detach())


def _run_by_reference(onnx: Any, path: Path, x: Tensor) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    return torch.from_numpy(y)


def _run_by_runtime(onnx: Any, path: Path, x: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("run", "dtype", "relative"),
    [(_run_by_reference, torch.float64, RELATIVE), (_run_by_runtime, torch.float32, FLOAT32)],
    ids=["reference", "onnxruntime"],
)
def test_onnx(
    tmp_path: Path, dynamo: bool, run: Callable[..., Tensor], dtype: torch.dtype, relative: float
) -> None:
    onnx, path = pytest.importorskip("onnx"), tmp_path / "model.onnx"
    ours, eager = (model.to(dtype) for model in swapped_and_eager())
    x = images().to(dtype)
    with torch.no_grad():
        torch.onnx.export(ours, (x,), path, dynamo=dynamo, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    assert_equal(run(onnx, path, x), eager(x).detach(), "output", relative)


@pytest.mark.parametrize("of", ["module", "exported program"])
def test_openvino(of: str) -> None:
    openvino = pytest.importorskip("openvino")
    ours, eager = (model.float() for model in swapped_and_eager())
    x = images().float()
    if of == "module":
        converted = openvino.convert_model(ours, example_input=x)
    else:
        converted = openvino.convert_model(_export(ours, x))
    assert "dense_ext" not in {op.get_type_info().version_id for op in converted.get_ordered_ops()}
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    served = openvino.compile_model(converted, "CPU", exact)
    y = torch.from_numpy(served(x.numpy())[0])
    assert_equal(y, eager(x).detach(), "output", FLOAT32)
    # The conversion does not change the network.
    assert fused_calls(lambda: ours(x)) == FUSED
