"""Float exports in ONNX Runtime: the logits of our models, whatever stands in them."""

import numpy as np
import pytest

from tests.onnx.case import float_batch, make_case, shorter, worst
from tests.ptq.int8_case import batch_of

CLIPPED = {"softmax": "clipped", "gamma": -0.05, "zeta": 1.02}
NCS = {"softmax": "clipped", "alpha": 0.4, "length_normalised": True}
ATTENTION = [
    {},
    {**CLIPPED, "gate": "linear"},
    {"sink": "learned", "gate": "mlp", "gate_finetune": True, "gate_pi_init": 0.4},
    {**CLIPPED, "sink": "zero", "gate": "all_heads_linear"},
    {"gate": "unconditional", "blind_queries": "uniform"},
    {**NCS, "gate": "value", "qk_norm": True},
    {**NCS, "zeta": 1.02, "sink": "learned", "gate": "elementwise", "blind_queries": "uniform"},
]
OTHERS = [
    ("bert", {"gate": "linear", "gate_pooling": "visible"}, {"head": "none"}),
    ("bert", {"gate": "mlp", "gate_pooling": "all"}, {"head": "classifier", "num_classes": 3}),
    ("bert", {"gate": "value", "gate_pooling": "visible"}, {}),
    ("bert", {"gate": "elementwise", "gate_pooling": "visible"}, {"head": "none"}),
    ("bert", {"gate": "linear", "gate_pooling": "visible"}, {"num_registers": 2}),
    ("bert", NCS, {"num_registers": 3, "head": "none"}),
    ("roberta", {}, {"pad_token_id": 1}),
    ("distilbert", {}, {"head": "classifier", "pad_token_id": 0}),
    ("opt", {"sink": "zero"}, {"embed_size": 16}),
    ("opt", CLIPPED, {"pre_layer_norm": False}),
    ("vit", CLIPPED, {"patch_layer_norm": True, "num_registers": 2, "distillation": "head"}),
    ("vit", {"gate": "linear", "gate_pooling": "visible"}, {"distillation": "token"}),
    ("vit", {}, {"num_classes": 0, "channels": 3}),
]


def check(case, batch):
    """One file, two batch sizes and lengths."""
    for given in (batch, shorter(batch)):
        assert worst(case.theirs(given), case.ours(given)) < 1e-5


@pytest.mark.parametrize("attention", ATTENTION, ids=lambda options: "-".join(map(str, options)))
@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_logits_are_ours(family, attention):
    case = make_case(family, attention)
    check(case, float_batch(family, case.model))


@pytest.mark.parametrize(("family", "attention", "model"), OTHERS)
def test_so_are_those_of_every_head_and_form(family, attention, model):
    kind = "bert" if family in ("roberta", "distilbert") else family
    case = make_case(family, attention, small=kind, **model)
    check(case, float_batch(kind, case.model))


def test_a_bare_encoder_has_its_pooler_beside():
    case = make_case("bert", head="pooler")
    batch = batch_of("bert")
    names = [output.name for output in case.session().get_outputs()]
    assert names == ["last_hidden_state", "pooler_output"]
    from tests.onnx.case import feeds

    hidden, pooled = case.session().run(None, feeds("bert", case.model.config, batch))
    ours = case.model.apply(case.variables, case.ours(batch), method="pool")
    assert worst(hidden, case.ours(batch)) < 1e-5
    assert worst(pooled, np.asarray(ours)) < 1e-5


def test_token_types_and_examples_without_a_token():
    case, batch = make_case("bert"), batch_of("bert")
    mask = batch["attention_mask"].at[1].set(0)
    types = (batch["input_ids"] % 2).astype("int32")
    check(case, {**batch, "attention_mask": mask, "token_type_ids": types})
