"""SmoothQuant: outliers of LayerNorm outputs moved into the weights behind them (arXiv 2211.10438).

Each channel of a LayerNorm's output is divided by a constant that the kernels behind it are
multiplied by, so the floating-point function stays as it was while the activations get easier to
quantize and the weights a little harder. Where the output is also added to a residual sum (post-LN)
that branch is multiplied back by an extra parameter, see `models.transformer.ResidualScale`.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from quantizable_flax.errors import UserError
from quantizable_flax.models.build import with_quant
from quantizable_flax.models.structure import Fold
from quantizable_flax.nn.norm import Norm

Batch = dict[str, Any]
SMALLEST = 1e-5  # of a channel's weight and of its factor, as in the authors' code


# The parameter of each kind of gate whose leading axes are the channels of x, see `Gate`.
GATE_KERNELS = {
    "linear": "kernel",
    "mlp": "hidden_kernel",
    "all_heads_linear": "kernel",
    "unconditional": None,
    "value": None,
    "elementwise": "kernel",
}


def smooth(model: nn.Module, params: Any, batches: Iterable[Batch], strength: float = 0.5) -> Any:
    """Returns params of the same function whose LayerNorm outputs are easier to quantize.

    Channel j of a LayerNorm is divided by `s_j = max|X_j|^strength / max|W_j|^(1 - strength)`
    (equation 4), W being all Dense kernels that read it, together. Gates are never quantized: their
    kernels follow s but have no say in it.

    Args:
      model: of any family; its quant spec plays no part.
      params: its parameters, which may be smoothed ones.
      batches: what `model.loss` takes; all of one shape.
      strength: the paper's alpha; 0 makes all rows of the weights equally large, 1 all channels of
        the activations.

    Returns:
      a new tree; post-LN models get `{block}_residual_scale` in each layer.

    Raises:
      UserError: strength outside [0, 1], norms with one scale for all channels, no batch,
        activations that are not finite.
    """
    check_smooth(model, strength)
    maxima = channel_maxima(model, params, batches)
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    gate = model.config.gate and GATE_KERNELS[model.config.gate.kind]
    for fold in folds(model):
        kernels = [flat[f"{name}/kernel"] for name in fold.dense]
        factors_D = smoothing_factors(maxima[fold.norm], kernels, strength)
        _apply(flat, fold, gate, factors_D)
    return traverse_util.unflatten_dict(flat, sep="/")


def check_smooth(model: nn.Module, strength: float) -> None:
    """Raises UserError for a strength outside [0, 1], or norms with one scale for all channels."""
    if not 0.0 <= strength <= 1.0:
        raise UserError(
            f"SmoothQuant's strength must be in [0, 1], found {strength}: 0.5 is the published "
            "default."
        )
    if model.config.norm == "rms_norm_single":
        raise UserError(
            "SmoothQuant divides each channel of a norm by its own constant, found "
            "model.norm=rms_norm_single, which has one scale for all: leave +smooth out."
        )


def folds(model: nn.Module) -> list[Fold]:
    """Returns the folds of a model, with the numbers of its layers."""
    config = model.config
    return [
        _numbered(fold, i)
        for fold in config.folds
        for i in range(_repeats(fold, config.num_layers))
    ]


def _repeats(fold: Fold, layers: int) -> int:
    if "{i}" not in fold.norm:
        return 1
    return layers - 1 if "{next}" in fold.dense[0] else layers


def _numbered(fold: Fold, i: int) -> Fold:
    def fill(path: str) -> str:
        return path.format(i=i, next=i + 1)

    return Fold(
        fill(fold.norm),
        tuple(map(fill, fold.dense)),
        fold.gate and fill(fold.gate),
        fold.residual and fill(fold.residual),
    )


def channel_maxima(model: nn.Module, params: Any, batches: Iterable[Batch]) -> dict[str, jax.Array]:
    """Returns max|X_j| [D] of each LayerNorm to fold, by path, in floating point.

    Padding counts, as it does in the calibration of ranges.

    Raises:
      UserError: no batch, or a value that is not finite.
    """
    exact = with_quant(model, None)
    maxima: dict[str, jax.Array] = {}
    for batch in batches:
        found = _maxima_step(exact, params, batch)
        maxima = jax.tree.map(jnp.maximum, maxima, found) if maxima else found
    if not maxima:
        raise UserError(
            "SmoothQuant needs at least one calibration batch, found none: give it data, or raise "
            "quant.calibration_batches."
        )
    for norm, largest_D in maxima.items():
        if not np.all(np.isfinite(largest_D)):
            raise UserError(
                f"SmoothQuant needs finite activations, found nan or inf behind {norm}: evaluate "
                "the checkpoint in floating point and use one that is sound."
            )
    return maxima


@functools.partial(jax.jit, static_argnums=0)
def _maxima_step(exact: nn.Module, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """The maxima of one batch through a model in floating point."""
    _, state = exact.apply(
        {"params": params},
        batch,
        method="loss",
        capture_intermediates=lambda module, _: isinstance(module, Norm),
        mutable=["intermediates"],
    )
    outputs = traverse_util.flatten_dict(state["intermediates"], sep="/")
    norms = [fold.norm for fold in folds(exact)]
    return {norm: _largest(outputs[f"{norm}/__call__"][0]) for norm in norms}


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))


def smoothing_factors(
    largest_D: jax.Array, kernels: Sequence[jax.Array], strength: float
) -> jax.Array:
    """Returns s_j (equation 4) of the kernels [D, ...] together: [D], 1 for a channel always 0."""
    weights_D = jnp.max(jnp.stack([jnp.max(jnp.abs(kernel), axis=1) for kernel in kernels]), axis=0)
    weights_D = jnp.maximum(weights_D, SMALLEST)
    factors_D = jnp.maximum(largest_D**strength / weights_D ** (1.0 - strength), SMALLEST)
    return jnp.where(largest_D == 0.0, 1.0, factors_D)


def _apply(flat: dict[str, jax.Array], fold: Fold, gate: str | None, factors_D: jax.Array) -> None:
    """Replaces the parameters of one fold; `gate` names the gate's parameter that reads x."""
    for name in (f"{fold.norm}/scale", f"{fold.norm}/bias"):
        if name in flat:  # an RMSNorm has no bias
            flat[name] = flat[name] / factors_D
    kernels = [f"{name}/kernel" for name in fold.dense]
    if gate and fold.gate:
        kernels.append(f"{fold.gate}/{gate}")
    for path in kernels:
        kernel = flat[path]
        # The heads of a gate's kernel [H, K, ...] are slices of the channels, in order.
        rows = kernel.reshape(factors_D.size, -1) * factors_D[:, None]
        flat[path] = rows.reshape(kernel.shape)
    if fold.residual:
        path = f"{fold.residual}/scale"
        flat[path] = flat.get(path, 1.0) * factors_D
