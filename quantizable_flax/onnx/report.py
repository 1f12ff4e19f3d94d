"""What a graph computes on integers, and what in floating point and why."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from quantizable_flax.quantization.spec import QuantSpec

PRODUCTS = ("Gemm", "MatMul")
# What only moves or selects values, says shapes, or goes from one grid to another.
MOVES = frozenset(
    (
        *("QuantizeLinear", "DequantizeLinear", "Identity", "Cast", "Where"),
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand"),
        *("Concat", "Gather", "Slice", "Shape", "Range", "LessOrEqual", "And", "CumSum"),
    )
)


@dataclasses.dataclass(frozen=True)
class Report:
    """Of a graph.

    Attributes:
      integers: names of the products that multiply codes of at most 8 bits.
      floats: of all that computes in floating point, (node, operator, why).
      spec: the scheme, None for a model in floating point.
    """

    integers: tuple[str, ...]
    floats: tuple[tuple[str, str, str], ...]
    spec: QuantSpec | None

    @property
    def float_products(self) -> tuple[tuple[str, str, str], ...]:
        """Those of `floats` that are matrix products."""
        return tuple(row for row in self.floats if row[1] in PRODUCTS)

    def as_json(self) -> dict[str, Any]:
        """The report as its file has it."""
        scheme = None if self.spec is None else dataclasses.asdict(self.spec)
        rows = [dict(zip(("node", "operator", "why"), row, strict=True)) for row in self.floats]
        return {"quant": scheme, "integer_products": list(self.integers), "float_nodes": rows}

    def lines(self) -> list[str]:
        """How many nodes are in floating point, by reason: lines to print."""
        found: dict[str, collections.Counter] = {}
        for _, operator, why in self.floats:
            found.setdefault(why, collections.Counter())[operator] += 1
        return [
            f"{', '.join(f'{count} {operator}' for operator, count in counts.items())}: {why}"
            for why, counts in found.items()
        ]


def make_report(model: Any, reasons: Mapping[str, str], spec: QuantSpec | None) -> Report:
    """Reads the nodes of a ModelProto; `reasons` say why some of them are in floating point."""
    integers, floats = [], []
    for node in model.graph.node:
        (name,) = node.output
        if node.op_type in MOVES:
            continue
        if name in reasons or spec is None:
            why = reasons.get(name, "") if spec else "nothing is quantized"
            floats.append((name, node.op_type, why))
        elif node.op_type in PRODUCTS:
            integers.append(name)
    return Report(tuple(integers), tuple(floats), spec)
