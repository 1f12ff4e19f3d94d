"""A run as an ONNX folder: calibrated, written, and what is on integers told."""

import logging
import os
from pathlib import Path

import jax.numpy as jnp

from quantizable_flax.checkpoint import export
from quantizable_flax.checkpoint.load import Run
from quantizable_flax.errors import UserError
from quantizable_flax.evaluation.study import make_evaluator
from quantizable_flax.models.build import with_config, with_quant
from quantizable_flax.onnx.write import MODEL, REPORT, check_model, check_spec, to_onnx, write_onnx
from quantizable_flax.ptq.settings import Setting, check_setting, make_spec
from quantizable_flax.runtime import terminal

logger = logging.getLogger(__name__)


def write_run(
    run: Run, setting: Setting | None, folder: os.PathLike, opset: int, seed: int
) -> None:
    """Writes a run as ONNX, and prints how large that is and what stays in floating point.

    Args:
      run: in floating point, with the configuration to calibrate by.
      setting: bits and options, None for floating point.
      folder: a new or empty one, on this machine.
      opset: of the ONNX standard.
      seed: of the calibration batches.

    Raises:
      UserError: a model or a setting that ONNX cannot say exactly, data that cannot be read, or a
        folder that cannot be written.
    """
    if "://" in os.fspath(folder):
        raise UserError(f"--out={folder} must be a local folder: write to one, and copy that.")
    check_model(run.model)
    if setting is None:
        model = with_quant(with_config(run.model, dtype=jnp.float32), None)
        exported = to_onnx(model, run.params, opset=opset)
    else:
        check_setting(run.model, run.config, setting)
        check_spec(make_spec(run.config, setting), opset)
        evaluator = make_evaluator(run)
        logger.info("calibrating %s, seed %d", setting.name, seed)
        model, params, ranges = evaluator.calibrated(setting, seed)
        exported = to_onnx(model, params, ranges, opset=opset)
    logger.info("writing %s", folder)
    crop = run.config.data.get("eval_crop", 1.0)
    write_onnx(Path(folder), exported, model, assets=run.assets, eval_crop=crop)
    _tell(Path(folder), exported.report, export.size_in_bytes(run.params))


def _tell(folder: Path, report, float32_bytes: int) -> None:
    written = sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))
    with terminal.printing():
        print(
            f"Wrote {folder}: {MODEL} {written / 1e6:.1f} MB; in float32 the parameters are "
            f"{float32_bytes / 1e6:.1f} MB ({written / float32_bytes:.3f} of it)."
        )
        if report.spec is not None:
            print(
                f"Matrix products: {len(report.integers)} of integers, "
                f"{len(report.float_products)} in floating point. In floating point ({REPORT} "
                "names each node):"
            )
            print(*(f"  {line}" for line in report.lines()), sep="\n")
