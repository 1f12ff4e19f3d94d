"""Pretrains a model: python train.py --config=configs/quickstart.py:clipped --workdir=RUN.

On a TPU pod, GKE or SLURM the same line runs on every host; elsewhere --coordinator,
--num_processes and --process_id join the hosts.
"""

from quantizable_flax.cli.train import run

if __name__ == "__main__":
    run()
