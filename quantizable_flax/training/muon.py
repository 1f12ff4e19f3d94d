"""Muon for the matrices inside the layers, Adam for everything else, as one transformation."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from quantizable_flax.errors import UserError
from quantizable_flax.ptq.settings import check_patterns

# Of a matrix's update, so that one learning rate suits Muon and Adam (arXiv 2502.16982).
UPDATE_RMS = 0.2
# Of Newton and Schulz' iteration; float32 also where JAX_ENABLE_X64 is set.
COEFFICIENTS = np.array([3.4445, -4.7750, 2.0315], np.float32)


class SplitState(NamedTuple):
    """The states of both, each of its own part of the parameters."""

    muon: Any
    adam: Any


def muon_or(
    adam: optax.GradientTransformation, pattern: str, momentum: float
) -> optax.GradientTransformation:
    """Returns Muon's direction for the parameters whose path matches in full, else `adam`'s.

    Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon) makes the Nesterov momentum of a
    matrix nearly orthogonal by five Newton-Schulz steps; that times `0.2 sqrt(max(in, out))`
    has Adam's usual size.

    Args:
      adam: of the other parameters.
      pattern: a regular expression of paths; each must be a matrix [in, out].
      momentum: decay of the mean gradient, in [0, 1).

    Raises:
      UserError: from `init`, the pattern matches nothing, or something that is no matrix.
    """
    muon = scale_by_muon(
        COEFFICIENTS,
        beta=momentum,
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MuonDimensionNumbers(), tree),
    )

    def init(params):
        _check(params, pattern)
        own, others = _split(params, pattern)
        return SplitState(muon.init(own), adam.init(others))

    def update(updates, state, params=None):
        (own, others), known = _split(updates, pattern), _split(params or {}, pattern)
        own, of_muon = muon.update(own, state.muon, known[0])
        others, of_adam = adam.update(others, state.adam, known[1])
        sized = jax.tree.map(lambda x: x * (UPDATE_RMS * math.sqrt(max(x.shape))), own)
        return _merged(sized, others), SplitState(of_muon, of_adam)

    return optax.GradientTransformation(init, update)


def matches(names: Sequence[str], pattern: str) -> bool:
    """Whether a parameter is Muon's, by the names on its way from the root."""
    return re.fullmatch(pattern, "/".join(names)) is not None


# By paths instead of masks: a state then holds its own arrays, boxed as the parameters are, and
# nothing in place of others.
def _split(tree: Any, pattern: str) -> tuple[Any, Any]:
    flat = traverse_util.flatten_dict(tree)
    own = {path: x for path, x in flat.items() if matches(path, pattern)}
    others = {path: x for path, x in flat.items() if path not in own}
    return traverse_util.unflatten_dict(own), traverse_util.unflatten_dict(others)


def _merged(own: Any, others: Any) -> Any:
    flat = traverse_util.flatten_dict(own) | traverse_util.flatten_dict(others)
    return traverse_util.unflatten_dict(flat)


def _check(params: Any, pattern: str) -> None:
    flat = traverse_util.flatten_dict(params, sep="/")
    for name in check_patterns("optimizer.muon_parameters", [pattern], list(flat), "parameters"):
        (x,) = jax.tree.leaves(flat[name])  # of its box
        if jnp.ndim(x) != 2:
            raise UserError(
                f"Muon is for matrices [in, out], found {name} of shape {jnp.shape(x)}: leave it "
                "out of optimizer.muon_parameters."
            )
