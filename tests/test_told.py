"""The yardstick on text: who is told, what the list of contexts holds, and which runs use it."""

import json

import numpy as np
import pytest
import torch

import morlib
from suite import field, runs, texts
from suite.field import told
from suite.routing import gain

V = 5


@pytest.fixture
def contexts(tmp_path, monkeypatch):
    """A file that names two contexts: 1 at the beginning, and 2 after 1 after 0."""
    path = tmp_path / "contexts.json"
    path.write_text(json.dumps(dict(vocabulary=V, contexts=[2, 3 + 2 * (V + 1) + 1 * (V + 1) ** 2])))
    monkeypatch.setattr(told, "CONTEXTS", path)
    return path


@pytest.fixture
def make_told(make_model, contexts):
    def make(routing="told", **changes):
        given = dict(n_layers=4, vocab_size=V, target_depth=3.0, max_recursions=1, options=dict(always=2))
        return make_model(routing=routing, **given | changes)

    return make


@pytest.mark.parametrize("routing", ["told", "told-sees-all"])
@torch.no_grad()
def test_those_who_are_told_run_all_layers_one_by_one_too(make_told, routing):
    model, x = make_told(routing), torch.tensor([[1, 0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 1, 0, 1]])
    out = model(x)
    assert out.depth.tolist() == [[4, 2, 2, 4, 2, 2, 4], [2, 2, 4, 2, 2, 2, 2]]
    cache, parts = morlib.Cache(), []
    for piece in (x[:, :3], *(x[:, i : i + 1] for i in range(3, 7))):
        parts.append(model(piece, cache))
    assert torch.equal(torch.cat([part.depth for part in parts], 1), out.depth)
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), out.logits, atol=1e-5)


@torch.no_grad()
def test_to_see_all_keys_is_another_model(make_told):
    x = torch.tensor([[1, 0, 1, 2, 0, 1, 2]])
    seen, unseen = (make_told(routing)(x) for routing in ("told-sees-all", "told"))
    changed = (seen.logits - unseen.logits).abs().amax(-1)[0] > 1e-5
    assert changed.tolist() == [False, False, False, True, False, False, True], "only who runs looks"


def test_without_the_list_or_with_another_vocabulary_it_says_so(make_told, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary of contexts.json \(5\), not 7"):
        make_told(vocab_size=7)
    monkeypatch.setattr(told, "CONTEXTS", tmp_path / "none.json")
    with pytest.raises(ValueError, match="no such file"):
        make_told()
    assert told.digest() == ""


def test_the_contexts_are_those_that_promise_most_and_hold_the_share(monkeypatch):
    windows = torch.randint(V, (300, 13), generator=torch.Generator().manual_seed(0))
    good = torch.tensor([1.0, 0.2, 0.0, -0.5, -1.0])[windows[:, :-1]].flatten()  # by the token read
    noise = torch.randn(2, len(good), generator=torch.Generator().manual_seed(1)).double()
    scored = {}
    for seed in range(2):
        scored["train", "fixed-shallow", seed] = dict(surprisal=good.double() + noise[seed], correct=good)
        scored["train", "fixed-deep", seed] = dict(surprisal=0 * good.double(), correct=good)
    monkeypatch.setattr(gain, "scores", lambda specs: (scored, {0: {}, 1: {}}, dict(train=windows)))
    cfg = morlib.ModelConfig(vocab_size=V, d_model=16, n_heads=2)
    monkeypatch.setattr(runs, "trained_model", lambda spec: (torch.nn.Module(), {}, None))
    monkeypatch.setattr(torch.nn.Module, "cfg", cfg, raising=False)
    specs = runs.long_runs(runs.settings(dict(preset="cpu", seeds=1)), gain.EXPERIMENT)
    found = gain.deep_contexts(specs, 0.3)
    numbers = texts.context_numbers(windows[:, :-1], 3, V)
    deep = np.isin(numbers.numpy(), found["contexts"])
    assert deep.mean() == pytest.approx(0.3, abs=0.02) and found["vocabulary"] == V
    assert good.numpy()[deep.ravel()].mean() > 0.7 and good.mean() < 0.1


def test_runs_of_the_told_differ_from_the_lots_in_who_runs_alone():
    s = runs.settings(dict(preset="cpu", seeds=2))
    made = field.told_runs(s)
    lots = {r.train.seed: r for r in runs.long_runs(s, "exp1-thin") if r.model == "by-kind"}
    assert [run.model for run in made] == 2 * ["told", "told-sees-all", "by-kind-sees-all"]
    for run in made:
        own = lots[run.train.seed]
        assert run.train == own.train and run.experiment == own.experiment and run.corpus == own.corpus
        assert vars(run.config) == vars(own.config) | dict(routing=run.model)


def test_the_list_that_ships_is_part_of_what_a_run_is():
    assert field.Told.version == told.digest() != ""
    shipped = json.loads(told.CONTEXTS.read_text(encoding="utf-8"))
    used = {r["id"] for r in runs.stored_records("exp1-thin-long")["record"]}
    assert {id for own in shipped["runs"].values() for id in own.values()} <= used
    assert len(shipped["runs"]) == 6 and 0 < max(shipped["contexts"]) < 66**3
