"""docs/results/FAMILY.json as Markdown tables: what each training seed has, and means over seeds.

python -m benchmarks.results_table docs/results/*.json

FAMILY.md beside the rows gets both with every setting; docs/results.md gets the first, with the
settings of `PAGE`, between `<!-- table of FAMILY -->` and `<!-- end of the table of FAMILY -->`.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from quantizable_flax.errors import UserError
from quantizable_flax.evaluation.tables import markdown_table, number, title
from quantizable_flax.models.metric import METRICS

Row = dict[str, Any]
# What tells methods apart at the size of models that minutes train: W8A8 costs next to nothing.
JUDGED = "w6a6"
# The columns that fit on a page.
PAGE = ("w8a8", "w6a6", "w4a4", "w6a6+hadamard")
OUTLIERS = {"max_inf_norm": "max inf norm", "avg_kurtosis": "avg kurtosis"}
UNITS = {"perplexity": "token", "top1": "image"}


def read_rows(file: Path) -> list[Row]:
    """Reads docs/results/FAMILY.json.

    Raises:
      UserError: there is no such file, or no row of `benchmarks.results` in it.
    """
    try:
        rows = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} could not be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}.") from error
    kept = {"method", "seed", "calibration_seeds", "overrides", "fp_loss"}
    known = isinstance(rows, list) and all(
        isinstance(row, dict) and kept <= set(row) for row in rows
    )
    if not (rows and known):
        raise UserError(
            f"{file} must have a list of the rows that python -m benchmarks.results keeps, with "
            f"{', '.join(sorted(kept))} and more."
        )
    return rows


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
    cells += [spread([row[key] for row in rows]) for key in ("fp", *OUTLIERS)]
    for setting in settings:
        if all(setting in row for row in rows):
            mean, deviation = pooled(rows, setting)
            behind = "" if math.isnan(deviation) else f" ± {deviation:.4f}"
            cells.append(f"{mean:+.4f}{behind}")
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
    """The setting that methods are ordered by: W6A6, or the first that all rows have.

    Raises:
      UserError: there is none.
    """
    common = [name for name in settings_of(rows) if all(name in row for row in rows)]
    if not common:
        raise UserError(
            f"rows must have a setting in common, found {', '.join(settings_of(rows))}: delete the "
            "rows of other settings."
        )
    return JUDGED if JUDGED in common else common[0]


def in_order(rows: list[Row], setting: str) -> dict[str, list[Row]]:
    """The rows of each method, those first that cost least in a setting."""
    return dict(sorted(by_method(rows).items(), key=lambda item: pooled(item[1], setting)[0]))


def means(rows: list[Row]) -> str:
    """All methods, pooled over training and calibration seeds."""
    settings = settings_of(rows)
    heads = ["method", "seeds", f"FP {METRICS[rows[0]['metric']].label}"]
    heads += [*OUTLIERS.values(), *map(title, settings), "steps", "seconds"]
    methods = in_order(rows, judged(rows))
    return markdown_table(heads, [line(m, found, settings) for m, found in methods.items()])


def by_seed(rows: list[Row], settings: Iterable[str]) -> str:
    """All methods, a value for each training seed: means over its calibration seeds.

    Where the cost of a setting does not tell which model ends best, its metric does: of the one
    that methods are ordered by, it stands behind that in floating point.
    """
    settings = [name for name in settings_of(rows) if name in settings]
    by, label = judged(rows), METRICS[rows[0]["metric"]].label
    seeds = sorted({row["seed"] for row in rows})

    def cell(found: list[Row], key: str, show: Callable[[Row, str], str]) -> str:
        known = {row["seed"]: show(row, key) for row in found if key in row}
        return ", ".join(known.get(seed, "–") for seed in seeds)

    lines = [
        [method]
        + [cell(found, key, _figure) for key in ("fp", by, *OUTLIERS)]
        + [cell(found, name, _cost) for name in settings]
        for method, found in in_order(rows, by).items()
    ]
    heads = ["method", f"FP {label}", f"{title(by)} {label}", *OUTLIERS.values()]
    return markdown_table([*heads, *map(title, settings)], lines)


def _figure(row: Row, key: str) -> str:
    return number(row[key])


def _cost(row: Row, setting: str) -> str:
    return f"{pooled([row], setting)[0]:+.4f}"


def table(rows: list[Row]) -> str:
    """The file of a family: both tables."""
    return (
        f"Quantized columns: {unit(rows)}. Of each training seed, mean over calibration seeds:\n\n"
        f"{by_seed(rows, settings_of(rows))}\n"
        f"Mean ± sample standard deviation over training and calibration seeds:\n\n{means(rows)}"
    )


def into_page(page: Path, family: str, text: str) -> None:
    """Puts a table between its marks; a page without them stays as it is."""
    begin, end = f"<!-- table of {family} -->\n", f"<!-- end of the table of {family} -->\n"
    between = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    page.write_text(between.sub(lambda _: f"\n{text}\n", page.read_text()))


def write_table(file: Path) -> None:
    """Writes the tables beside the rows, and into the page one folder up, where there is one."""
    rows = read_rows(file)
    file.with_suffix(".md").write_text(table(rows))
    page = file.parent.with_suffix(".md")
    if page.exists():
        into_page(page, file.stem, by_seed(rows, PAGE))


def main() -> None:
    """Writes the tables of files of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+")
    try:
        for file in parser.parse_args().rows:
            write_table(file)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
