"""Text generation with a preallocated key-value cache, greedy or sampled."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from quantizable_flax.errors import UserError, check_at_least
from quantizable_flax.models.opt import OptForCausalLM
from quantizable_flax.models.transformer import positions
from quantizable_flax.quantization.sites import RANGES


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
      temperature: 0 takes the most likely token; above, logits are divided by it.
      top_k: keep the k most likely tokens, 0 for all.
      top_p: keep the smallest set of tokens with at least this probability (arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        """Raises UserError for a field outside its domain."""
        if not self.temperature >= 0.0:
            raise UserError(f"temperature must not be negative, found {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top_k must not be negative, found {self.top_k}.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p must be in (0, 1], found {self.top_p}.")

    def draw(self, logits_BxV: jax.Array, key: jax.Array) -> jax.Array:
        """Returns int32 token ids [B]."""
        if self.temperature == 0.0:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        logits_BxV = logits_BxV / self.temperature
        if 0 < self.top_k < logits_BxV.shape[-1]:
            least_Bx1 = jax.lax.top_k(logits_BxV, self.top_k)[0][:, -1:]
            logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
        if self.top_p < 1.0:
            logits_BxV = _nucleus(logits_BxV, self.top_p)
        return jax.random.categorical(key, logits_BxV).astype(jnp.int32)


def _nucleus(logits_BxV: jax.Array, top_p: float) -> jax.Array:
    ordered_BxV = -jnp.sort(-logits_BxV, axis=-1)
    probs_BxV = jax.nn.softmax(ordered_BxV, axis=-1)
    # A token stays while those before it hold less than top_p; the first always does.
    kept_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV < top_p
    least_Bx1 = jnp.min(jnp.where(kept_BxV, ordered_BxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)


def generate(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_id: int | None = None,
    seed: int = 0,
    ranges: Any = None,
) -> list[list[int]]:
    """Continues each prompt; returns the new tokens alone, without the end token.

    Prompts of several lengths share a batch by padding on the left, which changes nothing: OPT's
    positions count visible tokens.

    Args:
      model: an `OptForCausalLM`.
      params: its parameters.
      prompts: token ids, at least one each (OPT's texts begin with `</s>`); lists or arrays, [B, T]
        if all are alike in length.
      max_new_tokens: at most so many per prompt.
      sampling: greedy by default.
      eos_id: a continuation ends before this token; None lets it run to the full length.
      seed: of the sampling.
      ranges: calibrated ranges of a quantized model.

    Raises:
      UserError: another model, an empty prompt, an id out of range, or more tokens than positions.
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    _check(model, rows, max_new_tokens)
    longest = max(map(len, rows))
    ids_BxT = np.zeros((len(rows), longest), np.int32)
    mask_BxT = np.zeros_like(ids_BxT)
    for row, prompt in enumerate(rows):
        ids_BxT[row, longest - len(prompt) :] = prompt
        mask_BxT[row, longest - len(prompt) :] = 1
    tokens_BxN = _generate(
        model,
        {"params": params, **({RANGES: ranges} if ranges is not None else {})},
        ids_BxT,
        mask_BxT,
        jax.random.key(seed),
        new=max_new_tokens,
        sampling=sampling,
    )
    return [_until(row, eos_id) for row in np.asarray(tokens_BxN).tolist()]


@functools.partial(jax.jit, static_argnames=("model", "new", "sampling"))
def _generate(model, variables, ids_BxT, mask_BxT, key, *, new: int, sampling: Sampling):
    """New token ids, [B, new]: the prompts in one pass, then one token at a time."""
    batch, length = ids_BxT.shape
    visible_BxS = jnp.pad(mask_BxT.astype(bool), ((0, 0), (0, new)))
    lengths_B = jnp.sum(mask_BxT, axis=1, dtype=jnp.int32)

    def extend(cache, ids, places, visible, start, *, first=False):
        logits_BxV, updated = model.apply(
            {**variables, "cache": cache},
            ids,
            places,
            visible,
            start,
            first=first,
            method="extend",
            mutable=["cache"],
        )
        return logits_BxV, updated["cache"]

    def one(carry, i):
        logits_BxV, cache, visible_BxS = carry
        token_B = sampling.draw(logits_BxV, jax.random.fold_in(key, i))
        visible_BxS = visible_BxS.at[:, length + i].set(True)
        logits_BxV, cache = extend(
            cache, token_B[:, None], (lengths_B + i)[:, None], visible_BxS, length + i
        )
        return (logits_BxV, cache, visible_BxS), token_B

    cache = model.empty_cache(batch, length + new)
    start, places_BxT = jnp.int32(0), positions(mask_BxT)
    logits_BxV, cache = extend(cache, ids_BxT, places_BxT, visible_BxS, start, first=True)
    carry = (logits_BxV, cache, visible_BxS)
    (logits_BxV, _, _), tokens_NxB = jax.lax.scan(one, carry, jnp.arange(new - 1, dtype=jnp.int32))
    last_B = sampling.draw(logits_BxV, jax.random.fold_in(key, new - 1))
    return jnp.concatenate([tokens_NxB, last_B[None]]).T


def check_causal(model: nn.Module) -> None:
    """Raises UserError for a model that does not predict the next token."""
    if not isinstance(model, OptForCausalLM):
        raise UserError(
            f"text generation needs a causal model (OPT), found {type(model).__name__}."
        )


def _check(model: nn.Module, prompts: Sequence[np.ndarray], max_new_tokens: int) -> None:
    check_causal(model)
    config = model.config
    if config.gate is not None and config.gate.pooled:
        raise UserError(
            "text generation needs gates that see no later token, found "
            f"gate_pooling={config.gate.pooling}, which averages over the whole sequence: generate "
            "with a model of gate_pooling=none."
        )
    if not prompts or not all(ids.ndim == 1 and ids.size for ids in prompts):
        raise UserError("text generation needs at least one prompt of at least one token each.")
    check_at_least(1, "max_new_tokens", max_new_tokens)
    every = np.concatenate(prompts)
    if every.dtype.kind not in "iu":
        raise UserError(f"prompts must be of integer token ids, found {every.dtype}.")
    wrong = every[(every < 0) | (every >= config.vocab_size)]
    if wrong.size:
        raise UserError(
            f"token ids must be in 0..{config.vocab_size - 1}, found {wrong[0]}: the tokenizer "
            "does not match the checkpoint."
        )
    total = max(map(len, prompts)) + max_new_tokens
    if total > config.max_position_embeddings:
        raise UserError(
            f"the model has {config.max_position_embeddings} positions, found a prompt and "
            f"max_new_tokens of {total} together: ask for fewer."
        )


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
