"""Evaluates runs: python eval.py --workdir=RUN [--workdir=RUN2 ...] --quant=w8a8,w6a6+mse."""

import contextlib
import logging

import jax
from absl import flags

from quantizable_flax import cli, exporting, terminal
from quantizable_flax.analysis import tables
from quantizable_flax.analysis.report import Subject, report, sensitivity_report
from quantizable_flax.compilation_cache import use_compilation_cache
from quantizable_flax.data import make_task
from quantizable_flax.errors import UserError, check_choice
from quantizable_flax.evaluator import Evaluator, result_row
from quantizable_flax.loading import Run, load_run, override_run, row_names, validation_history
from quantizable_flax.ptq.settings import Setting, check_spec, make_spec, parse_setting
from quantizable_flax.quantization.spec import BACKENDS
from quantizable_flax.training import distributed

logger = logging.getLogger("quantizable_flax.eval")

WORKDIR = flags.DEFINE_multi_string("workdir", [], "A run to evaluate; give it several times.")
QUANT = flags.DEFINE_list(
    "quant",
    ["w8a8"],
    "Settings, e.g. w8a8,w6a6,w4a8+mse,w8,a8,w8a8+token,w8a8+smooth=0.5; none for floating point "
    "only. --quant.KEY=VALUE is short for --config.quant.KEY=VALUE.",
)
BACKEND = flags.DEFINE_string(
    "backend", "simulated", "simulated in float32, or int8: products of integers through AQT."
)
SEEDS = flags.DEFINE_integer(
    "calibration_seeds", 3, "Calibrate this many times on other batches, for mean and deviation."
)
SENSITIVITY = flags.DEFINE_bool(
    "sensitivity", False, "Instead rank the sites by what each costs when it alone is quantized."
)
EXPORT = flags.DEFINE_string(
    "export_int8", None, "Instead write an INT8 checkpoint and a StableHLO program to this folder."
)
EXPORT_BATCH = flags.DEFINE_integer("export_batch_size", 8, "Batch size of that program.")
JSON = flags.DEFINE_string("json", None, "Also write the rows to this JSON file.")
REPORT = flags.DEFINE_string("report", None, "Also write an HTML report with pictures.")
MARKDOWN = flags.DEFINE_string("markdown", None, "Also write the table to this Markdown file.")
distributed.define_flags()


def main(arguments: list[str]) -> None:
    """Prints one table of all workdirs; `--config.a.b=value` overrides each run's configuration."""
    overrides = [a for a in arguments[1:] if a.lstrip("-").startswith(cli.OVERRIDES)]
    cli.reject_rest([a for a in arguments if a not in overrides])
    workdirs = cli.required("workdir", WORKDIR.value)
    settings = [] if QUANT.value == ["none"] else [parse_setting(name) for name in QUANT.value]
    check_choice("--backend", BACKEND.value, BACKENDS)
    if SEEDS.value < 1:
        raise UserError(f"--calibration_seeds must be at least 1, found {SEEDS.value}.")
    use_compilation_cache()
    with distributed.joined():
        _run(workdirs, settings, overrides)


def _run(workdirs: list[str], settings: list[Setting], overrides: list[str]) -> None:
    runs = {workdir: load_run(workdir) for workdir in workdirs}
    for workdir, run in runs.items():  # every mistake shows before the first minute is spent
        override_run(run, overrides)
        if run.is_int8 and (settings or SENSITIVITY.value or EXPORT.value):
            raise UserError(f"{workdir} is an INT8 model already: evaluate it with --quant=none.")
        for setting in settings:
            check_spec(run.model, make_spec(run.config, setting))
    if EXPORT.value or SENSITIVITY.value:
        run, setting = _one("--export_int8" if EXPORT.value else "--sensitivity", runs, settings)
        if EXPORT.value:
            _export(run, setting, EXPORT.value)
        else:
            _rank(run, setting)
    else:
        _evaluate(runs, settings)


def _evaluate(runs: dict[str, Run], settings: list[Setting]) -> None:
    subjects, columns = [], [setting.name for setting in settings]
    for name, (workdir, run) in zip(row_names(runs), runs.items(), strict=True):
        logger.info("%s: step %d of %s", name, run.info["step"], workdir)
        evaluator = _evaluator(run)
        row = result_row(
            name, run.config, evaluator, settings, SEEDS.value, run.info, BACKEND.value
        )
        history = validation_history(workdir, evaluator.metric.name)
        subjects.append(Subject(row, evaluator.fp.sites, history))
    if not distributed.is_first():
        return
    rows = [subject.row for subject in subjects]
    with contextlib.ExitStack() as outputs:  # from the last to the first, whichever fails
        outputs.callback(tables.print_table, rows, columns)
        if REPORT.value:
            outputs.callback(_write_report, subjects, columns, REPORT.value)
        if MARKDOWN.value:
            outputs.callback(tables.write_text, tables.markdown(rows, columns), MARKDOWN.value)
        if JSON.value:
            outputs.callback(tables.write_json, rows, JSON.value)


def _write_report(subjects: list[Subject], columns: list[str], path: str) -> None:
    tables.write_text(report(subjects, columns), path)


def _rank(run: Run, setting: Setting) -> None:
    costs = _evaluator(run).sensitivity(setting)
    if not distributed.is_first():
        return
    name = run.config.name or run.config.model.name
    with contextlib.ExitStack() as outputs:
        outputs.callback(tables.print_costs, costs)
        if REPORT.value:
            page = sensitivity_report(name, setting.name, costs)
            outputs.callback(tables.write_text, page, REPORT.value)
        if JSON.value:
            outputs.callback(tables.write_json, [cost._asdict() for cost in costs], JSON.value)


def _export(run: Run, setting: Setting, path: str) -> None:
    if jax.process_count() > 1:
        raise UserError(
            f"--export_int8 is the work of one process, found {jax.process_count()}: run it on one "
            "host with --num_processes=1."
        )
    folder = exporting.check_folder(path)
    if EXPORT_BATCH.value < 1:
        raise UserError(f"--export_batch_size must be at least 1, found {EXPORT_BATCH.value}.")
    sizes = exporting.export_int8(
        folder,
        *_evaluator(run).int8(setting),
        run.notes,
        batch_size=EXPORT_BATCH.value,
        seq_len=run.config.data.get("seq_len"),
        float32_bytes=exporting.size_in_bytes(run.params),
    )
    with terminal.printing():
        print(
            f"Wrote {folder}: parameters {sizes.int8 / 1e6:.1f} MB, program {exporting.PROGRAM} "
            f"{sizes.program / 1e6:.1f} MB; in float32 they are {sizes.float32 / 1e6:.1f} MB "
            f"({sizes.int8 / sizes.float32:.3f} and {sizes.program / sizes.float32:.3f} of it)."
        )


def _one(flag: str, runs: dict[str, Run], settings: list[Setting]) -> tuple[Run, Setting]:
    if len(runs) != 1 or len(settings) != 1:
        raise UserError(
            f"{flag} takes one --workdir and one --quant setting, found {len(runs)} and "
            f"{len(settings)}."
        )
    return next(iter(runs.values())), settings[0]


def _evaluator(run: Run) -> Evaluator:
    return Evaluator(run, make_task(run.config, run.assets))


if __name__ == "__main__":
    cli.run(main, unknown_prefix=cli.OVERRIDES)
