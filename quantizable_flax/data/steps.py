"""The batches of a split by their steps, as Grain sources."""

import abc
import sys

import numpy as np

from quantizable_flax.data.examples import Examples
from quantizable_flax.data.share import Share
from quantizable_flax.data.shuffle import Shuffle
from quantizable_flax.data.task import Batch, Source, Task

# Every evaluation masks an example in the same way, whatever the run, the order and the batches.
EVAL_MASK_SEED = 20_230_622


class BatchesByStep(abc.ABC):
    """Random access to the rows that one host has of every batch."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns how many batches there are."""

    @abc.abstractmethod
    def _batch(self, step: int, rows_B: np.ndarray) -> Batch:
        """Returns some rows of a batch."""

    def __getitem__(self, step: int) -> Batch:
        return self._batch(step, self._rows)

    def nbytes(self) -> int:
        """Returns the size of a batch, of which it makes one row."""
        row = self._batch(0, self._rows[:1])
        return len(self._rows) * sum(array.nbytes for array in row.values())


class TrainingSteps(BatchesByStep):
    """Batches of an endless stream of epochs.

    Example p of the stream is the raw one at place p // repeats of the shuffled epochs, with the
    draws of p: neither depends on batches, hosts or processes.
    """

    def __init__(self, task: Task, source: Source, batch_size: int, share: Share, seed: int):
        super().__init__(share.rows(batch_size))
        order, draws = (_derived(seed, use) for use in (1, 2))
        self._examples = Examples(source, task.transform(train=True), draws)
        self._order, self._repeats = Shuffle(len(source), order), task.repeats
        self._batch_size = batch_size

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def _batch(self, step: int, rows_B: np.ndarray) -> Batch:
        places_B = step * self._batch_size + rows_B
        return self._examples.batch(self._order(places_B // self._repeats), places_B)


class EvaluationSteps(BatchesByStep):
    """Batches of the first `count` examples, the last one filled up.

    They are in the order of the source, or shuffled by `seed`; the draws of an example depend on
    it alone. A batch is as long as the parts of a share need it; every host has all batches, so
    that all take the same number of steps.
    """

    def __init__(
        self,
        task: Task,
        source: Source,
        batch_size: int,
        share: Share,
        seed: int | None,
        count: int,
    ):
        super().__init__(share.rows(-(-batch_size // share.count) * share.count))
        self._examples = Examples(source, task.transform(train=False), EVAL_MASK_SEED)
        self._shuffle = None if seed is None else Shuffle(len(source), seed % 2**32)
        self._fillers, self._batch_size, self._count = dict(task.filler), batch_size, count

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def _batch(self, step: int, rows_B: np.ndarray) -> Batch:
        first = step * self._batch_size
        real_B = (rows_B < self._batch_size) & (first + rows_B < self._count)
        places_B = np.where(real_B, first + rows_B, first)
        indices_B = places_B if self._shuffle is None else self._shuffle(places_B)
        batch = self._examples.batch(indices_B, indices_B)
        for name, array in batch.items():
            array[~real_B] = self._fillers.get(name, 0)
        return batch | {"example_weight": real_B.astype(np.float32)}


def _derived(seed: int, use: int) -> int:
    """Returns the seed of one of a run's uses of randomness."""
    return int(np.random.SeedSequence((seed, use)).generate_state(1, np.uint32)[0])
