"""Small models with an outlier planted in a token, a dimension and a site, and what they read."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from quantizable_flax.quantization.sites import Site
from quantizable_flax.report.inputs import Inputs, make_inputs
from tests.small import small_batch, small_model

DIMENSION, TOKEN, PLACE = 5, 9, 6  # of text, the token's number; of images, the token's place
SITE = "layer_0/ffn_out/output"
ATTENTION: dict[str, dict[str, Any]] = {
    "bert": {"softmax": "clipped", "gamma": -0.1},
    "opt": {"gate": "linear", "gate_pi_init": 0.25, "gate_finetune": True},
    "vit": {},
}


class Letters:
    """A tokenizer whose tokens have their number for a text."""

    def decode(self, ids):
        return f" t{ids[0]}\n" if ids[0] != 3 else ""


class LettersTask:
    tokenizer = Letters()


def planted(family: str, attention: dict[str, Any] | None = None, **config: Any):
    """(model, params) whose FFN output is large at one token and in one dimension."""
    model, params = small_model(family, attention or ATTENTION[family], **config)
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    table, row = ("position_table", PLACE) if family == "vit" else ("word/embedding", TOKEN)
    # Behind any LayerNorm the dimension is near sqrt(32) at that token, and below 4 elsewhere.
    flat[f"embeddings/{table}"] = flat[f"embeddings/{table}"].at[row, DIMENSION].set(300.0)
    flat["layer_0/ffn_in/kernel"] = (
        flat["layer_0/ffn_in/kernel"].at[:, 0].set(0.0).at[DIMENSION, 0].set(1.0)
    )
    flat["layer_0/ffn_in/bias"] = flat["layer_0/ffn_in/bias"].at[0].set(-4.0)
    flat["layer_0/ffn_out/kernel"] = (
        flat["layer_0/ffn_out/kernel"].at[0].set(0.0).at[0, DIMENSION].set(-3000.0)
    )
    for name in ("attention_layer_norm", "ffn_layer_norm"):
        flat[f"layer_0/{name}/scale"] = jnp.ones_like(flat[f"layer_0/{name}/scale"])
    return model, traverse_util.unflatten_dict(flat, sep="/")


def inputs_of(family: str, model: Any) -> Inputs:
    """Three examples; of BERT with padding, and the token in all texts."""
    batch = {key: np.array(x) for key, x in small_batch(family).items()}
    if family != "vit":
        batch["input_ids"][:, 4] = TOKEN
        batch["input_ids"][1, 7] = TOKEN
    if family == "bert":
        batch["attention_mask"] = np.ones_like(batch["input_ids"])
        batch["attention_mask"][2, 8:] = 0
    return make_inputs(model, LettersTask(), batch, 10_000)


def captured(model: nn.Module, params: Any, inputs: Inputs) -> dict[str, np.ndarray]:
    """What every site returns, by Flax's own means."""

    @functools.partial(jax.jit, static_argnums=0)
    def forward(model, params, batch):
        return model.apply(
            {"params": params},
            batch,
            method="features",
            mutable=["intermediates"],
            capture_intermediates=lambda m, name: isinstance(m, Site) and name == "__call__",
        )[1]["intermediates"]

    batch = {key: jnp.asarray(x) for key, x in inputs.batch.items()}
    flat = traverse_util.flatten_dict(forward(model, params, batch), sep="/")
    return {
        path.removesuffix("/__call__"): np.asarray(x[0], np.float64) for path, x in flat.items()
    }
