"""Which task a configuration asks for."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from quantizable_flax.data.task import Task
from quantizable_flax.data.text.task import CausalLmTask, MaskedLmTask
from quantizable_flax.errors import UserError, nearest


def make_task(config: ConfigDict, assets: Mapping[str, Any] | None = None) -> Task:
    """Returns the data side of `config.model.name`.

    Args:
      config: the whole configuration.
      assets: `Task.assets` of the checkpoint that is continued or evaluated, None for a new run.

    Raises:
      UserError: an unknown model, or assets or a tokenizer that do not fit it.
    """
    name = config.model.name
    if name not in _TASKS:
        raise UserError(
            f"expected model.name among {', '.join(_TASKS)}, found {name!r}{nearest(name, _TASKS)}"
        )
    return _TASKS[name](config, assets)


def _images(config: ConfigDict, assets: Mapping[str, Any] | None) -> Task:
    from quantizable_flax.data.images.task import ImageTask

    return ImageTask(config, assets)


_TASKS: dict[str, Callable[[ConfigDict, Mapping[str, Any] | None], Task]] = {
    "bert": MaskedLmTask,
    "opt": CausalLmTask,
    "vit": _images,
}
