"""Reads and writes any model by its family's table of names; shapes are the model's own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from quantizable_flax.errors import UserError
from quantizable_flax.interop.pieces import Piece, Shape, pieces
from quantizable_flax.interop.reader import TensorReader
from quantizable_flax.models.shapes import boxed_shapes
from quantizable_flax.models.weights import WeightNames

Tree = dict[str, Any]  # names to numpy arrays or to further trees


class Plan(NamedTuple):
    """How a model would be read by one table.

    Attributes:
      table: the family's names in one source.
      reader: of the mapping, with the model found in it.
      pieces: what the parameters are made of.
    """

    table: WeightNames
    reader: TensorReader
    pieces: list[Piece]


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Returns path -> shape of the parameters that the model's init makes."""
    params = nn.meta.unbox(boxed_shapes(model))
    return {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}


def read(
    mapping: Mapping[str, np.ndarray],
    tables: Sequence[WeightNames],
    shapes: Mapping[str, Shape],
    config: Any,
) -> Tree:
    """Returns parameters of these shapes, by the table that knows most of the mapping's tensors.

    Raises:
      UserError: as `from_state_dict`.
    """
    plan = max((_plan(mapping, table, shapes, config) for table in tables), key=_count)
    _check_heads(plan, shapes)
    _check_refused(plan.table, shapes, config)
    _check_named(plan.pieces, shapes)
    blocks: dict[str, list[np.ndarray]] = {path: [] for path in shapes}
    for piece in plan.pieces:
        blocks[piece.path].append(piece.ours(_take(plan, piece), shapes[piece.path]))
    reader = plan.reader
    reader.ignore(*(name.format(root=reader.root) for name in plan.table.unused))
    for name in plan.table.positions:
        reader.ignore_positions(name.format(root=reader.root))
    reader.check_all_used()
    several = {piece.path for piece in plan.pieces if piece.head is not None}
    params = {p: np.stack(found) if p in several else found[0] for p, found in blocks.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def _plan(
    mapping: Mapping[str, np.ndarray],
    table: WeightNames,
    shapes: Mapping[str, Shape],
    config: Any,
) -> Plan:
    reader = TensorReader(mapping, table.anchor, table.roots)
    return Plan(table, reader, list(pieces(table.names, reader.root, shapes, config)))


def _count(plan: Plan) -> int:
    """How many of the pieces are there."""
    return sum(any(map(plan.reader.has, piece.names)) for piece in plan.pieces)


def _take(plan: Plan, piece: Piece) -> np.ndarray:
    name = plan.reader.first(piece.names)
    if piece.path not in plan.table.tied:
        return plan.reader.take(name, piece.shape)
    alias = plan.table.tied[piece.path].format(root=plan.reader.root)
    return plan.reader.tied(name, alias, piece.shape)


def _check_heads(plan: Plan, shapes: Mapping[str, Shape]) -> None:
    for path, (head, whole) in plan.table.heads.items():
        wanted = any(known.startswith(f"{path}/") for known in shapes)
        if wanted and plan.reader.found and not plan.reader.holds(head):
            raise UserError(
                f"the weights have no tensors {head}.*, the head: they are of an encoder alone "
                f"or of another architecture, save {whole}."
            )


def _check_refused(table: WeightNames, shapes: Mapping[str, Shape], config: Any) -> None:
    for path, reason in table.refused.items():
        start = path.format(i=0)
        if any(f"{known}/".startswith(f"{start}/") for known in shapes):
            raise UserError(reason.format(config=config))


def _check_named(plan: list[Piece], shapes: Mapping[str, Shape]) -> None:
    named = {piece.path for piece in plan}
    for path in shapes:
        if path not in named:
            raise UserError(
                f"parameter {path!r} has no name in other checkpoints: use the run's own, or add "
                "it to the family's weight_names (docs/new_model.md)."
            )


def write(
    params: Mapping[str, Any], table: WeightNames, shapes: Mapping[str, Shape], config: Any
) -> dict[str, np.ndarray]:
    """Returns the parameters under the table's names, aliases included, in PyTorch's layout.

    Raises:
      UserError: as `to_state_dict`.
    """
    _check_refused(table, shapes, config)
    flat = traverse_util.flatten_dict(nn.meta.unbox(params), sep="/")
    _check_params(flat, shapes)
    plan = list(pieces(table.names, table.roots[0], shapes, config))
    _check_named(plan, shapes)
    arrays = {path: np.asarray(x, np.float32) for path, x in flat.items()}
    tensors: dict[str, np.ndarray] = {}
    for piece in plan:
        name = piece.names[0]
        whole = tensors.setdefault(name, np.empty(piece.shape, np.float32))
        whole[piece.rows] = piece.theirs(arrays[piece.path])
        if piece.path in table.tied:
            tensors[table.tied[piece.path].format(root=table.roots[0])] = whole
    return tensors


def _check_params(flat: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    for path in flat:
        if path not in shapes:
            raise UserError(
                f"parameter {path!r} has no place in the configured model: give the parameters as "
                "they were trained, neither smoothed nor as int8 codes, and without learned grids."
            )
    for path, shape in shapes.items():
        if path not in flat or np.shape(flat[path]) != shape:
            found = np.shape(flat[path]) if path in flat else "none"
            raise UserError(
                f"parameter {path!r} should have shape {shape} by the configuration, found {found}."
            )
