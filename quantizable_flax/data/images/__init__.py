"""Images to examples: digits, folders and tars, TFDS; decoding and augmentation in Grain."""
