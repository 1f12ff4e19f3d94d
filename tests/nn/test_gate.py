"""The gate: where it starts, how fine it is, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import GateConfig, MultiHeadAttention, UserError
from quantizable_flax.nn.gate import KINDS, POOLINGS, Gate

HEADS = 4


class OfHidden(Gate):
    """A gate whose attention has the hidden states for values."""

    def __call__(self, hidden, mask=None):
        return super().__call__(hidden, mask, hidden.reshape(*hidden.shape[:2], HEADS, -1))


def fresh(config: GateConfig, hidden) -> tuple[Gate, dict]:
    gate = OfHidden(config, HEADS)
    return gate, nn.meta.unbox(gate.init(jax.random.key(0), hidden))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_at_pi_init(kind, pooling, hidden):
    gate, variables = fresh(GateConfig(kind, pooling, pi_init=0.25, init_std=0.0), hidden)
    np.testing.assert_allclose(gate.apply(variables, hidden), 0.25, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_noisy_by_init_std(kind, hidden):
    gate, variables = fresh(GateConfig(kind, pi_init=0.25, init_std=0.02), hidden)
    start = np.asarray(gate.apply(variables, hidden))
    np.testing.assert_allclose(start, 0.25, atol=0.1)
    assert (np.ptp(start) > 0.0) == (kind != "unconditional")


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_shape_is_one_factor_per_head_and_token_or_sequence(kind, pooling, hidden):
    gate, variables = fresh(GateConfig(kind, pooling), hidden)
    tokens = 1 if pooling != "none" or kind == "unconditional" else hidden.shape[1]
    width = 4 if kind == "elementwise" else 1
    assert gate.apply(variables, hidden).shape == (hidden.shape[0], tokens, HEADS, width)


def test_pooled_gate_averages_logits_not_probabilities(hidden):
    token, variables = fresh(GateConfig("linear", "none", init_std=1.0), hidden)
    head = Gate(GateConfig("linear", "visible", init_std=1.0), HEADS)
    gates = np.asarray(token.apply(variables, hidden))
    logits = np.log(gates / (1.0 - gates)).mean(axis=1, keepdims=True)
    expected = 1.0 / (1.0 + np.exp(-logits))
    np.testing.assert_allclose(head.apply(variables, hidden), expected, rtol=1e-5)


def test_linear_gate_of_a_head_sees_only_its_slice(hidden):
    gate, variables = fresh(GateConfig("linear", init_std=1.0), hidden)
    changed = hidden.at[..., :4].add(1.0)  # the slice of head 0
    before, after = gate.apply(variables, hidden), gate.apply(variables, changed)
    np.testing.assert_array_equal(before[:, :, 1:], after[:, :, 1:])
    assert np.all(np.asarray(before[:, :, 0]) != np.asarray(after[:, :, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_gate_of_a_token_sees_no_other_token(kind, hidden):
    gate, variables = fresh(GateConfig(kind, init_std=1.0), hidden)
    before = gate.apply(variables, hidden)
    after = gate.apply(variables, hidden.at[:, 3:].add(1.0))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    if kind != "unconditional":
        assert np.all(np.asarray(before[:, 3:] != after[:, 3:]))


def test_gate_of_values_reads_no_input_and_needs_values(hidden):
    gate, variables = fresh(GateConfig("value", init_std=1.0), hidden)
    own, gate = hidden.reshape(2, 6, HEADS, 4), Gate(gate.config, HEADS)
    found = gate.apply(variables, jnp.zeros_like(hidden), None, own)
    changed = gate.apply(variables, hidden, None, own.at[:, :, 0].add(1.0))
    np.testing.assert_array_equal(found[:, :, 1:], changed[:, :, 1:])
    assert np.all(np.asarray(found[:, :, 0] != changed[:, :, 0]))
    with pytest.raises(UserError, match="kind value reads the values of attention, found none"):
        gate.apply(variables, hidden)


def test_pooled_is_what_sees_other_tokens():
    for kind in KINDS:
        assert not GateConfig(kind, "none").pooled
        for pooling in ("visible", "all"):
            assert GateConfig(kind, pooling).pooled == (kind != "unconditional")


POOLED = [kind for kind in KINDS if kind != "unconditional"]


@pytest.mark.parametrize("kind", POOLED)
def test_pooled_gate_averages_visible_tokens_alone(kind, hidden):
    gate, variables = fresh(GateConfig(kind, "visible", init_std=1.0), hidden)
    unmasked = OfHidden(GateConfig(kind, "all", init_std=1.0), HEADS)
    visible = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], bool)
    found = gate.apply(variables, hidden, visible[:, None, None, :])
    for row, seen in enumerate(visible):
        alone = gate.apply(variables, hidden[row : row + 1, seen])
        # Sums of four or five terms and of zeros, in another order.
        np.testing.assert_allclose(found[row], alone[0], rtol=1e-5)
    everything = gate.apply(variables, hidden)
    published = unmasked.apply(variables, hidden, visible[:, None, None, :])
    np.testing.assert_array_equal(published, everything)
    assert np.abs(published - found).min() > 1e-4
    shown = gate.apply(variables, hidden, np.ones((1, 1, 1, 6), bool))
    np.testing.assert_allclose(shown, everything, rtol=1e-6)


def test_pooled_gate_takes_masks_of_every_shape_that_broadcasts(hidden):
    gate, variables = fresh(GateConfig("linear", "visible", init_std=1.0), hidden)
    keys = jnp.arange(6) < 4
    expected = gate.apply(variables, hidden, keys[None, None, None])
    for mask in (keys, keys[None], keys[None, None], keys[None, None, None].astype(jnp.int32)):
        np.testing.assert_array_equal(gate.apply(variables, hidden, mask), expected)
    by_head = jnp.stack([keys, ~keys, keys, ~keys])[None, :, None, :]
    found = gate.apply(variables, hidden, by_head)
    other = gate.apply(variables, hidden, ~keys)
    np.testing.assert_array_equal(found[:, :, ::2], expected[:, :, ::2])
    np.testing.assert_array_equal(found[:, :, 1::2], other[:, :, 1::2])


def test_pooled_gate_that_sees_nothing_is_finite(hidden):
    gate, variables = fresh(GateConfig("linear", "visible", init_std=1.0), hidden)
    found = gate.apply(variables, hidden, jnp.zeros((2, 1, 1, 6), bool))
    np.testing.assert_array_equal(found, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_gate_refuses_what_differs_from_query_to_query(kind, hidden):
    causal = jnp.tril(jnp.ones((6, 6), bool))
    module = MultiHeadAttention(HEADS, gate=GateConfig(kind, "visible"))
    published = module.clone(gate=GateConfig(kind, "all"))
    variables = published.init(jax.random.key(0), hidden)
    for mask in (causal, causal[None, None], jnp.ones((2, HEADS, 6, 6), bool)):
        published.apply(variables, hidden, mask)
        if kind == "unconditional":  # looks at no token
            module.apply(variables, hidden, mask)
            continue
        with pytest.raises(UserError, match=r"one mask for all queries.*gate_pooling=all"):
            module.apply(variables, hidden, mask)


@pytest.mark.parametrize("pooling", ["visible", "all"])
def test_pooled_gate_with_a_cache_is_refused(pooling, hidden):
    module = MultiHeadAttention(HEADS, gate=GateConfig("linear", pooling))
    variables = module.init(jax.random.key(0), hidden)
    with pytest.raises(UserError, match=f"sees no other token, found gate_pooling={pooling}"):
        module.apply(variables, hidden, cache_at=0, mutable=["cache"])


@pytest.mark.parametrize("kind", POOLED)
def test_finetune_without_noise_leaves_attention_unchanged(kind, hidden):
    plain = MultiHeadAttention(HEADS)
    variables = nn.meta.unbox(plain.init(jax.random.key(1), hidden))
    config = GateConfig(kind, pi_init=0.25, init_std=0.0, finetune=True)
    gated = MultiHeadAttention(HEADS, gate=config)
    params = nn.meta.unbox(gated.init(jax.random.key(2), hidden))["params"]
    merged = {"params": {**params, **variables["params"]}}
    np.testing.assert_allclose(
        gated.apply(merged, hidden), plain.apply(variables, hidden), rtol=1e-6, atol=1e-7
    )


def test_unconditional_gate_is_never_scaled(hidden):
    config = GateConfig("unconditional", pi_init=0.25, finetune=True)
    gate, variables = fresh(config, hidden)
    np.testing.assert_allclose(gate.apply(variables, hidden), 0.25, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_mean_is_the_probability_before_the_scale(kind, hidden):
    gate, variables = fresh(GateConfig(kind, pi_init=0.25, finetune=True, init_std=0.5), hidden)
    factor, recorded = gate.apply(variables, hidden, mutable=["stats"])
    scale = 1.0 if kind == "unconditional" else 4.0
    mean = recorded["stats"]["mean"]
    assert mean.shape == (2, HEADS)
    np.testing.assert_allclose(mean, np.asarray(factor).mean((1, 3)) / scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (GateConfig("linear"), HEADS * (4 + 1)),
        (GateConfig("mlp", hidden=3), HEADS * (3 * (4 + 2) + 1)),
        (GateConfig("all_heads_linear"), HEADS * (16 + 1)),
        (GateConfig("unconditional"), HEADS),
        # Of the other papers.
        (GateConfig("value"), HEADS * (4 + 1)),
        (GateConfig("elementwise"), 16 * 16 + 16),
    ],
)
def test_parameter_count_is_that_of_table_4(options, count, hidden):
    _, variables = fresh(options, hidden)
    assert sum(x.size for x in jax.tree.leaves(variables)) == count


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "liner"}, r"found 'liner' \(did you mean 'linear'"),
        ({"pooling": "visibel"}, r"none, visible, all, found 'visibel' \(did you mean 'visible'"),
        ({"pi_init": 1.0}, r"gate_pi_init must be in \(0, 1\), found 1.0"),
        ({"pi_init": 0.0}, r"gate_pi_init must be in \(0, 1\), found 0.0"),
        ({"hidden": 0}, "gate_hidden must be at least 1, found 0"),
    ],
)
def test_wrong_options_are_named(options, sentence):
    with pytest.raises(UserError, match=sentence):
        GateConfig(**options)
