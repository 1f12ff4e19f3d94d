"""Generation with a cache against the forward pass without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import QuantSpec, UserError, build_model
from quantizable_flax.models.build import with_quant
from quantizable_flax.models.generation import Sampling, generate
from quantizable_flax.models.opt import positions
from quantizable_flax.ptq.calibrate import calibrate
from tests.small import small_batch, small_config, small_model

PROMPTS = [[2, 17, 40, 8, 91], [2, 5], [2, 60, 33]]
NEW = 8
# Attention and sizes.
MODELS: dict[str, tuple[dict, dict]] = {
    "vanilla": ({}, {}),
    "clipped, gate": ({"softmax": "clipped", "gamma": -0.2, "gate": "linear"}, {}),
    "two layers": ({"gate": "mlp"}, {"num_layers": 2}),
    "methods": (
        {
            **{"softmax": "clipped", "alpha": 0.3, "length_normalised": True, "qk_norm": True},
            **{"gate": "value", "sink": "learned"},
        },
        {"num_registers": 3, "num_layers": 2},
    ),
    "elementwise": ({"gate": "elementwise"}, {"num_registers": 1}),
    "post-LN": ({"gate": "all_heads_linear"}, {"pre_layer_norm": False, "embed_size": 16}),
}


def load(name: str):
    """(module, params) with weights so large that a continuation depends on its prompt."""
    attention, sizes = MODELS[name]
    return small_model("opt", attention, spread=0.5, **sizes)


@pytest.fixture(scope="module")
def vanilla():
    return load("vanilla")


def uncached(model, params, ranges=None) -> list[list[int]]:
    """Greedy continuations by whole forward passes of sequences that begin at position 0."""
    variables = {"params": params, **({"ranges": ranges} if ranges is not None else {})}
    # What stands behind a token cannot change its logits, so one shape serves all lengths.
    forward = jax.jit(model.apply)
    sequences = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        ids = np.zeros((len(sequences), 16), np.int32)
        for row, tokens in zip(ids, sequences, strict=True):
            row[: len(tokens)] = tokens
        logits = np.asarray(forward(variables, ids))
        for row, tokens in zip(logits, sequences, strict=True):
            tokens.append(int(np.argmax(row[len(tokens) - 1])))
    return [tokens[len(prompt) :] for tokens, prompt in zip(sequences, PROMPTS, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_the_uncached_forward_for_ragged_prompts(name):
    model, params = load(name)
    expected = uncached(model, params)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert min(len(set(tokens)) for tokens in expected) > 1
    assert generate(model, params, PROMPTS, max_new_tokens=NEW) == expected


@pytest.mark.parametrize("name", ["two layers", "methods"])
def test_logits_equal_the_uncached_ones(name):
    model, params = load(name)
    ids = small_batch("opt")["input_ids"]
    mask = jnp.ones_like(ids).at[1, :3].set(0)
    expected = jax.jit(model.apply)({"params": params}, ids, mask)
    visible, places = mask.astype(bool), positions(mask)

    @functools.partial(jax.jit, static_argnames="length")
    def extend(cache, start, length):
        chunk = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, axis=1)
        shown = visible & (jnp.arange(12) < start + length)[None]
        return model.apply(
            {"params": params, "cache": cache},
            chunk(ids, slice_size=length),
            chunk(places, slice_size=length),
            shown,
            start,
            first=length > 1,
            method="extend",
            mutable=["cache"],
        )

    cache = model.empty_cache(3, 12)
    # A prompt at once, then token by token.
    for start, length in ((0, 7), *((t, 1) for t in range(7, 12))):
        logits, updated = extend(cache, jnp.int32(start), length)
        cache = updated["cache"]
        # The same sums in another order: measured 6e-6 of logits up to 9.
        np.testing.assert_allclose(logits, expected[:, start + length - 1], atol=5e-5)


def test_arrays_of_ids_are_prompts(vanilla):
    lists = [[2, 17, 40], [2, 5, 60]]
    wanted = generate(*vanilla, lists, max_new_tokens=3)
    rows = [jnp.asarray(row) for row in lists]
    for prompts in (jnp.asarray(lists), np.asarray(lists, np.uint16), rows):
        assert generate(*vanilla, prompts, max_new_tokens=3) == wanted


def test_sampling_is_repeatable_by_seed(vanilla):
    sampling = Sampling(temperature=1e4)  # all but uniform
    options = {"max_new_tokens": NEW, "sampling": sampling}
    first, again, other = (generate(*vanilla, PROMPTS, seed=s, **options) for s in (0, 0, 1))
    assert first == again
    assert first != other
    # Places and rows have draws of their own.
    rows = generate(*vanilla, [PROMPTS[0]] * 3, **options)
    assert len({tuple(row) for row in rows}) == 3
    assert min(len(set(row)) for row in rows) > 4


def test_sampling_from_one_token_is_greedy(vanilla):
    sampling = Sampling(temperature=2.0, top_k=1)
    greedy = generate(*vanilla, PROMPTS, max_new_tokens=NEW)
    assert generate(*vanilla, PROMPTS, max_new_tokens=NEW, sampling=sampling) == greedy


def test_end_token_ends_a_continuation(vanilla):
    whole = generate(*vanilla, PROMPTS, max_new_tokens=NEW)
    end = whole[0][3]
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in whole]
    assert len(cut[0]) <= 3
    assert generate(*vanilla, PROMPTS, max_new_tokens=NEW, eos_id=end) == cut


def test_quantized_generation_equals_the_quantized_forward():
    model, params = load("two layers")
    in_float = uncached(model, params)
    model = with_quant(model, QuantSpec(8, 8, head=True))
    ranges = calibrate(model, params, [small_batch("opt")])
    expected = uncached(model, params, ranges)
    assert generate(model, params, PROMPTS, max_new_tokens=NEW, ranges=ranges) == expected
    assert expected != in_float
    with pytest.raises(UserError, match="no calibrated range"):
        generate(model, params, PROMPTS, max_new_tokens=NEW)


@pytest.mark.parametrize(
    ("prompts", "new", "sentence"),
    [
        ([], 4, "at least one prompt"),
        ([2, 17, 40], 4, "at least one prompt"),  # one prompt, not a sequence of them
        ([[2.0, 17.0]], 4, "integer token ids, found float64"),
        ([[2, 3], []], 4, "at least one token each"),
        ([[2, 96]], 4, r"in 0..95, found 96: the tokenizer"),
        ([[-1]], 4, r"in 0..95, found -1"),
        ([[2]], 0, "max_new_tokens must be at least 1, found 0"),
        ([[2], [2] * 10], 7, "16 positions, found a prompt and max_new_tokens of 17"),
    ],
)
def test_prompts_that_do_not_fit_are_named(vanilla, prompts, new, sentence):
    with pytest.raises(UserError, match=sentence):
        generate(*vanilla, prompts, max_new_tokens=new)


def test_all_positions_can_be_used(vanilla):
    tokens = generate(*vanilla, [[2] * 10], max_new_tokens=6)
    assert len(tokens[0]) == 6


@pytest.mark.parametrize(
    ("family", "attention", "sentence"),
    [
        ("bert", {}, r"causal model \(OPT\), found Bert"),
        ("opt", {"gate": "mlp", "gate_pooling": "all"}, "found gate_pooling=all"),
    ],
)
def test_models_that_cannot_generate_are_named(family, attention, sentence):
    model = build_model(small_config(family, attention))
    with pytest.raises(UserError, match=sentence):
        generate(model, {}, PROMPTS, max_new_tokens=NEW)


def test_missing_cache_is_named(vanilla):
    model, params = vanilla
    ids = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(UserError, match="needs the collection `cache`, found none"):
        model.apply({"params": params}, ids, ids, ids, 0, method="extend", mutable=["cache"])


@pytest.mark.parametrize(("bits", "dtype"), [(16, "float32"), (8, "bfloat16")])
def test_a_cache_holds_codes_that_its_type_tells_apart(bits, dtype):
    model = build_model(small_config("opt", dtype="bfloat16"))
    cache = with_quant(model, QuantSpec(bits, bits)).empty_cache(1, 4)
    assert {str(x.dtype) for x in jax.tree.leaves(cache)} == {dtype}
