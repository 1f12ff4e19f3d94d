"""BERT's own promises: the tied decoder, and padding."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.small import small_batch, small_model

IDS = small_batch("bert")["input_ids"]


def test_decoder_is_the_word_table():
    _, params = small_model("bert")
    assert set(params["mlm_head"]) == {"dense", "layer_norm", "bias"}


def test_padding_changes_nothing_for_the_visible_tokens():
    model, params = small_model("bert")
    run = jax.jit(lambda ids, mask: model.apply({"params": params}, ids, mask))
    mask = jnp.broadcast_to(jnp.arange(12) < 9, (3, 12)).astype(jnp.int32)
    one, other = (run(IDS.at[:, 9:].set(filler), mask) for filler in (0, 7))
    np.testing.assert_array_equal(one[:, :9], other[:, :9])
    everything, plain = run(IDS, jnp.ones_like(mask)), run(IDS, None)
    np.testing.assert_allclose(everything, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(everything - one)[:, :9].max() > 0.01
