"""`QuantSpec` and the short names that it is read from."""

import pytest

from quantizable_flax import QuantSpec, UserError, build_model
from quantizable_flax.models.build import with_quant
from quantizable_flax.quantization.spec import parse_bits, parse_coverage
from tests.small import small_config


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight_bits": 1}, "weight_bits must be in 2..16, found 1"),
        ({"activation_bits": 17}, "activation_bits must be in 2..16, found 17"),
        ({"layer_norm_bits": 32}, "layer_norm_bits must be in 2..16, found 32"),
        ({"final_layer_norm_bits": 0}, "final_layer_norm_bits must be in 2..16, found 0"),
        ({"weight_estimator": "mse2"}, "found 'mse2'.*did you mean 'mse'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), found 1.0"),
        ({"percentile": 50.0}, r"percentile must be in \(50, 100\], found 50.0"),
        ({"weight_percentile": 101}, r"weight_percentile must be in \(50, 100\], found 101"),
        ({"activation_estimator": "mse_lst"}, "found 'mse_lst'.*did you mean 'mse_last'"),
        ({"activation_estimator": "mse", "percentile": 99.9}, "percentile is of .*=minmax"),
        ({"weight_estimator": "mse", "weight_percentile": 99.9}, "weight_percentile is of"),
    ],
)
def test_wrong_options_are_named(options, sentence):
    with pytest.raises(UserError, match=sentence):
        QuantSpec(**options)


@pytest.mark.parametrize(
    ("name", "bits"), [("w8a8", (8, 8)), ("w4a16", (4, 16)), ("w8", (8, None)), ("a6", (None, 6))]
)
def test_bit_widths_are_read(name, bits):
    assert parse_bits(name) == bits


@pytest.mark.parametrize("name", ["", "8", "w8a", "a8w8", "w8a8x", "W8A8"])
def test_unreadable_bit_widths_are_named(name):
    with pytest.raises(UserError, match=f"must read like w8a8, w4a8, w8 or a8, found '{name}'"):
        parse_bits(name)


@pytest.mark.parametrize(
    ("name", "head", "layer_norm", "final"),
    [
        ("all", True, None, None),
        ("fp32_head", False, None, None),
        ("fp32_head+int16_final_LN", False, None, 16),
        ("fp32_head+int16_all_LN", False, 16, None),
        ("all+int16_all_LN", True, 16, None),
    ],
)
def test_setups_are_read(name, head, layer_norm, final):
    spec = QuantSpec(**parse_coverage(name))
    found = (spec.head, spec.layer_norm_bits, spec.final_layer_norm_bits)
    assert found == (head, layer_norm, final)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "found ''"),
        ("fp16_head", r"found 'fp16_head' \(did you mean 'fp32_head'"),
        ("fp32_head+int16_LN", "joined by .*, found 'int16_LN'"),
        ("fp32_head,int16_all_LN", "found 'fp32_head,int16_all_LN'"),
        ("int16_all_LN", "must contain all or fp32_head, found 'int16_all_LN'"),
        ("all+fp32_head", r"each of its parts once, found 'all\+fp32_head'"),
        ("all+int16_all_LN+int16_all_LN", "each of its parts once"),
    ],
)
def test_unreadable_setups_are_named(name, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_coverage(name)


@pytest.mark.parametrize(
    ("options", "inner", "final"),
    [
        ({}, (8, 8), (8, 8)),
        ({"layer_norm_bits": 16}, (16, 16), (16, 16)),
        ({"final_layer_norm_bits": 16}, (8, 8), (16, 16)),
        ({"layer_norm_bits": 12, "final_layer_norm_bits": 16}, (12, 12), (16, 16)),
        # A side that is in floating point stays there.
        ({"weight_bits": None, "layer_norm_bits": 16}, (None, 16), (None, 16)),
        ({"activation_bits": None, "layer_norm_bits": 16}, (16, None), (16, None)),
    ],
)
def test_layer_norms_can_have_bits_of_their_own(options, inner, final):
    spec = QuantSpec(**options)
    for is_final, expected in ((False, inner), (True, final)):
        found = spec.for_layer_norm(final=is_final)
        assert (found.weight_bits, found.activation_bits) == expected


@pytest.mark.parametrize(
    ("family", "sizes", "has_one"),
    [
        ("bert", {}, False),
        ("opt", {}, True),
        ("opt", {"pre_layer_norm": False}, False),
        ("vit", {}, True),
    ],
)
def test_layer_norm_before_the_head_must_exist(family, sizes, has_one):
    model, spec = build_model(small_config(family, **sizes)), QuantSpec(final_layer_norm_bits=16)
    if has_one:
        assert with_quant(model, spec).config.quant == spec
    else:
        with pytest.raises(UserError, match=r"no LayerNorm before its head.*int16_final_LN"):
            with_quant(model, spec)
