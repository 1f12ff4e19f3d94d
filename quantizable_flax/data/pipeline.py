"""Batches of a task for training and evaluation, with Grain as the engine."""

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from quantizable_flax.data.share import WHOLE, Share
from quantizable_flax.data.task import Batch, Example, Source, Task, Transform
from quantizable_flax.data.workers import Prefetched, check_workers
from quantizable_flax.errors import UserError

# Every evaluation masks an example in the same way, whatever the run, the order and the batches.
EVAL_MASK_SEED = 20_230_622
_MAX_EXAMPLES = 2**32  # what Grain's shuffle can number


class _HostStream:
    """The examples of one host in an endless global stream, as a Grain source.

    Of every global batch, it has those in `rows`.
    """

    def __init__(self, stream: grain.MapDataset, batch_size: int, rows: np.ndarray):
        self._stream, self._batch_size, self._rows = stream, batch_size, rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Example:
        step, place = divmod(index, len(self._rows))
        return self._stream[step * self._batch_size + int(self._rows[place])]


class _PaddedStream:
    """The rows of one host in every evaluation batch: (example, whether it is a real one).

    A batch is as long as the parts of a share need it; every host has all batches, so that all
    take the same number of steps.
    """

    def __init__(self, examples: grain.MapDataset, batch_size: int, share: Share):
        self._examples, self._batch_size = examples, batch_size
        self._rows = share.rows(-(-batch_size // share.count) * share.count)

    def __len__(self) -> int:
        return -(-len(self._examples) // self._batch_size) * len(self._rows)

    def __getitem__(self, index: int) -> tuple[Example, bool]:
        step, place = divmod(index, len(self._rows))
        first, row = step * self._batch_size, int(self._rows[place])
        real = row < self._batch_size and first + row < len(self._examples)
        return self._examples[first + row if real else first], real


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
    share: Share = WHOLE,
) -> TrainBatches:
    """Returns endless batches of the train split: dicts of arrays, the rows of `share`.

    Every epoch has each example once, in an order of its own that `seed` decides; batches run
    across the border of two epochs. The parts of all hosts, put together in order, are the
    batch of a single host. With `workers` = 0 a thread of this process makes the batches, else
    so many processes do; the batches are the same. Raises UserError where the split is smaller
    than a batch.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"expected config.seed in [0, 2**32), found {seed}; choose another seed")
    _check_batch_size(batch_size)
    check_workers(workers)
    if batch_size % share.count:
        raise UserError(
            f"expected batch_size to be a multiple of the {share.count} parts of a batch, "
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
    rows = share.rows(batch_size)
    host = grain.MapDataset.source(_HostStream(stream, batch_size, rows))
    batches = host.batch(len(rows), drop_remainder=True, batch_fn=_stack)
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
    share: Share = WHOLE,
) -> EvalBatches:
    """Returns the first `num_batches` batches (all where None) of a split, in a fixed order.

    With a `seed` the order is shuffled by it, for calibration. The random part of the transform
    depends on the example alone. Of each batch a host has the rows of its `share`. The last batch
    is filled up with the task's fillers, and so is every batch that `share` does not divide;
    `example_weight`, float32 [rows], is 1 for real examples and 0 for those. With `full` the last
    one is left out, so that no filler reaches a calibrated range. Raises UserError where the split
    has fewer batches than `num_batches`.
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
    padded = _PaddedStream(examples, batch_size, share)
    stack = functools.partial(_stack_padded, fillers=dict(task.filler))
    rows = len(padded) // wanted
    return EvalBatches(grain.MapDataset.source(padded).batch(rows, batch_fn=stack), workers)


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


def _stack_padded(examples: Sequence[tuple[Example, bool]], fillers: dict[str, int]) -> Batch:
    batch = _stack([example for example, _ in examples])
    real_B = np.array([real for _, real in examples])
    for name, array in batch.items():
        array[~real_B] = fillers.get(name, 0)
    return batch | {"example_weight": real_B.astype(np.float32)}
