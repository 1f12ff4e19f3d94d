"""Continues text: python -m quantizable_flax.generate --workdir=RUN --prompt="The file is"."""

import os

from absl import flags

from quantizable_flax.checkpoint.load import Run, load_run
from quantizable_flax.cli import program
from quantizable_flax.data.tasks import make_task
from quantizable_flax.models.generation import Sampling, check_causal, generate
from quantizable_flax.runtime import terminal
from quantizable_flax.runtime.compilation_cache import use_compilation_cache


def define_flags() -> None:
    """Declares the flags; not on import, for this is a package and others have flags too."""
    flags.DEFINE_string("workdir", None, "A run of OPT.")
    flags.DEFINE_multi_string("prompt", [], "Text to continue; give it several times for several.")
    flags.DEFINE_integer("max_new_tokens", 32, "At most so many tokens per prompt.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token, above 0 samples.")
    flags.DEFINE_integer("top_k", 0, "Sample among the k most likely tokens, 0: all.")
    flags.DEFINE_float("top_p", 1.0, "Sample among the likely tokens with this probability.")
    flags.DEFINE_integer("seed", 0, "Of the sampling.")


def continuations(
    run: Run, prompts: list[str], *, max_new_tokens: int, sampling: Sampling, seed: int = 0
) -> list[str]:
    """Returns each prompt with its continuation.

    Args:
      run: from `load_run`.
      prompts: texts; an empty one begins a document.
      max_new_tokens: at most so many per prompt.
      sampling: how tokens are drawn.
      seed: of the sampling.

    Raises:
      UserError: as `generate`.
    """
    check_causal(run.model)
    tokenizer = make_task(run.config, run.assets).tokenizer  # type: ignore[attr-defined]
    ids = [[*tokenizer.prefix_ids, *text] for text in tokenizer.encode_batch(prompts)]
    new = generate(
        run.model,
        run.params,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_id=tokenizer.prefix_ids[0],  # the start of the next document ends this one
        seed=seed,
    )
    skipped = len(tokenizer.prefix_ids)
    return [tokenizer.decode(old[skipped:] + more) for old, more in zip(ids, new, strict=True)]


def main(arguments: list[str]) -> None:
    """Prints each prompt with its continuation."""
    program.reject_rest(arguments)
    values = flags.FLAGS
    use_compilation_cache()
    run = load_run(program.required("workdir", values.workdir))
    prompts = program.required("prompt", values.prompt)
    sampling = Sampling(values.temperature, values.top_k, values.top_p)
    texts = continuations(
        run,
        # Where the locale is ASCII, Python keeps the other bytes of its arguments undecoded.
        [os.fsencode(text).decode("utf-8", "replace") for text in prompts],
        max_new_tokens=values.max_new_tokens,
        sampling=sampling,
        seed=values.seed,
    )
    with terminal.printing():
        print("\n".join(texts))


def run() -> None:
    """The command line."""
    define_flags()
    program.run(main)


if __name__ == "__main__":
    run()
