"""The door to plotly: a few kinds of figures, without the colours that the page gives by theme."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

Pairs = Sequence[tuple[Any, float]]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MIDDLE = 0.45  # of the scale: black numbers stand out above, white ones below
SCALE = "Cividis"  # made for all kinds of colour vision, and as light or dark on either ground


class Axis(NamedTuple):
    """An axis: its title with the unit, and what stands at it."""

    title: str
    ticks: Sequence[Any] | None = None  # places
    texts: Sequence[str] | None = None  # at the places
    first: float | None = None
    last: float | None = None


def javascript() -> str:
    """The library that draws, to stand in the page."""
    return get_plotlyjs()


def lines(series: Mapping[str, Pairs], x: Axis, y: Axis, *, height: int = 260) -> dict[str, Any]:
    """A line with markers for each name, from 0 on."""
    figure = go.Figure()
    for i, (name, pairs) in enumerate(series.items()):
        figure.add_scatter(
            x=[pair[0] for pair in pairs],
            y=[pair[1] for pair in pairs],
            name=html.escape(name, quote=False),
            mode="lines+markers",
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7},
            line={"dash": DASHES[i % len(DASHES)], "width": 2},
            meta=i,
        )
    return _finished(figure, x, y, height, legend=len(series) > 1)


def bars(
    series: Mapping[str, Sequence[float]],
    names: Sequence[str],
    axis: Axis,
    *,
    height: int = 260,
    names_title: str = "",
    sideways: bool = False,
    hover: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Bars beside each other for each of the names; `sideways`, from the top down."""
    figure = go.Figure()
    places = list(range(len(names)))
    for i, (name, values) in enumerate(series.items()):
        across = [float(v) for v in values]
        figure.add_bar(
            x=across if sideways else places,
            y=places if sideways else across,
            name=html.escape(name, quote=False),
            orientation="h" if sideways else "v",
            meta=i,
            hovertext=hover,
        )
    other = Axis(names_title, places, names)
    x, y = (axis, other) if sideways else (other, axis)
    finished = _finished(figure, x, y, height, legend=len(series) > 1)
    finished["layout"]["yaxis" if sideways else "xaxis"]["showgrid"] = False
    if sideways:
        finished["layout"]["yaxis"]["autorange"] = "reversed"
    return finished


def heatmap(
    z: np.ndarray,
    x: Axis,
    y: Axis,
    *,
    unit: str,
    height: int,
    digits: int = 2,
    written: bool = False,
    top: float | None = None,
) -> dict[str, Any]:
    """A map of numbers [rows, columns], the first row on top, from 0 to the largest or `top`."""
    figure = go.Figure()
    shown = np.round(np.asarray(z, np.float64), 5)
    highest = float(top if top is not None else max(shown.max(), 1e-9))
    figure.add_heatmap(
        z=shown.tolist(),
        zmin=0.0,
        zmax=highest,
        colorscale=SCALE,
        colorbar={
            "title": {"text": unit, "side": "right"},
            "thickness": 12,
            "exponentformat": "none",
        },
        xgap=1 if max(shown.shape) <= 24 else 0,
        ygap=1 if max(shown.shape) <= 24 else 0,
        showscale=not written,
        hovertemplate=f"%{{y}} · %{{x}}: %{{z:,.{max(digits, 2)}f}}<extra></extra>",
    )
    finished = _finished(figure, x, y, height, legend=False)
    finished["layout"]["yaxis"]["autorange"] = "reversed"
    for name in ("xaxis", "yaxis"):
        finished["layout"][name]["showgrid"] = False
    if written:
        finished["layout"]["annotations"] = _numbers(shown, highest, digits)
    return finished


def _numbers(z: np.ndarray, top: float, digits: int) -> list[dict[str, Any]]:
    """What stands in the cells of a map."""
    return [
        {
            "x": column,
            "y": row,
            "text": f"{value:,.{digits}f}",
            "showarrow": False,
            "font": {"color": "#000000" if value > MIDDLE * top else "#ffffff"},
        }
        for (row, column), value in np.ndenumerate(z)
    ]


def over_picture(
    pixels_HxWx3: np.ndarray, z_RxC: np.ndarray, *, unit: str, top: float | None = None
) -> dict[str, Any]:
    """A map of the patches of a picture, laid over it."""
    height, width, _ = pixels_HxWx3.shape
    rows, columns = z_RxC.shape
    figure = go.Figure()
    figure.add_image(z=pixels_HxWx3.tolist(), hoverinfo="skip")
    figure.add_heatmap(
        z=np.round(z_RxC.astype(np.float64), 5).tolist(),
        x=[(i + 0.5) * width / columns - 0.5 for i in range(columns)],
        y=[(i + 0.5) * height / rows - 0.5 for i in range(rows)],
        zmin=0.0,
        zmax=float(top if top is not None else max(z_RxC.max(), 1e-9)),
        colorscale=SCALE,
        opacity=0.5,
        colorbar={
            "title": {"text": unit, "side": "right"},
            "thickness": 12,
            "exponentformat": "none",
        },
        hovertemplate="%{z:,.3f}<extra></extra>",
    )
    finished = _finished(figure, Axis(""), Axis(""), 300, legend=False)
    for name in ("xaxis", "yaxis"):
        finished["layout"][name] |= {"visible": False, "constrain": "domain"}
    finished["layout"]["yaxis"] |= {"autorange": "reversed", "scaleanchor": "x"}
    return finished


def histogram(
    counts_N: np.ndarray,
    edges: np.ndarray,
    x: Axis,
    y: Axis,
    *,
    levels: Sequence[float] = (),
    reach: float = 1.0,
    band: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
    height: int = 290,
) -> dict[str, Any]:
    """Bars of a histogram, and what stands over them.

    Args:
      counts_N: heights.
      edges: of the bars.
      x, y: the axes.
      levels: of a grid, as lines.
      reach: how high those are, as a share of the highest bar.
      band: where the bulk lies.
      marks: single values, as strokes on the axis.
      height: of the figure.
    """
    figure = go.Figure()
    figure.add_bar(
        x=((edges[:-1] + edges[1:]) / 2).tolist(),
        y=counts_N.tolist(),
        width=float(edges[1] - edges[0]),
        name="values",
        meta=0,
    )
    top = float(max(counts_N.max(), 1e-9))
    if len(levels):
        ends = (0.0, 1.06 * reach * top, None)
        xs, ys = [v for at in levels for v in (at, at, None)], [*ends] * len(levels)
        _add(figure, "levels of the grid", xs, ys, meta=1, mode="lines", line={"width": 1})
    if len(marks):
        stroke = {"symbol": "line-ns-open", "size": 14, "line": {"width": 2}}
        zeros = [0.0] * len(marks)
        _add(figure, "least and largest", list(marks), zeros, meta=3, marker=stroke)
    if band is not None:
        figure.add_vrect(x0=band[0], x1=band[1], line_width=0, fillcolor="#888888", opacity=0.25)
        square = {"symbol": "square", "size": 12, "color": "rgba(136,136,136,0.5)"}
        _add(figure, "99 % of the values", [None], [None], marker=square)  # of the legend alone
    finished = _finished(figure, x, y._replace(last=1.08 * top, first=0.0), height, legend=True)
    finished["layout"]["bargap"] = 0
    return finished


def _add(figure: go.Figure, name: str, x: list[Any], y: list[Any], **options: Any) -> None:
    """Strokes or marks over a histogram."""
    figure.add_scatter(x=x, y=y, name=name, hoverinfo="x", **{"mode": "markers", **options})


def _finished(figure: go.Figure, x: Axis, y: Axis, height: int, *, legend: bool) -> dict[str, Any]:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 12, "t": 30 if legend else 10, "b": 44},
        showlegend=legend,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        barmode="group",
        bargap=0.25,
    )
    for update, axis in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        update(
            title={"text": axis.title},
            exponentformat="none",
            separatethousands=True,
            automargin=True,
            zeroline=False,
            tickvals=None if axis.ticks is None else list(axis.ticks),
            ticktext=None if axis.texts is None else list(axis.texts),
        )
        if axis.last is not None:
            update(range=[axis.first or 0.0, axis.last])
        elif axis is y and axis.ticks is None:
            update(rangemode="tozero")
    return figure.to_plotly_json()
