"""The pictures of attention: what heads let through, where they look, what gates and clips do."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from quantizable_flax.evaluation.tables import number
from quantizable_flax.report import plot
from quantizable_flax.report.charts import shown_places, text
from quantizable_flax.report.measured import HeadMap, Heads, Picture
from quantizable_flax.report.page import Chart
from quantizable_flax.report.plot import Axis
from quantizable_flax.report.subject import Subject
from quantizable_flax.report.words import favourite

Figure = dict[str, Any]


def passes_charts(subjects: Sequence[Subject]) -> list[Chart]:
    """How much every head lets through."""
    charts = []
    for subject, heads in _with_heads(subjects):
        quiet = heads.quiet[0]
        least = f"{number(quiet.passes)}, head {quiet.head} of layer {quiet.layer}"
        charts.append(
            Chart(
                _by_head(heads.passes_LxH, "value let through", top=1.0),
                f"{subject.name}: how much of an average value each head lets through",
                "1 is all of it. A dark cell is a head that does nothing: its probability lies on "
                f"keys whose values are small, or its gate is shut. The darkest is {least}.",
                f"Map of what the heads of {subject.name} let through, by layer and head; least: "
                f"{least}.",
            )
        )
    return charts


def quiet_charts(subject: Subject, count: int) -> list[Chart]:
    """The maps of the heads that let least through, raw and weighted by the norms of the values."""
    heads, anatomy = subject.anatomy.heads, subject.anatomy
    charts = []
    for head in heads.quiet[:count] if heads is not None else []:
        if anatomy.picture is None:
            charts += _maps_of_text(subject.name, head, anatomy.tokens)
        else:
            charts += _maps_of_picture(subject.name, head, anatomy.tokens, anatomy.picture)
    return charts


def _maps_of_text(name: str, head: HeadMap, tokens: Sequence[str]) -> list[Chart]:
    kept = shown_places(len(tokens))
    names, block = [text(tokens[i]) for i in kept], np.ix_(kept, kept)
    outside = 1.0 - float(head.probs_TxS[block].sum() / max(head.probs_TxS[kept].sum(), 1e-9))
    note = f" {100 * outside:.0f} % lies on keys left out here." if outside > 0.005 else ""
    keys, queries = (Axis(title, range(len(kept)), names) for title in ("key", "query"))
    top = float(head.probs_TxS[block].max())

    def drawn(map_TxS: np.ndarray, unit: str) -> Figure:
        return plot.heatmap(
            map_TxS[block], keys, queries, unit=unit, height=120 + 12 * len(kept), top=top
        )

    return _pair(name, head, tokens, drawn, note)


def _maps_of_picture(
    name: str, head: HeadMap, tokens: Sequence[str], picture: Picture
) -> list[Chart]:
    """The row of the class token, over the patches."""
    row_S = head.probs_TxS[0, picture.skipped :]
    note = f" Here the query is the class token: {100 * (1 - row_S.sum()):.0f} % of its "
    note += "probability is on no patch."

    def drawn(map_TxS: np.ndarray, unit: str) -> Figure:
        z = map_TxS[0, picture.skipped :].reshape(picture.grid)
        return plot.over_picture(picture.pixels_HxWx3, z, unit=unit, top=float(row_S.max()))

    return _pair(name, head, tokens, drawn, note)


def _pair(
    name: str,
    head: HeadMap,
    tokens: Sequence[str],
    drawn: Callable[[np.ndarray, str], Figure],
    note: str,
) -> list[Chart]:
    title = f"{name}: layer {head.layer}, head {head.head}"
    looks, through = favourite(head, tokens), number(head.passes)
    return [
        Chart(
            drawn(head.probs_TxS, "probability"),
            f"{title}, where it looks",
            f"Over all queries {looks}.{note}",
            f"Attention map of {title}: {looks}.",
        ),
        Chart(
            drawn(head.weighted, "probability times norm"),
            f"{title}, what it finds there",
            "Each probability times the norm of its key's value (1: the mean), on the same scale. "
            f"What is bright there and dark here is attention paid to nothing; {through} of an "
            "average value gets through.",
            f"The map of {title} weighted by the norms of the values; {through} gets through.",
        ),
    ]


def gate_charts(subject: Subject) -> list[Chart]:
    """The gate probabilities by head, averaged, and token by token on one example."""
    heads = subject.anatomy.heads
    if heads is None or heads.gates_LxHxT is None or heads.gate_means_LxH is None:
        return []
    means, gates = heads.gate_means_LxH, heads.gates_LxHxT
    ends = f"{number(float(means.min()))} to {number(float(means.max()))}"
    found = [
        Chart(
            _by_head(means, "gate probability", top=1.0),
            f"{subject.name}: mean gate probability of each head",
            f"From {ends}. A dark head is shut for most tokens.",
            f"Map of mean gate probabilities of {subject.name} by layer and head, {ends}.",
        )
    ]
    return found if gates.shape[2] == 1 else [*found, _gates_by_token(subject, gates)]


def _gates_by_token(subject: Subject, gates_LxHxT: np.ndarray) -> Chart:
    layers, heads, length = gates_LxHxT.shape
    kept = shown_places(length)
    rows = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
    names = [text(subject.anatomy.tokens[i]) for i in kept]
    figure = plot.heatmap(
        gates_LxHxT.reshape(len(rows), -1)[:, kept],
        Axis("token", range(len(kept)), names),
        Axis("layer.head", range(len(rows)), rows),
        unit="gate probability",
        height=150 + 14 * len(rows),
        top=1.0,
    )
    return Chart(
        figure,
        f"{subject.name}: gate probabilities, token by token",
        "One real input, a row for each head. A head with something to say at some tokens alone is "
        "bright there and dark elsewhere.",
        f"Map of the gate probabilities of {subject.name} by head and token.",
    )


def zero_charts(subjects: Sequence[Subject]) -> list[Chart]:
    """The share of probabilities that are exactly 0, of the subjects that have some."""
    charts = []
    for subject, heads in _with_heads(subjects):
        share = 100.0 * heads.zeros_LxH
        if not share.max() > 0.0:
            continue
        mean = number(float(share.mean()))
        charts.append(
            Chart(
                _by_head(share, "exact zeros (%)", top=100.0, digits=0),
                f"{subject.name}: visible probabilities that are exactly 0 (%)",
                f"{mean} % on average. A softmax that can reach 0 needs no large scores to look "
                "away.",
                f"Map of the share of exact zeros of {subject.name}, {mean} % on average.",
            )
        )
    return charts


def _with_heads(subjects: Sequence[Subject]) -> list[tuple[Subject, Heads]]:
    return [(s, s.anatomy.heads) for s in subjects if s.anatomy.heads is not None]


def _by_head(z_LxH: np.ndarray, unit: str, *, top: float, digits: int = 2) -> Figure:
    layers, heads = z_LxH.shape
    return plot.heatmap(
        z_LxH,
        Axis("head", range(heads), [str(i) for i in range(heads)]),
        Axis("layer", range(layers), [str(i) for i in range(layers)]),
        unit=unit,
        height=80 + 26 * layers,
        digits=digits,
        written=True,
        top=max(top, float(z_LxH.max())),
    )
