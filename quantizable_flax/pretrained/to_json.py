"""What the JSON files of a folder of transformers say of a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from quantizable_flax.errors import UserError
from quantizable_flax.nn.softmax_config import SoftmaxConfig
from quantizable_flax.pretrained.config_json import DEFAULT_CLASSES, OURS
from quantizable_flax.pretrained.forms import FORMS, Form

VERSION = 1  # of what stands under our key
NO_ALPHA = ("value", "elementwise")  # gates that the original implementation has no name for
PADDING = 1  # RoBERTa's: its positions are counted from the row behind it
BICUBIC = 3
# What a tokenizer's tokens are for, the names by which they are known.
SPECIAL = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<s>",),
    "eos_token": ("</s>", "<|endoftext|>"),
}


def to_transformers(
    family: str, model: Any, classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Returns the values of config.json for a model.

    Args:
      family: its name.
      model: its frozen config.
      classes: the names of its classes, as far as they are known.

    Raises:
      UserError: a family that transformers does not have, or a model that it cannot hold.
    """
    kind, suffix = _class_of(family, model)
    form = FORMS[kind]
    _check_needs(form, model)
    values: dict[str, Any] = {"model_type": kind, "architectures": [form.classes + suffix]}
    for name, (key, _) in form.fields.items():
        value = getattr(model, key)
        if key == "max_position_embeddings":
            value += form.position_offset
        if key == "pad_token_id" and form.position_offset:
            value = PADDING
        values[name] = model.hidden_size if name == "word_embed_proj_dim" and not value else value
    values |= {**form.fixed, "dtype": "float32", **_labels(model, classes)}
    if attention := attention_keys(model):
        values[OURS] = {"version": VERSION, "attention": attention}
    return values


def _class_of(family: str, model: Any) -> tuple[str, str]:
    for kind, form in FORMS.items():
        for suffix, keys in form.heads:
            if form.family == family and all(getattr(model, k) == v for k, v in keys.items()):
                return kind, suffix
    known = sorted({form.family for form in FORMS.values()})
    if family in known:
        raise UserError(
            f"transformers has no class of model.name={family} with model.head={model.head}, "
            f"expected another head: write it with to_state_dict."
        )
    raise UserError(
        f"transformers has no model.name={family}, expected one of {', '.join(known)}: write it "
        "with to_state_dict."
    )


def _check_needs(form: Form, model: Any) -> None:
    """Raises UserError for what a class of transformers has no key for."""
    needs = dict(form.needs)
    if form.position_offset and model.pad_token_id is not None:
        needs["pad_token_id"] = PADDING
    for key, wanted in needs.items():
        if (found := getattr(model, key)) != wanted:
            raise UserError(
                f"transformers' {form.classes} computes with model.{key}={wanted} alone, found "
                f"{found}: write the model with to_state_dict."
            )
    if form.fields.get("type_vocab_size") and not model.type_vocab_size:
        raise UserError(
            f"transformers' {form.classes} has a table of token types, found "
            "model.type_vocab_size=0: write the model with to_state_dict."
        )
    if model.norm != "layer_norm":
        raise UserError(
            "transformers' models of these families have LayerNorms alone, found "
            f"model.norm={model.norm}: use the checkpoint of the run."
        )
    if not isinstance(model.softmax, SoftmaxConfig):
        raise UserError(
            f"a model is written with a SoftmaxConfig, found the softmax {model.softmax!r}, of "
            "which no file can tell: write its weights with to_state_dict."
        )
    of_ours = {
        "sinks": model.softmax.sink != "none" and f"sink={model.softmax.sink}",
        "length-normalised clipping": model.softmax.alpha and "length_normalised=True",
        "QK-norm": model.qk_norm and "qk_norm=True",
        "this gate": model.gate and model.gate.kind in NO_ALPHA and f"gate={model.gate.kind}",
    }
    for what, found in of_ours.items():
        if found:
            raise UserError(
                f"transformers' models have no place for {what} in attention, found "
                f"model.attention.{found}: use the checkpoint of the run."
            )


def _labels(model: Any, classes: Sequence[str] | None) -> dict[str, Any]:
    """The classes by name, or how many they are where transformers would take it for another."""
    classifies = getattr(model, "head", "classifier") == "classifier"
    count = getattr(model, "num_classes", 0)
    if not count or not (classifies or count != DEFAULT_CLASSES):
        return {}
    if not classes or not classifies:
        return {"num_labels": count}
    if len(classes) > count:
        raise UserError(
            f"a model of model.num_classes={count} should have at most so many names of classes, "
            f"found {len(classes)}: give those that it was trained with."
        )
    # The head may have more classes than the data.
    names = [*map(str, classes), *(f"LABEL_{label}" for label in range(len(classes), count))]
    return {
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


def attention_keys(model: Any) -> dict[str, Any]:
    """Returns keys of `config.model.attention` that differ from transformers', {} for vanilla.

    Args:
      model: the frozen config of a model.
    """
    softmax, gate = model.softmax, model.gate
    keys: dict[str, Any] = {}
    if softmax.kind != "vanilla":
        keys = {"softmax": softmax.kind, "gamma": softmax.gamma, "zeta": softmax.zeta}
    if softmax.blind_queries != SoftmaxConfig().blind_queries:
        keys["blind_queries"] = softmax.blind_queries
    if gate is not None:
        fields = dataclasses.asdict(gate)
        keys |= {"gate": fields.pop("kind"), **{f"gate_{key}": x for key, x in fields.items()}}
    return keys


def preprocessor(model: Any, eval_crop: float) -> dict[str, Any]:
    """Returns preprocessor_config.json for a model of images: what evaluation does to them.

    ViTImageProcessor would squeeze an image into a square; this one of transformers scales the
    shorter side and keeps the centre, as we do.

    Args:
      model: its frozen config.
      eval_crop: share of the shorter side that is kept, in (0, 1].

    Raises:
      UserError: a share out of its bounds.
    """
    if not 0.0 < eval_crop <= 1.0:
        raise UserError(f"eval_crop must be in (0, 1], found {eval_crop}.")
    size = model.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": model.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": int(size / eval_crop + 1e-6)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "crop_pct": eval_crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.pixel_mean),
        "image_std": list(model.pixel_std),
    }


def tokenizer_config(tokenizer: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Returns tokenizer_config.json: what a tokenizer.json's special tokens are for.

    Args:
      tokenizer: the content of the tokenizer.json.
      length: the most tokens that the model takes.
    """
    added = {token["content"] for token in tokenizer.get("added_tokens", ())}
    roles = {role: [name for name in names if name in added] for role, names in SPECIAL.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        **{role: names[0] for role, names in roles.items() if names},
    }
