"""Several local processes as the hosts of one run, joined over the loopback network."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


class Hosts:
    """The processes of one command, each with its own output files in a folder."""

    def __init__(self, folder: Path, count: int, program: str, *arguments: str, devices: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        joining = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        if count == 1:
            joining = []
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        self.processes = []
        for index in range(count):
            mine = [*joining, f"--process_id={index}"] if joining else []
            with self._file(index, "err").open("w") as err, self._file(index, "out").open("w") as o:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, program, *arguments, *mine],
                        cwd=ROOT,
                        env=environment,
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
