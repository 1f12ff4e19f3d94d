"""Stopping between two steps: SIGTERM (preemption) and Ctrl-C, on one host or on many."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop answers between two steps.

    In a run of several processes SIGTERM belongs to JAX's coordination service: whichever process
    gets it, all stop after the same step. Ctrl-C is passed on to it.

    A second Ctrl-C interrupts at once. A run that Ctrl-C stopped exits with status 130, so that a
    script does not go on; after SIGTERM, which means preemption, it exits with 0.
    """

    def __init__(self):
        self._requested: int | None = None
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "StopSignal":
        numbers = [signal.SIGTERM, signal.SIGINT] if self._alone else [signal.SIGINT]
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._requested == signal.SIGINT and kind is None:
            raise SystemExit(128 + signal.SIGINT)

    def reached(self, steps_taken: int) -> bool:
        """Whether to stop here; asked once after every step, of all processes alike.

        Args:
          steps_taken: by this program, 1 at the first call: the service agrees on the next count
            that no process has passed yet, and before the first call that is 1.
        """
        if self._alone:
            return self._requested is not None
        return multihost_utils.reached_preemption_sync_point(steps_taken)

    def _request(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self._requested is not None:
            raise KeyboardInterrupt
        self._requested = number
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)
