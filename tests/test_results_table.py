"""The tables and pictures of rows: their means, their order, and files that are no rows."""

import json
import re

import numpy as np
import pytest

from benchmarks import results_plot, results_study, results_table
from benchmarks.results_table import PAGE, by_seed, judged, pooled, table, write_table
from quantizable_flax.errors import UserError
from tests.results_rows import row, setting


@pytest.mark.parametrize(("metric", "unit"), [("perplexity", "nats per token"), ("top1", "image")])
def test_costs_are_increases_of_the_loss_over_all_seeds(metric, unit):
    raw = {0: (2.0, [2.1, 2.2, 2.05]), 1: (1.9, [2.3, 2.0, 2.1])}
    rows = [row("a", seed, fp, losses, metric=metric) for seed, (fp, losses) in raw.items()]
    costs = [loss - fp for fp, losses in raw.values() for loss in losses]
    assert pooled(rows, "w8a8") == pytest.approx((np.mean(costs), np.std(costs, ddof=1)))
    assert f"{unit})" in table(rows).splitlines()[0]


def test_the_table_has_the_least_cost_first(tmp_path):
    rows = [row("vanilla", 0, 2.0, [2.4, 2.5]), row("gated", 0, 2.1, [2.2, 2.3])]
    file = tmp_path / "bert.json"
    file.write_text(json.dumps(rows))
    write_table(file)
    text = (tmp_path / "bert.md").read_text()
    assert text == table(rows)
    lines = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line[:1] == "|"]
    assert lines == 2 * ["method", "---", "gated", "vanilla"]
    # W6A6 decides where all rows have it.
    rows[0] |= setting("w6a6", [2.5, 2.6])
    assert judged(rows) == "w8a8"
    rows[1] |= setting("w6a6", [2.9, 3.0])
    assert judged(rows) == "w6a6"
    assert table(rows).splitlines()[-1].startswith("| gated")


def test_a_page_has_what_each_training_seed_has_and_keeps_the_rest(tmp_path):
    rows = [row("gated", seed, 2.0, [2.1 + seed, 2.2 + seed]) for seed in (1, 0)]
    rows += [row("vanilla", 0, 2.0, [9.0])]
    marks = "<!-- table of {} -->\n\nold\n<!-- end of the table of {} -->\n"
    page = tmp_path / "results.md"
    page.write_text("before\n" + marks.format("bert", "bert") + marks.format("opt", "opt"))
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "bert.json"
    file.write_text(json.dumps(rows))
    write_table(file)
    write_table(file)  # again: the same
    shown = by_seed(rows, PAGE)
    assert "| gated | 7.389, 7.389 | 8.596, 23.37 | " in shown
    assert "| vanilla | 7.389, – | " in shown
    assert shown.splitlines()[2].endswith(" | +0.1500, +1.1500 |")
    assert shown in table(rows)
    assert page.read_text() == (
        "before\n" + marks.format("bert", "bert").replace("old", shown) + marks.format("opt", "opt")
    )


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_the_docs_have_the_tables_of_their_rows(family):
    file = results_study.ROOT / f"docs/results/{family}.json"
    rows = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == table(rows)
    page = (results_study.ROOT / "docs/results.md").read_text()
    assert f"<!-- table of {family} -->\n\n{by_seed(rows, PAGE)}\n<!-- end" in page


def test_the_picture_has_every_seed_of_every_method_with_the_setting(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(results_plot.plt, "close", shown.append)
    w6a6 = setting("w6a6", [2.6, 2.6])
    rows = [row("vanilla", seed, 2.0, [2.3, 2.5 + seed], **w6a6) for seed in (0, 1)]
    rows += [row("gated", 0, 2.5, [2.6, 2.7], **w6a6), row("other", 0, 2.0, [2.1])]
    results_plot.draw(rows, "w6a6", tmp_path / "bert.png")
    assert (tmp_path / "bert.png").read_bytes().startswith(b"\x89PNG")
    costs, norms = shown[0].axes
    assert [label.get_text() for label in costs.get_yticklabels()] == ["gated", "vanilla"]
    drawn = [bars.lines[0].get_xdata().tolist() for bars in costs.containers]
    assert drawn == [pytest.approx([0.1]), pytest.approx([0.6, 0.6])]
    assert [len(bars.lines[0].get_xdata()) for bars in norms.containers] == [1, 2]
    # One far away is a number, so that the others stay apart.
    rows[1] |= {"max_inf_norm": 3.0 * results_plot.FAR + 1}
    results_plot.draw(rows, "w6a6", tmp_path / "bert.png")
    costs, norms = shown[1].axes
    assert [text.get_text() for text in norms.texts] == ["25 \N{RIGHTWARDS ARROW}"]
    assert norms.get_xlim()[1] < 4
    assert not costs.texts


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "could not be read: No such file"),
        ("[", "is no JSON"),
        ("[]", "must have a list of the rows"),
        ('{"a": 1}', "must have a list of the rows"),
        ("[1]", "must have a list of the rows"),
        (json.dumps([row("a", 0, 2.0, [2.1])]), "--setting must be one of w8a8, found 'w5a5'"),
    ],
)
def test_files_that_are_no_rows_are_told(tmp_path, monkeypatch, capsys, text, sentence):
    file = tmp_path / "bert.json"
    if text is not None:
        file.write_text(text)
    setting = ["--setting=w5a5"] if "--setting" in sentence else []
    for command in (results_plot, results_table):
        if setting and command is results_table:
            continue
        monkeypatch.setattr("sys.argv", ["command", str(file), *setting])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


def test_rows_without_a_common_setting_have_no_order():
    rows = [row("a", 0, 2.0, [2.1]), row("b", 0, 2.0, [2.1])]
    rows[1] = {key.replace("w8a8", "w6a6"): value for key, value in rows[1].items()}
    with pytest.raises(UserError, match=re.escape("in common, found w8a8, w6a6")):
        table(rows)
