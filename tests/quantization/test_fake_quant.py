"""Grids, codes and straight-through gradients against the original, and their own promises."""

import re

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from quantizable_flax.quantization.grid import make_grid
from quantizable_flax.quantization.tensor import fake_quantize, quantize
from tests.helpers import golden

FILE = golden("quantizers")
CASES = sorted(key.removesuffix("/scale") for key in FILE if key.endswith("/scale"))
TENSORS = sorted({case.split("/")[0] for case in CASES} - {"ties"})


def codes_of(x, grid):
    return quantize(x, grid).codes + grid.zero_point


@jax.jit
def run(x, grid, cot):
    out, backward = jax.vjp(lambda x: fake_quantize(x, grid), x)
    return codes_of(x, grid), out, backward(cot)[0]


def grid_of(kind: str, low, high):
    sign, bits = re.fullmatch(r"(a?sym)(\d+)", kind).groups()
    return make_grid(jnp.asarray(low), jnp.asarray(high), int(bits), symmetric=sign == "sym")


def check(case: str, x, grid, cot=None) -> None:
    codes, out, grad = run(x, grid, jnp.zeros_like(x) if cot is None else cot)
    scale = FILE[f"{case}/scale"]
    np.testing.assert_allclose(np.ravel(grid.scale), np.ravel(scale), rtol=1e-6, err_msg=case)
    # The original keeps a single zero point for all channels of a symmetric grid.
    assert np.all(np.ravel(grid.zero_point) == np.ravel(FILE[f"{case}/zero_point"])), case
    if f"{case}/int" in FILE:
        # Not one integer may differ, half-way cases included: measured 0 of 62784.
        np.testing.assert_array_equal(codes, FILE[f"{case}/int"], err_msg=case)
    if f"{case}/out" in FILE:
        np.testing.assert_allclose(out, FILE[f"{case}/out"], rtol=1e-6, err_msg=case)
    if f"{case}/grad_x" in FILE:
        # Passed or blocked must agree exactly; the original also multiplies and divides by scale.
        np.testing.assert_allclose(grad, FILE[f"{case}/grad_x"], rtol=1e-6, err_msg=case)


@pytest.mark.parametrize("tensor", TENSORS)
def test_grids_codes_and_gradients_match(tensor):
    x, cot = jnp.asarray(FILE[f"in/{tensor}"]), jnp.asarray(FILE[f"cot/{tensor}"])
    for case in CASES:
        name, kind, *rest = case.split("/")
        if name != tensor:
            continue
        shape = (-1,) + (1,) * (x.ndim - 1) if rest[0] == "pc" else ()
        low, high = (FILE[f"{case}/x_{end}"].reshape(shape) for end in ("min", "max"))
        check(case, x, grid_of(kind, low, high), cot)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("ties/")])
def test_ties_round_half_to_even(case):
    _, index, kind = case.split("/")
    low, high = np.float32(FILE.config["ties_ranges"][int(index)])
    check(case, jnp.asarray(FILE[f"{case}/x"]), grid_of(kind, low, high))


FLOATS = st.floats(-1e4, 1e4, width=32)
BITS = st.integers(2, 16)


@hypothesis.given(
    x=hnp.arrays(np.float32, 32, elements=FLOATS), low=FLOATS, width=st.floats(0, 1e4), bits=BITS
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_within_half_a_step_inside_the_range(symmetric, x, low, width, bits):
    grid = make_grid(jnp.float32(low), jnp.float32(low + width), bits, symmetric=symmetric)
    codes, out, _ = run(jnp.asarray(x), grid, jnp.zeros(32))
    codes, out, scale = (np.asarray(a, np.float64) for a in (codes, out, grid.scale))
    assert np.all(codes == np.round(codes))
    assert np.all((codes >= grid.lower) & (codes <= grid.upper))
    lowest, highest = ((bound - np.float64(grid.zero_point)) * scale for bound in grid[2:])
    inside = (x >= lowest) & (x <= highest)
    slack = 1e-6 * np.maximum(np.abs(x), scale)
    assert np.all(np.abs(out - x)[inside] <= 0.5 * scale + slack[inside])


@hypothesis.given(x=hnp.arrays(np.float32, 32, elements=FLOATS), bits=BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantizing_twice_changes_nothing(symmetric, x, bits):
    grid = make_grid(jnp.float32(x.min()), jnp.float32(x.max()), bits, symmetric=symmetric)
    codes, once, _ = run(jnp.asarray(x), grid, jnp.zeros(32))
    np.testing.assert_array_equal(codes_of(once, grid), codes)


@hypothesis.given(low=FLOATS, width=st.floats(0, 1e4), bits=BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid(symmetric, low, width, bits):
    grid = make_grid(jnp.float32(low), jnp.float32(low + width), bits, symmetric=symmetric)
    assert fake_quantize(jnp.zeros(()), grid) == 0.0
    assert grid.scale > 0.0


def test_symmetric_grid_is_unsigned_without_negative_values():
    grid = make_grid(jnp.float32(0.1), jnp.float32(2.0), 8, symmetric=True)
    assert (grid.lower, grid.upper) == (0.0, 255.0)
    np.testing.assert_allclose(grid.scale, 2.0 / 255)


def test_one_negative_channel_makes_all_channels_signed():
    grid = make_grid(jnp.array([-1.0, 0.5]), jnp.array([1.0, 2.0]), 8, symmetric=True)
    assert (grid.lower, grid.upper) == (-128.0, 127.0)


def test_dtype_is_kept_and_gradients_stop_outside_the_range():
    def total(x):
        return jnp.sum(fake_quantize(x, make_grid(*map(jnp.float32, (-1, 1)), 8, symmetric=False)))

    x = jnp.linspace(-2.0, 2.0, 9).astype(jnp.bfloat16)
    grad = jax.grad(total)(x)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad, np.abs(np.linspace(-2.0, 2.0, 9)) <= 1.0)
