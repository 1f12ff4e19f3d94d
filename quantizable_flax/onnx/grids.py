"""Sites as pairs of QuantizeLinear and DequantizeLinear, with our ranges and learned grids."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.onnx.graph import Graph
from quantizable_flax.onnx.opsets import WIDE
from quantizable_flax.quantization import learned
from quantizable_flax.quantization.grid import Grid, make_grid
from quantizable_flax.quantization.libraries import affine_codes
from quantizable_flax.quantization.spec import INT8_BITS, QuantSpec


class Codes(NamedTuple):
    """A tensor of codes in a graph, and the grid that they are on.

    Attributes:
      name: of the value: uint8 or int8, or 16 bits of either sign.
      scale: float32, a scalar, or [C] of a weight per channel.
      zero_point: of the codes' dtype, the shape of scale.
      axis: the channels' axis, None for one scale.
    """

    name: str
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None

    @property
    def wide(self) -> bool:
        """Whether codes have more than 8 bits: no integer kernel multiplies them."""
        return self.zero_point.dtype.itemsize > 1


class Value(NamedTuple):
    """A value of a graph in float32, and the codes it was dequantized from if it is on a grid."""

    name: str
    codes: Codes | None = None


class Sites:
    """Puts the sites and weights of one model on their grids as they are added to a graph."""

    def __init__(self, graph: Graph, params: Mapping[str, Any], ranges: Mapping[str, Any] | None):
        """Args: the graph, a model's parameters, and its calibrated `ranges` (None: float)."""
        self.graph, self.params, self._ranges = graph, params, ranges or {}

    def activation(self, x: str, site: str, spec: QuantSpec | None) -> Value:
        """A value through its site, as `quantization.sites.Site` does it.

        Args:
          x: a float value.
          site: the name below the graph's scope.
          spec: the scheme of the module around the site, None for floating point.

        Raises:
          UserError: ranges of rows, or more bits than the opset can say.
        """
        with self.graph.scope(*site.split("/")):
            path = self.graph.path
            bits = None if spec is None else spec.bits(path)
            if spec is None or bits is None:
                return Value(x)
            grid = self._grid(path, bits, symmetric=spec.activation_symmetric)
            dtype = self._dtype(grid, bits)
            if bits not in (8, 16):
                x = self._clipped(x, grid)
            scale = np.asarray(grid.scale, np.float32)
            codes = Codes("codes", scale, np.asarray(grid.zero_point).astype(dtype))
            name = self.graph.node("QuantizeLinear", x, *self._grid_names(codes), name="codes")
            return self.value(codes._replace(name=name))

    def value(self, codes: Codes, *, divisor: float = 1.0) -> Value:
        """Dequantizes codes; a divisor makes the value that much smaller by its scale."""
        scale = codes.scale if divisor == 1.0 else codes.scale / np.float32(divisor)
        attributes = {} if codes.axis is None else {"axis": codes.axis}
        names = self._grid_names(codes._replace(scale=scale.astype(np.float32)))
        name = self.graph.node("DequantizeLinear", codes.name, *names, name="value", **attributes)
        return Value(name, codes._replace(scale=scale))

    def again(self, x: str, codes: Codes | None, *, divisor: float = 1.0) -> Value:
        """Puts a moved or selected value on the grid that it was on: no code changes."""
        if codes is None:
            return Value(x)
        name = self.graph.node("QuantizeLinear", x, *self._grid_names(codes), name="codes")
        return self.value(codes._replace(name=name), divisor=divisor)

    def weight_codes(
        self, path: str, parameter: str, spec: QuantSpec | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """A weight as (codes, scale, zero point), None where it stays in floating point.

        Args:
          path: of its `WeightSite`, in full.
          parameter: its name in the module around the site.
          spec: the scheme of that module.
        """
        bits = None if spec is None else spec.bits(path, weight=True)
        if spec is None or bits is None:
            return None
        grid = self._grid(path, bits, symmetric=True)
        codes = np.asarray(_codes(self.float_weight(path, parameter), grid))
        dtype = self._dtype(grid, bits)
        scale = np.asarray(grid.scale, np.float32)
        scale = scale.reshape(-1) if scale.ndim else scale
        return codes.astype(dtype), scale, np.zeros(scale.shape, dtype)

    def rounded(self, path: str, parameter: str, spec: QuantSpec | None) -> np.ndarray:
        """A weight in float32, on its grid if it has one."""
        weight = self.float_weight(path, parameter)
        bits = None if spec is None else spec.bits(path, weight=True)
        if bits is None:
            return weight
        grid = self._grid(path, bits, symmetric=True)
        return np.asarray(_codes(weight, grid)) * grid.scale

    def module(self, path: str) -> Mapping[str, Any]:
        """The parameters of a module, {} where it has none."""
        return _at(self.params, path.split("/")) or {}

    def float_weight(self, path: str, parameter: str) -> np.ndarray:
        """The parameter at a `WeightSite`, as it was trained."""
        module = _at(self.params, path.split("/")[:-1])
        return np.asarray(module[parameter], np.float32)

    def weight(self, codes: np.ndarray, scale, zero_point, *, axis: int) -> Value:
        """Adds a weight's codes and their DequantizeLinear under the scope."""
        name = self.graph.shared("codes", codes)
        return self.value(Codes(name, scale, zero_point, axis if scale.ndim else None))

    def _grid(self, path: str, bits: int, *, symmetric: bool) -> Grid:
        names = path.split("/")
        held = _at(self.params, names)
        if held is not None and learned.GRID in held:
            grid = _learned_grid(held[learned.GRID], bits, symmetric)
        else:
            found = _at(self._ranges, names)
            if found is None or "range" not in found:
                raise UserError(
                    f"site {path} has no calibrated range, found none in `ranges`: give those that "
                    "qf.calibrate returns for this model and its scheme."
                )
            grid = _range_grid(found["range"][0], found["range"][1], bits, symmetric)
        return jax.tree.map(np.asarray, grid)

    def _dtype(self, grid: Grid, bits: int) -> Any:
        if bits <= INT8_BITS:
            return np.int8 if grid.lower < 0 else np.uint8
        if self.graph.opset < WIDE:
            raise UserError(
                f"codes of {bits} bits need --opset={WIDE} or more, found {self.graph.opset}"
                ": set it, or use 8 bits and fewer."
            )
        return np.int16 if grid.lower < 0 else np.uint16

    def _clipped(self, x: str, grid: Grid) -> str:
        """Bounds x to a grid narrower than its codes' type, which alone QuantizeLinear knows."""
        ends = (grid.scale * (end - grid.zero_point) for end in (grid.lower, grid.upper))
        with self.graph.because("the grid is narrower than 8 bits, and QuantizeLinear's is not"):
            return self.graph.node("Clip", x, *(self.graph.constant(end) for end in ends))

    def _grid_names(self, codes: Codes) -> tuple[str, str]:
        dtype = codes.zero_point.dtype
        if codes.axis is None:
            return self.graph.constant(codes.scale), self.graph.constant(codes.zero_point, dtype)
        return (
            self.graph.array("scale", codes.scale.astype(np.float32)),
            self.graph.constant(codes.zero_point, dtype),
        )


# Compiled as in the simulation: XLA divides otherwise where it knows the divisor.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _range_grid(low, high, bits: int, symmetric: bool) -> Grid:
    return make_grid(low, high, bits, symmetric=symmetric)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _learned_grid(parameters, bits: int, symmetric: bool) -> Grid:
    return learned.learned_grid(parameters, bits, symmetric=symmetric)


@jax.jit
def _codes(w: np.ndarray, grid: Grid) -> jax.Array:
    """Of a weight, in float32: one in the middle between two codes gets that of the simulation."""
    return affine_codes(w / grid.scale, grid)


def _at(tree: Any, names: list[str]) -> Any:
    for name in names:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
