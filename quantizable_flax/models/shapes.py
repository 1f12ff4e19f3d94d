"""What a model's parameters look like, found without making them."""

import functools
from typing import Any

import flax.linen as nn
import jax


@functools.lru_cache(maxsize=64)
def boxed_shapes(model: nn.Module) -> Any:
    """Returns the shapes and dtypes of the parameters that init makes, boxed with logical axes.

    A model of a family is traced once: to trace one of many layers takes seconds, and a run asks
    several times before its first step. Nobody may write into the tree.
    """
    family: Any = model

    def init(key: jax.Array) -> Any:
        return family.init(key, family.example_batch(), method="loss")["params"]

    return jax.eval_shape(init, jax.random.key(0))
