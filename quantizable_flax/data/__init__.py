"""Text and images to batches: sources, tokenizers, tasks, training and evaluation."""
