"""Evaluates runs: python eval.py --workdir=RUN [--workdir=RUN2 ...] --quant=w8a8."""

import logging

from absl import flags

from quantizable_flax import cli
from quantizable_flax.analysis import tables
from quantizable_flax.analysis.report import Subject, report
from quantizable_flax.data import make_task
from quantizable_flax.errors import UserError
from quantizable_flax.evaluator import Evaluator, make_spec, result_row
from quantizable_flax.loading import load_run, override_run, row_names, validation_history
from quantizable_flax.models.registry import with_quant

logger = logging.getLogger("quantizable_flax.eval")

WORKDIR = flags.DEFINE_multi_string("workdir", [], "A run to evaluate; give it several times.")
QUANT = flags.DEFINE_list(
    "quant", ["w8a8"], "Bit settings, e.g. w8a8,w6a6,w4a8,w8,a8; none for floating point only."
)
SEEDS = flags.DEFINE_integer(
    "calibration_seeds", 3, "Calibrate this many times on other batches, for mean and deviation."
)
JSON = flags.DEFINE_string("json", None, "Also write the rows to this JSON file.")
REPORT = flags.DEFINE_string("report", None, "Also write an HTML report with pictures.")
MARKDOWN = flags.DEFINE_string("markdown", None, "Also write the table to this Markdown file.")


def main(arguments: list[str]) -> None:
    """Prints one table of all workdirs; `--config.a.b=value` overrides each run's configuration."""
    overrides = [a for a in arguments[1:] if a.lstrip("-").startswith("config.")]
    cli.reject_rest([a for a in arguments if a not in overrides])
    workdirs = cli.required("workdir", WORKDIR.value)
    bits = [] if QUANT.value == ["none"] else QUANT.value
    if SEEDS.value < 1:
        raise UserError(f"--calibration_seeds must be at least 1, found {SEEDS.value}.")
    runs = {workdir: load_run(workdir) for workdir in workdirs}
    for run in runs.values():  # every mistake shows before the first minute is spent
        override_run(run, overrides)
        for setting in bits:
            with_quant(run.model, make_spec(run.config, setting))
    subjects = []
    for name, (workdir, run) in zip(row_names(runs), runs.items(), strict=True):
        logger.info("%s: step %d of %s", name, run.info["step"], workdir)
        config = run.config
        evaluator = Evaluator(config, run.model, run.params, make_task(config, run.assets))
        row = result_row(name, config, evaluator, bits, SEEDS.value, run.info)
        history = validation_history(workdir, evaluator.metric.name)
        subjects.append(Subject(row, evaluator.fp.sites, history))
    rows = [subject.row for subject in subjects]
    tables.print_table(rows, bits)
    if JSON.value:
        tables.write_json(rows, JSON.value)
    if MARKDOWN.value:
        tables.write_text(tables.markdown(rows, bits), MARKDOWN.value)
    if REPORT.value:
        tables.write_text(report(subjects, bits), REPORT.value)


if __name__ == "__main__":
    cli.run(main, unknown_prefix="config.")
