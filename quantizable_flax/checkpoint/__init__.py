"""A run's folder: checkpoints, what they say of themselves, the lock, loading and exporting."""
