"""ViT's own promises: tokens, pixels, training targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import UserError, build_model
from quantizable_flax.models import vit
from quantizable_flax.models.build import with_config
from quantizable_flax.models.losses import smooth_targets
from quantizable_flax.training.optimizer import decay_mask
from tests.helpers import pairs
from tests.small import small_batch, small_config, small_model

BATCH = small_batch("vit")
IMAGES, LABELS = BATCH["images"], BATCH["labels"]


def embeddings(model, images):
    return model.embeddings(model.normalise(images), train=False)


def run(model, params, method, *arguments, **options):
    apply = functools.partial(model.apply, method=method, **options)
    return jax.jit(apply)({"params": params}, *arguments)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_registers_stand_behind_the_class_token_without_a_position():
    model, params = small_model("vit", num_registers=3)
    x = run(model, params, embeddings, IMAGES)
    assert x.shape == (3, 1 + 3 + 16, 32)
    assert model.config.num_tokens == 20
    tables = params["embeddings"]
    np.testing.assert_array_equal(x[0, 1:4], tables["register_tokens"])
    assert tables["position_table"].shape == (17, 32)
    cls = tables["cls_token"] + tables["position_table"][:1]
    np.testing.assert_array_equal(x[1, :1], cls)
    # Without them the other tokens are the same.
    del (rest := {**params, "embeddings": {**tables}})["embeddings"]["register_tokens"]
    plain = run(with_config(model, num_registers=0), rest, embeddings, IMAGES)
    np.testing.assert_array_equal(x[:, [0, *range(4, 20)]], plain)


def test_patch_layer_norm_comes_before_class_token_and_positions():
    model, params = small_model("vit", patch_layer_norm=True)
    tables, norm = params["embeddings"], params["embeddings"]["patch_layer_norm"]
    x = np.asarray(run(model, params, embeddings, IMAGES))
    tables, norm = jax.device_get((tables, norm))
    normed = (x[:, 1:] - tables["position_table"][1:] - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(normed.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(normed.std(-1), 1.0, rtol=1e-3)
    cls = tables["cls_token"] + tables["position_table"][:1]
    np.testing.assert_array_equal(x[:, :1], jnp.broadcast_to(cls, (3, 1, 32)))


def test_pixels_are_normalised_by_channel_and_floats_are_not():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = build_model(small_config("vit", pixel_mean=mean, pixel_std=std))
    by_hand = (np.asarray(IMAGES) / 255.0 - mean) / std
    # The division and the difference in float32: measured 2e-7.
    np.testing.assert_allclose(model.normalise(IMAGES), by_hand, atol=1e-6)
    floats = jnp.asarray(by_hand, jnp.float32)
    np.testing.assert_array_equal(model.normalise(floats), floats)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_wide_integers_are_the_same_pixels(dtype):
    model = build_model(small_config("vit"))
    pixels = np.asarray(IMAGES).astype(dtype)
    expected = model.normalise(IMAGES)
    for images in (pixels, jnp.asarray(pixels)):
        np.testing.assert_array_equal(model.normalise(images), expected)
    # What is no such pixel comes out as no number, in a compiled program too.
    pixels[0, 0, 0], pixels[1, 2, 3, 1] = (0, 255, 256), 65535
    found = np.asarray(jax.jit(model.normalise)(pixels))
    wrong = (pixels < 0) | (pixels > 255)
    assert wrong.sum() == 2
    np.testing.assert_array_equal(np.isnan(found), wrong)
    assert np.isnan(model.normalise(np.full(IMAGES.shape, -1, np.int32))).all()


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int16, np.complex64])
def test_pixels_of_another_scale_are_refused(dtype):
    model = build_model(small_config("vit"))
    with pytest.raises(UserError, match=f"0..255 as uint8 or int32.*found {np.dtype(dtype)}"):
        model.normalise(np.zeros(IMAGES.shape, dtype))


@pytest.mark.parametrize(
    "shape", [(2, 16, 12, 3), (2, 3, 16, 16), (2, 16, 16, 1), (2, 16, 16), (2, 1, 16, 16, 3)]
)
def test_images_of_another_shape_are_named(shape):
    model, params = small_model("vit")
    with pytest.raises(UserError, match=r"shape \[batch, 16, 16, 3\].*found \[2, "):
        model.apply({"params": params}, jnp.zeros(shape))


def test_alpha_counts_all_tokens():
    config = small_config("vit", {"softmax": "clipped", "alpha": 2.0}, num_registers=3)
    assert build_model(config).config.softmax.gamma == -2.0 / 20


def test_label_smoothing_is_for_training_alone():
    model, params = small_model("vit")
    smooth = with_config(model, label_smoothing=0.1)
    log_probs = log_softmax(run(model, params, None, IMAGES))
    own = -log_probs[np.arange(3), LABELS]
    evaluated = run(smooth, params, "loss", BATCH)
    trained = run(smooth, params, "loss", BATCH, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(evaluated.loss, own, rtol=1e-5)
    np.testing.assert_allclose(trained.loss, 0.9 * own - 0.1 * log_probs.mean(-1), rtol=1e-5)
    np.testing.assert_array_equal(evaluated.correct, log_probs.argmax(-1) == LABELS)


def test_mixing_is_for_training_alone():
    model, params = small_model("vit")
    mixing = with_config(model, mixup_alpha=0.8, cutmix_alpha=1.0)
    plain = run(model, params, "loss", BATCH).loss
    np.testing.assert_array_equal(run(mixing, params, "loss", BATCH).loss, plain)

    @jax.jit
    def trained(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return mixing.apply({"params": params}, BATCH, train=True, method="loss", rngs=rngs).loss

    np.testing.assert_array_equal(trained(0), trained(0))
    assert not np.array_equal(trained(0), trained(1))
    with pytest.raises(Exception, match="dropout"):
        mixing.apply({"params": params}, BATCH, train=True, method="loss")


def test_mixed_images_meet_mixed_targets(monkeypatch):
    model, params = small_model("vit")
    mixing = with_config(model, mixup_alpha=0.8, label_smoothing=0.1)
    mixed = jax.random.normal(jax.random.key(3), IMAGES.shape)
    monkeypatch.setattr(vit, "mix", lambda images, key, **options: (mixed, 0.3))
    rngs = {"dropout": jax.random.key(0)}
    actual = run(mixing, params, "loss", BATCH, train=True, rngs=rngs)
    targets = np.asarray(smooth_targets(LABELS, 5, 0.1), np.float64)
    log_probs = log_softmax(run(model, params, None, mixed))
    expected = -((0.3 * targets + 0.7 * targets[::-1]) * log_probs).sum(-1)
    np.testing.assert_allclose(actual.loss, expected, rtol=1e-5)


def test_mixing_sees_normalised_pixels_and_its_options(monkeypatch):
    model, params = small_model("vit")
    options = {
        "mixup_alpha": 0.8,
        "cutmix_alpha": 0.7,
        "mix_probability": 0.6,
        "cutmix_share": 0.4,
    }
    seen = {}

    def record(images, key, **given):
        seen.update(given)
        np.testing.assert_allclose(images, np.asarray(IMAGES) / 127.5 - 1.0, atol=1e-5)
        return images, 1.0

    monkeypatch.setattr(vit, "mix", record)
    mixing, rngs = with_config(model, **options), {"dropout": jax.random.key(0)}
    mixing.apply({"params": params}, BATCH, train=True, method="loss", rngs=rngs)
    assert seen == {"probability": options.pop("mix_probability"), **options}


def test_tables_biases_and_norms_are_not_decayed():
    _, params = small_model("vit", {"gate": "linear"}, num_registers=2, patch_layer_norm=True)
    kernels = {name for name, flag, _ in pairs(decay_mask(params), params) if flag}
    assert all(name.endswith("kernel") for name in kernels)
    assert {"head/kernel", "embeddings/patch_embedding/kernel"} < kernels
    assert len(kernels) == 2 + 6 + 1  # q, k, v, output, FFN in and out; the gate
