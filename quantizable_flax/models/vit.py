"""ViT for image classification: pre-LN, class token, erf GELU (arXiv 2010.11929)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError
from quantizable_flax.models.features import Features, pooled
from quantizable_flax.models.losses import Scores, class_scores, no_scores, smooth_targets
from quantizable_flax.models.metric import FIDELITY, TOP1, Metric
from quantizable_flax.models.mixing import mix
from quantizable_flax.models.registers import learned_table, learned_tokens
from quantizable_flax.models.transformer import gelu, residual, run_layers
from quantizable_flax.models.vit_config import VitConfig
from quantizable_flax.nn.layers import Dropout, is_training
from quantizable_flax.quantization.sites import Site
from quantizable_flax.quantization.tensor import Tensor, beside, values


class VitEmbeddings(nn.Module):
    """Patches through a Dense layer, class token, positions, registers.

    A convolution with stride = kernel size is a matmul of flattened patches, and as such it is
    quantized like every other one.
    """

    config: VitConfig

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, *, train: bool) -> Tensor:
        """Normalised images -> [B, tokens, D]."""
        c = self.config
        patches_BxNxP = Site(c.quant, name="patches")(patches(images_BxHxWxC, c.patch_size))
        x = c.dense(c.hidden_size, (None, "embed"), name="patch_embedding")(patches_BxNxP)
        if c.patch_layer_norm:
            x = c.layer_norm(name="patch_layer_norm")(x)
        x = values(x)
        first = [learned_tokens(self, c, "cls_token", 1, len(x))]
        if c.distillation != "none":
            first.append(learned_tokens(self, c, "distillation_token", 1, len(x)))
        x = jnp.concatenate([*first, x], axis=1)
        x = x + beside(learned_table(self, c, "position_table", c.num_positions), x)
        if c.num_registers:
            # Behind the class token and without a position, as in DINOv2.
            registers = learned_tokens(self, c, "register_tokens", c.num_registers, len(x))
            x = jnp.concatenate([x[:, : len(first)], registers, x[:, len(first) :]], axis=1)
        x = Site(c.quant, name="sum")(x)
        return Dropout(c.hidden_dropout, deterministic=not train)(x)


class VitLayer(nn.Module):
    """LayerNorm, attention, residual sum; LayerNorm, FFN, residual sum."""

    config: VitConfig

    @nn.compact
    def __call__(self, x_BxTxD: Tensor, *, train: bool = False) -> Tensor:
        """Returns [B, T, D]."""
        c = self.config
        y = c.layer_norm(name="attention_layer_norm")(x_BxTxD)
        y = c.attention(name="attention")(y, train=train)
        x_BxTxD = residual(c, "attention", x_BxTxD, y, train=train)
        y = c.layer_norm(name="ffn_layer_norm")(x_BxTxD)
        y = c.dense(c.intermediate_size, ("embed", "mlp"), activation=gelu, name="ffn_in")(y)
        y = Dropout(c.hidden_dropout, deterministic=not train)(y)
        y = c.dense(c.hidden_size, ("mlp", "embed"), name="ffn_out")(y)
        return residual(c, "ffn", x_BxTxD, y, train=train)


class VitForImageClassification(nn.Module):
    """The whole model; `loss` is what training and evaluation call."""

    config: VitConfig
    has_final_layer_norm = True

    @property
    def metric(self) -> Metric:
        """What it is judged by."""
        return TOP1 if self.config.num_classes else FIDELITY

    def setup(self):
        """Declares embeddings, layers and head."""
        c = self.config
        self.embeddings = VitEmbeddings(c)
        self.layers = [VitLayer(c, name=f"layer_{i}") for i in range(c.num_layers)]
        self.final_layer_norm = c.layer_norm(final=True)
        if c.num_classes:
            self.head = c.dense(c.num_classes, ("embed", None), quant=c.head_quant)
        if c.distillation == "head":
            self.distillation_head = c.dense(c.num_classes, ("embed", None), quant=c.head_quant)

    def normalise(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Pixels in 0..255 -> `(pixels / 255 - pixel_mean) / pixel_std`; floats stay as they are.

        Pixels are uint8 or an integer of 32 bits and more, where those outside 0..255 come out as
        NaN: a compiled program cannot refuse them, and samples of 16 bits must not pass for dark
        images.

        Raises:
          UserError: images of another size than the model's, or of a dtype that holds no such
            pixels.
        """
        c = self.config
        expected = (c.image_size, c.image_size, c.channels)
        if images_BxHxWxC.shape[1:] != expected:
            raise UserError(
                f"images must have shape [batch, {', '.join(map(str, expected))}] (height, width, "
                f"channels), found {list(images_BxHxWxC.shape)}."
            )
        dtype = images_BxHxWxC.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            return images_BxHxWxC.astype(c.dtype)
        wide = jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits >= 32
        if dtype != jnp.uint8 and not wide:
            raise UserError(
                "images must be pixels in 0..255 as uint8 or int32, or floats that are normalised "
                f"already, found {dtype}: convert them, and samples of 16 bits divided by 257."
            )
        pixels = jnp.asarray(images_BxHxWxC, jnp.float32)
        if wide:
            pixels = jnp.where((pixels >= 0.0) & (pixels <= 255.0), pixels, jnp.nan)
        mean, std = (
            beside(jnp.asarray(x, jnp.float32), pixels) for x in (c.pixel_mean, c.pixel_std)
        )
        return ((pixels / 255.0 - mean) / std).astype(c.dtype)

    def encode(self, images_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        """Images, as `__call__` takes them -> hidden states behind the last LayerNorm [B, T, D]."""
        return values(self._encode(images_BxHxWxC, train))

    def _encode(self, images_BxHxWxC: jax.Array, train: bool) -> Tensor:
        x = self.embeddings(self.normalise(images_BxHxWxC), train=train)
        return self.final_layer_norm(run_layers(self.config, self.layers, x, train=train))

    def __call__(
        self,
        images_BxHxWxC: jax.Array,
        *,
        train: bool = False,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Returns float32 logits [B, num_classes]; without a head, hidden states [B, T, D].

        Args:
          images_BxHxWxC: integer pixels in 0..255, or floats that are normalised already.
          train: True applies dropout and needs a "dropout" rng.
          deterministic: the opposite of `train`, as Flax's modules take it; None leaves it to that.
        """
        x_BxTxD = self._encode(images_BxHxWxC, is_training(train, deterministic))
        return self.predict(x_BxTxD) if self.config.num_classes else values(x_BxTxD)

    def predict(self, x_BxTxD: Tensor, *, train: bool = False) -> jax.Array:
        """Hidden states -> float32 logits [B, num_classes]."""
        del train
        x_BxTxD = x_BxTxD if self.config.head_quant is not None else values(x_BxTxD)
        logits_BxC = values(self.head(x_BxTxD[:, 0])).astype(jnp.float32)
        if self.config.distillation != "head":
            return logits_BxC
        return (logits_BxC + values(self.distillation_head(x_BxTxD[:, 1])).astype(jnp.float32)) / 2

    def features(self, batch: dict[str, jax.Array], *, train: bool = False) -> Features:
        """Returns the last hidden states of a batch of `images`, and the images' embeddings."""
        hidden_BxTxD = self.encode(batch["images"], train=train)
        visible_BxT = jnp.ones(hidden_BxTxD.shape[:2], jnp.float32)
        return pooled(hidden_BxTxD, visible_BxT, self.config.pooling)

    def loss(self, batch: dict[str, jax.Array], *, train: bool = False) -> Scores:
        """Scores the labels; label smoothing, Mixup and CutMix in training alone.

        Args:
          batch: `images` as in `__call__`, `labels` int32 [B]; without them or without a head
            nothing is scored.
          train: needs a "dropout" rng, which the mixing draws from too.
        """
        c, images = self.config, batch["images"]
        if not c.num_classes or "labels" not in batch:
            self(images, train=train)
            return no_scores(images.shape[0])
        labels_B = batch["labels"]
        smoothing = c.label_smoothing if train else 0.0
        targets = smooth_targets(labels_B, c.num_classes, smoothing)
        if train and (c.mixup_alpha or c.cutmix_alpha):
            images, own = mix(
                self.normalise(images),
                self.make_rng("dropout"),
                mixup_alpha=c.mixup_alpha,
                cutmix_alpha=c.cutmix_alpha,
                cutmix_share=c.cutmix_share,
                probability=c.mix_probability,
            )
            targets = own * targets + (1.0 - own) * targets[::-1]
        return class_scores(self(images, train=train), targets, labels_B)

    def example_batch(self) -> dict[str, jax.Array]:
        """The smallest batch that the model can be initialised with."""
        c = self.config
        images = jnp.zeros((1, c.image_size, c.image_size, c.channels), jnp.uint8)
        return {"images": images, "labels": jnp.zeros((1,), jnp.int32)}


def patches(images_BxHxWxC: jax.Array, size: int) -> jax.Array:
    """Cuts images into flattened size x size patches, row by row: [B, N, size * size * C]."""
    batch, height, width, channels = images_BxHxWxC.shape
    x = images_BxHxWxC.reshape(batch, height // size, size, width // size, size, channels).swapaxes(
        2, 3
    )
    return x.reshape(batch, -1, size * size * channels)
