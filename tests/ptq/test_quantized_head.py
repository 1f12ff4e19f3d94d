"""A head on grids scores its labels chunk by chunk, as one in floating point does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec
from tests.ptq.int8_case import batch_of, make_case

WHOLE = {"loss_chunk": 0}
PARTS = {"loss_chunk": 5}  # of 12 positions: three chunks of 4


@functools.cache
def case(family: str):
    return make_case(family, QuantSpec(head=True))


def form(family: str, name: str, **changes):
    """(model, its variables) in one of the forms of `Case`, some keys of its config changed."""
    made = case(family)
    variables = {"simulated": {"params": made.params, "ranges": made.ranges}}
    variables["native"] = {"params": made.codes}
    model = getattr(made, name)
    return model.clone(config=dataclasses.replace(model.config, **changes)), variables[name]


def program(model, batch):
    return jax.jit(lambda variables: model.apply(variables, batch, method="loss"))


@pytest.mark.parametrize("name", ["simulated", "native"])
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_logits_exist_by_chunks_and_say_the_same(family, name):
    batch, found = batch_of(family), {}
    for label, changes in (("whole", WHOLE), ("parts", PARTS)):
        model, variables = form(family, name, **changes)
        loss = program(model, batch)
        # The vocabulary of 96 is nobody's width.
        logits = re.findall(r"tensor<([\dx]+)x96xf32>", loss.lower(variables).as_text())
        rows = max(int(np.prod([int(n) for n in shape.split("x")])) for shape in logits)
        assert rows == (36 if label == "whole" else 12)
        found[label] = jax.device_get(loss(variables))
    for parts, whole in zip(found["parts"], found["whole"], strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-6)  # sums in another order
    assert np.all(found["parts"].weight > 0)


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_gradients_of_a_loss_on_grids_by_chunks(family):
    def grads(changes):
        model, variables = form(family, "simulated", **changes)

        def total(params):
            return model.apply(
                {**variables, "params": params}, batch_of(family), method="loss"
            ).total

        return jax.jit(jax.grad(total))(variables["params"])

    parts, whole = (jax.tree.leaves(grads(changes)) for changes in (PARTS, WHOLE))
    # That of a key's bias is nothing but rounding: its scale is that of the others.
    largest = max(np.abs(a).max() for a in whole)
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("site", ["mlm_head/logits", "logits"])
def test_a_site_of_logits_that_is_switched_off_rounds_no_chunk(site):
    family = "opt" if site == "logits" else "bert"
    model, variables = form(family, "simulated", **PARTS)
    losses = {}
    for on in (True, False):
        switch: dict = {"on": jnp.asarray(on)}
        for name in reversed(site.split("/")):
            switch = {name: switch}
        losses[on] = program(model, batch_of(family))({**variables, "switches": switch}).total
    float_model, _ = form(
        family, "simulated", quant=QuantSpec(head=True, float_sites=site), **PARTS
    )
    expected = program(float_model, batch_of(family))(variables).total
    np.testing.assert_allclose(losses[False], expected, rtol=1e-6)
    assert abs(losses[True] - expected) > 1e-4
