"""Batches of a task for training and evaluation, with Grain as the engine."""

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from quantizable_flax.data.task import Batch, Example, Source, Task, Transform
from quantizable_flax.data.workers import Prefetched, check_workers
from quantizable_flax.errors import UserError

# Every evaluation masks an example in the same way, whatever the run, the order and the batches.
EVAL_MASK_SEED = 20_230_622
_MAX_EXAMPLES = 2**32  # what Grain's shuffle can number


class _HostStream:
    """The examples of one host in an endless global stream, as a Grain source.

    Of every global batch, host h has the examples h*b to (h+1)*b, where b is its share.
    """

    def __init__(self, stream: grain.MapDataset, batch_size: int, first: int, share: int):
        self._stream, self._batch_size = stream, batch_size
        self._first, self._share = first, share

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size * self._share

    def __getitem__(self, index: int) -> Example:
        step, place = divmod(index, self._share)
        return self._stream[step * self._batch_size + self._first + place]


class TrainBatches(Iterator[Batch]):
    """Endless batches whose position is the number of batches taken.

    The state goes into JSON and holds for any number of hosts, threads and worker processes.
    """

    def __init__(self, batches: grain.MapDataset, workers: int, examples: int):
        self._batches, self._workers, self._examples = batches, workers, examples
        self._next_index = 0
        self._running: Prefetched | None = None

    def __next__(self) -> Batch:
        if self._running is None:
            rest = self._batches.slice(slice(self._next_index, None))
            self._running = Prefetched(rest, self._workers)
        batch = next(self._running)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns {"next_index": batches taken so far, "examples": of an epoch}."""
        return {"next_index": self._next_index, "examples": self._examples}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to the batch that followed when `state` was taken.

        Raises UserError where the split has grown or shrunk since: the order would be another.
        """
        examples = state.get("examples", self._examples)
        if examples != self._examples:
            raise UserError(
                f"expected the {examples} training examples that the run began with, found "
                f"{self._examples}; bring the same data back or start in a new workdir"
            )
        self.close()
        self._next_index = int(state["next_index"])

    def close(self) -> None:
        """Ends threads and worker processes; the next batch starts them again."""
        running, self._running = self._running, None
        if running is not None:
            running.close()


class EvalBatches:
    """Batches that can be iterated again and again, each time the same; len() counts them."""

    def __init__(self, batches: grain.MapDataset, workers: int = 0):
        self._batches, self._workers = batches, workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        workers = min(self._workers, len(self))
        with contextlib.closing(Prefetched(self._batches, workers)) as running:
            yield from running


def train_iterator(
    task: Task,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Returns endless batches of the train split: dicts of arrays [batch_size // process_count].

    Every epoch has each example once, in an order of its own that `seed` decides; batches run
    across the border of two epochs. The shares of all hosts, put together in order, are the
    batch of a single host. With `workers` = 0 a thread of this process makes the batches, else
    so many processes do; the batches are the same. Raises UserError where the split is smaller
    than a batch.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"expected config.seed in [0, 2**32), found {seed}; choose another seed")
    _check_batch_size(batch_size)
    check_workers(workers)
    if batch_size % process_count:
        raise UserError(
            f"expected batch_size to be a multiple of the {process_count} hosts, "
            f"found {batch_size}; change batch_size"
        )
    source = _source(task, "train")
    if batch_size > len(source):
        raise UserError(
            f"expected at least batch_size={batch_size} {task.unit} in the train split, found "
            f"{len(source)}; add data or lower batch_size"
        )
    shuffled = grain.MapDataset.source(source).seed(int(seed)).shuffle()
    stream = _apply(shuffled, task.transform(train=True)).repeat()
    share = batch_size // process_count
    host = _HostStream(stream, batch_size, process_index * share, share)
    batches = grain.MapDataset.source(host).batch(share, drop_remainder=True, batch_fn=_stack)
    return TrainBatches(batches, workers, len(source))


def eval_batches(
    task: Task,
    *,
    split: str = "validation",
    batch_size: int,
    num_batches: int | None = None,
    seed: int | None = None,
    full: bool = False,
    workers: int = 0,
) -> EvalBatches:
    """Returns the first `num_batches` batches (all where None) of a split, in a fixed order.

    With a `seed` the order is shuffled by it, for calibration. The random part of the transform
    depends on the example alone. The last batch is filled up with the task's fillers;
    `example_weight`, float32 [batch_size], is 1 for real examples and 0 for those. With `full`
    there is no such batch, so that no filler reaches a calibrated range. Raises UserError where
    the split has fewer batches than `num_batches`.
    """
    _check_batch_size(batch_size)
    check_workers(workers)
    source = _source(task, split)
    count = len(source)
    available = count // batch_size if full else -(-count // batch_size)
    wanted = available if num_batches is None else num_batches
    if not 1 <= wanted <= available:
        raise UserError(
            f"expected between 1 and {available} {'full ' if full else ''}batches of {batch_size} "
            f"from the {count} {task.unit} of the {split} split, found {wanted}; ask for fewer or "
            "smaller ones or add data"
        )
    transform = task.transform(train=False)
    examples = _apply(grain.MapDataset.source(source), transform, seed=EVAL_MASK_SEED)
    if seed is not None:
        examples = examples.shuffle(seed=seed % 2**32)
    examples = examples.slice(slice(0, min(count, wanted * batch_size)))
    pad = functools.partial(_stack_and_pad, batch_size=batch_size, fillers=dict(task.filler))
    return EvalBatches(examples.batch(batch_size, batch_fn=pad), workers)


def _source(task: Task, split: str) -> Source:
    source = task.source(split)
    if len(source) >= _MAX_EXAMPLES:
        raise UserError(
            f"expected fewer than 2**32 {task.unit} in the {split} split, found {len(source)}; "
            "take longer sequences or less data"
        )
    return source


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


def _stack(examples: Sequence[Example]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _stack_and_pad(examples: Sequence[Example], batch_size: int, fillers: dict[str, int]) -> Batch:
    batch = _stack(examples)
    missing = batch_size - len(examples)
    for name, array in batch.items():
        widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
        batch[name] = np.pad(array, widths, constant_values=fillers.get(name, 0))
    weight_B = np.ones(batch_size, dtype=np.float32)
    weight_B[len(examples) :] = 0
    return batch | {"example_weight": weight_B}
