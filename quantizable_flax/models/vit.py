"""ViT for image classification: pre-LN, class token, erf GELU (arXiv 2010.11929)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.models.features import POOLINGS, Features, pooled
from quantizable_flax.models.losses import Scores, class_scores, no_scores, smooth_targets
from quantizable_flax.models.metric import FIDELITY, TOP1, Metric
from quantizable_flax.models.mixing import mix
from quantizable_flax.models.structure import PRE_LN, Fold, OutlierSites
from quantizable_flax.models.transformer import TransformerConfig, gelu, residual, run_layers
from quantizable_flax.models.vit_names import vit_names
from quantizable_flax.models.weights import WeightNames
from quantizable_flax.nn.layers import Dropout, is_training, quantized_param
from quantizable_flax.quantization.sites import Site, WeightSite
from quantizable_flax.quantization.tensor import Tensor, beside, values

OUTLIERS = r"final_layer_norm/output|layer_\d+/(ffn_residual|(ffn_out|\w+_layer_norm)/output)"


@dataclasses.dataclass(frozen=True)
class VitConfig(TransformerConfig):
    """Sizes and switches; the defaults are ViT-S/16. Sizes of images in pixels.

    Attributes:
      image_size: height and width, a multiple of patch_size.
      patch_size: height and width of a patch.
      channels: of the images, 1 or 3.
      num_classes: of the head, at least those of the data; 0 for no head.
      pooling: what is an image's embedding: "cls", the first hidden state, or the "mean" of all.
      patch_layer_norm: a LayerNorm behind the patch embedding (arXiv 2306.12929, appendix B).
      num_registers: learned tokens beside the class token, without position (arXiv 2309.16588).
      pixel_mean: of each channel, subtracted from integer pixels brought to [0, 1].
      pixel_std: what they are divided by then.
      label_smoothing: share of a training label's mass that all classes get evenly.
      mixup_alpha: Mixup (arXiv 1710.09412) by weights from Beta(alpha, alpha), 0 for none.
      cutmix_alpha: the same for the areas of CutMix (arXiv 1905.04899).
      mix_probability: that a batch is mixed by either, see `models.mixing.mix`.
      cutmix_share: share of the mixed batches that is CutMix's, where both alphas are above 0.
    """

    data: ClassVar[str] = "images"
    coverage: ClassVar[str] = "all"

    hidden_size: int = 384
    num_heads: int = 6
    intermediate_size: int = 1536
    layer_norm_eps: float = 1e-6
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    pooling: str = "cls"
    patch_layer_norm: bool = False
    num_registers: int = 0
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_probability: float = 1.0
    cutmix_share: float = 0.5

    outlier_sites = OutlierSites(inf_norm=OUTLIERS, kurtosis=OUTLIERS)

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Without a head the last LayerNorm's output is what is asked for."""
        return (*PRE_LN, Fold("final_layer_norm", ("head",))) if self.num_classes else PRE_LN

    @property
    def weight_names(self) -> tuple[WeightNames, ...]:  # type: ignore[override]
        """The names of transformers and of timm."""
        return vit_names(alone=not self.num_classes)

    def __post_init__(self):
        """Raises UserError for sizes that do not fit together."""
        super().__post_init__()
        check_choice("model.pooling", self.pooling, POOLINGS)
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                "model.patch_size must divide model.image_size, found "
                f"{self.patch_size} and {self.image_size}."
            )
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) != self.channels:
                raise UserError(
                    f"model.{name} must have one value for each of the {self.channels} channels, "
                    f"found {getattr(self, name)}."
                )
        if min(self.pixel_std) <= 0:
            raise UserError(f"model.pixel_std must be positive, found {self.pixel_std}.")
        for name in ("label_smoothing", "mix_probability", "cutmix_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"model.{name} must be in [0, 1], found {getattr(self, name)}.")
        for name in ("mixup_alpha", "cutmix_alpha", "num_registers", "num_classes"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} must not be negative, found {getattr(self, name)}.")

    @property
    def kernel_init(self):
        """N(0, initializer_range), truncated at -2 and 2 as by timm, for matrices and tables."""
        bound = 2.0 / self.initializer_range
        return nn.initializers.truncated_normal(self.initializer_range, lower=-bound, upper=bound)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: class token, registers, patches."""
        return 1 + self.num_registers + self.num_patches

    def length(self, data: Mapping[str, Any]) -> int:
        """The same for every image."""
        del data
        return self.num_tokens

    def embedding_products(self, tokens: int) -> int:
        """Of the patches."""
        del tokens
        return self.num_patches * self.patch_size**2 * self.channels * self.hidden_size

    def head_products(self, tokens: int) -> int:
        """Of the class token alone."""
        del tokens
        return self.hidden_size * self.num_classes


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
        batch = (x.shape[0],)
        cls = self._table("cls_token", 1)
        x = jnp.concatenate([jnp.broadcast_to(cls, batch + cls.shape), x], axis=1)
        x = x + beside(self._table("position_table", 1 + c.num_patches), x)
        if c.num_registers:
            # Behind the class token and without a position, as in DINOv2.
            registers = self._table("register_tokens", c.num_registers)
            registers = jnp.broadcast_to(registers, batch + registers.shape)
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        x = Site(c.quant, name="sum")(x)
        return Dropout(c.hidden_dropout, deterministic=not train)(x)

    def _table(self, name: str, rows: int) -> jax.Array:
        c = self.config
        site = WeightSite(c.quant, parameter=name, channel_axis=0, name=f"{name}_weight")
        table = quantized_param(self, site, c.kernel_init, (rows, c.hidden_size), (None, "embed"))
        return values(table).astype(c.dtype)


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
        x_BxD = x_BxTxD[:, 0] if self.config.head_quant is not None else values(x_BxTxD)[:, 0]
        return values(self.head(x_BxD)).astype(jnp.float32)

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
