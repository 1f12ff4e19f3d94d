"""The pictures of activations: where large ones are, who carries them, what a grid does to them."""

import html
from collections.abc import Sequence

import numpy as np

from quantizable_flax.evaluation.tables import number
from quantizable_flax.report import plot
from quantizable_flax.report.measured import SIGMAS, Picture, SiteFigures
from quantizable_flax.report.page import Chart
from quantizable_flax.report.plot import Axis
from quantizable_flax.report.subject import Subject
from quantizable_flax.report.words import carried_by, kind, of_layer, on_the_grid, plain

STATISTICS = {"inf_norm": "infinity norm", "kurtosis": "kurtosis"}
KINDS_SHOWN = 6  # as lines
CARRIERS = 12
DRAWN_LEVELS = 300  # more would be a plane


def by_layer(sites: dict[str, SiteFigures], statistic: str) -> dict[str, list[tuple[int, float]]]:
    """(layer, figure) of each kind of site, in the order of layers and of the forward pass."""
    found: dict[str, list[tuple[int, float]]] = {}
    for site, figures in sites.items():
        layer = of_layer(site)
        if layer is not None:
            found.setdefault(layer[1], []).append((layer[0], getattr(figures, statistic)))
    return {path: sorted(pairs) for path, pairs in found.items()}


def site_maps(subjects: Sequence[Subject], statistic: str) -> list[Chart]:
    """A map of kinds of sites and layers for each subject."""
    charts = []
    for subject in subjects:
        kinds = by_layer(subject.anatomy.sites, statistic)
        if not kinds:
            continue
        layers = sorted({layer for pairs in kinds.values() for layer, _ in pairs})
        z = np.array(
            [[dict(pairs).get(layer, 0.0) for layer in layers] for pairs in kinds.values()]
        )
        path, place = list(kinds)[int(z.max(axis=1).argmax())], int(z.max(axis=0).argmax())
        figure = plot.heatmap(
            z,
            Axis("layer", range(len(layers)), [str(layer) for layer in layers]),
            Axis("", range(len(kinds)), [kind(path) for path in kinds]),
            unit=STATISTICS[statistic],
            height=70 + 26 * len(kinds),
            digits=0 if z.max() >= 20 else 1,
            written=True,
        )
        figure["data"][0]["showscale"] = False
        where = f"{number(float(z.max()))}, at {kind(path)} of layer {layers[place]}"
        charts.append(
            Chart(
                figure,
                f"{subject.name}: the {STATISTICS[statistic]} of every site, averaged over "
                f"{subject.anatomy.worst.examples} examples. The brightest cell is the largest: "
                f"{where}. Cells as dark as their neighbours have nothing to hide from a grid.",
                f"Map of the {STATISTICS[statistic]} by site and layer of {subject.name}; the "
                f"largest is {where}.",
            )
        )
    return charts


def layer_lines(subjects: Sequence[Subject], statistic: str) -> list[Chart]:
    """The kinds of sites with the largest figures over layers, the subjects side by side."""
    kinds = {s.name: by_layer(s.anatomy.sites, statistic) for s in subjects}
    largest: dict[str, float] = {}
    for found in kinds.values():
        for path, pairs in found.items():
            largest[path] = max(largest.get(path, 0.0), *(value for _, value in pairs))
    chosen = sorted(largest, key=lambda path: -largest[path])[:KINDS_SHOWN]
    name = STATISTICS[statistic]
    charts = []
    for path in chosen:
        series = {n: found[path] for n, found in kinds.items() if path in found}
        layers = sorted({layer for pairs in series.values() for layer, _ in pairs})
        x = Axis("layer", layers, [str(layer) for layer in layers])
        tops = {n: max(value for _, value in pairs) for n, pairs in series.items()}
        told = ", ".join(f"{n} {number(top)}" for n, top in tops.items())
        label = f"{name} of {kind(path)} by layer; largest: {told}."
        figure = plot.lines(series, x, Axis(name), height=230)
        charts.append(Chart(figure, f"{kind(path).capitalize()}. Largest: {told}.", label))
    return charts


def grid_charts(subject: Subject) -> list[Chart]:
    """The values of the worst site, all and the bulk, with the levels of the grid over them."""
    values, grid = subject.anatomy.worst, subject.grid
    levels = [] if grid is None else np.linspace(grid.low, grid.high, grid.levels)
    if len(levels) > DRAWN_LEVELS:
        levels = []
    share = Axis("share of values (%)")
    total = values.tokens * len(values.largest_D)
    place = plain(values.site)
    where = Axis(f"value at {place}")
    ends = [values.low, values.high] if values.outliers else []
    told = on_the_grid(subject) or "No setting has one grid over this site."
    whole = plot.histogram(
        100.0 * values.whole.counts_N / total, values.whole.edges, where, share,
        levels=levels, band=values.bulk, band_name="99 % of the values", marks=ends,
    )  # fmt: skip
    near = plot.histogram(
        100.0 * values.near.counts_N / total, values.near.edges,
        where._replace(first=float(values.near.edges[0]), last=float(values.near.edges[-1])), share,
        levels=levels, band=values.bulk, band_name="99 % of the values",
    )  # fmt: skip
    return [
        Chart(
            whole,
            f"{subject.name}: all values at {place}, from {number(values.low)} to "
            f"{number(values.high)} (marked on the axis). The grid must span them, though 99 % lie "
            "in the grey band.",
            f"Histogram of all values at {place} of {subject.name}, {number(values.low)} to "
            f"{number(values.high)}, with the levels of the grid.",
        ),
        Chart(
            near,
            f"{subject.name}: the same, near the bulk. Every value moves to the nearest line. {told}",
            f"Histogram of the bulk of the values at {place} of {subject.name}. {told}",
        ),
    ]


def dimension_chart(subject: Subject) -> Chart:
    """The largest |x| of every dimension of the worst site."""
    values = subject.anatomy.worst
    first = values.dimensions[:3]
    ordered = np.sort(values.largest_D)
    told = ", ".join(f"{d} ({number(float(values.largest_D[d]))})" for d in first)
    count = len(values.largest_D)
    places = [str(i) for i in range(count)]
    figure = plot.bars(
        {"largest |x|": values.largest_D}, places, Axis("largest |x|"), names_title="dimension"
    )
    figure["layout"]["xaxis"] |= {
        "tickvals": sorted(first),
        "ticktext": [str(d) for d in sorted(first)],
    }
    figure["layout"]["bargap"] = 0
    return Chart(
        figure,
        f"{subject.name}: the largest |x| by dimension at {plain(values.site)}. Lonely peaks are "
        f"outlier dimensions: {told}; half of the dimensions never exceed "
        f"{number(float(ordered[count // 2]))}.",
        f"Bars of the largest absolute value of each of {count} dimensions; the largest: {told}.",
    )


def token_charts(subject: Subject) -> list[Chart]:
    """Which kinds of tokens carry outliers, and where they stand in the example with the largest."""
    values = subject.anatomy.worst
    charts = []
    if values.carriers:
        shown = values.carriers[:CARRIERS]
        names = [text(c.token) for c in shown]
        hover = [f"{c.carrying} of {c.occurrences}, largest |x| {number(c.largest)}" for c in shown]
        figure = plot.bars(
            {"tokens with an outlier": [c.carrying for c in shown]},
            names,
            Axis("tokens with an outlier"),
            sideways=True,
            hover=hover,
            height=90 + 22 * len(shown),
        )
        charts.append(
            Chart(
                figure,
                f"{subject.name}: the tokens that carry them, of {values.tokens:,} looked at: "
                f"{carried_by(values)}",
                f"Bars of tokens by how many have an outlier. {carried_by(values)}",
            )
        )
    picture = subject.anatomy.picture
    if picture is not None:
        charts.append(_on_picture(subject, picture))
        return charts
    tokens = subject.anatomy.tokens
    kept = shown_places(len(tokens))
    names = [text(tokens[i]) for i in kept]
    figure = plot.bars({"largest |x|": values.strip_T[kept]}, names, Axis("largest |x|"))
    place = int(values.strip_T.argmax())
    charts.append(
        Chart(
            figure,
            f"{subject.name}: one real input, token by token ({_kept(len(tokens))}): the largest "
            f"|x| is {number(float(values.strip_T.max()))}, at “{tokens[place]}”.",
            f"Bars of the largest absolute value by token of one input; the largest stands at "
            f"{tokens[place]}.",
        )
    )
    return charts


def _on_picture(subject: Subject, picture: Picture) -> Chart:
    values = subject.anatomy.worst
    z = values.strip_T[picture.skipped :].reshape(picture.grid)
    first = ", ".join(
        f"{name} {number(float(v))}"
        for name, v in zip(subject.anatomy.tokens, values.strip_T[: picture.skipped], strict=False)
    )
    return Chart(
        plot.over_picture(picture.pixels_HxWx3, z, unit="largest |x|"),
        f"{subject.name}: the largest |x| of every patch, over the picture with the largest of all; "
        f"beside the patches: {first}. Bright patches carry outliers: often empty background.",
        f"Picture with the largest absolute value of each patch laid over it; beside it {first}.",
    )


def shown_places(length: int, first: int = 30, last: int = 10) -> list[int]:
    """Which tokens of an example have room on an axis: the first and the last."""
    if length <= first + last:
        return list(range(length))
    return [*range(first), *range(length - last, length)]


def _kept(length: int) -> str:
    kept = shown_places(length)
    return "all of it" if len(kept) == length else f"its first 30 and last 10 of {length} tokens"


def text(token: str) -> str:
    """A token as plotly shows it, which reads tags."""
    return html.escape(token, quote=False)


def outlier_rule() -> str:
    """What is called an outlier."""
    return (
        f"An outlier is a value further than {SIGMAS:g} standard deviations from the mean of all "
        "values at its site."
    )
