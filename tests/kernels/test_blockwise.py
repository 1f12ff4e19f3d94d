"""Attention in blocks: values, gradients, memory."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.kernels.attention import fused_attention
from quantizable_flax.kernels.scheme import Extras, Scheme
from tests.kernels.case import Case, cases, check_path
from tests.kernels.reference import unfused

CLIPPED = Scheme(0.25, gamma=-0.03, zeta=1.03)


@pytest.mark.parametrize("examples", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_random_attentions_are_the_formula(examples):
    @hypothesis.settings(max_examples=examples, phases=(hypothesis.Phase.generate,), deadline=None)
    @hypothesis.given(case=cases())
    def check(case):
        check_path("blockwise", case)

    check()


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1),
        Case(7, 7, CLIPPED),
        pytest.param(Case(129, 1500, CLIPPED, mask="segments"), marks=pytest.mark.slow),
        Case(
            1100, 1100, Scheme(0.25, -0.003, 1.003, causal=True, dropout_rate=0.1), "padding", True
        ),
        pytest.param(
            Case(300, 200, Scheme(0.25, -0.03, causal=True, dropout_rate=0.5), first=(3, 1, 40)),
            marks=pytest.mark.slow,
        ),
        Case(300, 300, Scheme(0.25, -0.03, 1.03, True, 0.1), "padding", True, dtype="bfloat16"),
        # Each row's own gamma; six blocks of queries that look at different numbers of keys.
        Case(700, 700, Scheme(1.0, zeta=1.01, causal=True, alpha=0.6), "padding", True),
        Case(150, 90, Scheme(0.25, alpha=2.0, dropout_rate=0.1), "segments"),
        Case(150, 90, Scheme(0.25, alpha=2.0)),
    ],
    ids=range(9),
)
def test_named_attentions_are_the_formula(case):
    check_path("blockwise", case)


def test_clipped_entries_pass_no_gradient():
    """Rows clipped to 0 throughout give none to queries, keys and values: exactly."""
    scheme = Scheme(0.25, gamma=-1.0)  # 2 P - 1 is below 0 unless one key has half of the row
    q, k, v = (0.1 * jax.random.normal(jax.random.key(i), (1, 40, 2, 16)) for i in range(3))
    out, vjp = jax.vjp(lambda *a: fused_attention("blockwise", scheme, *a), q, k, v)
    for x in (out, *vjp(jnp.ones_like(out))):
        np.testing.assert_array_equal(x, 0.0)


def temporaries(attend, length: int) -> int:
    shape = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    gradients = jax.grad(lambda *a: jnp.sum(attend(*a)), argnums=(0, 1, 2))
    return jax.jit(gradients).lower(*(shape,) * 3).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly():
    def blockwise(*a):
        return fused_attention("blockwise", CLIPPED, *a)

    def whole(*a):
        return unfused(CLIPPED, *a, Extras())

    sizes = [temporaries(blockwise, n) for n in (1024, 2048, 4096, 8192)]
    for one, other in itertools.pairwise(sizes):
        assert other < 2.1 * one
    assert sizes[-1] < temporaries(whole, 8192) / 20
