"""What a run is made of before it has arrays: the same for training and for compiling ahead."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from quantizable_flax.models.build import check_length
from quantizable_flax.nn.fused import check_hardware
from quantizable_flax.nn.partition import on_mesh
from quantizable_flax.ptq.trained import model_to_train
from quantizable_flax.runtime.mesh import check_sizes, make_mesh
from quantizable_flax.training.no_effect import without_effect
from quantizable_flax.training.optimizer import make_optimizer

logger = logging.getLogger(__name__)


class Setup(NamedTuple):
    """The parts that a configuration names."""

    mesh: Mesh
    model: nn.Module
    optimizer: optax.GradientTransformation


def set_up(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Returns mesh, model and optimizer of a run, checked against each other.

    Raises:
      UserError: a configuration that cannot work on these devices, by default all there are.
    """
    mesh = make_mesh(config.mesh, None if devices is None else list(devices))
    with on_mesh(mesh):
        check_hardware(config.train.attention_kernel)
    model, optimizer = model_to_train(config), make_optimizer(config, config.train.steps)
    check_length(config)
    check_sizes(config, model, mesh)
    for sentence in without_effect(config):
        logger.warning(sentence)
    return Setup(mesh, model, optimizer)
