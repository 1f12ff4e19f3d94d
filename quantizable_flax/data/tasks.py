"""Which task a configuration asks for."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from quantizable_flax.data.kinds import (
    CAUSAL_TEXT,
    IMAGES,
    LABELLED_TEXT,
    MASKED_TEXT,
    TEXT_ROWS,
    kind_of,
)
from quantizable_flax.data.task import Task
from quantizable_flax.data.text.rows import LabelledTextTask, RowsTask
from quantizable_flax.data.text.task import CausalLmTask, MaskedLmTask


def make_task(config: ConfigDict, assets: Mapping[str, Any] | None = None) -> Task:
    """Returns the data side of a configuration.

    Args:
      config: the whole configuration.
      assets: `Task.assets` of the checkpoint that is continued or evaluated, None for a new run.

    Raises:
      UserError: assets or a tokenizer that do not fit the model.
    """
    return _TASKS[kind_of(config)](config, assets)


def _images(config: ConfigDict, assets: Mapping[str, Any] | None) -> Task:
    from quantizable_flax.data.images.task import ImageTask  # Text runs need no image libraries.

    return ImageTask(config, assets)


_TASKS: dict[str, Callable[[ConfigDict, Mapping[str, Any] | None], Task]] = {
    MASKED_TEXT: MaskedLmTask,
    CAUSAL_TEXT: CausalLmTask,
    TEXT_ROWS: RowsTask,
    LABELLED_TEXT: LabelledTextTask,
    IMAGES: _images,
}
