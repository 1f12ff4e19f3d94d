"""Products of tensors on grids against sums of integers in numpy."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from quantizable_flax.quantization.grid import Grid, asymmetric_grid, make_grid, symmetric_grid
from quantizable_flax.quantization.tensor import (
    Quantized,
    as_rows,
    product,
    quantize,
    quantize_int8,
    split_last,
    values,
)

# Each equation of the models with the shapes of its operands, and the same with `...` spelled out.
LETTERS = "NDFVBTSHK"
EQUATIONS = {
    "ND,DF->NF": "ND,DF->NF",
    "ND,VD->NV": "ND,VD->NV",
    "...THK,...SHK->...HTS": "BTHK,BSHK->BHTS",
    "...HTS,...SHK->...THK": "BHTS,BSHK->BTHK",
}
SMALL = dict(zip(LETTERS, (5, 7, 6, 11, 2, 3, 4, 2, 5), strict=True))
run = functools.partial(jax.jit, static_argnums=(0, 3))(product)


def shapes(equation: str, sizes: dict[str, int]) -> list[tuple[int, ...]]:
    left, right, _ = EQUATIONS[equation].replace("->", ",").split(",")
    return [tuple(sizes[letter] for letter in letters) for letters in (left, right)]


def draw(shape, seed: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def integers(x: np.ndarray, grid: Grid) -> np.ndarray:
    """`codes - zero_point` as int64, by numpy alone."""
    scale, zero = np.float32(grid.scale), np.float32(grid.zero_point)
    codes = np.clip(np.round(x / scale) + zero, np.float32(grid.lower), np.float32(grid.upper))
    return (codes - zero).astype(np.int64)


def exact(equation: str, x, y, grid_x: Grid, grid_y: Grid, scale=None) -> np.ndarray:
    """The sum of integers times the scales, rounded where a float32 program rounds."""
    total = np.einsum(EQUATIONS[equation], integers(x, grid_x), integers(y, grid_y))
    assert np.abs(total).max() < 2**24  # so that float32 holds it
    scale = np.float32(grid_x.scale) * np.float32(grid_y.scale) if scale is None else scale
    return total.astype(np.float32) * scale


def check(equation: str, x, y, grid_x: Grid, grid_y: Grid, scale=None) -> None:
    """Simulated and integer products are that sum, to the last bit."""
    expected = exact(equation, x, y, grid_x, grid_y, scale)
    simulated = run(equation, quantize(x, grid_x), quantize(y, grid_y))
    native = run(equation, quantize_int8(x, grid_x), quantize_int8(y, grid_y))
    assert simulated.dtype == native.dtype == jnp.float32
    np.testing.assert_array_equal(simulated, expected)
    np.testing.assert_array_equal(native, expected)


ENDS = st.floats(0.0, 8.0, width=32)
# Few sizes, so that programs are shared; of operands that broadcast too.
SIZES = (
    SMALL,
    dict.fromkeys(LETTERS, 1),
    dict(zip(LETTERS, (9, 8, 1, 3, 1, 9, 2, 1, 8), strict=True)),
)


@st.composite
def grids(draw) -> Grid:
    """2..8 bits; symmetric or not, zero points from one end of the grid to the other."""
    low, high = -draw(ENDS), draw(ENDS)
    make = functools.partial(make_grid, symmetric=draw(st.booleans()))
    return make(jnp.float32(low), jnp.float32(high), draw(st.integers(2, 8)))


@pytest.mark.parametrize("equation", EQUATIONS)
@hypothesis.settings(max_examples=10)
@hypothesis.given(data=st.data())
def test_products_are_sums_of_integers(equation, data):
    sizes = data.draw(st.sampled_from(SIZES))
    x, y = (draw(shape, seed, -9, 9) for seed, shape in enumerate(shapes(equation, sizes)))
    check(equation, x, y, data.draw(grids()), data.draw(grids()))


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_zero_points_at_both_ends(equation, bits):
    x, y = (draw(shape, seed) for seed, shape in enumerate(shapes(equation, SMALL)))
    zero = jnp.float32(0.0)
    ends = [asymmetric_grid(zero, zero + 1.5, bits), asymmetric_grid(zero - 1.5, zero, bits)]
    assert [float(grid.zero_point) for grid in ends] == [0.0, 2.0**bits - 1]
    for grid_x in ends:
        for grid_y in (*ends, symmetric_grid(zero - 1.0, zero + 1.5, bits)):
            check(equation, x, y, grid_x, grid_y)


def test_codes_of_eight_bits_fill_int8():
    """Both ends of int8 occur, and with them the largest products."""
    grid = asymmetric_grid(jnp.float32(0.0), jnp.float32(255.0), 8)
    x = np.arange(256, dtype=np.float32).reshape(1, 256)
    codes = quantize_int8(x, grid)
    assert codes.codes.dtype == jnp.int8
    assert (int(codes.codes.min()), int(codes.codes.max())) == (-128, 127)
    assert int(codes.zero_point) == -128
    check("ND,DF->NF", x, x.T, grid, grid)


def token_grid(x: np.ndarray, axes: tuple[int, ...]) -> Grid:
    """An asymmetric grid for each place along the axes that are not reduced."""
    return asymmetric_grid(
        jnp.asarray(x.min(axes, keepdims=True)), jnp.asarray(x.max(axes, keepdims=True)), 8
    )


def test_per_channel_weights_and_per_token_activations():
    # The spread of the rows sets the grids well apart.
    x = draw((5, 7), 0, -1, 3) * 2.0 ** np.arange(5, dtype=np.float32)[:, None]
    rows = token_grid(x, (1,))
    for equation, y, axis in (("ND,DF->NF", draw((7, 6), 1), 0), ("ND,VD->NV", draw((6, 7), 1), 1)):
        low, high = y.min(axis, keepdims=True), y.max(axis, keepdims=True)
        weight = symmetric_grid(jnp.asarray(low), jnp.asarray(high), 8)
        assert weight.scale.shape == low.shape
        columns = np.asarray(weight.scale).reshape(1, 6)
        check(equation, x, y, rows, weight, np.asarray(rows.scale) * columns)
        one = asymmetric_grid(jnp.float32(-1.0), jnp.float32(3.0), 8)
        check(equation, x, y, one, weight, np.float32(one.scale) * columns)


def test_per_token_queries_and_keys():
    equation = "...THK,...SHK->...HTS"
    q, k = (draw(shape, seed, -1, 3) for seed, shape in enumerate(shapes(equation, SMALL)))
    grid_q, grid_k = (token_grid(x, (2, 3)) for x in (q, k))  # scales [B, T, 1, 1]
    scale_q, scale_k = (np.asarray(grid.scale)[:, :, 0, 0] for grid in (grid_q, grid_k))
    scale = scale_q[:, None, :, None] * scale_k[:, None, None, :]
    check(equation, q, k, grid_q, grid_k, scale)


def test_a_scale_along_the_contracted_axis_falls_back_to_values():
    equation = "...HTS,...SHK->...THK"
    probs, v = (draw(shape, seed, -1, 3) for seed, shape in enumerate(shapes(equation, SMALL)))
    grid_p, grid_v = token_grid(probs, (3,)), token_grid(v, (2, 3))  # v's varies along S
    terms = [integers(x, g) * np.float64(g.scale) for x, g in ((probs, grid_p), (v, grid_v))]
    expected = np.einsum(EQUATIONS[equation], *terms)
    simulated = run(equation, quantize(probs, grid_p), quantize(v, grid_v))
    native = run(equation, quantize_int8(probs, grid_p), quantize_int8(v, grid_v))
    np.testing.assert_allclose(simulated, expected, atol=1e-5)
    np.testing.assert_array_equal(native, simulated)
    # The same grid for all tokens would be wrong by far.
    assert np.abs(expected - np.einsum(EQUATIONS[equation], terms[0], v)).max() > 1e-3


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("quantized", [0, 1])
def test_one_operand_in_floating_point(equation, quantized):
    operands = [draw(shape, seed) for seed, shape in enumerate(shapes(equation, SMALL))]
    grid = asymmetric_grid(jnp.float32(-1.0), jnp.float32(1.5), 8)
    on_grid = integers(operands[quantized], grid) * np.float64(grid.scale)
    terms = [on_grid if i == quantized else x for i, x in enumerate(operands)]
    expected = np.einsum(EQUATIONS[equation], *(np.float64(x) for x in terms))
    results = []
    for form in (quantize, quantize_int8):
        forms = [form(x, grid) if i == quantized else x for i, x in enumerate(operands)]
        results.append(run(equation, *forms))
        assert results[-1].dtype == jnp.float32
        np.testing.assert_allclose(results[-1], expected, atol=1e-5)
    np.testing.assert_array_equal(*results)


def test_codes_of_sixteen_bits_stay_in_floating_point():
    x, y = draw((5, 7), 0), draw((7, 6), 1)
    wide = asymmetric_grid(jnp.float32(-1.0), jnp.float32(1.5), 16)
    narrow = symmetric_grid(jnp.float32(-1.0), jnp.float32(1.5), 8)
    total = np.einsum("ND,DF->NF", integers(x, wide), integers(y, narrow))
    expected = total * np.float64(wide.scale) * np.float64(narrow.scale)
    for right in (quantize(y, narrow), quantize_int8(y, narrow)):
        found = run("ND,DF->NF", quantize(x, wide), right)
        # The integers are above 2^24 and lose their last bits.
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    assert np.abs(integers(x, wide)).max() > 2**14


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_dtypes_of_results(dtype):
    x, y = draw((5, 7), 0), draw((7, 6), 1)
    grid = symmetric_grid(jnp.float32(-2.0), jnp.float32(2.0), 8)
    assert run("ND,DF->NF", x, y, dtype).dtype == (dtype or jnp.float32)
    for form in (quantize, quantize_int8):
        exactly = run("ND,DF->NF", form(x, grid), form(y, grid))
        found = run("ND,DF->NF", form(x, grid), form(y, grid), dtype)
        # Codes of 8 bits are exact in bfloat16 too.
        np.testing.assert_array_equal(found, exactly)
        assert found.dtype == jnp.float32
        assert run("ND,DF->NF", x, form(y, grid), dtype).dtype == jnp.float32


def test_stored_sums_take_the_place_of_sums_over_the_codes():
    x, y = draw((5, 7), 0, 0, 3), draw((7, 6), 1)
    left = quantize_int8(x, asymmetric_grid(jnp.float32(0.0), jnp.float32(3.0), 8))
    right = quantize_int8(y, symmetric_grid(jnp.float32(-2.0), jnp.float32(2.0), 8))
    plain = run("ND,DF->NF", left, right)
    sums = jnp.sum(right.codes, 0, dtype=jnp.int32)
    np.testing.assert_array_equal(run("ND,DF->NF", left, right.replace(sums=sums)), plain)
    moved = run("ND,DF->NF", left, right.replace(sums=sums + 1))
    step = float(left.scale * right.scale)
    np.testing.assert_allclose(moved - plain, 128 * step, rtol=1e-3)
    # The table of a tied head contracts its other axis.
    table = Quantized(right.codes.T, right.scale, right.zero_point, sums)
    np.testing.assert_array_equal(run("ND,VD->NV", left, table), plain)


@pytest.mark.parametrize("form", [quantize, quantize_int8])
def test_grids_with_axes_move_with_their_codes(form):
    x = draw((2, 3, 8), 0, -1, 3) * 2.0 ** np.arange(3, dtype=np.float32)[:, None]
    tokens = form(x, token_grid(x, (2,)))
    assert tokens.scale.shape == (2, 3, 1)
    for move in (functools.partial(split_last, parts=4), as_rows, lambda x: x[:, 0]):
        found = move(tokens)
        assert found.shape == move(jnp.asarray(x)).shape
        np.testing.assert_array_equal(values(found), move(values(tokens)))
