"""SmoothQuant: the same function in floating point, a better one on the grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from quantizable_flax import QuantSpec, UserError
from quantizable_flax.models.build import with_config, with_quant
from quantizable_flax.models.transformer import ResidualScale
from quantizable_flax.nn.gate import KINDS
from quantizable_flax.ptq import smoothquant
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.ptq.smoothquant import SMALLEST, smooth, smoothing_factors
from tests.small import small_batch, small_model

MODELS = {
    "bert": ("bert", {}),
    "bert with registers": ("bert", {"num_registers": 2}),
    "opt": ("opt", {}),
    "opt projected": ("opt", {"embed_size": 16}),
    "opt post-LN": ("opt", {"pre_layer_norm": False, "embed_size": 16}),
    "vit": ("vit", {"patch_layer_norm": True, "num_registers": 2}),
}
CLIPPED = {"softmax": "clipped", "gamma": -0.03}
CASES = [
    *((name, {}) for name in MODELS),
    *((name, {**CLIPPED, "gate": "linear"}) for name in ("bert", "opt", "opt post-LN", "vit")),
    ("bert", {"gate": "mlp"}),
    ("bert", {"gate": "unconditional"}),
    ("bert", {"gate": "value", "qk_norm": True}),
    ("bert", {"gate": "elementwise"}),
    ("opt", {"gate": "elementwise", "qk_norm": True}),
    ("opt", {"gate": "all_heads_linear"}),
    ("opt post-LN", {"gate": "all_heads_linear"}),
    ("vit", {"gate": "mlp", "gate_pooling": "visible"}),
]
OUTLIERS = np.array([3, 17])  # channels, in two heads


def built(name: str, attention=None, layers: int = 2):
    """(model, params, batch) of two layers."""
    family, options = MODELS[name]
    return *small_model(family, attention, num_layers=layers, **options), small_batch(family)


def logits(model, params, batch, ranges=None) -> np.ndarray:
    variables = {"params": params} if ranges is None else {"params": params, "ranges": ranges}
    inputs = [x for key, x in batch.items() if key != "labels"]
    return np.asarray(_logits(model, variables, inputs))


@functools.partial(jax.jit, static_argnums=0)  # equal models share their program
def _logits(model, variables, inputs):
    return model.apply(variables, *inputs)


def flat(params) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square, as a share of that of the expected values."""
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def planted(model, params):
    """The same function with two channels of each LayerNorm 50 times larger."""
    params = {path: x.copy() for path, x in flat(params).items()}
    for fold in smoothquant.folds(model):
        for name in ("scale", "bias"):
            params[f"{fold.norm}/{name}"][OUTLIERS] *= 50.0
        for name in fold.dense:
            params[f"{name}/kernel"][OUTLIERS] /= 50.0
        if fold.residual:
            back = params[f"{fold.residual}/scale"] = np.ones(32, np.float32)
            back[OUTLIERS] /= 50.0
    return traverse_util.unflatten_dict(params, sep="/")


@pytest.mark.parametrize(("name", "attention"), CASES, ids=str)
def test_the_floating_point_function_stays(name, attention):
    model, params, batch = built(name, attention)
    before, given = logits(model, params, batch), flat(params)
    # As numpy arrays that nobody may write into.
    assert not any(x.flags.writeable for x in given.values())
    smoothed = smooth(model, traverse_util.unflatten_dict(given, sep="/"), [batch])
    # Measured at most 5e-7.
    assert error(logits(model, smoothed, batch), before) < 1e-5
    after = flat(smoothed)
    kernels = {
        path for path in given if "kernel" in path and not np.array_equal(given[path], after[path])
    }
    readers = [f"{name}/kernel" for fold in smoothquant.folds(model) for name in fold.dense]
    assert {path for path in kernels if "gate" not in path} == set(readers)
    assert {"layer_1/attention/query/kernel", "layer_0/ffn_in/kernel"} <= kernels


@pytest.mark.parametrize("name", ["bert", "opt post-LN"])
def test_smoothed_params_can_be_smoothed_again(name):
    model, params, batch = built(name, {"gate": "mlp"})
    smoothed = smooth(model, smooth(model, params, [batch], strength=0.8), [batch], strength=0.3)
    assert error(logits(model, smoothed, batch), logits(model, params, batch)) < 1e-5


@pytest.mark.parametrize(
    ("name", "last", "folded", "scales"),
    [
        # The word table is the head; a Dense layer of its own can take the factors.
        ("opt", "final_layer_norm", False, 0),
        ("opt projected", "final_layer_norm", True, 0),
        ("vit", "final_layer_norm", True, 0),
        # The head reads the last layer; nothing normalises OPT's embeddings.
        ("opt post-LN", "layer_1/ffn_layer_norm", False, 3),
        ("bert", "layer_1/ffn_layer_norm", False, 4),
    ],
)
def test_what_is_folded_and_what_is_scaled_back(name, last, folded, scales):
    model = built(name)[0]
    found = smoothquant.folds(model)
    assert (last in {fold.norm for fold in found}) == folded
    backs = [fold.residual for fold in found if fold.residual]
    assert len(backs) == len(set(backs)) == scales
    assert len({fold.norm for fold in found}) == len(found)


def test_every_gate_has_a_rule():
    assert set(smoothquant.GATE_KERNELS) == set(KINDS)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_factors_follow_the_formula(strength):
    model, params, batch = built("bert")
    batches = [batch, {**batch, "input_ids": batch["input_ids"][:, ::-1]}]
    params = jax.tree.map(np.asarray, params)
    # The first LayerNorm, from the tables alone.
    tables, largest = params["embeddings"], []
    for ids in (np.asarray(b["input_ids"]) for b in batches):
        x = tables["word"]["embedding"][ids] + tables["token_type"]["embedding"][0]
        x = x + tables["position"]["embedding"][: ids.shape[1]]
        x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        x = x * tables["layer_norm"]["scale"] + tables["layer_norm"]["bias"]
        largest.append(np.abs(x).max(axis=(0, 1)))
    attention = params["layer_0"]["attention"]
    readers = [attention[name]["kernel"] for name in ("query", "key", "value")]
    weights = np.abs(np.concatenate(readers, axis=1)).max(axis=1)
    expected = np.max(largest, axis=0) ** strength / weights ** (1.0 - strength)

    smoothed = smooth(model, params, batches, strength=strength)
    layer, norm = smoothed["layer_0"], smoothed["embeddings"]["layer_norm"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(layer["attention_residual_scale"]["scale"], expected)
    for name in ("scale", "bias"):
        close(norm[name] * expected, tables["layer_norm"][name])
    for name in ("query", "key", "value"):
        close(layer["attention"][name]["kernel"], attention[name]["kernel"] * expected[:, None])


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_ends_of_its_strength_level_one_side(strength):
    model, params, batch = built("opt")
    smoothed = smooth(model, params, [batch], strength=strength)
    maxima = smoothquant.channel_maxima(model, smoothed, [batch])
    for fold in smoothquant.folds(model):
        kernels = [flat(smoothed)[f"{name}/kernel"] for name in fold.dense]
        weights = np.abs(np.concatenate(kernels, axis=1)).max(axis=1)
        np.testing.assert_allclose(maxima[fold.norm] if strength else weights, 1.0, rtol=1e-5)


def test_channels_that_are_zero_or_that_nobody_reads_stay_finite():
    kernel = jnp.array([[1.0, -2.0], [3.0, 0.0], [0.0, 0.0], [1e-30, 0.0], [4e9, 0.0]])
    largest = jnp.array([8.0, 0.0, 4.0, 1e-30, 1e-9])
    factors = smoothing_factors(largest, [kernel], 0.5)
    np.testing.assert_allclose(factors, [2.0, 1.0, 2.0 / SMALLEST**0.5, SMALLEST, SMALLEST], 1e-6)


def test_gates_follow_but_have_no_say():
    model, params, batch = built("vit", {"gate": "linear"})
    louder = traverse_util.path_aware_map(
        lambda path, x: 100.0 * x if path[-2:] == ("gate", "kernel") else x, params
    )
    first, second = (flat(smooth(model, p, [batch])) for p in (params, louder))
    path = "layer_0/attention_layer_norm/scale"
    np.testing.assert_array_equal(first[path], second[path])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["bert", "vit", *(pytest.param(name, marks=SLOW) for name in ("opt", "opt post-LN"))]
)
def test_w8a8_recovers_from_planted_outliers(name):
    model, params, batch = built(name)
    exact, quantized = logits(model, params, batch), with_quant(model, QuantSpec())
    params = planted(model, params)
    assert error(logits(model, params, batch), exact) < 1e-5
    smoothed = smooth(quantized, params, [batch])
    plain, repaired = (
        error(logits(quantized, p, batch, calibrate(quantized, p, [batch])), exact)
        for p in (params, smoothed)
    )
    # Measured 0.04 (ViT) to 0.09 (post-LN OPT) of it.
    assert repaired < 0.2 * plain


def test_ordinary_models_have_neither_the_parameter_nor_the_operation(monkeypatch):
    def program():
        model, params, batch = built("bert")
        assert not any("residual_scale" in path for path in flat(params))
        run = functools.partial(model.apply, method="loss", train=True)
        keys = {"dropout": jax.random.key(0)}
        return str(jax.make_jaxpr(lambda p: run({"params": p}, batch, rngs=keys))(params))

    with_module = program()
    monkeypatch.setattr(ResidualScale, "__call__", lambda self, x: x)
    assert program() == with_module


def test_bfloat16_models_keep_their_dtype():
    model, params, batch = built("bert")
    half = with_config(model, dtype=jnp.bfloat16)
    smoothed = smooth(half, params, [batch])
    assert {x.dtype for x in jax.tree.leaves(smoothed)} == {jnp.dtype("float32")}
    encode = functools.partial(half.apply, {"params": smoothed}, method="encode")
    assert jax.eval_shape(encode, batch["input_ids"]).dtype == jnp.bfloat16


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strength_outside_its_domain_is_an_error(strength):
    model, params, batch = built("vit", layers=1)
    with pytest.raises(UserError, match=rf"strength must be in \[0, 1\], found {strength}"):
        smooth(model, params, [batch], strength=strength)


def test_no_batch_is_an_error():
    model, params, _ = built("vit", layers=1)
    with pytest.raises(UserError, match="at least one calibration batch, found none"):
        smooth(model, params, [])


def test_activations_that_are_not_finite_are_an_error():
    model, params, batch = built("opt", layers=1)
    params["layer_0"]["ffn_layer_norm"]["bias"] *= jnp.inf
    with pytest.raises(UserError, match="nan or inf behind layer_0/ffn_layer_norm"):
        smooth(model, params, [batch])
