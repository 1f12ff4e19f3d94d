"""Trained models: ONNX Runtime against the simulation, over the validation split."""

import functools
import importlib
import itertools

import jax
import numpy as np
import pytest

from quantizable_flax.checkpoint.load import load_run
from quantizable_flax.data.tasks import make_task
from quantizable_flax.evaluation.study import Evaluator
from quantizable_flax.onnx.write import to_onnx
from quantizable_flax.ptq.settings import parse_setting
from quantizable_flax.training.loop import train
from tests.onnx.case import arguments, feeds, session

RECIPES = {"bert": "quickstart", "opt": "opt_tiny", "vit": "vit_digits"}
BATCHES = 16


@pytest.fixture(
    scope="module",
    params=itertools.product(RECIPES, ["vanilla", "clipped", "gated"]),
    ids="-".join,
)
def evaluator(request, tmp_path_factory):
    """(name of the model, evaluator of a whole run of the recipe)."""
    family, variant = request.param
    config = importlib.import_module(f"configs.{RECIPES[family]}").get_config(variant)
    config.train.update({"eval_every": 0, "telemetry_every": 0})
    config.checkpoint.every = config.train.steps
    folder = tmp_path_factory.mktemp("trained")
    if family != "vit":
        config.data.cache_dir = str(folder / "cache")
    train(config, str(folder / "run"))
    run = load_run(str(folder / "run"))
    return f"{family} {variant}", Evaluator(run, make_task(run.config, run.assets))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["none", "w8a8", "w8a8+channel"])
def test_onnx_runtime_is_the_simulation(evaluator, setting):
    name, evaluator = evaluator
    family = name.split()[0]
    if setting == "none":
        model, params, ranges = evaluator.model, evaluator.params, {}
    else:
        model, params, ranges = evaluator.calibrated(parse_setting(setting))
    # As in an evaluation the scales are arguments: XLA would multiply by a constant's reciprocal,
    # which puts what lies in the middle between two codes on the other side.
    variables = {"params": params, "ranges": ranges}
    forward = functools.partial(jax.jit(model.apply), variables)
    found = session(to_onnx(model, params, ranges).model)
    normalise = jax.jit(lambda x: model.apply({}, x, method="normalise"))
    differences, own, sizes, equal, losses = [], [], [], [], []
    for batch in itertools.islice(evaluator.batches, BATCHES):
        if family == "vit":  # rounded alike: a pixel lies between two codes
            batch = {**batch, "images": np.asarray(normalise(batch["images"]))}
        elif "attention_mask" not in batch:
            batch = {**batch, "attention_mask": np.ones_like(batch["input_ids"])}
        ours = np.asarray(forward(*arguments(batch)))
        theirs = found.run(["logits"], feeds(family, model.config, batch))[0]
        differences.append(np.abs(ours - theirs).max())
        own.append(np.abs(ours - in_halves(forward, arguments(batch))).max())
        sizes.append(np.abs(ours).max())
        equal.append((ours.argmax(-1) == theirs.argmax(-1)).ravel())
        losses.append([mean_loss(family, logits, batch["labels"]) for logits in (ours, theirs)])
    worst, itself = max(differences) / max(sizes), max(own) / max(sizes)
    same = np.mean(np.concatenate(equal))
    metric = [value(family, np.mean(x)) for x in zip(*losses, strict=True)]
    print(
        f"\n{name} {setting}: {same:.5%} of {sum(map(len, equal))} predictions, largest "
        f"difference {worst:.2e} of the largest logit (the simulation's to itself in half batches "
        f"{itself:.2e}), metric {metric[0]:.5f} and {metric[1]:.5f}"
    )
    # One code that moves moves others behind it, in the simulation alone as well.
    assert worst < (1e-4 if setting == "none" else max(0.02, 2 * itself))
    assert same >= 0.999
    assert metric[1] == pytest.approx(metric[0], rel=1e-3)


def in_halves(forward, inputs) -> np.ndarray:
    """The same in two batches: sums are in another order, as in any other program."""
    half = inputs[0].shape[0] // 2
    parts = (slice(half), slice(half, None))
    return np.concatenate([np.asarray(forward(*(x[part] for x in inputs))) for part in parts])


def mean_loss(family: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """Of a batch: nats per label, or the share of right classes."""
    labels = np.asarray(labels)
    if family == "vit":
        return float(np.mean(logits.argmax(-1) == labels))
    if family == "opt":
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits[labels >= 0].astype(np.float64), labels[labels >= 0]
    own = np.take_along_axis(logits, labels[:, None], -1)[:, 0]
    highest = logits.max(-1)
    return float(np.mean(np.log(np.exp(logits - highest[:, None]).sum(-1)) + highest - own))


def value(family: str, loss: float) -> float:
    """Top-1, or perplexity."""
    return float(loss if family == "vit" else np.exp(loss))
