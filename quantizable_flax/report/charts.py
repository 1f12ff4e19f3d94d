"""The pictures of activations: where large ones are, who carries them, what a grid does to them."""

import html
from collections.abc import Sequence

import numpy as np

from quantizable_flax.evaluation.tables import number
from quantizable_flax.report import plot
from quantizable_flax.report.measured import Picture, SiteFigures
from quantizable_flax.report.page import Chart
from quantizable_flax.report.plot import Axis
from quantizable_flax.report.subject import Subject
from quantizable_flax.report.words import carried_by, kind, of_layer, on_the_grid, plain, sentence

STATISTICS = {"inf_norm": "infinity norm", "kurtosis": "kurtosis"}
KINDS_SHOWN = 6  # as lines
CARRIERS = 12
FIRST, LAST = 30, 10  # tokens of a long example that have room on an axis
DRAWN_LEVELS = 300  # more would be a plane
CLOSE_LEVELS = 50  # in a picture; so many are shown as a comb
COMB = 0.25  # of the height


def by_layer(sites: dict[str, SiteFigures], statistic: str) -> dict[str, list[tuple[int, float]]]:
    """(layer, figure) of each kind of site, in the order of layers and of the forward pass."""
    found: dict[str, list[tuple[int, float]]] = {}
    for site, figures in sites.items():
        layer = of_layer(site)
        if layer is not None:
            found.setdefault(layer[1], []).append((layer[0], getattr(figures, statistic)))
    return {path: sorted(pairs) for path, pairs in found.items()}


def site_maps(subjects: Sequence[Subject]) -> list[Chart]:
    """A map of kinds of sites and layers for each statistic and subject, on one scale for all."""
    tops = {
        statistic: max(
            value
            for subject in subjects
            for pairs in by_layer(subject.anatomy.sites, statistic).values()
            for _, value in pairs
        )
        for statistic in (STATISTICS if subjects else ())
    }
    return [_site_map(s, statistic, top) for s in subjects for statistic, top in tops.items()]


def _site_map(subject: Subject, statistic: str, top: float) -> Chart:
    kinds, name = by_layer(subject.anatomy.sites, statistic), STATISTICS[statistic]
    layers = sorted({layer for pairs in kinds.values() for layer, _ in pairs})
    z = np.array([[dict(pairs).get(layer, 0.0) for layer in layers] for pairs in kinds.values()])
    row, column = np.unravel_index(z.argmax(), z.shape)
    where = f"{number(float(z.max()))}, {kind(list(kinds)[row])} of layer {layers[column]}"
    figure = plot.heatmap(
        z,
        Axis("layer", range(len(layers)), [str(layer) for layer in layers]),
        Axis("", range(len(kinds)), [kind(path) for path in kinds]),
        unit=name,
        height=70 + 24 * len(kinds),
        digits=0 if top >= 20 else 1,
        written=True,
        top=top,
    )
    return Chart(
        figure,
        f"{subject.name}: {name} of every site",
        f"Rows in the order of the forward pass, averaged over {subject.anatomy.worst.examples} "
        f"examples. Look for bright cells among dark ones; the brightest is {where}.",
        f"Map of the {name} by site and layer of {subject.name}; the largest is {where}.",
    )


def layer_lines(subjects: Sequence[Subject], statistic: str) -> list[Chart]:
    """The kinds of sites with the largest figures over layers, the subjects side by side."""
    kinds = {s.name: by_layer(s.anatomy.sites, statistic) for s in subjects}
    largest: dict[str, float] = {}
    for found in kinds.values():
        for path, pairs in found.items():
            largest[path] = max(largest.get(path, 0.0), *(value for _, value in pairs))
    charts, name = [], STATISTICS[statistic]
    for path in sorted(largest, key=lambda path: -largest[path])[:KINDS_SHOWN]:
        series = {n: found[path] for n, found in kinds.items() if path in found}
        layers = sorted({layer for pairs in series.values() for layer, _ in pairs})
        tops = ", ".join(
            f"{n} {number(max(value for _, value in pairs))}" for n, pairs in series.items()
        )
        x = Axis("layer", layers, [str(layer) for layer in layers])
        figure = plot.lines(series, x, Axis(name), height=230)
        label = f"{name} of {kind(path)} by layer; largest: {tops}."
        title = f"{sentence(kind(path))}: {name}"
        charts.append(Chart(figure, title, f"Largest: {tops}.", label, "third"))
    return charts


def grid_charts(subject: Subject) -> list[Chart]:
    """The values of the worst site, all and the bulk, with the levels of the grid over them."""
    values, grid = subject.anatomy.worst, subject.grid
    levels: list[float] = []
    if grid is not None and grid.levels <= DRAWN_LEVELS:
        levels = np.linspace(grid.low, grid.high, grid.levels).tolist()
    share, place = Axis("share of values (%)"), plain(values.site)
    told = on_the_grid(subject) or "No setting has one grid over this site."
    total = values.tokens * len(values.largest_D) / 100.0
    low, high = (float(values.near.edges[i]) for i in (0, -1))
    in_view = sum(low <= level <= high for level in levels)
    whole = plot.histogram(
        values.whole.counts_N / total,
        values.whole.edges,
        Axis("value"),
        share,
        levels=levels,
        reach=COMB,
        band=values.bulk,
        marks=(values.low, values.high),
    )
    near = plot.histogram(
        values.near.counts_N / total,
        values.near.edges,
        Axis("value", first=low, last=high),
        share,
        levels=levels,
        reach=1.0 if in_view <= CLOSE_LEVELS else COMB,
        band=values.bulk,
    )
    ends = f"{number(values.low)} to {number(values.high)}"
    return [
        Chart(
            whole,
            f"{subject.name}: all values, {place}",
            f"They reach from {ends} (the strokes on the axis), and the comb of the grid must span "
            "them, though 99 % lie in the grey band.",
            f"Histogram of all values at {place} of {subject.name}, {ends}, with the grid over it.",
        ),
        Chart(
            near,
            f"{subject.name}: the bulk of them, from near",
            f"Every value moves to the nearest line. {told}",
            f"Histogram of the bulk of the values at {place} of {subject.name}. {told}",
        ),
    ]


def dimension_chart(subject: Subject) -> Chart:
    """The largest |x| of every dimension of the worst site."""
    values = subject.anatomy.worst
    first, count = values.dimensions[:3], len(values.largest_D)
    told = ", ".join(f"{d} ({number(float(values.largest_D[d]))})" for d in first)
    places = [str(i) for i in range(count)]
    axis = Axis("largest |x|")
    figure = plot.bars(
        {"largest |x|": values.largest_D.tolist()}, places, axis, names_title="dimension"
    )
    named = sorted(first)
    figure["layout"]["xaxis"] |= {"tickvals": named, "ticktext": [str(d) for d in named]}
    figure["layout"]["bargap"] = 0
    return Chart(
        figure,
        f"{subject.name}: dimensions, {plain(values.site)}",
        f"A lonely peak is an outlier dimension. The largest: {told}; half of all {count} never "
        f"exceed {number(float(np.median(values.largest_D)))}.",
        f"Bars of the largest absolute value of each of {count} dimensions; the largest: {told}.",
        "third",
    )


def token_charts(subject: Subject) -> list[Chart]:
    """Which kinds of tokens carry outliers, and where they stand in one example."""
    values, picture = subject.anatomy.worst, subject.anatomy.picture
    charts = [_carriers(subject)] if values.carriers else []
    if picture is not None:
        return [*charts, _on_picture(subject, picture)]
    tokens = subject.anatomy.tokens[-len(values.strip_T) :]
    kept = shown_places(len(tokens))
    names = [text(tokens[i]) for i in kept]
    place = int(values.strip_T.argmax())
    told = f"{number(float(values.strip_T.max()))}, at “{tokens[place]}”"
    part = "" if len(kept) == len(tokens) else f", its first {FIRST} and last {LAST} tokens"
    figure = plot.bars({"largest |x|": values.strip_T[kept].tolist()}, names, Axis("largest |x|"))
    return [
        *charts,
        Chart(
            figure,
            f"{subject.name}: one real input, token by token",
            f"The one with the largest |x| of all{part}: {told}.",
            f"Bars of the largest absolute value by token of one input; the largest is {told}.",
            "third",
        ),
    ]


def _carriers(subject: Subject) -> Chart:
    values = subject.anatomy.worst
    shown = values.carriers[:CARRIERS]
    figure = plot.bars(
        {"tokens with an outlier": [c.carrying for c in shown]},
        [text(c.token) for c in shown],
        Axis(f"tokens with an outlier, of {values.tokens:,}"),
        sideways=True,
        hover=[f"{c.carrying} of {c.occurrences}, largest |x| {number(c.largest)}" for c in shown],
        height=max(260, 70 + 20 * len(shown)),
    )
    return Chart(
        figure,
        f"{subject.name}: the tokens that carry outliers",
        carried_by(values),
        f"Bars of tokens by how many have an outlier. {carried_by(values)}",
        "third",
    )


def _on_picture(subject: Subject, picture: Picture) -> Chart:
    values = subject.anatomy.worst
    z = values.strip_T[picture.skipped :].reshape(picture.grid)
    named = zip(subject.anatomy.tokens[: picture.skipped], values.strip_T, strict=False)
    first = ", ".join(f"{name} {number(float(v))}" for name, v in named)
    return Chart(
        plot.over_picture(picture.pixels_HxWx3, z, unit="largest |x|"),
        f"{subject.name}: one real input, patch by patch",
        f"The picture with the largest |x| of all, each patch coloured by its own; beside the "
        f"patches: {first}. Often the bright ones are empty background.",
        f"Picture with the largest absolute value of each patch laid over it; beside it {first}.",
        "third",
    )


def shown_places(length: int) -> list[int]:
    """Which tokens of an example have room on an axis: the first and the last."""
    if length <= FIRST + LAST:
        return list(range(length))
    return [*range(FIRST), *range(length - LAST, length)]


def text(token: str) -> str:
    """A token as plotly shows it, which reads tags."""
    return html.escape(token, quote=False)
