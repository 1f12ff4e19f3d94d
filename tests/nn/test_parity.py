"""Attention against the original, every variant of BERT's and of OPT's module."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from quantizable_flax import MultiHeadAttention, build_model
from quantizable_flax.interop.engine import read
from quantizable_flax.models.weights import Gate as GateName
from quantizable_flax.models.weights import WeightNames
from quantizable_flax.nn.gate import Gate
from quantizable_flax.quantization.sites import Site
from tests.helpers import (
    CONFIGS,
    Golden,
    deviation,
    golden,
    golden_names,
    is_key_bias,
    pairs,
)

# float32 on both sides, sums of at most 48 terms in another order: measured 4e-7 for values, and
# 1e-6 for gradients, which pass through two more such sums and the softmax's cancellation.
FORWARD, BACKWARD = 1e-5, 1e-5
SIDES = ("query", "key", "value")
NAMES = {  # of the attention alone; that of BERT is the inner one, without its output projection
    "bert": {side: side for side in SIDES},
    "opt": {**{side: f"{side[0]}_proj" for side in SIDES}, "output": "out_proj"},
}
VARIANTS = [
    (name.removeprefix("attention_"), variant)
    for name in golden_names("attention_*")
    for variant in golden(name).config["variants"]
]


@dataclasses.dataclass
class Variant:
    """One golden variant: our module, its params, and the golden input."""

    file: Golden
    name: str
    module: MultiHeadAttention
    config: object
    mask: jax.Array

    @property
    def family(self) -> str:
        return self.file.config["arch"]

    @property
    def params(self):
        return self.ours(self.file.group(f"{self.name}/w"))

    @property
    def hidden(self):
        return jnp.asarray(self.file["in/hidden"])

    def ours(self, tensors):
        """Weights, or gradients, under the original's names as our tree."""
        names = {**NAMES[self.family], "gate": GateName("alpha")}
        table = WeightNames("original", anchor=f"{names['query']}.weight", names=names)
        fresh = jax.eval_shape(self.module.init, jax.random.key(0), self.hidden)["params"]
        flat = flatten_dict(nn.meta.unbox(fresh), sep="/")
        shapes = {path: x.shape for path, x in flat.items()}
        return read(tensors, (table,), shapes, build_model(self.config).config)

    def context(self, params, hidden):
        return self.module.apply({"params": params}, hidden, self.mask)

    def with_our_softmax(self) -> "Variant":
        config = self.config.copy_and_resolve_references()
        config.model.attention.blind_queries = "zero"
        softmax_fn = build_model(config).config.softmax
        return dataclasses.replace(self, module=self.module.clone(softmax=softmax_fn))


def load(family: str, name: str) -> Variant:
    file = golden(f"attention_{family}")
    original, length = file.config["variants"][name], file.config["T"]
    sizes = {"hidden_size": file.config["hidden"], "heads": file.config["heads"]}
    unused = {"layers": 1, "ffn": 1, "vocab": 1, "pad_id": 0}
    config = CONFIGS[family]({**sizes, **unused, "seq": length, "attention": original})
    if "max_seq_length" in original:  # only alpha asks for it
        config.model.max_position_embeddings = config.data.seq_len = original["max_seq_length"]
    config.model.attention.blind_queries = "uniform"
    built = build_model(config).config
    mask = jnp.asarray(file["in/mask_2d"], bool)[:, None, None, :]
    if family == "opt":
        mask &= jnp.tril(jnp.ones((1, 1, length, length), bool))
    module = MultiHeadAttention(
        built.num_heads,
        softmax=built.softmax,
        gate=built.gate,
        output_projection=family == "opt",
    )
    return Variant(file, name, module, config, mask)


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def variant(request) -> Variant:
    return load(*request.param)


def test_values_match_the_original(variant):
    context, kept = variant.module.apply(
        {"params": variant.params},
        variant.hidden,
        variant.mask,
        capture_intermediates=lambda module, _: isinstance(module, (Site, Gate)),
        mutable=["intermediates", "stats"],
    )
    expected = variant.file.group(f"{variant.name}/out")
    captured = kept["intermediates"]
    assert deviation(context, expected["context"]) < FORWARD
    if "attn_probs" in expected:
        (probs,) = captured["probs"]["__call__"]
        assert deviation(probs, expected["attn_probs"]) < FORWARD
    if "last_gate_avg_prob" in expected:
        mean_BxH = np.asarray(kept["stats"]["gate"]["mean"])
        assert deviation(mean_BxH.mean(0), expected["last_gate_avg_prob"]) < FORWARD
    if "last_gate_all_probs" in expected:  # of conditional gates
        (factor_BxTxHx1,) = captured["gate"]["__call__"]
        probability_BxHxTx1 = jnp.swapaxes(factor_BxTxHx1, 1, 2) / variant.module.gate.scale
        assert deviation(probability_BxHxTx1, expected["last_gate_all_probs"]) < FORWARD


def test_gradients_match_the_original(variant):
    _, backward = jax.vjp(variant.context, variant.params, variant.hidden)
    grads, grad_hidden = backward(jnp.asarray(variant.file["in/cot"]))
    assert deviation(grad_hidden, variant.file[f"{variant.name}/grad_hidden"]) < BACKWARD

    # Tensors that the file leaves out are marked by NaN and not compared.
    weights = variant.file.group(f"{variant.name}/w")
    known = variant.file.group(f"{variant.name}/grad")
    padded = {key: known.get(key, np.full(w.shape, np.nan)) for key, w in weights.items()}
    largest = max(np.abs(grad).max() for grad in known.values())
    for path, actual, expected in pairs(grads, variant.ours(padded)):
        compared = ~np.isnan(expected)
        if not compared.any():
            continue
        scale = largest if is_key_bias(path) else np.abs(expected[compared]).max()
        assert np.abs(actual[compared] - expected[compared]).max() < BACKWARD * scale, path


@pytest.mark.parametrize("name", [name for family, name in VARIANTS if family == "opt"])
def test_opt_with_our_softmax_differs_at_padded_queries_alone(name):
    variant = load("opt", name)
    ours = variant.with_our_softmax()
    expected = variant.file[f"{name}/out/context"]
    context, backward = jax.vjp(ours.context, ours.params, ours.hidden)
    seeing = np.asarray(variant.mask.any(-1))[:, 0]  # [B, T]
    assert 0 < (~seeing).sum() < seeing.size
    found = np.asarray(context) * seeing[..., None]
    assert deviation(found, expected * seeing[..., None]) < FORWARD
    # What sees nothing attends to nothing: the output projection's bias is all that is left.
    bias = np.broadcast_to(ours.params["output"]["bias"], context.shape)
    np.testing.assert_array_equal(context[~seeing], bias[~seeing])
    _, grad_hidden = backward(jnp.asarray(variant.file["in/cot"]))
    whole = seeing.all(axis=1)  # the other samples have no such query
    expected = variant.file[f"{name}/grad_hidden"]
    assert deviation(grad_hidden[whole], expected[whole]) < BACKWARD
