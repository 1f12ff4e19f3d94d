"""Batches made ahead of their use, by a thread of this process or by processes of their own."""

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from quantizable_flax.data.task import Batch
from quantizable_flax.errors import UserError

# One thread suffices for text: an example takes a few microseconds, the blocks lie in memory.
_PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
_AHEAD = 2  # batches that each process keeps ready


class Prefetched(Iterator[Batch]):
    """The batches of a dataset, in its order whatever makes them.

    Args:
      batches: dicts of arrays.
      workers: processes that make them, 0 for a thread of this one.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        dataset = batches.to_iter_dataset(_PREFETCH)
        if workers:
            # Grain asks absl for its flags, which only programs that absl.app runs have parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(workers, _AHEAD)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_begin_worker)
        self._workers, self._begun = workers, False
        self._batches = iter(dataset)
        self._end = weakref.finalize(self, self._batches.close)  # also when the program ends

    def __next__(self) -> Batch:
        if not self._workers:
            return next(self._batches)
        with contextlib.nullcontext() if self._begun else _uninterrupted():
            batch = next(self._batches)
        self._begun = True
        # Memory between processes is a file, gone only once nothing refers to it.
        return {name: np.array(array) for name, array in batch.items()}

    def close(self) -> None:
        """Ends the thread or the processes."""
        self._end()


def check_workers(workers: int) -> None:
    """Raises UserError for a negative number."""
    if workers < 0:
        raise UserError(
            f"expected data.workers of at least 0, found {workers}; 0 needs no further processes"
        )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets processes that are started within live through Ctrl-C, which goes to the whole group.

    The main process may want to end its step and to save. Here, it answers only afterwards.
    """
    multiprocessing.resource_tracker.ensure_running()  # it unblocks the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(index: int, count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose main process was killed and could not say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
