"""Sites, figures and findings in plain words, for the page and for the terminal."""

import math
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from quantizable_flax.evaluation.tables import number, title
from quantizable_flax.models.metric import METRICS
from quantizable_flax.report.measured import SIGMAS, HeadMap, Values
from quantizable_flax.report.subject import Subject

LAYER = re.compile(r"layer_(\d+)/(.+)")
KINDS = {
    "attention/query/output": "queries",
    "attention/key/output": "keys",
    "attention/value/output": "values",
    "attention/scores": "attention scores",
    "attention/probs": "attention probabilities",
    "attention/context": "attention context",
    "attention/gated_context": "gated context",
    "attention/output/output": "attention output",
    "attention_residual": "residual sum behind attention",
    "attention_layer_norm/output": "attention's LayerNorm",
    "ffn_in/output": "inside the FFN",
    "ffn_out/output": "FFN output",
    "ffn_residual": "residual sum behind the FFN",
    "ffn_layer_norm/output": "FFN's LayerNorm",
    "final_layer_norm/output": "last LayerNorm",
}


def of_layer(site: str) -> tuple[int, str] | None:
    """A site's layer and its path there; None for one of no layer."""
    match = LAYER.fullmatch(site)
    return (int(match[1]), match[2]) if match else None


def kind(path: str) -> str:
    """What passes a site of some layer."""
    if path.endswith("/weight"):
        return f"weight of {path.removesuffix('/weight')}"
    return KINDS.get(path, path)


def plain(site: str) -> str:
    """A site in words: `layer 0, FFN output`."""
    layer = of_layer(site)
    return kind(site) if layer is None else f"layer {layer[0]}, {kind(layer[1])}"


def headline(subject: Subject, settings: Sequence[str]) -> list[str]:
    """Where the outliers are, and what INT8 would cost, in a few sentences."""
    return [
        f"Where: {_where(subject)}",
        f"Who: {carried_by(subject.anatomy.worst)}",
        *(f"Grid: {line}" for line in [on_the_grid(subject)] if line),
        *(f"Cost: {cost(subject, setting)}" for setting in settings),
        *(f"Dearest: {line}" for line in [dearest(subject)] if line),
        *(f"Idle: {line}" for line in [idle(subject)] if line),
    ]


def _where(subject: Subject) -> str:
    values = subject.anatomy.worst
    norm = subject.anatomy.sites[values.site].inf_norm
    return (
        f"the largest activations pass at {plain(values.site)} ({values.site}): {number(norm)} in a "
        f"typical example, where 99 % of the values lie between {number(values.bulk[0])} and "
        f"{number(values.bulk[1])}."
    )


def carried_by(values: Values) -> str:
    """Which dimensions and tokens carry the outliers of a site."""
    if not values.outliers:
        return f"no value there is further than {SIGMAS:g} standard deviations from the mean."
    by_count = sorted(range(len(values.outliers_D)), key=lambda d: -values.outliers_D[d])
    dims = [d for d in by_count[:3] if values.outliers_D[d]]
    shares = ", ".join(f"{d} ({_percent(values.outliers_D[d] / values.outliers)})" for d in dims)
    tokens = ", ".join(
        f"“{c.token}” ({c.carrying} of {c.occurrences})" for c in values.carriers[:3]
    )
    return (
        f"{values.outliers:,} of {values.tokens * len(values.largest_D):,} values are further than "
        f"{SIGMAS:g} standard deviations from the mean; most lie in dimension{'s'[: len(dims) > 1]} "
        f"{shares}, at the tokens {tokens}."
    )


def on_the_grid(subject: Subject) -> str:
    """How the levels of the grid are spent at the worst site, empty without a grid."""
    grid, values = subject.grid, subject.anatomy.worst
    if grid is None:
        return ""
    return (
        f"{title(grid.setting)} puts one grid from {number(grid.low)} to {number(grid.high)} over "
        f"that site, in steps of {number(grid.step)}: 99 % of the values share {grid.bulk_levels} of "
        f"its {grid.levels} levels (their standard deviation is {number(values.std)})."
    )


def cost(subject: Subject, setting: str) -> str:
    """What a setting does to the metric."""
    row = subject.row
    metric = METRICS[row["metric"]]
    before, after = row["fp"], row[setting]
    worse = after - before if not metric.larger_is_better else before - after
    change = f"{number(worse)} worse" if worse >= 0 else f"{number(-worse)} better"
    if not metric.larger_is_better and before > 0 and math.isfinite(after):
        change = f"{100 * (after / before - 1):+.1f} %"
    kept = row.get(f"{setting}_neighbours")
    near = (
        ""
        if kept is None or math.isnan(kept)
        else f"; {_percent(kept)} of the 10 nearest neighbours stay"
    )
    return (
        f"in {title(setting)} the {metric.label} goes from {number(before)} to {number(after)} "
        f"({change}){near}."
    )


def dearest(subject: Subject) -> str:
    """The sites that cost most alone, empty where none was measured."""
    if not subject.costs:
        return ""
    told = "; ".join(f"{plain(c.site)} {c.increase:+.4f}" for c in subject.costs[:3])
    return f"quantized alone, these sites cost most ({subject.unit}): {told}."


def idle(subject: Subject) -> str:
    """The heads that let least through, empty for a model without heads."""
    heads = subject.anatomy.heads
    if heads is None:
        return ""
    quiet = heads.quiet[0]
    few = int((heads.passes_LxH < 0.5).sum())
    return (
        f"{few} of {heads.passes_LxH.size} attention heads let less than half of an average value "
        f"through; the least, head {quiet.head} of layer {quiet.layer}, {_percent(quiet.passes)}."
    )


def favourite(head: HeadMap, tokens: Sequence[str]) -> str:
    """The key that a head looks at most on its example, and what it finds there."""
    share_S = head.probs_TxS.mean(axis=0)
    place = int(share_S.argmax())
    return (
        f"it puts {_percent(share_S[place])} of its probability on “{tokens[place]}” at place "
        f"{place}, whose value has {number(float(head.norms_S[place]))} times the average norm"
    )


def used(subject: Subject, config: ConfigDict, seconds: float) -> str:
    """On what a model was looked at, and how long that took."""
    values, data, quant = subject.anatomy.worst, config.data, config.quant
    source = data.source if data.source != "auto" else (data.files or "the embedded text")
    length = f" of {data.seq_len} tokens" if "seq_len" in data else ""
    batches = f"{config.eval.batches} batches" if config.eval.batches else "all batches"
    return (
        f"Looked at: {source}; the table on {batches} of {config.eval.batch_size} examples{length}, "
        f"activations on {values.examples} examples, ranges from {quant.calibration_batches} batches of "
        f"{quant.calibration_batch_size}; {seconds:.0f} s in all."
    )


def _percent(share: float) -> str:
    return f"{100 * float(share):.1f} %" if share < 0.1 else f"{100 * float(share):.0f} %"
