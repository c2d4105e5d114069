"""``dense-ext tune``: the Triton kernels' configurations, measured on this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import progress, remark
from .options import check, check_choice, check_positive, option


def tune(
    model: Annotated[str, typer.Option(help="Whose layers: a name from dense-ext models.")] = "densenet121",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 224,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    table: Annotated[Path | None, option("Where to write.", "the user's own table")] = None,
) -> None:
    """Measure neighbours of each Triton kernel's configuration on this GPU, and keep the faster ones.

    Writes a table that the Triton backend reads before the one shipped with the package. Rows for
    other shapes and chips that it has stay. Ctrl-C keeps what was found.
    """
    from ..backends import unavailable_reasons
    from ..benchmark.networks import check_model_name
    from ..benchmark.primitives import model_cases
    from ..benchmark.step import DTYPES
    from ..models import MODELS

    check_model_name(model)
    check_positive(batch=batch, size=size)
    check_choice("--dtype", dtype, tuple(DTYPES))
    reason = unavailable_reasons("cuda", DTYPES[dtype])["triton"]
    check(reason is None, f"the Triton backend can't run here: {reason}")

    import torch

    from ..backends.triton.configs import Row, forget_tables, user_table, write_rows
    from ..benchmark.tune import Key, tune_case

    cases = model_cases(MODELS[model], batch, size)
    rows: list[Row] = []
    done: set[Key] = set()
    try:
        with progress(len(cases)) as tick:
            for case in cases:
                tick(f"{case.primitive}, {case.where}")
                rows += tune_case(case, DTYPES[dtype], torch.device("cuda"), done, lambda what: None)
    except KeyboardInterrupt:
        remark("ended early")
    path = table or user_table()
    write_rows(path, rows)
    forget_tables()
    remark(f"{len(rows)} of {len(done)} configurations got faster; wrote {path}")
