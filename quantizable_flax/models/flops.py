"""Model FLOPs by formula: what a step has to compute, however it is computed.

Utilisation of model FLOPs (MFU) is defined by PaLM (arXiv 2204.02311, appendix B): the matrix
products of a forward and a backward pass over the peak of the hardware, without what
rematerialisation computes twice. With T tokens, width D, heads of width K = D / H, FFN width F and
L layers, 2 FLOPs for a multiply-add, the forward pass of one example takes

    projections  L * 2 T * 4 D^2            query, key, value, output
    attention    L * 2 * 2 T^2 D            scores and context; half of it where attention is causal
    ffn          L * 2 T * 2 D F
    gate         L * 2 T * g                g of `_gate_products`
    embedding    2 N P D (ViT: N patches of P values), 2 T E D (OPT with words of width E != D)
    head         2 M (D^2 + D V)            BERT: M = max_predictions, or T where that is 0
                 2 T (D E + E V)            OPT, D E only where E != D
                 2 D classes                ViT, the class token alone

and the backward pass twice that (a gradient of the weights and one of the input). Lookups and
elementwise work (softmax, LayerNorm, activations, dropout, the optimizer) are not counted.
"""

import dataclasses

from ml_collections import ConfigDict

from quantizable_flax.models.build import build_model
from quantizable_flax.models.transformer import TransformerConfig
from quantizable_flax.nn.gate import GateConfig

FORWARD_AND_BACKWARD = 3  # a backward pass is two products for each one forward


@dataclasses.dataclass(frozen=True)
class ExampleFlops:
    """FLOPs of one example, a sequence or an image.

    Attributes:
      parts: of the forward pass, by the names of the module docstring; only those that occur.
      tokens: length of the sequence that the layers see.
    """

    parts: dict[str, float]
    tokens: int

    @property
    def forward(self) -> float:
        """Of a forward pass."""
        return sum(self.parts.values())

    @property
    def train(self) -> float:
        """Of a forward and a backward pass."""
        return FORWARD_AND_BACKWARD * self.forward

    @property
    def train_per_token(self) -> float:
        """Of a forward and a backward pass, by token."""
        return self.train / self.tokens


def example_flops(config: ConfigDict) -> ExampleFlops:
    """Returns the FLOPs of one example of `config.data` through `config.model`.

    Raises:
      UserError: as `build_model`.
    """
    model: TransformerConfig = build_model(config).config
    tokens = model.length(config.data)
    width, layers = model.hidden_size, model.num_layers
    visible = 0.5 if model.causal else 1.0  # share of keys that a causal query sees
    parts = {
        "projections": layers * 2.0 * tokens * 4 * width**2,
        "attention": layers * 2.0 * 2 * tokens**2 * width * visible,
        "ffn": layers * 2.0 * tokens * 2 * width * model.intermediate_size,
        "gate": layers * 2.0 * tokens * _gate_products(model.gate, width, model.num_heads),
        "embedding": 2.0 * model.embedding_products(tokens),
        "head": 2.0 * model.head_products(tokens),
    }
    return ExampleFlops({name: value for name, value in parts.items() if value}, tokens)


def step_flops(config: ConfigDict) -> float:
    """Returns the model FLOPs of a training step on all devices together."""
    return config.train.batch_size * example_flops(config).train


def _gate_products(gate: GateConfig | None, width: int, heads: int) -> int:
    """Multiply-adds of a token's gates in one layer."""
    if gate is None or gate.kind == "unconditional":
        return 0
    if gate.kind == "elementwise":
        return width * width
    if gate.kind == "all_heads_linear":
        return width * heads
    if gate.kind in ("linear", "value"):
        return width
    return width * gate.hidden + heads * gate.hidden
