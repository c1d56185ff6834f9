"""The analysis of routing: a planted router makes it say yes and no, statistics have known answers, pages show what they should."""

import dataclasses
import random

import numpy as np
import pandas as pd
import pytest
import torch

import analysis
import morlib
from morlib import FORWARD, RECURSE, SKIP


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A text of 40,000 characters in which words differ in predictability, and a meter that has learnt a little of it."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("scene")
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 7))) for _ in range(60)]
    (folder / "words.txt").write_text(" ".join(words[min(int(draw.expovariate(0.1)), 59)] for _ in range(8_000)), encoding="utf-8")
    corpus = morlib.load_corpus(str(folder / "words.txt"))
    torch.manual_seed(0)
    config = morlib.ModelConfig(vocab_size=corpus.vocab_size, n_layers=2, d_model=24, n_heads=2, d_ff=48, max_len=16, dropout=0.0, routing="none")
    meter = morlib.build_model(config)
    morlib.train(meter, corpus, morlib.TrainConfig(epochs=3, windows=480, batch_size=16, lr=1e-2, evaluations=1, eval_windows=4))
    windows, known = analysis.places(corpus, meter.eval(), 200)
    return corpus, config, meter, windows, known


def plan_of(score, noise, seed):
    """Applications [4, n, L] of a router of 4 layers that spends 1 to 7 of 8 applications by the rank of a score with noise."""
    rng = np.random.default_rng(seed)
    rank = np.argsort(np.argsort((analysis.scipy.stats.rankdata(score) / score.size + noise * rng.normal(size=score.size)))).reshape(score.shape)
    depth = torch.as_tensor(1 + rank * 7 // score.size)
    return torch.stack([(depth - layer * 2).clamp(0, 2) for layer in range(4)])


def mean_by(group, values):
    code = np.unique(group, return_inverse=True)[1].reshape(-1)
    return (np.bincount(code, values.flatten()) / np.bincount(code))[code].reshape(values.shape)


def judged(scene, planted):
    """The verdict on six planted routers, run through a model, beside blind and untrained ones."""
    corpus, config, _, windows, known = scene
    given = [analysis.groups(known["frequency"], 4), known["position"], known["in_word"]]
    rows = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = morlib.build_model(dataclasses.replace(config, n_layers=4, routing="frozen", target_depth=4.0)).eval()
        untrained, blind = model.policy, np.random.default_rng(seed + 100).random(known["surprisal"].shape)
        for name, policy in dict(mor=morlib.Planned(plan_of(planted(known, blind), 0.2, seed)), random=morlib.Planned(plan_of(blind, 0.0, seed)), frozen=untrained).items():
            model.policy = policy
            depth = morlib.score(model, windows, batch_size=len(windows))["depth"].numpy().astype(float)
            r = {column: analysis.rank_correlation(depth, known["surprisal"], factors, draws=10)[0]
                 for column, factors in dict(raw=[], given=given, same=[known["token"], known["position"]]).items()}  # fmt: skip
            rows.append(dict(model=name, seed=seed) | r)
    return analysis.verdict(pd.DataFrame(rows))


@pytest.mark.parametrize("planted, answer", [
    (lambda known, blind: known["surprisal"], "yes, also among places that read the same token: rank correlation +0."),
    (lambda known, blind: blind, "no, depth does not rise with difficulty"),
    (lambda known, blind: -known["surprisal"], "no, depth falls with difficulty: rank correlation -0."),
    (lambda known, blind: mean_by(known["token"], known["surprisal"]), "yes, but only by which token was read"),
    (lambda known, blind: mean_by(known["in_word"], known["surprisal"]), "no, what there is goes with frequency and position"),
], ids=["follows", "blind", "against", "by token", "by place in the word"])  # fmt: skip
def test_a_planted_router_is_seen_for_what_it_is(scene, planted, answer):
    assert judged(scene, planted).startswith(answer)


def test_a_claim_needs_six_seeds_and_controls_that_show_less():
    rows = pd.DataFrame([dict(model=m, seed=s, raw=0.3 + s / 100, given=0.2 + s / 100, same=0.1 + s / 100) for m in ("mor", "frozen") for s in range(6)])
    assert analysis.verdict(rows).startswith("no, frozen routing shows as much")
    assert analysis.verdict(rows[rows["seed"] < 5]).startswith("open, 5 seed(s) are too few")
    rows.loc[rows["model"] == "frozen", ["raw", "given", "same"]] *= np.random.default_rng(0).random((6, 1)) / 2
    assert analysis.verdict(rows).startswith("yes, also")


def test_a_plan_is_carried_out(make_model):
    """A router's own decisions replayed give its loss and depth; others run exactly what they say."""
    model, windows = make_model(routing="mor", max_recursions=3), torch.randint(11, (20, 13), generator=torch.Generator().manual_seed(1))
    own = morlib.score(model, windows)
    plan = analysis.applications(own["actions"])
    assert np.allclose(analysis.forced(model, windows, plan, batch_size=7), own["surprisal"].numpy(), atol=1e-6)
    assert isinstance(model.policy, morlib.Router), "the router is back in its place"
    model.policy = morlib.Planned(torch.tensor([0, 1, 3])[:, None, None].expand(3, 20, 12))
    actions = morlib.score(model, windows)["actions"]
    assert (actions[0, 0] == SKIP).all() and (actions[1, 0] == FORWARD).all()
    assert (actions[2, 0] == RECURSE).all() and (actions[2, 1] == RECURSE).all() and (actions[2, 2] == FORWARD).all()


def test_interventions_change_what_they_say(make_model):
    model, windows = make_model(routing="mor", n_layers=4), torch.randint(11, (30, 13), generator=torch.Generator().manual_seed(1))
    own, hardness = analysis.applications(morlib.score(model, windows)["actions"]), np.random.default_rng(0).random((30, 12))
    plans = analysis.plans(own, hardness, 2)
    sums = {name: plan.sum(0) for name, (plan, _) in plans.items()}
    for name in ("depths shuffled in each sequence", "deepest to the hardest", "deepest to the easiest"):
        assert torch.equal(sums[name].sort(1)[0], own.sum(0).sort(1)[0]), "each sequence keeps its depths"
    order = torch.as_tensor(np.argsort(-hardness, axis=1))
    assert (sums["deepest to the hardest"].gather(1, order).diff(dim=1) <= 0).all()
    assert (sums["deepest to the easiest"].gather(1, order).diff(dim=1) >= 0).all()
    assert (sums["the same depth for all"] == round(own.sum(0).double().mean().item())).all()
    for name, (plan, where) in plans.items():
        assert plan.shape == own.shape and plan.min() >= 0 and plan.max() <= 2
        if "tenth" in name:
            assert abs(where.mean() - 0.1) < 0.01 and torch.equal(plan[:, ~where], own[:, ~where]), "the others are left alone"
        if "once more" in name:
            assert set((plan - own).sum(0)[torch.as_tensor(where)].tolist()) <= {0, 1}
    table = analysis.interventions(model, windows, hardness).set_index("intervention")
    assert (table["low"] <= table["there"]).all() and (table["there"] <= table["high"]).all()


def test_the_oracle_loses_to_no_router(make_model):
    model, meter = make_model(routing="mor", n_layers=4), make_model(routing="none")
    windows = torch.randint(11, (30, 13), generator=torch.Generator().manual_seed(1))
    found = analysis.oracle(model, windows, meter, 20)
    assert found["places"] == 20 and found["hindsight"] >= found["foresight"] and found["hindsight"] >= 0 and found["decision"] >= 0


def test_rank_correlation_has_known_answers():
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(200, 20))
    x, y, other = cause + rng.normal(size=cause.shape), cause + rng.normal(size=cause.shape), rng.normal(size=cause.shape)
    plain = analysis.rank_correlation(x, y)
    assert plain[0] == pytest.approx(analysis.scipy.stats.spearmanr(x.flatten(), y.flatten()).statistic, abs=1e-9) and plain[1] < plain[0] < plain[2]
    assert abs(analysis.rank_correlation(x, y, [analysis.groups(cause, 50)])[0]) < 0.05, "two effects of one cause are unrelated given the cause"
    low, high = analysis.rank_correlation(x, other)[1:]
    assert low < 0 < high
    half = np.where(np.arange(20) < 10, np.nan, y)
    assert analysis.rank_correlation(x, half)[0] == pytest.approx(analysis.scipy.stats.spearmanr(x[:, 10:].flatten(), y[:, 10:].flatten()).statistic, abs=1e-9)
    assert analysis.rank_correlation(np.ones_like(x), y) == (0.0, 0.0, 0.0)


def test_the_interval_over_windows_covers_as_often_as_it_says():
    """Places of one window share a draw, so an interval that took them for independent would be far too narrow."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        shared_x, shared_y = rng.normal(size=(2, 80, 1))
        low, high = analysis.rank_correlation(shared_x + 0.3 * rng.normal(size=(80, 12)), shared_y + 0.3 * rng.normal(size=(80, 12)), draws=200)[1:]
        covered += low < 0 < high
    assert covered >= 52


def test_variance_is_given_to_what_made_it():
    rng = np.random.default_rng(0)
    layer, place = np.arange(4)[:, None, None], np.broadcast_to(np.arange(30), (4, 400, 30))
    token = rng.integers(50, size=(400, 30))
    made = 2.0 * layer + 1.5 * rng.normal(size=50)[token] + rng.normal(size=(4, 400, 30))  # variances 5, about 2.25, 1
    found = analysis.variance_explained(made, {"layer": layer, "position": place, "token": token, "noise": rng.integers(3000, size=(400, 30))})
    total = made.var()
    assert found["layer"] == pytest.approx(100 * 5 / total, abs=1.0) and found["rest"] == pytest.approx(100 * 1 / total, abs=1.5)
    assert abs(found["position"]) < 0.5 and abs(found["noise"]) < 1.5, "what has no part in it explains nothing, however many groups it has"
    assert sum(found.values()) == pytest.approx(100)


def test_rates_by_group_add_up(make_model):
    model, windows = make_model(routing="mor"), torch.randint(11, (20, 13), generator=torch.Generator().manual_seed(1))
    seen = morlib.score(model, windows)
    table = analysis.rates(seen["actions"], windows[:, :-1].numpy())
    assert np.allclose(table[list(morlib.ACTIONS)].sum(axis=1), 100) and table["places"].sum() == 240
    assert table["depth"] @ table["places"] == pytest.approx(float(seen["depth"].sum()))


def test_groups_keep_equal_values_together():
    values = np.array([[1.0, 1, 1, 1, 2, 3], [4, 5, 6, 7, 8, np.nan]])
    found = analysis.groups(values, 4)
    assert len(set(found[0, :4])) == 1 and found[1, 5] == -1 and (np.diff(found.flatten()[:-1]) >= 0).all() and set(found.flatten()) == set(range(-1, found.max() + 1))


def test_the_places_are_the_texts(scene):
    corpus, _, meter, windows, known = scene
    assert known["surprisal"].shape == windows[:, :-1].shape == known["kind"].shape
    assert torch.equal(torch.as_tensor(known["token"]), windows[:, :-1])
    assert np.allclose(known["surprisal"], morlib.score(meter, windows)["surprisal"].numpy(), atol=1e-5)
    assert np.allclose(known["read"][:, 1:], known["surprisal"][:, :-1]) and np.isnan(known["read"][:, 0]).all()
    whole = morlib.ngram_surprisal(corpus.ids["train"], corpus.ids["heldout"], 3, corpus.vocab_size)[0]
    assert np.allclose(known["ngram"][0, 1:], whole[: windows.shape[1] - 2]), "the trigram sees across the windows' borders"
    assert whole.mean() == pytest.approx(morlib.ngram_floor(corpus.ids["train"], corpus.ids["heldout"], 3, corpus.vocab_size)["loss"])


def test_kinds_of_characters():
    text = "O Romeo, I'll\ngo 3 times."
    found, place = analysis.kinds(morlib.CharTokenizer(text), morlib.CharTokenizer(text).encode(text))
    assert dict(zip(text, found)) == {"O": "capital", " ": "space", "R": "capital", "o": "letter", "m": "letter", "e": "letter", ",": "punctuation", "I": "capital",
                                            "'": "punctuation", "l": "letter", "\n": "newline", "g": "letter", "3": "digit", "t": "letter", "i": "letter", "s": "letter",
                                            ".": "punctuation"}  # fmt: skip
    assert place[2:8].tolist() == [0, 1, 2, 3, 4, 0] and place[9:14].tolist() == [0, 1, 2, 3, 0], "an apostrophe stands within its word"


def test_kinds_of_bangla_pieces():
    class Pieces:
        kind, newline = "sentencepiece", [0]
        made = ["<0x0A>", "▁বাংলা", "দেশ", "ের", "▁যুক্ত", "▁১৯৭১", "।", "▁", "<0xE0>", "▁নদী"]

        @property
        def pieces(self):
            return type("Inner", (), {"id_to_piece": lambda _, i: self.made[i]})()

    found, place = analysis.kinds(Pieces(), range(10))
    assert found.tolist() == ["newline", "word-initial", "continuation", "suffix", "conjunct", "digit", "danda", "space", "byte", "word-initial"]
    assert place.tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
