"""Statistics have known answers; tables, sentences and RESULTS.md follow the records."""

import dataclasses
import functools
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats

import morlib
from suite import cost, report, results, routing, runs
from suite.files import REFERENCE, ROOT
from suite.results import figures, headlines, stats, tables
from suite.routing import bangla_findings

EXPERIMENTS = ("exp1", "exp2", "bangla")


# ---- Over seeds ----


def table(accuracies, did_train=True):
    """Records of models as `compare` needs them: name to accuracies by seed."""
    return pd.DataFrame([
        dict(model=model, seed=seed, accuracy=accuracy, did_train=did_train)
        for model, values in accuracies.items() for seed, accuracy in enumerate(values)
    ])  # fmt: skip


def test_an_interval_is_student_s():
    values = np.array([1.0, 2.0, 4.0])
    mean, low, high = results.interval(values)
    assert (low, high) == pytest.approx(
        scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
    )
    assert mean == pytest.approx(7 / 3)
    _, low90, high90 = results.interval(values, 0.90)
    assert low < low90 < high90 < high
    for few in ([1.0], [1.0, 2.0], [3.0, 3.0, 3.0]):
        assert np.isnan(results.interval(few)[1:]).all()


def test_an_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(40, 0.3, (4000, 6))
    covered = [low < 40 < high for _, low, high in map(results.interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_where_a_new_seed_is_expected():
    """The interval of one further draw holds 95 % of further draws from a normal population."""
    draws = np.random.default_rng(0).normal(40, 0.3, (4000, 7))
    inside = [low < row[6] < high for row in draws for low, high in [results.new_seed_range(row[:6])]]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert np.isnan(results.new_seed_range([1.0, 2.0])).all()


def test_paired_comparison():
    rng = np.random.default_rng(0)
    base = rng.normal(40, 3, 8)
    wave = np.array([1, -1, 2, -2, 3, -3, 1, -1])
    better = results.compare(table(dict(a=base + 1 + rng.normal(0, 0.1, 8), b=base)), "a", "b")
    assert better["low"] > 0.8 and better["high"] < 1.2 and better["p"] == pytest.approx(2 / 2**8)
    assert better["claim"] == "a higher"
    same = results.compare(table(dict(a=base + 0.1 * wave, b=base)), "a", "b")
    assert same["claim"] == "equal within 0.5" and same["p_equivalent"] < 0.001 < 0.05 < same["p"]
    wide = results.compare(table(dict(a=base + 2 * wave, b=base)), "a", "b")
    assert wide["claim"] == "no difference shown" and wide["p_equivalent"] > 0.05, "too noisy to say either"
    slight = results.compare(table(dict(a=base - 0.2 + rng.normal(0, 0.01, 8), b=base)), "a", "b")
    assert slight["claim"] == "a lower, yet equal within 0.5", "a difference can be certain and small"
    few = results.compare(table(dict(a=base[:5] + 1 + rng.normal(0, 0.01, 5), b=base[:5])), "a", "b")
    assert few["p"] > 0.05 and "too few" in few["claim"]
    untrained = results.compare(table(dict(a=base + 1, b=base), did_train=False), "a", "b")
    assert "does not beat its table" in untrained["claim"]
    with pytest.raises(ValueError, match="no records of model 'c'"):
        results.compare(table(dict(a=base, b=base)), "c", "b")


def of_gaps(gaps):
    """What `compare` finds of these gaps between two models, a and b."""
    c = stats.tested(np.array(gaps)) | dict(margin=0.5, a="a", b="b")
    return c | dict(claim=stats.claim_of(c))


@functools.cache
def random_comparisons(n=400):
    """To be read alone."""
    rng = np.random.default_rng(0)
    return [of_gaps(rng.normal(0, 0.5) + rng.normal(0, rng.choice([0.05, 0.3, 1.0]), 6)) for _ in range(n)]


def test_interval_and_p_cannot_contradict_a_claim():
    """A difference is claimed where both say so. Where one of them does, the claim names the disagreement."""
    seen = set()
    for c in random_comparisons():
        beyond, small_p = c["low"] > 0 or c["high"] < 0, c["p"] < 0.05
        higher_or_lower = "higher" in c["claim"] or "lower" in c["claim"]
        assert higher_or_lower == (beyond and small_p)
        assert ("disagree" in c["claim"]) == (beyond != small_p)
        inside = -0.5 < c["low90"] and c["high90"] < 0.5
        assert ("equal within 0.5" in c["claim"]) == inside == (c["p_equivalent"] < 0.05)
        seen.add(c["claim"])
    assert len(seen) >= 6, "all kinds of claims have been tried"


def test_the_interval_beside_a_verdict_is_the_one_that_decided():
    for c in random_comparisons():
        shown, verdict = tables.deciding_interval(c), tables.verdict_words(c)
        assert "(90 %)" in shown or "(95 %)" in shown
        for part in shown.split("; "):
            low, high = (float(n.replace("\u2212", "-")) for n in re.findall("[\u2212+][0-9.]+", part))
            if "(95 %)" in part and low * high > 0:
                assert verdict.startswith(("better", "worse", "undecided"))
        if verdict.startswith("equal"):
            assert "90 %" in shown and -0.5 <= low and high <= 0.5
        if "by less than" in verdict:
            assert max(abs(low), abs(high)) <= 0.5, "this, too, is a claim of equality"


# ---- Over places ----


def test_spearman_is_the_rank_correlation_without_its_interval():
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 7, (40, 30)).astype(float), rng.normal(size=(40, 30)).round(1)
    y[rng.random(y.shape) < 0.05] = np.nan
    spearman = results.stats.spearman
    assert spearman(x, y) == pytest.approx(results.rank_correlation(x, y, draws=1)[0], abs=1e-12)
    assert spearman((1, 2, 3), (5, 6, 9)) == pytest.approx(1) and spearman((1, 2), (3, 3)) == 0


def test_rank_correlation_has_known_answers():
    rng = np.random.default_rng(0)
    cause, other = rng.normal(size=(2, 200, 20))
    x, y = cause + rng.normal(size=cause.shape), cause + rng.normal(size=cause.shape)
    plain = results.rank_correlation(x, y)
    assert plain[0] == pytest.approx(scipy.stats.spearmanr(x.flatten(), y.flatten()).statistic, abs=1e-9)
    assert plain[1] < plain[0] < plain[2]
    given = results.rank_correlation(x, y, [routing.groups(cause, 50)])
    assert abs(given[0]) < 0.05, "two effects of one cause are unrelated given the cause"
    _, low, high = results.rank_correlation(x, other)
    assert low < 0 < high
    half = np.where(np.arange(20) < 10, np.nan, y)
    known = scipy.stats.spearmanr(x[:, 10:].flatten(), y[:, 10:].flatten()).statistic
    assert results.rank_correlation(x, half)[0] == pytest.approx(known, abs=1e-9)
    assert results.rank_correlation(np.ones_like(x), y) == (0.0, 0.0, 0.0)


def test_rank_correlation_has_an_interval_where_only_one_window_differs():
    entropy, depth = np.random.default_rng(0).normal(size=(60, 20)), np.full((60, 20), 8.0)
    depth[3, :5] = 9
    r, low, high = results.rank_correlation(depth, entropy)
    assert np.isfinite([low, high]).all() and min(low, high) <= 0 <= max(low, high)
    assert abs(r) < 0.1


def test_points_of_accuracy_are_no_margin_for_other_metrics():
    records = runs.stored_records("exp1")
    pair = [("mor", "fixed-at-E")]
    found = results.comparisons(records, pair, "loss").iloc[0]
    assert "equal" not in found["claim"] and found["p of equality"] == ""
    assert "equal within 0.1" in results.comparisons(records, pair, "loss", margin=0.1)["claim"].iloc[0]
    assert results.compare(records, *pair[0])["margin"] == results.stats.MARGIN


def test_the_interval_over_windows_covers_as_often_as_it_says():
    """Places of one window share a draw: an interval that took them for independent would be too narrow."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        shared_x, shared_y = rng.normal(size=(2, 80, 1))
        noise_x, noise_y = 0.3 * rng.normal(size=(2, 80, 12))
        _, low, high = results.rank_correlation(shared_x + noise_x, shared_y + noise_y, draws=200)
        covered += low < 0 < high
    assert covered >= 52


def test_variance_is_given_to_what_made_it():
    rng = np.random.default_rng(0)
    layer, place = np.arange(4)[:, None, None], np.broadcast_to(np.arange(30), (4, 400, 30))
    token, noise = rng.integers(50, size=(400, 30)), rng.integers(3000, size=(400, 30))
    by_token = 1.5 * rng.normal(size=50)[token]
    made = 2.0 * layer + by_token + rng.normal(size=(4, 400, 30))  # variances 5, about 2.25, 1
    factors = {"layer": layer, "position": place, "token": token, "noise": noise}
    found, total = results.variance_explained(made, factors), made.var()
    assert found["layer"] == pytest.approx(100 * 5 / total, abs=1.0)
    assert found["rest"] == pytest.approx(100 * 1 / total, abs=1.5)
    assert abs(found["position"]) < 0.5, "what has no part in it explains nothing"
    assert abs(found["noise"]) < 1.5, "however many groups it has"
    assert sum(found.values()) == pytest.approx(100)


# ---- Words ----


@pytest.mark.parametrize(
    "share, words", [(0.329, "a third"), (0.5, "half"), (0.24, "a quarter"), (0.41, "41 %")]
)
def test_shares_in_words(share, words):
    assert tables.share_words(share) == words


def test_markdown_keeps_decimals_and_leaves_out_a_running_number():
    shown = results.markdown(pd.DataFrame(dict(x=[1.0, 1.25], n=[3, 4])))
    assert shown.splitlines() == ["| x | n |", "| --- | --- |", "| 1.00 | 3 |", "| 1.25 | 4 |"]
    named = pd.DataFrame(dict(x=["y"]), index=pd.Index(["z"], name="what"))
    assert results.markdown(named).splitlines()[0] == "| what | x |"
    assert repr(results.Text("**a**")) == results.Text("**a**")._repr_markdown_() == "**a**"


def test_the_first_sentence_follows_the_records(moved):
    exp1, exp2 = runs.stored_records("exp1"), runs.stored_records("exp2")
    told = results.sentence("exp1", exp1)
    assert "as accurate as twelve layers, within half a point" in told
    assert "no better than eight fixed layers" in told
    assert "(\u22120.26 points, 90 % interval \u22120.49 to \u22120.04; six seeds)" in told
    better = results.sentence("exp1", moved(exp1, "mor", 2.0))
    assert "MoR is more accurate than twelve layers" in better and "and better than eight" in better
    assert "less accurate than twelve layers" in results.sentence("exp1", moved(exp1, "mor", -2.0))
    few = results.sentence("exp1", exp1[exp1["seed"] < 2])
    assert "not shown to differ from twelve layers" in few and "nan" not in few
    told = results.sentence("exp2", exp2)
    assert "no better than six fixed layers" in told and "and in loss worse (+0.0097 nats" in told
    less = "gains +2.45 points on them, but is a little less accurate than six layers that train as long"
    assert less in told
    better = results.sentence("exp2", moved(exp2, "mor-source-protocol", 2.0))
    assert "and is more accurate than six layers that train as long" in better
    told = results.sentence("bangla", runs.stored_records("bangla"))
    assert "a little more accurate than twelve layers" in told


def test_loss_is_told_where_it_shows_what_accuracy_does_not():
    exp2 = runs.stored_records("exp2")
    pair = "mor-equal-epochs", "fixed-shallow"
    told = results.verdicts(exp2, [pair])["loss (nats)"].iloc[0]
    assert told == "+0.0097 (+0.0063 to +0.0132), worse"
    assert results.comparisons(exp2, [pair])["loss (nats)"].iloc[0] == told
    turned = exp2.assign(loss=-exp2["loss"])
    assert headlines.loss_apart(turned, *pair).startswith(", but in loss better (\u22120.0097 nats")
    few = exp2[exp2["seed"] < 5]
    assert headlines.loss_apart(few, *pair) == "", "five seeds show nothing"
    assert results.verdicts(few, [pair])["loss (nats)"].iloc[0].endswith(")")
    apart = exp2.assign(accuracy=exp2["accuracy"] - 5 * (exp2["model"] == pair[0]))
    assert headlines.loss_apart(apart, *pair) == "", "accuracy says it already"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_headline_shows_a_sentence_five_columns_and_a_picture(experiment, capsys):
    results.headline(experiment)
    shown = capsys.readouterr().out
    lines = shown.strip().splitlines()
    assert lines[0].startswith("**") and lines[0].endswith(".**") and "interval" in lines[0]
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert rows[0] == ["against", "difference (points)", "interval", "verdict", "loss (nats)"]
    assert len(rows) == 2 + len(runs.PAIRS[experiment]) and all(len(row) == 5 for row in rows)
    assert "beat its table" not in shown and "nan" not in shown
    assert len(plt.get_fignums()) == 1 and plt.gcf().axes[0].get_ylabel() == "held-out accuracy (%)"


def test_a_headline_without_records_says_what_to_do(tmp_path, capsys):
    results.headline("exp1", tmp_path)
    assert "run the notebook to make some" in capsys.readouterr().out


def test_models_are_named_in_words():
    names = results.plain_names(runs.stored_records("exp1"))
    assert list(names)[:3] == ["mor", "fixed-deep", "fixed-at-E"], "MoR comes first"
    assert names["fixed-at-E"] == "8 layers" and names["fixed-shared"] == "12 layers of 6 blocks"
    trained = {m for e in EXPERIMENTS for m in runs.stored_records(e)["model"]}
    assert set(tables.NAMES) == trained | {"worth", *results.long.WHO}


# ---- Tables of studies ----


def study_record(model, seed, E=8.0, loss=2.0, rates=None, val=(3.0, 2.1), target=2.0, followed=None):
    """What the tables of studies read of a record, as `runs.table_of` lays it out."""
    config = dataclasses.asdict(morlib.ModelConfig(vocab_size=9, n_layers=3, target_depth=target))
    sampled = dict(loss=loss + 0.01, effective_depth=E - 0.2)
    metrics = dict(accuracy=100 - 20 * loss, loss=loss, effective_depth=E, train_seconds=9.0, did_train=True)
    metrics |= dict(action_rates=rates, sampled=sampled)
    metrics |= dict(followed=dict(effective_depth=followed)) if followed else {}
    history = [dict(val_loss=v, val_accuracy=10 * v) for v in val]
    names = dict(
        experiment="study", model=model, recipe="sound", preset="smoke", seed=seed, data=dict(name="t")
    )
    return names | dict(metrics=metrics, history=history, config=dict(model=config))


def front_records(followed=None):
    records = []
    for seed in (0, 1):
        for k in (3, 4, 5):
            records.append(study_record(f"fixed {k}", seed, E=k, loss=2 - k / 100))
            loss, E = 2 - k / 100 - 0.02 * (k > 3), k + 0.15 * (k == 4)
            records.append(study_record(f"mor {k}", seed, E, loss, followed=followed and k - followed))
        records += [study_record(f"random {k}", seed, E=k, loss=2.1) for k in (3, 4)]
    return runs.table_of(records)


def test_the_front_says_where_mor_lies():
    front = front_records()
    fixed, blind, depth, held = results.front_lines(front)
    assert "at 1 of 2 depths" in fixed, "at all its layers MoR is the fixed model"
    assert "\u22120.0100" in fixed
    assert "at 2 of 2 depths" in blind and "1.9500 (5 layers) to 1.9700 (3 layers)" in depth
    assert "in 2 of 4 runs, 0.15 from it" in held
    last = results.front_lines(front_records(followed=0.02))[-1]
    assert "follow the text read so far: within 0.1 of its target in 4 of 4 runs, 0.02 from it" in last
    assert results.front_table(front).loc[("mor", 4), "loss"] == pytest.approx(1.94)
    figure = results.draw_front(front)
    assert len(figure.axes) == 3 and len(figure.axes[0].lines) == 3
    assert list(figure.axes[0].lines[0].get_xdata()) == [3, 4, 5]
    assert len(results.draw_front(front, sources=False).axes) == 2


def test_differences_that_are_all_the_same_show_what_they_are():
    ahead = stats.tested(np.array([100.0] * 6), 1.0)
    assert (ahead["low"], ahead["high"], ahead["p"]) == (100, 100, 2 / 64)
    claims = {}
    for value, seeds in ((100.0, 6), (0.0, 6), (100.0, 5), (0.2, 6)):
        found = stats.tested(np.full(seeds, value), 1.0)
        claims[value, seeds] = stats.claim_of(found | dict(a="a", b="b", margin=1.0))
    assert claims[100.0, 6] == "a higher" and claims[0.0, 6] == "equal within 1"
    assert claims[0.2, 6] == "a higher, yet equal within 1" and claims[100.0, 5].startswith("none: 5 seeds")


def test_settings_by_validation_loss_do_not_depend_on_how_records_are_counted():
    estimators = runs.stored_records("estimators")
    part = estimators[estimators["model"] != "all branches"]
    table = results.by_validation(part)
    pd.testing.assert_frame_equal(table, results.by_validation(part.reset_index(drop=True)))
    assert table.loc["gumbel", "validation loss"] == results.by_validation(estimators).loc["gumbel"].iloc[0]


def test_settings_are_ordered_by_validation_loss_at_the_end():
    records = [study_record("a", 0, val=(1.0, 2.2))]
    records += [study_record("b", seed, val=(3.0, loss)) for seed, loss in enumerate((2.0, 2.2))]
    found = results.by_validation(runs.table_of(records))
    assert list(found.index) == ["b", "a"] and "a new seed" not in found
    assert found.loc["b", "validation loss"] == pytest.approx(2.1) and found.loc["b", "seeds"] == 2
    assert found.loc["a", "E"] == 8.0 and found.loc["a", "E sampled"] == 7.8
    assert found.loc["a", "loss sampled - argmax"] == pytest.approx(0.01)
    three = [study_record("a", seed, val=(3.0, loss)) for seed, loss in enumerate((2.0, 2.1, 2.2))]
    reach = 4.303 * 0.1 * (4 / 3) ** 0.5  # Student's t of two degrees of freedom
    expected = f"{2.1 - reach:.3f} to {2.1 + reach:.3f}"
    assert results.by_validation(runs.table_of(three)).loc["a", "a new seed"] == expected


def test_collapsed_routers_are_counted_where_there_is_a_choice():
    """Of 3 layers at depth 2 the budget runs one or more for everyone: one action there is no collapse."""
    budget = morlib.depth_budget(morlib.ModelConfig(vocab_size=9, n_layers=3, target_depth=2.0))
    choice = [run < 1 for run, _ in budget]
    assert 0 < sum(choice) < 3
    alive = [[[0.5, 0.3, 0.2]] if c else [[0.0, 1.0, 0.0]] for c in choice]
    dead = [[[1.0, 0.0, 0.0]] if c else [[0.0, 1.0, 0.0]] for c in choice]
    records = [study_record("mor 2", 0, rates=alive), study_record("mor 2", 1, rates=dead, E=8.3)]
    row = results.collapse_table(runs.table_of(records)).loc["mor 2"]
    assert row["seeds"] == 2 and row["layers with a choice"] == sum(choice)
    assert row["of them collapsed, all seeds"] == sum(choice)
    assert row["E"] == "8.00 to 8.30" and row["E, followed"] == ""
    assert row["skip (%)"] == 75 and row["recurse (%)"] == 10
    records = [study_record("mor 2", seed, rates=alive, followed=2.0 + seed / 100) for seed in (0, 4)]
    row = results.collapse_table(runs.table_of(records)).loc["mor 2"]
    assert row["E, followed"] == "2.00 to 2.04" and row["of them collapsed, all seeds"] == 0


def test_bits_by_vocabulary_go_from_small_to_large():
    found = results.bits_by_vocabulary(runs.stored_records("vocabulary"))
    assert list(found.index) == ["characters", "1000-pieces", "4000-pieces", "16000-pieces"]
    assert (found["lowest"] <= found["model"]).all() and (found["model"] <= found["highest"]).all()
    record = runs.stored_records("vocabulary").query("model == 'characters'")["record"].iloc[0]
    bytes_a_token = 2.6627  # of the held-out part: it ships in the findings about Bangla
    floor = record["floors"]["2"]["heldout"]["loss"] / np.log(2) / bytes_a_token
    assert found.loc["characters", "2-gram table"] == pytest.approx(floor, rel=1e-3)


# ---- Figures ----


def test_every_figure_names_its_axes_and_tells_models_apart():
    exp1, exp2, bangla = map(runs.stored_records, EXPERIMENTS)
    drawn = [
        results.learning_curves(exp1), results.learning_curves(bangla, "loss", minus="fixed-deep"),
        results.learning_curves(exp2, by=("step", "applications")), results.actions_by_layer(exp1),
        results.accuracy_against_depth(exp1, "fixed-deep"),
        results.accuracy_against_depth(exp1, metric="loss"),
        results.accuracy_against_depth(exp2, "fixed-shallow", cost="train_applications"),
        results.draw_front(runs.stored_records("pareto")),
        results.draw_vocabularies(runs.stored_records("vocabulary")),
    ]  # fmt: skip
    for figure in drawn:
        assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    looks = [figures.look_of(model) for model in tables.NAMES]
    for records in (exp1, exp2, bangla):
        own = [(look.marker, look.line) for m, look in zip(tables.NAMES, looks) if m in set(records["model"])]
        assert len(set(own)) == len(own), "also in grey"
    assert set(tables.NAMES) == set(figures.LOOKS) | set(results.long.WHO), "the latter are in tables alone"


def test_learning_curves_are_the_records_means():
    exp2 = runs.stored_records("exp2")
    by_steps, by_work = results.learning_curves(exp2, by=("step", "applications")).axes
    line = by_steps.lines[0]
    own = exp2[exp2["model"] == "mor-equal-epochs"]
    assert line.get_ydata()[-1] == pytest.approx(
        np.mean([r["history"][-1]["val_accuracy"] for r in own["record"]])
    )
    assert line.get_xdata()[-1] == own["record"].iloc[0]["history"][-1]["step"]
    assert by_work.lines[0].get_xdata()[-1] == pytest.approx(own["train_applications"].mean() / 1e6)


def test_equal_values_stand_side_by_side():
    moved = figures.side_by_side([8.0, 12.0, 8.1, 8.05], 0.5)
    assert moved[1] == 12 and sorted(np.diff(sorted(moved[[0, 2, 3]]))) == pytest.approx([0.5, 0.5])
    assert moved[[0, 2, 3]].mean() == pytest.approx(8.05)
    many = figures.side_by_side([8.0 + 0.01 * i for i in range(9)], 0.5)
    assert np.ptp(many) == pytest.approx(2.0) and many.mean() == pytest.approx(8.04)
    assert (np.diff(many) > 0).all()
    wide = np.arange(10) * 0.4
    assert figures.side_by_side(wide, 0.5) == pytest.approx(wide), "never closer than they are"


def test_a_forest_has_a_point_for_each_row_and_model():
    rows = [
        dict(model=m, what=w, mean=0.1, low=0.0, high=np.nan if m == "b" else 0.2)
        for m in "ab"
        for w in "xyz"
    ]
    figure = results.forest(pd.DataFrame(rows), "what", unit="points", names=dict(a="one"))
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["x", "y", "z"] and ax.yaxis_inverted()
    assert ax.get_xlabel() == "points"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "b"]


def test_a_heat_map_writes_its_numbers():
    shown = results.heat_map(
        pd.DataFrame([[1.0, np.nan]], index=["r"], columns=["p", "q"]), "title", digits=1
    ).axes[0]
    assert [text.get_text() for text in shown.texts] == ["1.0"] and shown.get_title("left") == "title"


# ---- What ships ----


def test_results_md_and_the_readme_print_the_stored_records(tmp_path):
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert report.results_page() == page, "run `make report`"
    readme = tmp_path / "README.md"
    readme.write_bytes((ROOT / "README.md").read_bytes())
    report.update_readme(readme)
    assert readme.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8"), (
        "make report"
    )
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        report.update_readme(readme)


TRIPLES = {  # MoR, the fixed model, and blind routing
    "exp1": [("mor", "fixed-deep", "random")],
    "exp2": [("mor-equal-epochs", "fixed-shallow", "random")],
    "bangla": [("mor-deep", "fixed-deep", "random-deep"), ("mor-half", "fixed-shallow", "random-half")],
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_is_said_of_mor_holds_in_the_records(experiment):
    """Within half a point of the fixed model, above blind routing, and depth within a tenth of its target."""
    records = runs.stored_records(experiment)
    for routed, fixed, blind in TRIPLES[experiment]:
        parity = results.compare(records, routed, fixed)
        assert "equal within 0.5" in parity["claim"] and parity["pairs"] >= 6
        assert results.compare(records, routed, blind)["mean"] > 0
        own = records[records["model"] == routed]
        targets = [record["config"]["model"]["target_depth"] for record in own["record"]]
        assert (own["effective_depth"] - targets).abs().max() <= 0.1
    assert records["did_train"].all()


def test_under_quick_bangla_has_one_depth_and_can_be_shown():
    """Routed models of half the depth are left out: notebook 04 compares what is there."""
    quick, cpu = (runs.bangla_models(runs.settings(dict(preset=name)), 8.0, 6.0) for name in ("quick", "cpu"))
    assert set(cpu) - set(quick) == {"mor-half", "frozen-half"}
    records = runs.stored_records("bangla")
    few = records[records["model"].isin([*quick, "random-deep"])]
    assert runs.random_controls(few, [], "mor-half") == []
    shown = results.comparisons(few, runs.PAIRS["bangla"])
    minuends = {"mor-deep", "fixed-at-E", "frozen-deep", "random-deep", "fixed-deep"}
    assert len(shown) == 9 and set(shown.index) == minuends
    drawn = results.learning_curves(few, "loss", minus="fixed-deep")
    assert drawn.axes and not results.summary(few).index.str.contains("half").any()


def test_loss_and_accuracy_order_the_models_of_experiment_1_alike():
    means = runs.stored_records("exp1").groupby("model")[["loss", "accuracy"]].mean()
    assert list(means.sort_values("loss").index) == list(means.sort_values("accuracy", ascending=False).index)


def test_what_is_said_of_the_gains_holds_in_the_records():
    """Notebooks 03 and 04: where the gains come from."""
    exp2, bangla = runs.stored_records("exp2"), runs.stored_records("bangla")
    assert results.compare(exp2, "mor-source-protocol", "fixed-long")["high"] < 0
    assert results.compare(exp2, "mor-source-protocol", "fixed-shallow")["low"] > 0
    assert results.compare(exp2, "fixed-long", "fixed-shallow")["mean"] > 2
    for routed, frozen in (("mor-deep", "frozen-deep"), ("mor-half", "frozen-half")):
        shown = results.compare(bangla, routed, frozen)
        assert shown["low"] < 0 < shown["high"] and shown["pairs"] >= 6
    assert results.compare(bangla, "mor-deep", "fixed-deep")["low"] > 0
    for ahead in ("fixed-at-E", "frozen-deep"):
        assert results.compare(bangla, ahead, "fixed-deep")["mean"] > 0.2


def test_what_is_said_of_the_front_and_the_budget_holds_in_the_records():
    """Notebook 02: what depth is worth, where MoR lies, and that following the text holds E."""
    front, collapse = runs.stored_records("pareto"), runs.stored_records("collapse")
    means = results.front_table(front)
    loss, accuracy = means["loss"].unstack("kind"), means["accuracy"]["fixed"]
    assert (loss["mor"] < loss["random"])[loss["random"].notna()].mean() > 0.5
    gap = (loss["mor"] - loss["fixed"]).drop(12)
    assert (gap > 0).sum() > len(gap) / 2
    assert accuracy.max() - accuracy.min() < 1
    for records in (front, collapse):
        for record in records[records["model"].str.startswith("mor")]["record"]:
            followed = record["metrics"]["followed"]["effective_depth"]
            assert abs(followed - record["config"]["model"]["target_depth"]) <= 0.1
    collapsed = results.collapse_table(collapse)
    assert (collapsed["seeds"] == 10).all() and (collapsed["of them collapsed, all seeds"] == 0).all()


def test_what_is_said_of_other_studies_holds_in_the_records():
    """Notebooks 02 and 04: recursing, which choices matter, the sources, vocabularies, and what time says."""
    studies = ("pareto", "recursions", "estimators", "sources", "vocabulary")
    for records in map(runs.stored_records, studies):
        assert (records.groupby("model").size() == 3).all()
    _, recursions, estimators, sources, vocabulary = map(runs.stored_records, studies)
    assert results.by_validation(recursions).index[0] == "R = 1"
    losses = results.by_validation(estimators)["validation loss"]
    assert losses.iloc[-1] - losses.iloc[-2] > losses.iloc[-2] - losses.iloc[0]
    assert losses.index[-1] == "scaled, budget spread"
    E = results.summary(sources)["E sampled"].astype(float)
    assert abs(E["mor, as published"] - 8) < 0.2 and E["mor, recursing mended"] > 8.2
    assert E["mor, gradient mended"] < 0.2
    accuracy = sources.groupby("model")["accuracy"].mean()
    published = sources[sources["model"] == "mor, as published"]["accuracy"]
    low, high = results.new_seed_range(published)
    assert low < accuracy["mor, per sample"] < high
    assert accuracy.max() < runs.stored_records("exp1").query("model == 'mor'")["accuracy"].min()
    bits = results.bits_by_vocabulary(vocabulary)
    below = bits["model"] < bits[["2-gram table", "3-gram table"]].min(axis=1)
    assert below.tolist() == [True, False, False, True]
    assert bits["model"].is_monotonic_decreasing and bits["2-gram table"].is_monotonic_decreasing
    speed = {key: row["measured"] for record in cost.speed_records() for key, row in record["rows"].items()}
    assert max(speed["train-8"], speed["forward-8"]) < 0.8 and 0.9 < speed["train-small"]


def test_what_ships_about_bangla_is_whole():
    found = bangla_findings.stored()
    assert list(found["segmentation"]) == ["characters", "1000-pieces", "4000-pieces", "16000-pieces"]
    assert list(found["line"]) == list(found["segmentation"])
    assert sum(found["script"].values()) == pytest.approx(100)
    assert 30 < found["script"]["vowel sign"] + found["script"]["hasanta"] < 36, (
        "a third, as notebook 04 says"
    )
    assert all(text.startswith(found["prompt"]) for text in found["samples"].values())
    tokens = runs.stored_records("bangla")["record"].iloc[0]["data"]["tokens"]
    assert found["text"]["tokens"] == tokens and found["text"]["in_nfc"]
    whole = pd.DataFrame(found["segmentation"]).T
    assert whole["conjuncts whole (%)"].is_monotonic_increasing
    assert whole["fertility (tokens a word)"].is_monotonic_decreasing


def test_findings_about_bangla_are_measured(tmp_path, capsys, monkeypatch):
    text = (ROOT / "data" / "bangla_sample.txt").read_text(encoding="utf-8")
    (tmp_path / "bangla_wikipedia.txt").write_text(text, encoding="utf-8")
    monkeypatch.setenv("MORLIB_DATA", str(tmp_path))
    monkeypatch.setattr(bangla_findings, "PIECE_NEEDS", 10)  # the text is small
    s = runs.settings(dict(preset="smoke", subwords=400, max_chars=60_000))
    corpora = bangla_findings.load_vocabularies(s, [360, 16_000])
    assert "16000 pieces are left out" in capsys.readouterr().out
    found = bangla_findings.measure(corpora)
    assert list(found["segmentation"]) == ["characters", "360-pieces", "400-pieces"]
    path = bangla_findings.save(found, tmp_path / bangla_findings.FILE)
    assert bangla_findings.stored(path) == json.loads(json.dumps(found))
    with pytest.raises(FileNotFoundError, match="choose a preset that trains"):
        bangla_findings.stored(tmp_path / "none.json")


def test_normalisation_keeps_joiners_where_the_usual_rule_loses_one():
    rows = bangla_findings.normalisations()
    lost = rows["in NFC"] != rows["by the usual rule"]
    assert list(rows.index[lost]) == ["a visible hasanta (non-joiner)"]
    assert (rows["written"] != rows["in NFC"]).sum() == 2


# ---- Notebooks ----


def test_the_vocabularies_that_are_compared_suit_the_preset():
    few, many = (runs.settings(dict(preset=name)) for name in ("quick", "cpu"))
    assert bangla_findings.checked(few, None) == [1000]
    assert bangla_findings.checked(many, None) == [1000, 4000, 16_000], "those of the stored records"
    assert bangla_findings.checked(few, [4000]) == [4000]


@pytest.mark.parametrize("name", ("02_exp1_efficiency", "03_exp2_equal_cost", "04_bangla"))
def test_a_committed_notebook_shows_the_stored_records(name):
    """Its first output is the stored answer, and it was executed under `stored`."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    experiment = dict(zip(("02", "03", "04"), EXPERIMENTS))[name[:2]]
    first = "".join(code[0]["outputs"][0]["data"]["text/markdown"])
    assert results.sentence(experiment, runs.stored_records(experiment)) in first
    printed = json.dumps([cell["outputs"] for cell in code], ensure_ascii=False)
    assert "preset stored" in printed and "none: a run does not beat its table of counts" not in printed


def test_the_reference_folder_holds_the_picture_of_the_front():
    assert (REFERENCE / "front.png").read_bytes().startswith(b"\x89PNG")


def test_undecided_and_equal_is_said_to_be_both():
    c = of_gaps([-0.1, -0.35, -0.3, -0.02, -0.3, 0.02])
    assert c["high"] < 0 and c["p"] > 0.05 and c["claim"].startswith("undecided")
    assert tables.verdict_words(c) == "undecided, yet equal within half a point"
    stored = stats.compare(runs.stored_records("exp1-long"), "mor", "fixed-at-E")
    assert tables.verdict_words(stored) == tables.verdict_words(c), "as in RESULTS, At a glance"
