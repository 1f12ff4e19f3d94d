"""A calibrated model to take away: an INT8 checkpoint, and a program that JAX alone can run."""

import dataclasses
import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax import export

from quantizable_flax.checkpoint import store
from quantizable_flax.pretrained.new_folder import check_new
from quantizable_flax.ptq.int8 import size_in_bytes
from quantizable_flax.runtime.workdir import check_writable

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, SIGNATURE = "model.stablehlo", "model.json"


class Sizes(NamedTuple):
    """Bytes of the float32 parameters, of the int8 ones and of the program."""

    float32: int
    int8: int
    program: int


def check_folder(path: str, flag: str) -> epath.Path:
    """Returns the folder to write to.

    Args:
      path: of a new or an empty folder.
      flag: what names it on the command line, for the message.

    Raises:
      UserError: it is there and not empty, or cannot be written.
    """
    folder = store.absolute(path)
    check_new(folder, f"{flag}={path}")
    check_writable(folder, flag)
    return folder


def export_int8(
    folder: epath.Path,
    model: nn.Module,
    params: Any,
    notes: store.Notes,
    *,
    batch_size: int,
    seq_len: int | None,
    float32_bytes: int,
) -> Sizes:
    """Writes a checkpoint that `load` reads, and the program beside it.

    Args:
      folder: a new or empty one.
      model: from `to_int8`, with
      params: its parameters.
      notes: configuration, assets and info of the run that it comes from.
      batch_size: of the program, whose shapes are fixed.
      seq_len: tokens per example of the program, None for a model of images.
      float32_bytes: size of the float parameters, for the comparison.
    """
    info = {**notes.info, "quant": dataclasses.asdict(model.config.quant)}
    store.save_params(folder, params, notes._replace(info=info, data={}))
    program, signature = make_program(model, params, batch_size, seq_len)
    (folder / PROGRAM).write_bytes(program)
    (folder / SIGNATURE).write_text(json.dumps(signature, indent=2) + "\n")
    return Sizes(float32_bytes, size_in_bytes(params), len(program))


def make_program(
    model: nn.Module, params: Any, batch_size: int, seq_len: int | None
) -> tuple[bytes, dict[str, Any]]:
    """Serializes `(inputs) -> logits` with the parameters inside, for CPU, CUDA and TPU.

    `jax.export.deserialize(program).call(*inputs)` runs it, without this package.

    Returns:
      (program, its signature: names, shapes and dtypes of inputs and logits, platforms).
    """
    inputs = _inputs(model, batch_size, seq_len)

    def logits(*arrays: jax.Array) -> Any:
        # As constants they would be folded: XLA turns a division by a constant scale into a
        # product with its reciprocal, which rounds differently, and codes would move.
        hidden = jax.tree.map(lambda x: jax.lax.optimization_barrier(jnp.asarray(x)), kept)
        return model.apply({"params": hidden}, *arrays)

    kept = jax.device_get(params)
    exported = export.export(jax.jit(logits), platforms=PLATFORMS)(*inputs.values())
    (result,) = exported.out_avals
    signature = {
        "inputs": [
            {"name": name, "shape": list(x.shape), "dtype": str(x.dtype)}
            for name, x in inputs.items()
        ],
        "logits": {"shape": list(result.shape), "dtype": str(result.dtype)},
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
    }
    return bytes(exported.serialize()), signature


def _inputs(
    model: nn.Module, batch_size: int, seq_len: int | None
) -> dict[str, jax.ShapeDtypeStruct]:
    if seq_len is None:
        images = model.example_batch()["images"]
        return {"images": jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), images.dtype)}
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
    return {"input_ids": tokens, "attention_mask": tokens}
