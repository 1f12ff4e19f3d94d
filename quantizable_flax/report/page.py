"""The page: one HTML file with its style, its figures and the program that draws them."""

import html
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from quantizable_flax.report import plot


class Chart(NamedTuple):
    """A figure of plotly with what is said of it.

    Attributes:
      figure: `data` and `layout`.
      title: whose and what it is, short.
      caption: what to see.
      label: what it shows, for those who hear the page.
      size: how many stand beside each other where there is room: "third", "half", "whole".
    """

    figure: dict[str, Any]
    title: str
    caption: str
    label: str
    size: str = "half"


class Html(NamedTuple):
    """A piece of the page as it is."""

    text: str


Part = str | Chart | Html  # text is a paragraph; charts stand beside each other


class Section(NamedTuple):
    """A heading and what follows."""

    title: str
    parts: Sequence[Part]


def write_page(title: str, lead: Iterable[str], sections: Iterable[Section]) -> str:
    """Returns the page.

    Args:
      title: of it.
      lead: sentences at its top; what stands before a colon is set apart.
      sections: what follows.
    """
    numbers = itertools.count()
    body = "".join(_section(section, numbers) for section in sections)
    room = resources.files(__package__)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{html.escape(title)}</title>"
        f"<style>{room.joinpath('page.css').read_text('utf-8')}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>{_lead(lead)}{body}</main>"
        f"<script>{plot.javascript()}</script>"
        f"<script>{room.joinpath('page.js').read_text('utf-8')}</script></body></html>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Html:
    """A table; the first `left` columns are of words, the others of numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=left' if i < left else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{line('th', columns)}</tr></thead>"
    return Html(
        f"<div class='scroll' tabindex='0'><table>{head}<tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, inner: Html) -> Html:
    """Something that opens when it is asked for."""
    return Html(f"<details><summary>{html.escape(summary)}</summary>{inner.text}</details>")


def _lead(lines: Iterable[str]) -> str:
    items = []
    for line in lines:
        key, colon, rest = line.partition(": ")
        items.append(
            f"<li><b>{html.escape(key)}</b> {html.escape(rest)}</li>"
            if colon
            else f"<li>{html.escape(line)}</li>"
        )
    return f"<ul class='lead'>{''.join(items)}</ul>" if items else ""


def _section(section: Section, numbers: Iterator[int]) -> str:
    found = [f"<section><h2>{html.escape(section.title)}</h2>"]
    sizes = itertools.groupby(section.parts, lambda p: p.size if isinstance(p, Chart) else "")
    for size, parts in sizes:
        shown = "".join(_part(part, numbers) for part in parts)
        found.append(f"<div class='charts {size}'>{shown}</div>" if size else shown)
    return "".join([*found, "</section>"])


def _part(part: Part, numbers: Iterator[int]) -> str:
    if isinstance(part, Chart):
        return _chart(part, next(numbers))
    return part.text if isinstance(part, Html) else f"<p>{html.escape(part)}</p>"


def _chart(chart: Chart, number: int) -> str:
    # In a script, `</` would end it.
    figure = json.dumps(chart.figure, default=_plain, separators=(",", ":")).replace("</", "<\\/")
    label, name = html.escape(chart.label, quote=True), f"chart-{number}"
    return (
        f"<figure><h3>{html.escape(chart.title)}</h3>"
        f"<div class='plot' id='{name}' role='img' aria-label=\"{label}\" "
        f"style='height:{chart.figure['layout']['height']}px'></div>"
        f"<script type='application/json' data-for='{name}'>{figure}</script>"
        f"<figcaption>{html.escape(chart.caption)}</figcaption></figure>"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value).__name__)
