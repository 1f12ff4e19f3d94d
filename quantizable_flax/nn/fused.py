"""Which program computes an attention, and the way into it from a mesh of devices.

The rule: what is measured or quantized, and what no kernel can do (see `obstacle`), is unfused.
Else `auto` takes blocks of queries in plain XLA from so many keys on (`_few`), below which whole
matrices are what was measured to be as fast; and instead of blocks cuDNN, for what it can do.
Our kernels for GPUs and TPUs have not run on their hardware yet and are taken by name.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.kernels.attention import PATHS, fused_attention
from quantizable_flax.kernels.scheme import NO_EXTRAS, Extras, Scheme
from quantizable_flax.nn.mask import Mask
from quantizable_flax.nn.partition import on_parts, platform, split_axes, splits_length
from quantizable_flax.nn.softmax_config import SoftmaxConfig, SoftmaxFn

KERNELS = ("auto", "unfused", "blockwise", "cudnn", "gpu", "tpu")
HARDWARE = {"cudnn": "gpu", "gpu": "gpu", "tpu": "tpu"}
BLOCKS_FROM = {"gpu": 1024, "tpu": 1024}  # keys; a CPU is faster by blocks at any length
CLIPPED_BLOCKS_FROM = {**BLOCKS_FROM, "cpu": 512}  # docs/attention.md


def check_kernel(kernel: str) -> None:
    """Raises UserError for a name of no kernel."""
    check_choice("train.attention_kernel", kernel, KERNELS)


def check_hardware(kernel: str) -> None:
    """Raises UserError for a kernel of other hardware than the program of the trace is for."""
    wanted = HARDWARE.get(kernel, platform())
    if wanted != platform():
        raise _impossible(kernel, f"needs a {wanted.upper()}, found {platform()}")


def _impossible(kernel: str, reason: str) -> UserError:
    return UserError(f"attention_kernel={kernel}: {reason}; choose auto.")


def obstacle(softmax: SoftmaxFn, mask: jax.Array | Mask | None) -> str | None:
    """Why no fused program can compute this softmax under this mask, None if one can."""
    if not isinstance(softmax, SoftmaxConfig):
        return "a softmax that is a function and no SoftmaxConfig"
    if softmax.blind_queries == "uniform" and mask is not None:
        return "blind_queries=uniform"
    if mask is not None and not isinstance(mask, Mask):
        return "a mask that is an array and no qf.Mask"
    return None


def choose(kernel: str, softmax: SoftmaxFn, mask: Any, *qkv: Any) -> str:
    """The path that computes it, a key of `PATHS` or "unfused".

    Args:
      kernel: one of `KERNELS`.
      softmax, mask: as attention has them.
      qkv: its operands [B, T, H, K] and [B, S, H, K]; shapes and dtypes count.

    Raises:
      UserError: a kernel that is asked for by name and cannot compute this here.
    """
    check_kernel(kernel)
    if kernel == "unfused":
        return kernel
    reason = obstacle(softmax, mask)
    if kernel == "auto":
        empty = not all(x.size for x in qkv)  # there are no blocks of an empty batch
        if reason or empty or _few(softmax, qkv[1]):
            return "unfused"
        return "blockwise" if _unsupported("cudnn", softmax, mask, qkv) else "cudnn"
    if reason is not None:
        reason = f"cannot compute {reason}"
    elif kernel != "blockwise":
        reason = _unsupported(kernel, softmax, mask, qkv)
    if reason is not None:
        raise _impossible(kernel, reason)
    return kernel


def _few(softmax: Any, k: Any) -> bool:
    """Whether whole matrices of scores over so few keys are no slower than blocks."""
    least = CLIPPED_BLOCKS_FROM if softmax.kind == "clipped" else BLOCKS_FROM
    return k.shape[1] < least.get(platform(), 0)


def _unsupported(kernel: str, softmax: Any, mask: Mask | None, qkv: tuple) -> str | None:
    """Why the kernel of some hardware cannot compute this here."""
    if HARDWARE[kernel] != platform():
        return f"needs a {HARDWARE[kernel].upper()}, found {platform()}"
    if softmax.alpha:
        return "cannot compute length-normalised clipping"
    if kernel == "cudnn":
        if softmax.sink != "none":
            return "cannot compute a sink"
        if mask is not None and mask.has_ids:
            return "cannot compute padding and segments"
        if splits_length():
            return "cannot compute a part of the queries"
    return PATHS[kernel].supports(_scheme(softmax, mask, qkv[0]), *qkv)


def fused(
    path: str,
    softmax: Any,
    q_BxTxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    v_BxSxHxK: jax.Array,
    mask: Any = None,
    *,
    sink_H: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The context [B, T, H, K] in v's dtype, by the path; on a mesh each device its part.

    Args:
      path: of `choose`, not "unfused".
      softmax: a SoftmaxConfig.
      q_BxTxHxK, k_BxSxHxK, v_BxSxHxK: the operands.
      mask: a `Mask` or None.
      sink_H: logits of learned sinks.
      dropout_rate: of the probabilities.
      dropout_key: a PRNG key, needed with dropout.
      scale: of the scores, 1 / sqrt(K) if None.
    """
    batch, queries, heads, _ = q_BxTxHxK.shape
    if path == "cudnn" and dropout_rate:
        path = "blockwise"  # its generator is another
    scheme = _scheme(softmax, mask, q_BxTxHxK, scale, dropout_rate)
    extras = NO_EXTRAS if mask is None else mask.extras(batch, queries, k_BxSxHxK.shape[1])
    extras = extras._replace(
        sink=softmax.sink_logits(sink_H, heads),
        seed=_seed(dropout_key) if dropout_rate else None,
    )
    return _on_mesh(path, scheme, q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, extras)


def _scheme(
    softmax: Any, mask: Any, q: Any, scale: float | None = None, dropout_rate: float = 0.0
) -> Scheme:
    return Scheme(
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        gamma=softmax.gamma,
        zeta=softmax.zeta,
        causal=mask is not None and mask.causal,
        dropout_rate=dropout_rate,
        alpha=softmax.alpha,
    )


def _seed(key: jax.Array | None) -> jax.Array:
    if key is None:
        raise UserError("attention dropout needs a key, found None.")
    return jax.random.bits(key, (2,), jnp.uint32)


def _on_mesh(path: str, scheme: Scheme, q, k, v, extras: Extras) -> jax.Array:
    names = ("batch", "length", "heads")
    axes = split_axes(dict(zip(names, q.shape[:3], strict=True)))
    if not axes:
        return fused_attention(path, scheme, q, k, v, extras)
    rows, length, heads = (axes[name] or None for name in names)
    wanted: dict[str, Any] = {
        "query_ids": PartitionSpec(rows, length),
        "key_ids": PartitionSpec(rows),
        "sink": PartitionSpec(heads),
        "seed": PartitionSpec(),
    }
    given = {name: spec for name, spec in wanted.items() if getattr(extras, name) is not None}
    # Places matter to dropout, and to causal queries that are split.
    placed = bool(scheme.dropout_rate) or (scheme.causal and length is not None)

    def part(q, k, v, extras: Extras) -> jax.Array:
        if placed:
            row, query, head = (
                size * jax.lax.axis_index(axes[name]) if axes[name] else 0
                for name, size in zip(names, q.shape[:3], strict=True)
            )
            extras = extras._replace(first=jnp.stack([jnp.int32(x) for x in (row, head, query)]))
        return fused_attention(path, scheme, q, k, v, extras)

    split, whole = PartitionSpec(rows, length, heads), PartitionSpec(rows, None, heads)
    in_specs = (split, whole, whole, Extras(**given))
    return on_parts(part, in_specs, split)(q, k, v, extras)
