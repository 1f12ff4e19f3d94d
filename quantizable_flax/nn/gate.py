"""The gate on each head's output, `sigmoid(G_h(x))` (arXiv 2306.12929, section 4.2, table 4).

Two kinds are of other papers. "value" reads the head's own values instead of x, after value-state
gated attention (arXiv 2510.09017): `sigmoid(w_h . v_h + b_h)` with v_h of the query's own token, a
factor on the head's output. "elementwise" is the gate behind attention that Qwen's comparison
prefers (arXiv 2505.06708, there G1): `sigmoid(x W + b)` with W [D, H, K], a factor for each element
of the output; its gate by head is our "all_heads_linear".
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError, check_at_least, nearest
from quantizable_flax.nn.layers import partitioned_param
from quantizable_flax.quantization.sites import record
from quantizable_flax.quantization.tensor import beside, precision_of

KINDS = ("linear", "mlp", "all_heads_linear", "value", "elementwise", "unconditional")
POOLINGS = ("none", "visible", "all")


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """Which gate, and how it starts.

    Attributes:
      kind: "linear" (on the head's own slice of x), "mlp" (the same with one hidden layer),
        "all_heads_linear" (on the whole x), "unconditional" (one learned scalar per head), "value"
        (on the head's own values) or "elementwise" (on the whole x, a factor for each element).
      pooling: "none", a gate for each token; "visible", one for the sequence: the logit is averaged
        over the visible tokens before the sigmoid; "all", the same over all positions whatever the
        mask, padding and later tokens included, as published.
      hidden: hidden units of the mlp (the paper uses 4 and 64).
      pi_init: the probability at which every gate starts, in (0, 1); its logit is the bias. The
        original honours it for "linear" only, here it holds for all kinds.
      init_std: standard deviation of the gate's initial weights.
      finetune: scale the conditional gates by 1 / pi_init, so that gates put on a finished model
        leave it unchanged at the start (use a small init_std: 0.01 BERT, 0.001 OPT).
    """

    kind: str = "linear"
    pooling: str = "none"
    hidden: int = 4
    pi_init: float = 0.5
    init_std: float = 0.02
    finetune: bool = False

    def __post_init__(self):
        """Raises UserError for a field outside its domain."""
        if self.kind not in KINDS:
            raise UserError(
                f"attention gate must be none or one of {', '.join(KINDS)}, found {self.kind!r}"
                f"{nearest(self.kind, (*KINDS, 'none'))}."
            )
        if self.pooling not in POOLINGS:
            raise UserError(
                f"attention gate_pooling must be one of {', '.join(POOLINGS)}, found "
                f"{self.pooling!r}{nearest(self.pooling, POOLINGS)}."
            )
        if not 0.0 < self.pi_init < 1.0:
            raise UserError(f"attention gate_pi_init must be in (0, 1), found {self.pi_init}.")
        check_at_least(1, "attention gate_hidden", self.hidden)

    @property
    def pooled(self) -> bool:
        """Whether the gate averages over tokens, later ones included."""
        return self.pooling != "none" and self.kind != "unconditional"

    @property
    def masked(self) -> bool:
        """Whether what the mask hides stays out of such an average."""
        return self.pooling == "visible"

    @property
    def scale(self) -> float:
        """The factor on the gate; as in the original, never on the unconditional one."""
        return 1.0 / self.pi_init if self.finetune and self.kind != "unconditional" else 1.0


class Gate(nn.Module):
    """Computes the gate of every head, in float32 and never quantized.

    Attributes:
      config: which gate.
      num_heads: H; must divide the width of x.
    """

    config: GateConfig
    num_heads: int

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask: jax.Array | None = None,
        v_BxTxHxK: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the factor on each head's context, [B, T or 1, H, 1], elementwise [..., H, K].

        Args:
          x_BxTxD: the input of attention.
          mask: as attention has it; read by a gate per head, which needs [B or 1, H or 1, 1, T].
          v_BxTxHxK: the values of these tokens, which kind="value" reads.

        Raises:
          UserError: a gate per head with a mask that has a row for each query, or values missing.
        """
        # With bfloat16 compute its products are as precise as all others there.
        einsum = functools.partial(jnp.einsum, precision=precision_of(x_BxTxD))
        logits_BxTxHxN = self._logits(x_BxTxD.astype(jnp.float32), v_BxTxHxK, einsum)
        if self.config.pooled:
            logits_BxTxHxN = self._pooled(logits_BxTxHxN, mask)
        gate_BxTxHxN = nn.sigmoid(logits_BxTxHxN)
        record(self, "mean", lambda: jnp.mean(gate_BxTxHxN, axis=(1, 3)))
        return self.config.scale * gate_BxTxHxN

    def _pooled(self, logits_BxTxHxN: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The mean over the tokens that the gate is to see: [B, 1, H, N]; 0 where it sees none."""
        if mask is None or not self.config.masked:
            return jnp.mean(logits_BxTxHxN, axis=1, keepdims=True)
        if mask.ndim > 1 and mask.shape[-2] > 1:
            raise UserError(
                "a gate with gate_pooling=visible needs one mask for all queries, [batch, 1, 1, "
                f"keys], found {list(mask.shape)}: choose gate_pooling=none for a causal model, or "
                "gate_pooling=all to average over all positions, hidden ones included."
            )
        mask_BxHx1xT = mask.astype(bool).reshape((1,) * (4 - mask.ndim) + mask.shape)
        visible_BxTxHx1 = jnp.swapaxes(mask_BxHx1xT[:, :, 0], 1, 2)[..., None]
        visible_BxTxHxN = jnp.broadcast_to(visible_BxTxHx1, logits_BxTxHxN.shape)
        total = jnp.sum(jnp.where(visible_BxTxHxN, logits_BxTxHxN, 0.0), axis=1, keepdims=True)
        count = jnp.sum(visible_BxTxHxN, axis=1, keepdims=True, dtype=jnp.float32)
        return total / jnp.maximum(count, 1.0)

    def _logits(
        self,
        x_BxTxD: jax.Array,
        v_BxTxHxK: jax.Array | None,
        einsum: Callable[..., jax.Array],
    ) -> jax.Array:
        """[B, T, H, 1], of an unconditional gate [B, 1, H, 1], elementwise [B, T, H, K]."""
        config, heads, width = self.config, self.num_heads, x_BxTxD.shape[-1]
        start = _logit(config.pi_init)
        if config.kind == "unconditional":
            logit_H = self._param("logit", (heads,), ("heads",), start)
            return jnp.broadcast_to(logit_H[:, None], (x_BxTxD.shape[0], 1, heads, 1))
        if config.kind == "elementwise":
            bias_HxK = self._param("bias", (heads, width // heads), ("heads", None), start)
            axes = ("embed", "heads", None)
            kernel = self._param("kernel", (width, heads, width // heads), axes)
            return einsum("BTD,DHK->BTHK", x_BxTxD, kernel) + bias_HxK[None, None]
        bias_H = self._param("bias", (heads,), ("heads",), start)
        if config.kind == "all_heads_linear":
            kernel = self._param("kernel", (width, heads), ("embed", "heads"))
            products_BxTxH = einsum("BTD,DH->BTH", x_BxTxD, kernel)
        else:
            x_BxTxHxK = x_BxTxD.reshape(*x_BxTxD.shape[:-1], heads, width // heads)
            if config.kind == "value":
                x_BxTxHxK = _given(v_BxTxHxK).astype(jnp.float32)
            products_BxTxH = self._of_slices(x_BxTxHxK, einsum)
        return (products_BxTxH + beside(bias_H, x_BxTxD))[..., None]

    def _of_slices(self, x_BxTxHxK: jax.Array, einsum: Callable[..., jax.Array]) -> jax.Array:
        """What each head makes of its own slice of x, or of its own values: [B, T, H]."""
        config, (heads, size) = self.config, x_BxTxHxK.shape[-2:]
        if config.kind != "mlp":
            kernel = self._param("kernel", (heads, size), ("heads", None))
            return einsum("BTHK,HK->BTH", x_BxTxHxK, kernel)
        hidden_kernel = self._param(
            "hidden_kernel", (heads, size, config.hidden), ("heads", None, None)
        )
        hidden_bias = self._param("hidden_bias", (heads, config.hidden), ("heads", None), 0.0)
        kernel = self._param("kernel", (heads, config.hidden), ("heads", None))
        hidden = einsum("BTHK,HKN->BTHN", x_BxTxHxK, hidden_kernel)
        hidden = nn.relu(hidden + beside(hidden_bias, hidden))
        return einsum("BTHN,HN->BTH", hidden, kernel)

    def _param(self, name, shape, axes, constant: float | None = None) -> jax.Array:
        init = (
            nn.initializers.normal(self.config.init_std)
            if constant is None
            else nn.initializers.constant(constant)
        )
        return partitioned_param(self, name, init, shape, axes)


def _given(v_BxTxHxK: jax.Array | None) -> jax.Array:
    if v_BxTxHxK is None:
        raise UserError(
            "a gate of kind value reads the values of attention, found none: give them as the "
            "third argument, [B, T, H, K]."
        )
    return v_BxTxHxK


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))
