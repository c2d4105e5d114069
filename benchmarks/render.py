"""Draw every committed result's figures and write the tables of ``PAGES``: ``python benchmarks/render.py``.

``results/NAME.json``, as ``dense-ext bench``, ``models`` and ``train`` write them, gives
``figures/NAME-memory.png`` and so on; figures of ``results/GPU/NAME.json`` are named ``GPU-NAME``. In each
page the text between ``<!-- NAME: KIND -->`` and ``<!-- end -->`` is replaced by a table of that result; no
number in a table is written by hand.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dense_ext.benchmark.compare import case_text
from dense_ext.benchmark.figures import draw_all
from dense_ext.benchmark.plot_style import machine_name, setting
from dense_ext.benchmark.relative import fastest, references, speeds
from dense_ext.benchmark.results import read_json
from dense_ext.benchmark.tables import ratio_cells, ratio_columns, sides

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# The pages with tables.
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "benchmarks.md")

Results = dict[str, Any]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _captioned(table: str, *caption: str) -> str:
    """What was measured, below the table."""
    return f"{table}\n\n{'; '.join(caption)}."


def _label(results: Results, name: str) -> str:
    label = results["peers"][name]["label"]
    return f"**{label}**" if results["peers"][name]["ours"] else label


def summary_table(results: Results) -> str:
    """Memory and speed of a step by peer, each in its own setting."""
    memory, options = results["memory"], results["options"]
    eager = memory["eager"]["saved_bytes_per_image"]
    rows = (
        (
            _label(results, name),
            f"{memory[name]['saved_bytes_per_image'] / 1e6:.1f}",
            f"{eager / memory[name]['saved_bytes_per_image']:.1f}",
            f"{memory[name]['peak_bytes_per_image'] / 1e6:.1f}",
            f"{s['images_per_second']:.1f}",
            *ratio_cells(s["ratios"]),
        )
        for name, s in speeds(results).items()
    )
    header = (
        "",
        "kept for backward, MB an image",
        "times less than eager",
        "peak, MB an image",
        "images/s",
        *ratio_columns(results),
    )
    return _captioned(
        _table(header, rows),
        f"memory: {setting(results, options['memory_batch'], options['memory_size'])}",
        f"speed: {options['batch']} images of {options['size']}x{options['size']}, medians of "
        f"{options['rounds']} rounds, PyTorch {results['versions']['torch']}",
    )


def memory_table(results: Results) -> str:
    """Bytes kept for backward and the peak of a step, by peer."""
    memory = results["memory"]
    eager = memory["eager"]["saved_bytes_per_image"]
    rows = (
        (
            _label(results, name),
            f"{m['saved_bytes_per_image'] / 1e6:.1f}",
            f"{eager / m['saved_bytes_per_image']:.1f}",
            f"{m['peak_bytes_per_image'] / 1e6:.1f}",
        )
        for name, m in memory.items()
    )
    options = results["options"]
    return _captioned(
        _table(("MB an image", "kept for backward", "times less than eager", "peak of a step"), rows),
        setting(results, options["memory_batch"], options["memory_size"]),
    )


def speed_table(results: Results) -> str:
    """Seconds per step with their spread, and what they are beside the fastest eager network."""
    rows = (
        (
            _label(results, name),
            f"{s['median']:.3f}",
            f"{s['min']:.3f} to {s['max']:.3f}",
            f"{s['images_per_second']:.1f}",
            *ratio_cells(s["ratios"]),
            f"{s['matmul_share']:.0%}",
        )
        for name, s in speeds(results).items()
    )
    header = ("", "median s", "min to max", "images/s", *ratio_columns(results), "of matmul rate")
    options, work = results["options"], results["work"]
    return _captioned(
        _table(header, rows),
        setting(results, options["batch"], options["size"]),
        f"PyTorch {results['versions']['torch']}",
        f"{options['rounds']} rounds. What bounds the step is arithmetic: "
        f"{work['step_flops_per_image'] / 1e9:.2f} GFLOP an image, on a machine that multiplies matrices "
        f"at {work['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s and copies at "
        f"{work['copy_bytes_per_second'] / 1e9:.0f} GB/s",
    )


def peers_table(results: Results) -> str:
    """Bytes and time of a step, beside all kinds of peers."""
    speed, memory, options = speeds(results), results["memory"], results["options"]
    rows = (
        (
            _label(results, name),
            *(f"{memory[name][f'{what}_bytes_per_image'] / 1e6:.1f}" for what in ("saved", "peak")),
            f"{s['median']:.3f}",
            f"{s['min']:.3f} to {s['max']:.3f}",
            *ratio_cells(s["ratios"]),
        )
        for name, s in speed.items()
    )
    header = (
        "MB an image",
        "kept for backward",
        "peak of a step",
        "median s",
        "min to max",
        *ratio_columns(results),
    )
    return _captioned(
        _table(header, rows),
        setting(results, options["batch"], options["size"]),
        f"PyTorch {results['versions']['torch']}, timm {results['versions']['timm']}",
        f"{options['rounds']} rounds",
    )


def depth_table(results: Results) -> str:
    """The lines through memory against depth."""
    depth, block = results["depth"]["peers"], results["depth"]["block"]
    rows = (
        (
            _label(results, name),
            f"{d['saved_bytes'][-1] / 1e6:.2f}",
            f"{d['line']['slope'] / 1e3:.1f}",
            f"{d['line']['r2']:.6f}",
        )
        for name, d in depth.items()
    )
    layers = next(iter(depth.values()))["layers"][-1]
    return _captioned(
        _table(("", f"MB at {layers} layers", "line: kB a layer", "line: R²"), rows),
        f"growth rate {block['growth_rate']}, bottleneck of {block['bottleneck']} channels",
        f"{block['size']}x{block['size']} pixels, {results['options']['dtype']}",
    )


def volumes_table(results: Results) -> str:
    """A step's bytes and time on volumes, by peer."""
    rows = [row for row in results["rows"] if row["seconds"] and "saved_bytes" in row["measures"]]
    case, (reference, among) = rows[0]["case"], next(iter(references(results).items()))
    rows = [row for row in rows if row["case"] == case]
    least = fastest(results, case, among)
    cells = (
        (
            _label(results, row["peer"]),
            *(f"{row['measures'][name] / 1e6 / case['batch']:.1f}" for name in ("saved_bytes", "peak_bytes")),
            f"{statistics.median(row['seconds']):.2f}",
            f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}",
            f"{least / statistics.median(row['seconds']):.2f}",
        )
        for row in rows
    )
    header = (
        "MB a volume",
        "kept for backward",
        "peak of a step",
        "median s",
        "min to max",
        f"{reference} = 1",
    )
    return _captioned(
        _table(header, cells),
        f"{case['batch']} volumes of {sides(results, case)}, {case['dtype']}, {machine_name(results)}",
        f"{results['options']['rounds']} rounds",
    )


def inference_table(results: Results) -> str:
    """How many times as fast as the fastest eager network dense_ext is, by network and batch."""
    return _speed_by_network(results, lambda row: f"images: {row['case']['batch']}")


def steps_table(results: Results) -> str:
    """How many times as fast as the fastest eager network dense_ext trains, by network and policy."""
    return _speed_by_network(results, lambda row: row["peer"].replace("dense_ext-", "recompute "))


def _speed_by_network(results: Results, column: Callable[[Results], str]) -> str:
    """A row a network; how far eager's samples spread says how far the ratios are to be trusted."""
    found: dict[str, dict[str, float]] = {}
    spread: dict[str, float] = {}
    reference, among = next(iter(references(results).items()))
    for row in results["rows"]:
        if row["seconds"]:
            case, samples = row["case"], row["seconds"]
            least, network = fastest(results, case, among), f"{case['model']}, {case['size']}x{case['size']}"
            if results["peers"][row["peer"]]["ours"]:
                found.setdefault(network, {})[column(row)] = least / statistics.median(samples)
            elif statistics.median(samples) == least:
                spread[network] = max(spread.get(network, 0), max(samples) / min(samples))
    columns = list(dict.fromkeys(name for speed in found.values() for name in speed))
    rows = (
        (network, *(f"{speed[name]:.2f}" for name in columns), f"{spread[network]:.2f}")
        for network, speed in found.items()
    )
    batches = " and ".join(dict.fromkeys(str(row["case"]["batch"]) for row in results["rows"]))
    options = results["options"]
    return _captioned(
        _table((f"{reference} = 1", *columns, "its slowest / fastest sample"), rows),
        f"images a call: {batches}",
        f"{', '.join(options['dtypes'])}, {machine_name(results)}, {options['rounds']} rounds",
    )


def batches_table(results: Results) -> str:
    """The largest batch that trains within a budget, by peer."""
    return _fitting(results, "largest_batch", "images")


def deepest_table(results: Results) -> str:
    """The deepest network of the paper's that fits a budget, by peer."""
    return _fitting(results, "deepest", "layers")


def _fitting(results: Results, measure: str, what: str) -> str:
    fits = [row for row in results["rows"] if measure in row["measures"]]
    fits = [row for row in fits if row["case"] == fits[0]["case"]]
    rows = ((_label(results, row["peer"]), str(row["measures"][measure])) for row in fits)
    case = fits[0]["case"]
    return _captioned(
        _table(("", f"{what} that train in {case['budget_bytes'] / 1e6:g} MB"), rows),
        case_text({name: value for name, value in case.items() if name != "budget_bytes"}),
    )


def accuracy_table(results: Results) -> str:
    """Final test accuracy and time of each network trained."""
    rows = (
        (
            name,
            f"{run['history'][-1]['test_accuracy']:.2%}",
            f"{run['history'][-1]['test_loss']:.3f}",
            f"{sum(epoch['seconds'] for epoch in run['history']):.0f}",
        )
        for name, run in results["runs"].items()
    )
    options, images = results["options"], results["images"]
    return _captioned(
        _table(("", "test accuracy", "test loss", "seconds"), rows),
        f"{options['model']}, {options['epochs']} epochs of {images['training']} images of "
        f"{options['size']}x{options['size']}, batches of {options['batch']}",
        f"one of the {images['test']} test images is {1 / images['test']:.2%}",
    )


KINDS = {
    "summary": summary_table,
    "memory": memory_table,
    "speed": speed_table,
    "depth": depth_table,
    "peers": peers_table,
    "inference": inference_table,
    "volumes": volumes_table,
    "steps": steps_table,
    "batches": batches_table,
    "deepest": deepest_table,
    "accuracy": accuracy_table,
}


def committed() -> dict[str, Path]:
    """The result files by their names; in a GPU's folder one has the folder's before its own."""
    paths = sorted(RESULTS.rglob("*.json"))
    return {"-".join(path.relative_to(RESULTS).with_suffix("").parts): path for path in paths}


def rendered(text: str) -> str:
    """``text`` with every marked part written anew from its result."""
    results = committed()

    def replace(match: re.Match[str]) -> str:
        name, kind = match.group("name", "kind")
        table = KINDS[kind](read_json(results[name]))
        return f"<!-- {name}: {kind} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>[\w-]+): (?P<kind>\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> None:
    for name, path in committed().items():
        for figure in draw_all(read_json(path), HERE / "figures", f"{name}-"):
            print(figure.relative_to(HERE))
    for page in PAGES:
        page.write_text(rendered(page.read_text()))


if __name__ == "__main__":
    main()
