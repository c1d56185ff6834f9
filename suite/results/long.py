"""What the experiments show of models that train long, each judged where its validation loss was lowest."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from ..runs import stored_records
from .figures import accuracy_against_depth
from .headlines import HOW_TO_READ, show
from .known_depth import points_of
from .stats import compare, interval
from .tables import count, possible, signed, span, verdicts, with_interval

ROUTED = {"exp1": "mor", "exp2": "mor-equal-epochs", "bangla": "mor-deep"}  # an experiment's main MoR
TEXT_NAMES = {"exp1": "Tiny Shakespeare", "exp2": "half of Tiny Shakespeare", "bangla": "Bangla Wikipedia"}
BLIND = {"exp1": "random", "exp2": "random", "bangla": "random-deep"}
UNTRAINED = {"exp1": "frozen", "exp2": "frozen", "bangla": "frozen-deep"}


def long_pairs(experiment: str) -> list[tuple[str, str]]:
    """What is compared: what depth is worth, then MoR and token worth against fixed depth and controls."""
    mor = ROUTED[experiment]
    as_cheap = "fixed-shallow" if experiment == "exp2" else "fixed-at-E"
    others = (BLIND[experiment], UNTRAINED[experiment])
    pairs = [("fixed-deep", "fixed-shallow"), (mor, "fixed-deep"), (mor, as_cheap)]
    pairs += [(mor, other) for other in others]
    if experiment == "exp2":
        pairs += [("mor-source-protocol", "fixed-long")]
    return pairs + [("worth", "fixed-deep"), ("worth", as_cheap), ("worth", mor)]


def long_records(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """The records that ship of `runs.long_runs`, with the metrics of where validation loss was lowest."""
    return stored_records(f"{experiment}-long", folder)


def best_count(records: pd.DataFrame) -> tuple[str, float]:
    """The best table of counts of a record's text: its order and its held-out loss (nats a token)."""
    floors = records.iloc[0]["record"]["floors"]
    order = min(floors, key=lambda order: floors[order]["heldout"]["loss"])
    return order, floors[order]["heldout"]["loss"]


def gate_sentence(experiment: str, folder: Path | None = None) -> str:
    """Whether a fixed model beats the best table of counts, as the experiment trains it and trained long."""
    long, short = long_records(experiment, folder), stored_records(experiment, folder)
    if long.empty or short.empty:
        return ""
    both = set(long["model"]) & set(short["model"])
    label = "fixed-deep" if "fixed-deep" in both else "fixed-shallow"
    order, count_loss = best_count(long)
    told = []
    for records in (short, long):
        own = records[records["model"] == label]
        config = own.iloc[0]["record"]["config"]
        verb = "beat" if own["loss"].max() < count_loss else "do not beat"
        told.append(f"after {config['train']['epochs']} epochs {own['loss'].mean():.3f} ({verb} it)")
    layers = count(config["model"]["n_layers"])
    return (
        f"The best table of counts on {TEXT_NAMES[experiment]}, of {order}-grams, has a held-out loss of "
        f"{count_loss:.3f} nats a token. {layers.capitalize()} layers reach {told[0]}, and {told[1]}."
    )


def worth_of_depth(folder: Path | None = None) -> pd.DataFrame:
    """One row a length of training on the text of experiment 1: seeds, accuracy (%) of N and of N/2 fixed
    layers where validation loss was lowest, their difference in points with its 95 % interval."""
    own = [stored_records("length", folder), long_records("exp1", folder)]
    own.append(stored_records("pareto", folder))
    rows = [
        dict(layers=r["config"]["model"]["n_layers"], epochs=r["config"]["train"]["epochs"], seed=r["seed"])
        | dict(accuracy=accuracy)
        for records in own if len(records)
        for r, accuracy in zip(records["record"], records["accuracy"])
        if r["config"]["model"]["routing"] == "none"
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    N = table["layers"].max()
    result = {}
    for epochs, group in table.groupby("epochs"):
        wide = group.pivot_table(index="seed", columns="layers", values="accuracy")[[N // 2, N]].dropna()
        mean, low, high = interval(wide[N] - wide[N // 2])
        result[epochs] = {
            "seeds": len(wide),
            **{f"{layers} layers (%)": round(wide[layers].mean(), 2) for layers in (N // 2, N)},
            "difference (points)": signed(mean),
            "95 % interval": "" if math.isnan(low) else span(low, high),
        }
    return pd.DataFrame.from_dict(result, orient="index").rename_axis("epochs")


def long_table(records: pd.DataFrame) -> pd.DataFrame:
    """One row a model: seeds, held-out accuracy and loss with their intervals, bits per byte, E, whether
    every seed beats the best table of counts, and how many seeds were at their best before the end."""
    order, _ = best_count(records)
    rows = {}
    for model, group in records.groupby("model"):
        early = sum(r["metrics"]["best"]["step"] < r["history"][-1]["step"] for r in group["record"])
        rows[model] = {
            "seeds": len(group),
            "accuracy (%)": with_interval(group["accuracy"]),
            "loss (nats)": with_interval(group["loss"], 3),
            "bits per byte": f"{group['bits_per_byte'].mean():.3f}",
            "E": f"{group['effective_depth'].mean():.2f}",
            f"beats {order}-grams": "yes" if group["did_train"].all() else "no",
            "best before the end": early,
        }
    table = pd.DataFrame(rows).T.rename_axis("model")
    labels = dict.fromkeys(label for pair in long_pairs(experiment_of(records)) for label in pair)
    first = [label for label in labels if label in table.index]
    return table.loc[first + [label for label in table.index if label not in first]]


def experiment_of(records: pd.DataFrame) -> str:
    return records.iloc[0]["experiment"].removesuffix("-long")


def epochs_of(records: pd.DataFrame) -> int:
    """Epochs of an experiment's fixed models, of which those of twelve layers are one."""
    return records[records["model"] == "fixed-deep"].iloc[0]["record"]["config"]["train"]["epochs"]


def gap(records: pd.DataFrame, a: str, b: str) -> str:
    """A difference in points of accuracy with its 95 % interval and its seeds."""
    return points_of(compare(records, a, b), digits=2)


def depth_sentence(experiment: str, folder: Path | None = None) -> str:
    """What depth is worth on a text to models that train long, and where MoR and token worth stand.

    Nothing, where no such records ship.
    """
    records = long_records(experiment, folder)
    labels = set(records.get("model", ()))
    if not {"fixed-deep", "fixed-shallow"} <= labels:
        return ""
    layers = {r["model"]: r["config"]["model"]["n_layers"] for r in records["record"]}
    deep, shallow = (count(layers[label]) for label in ("fixed-deep", "fixed-shallow"))
    trained = f"On {TEXT_NAMES[experiment]}, trained for {epochs_of(records)} epochs"
    told = [f"{trained}, {deep} layers against {shallow}: {gap(records, 'fixed-deep', 'fixed-shallow')}."]
    for label, name in {ROUTED[experiment]: "MoR", "worth": "Token worth"}.items():
        if label in labels:
            E = records[records["model"] == label]["effective_depth"].mean()
            to_deep, to_shallow = (gap(records, label, other) for other in ("fixed-deep", "fixed-shallow"))
            told.append(f"{name} at E {E:.1f} against {deep}: {to_deep}; against {shallow}: {to_shallow}.")
    return " ".join(told)


def show_long(experiment: str, folder: Path | None = None) -> None:
    """Show what an experiment's models reach when they train long, from the records that ship."""
    records = long_records(experiment, folder)
    told = depth_sentence(experiment, folder)
    if not told:
        print(f"No stored record of {experiment}-long ships with this copy: choose the preset long.")
        return
    order, loss = best_count(records)
    config = records.iloc[0]["record"]["config"]["model"]
    beaten = "All of these models beat" if records["did_train"].all() else "Not all of these models beat"
    note = (
        f"{beaten} the best table of counts ({order}-grams: {loss:.3f} nats a token). Points of held-out "
        f"accuracy where validation loss was lowest, width {config['d_model']}. {HOW_TO_READ}"
    )
    show(told, verdicts(records, possible(records, long_pairs(experiment))), note)
    accuracy_against_depth(records, "fixed-deep")
