"""quantizable_flax.export: a trained run as a model to take away."""

import logging

from absl import flags
from etils import epath

from quantizable_flax.checkpoint import export
from quantizable_flax.checkpoint.load import Run, load_run, override_run
from quantizable_flax.cli import program
from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.evaluation.study import make_evaluator
from quantizable_flax.ptq.int8 import count_products
from quantizable_flax.ptq.settings import Setting, check_spec, make_spec, parse_setting
from quantizable_flax.quantization.spec import INT8_BITS, QuantSpec
from quantizable_flax.runtime import terminal
from quantizable_flax.runtime.compilation_cache import use_compilation_cache

logger = logging.getLogger("quantizable_flax.export")

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help shows them as those of the program


def define_flags() -> None:
    """Declares the flags; not on import, for programs have flags of the same names."""
    flags.DEFINE_string("workdir", None, "The run to export, or the folder of one of its steps.")
    flags.DEFINE_string(
        "to",
        "int8",
        "What to write; int8: an Orbax checkpoint of integers, and a StableHLO program beside it.",
    )
    flags.DEFINE_string("out", None, "The folder to write, new or empty.")
    flags.DEFINE_string(
        "quant",
        "w8a8",
        "Bits and options, as of eval.py: w8a8, w4a8+mse, w8a8+smooth=0.5; the rest of the scheme "
        "is set by --config.quant.KEY=VALUE.",
    )
    flags.DEFINE_integer("calibration_seed", 0, "Which training batches ranges are taken from.")
    flags.DEFINE_integer("batch_size", 8, "Batch size of the program, whose shapes are fixed.")


def main(arguments: list[str]) -> None:
    """Writes what the flags ask for; `--config.a.b=value` overrides the run's configuration."""
    overrides = [a for a in arguments[1:] if a.lstrip("-").startswith(program.OVERRIDES)]
    program.reject_rest([a for a in arguments if a not in overrides])
    check_choice("--to", FLAGS.to, TARGETS)
    workdir = program.required("workdir", FLAGS.workdir)
    folder = export.check_folder(program.required("out", FLAGS.out), "--out")
    program.at_least(1, "batch_size", FLAGS.batch_size)
    program.at_least(0, "calibration_seed", FLAGS.calibration_seed)
    setting = parse_setting(FLAGS.quant)
    use_compilation_cache()
    run = load_run(workdir)
    logger.info("step %d of %s, to %s", run.info["step"], workdir, FLAGS.to)
    run = override_run(run, overrides)
    if run.is_int8:
        raise UserError(f"{workdir} is an INT8 model already: export the run that it came from.")
    check_spec(run.model, make_spec(run.config, setting))
    TARGETS[FLAGS.to](run, setting, folder, FLAGS.batch_size, FLAGS.calibration_seed)


def write_int8(
    run: Run, setting: Setting, folder: epath.Path, batch_size: int, seed: int = 0
) -> None:
    """Calibrates a run, writes it as integers and prints how large that is.

    Args:
      run: in floating point, with the configuration to calibrate by.
      setting: bits and options, which fit the model (`check_spec`).
      folder: a new or empty one.
      batch_size: of the program.
      seed: of the calibration batches.

    Raises:
      UserError: a setting that leaves no product of integers, or data that cannot be read.
    """
    _check_integers(setting, make_spec(run.config, setting))
    evaluator = make_evaluator(run)
    model, params = evaluator.int8(setting, seed)
    integers, floats = count_products(model, params)
    logger.info("matrix products: %d of integers, %d in floating point", integers, floats)
    if not integers:
        raise _no_integers(setting)
    logger.info("writing %s", folder)
    sizes = export.export_int8(
        folder,
        model,
        params,
        run.notes,
        batch_size=batch_size,
        seq_len=run.config.data.get("seq_len"),
        float32_bytes=export.size_in_bytes(run.params),
    )
    with terminal.printing():
        print(
            f"Wrote {folder}: parameters {sizes.int8 / 1e6:.1f} MB, program {export.PROGRAM} "
            f"{sizes.program / 1e6:.1f} MB; in float32 they are {sizes.float32 / 1e6:.1f} MB "
            f"({sizes.int8 / sizes.float32:.3f} and {sizes.program / sizes.float32:.3f} of it)."
        )


TARGETS = {"int8": write_int8}


def _check_integers(setting: Setting, spec: QuantSpec) -> None:
    """Raises UserError for bits at which no product can be of integers, before any is computed."""
    if spec.site_bits:  # they may say otherwise somewhere: counted when it is done
        return
    if not all(bits and bits <= INT8_BITS for bits in (spec.weight_bits, spec.activation_bits)):
        raise _no_integers(setting)


def _no_integers(setting: Setting) -> UserError:
    return UserError(
        f"an INT8 export needs products of integers, weights and activations of at most "
        f"{INT8_BITS} bits, found none with --quant={setting.name}: use w8a8 or fewer bits, and "
        "quant.float_sites and quant.site_bits that leave some."
    )


def run() -> None:
    """The command line."""
    define_flags()
    program.run(main, unknown_prefix=program.OVERRIDES)
