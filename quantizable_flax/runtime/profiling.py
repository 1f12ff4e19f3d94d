"""A profiler trace of chosen steps, for TensorBoard and XProf."""

import contextlib
import functools
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from quantizable_flax.errors import UserError
from quantizable_flax.runtime.progress import Clock
from quantizable_flax.runtime.workdir import reason_of

FOLDER = "profile"
ON_SIGNAL = 5  # steps that SIGUSR1 traces


def parse_steps(text: str | None, last: int) -> tuple[int, int] | None:
    """Returns the first and the last step of `START:STOP`, counted from 1; None for None.

    Raises:
      UserError: not two numbers with 1 <= START <= STOP, or START beyond the last step.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    span = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= span[0] <= min(span[1], last):
        raise UserError(
            f"--profile must be START:STOP, two steps with 1 <= START <= STOP and START at most "
            f"train.steps = {last}, found {text!r}."
        )
    return span


class Profile:
    """Traces steps into `profile/` of the workdir, those asked for and, on SIGUSR1, the next few.

    The devices are idle when a trace begins and ends, so it holds whole steps. It is written to a
    local folder and copied from there, so the workdir may be a bucket.
    """

    def __init__(
        self,
        workdir: epath.Path,
        span: tuple[int, int] | None,
        clock: Clock,
        note: Callable[[str], None],
    ):
        self._folder, self._span = workdir / FOLDER, span
        self._clock, self._note = clock, note
        self._local: tempfile.TemporaryDirectory | None = None  # of the trace that runs
        self._first = self._until = self._step = 0
        self._asked = False
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._previous = signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def around(self, step: Callable, done: int) -> Callable:
        """Returns the step `(state, ...) -> ...` traced where asked; `done` were taken before."""
        self._step = done

        @functools.wraps(step)
        def traced(state: Any, *given: Any) -> Any:
            if self._local is not None and self._step == self._until:
                jax.block_until_ready(state)
                self._stop()
            self._step += 1
            if self._local is None and (last := self._wanted()):
                jax.block_until_ready(state)
                self._start(last)
            if self._local is None:
                return step(state, *given)
            with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
                return step(state, *given)

        return traced

    def _wanted(self) -> int | None:
        """The last step of a trace that is to begin with this one."""
        if self._span is not None and self._span[0] <= self._step <= self._span[1]:
            return self._span[1]
        if self._asked:
            self._asked = False
            return self._step + ON_SIGNAL - 1
        return None

    def _start(self, last: int) -> None:
        with self._clock, self._harmless():
            self._first, self._until = self._step, last
            local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(local.name)
            self._local = local

    def _stop(self) -> None:
        assert self._local is not None
        # TensorBoard looks for plugins/profile/RUN; one folder takes the files of all processes,
        # of which several may run on a host.
        process = f"process_{jax.process_index()}_" if jax.process_count() > 1 else ""
        run = f"steps_{self._first}_{self._step}"
        target = self._folder / "plugins" / "profile" / run
        local, self._local = self._local, None
        with self._clock, self._harmless(), local as name:
            jax.profiler.stop_trace()
            target.mkdir(parents=True, exist_ok=True)
            for file in epath.Path(name).glob("plugins/profile/*/*"):
                file.copy(target / f"{process}{file.name}", overwrite=True)
            self._note(f"steps {self._first} to {self._step} are traced in {self._folder}")

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Says that a trace could not be written, and lets the run go on."""
        try:
            yield
        except Exception as error:  # of a file system, reached through several libraries
            self._span = None  # not tried again at each step
            self._note(f"steps from {self._first} on are not traced ({reason_of(error)}).")

    def close(self) -> None:
        """Ends a trace that still runs behind the last step, and gives SIGUSR1 back."""
        if self._local is not None:
            self._stop()
        if self._in_main:
            signal.signal(signal.SIGUSR1, self._previous)
