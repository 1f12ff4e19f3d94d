"""The runs of one family's table: trains and evaluates each, and keeps its row."""

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax

from benchmarks.results_table import read_rows, settings_of, write_table
from quantizable_flax.errors import UserError

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
RUNNING: set[subprocess.Popen] = set()
STOPPED = threading.Event()


class Study:
    """The runs of one family, and the file of their rows."""

    def __init__(self, options: argparse.Namespace, overrides: list[str]):
        """Reads the rows that are there.

        Raises:
          UserError: they are no rows, or of other overrides, calibration seeds or settings.
        """
        self.options, self.overrides = options, overrides
        self.file = Path(options.out) / f"{options.family}.json"
        self._lock = threading.Lock()
        self.rows: list[Row] = read_rows(self.file) if self.file.exists() else []
        self._check_alike()

    def _check_alike(self) -> None:
        """Raises UserError unless rows that are there stand in one table with ours."""
        ours = {
            "overrides": self.overrides,
            "calibration_seeds": self.options.calibration_seeds,
        }
        for row in self.rows:
            for key, value in ours.items():
                if row[key] != value:
                    raise UserError(
                        f"{self.file} has rows with {key} {row[key]}, found {value}: give "
                        "--out=FOLDER for a table of its own."
                    )
        known, asked = settings_of(self.rows), self.options.quant.split(",")
        if self.rows and not set(known) & set(asked):
            raise UserError(
                f"{self.file} has rows with {', '.join(known)}, none of which is among "
                f"--quant={self.options.quant}: give one of them, or --out=FOLDER."
            )

    def missing(self, methods: list[str]) -> list[tuple[str, int]]:
        """Which methods and training seeds have no row yet, seed by seed."""
        known = {(row["method"], row["seed"]) for row in self.rows}
        wanted = [(method, seed) for seed in self.options.seeds for method in methods]
        return [pair for pair in wanted if pair not in known]

    def folder(self, method: str, seed: int) -> Path:
        """The workdir of a run; its log and row lie beside it.

        Overrides have one of their own: no run goes on with what another configuration trained.
        """
        name = f"{method}-{seed}"
        if self.overrides:
            name += "-" + hashlib.sha256("\n".join(self.overrides).encode()).hexdigest()[:8]
        return Path(self.options.workdirs) / self.options.family / name

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


def stop(number: int, frame: Any) -> None:
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
