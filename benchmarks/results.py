"""The table of methods: trains each with every seed, evaluates it, and writes what it found.

    python -m benchmarks.results --family=bert [--methods=vanilla,gated --seeds=0,1 --jobs=2]
        [--config.KEY=VALUE ...]

The recipe is configs/results_FAMILY.py, its variants are the methods. docs/results/FAMILY.json gets
a row for each method and training seed as soon as it is there, FAMILY.md its tables, and at the end
FAMILY.png the picture.
What the file has already is not run again (delete a row to have it anew), so that a table may be
made in several sittings; runs that were stopped go on. A file has rows of the same overrides and
calibration seeds: other ones, such as a trial of few steps, want --out=FOLDER. --jobs trains so
many at once, each on a part of the CPU's cores: small models do not fill two.
"""

import argparse
import concurrent.futures
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.results_plot import draw
from benchmarks.results_study import Study, last_line, recipe, stop
from benchmarks.results_table import judged, write_table
from quantizable_flax.config import override
from quantizable_flax.errors import UserError
from quantizable_flax.ptq.settings import make_spec, parse_setting

SETTINGS = "w8a8,w6a6,w4a8,w4a4,w8a8+smooth,w6a6+smooth,w8a8+hadamard,w6a6+hadamard"
FAMILIES = ("bert", "opt", "vit", "bert_wiki")


def shares(jobs: int) -> list[set[int] | None]:
    """The cores of each job, in parts; None for all of them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if jobs == 1 or len(cores) < jobs:
        return [None] * jobs
    return [set(cores[i::jobs]) for i in range(jobs)]


def numbers(text: str) -> list[int]:
    """Reads `0,1`."""
    return [int(part) for part in text.split(",")]


def _arguments() -> tuple[Study, list[str]]:
    """The study that is asked for, and its methods; a wrong option ends the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="bert")
    parser.add_argument("--methods", default="", help="variants of the recipe; default: all")
    parser.add_argument("--seeds", type=numbers, default=[0, 1], help="of training, as 0,1")
    parser.add_argument("--calibration_seeds", type=int, default=3)
    parser.add_argument("--quant", default=SETTINGS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default="docs/results")
    parser.add_argument("--workdirs", default="runs/results")
    options, overrides = parser.parse_known_args()
    wrong = [argument for argument in overrides if not argument.startswith("--config.")]
    known = list(recipe(options.family).VARIANTS)
    methods = [name for name in options.methods.split(",") if name] or known
    wrong += sorted(set(methods) - set(known))
    if wrong:
        parser.error(f"unknown: {', '.join(wrong)}; methods are {', '.join(known)}")
    if options.jobs < 1 or options.calibration_seeds < 1:
        parser.error("--jobs and --calibration_seeds must be at least 1")
    try:
        config = override(recipe(options.family).get_config(methods[0]), overrides)
        for name in options.quant.split(","):
            make_spec(config, parse_setting(name))
        return Study(options, overrides), methods
    except UserError as error:
        parser.error(str(error))


def main() -> None:
    """Runs what is missing, and says what failed."""
    study, methods = _arguments()
    options = study.options
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    missing = study.missing(methods)
    kept = len(methods) * len(options.seeds) - len(missing)
    if kept:
        print(f"{kept} rows are in {study.file} already and stay: delete one to have it anew")
    free: queue.Queue[set[int] | None] = queue.Queue()
    for share in shares(options.jobs):
        free.put(share)

    def one(pair: tuple[str, int]) -> str | None:
        share = free.get()
        try:
            study.run(*pair, share)
            print(f"{pair[0]}, seed {pair[1]}: done", flush=True)
        except subprocess.CalledProcessError as error:
            log = study.folder(*pair).with_suffix(".log")
            command = Path(error.cmd[1]).name
            return f"{pair[0]}, seed {pair[1]}: {command} failed: {last_line(log)} ({log})"
        finally:
            free.put(share)
        return None

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        failed = [text for text in pool.map(one, missing) if text]
    if study.rows:
        write_table(study.file)
        draw(study.rows, judged(study.rows), study.file.with_suffix(".png"))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
