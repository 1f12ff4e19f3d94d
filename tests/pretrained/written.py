"""Models to be written as transformers writes them, and what their folders are called there."""

import jax
import jax.numpy as jnp

from quantizable_flax import build_model
from tests.interop.test_to_state_dict import drawn, small_config

CLIPPED = {"softmax": "clipped", "gamma": -0.1, "zeta": 1.0 + 1 / 3}
MLP = {"gate": "mlp", "gate_hidden": 3, "gate_pi_init": 0.3, "gate_finetune": True}
# What we have in another class: the same weights, without what that class does not use.
OTHER_CLASS = {
    "BertForPreTraining": "BertForMaskedLM",
    "OPTModel": "OPTForCausalLM",
    "XLMRobertaModel": "RobertaModel",
}
DROPPED = {
    "BertForPreTraining": ("cls.seq_relationship", "bert.pooler"),
    "ViTModel": "pooler",
    "DeiTModel": "pooler",
}


def made(family: str, attention=None, **changes):
    """(model, params) of random parameters."""
    config = small_config(family, **changes)
    config.model.attention.update(attention or {})
    return build_model(config), jax.tree.map(jnp.asarray, drawn(config))
