"""Compiles the training step for a TPU slice without a TPU, parameters or data.

What is compiled is the step of `training/loop.py`: the same model, optimizer, mesh and shardings,
from shapes alone.
"""

import dataclasses
import logging
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from quantizable_flax.aot import report
from quantizable_flax.aot.candidates import Candidate, candidates
from quantizable_flax.aot.estimate import Estimate, measure
from quantizable_flax.aot.topology import chip_of_topology, devices_of, prepare
from quantizable_flax.config import check_positive
from quantizable_flax.data.specs import batch_specs
from quantizable_flax.errors import UserError
from quantizable_flax.models.flops import step_flops
from quantizable_flax.ptq.trained import learns_ranges
from quantizable_flax.runtime import terminal
from quantizable_flax.runtime.mesh import batch_sharding, batch_shards
from quantizable_flax.training.distillation import make_objective
from quantizable_flax.training.setup import set_up
from quantizable_flax.training.step import abstract_state, make_train_step
from quantizable_flax.training.teacher import abstract_teacher

logger = logging.getLogger(__name__)


def run(
    config: ConfigDict,
    topologies: list[str],
    vary: list[str],
    *,
    json: str | None = None,
    markdown: str | None = None,
) -> list[Estimate]:
    """Compiles every candidate and prints a report of the one, or a table of several.

    Args:
      config: the recipe.
      topologies: TPU slices, as `v5e:16x16`.
      vary: settings to compare, see `candidates`.
      json: also write all figures to this file, anew with each candidate.
      markdown: also write what is printed to this file.

    Raises:
      UserError: no libtpu, an unknown topology or key; of a single candidate also why it cannot
        work, while a table says so in its row.
    """
    tried = candidates(config, topologies, vary)
    for topology in topologies:
        chip_of_topology(topology)
    prepare()
    for topology in topologies:  # every mistake shows before the first minute is spent
        devices_of(topology)
    rows = []
    for number, candidate in enumerate(tried, 1):
        logger.info("compiling %d of %d: %s", number, len(tried), candidate.label)
        row = _estimate(candidate, alone=len(tried) == 1)
        took = f"compiled in {row.compiled.seconds:.0f} s" if row.compiled else row.reason
        logger.info("%s: %s", candidate.label, took)
        rows.append(row)
        report.save(config, rows, json=json, markdown=markdown)
    with terminal.printing():
        print(report.text_of(config, rows))
    return rows


def _estimate(candidate: Candidate, *, alone: bool) -> Estimate:
    try:
        return estimate(candidate)
    except UserError as error:
        if alone:
            raise
        chip = chip_of_topology(candidate.topology)
        return Estimate(candidate.topology, candidate.settings, chip, reason=str(error))


def estimate(candidate: Candidate) -> Estimate:
    """Returns the figures of a candidate's step; too large for the memory, the reason.

    Raises:
      UserError: a configuration that cannot work, as `train`.
    """
    config, devices = candidate.config, devices_of(candidate.topology)
    lowered, mesh = lower(config, devices)
    known = Estimate(
        topology=candidate.topology,
        settings=candidate.settings,
        chip=chip_of_topology(candidate.topology),
        devices=len(devices),
        mesh=dict(mesh.shape),
        batch_size=config.train.batch_size,
        tokens=config.data.get("seq_len", 0),
        model_flops=step_flops(config) / len(devices),
        waiting=config.train.prefetch * _batch_bytes(config) // batch_shards(mesh),
    )
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(known, reason=why(str(error)))
    figures = measure(compiled, len(devices), time.monotonic() - started)
    return dataclasses.replace(known, compiled=figures)


def lower(
    config: ConfigDict, devices: Sequence[jax.Device]
) -> tuple[jax.stages.Lowered, jax.sharding.Mesh]:
    """Returns the training step of `train` for these devices, not yet compiled, and its mesh.

    Raises:
      UserError: as `train`.
    """
    check_positive(config)
    mesh, model, optimizer = set_up(config, devices)
    learned = learns_ranges(config)
    state = abstract_state(model, optimizer, model.example_batch(), mesh, learned_ranges=learned)
    objective = make_objective(config, model, abstract_teacher(config, model, mesh))
    step: Any = make_train_step(model, optimizer, config, mesh, state, objective)
    return step.lower(state, abstract_batch(config, mesh), *objective.given), mesh


def abstract_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a global training batch as shapes, dtypes and shardings."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
        for name, spec in batch_specs(config).items()
    }


def _batch_bytes(config: ConfigDict) -> int:
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in batch_specs(config).values())


def why(message: str) -> str:
    """Says in a few words why XLA gave up."""
    first = message.strip().splitlines()[0]
    if "RESOURCE_EXHAUSTED" not in message:
        return f"the compiler refuses it: {first}"
    sizes = re.search(r"\(([\d.]+\w)\) exceeds available \w+ \(([\d.]+\w)\)", message)
    sizes = sizes or re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", message)
    if sizes is None:
        return f"does not fit into the HBM: {first}"
    return f"does not fit: needs {sizes[1]} of the {sizes[2]} of HBM"
