"""What a run is made of."""

import pytest

from quantizable_flax.training.setup import set_up
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("switch", "on", "key", "value"),
    [
        ("quant.train", True, "quant.train_setting", "w4a4"),
        ("model.attention.gate", "linear", "model.attention.gate_pooling", "all"),
        ("optimizer.name", "muon", "optimizer.muon_learning_rate", 1e-3),
        ("penalty.weight", 0.1, "penalty.power", 6),
    ],
)
def test_a_key_without_effect_is_told(tmp_path, caplog, switch, on, key, value):
    config = tiny_config(tmp_path, "bert")
    config.update_from_flattened_dict({key: value})
    set_up(config)
    assert caplog.messages == [f"{key}={value} has no effect with {switch}={OFF[switch]}."]
    caplog.clear()
    config.update_from_flattened_dict({switch: on})
    set_up(config)
    assert not caplog.messages


OFF = {
    "quant.train": "False",
    "model.attention.gate": "none",
    "optimizer.name": "adamw",
    "penalty.weight": "0.0",
}


def test_the_default_setting_is_not_told(tmp_path, caplog):
    set_up(tiny_config(tmp_path, "bert"))
    assert not caplog.messages
