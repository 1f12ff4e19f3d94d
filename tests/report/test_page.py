"""The report's figures: every layer in its place, whatever the family."""

import pytest

from quantizable_flax.evaluation.report import Subject, by_layer, report
from quantizable_flax.evaluation.tables import columns


def test_layers_are_in_order_beyond_ten():
    # A jitted step returns its dictionary in the order of the names: 0, 1, 10, 11, 2, ...
    names = sorted(f"layer_{i}" for i in range(12))
    sites = {f"{name}/ffn_residual:inf_norm": float(name.split("_")[1]) for name in names}
    sites["layer_0/ffn_out/output:inf_norm"] = 99.0
    sites["layer_0/ffn_residual:kurtosis"] = 99.0
    assert by_layer(sites, "ffn_residual") == list(range(12))


def row(model: str, metric: str, **values) -> dict:
    shared = {"name": model, "model": model, "attention": "vanilla", "metric": metric}
    return shared | {"max_inf_norm": 5.0, "avg_kurtosis": 3.0, "steps": 1} | values


def test_rows_of_one_metric_name_it_in_the_header():
    bert = row("bert", "perplexity", fp=10.0, w8a8=11.0, w8a8_std=0.1)
    vit = row("vit", "top1", fp=90.0, w8a8=89.0, w8a8_std=0.1)
    assert [title for title, _ in columns([bert], ["w8a8"])][2] == "FP ppl"
    assert [title for title, _ in columns([vit], ["w8a8"])][-2] == "W8A8 top-1 %"
    both = [title for title, _ in columns([bert, vit], ["w8a8"])]
    assert both == [
        "name", "model", "attention", "metric", "FP",
        "max inf norm", "avg kurtosis", "W8A8", "steps",
    ]  # fmt: skip


@pytest.mark.parametrize(("history", "pictures"), [([], 3), ([(1, 5.0), (2, 4.0)], 5)])
def test_each_metric_has_its_own_pictures(history, pictures):
    subjects = [
        Subject(row("bert", "perplexity", fp=10.0, w8a8=11.0, w8a8_std=0.1), {}, history),
        Subject(row("vit", "top1", fp=90.0, w8a8=89.0, w8a8_std=0.1), {}, history),
    ]
    page = report(subjects, ["w8a8"])
    assert page.count("data:image/png;base64,") == pictures
