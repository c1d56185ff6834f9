"""Recursion that works: one block, run once a hop, and more often than in training."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

import morlib
from suite import field, results, runs, texts
from suite.results import recursion
from suite.texts.known_depth import hop, returns

KINDS = ("run-per-hop", "run-per-hop-sharing")


def small(routing, layers=5, **options):
    torch.manual_seed(0)
    cfg = morlib.ModelConfig(
        vocab_size=11, n_layers=layers, d_model=16, n_heads=2, d_ff=32, dropout=0.0, routing=routing,
        max_recursions=1, options=options or None,
    )  # fmt: skip
    return morlib.Transformer(cfg).eval()


@pytest.mark.parametrize("routing", KINDS)
def test_a_symbol_runs_the_block_once_a_hop(routing):
    task, model = texts.load_corpus("hops-8-3"), small(routing)
    lines = task.windows("heldout", 64, 20)
    depth, k, places = model(lines[:, :-1]).depth, task.answers(lines)["k"], task.places(64)
    assert torch.equal(depth[:, places], 2 + k), "a layer below, a layer above"
    of_table = 3 if routing.endswith("sharing") else 5
    for kind, wanted in (("table", of_table), ("k", 3), ("answer", 3)):
        assert (depth[:, [t for t, name in enumerate(task.kinds(64)) if name == kind]] == wanted).all()
    further = small(routing, layers=7, extra=2)
    further.load_state_dict(model.state_dict())
    out = further(lines[:, :-1])
    assert torch.equal(out.depth[:, places], 2 + k + 2)
    assert torch.equal(recursion.likeliest(model, lines, 2), out.logits.argmax(-1))
    assert not torch.equal(recursion.likeliest(model, lines, 2), model(lines[:, :-1]).logits.argmax(-1))


@pytest.mark.parametrize("routing", KINDS)
def test_in_parts_and_at_once_it_says_the_same(routing):
    model = small(routing)
    windows = texts.load_corpus("hops-8-3").windows("heldout", 64, 4)[:, :-1]
    whole, cache = model(windows).logits, morlib.Cache()
    parts = [model(part, cache).logits for part in windows.split([9, 1, 1, 30, 23], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.fixture
def trained(monkeypatch):
    monkeypatch.setattr(texts.Hops, "floors", {"2": {"heldout": dict(loss=3.0)}})
    few = dict(epochs=1, windows=64, evaluations=1, eval_windows=20, heldout_windows=50)
    return [
        replace(spec, config=replace(spec.config, d_model=16, d_ff=32), train=replace(spec.train, **few))
        for spec in field.recursion_runs(runs.settings(dict(preset="smoke", seeds=1)))
    ]


def test_more_runs_are_judged_by_as_many_hops(trained, tmp_path):
    table = results.measure_recursion(trained, most=6, lines=80)
    assert sorted(table["runs"].unique()) == list(range(1, 7)) and len(table) == 2 * 3 * (1 + 3)
    for spec in trained:
        model, _, task = runs.trained_model(spec)
        lines = task.windows("heldout", 64, 80)
        of_k = {row["k"]: row["accuracy"] for row in task.by_hops(morlib.score(model, lines), lines)}
        own = table[(table["model"] == spec.model) & (table["runs"] == table["k"])]
        assert own.set_index("k")["right"].to_dict() == pytest.approx(of_k), "as the task itself says"
    results.save_table(table, tmp_path / "recursion.json")
    pd.testing.assert_frame_equal(results.stored_table("recursion.json", tmp_path), table)


def test_answers_are_judged_by_the_hops_that_were_run(trained, monkeypatch):
    """A model that follows as many hops as it runs is always right, and one that stops at K never is."""
    followed = {}

    def oracle(model, lines, extra):
        task = texts.load_corpus("hops-8-3")
        asked, table, places = task.answers(lines), lines[:, :8] - 3, task.places(64)
        guess = torch.zeros_like(lines[:, :-1])
        guess[:, places] = 3 + hop(table, asked["x"], asked["k"] + (extra if followed["all"] else 0))
        return guess

    monkeypatch.setattr(recursion, "likeliest", oracle)
    for followed["all"], beyond in ((True, 100.0), (False, 0.0)):
        table = results.measure_recursion(trained[:1], lines=300)
        assert set(table[table["runs"] > 3]["right"]) == {beyond}
        assert set(table[table["runs"] <= 3]["right"]) == {100.0}


def test_a_cycle_of_two_returns_after_two():
    table, x = torch.tensor([[1, 0, 3, 4, 2]]), torch.tensor([[0, 2]])
    assert returns(table, x, 1).tolist() == [[False, False]]
    assert returns(table, x, 2).tolist() == [[True, False]]


def test_what_is_shown_is_what_was_measured():
    right = {
        "run-per-hop": {1: 90.0, 2: 80.0, 3: 4.0, 4: 3.0},
        "run-per-hop-sharing": {1: 99.0, 2: 98.0, 3: 70.0, 4: 50.0},
    }
    rows = [
        dict(run="", model=model, seed=0, k=k, runs=runs, right=value)
        for model, of_model in right.items()
        for runs, value in of_model.items()
        for k in (1, 2)
        if k <= runs
    ]
    table = pd.DataFrame(rows)
    shown = results.recursion_table(table)
    assert shown.loc["keys of the first, shared"].tolist() == ["99", "98", "70", "50"]
    told = results.recursion_sentence(table)
    assert "up to two hops" in told and "98 % after two, 70 % after three, 50 % after four (one seed" in told
    lines = {line.get_label(): line for line in results.draw_recursion(table).axes[0].lines}
    assert lines["keys of each recursion"].get_ydata().tolist() == [90.0, 80.0, 4.0, 3.0]


def test_hops_beyond_a_cycle_go_round_it():
    table = torch.tensor([[1, 2, 0, 3]])
    assert hop(table, torch.tensor([[0, 0, 3]]), torch.tensor([[3, 4, 9]])).tolist() == [[0, 1, 3]]


def test_without_a_table_there_is_nothing(tmp_path):
    table = results.stored_table("none.json", tmp_path)
    assert table.empty and results.recursion_sentence(table) == ""
