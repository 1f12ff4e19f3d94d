"""Program for two hosts that continue a run whose step 20 the second one cannot read."""

import sys
from pathlib import Path

import jax
from absl import app, flags

from quantizable_flax.checkpoint import store
from quantizable_flax.runtime import hosts
from quantizable_flax.training.loop import train
from tests.tiny import tiny_config
from tests.training.test_hosts import CHANGES, MESHES

hosts.define_flags()
TEXT = flags.DEFINE_string("text", None, "Folder with the text.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run.")


def main(_: list[str]) -> None:
    with hosts.joined(stoppable=True):
        if jax.process_index() == 1:
            restore = store.restore_state

            def failing(workdir, step, like):
                if step == 20:
                    raise ValueError("a file of this host is cut off")
                return restore(workdir, step, like)

            store.restore_state = failing
        train(tiny_config(Path(TEXT.value), **CHANGES, **MESHES[2]), WORKDIR.value)


if __name__ == "__main__":
    app.run(main, argv=sys.argv)
