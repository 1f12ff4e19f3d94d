"""What the activations of a model look like: collected, drawn and told on one page."""
