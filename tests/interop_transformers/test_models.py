"""transformers computes what we compute, of the folders that either side writes.

Needs PyTorch and transformers (`pip install 'quantizable_flax[transformers]'`), and skips without.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantizable_flax as qf
from tests.make_pretrained_goldens import CASES, inputs
from tests.pretrained.written import CLIPPED, DROPPED, MLP, OTHER_CLASS, made
from tests.programs import ROOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

TOLERANCE = 1e-5  # float32 on both sides
# Of ViTModel and DeiTModel transformers makes new ones: nothing that we compute needs them.
POOLERS = {"ViTModel": "pooler.", "DeiTModel": "pooler."}


def arguments(name: str) -> dict:
    """Inputs that transformers takes, PyTorch's."""
    given = {key: torch.tensor(value) for key, value in inputs().items()}
    if name.startswith(("ViT", "DeiT")):
        return {"pixel_values": given["pixel_values"]}
    return {key: given[key] for key in ("input_ids", "attention_mask")}


def theirs(model, given: dict) -> np.ndarray:
    """Logits, or the last hidden states of a model without a head; of padding nothing is asked."""
    with torch.no_grad():
        result = model.eval()(**given)
    keys = ("logits", "prediction_logits", "last_hidden_state")
    return next(result[key] for key in keys if result.get(key) is not None).numpy()


def ours(model, params, given: dict, method: str = "__call__") -> np.ndarray:
    arrays = {key: jnp.asarray(value.numpy()) for key, value in given.items()}
    if "pixel_values" in arrays:
        arrays = {"images": arrays["pixel_values"].transpose(0, 2, 3, 1)}
    apply = jax.jit(functools.partial(model.apply, method=method))
    return np.asarray(apply({"params": params}, *arrays.values()))


def assert_close(actual: np.ndarray, expected: np.ndarray, given: dict) -> None:
    if actual.ndim == 3 and "attention_mask" in given:
        visible = given["attention_mask"].numpy().astype(bool)
        actual, expected = actual[visible], expected[visible]
    assert np.max(np.abs(expected)) > 0.1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def drawn(name: str):
    """A model of that class, whose weights are so large that attention is not uniform."""
    config, sizes = CASES[name]
    torch.manual_seed(len(name))
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in path.lower() else 0.0, 0.2)
    return model.eval()


def loaded(name: str, folder):
    """(the model that transformers reads, keys that it misses, keys that it does not know)."""
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["mismatched_keys"]
    return model.eval(), set(info["missing_keys"]), set(info["unexpected_keys"])


@pytest.mark.parametrize("name", CASES)
def test_both_compute_the_same_of_either_folder(name, tmp_path):
    original, given = drawn(name), arguments(name)
    original.save_pretrained(tmp_path / "theirs")
    model, params = qf.from_pretrained(str(tmp_path / "theirs"))
    method = "encode" if name == "OPTModel" else "__call__"
    expected = theirs(original, given)
    assert_close(ours(model, params, given, method), expected, given)
    qf.to_huggingface(model, params, str(tmp_path / "ours"))
    kind = name if name == "OPTModel" else OTHER_CLASS.get(name, name)
    again, missing, unexpected = loaded(kind, tmp_path / "ours")
    assert {key.startswith(POOLERS.get(name, "-")) for key in missing} <= {True}
    assert not unexpected
    assert_close(theirs(again, given), expected, given)
    dropped = DROPPED.get(name, "-")
    before = {key: x for key, x in original.state_dict().items() if not key.startswith(dropped)}
    after = {key: x for key, x in again.state_dict().items() if key not in missing}
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def documented():
    """The functions of the page in docs."""
    page = (ROOT / "docs" / "transformers_attention.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert sum(map(bool, code.splitlines())) <= 60
    names: dict = {}
    exec(compile(code, "docs/transformers_attention.md", "exec"), names)
    return names["attend_as_trained"]


POOLED = {"gate": "linear", "gate_pooling": "visible"}
GATED = [
    ("bert", "BertForMaskedLM", CLIPPED | MLP),
    ("bert", "BertForMaskedLM", POOLED | {"softmax": "clipped", "alpha": 2.0}),
    ("bert", "BertForMaskedLM", {"gate": "unconditional", "gate_finetune": True}),
    ("bert", "BertForMaskedLM", CLIPPED | {"blind_queries": "uniform"}),
    ("roberta", "RobertaForMaskedLM", CLIPPED | {"gate": "linear", "gate_pooling": "all"}),
    ("distilbert", "DistilBertForMaskedLM", CLIPPED | MLP),
    ("opt", "OPTForCausalLM", CLIPPED | {"gate": "linear", "gate_pi_init": 0.25}),
    ("opt", "OPTForCausalLM", CLIPPED | {"gate": "all_heads_linear"}),
    ("vit", "ViTForImageClassification", CLIPPED | MLP),
    ("vit", "ViTForImageClassification", CLIPPED | POOLED),
    ("vit", "DeiTForImageClassification", CLIPPED | MLP),
]


@pytest.mark.parametrize(("family", "name", "attention"), GATED)
def test_the_documented_module_computes_gates_and_clipped_softmax(
    family, name, attention, tmp_path
):
    changes = {"roberta": {"pad_token_id": 1}, "vit": {"patch_size": 4, "image_size": 8}}
    token = {"distillation": "token"} if name.startswith("DeiT") else {}
    model, params = made(family, attention, **changes.get(family, {}), **token)
    params = jax.tree.map(lambda x: 0.3 * x, params)
    qf.to_huggingface(model, params, str(tmp_path / "ours"))
    again, missing, unexpected = loaded(name, tmp_path / "ours")
    assert not missing
    assert bool(unexpected) == ("gate" in attention)
    assert all(".alpha" in key for key in unexpected)
    given = arguments(name)
    expected = ours(model, params, given)
    vanilla = theirs(again, given)
    assert np.max(np.abs(vanilla - expected)) > 1e-3
    again = documented()(again, tmp_path / "ours")
    assert_close(theirs(again, given), expected, given)
    again.save_pretrained(tmp_path / "saved")
    read, kept = qf.from_pretrained(str(tmp_path / "saved"))
    assert (read.config.softmax, read.config.gate) == (model.config.softmax, model.config.gate)
    jax.tree.map(np.testing.assert_array_equal, kept, params)
