"""The FLOP formulas, against XLA's own count and against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest

from quantizable_flax.config import default_config
from quantizable_flax.models.build import build_model
from quantizable_flax.models.flops import example_flops, step_flops
from quantizable_flax.runtime.chips import CHIPS, chip_of

BATCH, TOKENS, WIDTH, LAYERS = 2, 64, 512, 2
# XLA also counts elementwise work, which falls as 1 / width: the erf of GELU is most of it, and
# whether another logit is as large as the label's takes a pass over the logits (BERT: 3.0 %).
ELEMENTWISE = 1.032


def config_of(family: str, **changes):
    config = default_config(family)
    model = {
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": 8,
        "intermediate_size": 4 * WIDTH,
    }
    if family == "vit":
        model |= {"image_size": 64, "patch_size": 8, "num_classes": 10}
    else:
        model |= {"vocab_size": 1000, "max_position_embeddings": TOKENS}
        config.data.seq_len = TOKENS
    for key, value in (model | changes).items():
        (config.model.attention if key.startswith("gate") else config.model)[key] = value
    return config


def xla_forward(config, *, compiled: bool = True) -> float:
    """FLOPs of one example in a forward pass, as XLA's cost analysis counts them."""
    model = build_model(config)
    if config.model.name == "vit":
        inputs = {"images": jnp.zeros((BATCH, 64, 64, 3), jnp.uint8)}
        labels = jnp.zeros((BATCH,), jnp.int32)
    else:
        labels = jnp.zeros((BATCH, TOKENS), jnp.int32)
        inputs = {"input_ids": labels}
    batch = inputs | {"labels": labels}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method="loss"))
    forward = jax.jit(lambda v, b: model.apply(v, b, method="loss")).lower(variables, batch)
    return (forward.compile() if compiled else forward).cost_analysis()["flops"] / BATCH


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {}),
        ("bert", {"max_predictions": 16}),
        ("opt", {}),
        ("opt", {"embed_size": 128}),
        ("bert", {"num_registers": 4}),
        ("opt", {"num_registers": 4, "embed_size": 128}),
        ("vit", {}),
        ("vit", {"num_registers": 4}),
    ],
)
def test_forward_is_what_xla_counts(family, changes):
    config = config_of(family, **changes)
    flops = example_flops(config)
    # The compiled program has the whole square of scores and masks half of it.
    masked = flops.parts["attention"] if family == "opt" else 0.0
    counted = xla_forward(config)
    assert 1.0 < counted / (flops.forward + masked) < ELEMENTWISE


@pytest.mark.parametrize(
    ("gate", "hidden"),
    [
        *(("linear", 4), ("mlp", 64), ("all_heads_linear", 4), ("unconditional", 4)),
        *(("value", 4), ("elementwise", 4)),
    ],
)
def test_gates_add_what_xla_counts(gate, hidden):
    gated = config_of("bert", gate=gate, gate_hidden=hidden)
    # Before compilation, which fuses small products with what comes before and computes it twice.
    added = xla_forward(gated, compiled=False) - xla_forward(config_of("bert"), compiled=False)
    # The gate's product with the context is elementwise.
    products = added - LAYERS * TOKENS * WIDTH
    formula = example_flops(gated).parts.get("gate", 0.0)
    # Sigmoids, biases and the ReLU: at most some 8 operations for each output or hidden unit.
    by_head = {"mlp": hidden + 1, "elementwise": WIDTH // 8}.get(gate, 1)
    units = LAYERS * TOKENS * 8 * by_head
    assert formula <= products <= formula + 8 * units


def test_bert_base_by_hand():
    config = default_config("bert")
    config.train.batch_size = 256
    flops = example_flops(config)
    assert flops.parts == {
        "projections": 12 * 8 * 128 * 768**2,  # 7.25e9
        "attention": 12 * 4 * 128**2 * 768,  # 0.60e9
        "ffn": 12 * 4 * 128 * 768 * 3072,  # 14.5e9
        "head": 2 * 128 * (768**2 + 768 * 30522),  # 6.15e9
    }
    assert flops.forward == 28_499_116_032
    assert flops.train == 3 * flops.forward
    assert flops.train_per_token == flops.train / 128
    assert step_flops(config) == 256 * flops.train


def test_predictions_beyond_the_sequence_cost_nothing():
    assert example_flops(config_of("bert", max_predictions=10 * TOKENS)) == example_flops(
        config_of("bert")
    )


def test_chips_are_found_by_device_kind_and_by_name():
    v5e = chip_of("TPU v5 lite")
    assert v5e is not None
    assert v5e is chip_of("v5e")
    assert chip_of("NVIDIA H200").hbm_bytes > chip_of("NVIDIA H100 80GB HBM3").hbm_bytes
    assert chip_of("NVIDIA H200 MIG 1g.18gb") is None
    assert chip_of("cpu") is None


def test_names_of_chips_are_unique():
    names = [name for chip in CHIPS for name in (chip.name, *chip.device_kinds)]
    assert len(names) == len(set(names))
