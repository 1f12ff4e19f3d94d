"""Which process has a workdir, and whether it still runs."""

import dataclasses
import json
import os
import platform
import time
import uuid
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that has a workdir: what its `lock.json` holds.

    A number says little of a process: numbers are used again, and containers count their own.

    Attributes:
      host: name of the machine, for people.
      pid: number of the process.
      since: when it took the workdir, for people.
      run: differs between any two.
      boot: of the machine; its name where a machine does not number its boots.
      namespace: in which `pid` counts.
      started: of the process, in ticks since that boot; None where there is no process table.
      device: of the workdir's file system as this machine numbers it, None in a bucket.
    """

    host: str
    pid: int
    since: str
    run: str
    boot: str
    namespace: str
    started: int | None
    device: int | None = None

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        return cls(
            host=platform.node(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z").strip(),
            run=uuid.uuid4().hex,
            boot=_read("/proc/sys/kernel/random/boot_id") or platform.node(),
            namespace=_namespace(),
            started=_started(os.getpid()),
        )

    @classmethod
    def parse(cls, text: str) -> "Owner | None":
        """Reads what `to_json` has written; None for anything else, such as half of it."""
        try:
            values = json.loads(text)
            return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
        except (ValueError, TypeError, KeyError):
            return None

    def to_json(self, beat: int) -> str:
        """What the file holds at the beat-th heartbeat."""
        return json.dumps(dataclasses.asdict(self) | {"beat": beat}, indent=2) + "\n"

    def still_runs(self, here: "Owner", locked: bool) -> bool | None:
        """Whether this process runs; None where nobody here can tell.

        Args:
          here: the process that asks, with the device that it sees.
          locked: whether it has got the kernel's lock on the file.
        """
        if self.boot != here.boot:  # the machine was started again, or it is another one
            return False if locked and self.host == here.host else None
        if locked and self.device == here.device:
            return False  # or the kernel would have refused
        if self.started is None or self.namespace != here.namespace:
            return None
        return _started(self.pid) == self.started


def _read(file: str) -> str:
    try:
        return Path(file).read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None if none of that number runs."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else None
