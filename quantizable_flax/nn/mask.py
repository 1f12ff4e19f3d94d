"""Which keys a query sees, as data that a fused attention reads, and as the matrix it means."""

import jax
import jax.numpy as jnp
from flax import struct

from quantizable_flax.errors import UserError
from quantizable_flax.kernels.scheme import HIDDEN, Extras


@struct.dataclass
class Mask:
    """Padding, causality and segments; a key is seen where all that are given agree.

    Attributes:
      visible_BxS: True or 1 where a key is no padding.
      causal: whether a query sees no later key.
      query_segments_BxT, key_segments_BxS: integers from 0, given both or neither: a query sees
        the keys of its own segment alone.
    """

    visible_BxS: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    query_segments_BxT: jax.Array | None = None
    key_segments_BxS: jax.Array | None = None

    @property
    def has_ids(self) -> bool:
        """Whether there is more than causality."""
        return self.visible_BxS is not None or self.query_segments_BxT is not None

    def dense(self, queries: int, keys: int) -> jax.Array | None:
        """Bool, broadcasts to [B, H, queries, keys]; None where every key is seen."""
        parts = []
        if self.causal:
            parts.append(jnp.tril(jnp.ones((queries, keys), bool))[None, None])
        if self.visible_BxS is not None:
            parts.append(self.visible_BxS.astype(bool)[:, None, None, :])
        if self.query_segments_BxT is not None and self.key_segments_BxS is not None:
            same = self.query_segments_BxT[:, :, None] == self.key_segments_BxS[:, None, :]
            parts.append(same[:, None])
        mask = None
        for part in parts:
            mask = part if mask is None else mask & part
        return mask

    def extras(self, batch: int, queries: int, keys: int) -> Extras:
        """The ids of padding and segments that kernels compare.

        Raises:
          UserError: segments of queries or of keys alone.
        """
        own, others = self.query_segments_BxT, self.key_segments_BxS
        if (own is None) != (others is None):
            raise UserError("a Mask needs segments of queries and of keys, found one of them.")
        if not self.has_ids:
            return Extras()
        own = jnp.zeros((batch, queries), jnp.int32) if own is None else own.astype(jnp.int32)
        others = jnp.zeros((batch, keys), jnp.int32) if others is None else others.astype(jnp.int32)
        if self.visible_BxS is not None:
            others = jnp.where(self.visible_BxS.astype(bool), others, HIDDEN)
        return Extras(*(jnp.broadcast_to(x, (batch, x.shape[1])) for x in (own, others)))


def dense(mask: jax.Array | Mask | None, queries: int, keys: int) -> jax.Array | None:
    """The matrix of a mask of either kind."""
    return mask.dense(queries, keys) if isinstance(mask, Mask) else mask
