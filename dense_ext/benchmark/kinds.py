"""Every kind of result: those of the suites, of ``dense-ext models`` and of ``dense-ext train``."""

from __future__ import annotations

from ..schedule import RECOMPUTE
from .family import MEMORY_KINDS
from .results import Results
from .suites import SUITES
from .tables import Draw, Kind, Table, failures, number


class Family(Kind):
    """Networks with their parameters, arithmetic and memory."""

    name = "models"
    title = "The family"

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        rows = []
        for network in results["models"]:
            saved = network["saved_bytes_per_image"]
            cells = [f"{saved[kind] / 1e6:.1f}" if kind in saved else "-" for kind in MEMORY_KINDS]
            rows.append((
                network["name"], str(network["size"]), f"{network['parameters'] / 1e6:.2f}",
                f"{network['forward_flops_per_image'] / 1e9:.3g}", *cells,
            ))  # fmt: skip
        title = (
            "kept for backward in MB (1e6 bytes) per image: eager, memory_efficient, dense_ext by recompute"
        )
        header = ("network", "pixels", "M parameters", "GFLOP forward", *MEMORY_KINDS)
        return {"models": Table(title, header, rows), "accuracy": _accuracies(results)}

    @classmethod
    def figures(cls, results: Results) -> dict[str, Draw]:
        from .figures import accuracy_lines, family_bars

        found: dict[str, Draw] = {"models": family_bars} if results["models"] else {}
        if any(network["imagenet_top1_percent"] for network in results["models"]):
            found["accuracy"] = accuracy_lines
        return found


def _accuracies(results: Results) -> Table:
    """Top-1 accuracy beside what it costs, the most accurate network first."""
    known = [row for row in results["models"] if row["imagenet_top1_percent"] is not None]
    kinds = ("default", *RECOMPUTE)
    rows = [
        (
            row["name"],
            f"{row['imagenet_top1_percent']:.2f}",
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['forward_flops_per_image'] / 1e9:.3g}",
            *(f"{row['step_bytes'][kind] / 1e9:.2f}" if kind in row["step_bytes"] else "-" for kind in kinds),
        )
        for row in sorted(known, key=lambda row: -row["imagenet_top1_percent"])
    ]
    title = (
        f"ImageNet top-1 accuracy in % ({results['accuracy_source']}) beside what a training step of "
        f"{results['step_batch']} images holds in GB (1e9 bytes): eager, dense_ext by recompute"
    )
    header = ("network", "top-1 %", "M parameters", "GFLOP forward", "eager", *RECOMPUTE)
    return Table(title, header, rows)


class Trainings(Kind):
    """Trainings with their loss and accuracy by epoch."""

    name = "train"
    title = "Training"

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        histories = {name: run["history"] for name, run in results["runs"].items() if run["history"]}
        rows = [
            (name, f"{h[-1]['test_accuracy']:.2%}", number(h[-1]["test_loss"], ".3f"),
             f"{sum(epoch['seconds'] for epoch in h):.0f}")
            for name, h in histories.items()
        ]  # fmt: skip
        options, images = results.options, results["images"]
        caption = (
            f"{options['model']}, {max(map(len, histories.values()), default=0)} epochs of "
            f"{images['training']} images of {options['size']}x{options['size']}, batches of "
            f"{options['batch']}; one of the {images['test']} test images is {1 / images['test']:.2%}"
        )
        title = f"training {options['model']} on {results['data']}"
        return {
            "accuracy": Table(title, ("", "test accuracy", "test loss", "seconds"), rows, caption=caption)
        }

    @classmethod
    def figures(cls, results: Results) -> dict[str, Draw]:
        from .figures import training_curves

        return {"curves": training_curves} if any(r["history"] for r in results["runs"].values()) else {}


KINDS: dict[str, type[Kind]] = {**SUITES, Family.name: Family, Trainings.name: Trainings}


def tables_of(results: Results) -> list[Table]:
    """Every table that the results have data for; of an interrupted run what was measured until then."""
    found = [*KINDS[results.kind].tables(results).values(), failures(results)]
    return [table for table in found if table.rows]
