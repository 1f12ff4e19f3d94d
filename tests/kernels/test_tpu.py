"""Attention in TPU kernels: interpreted on this machine, and compiled for TPUs ahead of time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.kernels import attention, tpu, tpu_blocks_backward, tpu_plan
from quantizable_flax.kernels.scheme import NO_EXTRAS, Extras, Scheme
from quantizable_flax.kernels.tpu_call import interpreting
from tests.kernels.case import Case, cases, check_path

ROOT = Path(__file__).parents[2]
CLIPPED = Scheme(0.25, gamma=-0.03, zeta=1.03)
CAUSAL = Scheme(0.25, gamma=-0.03, zeta=1.03, causal=True, dropout_rate=0.1)


@pytest.fixture(params=["whole rows", "blocks", "blocks, queries apart"])
def layout(request, monkeypatch):
    """Kernels for short rows, and those for long ones at sizes of a test."""
    if request.param != "whole rows":
        small_blocks(monkeypatch, resident="apart" not in request.param)
    return request.param


def small_blocks(monkeypatch, *, resident=True):
    monkeypatch.setattr(tpu_plan, "WHOLE_ROWS", 0)
    monkeypatch.setattr(tpu_plan, "BLOCK", 128)
    if not resident:
        monkeypatch.setattr(tpu_blocks_backward, "RESIDENT", 0)


def check(case):
    with interpreting():
        check_path("tpu", case)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1),
        pytest.param(Case(40, 56, Scheme(0.3), heads=3, width=64), marks=pytest.mark.slow),
        Case(129, 700, CLIPPED, mask="segments", sink=True),
        Case(520, 520, CAUSAL, mask="padding", sink=True),
        pytest.param(
            Case(130, 100, Scheme(0.25, -0.03, causal=True, dropout_rate=0.5), first=(3, 1, 40)),
            marks=pytest.mark.slow,
        ),
        Case(300, 300, CAUSAL, "padding", True, dtype="bfloat16"),
        pytest.param(Case(60, 60, CLIPPED, width=80, heads=1), marks=pytest.mark.slow),
    ],
    ids=range(7),
)
def test_whole_rows_are_the_formula(case):
    check(case)


@pytest.mark.parametrize(
    ("case", "resident"),
    [
        pytest.param(
            *(Case(200, 300, Scheme(0.3), mask="segments", sink=True), True),
            marks=pytest.mark.slow,
        ),
        (Case(300, 300, CAUSAL, "padding", True), True),
        (Case(300, 200, Scheme(0.25, causal=True, dropout_rate=0.5), first=(3, 1, 40)), False),
        (Case(300, 300, CLIPPED, "padding", dtype="bfloat16"), False),
    ],
    ids=range(4),
)
def test_small_blocks_are_the_formula(case, resident, monkeypatch):
    small_blocks(monkeypatch, resident=resident)
    check(case)


def test_a_long_sequence_is_the_formula():
    case = Case(1100, 1100, CAUSAL, batch=1, heads=1)
    assert not plan(case).whole_rows
    check(case)


@pytest.mark.slow
def test_random_attentions_are_the_formula():
    @hypothesis.settings(max_examples=40, phases=(hypothesis.Phase.generate,), deadline=None)
    @hypothesis.given(case=cases())
    def run(case):
        check(case)

    run()


@pytest.mark.slow
def test_random_attentions_in_small_blocks_are_the_formula(monkeypatch):
    small_blocks(monkeypatch)

    @hypothesis.settings(max_examples=24, phases=(hypothesis.Phase.generate,), deadline=None)
    @hypothesis.given(case=cases(largest=600))
    def run(case):
        # By way of U, of the precision of the values, gradients of few entries cancel less exactly.
        hypothesis.assume(min(case.queries, case.keys) > 16)
        check(case)

    run()


@pytest.mark.parametrize("first", [None, (3, 1, 40)])
def test_dropout_drops_the_same_entries(first, layout):
    """Zeros of the weights, which the identity as values shows."""
    keys = 256
    scheme = Scheme(dropout_rate=0.3)
    extras = Extras(
        seed=jnp.array([2**31 + 5, 2**32 - 1], jnp.uint32),
        first=None if first is None else jnp.array(first, jnp.int32),
    )
    q, k = jnp.zeros((1, 130, 2, keys)), jnp.zeros((1, keys, 2, keys))
    v = jnp.broadcast_to(jnp.eye(keys)[None, :, None], k.shape)
    kept = [np.asarray(forward(path, scheme, q, k, v, extras)) > 0 for path in ("blockwise", "tpu")]
    np.testing.assert_array_equal(*kept)
    assert kept[0].mean() == pytest.approx(0.7, abs=0.02)


def forward(path, *arguments):
    with interpreting():
        return attention.fused_attention(path, *arguments)


def test_clipped_entries_pass_no_gradient(layout):
    """Rows clipped to 0 throughout give none to queries, keys and values: exactly."""
    scheme = Scheme(0.25, gamma=-1.0)  # 2 P - 1 is below 0 unless one key has half of the row
    q, k, v = (0.1 * jax.random.normal(jax.random.key(i), (1, 140, 2, 16)) for i in range(3))
    out, vjp = jax.vjp(lambda *a: forward("tpu", scheme, *a), q, k, v)
    with interpreting():
        gradients = vjp(jnp.ones_like(out))
    for x in (out, *gradients):
        np.testing.assert_array_equal(x, 0.0)


def plan(case):
    q, k = (
        jax.ShapeDtypeStruct((case.batch, n, case.heads, case.width), case.dtype)
        for n in (case.queries, case.keys)
    )
    return tpu_plan.plan_of(case.scheme, q, k, NO_EXTRAS)


def test_sizes_of_blocks():
    short = plan(Case(128, 128, CLIPPED, width=64, heads=12, dtype="bfloat16"))
    assert (short.step_heads, short.grid) == (12, (2, 1, 1, 1))
    image = plan(Case(197, 197, CLIPPED, width=64, heads=6, dtype="bfloat16"))
    assert (image.block_q, image.block_k, image.grid) == (256, 256, (2, 3, 1, 1))
    causal = plan(Case(512, 512, CAUSAL, width=64, heads=12, dtype="bfloat16"))
    assert causal.prefixes() == [256, 512]
    assert causal.entries() == 256 * (256 + 512)
    long = plan(Case(4096, 4096, CAUSAL, width=64, dtype="bfloat16"))
    assert (long.whole_rows, long.block_q, long.block_k) == (False, 256, 512)
    assert long.entries() == 512 * 512 * 8 * 9 // 2


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(8, 8), None),
        (Case(8, 8, dtype="float16"), "operands are not all float32 or bfloat16 (found float16)"),
        (Case(8, 8, width=300), "heads are wider than 256 (found 300)"),
    ],
    ids=range(3),
)
def test_what_is_not_supported(case, reason):
    q, k = (jnp.zeros((1, n, 1, case.width), case.dtype) for n in (case.queries, case.keys))
    found = tpu.supports(case.scheme, q, k, k)
    assert found is None if reason is None else reason in found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("slice_name", ["v5e:2x2", "v6e:2x2"])
def test_kernels_compile_for_tpus(slice_name):
    """Ahead of time; in a process of its own, for its environment."""
    command = [sys.executable, "-m", "tests.kernels.tpu_programs", slice_name]
    # Not all flags of the tests are known to the compiler for TPUs.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) >= 4
    for name, program in found.items():
        assert program["kernels"] == 2, name  # forward, backward
        # What is kept between them is linear in the length.
        assert program["temporaries"] < 3 * program["operands"], name
        assert program["temporaries"] < program["scores"] / 2, name
