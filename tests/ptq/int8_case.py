"""A small model of any family, simulated and on integers, and its inputs."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from quantizable_flax import QuantSpec
from quantizable_flax.models.build import quant_spec, with_quant
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.ptq.int8 import to_int8
from tests.compiled import ORDINARY
from tests.small import small_batch, small_model


class Case(NamedTuple):
    """One set of weights in three forms."""

    plain: nn.Module
    simulated: nn.Module
    native: nn.Module
    params: Any
    ranges: Any
    codes: Any  # the params of the native model

    def in_float(self, *inputs, **options) -> np.ndarray:
        """The result in floating point; options are those of `Module.apply`."""
        return _run(self.plain, {"params": self.params}, inputs, options)

    def in_simulation(self, *inputs, **options) -> np.ndarray:
        """The result of the simulation."""
        return _run(self.simulated, {"params": self.params, "ranges": self.ranges}, inputs, options)

    def on_integers(self, *inputs, **options) -> np.ndarray:
        """The result of the int8 model."""
        return _run(self.native, {"params": self.codes}, inputs, options)


def _run(model, variables, inputs, options):
    # Options are few and plain: models that are equal share their program.
    spec = quant_spec(model)
    rotates = spec is not None and spec.hadamard
    pixels = any(x.dtype == jnp.uint8 for x in jax.tree.leaves(inputs))
    program = _with_floats if rotates or pixels else _program
    return jax.device_get(program(model, variables, inputs, tuple(options.items())))


def _apply(model, variables, inputs, options):
    return model.apply(variables, *inputs, **dict(options))


# Variables are arguments of the program, or XLA would fold the weights into constants.
_program = jax.jit(_apply, static_argnums=(0, 3))
# Rotations and the product with pixels are sums of floats before the rounding: their last bits must
# be those of everybody.
_with_floats = jax.jit(_apply, static_argnums=(0, 3), compiler_options=ORDINARY)


def make_case(
    family: str, spec: QuantSpec, attention: dict[str, Any] | None = None, *, params=None, **sizes
) -> Case:
    """Calibrates on `small_batch` and converts; `params` in place of random ones."""
    model, random = small_model(family, attention, **sizes)
    params = random if params is None else params
    simulated = with_quant(model, spec)
    ranges = calibrate(simulated, params, [batch_of(family)])
    return Case(model, simulated, *_served(simulated, params, ranges))


def _served(simulated, params, ranges):
    native, codes = to_int8(simulated, params, ranges)
    return native, params, ranges, codes


def batch_of(family: str) -> dict[str, jax.Array]:
    """`small_batch`, the last text padded at its end and the first at its beginning."""
    batch = small_batch(family)
    if family == "vit":
        return batch
    mask = jnp.ones_like(batch["input_ids"]).at[0, :3].set(0).at[2, 7:].set(0)
    labels = jnp.where(mask == 1, batch["labels"], -100)
    return {**batch, "labels": labels, "attention_mask": mask}


def inputs_of(family: str) -> tuple[jax.Array, ...]:
    """The arguments of the model's call."""
    batch = batch_of(family)
    if family == "vit":
        return (batch["images"],)
    return batch["input_ids"], batch["attention_mask"]


def check_agreement(case: Case, *inputs, **options) -> Any:
    """Asserts that both forms agree in all results, and returns those of the integers."""
    simulated, native = (run(*inputs, **options) for run in (case.in_simulation, case.on_integers))
    for one, other in zip(jax.tree.leaves(simulated), jax.tree.leaves(native), strict=True):
        assert other.dtype == np.float32
        assert np.isfinite(other).all()
        # The promise; measured: no difference at all on a CPU at XLA's defaults (at the tests' own
        # flags products with float weights may sum in another order, and codes move).
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * np.abs(one).max())
    return native
