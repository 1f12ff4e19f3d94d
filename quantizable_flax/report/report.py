"""The report: the table and the pictures of some models on one page."""

import math
from collections.abc import Iterable, Sequence

from quantizable_flax.checkpoint.logged import Curve
from quantizable_flax.evaluation import tables
from quantizable_flax.evaluation.tables import number
from quantizable_flax.models.metric import METRICS
from quantizable_flax.ptq.sensitivity import SiteCost
from quantizable_flax.report import charts, head_charts, plot
from quantizable_flax.report.page import Chart, Html, Section, folded, table, write_page
from quantizable_flax.report.plot import Axis
from quantizable_flax.report.subject import Subject
from quantizable_flax.report.words import plain

SHOWN_SITES = 15  # as bars
RANKED_SITES = 40  # of the page of sensitivity alone


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
    left = sum(name in tables.LEFT for name, _ in columns)
    figures = table(
        [name for name, _ in columns], [[show(r) for _, show in columns] for r in rows], left
    )
    found = [
        Section("Figures", [figures, _said_of_table(), *_cost_charts(subjects, settings)]),
        _where(subjects),
        _grids(subjects),
        _carriers(subjects),
        *_heads(subjects),
        *_sensitivity(subjects),
        *_growth(subjects),
    ]
    return write_page(title, lead, found)


def sensitivity_report(name: str, setting: str, costs: Sequence[SiteCost], unit: str) -> str:
    """Returns a page with what each site costs alone; the picture shows the dearest of them."""
    title = f"{name}: sites by what {tables.title(setting)} costs"
    parts = [_cost_bars(name, costs[:RANKED_SITES], unit), _cost_table(costs, unit)]
    return write_page(title, (), [Section("Sites", parts)])


def _said_of_table() -> str:
    return (
        "Perplexity (lower is better), top-1 accuracy (higher is better), or the cosine of the "
        "embeddings to the reference's (1 is equal), on the validation split. Quantized columns: mean "
        "± standard deviation over calibration seeds. Infinity norm and kurtosis are taken over each "
        "family's outputs, FFN outputs and LayerNorms: the largest infinity norm, the mean kurtosis "
        "(a normal distribution has 3)."
    )


def _cost_charts(subjects: Sequence[Subject], settings: Sequence[str]) -> list[Chart]:
    """What the settings cost over floating point; a picture for each metric."""
    found = []
    for name, metric in METRICS.items():
        rows = [s.row for s in subjects if s.row["metric"] == name]
        if not rows or not settings:
            continue
        costs = {r["name"]: [metric.cost(r[s], r["fp"]) for s in settings] for r in rows}
        names = [tables.title(setting) for setting in settings]
        told = "; ".join(
            f"{n} " + ", ".join(f"{s} {number(c)}" for s, c in zip(names, values, strict=True))
            for n, values in costs.items()
        )
        figure = plot.bars(_finite(costs), names, Axis(metric.cost_label))
        caption = f"What each setting costs: {metric.cost_label}; bars near 0 cost nothing. {told}."
        found.append(Chart(figure, caption, f"Bars of the {metric.cost_label}: {told}."))
    return found


def _finite(costs: dict[str, list[float]]) -> dict[str, list[float]]:
    """nan, which is drawn as nothing, for what is not finite."""
    return {n: [v if math.isfinite(v) else math.nan for v in vs] for n, vs in costs.items()}


def _where(subjects: Sequence[Subject]) -> Section:
    sites = []
    for subject in subjects:
        rows = sorted(subject.anatomy.sites.items(), key=lambda item: -item[1].inf_norm)
        lines = [[site, plain(site), number(f.inf_norm), number(f.kurtosis)] for site, f in rows]
        found = table(["site", "in words", "infinity norm", "kurtosis"], lines, left=2)
        sites.append(folded(f"{subject.name}: all {len(rows)} sites in figures", found))
    several = "; several models share a picture" if len(subjects) > 1 else ""
    return Section(
        "Where the outliers are",
        [
            "The infinity norm is the largest |x| of an example, averaged over examples. A grid per "
            "tensor has to reach that far.",
            *charts.site_maps(subjects, "inf_norm"),
            f"Layer by layer, the kinds of sites with the largest infinity norms{several}:",
            *charts.layer_lines(subjects, "inf_norm"),
            "Kurtosis tells how far the few stand out from the many: a normal distribution has 3.",
            *charts.layer_lines(subjects, "kurtosis"),
            *sites,
        ],
    )


def _grids(subjects: Sequence[Subject]) -> Section:
    return Section(
        "What the INT8 grid makes of the worst site",
        [
            "The site with the largest infinity norm, and the calibrated grid over its values. Its "
            "levels are the vertical lines: far outliers pull them apart, and what stands between two "
            "lines becomes one number.",
            *(chart for subject in subjects for chart in charts.grid_charts(subject)),
        ],
    )


def _carriers(subjects: Sequence[Subject]) -> Section:
    parts: list[Chart] = []
    for subject in subjects:
        parts += [charts.dimension_chart(subject), *charts.token_charts(subject)]
    return Section("Which dimensions and which tokens carry them", [charts.outlier_rule(), *parts])


def _heads(subjects: Sequence[Subject]) -> list[Section]:
    passes = head_charts.passes_charts(subjects)
    if not passes:
        return []
    count = 2 if len(subjects) == 1 else 1
    maps = [chart for s in subjects for chart in head_charts.quiet_charts(s, count)]
    gates = [chart for s in subjects for chart in head_charts.gate_charts(s)]
    zeros = head_charts.zero_charts(subjects)
    without = [
        s.name for s in subjects if s.anatomy.heads and not s.anatomy.heads.zeros_LxH.max() > 0
    ]
    said = f"No probability is exactly 0 in {', '.join(without)}." if without else ""
    return [
        Section(
            "Heads that do nothing",
            [
                "A head that has nothing to add puts its probability on tokens whose values are small. "
                "The softmax reaches that only by large scores, and what grows them grows outliers.",
                *passes,
                "The heads that let least through, on a real input:",
                *maps,
            ],
        ),
        *([Section("Gates", gates)] if gates else []),
        Section("Exact zeros", [*([said] if said else []), *zeros]),
    ]


def _sensitivity(subjects: Sequence[Subject]) -> list[Section]:
    known = [subject for subject in subjects if subject.costs]
    if not known:
        return []
    tables_of_all = [
        folded(f"{s.name}: all {len(s.costs)} sites", _cost_table(s.costs, s.unit)) for s in known
    ]
    return [
        Section(
            "Which sites cost most",
            [
                "What it costs to quantize one site alone, everything else in floating point, on a few "
                "examples. Sites of weights are named so; all others are activations.",
                *(_cost_bars(s.name, s.costs[:SHOWN_SITES], s.unit) for s in known),
                *tables_of_all,
            ],
        )
    ]


def _cost_bars(name: str, costs: Sequence[SiteCost], unit: str) -> Chart:
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
        f"{name}: the {len(costs)} dearest sites, {unit}. The dearest is {told}; give those more "
        "bits, ranges per token or none at all first.",
        f"Bars of the {unit} of {name} by quantized site; the dearest is {told}.",
        wide=len(costs) > SHOWN_SITES,
    )


def _cost_table(costs: Sequence[SiteCost], unit: str) -> Html:
    return table(["site", unit], [[cost.site, f"{cost.increase:+.6f}"] for cost in costs])


def _growth(subjects: Sequence[Subject]) -> list[Section]:
    norms = _curves(subjects, "max_inf_norm", "infinity norm")
    kurtoses = _curves(subjects, "avg_kurtosis", "kurtosis")
    found: list[Chart] = [*norms, *kurtoses]
    for name, metric in METRICS.items():
        group = [s for s in subjects if s.row["metric"] == name]
        found += _curves(group, "validation", f"validation {metric.label}")
    if not found:
        return []
    return [
        Section(
            "How they grew in training",
            ["As the runs have logged it: the largest infinity norm and the mean kurtosis over the "
             "family's sites, of one training batch, and the metric on the validation split.", *found],
        )
    ]  # fmt: skip


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
    return [
        Chart(figure, f"{name.capitalize()} over steps: {told}.", f"{name} over steps: {told}.")
    ]
