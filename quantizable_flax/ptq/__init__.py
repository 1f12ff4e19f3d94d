"""Post-training quantization of whole models: what is done to a checkpoint after its training."""
