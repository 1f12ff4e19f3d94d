"""A golden model of any family: our module with its weights, and what it computes."""

import functools

import jax
import jax.numpy as jnp

from quantizable_flax import build_model
from quantizable_flax.interop import from_state_dict
from tests.helpers import INPUTS, batch_of, config_of, golden


class Case:
    """A golden model: its config, our model and params, the golden batch.

    `model` treats queries that see no key as the original does, `own_model` as ours by default.
    """

    def __init__(self, name: str):
        self.file = golden(name)
        self.family = self.file.config["arch"]
        self.config = config_of(self.file)
        self.weights = self.file.group("w")
        self.params = jax.tree.map(jnp.asarray, self.ours(self.weights))
        self.model = build_model(self.config)
        own = self.config.copy_and_resolve_references()
        own.model.attention.blind_queries = "zero"
        self.own_model = build_model(own)
        self.batch = batch_of(self.file)

    def ours(self, tensors):
        """Weights, or gradients, under the original's names as our tree."""
        return from_state_dict(tensors, self.config)

    def loss_and_grads(self, model):
        """The mean loss and its gradients."""

        def mean_loss(params):
            scores = model.apply({"params": params}, self.batch, method="loss")
            return scores.loss.sum() / scores.weight.sum()

        return jax.jit(jax.value_and_grad(mean_loss))(self.params)

    @functools.cached_property
    def result(self):
        return self.loss_and_grads(self.model)

    def inputs(self, rows: int | None = None):
        """The positional arguments of the model, for the first rows or all."""
        return tuple(self.batch[key][:rows] for key in INPUTS[self.family])

    def outputs(self, model, *inputs):
        """The golden outputs of `inputs` by their names."""
        apply = functools.partial(model.apply, method=OUTPUTS[self.family])
        return jax.jit(apply)({"params": self.params}, *inputs)


load = functools.cache(Case)  # by name: its compiled results serve several test files


def _bert(model, ids, mask, types):
    return {
        "hidden_0": model.embeddings(ids, mask, types, train=False),
        "hidden_last": model.encode(ids, mask, types),
        "logits": model(ids, mask, types),
    }


def _opt(model, ids, mask):
    return {
        "hidden_0": model.embed(ids, mask),
        "hidden_last": model.encode(ids, mask),
        "logits": model(ids, mask),
    }


def _vit(model, images):
    hidden = [model.embeddings(model.normalise(images), train=False)]
    for layer in model.layers:
        hidden.append(layer(hidden[-1]))
    states = {f"hidden_states/{i}": x for i, x in enumerate(hidden)}
    return {**states, "logits": model(images)}


OUTPUTS = {"bert": _bert, "opt": _opt, "vit": _vit}
