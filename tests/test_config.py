"""Configuration keys: their defaults, which may be unset, and how a command line says so."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict, FieldReference, config_dict

from quantizable_flax import GateConfig, QuantSpec, UserError, build_model, default_config
from quantizable_flax.aot.candidates import candidates
from quantizable_flax.checkpoint.load import Run, override_run
from quantizable_flax.config import check_set, from_dict, override, to_json
from quantizable_flax.config.defaults import FAMILIES
from quantizable_flax.config.migration import RENAMED
from quantizable_flax.data.kinds import kind_of
from quantizable_flax.models import build
from quantizable_flax.ptq.settings import make_spec

VALUES = {float: 0.25, int: 3, str: "text", bool: True, tuple: (1.0, 2.0)}


def leaves(group: ConfigDict, prefix: str = ""):
    """(path, value or reference) of every key."""
    for key, value in group.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def value_at(config: ConfigDict, path: str):
    for key in path.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_optional_key_can_be_set_and_unset(family):
    config = default_config(family)
    config.optional_tuple = config_dict.placeholder(tuple)
    config.optional_bool = config_dict.placeholder(bool)
    optional = {k: v.get_type() for k, v in leaves(config) if isinstance(v, FieldReference)}
    assert {"quant.percentile", "data.files", "model.attention.alpha"} < optional.keys()
    override(config, [f"--config.{path}={VALUES[kind]}" for path, kind in optional.items()])
    assert {path: value_at(config, path) for path in optional} == {
        path: VALUES[kind] for path, kind in optional.items()
    }
    override(config, [f"--config.{path}=None" for path in optional])
    assert all(value_at(config, path) is None for path in optional)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_key_must_have_a_value(family):
    required = [k for k, v in leaves(default_config(family)) if not isinstance(v, FieldReference)]
    assert {"train.steps", "model.attention.gate", "quant.site_bits"} < set(required)
    for path in required:
        config = default_config(family)
        with pytest.raises(UserError, match=f"^{path} cannot be unset, found None: give it a val"):
            override(config, [f"--config.{path}=None"])


def test_the_last_of_several_values_counts():
    config = default_config()
    key = "--config.model.attention.alpha"
    assert override(config, [f"{key}=0.5", key, "None"]).model.attention.alpha is None
    assert override(config, [f"{key}=None", f"{key}=0.5"]).model.attention.alpha == 0.5


def test_values_of_another_type_are_named():
    for argument in ("model.attention.alpha=none", "train.steps=many", "quant.percentile="):
        with pytest.raises(UserError, match=f"could not be read: flag --config.{argument}"):
            override(default_config(), [f"--config.{argument}"])


def test_none_is_a_gate_and_nothing_unset():
    config = override(default_config(), ["--config.model.attention.gate=none"])
    assert config.model.attention.gate == "none"


def test_a_recipe_that_leaves_out_a_value_is_refused():
    config = default_config("vit")
    config.data.augment.flip = None
    with pytest.raises(UserError, match=r"data.augment.flip cannot be unset.*default is False"):
        check_set(config)


def test_a_trained_run_can_be_evaluated_without_its_optional_keys():
    config = default_config()
    config.quant.update({"percentile": 99.9, "float_sites": "layer_0/.*"})
    run = Run(config, None, None, {}, {})
    override_run(run, ["--config.quant.percentile=None", "--config.quant.float_sites=None"])
    assert (config.quant.percentile, config.quant.float_sites) == (None, None)


def test_compiling_ahead_compares_with_an_unset_key():
    config = default_config()
    config.model.attention.softmax = "clipped"
    unset, set_ = candidates(config, ["v5e:2x2"], ["model.attention.alpha=None,0.25"])
    assert unset.config.model.attention.alpha is None
    assert set_.config.model.attention.alpha == 0.25


def test_what_an_older_version_stored_is_read_by_the_names_of_now():
    values = default_config().to_dict()
    values["train"]["accumulate"] = 4
    values["quant"] |= {"setup": "all", "skip": ".*/probs", "bits": "w4a4"}
    values["distill"] |= {"outliers": 0.06, "outlier_power": 6}
    del values["penalty"]
    values["model"]["attention"] |= {"gate": "linear", "gate_per": "head"}
    for group, key in (
        ("train", "grad_accum_steps"),
        ("quant", "coverage"),
        ("quant", "float_sites"),
        ("quant", "train_setting"),
    ):
        del values[group][key]
    del values["model"]["attention"]["gate_pooling"]
    stored = json.dumps(values)
    config = from_dict(json.loads(stored))
    assert config.train.grad_accum_steps == 4
    assert config.model.attention.gate_pooling == "visible"
    quant = config.quant
    assert (quant.coverage, quant.float_sites, quant.train_setting) == ("all", ".*/probs", "w4a4")
    assert (config.penalty.weight, config.penalty.scale, config.penalty.power) == (0.06, 3.0, 6)
    assert values == json.loads(stored)  # what was handed in is left alone
    assert from_dict(json.loads(to_json(config))).to_dict() == config.to_dict()


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_answered_with_the_new_one(old, new):
    with pytest.raises(UserError, match=f"key {old}, which is {new} now"):
        override(default_config(), [f"--config.{old}=3"])
    value_at(default_config(), new)  # there is such a key


def test_the_scheme_of_an_older_export_is_read():
    spec = QuantSpec(float_sites=".*/probs", site_bits=((".*", 4),))
    values = dataclasses.asdict(spec)
    values["skip"] = values.pop("float_sites")
    assert QuantSpec.from_dict(json.loads(json.dumps(values))) == spec


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_dataclasses(family):
    config = default_config(family)
    assert build_model(config).config == build.FAMILIES[family].config()
    config.model.attention.gate = "linear"
    assert build_model(config).config.gate == GateConfig("linear")
    # ViT's head is quantized by default, which the key setup says.
    assert make_spec(config, "w8a8") == QuantSpec(head=family == "vit")


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_what_runs_were_trained_with(family):
    config = default_config(family)
    assert config.train.loss_chunk == 128
    assert config.train.remat == "none"
    if family != "vit":
        assert config.model.pad_token_id is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_data_are_those_that_the_family_learns_from(family):
    assert kind_of(default_config(family)) == FAMILIES[family].config.data
