"""Images of datasets of the Hugging Face hub."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from quantizable_flax.data import hub
from quantizable_flax.data.images.examples import SplitDataset, labelled_pool
from quantizable_flax.data.images.pool import Pool
from quantizable_flax.errors import UserError, nearest

# What the configuration says where nobody said anything; many datasets call them otherwise.
_IMAGE_KEY, _LABEL_KEY = "image", "label"


def hub_dataset(name: str, data_cfg: ConfigDict, num_classes: int | None) -> SplitDataset:
    """Returns the splits of a dataset of the hub, see `data.hub.split_names`.

    Its columns are data.image_key and data.label_key; where these are the defaults and there is
    no such column, the first with images and the first with names of classes. With `num_classes`
    None, the images have no labels. Raises UserError for a dataset or a column that is not there.
    """
    title = f"the dataset {name}"

    def pool(split: str) -> Pool:
        columns = hub.columns(name, split)
        image = _column(columns, "image_key", data_cfg.image_key, _IMAGE_KEY, (hub.IMAGE,), title)
        where, mend = f"the {split} split of {title}", "take the dataset anew"
        if num_classes is None:
            examples = hub.open_split(name, split, (image,))
            return labelled_pool(examples, where, (image, None), None, None, mend)
        kinds = (hub.CLASS, hub.INTEGER)
        label = _column(columns, "label_key", data_cfg.label_key, _LABEL_KEY, kinds, title)
        examples = hub.open_split(name, split, (image, label))
        names = hub.class_names(name, split, label)
        return labelled_pool(examples, where, (image, label), names, num_classes, mend)

    return SplitDataset(title, hub.split_names(name), pool)


def _column(
    columns: Mapping[str, str], option: str, key: str, default: str, kinds: tuple, title: str
) -> str:
    """Returns the column that `key` names, or of the first of `kinds` where nobody named one."""
    first = next((name for name, kind in columns.items() if kind == kinds[0]), None)
    if key not in columns and key == default and first is not None:
        return first
    if key not in columns:
        raise UserError(
            f"expected the column {key!r} in {title}, found {', '.join(columns)}"
            f"{nearest(key, columns)}; set data.{option} to one of these"
        )
    if columns[key] not in kinds:
        raise UserError(
            f"expected {' or '.join(kinds)} in the column {key!r} of {title}, found "
            f"{columns[key]}; set data.{option} to another of {', '.join(columns)}"
        )
    return key
