"""Images of datasets that TensorFlow Datasets has built."""

from ml_collections import ConfigDict

from quantizable_flax.data.images.examples import SplitDataset, labelled_pool
from quantizable_flax.data.images.pool import Pool
from quantizable_flax.data.tfds_source import class_names, open_split, split_names


def tfds_dataset(name: str, data_cfg: ConfigDict, num_classes: int) -> SplitDataset:
    """Returns the splits of a TFDS dataset, with the features that `data_cfg` names.

    Raises UserError for a dataset or a feature that is not there.
    """
    title = f"the TFDS dataset {name}"

    def pool(split: str) -> Pool:
        keys = (data_cfg.image_key, data_cfg.label_key)
        names = class_names(name, data_cfg.tfds_dir, data_cfg.label_key)
        examples = open_split(name, split, data_cfg.tfds_dir, undecoded=keys[:1], only=keys)
        where = f"the {split} split of {title}"
        return labelled_pool(examples, where, keys, names, num_classes, "build the dataset again")

    return SplitDataset(title, split_names(name, data_cfg.tfds_dir), pool)
