"""Quantization-aware training: what it wins, what it saves, and what it refuses."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

import quantizable_flax as qf
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.data.pipeline import eval_batches
from quantizable_flax.data.tasks import make_task
from quantizable_flax.errors import UserError
from quantizable_flax.evaluation.step import evaluate, make_eval_step
from quantizable_flax.models.build import with_quant
from quantizable_flax.ptq.calibrate import calibrate, with_weight_ranges
from quantizable_flax.ptq.trained import trained_spec
from quantizable_flax.training.loop import train
from tests.tiny import tiny_config
from tests.training.test_resume import assert_bitwise_equal, saved

DIGITS = {
    "model__patch_size": 2,
    "model__label_smoothing": 0.0,
    "model__mixup_alpha": 0.0,
    "model__cutmix_alpha": 0.0,
    "data__augment__crop_scale": 1.0,
    "data__augment__pad_crop": 0,
    "data__augment__flip": False,
    "data__augment__rand_layers": 0,
    "data__augment__color_jitter": 0.0,
    "data__validation_fraction": 0.3,
    "train__batch_size": 32,
    "train__eval_batches": 0,
    "checkpoint__every": 20,
}
SHORT = {
    **DIGITS,
    "optimizer__learning_rate": 1e-3,
    "optimizer__decay_steps": 40,
    "train__steps": 40,
    "train__eval_every": 40,
    "train__telemetry_every": 40,
}
MODES = {
    "running": {"quant__train_ranges": "running"},
    "learned": {"quant__train_ranges": "learned", "quant__range_learning_rate": 3e-4},
}


def lines(workdir, group: str) -> list[dict]:
    text = (workdir / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["group"] == group]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `float`, a finished run in floating point."""
    path = tmp_path_factory.mktemp("qat")
    changes = {**DIGITS, "train__steps": 300, "optimizer__learning_rate": 1e-2}
    train(tiny_config(path, "vit", **changes, train__eval_every=300), str(path / "float"))
    return path


def trained_config(folder, mode: str, **changes):
    start = {
        "init_from": str(folder / "float"),
        "quant__train": True,
        "quant__train_setting": "w4a4",
    }
    return tiny_config(folder, "vit", **{**SHORT, **start, **MODES[mode], **changes})


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def run(folder, mode):
    """The workdir of 40 steps in W4A4."""
    train(trained_config(folder, mode), str(folder / mode))
    return folder / mode


def validation_loss(model, params, ranges, config) -> float:
    task = make_task(config)
    batches = eval_batches(task, batch_size=config.eval.batch_size)
    step = make_eval_step(model)
    return evaluate(step, params, batches, ranges, metric=model.metric).loss


@pytest.fixture(scope="module")
def after_training(folder):
    """Validation loss of the float run after calibration at the same bits."""
    float_run, config = load_run(str(folder / "float")), trained_config(folder, "running")
    model = with_quant(float_run.model, trained_spec(config))
    batches = eval_batches(
        make_task(config), split="train", batch_size=8, num_batches=2, seed=0, full=True
    )
    ranges = calibrate(model, float_run.params, batches)
    return validation_loss(model, float_run.params, ranges, config)


def test_training_wins_back_most_of_what_rounding_costs(folder, run, after_training):
    exact = lines(folder / "float", "validation")[-1]["loss"]
    trained = lines(run, "validation")[-1]["loss"]
    assert after_training > exact + 0.15
    assert trained < exact + 0.6 * (after_training - exact)


def test_loaded_run_is_what_validation_saw(folder, run, mode):
    loaded, config = load_run(str(run)), trained_config(folder, mode)
    model = with_quant(loaded.model, trained_spec(config))
    loss = validation_loss(model, loaded.params, loaded.ranges, config)
    assert loss == pytest.approx(lines(run, "validation")[-1]["loss"], rel=1e-5)
    assert (loaded.ranges is not None) == (mode == "running")
    public, _ = qf.load(str(run))
    assert (public.config.quant is not None) == (mode == "learned")
    assert len(lines(run, "telemetry")) == 1


def test_ranges_move_and_those_of_weights_are_of_the_saved_weights(folder, run, mode):
    loaded = load_run(str(run))
    if mode == "learned":
        grid = loaded.params["layer_0"]["ffn_in"]["output"]["grid"]
        assert 0.0 < grid["zero"] < 15.0
        assert grid["zero"] != np.round(grid["zero"])
        assert not (run / "checkpoints" / "40" / "ranges").exists()
        return
    model = with_quant(loaded.model, trained_spec(loaded.config))
    refresh = jax.jit(functools.partial(with_weight_ranges, model))
    fresh = refresh(loaded.params, loaded.ranges)
    assert_bitwise_equal(fresh, loaded.ranges)
    assert loaded.ranges["layer_0"]["ffn_in"]["output"]["range"].batches == 2 + 40


def everything(workdir, step: int) -> dict:
    return {**saved(workdir, step), "ranges": load_run(f"{workdir}/checkpoints/{step}").ranges}


def test_stopped_run_continues_bitwise_and_ignores_init_from(folder, run, mode, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")  # as though it had been killed
    train(trained_config(folder, mode, init_from="/nowhere"), str(tmp_path / "run"))
    assert_bitwise_equal(everything(tmp_path / "run", 40), everything(run, 40))


def test_neither_kind_of_run_continues_as_the_other(folder, run, mode):
    ordinary = tiny_config(folder, "vit", **SHORT)
    with pytest.raises(UserError, match=r"quant.train=true, not false"):
        train(ordinary, str(run))
    with pytest.raises(UserError, match=r"quant.train=false, not true"):
        train(trained_config(folder, mode), str(folder / "float"))
    with pytest.raises(UserError, match=r'quant.train_setting="w4a4", not "w8a8"'):
        train(trained_config(folder, mode, quant__train_setting="w8a8"), str(run))


def test_ordinary_checkpoint_has_no_ranges(folder):
    items = {path.name for path in (folder / "float" / "checkpoints" / "300").iterdir()}
    assert "ranges" not in items
    assert load_run(str(folder / "float")).ranges is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "/nowhere"}, "init_from=/nowhere: /nowhere does not exist"),
        ({"model__hidden_size": 32}, "model.hidden_size=16, not 32"),
        ({"model__num_heads": 4}, "model.num_heads=2, not 4"),
        (
            {"model__attention__gate": "linear"},
            r"no parameter layer_0/attention/gate/bias .*gate_finetune",
        ),
    ],
)
def test_init_from_of_another_model_is_one_sentence(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(trained_config(folder, "running", **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_gates_are_added_to_a_finished_model(folder, tmp_path):
    gates = {
        "model__attention__gate": "linear",
        "model__attention__gate_finetune": True,
        "model__attention__gate_init_std": 1e-3,
        "optimizer__learning_rate": 0.0,
    }
    source = folder / "float" / "checkpoints" / "300"  # the folder of a step is fine too
    keys = {**SHORT, **gates, "train__steps": 1, "train__eval_every": 1, "init_from": str(source)}
    train(tiny_config(folder, "vit", **keys), str(tmp_path / "gated"))
    loss, exact = (
        lines(path, "validation")[-1]["loss"] for path in (tmp_path / "gated", folder / "float")
    )
    assert loss == pytest.approx(exact, rel=0.01)
    without = {**SHORT, "init_from": str(tmp_path / "gated")}
    with pytest.raises(UserError, match=r"has a parameter layer_0/attention/gate/bias that this"):
        train(tiny_config(folder, "vit", **without), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant__train_ranges": "runing"}, "did you mean 'running'"),
        ({"quant__activation_estimator": "mse"}, "needs quant.activation_estimator=minmax"),
        ({"quant__range_learning_rate": 0.1}, "is of quant.train_ranges=learned"),
        ({"quant__train_setting": "8"}, "must read like w8a8"),
        ({"quant__calibration_batches": 10000}, "quant.calibration_batches"),
    ],
)
def test_impossible_settings_are_one_sentence(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(trained_config(folder, "running", **changes), str(tmp_path / "run"))
