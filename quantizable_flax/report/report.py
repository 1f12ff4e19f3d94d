"""The report: the table and the pictures of some models on one page."""

import math
from collections.abc import Iterable, Sequence

from quantizable_flax.checkpoint.logged import Curve
from quantizable_flax.evaluation import tables
from quantizable_flax.evaluation.tables import number
from quantizable_flax.models.metric import METRICS
from quantizable_flax.ptq.sensitivity import SiteCost
from quantizable_flax.report import charts, head_charts, plot
from quantizable_flax.report.measured import SIGMAS
from quantizable_flax.report.page import Chart, Html, Part, Section, folded, table, write_page
from quantizable_flax.report.plot import Axis
from quantizable_flax.report.subject import Subject
from quantizable_flax.report.words import plain, sentence

SHOWN_SITES = 15  # as bars
RANKED_SITES = 40  # of the page of sensitivity alone
OF_TABLE = (
    "Perplexity (lower is better), top-1 accuracy (higher is better), or the cosine of the "
    "embeddings to the reference's (1 is equal), on the validation split. Quantized columns: mean "
    "± standard deviation over calibration seeds, where there are several. Infinity norm and "
    "kurtosis are taken over each family's outputs, FFN outputs and LayerNorms: the largest "
    "infinity norm, the mean kurtosis (a normal distribution has 3)."
)
OF_SITES = (
    "The infinity norm is the largest |x| of an example, averaged over examples: so far a grid per "
    "tensor has to reach. Kurtosis tells how far the few stand out from the many; a normal "
    "distribution has 3."
)
OF_GRID = (
    "Of the sites of hidden states, the one with the largest infinity norm, and the calibrated "
    "grid over its values, whose levels are the vertical lines. Far outliers pull them apart, and "
    "what stands between two of them becomes one number."
)
OF_CARRIERS = (
    f"At the same site. An outlier is a value further than {SIGMAS:g} standard deviations from the "
    "mean of all values there."
)
OF_HEADS = (
    "A head that has nothing to add puts its probability on tokens whose values are small. A "
    "softmax reaches that by ever larger scores alone, and what makes those large makes outliers."
)
OF_COSTS = (
    "What it costs to quantize one site alone, with everything else in floating point, on a few "
    "examples. Weights are named so; all others are activations."
)
OF_GROWTH = (
    "As the runs have logged it: the largest infinity norm and the mean kurtosis over the family's "
    "sites, of one training batch, and the metric on the validation split."
)


def report(
    subjects: Sequence[Subject],
    settings: Sequence[str],
    *,
    title: str = "Outliers and INT8 quality",
    lead: Iterable[str] = (),
) -> str:
    """Returns the page.

    Args:
      subjects: the models, side by side.
      settings: columns of the table.
      title: of the page.
      lead: sentences at its top.
    """
    rows = [subject.row for subject in subjects]
    columns = tables.columns(rows, list(settings))
    cells = [[show(row) for _, show in columns] for row in rows]
    names = [name for name, _ in columns]
    figures = table(names, cells, left=sum(name in tables.LEFT for name in names))
    first: list[Part] = [figures, OF_TABLE, *_setting_charts(subjects, settings)]
    carriers: list[Chart] = []
    for subject in subjects:
        carriers += [charts.dimension_chart(subject), *charts.token_charts(subject)]
    grids = [chart for s in subjects for chart in charts.grid_charts(s)]
    found = [
        Section("Figures", first),
        _where(subjects),
        Section("What the grid makes of the worst site", [OF_GRID, *grids]),
        Section("Which dimensions and which tokens carry outliers", [OF_CARRIERS, *carriers]),
        *_heads(subjects),
        *_sensitivity(subjects),
        *_growth(subjects),
    ]
    return write_page(title, lead, found)


def sensitivity_report(name: str, setting: str, costs: Sequence[SiteCost], unit: str) -> str:
    """Returns a page with what each site costs alone; the picture shows the dearest of them."""
    title = f"{name}: sites by what {tables.title(setting)} costs"
    bars = _cost_bars(name, setting, costs[:RANKED_SITES], unit)
    parts: list[Part] = [bars, _cost_table(costs, unit)]
    return write_page(title, (), [Section("Sites", parts)])


def _setting_charts(subjects: Sequence[Subject], settings: Sequence[str]) -> list[Chart]:
    """What the settings cost over floating point; a picture for each metric."""
    found = []
    titles = [tables.title(setting) for setting in settings]
    for metric in METRICS.values():
        rows = [s.row for s in subjects if s.row["metric"] == metric.name]
        if not rows or not settings:
            continue
        costs = {
            row["name"]: [metric.cost(row[setting], row["fp"]) for setting in settings]
            for row in rows
        }
        told = "; ".join(
            f"{name} " + ", ".join(f"{t} {c:.4f}" for t, c in zip(titles, paid, strict=True))
            for name, paid in costs.items()
        )
        drawn = {  # of what is not finite, no bar
            name: [c if math.isfinite(c) else math.nan for c in paid]
            for name, paid in costs.items()
        }
        figure = plot.bars(drawn, titles, Axis(metric.cost_label))
        title = f"What each setting costs: {metric.cost_label}"
        caption = f"A bar at 0 costs nothing. {told}."
        found.append(Chart(figure, title, caption, f"Bars of the {metric.cost_label}: {told}."))
    return found


def _where(subjects: Sequence[Subject]) -> Section:
    lists = []
    for subject in subjects:
        rows = sorted(subject.anatomy.sites.items(), key=lambda item: -item[1].inf_norm)
        lines = [[site, plain(site), number(f.inf_norm), number(f.kurtosis)] for site, f in rows]
        found = table(["site", "in words", "infinity norm", "kurtosis"], lines, left=2)
        lists.append(folded(f"{subject.name}: all {len(rows)} sites in figures", found))
    layered = [s for s in subjects if charts.by_layer(s.anatomy.sites, "inf_norm")]
    return Section(
        "Where the outliers are",
        [
            OF_SITES,
            *charts.site_maps(layered),
            "Layer by layer, the kinds of sites where the infinity norm is largest:",
            *charts.layer_lines(layered, "inf_norm"),
            "The same of the kurtosis:",
            *charts.layer_lines(layered, "kurtosis"),
            *lists,
        ],
    )


def _heads(subjects: Sequence[Subject]) -> list[Section]:
    passes = head_charts.passes_charts(subjects)
    if not passes:
        return []
    count = 2 if len(subjects) == 1 else 1
    maps = [chart for s in subjects for chart in head_charts.quiet_charts(s, count)]
    gates = [chart for s in subjects for chart in head_charts.gate_charts(s)]
    none = [s.name for s in subjects if s.anatomy.heads and not s.anatomy.heads.zeros_LxH.max()]
    said = [f"No probability is exactly 0 in {', '.join(none)}."] if none else []
    shown = "The heads that let least through, on a real input:"
    return [
        Section("Heads that do nothing", [OF_HEADS, *passes, shown, *maps]),
        *([Section("Gates", gates)] if gates else []),
        Section("Exact zeros", [*said, *head_charts.zero_charts(subjects)]),
    ]


def _sensitivity(subjects: Sequence[Subject]) -> list[Section]:
    known = [subject for subject in subjects if subject.costs]
    if not known:
        return []
    bars = [_cost_bars(s.name, s.costed, s.costs[:SHOWN_SITES], s.unit) for s in known]
    lists = [
        folded(f"{s.name}: all {len(s.costs)} sites", _cost_table(s.costs, s.unit)) for s in known
    ]
    return [Section("Which sites cost most", [OF_COSTS, *bars, *lists])]


def _cost_bars(name: str, setting: str, costs: Sequence[SiteCost], unit: str) -> Chart:
    figure = plot.bars(
        {unit: [cost.increase for cost in costs]},
        [plain(cost.site) for cost in costs],
        Axis(unit),
        sideways=True,
        height=90 + 20 * len(costs),
    )
    told = f"{plain(costs[0].site)}, {costs[0].increase:+.4f}"
    return Chart(
        figure,
        f"{name}: the {len(costs)} dearest sites in {tables.title(setting)}",
        f"First of all {told}. Give these more bits first, activations ranges per token and "
        "weights ranges per channel, or leave them in floating point.",
        f"Bars of the {unit} of {name} by quantized site; the dearest is {told}.",
        "half" if len(costs) <= SHOWN_SITES else "whole",
    )


def _cost_table(costs: Sequence[SiteCost], unit: str) -> Html:
    return table(["site", unit], [[cost.site, f"{cost.increase:+.6f}"] for cost in costs])


def _growth(subjects: Sequence[Subject]) -> list[Section]:
    found = [
        *_curves(subjects, "max_inf_norm", "largest infinity norm"),
        *_curves(subjects, "avg_kurtosis", "mean kurtosis"),
    ]
    for metric in METRICS.values():
        group = [s for s in subjects if s.row["metric"] == metric.name]
        found += _curves(group, "validation", f"validation {metric.label}")
    return [Section("How they grew in training", [OF_GROWTH, *found])] if found else []


def _curves(subjects: Sequence[Subject], field: str, name: str) -> list[Chart]:
    curves: dict[str, Curve] = {}
    for subject in subjects:
        curve = [(step, v) for step, v in getattr(subject.history, field) if math.isfinite(v)]
        if len(curve) > 1:
            curves[subject.name] = curve
    if not curves:
        return []
    told = "; ".join(
        f"{n} from {number(curve[0][1])} to {number(curve[-1][1])}" for n, curve in curves.items()
    )
    figure = plot.lines(curves, Axis("step"), Axis(name))
    label = f"{name} over steps: {told}."
    return [Chart(figure, f"{sentence(name)} over steps", f"{sentence(told)}.", label, "third")]
