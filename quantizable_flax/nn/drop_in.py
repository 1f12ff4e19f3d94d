"""Our softmax in attention modules of Flax, Linen and NNX: `attention_fn`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from quantizable_flax.errors import UserError
from quantizable_flax.nn.attention import attention_context, attention_scores
from quantizable_flax.nn.functional import as_mask, dropped, for_each_head
from quantizable_flax.nn.fused import choose, fused
from quantizable_flax.nn.softmax_config import make_softmax
from quantizable_flax.quantization.tensor import beside


def attention_fn(
    softmax: str = "clipped",
    *,
    gamma: float | None = None,
    zeta: float | None = None,
    alpha: float | None = None,
    length_normalised: bool = False,
    seq_len: int | None = None,
    blind_queries: str = "zero",
) -> Callable[..., jax.Array]:
    """Returns a drop-in `attention_fn` for the attention of `flax.linen` and of `flax.nnx`.

    For example `nn.MultiHeadDotProductAttention(8, attention_fn=attention_fn("clipped",
    gamma=-0.025))`, or the same of `nnx.MultiHeadAttention`. Arguments are those of `make_softmax`.
    The function honours what `dot_product_attention` of either takes, grouped key heads included,
    but for products of the caller's own (`qk_attn_weights_einsum` and the like), which it refuses.
    Scores and softmax are float32 whatever the dtype, so `force_fp32_for_softmax` changes nothing.

    Raises:
      UserError: as `make_softmax`.
    """
    probabilities = make_softmax(
        softmax,
        gamma=gamma,
        zeta=zeta,
        alpha=alpha,
        length_normalised=length_normalised,
        seq_len=seq_len,
        blind_queries=blind_queries,
    )

    # Flax passes by name what it finds in this signature and drops the rest: what is not named
    # here cannot be refused.
    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable | None = None,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        """[B, T, H, K] queries, [B, S, G, K] keys and values -> [B, T, H, K]; G divides H."""
        _refuse(
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        key, value = (for_each_head(x, query.shape[-2]) for x in (key, value))
        rate = 0.0 if deterministic else dropout_rate
        if rate and dropout_rng is None:
            raise UserError("attention dropout needs a dropout_rng, found None.")
        # Weights that are sown, and dropout's mask that is shared, are there as whole matrices.
        whole = (bias, module, precision) != (None,) * 3 or (rate and broadcast_dropout)
        if not whole and query.ndim == 4:
            seen = as_mask(mask, query.shape[0], is_causal)
            path = choose("auto", probabilities, seen, query, key, value)
            if path != "unfused":
                return fused(
                    path,
                    probabilities,
                    query,
                    key,
                    value,
                    seen,
                    dropout_rate=rate,
                    dropout_key=dropout_rng,
                )
        scores = attention_scores(query, key, precision)
        if bias is not None:
            scores = scores + beside(bias.astype(scores.dtype), scores)
        if is_causal:
            causal = beside(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores)
            mask = causal if mask is None else causal & beside(mask.astype(bool), scores)
        probs = probabilities(scores, mask)
        if module is not None:
            module.sow("intermediates", "attention_weights", probs)
        if rate and dropout_rng is not None:
            probs = dropped(probs, rate, dropout_rng, broadcast=broadcast_dropout)
        return attention_context(probs, value, precision)

    return attend


def _refuse(**products: Callable | None) -> None:
    given = [name for name, function in products.items() if function is not None]
    if given:
        raise UserError(
            f"attention_fn computes its products itself, found {given[0]}: leave it out, or take "
            "quantizable_flax.MultiHeadAttention for quantized products."
        )
