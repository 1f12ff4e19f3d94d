"""Fidelity: how near a model stays to a reference, for models without a head or labels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import UserError
from quantizable_flax.checkpoint.load import load_run, override_run
from quantizable_flax.data.text.subword import BERT_TOKENS
from quantizable_flax.evaluation.fidelity import (
    evaluate_fidelity,
    kept_neighbours,
    make_fidelity_step,
)
from quantizable_flax.evaluation.study import make_evaluator
from quantizable_flax.models.features import cosine
from quantizable_flax.ptq.settings import parse_setting
from tests.pretrained import published
from tests.programs import run as run_program

WORDS = [f"w{i}" for i in range(35)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A published encoder with its tokenizer, and texts of its words beside it."""
    path = tmp_path_factory.mktemp("encoder")
    published.saved(path, "BertModel")
    (path / "vocab.txt").write_text("\n".join([*BERT_TOKENS, *WORDS]))
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("validation", 40)):
        texts = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        (path / f"{split}.jsonl").write_text("\n".join(lines))
    return str(path)


def options(folder: str) -> list[str]:
    return [
        f"--config.data.files={folder}/train.jsonl",
        f"--config.data.validation_files={folder}/validation.jsonl",
        f"--config.data.cache_dir={folder}/cache",
        "--config.data.seq_len=12",
        "--config.quant.calibration_batches=2",
        "--config.eval.batch_size=16",
    ]


@pytest.fixture(scope="module")
def run(folder):
    return override_run(load_run(folder), options(folder))


@pytest.fixture(scope="module")
def evaluator(run):
    return make_evaluator(run)


def test_a_model_is_true_to_itself(evaluator):
    found = evaluator.fp
    assert evaluator.metric.name == "fidelity"
    np.testing.assert_allclose(found.value, 1.0, rtol=1e-6)
    assert found.fidelity.hidden_error < 1e-6
    assert found.fidelity.neighbours == 1.0
    assert found.outliers["max_inf_norm"] > 0.0


def test_fewer_bits_cost_more(evaluator):
    (eight,), (four,) = (evaluator.measured(parse_setting(s), 1) for s in ("w8a8", "w4a4"))
    assert 1.0 > eight.value > four.value
    assert 0.0 < eight.fidelity.hidden_error < four.fidelity.hidden_error
    assert eight.fidelity.pooled_error < four.fidelity.pooled_error


def test_figures_are_those_of_the_definition(run, evaluator):
    """Against NumPy in float64, on a model whose parameters are a little off."""
    rng = np.random.default_rng(0)
    other = jax.tree.map(
        lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), run.params
    )
    batches = list(evaluator.batches)
    step = make_fidelity_step(run.model, run.model)
    found = evaluate_fidelity(step, (other, run.params), batches).fidelity
    hidden, pooled = [[], []], [[], []]
    for batch in batches:
        rows = np.asarray(batch["example_weight"], bool)
        visible = np.asarray(batch["attention_mask"], bool)[rows]
        for i, params in enumerate((other, run.params)):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            x = np.asarray(run.model.apply({"params": params}, ids, mask), np.float64)[rows]
            hidden[i].append(x[visible])
            pooled[i] += [
                np.mean(states[shown], 0) for states, shown in zip(x, visible, strict=True)
            ]
    (h, r), (p, q) = [[np.concatenate(x) for x in hidden], [np.array(x) for x in pooled]]
    cosines = np.sum(p * q, 1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1)
    assert len(p) == 40  # fillers count for nothing
    np.testing.assert_allclose(found.cosine, np.mean(cosines), rtol=1e-5)
    expected = np.linalg.norm(h - r) / np.linalg.norm(r)
    np.testing.assert_allclose(found.hidden_error, expected, rtol=1e-5)
    expected = np.linalg.norm(p - q) / np.linalg.norm(q)
    np.testing.assert_allclose(found.pooled_error, expected, rtol=1e-5)
    assert found.neighbours == kept_neighbours(p, q) < 1.0


def test_neighbours_are_counted():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 8))
    assert kept_neighbours(x, 3.0 * x) == 1.0  # lengths say nothing
    assert kept_neighbours(x[:8], rng.normal(size=(8, 8))) == 1.0  # all 7 others are near
    assert kept_neighbours(x, rng.normal(size=(30, 8))) < 0.6  # by chance 10 of 29
    assert np.isnan(kept_neighbours(x[:1], x[:1]))


def test_cosines_of_nothing_are_zero():
    x = jnp.asarray([[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(cosine(x, jnp.ones_like(x)), [np.sqrt(0.5), 0.0], rtol=1e-6)


def test_the_reference_may_be_another_model(run, folder):
    config = run.config.copy_and_resolve_references()
    config.eval.reference = folder
    moved = jax.tree.map(lambda x: 0.9 * x, run.params)
    found = make_evaluator(run._replace(config=config, params=moved)).fp
    assert found.fidelity.hidden_error > 0.0
    assert found.value < 1.0


def test_a_reference_of_another_width_is_refused(run, tmp_path):
    config = run.config.copy_and_resolve_references()
    narrow = published.config_json("BertModel") | {"hidden_size": 8}
    tensors = {}
    for name, tensor in published.weights("BertModel").items():
        index = tuple(slice(8) if size == 16 else slice(None) for size in tensor.shape)
        tensors[name] = np.ascontiguousarray(tensor[index])
    config.eval.reference = published.write(tmp_path, narrow, tensors)
    with pytest.raises(UserError, match="must have the model's width, found 8 and 16"):
        make_evaluator(run._replace(config=config)).fp  # noqa: B018


def test_a_reference_must_read_what_the_model_reads(run, tmp_path):
    config = run.config.copy_and_resolve_references()
    config.eval.reference = published.saved(tmp_path / "vit", "ViTModel")
    with pytest.raises(UserError, match="reads images, this model masked text"):
        make_evaluator(run._replace(config=config))
    config.eval.reference = published.saved(tmp_path / "other", "BertModel")
    (tmp_path / "other" / "vocab.txt").write_text("\n".join([*BERT_TOKENS, *reversed(WORDS)]))
    with pytest.raises(UserError, match="has another tokenizer than this model"):
        make_evaluator(run._replace(config=config))


def test_a_reference_that_is_nowhere_is_named(run):
    config = run.config.copy_and_resolve_references()
    config.eval.reference = "/nowhere"
    with pytest.raises(UserError, match="/nowhere does not exist"):
        make_evaluator(run._replace(config=config))


def test_sites_are_ranked_by_the_cosine_that_they_cost(evaluator):
    costs = evaluator.sensitivity(parse_setting("w4a4"))
    assert costs[0].increase > costs[-1].increase >= -1e-6
    assert costs[0].increase < 1.0
    assert {"layer_0/ffn_residual", "layer_1/ffn_out/output"} <= {cost.site for cost in costs}


def test_another_metric_is_named(run):
    config = run.config.copy_and_resolve_references()
    config.eval.metric = "perplexity"
    with pytest.raises(UserError, match=r"eval\.metric must be one of auto, fidelity"):
        make_evaluator(run._replace(config=config))


def test_the_command_line_takes_a_folder(folder, tmp_path):
    json_file = tmp_path / "rows.json"
    arguments = [f"--workdir={folder}", "--quant=w8a8,w4a4", "--calibration_seeds=1"]
    report = tmp_path / "report.html"
    result = run_program(
        "eval.py", *arguments, *options(folder), f"--json={json_file}", f"--report={report}"
    )
    assert result.returncode == 0, result.stderr
    assert "W8A8 neighbours %" in result.stdout
    (row,) = json.loads(json_file.read_text())
    assert row["metric"] == "fidelity"
    assert 0.999 < row["fp"] <= 1.0 + 1e-6
    assert row["fp"] > row["w8a8"] > row["w4a4"]
    assert 0.0 <= row["w4a4_neighbours"] <= row["w8a8_neighbours"] <= 1.0
    assert "cosine" in report.read_text()


def test_what_a_published_model_was_trained_with_may_be_said(folder):
    run = load_run(folder)
    clipped = ["--config.model.attention.softmax=clipped", "--config.model.attention.gamma=-0.1"]
    assert override_run(run, clipped).model.config.softmax.gamma == -0.1
    with pytest.raises(UserError, match="cannot be changed: the model is trained already"):
        override_run(run, ["--config.model.num_layers=1"])
