"""Parameters of layers: of the declared shape, and without tracing what initialises them."""

import jax
import jax.numpy as jnp
import pytest

from quantizable_flax.errors import UserError
from quantizable_flax.nn.layers import Dense


def test_a_parameter_of_another_shape_is_refused():
    x, dense = jnp.ones((2, 4)), Dense(3)
    params = dense.init(jax.random.key(0), x)["params"]
    narrow = params | {"kernel": params["kernel"].unbox()[:, :2]}
    with pytest.raises(UserError, match=r"kernel must have the shape \[4, 3\], .*\[4, 2\]"):
        dense.apply({"params": narrow}, x)


def test_what_initialises_a_parameter_is_not_traced_again():
    def init(*arguments):
        traced.append(arguments)
        return jax.nn.initializers.normal(0.02)(*arguments)

    traced = []
    x, dense = jnp.ones((2, 4)), Dense(3, kernel_init=init)
    params = dense.init(jax.random.key(0), x)["params"]
    assert len(traced) == 1
    dense.apply({"params": params}, x)
    assert len(traced) == 1
