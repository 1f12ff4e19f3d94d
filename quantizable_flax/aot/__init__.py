"""The training step compiled ahead of time for a TPU slice that is not there."""
