"""`qf.evaluate`: the row of a model that is of no family, without `config` or `example_batch`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantizable_flax as qf

VOCAB = 12


class Own(nn.Module):
    """A layer between an embedding and a head."""

    quant: qf.QuantSpec | None = None

    @nn.compact
    def __call__(self, ids_BxT):
        x = nn.Embed(VOCAB, 16, name="token", embedding_init=nn.initializers.normal(1.0))(ids_BxT)
        y = qf.Dense(16, quant=self.quant, activation=nn.relu, name="dense")(x)
        x = qf.Site(self.quant, name="sum")(x + qf.values(y))
        return qf.values(qf.Dense(VOCAB, quant=self.quant, name="head")(x))

    def loss(self, batch):
        return qf.token_scores(self(batch["ids"]), batch["labels"])


class Scalar(Own):
    """Whose loss is a mean already."""

    def loss(self, batch):
        return jnp.mean(self(batch["ids"]))


class Plain(nn.Module):
    """Neither `quant` nor `loss`."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


def batch_of(seed):
    ids, labels = jax.random.randint(jax.random.key(seed), (2, 4, 6), 0, VOCAB)
    return {"ids": ids, "labels": labels.at[:, :2].set(-100)}


HELD_OUT, SEEN = [batch_of(seed) for seed in (1, 2)], [batch_of(seed) for seed in (3, 4, 5)]
OPTIONS = {"calibration_batches": SEEN, "outliers": "sum"}


@pytest.fixture(scope="module")
def params():
    params = nn.unbox(Own().init(jax.random.key(0), SEEN[0], method="loss"))["params"]
    kernel = 0.3 * jax.random.normal(jax.random.key(6), (16, 16))
    params["dense"]["kernel"] = kernel.at[0, 0].set(20.0)  # so that four bits cost something
    params["head"]["kernel"] = params["head"]["kernel"] * 10.0
    return params


def log_probs(params, ids, model=None, ranges=None):
    logits = (model or Own()).apply({"params": params, "ranges": ranges or {}}, ids)
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def perplexity(params, batches, **options):
    """By numpy, over the labelled tokens of all batches."""
    total, count = 0.0, 0
    for batch in batches:
        found, labels = log_probs(params, batch["ids"], **options), np.asarray(batch["labels"])
        for row, column in zip(*np.nonzero(labels != -100), strict=True):
            total -= found[row, column, labels[row, column]]
            count += 1
    return np.exp(total / count)


def test_the_row_is_what_the_definitions_give(params):
    row = qf.evaluate(Own(), params, HELD_OUT, settings=("w8a8", "w3a8"), **OPTIONS)
    assert list(row) == ["fp", "fp_loss", "max_inf_norm", "avg_kurtosis", "w8a8", "w3a8"]
    assert row["fp"] == pytest.approx(perplexity(params, HELD_OUT), rel=1e-5)
    assert row["fp_loss"] == pytest.approx(np.log(row["fp"]), rel=1e-6)
    norms, kurtoses = [], []
    for batch in HELD_OUT:
        x = params["token"]["embedding"][batch["ids"]]
        y = x @ params["dense"]["kernel"] + params["dense"]["bias"][None, None]
        for sample in np.asarray(x + jax.nn.relu(y), np.float64):
            norms.append(np.abs(sample).max())
            centred = sample - sample.mean()
            kurtoses.append((centred**4).mean() / sample.var(ddof=1) ** 2)
    assert row["max_inf_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert row["avg_kurtosis"] == pytest.approx(np.mean(kurtoses), rel=1e-4)
    for name, bits in (("w8a8", 8), ("w3a8", 3)):
        model = qf.with_quant(Own(), qf.QuantSpec(weight_bits=bits))
        ranges = qf.calibrate(model, params, SEEN)
        expected = perplexity(params, HELD_OUT, model=model, ranges=ranges)
        assert row[name] == pytest.approx(expected, rel=1e-5)
    cost8, cost3 = (abs(np.log(row[name] / row["fp"])) for name in ("w8a8", "w3a8"))
    assert 0 < cost8 < 0.1 < cost3


def test_boxed_parameters_other_metrics_and_padding(params):
    boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), params)
    weights = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
    padded = [{**batch, "example_weight": weights} for batch in HELD_OUT]
    row = qf.evaluate(Own(), boxed, padded, metric="top1", settings=(), **OPTIONS)
    right = []
    for batch in HELD_OUT:
        found = log_probs(params, batch["ids"]).argmax(-1) == batch["labels"]
        right.append(found[np.array([0, 2, 3]), 2:])
    assert row["fp"] == pytest.approx(100.0 * np.mean(right))


def test_a_model_of_ones_own_runs_in_integers(params):
    model = qf.with_quant(Own(), qf.QuantSpec())
    ranges = qf.calibrate(model, params, SEEN)
    served, codes = qf.to_int8(model, params, ranges, SEEN[0])
    assert [x.shape for x in jax.tree.leaves(codes) if x.dtype == jnp.int8] == [(16, 16), (16, 12)]
    ids = HELD_OUT[0]["ids"]
    simulated = model.apply({"params": params, "ranges": ranges}, ids)
    integers = served.apply({"params": codes}, ids)
    np.testing.assert_allclose(integers, simulated, atol=1e-4 * np.abs(simulated).max())
    assert np.abs(simulated - Own().apply({"params": params}, ids)).max() > 0


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (Own(), {"outliers": "sums"}, "'sums' matches no site in full.* dense/output, head/output"),
        (Own(), {"batches": iter(HELD_OUT)}, "batches must be a list .* found an iterator"),
        (Own(), {"calibration_batches": []}, "calibration_batches must hold at least one batch"),
        (Own(), {"settings": ("w8a8+smooth",)}, "SmoothQuant .* found no `folds` in Own"),
        (Own(), {"settings": ("w8a8+sm",)}, "found 'sm'"),
        (Own(), {"settings": ("w8a8+hadamard",)}, r"of \+hadamard matches none of the .* sites"),
        (Own(), {"metric": "loss"}, "metric .*'loss'"),
        (Scalar(), {}, "Scalar.loss must return what token_scores does, found ShapeDtypeStruct"),
        (Plain(), {}, "needs a field `quant`, found none in Plain"),
    ],
)
def test_mistakes_are_named(params, model, changes, message):
    options = {"batches": HELD_OUT, **OPTIONS, **changes}
    with pytest.raises(qf.UserError, match=message):
        qf.evaluate(model, params, options.pop("batches"), **options)


def test_a_loss_is_asked_for(params):
    class Mute(nn.Module):
        quant: qf.QuantSpec | None = None

    with pytest.raises(qf.UserError, match=r"a method loss\(batch\), found none in Mute"):
        qf.evaluate(Mute(), params, HELD_OUT, **OPTIONS)
