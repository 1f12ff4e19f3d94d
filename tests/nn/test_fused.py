"""Which program computes an attention, and that it does not matter which."""

import json
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import (
    GateConfig,
    Mask,
    MultiHeadAttention,
    QuantSpec,
    UserError,
    make_softmax,
)
from quantizable_flax.nn.fused import choose
from quantizable_flax.nn.softmax import clipped_softmax
from quantizable_flax.quantization.sites import PENALTY, STATS
from tests.training.hosts import with_devices

VANILLA = make_softmax()
CLIPPED = make_softmax("clipped", gamma=-0.1, zeta=1.05)
MASK = Mask(jnp.arange(6)[None] < jnp.array([[4], [6]]), causal=True)
Q = jnp.zeros((2, 6, 4, 4))
LONG = jnp.zeros((1, 1024, 1, 4))  # by blocks on every platform


@pytest.mark.parametrize(
    ("softmax", "mask", "path"),
    [
        (CLIPPED, None, "blockwise"),
        (CLIPPED, MASK, "blockwise"),
        (make_softmax(sink="learned"), MASK, "blockwise"),
        # What no fused program can do.
        (CLIPPED, jnp.ones((2, 1, 6, 6), bool), "unfused"),
        (lambda scores, mask: nn.softmax(scores), None, "unfused"),
        (make_softmax(blind_queries="uniform"), MASK, "unfused"),
        (make_softmax(blind_queries="uniform"), None, "blockwise"),
        (make_softmax("clipped", alpha=0.5, length_normalised=True), MASK, "blockwise"),
    ],
)
def test_what_can_be_fused_is(softmax, mask, path):
    assert choose("auto", softmax, mask, Q, LONG, LONG) == path
    assert choose("unfused", softmax, mask, Q, LONG, LONG) == "unfused"


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_take_blocks_for_long_sequences(monkeypatch, platform):
    monkeypatch.setattr("quantizable_flax.nn.fused.platform", lambda: platform)
    assert choose("auto", VANILLA, MASK, Q, Q, Q) == "unfused"
    assert choose("auto", CLIPPED, MASK, Q, LONG, LONG) == "blockwise"
    assert choose("blockwise", CLIPPED, MASK, Q, Q, Q) == "blockwise"


def test_a_cpu_takes_blocks_at_any_length_but_for_clipping_few_keys():
    keys = jnp.zeros((2, 511, 4, 4)), jnp.zeros((2, 512, 4, 4))
    assert [choose("auto", VANILLA, MASK, Q, k, k) for k in (Q, *keys)] == ["blockwise"] * 3
    found = [choose("auto", CLIPPED, MASK, Q, k, k) for k in (Q, *keys)]
    assert found == ["unfused", "unfused", "blockwise"]


@pytest.mark.parametrize(
    ("kernel", "mask", "sentence"),
    [
        ("tpu", None, "attention_kernel=tpu: needs a TPU, found cpu; choose auto"),
        ("gpu", None, "attention_kernel=gpu: needs a GPU, found cpu"),
        ("blockwise", jnp.ones((6, 6)), "cannot compute a mask that is an array"),
        ("flash", None, "attention_kernel must be one of auto, .*'flash'"),
    ],
)
def test_what_is_asked_for_by_name_and_is_not_here(kernel, mask, sentence):
    with pytest.raises(UserError, match=sentence):
        choose(kernel, CLIPPED, mask, Q, Q, Q)


@pytest.mark.parametrize("kernel", ["gpu", "tpu", "cudnn"])
def test_hardware_kernels_refuse_gammas_of_rows_and_auto_does_not(monkeypatch, kernel):
    platform = "tpu" if kernel == "tpu" else "gpu"
    monkeypatch.setattr("quantizable_flax.nn.fused.platform", lambda: platform)
    by_row = make_softmax("clipped", alpha=0.5, length_normalised=True)
    long = jnp.zeros((1, 1024, 1, 4))
    with pytest.raises(UserError, match=f"={kernel}: cannot compute length-normalised clipping"):
        choose(kernel, by_row, None, long, long, long)
    assert choose("auto", by_row, None, long, long, long) == "blockwise"


@pytest.mark.parametrize("mask", [None, Mask(MASK.visible_BxS), MASK], ids=["all", "keys", "both"])
@pytest.mark.parametrize("sink", ["none", "zero", "learned"])
@pytest.mark.parametrize("gate", [None, GateConfig("linear")], ids=["", "gate"])
def test_the_module_computes_the_same_by_either(hidden, mask, sink, gate):
    softmax = make_softmax("clipped", gamma=-0.1, zeta=1.05, sink=sink)
    fused = MultiHeadAttention(4, softmax=softmax, gate=gate, kernel="blockwise")
    params = nn.meta.unbox(fused.init(jax.random.key(0), hidden, mask))["params"]
    noise = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), params)
    assert ("sink" in params) == (sink == "learned")

    def gradients(module, mask):
        return jax.value_and_grad(
            lambda params: jnp.sum(module.apply({"params": params}, hidden, mask) ** 2)
        )(params)

    found = gradients(fused, mask)
    for other, its_mask in (
        (fused.clone(kernel="unfused"), mask),
        # An array of the same meaning goes by the whole matrices too.
        (fused.clone(kernel="auto"), None if mask is None else mask.dense(6, 6)),
    ):
        expected = gradients(other, its_mask)
        # float32 sums in another order; the gradient of the key's bias is 0 but for rounding
        atol = 1e-6 * max(np.abs(x).max() for x in jax.tree.leaves(expected))
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=atol)


def scores_in(module, hidden, mutable=(), **collections) -> bool:
    """Whether the program, before XLA sees it, divides scores by sqrt(d): only the unfused does."""
    params = nn.meta.unbox(module.init(jax.random.key(0), hidden))["params"]

    def run(params):
        return module.apply({"params": params, **collections}, hidden, mutable=list(mutable))

    return bool(re.search(r"divide .*tensor<2x4x6x6xf32>", jax.jit(run).lower(params).as_text()))


def test_what_is_measured_or_quantized_is_unfused(hidden):
    module = MultiHeadAttention(4, softmax=VANILLA)
    # blockwise scales by a product, so that the division tells the two apart
    assert not scores_in(module, hidden)
    assert scores_in(module.clone(kernel="unfused"), hidden)
    assert scores_in(module, hidden, [STATS])
    assert scores_in(module, hidden, ["intermediates"])
    assert scores_in(module.clone(quant=QuantSpec()), hidden, ["ranges"])
    limit = {"probs": {"limit": jnp.float32(1.0)}}
    assert not scores_in(module, hidden, **{PENALTY: {"output": limit["probs"]}})


def test_dropout_of_the_fused_program(hidden):
    """Expectation and share of zeros are those of the rate; a key gives one mask."""
    module = MultiHeadAttention(
        4, softmax=CLIPPED, dropout_rate=0.25, output_projection=False, kernel="blockwise"
    )
    params = nn.meta.unbox(module.init(jax.random.key(0), hidden))["params"]

    @jax.jit
    def run(key):
        return module.apply({"params": params}, hidden, train=True, rngs={"dropout": key})

    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 1e-4
    mean = np.mean([run(jax.random.key(i)) for i in range(400)], axis=0)
    clean = module.apply({"params": params}, hidden)
    # The mean of 400 draws: one entry's deviation is at most 0.03 of the largest, 4 sigma here.
    np.testing.assert_allclose(mean, clean, rtol=0, atol=0.12 * np.abs(clean).max())


def test_sinks_take_their_share():
    scores = jax.random.normal(jax.random.key(0), (2, 3, 5, 7)) * 3
    sink = jnp.array([-1.0, 0.0, 2.0])
    exps = np.exp(np.asarray(scores, np.float64))
    total = exps.sum(-1, keepdims=True) + np.exp(np.asarray(sink, np.float64))[:, None, None]
    expected = np.clip(1.1 * exps / total - 0.05, 0, 1)
    found = clipped_softmax(scores, gamma=-0.05, zeta=1.05, sink=sink[:, None, None])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    softmax1 = make_softmax(sink="zero")(scores)
    np.testing.assert_allclose(softmax1, exps / (1 + exps.sum(-1, keepdims=True)), atol=1e-6)


def test_sinks_that_are_missing_or_too_many():
    scores = jnp.zeros((1, 2, 3, 3))
    with pytest.raises(UserError, match="needs the logits of its sinks"):
        make_softmax(sink="learned")(scores)
    with pytest.raises(UserError, match=r"belong to sink='learned', found sink='zero'"):
        make_softmax(sink="zero")(scores, None, jnp.zeros(2))
    with pytest.raises(UserError, match="sink must be one of none, zero, learned"):
        make_softmax(sink="one")


def test_parts_of_a_mesh_are_the_whole():
    """Values, gradients and dropout of every split of batch, sequence and heads, sinks included."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.nn.fused_mesh"],
        cwd=Path(__file__).parents[2],
        env=with_devices(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 6
    for mesh, difference in differences.items():
        assert difference < 1e-5, mesh  # sums over devices in another order
