"""Every method of attention, alone and together, against float64 formulas and their slopes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import GateConfig, Mask, MultiHeadAttention, make_softmax
from tests.nn.formulas import attention

HEADS = 4
NCS = {"softmax": "clipped", "alpha": 0.5, "length_normalised": True}
METHODS = {
    "value gate": {"gate": "value"},
    "value gate, pooled": {"gate": "value", "gate_pooling": "visible", "causal": False},
    "elementwise gate": {"gate": "elementwise", "gate_finetune": True, "gate_pi_init": 0.3},
    "elementwise gate, pooled": {
        "gate": "elementwise",
        "gate_pooling": "visible",
        "causal": False,
    },
    "length-normalised": NCS,
    "length-normalised, padding alone": {**NCS, "causal": False},
    "QK-norm": {"qk_norm": True},
    "all": {**NCS, "zeta": 1.02, "sink": "learned", "gate": "elementwise", "qk_norm": True},
    "softmax1, QK-norm, value gate": {"sink": "zero", "gate": "value", "qk_norm": True},
}


def module_of(options: dict, **fields) -> MultiHeadAttention:
    names = ("gamma", "zeta", "alpha", "length_normalised", "sink")
    softmax = make_softmax(
        options.get("softmax", "vanilla"), **{k: options[k] for k in names if k in options}
    )
    gate = None
    if "gate" in options:
        known = {f.name for f in dataclasses.fields(GateConfig)}
        rest = {k.removeprefix("gate_"): v for k, v in options.items() if k.startswith("gate_")}
        assert rest.keys() <= known
        gate = GateConfig(options["gate"], **rest)
    qk_norm = options.get("qk_norm", False)
    return MultiHeadAttention(HEADS, softmax=softmax, gate=gate, qk_norm=qk_norm, **fields)


def random_params(module, x):
    """All of them far from where they start."""
    params = nn.meta.unbox(module.init(jax.random.key(0), x))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), params)


def doubled(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("kernel", ["unfused", "blockwise"])
@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_are_the_formulas(name, kernel, hidden):
    options = METHODS[name]
    causal = options.get("causal", True)
    visible = jnp.array([[1, 1, 1, 1, 0, 0], [1] * 6])  # padding behind the first text
    module = module_of(options, kernel=kernel)
    params = random_params(module, hidden)
    mask = Mask(visible, causal=causal)
    seen = np.broadcast_to(np.asarray(mask.dense(6, 6))[:, 0], (2, 6, 6))
    weights = np.random.default_rng(1).normal(size=hidden.shape)

    def ours(given):
        return module.apply({"params": given["params"]}, given["x"], mask)

    def exact(given):
        return attention(given["params"], given["x"], seen, HEADS, options)

    given = {"params": params, "x": hidden}
    found = ours(given)
    expected = exact(doubled(given))
    # float32 sums of at most 16 terms: measured 3e-7 of the largest.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * np.abs(expected).max())

    grads = jax.grad(lambda g: jnp.sum(ours(g) * jnp.asarray(weights, jnp.float32)))(given)
    leaves, tree = jax.tree.flatten(doubled(given))
    slopes = jax.tree.leaves(doubled(grads))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(given)]
    largest = max(np.abs(slope).max() for slope in slopes)
    rng = np.random.default_rng(2)
    for i, leaf in enumerate(leaves):
        direction = rng.normal(size=leaf.shape)
        step = 1e-6 * direction  # in float64 the difference of two values is good to 1e-9
        ends = [
            np.sum(weights * exact(tree.unflatten([*leaves[:i], leaf + s, *leaves[i + 1 :]])))
            for s in (step, -step)
        ]
        slope, formula = np.sum(slopes[i] * direction), (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(slope, formula, rtol=2e-4, atol=1e-4 * largest, err_msg=names[i])
        # None but the key's bias, which moves all scores of a row alike, is without effect.
        assert options.get("qk_norm") or "key" in names[i] or abs(formula) > 1e-3, names[i]
