"""Pretrains a model: python train.py --config=configs/quickstart.py:clipped --workdir=RUN.

On a TPU pod, GKE or SLURM the same line runs on every host; elsewhere --coordinator,
--num_processes and --process_id join the hosts.
"""

from absl import flags
from ml_collections.config_flags import config_flags

from quantizable_flax import cli
from quantizable_flax.aot import compile as aot
from quantizable_flax.compilation_cache import use_compilation_cache
from quantizable_flax.errors import UserError
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
AOT = flags.DEFINE_list(
    "aot",
    [],
    "Instead of training, compile the step for these TPU slices without a TPU and say what it "
    "takes: v5e:2x2,v5e:16x16,v6e:4x4. Needs libtpu: pip install 'quantizable_flax[aot]'.",
)
AOT_VARY = flags.DEFINE_multi_string(
    "aot_vary",
    [],
    "With --aot, compare values of a key, train.batch_size=256,512, or of a group of keys, "
    "'mesh=data=-1|fsdp=16,tensor=2'; given several times, every combination is a row.",
)
AOT_JSON = flags.DEFINE_string("aot_json", None, "Also write --aot's figures to this JSON file.")
AOT_MARKDOWN = flags.DEFINE_string(
    "aot_markdown", None, "Also write --aot's report or table to this Markdown file."
)


def main(arguments: list[str]) -> None:
    """Runs the training that the flags describe."""
    cli.reject_rest(arguments)
    if AOT.value:
        aot.run(
            cli.loaded(CONFIG.value),
            AOT.value,
            AOT_VARY.value,
            json=AOT_JSON.value,
            markdown=AOT_MARKDOWN.value,
        )
        return
    if AOT_VARY.value or AOT_JSON.value or AOT_MARKDOWN.value:
        raise UserError("--aot_* flags are of --aot: name a slice, as --aot=v5e:2x2.")
    config, workdir = cli.loaded(CONFIG.value), cli.required("workdir", WORKDIR.value)
    use_compilation_cache()
    with distributed.joined(stoppable=True):
        train(config, workdir, profile=PROFILE.value)


if __name__ == "__main__":
    cli.run(main)
