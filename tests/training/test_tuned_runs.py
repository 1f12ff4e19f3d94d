"""Whole runs of the tuning recipe: going on, what they log and keep, and what they refuse."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.errors import UserError
from quantizable_flax.training.loop import train
from tests.tiny import tiny_config
from tests.training.test_loop import lines
from tests.training.test_resume import assert_bitwise_equal, saved
from tests.training.tuning_case import RECIPE, recipe


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """(data, workdir of an uninterrupted run of 8 steps with dropout and padding)."""
    folder = tmp_path_factory.mktemp("whole")
    model, data = models("BertForSequenceClassification")
    train(recipe(model, data, folder, model__hidden_dropout=0.1), str(folder / "run"))
    return model, data, folder / "run"


def test_stopped_run_continues_bitwise(whole, tmp_path):
    model, data, workdir = whole
    changes = {"model__hidden_dropout": 0.1, "optimizer__decay_steps": 8}
    first = recipe(model, data, tmp_path, **changes, train__steps=4)
    train(first, str(tmp_path / "run"))
    train(recipe(model, data, tmp_path, **changes), str(tmp_path / "run"))
    assert_bitwise_equal(saved(tmp_path / "run", 8), saved(workdir, 8))


def test_a_run_keeps_its_teacher_wherever_that_lies(whole, tmp_path):
    model, data, workdir = whole
    shutil.copytree(workdir, tmp_path / "run")
    for name in ("moved", "other"):
        shutil.copytree(model, tmp_path / name)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 0.5
    save_file(weights, tmp_path / "other" / "model.safetensors")
    changes = {"model__hidden_dropout": 0.1, "train__steps": 9}

    def go_on(teacher):
        train(recipe(str(teacher), data, tmp_path, **changes), str(tmp_path / "run"))

    with pytest.raises(UserError, match=r"holds a run with another teacher than .*/other"):
        go_on(tmp_path / "other")
    with pytest.raises(UserError, match=r"distill\.teacher=.*/run is the workdir itself"):
        go_on(tmp_path / "run")
    assert load_run(str(tmp_path / "run")).info["step"] == 8
    go_on(tmp_path / "moved")
    assert load_run(str(tmp_path / "run")).info["step"] == 9


def test_a_run_logs_its_parts_and_its_fidelity(whole):
    _, _, workdir = whole
    training, validation, telemetry = (
        [row for row in lines(workdir) if row["group"] == group]
        for group in ("train", "validation", "telemetry")
    )
    assert {"loss", "hidden", "pooled", "logits", "penalty", "grad_norm"} <= training[-1].keys()
    last = validation[-1]
    assert last["fidelity"] == pytest.approx(1 - last["pooled"])
    assert last["loss"] == pytest.approx(last["hidden"] + last["layers"] + last["logits"])
    assert telemetry[-1]["layer_0/ffn_residual:inf_norm"] > 0


def test_a_run_keeps_what_its_model_came_with(whole):
    model, _, workdir = whole
    run = load_run(str(workdir))
    assert run.assets["tokenizer"]
    assert run.config.distill.teacher == model
    assert run.model.config.head == "classifier"


def test_a_run_of_ours_is_tuned_with_its_own_data(tmp_path):
    train(tiny_config(tmp_path, "vit", train__steps=4), str(tmp_path / "first"))
    config = recipe(str(tmp_path / "first"), None, tmp_path)
    assert config.data.label_key == "label"
    assert config.data.augment.rand_layers == 2
    train(config, str(tmp_path / "run"))
    assert load_run(str(tmp_path / "run")).assets["classes"] == list("0123456789")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty__sites": "layer_0/fn_residual"}, "matches none of .* layer_0/ffn_resid"),
        ({"penalty__sites": "("}, "must be a regular expression"),
        ({"penalty__scale": 0.0}, "penalty.scale must be above 0"),
        ({"penalty__power": 0}, "penalty.power must be at least 1"),
        ({"penalty__weight": -1.0}, "penalty.weight must be a number that is not negative"),
        ({"distill__hidden": -1.0}, "distill.hidden must not be negative"),
        (
            {"distill__hidden": 0.0, "distill__layers": 0.0, "penalty__weight": 0.0},
            "needs a loss",
        ),
        ({"distill__teacher": "/nowhere"}, "distill.teacher=/nowhere: /nowhere does not exist"),
        ({"distill__teacher": None}, "has no loss of its own, found distill.teacher=None"),
        ({"init_from": "/nowhere"}, "init_from=/nowhere: /nowhere does not exist"),
        ({"model__hidden_size": 32}, "hidden_size=16 where the one that is trained has 32"),
        ({"optimizer__frozen": "embedding/.*"}, "matches none of the .* parameters"),
    ],
)
def test_mistakes_are_one_sentence(models, tmp_path, changes, message):
    # An encoder: the weight of its logits is not asked for.
    changes = {"distill__logits": 0.0} | changes
    with pytest.raises(UserError, match=message) as caught:
        train(recipe(*models("BertModel"), tmp_path, **changes), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_tuned_are_one_sentence(models, tmp_path):
    with pytest.raises(UserError, match="takes a finished model, found none"):
        RECIPE.get_config("plain")
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        RECIPE.get_config(f"plain,{tmp_path}")
    with pytest.raises(UserError, match="did you mean 'gated'"):
        RECIPE.get_config(f"gate,{models('BertModel')[0]}")
    keys = {"quant__train": True, "quant__train_ranges": "learned", "train__steps": 2}
    train(tiny_config(tmp_path, **keys), str(tmp_path / "learned"))
    with pytest.raises(UserError, match="learned grids"):
        RECIPE.get_config(f"plain,{tmp_path / 'learned'}")
    train(tiny_config(tmp_path, train__steps=2), str(tmp_path / "int8"))
    info = tmp_path / "int8" / "checkpoints" / "2" / "info" / "metadata"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"quant": {}}))  # as the export does
    with pytest.raises(UserError, match="exported INT8 model"):
        RECIPE.get_config(f"plain,{tmp_path / 'int8'}")
    config = recipe(*models("BertModel"), tmp_path, distill__teacher=str(tmp_path / "learned"))
    with pytest.raises(UserError, match="a teacher computes in floating point"):
        train(config, str(tmp_path / "run"))
