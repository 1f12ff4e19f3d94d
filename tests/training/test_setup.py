"""What a run is made of."""

import pytest

from quantizable_flax.training.setup import set_up
from tests.tiny import tiny_config


@pytest.mark.parametrize("train", [False, True])
def test_a_setting_that_nothing_trains_is_told(tmp_path, caplog, train):
    changes = {"quant__train": train, "quant__train_setting": "w4a4"}
    set_up(tiny_config(tmp_path, "bert", **changes))
    told = [message for message in caplog.messages if "quant.train_setting=w4a4" in message]
    assert len(told) == (not train)


def test_the_default_setting_is_not_told(tmp_path, caplog):
    set_up(tiny_config(tmp_path, "bert"))
    assert not caplog.messages
