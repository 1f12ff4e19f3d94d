"""What a token may not see moves nothing of it: every gate with every softmax."""

import itertools

import numpy as np
import pytest

from quantizable_flax import GateConfig, UserError, build_model, default_config
from quantizable_flax.checkpoint.resume import check_same
from quantizable_flax.config import from_dict
from quantizable_flax.models.build import with_config
from quantizable_flax.nn.gate import KINDS, POOLINGS
from quantizable_flax.nn.softmax import BLIND_QUERIES
from tests.small import small_batch, small_config, small_model

SOFTMAXES = ({}, {"softmax": "clipped", "gamma": -0.05, "zeta": 1.1})
GATES = (
    {"gate": "none"},
    {"gate": "unconditional", "gate_pooling": "visible"},
    *({"gate": kind, "gate_pooling": per} for kind in KINDS[:-1] for per in POOLINGS),
)
assert KINDS[-1] == "unconditional"
IDS = small_batch("opt")["input_ids"]
LENGTH = IDS.shape[1]


def shows_hidden_tokens(family: str, gate: dict) -> bool:
    """Whether a gate is one that a model of this family refuses, or offers for parity alone."""
    shown = ("visible", "all") if family == "opt" else ("all",)
    return gate["gate"] not in ("none", "unconditional") and gate["gate_pooling"] in shown


def attentions(family: str) -> list:
    """Every attention of a family in which no hidden token may show."""
    found = []
    for gate, softmax in itertools.product(GATES, SOFTMAXES):
        if shows_hidden_tokens(family, gate):
            continue
        for blind in BLIND_QUERIES if gate["gate"] in ("none", "linear") else ("zero",):
            name = "-".join((*gate.values(), softmax.get("softmax", "vanilla"), blind))
            options = {**gate, **softmax, "blind_queries": blind}
            found.append(pytest.param(family, options, id=f"{family}-{name}"))
    return found


def runner(family: str, attention: dict):
    """`(ids, mask) -> logits`, op by op: compiling each of so many models would take minutes."""
    model, params = small_model(family, attention, hidden_size=16, num_heads=2)

    def run(ids, mask=None):
        return np.asarray(model.apply({"params": params}, ids, mask))

    return run


@pytest.mark.parametrize(("family", "attention"), attentions("bert") + attentions("opt"))
def test_padding_moves_no_visible_logit(family, attention):
    run, content = runner(family, attention), IDS[:, :6]
    seen = slice(3, 9) if family == "opt" else slice(0, 6)  # BERT's positions count from the left
    ids = np.repeat([1, 7], len(IDS))[:, None] * np.ones((1, LENGTH), np.int32)
    mask = np.zeros_like(ids)
    ids[:, seen], mask[:, seen] = np.tile(content, (2, 1)), 1
    one_filler, other = np.split(run(ids, mask)[:, seen], 2)
    # The weight of both is exactly 0.
    np.testing.assert_array_equal(one_filler, other)
    # The same sums without those zeros, in another order: measured 2e-6 of logits up to 4.
    np.testing.assert_allclose(one_filler, run(content), atol=2e-5)


@pytest.mark.parametrize(("family", "attention"), attentions("opt"))
def test_later_tokens_move_no_earlier_logit(family, attention):
    run, ids = runner(family, attention), np.concatenate([IDS, IDS.at[:, 7:].set(5)])
    for padding in (0, 2):
        mask = np.ones_like(ids)
        mask[:, :padding] = 0
        before, after = np.split(run(ids, mask), 2)
        np.testing.assert_array_equal(before[:, padding:7], after[:, padding:7])
        assert np.abs(before - after)[:, 7:].max() > 0.01


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_published_pooled_gate_shows_what_is_hidden(kind):
    ids, last = np.concatenate([IDS, IDS.at[:, -1].set(5)]), np.arange(LENGTH) == LENGTH - 1
    for family, mask in (("opt", np.ones_like(ids)), ("bert", np.ones_like(ids) - last)):
        run = runner(family, {"gate": kind, "gate_pooling": "all"})
        before, after = np.split(run(ids, mask), 2)
        assert np.abs(before - after)[:, 0].max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_model_refuses_the_pooled_gate(kind):
    attention = {"gate": kind, "gate_pooling": "visible"}
    config = small_config("opt", attention)
    plain = build_model(small_config("opt"))
    if kind == "unconditional":  # one number for each head, whatever the tokens
        build_model(config)
        return
    with pytest.raises(
        UserError, match=r"=visible, .*choose gate_pooling=none, or gate_pooling=all"
    ):
        build_model(config)
    with pytest.raises(UserError, match="a causal model cannot have"):
        with_config(plain, gate=GateConfig(kind, "visible"))
    for family in ("bert", "vit"):
        build_model(small_config(family, attention))
    build_model(small_config("opt", {**attention, "gate_pooling": "all"}))


def stored(family: str, gate: str, *, old: bool) -> dict:
    config = default_config(family)
    config.model.attention.gate = gate
    values = config.to_dict()
    attention = values["model"]["attention"]
    del attention["gate_pooling"]
    attention["gate_per"] = "head"
    if old:
        del attention["blind_queries"]
    return values


def test_an_older_run_with_the_pooled_gate_loads_under_its_present_name(tmp_path):
    def loaded(*arguments, **options) -> str:
        return from_dict(stored(*arguments, **options)).model.attention.gate_pooling

    assert loaded("opt", "linear", old=True) == "all"
    assert loaded("opt", "unconditional", old=True) == "visible"
    assert loaded("bert", "linear", old=True) == "visible"
    assert loaded("opt", "linear", old=False) == "visible"  # which the model refuses

    asked = from_dict(stored("opt", "linear", old=True)).to_dict()
    check_same(stored("opt", "linear", old=True), asked, tmp_path)  # goes on
    asked["model"]["attention"]["gate_pooling"] = "none"
    with pytest.raises(UserError, match='gate_pooling="all", not "none"'):
        check_same(stored("opt", "linear", old=True), asked, tmp_path)


def test_blind_queries_are_fixed_for_a_run(tmp_path):
    asked = default_config("opt").to_dict()
    saved = stored("opt", "none", old=True)
    saved["model"]["attention"]["gate_per"] = "token"
    check_same(saved, asked, tmp_path)
    asked["model"]["attention"]["blind_queries"] = "uniform"
    with pytest.raises(UserError, match='blind_queries="zero", not "uniform"'):
        check_same(saved, asked, tmp_path)
