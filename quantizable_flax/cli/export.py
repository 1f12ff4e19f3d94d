"""quantizable_flax.export: a trained run as a model to take away."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from absl import flags
from etils import epath

from quantizable_flax.checkpoint import export
from quantizable_flax.checkpoint.load import Run, load_run, override_run
from quantizable_flax.cli import program
from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.evaluation.study import make_evaluator
from quantizable_flax.onnx.opsets import LEAST, check_opset
from quantizable_flax.pretrained.write import to_huggingface
from quantizable_flax.ptq.int8 import count_products, size_in_bytes
from quantizable_flax.ptq.settings import Setting, check_setting, make_spec, parse_setting
from quantizable_flax.ptq.trained import learns_ranges
from quantizable_flax.quantization.learned import without_grids
from quantizable_flax.quantization.spec import INT8_BITS, QuantSpec
from quantizable_flax.runtime import terminal
from quantizable_flax.runtime.compilation_cache import use_compilation_cache

logger = logging.getLogger("quantizable_flax.export")

FLAGS = flags.FLAGS
NO_QUANT = "none"  # as eval.py has it
# How the overrides begin that a model in floating point looks at.
FLOAT_KEYS = ("config.data.eval_crop", "config.model.attention.")
flags.disclaim_key_flags()  # --help shows them as those of the program


def define_flags() -> None:
    """Declares the flags; not on import, for programs have flags of the same names."""
    flags.DEFINE_string("workdir", None, "The run to export, or the folder of one of its steps.")
    flags.DEFINE_string(
        "to",
        "int8",
        "What to write; int8: an Orbax checkpoint of integers, and a StableHLO program beside it; "
        "huggingface: a folder of transformers (config.json, model.safetensors, tokenizer.json); "
        "onnx: model.onnx, with explicit grids and integer weights, for ONNX Runtime and others.",
    )
    flags.DEFINE_string("out", None, "The folder to write, new or empty.")
    flags.DEFINE_string(
        "quant",
        None,
        "Of int8 and onnx: bits and options, as of eval.py: w8a8, w4a8+mse, w8a8+smooth=0.5; by "
        "default what the run was trained in, else w8a8; of onnx also none, for floating point. "
        "The rest of the scheme is set by --config.quant.KEY=VALUE.",
    )
    flags.DEFINE_integer(
        "calibration_seed",
        0,
        "Of int8 and onnx: which training batches ranges are taken from.",
    )
    flags.DEFINE_integer(
        "batch_size", 8, "Of int8: batch size of the program, whose shapes are fixed."
    )
    flags.DEFINE_integer(
        "opset", LEAST, "Of onnx: opset of the ONNX standard; more than 8 bits need 21."
    )


def main(arguments: list[str]) -> None:
    """Writes what the flags ask for; `--config.a.b=value` overrides the run's configuration."""
    overrides = [a for a in arguments[1:] if a.lstrip("-").startswith(program.OVERRIDES)]
    program.reject_rest([a for a in arguments if a not in overrides])
    check_choice("--to", FLAGS.to, TARGETS)
    workdir = program.required("workdir", FLAGS.workdir)
    folder = export.check_folder(program.required("out", FLAGS.out), "--out")
    target = _target()
    _check_given(target, overrides)
    write = target.prepare()
    use_compilation_cache()
    run = load_run(workdir)
    logger.info("step %d of %s, to %s", run.info["step"], workdir, FLAGS.to)
    run = override_run(run, overrides)
    if run.is_int8:
        raise UserError(f"{workdir} is an INT8 model already: export the run that it came from.")
    write(run, folder)


def _target() -> "Target":
    """What the flags name: of ONNX in floating point, less is asked than of its integers."""
    target = TARGETS[FLAGS.to]
    if FLAGS.to == "onnx" and FLAGS.quant == NO_QUANT:
        return target._replace(flags=("quant", "opset"), keys=FLOAT_KEYS)
    return target


def _check_given(target: "Target", overrides: list[str]) -> None:
    """Raises UserError for a flag or a key that the target would not look at."""
    others = {name for other in TARGETS.values() for name in other.flags} - set(target.flags)
    given = [f"--{name}" for name in sorted(others) if FLAGS[name].present]
    for override in overrides:
        name = override.lstrip("-")
        if not name.startswith(target.keys):
            given.append(f"--{name.partition('=')[0]}")
    if given:
        asked = f"--to={FLAGS.to}" + (f" --quant={FLAGS.quant}" if FLAGS.quant else "")
        raise UserError(f"{given[0]} is of another target, found it with {asked}: leave it out.")


def _int8() -> "Write":
    """Checks the flags of int8, and returns what writes it."""
    program.at_least(1, "batch_size", FLAGS.batch_size)
    program.at_least(0, "calibration_seed", FLAGS.calibration_seed)
    if FLAGS.quant == NO_QUANT:
        raise UserError(
            f"--to=int8 is of integers, found --quant={NO_QUANT}: in floating point there are "
            "--to=onnx and --to=huggingface."
        )
    given = None if FLAGS.quant is None else parse_setting(FLAGS.quant)

    def write(run: Run, folder: epath.Path) -> None:
        setting = given or default_setting(run)
        check_setting(run.model, run.config, setting)
        write_int8(run, setting, folder, FLAGS.batch_size, FLAGS.calibration_seed)

    return write


def default_setting(run: Run) -> Setting:
    """What an export is in if nothing else is asked for: what the run was trained in, or w8a8."""
    trained = run.trained_spec is not None
    return parse_setting(run.config.quant.train_setting if trained else "w8a8")


def write_int8(
    run: Run, setting: Setting, folder: epath.Path, batch_size: int, seed: int = 0
) -> None:
    """Calibrates a run, writes it as integers and prints how large that is.

    Args:
      run: in floating point, with the configuration to calibrate by.
      setting: bits and options, which fit the model (`check_setting`).
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


def write_huggingface(run: Run, folder: epath.Path) -> None:
    """Writes a run as transformers does, in floating point, with its tokenizer and class names.

    Args:
      run: in floating point.
      folder: a new or empty one.

    Raises:
      UserError: as `to_huggingface`.
    """
    if run.trained_spec is not None:
        logger.info("in floating point, without the grids of quant.train_setting")
    params = without_grids(run.params) if learns_ranges(run.config) else run.params
    crop = run.config.data.get("eval_crop", 1.0)
    to_huggingface(run.model, params, str(folder), assets=run.assets, eval_crop=crop)
    with terminal.printing():
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(f"Wrote {folder}: {names}; parameters {size_in_bytes(params) / 1e6:.1f} MB.")


def _onnx() -> "Write":
    """Checks the flags of onnx, and returns what writes it."""
    program.at_least(0, "calibration_seed", FLAGS.calibration_seed)
    check_opset(FLAGS.opset)
    is_float = FLAGS.quant == NO_QUANT
    given = None if FLAGS.quant is None or is_float else parse_setting(FLAGS.quant)
    # The library behind it is an extra: whoever lacks it is told before a run is read.
    from quantizable_flax.cli import export_onnx

    def write(run: Run, folder: epath.Path) -> None:
        setting = None if is_float else given or default_setting(run)
        export_onnx.write_run(run, setting, folder, FLAGS.opset, FLAGS.calibration_seed)

    return write


Write = Callable[[Run, epath.Path], None]


class Target(NamedTuple):
    """What a run can be written as.

    Attributes:
      prepare: checks the flags before anything is read, and returns what writes a run.
      flags: those that are its own.
      keys: how the overrides begin that it looks at.
    """

    prepare: Callable[[], Write]
    flags: tuple[str, ...]
    keys: tuple[str, ...]


TARGETS = {
    "int8": Target(_int8, ("quant", "calibration_seed", "batch_size"), program.OVERRIDES),
    "huggingface": Target(lambda: write_huggingface, (), FLOAT_KEYS),
    "onnx": Target(_onnx, ("quant", "calibration_seed", "opset"), program.OVERRIDES),
}


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
