"""Draws docs/results/FAMILY.json: what quantization costs each method, beside its outliers.

python -m benchmarks.results_plot docs/results/bert.json [--setting=w8a8]

A dot for each training seed; bars are sample standard deviations over calibration seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results_table import by_method, judged, pooled, unit
from quantizable_flax.evaluation.tables import title

Row = dict[str, Any]


def draw(rows: list[Row], setting: str, file: Path) -> None:
    """Writes the picture: methods downwards in the order of their cost, the least first."""
    methods = by_method([row for row in rows if setting in row])
    order = sorted(methods, key=lambda name: pooled(methods[name], setting)[0])
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 1.1 + 0.27 * len(order)), sharey=True, layout="constrained"
    )
    for place, name in enumerate(order):
        found = methods[name]
        costs = [pooled([row], setting) for row in found]
        places = [place] * len(found)
        axes[0].errorbar(
            [mean for mean, _ in costs],
            places,
            xerr=[deviation for _, deviation in costs],
            fmt="o",
            color="C0",
            markersize=4,
        )
        axes[1].plot([row["max_inf_norm"] for row in found], places, "o", color="C1", markersize=4)
    axes[0].set_yticks(range(len(order)), [name.replace("_", " ") for name in order])
    axes[0].invert_yaxis()
    axes[0].set(xlabel=unit(rows), title=f"what {title(setting)} costs")
    axes[0].set_xlim(left=min(0.0, axes[0].get_xlim()[0]))
    largest = max(row["max_inf_norm"] for found in methods.values() for row in found)
    axes[1].set(xlabel="max inf norm", title="largest activation", xlim=(0, 1.05 * largest))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draws one file of rows, beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--setting", help="by default the one that the table is ordered by")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text())
    draw(rows, options.setting or judged(rows), options.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
