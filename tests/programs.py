"""The command lines, each in a process of its own that need not import everything again."""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A process that has imported what the programs import, without any device, forks for each call.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [f"quantizable_flax.{name}" for name in ("cli.eval", "cli.train", "models.generation")]
)
TIMEOUT = 300.0  # seconds


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `python PROGRAM ARGUMENTS` at the root, or `python -m MODULE` for a name without .py."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        command = [program, *map(str, arguments)]
        process = _SERVER.Process(target=_main, args=(command, str(out), str(err)))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
        status = process.exitcode
        return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())


def assert_mistake(done: subprocess.CompletedProcess, *parts: str) -> None:
    """One sentence on stderr's last line, no stack trace, exit status 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last


def _main(command: list[str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Whoever was imported has kept these.
    for name, number in (("stdout", 1), ("stderr", 2)):
        getattr(sys, name).reconfigure(line_buffering=True)
        assert getattr(sys, name).fileno() == number
    os.chdir(ROOT)
    sys.argv = command
    program = command[0]
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(atexit._run_exitfuncs)
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
