"""OPT's published metrics against the original, and what `eval.outliers` means by its rows."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from quantizable_flax import UserError, build_model
from quantizable_flax.evaluation.outliers import outlier_sites, published_stats
from quantizable_flax.evaluation.step import evaluate, make_eval_step
from quantizable_flax.quantization.sites import STATS, Site
from tests.helpers import golden, golden_names
from tests.models.golden_case import load

MODELS = golden_names("model_opt_*")


def site_names(config) -> dict[str, str]:
    """Our names of the original's sites."""
    output = "ffn_residual" if config.model.pre_layer_norm else "ffn_layer_norm/output"
    start = "model.decoder."
    names = {
        f"{start}layers.{i}{theirs}": f"layer_{i}/{ours}"
        for i in range(config.model.num_layers)
        for theirs, ours in {
            "": output,
            ".fc2": "ffn_out/output",
            ".final_layer_norm": "ffn_layer_norm/output",
            ".self_attn.out_proj": "attention/output/output",
            ".self_attn_layer_norm": "attention_layer_norm/output",
        }.items()
    }
    if config.model.pre_layer_norm:
        names[f"{start}final_layer_norm"] = "final_layer_norm/output"
    return names


@functools.cache
def eval_step(name: str):
    """One program for all batches of a model."""
    case = load(name)
    return make_eval_step(case.model, outlier_sites(case.model))


@functools.cache
def evaluated(name: str):
    """(what we find, what the original's evaluation script printed, our names of its sites)."""
    case, metrics, key = load(name), golden("metrics_opt"), name.removeprefix("model_")
    arrays, size = metrics.group(f"{key}/in"), metrics.config["batch_size"]
    batches = [
        {key: x[start : start + size] for key, x in arrays.items()}
        for start in range(0, len(arrays["labels"]), size)
    ]
    step, metric = eval_step(name), case.model.metric
    found = evaluate(step, case.params, batches, metric=metric, averaging="published")
    return found, metrics.config["metrics"][key], site_names(case.config)


# float32 sums in another order: measured 2e-7 and below.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_published_metrics(name):
    found, expected, sites = evaluated(name)
    close(found.value, expected["perplexity"])
    for theirs, ours in sites.items():
        close(found.sites[f"{ours}:inf_norm"], expected[theirs], err_msg=theirs)
    for key in ("max_inf_norm", "max_kurtosis"):
        close(found.outliers[key], expected[key], err_msg=key)
    # The other summaries of the original are of some of the sites.
    layers = [ours for theirs, ours in sites.items() if re.search(r"layers\.\d+$", theirs)]
    ffn = [ours for theirs, ours in sites.items() if theirs.endswith(".fc2")]
    for key, statistic, chosen in (
        ("max_ffn_inf_norm", "inf_norm", ffn),
        ("max_layer_inf_norm", "inf_norm", layers),
        ("max_kurtosis_layers", "kurtosis", layers),
    ):
        actual = max(found.sites[f"{site}:{statistic}"] for site in chosen)
        close(actual, expected[key], err_msg=key)
    # Post-LN, a layer's output is its LayerNorm's: the original counts that one twice.
    average = np.mean([found.sites[f"{ours}:kurtosis"] for ours in sites.values()])
    close(average, expected["avg_kurtosis"])


@pytest.mark.parametrize("name", MODELS)
def test_published_average_kurtosis(name):
    found, expected, _ = evaluated(name)
    close(found.outliers["avg_kurtosis"], expected["avg_kurtosis"])


@pytest.mark.parametrize("name", MODELS)
def test_metrics_of_sequences_padded_on_the_left(name):
    """There a query that sees no key predicts the first token, and counts in every statistic."""
    case = load(name)
    first = np.argmax(case.batch["attention_mask"], axis=1)
    assert first.any()
    metric = case.model.metric
    found = evaluate(eval_step(name), case.params, [case.batch], metric=metric)
    close(found.loss, case.file["out/loss"])
    hidden = case.file["out/hidden_last"]
    if case.config.model.pre_layer_norm and len(hidden) == len(first):  # the subset keeps one row
        for statistic, rows in row_statistics(hidden.reshape(len(hidden), -1)).items():
            close(found.sites[f"final_layer_norm/output:{statistic}"], rows.mean())


def row_statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
    rows = rows.astype(np.float64)
    centred = rows - rows.mean(1, keepdims=True)
    deviation = rows.std(1, ddof=1)
    return {
        "inf_norm": np.abs(rows).max(1),
        "kurtosis": (centred**4).mean(1) / (deviation**4 + 1e-6),
    }


@pytest.fixture(scope="module", params=[MODELS[0], *golden_names("model_opt_postln")])
def captured(request):
    """(config, outputs of all sites, their recorded statistics) of one batch."""
    case = load(request.param)

    @jax.jit
    def run(params, ids):
        _, kept = case.own_model.apply(
            {"params": params},
            ids,
            capture_intermediates=lambda module, _: isinstance(module, Site),
            mutable=["intermediates", STATS],
        )
        return kept

    kept = run(case.params, case.batch["input_ids"])
    outputs = traverse_util.flatten_dict(kept["intermediates"], sep="/")
    outputs = {key.removesuffix("/__call__"): np.asarray(x) for key, (x,) in outputs.items()}
    return case.config.copy_and_resolve_references(), outputs, kept[STATS]


@pytest.mark.parametrize("rows", ["published", "sequence", "token"])
def test_rows_of_the_statistics(captured, rows):
    config, outputs, stats = captured
    found = published_stats(stats, outlier_sites(build_model(config), rows))
    sites = {name.rpartition(":")[0].removesuffix("/again") for name in found}
    assert sites == set(site_names(config).values())
    for name, actual_B in found.items():
        site, _, statistic = name.rpartition(":")
        x = outputs[site.removesuffix("/again")]
        # The original flattens tokens before the FFN: its fc2, and the LayerNorm before fc1.
        flattened = site.endswith("ffn_out/output") or (
            site.endswith("ffn_layer_norm/output") and config.model.pre_layer_norm
        )
        if rows == "token" or (rows == "published" and flattened):
            per_token = row_statistics(x.reshape(-1, x.shape[-1]))[statistic]
            expected_B = per_token.reshape(len(x), -1).mean(1)
        else:
            expected_B = row_statistics(x.reshape(len(x), -1))[statistic]
        # The statistics are float32, fourth powers of it: measured 3e-7.
        np.testing.assert_allclose(actual_B, expected_B, rtol=1e-5, err_msg=name)


def test_unknown_rows_are_named(captured):
    model = build_model(captured[0])
    with pytest.raises(UserError, match=r"found 'tokens' \(did you mean 'token'"):
        outlier_sites(model, "tokens")
