"""Kills a run of two hosts at random moments, again and again: `make soak-kill`.

Each round starts the run, lets it go on for a random time and kills both processes (kill -9), more
often than not aimed at a checkpoint that is being written. In the end the run is let through, and
everything that its last checkpoint holds must be, bit by bit, what an uninterrupted run holds.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from tests.tiny import flags
from tests.training.hosts import Hosts, arrays

EVERY = 8
STEPS_OF_A_ROUND = 5 * EVERY  # more than a round may get on
CHANGES = {
    "model__hidden_dropout": 0.1,
    "model__attention_dropout": 0.1,
    "mesh__fsdp": 2,  # every parameter lies on both hosts
    "train__log_every": 1,
    "checkpoint__every": EVERY,
}


class Kill(NamedTuple):
    """One round: the newest step logged and saved, and whether a save was in flight."""

    reached: int
    saved: int
    in_save: bool


def start(folder: Path, workdir: Path, steps: int) -> Hosts:
    command = ["train.py", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    return Hosts(
        folder / f"{workdir.name}-output",
        2,
        *command,
        *flags(folder, **CHANGES, train__steps=steps),
    )


def finished(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Saves in flight, or left so: name and inode, for a step may be begun again."""
    found = set()
    for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(FileNotFoundError):  # it was finished just now
            found.add((path.name, path.stat().st_ino))
    return found


def logged(workdir: Path) -> int:
    """The last step whose metrics were written whole."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except ValueError:
            continue
    return 0


def kill_once(folder: Path, workdir: Path, steps: int, rng: random.Random) -> Kill:
    """Starts the run and kills it, at once when a save is seen or after a random time."""
    newest, stale = max(finished(workdir), default=0), unfinished(workdir)
    aim_at_save, further = rng.random() < 0.6, rng.randint(0, 2) * EVERY
    hosts = start(folder, workdir, steps)
    seen = set(stale)
    # It must get on, or the soak would never end: the first new checkpoint is waited for.
    for _ in hosts.waiting(300, "the run made no checkpoint"):
        passed = max(finished(workdir), default=0) > newest + further
        begun = unfinished(workdir) - seen
        if passed and (begun or not aim_at_save):
            break
        if not passed:
            seen |= begun
    time.sleep(rng.uniform(0, 0.03 if aim_at_save else 0.5))
    order = rng.sample(hosts.processes, 2)
    for process in order:
        process.kill()
        time.sleep(rng.choice([0, 0, 0.01, 0.05]))
    hosts.kill()
    in_save = bool(unfinished(workdir) - stale)  # begun by this round, and never finished
    return Kill(logged(workdir), max(finished(workdir), default=0), in_save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = options.rounds * STEPS_OF_A_ROUND
    rng, began = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak_kill") as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        start(folder, folder / "whole", steps).succeed(900)
        kills = []
        for number in range(options.rounds):
            kills.append(kill_once(folder, folder / "killed", steps, rng))
            print(f"round {number + 1}: {kills[-1]}", flush=True)
            if kills[-1].saved >= steps:
                sys.exit("error: the run ended before the last round: raise STEPS_OF_A_ROUND.")
        start(folder, folder / "killed", steps).succeed(900)
        left, right = (arrays(folder / run, steps) for run in ("whole", "killed"))
        same = [
            bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (left, right)), strict=True)
        ]
        damaged = list((folder / "killed" / "damaged").glob("*"))
        stale = unfinished(folder / "killed")
    lost = [kill.reached - kill.saved for kill in kills]
    print(
        f"{len(kills)} rounds, {sum(kill.in_save for kill in kills)} kills during a save, "
        f"{sum(lost)} steps lost (at most {max(lost)} at once), {len(damaged)} damaged steps "
        f"found, {len(stale)} unfinished saves left over, {time.monotonic() - began:.0f} s; "
        f"{sum(same)} of {len(same)} arrays bitwise equal."
    )
    if not all(same):
        sys.exit("error: the killed run ended with other parameters than the whole one.")


if __name__ == "__main__":
    main()
