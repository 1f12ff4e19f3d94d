"""Attention against the original variant by variant, and its own promises."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import MultiHeadAttention, UserError, build_model, make_softmax
from quantizable_flax.attention.gate import Gate
from quantizable_flax.interop.bert import attention_params
from quantizable_flax.interop.torch_layout import TensorReader
from quantizable_flax.quantization.sites import Site
from tests.helpers import Golden, bert_config, deviation, golden

# float32 on both sides, sums of at most 48 terms in another order: measured 1e-6 and below. The
# gradients pass through two more such sums and the softmax's cancellation.
FORWARD, BACKWARD = 1e-5, 1e-4
VARIANTS = list(golden("attention_bert").config["variants"])


class Variant:
    """One golden variant: our module, its params, and what it computes from the golden input."""

    def __init__(self, file: Golden, name: str):
        original = file.config["variants"][name]
        sizes = {"hidden_size": file.config["hidden"], "heads": file.config["heads"]}
        unused = {"layers": 1, "ffn": 1, "vocab": 1, "pad_id": 0}
        config = bert_config({**sizes, **unused, "seq": file.config["T"], "attention": original})
        if "max_seq_length" in original:  # only alpha asks for it
            config.model.max_position_embeddings = config.data.seq_len = original["max_seq_length"]
        built = build_model(config).config
        self.module = MultiHeadAttention(
            built.num_heads, softmax_fn=built.softmax_fn, gate=built.gate, output_projection=False
        )
        self.model = config.model
        self.params = self.ours(file.group(f"{name}/w"))
        self.hidden = jnp.asarray(file["in/hidden"])
        self.mask = jnp.asarray(file["in/mask_2d"])[:, None, None, :]

    def ours(self, tensors):
        """Weights, or gradients, under the original's names as our tree."""
        return attention_params(TensorReader(tensors), "", self.model.hidden_size, self.model)

    def context(self, params, hidden):
        return self.module.apply({"params": params}, hidden, self.mask)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> tuple[Variant, str, Golden]:
    file = golden("attention_bert")
    return Variant(file, request.param), request.param, file


def test_values_match_the_original(variant):
    ours, name, file = variant
    context, kept = ours.module.apply(
        {"params": ours.params},
        ours.hidden,
        ours.mask,
        capture_intermediates=lambda module, _: isinstance(module, (Site, Gate)),
        mutable=["intermediates", "stats"],
    )
    expected = file.group(f"{name}/out")
    captured = kept["intermediates"]
    assert deviation(context, expected["context"]) < FORWARD
    if "attn_probs" in expected:
        (probs,) = captured["probs"]["__call__"]
        assert deviation(probs, expected["attn_probs"]) < FORWARD
    if "last_gate_avg_prob" in expected:
        mean_BxH = np.asarray(kept["stats"]["gate"]["mean"])
        assert deviation(mean_BxH.mean(0), expected["last_gate_avg_prob"]) < FORWARD
    if "last_gate_all_probs" in expected:  # of conditional gates
        (factor_BxTxHx1,) = captured["gate"]["__call__"]
        probability_BxHxTx1 = jnp.swapaxes(factor_BxTxHx1, 1, 2) / ours.module.gate.scale
        assert deviation(probability_BxHxTx1, expected["last_gate_all_probs"]) < FORWARD


def test_gradients_match_the_original(variant):
    ours, name, file = variant
    _, backward = jax.vjp(ours.context, ours.params, ours.hidden)
    grads, grad_hidden = backward(jnp.asarray(file["in/cot"]))
    assert deviation(grad_hidden, file[f"{name}/grad_hidden"]) < BACKWARD

    # Tensors that the file leaves out are marked by NaN and not compared.
    weights, known = file.group(f"{name}/w"), file.group(f"{name}/grad")
    padded = {key: known.get(key, np.full(w.shape, np.nan)) for key, w in weights.items()}
    largest = max(np.abs(grad).max() for grad in known.values())
    for (path, actual), expected in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(ours.ours(padded)), strict=True
    ):
        compared = ~np.isnan(expected)
        if not compared.any():
            continue
        # A key bias shifts all scores of a row alike, so its exact gradient is 0 and both sides
        # hold rounding noise: it is compared on the scale of the other gradients.
        is_key_bias = "key" in str(path) and "bias" in str(path)
        scale = largest if is_key_bias else np.abs(expected[compared]).max()
        error = np.abs(np.asarray(actual)[compared] - expected[compared]).max()
        assert error < BACKWARD * scale, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def with_dropout(hidden):
    softmax_fn = make_softmax("clipped", gamma=-0.2)
    module = MultiHeadAttention(4, softmax_fn=softmax_fn, dropout_rate=0.5)
    return module, module.init(jax.random.key(0), hidden)


def test_dropout_comes_after_the_clip(with_dropout, hidden):
    module, variables = with_dropout
    _, kept = module.apply(
        variables,
        hidden,
        train=True,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda m, _: m.name == "probs" or isinstance(m, nn.Dropout),
        mutable=["intermediates"],
    )
    kept = kept["intermediates"]
    before, after = (np.asarray(kept[key]["__call__"][0]) for key in ("probs", "Dropout_0"))
    assert (before == 0.0).any()
    assert (before > 0.0).any()
    assert np.all(after[before == 0.0] == 0.0)
    survivors = after != 0.0
    assert 0 < survivors.sum() < (before > 0.0).sum()
    np.testing.assert_allclose(after[survivors], 2.0 * before[survivors], rtol=1e-6)


def test_dropout_needs_train_and_a_key(with_dropout, hidden):
    module, variables = with_dropout
    one, other = (
        module.apply(variables, hidden, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(module.apply(variables, hidden), module.apply(variables, hidden))
    with pytest.raises(Exception, match="dropout"):
        module.apply(variables, hidden, train=True)


def test_zero_share_counts_visible_keys_only(hidden):
    module = MultiHeadAttention(4, softmax_fn=make_softmax("clipped", gamma=-0.2))
    variables = module.init(jax.random.key(0), hidden)
    mask = jnp.arange(6)[None, None, None, :] < 4
    _, kept = module.apply(
        variables,
        hidden,
        mask,
        capture_intermediates=lambda m, _: m.name == "probs",
        mutable=["intermediates", "stats"],
    )
    probs = np.asarray(kept["intermediates"]["probs"]["__call__"][0])
    expected = (probs[..., :4] == 0.0).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(kept["stats"]["zero_share"], expected, rtol=1e-6)


def test_heads_must_divide_the_width(hidden):
    with pytest.raises(UserError, match="found 3 heads and hidden size 16"):
        MultiHeadAttention(3).init(jax.random.key(0), hidden)


def test_bfloat16_keeps_float32_params_and_probabilities(hidden):
    module = MultiHeadAttention(4, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), hidden)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    context, kept = module.apply(
        variables,
        hidden.astype(jnp.bfloat16),
        capture_intermediates=lambda m, _: m.name in ("scores", "probs"),
        mutable=["intermediates"],
    )
    assert context.dtype == jnp.bfloat16
    for name in ("scores", "probs"):
        assert kept["intermediates"][name]["__call__"][0].dtype == jnp.float32
