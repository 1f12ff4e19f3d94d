"""Images to examples: digits, folders and tars, TFDS; decoding and augmentation in Grain."""

from quantizable_flax.data.images.task import ImageTask

__all__ = ["ImageTask"]
