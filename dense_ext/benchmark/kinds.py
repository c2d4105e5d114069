"""Every kind of result: those of the suites, of ``dense-ext models`` and of ``dense-ext train``."""

from __future__ import annotations

from .family import Family
from .results import Results, by_peer
from .suites import SUITES
from .tables import Kind, Table, failures, shown


class Trainings(Kind):
    """Trainings: a row per network and epoch."""

    name = "train"
    title = "Training"

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        runs, options = by_peer(results.rows), results.options
        caption = (
            f"{options['model']}, {max(map(len, runs.values()), default=0)} epochs of "
            f"{options['training_images']} images of {options['size']}x{options['size']}, batches of "
            f"{options['batch']}; one of the {options['test_images']} test images is "
            f"{1 / options['test_images']:.2%}"
        )
        return {"accuracy": Table.of(f"training {options['model']} on {options['data']}", runs.values(), {
            "": lambda run: results.label(run[-1]),
            "test accuracy": lambda run: f"{run[-1].measures['test_accuracy']:.2%}",
            "test loss": lambda run: shown(run[-1].measures["test_loss"], ".3f", "not finite"),
            "seconds": lambda run: f"{sum(epoch.median for epoch in run):.0f}",
        }, caption=caption)}  # fmt: skip


KINDS: dict[str, type[Kind]] = {**SUITES, Family.name: Family, Trainings.name: Trainings}


def tables_of(results: Results) -> list[Table]:
    """Every table that the results have data for; of an interrupted run what was measured until then."""
    found = [*KINDS[results.kind].tables(results).values(), failures(results)]
    return [table for table in found if table.rows and not table.short]
