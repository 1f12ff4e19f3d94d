"""Draws how outliers grow while models train, from what `train.telemetry_every` logged.

    python -m benchmarks.telemetry RUN [RUN ...] --out=outliers.png

Loss, the largest infinity norm and the mean kurtosis of the published sites over steps, a line for
each run, which is named by its folder; a table of the same is printed.
"""

import argparse
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Series = dict[int, float]


def series(run: pathlib.Path) -> dict[str, Series]:
    """Quantity -> step -> value."""
    found: dict[str, Series] = {"training loss": {}, "max inf norm": {}, "mean kurtosis": {}}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        step = line["step"]
        if line["group"] == "train":
            found["training loss"][step] = line["loss"]
        elif line["group"] == "telemetry":
            found["max inf norm"][step] = max(_of(line, ":inf_norm"))
            found["mean kurtosis"][step] = float(np.mean(_of(line, ":kurtosis")))
    return found


def _of(line: dict[str, Any], ending: str) -> list[float]:
    return [value for name, value in line.items() if name.endswith(ending)]


def main() -> None:
    """Draws the figure and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", default="outliers.png")
    options = parser.parse_args()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for run in options.runs:
        for axis, (name, values) in zip(axes, series(run).items(), strict=True):
            axis.plot(list(values), list(values.values()), label=run.name)
            axis.set(xlabel="step", title=name, yscale="linear" if "loss" in name else "log")
            if axis is axes[0]:
                continue
            shown = "  ".join(f"{step}: {value:.3g}" for step, value in values.items())
            print(f"{run.name}, {name}: {shown}")
    axes[0].legend()
    figure.savefig(options.out, dpi=90)


if __name__ == "__main__":
    main()
