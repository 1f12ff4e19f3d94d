"""Exports a run: python -m quantizable_flax.export --workdir=RUN --to=int8 --out=DIR."""

from quantizable_flax.cli.export import run

if __name__ == "__main__":
    run()
