"""The configuration of ViT (arXiv 2010.11929) and DeiT (2012.12877)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn

from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.models.features import POOLINGS
from quantizable_flax.models.structure import PRE_LN, Fold, OutlierSites
from quantizable_flax.models.transformer import TransformerConfig
from quantizable_flax.models.vit_names import vit_names
from quantizable_flax.models.weights import WeightNames

DISTILLATION = ("none", "token", "head")
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
      distillation: DeiT's distillation token (arXiv 2012.12877): "none"; "token", which has a
        position; "head", and a head of its own, whose logits and the class token's are averaged.
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
    distillation: str = "none"
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
        if not self.num_classes:
            return PRE_LN
        heads = ("head", "distillation_head") if self.distillation == "head" else ("head",)
        return (*PRE_LN, Fold("final_layer_norm", heads))

    @property
    def weight_names(self) -> tuple[WeightNames, ...]:  # type: ignore[override]
        """The names of transformers and of timm."""
        return vit_names(not self.num_classes, self.distillation)

    def __post_init__(self):
        """Raises UserError for sizes that do not fit together."""
        super().__post_init__()
        check_choice("model.pooling", self.pooling, POOLINGS)
        check_choice("model.distillation", self.distillation, DISTILLATION)
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
        if self.distillation == "head" and not self.num_classes:
            raise UserError(
                "model.distillation=head needs classes, found model.num_classes=0: set it to token."
            )
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
    def num_positions(self) -> int:
        """Tokens that have a position: class token, distillation token, patches."""
        return 1 + (self.distillation != "none") + self.num_patches

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: those with a position, and registers."""
        return self.num_positions + self.num_registers

    def length(self, data: Mapping[str, Any]) -> int:
        """The same for every image."""
        del data
        return self.num_tokens

    def embedding_products(self, tokens: int) -> int:
        """Of the patches."""
        del tokens
        return self.num_patches * self.patch_size**2 * self.channels * self.hidden_size

    def head_products(self, tokens: int) -> int:
        """Of the class token alone, and of the distillation token where that has a head."""
        del tokens
        return (1 + (self.distillation == "head")) * self.hidden_size * self.num_classes
