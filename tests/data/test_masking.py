"""The statistics of masking, within tolerances that a right implementation misses by bad luck
less than once in a million: five standard deviations of a binomial share."""

import math
import pickle

import numpy as np
import pytest

from quantizable_flax.data.draws import Randomness
from quantizable_flax.data.text.masking import MaskTokens
from quantizable_flax.errors import UserError

COUNT = 400_000


class Ids:
    vocab_size = 1000
    pad_id, unk_id, cls_id, sep_id, mask_id = special_ids = (0, 1, 2, 3, 4)


def rng(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def close(found, share, count):
    return abs(found - share) < 5 * math.sqrt(share * (1 - share) / count)


def masked(tokens_T, rate=0.15, seed=0):
    batch = MaskTokens(Ids, rate).batch(tokens_T[None], Randomness(seed).of([0]))
    return batch["input_ids"][0], batch["labels"][0]


def reference(tokens_T, vocab_size, rate, max_predictions, generator):
    """The masking of one block, draw by draw from NumPy's own distributions."""
    draw_T = generator.random(len(tokens_T))
    selected_T = (draw_T < rate) & (tokens_T > 4)
    if max_predictions and selected_T.sum() > max_predictions:
        selected_T &= draw_T <= np.sort(draw_T[selected_T])[max_predictions - 1]
    fate_T = generator.random(len(tokens_T))
    random_T = generator.integers(vocab_size, size=len(tokens_T), dtype=np.int32)
    replaced_T = np.where(fate_T < 0.8, Ids.mask_id, np.where(fate_T < 0.9, random_T, tokens_T))
    labels_T = np.where(selected_T, tokens_T, -100)
    return np.where(selected_T, replaced_T, tokens_T), labels_T


# Of three million tokens, one draw in 1,100 is taken again, so that every tenth block has one.
@pytest.mark.parametrize("vocab_size", [7, 1000, 1024, 3_000_000])
@pytest.mark.parametrize(("rate", "max_predictions"), [(0.15, 0), (0.5, 20), (1.0, 0), (1.0, 1)])
@pytest.mark.parametrize("length", [33, 128])
def test_a_batch_is_masked_as_its_blocks_one_by_one(vocab_size, rate, max_predictions, length):
    class Vocabulary(Ids):
        pass

    Vocabulary.vocab_size = vocab_size
    tokens_BxT = rng(3).integers(0, vocab_size, (40, length)).astype(np.int32)
    numbers_B = np.arange(1000, 1040)
    draws = Randomness(6).of(numbers_B)
    batch = MaskTokens(Vocabulary, rate, max_predictions).batch(tokens_BxT, draws)
    for row, number in enumerate(numbers_B):
        generator = rng(6)
        generator.bit_generator.advance(int(number) << 192)
        expected = reference(tokens_BxT[row], vocab_size, rate, max_predictions, generator)
        np.testing.assert_array_equal(batch["input_ids"][row], expected[0])
        np.testing.assert_array_equal(batch["labels"][row], expected[1])


@pytest.fixture(name="tokens_T", scope="module")
def make_tokens():
    return rng(7).integers(0, Ids.vocab_size, COUNT).astype(np.uint16)


@pytest.mark.parametrize("rate", [0.15, 0.4, 1.0])
def test_selection_rate(tokens_T, rate):
    _, labels_T = masked(tokens_T, rate)
    ordinary_T = tokens_T > 4
    selected = (labels_T != -100)[ordinary_T].mean()
    assert selected == 1 if rate == 1 else close(selected, rate, ordinary_T.sum())


def test_selection_is_independent_between_neighbours(tokens_T):
    selected_T = (masked(tokens_T)[1] != -100)[tokens_T > 4]
    assert close((selected_T[1:] & selected_T[:-1]).mean(), 0.15**2, len(selected_T))


def test_fates_of_selected_tokens(tokens_T):
    input_T, labels_T = masked(tokens_T)
    selected_T = labels_T != -100
    count = selected_T.sum()
    kept = (input_T == tokens_T)[selected_T].mean()
    to_mask = (input_T == Ids.mask_id)[selected_T].mean()
    # A random token is the old one, or [MASK] itself, once in vocab_size.
    assert close(to_mask, 0.8 + 0.1 / Ids.vocab_size, count)
    assert close(kept, 0.1 + 0.1 / Ids.vocab_size, count)


def test_random_tokens_are_uniform_over_the_whole_vocabulary(tokens_T):
    input_T, labels_T = masked(tokens_T, rate=1.0)
    replaced_T = input_T[(labels_T != -100) & (input_T != tokens_T) & (input_T != Ids.mask_id)]
    counts_V = np.bincount(replaced_T, minlength=Ids.vocab_size)
    counts_V = np.delete(counts_V, Ids.mask_id)
    mean = counts_V.mean()
    chi_square = ((counts_V - mean) ** 2 / mean).sum()
    freedom = len(counts_V) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)
    assert counts_V[:4].min() > 0


def test_labels_hold_the_originals_and_the_rest_is_untouched(tokens_T):
    input_T, labels_T = masked(tokens_T)
    selected_T = labels_T != -100
    np.testing.assert_array_equal(labels_T[selected_T], tokens_T[selected_T])
    np.testing.assert_array_equal(input_T[~selected_T], tokens_T[~selected_T])
    assert input_T.dtype == labels_T.dtype == np.int32


@pytest.mark.parametrize("rate", [0.15, 1.0])
def test_special_tokens_are_never_selected(tokens_T, rate):
    input_T, labels_T = masked(tokens_T, rate)
    special_T = tokens_T <= 4
    assert special_T.any()
    assert (labels_T[special_T] == -100).all()
    np.testing.assert_array_equal(input_T[special_T], tokens_T[special_T])


def test_the_generator_decides(tokens_T):
    np.testing.assert_array_equal(masked(tokens_T, seed=1), masked(tokens_T, seed=1))
    assert (masked(tokens_T, seed=1)[1] != masked(tokens_T, seed=2)[1]).any()


def test_the_element_is_not_written_and_the_transform_pickles(tokens_T):
    tokens_T = tokens_T[:100].copy()
    before_T = tokens_T.copy()
    transform = pickle.loads(pickle.dumps(MaskTokens(Ids, 1.0)))
    transform.batch(tokens_T[None], Randomness(0).of([0]))
    np.testing.assert_array_equal(tokens_T, before_T)


@pytest.mark.parametrize("rate", [0, -0.1, 1.5])
def test_senseless_rates(rate):
    with pytest.raises(UserError, match="in \\(0, 1\\]"):
        MaskTokens(Ids, rate)


def test_max_predictions_keeps_a_random_choice_of_the_selected(tokens_T):
    blocks_NxT = tokens_T[:32000].reshape(-1, 32)
    limited, free = (
        MaskTokens(Ids, 0.5, limit).batch(blocks_NxT, Randomness(0).of(range(1000)))["labels"]
        for limit in (6, 0)
    )
    kept_NxT = limited != -100
    # Never more than asked, never one that the rate alone would not have selected.
    np.testing.assert_array_equal(kept_NxT.sum(1), np.minimum(6, (free != -100).sum(1)))
    np.testing.assert_array_equal(limited[kept_NxT], free[kept_NxT])
    # Were it the first six, the mean position would be about 6, not the middle of 32.
    assert abs(np.nonzero(kept_NxT)[1].mean() - 15.5) < 1
