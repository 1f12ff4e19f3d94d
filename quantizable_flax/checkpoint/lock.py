"""One run at a time in a workdir: the second is told who the first one is.

While a run has its workdir, `lock.json` there says which process it is. Three things tell a run
that goes on from one that died without removing the file, each where the others cannot:

- The kernel's lock on the file (flock). It holds on local disks, on network file systems that pass
  locks on, and between containers of one machine, and it ends with the process, however that ends.
- The process table, for a process of this machine on storage without locks, such as a bucket.
- A heartbeat, for all else: the first run renews the file every `BEAT` seconds, the second one
  watches it for three times as long. The clocks of two machines are never compared.

In a bucket nothing is atomic: of two runs that begin there in the same second both may go on, until
the one whose file was overwritten finds the other's at its next heartbeat, and stops.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Generator, Iterator
from typing import NoReturn, cast

import jax
from etils import epath

from quantizable_flax.checkpoint.lock_file import BucketFile, LocalFile
from quantizable_flax.checkpoint.owner import Owner
from quantizable_flax.errors import UserError
from quantizable_flax.runtime import hosts
from quantizable_flax.runtime.workdir import unwritable

logger = logging.getLogger(__name__)

BEAT = 15.0  # seconds
_WAITING, _TAKEN = "waiting", "taken"  # else a sentence


class Lock:
    """The workdir of a run of one process or of several, of which the first holds the file."""

    def __init__(self, workdir: epath.Path, beat: float = BEAT):
        """Takes the workdir, which need not exist; all processes of a run do at the same point.

        Args:
          workdir: of the run.
          beat: seconds between two heartbeats.

        Raises:
          UserError: on all processes, if another run has it or its file cannot be written.
        """
        self._workdir, self._beat = workdir, beat
        self._file = BucketFile(workdir) if "://" in str(workdir) else LocalFile(workdir)
        self._owner, self._other = Owner.here(), cast(Owner | None, None)
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._renew)
        # JAX is not asked for the number of a process alone: that takes hold of an accelerator,
        # which fails in its own words where the other run is using it.
        several = jax.distributed.is_initialized()
        self._holds = not several or hosts.is_first()
        verdicts, verdict = self._verdicts() if self._holds else iter(()), _WAITING
        while verdict == _WAITING:
            verdict = next(verdicts, "")
            verdict = hosts.text_of_first(verdict) if several else verdict
        if verdict != _TAKEN:
            raise UserError(verdict)
        if self._holds:
            self._thread.daemon = True
            self._thread.start()

    def _verdicts(self) -> Iterator[str]:
        """Yields `_WAITING` every now and then, and in the end `_TAKEN` or why not."""
        try:
            yield from self._taking()
            yield _TAKEN
        except UserError as error:
            yield str(error)
        except Exception as error:  # every storage library has its own
            yield unwritable(self._workdir, error)

    def _taking(self) -> Iterator[str]:
        refused = 0
        while True:
            locked = self._file.open()
            owner, pulse = self._file.read()
            if locked is None:
                if owner is not None or refused == 10:
                    self._refuse(owner)
                refused += 1
                time.sleep(0.1)  # it is just being written, or removed
                continue
            self._owner = dataclasses.replace(self._owner, device=self._file.device)
            runs = owner is not None and owner.still_runs(self._owner, locked)
            if owner is None or runs is False:
                break
            if runs is None and not (yield from self._renewed(owner, pulse)):
                break
            self._file.close(remove=False)
            owner, _ = self._file.read()
            if owner is not None:
                self._refuse(owner)
        try:
            self._file.write(self._owner, 0)
        except BaseException:
            self._file.close(remove=True)
            raise
        owner, _ = self._file.read()
        if owner != self._owner:
            self._refuse(owner)

    def _renewed(self, owner: Owner, pulse: object) -> Generator[str, None, bool]:
        """Watches the file for three heartbeats; returns whether it was renewed or removed."""
        patience = 3 * self._beat
        logger.info(
            "process %d on %s had %s since %s: waiting up to %.0f s for a sign that it still runs.",
            *(owner.pid, owner.host, self._workdir, owner.since, patience),
        )
        end = time.monotonic() + patience
        while time.monotonic() < end:
            yield _WAITING
            time.sleep(self._beat / 15)
            if self._file.read()[1] != pulse:
                return True
        return False

    def _refuse(self, owner: Owner | None) -> NoReturn:
        who = f"process {owner.pid} on {owner.host} since {owner.since}" if owner else "another run"
        raise UserError(
            f"--workdir={self._workdir} is in use by {who}: wait for its end or stop it, or give "
            f"another --workdir; if that process is gone for certain, delete {self._file.path}."
        )

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat):
            beat += 1
            with contextlib.suppress(Exception):  # the next one may find the storage again
                owner, _ = self._file.read()
                if owner is not None and owner.run != self._owner.run:
                    self._other = owner
                    return
                self._file.write(self._owner, beat)

    def check(self) -> None:
        """Raises UserError if another run has taken the workdir meanwhile, as it should not."""
        if self._other is not None:
            self._refuse(self._other)

    def release(self) -> None:
        """Gives the workdir back; never fails."""
        if not self._holds:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            owner, _ = self._file.read()
            self._file.close(remove=owner == self._owner)


@contextlib.contextmanager
def held(workdir: epath.Path, beat: float = BEAT) -> Iterator[Lock]:
    """Has the workdir within; arguments and errors are those of `Lock`."""
    lock = Lock(workdir, beat)
    try:
        yield lock
    finally:
        lock.release()
