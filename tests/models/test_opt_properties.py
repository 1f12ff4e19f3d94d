"""OPT's own promises: causality, positions by visible tokens, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.models.opt import positions
from tests.small import small_batch, small_model

IDS = small_batch("opt")["input_ids"]
ATTENTIONS = {
    "vanilla": {},
    "clipped and gated": {"softmax": "clipped", "gamma": -0.05, "gate": "linear"},
}


def compiled(attention=None, **model):
    """`(ids, mask) -> logits` of a small model."""
    model, params = small_model("opt", attention, **model)
    return jax.jit(lambda ids, mask=None: model.apply({"params": params}, ids, mask))


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_later_tokens_change_no_earlier_logits(attention):
    run = compiled(attention)
    before, after = run(IDS), run(IDS.at[:, 7:].set(5))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before - after)[:, 7:].max() > 0.1


def test_position_counts_visible_tokens():
    mask = jnp.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    expected = [[0, 1, 2, 3], [-1, -1, 0, 1], [0, 1, -1, -1], [-1, 0, -1, 1]]
    np.testing.assert_array_equal(positions(mask), expected)


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_padding_on_either_side_changes_nothing_for_the_visible_tokens(pre_layer_norm):
    run = compiled(pre_layer_norm=pre_layer_norm)
    short = run(IDS[:, :8])
    for start in (0, 4, 2):
        seen = slice(start, start + 8)
        mask = jnp.zeros_like(IDS).at[:, seen].set(1)
        for filler in (1, 7):
            ids = jnp.full_like(IDS, filler).at[:, seen].set(IDS[:, :8])
            # Sums over eight keys, or over those and zeros: measured 1e-6 of logits up to 4.
            np.testing.assert_allclose(run(ids, mask)[:, seen], short, atol=2e-5)
    np.testing.assert_allclose(run(IDS, jnp.ones_like(IDS)), run(IDS), atol=2e-5)


def test_loss_predicts_the_next_token():
    model, params = small_model("opt")
    labels = IDS.at[0].set(-100).at[1, 5:].set(-100)
    loss = jax.jit(functools.partial(model.apply, method="loss"))
    scores = loss({"params": params}, {"input_ids": IDS, "labels": labels})
    logits = np.asarray(compiled()(IDS), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected, counts, right = np.zeros(3), np.zeros(3), np.zeros(3)
    for b in range(3):
        for t in range(11):
            if (label := int(labels[b, t + 1])) != -100:
                expected[b] -= log_probs[b, t, label]
                counts[b] += 1
                right[b] += log_probs[b, t].argmax() == label
    np.testing.assert_array_equal(counts, [0, 4, 11])
    np.testing.assert_array_equal(scores.weight, counts)
    np.testing.assert_array_equal(scores.correct, right)
    np.testing.assert_allclose(scores.loss, expected, rtol=1e-5)


def test_narrow_word_table_is_projected():
    _, params = small_model("opt", embed_size=16)
    assert params["embeddings"]["word"]["embedding"].shape == (96, 16)
    assert params["embeddings"]["project_in"]["kernel"].shape == (16, 32)
    assert params["project_out"]["kernel"].shape == (32, 16)
    assert "bias" not in params["project_out"]
    _, wide = small_model("opt", embed_size=32)
    assert "project_out" not in wide
