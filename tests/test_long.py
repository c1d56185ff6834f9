"""Models that train long: which they are, what they must beat, and what is said of them."""

import dataclasses
import importlib
import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import morlib
from suite import field, results, runs
from suite.results import stats
from suite.runs import records
from suite.runs.experiments import LONG, ROUTED

FLOORS = {"2": dict(heldout=dict(loss=2.5)), "5": dict(heldout=dict(loss=1.9, accuracy=49.3))}


def record(
    model,
    seed,
    accuracy,
    E,
    layers=12,
    routing="none",
    epochs=15,
    late=3.0,
    experiment="exp1-long",
    beats=True,
):
    """A record whose last point is worse by `late` points and nats than its best one."""
    best = dict(step=100, loss=1.8, accuracy=accuracy, effective_depth=E, bits_per_byte=2.6)
    last = best | dict(step=200, accuracy=accuracy - late, loss=1.8 + late)
    cfg = morlib.ModelConfig(vocab_size=65, n_layers=layers, routing="none", d_model=64)
    config = dict(
        model=dataclasses.asdict(cfg) | dict(routing=routing),
        train=dataclasses.asdict(morlib.TrainConfig(epochs=epochs)),
    )
    main = last if experiment == "exp1" else best
    metrics = {k: v for k, v in main.items() if k != "step"} | dict(best=best, last=last, did_train=beats)
    metrics |= dict(train_applications=10, train_seconds=1.0, sampled=last)
    return dict(
        experiment=experiment, model=model, recipe="sound", seed=seed, config=config,
        preset="cpu" if experiment == "exp1" else "long",
        data=dict(name="tinyshakespeare", split="full", sha256="0" * 12), versions=dict(morlib="0.2.0+0"),
        metrics=metrics, floors=FLOORS, history=[dict(step=100), dict(step=200)],
    )  # fmt: skip


def write(folder, many):
    for index, one in enumerate(many):
        path = folder / f"{one['experiment']}_{one['model']}_s{one['seed']}_{index:012x}.json"
        path.write_text(json.dumps(one), encoding="utf-8")


def several(seeds):
    noise = (0.0, 0.1, -0.1, 0.05, -0.05, 0.02)
    made = []
    for seed in range(seeds):
        made.append(record("fixed-deep", seed, 49 + noise[seed], 12.0))
        made.append(record("fixed-shallow", seed, 48 - noise[seed], 6.0, layers=6))
        made.append(record("fixed-at-E", seed, 48.5, 8.0, layers=8))
        made.append(record("mor", seed, 48.7 + noise[seed], 8.0, routing="mor"))
    return made


def test_what_trains_long_is_what_the_experiment_trains_and_more():
    s, widths = runs.settings(dict(preset="cpu")), {"exp1-thin": 32, "exp2-thin": 48}
    for experiment in LONG:
        specs = runs.long_runs(s, experiment)
        labels = {spec.model for spec in specs}
        assert len(specs) == 6 * len(labels) and {"worth", "fixed-deep", "fixed-shallow"} <= labels
        assert {spec.experiment for spec in specs} == {f"{experiment}-long"}
        assert {spec.preset for spec in specs} == {"long"} and "fixed-shared" not in labels
        assert ("by-kind" in labels) == (experiment == "exp1-thin"), "lots are drawn in one setting"
        longer = {25} if experiment.startswith("exp2") else set()
        wanted = 30 if experiment == "bangla" else 15
        assert {spec.config.d_model for spec in specs} == {widths.get(experiment, 64)}
        assert {spec.train.epochs for spec in specs} == {wanted, *longer}
        blind = {"random", "random-deep"}
        assert {label for pair in results.long_pairs(experiment) for label in pair} - blind <= labels
    [target] = {spec.config.target_depth for spec in runs.long_runs(s, "exp2") if spec.config.target_depth}
    assert target == 6.0


def test_a_notebook_may_change_what_a_preset_means_and_its_reader_may_still_choose():
    longer = dict(long=dict(epochs=30))
    for given, epochs in (
        (dict(preset="long"), 30),
        (dict(preset="cpu"), 6),
        (dict(preset="long", epochs=7), 7),
    ):
        assert runs.settings(given, changed=longer).train().epochs == epochs
    assert runs.settings(dict(preset="long")).train().epochs == LONG["exp1"] == 15


def test_what_depth_is_worth_is_asked_of_longer_training_and_of_other_sizes():
    found = runs.depth_worth_runs(runs.settings(dict(preset="cpu")))
    assert {spec.train.seed for spec in found} == {0, 1, 2}
    assert {spec.config.n_layers for spec in found} == {6, 12} and len({spec.model for spec in found}) == 8
    kinds = [(s.experiment, s.train.epochs, s.config.d_model, s.config.max_len, s.train.lr) for s in found]
    assert {kind[:4] for kind in kinds} == {
        ("length", 30, 64, 64), ("length", 60, 64, 64), ("sizes", 15, 128, 64), ("sizes", 15, 64, 256),
    }  # fmt: skip
    assert {kind[2]: round(kind[4], 6) for kind in kinds} == {64: 0.004, 128: 0.002828}
    read = {spec.train.batch_size * spec.config.max_len for spec in found}
    assert read == {1024} and len({spec.train.windows * spec.config.max_len for spec in found}) == 1


def test_what_the_same_kinds_are_worth_is_said_against_chance_and_against_mor(tmp_path):
    assert results.kinds_sentence("exp1-thin", tmp_path) == ""
    made, options = several(6), dict(always=6)
    for one in list(made):
        if one["model"] == "mor":
            gains = {"by-kind": 0.5, "blind-tokens": -0.5}
            for label, gain in gains.items():
                accuracy = one["metrics"]["accuracy"] + gain
                made.append(record(label, one["seed"], accuracy, 8.0, routing=label))
                made[-1]["config"]["model"] |= dict(options=options, target_depth=8.0)
    write(tmp_path, [one | dict(experiment="exp1-thin-long") for one in made])
    told = results.kinds_sentence("exp1-thin", tmp_path)
    assert told.startswith("Let a third of the tokens run twelve layers, the others six. ")
    assert "against lots for each token anew: better, +1.00 points" in told
    assert "against MoR, whose router learns: better, +0.50 points" in told
    assert "To be told" not in told and "To be told where" in results.kinds_sentence("exp1-thin")


def test_who_trains_long_must_beat_the_best_table_of_counts():
    assert records.gate(FLOORS, "cpu") == records.gate(FLOORS, "quick") == 2.5
    assert records.gate(FLOORS, "long") == records.gate(FLOORS, "paper") == 1.9


def test_numbers_are_those_of_the_best_point(tmp_path):
    write(tmp_path, several(6))
    long = results.long_records("exp1", tmp_path)
    assert long[long["model"] == "fixed-at-E"]["accuracy"].tolist() == [48.5] * 6
    assert long["loss"].tolist() == [1.8] * 24


def test_what_depth_is_worth_is_said_with_its_interval(tmp_path, capsys):
    write(tmp_path, several(6))
    told = results.depth_sentence("exp1", tmp_path)
    assert told.startswith(
        "On Tiny Shakespeare, trained for 15 epochs, twelve layers against six: better, +1.01 points"
    )
    assert "better, +1.01 points (95 % interval +0.86 to +1.16; six seeds)." in told
    assert "MoR, which runs 8.0 layers on average, against the same six: better, +0.71 points (95 %" in told
    assert (
        "against eight fixed layers, which cost as much: better, by less than half a point, +0.20 points (95"
        in told
    )
    few = results.long_records("exp1", tmp_path)
    told = results.long.gap(few[few["seed"] < 3], "mor", "fixed-deep")
    assert told.startswith("\u22120.30 points (") and told.endswith("three of six seeds)"), "no verdict yet"
    results.show_long("exp1", tmp_path)
    shown = capsys.readouterr().out
    assert (
        "All of these models have a lower loss than the best table of counts (5-grams: 1.900 nats a token)"
        in shown
    )
    assert "lowest (in 24 of 24 runs before the end), width 64" in shown
    assert "| 12 layers against 6 layers | +1.01 |" in shown and len(plt.get_fignums()) == 1


def test_the_headline_says_what_becomes_of_it(tmp_path, capsys):
    own = ("mor", "fixed-deep", "fixed-at-E", "random", "frozen", "fixed-shared")
    short = [record(model, seed, 44, 8.0, epochs=6, experiment="exp1") for model in own for seed in range(6)]
    write(tmp_path, short)
    results.headline("exp1", tmp_path)
    assert "After" not in capsys.readouterr().out
    write(tmp_path, several(6))
    results.headline("exp1", tmp_path)
    shown = capsys.readouterr().out
    assert "After 15 epochs in place of 6, MoR is a little less accurate than twelve layers (" in shown


def test_few_seeds_are_said_and_claim_nothing(tmp_path, capsys):
    write(tmp_path, several(2))
    told = results.depth_sentence("exp1", tmp_path)
    assert "(two of six seeds)" in told and "interval" not in told
    results.show_long("exp1", tmp_path)
    assert "2 seeds are too few" in capsys.readouterr().out


def test_without_records_it_says_what_to_do(tmp_path, capsys):
    assert results.depth_sentence("exp1", tmp_path) == "" == results.gate_sentence("exp1", tmp_path)
    results.show_long("exp1", tmp_path)
    assert (
        results.worth_of_depth(tmp_path).empty and results.hops_table(results.front_records(tmp_path)).empty
    )
    assert "see runs.long_runs" in capsys.readouterr().out


def test_whether_short_and_long_training_beat_counting(tmp_path):
    short = [record("fixed-deep", seed, 44, 12.0, epochs=6, late=0.15, experiment="exp1") for seed in (0, 1)]
    write(tmp_path, several(2) + short)
    assert results.gate_sentence("exp1", tmp_path) == (
        "On held-out text the best table of counts, of 5-grams, has a loss of 1.900 nats a token, and its "
        "guess is right for 49.3 %. Twelve layers reach after 6 epochs 1.950 nats and 43.9 %, after 15 "
        "epochs 1.800 nats and 49.0 %."
    )


def test_one_that_does_not_beat_counting_is_said(tmp_path, capsys):
    write(tmp_path, several(6)[:-1] + [record("mor", 5, 40, 8.0, routing="mor", beats=False)])
    results.show_long("exp1", tmp_path)
    shown = capsys.readouterr().out
    assert (
        "Not all of these models have a lower loss" in shown
        and "a run does not beat its table of counts" in shown
    )


def test_blind_routing_has_the_rates_and_the_name_that_the_pairs_expect():
    for experiment, (routed, blind) in ROUTED.items():
        specs = [spec for spec in runs.long_runs(runs.settings(dict(preset="cpu")), experiment)]
        rates = [[[0.2, 0.8, 0.0]] * 2] * 12
        rows = [
            dict(model=routed, record=dict(seed=seed, metrics=dict(action_rates=rates))) for seed in (0, 3)
        ]
        controls = runs.long_controls(pd.DataFrame(rows), specs, experiment)
        assert [control.train.seed for control in controls] == [0, 3]
        assert {control.model for control in controls} == {blind} and (routed, blind) in results.long_pairs(
            experiment
        )


def test_stored_records_are_those_of_the_runs_that_make_them():
    s = runs.settings(dict(preset="cpu"))
    for experiment in LONG:
        table = runs.stored_records(f"{experiment}-long")
        if table.empty:
            continue
        specs = runs.long_runs(s, experiment)
        told = field.told_runs(s) if experiment == "exp1-thin" else []
        hold_to(specs + runs.long_controls(table, specs, experiment) + told, table)
    for experiment in ("length", "sizes"):
        hold_to(runs.depth_worth_runs(s), runs.stored_records(experiment))


def hold_to(specs, table):
    made = {(spec.model, spec.train.seed): spec for spec in specs}
    for stored in table.get("record", ()):
        spec, own = made[stored["model"], stored["seed"]], stored["config"]
        assert own["train"] == json.loads(json.dumps(vars(spec.train)))
        found = records.LATER | own["model"] | dict(vocab_size=1)
        assert found == records.LATER | json.loads(json.dumps(vars(spec.config)))
        assert stored["preset"] == "long" and stored["metrics"]["loss"] == stored["metrics"]["best"]["loss"]


def test_what_depth_is_worth_by_length_of_training(tmp_path):
    longer = [
        record(f"{n}, 30", seed, 50 + n / 6 + seed * (n == 12), n, n, epochs=30, experiment="length")
        for n in (6, 12) for seed in (0, 1, 2)
    ]  # fmt: skip
    wider = [record(f"{n}, wide", 0, 50 + n, n, n, experiment="sizes") for n in (6, 12)]
    for each in wider:
        each["config"]["model"]["d_model"] = 128
    write(tmp_path, several(2) + longer + wider)
    table = results.worth_of_depth(tmp_path)
    name = "Tiny Shakespeare"
    assert list(table.index) == [(name, 128, 15), (name, 64, 15), (name, 64, 30)]
    table = table.xs((name, 64), level=("text", "width"))
    assert table["seeds"].tolist() == [2, 3]
    assert table["difference (points)"].tolist() == ["+1.10", "+2.00"]
    assert table["95 % interval"].tolist() == ["", "\u22120.48 to +4.48"]
    assert table.loc[30, "12 layers (%)"] == 53.0


def test_goals_on_text_are_judged_by_the_whole_interval_and_by_six_seeds(tmp_path):
    table = results.text_goals().reset_index()
    assert set(table["reached"]) == {"yes", "no", "no so far"}
    for experiment, mor, other, most, layers in (
        ("exp1", "mor", "fixed-deep", 0.5, "twelve"), ("exp1", "mor", "fixed-at-E", 0.2, "eight"),
        ("exp2", "mor-equal-epochs", "fixed-shallow", 0.3, "six"),
        ("exp1-thin", "mor", "fixed-at-E", 0.2, "eight"),
        ("exp2-thin", "mor-equal-epochs", "fixed-shallow", 0.0, "six"),
    ):  # fmt: skip
        c = results.compare(results.long_records(experiment), mor, other)
        name = results.TEXT_NAMES[experiment]
        goal = (
            f"{most:g} points behind {layers} fixed layers at most" if most else "ahead of six fixed layers"
        )
        (row,) = table[(table["setting"] == f"{name}, MoR, six seeds") & (table["goal"] == goal)].itertuples()
        assert row.found.startswith(f"{results.signed(c['mean'])} (")
        if experiment == "exp1-thin":
            assert c["low90"] < -most < c["mean"], "the mean alone would do"
        assert row.reached == ("yes" if c["low90"] >= -most else "no")
    few = table[table["setting"].str.endswith("one of six seeds")]
    assert (
        len(few)
        and few["reached"].str.endswith("so far").all()
        and not few["found"].str.split(". Eight").str[0].str.contains("\\(").any()
    )
    beside = table[table["found"].str.contains(". Eight fixed layers: no, ", regex=False)]
    assert set(beside["goal"]) == {"0.5 points behind twelve fixed layers at most"} and len(beside) == 4
    as_many = results.compare(results.long_records("exp1-thin"), "fixed-at-E", "fixed-deep")
    assert beside["found"].iloc[-1].count(f"no, {results.signed(as_many['mean'])} (") == 1
    untrained = table[table["setting"].str.endswith("width 32, token worth, six seeds")]
    assert (
        untrained["reached"].eq("no so far").all()
        and untrained["found"].str.contains("table of counts").all()
    )
    assert results.text_goals(tmp_path).empty


@pytest.mark.parametrize("more, met", [(0.0, "no"), (0.25, "no"), (0.5, "yes")])
def test_ahead_on_text_is_what_is_judged_better(monkeypatch, more, met):
    """At 0.25 the 90 % interval leaves out zero, and the 95 % one does not."""
    records = results.long_records("exp2-thin")
    moved = records["accuracy"].where(records["model"] != "mor-equal-epochs", records["accuracy"] + more)
    tables = {"exp2-thin": records.assign(accuracy=moved)}
    goals = importlib.import_module("suite.results.known_goals")  # the package has a function of this name
    monkeypatch.setattr(goals, "long_records", lambda name, folder: tables.get(name, pd.DataFrame()))
    table = results.text_goals()
    assert table["goal"].tolist() == ["ahead of six fixed layers"] and table["reached"].tolist() == [met]
    c = results.compare(records.assign(accuracy=moved), "mor-equal-epochs", "fixed-shallow")
    assert (c["low90"] > 0) == (more > 0)


def test_numbers_that_notebooks_02_and_03_write_out_are_those_of_the_records():
    def by_seed(experiment, model, metric):
        own = runs.stored_records(experiment)
        return own[own["model"] == model].set_index("seed")[metric]

    loss = by_seed("exp2-long", "mor-equal-epochs", "loss") - by_seed("exp2-long", "fixed-shallow", "loss")
    assert (len(loss), round(loss.min(), 3), round(loss.max(), 3)) == (6, 0.009, 0.025)
    assert by_seed("exp2-long", "worth", "effective_depth").round(2).tolist() == [6.25]
    ahead = by_seed("sources", "mor, per sample", "accuracy") - by_seed(
        "sources", "mor, as published", "accuracy"
    )
    assert (len(ahead), round(ahead.min(), 1), round(ahead.max(), 1)) == (3, 0.8, 1.3)
    tried = {r["model"]: {} for r in runs.stored_records("estimators")["record"]}
    for r in runs.stored_records("estimators")["record"]:
        tried[r["model"]][r["seed"]] = r["history"][-1]["val_loss"]
    more = {name: [own[seed] - tried["scaled (in use)"][seed] for seed in own] for name, own in tried.items()}
    assert all(-0.0045 < gap < 0 for gap in more["hard choice, executed tokens"])
    higher = ("zero at the threshold", "trapezoid", "all branches")
    assert all(gap > 0 for name in higher for gap in more[name])
    six = by_seed("exp1-thin-long", "fixed-shallow", "accuracy")
    lots = by_seed("exp1-thin-long", "by-kind", "accuracy") - six
    assert (lots <= 0).sum() == 2, "in two of the six seeds they gain nothing"
    kept = [(by_seed("exp1-thin-long", name, "accuracy") - six).mean() for name in ("told", "told-sees-all")]
    assert [round(gain / 0.82, 2) for gain in kept] == [0.52, 0.77], "half, and three quarters"


def test_six_layers_at_seven_and_eight_hops_answer_what_notebook_07_says():
    answers = results.known_depth.by_hops(results.deep_records())
    six = answers[(answers["model"] == "fixed-half") & (answers["k"] >= 7)]["accuracy"]
    assert (round(six.min()), round(six.max())) == (53, 93)


def test_equality_stands_beside_the_interval_that_decides_it():
    c = results.compare(results.long_records("exp1"), "mor", "fixed-shallow")
    equality = f"equal within half a point, {results.signed(c['mean'])} points (90 % interval "
    told = results.depth_sentence("exp1")
    assert f"{equality}{results.signed(c['low90'])} to {results.signed(c['high90'])}; six seeds)" in told
    assert "better, +0.80 points (95 % interval " in told


def test_what_notebooks_02_and_03_say_of_loss_holds():
    cheap = {"exp1": ("mor", "fixed-at-E"), "exp2": ("mor-equal-epochs", "fixed-shallow")}
    for experiment, pair in cheap.items():
        c = stats.compare(results.long_records(experiment), *pair, "loss")
        assert c["pairs"] == 6 and c["low"] > 0 and c["p"] < 0.05, "its loss is higher"
    short = stats.compare(runs.stored_records("exp1"), "mor", "fixed-at-E", "loss")
    assert short["low"] < 0 < short["high"], "after 6 epochs this is not shown"
    untrained = stats.compare(results.long_records("exp2"), "mor-equal-epochs", "frozen", "loss")
    assert untrained["low"] > 0 and untrained["p"] < 0.05 and round(untrained["mean"], 3) == 0.006
    table = results.worth_of_depth()
    worth = table.loc["Tiny Shakespeare", 64, 6]
    assert (worth["seeds"], worth["difference (points)"]) == (3, "+0.15")
    for experiment, place in (("exp2-thin-long", ("half of Tiny Shakespeare", 48, 15)),
                              ("bangla-long", ("Bangla Wikipedia", 64, 30))):  # fmt: skip
        c = stats.compare(runs.stored_records(experiment), "fixed-deep", "fixed-shallow")
        assert table.loc[place]["difference (points)"] == results.signed(c["mean"])


def test_what_notebook_02_says_of_the_budget_and_of_memory_holds():
    records = runs.stored_records("exp1").groupby("model").first()
    mor, few = (records.loc[label, "record"] for label in ("mor", "fixed-at-E"))
    models = [morlib.Transformer(morlib.ModelConfig(**record["config"]["model"])) for record in (mor, few)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert round(sizes[0] / sizes[1], 2) == 1.55
    given = [share == 1 for share, _ in morlib.depth_budget(models[0].cfg)]
    assert given == [True] * 6 + [False] * 5 + [True]
    tc, read = mor["config"]["train"], mor["data"]["tokens"]["train"]
    epoch = tc["windows"] * mor["config"]["model"]["max_len"] / read
    assert round(epoch, 1) == 0.2 and round(tc["epochs"] * epoch, 1) == 1.2
    sources = runs.stored_records("sources").groupby("model")["accuracy"].mean().round(1)
    assert sources[["mor, as published", "fixed 6", "fixed 12"]].tolist() == [30.0, 34.1, 35.9]


def test_what_notebooks_03_and_04_say_of_seconds_and_of_parameters_holds():
    seconds = runs.stored_records("exp2").groupby("model")["train_seconds"].mean()
    assert 1.8 < seconds["mor-equal-epochs"] / seconds["fixed-shallow"] < 2, "nearly twice"
    record = runs.stored_records("bangla").groupby("model").first().loc["fixed-deep", "record"]
    model = morlib.Transformer(morlib.ModelConfig(**record["config"]["model"]))
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert round(blocks / 1e6, 1) == 0.6 and round(2 * 16_000 * model.cfg.d_model / 1e6, 1) == 2.0


def test_what_notebook_04_says_of_long_training_holds():
    records = results.long_records("bangla")
    floors = [record["floors"][order]["heldout"] for record in records["record"] for order in ("2", "3")]
    assert (records["loss"] < min(floor["loss"] for floor in floors)).all()
    ahead = (records["accuracy"] - max(floor["accuracy"] for floor in floors)).round(1)
    assert ahead[records["model"] == "fixed-deep"].tolist() == [0.1, 0.3]
    assert (ahead[records["model"] != "fixed-deep"] < 0).all()
    assert records.groupby("model").size().between(1, 2).all(), "one or two seeds of each"


def test_what_notebook_03_says_of_width_48_holds():
    records = results.long_records("exp2-thin")
    depth = results.compare(records, "fixed-deep", "fixed-shallow")
    assert depth["pairs"] == 6 and 0.9 < depth["mean"] < 1.1 and stats.judged(depth) == "better"
    assert stats.judged(results.compare(records, "mor-equal-epochs", "fixed-shallow")) == "equal"
    loss = results.compare(records, "mor-equal-epochs", "fixed-shallow", "loss")
    assert loss["low"] < 0 < loss["high"]
    mean = records.groupby("model")["loss"].mean().round(3)
    assert (mean["mor-equal-epochs"], mean["fixed-shallow"]) == (1.811, 1.808)
    assert not {"worth", "frozen"} & set(records["model"])
