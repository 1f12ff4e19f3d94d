"""The loop and what it stands on: mesh, optimizer, step, checkpoints, metrics."""
