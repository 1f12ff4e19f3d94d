"""OPT with keys and values of the past: a token at a time as all at once."""

import numpy as np
import pytest

from quantizable_flax import QuantSpec
from tests.onnx.case import empty_past, float_batch, make_case, worst

ATTENTION = {"softmax": "clipped", "gamma": -0.03, "gate": "linear"}


def as_past(names, present):
    """What a call returned, as the next one takes it."""
    past = (name.replace("present", "past_key_values") for name in names)
    return dict(zip(past, present, strict=True))


METHODS = {
    **{"softmax": "clipped", "alpha": 0.4, "length_normalised": True},
    **{"gate": "value", "qk_norm": True, "sink": "learned"},
}


@pytest.mark.parametrize(
    ("attention", "spec"),
    [(ATTENTION, None), (ATTENTION, QuantSpec()), (METHODS, None)],
    ids=["float", "w8a8", "methods"],
)
def test_a_token_at_a_time_is_as_all_at_once(attention, spec):
    case = make_case("opt", attention, spec, num_layers=2)
    batch, config, session = float_batch("opt", case.model), case.model.config, case.session()
    ids, mask = (np.asarray(batch[k], np.int64) for k in ("input_ids", "attention_mask"))
    assert not mask[0, 0]  # padding on the left
    past = empty_past(config, len(ids))
    names = [output.name for output in session.get_outputs()]
    logits, done = [], 0
    for now in (5, *[1] * 7):  # a prompt, and what follows it
        given = {"input_ids": ids[:, done : done + now], "attention_mask": mask[:, : done + now]}
        first, *present = session.run(None, {**given, **past})
        logits.append(first)
        past = as_past(names[1:], present)
        done += now
    assert past["past_key_values.1.key"].shape == (3, 4, 12, 8)
    # Of padding nothing is asked: the queries there see other keys.
    visible = mask.astype(bool)
    alone, whole = np.concatenate(logits, axis=1)[visible], case.ours(batch)[visible]
    assert worst(alone, whole) < (1e-5 if spec is None else 0.05)
    assert np.mean(alone.argmax(-1) == whole.argmax(-1)) > 0.9


def test_it_generates_what_we_do():
    from quantizable_flax.models.generation import generate

    case = make_case("opt", ATTENTION, num_layers=2)
    session, config = case.session(), case.model.config
    prompt = [2, 30, 40, 50]
    ours = generate(case.model, case.variables["params"], [prompt], max_new_tokens=6)[0]
    past, ids, theirs = empty_past(config, 1), prompt, []
    names = [output.name for output in session.get_outputs()]
    for i in range(6):
        mask = np.ones((1, len(prompt) + i), np.int64)
        given = {"input_ids": np.asarray([ids], np.int64), "attention_mask": mask}
        logits, *present = session.run(None, {**given, **past})
        past = as_past(names[1:], present)
        ids = [int(logits[0, -1].argmax())]
        theirs += ids
    assert theirs == ours
