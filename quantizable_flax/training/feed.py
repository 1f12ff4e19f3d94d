"""Batches on their way to the devices while earlier steps run.

Why the queue is not Grain's: docs/readers.md, "Why positions are numbers of batches".
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from quantizable_flax.data.pipeline import TrainBatches
from quantizable_flax.errors import UserError
from quantizable_flax.runtime.mesh import put_batch
from quantizable_flax.runtime.progress import Clock


class Feed(Iterator[dict[str, jax.Array]]):
    """Batches of a training iterator on the mesh, transfers begun some batches ahead.

    Args:
      data: this host's share of the batches.
      mesh: where they go.
      ahead: batches on the devices beside the one that is handed out.
      clock: measures the time spent waiting for data.

    Raises:
      UserError: a negative number of batches.
    """

    def __init__(self, data: TrainBatches, mesh: Mesh, ahead: int, clock: Clock):
        if ahead < 0:
            raise UserError(f"train.prefetch must not be negative, found {ahead}.")
        self._data, self._mesh, self._ahead, self._clock = data, mesh, ahead, clock
        self._placed: deque[tuple[dict[str, jax.Array], dict[str, Any]]] = deque()
        self._state = data.get_state()

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._placed) <= self._ahead:
            with self._clock:
                examples = next(self._data)
            # The transfer runs while the devices still compute.
            self._placed.append((put_batch(examples, self._mesh), self._data.get_state()))
        batch, self._state = self._placed.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position behind the batch handed out last, whatever has been read ahead."""
        return self._state
