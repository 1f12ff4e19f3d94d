"""What is collected of a model is what the definitions give, computed by numpy from its sites."""

import collections
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax.report.collect import collect
from quantizable_flax.report.inputs import Inputs, make_inputs, thumbnail
from quantizable_flax.report.measured import Anatomy
from quantizable_flax.report.values import describe, grid_over
from tests.report.case import (
    DIMENSION,
    PLACE,
    SITE,
    TOKEN,
    LettersTask,
    captured,
    inputs_of,
    planted,
)


class Look(NamedTuple):
    family: str
    model: object
    params: dict
    inputs: Inputs
    anatomy: Anatomy
    sites: dict[str, np.ndarray]


@pytest.fixture(
    scope="module",
    params=[
        ("bert", 2),
        ("opt", 0),
        ("vit", 0),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (("bert", 0), ("opt", 2))),
    ],
    ids=str,
)
def look(request) -> Look:
    family, registers = request.param
    model, params = planted(family, num_registers=registers)
    inputs = inputs_of(family, model)
    sites = captured(model, params, inputs)
    return Look(family, model, params, inputs, collect(model, params, inputs), sites)


def test_every_site_has_its_figures(look):
    assert set(look.anatomy.sites) == set(look.sites)
    for site, x in look.sites.items():
        rows = x.reshape(len(x), -1)
        centred = rows - rows.mean(axis=1, keepdims=True)
        fourth, variance = (centred**4).mean(axis=1), rows.var(axis=1, ddof=1)
        found = look.anatomy.sites[site]
        assert found.inf_norm == pytest.approx(np.abs(rows).max(axis=1).mean(), rel=1e-5), site
        kurtosis = (fourth / (variance**2 + 1e-6)).mean()
        assert found.kurtosis == pytest.approx(kurtosis, rel=1e-3), site


def test_sites_are_in_the_order_of_the_forward_pass(look):
    layer = [site for site in look.anatomy.sites if site.startswith("layer_0/")]
    order = ["attention/query/output", "attention/probs", "attention_residual", "ffn_in/output"]
    places = [layer.index(f"layer_0/{name}") for name in [*order, "ffn_residual"]]
    assert places == sorted(places)


def test_the_planted_outlier_is_found(look):
    values, x = look.anatomy.worst, look.sites[SITE]
    seen = x[look.inputs.visible_BxT]
    assert values.site == SITE
    assert values.dimensions[0] == DIMENSION
    name = "patch 1,1" if look.family == "vit" else f"␣t{TOKEN}⏎"
    names = np.array(look.inputs.tokens_BxT)
    first = values.carriers[0]
    occurrences = int(((names == name) & look.inputs.visible_BxT).sum())
    assert (first.token, first.carrying, first.occurrences) == (name, occurrences, occurrences)
    assert first.largest == pytest.approx(np.abs(x[names == name]).max(), rel=1e-6)
    assert look.anatomy.tokens[int(values.strip_T.argmax())] == name
    if look.family == "vit":
        assert names[0, PLACE] == name
    assert (values.low, values.high) == pytest.approx((seen.min(), seen.max()), rel=1e-6)
    assert values.std == pytest.approx(seen.std(), rel=1e-5)
    assert values.bulk == pytest.approx(tuple(np.percentile(seen, (0.5, 99.5))), rel=1e-5)
    assert values.whole.counts_N.sum() == seen.size
    assert values.whole.edges[[0, -1]] == pytest.approx([seen.min(), seen.max()], rel=1e-6)
    np.testing.assert_allclose(values.largest_D, np.abs(seen).max(axis=0), rtol=1e-5)


def test_outliers_are_counted_by_dimension_and_by_token(look):
    values = look.anatomy.worst
    x, visible = look.sites[SITE], look.inputs.visible_BxT
    mean, std = x[visible].mean(), x[visible].std()
    by_dimension, carrying = np.zeros(x.shape[2], int), collections.Counter()
    for example, place in zip(*np.nonzero(visible), strict=True):
        far = [d for d, v in enumerate(x[example, place]) if abs(v - mean) > 6 * std]
        by_dimension[far] += 1
        carrying[look.inputs.tokens_BxT[example][place]] += bool(far)
    np.testing.assert_array_equal(values.outliers_D, by_dimension)
    assert values.outliers == by_dimension.sum() > 0
    assert {c.token: c.carrying for c in values.carriers} == dict(+carrying)


def heads_of(look):
    """What every head lets through and how many zeros it has, one pair of tokens at a time."""
    probs, flat = (
        look.sites["layer_0/attention/probs"],
        look.sites["layer_0/attention/value/output"],
    )
    batch, heads, length, _ = probs.shape
    values = flat.reshape(batch, length, heads, -1)
    gates = np.ones((batch, length, heads))
    if look.family == "opt":
        gate = look.params["layer_0"]["attention"]["gate"]
        x = look.sites["layer_0/attention_layer_norm/output"].reshape(values.shape)
        logits = np.einsum("bthk,hk->bth", x, np.asarray(gate["kernel"])) + np.asarray(gate["bias"])
        gates = 1.0 / (1.0 + np.exp(-logits))
    visible = look.inputs.visible_BxT
    passes, zeros = np.zeros(heads), np.zeros(heads)
    for head in range(heads):
        norms = np.sqrt((values[:, :, head] ** 2).sum(axis=-1))
        mean, through, pairs, none = norms[visible].mean(), [], 0, 0
        for b, t in zip(*np.nonzero(visible), strict=True):
            through.append(gates[b, t, head] * (probs[b, head, t] @ norms[b]) / mean)
            last = t + 1 if look.family == "opt" else length
            keys = [s for s in range(last) if visible[b, s]]
            pairs += len(keys)
            none += sum(probs[b, head, t, s] == 0.0 for s in keys)
        passes[head], zeros[head] = np.mean(through), none / pairs
    return passes, zeros, gates


def test_heads(look):
    heads, example = look.anatomy.heads, look.anatomy.worst.example
    passes, zeros, gates = heads_of(look)
    np.testing.assert_allclose(heads.passes_LxH[0], passes, rtol=1e-4)
    np.testing.assert_allclose(heads.zeros_LxH[0], zeros, atol=1e-6)
    assert (zeros.max() > 0.1) == (look.family == "bert")  # clipped; no other reaches 0
    assert [head.head for head in heads.quiet] == list(np.argsort(passes)[:3])
    quiet = heads.quiet[0]
    probs = look.sites["layer_0/attention/probs"][example, quiet.head]
    np.testing.assert_allclose(quiet.probs_TxS, probs, rtol=1e-5, atol=1e-7)
    flat = look.sites["layer_0/attention/value/output"]
    norms = np.linalg.norm(flat.reshape(*flat.shape[:2], 4, -1)[:, :, quiet.head], axis=-1)
    expected = norms[example] / norms[look.inputs.visible_BxT].mean()
    np.testing.assert_allclose(quiet.norms_S, expected, rtol=1e-4)
    np.testing.assert_allclose(quiet.weighted, probs * expected[None], rtol=1e-4, atol=1e-6)
    if look.family == "opt":
        np.testing.assert_allclose(heads.gates_LxHxT[0], gates[example].T, rtol=1e-4)
        np.testing.assert_allclose(heads.gate_means_LxH[0], gates.mean(axis=(0, 1)), rtol=1e-4)
    else:
        assert heads.gates_LxHxT is None


def test_a_picture_comes_with_its_patches(look):
    picture = look.anatomy.picture
    if look.family != "vit":
        assert picture is None
        return
    images = look.inputs.batch["images"]
    np.testing.assert_array_equal(picture.pixels_HxWx3, images[look.anatomy.worst.example])
    assert (picture.grid, picture.skipped) == ((4, 4), 1)
    assert look.anatomy.tokens[:2] == ["[class]", "patch 0,0"]


def test_examples_that_only_fill_a_batch_are_left_out():
    ids = np.array([[4, 5], [6, 3], [0, 0]])
    batch = {"input_ids": ids, "example_weight": np.array([1.0, 1.0, 0.0], np.float32)}
    inputs = make_inputs(None, LettersTask(), batch, 100)
    assert inputs.tokens_BxT == [["␣t4⏎", "␣t5⏎"], ["␣t6⏎", "#3"]]
    assert inputs.visible_BxT.all()
    assert list(inputs.batch) == ["input_ids"]
    assert len(make_inputs(None, LettersTask(), batch, 3).tokens_BxT) == 1
    assert thumbnail(np.zeros((200, 100, 1), np.uint8)).shape == (67, 34, 3)


@pytest.mark.parametrize(
    ("symmetric", "high", "expected"),
    [
        (False, 244.0, (-11.0, 244.0, 1.0, 256, 5)),
        (False, 1264.0, (-10.0, 1265.0, 5.0, 256, 1)),
        (True, 254.0, (-256.0, 254.0, 2.0, 256, 3)),
    ],
)
def test_the_bulk_gets_the_levels_between_its_ends(symmetric, high, expected):
    # 1000 values from -2.5 to 2.5, whose 0.5 and 99.5 percentiles are -2.475 and 2.475.
    x = np.linspace(-2.5, 2.5, 1001)[None, :, None]
    values = describe("here", x, np.ones((1, 1001), bool), [["a"] * 1001])
    assert values.bulk == pytest.approx((-2.475, 2.475))
    grid = grid_over(values, "w8a8", -11.0, high, 8, symmetric=symmetric)
    assert (grid.low, grid.high, grid.step, grid.levels, grid.bulk_levels) == expected


def test_values_without_any_outlier():
    x = np.ones((2, 3, 4))
    values = describe("here", x, np.ones((2, 3), bool), [["a"] * 3] * 2)
    assert (values.outliers, values.carriers, values.std) == (0, [], 0.0)
    assert values.whole.counts_N.sum() == 24


def test_a_gate_on_each_element_is_told_by_its_mean():
    """Element 0 of each head is open, all others are shut."""
    model, params = planted("bert", {"gate": "elementwise"})
    gate = params["layer_0"]["attention"]["gate"]
    width = gate["bias"].shape[1]
    gate["kernel"] = jnp.zeros_like(gate["kernel"])
    gate["bias"] = jnp.full_like(gate["bias"], -20.0).at[:, 0].set(20.0)
    heads = collect(model, params, inputs_of("bert", model)).heads
    np.testing.assert_allclose(heads.gate_means_LxH, 1.0 / width, rtol=1e-5)


def test_a_site_before_registers_has_the_tokens_of_the_text():
    model, params = planted("bert", num_registers=2)
    words, places = (params["embeddings"][name] for name in ("word", "position"))
    words["embedding"] = words["embedding"].at[TOKEN, DIMENSION].set(1e6)
    places["embedding"] = places["embedding"].at[jnp.array([4, 7]), DIMENSION].set(-5e5)
    anatomy = collect(model, params, inputs_of("bert", model))
    assert anatomy.worst.site == "embeddings/word_type_sum"
    strip_T = anatomy.worst.strip_T
    assert len(strip_T) == len(anatomy.tokens) - 2
    assert anatomy.tokens[2:][int(strip_T.argmax())] == f"␣t{TOKEN}⏎"
