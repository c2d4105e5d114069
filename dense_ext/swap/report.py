"""The report on a model: how each of its dense parts runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..backends import requested, select
from ..backends.general import FOR_IMAGES, FOR_VOLUMES, Form, in_form
from ..modules import FusedDenseBlock, FusedFeatures, FusedTransition
from ..recognise import Recognised, Rewritten, name_of_pieces


@dataclass(frozen=True)
class Row:
    """One dense part of a model."""

    name: str  # of the module, as in ``named_modules``
    kind: str  # what it is: a dense block, transition or stem
    runs: str  # "fused", "eager", or "refused" if the requested backend can't run it
    recompute: str  # the policy; empty where there is none
    detail: str  # the backends, or the reason why the part is not fused


@dataclass(frozen=True)
class Report:
    """The rows for a model's dense parts, first those that are swapped; printing it gives a table."""

    rows: list[Row]

    def __str__(self) -> str:
        if not self.rows:
            return "no dense block, transition or stem that dense_ext knows"
        header = ("part", "kind", "runs", "recompute", "by / why not")
        table = [header, *((r.name, r.kind, r.runs, r.recompute or "-", r.detail) for r in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(lines)


def swapped_rows(model: nn.Module) -> Iterator[Row]:
    """A row for each swapped part, saying how it would run now on its parameters' device and dtype."""
    kinds = ((FusedDenseBlock, "dense block"), (FusedTransition, "transition"), (FusedFeatures, "stem"))
    for name, module in model.named_modules():
        if isinstance(module, Rewritten):
            for pieces in module.plan.pieces:
                inner = name_of_pieces(module, pieces)
                yield _row(f"{name}.{inner}" if name else inner, pieces.kind, module, [pieces.form])
            continue
        if isinstance(module, Recognised):
            yield _row(name, module.plan.kind, module, module.forms())
            continue
        kind = next((k for cls, k in kinds if isinstance(module, cls)), None)
        if kind is None or (isinstance(module, FusedFeatures) and not module.runs_stem()):
            continue
        volumes = any(isinstance(inner, nn.BatchNorm3d) for inner in module.modules())
        yield _row(name, kind, module, [FOR_VOLUMES if volumes else FOR_IMAGES])


def _row(name: str, kind: str, module: Any, forms: list[Form]) -> Row:
    """The row of a part that a swapped module runs with primitives of these forms."""
    recompute = "" if kind == "transition" else getattr(module, "recompute", "")
    if (reason := module.why_not_at_rest(module)) is not None:
        return Row(name, kind, "eager", recompute, reason)
    parameter = next(module.parameters(), None)
    tensor = parameter if parameter is not None else next(module.buffers())
    try:
        primitives = select(requested(module.backend), tensor.device.type, tensor.dtype)
        detail = " and ".join(dict.fromkeys(in_form(primitives, form).summary() for form in forms))
    except RuntimeError as error:
        return Row(name, kind, "refused", recompute, str(error))
    return Row(name, kind, "fused", recompute, detail)
