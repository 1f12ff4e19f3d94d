"""ViT and DeiT as an ONNX graph: images of one size, any number of them."""

import numpy as np

from quantizable_flax.onnx import masks
from quantizable_flax.onnx.attention import Around, attention, check_softmax
from quantizable_flax.onnx.grids import Value
from quantizable_flax.onnx.layers import (
    Build,
    as_rows,
    dense,
    gelu,
    layer_norm,
    residual,
    spec_of_norm,
)
from quantizable_flax.onnx.tables import learned_table, learned_tokens, output_shape


def write_vit(build: Build) -> None:
    """Adds the whole model: normalised `pixel_values` [B, C, H, W]; `logits` or hidden states."""
    graph, c = build.graph, build.config
    shape = ("batch", c.channels, c.image_size, c.image_size)
    images = graph.input("pixel_values", "float32", shape)
    batch = graph.node("Shape", images, start=0, end=1, name="batch")
    shape_of_heads = masks.heads_shape(graph, batch, c)
    around = masks.unmasked(graph, shape_of_heads, check_softmax(c.softmax), c.num_tokens)
    x = _embeddings(build, images, batch)
    for i in range(c.num_layers):
        with graph.scope(f"layer_{i}"):
            x = _layer(build, x, around)
    x = layer_norm(build, x, "final_layer_norm", spec_of_norm(c, final=True))
    _head(build, x, batch)


def _patches(build: Build, images: str) -> str:
    """[B, C, H, W] -> [B N, size size C], each patch row by row, as in `models.vit`."""
    graph, c = build.graph, build.config
    count, size = c.image_size // c.patch_size, c.patch_size
    cut = graph.constant([-1, c.channels, count, size, count, size], np.int64)
    cut = graph.node("Reshape", images, cut)
    cut = graph.node("Transpose", cut, perm=[0, 2, 4, 3, 5, 1])
    return graph.node("Reshape", cut, graph.constant([-1, size * size * c.channels], np.int64))


def _embeddings(build: Build, images: str, batch: str) -> Value:
    graph, c = build.graph, build.config
    with graph.scope("embeddings"):
        patches = build.sites.activation(_patches(build, images), "patches", c.quant)
        rows = dense(build, patches, "patch_embedding", c.quant)
        if c.patch_layer_norm:
            rows = layer_norm(build, rows, "patch_layer_norm", spec_of_norm(c))
        x = graph.node("Reshape", rows.name, output_shape(build, batch, c.hidden_size))
        names = ["cls_token"] + ["distillation_token"] * (c.distillation != "none")
        first = [learned_tokens(build, name, batch) for name in names]
        x = graph.node("Concat", *first, x, axis=1)
        positions = graph.array("position_table", learned_table(build, "position_table"))
        with graph.because("learned tokens are few: on their grids, but added in float32"):
            x = graph.node("Add", x, positions)
        if c.num_registers:
            x = _with_registers(build, x, len(first), batch)
        return as_rows(build, build.sites.activation(x, "sum", c.quant), c.hidden_size)


def _with_registers(build: Build, x: str, place: int, batch: str) -> str:
    graph = build.graph
    ends = [graph.constant([i], np.int64) for i in (0, place, build.config.num_positions, 1)]
    before = graph.node("Slice", x, ends[0], ends[1], ends[3])
    behind = graph.node("Slice", x, ends[1], ends[2], ends[3])
    registers = learned_tokens(build, "register_tokens", batch)
    return graph.node("Concat", before, registers, behind, axis=1)


def _layer(build: Build, x: Value, around: Around) -> Value:
    c = build.config
    y = layer_norm(build, x, "attention_layer_norm", spec_of_norm(c))
    y, _ = attention(build, y, around, c.quant)
    x = residual(build, "attention", x, y, c.quant)
    y = layer_norm(build, x, "ffn_layer_norm", spec_of_norm(c))
    y = dense(build, y, "ffn_in", c.quant, gelu)
    y = dense(build, y, "ffn_out", c.quant)
    return residual(build, "ffn", x, y, c.quant)


def _head(build: Build, x: Value, batch: str) -> None:
    graph, c = build.graph, build.config
    hidden = graph.node("Reshape", x.name, output_shape(build, batch, c.hidden_size))
    if not c.num_classes:
        shape = ("batch", c.num_tokens, c.hidden_size)
        graph.output("last_hidden_state", hidden, "float32", shape)
        return
    logits = _classes(build, "head", hidden, 0, x)
    if c.distillation == "head":
        other = _classes(build, "distillation_head", hidden, 1, x)
        logits = graph.node("Div", graph.node("Add", logits, other), graph.constant(2.0))
    graph.output("logits", logits, "float32", ("batch", c.num_classes))


def _classes(build: Build, name: str, hidden: str, token: int, x: Value) -> str:
    """One token of [B, T, D], on the grid of x, through a head: [B, classes]."""
    graph, spec = build.graph, build.config.head_quant
    with graph.scope(name):
        picked = graph.node("Gather", hidden, graph.constant(token, np.int64), axis=1)
        first = build.sites.again(picked, None if spec is None else x.codes)
    return dense(build, first, name, spec).name
