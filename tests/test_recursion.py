"""Hops in strokes, and one block that runs again and again."""

import re

import pandas as pd
import pytest
import torch

import morlib
from suite import results, runs, texts
from suite.results.recursion import beyond
from suite.texts import Strokes


@pytest.mark.parametrize("name", ["strokes-8-6", "strokes-8-12", "strokes-5-3"])
def test_lines_are_tables_and_then_right_answers(name):
    task = texts.load_corpus(name)
    lines = task.windows("heldout", 48, 100)
    asked, answers = task.answers(lines), 0
    for row, line in enumerate(lines):
        text = task.tokenizer.decode(line.tolist())
        table, told = dict(zip("abcdefgh", text[: task.symbols])), set()
        for found in re.finditer(r"([a-h])(\|+)~([a-h]|$)", text[task.symbols :]):
            x, k, place = found[1], len(found[2]), task.symbols + found.end(2)
            at, cycle = table[x], 1
            while at != x:
                at, cycle = table[at], cycle + 1
            for _ in range(k):
                x = table[x]
            assert x == (found[3] or x) and 1 <= k <= task.hops
            if place < 48:
                further = k % cycle
                easy = further == 0 or (further == 1 and k > 1) or (found[1], further) in told
                assert asked["k"][row, place] == k
                assert asked["hard"][row, place] == (cycle >= task.symbols - 1 and not easy)
                answers += 1
            told.add((found[1], k % cycle))
    assert answers == (asked["k"] > 0).sum() > 300


def test_parts_share_no_table_and_more_strokes_are_the_same_tokens():
    task, longer = Strokes(8, 6), Strokes(8, 12)
    assert task.vocabulary == longer.vocabulary
    tables = {
        part: {tuple(row) for row in task.windows(part, 64)[:, :8].tolist()} for part in ("train", "heldout")
    }
    assert not tables["train"] & tables["heldout"]
    with pytest.raises(ValueError, match="strokes-8-60 needs a max_len of 71 or more, not 64"):
        Strokes(8, 60).windows("val", 64)
    with pytest.raises(ValueError, match="strokes-M-K needs 4 to 26 symbols"):
        Strokes(3, 6)


def test_the_last_layer_runs_as_often_as_it_is_told(make_model):
    model = make_model(routing="loops", max_recursions=5, n_layers=2)
    tokens = torch.randint(model.cfg.vocab_size, (2, 12))
    assert (model(tokens).depth == 1 + 5).all()
    more = runs.with_recursions(model, 9)
    assert (more(tokens).depth == 1 + 9).all() and (model(tokens).depth == 6).all()
    drawn = {int(model(tokens, sampling=True).depth[0, 0]) for _ in range(60)}
    assert drawn == {1 + 3, 1 + 4, 1 + 5}
    trained = model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in more.state_dict().items())


def test_more_runs_go_on_from_fewer(make_model):
    """Six runs are three runs and three more: the states after three are where the others begin."""
    model = make_model(routing="loops", max_recursions=3, n_layers=2)
    tokens = torch.randint(model.cfg.vocab_size, (2, 12))
    x = (model.embed(tokens) + model.positions[:12]).view(24, -1)
    packing = morlib.Packing(torch.arange(24), 2, 12)
    x = model.blocks[0](x, packing)
    for _ in range(6):
        x = model.blocks[1](x, packing)
    expected = model.readout(x).view(2, 12, -1)
    assert torch.allclose(runs.with_recursions(model, 6)(tokens).logits, expected, atol=1e-5)


def test_the_reach_of_each_run_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path))
    specs = runs.recursion_runs(runs.settings(dict(preset="smoke", seeds=1)))
    table = results.measure_reach(specs)
    assert table["recursions"].dropna().tolist() == [1, 2, 3, 4, 6]
    assert table["model"].tolist() == ["loops"] * 5 + ["fixed"]
    for row in table.to_dict("records"):
        assert [of_k["k"] for of_k in row["by_hops"]] == [1, 2, 3, 4]  # twice as many as were trained on
    shown = results.reach_table(table)
    assert shown.index.tolist()[-1] == "three layers of their own" and (shown["seeds"] == 1).all()
    assert shown.index[0] == "one block, 1 run"


def reach_of(right):
    """A table of `measure_reach`: right {R: by seed: accuracy at k = 3, beyond the training}."""
    rows = []
    for R, by_seed in right.items():
        for seed, accuracy in enumerate(by_seed):
            hops = [
                dict(k=k, accuracy=right, answers=9) for k, right in ((1, 100.0), (2, 100.0), (3, accuracy))
            ]
            hops.append(dict(k=4, accuracy=None, answers=0))
            rows.append(dict(run="", model="loops", seed=seed, recursions=R, trained=2, most=2, layers=2,
                             loss=1.0, by_hops=hops))  # fmt: skip
    return pd.DataFrame(rows)


def test_what_is_reached_beyond_is_that_of_the_best_number_of_runs():
    table = reach_of({2: [10.0, 20.0], 4: [80.0, 90.0], 6: [100.0, 30.0]})
    assert beyond(table).tolist() == [80.0, 90.0]
    assert results.reach_table(table)["k = 3"].tolist() == [15, 85, 65]
    assert "k = 4" not in results.reach_table(table)
