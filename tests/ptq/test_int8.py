"""Conversion to int8 codes: what is kept, what is dropped, and what can be stored."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from quantizable_flax import QuantSpec, UserError
from quantizable_flax.models.build import with_quant
from quantizable_flax.ptq.int8 import size_in_bytes, to_int8
from tests.ptq.int8_case import check_agreement, inputs_of, make_case
from tests.small import small_model

FAMILIES = ("bert", "opt", "vit")
HEAD = QuantSpec(head=True)


def flat(tree) -> dict[str, jax.Array]:
    return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_replace_weights(family):
    case = make_case(family, HEAD)
    before, after = flat(case.params), flat(case.codes)
    gone = set(before) - set(after)
    assert gone == {path for path in before if not path.endswith("bias")}
    codes = {path: x for path, x in after.items() if path.endswith("/codes")}
    assert len(codes) == len(gone)
    for path, x in codes.items():
        assert x.dtype == jnp.int8, path
        *module, _, parameter, _ = path.split("/")
        assert x.shape == before["/".join((*module, parameter))].shape
    # Signed weights have no zero point; the LayerNorms' scales are all positive, and have one.
    shifted = {path.removesuffix("zero_point") for path in after if path.endswith("zero_point")}
    norms = {path.removesuffix("codes") for path in codes if "layer_norm" in path}
    assert shifted == norms != set()
    # Activations have their ranges, and every value is an array.
    ranges = {path.removesuffix("/range") for path in flat(case.ranges)}
    kept = {path.removesuffix("/range/min") for path in after if path.endswith("/range/min")}
    assert kept == {path for path in ranges if not path.endswith("weight")}


def test_sums_are_kept_where_products_need_them():
    codes = flat(make_case("opt", HEAD).codes)
    for path, x in codes.items():
        if path.endswith("kernel/sums"):
            np.testing.assert_array_equal(x, np.sum(codes[f"{path[:-4]}codes"], 0, dtype=np.int32))
    table = codes["embeddings/word/weight/embedding/codes"]
    sums = codes["embeddings/word/weight/embedding/sums"]
    np.testing.assert_array_equal(sums, np.sum(table, 1, dtype=np.int32))
    assert "embeddings/position/weight/embedding/sums" not in codes


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_without_negative_values(per_channel):
    """Their grid is unsigned, so codes in int8 have a zero point at its lower end."""
    _, params = small_model("opt")
    for name in ("ffn_in", "ffn_out"):
        kernel = params["layer_0"][name]["kernel"]
        params["layer_0"][name]["kernel"] = jnp.abs(kernel) + 0.01
    spec = dataclasses.replace(HEAD, weight_per_channel=per_channel)
    case, inputs = make_case("opt", spec, params=params), inputs_of("opt")
    stored = case.codes["layer_0"]["ffn_in"]["weight"]["kernel"]
    assert np.all(np.asarray(stored["zero_point"]) == -128)
    found = check_agreement(case, *inputs)
    floats = case.in_float(*inputs)
    assert np.abs(found - floats).max() < 0.1 * np.abs(floats).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_size(family):
    case = make_case(family, HEAD)
    ratio = size_in_bytes(case.codes) / size_in_bytes(case.params)
    weights = sum(x.size for path, x in flat(case.params).items() if not path.endswith("bias"))
    floats = sum(x.size for x in jax.tree.leaves(case.params))
    least = (weights + 4 * (floats - weights)) / (4 * floats)
    # Beside codes and biases: scales, sums and ranges.
    assert least < ratio < least + 0.06 < 0.4


def test_a_table_that_the_head_reads_in_floating_point_stays():
    case = make_case("bert", QuantSpec())
    stored = flat(case.codes)
    np.testing.assert_array_equal(
        stored["embeddings/word/embedding"], case.params["embeddings"]["word"]["embedding"]
    )
    assert "embeddings/word/weight/embedding/codes" not in stored
    assert stored["embeddings/position/weight/embedding/codes"].dtype == jnp.int8
    np.testing.assert_array_equal(
        stored["mlm_head/dense/kernel"], case.params["mlm_head"]["dense"]["kernel"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_survive_plain_numpy(family):
    case, inputs = make_case(family, HEAD), inputs_of(family)
    file = io.BytesIO()
    np.savez(file, **{path: np.asarray(x) for path, x in flat(case.codes).items()})
    file.seek(0)
    with np.load(file) as arrays:
        codes = traverse_util.unflatten_dict(dict(arrays), sep="/")
    expected = case.on_integers(*inputs)
    np.testing.assert_array_equal(case._replace(codes=codes).on_integers(*inputs), expected)
    # As constants of the program, too: folding them may move a value to the next grid step.
    closed = jax.jit(lambda *x: case.native.apply({"params": codes}, *x))(*inputs)
    np.testing.assert_allclose(closed, expected, atol=0.05 * np.abs(expected).max())


def test_a_model_in_floating_point_is_named():
    model, params = small_model("vit")
    with pytest.raises(UserError, match="needs a quant spec, found a model in floating point"):
        to_int8(model, params, {})


def test_converting_twice_gives_the_same():
    case = make_case("vit", HEAD)
    native, codes = to_int8(case.native, case.params, case.ranges)
    assert native == case.native == with_quant(case.plain, case.native.config.quant)
    assert native.config.quant == dataclasses.replace(HEAD, backend="int8")
    jax.tree.map(np.testing.assert_array_equal, codes, case.codes)


@pytest.mark.parametrize("spec", [{"weight_bits": None}, {"weight_bits": 16}])
def test_models_without_static_ranges_or_codes(spec):
    """Tokens have their own ranges: nothing is calibrated, or nothing of 8 bits."""
    case = make_case("bert", QuantSpec(activation_ranges="token", head=True, **spec))
    check_agreement(case, *inputs_of("bert"))
    assert not any(x.dtype == jnp.int8 for x in jax.tree.leaves(case.codes))
