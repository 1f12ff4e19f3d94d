"""OPT as an ONNX graph that takes the keys and values of the past and returns those of now."""

from typing import Any

import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.models.opt import POSITION_OFFSET
from quantizable_flax.onnx import masks
from quantizable_flax.onnx.attention import Around, Past, attention, check_softmax
from quantizable_flax.onnx.grids import Value
from quantizable_flax.onnx.layers import (
    Build,
    added,
    as_rows,
    dense,
    layer_norm,
    relu,
    residual,
    spec_of_norm,
)
from quantizable_flax.onnx.tables import decoder, lookup, output_shape


def write_opt(build: Build) -> None:
    """Adds the whole model: tokens, a mask of them and of the past, and the past; `logits`."""
    graph = build.graph
    check_past(build.config)
    ids = graph.input("input_ids", "int64", ("batch", "sequence"))
    mask = graph.input("attention_mask", "int64", ("batch", "past + sequence"))
    past = _inputs(build)
    batch = graph.node("Shape", ids, start=0, end=1, name="batch")
    around, positions = _around(build, ids, mask, past[0].key, batch)
    x = _embeddings(build, ids, positions)
    present: list[Past | None] = []
    for i, old in enumerate(past):
        with graph.scope(f"layer_{i}"):
            x, new = _layer(build, x, around, old)
        present.append(new)
    _head(build, x, batch)
    for i, new in enumerate(filter(None, present)):
        _output(build, i, new)


def check_past(config: Any) -> None:
    """Raises UserError for what a graph with keys and values of the past cannot compute.

    Gates that average over the sequence, of which the past is a part, and registers, which a call
    would have to add to an empty past alone.
    """
    if config.num_registers:
        raise UserError(
            "an ONNX graph of OPT with past keys and values has no registers, found "
            f"model.num_registers={config.num_registers}: train without them, or export "
            "with --to=int8."
        )
    gate = config.gate
    if gate is not None and gate.pooled:
        raise UserError(
            "an ONNX graph of OPT with past keys and values needs gates that see no other token, "
            f"found gate_pooling={gate.pooling}: train with gate_pooling=none."
        )


def _inputs(build: Build) -> list[Past]:
    shape = ("batch", build.config.num_heads, "past", _head_size(build))
    return [
        Past(
            *(
                build.graph.input(f"past_key_values.{i}.{name}", "float32", shape)
                for name in Past._fields
            )
        )
        for i in range(build.config.num_layers)
    ]


def _output(build: Build, layer: int, present: Past) -> None:
    shape = ("batch", build.config.num_heads, "past + sequence", _head_size(build))
    for name, value in present._asdict().items():
        build.graph.output(f"present.{layer}.{name}", value, "float32", shape)


def _head_size(build: Build) -> int:
    return build.config.hidden_size // build.config.num_heads


def _around(build: Build, ids: str, mask: str, key: str, batch: str) -> tuple[Around, str]:
    """What attention reads, and the positions of this call's tokens [B, T]."""
    graph, config = build.graph, build.config
    before = graph.node("Shape", key, start=2, end=3, name="past")
    length = graph.node("Shape", ids, start=1, end=2, name="length")
    known = masks.positions(graph, mask)
    end, axis = graph.node("Add", before, length), graph.constant([1], np.int64)
    positions = graph.node("Slice", known, before, end, axis)
    around = masks.causal(
        graph,
        mask,
        graph.node("Squeeze", length),
        graph.node("Squeeze", before),
        masks.heads_shape(graph, batch, config),
        check_softmax(config.softmax),
    )
    return around, positions


def _embeddings(build: Build, ids: str, positions: str) -> Value:
    graph, c = build.graph, build.config
    with graph.scope("embeddings"):
        x = as_rows(build, lookup(build, ids, "word", c.quant), c.word_size)
        if c.projects:
            x = dense(build, x, "project_in", c.quant)
        rows = graph.node("Add", positions, graph.constant(POSITION_OFFSET, np.int64))
        position = as_rows(build, lookup(build, rows, "position", c.quant), c.hidden_size)
        return build.sites.activation(added(graph, x, position), "sum", c.quant)


def _layer(build: Build, x: Value, around: Around, past: Past) -> tuple[Value, Past | None]:
    c = build.config
    y = _norm(build, x, "attention") if c.pre_layer_norm else x
    y, present = attention(build, y, around, c.quant, context_before_gate=True, past=past)
    x = residual(build, "attention", x, y, c.quant)
    x = x if c.pre_layer_norm else _norm(build, x, "attention")
    y = _norm(build, x, "ffn") if c.pre_layer_norm else x
    y = dense(build, y, "ffn_in", c.quant, relu)
    y = dense(build, y, "ffn_out", c.quant)
    x = residual(build, "ffn", x, y, c.quant)
    return x if c.pre_layer_norm else _norm(build, x, "ffn"), present


def _norm(build: Build, x: Value, block: str) -> Value:
    c = build.config
    return layer_norm(build, x, f"{block}_layer_norm", spec_of_norm(c))


def _head(build: Build, x: Value, batch: str) -> None:
    graph, c = build.graph, build.config
    if c.pre_layer_norm:
        spec = spec_of_norm(c, final=True)
        x = layer_norm(build, x, "final_layer_norm", spec)
    if c.projects:
        x = dense(build, x, "project_out", c.quant)
    logits = decoder(build, x, "embeddings/word", c.head_quant)
    logits = build.sites.activation(logits, "logits", c.head_quant).name
    shaped = graph.node("Reshape", logits, output_shape(build, batch, c.vocab_size))
    graph.output("logits", shaped, "float32", ("batch", "sequence", c.vocab_size))
