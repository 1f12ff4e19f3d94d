"""Images of datasets that TensorFlow Datasets has built."""

from ml_collections import ConfigDict

from quantizable_flax.data.images.examples import SplitDataset, labelled_pool
from quantizable_flax.data.images.pool import Pool
from quantizable_flax.data.tfds_source import class_names, open_split, split_names


def tfds_dataset(name: str, data_cfg: ConfigDict, num_classes: int | None) -> SplitDataset:
    """Returns the splits of a TFDS dataset, with the features that `data_cfg` names.

    With `num_classes` None, the images have no labels. Raises UserError for a dataset or a feature
    that is not there.
    """
    title = f"the TFDS dataset {name}"

    def pool(split: str) -> Pool:
        image, folder = data_cfg.image_key, data_cfg.tfds_dir
        label = None if num_classes is None else data_cfg.label_key
        names = None if label is None else class_names(name, folder, label)
        only = (image,) if label is None else (image, label)
        examples = open_split(name, split, folder, undecoded=(image,), only=only)
        where, keys = f"the {split} split of {title}", (image, label)
        return labelled_pool(examples, where, keys, names, num_classes, "build the dataset again")

    return SplitDataset(title, split_names(name, data_cfg.tfds_dir), pool)
