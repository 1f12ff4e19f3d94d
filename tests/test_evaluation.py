"""Evaluation: parity of the published metrics, exact averages, quantized rows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.checkpoint.load import load_run, override_run, row_names
from quantizable_flax.config import default_config
from quantizable_flax.data.tasks import make_task
from quantizable_flax.errors import UserError
from quantizable_flax.evaluation import tables
from quantizable_flax.evaluation.rows import beside_attention, result_row
from quantizable_flax.evaluation.step import Metrics, evaluate, make_eval_step
from quantizable_flax.evaluation.study import Evaluator
from quantizable_flax.interop import from_state_dict
from quantizable_flax.models.bert_config import BertConfig
from quantizable_flax.models.build import build_model, with_config
from quantizable_flax.models.metric import PERPLEXITY
from quantizable_flax.ptq.settings import parse_setting
from quantizable_flax.training.loop import train
from tests import compiled
from tests.helpers import bert_config, golden, golden_names
from tests.tiny import tiny_config


def batches_of(arrays: dict, size: int, padded: bool = False) -> list[dict]:
    """Splits arrays into batches; the last is filled up with examples of weight 0 if asked."""
    count = len(next(iter(arrays.values())))
    batches = []
    for start in range(0, count, size):
        batch = {key: value[start : start + size] for key, value in arrays.items()}
        real = len(batch["labels"])
        if padded:
            fill = {key: np.resize(value, (size, *value.shape[1:])) for key, value in batch.items()}
            batch = {**fill, "example_weight": (np.arange(size) < real).astype(np.float32)}
        batches.append(batch)
    return batches


@pytest.mark.parametrize("model_name", golden_names("model_bert_*"))
def test_published_metrics(model_name):
    name = model_name.removeprefix("model_")
    metrics, weights = golden("metrics_bert"), golden(model_name)
    expected, arrays = metrics.config["metrics"][name], metrics.group(f"{name}/in")
    config = bert_config(weights.config)
    params = from_state_dict(weights.group("w"), config)
    step = make_eval_step(build_model(config), BertConfig.outlier_sites)
    found = evaluate(
        step,
        params,
        batches_of(arrays, metrics.config["batch_size"]),
        metric=PERPLEXITY,
        averaging="published",
    )
    # float32 sums in another order; the original keeps its means in float64, as we do.
    assert found.value == pytest.approx(expected["perplexity"], rel=1e-5)
    assert found.outliers["avg_kurtosis"] == pytest.approx(expected["avg_kurtosis"], rel=1e-5)
    assert found.outliers["max_kurtosis"] == pytest.approx(expected["max_kurtosis"], rel=1e-5)
    norms = {key: expected[key] for key in expected if key.startswith("max_")}
    norms.pop("max_kurtosis")
    assert found.outliers["max_inf_norm"] == pytest.approx(max(norms.values()), rel=1e-5)
    for layer in range(config.model.num_layers):
        ours, theirs = f"layer_{layer}", f"bert.encoder.layer.{layer}.output"
        for site, original in {
            "ffn_out/output": "dense",
            "ffn_layer_norm/output": "LayerNorm",
            "ffn_residual": "LayerNorm.input",
        }.items():
            assert found.sites[f"{ours}/{site}:inf_norm"] == pytest.approx(
                expected[f"{theirs}.{original}"], rel=1e-5
            )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_config(folder), str(folder / "run"))
    return load_run(str(folder / "run"))


def evaluator_of(run) -> Evaluator:
    return Evaluator(run, make_task(run.config, run.assets))


def random_arrays(config, count: int = 7) -> dict:
    rng = np.random.default_rng(1)
    ids = rng.integers(5, config.model.vocab_size, (count, config.data.seq_len), dtype=np.int32)
    labels = np.where(rng.random(ids.shape) < 0.15, ids, np.int32(-100))
    labels[0] = -100  # a sequence without any label
    return {"input_ids": ids, "labels": labels}


def test_token_perplexity_is_independent_of_batches_and_padding(trained):
    arrays = random_arrays(trained.config)
    step = make_eval_step(trained.model, BertConfig.outlier_sites)
    whole = evaluate(step, trained.params, metric=PERPLEXITY, batches=batches_of(arrays, 7))
    split = evaluate(
        step, trained.params, metric=PERPLEXITY, batches=batches_of(arrays, 3, padded=True)
    )
    assert split.value == pytest.approx(whole.value, rel=1e-6)
    assert split.outliers == pytest.approx(whole.outliers, rel=1e-5)


def test_kurtosis_batches_limits_the_kurtosis_alone(trained):
    arrays = random_arrays(trained.config)
    step = make_eval_step(trained.model, BertConfig.outlier_sites)
    first = evaluate(step, trained.params, metric=PERPLEXITY, batches=batches_of(arrays, 3)[:1])
    limited = evaluate(
        step, trained.params, metric=PERPLEXITY, batches=batches_of(arrays, 3), kurtosis_batches=1
    )
    everything = evaluate(step, trained.params, metric=PERPLEXITY, batches=batches_of(arrays, 3))
    assert limited.outliers["avg_kurtosis"] == pytest.approx(first.outliers["avg_kurtosis"])
    assert limited.outliers["max_inf_norm"] == everything.outliers["max_inf_norm"]


def test_no_batch_or_label_is_an_error(trained):
    step = make_eval_step(trained.model)
    with pytest.raises(UserError, match="at least one batch"):
        evaluate(step, trained.params, metric=PERPLEXITY, batches=[])
    unlabelled = {"input_ids": np.ones((2, 16), np.int32), "labels": np.full((2, 16), -100)}
    with pytest.raises(UserError, match="with a label"):
        evaluate(step, trained.params, metric=PERPLEXITY, batches=[unlabelled])


def test_statistics_leave_the_step_as_scalars_only(trained):
    step = make_eval_step(trained.model, BertConfig.outlier_sites)
    batch = {key: jnp.asarray(value) for key, value in random_arrays(trained.config).items()}
    shapes = jax.eval_shape(step, trained.params, {}, batch)
    assert {leaf.shape for leaf in jax.tree.leaves(shapes)} == {()}


def test_row_of_a_run(trained):
    evaluator = evaluator_of(trained)
    row = result_row("run", trained.config, evaluator, ["w8a8", "w2a4"], 2, trained.info)
    assert set(row) == {
        "name", "model", "attention", "beside_attention", "metric", "fp", "fp_loss", "max_inf_norm",
        "avg_kurtosis",
        "w8a8", "w8a8_std", "w8a8_loss", "w8a8_loss_std",
        "w2a4", "w2a4_std", "w2a4_loss", "w2a4_loss_std", "steps", "seconds",
    }  # fmt: skip
    assert row["steps"] == 80
    assert row["seconds"] > 0
    assert abs(row["w8a8"] / row["fp"] - 1) < 0.02  # 8 bits cost this model next to nothing
    assert row["w2a4"] > 1.005 * row["fp"]
    # Of each seed value = exp(loss), so that means differ by no more than the deviation.
    assert np.exp(row["w2a4_loss"]) == pytest.approx(row["w2a4"], abs=row["w2a4_std"])
    assert row["w2a4_loss_std"] == pytest.approx(row["w2a4_std"] / row["w2a4"], rel=0.05)


def test_calibration_seeds_see_different_batches(trained):
    evaluator = evaluator_of(trained)
    first, second = evaluator.quantized(parse_setting("w4a4"), 2)
    assert first != second
    assert evaluator.quantized(parse_setting("w4a4"), 1) == [first]


@pytest.mark.parametrize(
    ("setting", "backend"), [("w8a8", "simulated"), ("w8a8+smooth=0.5", "int8")]
)
def test_a_setting_is_compiled_once_whatever_the_seeds(trained, setting, backend):
    """Calibration, SmoothQuant, the collection of codes and the evaluation."""
    evaluator = evaluator_of(trained)
    with compiled.counted() as programs:
        evaluator.quantized(parse_setting(setting), 1, backend)
        assert programs
        programs.clear()
        evaluator.quantized(parse_setting(setting), 2, backend)
        assert not programs


class Seeded:
    """An evaluator that finds given values, one for each seed."""

    metric = PERPLEXITY
    fp = Metrics(1.0, 0.5, 2.0, {"max_inf_norm": 1.0, "avg_kurtosis": 3.0}, {})

    def __init__(self, *values: float):
        self.values = list(values)

    def measured(self, setting, seeds, backend):
        return [dataclasses.replace(self.fp, value=value) for value in self.values]


@pytest.mark.parametrize(
    ("values", "seeds", "deviation", "shown"),
    [
        ([4.0, 5.0, 6.0], 3, 1.0, "5.000 ± 1.000"),
        ([4.0, 6.0], 2, 2**0.5, "5.000 ± 1.414"),
        ([5.0], 3, 0.0, "5.000 ± 0.00"),  # looks at no data: the same for every seed
        ([5.0], 1, None, "5.000"),  # one seed tells of no deviation
        ([np.inf, np.inf], 2, None, "inf"),
    ],
)
def test_deviation_is_that_of_a_sample(values, seeds, deviation, shown, tmp_path):
    info = {"step": 1, "train_seconds": 1.0}
    row = result_row("run", default_config(), Seeded(*values), ["w8a8"], seeds, info)
    tables.write_json([row], str(tmp_path / "row.json"))
    (written,) = json.loads((tmp_path / "row.json").read_text())
    assert written["w8a8_std"] == (deviation if deviation is None else pytest.approx(deviation))
    show = dict(tables.columns([row], ["w8a8"]))["W8A8 ppl"]
    assert show(row) == shown


def test_16_bits_cost_next_to_nothing(trained):
    evaluator = evaluator_of(trained)
    costs = {
        bits: abs(evaluator.quantized(parse_setting(bits), 1)[0] / evaluator.fp.value - 1)
        for bits in ("w4a4", "w16a16")
    }
    # A step of 16 bits is 4096 times finer; single errors shrink so, their sum over a model may
    # cancel in either. Found: 2.4e-6 and 2.6e-6; of 4 bits once 2.1e-4, mostly above 1e-3.
    assert costs["w16a16"] < costs["w4a4"] / 10
    assert costs["w16a16"] < 1e-5


def test_config_of_a_run_builds_the_same_model(trained):
    assert build_model(trained.config) == trained.model


def test_other_sequence_length_keeps_the_trained_gamma(tmp_path):
    config = tiny_config(
        tmp_path, train__steps=5, model__attention__softmax="clipped", model__attention__alpha=1.0
    )
    train(config, str(tmp_path / "run"))
    run = load_run(str(tmp_path / "run"))
    override_run(run, ["--config.data.seq_len=8"])
    evaluator = evaluator_of(run)
    assert evaluator.model.config.softmax.gamma == -1.0 / 16


def test_model_keys_cannot_be_overridden(trained):
    with pytest.raises(UserError, match=r"config.model.num_layers cannot be changed"):
        override_run(trained, ["--config.model.num_layers=2"])


def test_bfloat16_runs_are_evaluated_in_float32(trained):
    narrow = with_config(trained.model, dtype=jnp.bfloat16)
    evaluator = evaluator_of(trained._replace(model=narrow))
    whole = evaluator_of(trained)
    assert evaluator.fp.value == whole.fp.value


def test_rows_of_like_named_runs_are_told_apart(trained):
    runs = {"a/clipped": trained, "b/clipped": trained, "c/gated": trained}
    assert row_names(runs) == ["a/clipped", "b/clipped", "gated"]


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_what_a_recipe_has_beside_attention_is_told(family):
    config = default_config(family)
    assert beside_attention(config) == ""
    config.optimizer.name = "muon"
    config.model.norm = "rms_norm_single"
    assert beside_attention(config) == "RMSNorm of one scale + Muon"
    config.optimizer.name, config.penalty.weight = "adamw", 0.01
    assert beside_attention(config) == "RMSNorm of one scale + loss on large activations"
