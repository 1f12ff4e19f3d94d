"""BERT weights under their original names: Hugging Face's, plus `alpha.*` for the gates."""

from collections.abc import Mapping

import ml_collections
import numpy as np

from quantizable_flax.interop.attention import attention_params, layer_params
from quantizable_flax.interop.torch_layout import TensorReader, Tree

# Aliases of tied tensors, buffers, and parts of a checkpoint that masked LM does not use.
IGNORABLE = (
    "position_ids",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)


def bert_params(mapping: Mapping[str, np.ndarray], config: ml_collections.ConfigDict) -> Tree:
    """Returns the `params` tree of `BertForMaskedLM`, numpy float32.

    Raises:
      UserError: a missing tensor, a wrong shape, or a tensor without a place.
    """
    model, reader = config.model, TensorReader(mapping)
    width = model.hidden_size
    params: Tree = {
        "embeddings": {
            "word": reader.embedding("bert.embeddings.word_embeddings", model.vocab_size, width),
            "position": reader.embedding(
                "bert.embeddings.position_embeddings", model.max_position_embeddings, width
            ),
            "token_type": reader.embedding(
                "bert.embeddings.token_type_embeddings", model.type_vocab_size, width
            ),
            "layer_norm": reader.layer_norm("bert.embeddings.LayerNorm", width),
        },
        "mlm_head": {
            "dense": reader.linear("cls.predictions.transform.dense", width, width),
            "layer_norm": reader.layer_norm("cls.predictions.transform.LayerNorm", width),
            "bias": reader.take("cls.predictions.bias", (model.vocab_size,)),
        },
    }
    for i in range(model.num_layers):
        params[f"layer_{i}"] = _layer(reader, f"bert.encoder.layer.{i}.", model)
    reader.check_all_used(IGNORABLE)
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
