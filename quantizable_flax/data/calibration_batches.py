"""The training data that ranges are calibrated on."""

from ml_collections import ConfigDict

from quantizable_flax.data.pipeline import EvalBatches, eval_batches
from quantizable_flax.data.task import Task
from quantizable_flax.errors import UserError, check_at_least


def calibration_batches(config: ConfigDict, task: Task, *, seed: int) -> EvalBatches:
    """Whole batches of training data by `config.quant`, other ones for another seed.

    Raises:
      UserError: no batch asked for, or more than there are.
    """
    quant = config.quant
    check_at_least(1, "quant.calibration_batches", quant.calibration_batches)
    try:
        return eval_batches(
            task,
            split="train",
            batch_size=quant.calibration_batch_size,
            num_batches=quant.calibration_batches,
            seed=seed,
            full=True,
            workers=config.data.workers,
        )
    except UserError as error:
        raise UserError(
            f"quant.calibration_batches * quant.calibration_batch_size: {error}"
        ) from error
