"""A small model as a graph, the inputs of both, and what ONNX Runtime makes of it."""

import collections
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime

from quantizable_flax.models.build import with_quant
from quantizable_flax.onnx.write import Exported, to_onnx
from quantizable_flax.ptq.calibrate import calibrate
from tests.ptq.int8_case import batch_of
from tests.small import small_model


class Case(NamedTuple):
    """A model, its variables, and its graph."""

    family: str
    model: nn.Module
    variables: dict[str, Any]
    exported: Exported

    def ours(self, batch: dict[str, Any]) -> np.ndarray:
        """The model's result, in floating point or simulated."""
        return np.asarray(jax.jit(self.model.apply)(self.variables, *arguments(batch)))

    def session(self, **options) -> onnxruntime.InferenceSession:
        """ONNX Runtime's, of the graph."""
        return session(self.exported.model, **options)

    def theirs(self, batch: dict[str, Any]) -> np.ndarray:
        """What ONNX Runtime returns first."""
        return self.session().run(None, feeds(self.family, self.model.config, batch))[0]


def make_case(family: str, attention=None, spec=None, *, opset=20, small="", **model) -> Case:
    """A random small model, calibrated on `batch_of` where it is quantized."""
    built, params = small_model(family, attention, **model)
    return of_params(small or family, built, params, spec, opset=opset)


def of_params(family: str, model: nn.Module, params, spec=None, *, opset=20) -> Case:
    """The same of a model and its parameters."""
    model, ranges = with_quant(model, spec), {}
    if spec is not None:
        ranges = calibrate(model, params, [float_batch(family, model)])
    variables = {"params": params, "ranges": ranges}
    return Case(family, model, variables, to_onnx(model, params, ranges, opset=opset))


def float_batch(family: str, model: nn.Module) -> dict[str, jax.Array]:
    """`batch_of`, with images as floats: both sides get the same, to the last bit."""
    batch = batch_of(family)
    if family == "vit":
        images = jax.jit(lambda x: model.apply({}, x, method="normalise"))(batch["images"])
        return {**batch, "images": images}
    return {**batch, "labels": batch["labels"][:, 0] % 2} if is_classifier(model) else batch


def is_classifier(model: nn.Module) -> bool:
    """Whether its labels are those of whole texts."""
    return getattr(model.config, "head", None) == "classifier"


def shorter(batch: dict[str, Any]) -> dict[str, Any]:
    """Two examples instead of three, and texts of seven tokens."""
    return {k: x[:2] if x.ndim != 2 else x[:2, :7] for k, x in batch.items()}


def arguments(batch: dict[str, Any]) -> list[jax.Array]:
    """What our models are called with."""
    names = ("images",) if "images" in batch else ("input_ids", "attention_mask", "token_type_ids")
    return [jnp.asarray(batch[name]) for name in names if name in batch]


def feeds(family: str, config: Any, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the graph is given; of OPT an empty past."""
    if family == "vit":
        return {"pixel_values": np.asarray(batch["images"]).transpose(0, 3, 1, 2)}
    ids = np.asarray(batch["input_ids"], np.int64)
    given = {"input_ids": ids, "attention_mask": np.asarray(batch["attention_mask"], np.int64)}
    if getattr(config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = np.asarray(batch.get("token_type_ids", 0 * ids), np.int64)
    if family == "opt":
        given |= empty_past(config, len(ids))
    return given


def empty_past(config: Any, batch_size: int) -> dict[str, np.ndarray]:
    """Keys and values of no token."""
    shape = (batch_size, config.num_heads, 0, config.hidden_size // config.num_heads)
    names = [f"{i}.{name}" for i in range(config.num_layers) for name in ("key", "value")]
    return {f"past_key_values.{name}": np.zeros(shape, np.float32) for name in names}


def session(model: Any, *, optimized: Path | None = None, all_off: bool = False):
    """An InferenceSession of one thread on the CPU, which writes its own graph where asked."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if all_off:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def kernels(model: Any, folder: Path) -> collections.Counter:
    """How often ONNX Runtime runs each operator once it has fused what it can."""
    session(model, optimized=folder / "optimized.onnx")
    return collections.Counter(
        node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node
    )


def worst(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())
