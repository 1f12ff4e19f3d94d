"""BERT weights under their original names: Hugging Face's, plus `alpha.*` for the gates."""

from collections.abc import Mapping

import ml_collections
import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.interop.attention import attention_params, layer_params
from quantizable_flax.interop.torch_layout import TensorReader, Tree

ANCHOR = "embeddings.position_embeddings.weight"
# Parts of a checkpoint that masked LM does not use.
UNUSED = (
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)
HEAD = "cls.predictions"


def bert_params(mapping: Mapping[str, np.ndarray], config: ml_collections.ConfigDict) -> Tree:
    """Returns the `params` tree of `BertForMaskedLM`, numpy float32.

    Raises:
      UserError: a missing tensor or head, a wrong shape, a head that is not tied, or a tensor
        without a place.
    """
    model, reader = config.model, TensorReader(mapping, ANCHOR, ("bert.",))
    if reader.found and not reader.holds(HEAD):
        raise UserError(
            f"the weights have no tensors {HEAD}.*, the head of masked LM: they are of an encoder "
            "alone or of another architecture, save BertForMaskedLM."
        )
    width, table = model.hidden_size, "bert.embeddings."
    params: Tree = {
        "embeddings": {
            "word": reader.embedding(
                f"{table}word_embeddings", model.vocab_size, width, f"{HEAD}.decoder.weight"
            ),
            "position": reader.embedding(
                f"{table}position_embeddings", model.max_position_embeddings, width
            ),
            "token_type": reader.embedding(
                f"{table}token_type_embeddings", model.type_vocab_size, width
            ),
            "layer_norm": reader.layer_norm(f"{table}LayerNorm", width),
        },
        "mlm_head": {
            "dense": reader.linear(f"{HEAD}.transform.dense", width, width),
            "layer_norm": reader.layer_norm(f"{HEAD}.transform.LayerNorm", width),
            "bias": reader.tied(f"{HEAD}.bias", f"{HEAD}.decoder.bias", (model.vocab_size,)),
        },
    }
    for i in range(model.num_layers):
        params[f"layer_{i}"] = _layer(reader, f"bert.encoder.layer.{i}.", model)
    reader.ignore(*UNUSED)
    reader.ignore_positions(f"{table}position_ids")
    reader.check_all_used()
    return params


def _layer(reader: TensorReader, prefix: str, model: ml_collections.ConfigDict) -> Tree:
    width = model.hidden_size
    attention = attention_params(reader, f"{prefix}attention.self.", width, model)
    attention["output"] = reader.linear(f"{prefix}attention.output.dense", width, width)
    return layer_params(
        reader,
        prefix,
        model,
        attention,
        attention_norm="attention.output.LayerNorm",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        ffn_norm="output.LayerNorm",
    )
