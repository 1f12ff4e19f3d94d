"""The tap: every tensor that the paper measures or quantizes passes through a `Site`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError
from quantizable_flax.quantization import estimators, learned, ranges
from quantizable_flax.quantization.grid import Grid, make_grid
from quantizable_flax.quantization.hadamard import rotate
from quantizable_flax.quantization.penalty import cost_above
from quantizable_flax.quantization.spec import INT8_BITS, QuantSpec
from quantizable_flax.quantization.statistics import inf_norm, kurtosis, token_mean
from quantizable_flax.quantization.tensor import Tensor, quantize, quantize_int8, values

RANGES = "ranges"  # collection: per site {min, max, batches}
STATS = "stats"  # collection: per site and sample statistics of one batch
SWITCHES = "switches"  # collection: per site a bool, whether it quantizes (all do without it)
STORED = "stored"  # collection, written only: what a model served in int8 needs instead of RANGES
FRESH = "fresh"  # collection, written only: the ranges of weights as these are now
GRIDS = "grids"  # collection, written only: the parameters with which a grid begins to learn
PENALTY = "penalty"  # collection: at sites that the caller names a `limit`, and its `cost` there
SHOWN = "shown"  # collection: at sites that the caller names `asked`, and the `value` there


class Site(nn.Module):
    """A named activation: the identity, unless the caller asks for more.

    With a mutable `stats` collection it records the infinity norm and the kurtosis of each
    sample, and of [B, T, D] also those of each token, averaged over the sample. With a `quant`
    spec it quantizes by its range in `ranges`; if that collection is mutable, the range is first
    updated from x, so that calibration sees what inference sees. Where the spec says so, x is
    rotated before its grid, and what is returned still stands for x. Where the parameters hold a
    learned grid at this site, that one comes first. Where the caller put a `Limit` into `penalty`,
    it stores what x costs by it before it is quantized, for a loss to be differentiated by; where
    it put `Asked` into `shown`, x itself.
    Asked for none of these, it leaves no operation in the program.

    Attributes:
      quant: how to quantize, None for floating point.
    """

    quant: QuantSpec | None = None

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array | None = None) -> Tensor:
        """Returns x, or x on the site's grid; [B, ...] in and out.

        Where `visible`, which broadcasts to x, is False, x does not count for ranges of rows: what
        a token may not see must not move its grid.
        """
        if self.has_variable(PENALTY, "limit"):
            limit: Any = self.get_variable(PENALTY, "limit")
            self.put_variable(PENALTY, "cost", cost_above(x, limit))
        if self.has_variable(SHOWN, "asked"):
            self.put_variable(SHOWN, "value", x)
        out = self._quantized(x, visible)
        for name, statistic in (("inf_norm", inf_norm), ("kurtosis", kurtosis)):
            record(self, name, functools.partial(_of_values, statistic, out))
            if x.ndim == 3:
                of_tokens = functools.partial(token_mean, statistic)
                record(self, f"token_{name}", functools.partial(_of_values, of_tokens, out))
        return out

    @nn.nowrap
    def passes(self) -> bool:
        """Whether a call would be the identity, and record nothing."""
        return self.quant is None and not self.is_initializing() and not self._records()

    @nn.nowrap
    def as_function(self) -> Callable[[jax.Array], Tensor] | None:
        """What a call computes, reading nothing from the module, so that a loop can trace it.

        None where a call would record what it sees, or look at all of x for its range.
        """
        if self._records(RANGES, STORED, GRIDS):
            return None
        spec = self.quant
        if spec is None or self.is_initializing():
            return lambda x: x
        if spec.activation_ranges == "token":
            return None
        bits = spec.bits(site_path(self))
        if bits is None:
            return lambda x: x
        grid = self._grid(jnp.zeros(()), spec, bits)
        return functools.partial(
            on_grid,
            grid=grid,
            bits=bits,
            spec=spec,
            switch=switch_of(self),
            rotated=self._rotated(spec, 3),
        )

    @nn.nowrap
    def _records(self, *collections: str) -> bool:
        # Flax's `capture_intermediates` asks for what a call returns.
        if any(self.is_mutable_collection(c) for c in (STATS, "intermediates", *collections)):
            return True
        return self.has_variable(PENALTY, "limit") or self.has_variable(SHOWN, "asked")

    def _quantized(self, x: jax.Array, visible: jax.Array | None) -> Tensor:
        spec = self.quant
        bits = None if spec is None else spec.bits(site_path(self))
        if spec is None or bits is None or self.is_initializing():
            return x
        axis = self._rotated(spec, x.ndim)
        seen = x if axis is None else rotate(x, axis)
        if spec.activation_ranges == "token":
            seen = seen if visible is None else jnp.where(visible, seen, 0.0)  # 0 is on every grid
            low, high = jax.lax.stop_gradient(ranges.min_max_of_rows(seen))
            grid = make_grid(low, high, bits, symmetric=spec.activation_symmetric)
        else:
            grid = self._grid(seen, spec, bits)
        return on_grid(x, grid, bits, spec, switch_of(self), axis)

    @nn.nowrap
    def _rotated(self, spec: QuantSpec, ndim: int) -> int | None:
        """The axis that is rotated before the grid, None for none."""
        if not spec.rotates(site_path(self)):
            return None
        if ndim > 3:  # keys are no channels, and their number is not the model's
            raise UserError(
                f"quant.hadamard rotates features, found the site {site_path(self)}: leave scores "
                "and probabilities out of the expression."
            )
        return -1

    @nn.nowrap
    def _grid(self, x: jax.Array, spec: QuantSpec, bits: int) -> Grid:
        known = functools.partial(self._range, x, spec, bits)
        return site_grid(self, known, bits, spec, spec.activation_symmetric)

    @nn.nowrap
    def _range(self, x: jax.Array, spec: QuantSpec, bits: int) -> ranges.Range:
        def estimate(old: estimators.State) -> estimators.State:
            return estimators.update(
                old,
                jax.lax.stop_gradient(x),
                estimator=spec.activation_estimator,
                bits=bits,
                symmetric=spec.activation_symmetric,
                momentum=spec.momentum,
                percentile=spec.percentile,
            )

        empty = functools.partial(estimators.empty, spec.activation_estimator)
        known = site_range(self, empty, estimate)
        if self.is_mutable_collection(STORED):
            self.put_variable(STORED, "range", {"min": known.min, "max": known.max})
        return known


def _of_values(statistic: Callable[[jax.Array], jax.Array], x: Tensor) -> jax.Array:
    return statistic(values(x))


def site_path(site: nn.Module) -> str:
    """The site's name in full, e.g. `layer_0/attention/query/output`."""
    return "/".join(site.path)


def on_grid(
    x: jax.Array,
    grid: Grid,
    bits: int,
    spec: QuantSpec,
    switch: jax.Array | None = None,
    rotated: int | None = None,
) -> Tensor:
    """x on the grid in the form that the backend wants; x itself where the switch is off.

    With `rotated`, the grid is that of x rotated along that axis, counted from the last.
    """
    turned = x if rotated is None else rotate(x, rotated)
    if spec.holds_int8(bits):
        codes = quantize_int8(turned, grid, library=spec.library)
        return dataclasses.replace(codes, rotated=rotated)
    rounded = quantize(turned, grid, wide=bits > INT8_BITS, library=spec.library)
    rounded = dataclasses.replace(rounded, rotated=rotated)
    return rounded if switch is None else jnp.where(switch, rounded.values(), x)


def switch_of(site: nn.Module) -> jax.Array | None:
    """Whether the site quantizes, where the caller says."""
    return site.get_variable(SWITCHES, "on") if site.has_variable(SWITCHES, "on") else None


def site_grid(
    site: nn.Module, known: Callable[[], ranges.Range], bits: int, spec: QuantSpec, symmetric: bool
) -> Grid:
    """The grid that the parameters hold at a site, else that of its range."""
    if site.has_variable("params", learned.GRID):
        parameters: Any = site.get_variable("params", learned.GRID)
        return learned.learned_grid(parameters, bits, symmetric=symmetric, library=spec.library)
    low, high, *_ = known()
    if site.is_mutable_collection(GRIDS):
        site.put_variable(GRIDS, learned.GRID, learned.begin(low, high, bits, symmetric=symmetric))
    return make_grid(low, high, bits, symmetric=symmetric)


def site_range(
    site: nn.Module, empty: Callable[[], estimators.State], estimate: Callable[[Any], Any]
) -> Any:
    """Reads the range of a site, after an update if the caller made `ranges` mutable."""
    if site.is_mutable_collection(RANGES):
        variable = site.variable(RANGES, "range", empty)
        # Ranges are no part of what a loss is differentiated by.
        variable.value = jax.lax.stop_gradient(estimate(variable.value))
        return variable.value
    if site.has_variable(RANGES, "range"):
        return ranges.Range(*site.get_variable(RANGES, "range")[:3])
    if site.has_variable("params", "range"):
        return ranges.Range(batches=jnp.int32(1), **site.get_variable("params", "range"))
    raise UserError(
        f"site {site_path(site)} has no calibrated range: run at least one calibration batch "
        "before a quantized forward."
    )


def record(module: nn.Module, name: str, value: Callable[[], jax.Array]) -> None:
    """Stores `value()` in the module's `stats` if the caller asked for statistics, else nothing."""
    if module.is_mutable_collection(STATS) and not module.is_initializing():
        module.put_variable(STATS, name, jax.lax.stop_gradient(value()))
