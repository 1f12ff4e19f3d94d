"""A golden model of any text family in one quantization setting."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from quantizable_flax import build_model
from quantizable_flax.interop import from_state_dict
from quantizable_flax.models.build import with_quant
from quantizable_flax.models.losses import token_scores
from quantizable_flax.ptq.calibrate import calibrate, unknown_ranges
from quantizable_flax.quantization.ranges import Range
from tests.helpers import INPUTS, Golden, batch_of, config_of, golden
from tests.quantization.original_sites import our_site, our_spec

EVALUATION = range(16, 20)


@dataclasses.dataclass
class Case:
    """The model with its weights, the golden file, and the `kw` of the case (None: float)."""

    file: Golden
    name: str
    params: dict
    model: object
    options: dict | None

    @property
    def family(self) -> str:
        return self.file.config["arch"]

    @functools.cached_property
    def ranges(self):
        """Ours, after calibration."""
        count = self.file.config["cases"][self.name]["n_calib"]
        return calibrate(self.model, self.params, (batch_of(self.file, i) for i in range(count)))

    @functools.cached_property
    def evaluate(self):
        """`(ranges, index of a batch) -> (logits, mean loss)`."""

        @jax.jit
        def evaluate(params, ranges, batch):
            inputs = (batch[key] for key in INPUTS[self.family])
            logits = self.model.apply({"params": params, "ranges": ranges}, *inputs)
            shift = 1 if self.family == "opt" else 0  # a label is predicted one place before it
            labels = batch["labels"][:, shift:]
            scores = token_scores(logits[:, : labels.shape[1]], labels)
            return logits, scores.loss.sum() / scores.weight.sum()

        return lambda ranges, index: evaluate(self.params, ranges, batch_of(self.file, index))

    def losses(self, ranges) -> np.ndarray:
        """Of the evaluation batches."""
        return np.array([self.evaluate(ranges, index)[1] for index in EVALUATION])

    def originals(self) -> dict[str, Range]:
        """The original's ranges by our paths, in its order of execution."""
        shapes = unknown_ranges(self.model, self.params, batch_of(self.file, 0))
        shapes = traverse_util.flatten_dict(shapes, sep="/")
        found: dict[str, Range] = {}
        for site in self.file.config["sites"][self.name]:
            path = our_site(site["name"], self.family)
            shape = shapes[path].min.shape
            low, high = (
                jnp.asarray(site[end], jnp.float32).reshape(shape) for end in ("x_min", "x_max")
            )
            if path in found:  # a tied head: the same table, so the same range
                assert np.array_equal(found[path].min, low)
                assert np.array_equal(found[path].max, high)
            found[path] = Range(low, high, jnp.int32(1))
        return found


def load(model_name: str, case_name: str) -> Case:
    """Loads e.g. ("opt_gated", "w8a8_mse"), or "fp" for the model in floating point."""
    file = golden(f"quant_{model_name}")
    config = config_of(file)
    weights = golden(f"model_{model_name}").group("w")
    params = jax.tree.map(jnp.asarray, from_state_dict(weights, config))
    options = file.config["cases"].get(case_name, {}).get("kw")
    spec = our_spec(options, file.config["arch"]) if options else None
    return Case(file, case_name, params, with_quant(build_model(config), spec), options)
