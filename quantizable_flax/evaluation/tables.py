"""Result rows as a terminal table, as Markdown and as JSON."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantizable_flax.errors import UserError
from quantizable_flax.models.metric import METRICS
from quantizable_flax.ptq.sensitivity import SiteCost
from quantizable_flax.runtime.terminal import encodable, printing

Row = dict[str, Any]
LEFT = ("name", "model", "attention", "beside attention", "metric")


def columns(rows: list[Row], bits: list[str]) -> list[tuple[str, Callable[[Row], str]]]:
    """Header and formatter of each column; one column for each quantized setting.

    Rows of one metric name it in the headers; rows of several get a column for it, as do methods
    beside attention where a row has some.
    """
    metrics = {row["metric"] for row in rows}
    unit = f" {METRICS[min(metrics)].label}" if len(metrics) == 1 else ""

    def quantized(setting: str) -> Callable[[Row], str]:
        return lambda row: mean_and_deviation(row[setting], row[f"{setting}_std"])

    beside = any(row.get("beside_attention") for row in rows)
    several = len({row["model"] for row in rows}) > 1
    kept: list[tuple[str, Callable[[Row], str]]] = [
        (f"{title(setting)} neighbours %", neighbours(setting))
        for setting in bits
        if any(f"{setting}_neighbours" in row for row in rows)
    ]
    return [
        ("name", lambda row: row["name"]),
        *((("model", lambda row: row["model"]),) if several else ()),
        ("attention", lambda row: row["attention"]),
        *((("beside attention", lambda row: row.get("beside_attention", "")),) if beside else ()),
        *((("metric", lambda row: METRICS[row["metric"]].label),) if not unit else ()),
        (f"FP{unit}", lambda row: number(row["fp"])),
        ("max inf norm", lambda row: number(row["max_inf_norm"])),
        ("avg kurtosis", lambda row: number(row["avg_kurtosis"])),
        *((f"{title(setting)}{unit}", quantized(setting)) for setting in bits),
        *kept,
        ("steps", lambda row: str(row["steps"])),
    ]


def neighbours(setting: str) -> Callable[[Row], str]:
    """How many of the nearest neighbours a setting keeps, in per cent; nothing of other metrics."""

    def show(row: Row) -> str:
        share = row.get(f"{setting}_neighbours")
        return "" if share is None else f"{100 * share:.1f}"

    return show


def mean_and_deviation(mean: float, deviation: float) -> str:
    """`4.52 ± 0.01`; the mean alone where one seed tells of no deviation."""
    return number(mean) if math.isnan(deviation) else f"{number(mean)} ± {number(deviation)}"


def title(setting: str) -> str:
    """A setting as a header: `W8A8+smooth=0.5`."""
    bits, plus, options = setting.partition("+")
    return bits.upper() + plus + options


def number(value: float) -> str:
    """Four significant digits, without an exponent below a million."""
    if not math.isfinite(value):
        return str(value)
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 2
    return f"{value:.{min(digits, 3)}f}" if abs(value) < 1e6 else f"{value:.2e}"


def print_table(rows: list[Row], bits: list[str]) -> None:
    """Prints the rows on stdout."""
    table = Table()
    for title, _ in columns(rows, bits):
        table.add_column(title, justify="left" if title in LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*(encodable(show(row), sys.stdout) for _, show in columns(rows, bits)))
    _print(table)


def _print(table: Table) -> None:
    # A pipe has no width of its own; a table cut at 80 columns would lose figures.
    console = Console()
    console = Console(width=console.width if console.is_terminal else 160)
    with console.capture() as captured:
        console.print(table)
    with printing():
        print(captured.get(), end="")


def print_costs(costs: Sequence[SiteCost], unit: str) -> None:
    """Prints what each site costs when it alone is quantized, in the order given."""
    table = Table()
    table.add_column("site")
    table.add_column(unit, justify="right")
    for cost in costs:
        table.add_row(cost.site, f"{cost.increase:+.6f}")
    _print(table)


def print_findings(lines: Sequence[str]) -> None:
    """Prints sentences; what stands before a colon becomes a column of its own."""
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for line in lines:
        key, _, rest = line.partition(": ")
        table.add_row(*(Text(encodable(cell, sys.stdout)) for cell in (key, rest)))
    _print(table)


def print_text(line: str) -> None:
    """Prints a line on stdout."""
    with printing():
        print(line)


def markdown(rows: list[Row], bits: list[str]) -> str:
    """Returns the rows as a Markdown table."""
    shown = columns(rows, bits)
    lines = [[show(row) for _, show in shown] for row in rows]
    return markdown_table([title for title, _ in shown], lines)


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns cells below their heads as a Markdown table."""
    cells = [heads, ["---"] * len(heads), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def write_json(rows: list[Row], path: str) -> None:
    """Writes the rows as a JSON list; a number that is not finite becomes null."""
    safe = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    write_text(json.dumps(safe, indent=2) + "\n", path)


def check_outputs(*paths: str | None) -> None:
    """Raises UserError unless a file of its own can be written to each path that is given."""
    given = [path for path in paths if path]
    for index, path in enumerate(given):
        if os.path.abspath(path) in map(os.path.abspath, given[:index]):
            raise UserError(f"two outputs must be two files, found {path} for both.")
        check_writable(path)


def check_writable(path: str) -> None:
    """Raises UserError unless a file can be written to the path, whose folder is made.

    A path in another storage (`gs://...`) is believed.
    """
    if "://" in path:
        return
    target = epath.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = not target.exists()
        with open(target, "ab"):
            pass
        if new:
            target.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}.")


def write_text(text: str, path: str) -> None:
    """Writes a file in UTF-8 whatever the locale, making its folder.

    Raises:
      UserError: the path cannot be written.
    """
    target = epath.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise _cannot_write(path, error) from error
