"""How the next token is drawn: greedy, top-k, nucleus, and the distribution itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantizable_flax import UserError
from quantizable_flax.models.generation import Sampling

LOGITS = 2.0 * jax.random.normal(jax.random.key(0), (3, 8))
DRAWS = 4000


def probabilities(temperature: float = 1.0) -> np.ndarray:
    logits = np.asarray(LOGITS, np.float64) / temperature
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def drawn(sampling: Sampling) -> np.ndarray:
    """Share of each token among DRAWS, [rows, vocabulary]."""
    keys = jax.random.split(jax.random.key(1), DRAWS)
    tokens = np.asarray(jax.jit(jax.vmap(lambda key: sampling.draw(LOGITS, key)))(keys))
    return np.stack([(tokens == token).mean(0) for token in range(8)], axis=-1)


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """By the definition: the fewest most likely tokens with at least top_p, renormalised."""
    kept = np.zeros_like(probs)
    for row, p in enumerate(probs):
        total = 0.0
        for token in np.argsort(-p):
            kept[row, token] = p[token]
            total += p[token]
            if total >= top_p:
                break
    return kept / kept.sum(-1, keepdims=True)


def top(probs: np.ndarray, k: int) -> np.ndarray:
    kept = np.where(probs >= np.sort(probs, -1)[:, -k:][:, :1], probs, 0.0)
    return kept / kept.sum(-1, keepdims=True)


DISTRIBUTIONS = {
    "plain": (Sampling(temperature=1.0), probabilities()),
    "cool": (Sampling(temperature=0.5), probabilities(0.5)),
    "hot": (Sampling(temperature=2.0), probabilities(2.0)),
    "top-k": (Sampling(temperature=1.0, top_k=3), top(probabilities(), 3)),
    "top-k of more than all": (Sampling(temperature=1.0, top_k=50), probabilities()),
    "nucleus": (Sampling(temperature=1.0, top_p=0.9), nucleus(probabilities(), 0.9)),
    # Nucleus of the tempered distribution, of the k that top_k has kept.
    "hot nucleus": (Sampling(temperature=2.0, top_p=0.5), nucleus(probabilities(2.0), 0.5)),
    "nucleus of top-k": (Sampling(1.0, top_k=3, top_p=0.8), nucleus(top(probabilities(), 3), 0.8)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_are_drawn_by_their_probability(name):
    sampling, expected = DISTRIBUTIONS[name]
    found = drawn(sampling)
    assert np.all(found[expected == 0.0] == 0.0)
    # Five standard errors of a share.
    assert np.all(np.abs(found - expected) <= 5.0 * np.sqrt(expected * (1 - expected) / DRAWS))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=3.0, top_k=1), Sampling(temperature=3.0, top_p=1e-6)],
    ids=str,
)
def test_one_token_left_is_the_most_likely(sampling):
    found = drawn(sampling)
    np.testing.assert_array_equal(found.argmax(-1), LOGITS.argmax(-1))
    assert np.all(found.max(-1) == 1.0)


def test_greedy_takes_the_first_of_equals():
    assert Sampling().draw(jnp.zeros((2, 4)), jax.random.key(0)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must not be negative, found -1.0"),
        ({"temperature": float("nan")}, "temperature must not be negative, found nan"),
        ({"top_k": -1}, "top_k must not be negative, found -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], found 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], found 1.5"),
    ],
)
def test_wrong_options_are_named(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Sampling(**options)
