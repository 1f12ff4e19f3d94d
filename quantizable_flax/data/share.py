"""Which rows of every batch a process reads, when several hosts share the work."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Share:
    """Of each batch, cut into `count` equal runs of rows, those numbered `parts`, ascending.

    Two processes may hold the same part: where the model is split over both, they read the same
    examples.
    """

    parts: tuple[int, ...]
    count: int

    def rows(self, batch_size: int) -> np.ndarray:
        """Returns the row numbers of a batch whose size `count` divides, ascending."""
        size = batch_size // self.count
        return np.concatenate([np.arange(part * size, (part + 1) * size) for part in self.parts])


WHOLE = Share((0,), 1)
