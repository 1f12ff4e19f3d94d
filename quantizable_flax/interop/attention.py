"""What the families' layers share under original names: attention, `alpha` for gates, FFN."""

import ml_collections
import numpy as np

from quantizable_flax.interop.torch_layout import TensorReader, Tree

BERT_NAMES = {"query": "query", "key": "key", "value": "value"}
OPT_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}


def attention_params(
    reader: TensorReader,
    prefix: str,
    width: int,
    model: ml_collections.ConfigDict,
    names: dict[str, str] = BERT_NAMES,
    gate: str = "alpha",
) -> Tree:
    """The projections in `names` (ours -> original) and the gate, if the model has one.

    All names are the original's, below the prefix.
    """
    params: Tree = {
        ours: reader.linear(prefix + theirs, width, width) for ours, theirs in names.items()
    }
    if model.attention.gate != "none":
        params["gate"] = gate_params(reader, prefix + gate, width, model)
    return params


def gate_params(
    reader: TensorReader, name: str, width: int, model: ml_collections.ConfigDict
) -> Tree:
    """The gate's `alpha` tensors; the original keeps one small module per head, we stack them."""
    heads, size, hidden = model.num_heads, width // model.num_heads, model.attention.gate_hidden
    kind = model.attention.gate
    if kind == "unconditional":
        return {"logit": reader.take(name, (heads,))}
    if kind == "all_heads_linear":
        return reader.linear(name, width, heads)
    last = ".2" if kind == "mlp" else ""
    inputs = hidden if kind == "mlp" else size
    outer = [reader.linear(f"{name}.{h}{last}", inputs, 1) for h in range(heads)]
    params: Tree = {
        "kernel": np.stack([np.ravel(part["kernel"]) for part in outer]),
        "bias": np.concatenate([np.ravel(part["bias"]) for part in outer]),
    }
    if kind == "mlp":
        inner = [reader.linear(f"{name}.{h}.0", size, hidden) for h in range(heads)]
        params["hidden_kernel"] = np.stack([part["kernel"] for part in inner])
        params["hidden_bias"] = np.stack([part["bias"] for part in inner])
    return params


def layer_params(
    reader: TensorReader,
    prefix: str,
    model: ml_collections.ConfigDict,
    attention: Tree,
    *,
    attention_norm: str,
    ffn_in: str,
    ffn_out: str,
    ffn_norm: str,
) -> Tree:
    """A whole layer around its attention; the names are the original's, below the prefix."""
    width, inner = model.hidden_size, model.intermediate_size
    return {
        "attention": attention,
        "attention_layer_norm": reader.layer_norm(prefix + attention_norm, width),
        "ffn_in": reader.linear(prefix + ffn_in, width, inner),
        "ffn_out": reader.linear(prefix + ffn_out, inner, width),
        "ffn_layer_norm": reader.layer_norm(prefix + ffn_norm, width),
    }
