"""AdamW with warm-up, linear or cosine decay, clipping and the published decay mask."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from quantizable_flax.errors import UserError, check_choice

SCHEDULES = ("linear", "cosine")
NEVER_DECAYED = ("cls_token", "register_tokens", "position_table")


def make_schedule(optimizer: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then a linear or cosine decay to the last step.

    A run shorter than its warm-up ends inside it.

    Args:
      optimizer: `config.optimizer`; its `decay_steps`, if not 0, replaces `steps`.
      steps: length of the run.

    Raises:
      UserError: a negative warm-up or another schedule.
    """
    check_choice("optimizer.schedule", optimizer.schedule, SCHEDULES)
    steps, warmup, peak = (
        optimizer.decay_steps or steps,
        optimizer.warmup_steps,
        optimizer.learning_rate,
    )
    if warmup < 0:
        raise UserError(f"optimizer.warmup_steps must be at least 0, found {warmup}.")
    length, last = max(steps - warmup, 1), optimizer.decay_to
    if optimizer.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, length, alpha=last / peak if peak else 0.0)
    else:
        decay = optax.linear_schedule(peak, last, length)
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(optimizer.warmup_from, peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def decay_mask(params: Any, decay_layer_norm: bool = False) -> Any:
    """True for the leaves that weight decay applies to.

    Not for biases and LayerNorm scales, nor for ViT's class token and positions, as in timm, and
    its registers.

    Args:
      params: a parameter tree.
      decay_layer_norm: also decay the LayerNorm scales.
    """

    def decayed(path, _):
        # A parameter that is still boxed with its logical axes ends its path in an attribute.
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        if name == "scale":
            return decay_layer_norm
        return not name.endswith("bias") and name not in NEVER_DECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Returns clip -> AdamW by `config.optimizer` for a run of `steps` steps.

    Raises:
      UserError: as `make_schedule`, or a value outside its domain.
    """
    optimizer = config.optimizer
    for key in ("b1", "b2"):
        if not 0.0 <= optimizer[key] < 1.0:
            raise UserError(f"optimizer.{key} must be in [0, 1), found {optimizer[key]}.")
    for key in ("learning_rate", "weight_decay", "clip_norm", "decay_steps"):
        if optimizer[key] < 0:
            raise UserError(f"optimizer.{key} must not be negative, found {optimizer[key]}.")
    adamw = optax.adamw(
        make_schedule(optimizer, steps),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=lambda params: decay_mask(params, optimizer.decay_layer_norm),
    )
    # Without clipping the state keeps its structure, so a run may be continued either way.
    norm = optimizer.clip_norm
    clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    return optax.chain(clip, adamw)
