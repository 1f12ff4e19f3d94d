"""quantizable_flax.inspect: where one model's outliers are, and what INT8 would cost it."""

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from quantizable_flax.checkpoint.load import Run, load_run, override_run, row_names
from quantizable_flax.checkpoint.logged import history
from quantizable_flax.cli import program
from quantizable_flax.data.tasks import make_task
from quantizable_flax.errors import UserError
from quantizable_flax.evaluation import tables
from quantizable_flax.evaluation.rows import result_row
from quantizable_flax.evaluation.study import Evaluator, make_evaluator
from quantizable_flax.ptq.settings import check_setting, parse_settings
from quantizable_flax.report.record import record
from quantizable_flax.report.report import report
from quantizable_flax.report.subject import Subject, make_subject
from quantizable_flax.report.words import headline, used
from quantizable_flax.runtime.compilation_cache import use_compilation_cache

logger = logging.getLogger("quantizable_flax.inspect")

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help shows them as those of the program

# What is looked at where nothing else is asked for, so that a minute is enough.
SEQ_LEN = 64  # tokens of an example, of a published model
EVAL_BATCHES = 2  # at most, as are those of calibration
CALIBRATION_BATCHES = 4


def define_flags() -> None:
    """Declares the flags; not on import, for programs have flags of the same names."""
    flags.DEFINE_multi_string(
        "workdir",
        None,
        "The run to look into, or the folder of a published model (hf:org/name: of the hub).",
    )
    flags.DEFINE_list("quant", ["w8a8", "w8a8+channel"], "Settings to cost, as of eval.py.")
    flags.DEFINE_string(
        "report", None, "The HTML file to write, by default WORKDIR.html in the current folder."
    )
    flags.DEFINE_string("json", None, "Also write the figures to this JSON file.")


def main(arguments: list[str]) -> None:
    """Writes the report of one model; `--config.a.b=value` overrides its configuration."""
    began = time.monotonic()
    overrides = [a for a in arguments[1:] if a.lstrip("-").startswith(program.OVERRIDES)]
    program.reject_rest([a for a in arguments if a not in overrides])
    workdir = _one(program.required("workdir", FLAGS.workdir))
    settings = parse_settings(program.required("quant", FLAGS.quant))
    tables.check_outputs(FLAGS.json, FLAGS.report)  # before a minute is spent
    use_compilation_cache()
    run = load_run(workdir)
    if run.is_int8:
        raise UserError(f"{workdir} is an INT8 model already: look into the run that it came from.")
    run = override_run(run, overrides)
    for setting in settings:
        check_setting(run.model, run.config, setting)
    (name,) = row_names({workdir: run})
    page = FLAGS.report or f"{_stem(workdir, name)}.html"
    tables.check_outputs(FLAGS.json, page)
    evaluator = _evaluator(run, overrides)
    row = result_row(name, run.config, evaluator, settings, 1, run.info)
    logged = history(workdir, evaluator.metric.name)
    subject = make_subject(evaluator, row, settings, logged)
    _write(subject, [s.name for s in settings], evaluator, page, began)


def _one(workdirs: Sequence[str]) -> str:
    if len(workdirs) > 1:
        raise UserError(
            f"inspect looks into one model, found --workdir {len(workdirs)} times: eval.py "
            "--report=FILE shows several side by side."
        )
    return workdirs[0]


def _stem(workdir: str, name: str) -> str:
    """Of the page's file: the folder's name, for the runs of a recipe share the row's."""
    folder = Path(workdir).name
    return Path(name).name if folder.isdigit() or not folder else folder  # a checkpoint is a step


def _evaluator(run: Run, overrides: Sequence[str]) -> Evaluator:
    """On as much of the data as tells something, unless the overrides say how much."""
    given = {argument.lstrip("-").partition("=")[0] for argument in overrides}
    config = run.config
    if "published" in run.info and "seq_len" in config.data and "config.data.seq_len" not in given:
        config.data.seq_len = min(SEQ_LEN, config.model.max_position_embeddings)
    task = make_task(config, run.assets)
    if "config.eval.batches" not in given:
        known = -(-len(task.source("validation")) // config.eval.batch_size)
        config.eval.batches = min(EVAL_BATCHES, known)
    if "config.quant.calibration_batches" not in given:
        known = len(task.source("train")) // config.quant.calibration_batch_size
        # One that is not there is told of by who asks for it.
        config.quant.calibration_batches = max(1, min(CALIBRATION_BATCHES, known))
    return make_evaluator(run, task)


def _write(
    subject: Subject, settings: list[str], evaluator: Evaluator, page: str, began: float
) -> None:
    """Prints the findings and the table, and writes the files; whichever fails, the others are."""
    found = headline(subject, settings)
    title = f"{subject.name}: where its outliers are"
    if settings:
        title += ", and what INT8 would cost"
    lead = [*found, used(subject, evaluator.config)]
    seconds = time.monotonic() - began
    with contextlib.ExitStack() as outputs:
        outputs.callback(tables.print_text, f"Wrote {page}, {seconds:.0f} s.")
        outputs.callback(tables.print_table, [subject.row], settings)
        outputs.callback(tables.print_findings, found)
        text = report([subject], settings, title=title, lead=lead)
        outputs.callback(tables.write_text, text, page)
        if FLAGS.json:
            content = json.dumps(record(subject), indent=2) + "\n"
            outputs.callback(tables.write_text, content, FLAGS.json)


def run() -> None:
    """The command line."""
    define_flags()
    program.run(main, unknown_prefix=program.OVERRIDES)
