"""Self-distillation: a student stays near its teacher while its activations become small."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.data.specs import batch_specs
from quantizable_flax.errors import UserError
from quantizable_flax.models.distillation import Distances, distances, outputs
from quantizable_flax.models.metric import FIDELITY
from quantizable_flax.nn.partition import on_mesh
from quantizable_flax.ptq.settings import check_patterns
from quantizable_flax.quantization.penalty import Asked
from quantizable_flax.quantization.sites import RANGES, SHOWN
from quantizable_flax.runtime.mesh import replicated
from quantizable_flax.training.objective import (
    Batch,
    Labels,
    LossFn,
    Metrics,
    Objective,
    forward,
)
from quantizable_flax.training.penalty import at_sites, make_penalty, sites
from quantizable_flax.training.teacher import Teacher

WEIGHTS = ("hidden", "layers", "pooled", "logits")


class Distillation:
    """The weighted sum of the parts of `config.distill` and of the penalty; all are metrics.

    Every part is a mean over the whole batch (of tokens, examples or activations), so that
    micro-batches change nothing but the order of sums.
    """

    def __init__(self, config: ConfigDict, model: nn.Module, teacher: Teacher):
        """Checks the weights and finds the sites.

        Raises:
          UserError: a weight that cannot work, or no site of that name; or as `make_penalty`.
        """
        distill = config.distill
        _check(config)
        self._model: Any = model
        self._teacher: Any = teacher.model
        self.given: tuple[Any, ...] = (teacher.params,)
        has_logits = distill.logits and self._model.metric is not FIDELITY
        self._method = functools.partial(
            outputs, positions=distill.logits_positions if has_logits else 0
        )
        parts = ["hidden", "pooled"]
        parts += ["layers"] if distill.layers else []
        parts += ["logits"] if has_logits and distill.logits_positions else []
        self._weights = {name: float(distill[name]) for name in parts}
        self._asked: dict[str, Any] = {}  # of the student
        self._known: dict[str, Any] = {}  # of the teacher
        self._penalty = make_penalty(config, model, self._method)
        if self._penalty is not None:
            self._asked |= self._penalty.asked
            self._weights["penalty"] = self._penalty.weight
        if distill.layers:
            self._asked[SHOWN] = self._known[SHOWN] = layers(
                model, teacher.model, distill, self._method
            )

    @property
    def zeros(self) -> Metrics:
        """As `Objective`: the parts."""
        return {name: jnp.float32(0.0) for name in self._weights}

    def loss(self, batch: Batch, parts: int, *given: Any) -> LossFn:
        """As `Objective`."""
        (teacher,) = given
        tokens = jnp.sum(batch["attention_mask"], dtype=jnp.float32) if _masked(batch) else None

        def loss_fn(params, ranges, batch, key):
            student, ranges, found = forward(
                self._model, params, ranges, batch, key, method=self._method, asked=self._asked
            )
            known, shown = self._of_teacher(teacher, batch)
            far = distances(student, known, _pairs(found, shown))
            whole = parts * jnp.sum(far.tokens_B) if tokens is None else tokens
            sums = _means(far, whole, parts * far.pooled_B.shape[0])
            if self._penalty is not None:
                sums["penalty"] = self._penalty.cost(found) / parts
            return self._weighted(sums), (sums, ranges)

        return loss_fn

    def _of_teacher(self, params: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
        """What the teacher computes, and what its sites show."""
        variables, mutable = {"params": params, **self._known}, list(self._known)
        if not mutable:
            return self._teacher.apply(variables, batch, method=self._method), {}
        return self._teacher.apply(variables, batch, method=self._method, mutable=mutable)

    def finish(self, loss: jax.Array, sums: Any) -> tuple[Any, Metrics]:
        """As `Objective`."""
        return 1.0, {"loss": loss, **sums}

    def _weighted(self, sums: Metrics) -> Any:
        terms = [w * sums[name] for name, w in self._weights.items() if w and name in sums]
        return sum(terms[1:], start=terms[0])

    def eval_step(self, mesh: Mesh) -> Callable:
        """Returns the jitted `(params, ranges, batch, teacher's params) -> sums` of real examples.

        Sums are device scalars: `examples`, `tokens`, and the distances over them.
        """

        def step(params, ranges, batch, teacher):
            with on_mesh(mesh):
                student, found = self._model.apply(
                    {"params": params, RANGES: ranges, **self._known},
                    batch,
                    method=self._method,
                    mutable=list(self._known),
                )
                known, shown = self._of_teacher(teacher, batch)
            far = distances(student, known, _pairs(found, shown))
            weight_B = batch.get("example_weight", jnp.ones_like(far.pooled_B))
            sums = {
                name.removesuffix("_B"): jnp.sum(x_B * weight_B)
                for name, x_B in far._asdict().items()
                if x_B is not None
            }
            return {"examples": jnp.sum(weight_B), **sums}

        return jax.jit(step, out_shardings=replicated(mesh))

    def of_sums(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The parts that `eval_step` measures, as means, and `loss`, their weighted sum."""
        means = {
            name: sums[name] / sums["tokens" if name in ("hidden", "layers") else "examples"]
            for name in self._weights
            if name in sums
        }
        return {"loss": sum(self._weights[name] * x for name, x in means.items()), **means}


def _pairs(found: Mapping[str, Any], shown: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The activations of student and teacher, site by site."""
    ours, theirs = (jax.tree.leaves(tree.get(SHOWN, {})) for tree in (found, shown))
    return list(zip(ours, theirs, strict=True))


def _masked(batch: Batch) -> bool:
    return "attention_mask" in batch


def _means(far: Distances, tokens: jax.Array, examples: int) -> Metrics:
    """A micro-batch's share of the means over all tokens and examples of its batch."""
    means = {
        "hidden": jnp.sum(far.hidden_B) / jnp.maximum(tokens, 1.0),
        "pooled": jnp.sum(far.pooled_B) / examples,
    }
    if far.layers_B is not None:
        means["layers"] = jnp.sum(far.layers_B) / jnp.maximum(tokens, 1.0)
    if far.logits_B is not None:
        means["logits"] = jnp.sum(far.logits_B) / examples
    return means


def make_objective(config: ConfigDict, model: nn.Module, teacher: Teacher | None) -> Objective:
    """Returns what a run minimises: with a teacher the distance to it, else the loss on labels.

    Raises:
      UserError: as `Distillation` or `make_penalty`, or neither a teacher nor labels.
    """
    if teacher is not None:
        return Distillation(config, model, teacher)
    family: Any = model
    if family.metric is FIDELITY or "labels" not in batch_specs(config):
        raise UserError(
            "a model without a head, or data without labels, has no loss of its own, found "
            "distill.teacher=None: name a teacher, as configs/tune.py does, or set data.label_key."
        )
    return Labels(model, make_penalty(config, model, "loss"))


def layers(
    model: nn.Module, teacher: nn.Module, distill: ConfigDict, method: Callable
) -> dict[str, Any]:
    """Returns the collection SHOWN for the sites that `distill.layer_sites` matches in full.

    Raises:
      UserError: it matches none of the student's, or the teacher lacks one of those.
    """
    matched = check_patterns("distill.layer_sites", [distill.layer_sites], sites(model, method))
    missing = sorted(set(matched) - set(sites(teacher, method)))
    if missing:
        raise UserError(
            f"the teacher has no site {missing[0]}, whose activations distill.layers compares: set "
            "distill.layers=0, or distill.layer_sites to what both models have."
        )
    return at_sites(matched, "asked", Asked())


def _check(config: ConfigDict) -> None:
    distill = config.distill
    for name in (*WEIGHTS, "logits_positions"):
        if distill[name] < 0:
            raise UserError(f"distill.{name} must not be negative, found {distill[name]}.")
    if not config.penalty.weight and not any(distill[name] for name in WEIGHTS):
        raise UserError(
            "a distillation needs a loss, found 0 for all of distill.hidden, distill.layers, "
            "distill.pooled, distill.logits and penalty.weight: raise one of them."
        )
