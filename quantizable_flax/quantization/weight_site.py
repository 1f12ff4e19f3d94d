"""The tap of weights: a `WeightSite`, whose grid is symmetric and does not move with batches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError
from quantizable_flax.quantization import estimators, ranges
from quantizable_flax.quantization.grid import Grid
from quantizable_flax.quantization.hadamard import rotate
from quantizable_flax.quantization.sites import (
    FRESH,
    STORED,
    on_grid,
    site_grid,
    site_path,
    site_range,
    switch_of,
)
from quantizable_flax.quantization.spec import INT8_BITS, QuantSpec
from quantizable_flax.quantization.tensor import Quantized, Tensor, quantize_int8


class WeightSite(nn.Module):
    """A named weight: as `Site`, with a symmetric grid whose range is taken once.

    Attributes:
      quant: how to quantize, None for floating point.
      parameter: name of the parameter in the module around this site.
      channel_axis: the axis that keeps its own scale when `quant.weight_per_channel`.
      contracted_axis: the axis over which products sum, None for a weight in no product.
      float_copy: whether the parameter is read in floating point too; then a model served in int8
        keeps it as it is, and rounds what it reads of it.
    """

    quant: QuantSpec | None = None
    parameter: str = "kernel"
    channel_axis: int = -1
    contracted_axis: int | None = None
    float_copy: bool = False

    @nn.compact
    def __call__(self, w: jax.Array, rows: jax.Array | slice | None = None) -> Tensor:
        """Returns w on its grid, or w; with `rows`, indices or a slice, only w[rows]."""
        spec = self.quant
        bits = None if spec is None else spec.bits(site_path(self), weight=True)
        if spec is None or bits is None or self.is_initializing():
            return w if rows is None else w[rows]
        axis = self._rotated(spec, w.ndim)
        turned = w if axis is None else rotate(w, axis)
        known = functools.partial(self._range, turned, spec, bits)
        grid = site_grid(self, known, bits, spec, True)
        if self.is_mutable_collection(STORED) and bits <= INT8_BITS and not self.float_copy:
            self._store(quantize_int8(turned, grid, library=spec.library))
        if rows is not None:
            w, grid = w[rows], _rows_of(grid, rows)
        return on_grid(w, grid, bits, spec, switch_of(self), axis)

    def stored(self) -> Quantized | None:
        """The weight as int8 codes, if the parameters hold it so."""
        if not self.has_variable("params", self.parameter):
            return None
        # Parameters that are still numpy arrays cannot be indexed by a traced one.
        kept = jax.tree.map(jnp.asarray, self.get_variable("params", self.parameter))
        if self.quant is None:
            return Quantized(**kept)
        rotated = self._rotated(self.quant, kept["codes"].ndim)
        return Quantized(**kept, rotated=rotated, library=self.quant.library)

    @nn.nowrap
    def _rotated(self, spec: QuantSpec, ndim: int) -> int | None:
        """The axis that is rotated before the grid, counted from the last, None for none."""
        if not spec.rotates(site_path(self)):
            return None
        if self.contracted_axis is None:
            raise UserError(
                f"quant.hadamard rotates what a product sums over, found the weight "
                f"{site_path(self)}, which is in none: leave it out of the expression."
            )
        return self.contracted_axis % ndim - ndim

    def _range(self, w: jax.Array, spec: QuantSpec, bits: int) -> ranges.Range:
        axis = self.channel_axis if spec.weight_per_channel else None

        def search() -> ranges.Range:
            return estimators.weight_range(
                jax.lax.stop_gradient(w),
                estimator=spec.weight_estimator,
                bits=bits,
                percentile=spec.weight_percentile,
                channel_axis=axis,
            )

        # Batches do not move it: `calibration.first_ranges` has it, and a training step that
        # changes weights asks for FRESH ranges behind it.
        known = site_range(self, search, lambda known: known)
        if self.is_mutable_collection(FRESH):
            self.put_variable(FRESH, "range", search())
        if self.is_mutable_collection(STORED) and (bits > INT8_BITS or self.float_copy):
            self.put_variable(STORED, "range", {"min": known.min, "max": known.max})
        return known

    def _store(self, w: Quantized) -> None:
        kept = {"codes": w.codes, "scale": w.scale, "zero_point": w.zero_point}
        if self.contracted_axis is not None:
            kept["sums"] = jnp.sum(w.codes, self.contracted_axis, dtype=jnp.int32)
        self.put_variable(STORED, self.parameter, kept)


def _rows_of(grid: Grid, rows: jax.Array | slice) -> Grid:
    """The grid of w[rows]: one per row where w has one per row."""
    return grid._replace(
        **{
            name: value[rows]
            for name in ("scale", "zero_point")
            if jnp.ndim(value := getattr(grid, name))
        }
    )
