"""What compiling ahead of time says: a report of one candidate, a table of several, files."""

import importlib.metadata
import json as json_lib
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from quantizable_flax.aot.estimate import ASSUMPTIONS, Compiled, Estimate
from quantizable_flax.errors import UserError
from quantizable_flax.models.build import attention_label

GIB, MB, GB, TERA = 2**30, 1e6, 1e9, 1e12
_NOTES = "\n".join(f"- {line}" for line in ASSUMPTIONS)
_COLUMNS = (
    "slice", "settings", "mesh", "batch", "arguments GiB", "temporaries GiB", "peak / HBM GiB",
    "fits", "TFLOP", "HBM GB", "sent MB", "bound ms", "limit", "at most / s", "MFU at most",
    "why not",
)  # fmt: skip


def text_of(config: ConfigDict, rows: list[Estimate]) -> str:
    """Returns what the command prints: a report of one candidate or a table of several."""
    return f"{_title(config)}: {_versions_text()}\n\n{_figures(rows)}\n\n{_NOTES}"


def save(config: ConfigDict, rows: list[Estimate], *, json: str | None, markdown: str | None):
    """Writes the files that are asked for.

    Raises:
      UserError: a file that cannot be written.
    """
    if json:
        content: dict[str, Any] = {
            "versions": versions(),
            "executed": False,
            "assumptions": list(ASSUMPTIONS),
            "config": config.to_dict(),
            "candidates": [row.as_json() for row in rows],
        }
        _write(json, json_lib.dumps(content, indent=2) + "\n")
    if markdown:
        shown = f"```\n{_figures(rows)}\n```" if len(rows) == 1 else _figures(rows)
        _write(markdown, f"## {_title(config)}\n\n{_versions_text()}\n\n{shown}\n\n{_NOTES}\n")


def _title(config: ConfigDict) -> str:
    return f"{config.model.name}, {attention_label(config)}"


def _figures(rows: list[Estimate]) -> str:
    return report(rows[0]) if len(rows) == 1 else table(rows)


def versions() -> dict[str, str]:
    """Returns those of what compiled."""
    found = {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}
    try:
        found["libtpu"] = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # one of TPU_LIBRARY_PATH
        found["libtpu"] = "unknown"
    return found


def report(row: Estimate) -> str:
    """Returns all figures of a candidate, a line for each."""
    lines = [("slice", f"{row.topology}, {row.devices} devices"), ("mesh", _mesh(row))]
    lines.append(("batch", f"{row.batch_size} examples, {_per_device(row)} on a data shard"))
    if row.compiled is None:
        lines.append(("fits", f"no: {row.reason}"))
    else:
        lines += _memory(row, row.compiled) + _work(row, row.compiled) + _roofline(row)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def table(rows: list[Estimate]) -> str:
    """Returns a Markdown table, a row for each candidate."""
    cells = [list(_COLUMNS), *(_cells(row) for row in rows)]
    if not any(row.reason for row in rows):
        cells = [row[:-1] for row in cells]
    # The last column holds sentences: it is as wide as its title.
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[-1] = min(widths[-1], len(cells[0][-1]))
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    )


def _cells(row: Estimate) -> list[str]:
    settings = " ".join(f"{key}={value}" for key, value in row.settings.items())
    start = [row.topology, settings, _mesh(row), str(row.batch_size or "")]
    compiled = row.compiled
    if compiled is None:
        values = ["", "", "", "no", *[""] * (len(_COLUMNS) - len(start) - 5), row.reason]
    else:
        values = [
            f"{compiled.arguments / GIB:.3g}",
            f"{compiled.temporaries / GIB:.3g}",
            f"{row.peak / GIB:.3g} / {row.chip.hbm_bytes / GIB:.0f}",
            "yes" if row.fits else "no",
            f"{compiled.flops / TERA:.3g}",
            f"{compiled.hbm_bytes / GB:.3g}",
            f"{sum(compiled.wire_bytes.values()) / MB:.3g}",
            f"{row.bound * 1e3:.3g}",
            row.limit,
            _rate(row),
            f"{row.utilisation:.0%}",
            "",
        ]
    return [cell.replace("|", "/") for cell in (*start, *values)]  # a bar would end the cell


def _memory(row: Estimate, compiled: Compiled) -> list[tuple[str, str]]:
    share = row.peak / row.chip.hbm_bytes
    return [
        ("arguments", f"{compiled.arguments / GIB:.3f} GiB: state and batch"),
        ("temporaries", f"{compiled.temporaries / GIB:.3f} GiB"),
        ("waiting", f"{row.waiting / GIB:.3f} GiB: batches ahead of the step"),
        ("program", f"{compiled.code / GIB:.3f} GiB"),
        (
            "peak",
            f"{row.peak / GIB:.3f} of {row.chip.hbm_bytes / GIB:.0f} GiB HBM ({share:.0%})",
        ),
        ("fits", "yes" if row.fits else "no"),
    ]


def _work(row: Estimate, compiled: Compiled) -> list[tuple[str, str]]:
    model = f"model FLOPs by formula {row.model_flops / TERA:.4g} TFLOP"
    lines = [
        ("products", f"{compiled.flops / TERA:.4g} TFLOP in the program; {model}"),
        (
            "cost analysis",
            f"{compiled.reported_flops / TERA:.4g} TFLOP by XLA, elementwise work too, loops once",
        ),
        ("HBM traffic", f"{compiled.hbm_bytes / GB:.4g} GB"),
    ]
    for kind, size in compiled.wire_bytes.items():
        lines.append((kind, f"{size / MB:.4g} MB sent"))
    lines += [("largest", words) for words in compiled.largest]
    if not compiled.wire_bytes:
        lines.append(("collectives", "none"))
    if compiled.unknown_loops:
        lines.append(("loops", f"{compiled.unknown_loops} of unknown length, counted for one pass"))
    return lines


def _roofline(row: Estimate) -> list[tuple[str, str]]:
    chip = row.chip
    peaks = {
        "compute": f"{chip.bf16_flops / TERA:.0f} TFLOP/s",
        "HBM": f"{chip.hbm_bandwidth / GB:.0f} GB/s",
        "interconnect": f"{chip.link_bandwidth / GB:.0f} GB/s",
    }
    lines = [
        (f"{name} time", f"{seconds * 1e3:.3f} ms at {peaks[name]}")
        for name, seconds in row.times.items()
    ]
    total = sum(row.times.values()) * 1e3
    return [
        *lines,
        ("bound", f"{row.bound * 1e3:.3f} ms a step, by {row.limit} ({total:.3f} ms one by one)"),
        ("at the bound", f"at most {_rate(row)} per second, MFU at most {row.utilisation:.1%}"),
    ]


def _rate(row: Estimate) -> str:
    if row.tokens:
        return f"{row.examples_per_second * row.tokens / 1e6:.3g}M tokens"
    return f"{row.examples_per_second:,.0f} images"


def _mesh(row: Estimate) -> str:
    return " ".join(f"{axis}={size}" for axis, size in row.mesh.items() if size > 1)


def _per_device(row: Estimate) -> int:
    return row.batch_size // (row.mesh["data"] * row.mesh["fsdp"])


def _versions_text() -> str:
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"compiled ahead of time, not executed ({named})"


def _write(path: str, text: str) -> None:
    try:
        file = epath.Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())  # in UTF-8 whatever the locale
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
