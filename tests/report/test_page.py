"""The page: every picture has words, and nothing is loaded from elsewhere."""

import json
import re
from html.parser import HTMLParser

import pytest

from quantizable_flax.checkpoint.logged import History
from quantizable_flax.evaluation.tables import columns
from quantizable_flax.ptq.sensitivity import SiteCost
from quantizable_flax.report.charts import by_layer, shown_places
from quantizable_flax.report.collect import collect
from quantizable_flax.report.measured import SiteFigures
from quantizable_flax.report.record import record
from quantizable_flax.report.report import report, sensitivity_report
from quantizable_flax.report.subject import Subject
from quantizable_flax.report.values import grid_over
from quantizable_flax.report.words import headline
from tests.report.case import DIMENSION, SITE, TOKEN, inputs_of, planted

LOADING = ("src", "href", "srcset", "data", "poster", "action", "background")


class Page(HTMLParser):
    """What a browser would read."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kept = {"script": self.scripts, "style": self.styles}
        kept.get(self.open[-1] if self.open else "", self.text).append(data)

    def figures(self) -> list[dict]:
        """The data of the charts, by plotly's names."""
        named = [s for s in self.scripts if s.startswith('{"data"')]
        return [json.loads(text) for text in named]


def row(model: str, metric: str, **values) -> dict:
    shared = {"name": model, "model": model, "attention": "vanilla", "metric": metric}
    return shared | {"max_inf_norm": 5.0, "avg_kurtosis": 3.0, "steps": 1} | values


METRICS = {
    "bert": ("perplexity", 10.0, 11.0),
    "opt": ("fidelity", 1.0, 0.8),
    "vit": ("top1", 90, 89),
}
COSTS = [SiteCost("layer_0/ffn_out/weight", 0.2), SiteCost("layer_0/attention/scores", 0.01)]
UNIT = "loss increase (nats)"
CURVE = [(10, 1.0), (20, 7.5)]


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    found = {}
    for family, (metric, fp, w8a8) in METRICS.items():
        model, params = planted(family)
        anatomy = collect(model, params, inputs_of(family, model))
        figures = row(f"<{family}>", metric, fp=fp, w8a8=w8a8, w8a8_std=0.1)
        values = anatomy.worst
        grid = grid_over(values, "w8a8", values.low, values.high, 8, symmetric=False)
        history = History(CURVE, CURVE, CURVE) if family == "bert" else History()
        found[family] = Subject(figures, anatomy, grid, COSTS, "w8a8", UNIT, history)
    return found


@pytest.fixture(scope="module")
def page(subjects) -> Page:
    return Page(report(list(subjects.values()), ["w8a8"], lead=["Where: </script> & there"]))


def test_nothing_is_loaded_from_elsewhere(page):
    assert not page.open
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not set(attributes) & set(LOADING), (tag, attributes)
    assert not re.search(r"url\(|@import", "".join(page.styles))
    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1


def test_every_chart_has_title_caption_and_label(page):
    plots = [a for tag, a in page.tags if a.get("class") == "plot"]
    names = [tag for tag, _ in page.tags]
    assert len(plots) == names.count("figure") == names.count("figcaption") == names.count("h3")
    assert len(plots) == len(page.figures()) > 30
    data = [a["data-for"] for _, a in page.tags if "data-for" in a]
    assert data == [a["id"] for a in plots]
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in plots)
    text = "".join(page.text)
    assert "</script> & there" in text
    assert "None" not in text
    assert "nan" not in text


def test_axes_are_linear_with_plain_numbers_and_units(page):
    for figure in page.figures():
        for axis in (figure["layout"][name] for name in ("xaxis", "yaxis")):
            assert axis.get("type", "linear") == "linear"
            assert axis["exponentformat"] == "none"
        kinds = {trace["type"] for trace in figure["data"]}
        if kinds & {"bar", "scatter"}:
            titles = [figure["layout"][name]["title"].get("text") for name in ("xaxis", "yaxis")]
            assert any(titles), titles
        if len([t for t in figure["data"] if t["type"] == "scatter"]) > 1:
            assert figure["layout"]["showlegend"]


def test_every_kind_of_picture_is_there(page):
    text = "".join(page.text)
    titles = [
        "What each setting costs: loss increase (nats per token)",
        "What each setting costs: cosine lost",
        "<bert>: infinity norm of every site",
        "<vit>: kurtosis of every site",
        "FFN output: infinity norm",
        "<bert>: all values, layer 0, FFN output",
        "<opt>: dimensions, layer 0, FFN output",
        "<opt>: the tokens that carry outliers",
        "<opt>: one real input, token by token",
        "<vit>: one real input, patch by patch",
        "<vit>: how much of an average value each head lets through",
        "<opt>: gate probabilities, token by token",
        "<bert>: visible probabilities that are exactly 0 (%)",
        "No probability is exactly 0 in <opt>, <vit>.",
        "<opt>: the 2 dearest sites in W8A8",
        "Largest infinity norm over steps",
        "Validation ppl over steps",
    ]
    for title in titles:
        assert title in text, title
    heads = re.findall(r"<(\w+)>: layer 0, head \d, what it finds there", text)
    assert heads == list(METRICS)


def test_one_model_alone_without_settings(subjects):
    subject = subjects["bert"]._replace(grid=None, costs=[], history=History())
    text = "".join(Page(report([subject], [])).text)
    assert "No setting has one grid over this site." in text
    for absent in ("Which sites cost most", "How they grew", "Gates", "What each setting costs"):
        assert absent not in text


def test_the_headline_names_site_token_dimension_and_cost(subjects):
    told = dict(line.split(": ", 1) for line in headline(subjects["opt"], ["w8a8"]))
    assert told["Cost"] == "In W8A8 the cosine goes from 1.000 to 0.800 (0.200 lost)."
    assert f"layer 0, FFN output ({SITE})" in told["Where"]
    assert f"in dimension {DIMENSION}" in told["Who"]
    assert f"“␣t{TOKEN}⏎” (" in told["Who"]
    grid = subjects["opt"].grid
    assert f"99 % of the values share {grid.bulk_levels} of its 256 levels" in told["Why"]
    assert grid.bulk_levels < 10
    assert "layer 0, weight of ffn_out +0.2000" in told["Dearest"]
    assert told["Dearest"].startswith("Quantized alone in W8A8, these sites cost most (")
    told = dict(line.split(": ", 1) for line in headline(subjects["bert"], ["w8a8"]))
    assert told["Cost"] == "In W8A8 the ppl goes from 10.00 to 11.00 (+10.0 %)."


def test_sites_that_cost_no_more_than_others_win_are_not_called_dear(subjects):
    costs = [SiteCost("layer_0/ffn_out/weight", 0.002), SiteCost("layer_0/ffn_in/weight", -0.003)]
    told = headline(subjects["bert"]._replace(costs=costs), [])
    assert any("no site costs more than chance" in line and "-0.0030" in line for line in told)
    assert not any("these sites cost most" in line for line in told)


def test_the_record_is_json(subjects):
    subject = subjects["opt"]
    lame = subject._replace(row=subject.row | {"w8a8_std": float("nan")})
    found = json.loads(json.dumps(record(lame), allow_nan=False))
    assert found["row"]["w8a8_std"] is None
    assert found["worst"]["dimensions"][0]["dimension"] == DIMENSION
    assert found["worst"]["carriers"][0]["token"] == f"␣t{TOKEN}⏎"
    assert len(found["heads"]["passes_LxH"][0]) == 4
    assert found["sensitivity"][0] == {"site": "layer_0/ffn_out/weight", "increase": 0.2}
    assert found["grid"]["bulk_levels"] == subject.grid.bulk_levels


def test_the_page_of_sensitivity():
    page = Page(sensitivity_report("run", "w4a8", COSTS, "nats"))
    text = "".join(page.text)
    assert "run: sites by what W4A8 costs" in text
    assert "layer_0/attention/scores+0.010000" in text
    assert len(page.figures()) == 1


def test_layers_are_in_order_beyond_ten():
    # A jitted step returns its dictionary in the order of the names: 0, 1, 10, 11, 2, ...
    names = sorted(f"layer_{i}" for i in range(12))
    sites = {f"{n}/ffn_residual": SiteFigures(float(n.split("_")[1]), 3.0) for n in names}
    sites["layer_0/ffn_out/output"] = SiteFigures(99.0, 9.0)
    sites["final_layer_norm/output"] = SiteFigures(1.0, 1.0)
    found = by_layer(sites, "inf_norm")
    assert found["ffn_residual"] == [(i, float(i)) for i in range(12)]
    assert by_layer(sites, "kurtosis")["ffn_out/output"] == [(0, 9.0)]
    assert set(found) == {"ffn_residual", "ffn_out/output"}


def test_long_examples_keep_their_ends():
    assert shown_places(40) == list(range(40))
    assert shown_places(64) == [*range(30), *range(54, 64)]


def test_rows_of_one_metric_name_it_in_the_header():
    bert = row("bert", "perplexity", fp=10.0, w8a8=11.0, w8a8_std=0.1)
    vit = row("vit", "top1", fp=90.0, w8a8=89.0, w8a8_std=0.1)
    assert [title for title, _ in columns([bert], ["w8a8"])][2] == "FP ppl"
    assert [title for title, _ in columns([vit], ["w8a8"])][-2] == "W8A8 top-1 %"
    muon = bert | {"beside_attention": "Muon"}
    shown = dict(columns([bert, muon], []))["beside attention"]
    assert [shown(bert), shown(muon)] == ["", "Muon"]
    both = [title for title, _ in columns([bert, vit], ["w8a8"])]
    assert both == [
        "name", "model", "attention", "metric", "FP",
        "max inf norm", "avg kurtosis", "W8A8", "steps",
    ]  # fmt: skip
