"""What a model learns from, by the keys of its `config.data` and by its head."""

from ml_collections import ConfigDict

MASKED_TEXT, CAUSAL_TEXT, IMAGES = "masked text", "causal text", "images"
# What families of masked text take whose model.head is another than that of the masked tokens.
TEXT_ROWS, LABELLED_TEXT = "text rows", "labelled text"


def kind_of(config: ConfigDict) -> str:
    """Returns one of these kinds for a whole configuration.

    A classifier without data.label_key takes text alone, as an encoder without a head does.
    """
    if "seq_len" not in config.data:
        return IMAGES
    if "mask_rate" not in config.data:
        return CAUSAL_TEXT
    head = config.model.get("head", "masked_lm")
    if head == "masked_lm":
        return MASKED_TEXT
    labelled = head == "classifier" and config.data.get("label_key") is not None
    return LABELLED_TEXT if labelled else TEXT_ROWS


def images_have_labels(config: ConfigDict) -> bool:
    """Whether images come with classes: the model has some, and data.label_key is set."""
    return config.model.num_classes > 0 and config.data.label_key is not None
