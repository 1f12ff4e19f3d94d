"""What holds for every family: initialisation, dtypes, dropout, and what a registry refuses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import UserError, build_model
from quantizable_flax.models.build import check_length, with_config
from tests.helpers import is_key_bias, pairs
from tests.small import FAMILIES, small_batch, small_config, small_model


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def scores_and_logits(model, params, batch):
    """The model's scores and its logits, without dropout."""
    inputs = {key: x for key, x in batch.items() if key != "labels"}

    def outputs(model, batch):
        return model.loss(batch), model(*inputs.values())

    return jax.jit(functools.partial(model.apply, method=outputs))({"params": params}, batch)


def test_initial_weights_are_normal_and_layer_norms_are_one(family):
    model = build_model(small_config(family, hidden_size=64, initializer_range=0.05))
    init = jax.jit(functools.partial(model.init, method="loss"))
    params = nn.meta.unbox(init(jax.random.key(1), small_batch(family)))["params"]
    for name, x, _ in pairs(params, params):
        if name.endswith("bias"):
            assert np.all(x == 0.0), name
        elif name.endswith("scale"):
            assert np.all(x == 1.0), name
        else:
            # The sampling error of a standard deviation is 1 / sqrt(2 n) of it: five of them.
            tolerance = 5.0 / np.sqrt(2.0 * x.size)
            np.testing.assert_allclose(np.std(x), 0.05, rtol=tolerance, err_msg=name)
            assert abs(np.mean(x)) < 5.0 * 0.05 / np.sqrt(x.size), name


def test_bfloat16_computes_close_to_float32_with_float32_params(family):
    model, params = small_model(family)
    half, batch = with_config(model, dtype=jnp.bfloat16), small_batch(family)
    fresh = jax.eval_shape(functools.partial(half.init, method="loss"), jax.random.key(0), batch)
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    scores, logits = scores_and_logits(half, params, batch)
    expected, exact = scores_and_logits(model, params, batch)
    assert {x.dtype for x in (*scores, logits)} == {jnp.dtype("float32")}
    # bfloat16 keeps 8 bits: 0.4 % a rounding, over some ten roundings in a row.
    assert 0.0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
    np.testing.assert_allclose(scores.loss, expected.loss, rtol=0.03)
    np.testing.assert_array_equal(scores.weight, expected.weight)


def test_dropout_acts_in_training_only(family):
    model, params = small_model(family)
    model, batch = (
        with_config(model, hidden_dropout=0.5, attention_dropout=0.5),
        small_batch(family),
    )

    def total(train, **options):
        return model.apply({"params": params}, batch, train=train, method="loss", **options).loss

    noisy = jax.jit(lambda seed: total(True, rngs={"dropout": jax.random.key(seed)}))
    assert not np.array_equal(noisy(0), noisy(1))
    np.testing.assert_array_equal(noisy(0), noisy(0))
    programs = [str(jax.make_jaxpr(f)()) for f in (lambda: total(False), lambda: noisy(0))]
    assert ["random_bits" in program for program in programs] == [False, True]
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: total(True))


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_is_the_opposite_of_train(family):
    model, params = small_model(family)
    model = with_config(model, hidden_dropout=0.5)
    inputs = small_batch(family)["images" if family == "vit" else "input_ids"]

    def program(**options) -> str:
        rngs = {"dropout": jax.random.key(0)}
        return str(
            jax.make_jaxpr(lambda: model.apply({"params": params}, inputs, rngs=rngs, **options))()
        )

    assert program(deterministic=False) == program(train=True) != program()
    assert program(deterministic=True) == program(train=False) == program()
    with pytest.raises(UserError, match="found train=True and deterministic=True"):
        program(train=True, deterministic=True)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("bert", {"name": "bret"}, r"found 'bret' \(did you mean 'bert'"),
        ("bert", {"name": "opt"}, r"another family \(it has model.head\)"),
        ("bert", {"dtype": "float16"}, "one of float32, bfloat16, found 'float16'"),
        ("bert", {"num_heads": 5}, "found 5 heads and hidden size 32"),
        ("bert", {"num_layers": 0}, "num_layers must be at least 1, found 0"),
        ("opt", {"hidden_dropout": 1.0}, r"hidden_dropout must be in \[0, 1\), found 1.0"),
        ("opt", {"initializer_range": 0.0}, "initializer_range must be above 0, found 0.0"),
        ("vit", {"num_classes": -1}, "num_classes must not be negative, found -1"),
        ("vit", {"patch_size": 5}, "patch_size must divide model.image_size, found 5 and 16"),
        ("vit", {"pixel_mean": (0.5,)}, r"pixel_mean must have one value for each of the 3"),
        ("vit", {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], found 1.5"),
        ("vit", {"mixup_alpha": -0.5}, "mixup_alpha must not be negative, found -0.5"),
        ("vit", {"num_registers": -1}, "num_registers must not be negative, found -1"),
    ],
)
def test_configurations_that_do_not_fit_are_named(family, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        build_model(small_config(family, **changes))


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_sequences_longer_than_the_positions_are_refused(family):
    config = small_config(family, max_position_embeddings=8)
    with pytest.raises(UserError, match="found 12 and 8"):
        check_length(config)
    # Without the check the lookup would repeat the last position in silence.
    model = build_model(config)
    with pytest.raises(UserError, match="8 positions, found sequences of 12 tokens"):
        model.init(jax.random.key(0), jnp.zeros((1, 12), jnp.int32))


@pytest.mark.parametrize(("family", "pad"), [("bert", 0), ("opt", 1)])
def test_pad_embedding_gets_no_gradient_from_the_lookup(family, pad):
    model, params = small_model(family)
    ids = small_batch(family)["input_ids"].at[:, 6:].set(pad)

    def hidden_sum(params):
        x = model.apply({"params": params}, ids, method="encode")
        return jnp.sum(x * jnp.arange(32.0)[None, None])

    grad = jax.jit(jax.grad(hidden_sum))(params)["embeddings"]["word"]["embedding"]
    assert np.all(np.asarray(grad[pad]) == 0.0)
    assert np.abs(grad[int(ids[0, 0])]).max() > 0.0


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_only_words_are_looked_up_where_nothing_is_masked(family):
    """Positions and token types are slices: their gradients add up without a scatter."""
    model, params = small_model(family)
    batch = small_batch(family)
    shown = {**batch, "attention_mask": jnp.ones_like(batch["input_ids"])}

    def total(params, batch):
        return jnp.sum(model.apply({"params": params}, batch, method="loss").loss)

    gradient = jax.jit(jax.grad(total))
    # Besides that of the words, one into the logits: a CPU picks those of the labels.
    assert gradient.lower(params, batch).as_text().count('"stablehlo.scatter"') == 2
    for name, plain, masked in pairs(gradient(params, batch), gradient(params, shown)):
        if is_key_bias(name):
            continue
        # The same sums in another order: a few roundings of the largest.
        tolerance = 1e-5 * np.abs(masked).max()
        np.testing.assert_allclose(plain, masked, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_an_empty_batch_has_an_empty_loss(family):
    model, params = small_model(family)
    batch = jax.tree.map(lambda x: x[:0], small_batch(family))
    assert model.apply({"params": params}, batch["input_ids"]).shape == (0, 12, 96)
    scores = model.apply({"params": params}, batch, method="loss")
    assert scores.loss.shape == (0,)
    assert scores.total == 0.0
