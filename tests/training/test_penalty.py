"""The term on large activations beside the loss on labels: its value, its gradient, its absence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from quantizable_flax import UserError
from quantizable_flax.models.build import build_model
from quantizable_flax.models.losses import count_labels
from quantizable_flax.quantization.penalty import Asked
from quantizable_flax.quantization.sites import SHOWN
from quantizable_flax.runtime.mesh import make_mesh, put_batch
from quantizable_flax.training.distillation import make_objective
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import init_state, make_train_step
from tests.small import small_batch, small_model
from tests.tiny import tiny_config
from tests.training.test_step import NO_DROPOUT, random_batch

WEIGHT, SCALE, POWER = 0.3, 0.02, 3
ON = {
    "penalty__weight": WEIGHT,
    "penalty__scale": SCALE,
    "penalty__power": POWER,
    "penalty__sites": r"layer_\d+/ffn_residual|layer_0/attention/scores",
}
SITES = ("layer_0/ffn_residual", "layer_0/attention/scores")
FAMILIES = ("bert", "opt", "vit")


def config_of(tmp_path, family: str, **changes):
    mixing = {"model__mixup_alpha": 0.0, "model__cutmix_alpha": 0.0} if family == "vit" else {}
    return tiny_config(tmp_path, family, **NO_DROPOUT, **mixing, **changes)


class Case:
    """A run on labels before its first step, with batches whose examples have unlike labels."""

    def __init__(self, config, devices=None):
        self.config, self.mesh = config, make_mesh(config.mesh, devices)
        self.model = build_model(config)
        self.optimizer = make_optimizer(config, 80)
        self.objective = make_objective(config, self.model, None)
        self.state = init_state(
            self.model, self.optimizer, self.model.example_batch(), 0, self.mesh
        )
        self.step = make_train_step(
            self.model, self.optimizer, config, self.mesh, self.state, self.objective
        )
        self.host_batch = random_batch(config, np.random.default_rng(0))
        self.batch = put_batch(self.host_batch, self.mesh)

    def metrics(self) -> dict[str, float]:
        state = jax.tree.map(jnp.copy, self.state)
        return {name: float(value) for name, value in self.step(state, self.batch)[1].items()}


def activations(model, params, batch) -> list:
    asked = {(*site.split("/"), "asked"): Asked() for site in SITES}
    variables = {"params": params, SHOWN: traverse_util.unflatten_dict(asked)}
    _, found = model.apply(variables, batch, train=True, method="loss", mutable=[SHOWN])
    return jax.tree.leaves(found[SHOWN])


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(x, marks=pytest.mark.slow) for x in ("opt", "vit"))]
)
def test_value_and_gradient_are_those_of_the_whole_batch(tmp_path, family, parts):
    """Micro-batches of unlike numbers of labels weigh their activations alike."""
    case = Case(config_of(tmp_path, family, **ON, train__grad_accum_steps=parts))
    params, batch = case.state.params, case.host_batch
    shown = [np.asarray(x, np.float64) for x in activations(case.model, params, batch)]
    expected = np.mean([np.mean((np.abs(x) / SCALE) ** POWER) for x in shown])

    def loss(params):
        scores = case.model.apply({"params": params}, batch, train=True, method="loss")
        shown = activations(case.model, params, batch)
        costs = [jnp.mean((jnp.abs(x) / SCALE) ** POWER) for x in shown]
        nats = scores.total / jnp.sum(scores.weight)
        return nats + WEIGHT * sum(costs) / len(costs), nats

    grads, nats = jax.jit(jax.grad(loss, has_aux=True))(params)
    found = case.metrics()
    assert found["penalty"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(float(nats), rel=1e-5)  # the penalty is told apart
    assert found["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    without = Case(config_of(tmp_path, family)).metrics()
    assert "penalty" not in without
    assert without["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert abs(without["grad_norm"] / found["grad_norm"] - 1) > 1e-2


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("bert", {}),
        ("bert", {"max_predictions": 4}),
        ("bert", {"head": "classifier", "num_classes": 3}),
        ("opt", {}),
        ("vit", {}),
    ],
)
def test_labels_are_counted_as_the_models_weigh_them(family, model):
    built, params = small_model(family, **model)
    batch = small_batch(family)
    if "head" in model:
        batch["labels"] = jnp.arange(3)
    elif family != "vit":
        batch["labels"] = batch["labels"].at[1, :7].set(-100)
    scores = built.apply({"params": params}, batch, method="loss")
    assert count_labels(batch["labels"], causal=built.config.causal) == jnp.sum(scores.weight)


def test_a_weight_of_0_leaves_nothing_in_the_program(tmp_path):
    def program(**changes):
        case = Case(config_of(tmp_path, "bert", **changes))
        return case.step.lower(case.state, case.batch).as_text()

    off = program()
    assert off == program(**ON | {"penalty__weight": 0.0})
    # One magnitude at each of the two sites, and those of the gradient where the power is odd.
    assert program(**ON).count("stablehlo.abs") >= off.count("stablehlo.abs") + len(SITES)


def test_a_mesh_and_rematerialisation_change_nothing(tmp_path):
    one = Case(config_of(tmp_path, "opt", **ON), jax.devices()[:1]).metrics()
    changes = {"mesh__data": 1, "mesh__fsdp": 2, "train__remat": "full"}
    two = Case(config_of(tmp_path, "opt", **ON, **changes), jax.devices()[:2]).metrics()
    assert two == pytest.approx(one, rel=1e-4)  # sums in another order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty__sites": "layer_0/fn_residual"}, "matches none of .* layer_0/ffn_resid"),
        ({"penalty__scale": 0.0}, r"penalty\.scale must be above 0"),
        ({"penalty__power": 0}, r"penalty\.power must be at least 1"),
        ({"penalty__weight": -0.1}, r"penalty\.weight must be a number that is not negative"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Case(config_of(tmp_path, "bert", **ON | changes))
