"""eval.py: tables, reports, sensitivity and INT8 exports of runs."""

import contextlib
import logging

import jax
from absl import flags

from quantizable_flax.checkpoint.export import check_folder
from quantizable_flax.checkpoint.load import Run, load_run, override_run, row_names
from quantizable_flax.checkpoint.logged import history
from quantizable_flax.cli import export, program
from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.evaluation import tables
from quantizable_flax.evaluation.rows import result_row
from quantizable_flax.evaluation.study import make_evaluator
from quantizable_flax.ptq.settings import Setting, check_setting, parse_settings
from quantizable_flax.quantization.spec import BACKENDS
from quantizable_flax.report.report import report, sensitivity_report
from quantizable_flax.report.subject import Subject, make_subject
from quantizable_flax.runtime import hosts
from quantizable_flax.runtime.compilation_cache import use_compilation_cache

logger = logging.getLogger("quantizable_flax.eval")

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help shows them as those of the program


def define_flags() -> None:
    """Declares the flags; not on import, for programs have flags of the same names."""
    flags.DEFINE_multi_string(
        "workdir",
        [],
        "A run to evaluate, or the folder of a published model (hf:org/name: of the hub); give it "
        "several times.",
    )
    flags.DEFINE_list(
        "quant",
        ["w8a8"],
        "Settings, e.g. w8a8,w6a6,w4a8+mse,w8,a8,w8a8+token,w8a8+smooth=0.5; none for floating "
        "point only. What all of them share is set by --config.quant.KEY=VALUE.",
    )
    flags.DEFINE_string(
        "backend", "simulated", "simulated in float32, or int8: products of integers."
    )
    flags.DEFINE_integer(
        "calibration_seeds",
        3,
        "Calibrate this many times on other batches, for mean and deviation.",
    )
    flags.DEFINE_bool(
        "sensitivity",
        False,
        "Instead rank the sites by what each costs when it alone is quantized.",
    )
    flags.DEFINE_string(
        "export_int8",
        None,
        "Instead write an INT8 checkpoint and a StableHLO program to this folder, as "
        "quantizable_flax.export does, which has more options.",
    )
    flags.DEFINE_integer("export_batch_size", 8, "Batch size of that program.")
    flags.DEFINE_string("json", None, "Also write the rows to this JSON file.")
    flags.DEFINE_string(
        "report",
        None,
        "Also write an HTML report with pictures of the activations, for which every model is "
        "looked at for half a minute or so more.",
    )
    flags.DEFINE_string("markdown", None, "Also write the table to this Markdown file.")
    hosts.define_flags()


def main(arguments: list[str]) -> None:
    """Prints one table of all workdirs; `--config.a.b=value` overrides each run's configuration."""
    overrides = [a for a in arguments[1:] if a.lstrip("-").startswith(program.OVERRIDES)]
    program.reject_rest([a for a in arguments if a not in overrides])
    workdirs = program.required("workdir", FLAGS.workdir)
    settings = parse_settings(FLAGS.quant)
    check_choice("--backend", FLAGS.backend, BACKENDS)
    program.at_least(1, "calibration_seeds", FLAGS.calibration_seeds)
    tables.check_outputs(FLAGS.json, FLAGS.markdown, FLAGS.report)  # before minutes are spent
    use_compilation_cache()
    with hosts.joined():
        _run(workdirs, settings, overrides)


def _run(workdirs: list[str], settings: list[Setting], overrides: list[str]) -> None:
    runs = {workdir: load_run(workdir) for workdir in workdirs}
    for workdir in workdirs:  # every mistake shows before the first minute is spent
        run = runs[workdir] = override_run(runs[workdir], overrides)
        if run.is_int8 and (settings or FLAGS.sensitivity or FLAGS.export_int8):
            raise UserError(f"{workdir} is an INT8 model already: evaluate it with --quant=none.")
        for setting in settings:
            check_setting(run.model, run.config, setting)
    if FLAGS.export_int8 or FLAGS.sensitivity:
        run, setting = _one(
            "--export_int8" if FLAGS.export_int8 else "--sensitivity", runs, settings
        )
        if FLAGS.export_int8:
            given = setting if FLAGS["quant"].present else export.default_setting(run)
            _export(run, given, FLAGS.export_int8)
        else:
            _rank(run, setting)
    else:
        _evaluate(runs, settings)


def _evaluate(runs: dict[str, Run], settings: list[Setting]) -> None:
    rows, columns = [], [setting.name for setting in settings]
    subjects: list[Subject] = []
    for name, (workdir, run) in zip(row_names(runs), runs.items(), strict=True):
        logger.info("%s: step %d of %s", name, run.info["step"], workdir)
        evaluator = make_evaluator(run)
        row = result_row(
            name,
            run.config,
            evaluator,
            settings,
            FLAGS.calibration_seeds,
            run.info,
            FLAGS.backend,
        )
        rows.append(row)
        if FLAGS.report and hosts.is_first():
            logged = history(workdir, evaluator.metric.name)
            subjects.append(make_subject(evaluator, row, settings, logged))
    if not hosts.is_first():
        return
    with contextlib.ExitStack() as outputs:  # from the last to the first, whichever fails
        outputs.callback(tables.print_table, rows, columns)
        if FLAGS.report:
            outputs.callback(_write_report, subjects, columns, FLAGS.report)
        if FLAGS.markdown:
            outputs.callback(tables.write_text, tables.markdown(rows, columns), FLAGS.markdown)
        if FLAGS.json:
            outputs.callback(tables.write_json, rows, FLAGS.json)


def _write_report(subjects: list[Subject], columns: list[str], path: str) -> None:
    tables.write_text(report(subjects, columns), path)


def _rank(run: Run, setting: Setting) -> None:
    evaluator = make_evaluator(run)
    costs, unit = evaluator.sensitivity(setting), evaluator.metric.sensitivity_label
    if not hosts.is_first():
        return
    name = run.config.name or run.config.model.name
    with contextlib.ExitStack() as outputs:
        outputs.callback(tables.print_costs, costs, unit)
        if FLAGS.report:
            page = sensitivity_report(name, setting.name, costs, unit)
            outputs.callback(tables.write_text, page, FLAGS.report)
        if FLAGS.json:
            outputs.callback(tables.write_json, [cost._asdict() for cost in costs], FLAGS.json)


def _export(run: Run, setting: Setting, path: str) -> None:
    if jax.process_count() > 1:
        raise UserError(
            f"--export_int8 is the work of one process, found {jax.process_count()}: run it on one "
            "host with --num_processes=1."
        )
    program.at_least(1, "export_batch_size", FLAGS.export_batch_size)
    folder = check_folder(path, "--export_int8")
    export.write_int8(run, setting, folder, FLAGS.export_batch_size)


def _one(flag: str, runs: dict[str, Run], settings: list[Setting]) -> tuple[Run, Setting]:
    if len(runs) != 1 or len(settings) != 1:
        raise UserError(
            f"{flag} takes one --workdir and one --quant setting, found {len(runs)} and "
            f"{len(settings)}."
        )
    return next(iter(runs.values())), settings[0]


def run() -> None:
    """The command line."""
    define_flags()
    program.run(main, unknown_prefix=program.OVERRIDES)
