"""Text: documents, tokenizers, packing, masking."""
