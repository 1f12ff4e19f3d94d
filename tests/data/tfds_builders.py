"""Datasets that TFDS itself writes to disk, in its own formats."""

import json
import pathlib
import struct

import tensorflow_datasets as tfds

TEXT = {"text": tfds.features.Text()}


def build(data_dir, dataset, splits, *, features=None, config=None, version="1.0.0"):
    """Builds `dataset` as array_record and returns its folder.

    `splits` maps a split to its examples: dicts by feature, or texts.
    """

    class Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        url_infos = None  # nothing is downloaded
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            described = tfds.features.FeaturesDict(features or TEXT)
            return tfds.core.DatasetInfo(builder=self, features=described)

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for key, example in enumerate(splits[split]):
                yield key, example if isinstance(example, dict) else {"text": example}

    tfds.disable_progress_bar()
    builder = Local(data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def as_tfrecord(folder):
    """Turns a built dataset into the TFRecord files that TFDS with TensorFlow writes."""
    builder = tfds.builder_from_directory(folder)
    for split, info in builder.info.splits.items():
        records = builder.as_data_source(split).data_source
        framed = b"".join(_framed(records[index]) for index in range(len(records)))
        for path in map(pathlib.Path, info.filepaths):
            path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(framed)
            path.unlink()
    metadata = folder / "dataset_info.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"fileFormat": "tfrecord"}))


def _framed(record):
    length = struct.pack("<Q", len(record))
    return length + struct.pack("<I", _crc(length)) + record + struct.pack("<I", _crc(record))


def _crc(content):
    """The masked CRC-32C of the TFRecord format."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
