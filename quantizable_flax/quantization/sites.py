"""The tap: every tensor that the paper measures or quantizes passes through a `Site`."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError
from quantizable_flax.quantization import ranges
from quantizable_flax.quantization.fake_quant import fake_quantize
from quantizable_flax.quantization.grid import make_grid
from quantizable_flax.quantization.spec import QuantSpec
from quantizable_flax.quantization.statistics import inf_norm, kurtosis, token_mean

RANGES = "ranges"  # collection: per site {min, max, batches}
STATS = "stats"  # collection: per site and sample statistics of one batch


class Site(nn.Module):
    """A named activation: the identity, unless the caller asks for more.

    With a mutable `stats` collection it records the infinity norm and the kurtosis of each
    sample, and of [B, T, D] also those of each token, averaged over the sample. With a `quant`
    spec it quantizes by its range in `ranges`; if that collection is mutable, the range is first
    updated from x, so that calibration sees what inference sees.
    Asked for neither, it leaves no operation in the program.

    Attributes:
      quant: how to quantize, None for floating point.
    """

    quant: QuantSpec | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x, or x rounded to the site's grid; [B, ...] in and out."""
        spec = self.quant
        if spec is not None and spec.activation_bits is not None and not self.is_initializing():

            def estimate(old: ranges.Range) -> ranges.Range:
                return ranges.update_running(
                    old, x, momentum=spec.momentum, percentile=spec.percentile
                )

            known = _site_range(self, (), estimate)
            grid = make_grid(
                known.min, known.max, spec.activation_bits, symmetric=spec.activation_symmetric
            )
            x = fake_quantize(x, grid)
        for name, statistic in (("inf_norm", inf_norm), ("kurtosis", kurtosis)):
            record(self, name, functools.partial(statistic, x))
            if x.ndim == 3:
                record(self, f"token_{name}", functools.partial(token_mean, statistic, x))
        return x


class WeightSite(nn.Module):
    """A named weight: as `Site`, with a symmetric grid whose range is taken once.

    Attributes:
      quant: how to quantize, None for floating point.
      channel_axis: the axis that keeps its own scale when `quant.weight_per_channel`.
    """

    quant: QuantSpec | None = None
    channel_axis: int = -1

    @nn.compact
    def __call__(self, w: jax.Array) -> jax.Array:
        """Returns w, or w rounded to its grid."""
        spec = self.quant
        if spec is None or spec.weight_bits is None or self.is_initializing():
            return w
        bits, axis = spec.weight_bits, self.channel_axis if spec.weight_per_channel else None

        def search(_: ranges.Range) -> ranges.Range:
            low, high = (
                ranges.mse_range(w, bits, axis)
                if spec.weight_estimator == "mse"
                else ranges.min_max(w, axis)
            )
            return ranges.Range(low, high, jnp.int32(1))

        def estimate(old: ranges.Range) -> ranges.Range:
            # The weights do not change between calibration batches, so one search is enough.
            return jax.lax.cond(old.batches == 0, search, lambda known: known, old)

        shape = () if axis is None else ranges.min_max(w, axis)[0].shape
        known = _site_range(self, shape, estimate)
        return fake_quantize(w, make_grid(known.min, known.max, bits, symmetric=True))


def _site_range(
    site: nn.Module, shape: tuple[int, ...], estimate: Callable[[ranges.Range], ranges.Range]
) -> ranges.Range:
    """Reads the range of a site, after an update if the caller made `ranges` mutable."""
    if site.is_mutable_collection(RANGES):
        variable = site.variable(
            RANGES,
            "range",
            lambda: ranges.Range(jnp.zeros(shape), jnp.zeros(shape), jnp.int32(0)),
        )
        variable.value = estimate(ranges.Range(*variable.value))
        return variable.value
    if not site.has_variable(RANGES, "range"):
        raise UserError(
            f"site {'/'.join(site.path)} has no calibrated range: run at least one calibration "
            "batch before a quantized forward."
        )
    return ranges.Range(*site.get_variable(RANGES, "range"))


def record(module: nn.Module, name: str, value: Callable[[], jax.Array]) -> None:
    """Stores `value()` in the module's `stats` if the caller asked for statistics, else nothing."""
    if module.is_mutable_collection(STATS) and not module.is_initializing():
        module.put_variable(STATS, name, jax.lax.stop_gradient(value()))
