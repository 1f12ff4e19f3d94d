"""The model that a student stays near: `config.distill.teacher`, in floating point."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.checkpoint import store
from quantizable_flax.data.task import Task
from quantizable_flax.errors import UserError
from quantizable_flax.models.build import build_model
from quantizable_flax.models.shapes import boxed_shapes
from quantizable_flax.ptq.trained import learns_ranges
from quantizable_flax.runtime.mesh import replicated, tree_shardings
from quantizable_flax.training.finished import read_finished, read_finished_config

TOKENIZER = "tokenizer"
KEY = "teacher"  # of a checkpoint's info: the teacher's fingerprint
_SAME = 1e-5  # of a tensor's magnitude: another layout on a mesh sums in another order


class Teacher(NamedTuple):
    """A model that no step changes; no checkpoint holds it.

    Attributes:
      model: the Linen module.
      params: its parameters, laid out on the mesh as a student's are, or their shapes.
      assets: its tokenizer, or the names of its classes.
    """

    model: nn.Module
    params: Any
    assets: dict[str, Any]


def load_teacher(config: ConfigDict, student: nn.Module, mesh: Mesh) -> Teacher | None:
    """Returns the teacher of a run, None where it has none.

    Raises:
      UserError: nothing readable there, a quantized model, or one that cannot be compared.
    """
    path = config.distill.teacher
    if not path:
        return None
    try:
        found = read_finished(
            path, lambda known, _: _layout(known, _compared(config, known, student), mesh)[1]
        )
    except UserError as error:
        raise UserError(f"distill.teacher={path}: {error}") from error
    return Teacher(build_model(found.config), found.params, found.assets)


def abstract_teacher(config: ConfigDict, student: nn.Module, mesh: Mesh) -> Teacher | None:
    """Returns the teacher with shapes for parameters; the devices of the mesh need not exist."""
    if not config.distill.teacher:
        return None
    known = read_finished_config(config.distill.teacher)
    model = _compared(config, known, student)
    shapes, shardings = _layout(known, model, mesh)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    return Teacher(model, params, {})


def _check_tokenizer(config: ConfigDict, teacher: Teacher, task: Task) -> None:
    """Raises UserError if the teacher reads other tokens than the run's data hold."""
    ours, theirs = task.assets.get(TOKENIZER), teacher.assets.get(TOKENIZER)
    if ours is not None and theirs is not None and ours != theirs:
        raise UserError(
            f"distill.teacher={config.distill.teacher} has another tokenizer than this run: set "
            "init_from to that model, or data.tokenizer.file to its tokenizer."
        )


def origin(
    config: ConfigDict, teacher: Teacher | None, task: Task, mesh: Mesh
) -> dict[str, list[list[float]]]:
    """What a checkpoint's info says of the teacher, nothing without one.

    Of each of its parameters the sum, and the sum of magnitudes.

    Raises:
      UserError: it reads other tokens than the run's data hold.
    """
    if teacher is None:
        return {}
    _check_tokenizer(config, teacher, task)

    def sums(params: Any) -> Any:
        return [jnp.stack([jnp.sum(x), jnp.sum(jnp.abs(x))]) for x in jax.tree.leaves(params)]

    found = jax.jit(sums, out_shardings=replicated(mesh))(teacher.params)
    return {KEY: [pair.tolist() for pair in jax.device_get(found)]}


def check_same(
    config: ConfigDict,
    info: Mapping[str, Any],
    found: Mapping[str, list[list[float]]],
    workdir: epath.Path,
) -> None:
    """Raises UserError if a run goes on with another teacher than it had, wherever that lies."""
    if KEY not in info or KEY not in found:  # of an earlier version, or without a teacher
        return
    ours, theirs = np.array(info[KEY]), np.array(found[KEY])
    same = ours.shape == theirs.shape and np.all(np.abs(ours - theirs) <= _SAME * ours[:, 1:])
    if not same:
        raise UserError(
            f"{workdir} holds a run with another teacher than distill.teacher="
            f"{config.distill.teacher}: name the model that it had, or give a new --workdir."
        )


def check_apart(config: ConfigDict, workdir: epath.Path) -> None:
    """Raises UserError if a run is to be its own teacher."""
    path = config.distill.teacher
    if path and store.split_step(store.absolute(path))[0] == workdir:
        raise UserError(
            f"distill.teacher={path} is the workdir itself: give a new --workdir, or leave "
            "init_from as it was to go on."
        )


def _layout(known: ConfigDict, model: nn.Module, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of a model's parameters."""
    boxed = boxed_shapes(model)
    return nn.unbox(boxed), tree_shardings(boxed, mesh)


def _compared(config: ConfigDict, known: ConfigDict, student: Any) -> Any:
    """Returns the teacher's model, if its outputs have the student's shapes."""
    if learns_ranges(known):
        raise UserError(
            "that run was trained with learned grids, a teacher computes in floating point: give a "
            "run in floating point."
        )
    model = build_model(known)
    sizes = ["hidden_size", *(["vocab_size", "num_classes"] if config.distill.logits else [])]
    teacher, own = (m.config for m in (model, student))
    pairs = {name: (getattr(teacher, name, None), getattr(own, name, None)) for name in sizes}
    pairs["tokens"] = teacher.length(config.data), own.length(config.data)
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(
                f"that model has {name}={theirs} where the one that is trained has {ours}: give a "
                "teacher of the same architecture."
            )
    return model
