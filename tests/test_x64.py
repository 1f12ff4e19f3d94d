"""JAX_ENABLE_X64 changes nothing: no program computes in float64, and results are the same."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import export

from quantizable_flax import QuantSpec, build_model, calibrate, to_int8, with_quant
from quantizable_flax.checkpoint.export import make_program
from quantizable_flax.evaluation.outliers import outlier_sites
from quantizable_flax.evaluation.step import make_eval_step
from quantizable_flax.models.generation import Sampling, generate
from quantizable_flax.ptq.calibrate import calibrate_step, unknown_ranges
from quantizable_flax.ptq.sensitivity import make_switched_step
from quantizable_flax.ptq.smoothquant import smooth
from quantizable_flax.ptq.trained import learns_ranges, model_to_train
from quantizable_flax.quantization import estimators
from quantizable_flax.runtime.mesh import make_mesh
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import abstract_state, init_state, make_train_step
from tests.small import small_batch, small_config, small_model

ATTENTION = {"softmax": "clipped", "gamma": -0.03, "gate": "mlp"}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
MORE = {
    "bert": {"max_predictions": 4},
    "opt": {},
    "vit": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
}
KNOWN = {"float32", "int32", "bool"}


def a_batch(family: str) -> dict[str, np.ndarray]:
    """As the data give it: int32 tokens and labels, uint8 images."""
    with jax.enable_x64(False):
        return jax.device_get(small_batch(family))


def config_to_train(family: str, ranges: str | None = None):
    config = small_config(family, ATTENTION, **DROPOUT, **MORE[family])
    config.train.update({"grad_accum_steps": 3, "loss_chunk": 5})
    if ranges:
        config.quant.update({"train": True, "train_ranges": ranges})
    return config


def dtypes(jaxpr) -> set[str]:
    """Of all that a program computes, inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {str(v.aval.dtype) for v in equation.outvars if hasattr(v.aval, "dtype")}
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            found |= dtypes(inner) if hasattr(inner, "eqns") else set()
    return found


def assert_float32(function, *arguments):
    program = jax.make_jaxpr(function)(*arguments)
    assert not dtypes(program.jaxpr) & {"float64", "complex128"}
    assert {str(out.dtype) for out in program.out_avals} <= KNOWN


@pytest.mark.parametrize(
    ("family", "ranges"), [("bert", "running"), ("opt", "learned"), ("vit", None)]
)
def test_training_computes_in_float32(family, ranges):
    config, batch = config_to_train(family, ranges), a_batch(family)
    model = model_to_train(config)
    optimizer, mesh = make_optimizer(config, 100), make_mesh(config.mesh, jax.devices()[:1])
    with jax.enable_x64(True):
        state = abstract_state(model, optimizer, batch, mesh, learned_ranges=learns_ranges(config))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} <= KNOWN
        assert_float32(make_train_step(model, optimizer, config, mesh, state), state, batch)


SCHEMES = {
    "percentile": QuantSpec(percentile=99.9, weight_percentile=99.9),
    "channel": QuantSpec(weight_estimator="mse", weight_per_channel=True),
    "token": QuantSpec(activation_ranges="token", head=True),
}


@pytest.mark.parametrize(
    ("family", "scheme"), [("bert", "percentile"), ("opt", "channel"), ("vit", "token")]
)
def test_calibration_and_evaluation_compute_in_float32(family, scheme):
    config, batch = small_config(family, ATTENTION), a_batch(family)
    _, params = small_model(family, ATTENTION)
    model = with_quant(build_model(config), SCHEMES[scheme])
    with jax.enable_x64(True):
        ranges = unknown_ranges(model, params, batch)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(ranges)} <= KNOWN
        calibrate = functools.partial(calibrate_step, model, switches={})
        assert_float32(calibrate, params, ranges, batch)
        assert_float32(make_eval_step(model, outlier_sites(model)), params, ranges, batch)
        sites = ["/".join(path[:-1]) for path in traverse_util.flatten_dict(ranges)]
        on_S = np.ones(len(sites), bool)
        assert_float32(make_switched_step(model, sites), params, ranges, on_S, batch)


@pytest.mark.parametrize("estimator", ["minmax", "mse", "mse_last"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_estimator_computes_in_float32(estimator, symmetric):
    update = functools.partial(
        estimators.update, estimator=estimator, bits=8, symmetric=symmetric, momentum=0.9
    )
    with jax.enable_x64(True):
        state = estimators.empty(estimator)
        assert {str(leaf.dtype) for leaf in state} <= KNOWN
        assert_float32(update, state, np.ones((2, 3), np.float32))


def trained(family: str, ranges: str | None = None) -> Any:
    """Metrics and parameters after two steps with dropout and mixing."""
    config = config_to_train(family, ranges)
    model, batch = model_to_train(config), a_batch(family)
    optimizer, mesh = make_optimizer(config, 100), make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(model, optimizer, batch, 0, mesh)
    step = make_train_step(model, optimizer, config, mesh, state)
    for _ in range(2):
        state, metrics = step(state, batch)
    return jax.device_get((metrics, state))


def served(family: str) -> Any:
    """What a smoothed and calibrated model says, simulated and in int8, and as a program."""
    model, params = small_model(family, ATTENTION)
    batch, spec = a_batch(family), QuantSpec(head=family == "vit")
    model = with_quant(model, spec)
    params = smooth(model, params, [batch])
    ranges = calibrate(model, params, [batch, batch])
    simulated = make_eval_step(model)(params, ranges, batch)
    served, codes = to_int8(model, params, ranges)
    program, signature = make_program(served, codes, 3, None if family == "vit" else 12)
    inputs = [batch["images"]] if family == "vit" else [batch["input_ids"]]
    inputs += [np.ones((3, 12), np.int32)] if family != "vit" else []
    logits = export.deserialize(program).call(*inputs)
    return jax.device_get((ranges, simulated, codes, logits, signature["logits"]["shape"]))


def continued() -> Any:
    """Drawn from a model that serves int8 codes, its cache included."""
    model, params = small_model("opt", ATTENTION)
    model = with_quant(model, QuantSpec())
    codes = to_int8(model, params, calibrate(model, params, [a_batch("opt")]))
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9)
    return generate(*codes, [[2, 5, 7], [9]], max_new_tokens=6, sampling=sampling)


def calibrated() -> Any:
    """Ranges and codes."""
    model, params = small_model("opt")
    batch = a_batch("opt")
    model = with_quant(model, QuantSpec())
    ranges = calibrate(model, params, [batch])
    return jax.device_get((ranges, to_int8(model, params, ranges)[1]))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "work",
    [
        calibrated,
        pytest.param(functools.partial(trained, "bert", "running"), marks=slow),
        pytest.param(functools.partial(trained, "vit"), marks=slow),
        pytest.param(functools.partial(served, "opt"), marks=slow),
        pytest.param(functools.partial(served, "vit"), marks=slow),
        pytest.param(continued, marks=slow),
    ],
    ids=["calibrated", "trained_bert", "trained_vit", "served_opt", "served_vit", "continued"],
)
def test_results_are_the_same_to_the_last_bit(work):
    expected = work()
    with jax.enable_x64(True):
        actual = work()
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert list(map(np.dtype, _dtypes(actual))) == list(map(np.dtype, _dtypes(expected)))


def _dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
