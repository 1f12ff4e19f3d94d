"""Configuration of OPT (arXiv 2205.01068)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from quantizable_flax.models.opt_names import NAMES
from quantizable_flax.models.registers import check_registers
from quantizable_flax.models.structure import POST_LN, PRE_LN, Fold, OutlierSites
from quantizable_flax.models.transformer import TransformerConfig

OUTLIERS = (
    r"final_layer_norm/output|layer_\d+/"
    r"({output}|ffn_out/output|(attention|ffn)_layer_norm/output|attention/output/output)"
)


@dataclasses.dataclass(frozen=True)
class OptConfig(TransformerConfig):
    """Sizes and switches; the defaults are OPT-125m. Lengths in tokens.

    Attributes:
      vocab_size: rows of the word table, at least the tokenizer's tokens.
      max_position_embeddings: rows of the position table, at least data.seq_len.
      pre_layer_norm: LayerNorm before attention and FFN and at the end; False puts it behind
        each residual sum, as the original OPT-350m does.
      embed_size: width of the word table, None where it is `hidden_size`.
      pad_token_id: its embedding row gets no gradient from the lookup, None for no such row.
      num_registers: learned tokens before the text, without position and label, which all tokens
        see (arXiv 2309.16588).
    """

    data: ClassVar[str] = "causal text"
    weight_names = NAMES
    causal: ClassVar[bool] = True

    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.006
    attention_dropout: float = 0.0
    vocab_size: int = 50272
    max_position_embeddings: int = 2048
    pre_layer_norm: bool = True
    embed_size: int | None = None
    pad_token_id: int | None = None
    num_registers: int = 0

    def __post_init__(self):
        """Raises UserError for a negative number of registers."""
        super().__post_init__()
        check_registers(self.num_registers)

    @property
    def word_size(self) -> int:
        """Width of the word table."""
        return self.embed_size or self.hidden_size

    @property
    def projects(self) -> bool:
        """Whether word embeddings have a width of their own."""
        return self.word_size != self.hidden_size

    @property
    def outlier_sites(self) -> OutlierSites:
        """Final LayerNorm; by layer its output, FFN output, LayerNorms, attention projection."""
        if self.pre_layer_norm:
            sites = OUTLIERS.format(output="ffn_residual")
            # The original flattens tokens before the FFN: its hooks see rows of tokens there.
            return OutlierSites(
                sites, sites, per_token=r"layer_\d+/(ffn_out|ffn_layer_norm)/output"
            )
        # A layer ends in its LayerNorm, and that one sees whole sequences.
        sites = OUTLIERS.format(output="ffn_layer_norm/output")
        return OutlierSites(
            sites,
            sites,
            per_token=r"layer_\d+/ffn_out/output",
            repeated=r"layer_\d+/ffn_layer_norm/output",  # as such, and as the layer's output
        )

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Without projections the head is the word table, which the lookup reads too."""
        if not self.pre_layer_norm:
            return POST_LN
        return (*PRE_LN, Fold("final_layer_norm", ("project_out",))) if self.projects else PRE_LN

    def length(self, data: Mapping[str, Any]) -> int:
        """The tokens of an example, and the registers."""
        return super().length(data) + self.num_registers

    def embedding_products(self, tokens: int) -> int:
        """The projection of the words."""
        tokens -= self.num_registers
        return tokens * self.word_size * self.hidden_size if self.projects else 0

    def head_products(self, tokens: int) -> int:
        """The projection back, and the word table."""
        tokens -= self.num_registers
        projection = self.hidden_size * self.word_size if self.projects else 0
        return tokens * (projection + self.word_size * self.vocab_size)
