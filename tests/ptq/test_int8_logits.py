"""Models on integers against the simulation: every family, every kind of grid."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from quantizable_flax import QuantSpec
from quantizable_flax.models.build import with_config
from quantizable_flax.quantization.spec import parse_coverage
from tests.ptq.int8_case import batch_of, check_agreement, inputs_of, make_case
from tests.small import small_model

ATTENTION = (
    {},
    {"softmax": "clipped", "gamma": -0.1},
    {"gate": "linear"},
    {"softmax": "clipped", "gamma": -0.1, "gate": "mlp"},
)
BY_ROW = {"softmax": "clipped", "alpha": 0.5, "length_normalised": True, "qk_norm": True}
SIZES = {
    "bert": ({}, {"num_layers": 2}),
    "opt": ({}, {"pre_layer_norm": False, "embed_size": 16}),
    "vit": ({}, {"num_registers": 2, "patch_layer_norm": True}),
}
# Sites that every family has.
PATTERNS = ("layer_0/ffn_in/.*", ".*/key/output", ".*/probs", ".*weight", ".*/attention/.*")


@st.composite
def specs(draw, family: str) -> QuantSpec:
    setup = draw(st.sampled_from(["all", "fp32_head"]))
    final = family == "vit"
    parts = ["", "+int16_all_LN", "+int16_final_LN"][: 3 if final else 2]
    site_bits = st.tuples(st.sampled_from(PATTERNS), st.sampled_from([2, 4, 8, 16]))
    return QuantSpec(
        draw(st.sampled_from([8, 4, 2, None])),
        draw(st.sampled_from([8, 6, 3, None])),
        weight_per_channel=draw(st.booleans()),
        activation_symmetric=draw(st.booleans()),
        activation_ranges=draw(st.sampled_from(["static", "token"])),
        float_sites=draw(st.sampled_from([None, *PATTERNS])),
        site_bits=tuple(draw(st.lists(site_bits, max_size=2))),
        **parse_coverage(setup + draw(st.sampled_from(parts))),
    )


# Each example compiles four programs: `make soak` draws more, none makes a failure smaller.
@pytest.mark.parametrize("examples", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", ["opt", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bert", "vit"))]
)
def test_integers_give_the_logits_of_the_simulation(family, examples):
    @hypothesis.settings(max_examples=examples, phases=(hypothesis.Phase.generate,))
    @hypothesis.given(data=st.data())
    def check(data):
        spec = data.draw(specs(family))
        attention, sizes = (data.draw(st.sampled_from(x)) for x in (ATTENTION, SIZES[family]))
        check_agreement(make_case(family, spec, attention, **sizes), *inputs_of(family))

    check()


@pytest.mark.parametrize(
    ("family", "spec", "sizes"),
    [
        # Each of what random specs may leave out.
        ("bert", {"activation_ranges": "token", "weight_per_channel": True, "head": True}, {}),
        ("opt", {"head": True}, {"pre_layer_norm": False, "embed_size": 16}),
        ("vit", {"head": True}, {"num_registers": 2, "patch_layer_norm": True}),
        ("opt", {"final_layer_norm_bits": 16, "head": True, "activation_symmetric": True}, {}),
        ("bert", {"head": True}, {"attention": BY_ROW | {"gate": "value"}, "num_registers": 2}),
        (
            "opt",
            {"layer_norm_bits": 16, "weight_per_channel": True},
            {"attention": {"gate": "elementwise", "qk_norm": True}, "num_registers": 2},
        ),
    ],
)
def test_integers_of_named_schemes(family, spec, sizes):
    case, inputs = make_case(family, QuantSpec(**spec), **sizes), inputs_of(family)
    found = check_agreement(case, *inputs)
    floats = case.in_float(*inputs)
    # It is quantized indeed, and near what it approximates.
    assert 1e-3 < np.abs(found - floats).max() / np.abs(floats).max() < 0.2


def test_gathered_predictions_of_bert():
    case = make_case("bert", QuantSpec(head=True), max_predictions=4)
    batch = batch_of("bert")
    found = check_agreement(case, batch, method="loss")
    everywhere = case._replace(native=with_config(case.native, max_predictions=0))
    for few, all_ in zip(found, everywhere.on_integers(batch, method="loss"), strict=True):
        np.testing.assert_allclose(few, all_, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_masked_tokens_do_not_reach_the_logits(family):
    """The code of a probability 0 is not 0, and must still weigh nothing."""
    case = make_case(family, QuantSpec(head=True))
    ids, mask = inputs_of(family)
    other = jnp.where(mask == 1, ids, (ids + 7) % 90 + 2)
    first, second = (case.on_integers(x, mask)[mask == 1] for x in (ids, other))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - case.on_integers(other)[mask == 1]).max() > 1e-2


@functools.cache
def float_params(family: str):
    return small_model(family)[1]


def zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("zeros", zeros),
        ("constants", lambda x: jnp.full_like(x, 0.25)),
        ("no negative", jnp.abs),
        ("no positive", lambda x: -jnp.abs(x)),
    ],
)
def test_tensors_of_one_kind_give_finite_logits(family, name, change):
    case = make_case(
        family, QuantSpec(head=True), params=jax.tree.map(change, float_params(family))
    )
    found = check_agreement(case, *inputs_of(family))
    if name == "zeros":
        np.testing.assert_array_equal(found, 0.0)
    if name == "no negative":  # the others end in constants
        floats = case.in_float(*inputs_of(family))
        assert np.abs(found - floats).max() < 0.1 * np.abs(floats).max()


@pytest.mark.parametrize(
    "family", ["opt", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bert", "vit"))]
)
def test_grids_of_two_bits(family):
    case = make_case(family, QuantSpec(2, 2, head=True))
    found = check_agreement(case, *inputs_of(family))
    assert 1 < len(np.unique(found)) <= 4
