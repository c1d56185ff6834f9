"""Recursion that works: one block, run once a hop, and more often than in training."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

import morlib
from suite import results, runs, texts
from suite.texts.known_depth import hop


@pytest.fixture
def small():
    torch.manual_seed(0)
    cfg = morlib.ModelConfig(
        vocab_size=12, n_layers=3, d_model=16, n_heads=2, d_ff=32, dropout=0.0, routing="run-per-hop",
        max_recursions=4,
    )  # fmt: skip
    return morlib.Transformer(cfg).eval()


def test_a_symbol_runs_the_block_once_a_hop(small):
    task = texts.load_corpus("hops-8-4")
    lines = task.windows("heldout", 64, 20)
    depth = small(lines[:, :-1]).depth
    k = task.answers(lines)["k"]
    assert torch.equal(depth[:, task.places(64)], 2 + k), "a layer below, a layer above"
    kinds = task.kinds(64)
    for kind, wanted in (("table", 6), ("k", 3), ("answer", 3)):
        assert (depth[:, [t for t, name in enumerate(kinds) if name == kind]] == wanted).all()
    further = morlib.Transformer(replace(small.cfg, max_recursions=6, options=dict(extra=3)))
    depth = further(lines[:, :-1]).depth[:, task.places(64)]
    assert torch.equal(depth, 2 + (k + 3).clamp(max=6))


def test_in_parts_and_at_once_it_says_the_same(small):
    windows = texts.load_corpus("hops-8-4").windows("heldout", 64, 4)[:, :-1]
    whole, cache = small(windows).logits, morlib.Cache()
    parts = [small(part, cache).logits for part in windows.split([9, 1, 1, 30, 23], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.fixture
def trained(monkeypatch):
    monkeypatch.setattr(texts.Hops, "floors", {"2": {"heldout": dict(loss=3.0)}})
    (spec,) = runs.recursion_runs(runs.settings(dict(preset="smoke", seeds=1)))
    few = dict(epochs=1, windows=64, evaluations=1, eval_windows=20, heldout_windows=50)
    return replace(spec, config=replace(spec.config, d_model=16, d_ff=32), train=replace(spec.train, **few))


def test_more_runs_are_judged_by_as_many_hops(trained, tmp_path):
    table = results.measure_recursion([trained], most=6)
    assert sorted(table["runs"].unique()) == list(range(1, 7)) and len(table) == 4 * 3
    model, _, task = runs.trained_model(trained)
    lines = task.windows("heldout", 64)
    of_k = {row["k"]: row["accuracy"] for row in task.by_hops(morlib.score(model, lines), lines)}
    as_trained = table[table["runs"] == table["k"]].set_index("k")["right"]
    assert as_trained.to_dict() == pytest.approx(of_k), "no further run: what the task itself says"
    results.save_recursion(table, tmp_path / "recursion.json")
    pd.testing.assert_frame_equal(results.stored_recursion(tmp_path / "recursion.json"), table)
    shown = results.recursion_table(table)
    assert list(shown.columns) == list(range(1, 7)) and shown.isna().to_numpy().sum() == 12
    line = results.draw_recursion(table).axes[0].lines[0]
    assert line.get_ydata() == pytest.approx(table.groupby("runs")["right"].mean().to_numpy())
    plt.close("all")


def test_hops_beyond_a_cycle_go_round_it():
    table = torch.tensor([[1, 2, 0, 3]])
    assert hop(table, torch.tensor([[0, 0, 3]]), torch.tensor([[3, 4, 9]])).tolist() == [[0, 1, 3]]


def test_without_a_table_there_is_nothing(tmp_path):
    assert results.stored_recursion(tmp_path / "none.json").empty
