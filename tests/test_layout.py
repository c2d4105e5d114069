"""The project's structure: a primitive has the same name everywhere, and imports go in one direction."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dense_ext.backends.base import Backend
from dense_ext.backends.table import PRIMITIVES, TABLE, THROUGH_NORM

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dense_ext"

# Lower layers first; a module may import from its own layer and lower ones.
LAYERS = ["files", "backends", "machine", "batch_norm", "ownership", "schedule", "transition", "arguments",
          "differentiable", "flops", "ops", "checks", "eligibility", "packing", "modules", "functional",
          "models", "recognise", "memory", "swap", "benchmark", "tuning", "training", "cli"]  # fmt: skip


def registered(path: Path) -> list[str]:
    return re.findall(r'm\.impl\("(\w+)"', path.read_text())


@pytest.mark.parametrize(
    ("sources", "ops"),
    [
        ("cpu/*.cpp", (*PRIMITIVES, "pack_frozen_transition", "packed_transition")),
        ("cuda/*.cu", (*PRIMITIVES, *THROUGH_NORM)),
    ],
)
def test_every_primitive_is_compiled_once_and_its_file_has_a_test(sources: str, ops: tuple[str, ...]) -> None:
    kernels: dict[str, list[str]] = {}
    for path in (ROOT / "csrc").glob(sources):
        if set(names := registered(path)) & set(ops):
            kernels.setdefault(path.stem.removesuffix("_backward"), []).extend(names)
    assert sorted(name for names in kernels.values() for name in names) == sorted(ops)
    triton = {path.stem for path in (PACKAGE / "backends" / "triton").glob("*.py")}
    assert set(kernels) <= triton
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "primitives").glob("test_*.py")}
    assert tests == {*kernels, "frozen_block", "plain_block"}  # which are made of primitives


@pytest.mark.parametrize("primitive", [*PRIMITIVES, *THROUGH_NORM])
def test_schema_interface_and_table_have_the_same_arguments(primitive: str) -> None:
    schema = re.search(rf"\b{primitive}\(([^)]*(?:\([a-z]!\)[^)]*)*)\) -> \(\)", _ops_source())
    assert schema is not None
    arguments = [argument.split() for argument in schema.group(1).split(",")]
    names = [argument[-1] for argument in arguments]
    code, row = getattr(Backend, primitive).__code__, TABLE[primitive]
    assert names == list(code.co_varnames[1 : code.co_argcount])
    assert set(names) == {*row.dimensions, *row.scalars}
    written = {argument[-1] for argument in arguments if "!" in argument[0]}
    assert written == {*row.writes, *row.adds_to, *row.overwrites}


def _ops_source() -> str:
    """csrc/ops.cpp with adjacent string literals joined, for a library without tf32."""
    return re.sub(r'"\s*(TF32_ARGUMENT\s*)?"', "", (ROOT / "csrc" / "ops.cpp").read_text())


def _layer(module: str) -> int | None:
    return LAYERS.index(module) if module in LAYERS else None


def _imports(path: Path) -> list[str]:
    """The top-level modules of dense_ext that a file imports from."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [name.split(".")[0] for name in names]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = _layer(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    if own is None:
        return
    for name in _imports(path):
        layer = _layer(name)
        assert layer is None or layer <= own, f"{path.name} imports {name}"


def test_documents_exist_and_links_in_them_lead_somewhere() -> None:
    folders = (ROOT, *(ROOT / name for name in ("docs", "benchmarks", "examples")))
    for document in (path for folder in folders for path in folder.glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
