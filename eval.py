"""Evaluates runs: python eval.py --workdir=RUN [--workdir=RUN2 ...] --quant=w8a8,w6a6+mse."""

from quantizable_flax.cli.eval import run

if __name__ == "__main__":
    run()
