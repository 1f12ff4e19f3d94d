"""A calibrated model as integers: int8 codes instead of weights, grids beside them."""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from quantizable_flax.errors import UserError
from quantizable_flax.models.build import quant_spec, with_quant
from quantizable_flax.models.metric import FIDELITY
from quantizable_flax.quantization.sites import RANGES, STORED

Params = Any


def to_int8(
    model: nn.Module, params: Params, ranges: Any, batch: Any = None
) -> tuple[nn.Module, Params]:
    """Returns the model that runs on integers, and all that it needs.

    Its logits are those of the simulation. A quantized weight is int8 codes, a scale and, where
    products contract it, sums of the codes; static ranges of activations lie beside them. No float
    copy of a quantized weight is left, except of a table whose head is in floating point: the
    lookup then rounds the rows that it reads. Weights of more than 8 bits stay in floating point.

    Args:
      model: with the quant spec that the ranges were calibrated for.
      params: its float parameters.
      ranges: the collection that `calibrate` returned.
      batch: of any content, for a model without an `example_batch` of its own.

    Returns:
      (model, params); `model.apply({"params": params}, ...)` needs no other collection.

    Raises:
      UserError: a model without a quant spec.
    """
    spec = quant_spec(model)
    if spec is None:
        raise UserError(
            "int8 execution needs a quant spec, found a model in floating point: see with_quant."
        )
    model = with_quant(model, dataclasses.replace(spec, backend="simulated"))

    stored = traverse_util.flatten_dict(_collect(model, params, ranges, batch))
    coded = [path[:-1] for path in stored if path[-1] == "codes"]  # (..., site, parameter)
    replaced = {(*path[:-2], path[-1]) for path in coded}
    sites = {path[:-1] for path in coded}  # with a learned grid there, perhaps
    kept = {
        path: value
        for path, value in traverse_util.flatten_dict(params).items()
        if path not in replaced and path[:-2] not in sites
    }
    for path, value in stored.items():
        # Without a zero point of 0 the program computes no corrections by it.
        if path[-1] != "zero_point" or np.any(np.asarray(value)):
            kept[path] = value
    served = with_quant(model, dataclasses.replace(spec, backend="int8"))
    return served, traverse_util.unflatten_dict(kept)


@functools.partial(jax.jit, static_argnums=0)
def _collect(model: nn.Module, params: Params, ranges: Any, batch: Any) -> Any:
    """What each site keeps instead of float weights and `ranges`."""
    batch = model.example_batch() if batch is None else batch
    _, updated = model.apply(
        {"params": params, RANGES: ranges}, batch, method="loss", mutable=[STORED]
    )
    return updated.get(STORED, {})


def count_products(model: nn.Module, params: Params) -> tuple[int, int]:
    """Returns how many matrix products of a model from `to_int8` are of integers, and how many not.

    Counted in the program before XLA's own passes.
    """

    # A model without a head has no loss, and what leads to nothing is in no program.
    method = "features" if model.metric is FIDELITY else "loss"

    def outputs(params):
        return model.apply({"params": params}, model.example_batch(), method=method)

    text = jax.jit(outputs).lower(params).as_text()
    operands = re.findall(r"stablehlo\.dot_general .*: \(tensor<[^>]*x(\w+)>,", text)
    return operands.count("i8"), len(operands) - operands.count("i8")


def size_in_bytes(params: Params) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
