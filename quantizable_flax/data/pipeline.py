"""Batches for training and evaluation from packed blocks, with Grain as the engine."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import grain
import numpy as np
from ml_collections import ConfigDict

from quantizable_flax.data.masking import IGNORE_LABEL
from quantizable_flax.data.packing import packed_tokens
from quantizable_flax.data.tokenizer import Tokenizer
from quantizable_flax.errors import UserError

Batch = dict[str, np.ndarray]
Transform: TypeAlias = (
    grain.transforms.Map | grain.transforms.RandomMap | Callable[[np.ndarray], Batch]
)

# Every evaluation masks an example in the same way, whatever the run, the order and the batches.
EVAL_MASK_SEED = 20_230_622
# One thread suffices: an example takes some ten microseconds and the blocks lie in memory.
_PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class _HostStream:
    """The examples of one host in an endless global stream, as a Grain source.

    Of every global batch, host h has the examples h*b to (h+1)*b, where b is its share.
    """

    def __init__(self, stream: grain.MapDataset, batch_size: int, first: int, share: int):
        self._stream, self._batch_size = stream, batch_size
        self._first, self._share = first, share

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size * self._share

    def __getitem__(self, index: int) -> Batch:
        step, place = divmod(index, self._share)
        return self._stream[step * self._batch_size + self._first + place]


class EvalBatches:
    """Batches that can be iterated again and again, each time the same; len() counts them."""

    def __init__(self, batches: grain.MapDataset):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches.to_iter_dataset(_PREFETCH))


def train_iterator(
    config: ConfigDict,
    tokenizer: Tokenizer,
    transform: Transform,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Returns endless batches of the train split: dicts of arrays [batch_size // process_count].

    Every epoch has each example once, in an order of its own that config.seed decides; batches
    run across the border of two epochs. The shares of all hosts, put together in order, are the
    batch of a single host. get_state() counts batches: it goes into JSON and holds for any
    number of hosts. Raises UserError where the split is smaller than a batch.
    """
    if not 0 <= config.seed < 2**32:
        raise UserError(
            f"expected config.seed in [0, 2**32), found {config.seed}; choose another seed"
        )
    _check_batch_size(batch_size)
    if batch_size % process_count:
        raise UserError(
            f"expected batch_size to be a multiple of the {process_count} hosts, "
            f"found {batch_size}; change batch_size"
        )
    tokens_NxT = packed_tokens(config.data, tokenizer, "train")
    if batch_size > len(tokens_NxT):
        raise UserError(
            f"expected at least batch_size={batch_size} examples in the train split, found "
            f"{len(tokens_NxT)} of {config.data.seq_len} tokens; add text or lower batch_size"
        )
    shuffled = grain.MapDataset.source(tokens_NxT).seed(int(config.seed)).shuffle()
    stream = _apply(shuffled, transform).repeat()
    share = batch_size // process_count
    host = _HostStream(stream, batch_size, process_index * share, share)
    batches = grain.MapDataset.source(host).batch(share, drop_remainder=True, batch_fn=_stack)
    return iter(batches.to_iter_dataset(_PREFETCH))


def eval_batches(
    config: ConfigDict,
    tokenizer: Tokenizer,
    transform: Transform,
    *,
    split: str = "validation",
    batch_size: int,
    num_batches: int | None = None,
    seed: int | None = None,
    full: bool = False,
) -> EvalBatches:
    """Returns the first `num_batches` batches (all where None) of a split, in a fixed order.

    With a `seed` the order is shuffled by it, for calibration. The random part of `transform`
    depends on the example alone. The last batch is filled up with zeros whose labels are
    IGNORE_LABEL; `example_weight`, float32 [batch_size], is 1 for real examples and 0 for those.
    With `full` there is no such batch, so that no filler reaches a calibrated range.
    Raises UserError where the split has fewer batches than `num_batches`.
    """
    _check_batch_size(batch_size)
    tokens_NxT = packed_tokens(config.data, tokenizer, split)
    count = len(tokens_NxT)
    available = count // batch_size if full else -(-count // batch_size)
    wanted = available if num_batches is None else num_batches
    if not 1 <= wanted <= available:
        raise UserError(
            f"expected between 1 and {available} {'full ' if full else ''}batches of {batch_size} "
            f"from the {count} examples of the {split} split, found {wanted}; ask for fewer or "
            "smaller ones or add text"
        )
    examples = _apply(grain.MapDataset.source(tokens_NxT), transform, seed=EVAL_MASK_SEED)
    if seed is not None:
        examples = examples.shuffle(seed=seed % 2**32)
    examples = examples.slice(slice(0, min(count, wanted * batch_size)))
    pad = functools.partial(_stack_and_pad, batch_size=batch_size)
    return EvalBatches(examples.batch(batch_size, batch_fn=pad))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"expected a batch_size of at least 1, found {batch_size}; raise it")


def _apply(
    dataset: grain.MapDataset, transform: Transform, seed: int | None = None
) -> grain.MapDataset:
    """Applies `transform`; Grain seeds a random one by the index of each example."""
    if isinstance(transform, grain.transforms.RandomMap):
        return dataset.random_map(transform, seed=seed)
    return dataset.map(transform)


def _stack(examples: Sequence[Batch]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _stack_and_pad(examples: Sequence[Batch], batch_size: int) -> Batch:
    batch = _stack(examples)
    missing = batch_size - len(examples)
    for name, array in batch.items():
        filler = IGNORE_LABEL if name == "labels" else 0
        widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
        batch[name] = np.pad(array, widths, constant_values=filler)
    weight_B = np.ones(batch_size, dtype=np.float32)
    weight_B[len(examples) :] = 0
    return batch | {"example_weight": weight_B}
