"""The table of methods: trains each with every seed, evaluates it, and writes what it found.

    python -m benchmarks.results --family=bert [--methods=vanilla,gated --seeds=0,1 --jobs=2]
        [--config.KEY=VALUE ...]

The recipe is configs/results_FAMILY.py, its variants are the methods. docs/results/FAMILY.json gets
a row for each method and training seed as soon as it is there, FAMILY.md the table over seeds, and
at the end FAMILY.png the picture.
What the file has already is not run again (delete a row to have it anew), so that a table may be
made in several sittings; runs that were stopped go on. --jobs trains so many at once, each on a
part of the CPU's cores: small models do not fill two.
"""

import argparse
import concurrent.futures
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax

from benchmarks.results_plot import draw
from benchmarks.results_table import judged, write_table
from quantizable_flax.errors import UserError
from quantizable_flax.ptq.settings import make_spec, parse_setting

ROOT = Path(__file__).parents[1]
SETTINGS = "w8a8,w6a6,w4a8,w4a4,w8a8+smooth,w6a6+smooth,w8a8+hadamard,w6a6+hadamard"
FAMILIES = ("bert", "opt", "vit", "bert_wiki")
Row = dict[str, Any]


class Study:
    """The runs of one family, and the file of their rows."""

    def __init__(self, options: argparse.Namespace, overrides: list[str]):
        """Reads the rows that are there."""
        self.options, self.overrides = options, overrides
        self.file = Path(options.out) / f"{options.family}.json"
        self._lock = threading.Lock()
        self.rows: list[Row] = json.loads(self.file.read_text()) if self.file.exists() else []

    def missing(self, methods: list[str]) -> list[tuple[str, int]]:
        """Which methods and training seeds have no row yet, seed by seed."""
        known = {(row["method"], row["seed"]) for row in self.rows}
        wanted = [(method, seed) for seed in self.options.seeds for method in methods]
        return [pair for pair in wanted if pair not in known]

    def folder(self, method: str, seed: int) -> Path:
        """The workdir of a run; its log and row lie beside it."""
        return Path(self.options.workdirs) / self.options.family / f"{method}-{seed}"

    def settings(self, method: str) -> str:
        """What a method is evaluated in: SmoothQuant needs a scale for each channel."""
        config = recipe(self.options.family).get_config(method)
        wanted = self.options.quant.split(",")
        single = config.model.norm == "rms_norm_single"
        return ",".join(name for name in wanted if not (single and "+smooth" in name))

    def run(self, method: str, seed: int, cores: set[int] | None) -> None:
        """Trains and evaluates one model, and keeps its row."""
        folder = self.folder(method, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = f"configs/results_{self.options.family}.py:{method}"
        given = [f"--config.seed={seed}", *self.overrides]
        found = folder.with_suffix(".json")
        commands = [
            ["train.py", f"--config={file}", f"--workdir={folder}", *given],
            ["eval.py", f"--workdir={folder}", f"--quant={self.settings(method)}",
             f"--json={found}", f"--calibration_seeds={self.options.calibration_seeds}"],
        ]  # fmt: skip
        with open(folder.with_suffix(".log"), "a") as log:
            for command in commands:
                _call([sys.executable, *command], log, cores)
        (row,) = json.loads(found.read_text())
        self._keep({"method": method, "seed": seed, **self._made_by(), **row})

    def _made_by(self) -> Row:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
        return {
            "calibration_seeds": self.options.calibration_seeds,
            "overrides": self.overrides,
            "device": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
            "jax": jax.__version__,
            "commit": commit.stdout.strip() or None,
        }

    def _keep(self, row: Row) -> None:
        with self._lock:
            self.rows = sorted([*self.rows, row], key=lambda row: (row["seed"], row["method"]))
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.rows, indent=1) + "\n")
            part.replace(self.file)
            write_table(self.file)


def recipe(family: str) -> Any:
    """The module of a family's recipe."""
    return importlib.import_module(f"configs.results_{family}")


RUNNING: set[subprocess.Popen] = set()
STOPPED = threading.Event()


def _call(command: list[str], log: Any, cores: set[int] | None) -> None:
    """Runs a command of the checkout on some of the cores; raises CalledProcessError."""
    if STOPPED.is_set():  # the next one would outlive us
        raise subprocess.CalledProcessError(128, command)
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    RUNNING.add(process)
    if cores is not None:
        os.sched_setaffinity(process.pid, cores)
    code = process.wait()
    RUNNING.discard(process)
    if code:
        raise subprocess.CalledProcessError(code, command)


def _stop(number: int, frame: Any) -> None:
    """Takes what runs along: its locks would refuse the next try."""
    STOPPED.set()
    for process in list(RUNNING):
        process.terminate()
    for process in list(RUNNING):
        process.wait()
    os._exit(128 + number)


def last_line(file: Path) -> str:
    """Of a log: why a command failed."""
    lines = file.read_text(errors="replace").split("\n") if file.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it says nothing")


def shares(jobs: int) -> list[set[int] | None]:
    """The cores of each job, in parts; None for all of them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if jobs == 1 or len(cores) < jobs:
        return [None] * jobs
    return [set(cores[i::jobs]) for i in range(jobs)]


def numbers(text: str) -> list[int]:
    """Reads `0,1`."""
    return [int(part) for part in text.split(",")]


def _arguments() -> tuple[argparse.Namespace, list[str], list[str]]:
    """The options, overrides of configurations, and methods; a wrong one ends the program."""
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
        for name in options.quant.split(","):
            make_spec(recipe(options.family).get_config(), parse_setting(name))
    except UserError as error:
        parser.error(str(error))
    return options, overrides, methods


def main() -> None:
    """Runs what is missing, and says what failed."""
    options, overrides, methods = _arguments()
    signal.signal(signal.SIGTERM, _stop)
    study = Study(options, overrides)
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
