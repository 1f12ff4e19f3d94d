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
    "attention/probs": "probabilities",
    "attention/context": "attention context",
    "attention/gated_context": "gated context",
    "attention/output/output": "attention output",
    "attention_residual": "sum after attention",
    "attention_layer_norm/output": "attention LayerNorm",
    "ffn_in/output": "inside the FFN",
    "ffn_out/output": "FFN output",
    "ffn_residual": "sum after the FFN",
    "ffn_layer_norm/output": "FFN LayerNorm",
    "final_layer_norm/output": "last LayerNorm",
    "embeddings/word_type_sum": "sum of word and type embeddings",
    "embeddings/position_sum": "sum with the position embeddings",
    "embeddings/layer_norm/output": "embeddings' LayerNorm",
}
LITTLE = 0.5  # of an average value: a head that lets less through is called idle


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
    """Where the outliers are and what INT8 would cost, each sentence behind a word and a colon."""
    told = {
        "Cost": " ".join(cost(subject, setting) for setting in settings),
        "Where": _where(subject),
        "Who": carried_by(subject.anatomy.worst),
        "Why": on_the_grid(subject),
        "Dearest": dearest(subject),
        "Heads": idle(subject),
    }
    return [f"{word}: {line}" for word, line in told.items() if line]


def _where(subject: Subject) -> str:
    values = subject.anatomy.worst
    norm = subject.anatomy.sites[values.site].inf_norm
    return (
        f"The largest hidden states pass at {plain(values.site)} ({values.site}): {number(norm)} "
        f"in an average example, where 99 % of the values lie between {number(values.bulk[0])} and "
        f"{number(values.bulk[1])}."
    )


def carried_by(values: Values) -> str:
    """Which dimensions and tokens carry the outliers of a site."""
    if not values.outliers:
        return f"No value there is further than {SIGMAS:g} standard deviations from the mean."
    ordered = sorted(range(len(values.outliers_D)), key=lambda d: -values.outliers_D[d])
    shares = [(d, float(values.outliers_D[d]) / values.outliers) for d in ordered[:3]]
    most = ", ".join(f"{d} ({percent(share)})" for d, share in shares if share >= 0.01)
    tokens = ", ".join(
        f"“{c.token}” ({c.carrying} of {c.occurrences})" for c in values.carriers[:3]
    )
    largest = values.dimensions[0]
    return (
        f"{values.outliers:,} of {values.tokens * len(values.largest_D):,} values are further than "
        f"{SIGMAS:g} standard deviations from the mean. By dimension: {most}; the largest of all, "
        f"{number(float(values.largest_D[largest]))}, in dimension {largest}. By token: {tokens}."
    )


def on_the_grid(subject: Subject) -> str:
    """How the levels of the grid are spent at the worst site, empty without a grid."""
    grid = subject.grid
    if grid is None:
        return ""
    return (
        f"{title(grid.setting)} puts one grid from {number(grid.low)} to {number(grid.high)} over "
        f"that site, in steps of {number(grid.step)}: 99 % of the values share {grid.bulk_levels} "
        f"of its {grid.levels} levels."
    )


def cost(subject: Subject, setting: str) -> str:
    """What a setting does to the metric."""
    row = subject.row
    metric = METRICS[row["metric"]]
    before, after = row["fp"], row[setting]
    if metric.larger_is_better:
        change = f"{number(abs(before - after))} {'lost' if after <= before else 'won'}"
    else:
        change = f"{100 * (after / before - 1):+.1f} %" if math.isfinite(after) else "lost"
    kept = row.get(f"{setting}_neighbours", math.nan)
    near = "" if math.isnan(kept) else f"; {percent(kept)} of the nearest neighbours stay"
    return (
        f"In {title(setting)} the {metric.label} goes from {number(before)} to {number(after)} "
        f"({change}{near})."
    )


def dearest(subject: Subject) -> str:
    """The sites that cost most alone, empty where none was measured."""
    if not subject.costs:
        return ""
    alone = f"Quantized alone in {title(subject.costed)}"
    most, least = subject.costs[0].increase, subject.costs[-1].increase
    if most <= -least:  # what is won is chance, and so is as much lost
        return (
            f"{alone}, no site costs more than chance ({subject.unit}): {least:+.4f} to "
            f"{most:+.4f} on these few examples."
        )
    told = "; ".join(f"{plain(c.site)} {c.increase:+.4f}" for c in subject.costs[:3])
    return f"{alone}, these sites cost most ({subject.unit}): {told}."


def idle(subject: Subject) -> str:
    """The heads that let least through, empty for a model without heads."""
    heads = subject.anatomy.heads
    if heads is None:
        return ""
    quiet = heads.quiet[0]
    few = int((heads.passes_LxH < LITTLE).sum())
    return (
        f"{few} of {heads.passes_LxH.size} attention heads let less than half of an average value "
        f"through; head {quiet.head} of layer {quiet.layer} least, {percent(quiet.passes)}."
    )


def favourite(head: HeadMap, tokens: Sequence[str]) -> str:
    """The key that a head looks at most on its example, and what it finds there."""
    share_S = head.probs_TxS.mean(axis=0)
    place = int(share_S.argmax())
    return (
        f"it puts {percent(share_S[place])} of its probability on “{tokens[place]}” at place "
        f"{place}, whose value has {number(float(head.norms_S[place]))} times the average norm"
    )


def used(subject: Subject, config: ConfigDict) -> str:
    """On what a model was looked at."""
    values, data, quant = subject.anatomy.worst, config.data, config.quant
    source = data.source if data.source != "auto" else (data.files or "the embedded data")
    length = f" of {data.seq_len} tokens" if "seq_len" in data else ""
    count = config.eval.batches
    batches = {0: "all batches", 1: "1 batch"}.get(count, f"{count} batches")
    return (
        f"Looked at: {source}; the figures on {batches} of {config.eval.batch_size} "
        f"examples{length}, the pictures on {values.examples} examples, ranges from "
        f"{quant.calibration_batches} batches of {quant.calibration_batch_size}."
    )


def percent(share: float) -> str:
    """A share in per cent, with a digit behind the point where it is small."""
    return f"{100 * float(share):.1f} %" if share < 0.1 else f"{100 * float(share):.0f} %"


def sentence(text: str) -> str:
    """The text with its first letter a capital one."""
    return text[:1].upper() + text[1:]
