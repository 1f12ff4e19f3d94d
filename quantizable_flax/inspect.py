"""Looks into one model: python -m quantizable_flax.inspect --workdir=PATH."""

from quantizable_flax.cli.inspect import run

if __name__ == "__main__":
    run()
