"""Every kind of result: those of the suites, of ``dense-ext models`` and of ``dense-ext train``."""

from __future__ import annotations

from .family import Family
from .results import Results
from .suites import SUITES
from .tables import Draw, Kind, Table, failures, number


class Trainings(Kind):
    """Trainings with their loss and accuracy by epoch."""

    name = "train"
    title = "Training"

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        histories = {name: run["history"] for name, run in results.content["runs"].items() if run["history"]}
        options, images = results.options, results.content["images"]
        caption = (
            f"{options['model']}, {max(map(len, histories.values()), default=0)} epochs of "
            f"{images['training']} images of {options['size']}x{options['size']}, batches of "
            f"{options['batch']}; one of the {images['test']} test images is {1 / images['test']:.2%}"
        )
        return {"accuracy": Table.of(f"training {options['model']} on {results.content['data']}", histories, {
            "": str,
            "test accuracy": lambda name: f"{histories[name][-1]['test_accuracy']:.2%}",
            "test loss": lambda name: number(histories[name][-1]["test_loss"], ".3f"),
            "seconds": lambda name: f"{sum(epoch['seconds'] for epoch in histories[name]):.0f}",
        }, caption=caption)}  # fmt: skip

    @classmethod
    def figures(cls, results: Results) -> dict[str, Draw]:
        from .figures import training_curves

        trained = any(run["history"] for run in results.content["runs"].values())
        return {"curves": training_curves} if trained else {}


KINDS: dict[str, type[Kind]] = {**SUITES, Family.name: Family, Trainings.name: Trainings}


def tables_of(results: Results) -> list[Table]:
    """Every table that the results have data for; of an interrupted run what was measured until then."""
    found = [*KINDS[results.kind].tables(results).values(), failures(results)]
    return [table for table in found if table.rows]
