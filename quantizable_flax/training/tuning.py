"""A recipe's first step where the model is finished already: its configuration."""

from ml_collections import ConfigDict

from quantizable_flax.config import default_config
from quantizable_flax.errors import UserError
from quantizable_flax.pretrained.folder import is_published
from quantizable_flax.training.finished import absolute_name, read_finished_config

UNUSED = ("hidden_dropout", "attention_dropout")  # a student that drops units strays


def begin(path: str) -> ConfigDict:
    """Returns the defaults of a family with `model` and `data` of a finished model.

    That model is where the run starts, its teacher, and what its fidelity is measured to; dropout
    is off. Of a published model nothing tells the data's labels, so that they come without.

    Args:
      path: a run, a published model's folder or hf:org/name.

    Raises:
      UserError: no path, or as `read_finished_config`.
    """
    if not path:
        raise UserError(
            "this recipe takes a finished model, found none: give --config.init_from=PATH, a run's "
            "workdir, the folder of a published model or hf:org/name."
        )
    known, published = read_finished_config(path), is_published(path)
    config = default_config(known.model.name)
    for group in ("model", "data"):
        config[group] = known[group]
    for key in UNUSED:
        config.model[key] = 0.0
    if published and "label_key" in config.data:
        config.data.label_key = None
    config.init_from = config.distill.teacher = config.eval.reference = absolute_name(path)
    return config
