"""python -m pytest tests/test_plots.py -q

What pictures and tables show of what they are given.
"""
import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from plumbing import plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in order; they are not written."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: saved.append(figure))
    return saved


def points(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def test_the_tables_and_the_picture_show_what_was_evaluated(figures):
    """The dotted line stood at the mean length of an answer, and budgets with one upper end were
    drawn against frames."""
    row = {"samples": 9, "format": 1.0, "forced": 0.0, "forced_accuracy": None, "length": 70.0}
    rows = []
    for least, most in ((20, 90), (60, 90)):
        rows.append({**row, "frames": 4, "think_least": least, "think_budget": most,
                     "accuracy": least / 100})
    plots.draw_sweep(rows, "none.png")
    plots.draw_sweep([{**rows[0], "frames": f, "accuracy": f / 100} for f in (64, 16)], "none.png")
    assert points(figures[0].axes[0]) == [([20, 60], [0.2, 0.6])]
    assert points(figures[1].axes[0]) == [([16, 64], [0.16, 0.64])]

    tiers = [{"samples": n, "accuracy": 0.25} for n in (0, 4, 0, 0, 5)]
    result = {**row, "dropped": 2, "accuracy": 1 / 3, "domains": {"count": 0.5}, "tiers": tiers,
              "pass@1": 0.3, "pass@8": 0.75}
    table = [line.split() for line in plots.eval_table(result, rows).split("\n")]
    assert table[1] == ["count", "50.0%"]
    assert table[2][2:] == ["(hard)", "0", "-"]
    assert table[3][2:] == ["4", "25.0%"]
    assert table[7] == ["all", "9", "33.3%;", "2", "dropped;", "format", "100.0%,",
                        "pass@1", "30.0%,", "pass@8", "75.0%"]
    assert table[-1] == ["4", "60-90", "9", "60.0%", "100.0%", "0.0%", "-", "70.0"]


def test_a_sweep_has_a_line_for_each_number_of_frames_and_kind_of_budget(figures):
    results = []
    for frames in (64, 16):
        for least, most in ((0, 96), (0, 48), (60, 90)):
            results.append({"frames": frames, "think_least": least, "think_budget": most,
                            "accuracy": frames / 100})
    plots.draw_sweep(results, "none.png")
    assert points(figures[0].axes[0]) == [
        ([48, 96], [0.16, 0.16]), ([60], [0.16]), ([48, 96], [0.64, 0.64]), ([60], [0.64])]


def test_curves_show_each_stage_at_its_own_steps(figures, monkeypatch):
    monkeypatch.setattr(plots.os, "replace", lambda *paths: None)
    records = [
        {"step": 1, "stage": "align", "loss": 3.0}, {"step": 1, "stage": "sft", "loss": 2.0},
        {"step": 2, "stage": "sft", "loss": 1.0}, {"step": 2, "stage": "sft", "eval_accuracy": 0.4}]
    keys = ("reward", "accuracy", "format", "length", "entropy", "forced")
    for step in (1, 2):
        records.append({"step": step, "stage": "rl", **dict.fromkeys(keys, step / 2),
                        "encode_s": 1.0, "rollout_s": 2.0, "train_s": 3.0})
    records[-1]["eval_accuracy"] = 0.9
    plots.draw_curves([json.dumps(record) + "\n" for record in records], "none.png")
    losses, rewards, held_out, lengths, entropies, seconds = figures[0].axes
    assert points(losses) == [([0], [3.0]), ([1, 2], [2.0, 1.0])]
    assert points(rewards) == 3 * [([1, 2], [0.5, 1.0])]
    assert points(held_out) == [([0, 2], [0.4, 0.9])]      # step 0 is the end of the cold start
    assert points(lengths) == [([1, 2], [0.5, 1.0])]
    assert points(entropies) == 2 * [([1, 2], [0.5, 1.0])]
    assert [line.get_label() for line in entropies.lines] == ["entropy (nats)", "forced (share)"]
    tops = [polygon.get_paths()[0].vertices[:, 1].max() for polygon in seconds.collections]
    assert tops == [1.0, 3.0, 6.0]


def test_curves_of_a_run_that_has_not_begun_rl_are_a_whole_picture(tmp_path):
    path = str(tmp_path / "curves.png")
    plots.draw_curves([], path)
    assert not list(tmp_path.iterdir())
    plots.draw_curves(['{"step": 1, "stage": "align", "loss": 3.0}\n'], path)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    with Image.open(path) as image:
        assert image.width > 1000


def test_bench_rows_are_a_line_for_each_way_to_do_a_step(figures):
    rows = []
    for frames in (128, 64):
        for variant, cache, sp, engine in (("naive", "cold", 1, "torch"),
                                           ("shared", "warm", 1, "vllm"),
                                           ("shared+sp", "warm", 2, "torch")):
            rows.append({"frames": frames, "variant": variant, "cache": cache, "sp": sp,
                         "rollout": engine, "size": 112, "group": 8, "completion": 32,
                         "seconds": frames * sp})
    plots.draw_bench(rows, "none.png")
    [axis] = figures[0].axes
    assert points(axis) == [([64, 128], [64, 128]), ([64, 128], [64, 128]), ([64, 128], [128, 256])]
    assert [line.get_label() for line in axis.lines] == [
        "naive, cold", "shared, warm, vllm", "shared+sp, warm, 2 ranks"]
