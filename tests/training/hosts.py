"""Several local processes as the hosts of one run, joined over the loopback network."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """What is left of a process."""

    status: int
    stderr: str
    stdout: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many virtual CPU devices."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}


def slurm_variables(count: int, index: int, port: int) -> dict[str, str]:
    """What `srun` sets, as far as JAX reads it."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }


def arrays(workdir: Path, step: int) -> dict[str, Any]:
    """What a checkpoint of any number of hosts holds, as NumPy arrays, read by Orbax alone."""

    def read(name: str) -> Any:
        folder = Path(workdir) / "checkpoints" / str(step) / name
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(folder).item_metadata.tree
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return reader.restore(folder, restore_args=plain)

    return {name: read(name) for name in ("params", "opt_state")}


class Hosts:
    """The processes of one command, each with its own output files in a folder."""

    def __init__(
        self,
        folder: Path,
        count: int,
        *command: str,
        each: Callable[[int], list[str]] = lambda index: [],
        devices: int = 1,
        joining: str = "flags",
    ):
        """Starts them.

        Args:
          folder: for their output.
          count: of processes.
          command: a Python program or `-m MODULE`, and its flags.
          each: further flags of each process.
          devices: of each process.
          joining: how they learn of each other: by "flags", by the variables of "slurm", or
            "not" at all, but by what `command` and `each` say.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.processes = folder, []
        port = free_port()
        for index in range(count):
            named = [
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={index}",
            ]
            named = named if joining == "flags" else []
            variables = slurm_variables(count, index, port) if joining == "slurm" else {}
            with self._file(index, "err").open("w") as err, self._file(index, "out").open("w") as o:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *each(index), *named],
                        cwd=ROOT,
                        env=with_devices(devices) | variables,
                        stdout=o,
                        stderr=err,
                    )
                )

    def _file(self, index: int, stream: str) -> Path:
        return self._folder / f"{index}.{stream}"

    def wait(self, timeout: float = 180) -> list[Ended]:
        """Waits for all of them; kills what is left after `timeout` seconds."""
        end = time.monotonic() + timeout
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        self.kill()
        return [
            Ended(
                process.returncode,
                self._file(index, "err").read_text(),
                self._file(index, "out").read_text(),
            )
            for index, process in enumerate(self.processes)
        ]

    def succeed(self, timeout: float = 180) -> list[Ended]:
        """Waits; every process must exit with status 0."""
        ended = self.wait(timeout)
        assert [one.status for one in ended] == [0] * len(ended), "\n".join(
            f"--- process {i}:\n{one.stderr[-3000:]}" for i, one in enumerate(ended)
        )
        return ended

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Waits for a file or folder that they are to write."""
        for _ in self.waiting(timeout, f"{path} never appeared"):
            if path.exists():
                return

    def waiting(self, timeout: float, message: str) -> Iterator[None]:
        """Yields every 5 ms while all run."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            yield
            for index, process in enumerate(self.processes):
                assert process.poll() is None, self._file(index, "err").read_text()
            time.sleep(0.005)
        raise AssertionError(message)

    def kill(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
