"""Order, restarts, hosts and padding of batches."""

import hashlib
import json

import numpy as np
import pytest

from quantizable_flax.data.pipeline import eval_batches, train_iterator
from quantizable_flax.data.share import Share
from quantizable_flax.data.task import Task
from quantizable_flax.data.text.blocks import Blocks
from quantizable_flax.data.text.masking import MaskTokens
from quantizable_flax.errors import UserError

from .batches import assert_same, joined, originals, take


@pytest.fixture
def task(text_config, make_text_task):
    return make_text_task(text_config())


@pytest.fixture
def train(task):
    def make(batch_size, seed=0, **hosts):
        return train_iterator(task, batch_size=batch_size, seed=seed, **hosts)

    return make


@pytest.fixture
def evaluate(task):
    def make(batch_size, **options):
        return eval_batches(task, batch_size=batch_size, **options)

    return make


@pytest.fixture(name="tokens_NxT")
def make_tokens(task):
    return np.stack(list(task.source("train")))


@pytest.fixture(name="held_out_NxT")
def make_held_out(task):
    return np.stack(list(task.source("validation")))


def test_batches_are_int32_of_the_asked_shape(train):
    batch = next(train(8))
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "input_ids": ((8, 16), np.int32),
        "labels": ((8, 16), np.int32),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 8, 12])
def test_an_epoch_does_not_depend_on_the_batch_size(train, tokens_NxT, batch_size):
    count = 2 * len(tokens_NxT) // 24 * 24
    expected = joined(take(train(24), count // 24))
    assert_same(joined(take(train(batch_size), count // batch_size)), expected)


@pytest.mark.parametrize("process_count", [2, 3, 6, 24])
def test_hosts_in_order_make_up_the_global_batch(train, process_count):
    hosts = [train(24, share=Share((h,), process_count)) for h in range(process_count)]
    whole = train(24)
    for _ in range(4 if process_count == 24 else 40):
        shares = [next(host) for host in hosts]
        assert len(shares[0]["labels"]) == 24 // process_count
        assert_same(joined(shares), next(whole))
    states = [host.get_state() for host in hosts]
    assert all(state == whole.get_state() for state in states)


def test_every_epoch_has_each_example_once_in_another_order(train, tokens_NxT):
    # One example a batch, so that the epochs can be told apart.
    count = len(tokens_NxT)
    examples = joined(take(train(1), 2 * count))
    rows = [tuple(row) for row in originals(examples)]
    expected = sorted(tuple(row) for row in tokens_NxT.tolist())
    assert sorted(rows[:count]) == sorted(rows[count:]) == expected
    assert rows[:count] != rows[count:]
    assert rows[:count] != [tuple(row) for row in tokens_NxT.tolist()]


def test_masks_differ_between_examples_and_between_epochs(train, tokens_NxT):
    count = len(tokens_NxT)
    examples = joined(take(train(1), 2 * count))
    masks = [
        {row.tobytes(): mask.tobytes() for row, mask in zip(rows, chosen, strict=True)}
        for rows, chosen in zip(
            np.split(originals(examples), 2),
            np.split(examples["labels"] != -100, 2),
            strict=True,
        )
    ]
    # 16 tokens at 15 % leave few patterns, of which the empty one has a share of 0.85**14.
    same = sum(masks[0][row] == masks[1][row] for row in masks[0])
    assert same < 0.2 * len(masks[0])
    assert len(set(masks[0].values())) > 0.3 * count


def test_the_seed_decides(train):
    assert_same(next(train(8, seed=1)), next(train(8, seed=1)))
    assert (next(train(8, seed=1))["labels"] != next(train(8, seed=2))["labels"]).any()


@pytest.mark.parametrize("done", [0, 1, 5, 40])
def test_a_restart_continues_where_the_state_was_taken(train, done):
    iterator = train(12)
    take(iterator, done)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    resumed = train(12)
    next(resumed)
    resumed.set_state(state)
    for left, right in zip(take(resumed, 5), expected, strict=True):
        assert_same(left, right)


def test_a_state_holds_for_another_number_of_hosts(train):
    whole = train(12)
    take(whole, 7)
    hosts = [train(12, share=Share((index,), 3)) for index in range(3)]
    for host in hosts:
        host.set_state(whole.get_state())
    assert_same(joined([next(host) for host in hosts]), next(whole))


@pytest.mark.parametrize("parts", [(0,), (1, 3), (0, 1, 2, 3)])
def test_a_host_may_hold_any_parts_of_a_batch(train, parts):
    whole, host = train(12), train(12, share=Share(parts, 4))
    rows = [row for part in parts for row in range(3 * part, 3 * part + 3)]
    for _ in range(3):
        expected = {name: array[rows] for name, array in next(whole).items()}
        assert_same(next(host), expected)


@pytest.mark.parametrize(("batch_size", "count"), [(8, 2), (8, 4), (7, 4), (5, 8)])
def test_evaluation_shares_hold_every_example_once(evaluate, held_out_NxT, batch_size, count):
    # Every host has every batch, even where nothing but fillers is left for it in the last one.
    hosts = [list(evaluate(batch_size, share=Share((p,), count))) for p in range(count)]
    whole = list(evaluate(batch_size))
    assert {len(host) for host in hosts} == {len(whole)}
    assert {len(b["example_weight"]) for host in hosts for b in host} == {-(-batch_size // count)}
    for step, expected in enumerate(whole):
        found = joined([host[step] for host in hosts])
        real = found["example_weight"] == 1
        assert real.sum() == expected["example_weight"].sum()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name][real], array[expected["example_weight"] == 1])
        assert np.all(found["labels"][~real] == -100)
    assert sum(b["example_weight"].sum() for b in whole) == len(held_out_NxT)


class Squares(Task):
    """A task of functions, not of Grain's transforms, with augmentation and fillers of its own."""

    unit = "numbers"
    filler = {"y": 7}  # noqa: RUF012
    assets = {}  # noqa: RUF012

    def source(self, split):
        return range(5) if split == "train" else range(100, 103)

    def transform(self, *, train):
        return lambda x: {"x": np.int32(x + 1000 * train), "y": np.full((2,), x * x)}


def test_any_task_will_do():
    (batch,) = eval_batches(Squares(), batch_size=4)
    assert batch["x"].tolist() == [100, 101, 102, 0]
    assert batch["y"].tolist() == [[10000] * 2, [10201] * 2, [10404] * 2, [7, 7]]
    assert batch["example_weight"].tolist() == [1, 1, 1, 0]
    assert next(train_iterator(Squares(), batch_size=5, seed=0))["x"].min() == 1000
    with pytest.raises(UserError, match="batch_size=6 numbers in the train split, found 5"):
        train_iterator(Squares(), batch_size=6, seed=0)
    with pytest.raises(UserError, match="from the 3 numbers of the validation split, found 4"):
        eval_batches(Squares(), batch_size=1, num_batches=4)


class Counted(Task):
    """Blocks of numbers, masked."""

    filler = {"labels": -100}  # noqa: RUF012
    assets = {}  # noqa: RUF012
    vocab_size = 1000
    pad_id, unk_id, cls_id, sep_id, mask_id = special_ids = (0, 1, 2, 3, 4)

    def source(self, split):
        tokens = np.arange(150 * 32) * 7919 % 1000
        return Blocks(tokens.astype(np.uint16).reshape(150, 32))

    def transform(self, *, train):
        return MaskTokens(Counted, mask_rate=0.3, max_predictions=8)


def test_runs_begun_earlier_continue_with_the_same_batches():
    # Digests of what commit fa1ab5a made, an example at a time with Grain's shuffle and random_map.
    task = Counted()
    made = {
        "13e2cdc0efe7740d": take(train_iterator(task, batch_size=20, seed=3), 20),
        "1162d10eb9a40a85": eval_batches(task, batch_size=40),
        "baeb1aeb9fe6a768": eval_batches(task, batch_size=40, seed=9, full=True),
    }
    for expected, batches in made.items():
        digest = hashlib.sha256()
        for batch in batches:
            digest.update(batch["input_ids"].astype("<i4").tobytes())
            digest.update(batch["labels"].astype("<i4").tobytes())
        assert digest.hexdigest()[:16] == expected


def test_a_split_that_cannot_be_shuffled():
    class Endless(Squares):
        def source(self, split):
            return range(2**32)

    with pytest.raises(UserError, match=r"fewer than 2\*\*32 numbers"):
        train_iterator(Endless(), batch_size=1, seed=0)


def test_evaluation_is_in_file_order_and_padded(evaluate, held_out_NxT):
    tokens_NxT = held_out_NxT
    batch_size = next(size for size in (7, 8) if len(tokens_NxT) % size)
    batches = evaluate(batch_size)
    found = list(batches)
    assert len(found) == len(batches) == -(-len(tokens_NxT) // batch_size)
    assert {len(batch[name]) for batch in found for name in batch} == {batch_size}
    examples = joined(found)
    real = examples["example_weight"] == 1
    np.testing.assert_array_equal(originals(examples)[real], tokens_NxT)
    assert real.sum() == len(tokens_NxT)
    assert real[: len(tokens_NxT)].all()
    assert (examples["example_weight"][~real] == 0).all()
    assert (examples["input_ids"][~real] == 0).all()
    assert (examples["labels"][~real] == -100).all()
    assert {name: array.dtype for name, array in examples.items()} == {
        "input_ids": np.int32,
        "labels": np.int32,
        "example_weight": np.float32,
    }


def test_evaluation_is_the_same_again_and_at_any_batch_size(evaluate):
    batches = evaluate(8)
    first = joined(list(batches))
    assert_same(joined(list(batches)), first)
    count = int(first["example_weight"].sum())
    other = joined(list(evaluate(5)))
    for name in first:
        np.testing.assert_array_equal(other[name][:count], first[name][:count])


def test_a_seed_shuffles_examples_with_their_masks(evaluate):
    def rows(**options):
        examples = joined(list(evaluate(4, **options)))
        pairs = np.concatenate([examples["input_ids"], examples["labels"]], axis=1)
        return [tuple(row) for row in pairs[examples["example_weight"] == 1].tolist()]

    assert sorted(rows(seed=1)) == sorted(rows())
    assert rows(seed=1) == rows(seed=1)
    assert rows(seed=1) != rows(seed=2)
    assert rows(seed=1) != rows()
    assert rows(seed=1, num_batches=2) == rows(seed=1)[:8]


def test_one_example_is_enough(text_config, make_text_task, tokens_NxT, held_out_NxT):
    length = (tokens_NxT.size + held_out_NxT.size) // 2
    task = make_text_task(text_config(seq_len=length))
    assert len(task.source("train")) == 1
    iterator = train_iterator(task, batch_size=1, seed=0)
    assert [len(batch["labels"]) for batch in take(iterator, 3)] == [1, 1, 1]


def test_more_than_there_is(train, evaluate, tokens_NxT, held_out_NxT):
    found = f"found {len(tokens_NxT)};"
    with pytest.raises(UserError, match=rf"batch_size=100000 sequences .* {found}"):
        train(100_000)
    with pytest.raises(UserError, match=rf"from the {len(held_out_NxT)} sequences .* found 1000"):
        evaluate(8, num_batches=1000)
    with pytest.raises(UserError, match="found 0"):
        evaluate(8, num_batches=0)


def test_senseless_requests(train, evaluate):
    with pytest.raises(UserError, match="multiple of the 3 parts of a batch, found 8"):
        train(8, share=Share((0,), 3))
    with pytest.raises(UserError, match="at least 1, found 0"):
        train(0)
    with pytest.raises(UserError, match="at least 1, found 0"):
        evaluate(0)
    with pytest.raises(UserError, match="found -1"):
        train(8, seed=-1)
    with pytest.raises(UserError, match="workers of at least 0, found -1"):
        train(8, workers=-1)
    with pytest.raises(UserError, match="workers of at least 0, found -2"):
        evaluate(8, workers=-2)


def test_full_batches_hold_no_filler(evaluate, held_out_NxT):
    count = len(held_out_NxT)
    size = next(size for size in range(7, 20) if count % size)
    whole = list(evaluate(size, full=True))
    assert len(whole) == count // size
    assert all(batch["example_weight"].all() for batch in whole)
    assert len(list(evaluate(size))) == count // size + 1
