"""What a model learns from, by the keys of its `config.data`."""

from ml_collections import ConfigDict

MASKED_TEXT, CAUSAL_TEXT, IMAGES = "masked text", "causal text", "images"


def kind_of(config: ConfigDict) -> str:
    """Returns MASKED_TEXT, CAUSAL_TEXT or IMAGES for a whole configuration."""
    if "seq_len" not in config.data:
        return IMAGES
    return MASKED_TEXT if "mask_rate" in config.data else CAUSAL_TEXT
