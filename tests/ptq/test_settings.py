"""Columns of the results and what they mean for the scheme."""

import pytest

from quantizable_flax import QuantSpec, UserError, build_model, default_config
from quantizable_flax.ptq.settings import (
    check_setting,
    check_spec,
    make_spec,
    parse_setting,
    site_names,
)
from quantizable_flax.quantization.spec import HADAMARD
from tests.small import small_config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w8a8", QuantSpec(8, 8)),
        ("w4a8+mse+channel", QuantSpec(4, 8, weight_estimator="mse", weight_per_channel=True)),
        ("w8a8+token", QuantSpec(8, 8, activation_ranges="token")),
        (
            "w8a8+symmetric+act_mse",
            QuantSpec(8, 8, activation_symmetric=True, activation_estimator="mse"),
        ),
        ("a8+percentile=99.999", QuantSpec(None, 8, percentile=99.999)),
        ("w8", QuantSpec(8, None)),
        ("w4a8+hadamard+channel", QuantSpec(4, 8, hadamard=HADAMARD, weight_per_channel=True)),
    ],
)
def test_options_set_fields_of_the_scheme(name, expected):
    assert make_spec(default_config(), name) == expected


def test_smoothing_has_a_default_and_a_value():
    assert parse_setting("w8a8").smooth is None
    assert parse_setting("w8a8+smooth").smooth == 0.5
    assert parse_setting("w8a8+token+smooth=0.8").smooth == 0.8


def test_every_key_of_the_configuration_arrives():
    config = default_config("opt")
    changes = {
        "coverage": "all+int16_final_LN",
        "gated_context": False,
        "weight_percentile": 99.0,
        "weight_per_channel": True,
        "activation_symmetric": True,
        "activation_ranges": "token",
        "momentum": 0.5,
        "percentile": 99.9,
        "float_sites": ".*scores",
        "site_bits": "layer_0/.*=4 .*/probs=16",
    }
    config.quant.update(changes)
    assert make_spec(config, "w6a4", backend="int8") == QuantSpec(
        6,
        4,
        weight_percentile=99.0,
        weight_per_channel=True,
        activation_symmetric=True,
        activation_ranges="token",
        momentum=0.5,
        percentile=99.9,
        head=True,
        final_layer_norm_bits=16,
        gated_context=False,
        float_sites=".*scores",
        site_bits=(("layer_0/.*", 4), (".*/probs", 16)),
        backend="int8",
    )
    config.quant.update({"weight_estimator": "mse", "weight_percentile": None, "percentile": None})
    config.quant.activation_estimator = "mse_last"
    spec = make_spec(config, "w8a8")
    assert (spec.weight_estimator, spec.activation_estimator) == ("mse", "mse_last")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8a8+mze", r"must be one of token, mse.*found 'mze' \(did you mean 'mse'\?\)"),
        ("w8a8+token=3", r"\+token takes no value, found 'token=3'"),
        ("w8a8+smooth=x", r"\+smooth takes a number, found 'x'"),
        ("w8a8+percentile", r"\+percentile takes a number, found ''"),
        ("eight", "must read like w8a8"),
    ],
)
def test_mistakes_in_a_setting(name, message):
    with pytest.raises(UserError, match=message):
        parse_setting(name)


@pytest.mark.parametrize("text", ["layer_0", "=4", ".*=x", ".*=4=", ".*=1", ".*=17"])
def test_mistakes_in_site_bits(text):
    config = default_config()
    config.quant.site_bits = text
    with pytest.raises(UserError, match=r"quant\.site_bits must"):
        make_spec(config, "w8a8")


def test_an_expression_must_match_a_site():
    model = build_model(small_config("bert"))
    for spec in (QuantSpec(float_sites=r"layer_0/.*"), QuantSpec(site_bits=((r".*/scores", 4),))):
        check_spec(model, spec)
    with pytest.raises(UserError, match=r"'layer_0/attention/scorse'.*nearest are layer_0/att"):
        check_spec(model, QuantSpec(float_sites="layer_0/attention/scorse"))
    # A part of a name is no match: the whole name must be described.
    with pytest.raises(UserError, match=r"in full.*scores"):
        check_spec(model, QuantSpec(site_bits=(("scores", 4),)))
    with pytest.raises(UserError, match="is no regular expression"):
        QuantSpec(float_sites="(")


def test_names_do_not_depend_on_what_is_skipped():
    model = build_model(small_config("opt"))
    names = site_names(model, QuantSpec(float_sites=".*"))
    assert "layer_0/attention/query/weight" in names
    assert names == site_names(model, QuantSpec(None, 4, activation_ranges="token"))
    assert set(names) < set(site_names(model, QuantSpec(head=True)))


def test_a_setting_that_a_model_refuses_is_told_before_it_is_run():
    config = small_config("bert", norm="rms_norm_single")
    model = build_model(config)
    check_setting(model, config, parse_setting("w8a8"))
    with pytest.raises(UserError, match=r"model\.norm=rms_norm_single.*leave \+smooth out"):
        check_setting(model, config, parse_setting("w8a8+smooth"))
    with pytest.raises(UserError, match="strength must be in"):
        check_setting(model, config, parse_setting("w8a8+smooth=2"))
