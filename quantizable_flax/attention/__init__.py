"""The contribution: clipped softmax and gated attention."""
