"""Everything that a report tells of one model."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from quantizable_flax.checkpoint.logged import History
from quantizable_flax.evaluation.study import Evaluator
from quantizable_flax.ptq.sensitivity import SiteCost
from quantizable_flax.ptq.settings import Setting, make_spec
from quantizable_flax.report.collect import collect
from quantizable_flax.report.inputs import make_inputs
from quantizable_flax.report.measured import Anatomy, GridOver, Values
from quantizable_flax.report.values import grid_over

logger = logging.getLogger(__name__)

MOST_TOKENS = 2048  # that the activations are looked at on
SENSITIVITY_TOKENS = 256  # that each site's cost is taken over, as all of them are gone through


class Subject(NamedTuple):
    """One model in the report.

    Attributes:
      row: its row of the table.
      anatomy: of its activations.
      grid: of the first setting that has one for the whole of its worst site, None without.
      costs: of the sites, the dearest first; empty without a setting.
      costed: the setting of these, empty without one.
      unit: of these.
      history: what its run has logged.
    """

    row: dict[str, Any]
    anatomy: Anatomy
    grid: GridOver | None
    costs: list[SiteCost]
    costed: str
    unit: str
    history: History

    @property
    def name(self) -> str:
        """As in the table."""
        return self.row["name"]


def make_subject(
    evaluator: Evaluator, row: dict[str, Any], settings: Sequence[Setting], history: History
) -> Subject:
    """Looks into the model of an evaluator.

    Args:
      evaluator: of the run.
      row: its row of the table.
      settings: of the table; of those without SmoothQuant the first is drawn, and costs sites.
      history: what its run has logged.
    """
    logger.info("looking at the activations")
    batch = next(iter(evaluator.batches))
    inputs = make_inputs(evaluator.model, evaluator.task, batch, MOST_TOKENS)
    anatomy = collect(evaluator.model, evaluator.params, inputs)
    plain = [setting for setting in settings if setting.smooth is None]
    grid = _grid(evaluator, plain, anatomy.worst)
    costs: list[SiteCost] = []
    costed = plain[0].name if plain else ""
    if plain:
        logger.info("quantizing each site alone, %s", costed)
        few = make_inputs(evaluator.model, evaluator.task, batch, SENSITIVITY_TOKENS)
        costs = evaluator.sensitivity(plain[0], batches=[few.batch])
    unit = evaluator.metric.sensitivity_label
    return Subject(row, anatomy, grid, costs, costed, unit, history)


def _grid(evaluator: Evaluator, settings: Sequence[Setting], values: Values) -> GridOver | None:
    """The grid of the first setting that has one for the whole site, None where none has."""
    for setting in settings:
        spec = make_spec(evaluator.config, setting)
        if "layer_norm" in values.site:
            spec = spec.for_layer_norm(final=values.site.startswith("final"))
        bits = spec.bits(values.site)
        known = None
        # The grid of a rotated site lies over other values than those that are drawn.
        static = spec.activation_ranges == "static" and not spec.rotates(values.site)
        if bits is not None and static:
            known = _range_of(evaluator.ranges(setting), values.site)
        if bits is not None and known is not None:
            symmetric = spec.activation_symmetric
            return grid_over(values, setting.name, *known, bits, symmetric=symmetric)
    return None


def _range_of(ranges: Any, site: str) -> tuple[float, float] | None:
    """The calibrated range of a site; None where it is learned, or the site has none."""
    for name in (*site.split("/"), "range"):
        if name not in ranges:
            return None
        ranges = ranges[name]
    return float(ranges.min), float(ranges.max)
