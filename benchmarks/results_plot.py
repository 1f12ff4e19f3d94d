"""Draws docs/results/FAMILY.json: what quantization costs each method, beside its outliers.

python -m benchmarks.results_plot docs/results/bert.json [--setting=w8a8]

A dot for each training seed; bars are sample standard deviations over calibration seeds. A value of
more than `FAR` medians stands as a number, for the others would lie on one spot beside it.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.results_table import in_order, judged, pooled, read_rows, settings_of, unit
from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.evaluation.tables import title

Row = dict[str, Any]
FAR = 8


def draw(rows: list[Row], setting: str, file: Path) -> None:
    """Writes the picture: methods downwards in the order of their cost, the least first."""
    methods = in_order([row for row in rows if setting in row], setting)
    costs = [[pooled([row], setting) for row in found] for found in methods.values()]
    norms = [[(row["max_inf_norm"], 0.0) for row in found] for found in methods.values()]
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 1.1 + 0.27 * len(methods)), sharey=True, layout="constrained"
    )
    _panel(axes[0], costs, "C0")
    _panel(axes[1], norms, "C1")
    axes[0].set_yticks(range(len(methods)), [name.replace("_", " ") for name in methods])
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    axes[0].set(xlabel=unit(rows), title=f"what {title(setting)} costs")
    axes[1].set(xlabel="max inf norm", title="largest activation")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, lines: list[list[tuple[float, float]]], color: str) -> None:
    """A line of dots with their deviations for each method; those beyond the scale as numbers."""
    values = [value for line in lines for value, _ in line]
    far = FAR * statistics.median(map(abs, values))
    for place, line in enumerate(lines):
        drawn = [(value, deviation) for value, deviation in line if value <= far]
        axis.errorbar(
            [value for value, _ in drawn],
            [place] * len(drawn),
            xerr=[deviation for _, deviation in drawn],
            fmt="o",
            color=color,
            markersize=4,
        )
        beyond = ", ".join(f"{value:.3g}" for value, _ in line if value > far)
        if beyond:
            spot = axis.get_yaxis_transform()  # across in parts of the panel
            text = f"{beyond} \N{RIGHTWARDS ARROW}"
            axis.text(0.99, place, text, ha="right", va="center", transform=spot)
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.grid(alpha=0.3)


def main() -> None:
    """Draws one file of rows, beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--setting", help="by default the one that the table is ordered by")
    options = parser.parse_args()
    try:
        rows = read_rows(options.rows)
        setting = options.setting or judged(rows)
        check_choice("--setting", setting, settings_of(rows))
    except UserError as error:
        parser.error(str(error))
    draw(rows, setting, options.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
