"""The table of the block sizes, warps and stages that each kernel is compiled with; it is read once.

Rows of the user's own table, which ``dense-ext tune`` writes, take precedence over those of
``configs.json``, which the package ships. A row is keyed by kernel, architecture, precision and shape
class; the class ``"*"`` matches any shape. Each row names its source: it was measured (on which GPU and
when), or estimated from the registers, spills and shared memory of the compiled kernel.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..tables import own_table, write_table

SHIPPED = Path(__file__).with_name("configs.json")
ENVIRONMENT_VARIABLE = "DENSE_EXT_TRITON_TABLE"
ANY_SHAPE = "*"


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def shape_class(*sizes: int) -> str:
    """The name of the class of shapes that a tuned row applies to: the sizes rounded up to powers of two."""
    return "x".join(str(power_of_2(size)) for size in sizes)


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled and spread over the GPU.

    Attributes:
        blocks: the kernel's block sizes, by the names of their constants.
        programs_per_multiprocessor: how many programs to start per multiprocessor if the grid's programs
            loop over tiles of pixels.
    """

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    programs_per_multiprocessor: int = 2

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        """Triton's compile options."""
        return ("num_warps", self.num_warps), ("num_stages", self.num_stages)

    def fit(self, **sizes: int) -> Config:
        """The same configuration with no block larger than its size needs; ``tl.dot`` needs at least 16."""
        fitted = {name: min(self.blocks[name], max(16, power_of_2(size))) for name, size in sizes.items()}
        return replace(self, blocks=self.blocks | fitted)


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    kernel: str
    architecture: str
    precision: str
    shape: str
    config: Config
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The key under which the row is looked up."""
        return self.kernel, self.architecture, self.precision, self.shape

    def as_json(self) -> dict[str, Any]:
        """The row as a table file holds it."""
        return asdict(self)


def user_table() -> Path:
    """The file that ``dense-ext tune`` writes: ``$DENSE_EXT_TRITON_TABLE`` or one in the user's cache."""
    return own_table("triton", ENVIRONMENT_VARIABLE)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a table.

    Raises:
        ValueError: the file is not a table; the message names the file and the reason.
    """
    try:
        for row in json.loads(path.read_text()):
            yield Row(**row | {"config": Config(**row["config"])})
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of Triton configurations: {error!r}") from error


@functools.cache
def _table() -> dict[tuple[str, str, str, str], Config]:
    paths = [SHIPPED, *([user_table()] if user_table().exists() else [])]
    return {row.key: row.config for path in paths for row in read_rows(path)}


@contextmanager
def trying(kernel: str, architecture: str, precision: str, shape: str, config: Config) -> Iterator[None]:
    """Make look-ups of this key find ``config`` inside the context."""
    table, key = _table(), (kernel, architecture, precision, shape)
    before = table.get(key)
    table[key] = config
    try:
        yield
    finally:
        table.pop(key)
        if before is not None:
            table[key] = before


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a table; the rows that it has for other keys stay."""
    kept = {row.key: row for row in (read_rows(path) if path.exists() else ())}
    kept |= {row.key: row for row in rows}
    write_table(path, [row.as_json() for row in kept.values()])


def find_config(kernel: str, architecture: str, precision: str, shape: str = ANY_SHAPE) -> Config:
    """The configuration of a kernel: that of its shape class if it was tuned, else the one for any shape.

    Raises:
        LookupError: the table has no configuration for that architecture and precision.
    """
    table = _table()
    for candidate in (shape, ANY_SHAPE):
        if config := table.get((kernel, architecture, precision, candidate)):
            return config
    raise LookupError(f"no configuration for {kernel} on {architecture} in {precision}")


def forget_tables() -> None:
    """Make the next look-up read the tables again, after one of them was written."""
    _table.cache_clear()


def has_architecture(architecture: str) -> bool:
    """Whether the table has a row for an architecture."""
    return any(key[1] == architecture for key in _table())
