"""Steps of self-distillation: their loss, micro-batches, frozen parameters, and what they win."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.aot.compile import lower
from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.data.tasks import make_task
from quantizable_flax.errors import UserError
from quantizable_flax.ptq.trained import model_to_train
from quantizable_flax.quantization.sites import STATS
from quantizable_flax.runtime.mesh import make_mesh, put_batch
from quantizable_flax.training import initial, qat
from quantizable_flax.training.distillation import make_objective
from quantizable_flax.training.loop import train
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import init_state, make_train_step
from quantizable_flax.training.teacher import load_teacher
from tests.tiny import tiny_config
from tests.training.test_loop import lines
from tests.training.test_resume import assert_bitwise_equal, saved
from tests.training.tunable import model_folder, plant_outlier

RECIPE = importlib.import_module("configs.tune")
SHORT = {
    "data__validation_fraction": 0.2,
    "eval__batch_size": 4,
    "train__batch_size": 8,
    "train__steps": 8,
    "train__log_every": 4,
    "train__eval_every": 4,
    "train__telemetry_every": 4,
    "optimizer__warmup_steps": 0,
    "checkpoint__every": 4,
    "quant__calibration_batches": 2,
    "quant__calibration_batch_size": 4,
}


def recipe(model: str, data: str, tmp_path, variant: str = "plain", **changes):
    """The recipe for a model, shortened; changes are written with `__` for a dot."""
    config = RECIPE.get_config(f"{variant},{model}")
    config.data.files = data
    if "cache_dir" in config.data:
        config.data.cache_dir = str(tmp_path / "cache")
    for path, value in (SHORT | changes).items():
        *groups, key = path.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[key] = value
    return config


class Case:
    """A run of the recipe before its first step."""

    def __init__(self, config, devices=None):
        self.config, self.mesh = config, make_mesh(config.mesh, devices)
        self.model = model_to_train(config)
        optimizer = make_optimizer(config, config.train.steps)
        teacher = load_teacher(config, self.model, self.mesh)
        self.objective = make_objective(config, self.model, teacher)
        self.state = init_state(self.model, optimizer, self.model.example_batch(), 0, self.mesh)
        self.state, assets = initial.start_from(config, self.state)
        if config.quant.train:
            task = make_task(config, initial.for_data(config, assets))
            self.state = qat.calibrated(config, self.model, task, self.state)
        self._step = make_train_step(
            self.model, optimizer, config, self.mesh, self.state, self.objective
        )

    def batch(self, seed: int = 0) -> dict:
        rng, rows = np.random.default_rng(seed), self.config.train.batch_size
        if self.config.model.name == "vit":
            return {"images": rng.integers(0, 256, (rows, 8, 8, 3)).astype(np.uint8)}
        length = self.config.data.seq_len
        ids = rng.integers(5, self.config.model.vocab_size, (rows, length)).astype(np.int32)
        if self.config.model.name == "opt":
            return {"input_ids": ids, "labels": ids}
        shown = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
        return {"input_ids": ids, "attention_mask": shown.astype(np.int32)}

    def step(self, seed: int = 0) -> dict[str, float]:
        given = self.objective.given
        self.state, metrics = self._step(self.state, put_batch(self.batch(seed), self.mesh), *given)
        return {name: float(value) for name, value in metrics.items()}

    def program(self) -> str:
        batch = put_batch(self.batch(), self.mesh)
        return self._step.lower(self.state, batch, *self.objective.given).as_text()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Published folders and their data, made when they are asked for."""
    known: dict = {}

    def get(name: str) -> tuple[str, str]:
        if name not in known:
            known[name] = model_folder(tmp_path_factory.mktemp(name) / "model", name)
        return known[name]

    return get


ALL = {"distill__pooled": 1.0, "distill__logits_positions": 3}


@pytest.mark.parametrize("name", ["BertModel", "OPTForCausalLM", "ViTForImageClassification"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(models, name, tmp_path):
    case = Case(recipe(*models(name), tmp_path, **ALL, distill__outliers=0.0))
    metrics = case.step()
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["grad_norm"] == pytest.approx(0.0, abs=1e-5)
    assert ("logits" in metrics) == (name != "BertModel")
    assert "outliers" not in metrics


@pytest.mark.parametrize(
    "name",
    [
        "BertModel",
        "OPTForCausalLM",
        pytest.param("ViTForImageClassification", marks=pytest.mark.slow),
    ],
)
def test_micro_batches_add_up_to_the_batch(models, name, tmp_path):
    weights = {**ALL, "distill__outliers": 1.0}
    steps = {}
    for parts in (1, 4):
        config = recipe(*models(name), tmp_path, **weights, train__grad_accum_steps=parts)
        case = Case(config, jax.devices()[:1])
        steps[parts] = [case.step(seed) for seed in range(3)]
    # Sums in another order, which Adam's division amplifies in the steps behind the first.
    for whole, split in zip(*steps.values(), strict=True):
        assert split == pytest.approx(whole, rel=2e-3, abs=1e-6)
    assert steps[4][0] == pytest.approx(steps[1][0], rel=1e-4, abs=1e-7)


def test_two_devices_tune_as_one(models, tmp_path):
    curves = []
    for mesh in ({"mesh__data": 1}, {"mesh__data": 2}, {"mesh__data": 1, "mesh__fsdp": 2}):
        devices = jax.devices()[: 1 if mesh == {"mesh__data": 1} else 2]
        case = Case(recipe(*models("BertModel"), tmp_path, **ALL, **mesh), devices)
        curves.append([case.step(seed)["loss"] for seed in range(3)])
    # Sums in another order, which Adam's division amplifies in the steps behind the first.
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-3)
    np.testing.assert_allclose(curves[2], curves[0], rtol=2e-3)


def test_a_student_in_bfloat16_that_keeps_nothing_for_its_gradient(models, tmp_path):
    changes = {"model__dtype": "bfloat16", "train__remat": "full", "distill__outliers": 1.0}
    case = Case(recipe(*models("OPTForCausalLM"), tmp_path, **ALL, **changes))
    exact = Case(recipe(*models("OPTForCausalLM"), tmp_path, **ALL, distill__outliers=1.0))
    metrics, expected = case.step(), exact.step()
    assert metrics["outliers"] == pytest.approx(expected["outliers"], rel=0.02)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    assert 0 < metrics["hidden"] < 1e-3  # eight bits of precision, beside a variance of 1


def test_the_loss_is_the_weighted_sum_of_its_parts(models, tmp_path):
    weights = {"hidden": 2.0, "pooled": 3.0, "logits": 0.5, "outliers": 0.1}
    changes = {f"distill__{name}": value for name, value in weights.items()}
    case = Case(recipe(*models("OPTForCausalLM"), tmp_path, **changes))
    case.step(0)
    metrics = case.step(1)
    parts = sum(weight * metrics[name] for name, weight in weights.items())
    assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
    assert all(metrics[name] > 0 for name in weights)


def test_what_weighs_nothing_is_not_in_the_program(models, tmp_path):
    # Of all that a step computes, only the cost of outliers takes a magnitude.
    programs = {
        weight: Case(recipe(*models("BertModel"), tmp_path, distill__outliers=weight)).program()
        for weight in (0.0, 0.01)
    }
    assert "stablehlo.abs" not in programs[0.0]
    assert "stablehlo.abs" in programs[0.01]


def test_compiling_ahead_of_time_gives_the_same_program(models, tmp_path):
    config = recipe(*models("BertModel"), tmp_path, **ALL)
    lowered, _ = lower(config, jax.devices())
    assert lowered.as_text() == Case(config).program()


def test_the_teacher_is_an_argument_and_not_saved(models, tmp_path):
    case = Case(recipe(*models("BertModel"), tmp_path))
    before = jax.device_get(case.objective.given)
    assert 'dense<"0x' not in case.program()  # so a constant array of some size is written
    case.step()
    assert_bitwise_equal(jax.device_get(case.objective.given), before)


def test_frozen_parameters_stay_whatever_the_decay(models, tmp_path):
    changes = {"optimizer__frozen": r"embeddings/.*", "optimizer__weight_decay": 0.5}
    case = Case(recipe(*models("BertModel"), tmp_path, **changes, optimizer__learning_rate=1e-2))
    before = jax.device_get(case.state.params)
    for seed in range(3):
        case.step(seed)
    after = jax.device_get(case.state.params)
    assert_bitwise_equal(after["embeddings"], before["embeddings"])
    moved = after["layer_0"]["ffn_out"]["kernel"] - before["layer_0"]["ffn_out"]["kernel"]
    assert np.abs(moved).min() > 0


def inf_norm(case: Case) -> float:
    """Of the residual sums, over one batch."""
    _, found = case.model.apply(
        {"params": case.state.params}, case.batch(99), method="features", mutable=[STATS]
    )
    layer = found[STATS]["layer_0"]
    return float(jnp.max(layer["ffn_residual"]["inf_norm"]))


def test_a_planted_outlier_shrinks_and_the_hidden_states_stay(models, tmp_path):
    path, data = model_folder(tmp_path / "planted", "BertModel")
    plant_outlier(path)
    changes = {"train__steps": 100, "optimizer__learning_rate": 0.1}
    case = Case(recipe(path, data, tmp_path, **changes, optimizer__frozen="embeddings/.*"))
    before = inf_norm(case)
    assert before > 50
    for seed in range(100):
        metrics = case.step(seed)
    # Measured: 62 -> 9.2, and 0.0026 beside states of variance about 1.
    assert inf_norm(case) < before / 4
    assert metrics["hidden"] < 0.01
    without = Case(
        recipe(path, data, tmp_path, **changes | {"distill__outliers": 0.0, "distill__pooled": 0.1})
    )
    for seed in range(3):
        without.step(seed)
    assert inf_norm(without) > 0.9 * before


def test_gates_that_are_added_change_nothing_at_the_start(models, tmp_path):
    case = Case(recipe(*models("BertModel"), tmp_path, "gated", **ALL))
    assert case.step()["hidden"] < 1e-5
    clipped = Case(recipe(*models("BertModel"), tmp_path, "clipped", **ALL))
    assert clipped.step()["hidden"] > 1e-5


def test_a_student_on_its_grids_learns_from_a_teacher_in_floating_point(models, tmp_path):
    config = recipe(*models("BertModel"), tmp_path, quant__train=True, quant__train_setting="w4a4")
    case = Case(config)
    first = case.step()
    assert first["hidden"] > 1e-3  # rounding to four bits is no small thing
    assert case.model.config.quant is not None
    before = jax.device_get(case.state.ranges)
    case.step(1)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, case.state.ranges)
    assert any(jax.tree.leaves(moved))


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


def test_a_run_logs_its_parts_and_its_fidelity(whole):
    _, _, workdir = whole
    training, validation, telemetry = (
        [row for row in lines(workdir) if row["group"] == group]
        for group in ("train", "validation", "telemetry")
    )
    assert {"loss", "hidden", "pooled", "logits", "outliers", "grad_norm"} <= training[-1].keys()
    last = validation[-1]
    assert last["fidelity"] == pytest.approx(1 - last["pooled"])
    assert last["loss"] == pytest.approx(last["hidden"] + last["logits"])
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
        ({"distill__outlier_sites": "layer_0/fn_residual"}, "matches none of .* layer_0/ffn_resid"),
        ({"distill__outlier_sites": "("}, "must be a regular expression"),
        ({"distill__outlier_scale": 0.0}, "outlier_scale must be above 0"),
        ({"distill__outlier_power": 0}, "outlier_power must be at least 1"),
        ({"distill__hidden": -1.0}, "distill.hidden must not be negative"),
        ({"distill__hidden": 0.0, "distill__outliers": 0.0}, "needs a loss"),
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
