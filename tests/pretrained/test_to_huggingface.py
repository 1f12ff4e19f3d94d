"""Models are written as transformers writes them, and read back bit for bit."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import quantizable_flax as qf
from quantizable_flax import UserError
from quantizable_flax.models.build import FAMILIES, with_config
from quantizable_flax.pretrained.folder import read_folder
from tests.helpers import pairs
from tests.pretrained import published
from tests.pretrained.published import ARCHITECTURES
from tests.pretrained.written import CLIPPED, DROPPED, MLP, OTHER_CLASS, made

# What is of training or of speed alone, and stands in no folder.
NOT_KEPT = {
    "dtype",
    "remat",
    "loss_chunk",
    "attention_kernel",
    "max_predictions",
    "label_smoothing",
}


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, found, wanted in pairs(actual, expected):
        assert found.dtype == wanted.dtype == np.float32
        np.testing.assert_array_equal(found, wanted, err_msg=path)


def kept(config) -> dict:
    """The fields that a folder has to keep."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in fields.items() if name not in NOT_KEPT}


def config_json(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_transformers_wrote_is_written_again(name, tmp_path):
    model, params = qf.from_pretrained(published.saved(tmp_path / "theirs", name))
    written = qf.to_huggingface(model, params, str(tmp_path / "ours"))
    theirs = published.weights(name)
    if name in DROPPED:
        theirs = {key: w for key, w in theirs.items() if not key.startswith(DROPPED[name])}
    if name == "OPTModel":
        theirs = {f"model.{key}": w for key, w in theirs.items()}
    ours = load_file(written / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
    here, there = config_json(written), published.config_json(name)
    assert here["architectures"] == [OTHER_CLASS.get(name, name)]
    other = {"architectures", "model_type"} if name in OTHER_CLASS else set()
    shared = (here.keys() & there.keys()) - other
    assert len(shared) > 12
    assert {key: here[key] for key in shared} == {key: there[key] for key in shared}
    again = qf.from_pretrained(str(written))
    assert again[0].config == model.config
    assert_equal(again[1], params)


GATES = [
    {"gate": "linear", "gate_pi_init": 0.25, "gate_init_std": 0.01},
    MLP,
    {"gate": "all_heads_linear"},
    {"gate": "unconditional", "gate_finetune": True},
    {"gate": "linear", "gate_pooling": "all"},
]
CASES = [
    *((family, attention, {}) for family in FAMILIES for attention in ({}, CLIPPED | MLP)),
    *((family, gate, {}) for family in ("bert", "opt", "vit") for gate in GATES),
    ("bert", {"softmax": "clipped", "alpha": 4.0, "blind_queries": "uniform"}, {}),
    ("opt", {"softmax": "clipped", "gamma": 0.0, "blind_queries": "uniform"}, {}),
    ("bert", {"gate": "linear", "gate_pooling": "visible"}, {"head": "classifier"}),
    ("bert", {}, {"head": "classifier", "num_classes": 7, "pad_token_id": 0}),
    ("bert", {}, {"head": "pooler", "pooling": "cls"}),
    ("roberta", {}, {"head": "none", "layer_norm_eps": 1e-3, "pad_token_id": 1}),
    ("distilbert", {}, {"head": "classifier", "hidden_dropout": 0.25}),
    ("opt", {}, {"pre_layer_norm": False, "embed_size": 12, "pad_token_id": 1}),
    ("opt", CLIPPED, {"pre_layer_norm": False}),
    ("vit", {}, {"num_classes": 0, "pooling": "mean"}),
    (
        "vit",
        {},
        {"distillation": "token", "channels": 1, "pixel_mean": (0.1,), "pixel_std": (3.0,)},
    ),
    ("vit", MLP, {"distillation": "head"}),
]


@pytest.mark.parametrize(("family", "attention", "changes"), CASES)
def test_what_is_written_is_read_back(family, attention, changes, tmp_path):
    if family == "roberta":
        changes = {"pad_token_id": 1, **changes}
    model, params = made(family, attention, **changes)
    qf.to_huggingface(model, params, str(tmp_path))
    read, again = qf.from_pretrained(str(tmp_path))
    assert kept(read.config) == kept(model.config)
    assert_equal(again, params)
    noted = config_json(tmp_path).get("quantizable_flax")
    assert (noted is None) == (not attention)
    if noted:
        assert noted["version"] == 1
        assert (
            noted["attention"].items()
            >= {key: value for key, value in attention.items() if key != "alpha"}.items()
        )


def test_one_sentence_says_that_transformers_knows_no_gates(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        qf.to_huggingface(*made("bert", {"blind_queries": "uniform"}), str(tmp_path / "vanilla"))
        assert not caplog.records
        for number, attention in enumerate((CLIPPED, MLP)):
            qf.to_huggingface(*made("bert", attention), str(tmp_path / str(number)))
            assert "vanilla attention" in caplog.records[number].message
    assert len(caplog.records) == 2


def test_names_of_classes_and_the_tokenizer_go_along(tmp_path):
    from quantizable_flax.data.text.tokenizer import Tokenizer

    content = json.loads(Tokenizer.train_wordpiece(["a fox"] * 9, 40).to_json())
    model, params = made("bert", head="classifier", num_classes=3)
    for number, classes in enumerate((["bad", "gut – ja", "neither"], ["no", "yes"])):
        folder = tmp_path / str(number)
        assets = {"tokenizer": content, "classes": classes}
        qf.to_huggingface(model, params, str(folder), assets=assets)
        whole = [*classes, "LABEL_2"][:3]
        assert config_json(folder)["label2id"] == {name: label for label, name in enumerate(whole)}
        assert read_folder(str(folder)).assets == {"tokenizer": content, "classes": whole}
    with pytest.raises(UserError, match=r"num_classes=3 .* at most .* found 4"):
        qf.to_huggingface(model, params, str(tmp_path / "2"), assets={"classes": list("abcd")})
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("assets", "sentence"),
    [
        ({"tokenizer": "tokenizer.json"}, "content of a tokenizer.json.* found 'tokenizer.json'"),
        ({"tokenizer": {"vocab": {}}}, 'with a "model".*: .* found'),
        ({"classes": "cat"}, "a list of names, found 'cat'"),
        ({"classes": [1, 2]}, "a list of names"),
        ({"tokeniser": {}}, "found 'tokeniser'"),
        (["tokenizer"], r"found \['tokenizer'\]"),
    ],
)
def test_assets_of_another_form_are_refused(assets, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        qf.to_huggingface(*made("bert"), str(tmp_path / "out"), assets=assets)
    assert not (tmp_path / "out").exists()


def test_images_are_prepared_as_in_evaluation(tmp_path):
    changes = {"channels": 3, "pixel_mean": (0.1, 0.2, 1 / 3), "pixel_std": (0.3, 0.2, 0.1)}
    qf.to_huggingface(*made("vit", **changes), str(tmp_path), eval_crop=0.9)
    config = read_folder(str(tmp_path)).config
    assert {key: config.model[key] for key in ("pixel_mean", "pixel_std")} == {
        key: changes[key] for key in ("pixel_mean", "pixel_std")
    }
    assert config.data.eval_crop == 0.9
    with pytest.raises(UserError, match=r"eval_crop must be in \(0, 1\], found 90"):
        qf.to_huggingface(*made("vit"), str(tmp_path / "new"), eval_crop=90)


def test_folders_of_sentence_transformers_only_where_their_default_differs(tmp_path):
    qf.to_huggingface(*made("bert", head="none"), str(tmp_path / "mean"))
    assert {path.name for path in (tmp_path / "mean").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    qf.to_huggingface(*made("bert", head="none", pooling="cls"), str(tmp_path / "cls"))
    modules = json.loads((tmp_path / "cls" / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling"]
    modes = json.loads((tmp_path / "cls" / "1_Pooling" / "config.json").read_text())
    assert modes["word_embedding_dimension"] == 16
    assert [mode for mode, on in modes.items() if on is True] == ["pooling_mode_cls_token"]


def test_models_in_bfloat16_are_written_in_float32(tmp_path):
    model, params = made("opt", dtype="bfloat16")
    qf.to_huggingface(model, params, str(tmp_path))
    assert config_json(tmp_path)["dtype"] == "float32"
    assert_equal(qf.from_pretrained(str(tmp_path))[1], params)


def test_padding_of_roberta_is_that_by_which_transformers_counts_positions(tmp_path):
    qf.to_huggingface(*made("roberta", pad_token_id=None), str(tmp_path))
    written = config_json(tmp_path)
    assert (written["pad_token_id"], written["max_position_embeddings"]) == (1, 14)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("vit", {"num_registers": 2}, r"transformers' ViT .*num_registers=0 alone, found 2:"),
        ("vit", {"patch_layer_norm": True}, r"patch_layer_norm=False alone, found True"),
        ("distilbert", {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-12 alone, found 1e-05"),
        ("distilbert", {"type_vocab_size": 2}, "type_vocab_size=0 alone, found 2"),
        ("distilbert", {"head": "pooler"}, "no class of model.name=distilbert with model.head=poo"),
        ("opt", {"layer_norm_eps": 1e-6}, "OPT computes with model.layer_norm_eps=1e-05 alone"),
        ("roberta", {"pad_token_id": 0}, "Roberta computes with model.pad_token_id=1 alone"),
        *(
            (family, {"num_registers": 2}, r"num_registers=0 alone, found 2:")
            for family in ("bert", "roberta", "distilbert", "opt")
        ),
        ("bert", {"type_vocab_size": 0}, "Bert has a table of token types, found .*=0"),
    ],
)
def test_what_transformers_lacks_is_refused(family, changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        qf.to_huggingface(*made(family, **changes), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("attention", "sentence"),
    [
        ({"sink": "zero"}, "place for sinks in attention, found model.attention.sink=zero"),
        ({"softmax": "clipped", "alpha": 0.5, "length_normalised": True}, "length_normalised=True"),
        ({"qk_norm": True}, "for QK-norm in attention, found model.attention.qk_norm=True"),
        ({"gate": "value"}, "found model.attention.gate=value: use the checkpoint of the run"),
        ({"gate": "elementwise"}, "found model.attention.gate=elementwise"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_attention_that_no_folder_can_note_is_refused(family, attention, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        qf.to_huggingface(*made(family, attention), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_another_family_and_another_softmax_are_refused(tmp_path, monkeypatch):
    model, params = made("bert")
    other = with_config(model, softmax=lambda scores, mask: scores)
    with pytest.raises(UserError, match="written with a SoftmaxConfig"):
        qf.to_huggingface(other, params, str(tmp_path / "new"))
    # Added alone: a family that is taken out would come back as the last one, for later tests too.
    mine = type("Mine", (type(model.config),), {})
    values = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
    model = model.clone(config=mine(**values))
    monkeypatch.setitem(FAMILIES, "mine", FAMILIES["bert"]._replace(config=mine))
    with pytest.raises(UserError, match=r"no model\.name=mine, expected one of bert, distilbert"):
        qf.to_huggingface(model, params, str(tmp_path / "new"))


def test_parameters_of_another_kind_are_refused(tmp_path):
    model, params = made("bert")
    path = str(tmp_path / "new")
    quantized = qf.with_quant(model, qf.QuantSpec(weight_bits=8, activation_bits=8))
    batch = model.example_batch()
    served, codes = qf.to_int8(quantized, params, qf.calibrate(quantized, params, [batch]))
    with pytest.raises(UserError, match="found a model that runs on integers"):
        qf.to_huggingface(served, codes, path)
    with pytest.raises(UserError, match="neither smoothed nor"):
        qf.to_huggingface(model, codes, path)
    scale = {"attention_residual_scale": {"scale": jnp.ones(16)}}
    smoothed = {**params, "layer_0": {**params["layer_0"], **scale}}
    with pytest.raises(UserError, match="neither smoothed nor"):
        qf.to_huggingface(model, smoothed, path)
    with pytest.raises(UserError, match=r"should have shape .* found \(32,\)"):
        qf.to_huggingface(made("bert", intermediate_size=8)[0], params, path)
    assert not Path(path).exists()
    qf.to_huggingface(quantized, params, path)  # in floating point, as they are
    assert qf.from_pretrained(path)[0].config == model.config


def test_a_folder_that_is_full_or_cannot_be_written_is_named(tmp_path, monkeypatch):
    model, params = made("bert")
    qf.to_huggingface(model, params, str(tmp_path / "new"))
    with pytest.raises(UserError, match="gs://bucket/x must be a local folder"):
        qf.to_huggingface(model, params, "gs://bucket/x")
    with pytest.raises(UserError, match="must be a new or an empty folder, found files in it"):
        qf.to_huggingface(model, params, str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"to be able to write the folder .*config\.json/new"):
        qf.to_huggingface(model, params, str(tmp_path / "new" / "config.json" / "new"))

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match=r"found 'No space left on device'.*make room"):
        qf.to_huggingface(model, params, str(tmp_path / "other"))
