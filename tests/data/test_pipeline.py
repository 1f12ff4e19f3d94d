"""Order, restarts, hosts and padding of batches."""

import ast
import itertools
import json
from pathlib import Path

import grain
import numpy as np
import pytest

from quantizable_flax.data import MaskTokens, eval_batches, packed_tokens, train_iterator
from quantizable_flax.errors import UserError


def take(batches, count):
    return list(itertools.islice(batches, count))


def joined(batches):
    """Returns the examples of all batches as one dict of arrays."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def originals(batch):
    return np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


@pytest.fixture
def train(text_config, tokenizer):
    def make(batch_size, seed=0, **hosts):
        transform = MaskTokens(tokenizer, 0.15)
        return train_iterator(
            text_config(seed), tokenizer, transform, batch_size=batch_size, **hosts
        )

    return make


@pytest.fixture
def evaluate(text_config, tokenizer):
    def make(batch_size, config=None, **options):
        transform = MaskTokens(tokenizer, 0.15)
        config = config or text_config()
        return eval_batches(config, tokenizer, transform, batch_size=batch_size, **options)

    return make


@pytest.fixture(name="tokens_NxT")
def make_tokens(text_config, tokenizer):
    return packed_tokens(text_config().data, tokenizer, "train")


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
    hosts = [train(24, process_index=h, process_count=process_count) for h in range(process_count)]
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
    hosts = [train(12, process_index=index, process_count=3) for index in range(3)]
    for host in hosts:
        host.set_state(whole.get_state())
    assert_same(joined([next(host) for host in hosts]), next(whole))


def test_a_deterministic_transform_works_too(text_config, tokenizer, tokens_NxT):
    class Plain(grain.transforms.Map):
        def map(self, element):
            return {"input_ids": element.astype(np.int32)}

    config = text_config()
    batches = list(eval_batches(config, tokenizer, Plain(), split="train", batch_size=10))
    np.testing.assert_array_equal(joined(batches)["input_ids"][: len(tokens_NxT)], tokens_NxT)
    assert next(train_iterator(config, tokenizer, Plain(), batch_size=2))["input_ids"].any()


def test_evaluation_is_in_file_order_and_padded(evaluate, text_config, tokenizer):
    tokens_NxT = packed_tokens(text_config().data, tokenizer, "validation")
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


def test_evaluation_is_the_same_again_and_at_any_batch_size_and_seed(evaluate, text_config):
    batches = evaluate(8)
    first = joined(list(batches))
    assert_same(joined(list(batches)), first)
    count = int(first["example_weight"].sum())
    other = joined(list(evaluate(5, config=text_config(seed=9))))
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


def test_one_example_is_enough(text_config, tokenizer):
    config = text_config()
    tokens = sum(
        len(ids) + 2
        for ids in tokenizer.encode_batch(Path(config.data.files).read_text().split("\n\n"))
    )
    config = text_config(seq_len=tokens // 2)
    iterator = train_iterator(config, tokenizer, MaskTokens(tokenizer), batch_size=1)
    assert [len(batch["labels"]) for batch in take(iterator, 3)] == [1, 1, 1]


def test_more_than_there_is(train, evaluate, tokens_NxT, text_config, tokenizer):
    with pytest.raises(UserError, match=rf"batch_size=100000 examples .* {len(tokens_NxT)} of 16"):
        train(100_000)
    count = len(packed_tokens(text_config().data, tokenizer, "validation"))
    with pytest.raises(UserError, match=rf"from the {count} examples .* found 1000"):
        evaluate(8, num_batches=1000)
    with pytest.raises(UserError, match="found 0"):
        evaluate(8, num_batches=0)


def test_senseless_requests(train, evaluate):
    with pytest.raises(UserError, match="multiple of the 3 hosts, found 8"):
        train(8, process_count=3)
    with pytest.raises(UserError, match="at least 1, found 0"):
        train(0)
    with pytest.raises(UserError, match="at least 1, found 0"):
        evaluate(0)
    with pytest.raises(UserError, match="found -1"):
        train(8, seed=-1)


def imports():
    """Yields (file name, imported module) for every import statement of the package."""
    package = Path(__file__).parents[2] / "quantizable_flax" / "data"
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path.name, node.module or "."


def test_the_package_itself_imports_no_model_code():
    # Grain brings jax along where it is installed; the package must not ask for it.
    modules = {module for _, module in imports()}
    assert not {m.split(".")[0] for m in modules} & {"jax", "flax", "orbax", "tensorflow"}
    own = {module.split(".")[1] for module in modules if module.startswith("quantizable_flax")}
    assert own <= {"data", "errors"}
    assert {name for name, module in imports() if module == "tokenizers"} == {"tokenizer.py"}


def test_full_batches_hold_no_filler(evaluate, text_config, tokenizer):
    count = len(packed_tokens(text_config().data, tokenizer, "validation"))
    size = next(size for size in range(7, 20) if count % size)
    whole = list(evaluate(size, full=True))
    assert len(whole) == count // size
    assert all(batch["example_weight"].all() for batch in whole)
    assert len(list(evaluate(size))) == count // size + 1
