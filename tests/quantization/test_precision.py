"""Products state how precise they are, so that no backend rounds float32 on its own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec
from quantizable_flax.checkpoint.export import make_program
from quantizable_flax.models.build import with_config, with_quant
from quantizable_flax.ptq.calibrate import calibrate_step, unknown_ranges
from quantizable_flax.ptq.int8 import to_int8
from quantizable_flax.quantization.grid import Grid
from quantizable_flax.quantization.tensor import product, quantize
from tests.small import FAMILIES, small_batch, small_model

GATES = {"bert": "mlp", "opt": "linear", "vit": "all_heads_linear"}


def dots(text: str) -> set[tuple[str, str, bool]]:
    """Operand types of each product of a lowered program, and whether it states the highest."""
    found = re.findall(r"stablehlo\.dot_general(.*): \(tensor<(.*?)>, tensor<(.*?)>\)", text)
    assert len(found) == text.count("stablehlo.dot_general") > 0
    return {
        (x.split("x")[-1], y.split("x")[-1], "precision = [HIGHEST, HIGHEST]" in attributes)
        for attributes, x, y in found
    }


@functools.cache
def case(family: str):
    return *small_model(family, {"gate": GATES[family]}), small_batch(family)


def training(model, params, batch, ranges=None) -> str:
    """The lowered gradient of the loss; with ranges, as in quantization-aware training."""

    def loss(params):
        variables = {"params": params, **({"ranges": ranges} if ranges else {})}
        mutable = ["ranges"] if ranges else []
        scores, _ = model.apply(variables, batch, method="loss", mutable=mutable)
        return jnp.sum(scores.loss)

    return jax.jit(jax.grad(loss)).lower(params).as_text()


EXACT = {("f32", "f32", True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_exact_on_every_backend_and_bfloat16_keeps_the_default(family):
    model, params, batch = case(family)
    assert dots(training(model, params, batch)) == EXACT
    half = dots(training(with_config(model, dtype=jnp.bfloat16), params, batch))
    assert ("bf16", "bf16", False) in half
    # The gate is float32 there too, of inputs that are bfloat16 already. On a CPU the gradient of
    # the bias of BERT's head, a sum over float32 logits, is a product as well.
    rest = half - EXACT if family == "bert" else half
    assert {highest for _, _, highest in rest} == {False}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_calibration_and_quantized_training_are_exact(family, bits):
    model, params, batch = case(family)
    model = with_quant(model, QuantSpec(bits, bits, head=True))
    ranges = unknown_ranges(model, params, batch)
    calibration = calibrate_step.lower(model, params, ranges, batch, {}).as_text()
    assert dots(calibration) == EXACT
    assert dots(training(model, params, batch, ranges)) == EXACT
    half = with_config(model, dtype=jnp.bfloat16)
    found = dots(training(half, params, batch, ranges))
    # 256 codes fit into bfloat16, 65,536 do not.
    assert found >= ({("bf16", "bf16", False)} if bits == 8 else EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_served_program_is_exact_between_its_integers(family):
    model, params, batch = case(family)
    model = with_quant(model, QuantSpec(head=False))
    ranges = jax.tree.map(jnp.ones_like, unknown_ranges(model, params, batch))
    program, _ = make_program(*to_int8(model, params, ranges), 2, None if family == "vit" else 12)
    text = str(jax.export.deserialize(bytearray(program)).mlir_module())
    assert dots(text) == {("i8", "i8", False), *EXACT}


def test_wide_codes_survive_bfloat16_compute():
    """In bfloat16 the codes 257 and 258 would be one."""
    grid = Grid(jnp.float32(0.5), jnp.float32(0.0), -32768.0, 32767.0)
    x, y = (jnp.array([[code]], jnp.float32) * 0.5 for code in (257.0, 1025.0))
    wide = [quantize(value.astype(jnp.float32), grid, wide=True) for value in (x, y)]
    found = product("ab,bc->ac", *wide, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found, [[0.25 * 257 * 1025]])
    # What moves a tensor leaves it as wide as it is.
    moved = wide[0].moved(jnp.transpose)[0:1].with_codes(wide[0].codes)
    np.testing.assert_array_equal(product("ab,bc->ac", moved, wide[1], dtype=jnp.bfloat16), found)
