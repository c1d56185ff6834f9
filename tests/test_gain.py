"""Where depth pays: the order of places, what the first of them carry, and the table that ships."""

import numpy as np
import pytest
import torch

import morlib
from suite import routing, runs
from suite.routing import gain


def test_the_first_places_carry_what_they_add_and_equal_ones_share_it():
    value, worth = np.array([1.0, 3.0, 2.0, 2.0]), np.array([0.0, 4.0, 8.0, 0.0])
    carried = dict(zip(gain.SHARES, gain.carried_by(value, worth)))
    assert [carried[share] for share in (0.25, 0.5, 0.75, 1.0)] == [1.0, 2.0, 3.0, 3.0]
    alike = gain.carried_by(np.zeros(4), worth)
    assert alike == pytest.approx([3.0 * share for share in gain.SHARES])


def test_contexts_tell_windows_apart_by_what_was_read():
    windows = torch.tensor([[1, 2, 3, 9], [4, 2, 3, 9], [1, 2, 3, 5]])
    one, two, three = (of_order.reshape(3, 3) for of_order in gain.contexts(windows, 3, 11))
    assert (one == windows[:, :-1].numpy() + 1).all()
    assert two[0, 2] == two[1, 2] and two[0, 1] != two[1, 1]
    assert three[0, 2] == three[2, 2] != three[1, 2]
    assert two[0, 0] == one[0, 0], "before a window stands nothing"


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


def test_it_is_measured_from_trained_models(monkeypatch, make_model):
    """An order that knows the gains carries them; MoR's is its own depth; the rest never saw the seed's."""
    s = runs.settings(dict(preset="cpu", seeds=2))
    specs = runs.long_runs(s, gain.EXPERIMENT)
    monkeypatch.setattr(gain, "WINDOWS", 60)

    class Text:
        def windows(self, part, length, most=None):
            own = torch.Generator().manual_seed(len(part))
            return torch.randint(11, (most or 50, length + 1), generator=own)

    def trained_model(spec):
        routing_of = dict(routing=spec.config.routing, n_layers=spec.config.n_layers // 2)
        if spec.model == "mor":
            routing_of |= dict(target_depth=4.0)
        model = make_model(seed=spec.train.seed * 10 + spec.config.n_layers, **routing_of)
        return model, dict(id=f"{spec.model}{spec.train.seed}"), Text()

    monkeypatch.setattr(runs, "trained_model", trained_model)
    asked = [spec for spec in specs if spec.model in ("fixed-deep", "fixed-shallow", "mor")]
    table = gain.measure_gain(specs)
    assert table.groupby("way").size().to_dict() == dict.fromkeys(gain.WAYS, 2)
    windows = Text().windows("heldout", 12)
    for seed, own in table.groupby("seed"):
        of = {spec.model: trained_model(spec)[0] for spec in asked if spec.train.seed == seed}
        losses = {label: morlib.score(model, windows) for label, model in of.items()}
        each = losses["fixed-shallow"]["surprisal"] - losses["fixed-deep"]["surprisal"]
        assert own["loss"].str[-1].tolist() == pytest.approx([each.mean().item()] * 4, abs=1e-6)
        deepest = losses["mor"]["depth"].flatten().argsort(descending=True)
        fifth = each.flatten()[deepest][: len(deepest) // 5].sum() / len(deepest)
        mor = own[own["way"] == "mor"].iloc[0]
        assert mor["loss"][3] == pytest.approx(fifth.item(), abs=0.02)
        assert mor["runs"] == {label: f"{label}{seed}" for label in ("fixed-deep", "fixed-shallow", "mor")}


def test_the_table_that_ships_agrees_with_the_records_of_its_runs():
    table = routing.stored_gain()
    records = {r["id"]: r["metrics"] for r in runs.stored_records("exp1-thin-long")["record"]}
    assert sorted(table["seed"].unique()) == list(range(6))
    for row in table.to_dict("records"):
        deep, shallow = (records[row["runs"][label]] for label in ("fixed-deep", "fixed-shallow"))
        assert row["runs"]["mor"] in records
        assert row["accuracy"][-1] == pytest.approx(deep["accuracy"] - shallow["accuracy"], abs=0.02)
        assert row["loss"][-1] == pytest.approx(shallow["loss"] - deep["loss"], abs=1e-3)


def test_the_sentence_and_the_picture_say_what_the_table_does():
    table = routing.stored_gain()
    shares = gain.carried_share(table, "three")
    third = np.mean([np.interp(1 / 3, gain.SHARES, seed) for seed in shares])
    assert f"carries {third:.0f} %" in routing.gain_sentence(table)
    assert shares[:, -1] == pytest.approx(100)
    shown = routing.gain_table(table)
    assert shown.loc[gain.WAYS["three"], "first 33 %"].startswith(f"{third:.0f} [")
    lines = {line.get_label(): line.get_ydata() for line in routing.draw_gain(table).axes[0].lines}
    assert lines[gain.WAYS["three"]][-1] == pytest.approx(100) and len(lines) == 5
