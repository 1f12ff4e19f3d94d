"""BERT's own promises: initialisation, dtypes, padding, dropout."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import UserError, build_model, default_config
from quantizable_flax.models.registry import check_length


def small_config(**model):
    config = default_config()
    config.model.update(
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            **model,
        }
    )
    config.data.seq_len = 12
    return config


IDS = jax.random.randint(jax.random.key(0), (3, 12), 1, 96)
LABELS = jnp.where(jnp.arange(12) % 4 == 0, IDS, -100)
BATCH = {"input_ids": IDS, "labels": LABELS}


@pytest.fixture(scope="module")
def variables():
    """Of every model here that has the default sizes; wide, so that attention is not uniform."""
    model = build_model(small_config(initializer_range=0.2))
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), IDS))


@functools.cache
def compiled(**model):
    """`(variables, ids, mask, types) -> (logits, summed losses)` without dropout."""

    def outputs(module, ids, mask=None, types=None):
        batch = {"input_ids": ids, "labels": LABELS, "attention_mask": mask}
        return module(ids, mask, types), module.loss(batch)[0]

    return jax.jit(functools.partial(build_model(small_config(**model)).apply, method=outputs))


def test_initial_weights_are_normal_and_layer_norms_are_one():
    model = build_model(small_config(hidden_size=64, initializer_range=0.05))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), IDS))["params"]
    assert set(params["mlm_head"]) == {"dense", "layer_norm", "bias"}  # the decoder is tied
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        x = np.asarray(x)
        if "bias" in name:
            assert np.all(x == 0.0), name
        elif "layer_norm" in name:
            assert np.all(x == 1.0), name
        else:
            # The sampling error of a standard deviation is 1 / sqrt(2 n) of it: five of them.
            tolerance = 5.0 / np.sqrt(2.0 * x.size)
            np.testing.assert_allclose(np.std(x), 0.05, rtol=tolerance, err_msg=name)
            assert abs(np.mean(x)) < 5.0 * 0.05 / np.sqrt(x.size), name


def test_bfloat16_computes_close_to_float32_with_float32_params(variables):
    half = build_model(small_config(dtype="bfloat16"))
    fresh = jax.eval_shape(half.init, jax.random.key(0), IDS)
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    logits, total = compiled(dtype="bfloat16")(variables, IDS)
    exact, expected = compiled()(variables, IDS)
    assert logits.dtype == total.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4 % a rounding, over some ten roundings in a row.
    assert 0.0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
    np.testing.assert_allclose(total, expected, rtol=0.02)


def test_padding_changes_nothing_for_the_visible_tokens(variables):
    mask = jnp.broadcast_to(jnp.arange(12) < 9, (3, 12)).astype(jnp.int32)
    types = jnp.zeros_like(IDS)
    one, _ = compiled()(variables, IDS.at[:, 9:].set(0), mask, types)
    other, _ = compiled()(variables, IDS.at[:, 9:].set(7), mask, types)
    np.testing.assert_array_equal(one[:, :9], other[:, :9])
    everything, _ = compiled()(variables, IDS, jnp.ones_like(mask), types)
    plain, _ = compiled()(variables, IDS)
    np.testing.assert_allclose(everything, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(everything - one)[:, :9].max() > 0.01


def test_pad_embedding_gets_no_gradient_from_the_lookup(variables):
    model, ids = build_model(small_config()), IDS.at[:, 6:].set(0)

    def hidden_sum(params):
        x = model.apply({"params": params}, ids, method="encode")
        return jnp.sum(x * jnp.arange(32.0))

    grad = jax.jit(jax.grad(hidden_sum))(variables["params"])["embeddings"]["word"]["embedding"]
    assert np.all(np.asarray(grad[0]) == 0.0)
    assert np.abs(grad[int(ids[0, 0])]).max() > 0.0


def test_dropout_acts_in_training_only(variables):
    model = build_model(small_config(hidden_dropout=0.5, attention_dropout=0.5))

    def total(train, **options):
        return model.apply(variables, BATCH, train=train, method="loss", **options)[0]

    noisy = jax.jit(lambda seed: total(True, rngs={"dropout": jax.random.key(seed)}))
    assert not np.array_equal(noisy(0), noisy(1))
    np.testing.assert_array_equal(noisy(0), noisy(0))
    programs = [str(jax.make_jaxpr(f)()) for f in (lambda: total(False), lambda: noisy(0))]
    assert ["random_bits" in program for program in programs] == [False, True]
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: total(True))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"name": "bret"}, r"found 'bret' \(did you mean 'bert'"),
        ({"dtype": "float16"}, "one of float32, bfloat16, found 'float16'"),
        ({"num_heads": 5}, "found 5 heads and hidden size 32"),
    ],
)
def test_sizes_that_do_not_fit_are_named(model, sentence):
    with pytest.raises(UserError, match=sentence):
        build_model(small_config(**model))


def test_sequences_longer_than_the_positions_are_refused():
    config = small_config(max_position_embeddings=8)
    with pytest.raises(UserError, match="found 12 and 8"):
        check_length(config)
    # Without the check the lookup would repeat the last position in silence.
    with pytest.raises(UserError, match="8 positions, found sequences of 12 tokens"):
        build_model(config).init(jax.random.key(0), jnp.zeros((1, 12), jnp.int32))
