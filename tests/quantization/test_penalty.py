"""What large activations cost: the value, its gradient, and that nobody pays who did not ask."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from quantizable_flax.models.build import with_config, with_quant
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.quantization.penalty import Limit, cost_above
from quantizable_flax.quantization.sites import PENALTY, Site
from quantizable_flax.quantization.spec import QuantSpec
from tests.small import small_batch, small_model

SITES = ("layer_0/attention_residual", "layer_0/ffn_residual")


def collection(limit: Limit, sites=SITES) -> dict:
    return traverse_util.unflatten_dict({(*site.split("/"), "limit"): limit for site in sites})


def costs(model, params, batch, limit, **variables) -> dict:
    """Cost by site."""
    variables |= {"params": params, PENALTY: collection(limit)}
    _, found = model.apply(variables, batch, method="features", mutable=[PENALTY])
    flat = traverse_util.flatten_dict(found[PENALTY], sep="/")
    return {
        path.removesuffix("/cost"): cost for path, cost in flat.items() if path.endswith("/cost")
    }


@pytest.mark.parametrize(("scale", "power"), [(3.0, 4), (0.5, 3), (2.0, 1)])
def test_cost_and_gradient_are_the_formula(scale, power):
    x = np.random.default_rng(0).normal(0.0, 2.0, (2, 3, 5))
    limit = Limit(scale, power)
    cost, gradient = jax.value_and_grad(cost_above)(jnp.float32(x), limit)
    np.testing.assert_allclose(cost, np.mean(np.abs(x / scale) ** power), rtol=1e-5)
    expected = power * np.abs(x) ** (power - 1) * np.sign(x) / scale**power / x.size
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


class Scaled(nn.Module):
    """One parameter, one site."""

    @nn.compact
    def __call__(self, x):
        return Site(name="residual")(x * self.param("factor", nn.initializers.ones, (1, 1)))


def test_a_site_hands_its_gradient_to_the_parameters_before_it():
    x = np.random.default_rng(0).normal(0.0, 3.0, (4, 6))

    def loss(factor):
        variables = {"params": {"factor": factor}, PENALTY: {"residual": {"limit": Limit(3.0, 4)}}}
        return Scaled().apply(variables, jnp.float32(x), mutable=[PENALTY])[1][PENALTY]["residual"][
            "cost"
        ]

    gradient = jax.grad(loss)(jnp.full((1, 1), 2.0, jnp.float32))
    # d/df mean((f x / 3)^4) = 4 f^3 mean((x / 3)^4)
    np.testing.assert_allclose(gradient, [[32.0 * np.mean((x / 3) ** 4)]], rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradient_of_all_parameters_is_a_difference_quotient(family, remat):
    model, params = small_model(family, spread=0.4)
    model, batch = with_config(model, remat=remat), small_batch(family)

    def loss(params):
        return sum(costs(model, params, batch, Limit(1.0, 4)).values())

    gradient = jax.jit(jax.grad(loss))(params)
    along = jax.tree.map(
        lambda g: g / jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient))), gradient
    )
    step = 1e-3

    @jax.jit
    def moved(by):
        return loss(jax.tree.map(lambda p, a: p + by * a, params, along))

    difference = moved(step) - moved(-step)
    slope = sum(
        jnp.vdot(g, a)
        for g, a in zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True)
    )
    np.testing.assert_allclose(difference / (2 * step), slope, rtol=2e-2)


def test_the_cost_is_of_the_value_before_rounding():
    model, params = small_model("bert")
    batch, limit = small_batch("bert"), Limit(0.1, 4)
    coarse = with_quant(
        model,
        QuantSpec(
            activation_bits=2, weight_bits=None, site_bits=((".*/ffn_residual", 2), (".*", 16))
        ),
    )
    ranges = calibrate(coarse, params, [batch])
    plain = costs(model, params, batch, limit)
    rounded = costs(coarse, params, batch, limit, ranges=ranges)
    # Every other site has a grid of 16 bits, so that the sum is the same before it is rounded.
    site = "layer_0/ffn_residual"
    np.testing.assert_allclose(rounded[site], plain[site], rtol=1e-3)


def test_sites_that_are_not_named_have_no_part_in_the_program():
    model, params = small_model("bert")
    batch = small_batch("bert")

    def program(**extra):
        def features(params):
            mutable = list(extra)
            return model.apply(
                {"params": params, **extra}, batch, method="features", mutable=mutable
            )

        return str(jax.make_jaxpr(features)(params))

    assert program() == program(**{PENALTY: {}})
    limited = program(**{PENALTY: collection(Limit(3.0, 4), SITES[:1])})
    assert limited.count(" abs ") == 1 + program().count(" abs ")
