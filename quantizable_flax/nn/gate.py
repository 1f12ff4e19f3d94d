"""The gate on each head's output, `sigmoid(G_h(x))` (arXiv 2306.12929, section 4.2, table 4)."""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError, nearest
from quantizable_flax.nn.layers import partitioned_param
from quantizable_flax.quantization.sites import record
from quantizable_flax.quantization.tensor import beside, precision_of

KINDS = ("linear", "mlp", "all_heads_linear", "unconditional")
POOLINGS = ("none", "visible", "all")


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """Which gate, and how it starts.

    Attributes:
      kind: "linear" (on the head's own slice of x), "mlp" (the same with one hidden layer),
        "all_heads_linear" (on the whole x) or "unconditional" (one learned scalar per head).
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
        if self.hidden < 1:
            raise UserError(f"attention gate_hidden must be at least 1, found {self.hidden}.")

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
    def __call__(self, x_BxTxD: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns the factor on each head's context, [B, T or 1, H, 1].

        Args:
          x_BxTxD: the input of attention.
          mask: as attention has it; read by a gate per head, which needs [B or 1, H or 1, 1, T].

        Raises:
          UserError: a gate per head with a mask that has a row for each query.
        """
        # With bfloat16 compute its products are as precise as all others there.
        einsum = functools.partial(jnp.einsum, precision=precision_of(x_BxTxD))
        logits_BxTxH = self._logits(x_BxTxD.astype(jnp.float32), einsum)
        if self.config.pooled:
            logits_BxTxH = self._pooled(logits_BxTxH, mask)
        gate_BxTxH = nn.sigmoid(logits_BxTxH)
        record(self, "mean", lambda: jnp.mean(gate_BxTxH, axis=1))
        return (self.config.scale * gate_BxTxH)[..., None]

    def _pooled(self, logits_BxTxH: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The mean over the tokens that the gate is to see: [B, 1, H]; 0 where it sees none."""
        if mask is None or not self.config.masked:
            return jnp.mean(logits_BxTxH, axis=1, keepdims=True)
        if mask.ndim > 1 and mask.shape[-2] > 1:
            raise UserError(
                "a gate with gate_pooling=visible needs one mask for all queries, [batch, 1, 1, "
                f"keys], found {list(mask.shape)}: choose gate_pooling=none for a causal model, or "
                "gate_pooling=all to average over all positions, hidden ones included."
            )
        mask_BxHx1xT = mask.astype(bool).reshape((1,) * (4 - mask.ndim) + mask.shape)
        visible_BxTxH = jnp.swapaxes(mask_BxHx1xT[:, :, 0], 1, 2)
        visible_BxTxH = jnp.broadcast_to(visible_BxTxH, logits_BxTxH.shape)
        total = jnp.sum(jnp.where(visible_BxTxH, logits_BxTxH, 0.0), axis=1, keepdims=True)
        count = jnp.sum(visible_BxTxH, axis=1, keepdims=True, dtype=jnp.float32)
        return total / jnp.maximum(count, 1.0)

    def _logits(self, x_BxTxD: jax.Array, einsum: Callable[..., jax.Array]) -> jax.Array:
        config, heads, width = self.config, self.num_heads, x_BxTxD.shape[-1]
        if config.kind == "unconditional":
            logit = self._param("logit", (heads,), ("heads",), _logit(config.pi_init))
            return jnp.broadcast_to(logit, (x_BxTxD.shape[0], 1, heads))
        bias_1x1xH = beside(
            self._param("bias", (heads,), ("heads",), _logit(config.pi_init)), x_BxTxD
        )
        if config.kind == "all_heads_linear":
            kernel = self._param("kernel", (width, heads), ("embed", "heads"))
            return einsum("BTD,DH->BTH", x_BxTxD, kernel) + bias_1x1xH
        size = width // heads
        x_BxTxHxK = x_BxTxD.reshape(*x_BxTxD.shape[:-1], heads, size)
        if config.kind == "linear":
            kernel = self._param("kernel", (heads, size), ("heads", None))
            return einsum("BTHK,HK->BTH", x_BxTxHxK, kernel) + bias_1x1xH
        hidden_kernel = self._param(
            "hidden_kernel", (heads, size, config.hidden), ("heads", None, None)
        )
        hidden_bias = self._param("hidden_bias", (heads, config.hidden), ("heads", None), 0.0)
        kernel = self._param("kernel", (heads, config.hidden), ("heads", None))
        hidden = einsum("BTHK,HKN->BTHN", x_BxTxHxK, hidden_kernel)
        hidden = nn.relu(hidden + beside(hidden_bias, hidden))
        return einsum("BTHN,HN->BTH", hidden, kernel) + bias_1x1xH

    def _param(self, name, shape, axes, constant: float | None = None) -> jax.Array:
        init = (
            nn.initializers.normal(self.config.init_std)
            if constant is None
            else nn.initializers.constant(constant)
        )
        return partitioned_param(self, name, init, shape, axes)


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))
