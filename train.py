"""Pretrains a model: python train.py --config=configs/quickstart.py:clipped --workdir=RUN.

On a TPU pod, GKE or SLURM the same line runs on every host; elsewhere --coordinator,
--num_processes and --process_id join the hosts.
"""

from absl import flags
from ml_collections.config_flags import config_flags

from quantizable_flax import cli
from quantizable_flax.training import distributed
from quantizable_flax.training.loop import train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, as configs/FILE.py:VARIANT; override keys by --config.a.b=value."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints and metrics go; an earlier run there is continued."
)
PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP, steps to trace into the workdir's profile/, for TensorBoard."
)
distributed.define_flags()


def main(arguments: list[str]) -> None:
    """Runs the training that the flags describe."""
    cli.reject_rest(arguments)
    config, workdir = cli.loaded(CONFIG.value), cli.required("workdir", WORKDIR.value)
    with distributed.joined(stoppable=True):
        train(config, workdir, profile=PROFILE.value)


if __name__ == "__main__":
    cli.run(main)
