"""All figures of a trained run: floating point, and post-training quantization in any setting."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from quantizable_flax.checkpoint.load import Run, load_run
from quantizable_flax.config import default_config
from quantizable_flax.data.calibration_batches import calibration_batches
from quantizable_flax.data.kinds import IMAGES
from quantizable_flax.data.pipeline import eval_batches
from quantizable_flax.data.share import WHOLE
from quantizable_flax.data.task import Task
from quantizable_flax.data.tasks import make_task
from quantizable_flax.errors import UserError
from quantizable_flax.evaluation.judge import ByFidelity, ByLabels, Judge, by_fidelity
from quantizable_flax.evaluation.outliers import outlier_sites
from quantizable_flax.evaluation.step import Metrics
from quantizable_flax.models.build import check_length, with_config, with_quant
from quantizable_flax.models.metric import FIDELITY, Metric
from quantizable_flax.ptq.calibrate import calibrate
from quantizable_flax.ptq.int8 import count_products, to_int8
from quantizable_flax.ptq.sensitivity import SiteCost, sensitivity
from quantizable_flax.ptq.settings import Setting, make_spec
from quantizable_flax.ptq.smoothquant import smooth
from quantizable_flax.quantization.learned import without_grids
from quantizable_flax.runtime.mesh import batch_share, make_mesh

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class Evaluator:
    """All figures of one trained model: floating point once, then any number of quantized setups.

    Everything is computed in float32, whatever dtype the run was trained in: on a grid the rounding
    of bfloat16 would be measured along with that of INT8.

    Batches are split over all devices of all processes, which hold the model whole; calibration is
    not, every process repeats it.

    Attributes:
      config: of the run, with the data to evaluate on.
      task: its data.
      model: in floating point, or the INT8 model that a run is.
      params: its parameters.
      batches: of the validation split.
      metric: the model's, e.g. perplexity.
    """

    def __init__(self, run: Run, task: Task, reference: Run | None = None):
        """Opens the validation split.

        Args:
          run: the model.
          task: its data.
          reference: what fidelity is measured to, None for the model itself.

        Raises:
          UserError: sequences longer than the model's positions, or data that cannot be read.
        """
        config, model = run.config, run.model
        check_length(config)
        self.config, self.task, self._run = config, task, run
        self.params = run.params if run.is_int8 else without_grids(run.params)
        self.model = with_config(model, dtype=jnp.float32)
        if not run.is_int8:
            self.model = with_quant(self.model, None)
        several = jax.device_count() > 1
        self._mesh = make_mesh(default_config().mesh) if several else None
        self._judge = self._make_judge(model.metric, reference)
        self.metric = self._judge.metric
        self.batches = eval_batches(
            task,
            batch_size=config.eval.batch_size,
            num_batches=config.eval.batches or None,
            workers=config.data.workers,
            share=batch_share(self._mesh) if self._mesh else WHOLE,
        )
        self._eval_steps: dict[nn.Module, Callable] = {}
        self._ranges: dict[Setting, Any] = {}

    @functools.cached_property
    def fp(self) -> Metrics:
        """The metrics of the model as it was trained, with outliers."""
        logger.info("evaluating the model as it is")
        step = self._judge.step(self.model, outlier_sites(self.model, self.config.eval.outliers))
        return self._judge(step, self.params, self.batches, {}, label="evaluating")

    def quantized(self, setting: Setting, seeds: int, backend: str = "simulated") -> list[float]:
        """The metric in one setting, one per calibration seed 0..seeds-1."""
        return [metrics.value for metrics in self.measured(setting, seeds, backend)]

    def measured(self, setting: Setting, seeds: int, backend: str = "simulated") -> list[Metrics]:
        """All that is measured in one setting, one per calibration seed 0..seeds-1.

        Settings that look at no data give one, whatever the seeds.
        """
        found: list[Metrics] = []
        for seed in range(seeds if self._needs_data(setting) else 1):
            logger.info("evaluating %s, calibration seed %d of %d", setting.name, seed + 1, seeds)
            model, params, ranges = self.calibrated(setting, seed)
            if backend == "int8":
                model, params = to_int8(model, params, ranges)
                ranges = {}
                if seed == 0:
                    counts = count_products(model, params)
                    logger.info("matrix products: %d of integers, %d in floating point", *counts)
            step = self._step(model)
            found.append(self._judge(step, params, self.batches, ranges, label=setting.name))
        return found

    def calibrated(self, setting: Setting, seed: int = 0) -> tuple[nn.Module, Any, Any]:
        """Returns (model with the setting's spec, params, ranges), calibrated on training data.

        The setting that a run was trained in has its ranges already.
        """
        spec, params = make_spec(self.config, setting), self.params
        model = with_quant(self.model, spec)
        if self._is_trained(setting):
            return model, self._run.params, self._run.ranges or {}
        if setting.smooth is not None:
            params = smooth(model, params, self._calibration_batches(seed), setting.smooth)
        batches = self._calibration_batches(seed)
        if not self._needs_data(setting):
            batches = itertools.islice(batches, 1)  # the weights alone have ranges
        ranges = calibrate(model, params, batches)
        if seed == 0:
            self._ranges[setting] = ranges
        return model, params, ranges

    def ranges(self, setting: Setting) -> Any:
        """The ranges of a setting, of calibration seed 0; those that are known are kept."""
        return self._ranges[setting] if setting in self._ranges else self.calibrated(setting)[2]

    def int8(self, setting: Setting, seed: int = 0) -> tuple[nn.Module, Any]:
        """Returns (model, params) that run on integers, of one calibration seed."""
        if self._needs_data(setting):
            quant = self.config.quant
            sizes = quant.calibration_batches, quant.calibration_batch_size
            logger.info("calibrating %s on %d batches of %d, seed %d", setting.name, *sizes, seed)
        return to_int8(*self.calibrated(setting, seed))

    def sensitivity(
        self, setting: Setting, *, batches: Iterable[Batch] | None = None
    ) -> list[SiteCost]:
        """What each site of a setting costs when it alone is quantized, dearest first.

        Args:
          setting: which.
          batches: a few that it costs something on, by the ranges of the setting where these are
            known; None for the validation split, by those of floating-point activations.
        """
        ranges = None
        if batches is not None and not self._is_trained(setting):
            ranges = self.ranges(setting)
        return sensitivity(
            with_quant(self.model, make_spec(self.config, setting)),
            self.params,
            self._calibration_batches(seed=0),
            self.batches if batches is None else batches,
            fidelity=self.metric is FIDELITY,
            ranges=ranges,
        )

    def _make_judge(self, metric: Metric, reference: Run | None) -> Judge:
        if not by_fidelity(self.config, metric):
            return ByLabels(metric, self.config, self._mesh)
        if reference is None:
            return ByFidelity(self.model, self.params, self.config, self._mesh)
        known = with_quant(with_config(reference.model, dtype=jnp.float32), None)
        return ByFidelity(known, without_grids(reference.params), self.config, self._mesh)

    def _is_trained(self, setting: Setting) -> bool:
        trained = self._run.trained_spec
        return setting.smooth is None and make_spec(self.config, setting) == trained

    def _needs_data(self, setting: Setting) -> bool:
        """Whether a setting's ranges depend on calibration data."""
        spec = make_spec(self.config, setting)
        static = spec.activation_ranges == "static"
        bits = spec.activation_bits is not None or bool(spec.site_bits)
        return not self._is_trained(setting) and ((static and bits) or setting.smooth is not None)

    def _step(self, model: nn.Module) -> Callable:
        if model not in self._eval_steps:
            self._eval_steps[model] = self._judge.step(model)
        return self._eval_steps[model]

    def _calibration_batches(self, seed: int) -> Iterable[Batch]:
        return calibration_batches(self.config, self.task, seed=seed)


def make_evaluator(run: Run, task: Task | None = None) -> Evaluator:
    """Returns the evaluator of a run on the data of its configuration, or of a task made of them.

    Raises:
      UserError: as `Evaluator`, or no model at `eval.reference` that reads what this one reads.
    """
    family: Any = run.model
    reference = run.config.eval.reference
    if reference is None or not by_fidelity(run.config, family.metric):
        return Evaluator(run, task or make_task(run.config, run.assets))
    known = load_run(reference)
    _check_reads_the_same(run, known, reference)
    return Evaluator(run, task or make_task(run.config, run.assets), known)


def _check_reads_the_same(run: Run, known: Run, reference: str) -> None:
    """Raises UserError for a reference of other data, or whose tokens are others."""
    ours, theirs = (one.model.config.data for one in (run, known))
    if (ours == IMAGES) != (theirs == IMAGES):
        raise UserError(
            f"eval.reference={reference} reads {theirs}, this model {ours}: set it to the model "
            "that this one came from."
        )
    tokenizers = [one.assets.get("tokenizer") for one in (run, known)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"eval.reference={reference} has another tokenizer than this model: set it to the "
            "model that this one came from."
        )
