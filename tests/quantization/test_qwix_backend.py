"""qwix in the place of AQT: the same codes, values, gradients, products and logits, bit for bit."""

import dataclasses
import functools
import json
import sys
import tarfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from quantizable_flax import QuantSpec, UserError
from quantizable_flax.quantization.grid import Grid, symmetric_bounds
from quantizable_flax.quantization.learned import learned_grid
from quantizable_flax.quantization.libraries import LIBRARIES
from quantizable_flax.quantization.tensor import fake_quantize, product, quantize, quantize_int8
from tests.programs import assert_mistake, run
from tests.ptq.int8_case import inputs_of, make_case
from tests.ptq.int8_programs import LAYERS, PRODUCTS, of_hlo, of_stablehlo
from tests.quantization.test_products import EQUATIONS, SIZES, draw, grids, shapes
from tests.test_old_checkpoints import RUNS
from tests.tiny import write_text

SHAPES = ((), (7,), (4, 6), (2, 3, 5))


def check_same(function, *arguments) -> None:
    """Asserts that function(*arguments, library) gives the same arrays by either library."""
    leaves = [jax.tree.leaves(jax.device_get(function(*arguments, name))) for name in LIBRARIES]
    for one, other in zip(*leaves, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@st.composite
def tensors(draw) -> tuple[jax.Array, Grid, int, jax.Array]:
    """(x, grid, bits, cotangent): half of x within some steps of ties, some far off the grid."""
    bits, shape = draw(st.integers(2, 16)), draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # One for all, or one for each place of the first axis or of the last.
    axis = draw(st.sampled_from([None, 0, -1])) if shape else None
    of_grid = [1] * len(shape) if axis is not None else []
    if axis is not None:
        of_grid[axis] = shape[axis]
    scale = 2.0 ** rng.integers(-8, 8, of_grid)  # with which halves of a step are exact
    if draw(st.booleans()):
        scale = scale * rng.uniform(0.5, 1.0, of_grid)
    if draw(st.booleans()):
        zero, (lower, upper) = np.zeros(of_grid), symmetric_bounds(draw(st.booleans()), bits)
    else:
        zero, lower, upper = rng.integers(0, 2**bits, of_grid), 0.0, 2.0**bits - 1
    steps = rng.integers(-(2 ** (bits + 1)), 2 ** (bits + 1), shape) / 2
    steps = np.where(rng.random(shape) < 0.5, steps, rng.normal(size=shape) * 2.0**bits)
    grid = Grid(*(jnp.asarray(a, jnp.float32) for a in (scale, zero, lower, upper)))
    x = jnp.asarray(steps * scale, jnp.float32)
    return x, grid, bits, jnp.asarray(rng.normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=3)
def simulated(x, grid: Grid, cotangent, library: str):
    def out(x, scale, zero_point):
        on = Grid(scale, zero_point, *grid[2:])
        return fake_quantize(x, on, library=library)

    found, backward = jax.vjp(out, x, *grid[:2])
    return quantize(x, grid, library=library), found, backward(cotangent)


@functools.partial(jax.jit, static_argnums=2)
def native(x, grid: Grid, library: str):
    found = quantize_int8(x, grid, library=library)
    return found, found.values()


@hypothesis.settings(max_examples=150)
@hypothesis.given(tensors())
def test_codes_values_and_gradients(case):
    x, grid, bits, cotangent = case
    check_same(simulated, x, grid, cotangent)
    if bits <= 8:
        check_same(native, x, grid)


@pytest.mark.parametrize("zero", [0.0, 3.0, 128.0])
def test_ties_overflow_and_what_is_not_finite(zero):
    x = jnp.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, 3e9, -3e9, 1e38, -1e38, np.inf, -np.inf, np.nan])
    grid = Grid(jnp.float32(1.0), jnp.float32(zero), jnp.float32(0.0), jnp.float32(255.0))
    check_same(simulated, x, grid, jnp.ones_like(x))
    check_same(native, x[:-1], grid)  # an integer cannot say NaN
    assert np.isnan(simulated(x, grid, x, "qwix")[1][-1])


@functools.partial(jax.jit, static_argnums=2)
def by_learned_grid(parameters, x, library: str):
    def total(parameters, x):
        grid = learned_grid(parameters, 4, symmetric=False, library=library)
        return jnp.sum(fake_quantize(x, grid, library=library) ** 2)

    return jax.value_and_grad(total, (0, 1))(parameters, x)


@pytest.mark.parametrize("zero", [0.5, 6.5, 7.5, 15.0])
def test_learned_grids(zero):
    parameters = {"scale": jnp.float32(0.3), "zero": jnp.float32(zero)}
    check_same(by_learned_grid, parameters, jnp.linspace(-4.0, 4.0, 50))


@functools.partial(jax.jit, static_argnums=(0, 5))
def of_integers(equation: str, x, grid_x: Grid, y, grid_y: Grid, library: str):
    return product(
        equation, *(quantize_int8(*a, library=library) for a in ((x, grid_x), (y, grid_y)))
    )


@pytest.mark.parametrize("equation", EQUATIONS)
@hypothesis.settings(max_examples=10)
@hypothesis.given(data=st.data())
def test_products(equation, data):
    sizes = data.draw(st.sampled_from(SIZES))
    x, y = (draw(shape, seed, -9, 9) for seed, shape in enumerate(shapes(equation, sizes)))
    check_same(of_integers, equation, x, data.draw(grids()), y, data.draw(grids()))


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        pytest.param("bert", QuantSpec(head=True), marks=pytest.mark.slow),
        ("opt", QuantSpec(head=True, activation_symmetric=True, weight_per_channel=True)),
        pytest.param(
            *("vit", QuantSpec(head=True, weight_bits=4, activation_bits=6)), marks=pytest.mark.slow
        ),
    ],
)
def test_logits_and_programs_of_every_family(family, spec):
    cases = [make_case(family, dataclasses.replace(spec, library=library)) for library in LIBRARIES]
    inputs = inputs_of(family)
    for what in (
        lambda case: case.ranges,
        lambda case: case.codes,
        lambda case: case.in_simulation(*inputs),
        lambda case: case.on_integers(*inputs),
    ):
        jax.tree.map(np.testing.assert_array_equal, *(what(case) for case in cases))
    lowered = jax.jit(cases[1].native.apply).lower({"params": cases[1].codes}, *inputs)
    by_layer, around = PRODUCTS[family]
    products = LAYERS * by_layer + around
    assert of_stablehlo(lowered.as_text()) == {"i8 x i8 -> i32": products}
    if jax.default_backend() == "cpu":
        assert of_hlo(lowered.compile().as_text()) == {"s8 x s8 -> s32": products}


def test_eval_takes_the_key_on_a_run_of_before_it(tmp_path):
    with tarfile.open(RUNS) as tar:
        tar.extractall(tmp_path, filter="data")
    arguments = [
        f"--workdir={tmp_path / 'bert'}",
        "--backend=int8",
        "--calibration_seeds=1",
        f"--config.data.files={write_text(tmp_path / 'text.txt')}",
        "--config.eval.batches=1",
        "--config.quant.calibration_batches=1",
    ]
    path = tmp_path / "rows.json"
    done = run("eval.py", *arguments, "--config.quant.library=qwix", f"--json={path}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())
    assert abs(row["w8a8"] / row["fp"] - 1.0) < 0.1
    done = run("eval.py", *arguments, "--config.quant.library=qwx")
    assert_mistake(done, "quant.library must be one of aqt, qwix, found 'qwx'", "'qwix'?")


def test_stored_specs_keep_the_library_and_old_ones_have_the_default():
    spec = QuantSpec(library="qwix")
    stored = json.loads(json.dumps(dataclasses.asdict(spec)))
    assert QuantSpec.from_dict(stored) == spec
    del stored["library"]
    assert QuantSpec.from_dict(stored) == QuantSpec(library="aqt")


def test_without_qwix_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install 'quantizable_flax\[qwix\]', or .*=aqt"):
        QuantSpec(library="qwix")
    QuantSpec(library="aqt")
