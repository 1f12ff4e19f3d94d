"""What a checkpoint holds of a run: the state between two steps."""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class TrainState:
    """What a step reads and replaces.

    Attributes:
      step: int32, steps taken.
      params: float32 parameters.
      opt_state: of the optimizer.
      ranges: running ranges of a model that is trained quantized, those of the weights always
        being of `params`; empty without.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ranges: Any = struct.field(default_factory=dict)
