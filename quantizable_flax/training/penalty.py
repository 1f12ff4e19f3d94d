"""The term on large activations that any objective may have: `config.penalty`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from quantizable_flax.errors import UserError, check_at_least
from quantizable_flax.models.build import with_quant
from quantizable_flax.models.shapes import boxed_shapes
from quantizable_flax.ptq.settings import check_patterns
from quantizable_flax.quantization.penalty import Limit
from quantizable_flax.quantization.sites import PENALTY, STATS


class Penalty:
    """`weight` times the mean over sites of `mean((|x| / scale) ** power)` (arXiv 2511.23225).

    Attributes:
      weight: of the term in the loss.
      asked: collections for `objective.forward`, in which the sites leave what they cost.
    """

    def __init__(self, config: ConfigDict, model: nn.Module, method: Callable | str):
        """Finds the sites of `config.penalty` among those that a method of the model passes.

        Raises:
          UserError: a scale or power that cannot work, or no site of that name.
        """
        penalty = config.penalty
        if not penalty.scale > 0:
            raise UserError(f"penalty.scale must be above 0, found {penalty.scale}.")
        check_at_least(1, "penalty.power", penalty.power)
        matched = check_patterns("penalty.sites", [penalty.sites], sites(model, method))
        limit = Limit(float(penalty.scale), int(penalty.power))
        self.weight = float(penalty.weight)
        self.asked: dict[str, Any] = {PENALTY: at_sites(matched, "limit", limit)}

    def cost(self, found: Mapping[str, Any]) -> jax.Array:
        """The mean over the sites, without its weight, of a forward pass that was asked."""
        return jnp.mean(jnp.stack(jax.tree.leaves(found[PENALTY])))


def make_penalty(config: ConfigDict, model: nn.Module, method: Callable | str) -> Penalty | None:
    """Returns the term of `config.penalty`, None where it weighs nothing.

    Raises:
      UserError: a negative weight, or as `Penalty`.
    """
    if not 0 <= config.penalty.weight < math.inf:
        raise UserError(
            f"penalty.weight must be a number that is not negative, found {config.penalty.weight}."
        )
    return Penalty(config, model, method) if config.penalty.weight else None


def sites(model: nn.Module, method: Callable | str) -> list[str]:
    """The sites that a method passes."""
    plain: Any = with_quant(model, None)  # where no site asks for a range

    def forward(params):
        found = plain.apply(
            {"params": params}, plain.example_batch(), method=method, mutable=[STATS]
        )
        return found[1][STATS]

    stats = traverse_util.flatten_dict(jax.eval_shape(forward, nn.unbox(boxed_shapes(plain))))
    return sorted("/".join(path[:-1]) for path in stats if path[-1] == "inf_norm")


def at_sites(names: list[str], key: str, value: Any) -> dict[str, Any]:
    """A collection with the same value at each of the sites."""
    return traverse_util.unflatten_dict({(*name.split("/"), key): value for name in names})
