"""BERT, RoBERTa and DistilBERT with each of their heads as an ONNX graph."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from quantizable_flax.onnx import masks
from quantizable_flax.onnx.attention import Around, attention, check_softmax
from quantizable_flax.onnx.grids import Value
from quantizable_flax.onnx.layers import (
    Build,
    added,
    as_rows,
    dense,
    gelu,
    layer_norm,
    relu,
    residual,
    spec_of_norm,
    tanh,
)
from quantizable_flax.onnx.tables import decoder, learned_tokens, lookup, output_shape

TOKENS = ("batch", "sequence")
ACTIVATIONS = {jnp.tanh: tanh, nn.relu: relu}  # of the pooler


def write_bert(build: Build) -> None:
    """Adds the whole model: inputs named as by transformers, `logits` or `last_hidden_state`."""
    graph, config = build.graph, build.config
    softmax = check_softmax(config.softmax)
    ids = graph.input("input_ids", "int64", TOKENS)
    mask = graph.input("attention_mask", "int64", TOKENS)
    types = graph.input("token_type_ids", "int64", TOKENS) if config.type_vocab_size > 1 else None
    batch = graph.node("Shape", ids, start=0, end=1, name="batch")
    shape_of_heads = masks.heads_shape(graph, batch, config)
    shown = masks.shown(graph, mask, batch, config.num_registers)
    around = masks.padding(graph, shown, shape_of_heads, softmax)
    x = _embeddings(build, ids, mask, types, batch)
    for i in range(config.num_layers):
        with graph.scope(f"layer_{i}"):
            x = _layer(build, x, around)
    _head(build, _behind(build, x, batch), batch)


def _behind(build: Build, x: Value, batch: str) -> Value:
    """Rows without those of the registers."""
    graph, c = build.graph, build.config
    if not c.num_registers:
        return x
    with graph.scope("tokens"):
        hidden = graph.node("Reshape", x.name, output_shape(build, batch, c.hidden_size))
        ends = (graph.constant([i], np.int64) for i in (c.num_registers, np.iinfo(np.int64).max, 1))
        tokens = graph.node("Slice", hidden, *ends)
        return as_rows(build, Value(tokens, x.codes), c.hidden_size)


def _embeddings(build: Build, ids: str, mask: str, types: str | None, batch: str) -> Value:
    graph, sites, config = build.graph, build.sites, build.config
    quant = config.quant
    with graph.scope("embeddings"):
        x = lookup(build, ids, "word", quant)  # [B, T, D]
        if config.type_vocab_size:
            types = types or graph.constant([[0]], np.int64)
            total = added(graph, x, lookup(build, types, "token_type", quant))
            x = sites.activation(total, "word_type_sum", quant)
        position = lookup(build, _rows(build, ids, mask), "position", quant)
        total = added(graph, x, position)
        if config.num_registers:
            with graph.scope("registers"):
                registers = learned_tokens(build, "register_tokens", batch)
            total = graph.node("Concat", registers, total, axis=1)
        x = sites.activation(total, "position_sum", quant)
        summed = as_rows(build, x, config.hidden_size)
        return layer_norm(build, summed, "layer_norm", spec_of_norm(config))


def _rows(build: Build, ids: str, mask: str) -> str:
    """Rows of the position table: in order, or as RoBERTa counts them."""
    graph, offset = build.graph, build.config.position_offset
    if offset:
        return graph.node("Add", masks.positions(graph, mask), graph.constant(offset, np.int64))
    length = graph.node("Squeeze", graph.node("Shape", ids, start=1, end=2, name="length"))
    return graph.node("Range", *(graph.constant(0, np.int64), length, graph.constant(1, np.int64)))


def _layer(build: Build, x: Value, around: Around) -> Value:
    c = build.config
    y, _ = attention(build, x, around, c.quant)
    x = _add_and_norm(build, "attention", x, y)
    y = dense(build, x, "ffn_in", c.quant, gelu)
    y = dense(build, y, "ffn_out", c.quant)
    return _add_and_norm(build, "ffn", x, y)


def _add_and_norm(build: Build, block: str, x: Value, y: Value) -> Value:
    c = build.config
    x = residual(build, block, x, y, c.quant)
    return layer_norm(build, x, f"{block}_layer_norm", spec_of_norm(c))


def _head(build: Build, x: Value, batch: str) -> None:
    graph, c = build.graph, build.config
    if c.head == "masked_lm":
        logits = _mlm_head(build, x)
        shape = output_shape(build, batch, c.vocab_size)
        graph.output(
            "logits", graph.node("Reshape", logits, shape), "float32", (*TOKENS, c.vocab_size)
        )
        return
    hidden = graph.node("Reshape", x.name, output_shape(build, batch, c.hidden_size))
    if c.head != "classifier":
        graph.output("last_hidden_state", hidden, "float32", (*TOKENS, c.hidden_size))
    if c.head == "none":
        return
    first = graph.node("Gather", hidden, graph.constant(0, np.int64), axis=1)
    with graph.scope("pooler"):
        pooled = build.sites.again(first, x.codes)
    pooled = dense(build, pooled, "pooler", c.head_quant, ACTIVATIONS[c.pooler_activation])
    if c.head == "pooler":
        graph.output("pooler_output", pooled.name, "float32", ("batch", c.hidden_size))
        return
    logits = dense(build, pooled, "classifier", c.head_quant).name
    graph.output("logits", logits, "float32", ("batch", c.num_classes))


def _mlm_head(build: Build, x: Value) -> str:
    graph, quant = build.graph, build.config.head_quant
    with graph.scope("mlm_head"):
        x = dense(build, x, "dense", quant, gelu)
        x = layer_norm(build, x, "layer_norm", quant and quant.for_layer_norm())
        bias = np.asarray(build.module()["bias"], np.float32)
        logits = decoder(build, x, "embeddings/word", quant, bias)
        return build.sites.activation(logits, "logits", quant).name
