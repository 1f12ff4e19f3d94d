"""AdamW with warm-up, linear decay, global-norm clipping and the published decay mask."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from quantizable_flax.errors import UserError


def make_schedule(optimizer: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over the warm-up, then linear to 0 at `steps`.

    Raises:
      UserError: a warm-up that is negative or not shorter than the run.
    """
    steps = optimizer.decay_steps or steps
    warmup = optimizer.warmup_steps
    if not 0 <= warmup < max(steps, 1):
        raise UserError(
            f"optimizer.warmup_steps must be at least 0 and below the {steps} steps of the "
            f"schedule, found {warmup}."
        )
    peak = optimizer.learning_rate
    decay = optax.linear_schedule(peak, 0.0, steps - warmup)
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def decay_mask(params: Any, decay_layer_norm: bool = False) -> Any:
    """True for the leaves that weight decay applies to: no bias, and no LayerNorm scale.

    Args:
      params: a parameter tree.
      decay_layer_norm: also decay the LayerNorm scales.
    """

    def decayed(path, _):
        # A parameter that is still boxed with its logical axes ends its path in an attribute.
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        return not name.endswith("bias") and (decay_layer_norm or name != "scale")

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Returns clip -> AdamW by `config.optimizer` for a run of `steps` steps.

    Raises:
      UserError: as `make_schedule`.
    """
    optimizer = config.optimizer
    adamw = optax.adamw(
        make_schedule(optimizer, steps),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=lambda params: decay_mask(params, optimizer.decay_layer_norm),
    )
    if not optimizer.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)
