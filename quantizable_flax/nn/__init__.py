"""The contribution: clipped softmax, gated attention, the layers around them, logical axes."""
