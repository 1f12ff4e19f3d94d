"""train.py: trains a recipe, or compiles its step for a TPU slice."""

from absl import flags
from ml_collections.config_flags import config_flags

from quantizable_flax.aot import compile as aot
from quantizable_flax.cli import program
from quantizable_flax.errors import UserError
from quantizable_flax.runtime import hosts
from quantizable_flax.runtime.compilation_cache import use_compilation_cache
from quantizable_flax.training.loop import train

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help shows them as those of the program


def define_flags() -> None:
    """Declares the flags; not on import, for programs have flags of the same names."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Recipe, as bert_base:clipped or FILE.py:VARIANT; override keys by --config.a.b=value.",
    )
    flags.DEFINE_string(
        "workdir", None, "Where checkpoints and metrics go; an earlier run there is continued."
    )
    flags.DEFINE_string(
        "profile", None, "START:STOP, steps to trace into the workdir's profile/, for TensorBoard."
    )
    hosts.define_flags()
    flags.DEFINE_list(
        "aot",
        [],
        "Instead of training, compile the step for these TPU slices without a TPU and say what it "
        "takes: v5e:2x2,v5e:16x16,v6e:4x4. Needs libtpu: pip install 'quantizable_flax[aot]'.",
    )
    flags.DEFINE_multi_string(
        "aot_vary",
        [],
        "With --aot, compare values of a key, train.batch_size=256,512, or of a group of keys, "
        "'mesh=data=-1|fsdp=16,tensor=2'; given several times, every combination is a row.",
    )
    flags.DEFINE_string("aot_json", None, "Also write --aot's figures to this JSON file.")
    flags.DEFINE_string(
        "aot_markdown", None, "Also write --aot's report or table to this Markdown file."
    )


def main(arguments: list[str]) -> None:
    """Runs the training that the flags describe."""
    program.reject_rest(arguments)
    if FLAGS.aot:
        aot.run(
            program.loaded(FLAGS.config),
            FLAGS.aot,
            FLAGS.aot_vary,
            json=FLAGS.aot_json,
            markdown=FLAGS.aot_markdown,
        )
        return
    if FLAGS.aot_vary or FLAGS.aot_json or FLAGS.aot_markdown:
        raise UserError("--aot_* flags are of --aot: name a slice, as --aot=v5e:2x2.")
    config, workdir = (
        program.loaded(FLAGS.config),
        program.required("workdir", FLAGS.workdir),
    )
    use_compilation_cache()
    with hosts.joined(stoppable=True):
        train(config, workdir, profile=FLAGS.profile)


def run() -> None:
    """The command line."""
    define_flags()
    program.run(main)
