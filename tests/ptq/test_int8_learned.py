"""Integers on learned grids."""

import jax
import numpy as np
import pytest

from quantizable_flax import QuantSpec, calibrate, to_int8, with_quant
from quantizable_flax.ptq.calibrate import with_grids
from tests.small import small_batch, small_model


@pytest.mark.parametrize("symmetric", [False, True])
def test_learned_grids_are_served_as_they_were_trained(symmetric):
    model, params = small_model("opt", {"gate": "linear"})
    batch = small_batch("opt")
    spec = QuantSpec(6, 6, head=True, activation_symmetric=symmetric)
    quantized = with_quant(model, spec)
    ranges = calibrate(quantized, params, [batch])
    known = jax.jit(with_grids, static_argnums=0)(quantized, params, ranges)
    # As though training had moved them: not the grids of any range.
    rng = np.random.default_rng(0)

    def move(path, x):
        kind = path[-1].key if "grid" in (part.key for part in path) else None
        factor = rng.uniform(0.7, 1.3)
        return x * factor if kind == "scale" else x + factor if kind == "zero" else x

    moved = jax.tree_util.tree_map_with_path(move, known)
    simulated = jax.jit(quantized.apply)({"params": moved}, batch["input_ids"])
    calibrated = jax.jit(quantized.apply)({"params": known}, batch["input_ids"])
    served, codes = to_int8(quantized, moved, {})
    native = jax.jit(served.apply)({"params": codes}, batch["input_ids"])
    np.testing.assert_allclose(native, simulated, atol=1e-4 * np.abs(simulated).max())
    assert np.abs(simulated - calibrated).max() > 1e-2 * np.abs(simulated).max()
    # The grid of a weight is in its codes and scale now.
    assert set(codes["layer_0"]["ffn_in"]["weight"]) == {"kernel"}
    assert "grid" in codes["layer_0"]["ffn_in"]["output"]
