"""AdamW or Muon with warm-up, linear or cosine decay, clipping and the published decay mask."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.ptq.settings import check_patterns
from quantizable_flax.quantization.learned import is_grid
from quantizable_flax.training.muon import matches, muon_or

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("linear", "cosine")
Other = tuple[Callable[[tuple[str, ...]], bool], optax.Schedule]
NEVER_DECAYED = ("cls_token", "distillation_token", "register_tokens", "position_table", "sink")


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
    its registers, nor sinks of attention; never for learned grids.

    Args:
      params: a parameter tree.
      decay_layer_norm: also decay the LayerNorm scales.
    """

    def decayed(path, _):
        names = _names(path)
        name = names[-1]
        if is_grid(names):
            return False
        if name == "scale":
            return decay_layer_norm
        return not name.endswith("bias") and name not in NEVER_DECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    # A parameter that is still boxed with its logical axes ends its path in an attribute.
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Returns clip -> AdamW, or Muon and AdamW, by `config.optimizer` for a run of `steps` steps.

    What `optimizer.frozen` matches stays as it is, and counts for no norm.

    Learned grids (`config.quant.range_learning_rate`) and Muon's matrices may have a learning rate
    of their own; its schedule is that of the weights in proportion.

    Raises:
      UserError: as `make_schedule`, another optimizer, or a value outside its domain.
    """
    optimizer = config.optimizer
    check_choice("optimizer.name", optimizer.name, OPTIMIZERS)
    for key in ("b1", "b2", "muon_momentum"):
        if not 0.0 <= optimizer[key] < 1.0:
            raise UserError(f"optimizer.{key} must be in [0, 1), found {optimizer[key]}.")
    for key in ("learning_rate", "weight_decay", "clip_norm", "decay_steps"):
        if optimizer[key] < 0:
            raise UserError(f"optimizer.{key} must not be negative, found {optimizer[key]}.")
    direction = optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)
    others = [(is_grid, _schedule_at(config, steps, "quant.range_learning_rate"))]
    if optimizer.name == "muon":
        direction = muon_or(direction, optimizer.muon_parameters, optimizer.muon_momentum)
        own = functools.partial(matches, pattern=optimizer.muon_parameters)
        others.append((own, _schedule_at(config, steps, "optimizer.muon_learning_rate")))
    # The parts of optax.adamw, in its nesting: earlier checkpoints hold that.
    stepping = optax.chain(
        direction,
        optax.add_decayed_weights(
            optimizer.weight_decay,
            lambda params: decay_mask(params, optimizer.decay_layer_norm),
        ),
        _scale_by_rates(
            make_schedule(optimizer, steps),
            [(chosen, schedule) for chosen, schedule in others if schedule is not None],
        ),
    )
    # Without clipping the state keeps its structure, so a run may be continued either way.
    norm = optimizer.clip_norm
    clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    return _freezing(optax.chain(clip, stepping), optimizer.frozen)


def _freezing(
    inner: optax.GradientTransformation, pattern: str | None
) -> optax.GradientTransformation:
    """As `inner`, and with its state, but nothing moves the parameters of a matching path."""
    if pattern is None:
        return inner

    def without(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.zeros_like(x) if re.fullmatch(pattern, _path(path)) else x, tree
        )

    def init(params):
        names = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        check_patterns("optimizer.frozen", [pattern], names, "parameters")
        return inner.init(params)

    def update(updates, state, params=None):
        updates, state = inner.update(without(updates), state, params)
        return without(updates), state  # weight decay moves what has no gradient, too

    return optax.GradientTransformation(init, update)


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(_names(path))


def _schedule_at(config: ConfigDict, steps: int, path: str) -> optax.Schedule | None:
    """The schedule with another peak, the key at a path; None where that is unset."""
    group, _, key = path.partition(".")
    rate, optimizer = config[group][key], config.optimizer
    if rate is None:
        return None
    if rate < 0:
        raise UserError(f"{path} must not be negative, found {rate}.")
    own, peak = ConfigDict(optimizer.to_dict()), optimizer.learning_rate
    own.learning_rate = rate
    for end in ("warmup_from", "decay_to"):
        own[end] = optimizer[end] * (rate / peak if peak else 0.0)
    return make_schedule(own, steps)


def _scale_by_rates(
    schedule: optax.Schedule, others: Sequence[Other]
) -> optax.GradientTransformation:
    """As `optax.scale_by_learning_rate`, with another schedule for parameters that some choose."""
    usual = optax.scale_by_learning_rate(schedule)

    def update(updates, state, params=None):
        scaled, after = usual.update(updates, state, params)
        for chosen, rate in others:
            theirs, _ = optax.scale_by_learning_rate(rate).update(updates, state, params)
            scaled = jax.tree_util.tree_map_with_path(
                lambda path, own, x, chosen=chosen: own if chosen(_names(path)) else x,
                theirs,
                scaled,
            )
        return scaled, after

    return optax.GradientTransformation(usual.init, update)
