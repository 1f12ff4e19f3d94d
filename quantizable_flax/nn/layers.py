"""Dense and Embed whose weights and outputs pass through the tap."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError
from quantizable_flax.nn.partition import constrain, splits_length
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.spec import QuantSpec
from quantizable_flax.quantization.tensor import (
    Quantized,
    Tensor,
    as_rows,
    beside,
    product,
    values,
)
from quantizable_flax.quantization.weight_site import WeightSite

Axes = tuple[str | None, ...]


def partitioned_param(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: Axes
) -> jax.Array:
    """Declares a float32 parameter whose axes carry logical names for sharding.

    Raises:
      UserError: the parameters hold one of another shape.
    """
    if module.has_variable("params", name):
        # As `module.param`, which would trace `init` to know the shape: a quarter of all tracing.
        known: Any = nn.unbox(module.get_variable("params", name))
        if jnp.shape(known) != shape:
            raise UserError(
                f"the parameter {'/'.join((*module.path, name))} must have the shape "
                f"{list(shape)}, found {list(jnp.shape(known))}: is it of another configuration?"
            )
        return known
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)  # type: ignore[return-value]


def quantized_param(
    module: nn.Module, site: WeightSite, init: Callable, shape: tuple[int, ...], axes: Axes
) -> Tensor:
    """Declares the float32 parameter of a weight site and returns it on its grid.

    Where the parameters hold int8 codes at the site instead, it returns those, and there is no
    parameter.
    """
    stored = site.stored()
    if stored is not None:
        return stored
    return site(partitioned_param(module, site.parameter, init, shape, axes))


def is_training(train: bool, deterministic: bool | None) -> bool:
    """Whether dropout is applied: `train`, or Flax's `deterministic` where it is given.

    Raises:
      UserError: both are True.
    """
    if train and deterministic:
        raise UserError("found train=True and deterministic=True: give one of the two.")
    return train if deterministic is None else not deterministic


class Dense(nn.Module):
    """`activation(x @ kernel + bias)`; the activation is fused, so only its result is quantized.

    Attributes:
      features: width of the output.
      axes: logical names of the kernel's (input, output) axes, for sharding.
      kernel_init: initialiser of the kernel; the bias starts at 0.
      activation: elementwise function, or None.
      use_bias: whether there is a bias.
      dtype: compute dtype; parameters stay float32.
      quant: how kernel and output are quantized.
    """

    features: int
    axes: Axes = (None, None)
    kernel_init: Callable = nn.initializers.normal(0.02)
    activation: Callable[[jax.Array], jax.Array] | None = None
    use_bias: bool = True
    dtype: Any = jnp.float32
    quant: QuantSpec | None = None

    @nn.compact
    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., features]."""
        kernel = quantized_param(
            self,
            WeightSite(self.quant, contracted_axis=0, name="weight"),
            self.kernel_init,
            (x.shape[-1], self.features),
            self.axes,
        )
        y = product("...D,DF->...F", _rows(x), kernel, dtype=self.dtype)
        if self.use_bias:
            bias = partitioned_param(
                self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:]
            )
            y = y + beside(bias.astype(y.dtype), y)
        if self.activation is not None:
            y = self.activation(y)
        y = y.astype(self.dtype).reshape(*x.shape[:-1], self.features)
        width = self.axes[1] if self.axes[1] in ("heads", "mlp") else None
        y = constrain(y, *("batch", "length")[: y.ndim - 1], width)
        return Site(self.quant, name="output")(y)


class Embed(nn.Module):
    """A lookup table; `attend` multiplies by its transpose.

    Attributes:
      num_embeddings: rows of the table.
      features: width of a row.
      axes: logical names of the table's axes.
      embedding_init: initialiser.
      frozen_id: a row that the lookup gives no gradient (the padding token), or None.
      dtype: compute dtype.
      quant: how the table is quantized.
      head: None for lookups alone, or how a tied decoder reads the table: "float" or "quantized".
    """

    num_embeddings: int
    features: int
    axes: Axes = (None, None)
    embedding_init: Callable = nn.initializers.normal(0.02)
    frozen_id: int | None = None
    dtype: Any = jnp.float32
    quant: QuantSpec | None = None
    head: str | None = None

    def setup(self):
        """Declares the table, shared by the lookup and `attend`."""
        self.weight = WeightSite(
            self.quant,
            parameter="embedding",
            channel_axis=0,
            contracted_axis=1 if self.head == "quantized" else None,
            float_copy=self.head == "float",
        )
        if self.weight.stored() is None:
            self.embedding = partitioned_param(
                self,
                "embedding",
                self.embedding_init,
                (self.num_embeddings, self.features),
                self.axes,
            )

    def __call__(self, ids: jax.Array | slice) -> jax.Array:
        """Integer [...] -> [..., features]; a slice of the table [n, features] without a lookup.

        The gradient of a slice is a block of the table's, that of a lookup a sum over all of ids.
        """
        return values(self.rows(ids)).astype(self.dtype)

    def rows(self, ids: jax.Array | slice) -> Tensor:
        """As the call, but on the table's grid, for a lookup that enters a product."""
        stored = self.weight.stored()
        if stored is not None:
            return stored[ids]
        # A table that is still a numpy array cannot be indexed by a traced one. Its width is whole,
        # for rows that are split so could not be handed to the devices that need them.
        rows = self.weight(constrain(jnp.asarray(self.embedding), self.axes[0], None), rows=ids)
        if self.frozen_id is None:
            return rows
        numbers = jnp.arange(self.num_embeddings)[ids] if isinstance(ids, slice) else ids
        frozen = (numbers == self.frozen_id)[..., None]

        def freeze(a: jax.Array) -> jax.Array:
            return jnp.where(frozen, jax.lax.stop_gradient(a), a)

        if isinstance(rows, Quantized):
            return rows.moved(freeze, lambda grid: grid)
        return freeze(rows)

    def decoder(self) -> Callable[[Tensor], jax.Array]:
        """Returns [..., features] -> float32 [..., num_embeddings]: logits without a bias.

        The table is on its grid if `head` is "quantized". The function reads nothing from the
        module, so that a loop can trace it.
        """
        if self.head == "quantized":
            stored = self.weight.stored()
            table = self.weight(self.embedding) if stored is None else stored
        else:
            # Gathered over fsdp once, here, and not in every turn of a loop.
            table = constrain(self.embedding.astype(self.dtype), "vocab", None)

        def attend(x: Tensor) -> jax.Array:
            if self.head != "quantized":
                x = values(x).astype(self.dtype)
            logits = product("...D,VD->...V", _rows(x), table)
            logits = logits.reshape(*x.shape[:-1], self.num_embeddings)
            return constrain(logits, *("batch", "length")[: logits.ndim - 1], "vocab")

        return attend


def _rows(x: Tensor) -> Tensor:
    """x as rows, but where a mesh splits sequences: there [B * T] has no layout.

    XLA:CPU gives the backward pass of a product of [B, T, D] operands transposed, strided fusions,
    and took nine times as long for the FFN of a small ViT.
    """
    return x if splits_length() else as_rows(x)


class Dropout(nn.Dropout):
    """Flax's dropout, which lets a tensor on its grid pass when there is nothing to drop."""

    @nn.compact
    def __call__(self, inputs: Tensor, deterministic: bool | None = None, rng=None) -> Tensor:
        """As `nn.Dropout`; what has been dropped is on no grid any more."""
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return inputs
        return super().__call__(values(inputs), deterministic, rng)
