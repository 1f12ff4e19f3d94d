"""Configurations of models without a head, and of classifiers."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SEQ_LEN = 24  # of labelled text: shorter than some of it


def with_head(config, head, num_classes=0):
    """Returns a configuration of the BERT family with another head."""
    with config.model.unlocked():
        config.model.head, config.model.num_classes = head, num_classes
    return config
