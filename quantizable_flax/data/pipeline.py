"""Batches of a task for training and evaluation, with Grain as the engine."""

from collections.abc import Iterator

from quantizable_flax.data.share import WHOLE, Share
from quantizable_flax.data.steps import EvaluationSteps, TrainingSteps
from quantizable_flax.data.task import Batch, Source, Task
from quantizable_flax.data.workers import Prefetched, check_workers, claim_shared_memory
from quantizable_flax.errors import UserError

_MAX_EXAMPLES = 2**32  # what Grain's shuffle can number


class TrainBatches(Iterator[Batch]):
    """Endless batches whose position is the number of batches taken.

    The state goes into JSON and holds for any number of hosts, threads and worker processes.
    """

    def __init__(self, batches: TrainingSteps, workers: int, examples: int):
        self._batches, self._workers, self._examples = batches, workers, examples
        claim_shared_memory(batches, workers)
        self._next_index = 0
        self._running: Prefetched | None = None

    def __next__(self) -> Batch:
        if self._running is None:
            self._running = Prefetched(self._batches, self._workers, first=self._next_index)
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
    """Batches that can be iterated again and again, each time the same; len() counts them.

    Worker processes are there for the next pass when one has ended or was left, until `close` or
    the end of this object.
    """

    def __init__(self, batches: EvaluationSteps, workers: int = 0):
        self._batches, self._workers = batches, min(workers, len(batches))
        claim_shared_memory(batches, self._workers)
        self._idle: Prefetched | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        running, self._idle = self._idle, None
        if running is None:
            running = Prefetched(self._batches, self._workers, again=self._workers > 0)
        try:
            for _ in range(len(self)):
                yield next(running)
        except GeneratorExit:  # the pass was left
            self._put_back(running)
            raise
        except BaseException:
            running.close()
            raise
        self._put_back(running)

    def _put_back(self, running: Prefetched) -> None:
        if self._workers and self._idle is None and running.rewind():
            self._idle = running
        else:  # a thread starts at once, and of two passes at a time one keeps its processes
            running.close()

    def close(self) -> None:
        """Ends the worker processes; the next pass starts them again."""
        idle, self._idle = self._idle, None
        if idle is not None:
            idle.close()


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
    across the border of two epochs. Where the task repeats examples, each comes so often in a row
    and a pass through the split takes so many times longer. The parts of all hosts, put together
    in order, are the batch of a single host. With `workers` = 0 a thread of this process makes the
    batches, else so many processes do; the batches are the same. Raises UserError where the split
    is smaller than a batch, or shared memory too small for the processes.
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
    batches = TrainingSteps(task, source, batch_size, share, seed)
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
    real = min(count, wanted * batch_size)
    batches = EvaluationSteps(task, source, batch_size, share, seed, real)
    return EvalBatches(batches, workers)


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
