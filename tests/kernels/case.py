"""A random attention, and its comparison with the float64 formula."""

from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from quantizable_flax.kernels.attention import fused_attention
from quantizable_flax.kernels.scheme import Extras, Scheme
from quantizable_flax.nn.mask import Mask
from tests.kernels.reference import on_the_edge, unfused

# Relative to the largest entry of the exact result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Case(NamedTuple):
    """Sizes and switches of one attention."""

    queries: int
    keys: int
    scheme: Scheme = Scheme(scale=0.25)
    mask: str = "none"  # none, padding, segments
    sink: bool = False
    first: tuple[int, int, int] | None = None
    dtype: str = "float32"
    batch: int = 2
    heads: int = 2
    width: int = 16
    seed: int = 0


def extras_of(case: Case) -> Extras:
    rng = np.random.default_rng(case.seed + 1)
    ids: tuple = (None, None)
    if case.mask == "padding":  # the first row of the batch sees nothing
        shown = jnp.asarray(rng.random((case.batch, case.keys)) < 0.6).at[0].set(False)
        ids = Mask(shown).extras(case.batch, case.queries, case.keys)[:2]
    elif case.mask == "segments":
        ids = tuple(
            jnp.asarray(np.sort(rng.integers(-1, 3, (case.batch, n)), axis=1), jnp.int32)
            for n in (case.queries, case.keys)
        )
    return Extras(
        *ids,
        sink=jnp.asarray(rng.normal(size=case.heads), jnp.float32) if case.sink else None,
        seed=jnp.array([case.seed, 7], jnp.uint32) if case.scheme.dropout_rate else None,
        first=None if case.first is None else jnp.array(case.first, jnp.int32),
    )


def operands(case: Case):
    """q, k, v and the gradient of the result; scores of a spread that fills rows and empties."""
    rng = np.random.default_rng(case.seed)
    shapes = [(case.batch, n, case.heads, case.width) for n in (case.queries, case.keys)]
    arrays = [rng.normal(size=shapes[i]) for i in (0, 1, 1, 0)]
    return [jnp.asarray(x, case.dtype) for x in arrays]


def check_path(path: str, case: Case) -> None:
    """Asserts that values and gradients are those of the formula."""
    *inputs, d_out = operands(case)
    extras = extras_of(case)
    with jax.enable_x64(True):
        exact = [None if x is None else jnp.asarray(x, jnp.float64) for x in (*inputs, extras.sink)]
        edge = on_the_edge(case.scheme, *exact[:2], extras)
        if hypothesis.currently_in_test_context():  # keys that are seen alone lie there
            hypothesis.assume(edge.mean() < 0.02)
        assert edge.mean() < 0.02
        d_out = jnp.where(edge, 0, d_out)
        expected, expected_vjp = jax.vjp(
            lambda *a: unfused(case.scheme, *a[:3], extras._replace(sink=a[3])), *exact
        )
        expected = (expected, *expected_vjp(jnp.asarray(d_out, jnp.float64)))
        expected = [None if x is None else np.asarray(x) for x in expected]
    found, found_vjp = jax.vjp(
        lambda *a: fused_attention(path, case.scheme, *a[:3], extras._replace(sink=a[3])),
        *inputs,
        extras.sink,
    )
    found = (found, *found_vjp(d_out))
    for name, one, other in zip(
        ("out", "d_q", "d_k", "d_v", "d_sink"), found, expected, strict=True
    ):
        if other is None:
            assert one is None
            continue
        dtype = jnp.float32 if name == "d_sink" else case.dtype
        assert one.dtype == dtype
        atol = TOLERANCE[case.dtype] * max(np.abs(other).max(), 1e-3)
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, rtol=0, atol=atol, err_msg=f"{name} of {case}"
        )


@st.composite
def cases(draw, largest: int = 1500, **fixed) -> Case:
    """Any attention; fields in `fixed` are as given."""
    length = st.one_of(st.integers(1, 160), st.integers(1, largest))
    queries = draw(length)
    scheme = Scheme(
        scale=draw(st.sampled_from([0.25, 1.0])),
        gamma=draw(st.sampled_from([0.0, -0.003, -0.03, -0.3])),
        zeta=draw(st.sampled_from([1.0, 1.003, 1.3])),
        causal=draw(st.booleans()),
        dropout_rate=draw(st.sampled_from([0.0, 0.1, 0.6])),
    )
    drawn = {
        "mask": draw(st.sampled_from(["none", "padding", "segments"])),
        "sink": draw(st.booleans()),
        "first": draw(st.sampled_from([None, (1, 2, 5)])),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "seed": draw(st.integers(0, 9)),
    }
    keys = draw(st.one_of(st.just(queries), length))
    return Case(queries, keys, scheme, **{**drawn, **fixed})
