"""Published models of every architecture compute what transformers computes of them."""

import functools
import json

import jax
import numpy as np
import pytest

import quantizable_flax as qf
from quantizable_flax import UserError
from quantizable_flax.pretrained.folder import read_folder
from tests.pretrained import published
from tests.pretrained.published import ARCHITECTURES, FILE

# Float32 on both sides: some 1e-6 of values of size 3.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_those_of_transformers(name, tmp_path):
    model, params = qf.from_pretrained(published.saved(tmp_path, name))
    arguments = published.arguments(name)
    # OPT is tied to its head: of the decoder by itself the states before that are asked.
    method = "encode" if name == "OPTModel" else "__call__"
    apply = jax.jit(functools.partial(model.apply, method=method))
    actual = apply({"params": params}, *arguments)
    visible = slice(None)
    if actual.ndim == 3 and len(arguments) == 2:
        visible = np.asarray(arguments[1], bool)  # of padding nothing is asked
    np.testing.assert_allclose(
        actual[visible], published.expected(name)[visible], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "XLMRobertaModel"])
def test_poolers_are_those_of_transformers(name, tmp_path):
    model, params = qf.from_pretrained(published.saved(tmp_path, name))
    hidden = model.apply({"params": params}, *published.arguments(name))
    actual = model.apply({"params": params}, hidden, method="pool")
    np.testing.assert_allclose(actual, FILE[f"{name}/pooler_output"], rtol=0, atol=TOLERANCE)


def test_an_encoder_saved_without_its_pooler(tmp_path):
    tensors = published.weights("BertModel")
    kept = {name: w for name, w in tensors.items() if not name.startswith("pooler")}
    path = published.write(tmp_path, published.config_json("BertModel"), kept)
    model, params = qf.from_pretrained(path)
    assert model.config.head == "none"
    assert "pooler" not in params


def test_what_the_config_does_not_name_is_as_in_transformers(tmp_path):
    """Where a key is absent, transformers' default counts: here 2 classes."""
    config = published.config_json("BertForSequenceClassification")
    del config["id2label"], config["label2id"]
    path = published.write(tmp_path, config, published.weights("BertForSequenceClassification"))
    with pytest.raises(UserError, match=r"'classifier.weight' should have shape \(2, 16\)"):
        qf.from_pretrained(path)


def change(name, tmp_path, **values):
    config = published.config_json(name) | values
    return published.write(tmp_path, config, published.weights(name))


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("BertModel", {"model_type": "bart"}, r'model_type="bart" \(did you mean \'bert\'\?\)'),
        ("BertModel", {"architectures": ["BertForTokenClassification"]}, "BertForMaskedLM, Bert"),
        ("BertModel", {"hidden_act": "gelu_new"}, 'hidden_act="gelu_new", where our bert'),
        ("RobertaModel", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("BertForMaskedLM", {"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ("OPTForCausalLM", {"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ("OPTForCausalLM", {"activation_function": "gelu"}, 'activation_function="gelu"'),
        ("BertModel", {"num_hidden_layers": 3}, r"no tensor 'encoder.layer.2"),
        ("BertModel", {"num_hidden_layers": 1}, r"16 tensors have no place"),
        ("BertModel", {"hidden_size": 8}, r"should have shape \(40, 8\) .* found \(40, 16\)"),
        ("BertModel", {"num_attention_heads": 3}, "num_heads must divide"),
        ("BertModel", {"hidden_size": "16"}, "a value of another type"),
        ("ViTModel", {"image_size": [8, 16]}, r"image_size=\[8, 16\], expected a square"),
        ("RobertaModel", {"pad_token_id": 0}, "pad_token_id=0, behind which positions begin"),
        ("ViTModel", {"qkv_bias": False}, "qkv_bias=false"),
        ("BertModel", {"quantizable_flax": {"attention": {"gama": 1}}}, "did you mean 'gamma'"),
    ],
)
def test_what_we_do_not_compute_is_named(name, values, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        qf.from_pretrained(change(name, tmp_path, **values))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "cannot be read as JSON"), ("[]", "should hold a JSON object, found list")],
)
def test_a_damaged_config_is_named(content, sentence, tmp_path):
    path = published.saved(tmp_path, "BertModel")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        qf.from_pretrained(path)


def test_a_missing_and_a_surplus_tensor_are_named(tmp_path):
    tensors, config = published.weights("BertModel"), published.config_json("BertModel")
    dense = "encoder.layer.1.output.dense.weight"
    path = published.write(tmp_path, config, tensors | {"extra": tensors[dense]})
    with pytest.raises(UserError, match=r"1 tensors have no place .* 'extra'"):
        qf.from_pretrained(path)
    del tensors[dense]
    published.write(tmp_path, config, tensors)
    with pytest.raises(UserError, match=f"no tensor '{dense}'"):
        qf.from_pretrained(path)


def test_gates_of_the_original_are_found_and_softmax_is_asked_for(tmp_path):
    tensors = published.weights("BertForMaskedLM")
    rng = np.random.default_rng(0)
    for layer in range(2):
        for head in range(2):
            name = f"bert.encoder.layer.{layer}.attention.self.alpha.{head}"
            shapes = {"0.weight": (3, 8), "0.bias": (3,), "2.weight": (1, 3), "2.bias": (1,)}
            for end, shape in shapes.items():
                tensors[f"{name}.{end}"] = rng.normal(size=shape).astype(np.float32)
    path = published.write(tmp_path, published.config_json("BertForMaskedLM"), tensors)
    attention = {"softmax": "clipped", "gamma": -0.1}
    model, params = qf.from_pretrained(path, attention=attention)
    assert (model.config.gate.kind, model.config.gate.hidden) == ("mlp", 3)
    assert model.config.softmax.gamma == -0.1
    kernel = params["layer_1"]["attention"]["gate"]["kernel"]
    expected = tensors["bert.encoder.layer.1.attention.self.alpha.1.2.weight"][0]
    np.testing.assert_array_equal(kernel[1], expected)


def test_pooling_is_that_of_sentence_transformers(tmp_path):
    path = published.saved(tmp_path, "BertModel")
    modes = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True}
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert qf.from_pretrained(path)[0].config.pooling == "cls"
    modes |= {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    with pytest.raises(UserError, match="pools by pooling_mode_max_tokens"):
        qf.from_pretrained(path)


def test_images_are_prepared_as_published(tmp_path):
    path = published.saved(tmp_path, "ViTForImageClassification")
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2], "crop_pct": 0.9}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    config = read_folder(path).config
    assert tuple(config.model.pixel_mean) == (0.1, 0.2, 0.3)
    assert tuple(config.model.pixel_std) == (1.0, 1.0, 2.0)
    assert config.data.eval_crop == 0.9


def test_classes_have_their_published_names(tmp_path):
    name = "BertForSequenceClassification"
    assert "classes" not in read_folder(published.saved(tmp_path, name)).assets
    config = published.config_json(name)
    config["id2label"] = {"2": "good", "0": "bad", "1": "neither"}
    found = read_folder(published.write(tmp_path, config, published.weights(name)))
    assert found.assets["classes"] == ["bad", "neither", "good"]


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    path = published.saved(tmp_path, "BertModel")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(UserError, match="has 55 tokens, its model only 40"):
        read_folder(path)
    (tmp_path / "vocab.txt").write_text("\n".join(words[:40]))
    assert len(read_folder(path).assets["tokenizer"]["model"]["vocab"]) == 40


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"should be a folder with a config\.json"):
        qf.from_pretrained(str(tmp_path))
