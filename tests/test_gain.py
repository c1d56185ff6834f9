"""Where depth pays: the order of places, what the first of them carry, and the table that ships."""

import numpy as np
import pytest
import torch

from suite import results, routing, runs
from suite.files import REFERENCE
from suite.routing import gain


def test_the_first_places_carry_what_they_add_and_equal_ones_share_it():
    value, worth = np.array([1.0, 3.0, 2.0, 2.0]), np.array([0.0, 4.0, 8.0, 0.0])
    carried = dict(zip(gain.SHARES, gain.carried_by(value, worth)))
    assert [carried[share] for share in (0.25, 0.5, 0.75, 1.0)] == [1.0, 2.0, 3.0, 3.0]
    alike = gain.carried_by(np.zeros(4), worth)
    assert alike == pytest.approx([3.0 * share for share in gain.SHARES])


def test_what_a_context_gains_is_learned_and_rare_contexts_ask_the_shorter_one():
    read = torch.tensor([[1, 2, 0]] * 400 + [[3, 2, 0]] * 400 + [[5, 2, 0]])
    of_place = np.array([[0.0, 1.0]] * 400 + [[0.0, -1.0]] * 400 + [[0.0, 9.0]]).ravel()
    at = torch.tensor([[1, 2, 0], [3, 2, 0], [5, 2, 0], [7, 7, 0]])
    told = gain.expected(of_place, read, at, 2).reshape(4, 2)[:, 1]
    prior = of_place.mean()
    token = (of_place.reshape(-1, 2)[:, 1].sum() + gain.PRIOR * prior) / (801 + gain.PRIOR)
    assert told[0] == pytest.approx((400 + gain.PRIOR * token) / (400 + gain.PRIOR))
    assert told[1] == pytest.approx((-400 + gain.PRIOR * token) / (400 + gain.PRIOR))
    assert told[2] == pytest.approx((9 + gain.PRIOR * token) / (1 + gain.PRIOR))
    assert told[3] == pytest.approx(prior)


N_TRAIN, N_HELDOUT, SEEDS = 40, 30, 3
LABELS = ("fixed-deep", "fixed-shallow", "mor")


@pytest.fixture
def measured(monkeypatch):
    """`measure_gain` on scores that are written down; a change to them may be given."""
    s = runs.settings(dict(preset="cpu", seeds=SEEDS))
    specs = runs.long_runs(s, gain.EXPERIMENT)
    draw = torch.Generator().manual_seed(0)
    windows = {
        "train": torch.randint(7, (N_TRAIN, 13), generator=draw),
        "heldout": torch.randint(7, (N_HELDOUT, 13), generator=draw),
    }

    def of(n):
        random = torch.rand(3, n, 12, generator=draw)
        return dict(
            surprisal=random[0], entropy=random[1], correct=random[2] > 0.5, depth=random[2].round(decimals=1)
        )

    scored = {
        (part, label, seed): of(len(own))
        for part, own in windows.items()
        for label in LABELS
        for seed in range(SEEDS)
    }
    ids = {seed: {label: f"{label}{seed}" for label in LABELS} for seed in range(SEEDS)}

    def measure(**changed):
        for place, value in changed.items():
            part, label, seed, what = place.split("__")
            scored[part, label.replace("_", "-"), int(seed)][what] = value
        monkeypatch.setattr(gain, "scores", lambda specs: (scored, ids, windows))
        return gain.measure_gain(specs).set_index(["seed", "way"]), scored, windows

    return measure


def test_each_order_carries_what_its_places_gain(measured):
    table, scored, windows = measured()
    for seed in range(SEEDS):
        deep, shallow, mor = (scored["heldout", label, seed] for label in LABELS)
        loss = (shallow["surprisal"] - deep["surprisal"]).flatten().double().numpy()
        accuracy = 100 * (deep["correct"].double() - shallow["correct"].double()).flatten().numpy()
        others = [
            scored["heldout", "fixed-shallow", other]["entropy"] for other in range(SEEDS) if other != seed
        ]
        learned = [
            scored["train", "fixed-shallow", other]["surprisal"]
            - scored["train", "fixed-deep", other]["surprisal"]
            for other in range(SEEDS)
            if other != seed
        ]
        told = torch.stack(learned).mean(0).flatten().double().numpy()
        orders = {
            "mor": mor["depth"].flatten().double().numpy(),
            "entropy": torch.stack(others).mean(0).flatten().double().numpy(),
            "read": gain.expected(told, windows["train"], windows["heldout"], 1),
            "three": gain.expected(told, windows["train"], windows["heldout"], 3),
        }
        for way, value in orders.items():
            row = table.loc[seed, way]
            assert row["loss"] == pytest.approx(gain.carried_by(value, loss), abs=1e-5), way
            assert row["accuracy"] == pytest.approx(gain.carried_by(value, accuracy), abs=1e-5), way
            assert row["runs"]["mor"] == f"mor{seed}"


def test_an_order_does_not_know_the_models_whose_gain_is_counted(measured):
    """Another training text for seed 0's models moves the others' orders, and not its own."""
    before = measured()[0]
    after = measured(train__fixed_deep__0__surprisal=torch.rand(N_TRAIN, 12))[0]
    for way in ("three", "read"):
        assert after.loc[0, way]["accuracy"] == before.loc[0, way]["accuracy"]
        assert after.loc[1, way]["accuracy"] != before.loc[1, way]["accuracy"]


def test_it_needs_two_seeds_and_all_models(measured):
    s = runs.settings(dict(preset="cpu", seeds=2))
    specs = runs.long_runs(s, gain.EXPERIMENT)
    for few in ([r for r in specs if r.train.seed == 0], [r for r in specs if r.model != "fixed-deep"]):
        with pytest.raises(ValueError, match="two seeds or more are needed, each with runs of fixed-deep"):
            gain.measure_gain(few)


def test_tables_are_kept_as_they_are(tmp_path):
    table = results.stored_table(routing.GAIN)
    results.save_table(table, tmp_path / "gain.json")
    assert results.stored_table("gain.json", tmp_path).equals(table)
    assert (tmp_path / "gain.json").read_bytes() == (REFERENCE / gain.GAIN).read_bytes()


def test_without_a_table_nothing_is_said(tmp_path):
    assert routing.gain_sentence(results.stored_table("none.json", tmp_path)) == ""


def test_the_table_that_ships_agrees_with_the_records_of_its_runs():
    table = results.stored_table(routing.GAIN)
    records = {r["id"]: r["metrics"] for r in runs.stored_records("exp1-thin-long")["record"]}
    assert sorted(table["seed"].unique()) == list(range(6))
    for row in table.to_dict("records"):
        deep, shallow = (records[row["runs"][label]] for label in ("fixed-deep", "fixed-shallow"))
        assert row["runs"]["mor"] in records
        assert row["accuracy"][-1] == pytest.approx(deep["accuracy"] - shallow["accuracy"], abs=0.02)
        assert row["loss"][-1] == pytest.approx(shallow["loss"] - deep["loss"], abs=1e-3)


def test_the_sentence_and_the_picture_say_what_the_table_does():
    table = results.stored_table(routing.GAIN)
    shares = gain.carried_share(table, "three")
    third = np.mean([np.interp(1 / 3, gain.SHARES, seed) for seed in shares])
    assert f", {third:.0f} % (" in routing.gain_sentence(table)
    assert "six seeds" in routing.gain_sentence(table)
    assert "not shown to differ from the 33 % of chance" in routing.gain_sentence(table)
    for share_of_mor, told in ((90, "more than"), (5, "less than")):
        other = table.copy()
        for index, whole in table[table["way"] == "mor"]["accuracy"].items():
            first = (share_of_mor + other.at[index, "seed"]) / 100  # of the gain, on each share but the last
            other.at[index, "accuracy"] = [first * whole[-1]] * (len(gain.SHARES) - 1) + whole[-1:]
        assert f"{told} the 33 % of chance" in routing.gain_sentence(other)
        assert "not shown to differ" in routing.gain_sentence(other[other["seed"] < 3]), "three seeds"
    assert shares[:, -1] == pytest.approx(100)
    shown = routing.gain_table(table)
    assert shown.loc[gain.WAYS["three"], "first 33 %"].startswith(f"{third:.0f} [")
    lines = {line.get_label(): line.get_ydata() for line in routing.draw_gain(table).axes[0].lines}
    assert lines[gain.WAYS["three"]][-1] == pytest.approx(100) and len(lines) == 7
