"""docs/results/FAMILY.json as a Markdown table: means over training and calibration seeds.

python -m benchmarks.results_table docs/results/bert.json
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from quantizable_flax.evaluation.tables import number, title
from quantizable_flax.models.metric import METRICS

Row = dict[str, Any]
# What tells methods apart at the size of models that minutes train: W8A8 costs next to nothing.
JUDGED = "w6a6"
UNITS = {"perplexity": "token", "top1": "image"}


def unit(rows: list[Row]) -> str:
    """What a cost is measured in, of images too: a few hundred tell no accuracies apart."""
    return f"loss increase (nats per {UNITS[rows[0]['metric']]})"


def pooled(rows: list[Row], setting: str) -> tuple[float, float]:
    """How much a setting adds to the loss: mean and sample standard deviation over all seeds.

    A row knows mean and deviation over its calibration seeds.
    """
    means = [row[f"{setting}_loss"] - row["fp_loss"] for row in rows]
    inner = [row.get(f"{setting}_loss_std") or 0.0 for row in rows]
    counts = [row["calibration_seeds"] for row in rows]
    total = sum(counts)
    mean = sum(n * m for n, m in zip(counts, means, strict=True)) / total
    squares = sum(
        (n - 1) * s * s + n * (m - mean) ** 2 for n, m, s in zip(counts, means, inner, strict=True)
    )
    return mean, math.sqrt(squares / (total - 1)) if total > 1 else math.nan


def spread(values: list[float]) -> str:
    """`12.3 (11.9 to 12.8)`; one value alone."""
    mean = number(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))} to {number(max(values))})"


def line(method: str, rows: list[Row], settings: list[str]) -> list[str]:
    """The cells of one method."""
    cells = [method, str(len(rows))]
    cells += [spread([row[key] for row in rows]) for key in ("fp", "max_inf_norm", "avg_kurtosis")]
    for setting in settings:
        if all(setting in row for row in rows):
            mean, deviation = pooled(rows, setting)
            cells.append(f"{mean:+.4f} ± {deviation:.4f}")
        else:  # a setting that refuses the method, or that came after some of its rows
            cells.append("")
    return [*cells, str(rows[0]["steps"]), number(sum(r["seconds"] for r in rows) / len(rows))]


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method, in the order of the file."""
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return methods


def settings_of(rows: list[Row]) -> list[str]:
    """The quantized columns that some row has."""
    found = [
        key.removesuffix("_loss_std") for row in rows for key in row if key.endswith("_loss_std")
    ]
    return list(dict.fromkeys(found))


def judged(rows: list[Row]) -> str:
    """The setting that methods are ordered by: W6A6, or the first that all rows have."""
    common = [name for name in settings_of(rows) if all(name in row for row in rows)]
    return JUDGED if JUDGED in common else common[0]


def table(rows: list[Row]) -> str:
    """All methods, those first that cost least in the setting of `judged`."""
    settings = settings_of(rows)
    methods = by_method(rows)
    heads = ["method", "seeds", f"FP {METRICS[rows[0]['metric']].label}"]
    heads += ["max inf norm", "avg kurtosis", *map(title, settings), "steps", "seconds"]
    by = judged(rows)
    order = sorted(methods, key=lambda name: pooled(methods[name], by)[0])
    lines = [heads, ["---"] * len(heads), *(line(m, methods[m], settings) for m in order)]
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    return f"Quantized columns: {unit(rows)}, mean ± sample standard deviation.\n\n{text}"


def write_table(file: Path) -> None:
    """Writes the table beside the rows."""
    file.with_suffix(".md").write_text(table(json.loads(file.read_text())))


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
