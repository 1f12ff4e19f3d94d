"""The pictures of attention: what heads let through, where they look, what gates and clips do."""

from collections.abc import Sequence

import numpy as np

from quantizable_flax.evaluation.tables import number
from quantizable_flax.report import plot
from quantizable_flax.report.charts import shown_places, text
from quantizable_flax.report.measured import HeadMap, Heads, Picture
from quantizable_flax.report.page import Chart
from quantizable_flax.report.plot import Axis
from quantizable_flax.report.subject import Subject
from quantizable_flax.report.words import favourite


def passes_charts(subjects: Sequence[Subject]) -> list[Chart]:
    """How much every head lets through."""
    charts = []
    for subject, heads in _with_heads(subjects):
        quiet = heads.quiet[0]
        charts.append(
            Chart(
                _by_head(heads.passes_LxH, "value let through", top=1.0),
                f"{subject.name}: how much of an average value every head lets through (1: all of it). "
                "Dark cells are heads that do nothing: their probability lies on keys whose values "
                f"are small, or their gate is shut. The darkest is head {quiet.head} of layer "
                f"{quiet.layer}: {number(quiet.passes)}.",
                f"Map of what the heads of {subject.name} let through, by layer and head; least: "
                f"{number(quiet.passes)} in layer {quiet.layer}, head {quiet.head}.",
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
    names = [text(tokens[i]) for i in kept]
    block = np.ix_(kept, kept)
    outside = 1.0 - float(head.probs_TxS[block].sum() / max(head.probs_TxS[kept].sum(), 1e-9))
    left_out = (
        f" {100 * outside:.0f} % of the probability lies on keys left out here."
        if outside > 0.005
        else ""
    )
    top = float(max(head.probs_TxS[block].max(), head.weighted_TxS[block].max()))
    keys, queries = Axis("key", range(len(kept)), names), Axis("query", range(len(kept)), names)

    def drawn(map_TxS: np.ndarray, unit: str) -> dict:
        return plot.heatmap(map_TxS[block], keys, queries, unit=unit, height=420, top=top)

    return _pair(name, head, tokens, drawn, left_out)


def _maps_of_picture(
    name: str, head: HeadMap, tokens: Sequence[str], picture: Picture
) -> list[Chart]:
    """The row of the class token, over the patches."""
    patches_TxS = head.probs_TxS[:, picture.skipped :]
    rest = 1.0 - float(patches_TxS[0].sum())
    top = float(max(patches_TxS[0].max(), head.weighted_TxS[0, picture.skipped :].max()))

    def drawn(map_TxS: np.ndarray, unit: str) -> dict:
        row = map_TxS[0, picture.skipped :].reshape(picture.grid)
        return plot.over_picture(picture.pixels_HxWx3, row, unit=unit, top=top)

    note = f" The query is the class token; {100 * rest:.0f} % of its probability is on no patch."
    return _pair(name, head, tokens, drawn, note)


def _pair(name: str, head: HeadMap, tokens: Sequence[str], drawn, note: str) -> list[Chart]:
    title = f"{name}: layer {head.layer}, head {head.head}"
    return [
        Chart(
            drawn(head.probs_TxS, "probability"),
            f"{title}: where it looks. Over all queries, {favourite(head, tokens)}.{note}",
            f"Attention map of layer {head.layer}, head {head.head} of {name}: "
            f"{favourite(head, tokens)}.",
        ),
        Chart(
            drawn(head.weighted_TxS, "probability times norm"),
            f"{title}: the same, each probability times the norm of its key's value (1: the mean). "
            f"What is bright before and dark here is attention paid to nothing; "
            f"{number(head.passes)} of an average value gets through.",
            f"The same map weighted by the norms of the values; {number(head.passes)} gets through.",
        ),
    ]


def gate_charts(subject: Subject) -> list[Chart]:
    """The gate probabilities by head, averaged, and token by token on one example."""
    heads = subject.anatomy.heads
    if heads is None or heads.gates_LxHxT is None or heads.gate_means_LxH is None:
        return []
    means, gates = heads.gate_means_LxH, heads.gates_LxHxT
    found = [
        Chart(
            _by_head(means, "gate probability", top=1.0),
            f"{subject.name}: the mean gate probability of every head, from {number(float(means.min()))} "
            f"to {number(float(means.max()))}. A dark head is shut for most tokens.",
            f"Map of mean gate probabilities of {subject.name} by layer and head.",
        )
    ]
    if gates.shape[2] == 1:
        return found
    kept = shown_places(gates.shape[2])
    rows = [f"{layer}.{head}" for layer in range(gates.shape[0]) for head in range(gates.shape[1])]
    names = [text(subject.anatomy.tokens[i]) for i in kept]
    figure = plot.heatmap(
        gates.reshape(len(rows), -1)[:, kept],
        Axis("token", range(len(kept)), names),
        Axis("layer.head", range(len(rows)), rows),
        unit="gate probability",
        height=150 + 14 * len(rows),
        top=1.0,
    )
    return [
        *found,
        Chart(
            figure,
            f"{subject.name}: gate probabilities on one real input, a row for each head. A head with "
            "something to say at some tokens alone is bright there and dark elsewhere.",
            f"Map of the gate probabilities of {subject.name} by head and token.",
        ),
    ]


def zero_charts(subjects: Sequence[Subject]) -> list[Chart]:
    """The share of probabilities that are exactly 0, of the subjects that have some."""
    charts = []
    for subject, heads in _with_heads(subjects):
        share = 100.0 * heads.zeros_LxH
        if not share.max() > 0.0:
            continue
        charts.append(
            Chart(
                _by_head(share, "exact zeros (%)", top=100.0, digits=0),
                f"{subject.name}: how many of the visible probabilities are exactly 0, in per cent; "
                f"{number(float(share.mean()))} on average. A softmax that can reach 0 needs no large "
                "scores to look away.",
                f"Map of the share of exact zeros among the probabilities of {subject.name}.",
            )
        )
    return charts


def _with_heads(subjects: Sequence[Subject]) -> list[tuple[Subject, Heads]]:
    return [(s, s.anatomy.heads) for s in subjects if s.anatomy.heads is not None]


def _by_head(z_LxH: np.ndarray, unit: str, *, top: float, digits: int = 2) -> dict:
    layers, heads = z_LxH.shape
    figure = plot.heatmap(
        z_LxH,
        Axis("head", range(heads), [str(i) for i in range(heads)]),
        Axis("layer", range(layers), [str(i) for i in range(layers)]),
        unit=unit,
        height=90 + 28 * layers,
        digits=digits,
        written=True,
        top=max(top, float(z_LxH.max())),
    )
    figure["data"][0]["showscale"] = False
    return figure
