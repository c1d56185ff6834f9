"""The table of the field: from whole records, from some, from none; and what its systems cost."""

import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import morlib
from suite import cost, field, files, results, runs, texts
from suite.cost.systems import follows_surprisal, times
from suite.results.field import (
    FIXED,
    NAMES,
    ON_TEXT,
    chose_nothing,
    collapsed,
    field_look,
    gaps_to_fixed,
    is_ahead,
    number_marks,
    with_costs,
)
from suite.runs.runner import stored

LOSSES = {"fixed-half": [1.5, 1.7], "fixed-between": [1.4, 1.4], "fixed-deep": [1.2, 1.4]}
OPERATIONS = {"fixed-half": 100.0, "fixed-between": 150.0, "fixed-deep": 200.0}


def rates(*run):
    return [[[1 - share, share, 0.0]] for share in run]


def records_of(losses, run=(1.0, 1.0)):
    """Records like stored ones: of each system the loss of each seed, and the shares that its layers run."""
    template = runs.stored_records("known-depth").iloc[0]["record"]
    made = []
    for model, values in losses.items():
        for seed, loss in enumerate(values):
            record = json.loads(json.dumps(template)) | dict(model=model, seed=seed, id=f"{model}-{seed}")
            record["experiment"] = "field"
            record["metrics"] |= dict(loss=loss, action_rates=rates(*run))
            record["config"]["model"]["n_layers"] = dict(zip(OPERATIONS, (2, 3, 4))).get(model, 4)
            made.append(record)
    return runs.table_of(made)


def costs_of(records, **of_system):
    """Costs of each run: the operations of its system; all else alike."""
    rows = []
    for record in records["record"]:
        model = record["model"]
        operations = (OPERATIONS | of_system).get(model, 120.0)
        none = dict(balance=float("nan"), agreement=float("nan"))
        same = dict(cache=512.0, step=0.5, decode=1.5, r=0.25) | none
        rows.append(dict(run=record["id"], model=model, seed=record["seed"], operations=operations) | same)
    return pd.DataFrame(rows)


NO_COSTS = cost.stored_systems(texts.corpus.Path("no such file"))


def test_systems_that_are_left_out_are_named_and_not_praised():
    records = records_of(LOSSES | {"act": [1.3, 1.3], "moe-top1": [1.1, 1.1]}, run=(1.0, 0.5))
    costs = costs_of(records)
    told = results.field_sentence(records, costs[costs["model"] != "act"])
    assert "operations are not measured, or are above those of all layers: Universal Transformer" in told
    costs.loc[costs["model"] == "moe-top1", "balance"] = 4.0
    right = records["model"].map({"moe-top1": 60.0}).fillna(50.0)
    for record in records["record"]:
        del record["metrics"]["details"]
    told = results.field.on_text_sentence(records.assign(accuracy=right), costs)
    assert "a router chose nothing at one seed or more: mixture of experts, top 1." in told
    assert "mixture of experts, top 1" not in told.split("By accuracy")[1]
    told = results.field_sentence(records[records["model"] != "moe-top1"], costs)
    assert told.startswith("None of one system is shown") and "few seeds: Universal Transformer" in told


def test_there_is_a_row_for_each_system():
    s = runs.settings(dict(preset="cpu"))
    assert list(NAMES) == list(field.field_models(s))
    assert (
        set(field.QUICK) <= set(NAMES) and len(set(NAMES.values())) == len(NAMES) - 2
    )  # the fixed are alike
    for listed, rows in ((field.field_runs, NAMES), (field.text_runs, field.text_models(s))):
        found = listed(s)
        seeds = {label: [run.train.seed for run in found if run.model == label] for label in rows}
        best = field.models.BEST if listed is field.field_runs else field.models.BEST_ON_TEXT
        assert all(own == list(range(6 if label in best else 3)) for label, own in seeds.items())
        assert len(found) == sum(map(len, seeds.values()))
        assert set(rows) == set(NAMES) - ({"planted"} if listed is field.text_runs else set())
    assert {run.preset for run in found} == {"long"}
    assert {run.config.n_layers for run in found} <= {6, 8, 9, 12}


def test_among_six_layers_mor_runs_about_half_and_shared_models_are_those_of_notebook_07():
    s = runs.settings(dict(preset="cpu", seeds=6))
    in_07 = runs.known_depth_runs(s, runs.known_depth_models(s))
    wide, known = field.wide_field_runs(s), {(run.model, run.train.seed): run for run in in_07}
    assert {run.model for run in wide} == set(NAMES) and {run.train.seed for run in wide} == {0, 1, 2}
    for run in wide:
        if (same := known.get((run.model, run.train.seed))) is not None:
            assert replace(run, experiment=same.experiment) == same
    expected = {"mor-expert": 3.5, "mor-expert-cycle": 3.0}  # by top-k
    for run in [run for run in wide if run.model in expected and run.train.seed == 0]:
        small = dict(d_model=16, n_heads=2, d_ff=32, vocab_size=11, max_len=12)
        model = morlib.Transformer(replace(run.config, **small))
        tokens = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))
        assert model.policy.recursions == 2
        assert model(tokens, sampling=True).depth.float().mean().item() == expected[run.model]


def test_on_text_mor_has_three_recursions_at_half_of_the_depth():
    """As in the paper, two to four; by top-k all, two thirds and one third of the tokens run them."""
    s = runs.settings(dict(preset="cpu", seeds=1))
    labels = [label for label in NAMES if label.startswith(("mor-expert", "mor-token", "mor-moe"))]
    for run in field.text_runs(s, labels):
        small = dict(d_model=16, n_heads=2, d_ff=32, vocab_size=11, max_len=12)
        model = morlib.Transformer(replace(run.config, **small))
        all_shared = run.model.endswith("cycle")
        assert model.policy.recursions == 3 and len(set(model.layout)) == (3 if all_shared else 4)
        assert list(model.policy.inside) == (list(range(9)) if all_shared else list(range(1, 7)))
        if "token" not in run.model:
            tokens = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))
            assert model(tokens, sampling=True).depth.float().mean().item() == 6.0


def identity(run, data):
    """A run's id on a text that a record describes, as code and versions are now."""
    parent = identity(run.parent, data) if isinstance(run.parent, runs.Run) else run.parent
    cfg, corpus = replace(run.config, vocab_size=data["vocab_size"]), SimpleNamespace(describe=lambda: data)
    return runs.run_id(cfg, run.train, corpus, run.code, parent, run.preset)


@pytest.mark.parametrize("name, made", [
    ("field", lambda s: field.field_runs(s) + runs.narrow_runs(s)), ("field-trials", field.trial_runs),
    ("field-text", field.text_runs), ("field-text-trials", field.text_trial_runs),
    ("field-text-long-trials", field.long_trial_runs), ("field-wide", field.wide_field_runs),
])  # fmt: skip
def test_what_ships_of_the_field_is_what_the_code_trains(name, made):
    """No record of a system's older form stays among its rows, and any can be trained again by its name."""
    specs, shipped = made(runs.settings(dict(preset="cpu", seeds=6))), runs.stored_records(name)["record"]
    data = shipped[0]["data"]
    found = {(run.model, run.train.seed, identity(run, data)) for run in specs}
    assert {(r["model"], r["seed"], r["id"]) for r in shipped} <= found
    assert all(r["data"]["sha256"] == data["sha256"] for r in shipped)


def test_the_fixed_models_of_the_field_on_text_are_those_of_experiment_1(tmp_path):
    s = runs.settings(dict(preset="cpu"))
    fixed = {spec.model: spec for spec in field.text_runs(s, list(FIXED)) if spec.train.seed == 0}
    long = {spec.model: spec for spec in runs.long_runs(s, "exp1") if spec.train.seed == 0}
    for name, label in ON_TEXT.items():
        same = dict(experiment="", model="")
        assert replace(fixed[label], **same) == replace(long[name], **same)
    assert results.stored_text_field(tmp_path).empty
    for path in files.REFERENCE.glob("exp1-long_*_s0_*.json"):
        record = path.read_text(encoding="utf-8")
        (tmp_path / path.name).write_text(record, encoding="utf-8")
    own = json.loads(record) | dict(experiment="field-text", model="act")
    (tmp_path / "field-text_act_s0_0.json").write_text(json.dumps(own), encoding="utf-8")
    stored = results.stored_text_field(tmp_path)
    assert set(stored["model"]) == {*FIXED, "act"} and set(stored["experiment"]) == {"field-text"}
    table = results.field_table(stored, NO_COSTS, 3)
    assert list(table.index) == ["six layers", "eight layers", "twelve layers", NAMES["act"]]


def test_partial_records_say_how_many_there_are():
    records = records_of(LOSSES | {"act": [1.45]})
    table = results.field_table(records, costs_of(records), 3)
    assert list(table.index) == ["two layers", "three layers", "four layers", NAMES["act"]]
    assert table.loc["two layers", "seeds"] == "2 of 3" and table.loc[NAMES["act"], "seeds"] == "1 of 3"
    more = results.field_table(records_of(LOSSES | {"act": [1.45], "worth": [1.3]}), NO_COSTS)
    assert more.loc[NAMES["worth"], "seeds"] == "1 of 6" and more.loc[NAMES["act"], "seeds"] == "1 of 3"
    assert results.field_table(runs.stored_records("no-such-experiment"), NO_COSTS, 3).empty


def test_the_way_is_from_half_of_the_layers_to_all_paired_by_seed():
    records = records_of(LOSSES | {"act": [1.35, 1.55], "ponder": [1.2]})
    scored = with_costs(records, costs_of(records))
    way = scored.groupby("model")["way"].apply(list)
    assert way["fixed-half"] == pytest.approx([0, 0]) and way["act"] == pytest.approx([50, 50])
    assert way["fixed-deep"] == pytest.approx([100, 100]) and way["ponder"] == pytest.approx([100])
    losses = {"fixed-half": [1.5, 1.7], "fixed-deep": [1.2, 1.6], "act": [1.35], "mod": [1.35, 1.65]}
    uneven = records_of(losses)
    mean = with_costs(uneven, costs_of(uneven)).groupby("model")["way"].mean()
    assert mean["act"] == pytest.approx(50), "of what all layers gain at its own seed, not on average"
    assert mean["mod"] == pytest.approx(50)
    alone = records_of({"act": [1.0]})
    assert with_costs(alone, NO_COSTS)["way"].isna().all(), "nothing to compare with"
    table = results.field_table(alone, NO_COSTS, 3)
    row = table.loc[NAMES["act"]]
    assert row["way (%)"] == row["operations a token (thousands)"] == "" and row["loss (nats)"] == "1.000"


def test_a_system_is_ahead_if_it_is_below_the_line_of_fixed_depth_of_its_seed_at_its_operations():
    losses = LOSSES | {"act": [1.40, 1.56], "mod": [1.5, 1.70], "exit": [1.0, 1.0], "ponder": [1.9]}
    records = records_of(losses, run=(1.0, 0.5))
    cost_of = dict(act=125.0, mod=125.0, exit=500.0, ponder=50.0)
    scored = with_costs(records, costs_of(records, **cost_of))
    gaps = {name: gaps_to_fixed(scored, name).tolist() for name in ("act", "mod", "exit", "ponder", "sliced")}
    assert gaps["act"] == pytest.approx([0.05, -0.01]) and gaps["mod"] == pytest.approx([-0.05, -0.15])
    assert all(gap != gap for gap in gaps["exit"]), "it costs more than any fixed model: no line is there"
    assert gaps["ponder"] == pytest.approx([-0.4]) and gaps["sliced"] == []
    right = scored.assign(right=100 - 10 * scored["loss"])
    assert gaps_to_fixed(right, "act", "right").tolist() == pytest.approx([0.5, -0.1]), (
        "points; more is better"
    )
    told = results.field_sentence(records, costs_of(records, **cost_of))
    assert told.startswith(
        "None of two systems is shown to lie below the line of fixed depth at equal operations"
    )
    assert f"The nearest to it is {NAMES['act']} (+0.020 nats; two seeds)." in told
    better = records_of(losses | {"act": [1.40, 1.50]}, run=(1.0, 0.5))
    told = results.field_sentence(better, costs_of(better, **cost_of))
    hint = f"Ahead of it so far, at each of few seeds: {NAMES['act']} (+0.050 nats; two seeds)."
    assert told.startswith("None of two systems is shown") and hint in told and "chose nothing" not in told
    assert "Of one more there is one seed so far, which shows nothing." in told, "not counted as behind"
    assert "The nearest" not in told
    six = records_of({model: [v[0] + 0.01 * seed for seed in range(6)] for model, v in LOSSES.items()}
                     | {"act": [1.40 + 0.01 * seed for seed in range(6)]}, run=(1.0, 0.5))  # fmt: skip
    told = results.field_sentence(six, costs_of(six, **cost_of))
    assert told.startswith("One of one system is shown") and "so far" not in told
    short = results.short_field(better, records, costs_of(better, **cost_of))
    assert (
        short
        == f"Where depth is known to matter, {NAMES['act']} (ahead by 0.050 nats; two seeds); on text, none."
    )
    assert results.short_field(better, records, NO_COSTS) == ""
    assert results.field_sentence(records, NO_COSTS).startswith("Not known yet")
    fallen = records_of(losses)
    told = results.field_sentence(fallen, costs_of(fallen, **cost_of))
    assert told.startswith("Not known yet"), "who chose nothing is not counted"


def test_a_fixed_model_of_another_seed_is_no_part_of_a_seeds_line():
    losses = {"fixed-half": [1.5, 1.7], "fixed-between": [1.2], "fixed-deep": [1.2, 1.4], "act": [1.3, 1.5]}
    records = records_of(losses, run=(1.0, 0.5))
    gaps = gaps_to_fixed(with_costs(records, costs_of(records, act=150.0)), "act")
    assert gaps.tolist() == pytest.approx([-0.1, 0.05]), "half-way between two and all layers at the second"


@pytest.mark.parametrize(
    "gaps, ahead",
    [
        ([0.2], False), ([0.1, 0.2], True), ([0.1, 0.2, 0.1], True), ([0.1, 0.2, -0.01], False),
        ([0.01, 0.02, 0.01, 0.02, 0.01, 0.02], True),
        ([0.4, 0.01, 0.01, 0.01, 0.01, 0.01], False), ([-0.01, -0.02, -0.01, -0.02, -0.01, -0.02], False),
        ([0.2, 0.3, 0.2, 0.3, 0.2, -0.01], False),
    ],
)  # fmt: skip
def test_six_seeds_are_judged_by_their_interval_and_fewer_each(gaps, ahead):
    """Of the last ones the interval leaves out zero, and the sign-flip test does not agree."""
    assert is_ahead(np.array(gaps)) is ahead
    assert ("95 % interval" in results.field.lead(np.array(gaps))) is (len(gaps) == 6)


def test_seeds_that_all_lead_alike_have_no_interval():
    assert results.field.lead(np.full(6, 0.1)) == "+0.100 nats; six seeds"
    assert results.tables.span(np.nan, np.nan) == "" and results.tables.span(-1, 2, 0) == "\u22121 to +2"


@pytest.mark.parametrize(
    "run, fallen",
    [((1, 1, 0), True), ((1, 0.995), True), ((1, 0.005), True), ((1, 0.5, 0), False), ((0.98, 1), False)],
)
def test_a_router_has_collapsed_if_each_layer_runs_all_or_none(run, fallen):
    records = records_of({"act": [1.0]}, run)
    assert chose_nothing(records["record"][0]) is fallen
    row = with_costs(records, NO_COSTS).iloc[0].to_dict()
    assert row["collapsed"] is fallen
    assert not collapsed(pd.Series(row | dict(model="fixed-half"))), "which has no choice to lose"
    for balance, uneven in ((2.5, True), (1.1, False)):
        assert collapsed(pd.Series(row | dict(model="moe-top1", balance=balance))) is uneven
        of_mor = collapsed(pd.Series(row | dict(model="mor-moe", balance=balance)))
        assert of_mor is (uneven or fallen), "its router, or its experts"
    repeats = json.loads(json.dumps(records["record"][0]))
    repeats["metrics"]["action_rates"] = [[[0.0, 0.8, 0.2]], [[0.0, 1.0, 0.0]]]
    assert not chose_nothing(repeats), "who repeats has chosen"
    shown = results.field_table(records, NO_COSTS, 3).loc[NAMES["act"], "collapsed"]
    assert shown == f"{int(fallen)} of 1"


def test_the_best_by_each_price_is_named():
    controls = {"planted": [1.0], "blind": [1.0], "frozen": [1.0]}
    losses = LOSSES | {"act": [1.31] * 2, "mod": [1.34] * 2, "worth": [1.7] * 2} | controls
    records = records_of(losses, run=(1.0, 0.5))
    costs = costs_of(records, act=190.0, mod=110.0, worth=90.0, planted=90.0, blind=90.0, frozen=90.0)
    once = pd.concat([records, records_of({"ponder": [0.1]}, run=(1.0, 0.5))], ignore_index=True)
    shown = results.choices_table(once, pd.concat([costs, costs_of(once, ponder=90.0)]))
    assert NAMES["ponder"] not in set(shown["system"]), "one seed shows nothing"
    told = results.field_sentence(records, costs)
    assert "of three systems" in told and not any(NAMES[name] in told for name in controls)
    table = results.choices_table(records, costs).set_index("what matters")["system"]
    assert table["bytes of the cache, half of the way at least"] == "four layers", "of equals"
    assert table["the loss alone"] == "four layers", "by the mean over seeds; the plan is left out"
    assert table["the loss, at the operations of half the layers or a fifth more"] == NAMES["mod"]
    assert table["operations, half of the way to all layers at least"] == NAMES["mod"]
    fallen = records_of(LOSSES | {"act": [0.9]})
    table = results.choices_table(fallen, costs_of(fallen)).set_index("what matters")["system"]
    assert table["the loss alone"] == "four layers", "act chose nothing"
    once = records_of(LOSSES | {"act": [0.9, 0.9]}, run=(1.0, 0.5))
    act = once[once["model"] == "act"]["record"].iloc[0]
    act["metrics"] = act["metrics"] | dict(action_rates=rates(1.0, 1.0))
    table = results.choices_table(once, costs_of(once)).set_index("what matters")["system"]
    assert table["the loss alone"] == "four layers", "act chose nothing at one of two seeds"
    assert results.choices_table(runs.stored_records("no-such-experiment"), NO_COSTS).empty
    table = results.choices_table(records, costs, without=["mod"])
    table = table.set_index("what matters")["system"]
    assert table["operations, half of the way to all layers at least"] == "three layers"


@pytest.mark.parametrize(
    "values, told",
    [
        ([0.5, 0.4], "+0.45"), ([-0.77, 0.61], "\u22120.77 to +0.61"), ([0.2, 0.49], "+0.34"),
        ([-0.1, 0.1], "\u22120.10 to +0.10"), ([0.1, 0.41], "+0.10 to +0.41"),
        ([-0.03, 0.001], "\u22120.01"),
    ],
)  # fmt: skip
def test_where_seeds_differ_in_what_their_depth_follows_their_range_is_shown(values, told):
    records = records_of({"act": [1.0, 1.1]})
    costs = costs_of(records).assign(r=values)
    table = results.field_table(records, costs, 3)
    assert table.loc[NAMES["act"], "depth follows hops"] == told


def test_what_deciding_alone_changes_is_shown_with_the_predictor_s_agreement():
    records = records_of({"mor-expert": [1.2], "mod": [1.0, 1.1], "act": [1.0]})
    trained = dict(loss=0.5, accuracy=50.0, effective_depth=2.5)
    records["sampled"] = [trained] * len(records)
    costs = costs_of(records)
    assert not results.sampled_table(records, costs)["predictor agrees (%)"].any(), "none was measured"
    costs.loc[costs["model"] == "mod", "agreement"] = [90.0, 95.0]
    table = results.sampled_table(records, costs)
    assert table.index.tolist() == [NAMES["mod"], NAMES["mor-expert"]]
    assert table["predictor agrees (%)"].tolist() == ["92.5", ""]
    row = table.loc[NAMES["mod"]]
    assert row["loss by top-k"] == 0.5 and row["loss in use"] == 1.05
    assert results.sampled_table(runs.stored_records("no-such-experiment"), NO_COSTS).empty
    agreed = cost.stored_systems().groupby("model")["agreement"].count()
    assert agreed["mod"] > 0 and agreed.drop("mod").sum() == 0


def test_the_headline_begins_with_what_holds_on_both_tasks(monkeypatch):
    shown, costs = [], cost.stored_systems()
    monkeypatch.setattr(results.field, "show", lambda *parts: shown.append(parts))
    results.field_headline(costs)
    assert shown[0][0].startswith(
        "Ahead of fixed layers at equal operations: where depth is known to matter, "
    )
    assert re.search(r"; on text, [^.]+\(ahead by 0\.\d+ nats\)\.$", shown[0][0])
    monkeypatch.setattr(results.field, "stored_text_field", lambda folder=None: pd.DataFrame())
    results.field_headline(costs)
    first = results.field_sentence(results.stored_field(), costs)
    assert shown[1][0] == first and first in shown[0][2], "the answer, or what is said after it"
    for sentence in (results.stays_high_sentence, results.second_lead_sentence):
        told = sentence(costs)
        assert told and all(told in parts[2] for parts in shown)


def test_on_text_it_is_accuracy_that_is_right():
    records = records_of(LOSSES | {"act": [1.45, 1.55]}, run=(1.0, 0.5))
    for record in records["record"]:
        del record["metrics"]["details"]
    table = results.field_table(records.assign(accuracy=48.125), costs_of(records), 3)
    assert table.loc[NAMES["act"], "accuracy (%)"] == "48.12" and "hard answers right (%)" not in table
    assert table.loc[NAMES["act"], "depth follows surprisal"] == "+0.25"
    told = results.on_text_sentence(records, costs_of(records))
    start = (
        "On text, where four layers are worth 0.300 nats over two layers: none of one system is shown to lie"
    )
    assert told.startswith(start) and told.endswith("By accuracy, those ahead of it are: none.")
    assert results.on_text_sentence(records[records["model"] == "act"], NO_COSTS) == ""


@torch.no_grad()
def test_depth_that_follows_surprisal_is_seen(small_text):
    corpus = texts.load_corpus(small_text)
    windows = corpus.windows("heldout", 32, 20)
    surprisal = texts.ngram_surprisal(corpus.ids["train"], windows.flatten(), 3, corpus.vocab_size)[0]
    depth = torch.zeros(windows.numel())
    depth[1:-1] = torch.tensor(surprisal).argsort().argsort().float()  # of the token read, at its place
    depth = depth.view(windows.shape)[:, :-1]
    assert follows_surprisal(dict(depth=depth), windows, corpus) > 0.99  # equal ones share a rank
    assert follows_surprisal(dict(depth=-depth), windows, corpus) < -0.99
    assert follows_surprisal(dict(depth=0 * depth), windows, corpus) == 0


def test_figures_draw_what_is_there():
    records = records_of(LOSSES | {"act": [1.45], "ponder": [1.3]})
    costs = costs_of(records)
    for costs_known in (costs, NO_COSTS):
        for axes in results.loss_against_operations(records, costs_known).axes:  # all, and near the line
            drawn = [line.get_label() for line in axes.get_lines()]
            systems = [f"1  {NAMES['act']}", f"2  {NAMES['ponder']}"] if len(costs_known) else []
            assert drawn == ["fixed depth", *systems]
            beside = {text.get_text(): text.xy for text in axes.texts}
            assert list(beside) == [name[0] for name in systems]
            assert [line.get_xydata()[0].tolist() for line in axes.get_lines()[1:]] == [
                list(place) for place in beside.values()
            ]
    axes = results.way_to_all_layers(records, costs).axes[0]
    assert len(axes.get_yticks()) == 5
    nothing = runs.stored_records("no-such-experiment")
    for draw in (results.loss_against_operations, results.way_to_all_layers):
        assert draw(nothing, NO_COSTS).axes[0].get_lines() is not None


def test_numbers_stand_beside_their_marks_and_apart():
    _, ax = plt.subplots()
    marks = [(0.0, 0.0), (0.02, 0.0), (1.0, 1.0)]
    ax.plot(*zip(*marks), "o")
    number_marks(ax, dict(enumerate(marks, 1)), [(0.0, 0.02)])
    texts = [text.get_text() for text in ax.texts]
    places = [ax.transData.transform(text.xy) + np.array(text.get_position()) for text in ax.texts]
    assert texts == ["1", "2", "3"]
    for place in places:
        others = [ax.transData.transform(mark) for mark in [*marks, (0.0, 0.02)]]
        others += [other for other in places if other is not place]
        assert min(np.linalg.norm(place - other) for other in others) > 6, "no number on a mark or a number"


def test_a_run_that_goes_on_from_another_is_not_mistaken_for_one_that_does_not():
    s = runs.settings(dict(preset="cpu"))
    [dr, *_], [lora, *_] = field.field_runs(s, ["dr"]), field.field_runs(s, ["lora"])
    asked = [dr.parent, dr, replace(lora, parent=dr.parent), runs.go_on(dr.parent), lora]
    first, began, later, none, scratch = runs.runner.stored(asked)
    assert began["parent"] == first["id"] and began["model"] == "dr"
    assert later.startswith("no record of it ships") and none == later
    assert isinstance(scratch, dict), "from scratch there is such a record"


# ---- Costs ----


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.setattr(texts.Hops, "floors", {"2": {"heldout": dict(loss=3.0)}})
    return runs.settings(dict(preset="smoke"))


def test_costs_are_those_of_the_trained_model(smoke, tmp_path):
    labels = ["fixed-half", "act", "mod", "moe-top2"]
    specs = [replace(spec, train=replace(spec.train, epochs=1, heldout_windows=20, eval_windows=20))
             for spec in field.field_runs(smoke, labels)]  # fmt: skip
    table = cost.measure_systems(specs, lines=30, repeats=1)
    assert table["model"].tolist() == labels
    rows = {row["model"]: row for row in table.to_dict("records")}
    assert rows["fixed-half"]["cache"] == 2 * 2 * 16 * 4, "layers, keys and values, width, bytes"
    assert rows["act"]["cache"] == 4 * 2 * 16 * 4, "who has stopped is still seen"
    for spec in specs:
        model, record, task = runs.trained_model(spec)
        with torch.no_grad():
            out = model(task.windows("heldout", 64, 30)[:, :-1])
        row = rows[spec.model]
        assert row["operations"] == cost.flops(model, out.actions)["total"] / out.depth.numel()
        assert row["run"] == record["id"] and row["decode"] > 0 < row["step"] and -1 <= row["r"] <= 1
    shallow = runs.trained_model(specs[0])  # two layers, timed beside twelve
    assert all(0 < ratio < 0.7 for ratio in times(shallow[0], shallow[2], 12, 5).values())
    assert 1 <= rows["moe-top2"]["balance"] <= 4 and rows["act"]["balance"] != rows["act"]["balance"]
    assert 50 < rows["mod"]["agreement"] <= 100 and np.isnan(rows["act"]["agreement"])
    assert table["measured_on"].str.contains(f"torch {torch.__version__}, morlib 0", regex=False).all()
    cost.save_systems(table, tmp_path / "costs.json")
    pd.testing.assert_frame_equal(cost.stored_systems(tmp_path / "costs.json"), table)


# ---- How to add one ----


def test_the_page_adds_a_system(smoke, monkeypatch, capsys):
    page = (files.ROOT / "suite" / "field" / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(morlib, "POLICIES", dict(morlib.POLICIES))
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S)), names)
    found = names["records"].set_index("model")
    assert found["effective_depth"]["fixed-deep"] == 4 and 2 <= found["effective_depth"]["gated"] <= 4
    assert "operations" in capsys.readouterr().out
    task = texts.load_corpus("hops-8-2")
    model = runs.trained_model(names["gated"])[0]
    windows = task.windows("heldout", 64, 8)[:, :-1]
    with torch.no_grad():
        for gate in model.policy.gates:
            gate.weight.mul_(100)
        whole, cache = model(windows), morlib.Cache()
        parts = [model(part, cache) for part in windows.split([40, 1, 1, 22], 1)]
    assert len(whole.depth.unique()) > 1, "the gates open for some"
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-4)
    for row in re.findall(r"^\| .+? \| .*?`(\w+)[`(]", page, flags=re.M):
        assert (
            hasattr(names["Gated"], row)
            or any(hasattr(kind, row) for kind in morlib.POLICIES.values())
            or row == "step"
        )


# ---- Trials ----


def test_trials_differ_from_their_rows_in_what_their_names_say(smoke):
    trials, task = field.trial_runs(smoke), texts.load_corpus("hops-8-2")
    assert {run.train.seed for run in trials} == {10} and {run.experiment for run in trials} == {
        "field-trials"
    }
    ids = {runs.run_id(run.config, run.train, task) for run in trials}
    assert len(ids) == len(trials) == len({run.model for run in trials})
    found = {run.model: run for run in trials}
    assert found["act, tau 0.1"].config.options == dict(tau=0.1)
    assert found["fixed-half, lr 0.004"].train.lr == 0.004
    assert found["mod, capacity 0.5"].config.capacity == 0.5
    (row,) = field.field_runs(smoke, ["mod"])
    shorter = dict(windows=16, evaluations=1, seed=1, heldout_windows=1)
    as_it_is = found["mod, router_lr 0.002"]
    assert as_it_is.config == row.config
    assert replace(as_it_is.train, **shorter) == replace(row.train, **shorter)
    begun = found["dr, beta 0.999"].parent
    assert begun.train.seed == 10 and begun.config.routing == "none" and "trials" in begun.experiment
    for run in trials:
        morlib.Transformer(replace(run.config, vocab_size=9))


def test_on_text_the_price_of_a_pass_is_its_own_and_added_routers_are_judged_at_the_end():
    s = runs.settings(dict(preset="cpu"))
    on_text = {run.model: run for run in field.text_runs(s) if run.train.seed == 1}
    assert on_text["act"].config.options == dict(tau=0.003) and on_text["dr"].config.options == dict(
        cost=0.005
    )
    assert on_text["dr"].train.evaluations == 1 < on_text["act"].train.evaluations
    assert on_text["dr"].parent == on_text["fixed-deep"] and on_text["act"].parent == ""
    tried = {run.model: run.config.options for run in field.text_trial_runs(s)}
    assert tried["act, tau 0.003"] == on_text["act"].config.options


@pytest.mark.parametrize("trials_of", [field.trial_runs, field.text_trial_runs])
def test_each_system_with_settings_has_four_trials(trials_of):
    s = runs.settings(dict(preset="cpu"))
    trials = trials_of(s)
    many = Counter(run.model.partition(",")[0] for run in trials)
    assert many == dict.fromkeys(many, 4) | dict(act=5)
    variants = {label for label in NAMES if label.endswith(("-cycle", "-sharing"))}
    variants |= {"lora-uptrained"}
    without = {"fixed-between", "planted", "blind", "frozen", "mor", "exit-confidence"} | variants
    assert set(NAMES) - set(many) == without
    rows = field.field_runs(s) if trials_of is field.trial_runs else field.text_runs(s)
    rows = {run.model: run for run in rows if run.train.seed == 0}
    own = Counter(run.model.partition(",")[0] for run in trials
                  if same_settings(run, rows[run.model.partition(",")[0]]))  # fmt: skip
    assert own == dict.fromkeys(many, 1), "one of them is that of the row"


def same_settings(trial, row):
    """Whether a trial has the settings of its row, for it is shorter and of another seed."""

    def settings(run):
        policy = morlib.POLICIES[run.config.routing]
        options = getattr(policy, "OPTIONS", {}) | (run.config.options or {})
        return replace(run.config, options=options), run.train.lr, run.train.router_lr

    return settings(trial) == settings(row)


def test_trials_are_listed_the_best_of_each_system_first():
    trials = records_of({"act, tau 0.1": [1.0], "act, tau 0.2": [1.0], "mod, capacity 0.5": [1.0]})
    for record, loss in zip(trials["record"], (1.9, 1.8, 1.7)):
        record["history"][-1]["val_loss"] = loss
    table = results.trials_table(trials)
    assert table["system"].tolist() == ["act", "act", "mod"]
    assert table["setting"].tolist() == ["tau 0.2", "tau 0.1", "capacity 0.5"]
    assert results.trials_table(runs.stored_records("no-such-experiment")).empty


def test_on_text_few_settings_in_use_are_behind_by_more_than_notebook_08_says():
    table = results.trials_table(runs.stored_records("field-text-trials"), results.stored_text_field())
    losses = table.set_index("system")["validation loss (nats)"]
    best, chosen = losses.groupby(level=0).min(), losses[(table["in use"] == "yes").to_numpy()]
    assert set(chosen.index) == set(best.index), "one trial of each is in use"
    behind = (chosen - best).round(3)
    assert set(behind[behind > 0.02].index) == {"moe-top1", "mor-moe", "mor-expert", "mod"}


def test_of_each_system_one_trial_at_most_is_in_use_and_it_is_the_row_s_own():
    table = results.trials_table(runs.stored_records("field-trials"), results.stored_field())
    used = table[table["in use"] == "yes"].set_index("system")["setting"].to_dict()
    assert used["mod"] == "router_lr 0.002" and used["moe-top1"] == "balance 0.01"
    assert used["worth"] == "lr 0.002, router_lr 0.002" and used["fixed-half"] == "lr 0.002"
    losses = table.set_index("system")["validation loss (nats)"]
    best, chosen = losses.groupby(level=0).min(), losses[(table["in use"] == "yes").to_numpy()]
    own = [name for name in used if name not in (*FIXED, "worth")]  # of these learning rates were tried
    assert ((chosen - best)[own] < 0.02).all(), "as notebook 08 says"
    assert used["dr"] == "beta 0" and len(used) == (table["in use"] == "yes").sum()


def test_what_notebook_08_says_of_mor_and_the_line_of_fixed_depth_holds():
    scored = with_costs(results.stored_field(), cost.stored_systems())
    gaps = {label: gaps_to_fixed(scored, label) for label in NAMES}
    above = {label: round(-gap.mean(), 3) for label, gap in gaps.items() if len(gap)}
    assert [above[label] for label in ("mor-token", "mor-expert", "mor-moe")] == [0.012, 0.032, 0.003]
    assert all((gaps[label] > 0).sum() == 2 for label in ("mor-token", "mor-expert", "mor-moe"))
    assert [above[label] for label in ("mor-token-sharing", "mor-expert-sharing")] == [0.078, 0.043]
    assert all(
        above[label] == pytest.approx(0.245, abs=0.001) for label in ("mor-token-cycle", "mor-expert-cycle")
    )
    assert [above[label] for label in ("mor", "frozen")] == [0.034, 0.033]


def test_what_notebook_08_says_of_depth_and_of_memory_holds():
    costs, narrow, text = cost.stored_systems(), results.stored_field(), results.stored_text_field()
    E = narrow.groupby("model")["effective_depth"].mean()
    held = E[["worth", "mor", "blind", "frozen", "exit", "exit-confidence"]]
    assert set(held.round(1)) == {2.3} and round(E["planted"], 2) == 2.27
    told = dict(act=1.8, ponder=2.5, mod=2.2) | {"mor-expert": 3.3, "mor-token": 3.5, "dr": 3.9}
    told |= {"mor-expert-cycle": 2.5, "mor-token-cycle": 2.5}
    assert E[list(told)].round(1).to_dict() == told
    assert set(E[["lora", "lora-uptrained", "sliced", "moe-top1", "moe-top2"]]) == {2.0}
    trials = results.trials_table(runs.stored_records("field-text-trials"))
    prices = trials[(trials["system"] == "act") & trials["setting"].str.startswith("tau")]["E"]
    assert (prices.min().round(1), prices.max().round(1)) == (1.8, 2.9)

    known, on_text = (with_costs(records, costs).groupby("model").mean(numeric_only=True)
                      for records in (narrow, text))  # fmt: skip
    half_way = known[(known["way"] >= 50) & (known.index != "planted")]["cache"]
    assert half_way.idxmin() == "worth" and (round(half_way.min()), known["cache"]["fixed-between"]) == (
        589,
        768,
    )
    shared, all_shared = (on_text.loc[f"mor-expert-{how}"] for how in ("sharing", "cycle"))
    assert 3 * shared["cache"] == 2 * on_text["cache"]["fixed-half"] and all_shared["cache"] < shared["cache"]
    assert on_text["loss"]["fixed-half"] < shared["loss"] < all_shared["loss"]

    own = results.trials_table(runs.stored_records("field-trials"), narrow)
    own = own[own["system"] == "moe-top1"].sort_values("validation loss (nats)")
    gap = own["validation loss (nats)"].iloc[-1] - own["validation loss (nats)"].iloc[0]
    assert len(own) == 4 and own["in use"].iloc[-1] == "yes" and round(gap, 3) == 0.017


def test_what_notebook_08_says_of_six_layers_holds():
    costs, wide, narrow = cost.stored_systems(), results.stored_wide_field(), results.stored_field()
    assert all("worth" in results.field.ahead_of_fixed(table, costs)[1] for table in (wide, narrow))
    right = results.known_depth.with_hops(wide).set_index(["model", "seed"])["hops"].round()
    first = {"fixed-half": 18, "fixed-between": 99, "fixed-deep": 99, "dr": 95, "mor-expert": 95, "mod": 93}
    first |= {"mor-moe": 94, "moe-top2": 89, "lora-uptrained": 71, "frozen": 47, "blind": 1}
    assert {label: right[label, 0] for label in first} == first
    others = set(NAMES) - set(first) - {"worth", "planted"}
    assert max(right[label, 0] for label in others) < 89, "none of the others comes near six layers"
    assert (right["fixed-between", 1], right["fixed-deep", 1]) == (77, 69)
    assert right["mor-expert"].tolist() == [95, 88, 22] and right["worth"].min() == 97
    assert (right["fixed-deep"].min(), right["fixed-deep"].max()) == (50, 99)
    record = wide[(wide["model"] == "mor-expert") & (wide["seed"] == 1)].iloc[0]["record"]
    both = record["metrics"]["sampled"]["loss"], record["metrics"]["loss"]
    assert [round(loss, 3) for loss in both] == [1.286, 1.404]
    depth = wide[wide["model"] == "exit"].iloc[0]["record"]["metrics"]["details"]["depth_by_kind"]
    assert {kind: round(value, 1) for kind, value in depth.items()} == dict(
        table=4.7, k=1.8, x=4.9, answer=1.8
    )
    seeds = results.field_table(wide, costs)["seeds"]
    assert seeds[NAMES["mor-expert"]] == "3 of 3" and seeds[NAMES["worth"]] == "6 of 6"
    assert "more there is one seed so far, which shows nothing." in results.field_sentence(wide, costs)


def test_the_lead_where_the_rate_stays_high_is_that_of_its_records(tmp_path):
    costs, own = cost.stored_systems(), runs.stored_records("known-depth-wsd")
    row = results.field_table(results.stored_field(), costs)["operations a token (thousands)"].astype(float)
    two, three, worth = row["two layers"], row["three layers"], row["token worth"]
    loss = own.pivot_table(index="seed", columns="model", values="loss")
    part = (worth - two) / (three - two)
    line = (1 - part) * loss["fixed-half"] + part * loss["fixed-between"]
    told, leads = results.stays_high_sentence(costs), line - loss["worth"]
    lead = float(re.search(r"is ahead too \(\+([\d.]+) nats", told)[1])
    assert lead == pytest.approx(leads.mean(), abs=0.002) and told.endswith("six seeds).")
    assert results.stays_high_sentence(costs, tmp_path) == results.stays_high_sentence(costs.head(0)) == ""


def test_the_lead_by_the_second_trainings_is_that_of_their_losses(tmp_path):
    costs = cost.stored_systems()
    again = (
        results.stored_table("known_depth_dial_narrow.json").query("target == 2.3").set_index("seed")["loss"]
    )
    own = with_costs(results.stored_field(), costs)
    losses = own.pivot_table(index="seed", columns="model", values="loss")
    at = own.groupby("model")["operations"].mean()
    part = (at["worth"] - at["fixed-half"]) / (at["fixed-between"] - at["fixed-half"])
    line = losses["fixed-half"] + part * (losses["fixed-between"] - losses["fixed-half"])
    gaps = line - again.combine_first(losses["worth"])
    told = results.second_lead_sentence(costs)
    assert "token worth is not shown to be ahead (+" in told and (gaps > 0).sum() == 5
    assert float(re.search(r"\(\+([\d.]+) nats", told)[1]) == pytest.approx(gaps.mean(), abs=0.002)
    assert told.endswith("six seeds, ahead at five of them).")
    assert results.second_lead_sentence(costs, tmp_path) == ""


def test_each_system_is_drawn_as_its_family_and_no_two_families_look_alike():
    families = results.field.FAMILIES
    placed = [label for _, own in families.values() for label in own]
    assert sorted(placed) == sorted(label for label in NAMES if label not in FIXED), "each has one family"
    looks = {(look.colour, look.marker) for look, _ in families.values()}
    assert len(looks) == len(families)
    for label in placed:
        assert field_look(label).filled is (label not in results.field.ASIDE)
    far = records_of(LOSSES | {"act": [3.0]})
    whole, near = results.loss_against_operations(far, costs_of(far)).axes
    assert [len(ax.texts) for ax in (whole, near)] == [1, 0], "near the line there is no room for it"


def test_a_long_trial_differs_from_its_row_by_the_setting_alone_and_what_ships_is_of_these():
    s = runs.settings(dict(preset="cpu"))
    tried = {"moe-top1": ("balance", 0.01, 0.1), "mor-moe": ("balance", 0.01, 0.1),
             "mor-expert": ("alpha", 0.1, 1.0)}  # fmt: skip
    rows = {(run.model, run.train.seed): run for run in field.text_runs(s, list(tried))}
    trials = field.long_trial_runs(s)
    assert len(trials) == len(rows)
    for run in trials:
        label, _, setting = run.model.partition(", ")
        name, usual, changed = tried[label]
        row = rows[label, run.train.seed]
        assert setting == f"{name} {changed:g}" and run.config.options[name] == changed
        own = morlib.POLICIES[row.config.routing].OPTIONS | (row.config.options or {})
        assert own[name] == usual
        alike = replace(run, config=row.config, experiment=row.experiment, model=row.model)
        assert alike == row
    shipped = runs.stored_records("field-text-long-trials")
    found = [record for record in stored(trials) if isinstance(record, dict)]
    assert {record["id"] for record in found} == {record["id"] for record in shipped["record"]} != set()


def test_leads_of_short_trials_are_a_third_at_most_in_the_long_ones_as_notebook_08_says():
    tables = [runs.stored_records(name) for name in ("field-text-trials", "field-text-long-trials")]
    records = pd.concat([*tables, results.stored_text_field()])
    best = {(r["model"], r["seed"]): min(p["val_loss"] for p in r["history"]) for r in records["record"]}
    found, balance = {}, ("balance 0.01", "balance 0.1")
    tried = dict.fromkeys(["moe-top1", "mor-moe"], balance)
    tried["mor-expert"] = ("alpha 0.1, weight 0.001", "alpha 1, weight 0.001")
    for model, (usual, changed) in tried.items():
        longer = f"{model}, {changed.partition(',')[0]}"
        leads = [best[model, seed] - best[longer, seed] for seed in range(3)]
        mean, short = sum(leads) / 3, best[f"{model}, {usual}", 10] - best[f"{model}, {changed}", 10]
        assert mean <= short / 3
        found[model] = round(mean, 3), sum(lead > 0 for lead in leads)
    assert found == {"moe-top1": (-0.003, 2), "mor-moe": (0.009, 2), "mor-expert": (0.005, 1)}


def test_what_trains_on_from_a_model_of_the_table_is_no_rival_of_fixed_depth():
    records = records_of(LOSSES | {"act": [1.40, 1.56], "lora-uptrained": [1.0, 1.0]}, run=(1.0, 0.5))
    costs = costs_of(records, act=125.0)
    told, shown = results.field_sentence(records, costs), results.choices_table(records, costs)
    assert NAMES["lora-uptrained"] not in told and told.startswith("None of ")
    assert told.endswith("Left out, since it has had more steps: relaxed recursion from a trained model.")
    without = records[records["model"] != "lora-uptrained"]
    assert "relaxed" not in results.field_sentence(without, costs)
    assert NAMES["lora-uptrained"] not in set(shown["system"])
