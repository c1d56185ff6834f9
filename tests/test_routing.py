"""The analysis of routing: planted routers make it say yes and no; pages show what they should."""

import base64
import dataclasses
import io
import json
import random
import re
import shutil
import subprocess
import unicodedata
from html.parser import HTMLParser

import fontTools.ttLib
import matplotlib.ft2font
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import morlib
from morlib import FORWARD, RECURSE, SKIP
from suite import files, results, routing, runs, texts
from suite.results import rank_correlation, variance_explained
from suite.routing import answers, bangla, difficulty, findings, interventions, textpage
from suite.routing.figures import CONTROLS


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A text of 40,000 characters in which words differ in predictability, and a reference model that has
    learnt a little of it."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("scene")
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 7))) for _ in range(60)]
    text = " ".join(words[min(int(draw.expovariate(0.1)), 59)] for _ in range(8_000))
    (folder / "words.txt").write_text(text, encoding="utf-8")
    corpus = texts.load_corpus(str(folder / "words.txt"))
    torch.manual_seed(0)
    shape = dict(n_layers=2, d_model=24, n_heads=2, d_ff=48, max_len=16, dropout=0.0, routing="none")
    config = morlib.ModelConfig(vocab_size=corpus.vocab_size, **shape)
    reference = morlib.Transformer(config)
    training = dict(epochs=3, windows=480, batch_size=16, lr=1e-2, evaluations=1, eval_windows=4)
    morlib.train(reference, corpus, morlib.TrainConfig(**training))
    windows, known = difficulty.places(corpus, reference.eval(), 200)
    return corpus, config, reference, windows, known


@pytest.fixture
def windows():
    """20 random windows for the small models."""
    return torch.randint(11, (20, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stored():
    """The texts of the findings that ship."""
    return findings.stored_subjects()


# ---- Does the analysis see what is there ----


def plan_of(score, noise, seed):
    """Applications [4, n, L] of a router that spends 1 to 7 of 8 by the rank of a score with noise."""
    rng = np.random.default_rng(seed)
    noisy = scipy.stats.rankdata(score) / score.size + noise * rng.normal(size=score.size)
    rank = np.argsort(np.argsort(noisy)).reshape(score.shape)
    depth = torch.as_tensor(1 + rank * 7 // score.size)
    return torch.stack([(depth - layer * 2).clamp(0, 2) for layer in range(4)])


def mean_by(group, values):
    code = np.unique(group, return_inverse=True)[1].reshape(-1)
    return (np.bincount(code, values.flatten()) / np.bincount(code))[code].reshape(values.shape)


def judged(scene, planted):
    """The verdict on six planted routers, run through a model, beside blind and untrained ones."""
    corpus, config, _, windows, known = scene
    factors = difficulty.controls(known) | {
        "given": [routing.groups(known["frequency"], 4), known["position"]]
    }
    factors["given"].append(known["in_word"])
    rows = []
    for seed in range(6):
        torch.manual_seed(seed)
        routed = dataclasses.replace(config, n_layers=4, routing="frozen", target_depth=4.0)
        model = morlib.Transformer(routed).eval()
        blind = np.random.default_rng(seed + 100).random(known["surprisal"].shape)
        policies = dict(
            mor=routing.Planned(plan_of(planted(known, blind), 0.2, seed)),
            random=routing.Planned(plan_of(blind, 0.0, seed)),
            frozen=model.policy,
        )
        for name, policy in policies.items():
            model.policy = policy
            depth = morlib.score(model, windows, batch_size=len(windows))["depth"].numpy().astype(float)
            correlations = {
                column: rank_correlation(depth, known["surprisal"], given, draws=10)[0]
                for column, given in factors.items()
            }
            rows.append(dict(model=name, seed=seed) | correlations)
    return difficulty.answer(pd.DataFrame(rows))


PLANTED = {
    "follows": (
        lambda known, blind: known["surprisal"],
        "yes, also among places that read the same token",
    ),
    "blind": (lambda known, blind: blind, "no, a rise with difficulty is not shown"),
    "against": (
        lambda known, blind: -known["surprisal"],
        "no, depth falls with difficulty",
    ),
    "by token": (
        lambda known, blind: mean_by(known["token"], known["surprisal"]),
        "yes, but only by which token was read",
    ),
    "by place in the word": (
        lambda known, blind: mean_by(known["in_word"], known["surprisal"]),
        "no, what there is goes with frequency and position",
    ),
}


@pytest.mark.parametrize("planted, answer", PLANTED.values(), ids=PLANTED)
def test_a_planted_router_is_seen_for_what_it_is(scene, planted, answer):
    assert judged(scene, planted).startswith(answer)


def test_a_claim_needs_six_seeds_and_controls_that_show_less():
    rows = pd.DataFrame([
        dict(model=m, seed=s, raw=0.3 + s / 100, given=0.2 + s / 100, same=0.1 + s / 100)
        for m in ("mor", "frozen") for s in range(6)
    ])  # fmt: skip
    assert difficulty.answer(rows).startswith("no, frozen routing shows as much")
    assert difficulty.answer(rows[rows["seed"] < 5]).startswith("open, 5 seed(s) are too few")
    less = np.random.default_rng(0).random((6, 1)) / 2
    rows.loc[rows["model"] == "frozen", ["raw", "given", "same"]] *= less
    assert difficulty.answer(rows).startswith("yes, also")


def test_the_places_are_the_texts(scene):
    corpus, _, reference, windows, known = scene
    assert known["surprisal"].shape == windows[:, :-1].shape == known["kind"].shape
    assert torch.equal(torch.as_tensor(known["token"]), windows[:, :-1])
    surprisal = morlib.score(reference, windows)["surprisal"].numpy()
    assert np.allclose(known["surprisal"], surprisal, atol=1e-5)
    assert (
        np.allclose(known["read"][:, 1:], known["surprisal"][:, :-1]) and np.isnan(known["read"][:, 0]).all()
    )
    train, heldout, V = corpus.ids["train"], corpus.ids["heldout"], corpus.vocab_size
    whole = texts.ngram_surprisal(train, heldout, 3, V)[0]
    seen = windows.shape[1] - 2
    assert np.allclose(known["ngram"][0, 1:], whole[:seen]), "the trigram sees across the windows' borders"
    assert whole.mean() == pytest.approx(texts.ngram_floor(train, heldout, 3, V)["loss"])
    assert torch.equal(windows, corpus.windows("heldout", windows.shape[1] - 1, 200))


def test_rates_by_group_add_up(make_model, windows):
    score = morlib.score(make_model(routing="mor"), windows)
    table = difficulty.rates(score["actions"], windows[:, :-1].numpy())
    assert np.allclose(table[list(morlib.ACTIONS)].sum(axis=1), 100) and table["places"].sum() == 240
    assert table["depth"] @ table["places"] == pytest.approx(float(score["depth"].sum()))


def test_groups_keep_equal_values_together():
    values = np.array([[1.0, 1, 1, 1, 2, 3], [4, 5, 6, 7, 8, np.nan]])
    codes = routing.groups(values, 4)
    assert len(set(codes[0, :4])) == 1 and codes[1, 5] == -1
    assert (np.diff(codes.flatten()[:-1]) >= 0).all() and set(codes.flatten()) == set(
        range(-1, codes.max() + 1)
    )


# ---- Decisions overruled ----


def test_a_plan_is_carried_out(make_model, windows):
    """A router's own decisions replayed give its loss and depth; others run exactly what they say."""
    model = make_model(routing="mor", max_recursions=3)
    own = morlib.score(model, windows)
    plan = routing.applications(own["actions"])
    replayed = routing.forced(model, windows, plan, batch_size=7)
    assert np.allclose(replayed, own["surprisal"].numpy(), atol=1e-6)
    assert isinstance(model.policy, morlib.Router), "the router is back in its place"
    model.policy = routing.Planned(torch.tensor([0, 1, 3])[:, None, None].expand(3, 20, 12))
    actions = morlib.score(model, windows)["actions"]
    assert (actions[0, 0] == SKIP).all() and (actions[1, 0] == FORWARD).all()
    assert [actions[2, r].unique().tolist() for r in range(3)] == [[RECURSE], [RECURSE], [FORWARD]]
    with pytest.raises(ValueError, match="the plan is for 240 tokens, the batch has 120"):
        morlib.score(model, windows[:10])


def test_the_router_is_back_after_a_failure(make_model, windows):
    model = make_model(routing="mor")
    router = model.policy
    with pytest.raises(ValueError, match="the plan is for"):
        routing.forced(model, windows, torch.ones(3, 20, 5, dtype=torch.long))
    assert model.policy is router


def test_interventions_change_what_they_say(make_model):
    model = make_model(routing="mor", n_layers=4)
    windows = torch.randint(11, (30, 13), generator=torch.Generator().manual_seed(1))
    own = routing.applications(morlib.score(model, windows)["actions"])
    hardness = np.random.default_rng(0).random((30, 12))
    plans = routing.plans(own, hardness, 2)
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
            assert abs(where.mean() - 0.1) < 0.01
            assert torch.equal(plan[:, ~where], own[:, ~where]), "the others are left alone"
        if "once more" in name:
            assert set((plan - own).sum(0)[torch.as_tensor(where)].tolist()) <= {0, 1}
    table = interventions.interventions(model, windows, hardness).set_index("intervention")
    assert (table["low"] <= table["there"]).all() and (table["there"] <= table["high"]).all()
    assert list(table.index) == list(plans)


def test_the_oracle_loses_to_no_router(make_model):
    model, reference = make_model(routing="mor", n_layers=4), make_model(routing="none")
    windows = torch.randint(11, (30, 13), generator=torch.Generator().manual_seed(1))
    found = routing.oracle(model, windows, reference, 20)
    assert found["places"] == 20 and found["hindsight"] >= found["foresight"]
    assert found["hindsight"] >= 0 and found["decision"] >= 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("action", (SKIP, FORWARD))
def test_a_router_that_decides_nothing_is_no_failure(make_model, windows, action):
    always = [[[float(a == action) for a in range(3)]] * 2] * 3
    model, reference = make_model(routing="random", action_rates=always), make_model(routing="none")
    score, hardness = morlib.score(model, windows), np.random.default_rng(0).random((20, 12))
    assert rank_correlation(score["depth"].numpy().astype(float), hardness) == (0.0, 0.0, 0.0)
    shares = variance_explained(
        routing.applications(score["actions"]).numpy(), {"token": windows[:, :-1].numpy()}
    )
    assert shares["rest"] == 0
    shuffled = interventions.interventions(model, windows, hardness)["there"].iloc[0]
    assert shuffled == pytest.approx(0, abs=1e-6), "equal depths can be shuffled"
    assert routing.oracle(model, windows, reference, 10)["layers"] == (3 if action == SKIP else 0)


def test_a_watched_training_is_the_same_training(corpus, quick_training):
    """The curves of a run seen on its way are those of the run that was not watched."""
    looks, states, val = [], [], corpus.windows("val", 12, 4)

    def look(training):
        if training.step in training.points:
            looks.append((training.step, morlib.score(training.model, val)["depth"].double().mean()))

    shape = dict(n_layers=3, d_model=16, n_heads=2, d_ff=40, max_len=12, dropout=0.1, target_depth=2.0)
    for watch in (None, look):
        torch.manual_seed(0)
        model = morlib.Transformer(morlib.ModelConfig(vocab_size=corpus.vocab_size, **shape))
        morlib.train(model, corpus, quick_training, after_step=watch)
        states.append(model.state_dict())
    assert [step for step, _ in looks] == [4, 8]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert looks[-1][1] == morlib.score(model, val)["depth"].double().mean()


# ---- Tokens and Bangla ----


def test_kinds_of_characters():
    text = "O Romeo, I'll\ngo 3 times."
    codec = texts.CharTokenizer(text)
    kinds, place = routing.kinds(codec, codec.encode(text))
    expected = {" ": "space", "\n": "newline", "3": "digit"} | dict.fromkeys("ORI", "capital")
    expected |= dict.fromkeys("omelgtis", "letter") | dict.fromkeys(",'.", "punctuation")
    assert dict(zip(text, kinds)) == expected
    assert place[2:8].tolist() == [0, 1, 2, 3, 4, 0]
    assert place[9:14].tolist() == [0, 1, 2, 3, 0], "an apostrophe stands within its word"


def test_kinds_of_bangla_pieces():
    class Pieces:
        kind, newline = "sentencepiece", [0]
        made = ["<0x0A>", "▁বাংলা", "দেশ", "ের", "▁যুক্ত", "▁১৯৭১", "।", "▁", "<0xE0>", "▁নদী"]

        @property
        def pieces(self):
            return type("Inner", (), {"id_to_piece": lambda _, i: self.made[i]})()

    kinds, place = routing.kinds(Pieces(), range(10))
    words = "newline word-initial continuation suffix conjunct digit danda space byte word-initial"
    assert kinds.tolist() == words.split()
    assert place.tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 0, 0]


def test_how_a_tokenizer_cuts_bangla():
    class Cuts:
        kind, newline, vocab_size = "sentencepiece", [99], 8
        made = ["যু", "ক্", "তি", "▁", "<0xE0>", "<0xA6>", "<0x95>", "্ষ"]
        pieces = type("Inner", (), {"id_to_piece": lambda _, i: Cuts.made[i]})()

        def encode(self, text):
            return range(8)

    text = "যুক্তি ক্ষ"
    assert routing.cuts(Cuts(), text) == {2, 4, 6, 7, 8, 10}, "three bytes make one character"
    found = routing.segmentation(Cuts(), text)
    assert found["fertility (tokens a word)"] == 4 and found["byte tokens (%)"] == 37.5
    assert found["vowel signs cut off (%)"] == 0
    assert found["conjuncts whole (%)"] == 0, "kta is cut by a piece's end, ksha by its bytes"
    Cuts.made = ["যু", "ক্তি", "▁", "ক", "্", "ষ", "", ""]
    assert routing.segmentation(Cuts(), text)["conjuncts whole (%)"] == 50
    whole = routing.conjuncts_whole({"pieces": Cuts(), "letters": texts.CharTokenizer(text)}, text)
    assert whole["pieces"].to_dict() == {"ক্ত": 100, "ক্ষ": 0} and (whole["letters"] == 0).all()
    letters = routing.segmentation(texts.CharTokenizer(text), text)
    assert letters["conjuncts whole (%)"] == 0 and letters["vowel signs cut off (%)"] == 100
    assert letters["byte tokens (%)"] == 0


CONJUNCTS = {
    "ক্ষ": ["ক্ষ"],
    "স্ত্রী": ["স্ত্র"],
    "র\u200d্যাব": ["র\u200d্য"],
    "ক্\u200cষ": [],
    "বড়্গ": ["ড়্গ"],
    "কক": [],
}


@pytest.mark.parametrize("word, conjuncts", CONJUNCTS.items())
def test_what_counts_as_a_conjunct(word, conjuncts):
    nfc = [unicodedata.normalize("NFC", conjunct) for conjunct in conjuncts]
    assert [m.group() for m in bangla.CONJUNCT.finditer(unicodedata.normalize("NFC", word))] == nfc


def test_the_script_is_told_apart():
    for kind, examples in routing.EXAMPLES.items():
        assert kind in {routing.character_class(c) for c in examples}, kind
    assert routing.character_class("\n") is None
    shares = routing.script_shares("কি কি a")
    assert shares.to_dict() == {"Latin": 20, "consonant": 40, "vowel sign": 40} and shares.index[0] == "Latin"
    assert routing.code_points("ক্ষ") == "0995 09CD 09B7"


# ---- Findings: made, kept, stored ----


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole analysis of a text of its own at a test's size, in a folder that all tests of it share."""
    folder = tmp_path_factory.mktemp("findings")
    lines = [f"Line {i % 17} of {i * i % 23}: the quick brown fox; Jumps!\n" for i in range(400)]
    (folder / "fox.txt").write_text("".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORLIB_OUTPUTS", str(folder / "outputs"))
        patch.setitem(findings.TEXTS, "fox", dict(name=str(folder / "fox.txt"), split="full"))
        s = runs.settings(dict(preset="smoke", epochs=1, n_layers=3))
        subjects = routing.subjects(s, ["fox"], sample=20)
        makers = (
            routing.models, routing.rates, routing.correlations, routing.variance, routing.changes,
            routing.oracles, routing.layers, routing.formation,
        )  # fmt: skip
        tables = {make.__name__: make(subjects) for make in makers}
        passages = routing.passages(subjects)
        path = routing.save(subjects, s)
        yield s, subjects, tables, passages, path


def test_findings_that_were_kept_show_the_same(made):
    _, subjects, tables, passages, path = made
    kept = findings.stored_subjects(path)
    for make, table in tables.items():
        again = getattr(routing, make)(kept)
        pd.testing.assert_frame_equal(again, table, check_dtype=False, atol=1e-4, rtol=1e-4)
    pd.testing.assert_frame_equal(routing.verdicts(kept), routing.verdicts(subjects), atol=1e-4, rtol=1e-3)
    shown = routing.passages(kept)
    assert shown[0]["tokens"] == passages[0]["tokens"] and shown[0]["runs"] == passages[0]["runs"]
    assert routing.page(shown) == routing.page(passages)
    with pytest.raises(ValueError, match="weights do not ship"):
        kept[0].needs()


def test_tables_say_what_was_found(made):
    _, subjects, tables, _, _ = made
    models = routing.model_table(tables["models"])
    assert set(models.index.get_level_values("model")) == {
        "MoR",
        "untrained router",
        "blind routing",
        "reference",
    }
    ends = routing.ends(tables["rates"], "entropy")
    own = tables["rates"].query("model == 'mor' and measure == 'entropy'").set_index("group")["depth"]
    assert ends.loc[("fox", "MoR"), "easiest tenth"] == pytest.approx(own[0], abs=0.01)
    assert ends.loc[("fox", "MoR"), "hardest tenth"] == pytest.approx(own.iloc[-1], abs=0.01)
    formed = routing.formation_table(tables["formation"])
    assert formed.columns.tolist() == sorted(tables["formation"]["step"].unique())
    for (seed, step), of_look in tables["formation"].groupby(["seed", "step"]):
        assert formed.loc[seed, step] == pytest.approx(of_look["r"].iloc[0], abs=0.005)
    assert routing.verdict_table(subjects)["verdict"].str.startswith("open, 1 seed(s)").all()
    assert np.allclose(routing.variance_table(tables["variance"]).iloc[:, :4].sum(axis=1), 100, atol=0.2)
    assert routing.change_table(tables["changes"]).shape == (10, 3)
    assert (
        routing.oracle_table(tables["oracles"]).loc["gain of the best change in hindsight (nats)", "fox"] >= 0
    )
    layers = tables["layers"]
    assert np.allclose(layers[list(morlib.ACTIONS)].sum(axis=1), 100) and list(layers["layer"]) == [1, 2, 3]
    last = tables["formation"]["step"].max()
    trained = tables["rates"].query("model == 'mor' and measure == 'entropy'")["depth"].to_numpy()
    assert np.allclose(tables["formation"].query(f"step == {last}")["depth"], trained), "seen at its end"


@pytest.mark.parametrize("draw, table", [
    (routing.depth_by_tenth, "rates"),
    (lambda rates: routing.depth_panels(rates, "fox"), "rates"),
    (routing.correlation_forest, "correlations"),
    (routing.change_forest, "changes"),
    (routing.stacked_variance, "variance"),
    (routing.formation_lines, "formation"),
    (routing.layers_by_actions, "layers"),
])  # fmt: skip
def test_every_figure_is_drawn_and_named(made, recwarn, draw, table):
    figure = draw(made[2][table])
    figure.canvas.draw()
    assert all(ax.get_xlabel() for ax in figure.axes)
    assert not [w for w in recwarn if "missing from font" in str(w.message)]


def test_tokens_by_layers_shows_the_decisions(made):
    passages = made[3]
    figure = routing.tokens_by_layers(passages, rows=8)
    image = figure.axes[0].collections[0].get_array().reshape(8, -1)
    assert np.array_equal(image, np.array(passages[0]["runs"][:8]))


def test_over_seeds_is_students_t_and_falls_back_on_windows():
    rows = [dict(text="a", r=r, low=0.0, high=1.0) for r in (0.1, 0.2, 0.4)] + [
        dict(text="b", r=0.5, low=0.4, high=0.7)
    ]
    table = routing.over_seeds(pd.DataFrame(rows), ["text"], "r")
    assert tuple(table.loc["a"]) == pytest.approx(results.interval([0.1, 0.2, 0.4]))
    assert tuple(table.loc["b"]) == (0.5, 0.4, 0.7)


def test_what_ships_is_whole(stored):
    """Six seeds of three routers on two texts, and everything that notebook 05 shows."""
    assert [subject.text for subject in stored] == ["tinyshakespeare", "bangla"]
    models = routing.models(stored)
    count = models.groupby(["text", "model"]).size().unstack()
    assert (count[["mor", "frozen", "random"]] == 6).all(axis=None) and (count["reference"] == 1).all()
    assert models["did_train"].all()
    for make in (routing.rates, routing.correlations, routing.variance, routing.changes, routing.oracles):
        assert len(make(stored)) > 0
    layers, s = routing.layers(stored), runs.settings(dict(preset="stored"))
    assert len(layers) == 2 * 6 * s.model(vocab_size=1).n_layers
    assert [subject.text for subject in routing.subjects(s, ["bangla"])] == ["bangla"]
    assert len(routing.formation(stored)["text"].unique()) == 1
    page = (files.REFERENCE / findings.PAGE).read_text(encoding="utf-8")
    assert json.loads(Seen(page).data) == json.loads(textpage.data_of(routing.passages(stored)))
    assert len(page.encode()) < 1_500_000


def test_the_bend_by_surprisal_that_notebook_05_tells_is_there(stored):
    rates = routing.rates(stored)
    of_mor = rates[rates["model"] == "mor"]
    deeper = {}
    for (text, measure), part in of_mor.groupby(["text", "measure"]):
        if measure in ("surprisal", "entropy"):
            tenths = part.pivot_table(index="group", columns="seed", values="depth")
            deeper[text, measure] = int((tenths.loc[9] > tenths.loc[1:8].mean()).sum())
            if (text, measure) == ("Tiny Shakespeare", "surprisal"):
                mean = tenths.mean(axis=1)
    assert round(mean.loc[9], 2) == 8.36 == round(mean.max(), 2) and round(mean.loc[1:8].mean(), 2) == 7.99
    assert deeper == {
        ("Tiny Shakespeare", "surprisal"): 6,
        ("Tiny Shakespeare", "entropy"): 1,
        ("Bangla Wikipedia", "surprisal"): 0,
        ("Bangla Wikipedia", "entropy"): 0,
    }


def test_the_verdicts_that_ship_follow_from_the_correlations(stored):
    found = findings.stored_findings()
    for subject in stored:
        again = routing.verdicts([subject]).drop(columns="text").sort_values(["measure", "model", "seed"])
        kept = pd.DataFrame(found["texts"][subject.text]["verdict"]).sort_values(["measure", "model", "seed"])
        pd.testing.assert_frame_equal(
            again.reset_index(drop=True)[kept.columns.tolist()],
            kept.reset_index(drop=True),
            check_dtype=False,
        )


@pytest.mark.parametrize("given, message", [
    (dict(epochs=3), "another epochs"),
    (dict(recipe="source"), "another .*norm"),
    (dict(max_chars=5000), "another max_chars: choose another preset"),
])  # fmt: skip
def test_stored_findings_are_not_shown_for_other_settings(given, message):
    s = runs.settings(dict(preset="stored") | given)
    with pytest.raises(ValueError, match=message):
        routing.subjects(s, ["tinyshakespeare"])


def test_the_headline_says_what_the_findings_say(stored, capsys, monkeypatch):
    routing.headline()
    shown = capsys.readouterr().out
    lead = (
        "The router is not shown to give harder tokens more depth: on Tiny Shakespeare no such rise is shown"
    )
    assert lead in shown and "six seeds" in shown
    assert "on Bangla Wikipedia they even get less (\u22120.20" in shown
    table = routing.verdict_table(stored)
    assert list(table.columns) == ["verdict", *CONTROLS.values()] and len(table) == 4
    assert all(cell in shown for cell in table.to_numpy().flatten())
    monkeypatch.setattr(answers, "stored_findings", lambda: None)
    routing.headline()
    assert "No stored finding ships" in capsys.readouterr().out


def test_the_headline_follows_the_findings(stored):
    """Its words are those of the findings, also where they are others than those that ship."""
    rows = [
        dict(measure=measure, model=model, seed=seed, control=control, r=(0.3 + seed / 99) * (model == "mor"))
        for measure in ("entropy", "surprisal")
        for model in ("mor", "random")
        for seed in range(6)
        for control in ("raw", "given", "same")
    ]
    rising = pd.DataFrame(rows)
    followed = [dataclasses.replace(subject, tables=dict(correlations=rising)) for subject in stored]
    yes = "The router gives harder tokens more depth: on Tiny Shakespeare also among places"
    assert answers.sentence(followed).startswith(yes) and answers.short(followed) == "Yes."
    mixed = "Whether the router gives harder tokens more depth depends on the text"
    assert answers.sentence([stored[0], followed[1]]).startswith(mixed)
    assert answers.short([stored[0], followed[1]]) == "It depends on the text."
    assert answers.short(stored) == "Not shown.", "on one of the texts a rise is not shown"
    assert answers.short([stored[1]]) == "No.", "in Bangla depth even falls"
    two_seeds = dict(correlations=rising[rising["seed"] < 2])
    few = [dataclasses.replace(subject, tables=two_seeds) for subject in stored]
    assert answers.sentence(few).startswith("There are too few seeds")
    assert answers.short(few) == answers.short([stored[0], few[1]]) == "Too few seeds to say."
    assert answers.sentence([stored[0], few[1]]).endswith("two seeds.")


# ---- Texts in colour ----


@pytest.fixture
def sections(make_model):
    """Two texts as a page shows them, with everything in them that a page might trip over."""
    both = {"en": '<b>&amp; "it\'s"</b>\n</script> end', "bn": "বাংলা ভাষায় যুক্তাক্ষর: ক্ষ, স্ত্রী।"}
    parts = []
    for lang, text in both.items():
        codec = texts.CharTokenizer(text)
        model, reference = (make_model(routing=r, vocab_size=codec.vocab_size) for r in ("mor", "none"))
        part = textpage.section(f"Text <{lang}>", "a note", lang, model, reference, codec, text)
        parts.append(part | dict(whole=text))
    return parts


def test_a_section_is_what_the_models_say(make_model, sections):
    part = sections[0]
    codec = texts.CharTokenizer(part["whole"])
    model, ids = (
        make_model(routing="mor", vocab_size=codec.vocab_size),
        torch.tensor(codec.encode(part["whole"])),
    )
    assert "".join(part["tokens"]) == part["whole"]
    assert len(part["depth"]) == len(part["surprisal"]) == len(part["runs"]) == len(part["tokens"]) - 1
    last = len(ids) - 1 - (len(ids) - 1) % 12  # the last window is shorter, and shown all the same
    out = model(ids[None, last:-1])
    assert part["depth"][last:] == out.depth[0].tolist() and [sum(r) for r in part["runs"]] == part["depth"]
    expected = out.logits.softmax(-1)[0].gather(-1, ids[last + 1 :, None])[:, 0]
    assert torch.allclose(torch.tensor(part["probability"][last:]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="two tokens or more"):
        textpage.section("", "", "en", model, model, codec, "b")


def test_tokens_of_one_sign_stay_together():
    assert textpage.signs(list("ab c")) == [[1], [2], [3]]
    assert textpage.signs(["▁", "শ", "্র", "ি", "উ", "ক্", "ষ", "া"]) == [[1, 2, 3], [4], [5, 6, 7]]
    part = dict(tokens=["x", "ক", "ি", "খ"], depth=[0, 6, 3])
    spans = [(span["first"], span["count"], span["shade"]) for span in textpage.painted(part, "depth")[0]]
    assert spans == [(1, 2, 3), (3, 1, 6)], "the mean shade of both, then one alone"


def test_a_passage_begins_with_a_line_and_ends_with_a_word():
    assert findings.cut("tail\n\nNew line of words", 12) == "\n\nNew line"
    assert findings.cut("a line\nof words", 20) == "\nof"
    assert findings.cut("nowordsend", 5) == "nowor"


def test_a_passage_is_long_enough_though_the_only_break_is_at_the_end():
    for text in ("word " * 500 + "\n", "one line. " * 100 + "\n\n", "a line of text\n" * 500 + "\n"):
        assert 590 <= len(findings.cut(text, 600)) <= 600


def test_the_training_that_is_watched_runs_where_the_first_one_did(made, monkeypatch, tmp_path):
    def picked(wanted=None):
        raise LookupError(f"asked for {wanted}")

    material = made[1][0].material
    run = next(run for run in material.runs if run.model == "mor")
    monkeypatch.setattr(findings, "outputs", lambda: tmp_path)
    monkeypatch.setattr(runs, "pick_device", picked)
    with pytest.raises(LookupError, match="asked for cpu"):
        findings.watch(material, dataclasses.replace(run, device="cpu"))


def test_an_own_text_is_shown_as_far_as_it_can_be(made, capsys):
    subjects = made[1]
    part = routing.own_passage(subjects, "the fox ক " + "quick " * 1000)
    assert "".join(part["tokens"]) == ("the fox ক " + "quick " * 1000)[: findings.OWN_TEXT].replace("ক", "")
    said = capsys.readouterr().out
    assert "the first 3,000" in said and "no token for them: ক" in said
    assert part["title"] == "Your text" and len(part["depth"]) == len(part["tokens"]) - 1


class Seen(HTMLParser):
    """The text of each <pre>, the addresses asked for, and the data of a page."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.addresses, self.inside, self.data = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside.append((tag, dict(attributes)))
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "srcset")]
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if any(tag == "pre" for tag, _ in self.inside):
            self.texts[-1] += data
        if self.inside and self.inside[-1][1].get("id") == "data":
            self.data += data


def test_the_page_holds_all_tokens_and_asks_for_nothing(sections):
    page = textpage.page(sections)
    seen = Seen(page)
    shown = [text.replace("↵\n", "\n") for text in seen.texts]
    assert shown == [part["whole"] for part in sections for _ in range(2)]
    assert seen.addresses == [] and not re.search(r"https?:|url\((?!data:)|@import", page)
    for kept, part in zip(json.loads(seen.data), sections):
        assert (
            kept["tokens"] == part["tokens"]
            and kept["depth"] == part["depth"]
            and kept["runs"] == part["runs"]
        )
    assert page.count("</script>") == 2 and "<b>&amp;" not in page, "what a text holds is no markup"
    assert "Text &lt;en&gt;" in page
    fragment = textpage.fragment(sections[0])
    assert [text.replace("↵\n", "\n") for text in Seen(fragment).texts] == [sections[0]["whole"]] * 2
    assert "<b>&amp;" not in fragment


def luminance(colour):
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot((0.2126, 0.7152, 0.0722), linear)


def contrast(a, b):
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


def test_every_shade_can_be_read_and_rises():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for what, themes in textpage.SHADES.items():
        assert what in textpage.LEGENDS
        for theme, shades in themes.items():
            assert len(shades) == textpage.MOST + 1
            for back, ink in shades:
                assert contrast(back, ink) >= 4.5
                assert contrast(back, ink) == max(contrast(back, other) for other in ("#000000", "#ffffff"))
            light = np.diff([luminance(back) for back, _ in shades])
            rises = light > 0.01 if theme == "dark" else light < -0.01
            assert rises.all(), "in grey too, more is darker on white, lighter on black"


PROBE = """<script>
const failures = [], found = {};
addEventListener('error', e => failures.push(e.message));
addEventListener('load', () => {
  const spans = [...document.querySelectorAll('pre span[data-i]')], bar = document.getElementById('bar');
  spans[2].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
  found.hover = bar.innerText;
  const focus = e => {  // a window in the background fires no focusin
    e.focus();
    if (!document.hasFocus()) e.dispatchEvent(new FocusEvent('focusin', {bubbles: true}));
  };
  focus(spans[0]);
  found.focus = bar.innerText;
  spans[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
  found.moved = bar.innerText;
  found.active = document.activeElement === spans[1];
  found.marked = document.querySelectorAll('.on').length;
  found.stops = document.querySelectorAll('pre span[tabindex="0"]').length;
  const joined = spans.find(s => +s.dataset.n > 1);
  focus(joined);
  found.joined = [+joined.dataset.n, bar.querySelectorAll('dl').length];
  const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 };
  const light = c => {
    const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const ratio = e => {
    const s = getComputedStyle(e);
    let b = e;
    while (getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement;
    const [x, y] = [light(s.color), light(getComputedStyle(b).backgroundColor)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const told = 'span[data-i],p,h1,h2,h3,.key,button,#bar dt,#bar dd,.runs b';
  const least = () => Math.min(...[...document.querySelectorAll(told)].map(ratio));
  const look = () => ({least: least(), back: getComputedStyle(document.body).backgroundColor});
  found.first = look();
  document.getElementById('theme').click();
  found.second = look();
  found.wide = document.documentElement.scrollWidth > innerWidth;
  const asked = performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'));
  found.fetched = asked.length;
  found.failures = failures;
  const out = document.createElement('script');
  out.type = 'text/plain';
  out.id = 'found';
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OFFLINE = (
    "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


@pytest.mark.parametrize("theme", ("light", "dark"))
def test_the_page_in_a_browser(tmp_path, sections, theme):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium or Chrome is installed: the page is checked without a browser only")
    page = tmp_path / "page.html"
    page.write_text(textpage.page(sections).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", *OFFLINE, "--window-size=420,900",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={int(theme == 'light')}", "--virtual-time-budget=4000",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'id="found">(.*?)</script>', done.stdout, re.S)
    assert match, done.stderr[-500:]
    found, part = json.loads(match[1]), sections[0]
    assert found["failures"] == [] and found["fetched"] == 0 and not found["wide"]
    words = {0: "skip", 1: "forward", 2: "recurse ×2"}
    for text, i in ((found["hover"], 3), (found["focus"], 1), (found["moved"], 2)):
        assert part["tokens"][i].replace(" ", "␣") in text
        assert (
            f"{100 * part['probability'][i - 1]:.1f} %" in text
            and f"{part['depth'][i - 1]} applications" in text
        )
        layers = " ".join(f"{layer} {words[n]}" for layer, n in enumerate(part["runs"][i - 1], 1))
        assert re.sub(r"\s+", " ", text).endswith(layers)
    assert found["active"] and found["marked"] == 2, "the same token is marked on both sides"
    assert found["stops"] == 4, "one tab stop a text"
    assert found["joined"][0] == found["joined"][1] > 1, "tokens written as one sign are told one by one"
    assert min(found["first"]["least"], found["second"]["least"]) >= 4.5
    white, black = "rgb(255, 255, 255)", "rgb(13, 17, 23)"
    order = [white, black] if theme == "light" else [black, white]
    assert [found["first"]["back"], found["second"]["back"]] == order, "as the system asks, then the other"


# ---- Bangla in pictures ----


def ink(text, shaped):
    """The pixels of a text in the suite's Bangla font, as figures draw it, or one glyph a character as if
    nothing shaped it."""
    from matplotlib import pyplot as plt

    results.figure_style()
    figure = plt.figure(figsize=(4, 1), dpi=100, layout="none")
    if shaped:
        figure.text(0.1, 0.4, text, fontsize=24)
    else:
        font = matplotlib.ft2font.FT2Font(str(results.bangla_font()))
        font.set_size(24, 100)
        left = 0.1
        for character in text:
            figure.text(left, 0.4, character, fontsize=24)
            left += font.load_char(ord(character)).linearHoriAdvance / 65536 / 400
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., 0] < 128
    plt.close(figure)
    columns = np.nonzero(pixels.any(0))[0]
    return pixels, columns[-1] - columns[0] + 1


def ends_like(word, letter):
    """Whether the right end of a word is the letter, below the line from which Bangla hangs."""
    right, left = (np.nonzero(pixels.any(0))[0] for pixels in (word, letter))
    width = left[-1] - left[0] + 1
    end = word[45:60, right[-1] + 1 - width : right[-1] + 1]
    return (end == letter[45:60, left[0] : left[-1] + 1]).mean() > 0.95


def test_the_font_of_a_page_shapes_its_text(sections):
    """What is left of the font in a page still joins and reorders: its substitution rules are there for the
    letters that the text has."""
    sections[1]["tokens"][-1:] += ["ক", "\u09cc"]
    rule = textpage.face(sections)
    packed = base64.b64decode(re.search(r"base64,([^)]+)", rule)[1])
    font = fontTools.ttLib.TTFont(io.BytesIO(packed))
    needed = {ord(c) for c in sections[1]["whole"]} | {0x09CC, 0x09C7, 0x09D7}
    assert needed <= set(font.getBestCmap()), "both parts of the sign au too"
    features = {record.FeatureTag for record in font["GSUB"].table.FeatureList.FeatureRecord}
    assert {"half", "pres"} & features and len(rule) < 120_000 and textpage.face(sections[:1]) == ""


def test_bangla_in_figures_is_shaped(recwarn):
    conjunct, narrow = ink("ক্ষ", True)
    _, wide = ink("ক্ষ", False)
    assert narrow < 0.75 * wide, "ka + hasanta + ssa is one conjunct, narrower than the letters"
    letter = ink("ক", True)[0]
    assert ends_like(ink("কি", True)[0], letter), "the vowel sign i stands before its consonant"
    assert not ends_like(ink("কি", False)[0], letter)
    assert not [w for w in recwarn if "missing from font" in str(w.message)]
