"""Batches made ahead of their use, by a thread of this process or by processes of their own."""

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np
from absl import flags

from quantizable_flax.data.task import Batch
from quantizable_flax.errors import UserError

# One thread suffices for text: an example takes a few microseconds, the blocks lie in memory.
_PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
_AHEAD = 2  # batches that each process keeps ready
_SHARED_MEMORY = "/dev/shm"
# Of each process: those kept ready here and there and those between; at most 7 were measured.
_IN_SHARED_MEMORY = 2 * _AHEAD + 4
_claims: weakref.WeakKeyDictionary["Batches", int] = weakref.WeakKeyDictionary()


class Batches(Protocol):
    """Random access to batches of one size."""

    def __len__(self) -> int:
        """Returns how many there are."""
        ...

    def __getitem__(self, step: int) -> Batch:
        """Returns dicts of arrays."""
        ...

    def nbytes(self) -> int:
        """Returns the size of a batch."""
        ...


class Prefetched(Iterator[Batch]):
    """Batches in their order, whatever makes them.

    Args:
      batches: what is made.
      workers: processes that make them, 0 for a thread of this one.
      first: the batch to begin with.
      again: whether the first batch follows the last one.

    Raises:
      UserError: processes that cannot be started or have died.
    """

    def __init__(self, batches: Batches, workers: int, *, first: int = 0, again: bool = False):
        steps = grain.MapDataset.source(batches)
        rest = steps.repeat() if again else steps.slice(slice(first, None))
        dataset = rest.to_iter_dataset(_PREFETCH)
        if workers:
            dataset = _by_processes(dataset, workers)
        self._workers, self._begun = workers, False
        self._length, self._taken = len(batches), 0
        self._dataset, self._batches = dataset, iter(dataset)
        self._end = weakref.finalize(self, self._batches.close)  # also when the program ends

    def __next__(self) -> Batch:
        if not self._workers:
            return next(self._batches)
        with contextlib.nullcontext() if self._begun else _uninterrupted():
            batch = self._next_of_workers()
        self._begun = True
        self._taken += 1
        # Memory between processes is a file, gone only once nothing refers to it.
        return {name: np.array(array) for name, array in batch.items()}

    def _next_of_workers(self) -> Batch:
        try:
            return next(self._batches)
        except RuntimeError as error:
            ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if ended is None:
                raise
            raise UserError(
                f"expected the processes of data.workers={self._workers} to go on, found that one "
                f"ended {_why(int(ended[1]))}"
            ) from None

    def rewind(self) -> bool:
        """Goes back to the first batch; returns False where only `close` is left.

        So it is where processes are still starting, which Grain would lose, or have ended.
        """
        if self._taken < self._workers or not self._end.alive:
            return False
        if self._taken % self._length:
            with contextlib.closing(iter(self._dataset)) as unused:
                self._batches.set_state(unused.get_state())
            self._taken = self._length
        return True

    def close(self) -> None:
        """Ends the thread or the processes."""
        self._end()


def _by_processes(dataset: grain.IterDataset, workers: int) -> grain.IterDataset:
    # Grain asks absl for its flags, which only programs that absl.app runs have parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.multiprocessing.MultiprocessingOptions(workers, _AHEAD)
    return dataset.mp_prefetch(options, worker_init_fn=_begin_worker)


def claim_shared_memory(batches: Batches, workers: int, folder: str = _SHARED_MEMORY) -> None:
    """Claims what processes will need for as long as `batches` lives; nothing for 0 processes.

    Raises UserError where it does not fit beside what others have claimed: a process that finds
    none when it writes is killed without a word.
    """
    if not workers:
        return
    _check_semaphores(workers, folder)
    try:
        stat = os.statvfs(folder)
    except OSError:  # a system that keeps it elsewhere
        return
    wanted, claimed = batches.nbytes() * workers * _IN_SHARED_MEMORY, sum(_claims.values())
    free = min(stat.f_bavail, stat.f_blocks - claimed // stat.f_frsize) * stat.f_frsize
    if free < wanted:
        size = _megabytes(wanted + claimed)
        raise UserError(
            f"expected {_megabytes(wanted)} MB of shared memory for data.workers={workers}, found "
            f"{max(free, 0) >> 20} MB left in {folder}; give a container more, for example by "
            f"docker run --shm-size={size + size // 4}m or --ipc=host, or set fewer data.workers "
            "(0 needs none) or a smaller batch size"
        )
    _claims[batches] = wanted


def _check_semaphores(workers: int, folder: str) -> None:
    try:
        multiprocessing.get_context("spawn").Event()
    except (OSError, ImportError) as error:
        raise UserError(
            f"expected room for semaphores in {folder} for data.workers={workers}, found that none "
            f"can be made ({error}); mount it with some megabytes or set data.workers=0"
        ) from None


def _megabytes(size: int) -> int:
    return -(-size >> 20)


def _why(exit_code: int) -> str:
    """Returns the end of a sentence: how a process ended and what to do."""
    if exit_code == -signal.SIGBUS:
        return (
            f"because {_SHARED_MEMORY} is full; give a container more shared memory, for example "
            "by docker run --shm-size=8g or --ipc=host, or set data.workers=0"
        )
    if exit_code == -signal.SIGKILL:
        return (
            "because it was killed, as the system does when memory runs out; lower data.workers "
            "or the batch size, or give it more memory"
        )
    return f"with exit code {exit_code}; see what it wrote above, or set data.workers=0"


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
