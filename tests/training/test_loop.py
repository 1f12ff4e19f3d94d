"""What a run leaves behind, and how it stops when it must."""

import json

import pytest
from etils import epath

import quantizable_flax as qf
from quantizable_flax.checkpoint import store
from quantizable_flax.config import from_dict
from quantizable_flax.data.pipeline import EvalBatches
from quantizable_flax.training.loop import train
from quantizable_flax.training.run import DivergedError
from tests.tiny import tiny_config


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(
        folder,
        model__num_layers=2,
        train__eval_every=40,
        train__telemetry_every=40,
        model__attention__softmax="clipped",
        model__attention__gamma=-0.03,
        model__attention__gate="mlp",
    )
    train(config, str(folder / "run"))
    return folder / "run"


def test_loss_falls_and_every_group_is_logged(run):
    by_group = {}
    for line in lines(run):
        by_group.setdefault(line["group"], []).append(line)
    assert [line["step"] for line in by_group["train"]] == [20, 40, 60, 80]
    assert by_group["validation"][-1]["perplexity"] < by_group["validation"][0]["perplexity"]
    assert [line["step"] for line in by_group["telemetry"]] == [0, 40]


def test_rows_say_how_fast_and_where_time_went(run):
    rows = lines(run)
    (compiled,) = (row for row in rows if row["group"] == "compile")
    assert compiled["step"] == 1
    training = [row for row in rows if row["group"] == "train"]
    for row in training:
        assert row["tokens_per_second"] == pytest.approx(16 * row["sequences_per_second"])
        assert row["sequences_per_second"] == pytest.approx(8 * row["steps_per_second"])
        assert row["device_flops_per_second"] > 0
        assert "mfu" not in row  # of a CPU no peak is known
        shares = [value for key, value in row.items() if key.endswith("_share")]
        assert len(shares) == 5
        assert 0 < sum(shares) <= 1
    assert training[0]["compile_share"] > 0
    assert [row["compile_share"] for row in training[1:]] == [0, 0, 0]
    # Telemetry at steps 0 and 40, validation at 40 and 80, where the row comes before it.
    assert [row["evaluation_share"] > 0 for row in training] == [True, False, True, False]
    assert [row["checkpoint_share"] > 0 for row in training] == [False, False, True, False]


def test_run_announces_itself_and_sums_up(tmp_path, capfd):
    train(tiny_config(tmp_path, train__steps=20), str(tmp_path / "run"))
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first.startswith("run: mesh data=")
    assert "x 8 sequences x (projections " in first
    assert last.startswith("20 steps in ")
    train(tiny_config(tmp_path, train__steps=20), str(tmp_path / "run"))
    again = capfd.readouterr().err
    assert "already at step 20" in again
    assert "mesh" not in again
    assert "steps in" not in again


def test_telemetry_has_norms_gates_per_head_and_exact_zeros(run):
    first = next(line for line in lines(run) if line["group"] == "telemetry")
    for layer in ("layer_0", "layer_1"):
        assert first[f"{layer}/ffn_residual:inf_norm"] > 0
        assert first[f"{layer}/ffn_layer_norm/output:kurtosis"] > 1  # no sample has less
        # At initialisation every gate is half open.
        assert first[f"{layer}/attention/gate:mean"] == pytest.approx([0.5, 0.5], abs=0.01)
        # 16 keys share the weight: hardly any probability lies below 0.03 / 1.03.
        assert 0 <= first[f"{layer}/attention:zero_share"] < 0.2


def test_tensorboard_files_hold_the_scalars(run):
    (events,) = (run / "tensorboard").glob("events.*")
    content = events.read_bytes()
    assert b"train/loss" in content
    assert b"validation/perplexity" in content


def test_checkpoint_explains_itself(run):
    notes = store.read_notes(epath.Path(run), 80)
    assert from_dict(notes.config).model.attention.gate == "mlp"
    assert notes.info["step"] == 80
    assert notes.info["versions"]["jax"]
    assert "model" in notes.assets["tokenizer"]
    model, params = qf.load(str(run))
    assert params["layer_0"]["attention"]["gate"]["hidden_kernel"].shape == (2, 8, 4)
    assert model.config.num_layers == 2


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    train(tiny_config(tmp_path, train__steps=40), str(tmp_path / "run"))
    config = tiny_config(tmp_path, optimizer__learning_rate=1e30, optimizer__warmup_steps=0)
    with pytest.raises(DivergedError, match="the checkpoint of step 40 is kept"):
        train(config, str(tmp_path / "run"))
    assert store.saved_steps(epath.Path(tmp_path / "run")) == [40]
    qf.load(str(tmp_path / "run"))


def test_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(qf.UserError, match=r"tokenizer has \d+ tokens but model.vocab_size is 50"):
        train(tiny_config(tmp_path, model__vocab_size=50), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_foreign_config_json_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(qf.UserError, match="would be overwritten"):
        train(tiny_config(tmp_path), str(tmp_path / "run"))
    assert (tmp_path / "run" / "config.json").read_text() == '{"model_type": "bert"}'


@pytest.mark.parametrize("key", ["checkpoint__every", "checkpoint__keep", "train__log_every"])
def test_counts_must_be_positive(tmp_path, key):
    with pytest.raises(qf.UserError, match="must be at least 1, found 0"):
        train(tiny_config(tmp_path, **{key: 0}), str(tmp_path / "run"))


def test_validation_reads_no_more_batches_than_asked(tmp_path, monkeypatch):
    taken = []

    class Counted(EvalBatches):
        def __iter__(self):
            for batch in super().__iter__():
                taken.append(batch)
                yield batch

    monkeypatch.setattr("quantizable_flax.data.pipeline.EvalBatches", Counted)
    config = tiny_config(
        tmp_path, train__steps=10, train__eval_every=10, train__eval_batches=2, eval__batch_size=4
    )
    train(config, str(tmp_path / "run"))
    assert len(taken) == 2
