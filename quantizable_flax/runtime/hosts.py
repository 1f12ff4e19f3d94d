"""One program on many hosts: joining them, agreeing, waiting for each other, leaving.

JAX itself finds the other hosts on Cloud TPU, GKE, SLURM and Open MPI; elsewhere flags name them.
Everything here does nothing in a run of one process.
"""

import atexit
import contextlib
import hashlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from quantizable_flax.errors import UserError, check_at_least

START_SECONDS = 300
LEAVE_SECONDS = 10  # that a host which failed waits for the others to fail too
MISTAKE = 2
_NOT_FOUND = "coordinator_address should be defined"  # by JAX, where it detects no cluster


def define_flags() -> None:
    """Defines the flags that name the hosts of a run."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, where several hosts run this command together. Not needed on "
        "Cloud TPU, GKE and SLURM.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes run this command; 1 for this one alone."
    )
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer(
        "coordinator_timeout", START_SECONDS, "Seconds to wait for the other processes at start."
    )


@contextlib.contextmanager
def joined(*, stoppable: bool = False) -> Iterator[None]:
    """Joins the processes that the flags or the cluster name, and leaves them at the end.

    It must come before anything is computed. Where no cluster is found and no flag is given,
    nothing happens. With `stoppable`, SIGTERM is left to the runtime, which tells all processes.

    Raises:
      UserError: flags that are incomplete or wrong, or a cluster that JAX cannot read. If the
        others do not come in time, the program ends with one sentence and status 2.
    """
    values = flags.FLAGS
    if not _join(
        values.coordinator, values.num_processes, values.process_id, values.coordinator_timeout
    ):
        yield
        return
    if not stoppable:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not is_first():
        logging.getLogger("quantizable_flax").setLevel(logging.ERROR)
    try:
        yield
    except BaseException as error:
        status = MISTAKE if isinstance(error, UserError) else 1
        # Runs before JAX's own, which waits long for hosts that have not failed, then aborts.
        atexit.register(_leave_after_failure, status)
        raise
    jax.distributed.shutdown()


def _join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> bool:
    """Returns whether there are processes to join, after joining them."""
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    asked = any(value is not None for value in given.values())
    _check_flags(coordinator, num_processes, process_id, timeout)
    if num_processes == 1 and coordinator is None:
        return False
    # On CPU the processes exchange arrays through gloo; accelerators have their own network.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = f"at {coordinator}" if coordinator else "of the cluster"
    count = f"{num_processes} processes" if num_processes else "processes"
    waited = (
        f"the {count} {where} did not all answer within {timeout} s: start the same command on "
        "every host, with the same --coordinator (reachable from all) and --num_processes and its "
        "own --process_id, or raise --coordinator_timeout."
    )
    try:
        # JAX would abort with a stack trace of C++ when its own time is over.
        with _deadline(timeout, waited, MISTAKE):
            jax.distributed.initialize(
                coordinator, num_processes, process_id, initialization_timeout=timeout + 60
            )
    except ValueError as error:
        if not asked and _NOT_FOUND in str(error):
            return False
        missing = [name for name, value in given.items() if value is None]
        raise UserError(
            f"no cluster was found, so several hosts need --coordinator, --num_processes and "
            f"--process_id, found no {' and no '.join(missing)}: give all three."
        ) from error
    except Exception as error:  # of the libraries that ask a cluster for its hosts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the hosts of this run could not be joined ({reason}): give --coordinator, "
            "--num_processes and --process_id, or --num_processes=1 to run here alone."
        ) from error
    return True


def _check_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(
                f"--coordinator must be HOST:PORT, found {coordinator!r}: name process 0's host "
                "and a free port there."
            )
    if num_processes is not None:
        check_at_least(1, "--num_processes", num_processes)
    if process_id is not None and not 0 <= process_id < (num_processes or sys.maxsize):
        raise UserError(
            f"--process_id must be from 0 to --num_processes - 1, found {process_id} of "
            f"{num_processes}."
        )
    check_at_least(1, "--coordinator_timeout", timeout)


@contextlib.contextmanager
def _deadline(seconds: float, sentence: str, status: int) -> Iterator[None]:
    """Ends the program with a sentence if what runs within takes longer."""

    def end() -> None:
        if sentence:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave_after_failure(status: int) -> None:
    """Leaves together with the others if they failed too, else alone."""
    with _deadline(LEAVE_SECONDS, "", status):
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes and reports for all."""
    return jax.process_index() == 0


def wait_for_all(point: str) -> None:
    """Waits until every process has come to this point."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(point)


def gathered(value: Any) -> np.ndarray:
    """Returns the values of all processes, stacked in their order."""
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(np.asarray(value)).reshape(
            jax.process_count(), *np.shape(value)
        )


def first_of_all(value: Any) -> np.ndarray:
    """Returns the value of the first process; shape and dtype are the same on all."""
    with jax.transfer_guard("allow"):
        return multihost_utils.broadcast_one_to_all(np.asarray(value))


def text_of_first(text: str) -> str:
    """Returns the text of the first process; the others give any."""
    content = np.frombuffer(text.encode(), np.uint8)
    shared = np.zeros(int(first_of_all(np.int32(len(content)))), np.uint8)
    shared[: len(content)] = content[: len(shared)]
    return first_of_all(shared).tobytes().decode()


def check_same(what: str, content: bytes, advice: str) -> None:
    """Raises UserError on every process unless all have the same content."""
    digest = np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.int32)
    others = np.flatnonzero(np.any(gathered(digest) != first_of_all(digest), axis=-1))
    if len(others):
        raise UserError(
            f"expected {what} to be the same on every host, found others on process "
            f"{', '.join(map(str, others))} than on process 0: {advice}."
        )
