"""Program for several hosts: puts training batches on meshes and writes what all devices hold.

Each mesh is data,fsdp,tensor; its global batches go to OUT/data-fsdp-tensor.npz.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jax.experimental import multihost_utils

from quantizable_flax.data.pipeline import train_iterator
from quantizable_flax.data.tasks import make_task
from quantizable_flax.runtime import hosts
from quantizable_flax.runtime.mesh import batch_share, make_mesh, put_batch
from tests.tiny import tiny_config

hosts.define_flags()
TEXT = flags.DEFINE_string("text", None, "Folder with the text.")
OUT = flags.DEFINE_string("out", None, "Folder to write to.")
MESHES = flags.DEFINE_list("meshes", [], "Meshes, e.g. 2-1-1.")


def batches(folder: Path, mesh) -> list[dict[str, np.ndarray]]:
    config = tiny_config(folder)
    task = make_task(config)
    data = train_iterator(task, batch_size=8, seed=0, share=batch_share(mesh))
    with jax.transfer_guard("disallow"):
        placed = [put_batch(next(data), mesh) for _ in range(3)]
    data.close()
    return multihost_utils.process_allgather(placed, tiled=True)


def main(_: list[str]) -> None:
    with hosts.joined():
        for name in MESHES.value:
            sizes = tiny_config(Path(TEXT.value)).mesh
            sizes.data, sizes.fsdp, sizes.tensor = map(int, name.split("-"))
            mesh = make_mesh(sizes)
            found = batches(Path(TEXT.value), mesh)
            if hosts.is_first():
                arrays = {
                    f"{key}/{i}": x for i, batch in enumerate(found) for key, x in batch.items()
                }
                np.savez(Path(OUT.value) / f"{name}.npz", **arrays)


if __name__ == "__main__":
    app.run(main, argv=sys.argv)
