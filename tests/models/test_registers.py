"""Registers of texts: tokens without a position, a label or a place in what comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import UserError, build_model
from quantizable_flax.interop import to_state_dict
from quantizable_flax.models.build import attention_label, with_config
from quantizable_flax.training.optimizer import decay_mask
from tests.helpers import is_key_bias, pairs
from tests.ptq.int8_case import batch_of
from tests.small import small_batch, small_config, small_model

COUNT = 3
ATTENTION = {"softmax": "clipped", "gamma": -0.02, "gate": "linear"}
# Rows of the position table before the first position.
OFFSETS = {"bert": 0, "roberta": 2, "opt": 2}


def text_of(family: str):
    """Ids, and a mask with padding on both sides for those whose positions count visible tokens."""
    batch = batch_of("opt")
    mask = batch["attention_mask"]
    return batch["input_ids"], mask if OFFSETS[family] else mask.at[0, :3].set(1)


def as_words(family: str, params, words: int):
    """Parameters of a model without registers that has them as further words at first positions."""
    tables = {**params["embeddings"]}
    rows = tables.pop("registers")["register_tokens"]
    if "token_type" in tables:
        rows = rows - tables["token_type"]["embedding"][:1]
    word, position = (tables[name]["embedding"] for name in ("word", "position"))
    assert len(word) == words
    offset = OFFSETS[family]
    position = jnp.concatenate(
        [position[:offset], jnp.zeros((COUNT, 32)), position[offset:]], axis=0
    )
    tables["word"] = {"embedding": jnp.concatenate([word, rows])}
    tables["position"] = {"embedding": position}
    return {**params, "embeddings": tables}


@pytest.mark.parametrize("family", ["bert", "opt", pytest.param("roberta", marks=pytest.mark.slow)])
def test_registers_are_words_without_a_position(family):
    """Values and gradients of the hidden states, with padding."""
    head = {} if family == "opt" else {"head": "none"}
    model, params = small_model(family, ATTENTION, num_registers=COUNT, num_layers=2, **head)
    ids, mask = text_of(family)
    words = model.config.vocab_size
    plain = with_config(
        model,
        num_registers=0,
        vocab_size=words + COUNT,
        max_position_embeddings=model.config.max_position_embeddings + COUNT,
    )
    first = jnp.tile(jnp.arange(words, words + COUNT, dtype=ids.dtype), (len(ids), 1))
    long_ids = jnp.concatenate([first, ids], axis=1)
    long_mask = jnp.concatenate([jnp.ones_like(first), mask], axis=1)
    # What padding makes of itself is nobody's: it has another position in the two.
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(*ids.shape, 32)), jnp.float32)
    weights = weights * mask[..., None].astype(jnp.float32)

    @jax.jit
    def ours(params):
        return weights * model.apply({"params": params}, ids, mask, method="encode")

    @jax.jit
    def theirs(params):
        params = as_words(family, params, words)
        hidden = plain.apply({"params": params}, long_ids, long_mask, method="encode")
        return weights * hidden[:, COUNT:]

    expected = theirs(params)
    # BERT's token type is subtracted from a register and added again: measured 5e-7 of the largest.
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(ours(params), expected, rtol=0, atol=atol)
    grads, others = (
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p))))(params) for f in (ours, theirs)
    )
    for name, one, other in pairs(grads, others):
        scale = 1.0 if is_key_bias(name) else np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale, err_msg=name)
    table = grads["embeddings"]["registers"]["register_tokens"]
    assert np.abs(table).min(axis=1).max() > 1e-4


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_what_comes_out_is_of_the_text_alone(family):
    model, params = small_model(family, num_registers=COUNT)
    batch = batch_of(family)
    inputs, mask = (
        (batch["input_ids"], batch["attention_mask"]),
        np.asarray(batch["attention_mask"]),
    )
    apply = functools.partial(model.apply, {"params": params})
    hidden = apply(*inputs, method="encode")
    logits = np.asarray(apply(*inputs), np.float64)
    assert (hidden.shape, logits.shape) == ((3, 12, 32), (3, 12, 96))
    features = apply(batch, method="features")
    np.testing.assert_array_equal(features.hidden_BxTxD, hidden)
    mean = (np.asarray(hidden) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(features.pooled_BxD, mean, atol=1e-5)
    if family == "bert":
        by_cls = with_config(model, pooling="cls").apply(
            {"params": params}, batch, method="features"
        )
        np.testing.assert_array_equal(by_cls.pooled_BxD, hidden[:, 0])
    # Labels meet the tokens that they are of.
    labels = np.asarray(batch["labels"])
    if family == "opt":
        logits, labels = logits[:, :-1], labels[:, 1:]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    scores = apply(batch, method="loss")
    np.testing.assert_allclose(scores.loss, -(own * (labels >= 0)).sum(1), rtol=1e-5)


def test_later_tokens_move_no_earlier_logit():
    model, params = small_model("opt", ATTENTION, num_registers=COUNT)
    ids = small_batch("opt")["input_ids"]
    run = jax.jit(lambda ids: model.apply({"params": params}, ids))
    before, after = run(ids), run(ids.at[:, 7:].set(5))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before - after)[:, 7:].max() > 0.01


def test_every_token_sees_every_register():
    for family in ("bert", "opt"):
        model, params = small_model(family, num_registers=COUNT)
        ids = small_batch(family)["input_ids"]
        table = params["embeddings"]["registers"]["register_tokens"]
        run = jax.jit(lambda t, m=model, p=params, i=ids: m.apply({"params": with_table(p, t)}, i))
        before = run(table)
        for row in range(COUNT):
            moved = np.abs(run(table.at[row, 3].add(2.0)) - before).max(axis=-1)
            assert moved.min() > 1e-4, (family, row)


def with_table(params, table):
    return {
        **params,
        "embeddings": {**params["embeddings"], "registers": {"register_tokens": table}},
    }


def test_alpha_and_the_mesh_count_registers_and_positions_do_not():
    clipped = {"softmax": "clipped", "alpha": 2.0}
    for family in ("bert", "opt"):
        config = small_config(family, clipped, num_registers=COUNT, max_position_embeddings=12)
        model = build_model(config)
        assert model.config.softmax.gamma == -2.0 / (12 + COUNT)
        assert model.config.length(config.data) == 12 + COUNT
        # All positions for words: registers need none.
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12), jnp.int32))
        assert "embeddings" in shapes["params"]


def test_a_row_of_a_table_names_every_method():
    assert attention_label(small_config("bert")) == "vanilla"
    assert attention_label(small_config("vit", num_registers=COUNT)) == "3 registers"
    every = {
        **{"softmax": "clipped", "alpha": 0.5, "length_normalised": True, "sink": "learned"},
        **{"qk_norm": True, "gate": "value"},
    }
    assert attention_label(small_config("opt", every, num_registers=1)) == (
        "clipped softmax (alpha=0.5, length-normalised) + learned sink + QK-norm + gated (value) "
        "+ 1 register"
    )


def test_registers_are_not_decayed_and_start_as_other_tables():
    model = build_model(small_config("bert", num_registers=COUNT, hidden_size=512, num_heads=4))
    params = model.init(jax.random.key(0), model.example_batch(), method="loss")["params"]
    table = params["embeddings"]["registers"]["register_tokens"]
    assert table.names == (None, "embed")
    np.testing.assert_allclose(np.std(table.value), 0.02, rtol=0.1)
    assert not decay_mask(params)["embeddings"]["registers"]["register_tokens"].value


def test_what_cannot_have_registers_says_so():
    for family in ("bert", "opt", "vit"):
        config = small_config(family, num_registers=-1)
        with pytest.raises(UserError, match="num_registers must not be negative, found -1"):
            build_model(config)
    _, params = small_model("opt", num_registers=COUNT)
    with pytest.raises(UserError, match="'embeddings/registers/register_tokens' has no name"):
        to_state_dict(params, small_config("opt", num_registers=COUNT))
