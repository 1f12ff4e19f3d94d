"""Muon: its update, what it leaves to AdamW, its state on a mesh, and an exact continuation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from quantizable_flax import UserError
from quantizable_flax.models.build import build_model
from quantizable_flax.runtime.mesh import make_mesh
from quantizable_flax.training.loop import train
from quantizable_flax.training.optimizer import make_optimizer
from quantizable_flax.training.step import abstract_state
from tests.small import small_model
from tests.tiny import tiny_config
from tests.training.test_resume import assert_bitwise_equal, saved
from tests.training.test_step import NO_DROPOUT, losses

MUON = {"optimizer__name": "muon"}
MATRICES = r"layer_\d+/(attention/(query|key|value|output)|ffn_in|ffn_out)/kernel"
GATED = {"gate": "all_heads_linear"}


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five steps of X <- a X + (b A + c A^2) X with A = X X^T, of X over its Frobenius norm."""
    x = x / np.sqrt(np.sum(x**2))
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon_direction(gradients: list[np.ndarray], beta: float) -> np.ndarray:
    """Of the last gradient: Nesterov's momentum with corrected bias, orthogonal, of RMS 0.2."""
    mean = np.zeros_like(gradients[0])
    for gradient in gradients:
        mean = beta * mean + (1 - beta) * gradient
    step = len(gradients)
    ahead = beta * mean / (1 - beta ** (step + 1))
    ahead = ahead + (1 - beta) * gradients[-1] / (1 - beta**step)
    return newton_schulz(ahead) * 0.2 * np.sqrt(max(ahead.shape))


def adam_direction(gradients: list[np.ndarray], b1: float, b2: float, eps: float) -> np.ndarray:
    mean = square = 0.0
    for gradient in gradients:
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * gradient**2
    step = len(gradients)
    return mean / (1 - b1**step) / (np.sqrt(square / (1 - b2**step)) + eps)


def flat(tree) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(tree, sep="/")


def random_gradients(params, count: int) -> list:
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda x: jnp.float32(rng.normal(0.0, 0.1, x.shape)), params)
        for _ in range(count)
    ]


def updates_of(config, params, gradients) -> dict[str, np.ndarray]:
    """The last of the steps' updates."""
    optimizer = make_optimizer(config, 100)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            updates, state = jax.jit(optimizer.update)(gradient, state, params)
    return flat(jax.device_get(updates))


def test_updates_are_the_formulas(tmp_path):
    _, params = small_model("bert", GATED)
    keys = {
        "optimizer__learning_rate": 0.01,
        "optimizer__muon_learning_rate": 0.04,
        "optimizer__muon_momentum": 0.9,
        "optimizer__weight_decay": 0.3,
        "optimizer__warmup_steps": 0,
        "optimizer__clip_norm": 0.5,
    }
    config = tiny_config(tmp_path, **MUON, **keys)
    gradients = random_gradients(params, 3)
    found = updates_of(config, params, gradients)
    norms = [np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in flat(g).values())) for g in gradients]
    rate = 1 - 2 / 100  # of the third step
    own = [name for name in found if re.fullmatch(MATRICES, name)]
    assert len(own) == 6
    for name, update in found.items():
        seen = [
            np.float64(flat(g)[name]) * min(1, 0.5 / norm)
            for g, norm in zip(gradients, norms, strict=True)
        ]
        if name in own:
            step = 0.04 * rate, muon_direction(seen, 0.9)
            # Five steps leave singular values between about 0.7 and 1.2.
            values = np.linalg.svd(step[1], compute_uv=False) / (0.2 * np.sqrt(max(update.shape)))
            assert 0.5 < values.min() < values.max() < 1.3
        else:
            step = 0.01 * rate, adam_direction(seen, 0.9, 0.999, 1e-8)
        decay = 0.3 if not re.search(r"(bias|scale)$", name) else 0.0
        expected = -step[0] * (step[1] + decay * np.float64(flat(params)[name]))
        # Five products in float32 that amplify; Adam's division.
        np.testing.assert_allclose(
            update, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_all_but_the_layers_matrices_go_as_by_adamw(tmp_path, family):
    _, params = small_model(family, {"gate": "mlp", "sink": "learned"}, norm="rms_norm_single")
    # As of a run that learns its grids.
    params["layer_0"]["ffn_in"]["weight"] = {"grid": {"scale": jnp.float32(0.1)}}
    gradients = random_gradients(params, 2)
    changes = {"optimizer__warmup_steps": 0, "quant__range_learning_rate": 1e-5}
    usual = updates_of(tiny_config(tmp_path, family, **changes), params, gradients)
    found = updates_of(tiny_config(tmp_path, family, **changes, **MUON), params, gradients)
    differ = {name for name in usual if not np.array_equal(usual[name], found[name])}
    assert differ == {name for name in usual if re.fullmatch(MATRICES, name)}
    assert len(differ) == 6


def test_frozen_matrices_stay(tmp_path):
    _, params = small_model("opt")
    config = tiny_config(tmp_path, **MUON, optimizer__frozen="layer_0/ffn_in/.*")
    found = updates_of(config, params, random_gradients(params, 2))
    moved = {name: bool(np.any(update)) for name, update in found.items()}
    assert not moved["layer_0/ffn_in/kernel"]
    assert moved["layer_0/ffn_out/kernel"]


def test_its_state_is_half_of_adams_and_lies_where_the_parameters_do(tmp_path):
    sizes = {"mesh__data": 1, "mesh__fsdp": 2}
    size = {}
    for name in ("adamw", "muon"):
        config = tiny_config(tmp_path, **sizes, optimizer__name=name)
        mesh, model = make_mesh(config.mesh, jax.devices()[:2]), build_model(config)
        with jax.enable_x64(True):
            state = abstract_state(model, make_optimizer(config, 80), model.example_batch(), mesh)
        leaves = jax.tree.leaves(state.opt_state)
        assert {str(leaf.dtype) for leaf in leaves} <= {"float32", "int32"}
        size[name] = sum(leaf.size for leaf in leaves)
    own = {path: x for path, x in flat(state.params).items() if re.fullmatch(MATRICES, path)}
    assert size["adamw"] - size["muon"] == sum(x.size for x in own.values()) - 4
    (split, *_) = (
        leaf for leaf in jax.tree.leaves(state.opt_state, is_leaf=_is_split) if _is_split(leaf)
    )
    momentum = flat(split.muon.mu)
    assert momentum.keys() == own.keys()
    assert {path: x.sharding for path, x in momentum.items()} == {
        path: x.sharding for path, x in own.items()
    }
    assert "fsdp" in str(momentum["layer_0/ffn_in/kernel"].sharding.spec)
    assert flat(split.adam.mu).keys() == flat(state.params).keys() - own.keys()


def _is_split(x) -> bool:
    return hasattr(x, "muon")


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"mesh__fsdp": 2}, id="fsdp"),
        pytest.param({"mesh__tensor": 2}, id="tensor", marks=pytest.mark.slow),
    ],
)
def test_two_devices_and_micro_batches_train_as_one(tmp_path, mesh):
    changes = {**NO_DROPOUT, **MUON, "optimizer__warmup_steps": 0}
    one, _ = losses(tiny_config(tmp_path, "opt", **changes), devices=jax.devices()[:1])
    split = {"mesh__data": 1, "train__grad_accum_steps": 2, **mesh}
    config = tiny_config(tmp_path, "opt", **changes, **split)
    two, _ = losses(config, devices=jax.devices()[:2])
    # Sums in another order, which five steps of Newton and Schulz amplify.
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bitwise(tmp_path):
    changes = {
        **MUON,
        "model__norm": "rms_norm_single",
        "model__hidden_dropout": 0.1,
        "penalty__weight": 0.01,
        "train__grad_accum_steps": 2,
        "train__steps": 8,
        "train__log_every": 4,
        "checkpoint__every": 4,
    }
    train(tiny_config(tmp_path, **changes), str(tmp_path / "whole"))
    first = changes | {"train__steps": 4, "optimizer__decay_steps": 8}
    train(tiny_config(tmp_path, **first), str(tmp_path / "parts"))
    with pytest.raises(UserError, match=r'optimizer.name="muon", not "adamw"'):
        train(
            tiny_config(tmp_path, **changes | {"optimizer__name": "adamw"}), str(tmp_path / "parts")
        )
    train(tiny_config(tmp_path, **changes), str(tmp_path / "parts"))
    assert_bitwise_equal(saved(tmp_path / "parts", 8), saved(tmp_path / "whole", 8))
    text = (tmp_path / "parts" / "metrics.jsonl").read_text()
    assert '"penalty": ' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__name": "moun"}, r"optimizer\.name must be .*did you mean 'muon'"),
        ({"optimizer__muon_momentum": 1.0}, r"muon_momentum must be in \[0, 1\), found 1\.0"),
        ({"optimizer__muon_learning_rate": -0.1}, r"muon_learning_rate must not be negative"),
        ({"optimizer__muon_parameters": "layer_0/ffn/kernel"}, "matches none of the .* parameters"),
        ({"optimizer__muon_parameters": "layer_0/ffn_in/.*"}, r"ffn_in/bias of shape \(64,\)"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, changes, message):
    _, params = small_model("opt")
    with pytest.raises(UserError, match=message):
        make_optimizer(tiny_config(tmp_path, **MUON | changes), 10).init(params)
