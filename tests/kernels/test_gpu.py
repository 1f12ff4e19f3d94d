"""The kernels for Hopper GPUs, without one: interpreted, lowered for CUDA, refused."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import pytest

from quantizable_flax.kernels import gpu
from quantizable_flax.kernels.attention import fused_attention
from quantizable_flax.kernels.scheme import Scheme
from tests.kernels.case import Case, cases, check_path, extras_of, operands
from tests.kernels.mosaic import interpreted

CLIPPED = Scheme(0.125, gamma=-0.03, zeta=1.03)
NARROW = Case(1, 1, dtype="bfloat16", width=64)
WIDE = NARROW._replace(width=128)
SINGLE = Scheme(0.125, -0.03, 1.03, causal=True, dropout_rate=0.1)

# The interpreter of JAX 0.10 reads nothing beyond the end of an array.
any_length = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 interprets whole tiles alone"
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            NARROW._replace(
                queries=128, keys=128, scheme=SINGLE, mask="segments", first=(3, 1, 4), batch=1
            ),
            marks=pytest.mark.slow,
        ),
        NARROW._replace(queries=128, keys=256, scheme=CLIPPED, mask="padding", sink=True, heads=1),
        *(
            pytest.param(case, marks=any_length)
            for case in (
                NARROW._replace(queries=300, keys=300, scheme=Scheme(0.125, causal=True), heads=1),
                WIDE._replace(queries=200, keys=140, scheme=SINGLE, first=(3, 1, 40), heads=1),
            )
        ),
    ],
    ids=range(4),
)
def test_interpreted_kernels_are_the_formula(case):
    with interpreted(detect_races=True):
        check_path("gpu", case)


@any_length
@pytest.mark.slow
def test_random_attentions_are_the_formula():
    @hypothesis.settings(max_examples=30, phases=(hypothesis.Phase.generate,), deadline=None)
    @hypothesis.given(case=cases(largest=500, dtype="bfloat16", width=64, batch=1))
    def check(case):
        with interpreted():
            check_path("gpu", case)

    check()


@pytest.mark.parametrize("case", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("scheme", [CLIPPED, SINGLE, Scheme(0.125)], ids=range(3))
def test_kernels_are_lowered_for_cuda(case, scheme):
    """As far as Python goes: layouts are found for every value in registers."""
    case = case._replace(queries=600, keys=600, scheme=scheme, mask="segments", sink=True)
    *inputs, d_out = operands(case)

    def both(*inputs):
        attend = functools.partial(fused_attention, "gpu", scheme, extras=extras_of(case))
        out, vjp = jax.vjp(attend, *inputs)
        return out, vjp(d_out)

    lowered = jax.jit(both).trace(*inputs).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("stablehlo.custom_call @mosaic_gpu") == 3


def test_what_is_not_supported_is_said_in_words():
    q = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    assert "Hopper" in gpu.supports(Scheme(), q, q, q)
