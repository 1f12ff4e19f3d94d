"""The report: one HTML page with the table and the pictures, no file beside it."""

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quantizable_flax.evaluation import tables
from quantizable_flax.models.metric import METRICS
from quantizable_flax.ptq.sensitivity import SiteCost

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ccc; }
td, th { text-align: right; } .left { text-align: left; } img { max-width: 100%; }
"""
LEFT = " class='left'"
SHOWN_SITES = 40


class Subject(NamedTuple):
    """One run in the report.

    Attributes:
      row: its row of the table.
      sites: mean of each published statistic, `site:statistic` -> value.
      history: (step, metric on the validation split) during training, may be empty.
    """

    row: dict[str, Any]
    sites: dict[str, float]
    history: list[tuple[int, float]]


def sensitivity_report(name: str, setting: str, costs: Sequence[SiteCost], unit: str) -> str:
    """Returns a page with what each site costs alone; the figure shows the dearest of them."""
    shown = list(costs[:SHOWN_SITES])[::-1]
    figure, axis = plt.subplots(figsize=(10, 1 + 0.25 * len(shown)), layout="constrained")
    axis.barh([cost.site for cost in shown], [cost.increase for cost in shown])
    axis.set_xlabel(f"{unit} with this site alone quantized")
    lines = "".join(
        f"<tr><td{LEFT}>{html.escape(cost.site)}</td><td>{cost.increase:+.6f}</td></tr>"
        for cost in costs
    )
    head = f"<h1>{html.escape(name)}: sites by what {html.escape(tables.title(setting))} costs</h1>"
    return _page(f"{head}{_image(figure)}<table>{lines}</table>")


def report(subjects: list[Subject], bits: list[str]) -> str:
    """Returns the page."""
    rows = [subject.row for subject in subjects]
    parts = [
        "<h1>Outliers and INT8 quality</h1>",
        _table(rows, bits),
        "<p>Perplexity (lower is better), top-1 accuracy (higher is better), or the cosine of the "
        "embeddings to the reference's (1 is equal), on the validation split. Quantized columns: "
        "mean ± standard deviation over calibration seeds. Infinity norm and kurtosis are taken "
        "over each family's outputs, FFN outputs and LayerNorms: the largest infinity norm, the "
        "mean kurtosis (a normal distribution has 3).</p>",
        "<h2>Where the outliers are</h2>",
        _image(_norm_figure(subjects)),
    ]
    groups = [[s for s in subjects if s.row["metric"] == name] for name in METRICS]
    groups = [group for group in groups if group]
    if bits:
        figures = [_image(_cost_figure([s.row for s in group], bits)) for group in groups]
        parts += ["<h2>What quantization costs</h2>", *figures]
    trained = [group for group in groups if any(subject.history for subject in group)]
    if trained:
        parts += ["<h2>Training</h2>", *(_image(_history_figure(group)) for group in trained)]
    return _page("\n".join(parts))


def _page(body: str) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>quantizable_flax</title>"
        f"<style>{STYLE}</style><body>{body}</body></html>\n"
    )


def _table(rows: list[dict[str, Any]], bits: list[str]) -> str:
    columns = tables.columns(rows, bits)

    def cell(tag: str, title: str, text: str) -> str:
        return f"<{tag}{LEFT if title in tables.LEFT else ''}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", title, title) for title, _ in columns)
    lines = [
        "<tr>" + "".join(cell("td", title, show(row)) for title, show in columns) + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def by_layer(sites: dict[str, float], site: str) -> list[float]:
    """The infinity norm of a site in each layer, in the order of the layers."""
    found = {
        int(match[1]): value
        for name, value in sites.items()
        if (match := re.fullmatch(rf"layer_(\d+)/{site}:inf_norm", name))
    }
    return [found[layer] for layer in sorted(found)]


def _norm_figure(subjects: list[Subject]) -> Figure:
    """Infinity norm by layer: feed-forward output and residual sum."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
    for axis, (site, title) in zip(
        axes, (("ffn_out/output", "FFN output"), ("ffn_residual", "residual sum")), strict=True
    ):
        for subject in subjects:
            norms = by_layer(subject.sites, site)
            axis.plot(range(len(norms)), norms, marker="o", label=subject.row["name"])
        axis.set(title=title, xlabel="layer", yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("infinity norm")
    axes[0].legend()
    return figure


def _cost_figure(rows: list[dict[str, Any]], bits: list[str]) -> Figure:
    """What each setting costs over floating point; all rows have one metric."""
    metric = METRICS[rows[0]["metric"]]
    figure, axis = plt.subplots(figsize=(10, 3.5), layout="constrained")
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        costs = [metric.cost(row[setting], row["fp"]) for setting in bits]
        axis.bar(np.arange(len(bits)) + i * width, costs, width, label=row["name"])
    axis.set_xticks(np.arange(len(bits)) + 0.4 - width / 2, [tables.title(b) for b in bits])
    axis.set_ylabel(metric.cost_label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend()
    return figure


def _history_figure(subjects: list[Subject]) -> Figure:
    figure, axis = plt.subplots(figsize=(10, 3.5), layout="constrained")
    for subject in subjects:
        if subject.history:
            steps, values = zip(*subject.history, strict=True)
            axis.plot(steps, values, marker=".", label=subject.row["name"])
    metric = METRICS[subjects[0].row["metric"]]
    scale = "linear" if metric.larger_is_better else "log"
    axis.set(xlabel="step", ylabel=f"validation {metric.label}", yscale=scale)
    axis.legend()
    return figure


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f"<img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
