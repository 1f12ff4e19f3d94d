"""What each scheme quantizes: every product of a family, and its sites by name."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from quantizable_flax import QuantSpec, build_model
from quantizable_flax.models.build import with_quant
from quantizable_flax.ptq.calibrate import unknown_ranges
from quantizable_flax.quantization.spec import parse_coverage
from tests.small import small_batch, small_config, small_model

BITS = 3


def operands(fn, *arguments) -> list[tuple[np.ndarray, np.ndarray]]:
    """Runs fn and returns the two operands of each of its matrix products."""

    def run(closed, values, found):
        environment = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        environment |= dict(zip(closed.jaxpr.invars, values, strict=True))

        def read(x):
            return x.val if hasattr(x, "val") else environment[x]

        for eqn in closed.jaxpr.eqns:
            inputs = [read(x) for x in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name == "dot_general":
                found.append(tuple(inputs))
            if hasattr(inner, "consts"):
                outputs = run(inner, inputs, found)
            else:
                outputs = eqn.primitive.bind(*inputs, **eqn.params)
                outputs = outputs if eqn.primitive.multiple_results else [outputs]
            environment |= dict(zip(eqn.outvars, outputs, strict=True))
        return [read(x) for x in closed.jaxpr.outvars]

    closed = jax.make_jaxpr(fn)(*arguments)

    @jax.jit
    def collect(leaves):
        found: list = []
        run(closed, leaves, found)
        return found

    return jax.device_get(collect(jax.tree.leaves(arguments)))


@pytest.mark.parametrize(
    ("family", "setup", "products", "in_float"),
    [
        # Patches, q, k, v, scores, context, output, FFN in and out, head.
        ("vit", "all", 10, 0),
        ("opt", "all", 9, 0),
        # Its head is a dense layer and the decoder.
        ("bert", "fp32_head", 10, 2),
    ],
)
def test_every_product_has_operands_on_a_grid(family, setup, products, in_float):
    assert off_grid(family, setup) == (products, in_float)


def off_grid(family: str, setup: str, **options) -> tuple[int, int]:
    """(number of products, number of those with an operand that is on no grid of BITS)."""
    # This gate has no product of its own, but moves each head's context off the grid.
    model, params = small_model(family, {"gate": "unconditional"})
    spec = QuantSpec(BITS, BITS, **parse_coverage(setup), **options)

    def forward(params, batch):
        return with_quant(model, spec).apply(
            {"params": params}, batch, method="loss", mutable=["ranges"]
        )

    pairs = operands(forward, params, small_batch(family))
    fine = [all(len(np.unique(x)) <= 2**BITS for x in pair) for pair in pairs]
    return len(fine), fine.count(False)


def test_published_opt_feeds_its_output_projection_off_the_grid():
    # One layer, so one product more than with a grid behind the gate.
    assert off_grid("opt", "all", gated_context=False) == (9, 1)


def sites(model, **spec) -> dict[str, tuple[int, ...]]:
    """The paths of everything that `spec` quantizes, and the shapes of their ranges."""
    batch, quantized = model.example_batch(), with_quant(model, QuantSpec(**spec))
    fresh = jax.eval_shape(functools.partial(model.init, method="loss"), jax.random.key(0), batch)
    ranges = unknown_ranges(quantized, nn.meta.unbox(fresh["params"]), batch)
    flat = traverse_util.flatten_dict(ranges, sep="/")
    return {path.removesuffix("/range"): known.min.shape for path, known in flat.items()}


def both(*names: str) -> set[str]:
    return {f"{name}/{kind}" for name in names for kind in ("weight", "output")}


EMBEDDINGS = {
    "embeddings/patches",
    *both("embeddings/patch_embedding", "embeddings/patch_layer_norm"),
    "embeddings/cls_token_weight",
    "embeddings/position_table_weight",
    "embeddings/register_tokens_weight",
    "embeddings/sum",
}
LAYER = {
    *both("attention_layer_norm", "ffn_layer_norm", "ffn_in", "ffn_out"),
    *both("attention/query", "attention/key", "attention/value", "attention/output"),
    "attention/scores",
    "attention/probs",
    "attention/context",
    "attention_residual",
    "ffn_residual",
}


def test_sites_of_vit():
    options = {"num_layers": 2, "num_registers": 2, "patch_layer_norm": True}
    model = build_model(small_config("vit", {"gate": "linear"}, **options))
    expected = EMBEDDINGS | {f"layer_{i}/{name}" for i in range(2) for name in LAYER}
    expected |= both("final_layer_norm", "head")
    found = set(sites(model, head=True))
    assert found == expected
    assert set(sites(model, head=False)) == expected - both("head")
    weights = {name for name in found if name.endswith("weight")}
    assert set(sites(model, head=True, activation_bits=None)) == weights
    assert set(sites(model, head=True, weight_bits=None)) == found - weights


def test_opt_has_one_more_site_by_layer_behind_the_gate():
    model = build_model(small_config("opt", {"gate": "linear"}, num_layers=2))
    published = set(sites(model, head=True, gated_context=False))
    more = set(sites(model, head=True, gated_context=True)) - published
    assert more == {f"layer_{i}/attention/gated_context" for i in range(2)}
    assert {f"layer_{i}/attention/context" for i in range(2)} < published
    plain = build_model(small_config("opt", num_layers=2))
    assert set(sites(plain, head=True, gated_context=True)) == published


def test_per_channel_means_one_scale_by_output_or_row():
    vit = build_model(small_config("vit", num_registers=2))
    shapes = sites(vit, weight_per_channel=True, head=True)
    for name, shape in {
        "embeddings/patch_embedding/weight": (1, 32),
        "embeddings/position_table_weight": (17, 1),
        "embeddings/register_tokens_weight": (2, 1),
        "layer_0/ffn_in/weight": (1, 64),
        "layer_0/ffn_layer_norm/weight": (32,),
        "head/weight": (1, 5),
        "head/output": (),
    }.items():
        assert shapes[name] == shape, name
    opt = sites(build_model(small_config("opt")), weight_per_channel=True, head=True)
    assert opt["embeddings/word/weight"] == (96, 1)
    assert opt["embeddings/position/weight"] == (18, 1)
