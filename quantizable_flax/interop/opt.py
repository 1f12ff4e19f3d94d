"""OPT weights under their original names: Hugging Face's, plus `alpha.*` for the gates."""

from collections.abc import Mapping

import ml_collections
import numpy as np

from quantizable_flax.interop.attention import OPT_NAMES, attention_params, layer_params
from quantizable_flax.interop.torch_layout import TensorReader, Tree
from quantizable_flax.models.opt import POSITION_OFFSET

ANCHOR = "embed_positions.weight"
# As OPTForCausalLM saves it, OPTModel, and the decoder by itself.
ROOTS = ("model.decoder.", "decoder.", "")


def opt_params(mapping: Mapping[str, np.ndarray], config: ml_collections.ConfigDict) -> Tree:
    """Returns the `params` tree of `OptForCausalLM`, numpy float32.

    Raises:
      UserError: a missing tensor, a wrong shape, a head that is not tied, or a tensor without a
        place.
    """
    model, reader = config.model, TensorReader(mapping, ANCHOR, ROOTS)
    width, root = model.hidden_size, reader.root
    word = model.embed_size or width
    rows = model.max_position_embeddings + POSITION_OFFSET
    embeddings: Tree = {
        "word": reader.embedding(f"{root}embed_tokens", model.vocab_size, word, "lm_head.weight"),
        "position": reader.embedding(f"{root}embed_positions", rows, width),
    }
    params: Tree = {"embeddings": embeddings}
    if word != width:
        embeddings["project_in"] = reader.linear(f"{root}project_in", word, width, bias=False)
        params["project_out"] = reader.linear(f"{root}project_out", width, word, bias=False)
    if model.pre_layer_norm:
        params["final_layer_norm"] = reader.layer_norm(f"{root}final_layer_norm", width)
    for i in range(model.num_layers):
        params[f"layer_{i}"] = _layer(reader, f"{root}layers.{i}.", model)
    reader.check_all_used()
    return params


def _layer(reader: TensorReader, prefix: str, model: ml_collections.ConfigDict) -> Tree:
    return layer_params(
        reader,
        prefix,
        model,
        attention_params(reader, f"{prefix}self_attn.", model.hidden_size, model, OPT_NAMES),
        attention_norm="self_attn_layer_norm",
        ffn_in="fc1",
        ffn_out="fc2",
        ffn_norm="final_layer_norm",
    )
