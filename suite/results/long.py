"""What the experiments show of models that train long, each judged where its validation loss was lowest."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from ..runs import stored_records
from ..runs.experiments import ROUTED
from .figures import accuracy_against_depth
from .headlines import HOW_TO_READ, TEXT_NAMES, best_count, epochs_of, loss_apart, show
from .known_depth import points_of
from .stats import LEAST_SEEDS, compare, interval
from .tables import count, share_words, signed, span, verdict_words, verdicts

# Models in which a third of the tokens runs all layers, and what is compared to learn which third matters
WHO_PAIRS = [
    ("by-kind", "blind-tokens"),
    ("by-kind", "by-position"),
    ("by-position", "blind-tokens"),
    ("by-kind", "fixed-shallow"),
    ("by-kind", "fixed-at-E"),
    ("by-kind", "mor"),
    ("blind-tokens", "fixed-shallow"),
    ("worth-above", "blind-tokens"),
    ("by-kind-sees-all", "by-kind"),
    ("told", "by-kind"),
    ("told-sees-all", "told"),
    ("told-sees-all", "by-kind-sees-all"),
    ("told-sees-all", "fixed-at-E"),
    ("told-sees-all", "fixed-deep"),
]
# Experiments with fixed models of all layers and of half of them, and the text that each reads
WORTH_OF_DEPTH = dict.fromkeys(("pareto", "exp1-long", "exp1-thin-long", "length", "sizes"), "exp1")
WORTH_OF_DEPTH |= dict.fromkeys(("exp2-long", "exp2-thin-long"), "exp2")
WORTH_OF_DEPTH |= dict.fromkeys(("bangla", "bangla-long"), "bangla")
WHO = ("worth-above", "blind-tokens", "by-position", "by-kind", "by-kind-sees-all", "told", "told-sees-all")


def long_pairs(experiment: str) -> list[tuple[str, str]]:
    """What is compared: what depth is worth, then MoR and token worth against fixed depth and controls."""
    mor, blind = ROUTED[experiment]
    halved = experiment.startswith("exp2")  # at the cost of half of the layers
    as_cheap = "fixed-shallow" if halved else "fixed-at-E"
    pairs = [("fixed-deep", "fixed-shallow"), (mor, "fixed-deep"), (mor, as_cheap)]
    if as_cheap != "fixed-shallow":
        pairs[1:1] = [(as_cheap, "fixed-shallow")]
        pairs += [(mor, "fixed-shallow")]
    pairs += [(mor, other) for other in (blind, blind.replace("random", "frozen"))]
    if halved:
        pairs += [("mor-source-protocol", "fixed-long")]
    return pairs + [("worth", "fixed-deep"), ("worth", as_cheap), ("worth", mor)]


def long_records(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """The records that ship of `runs.long_runs` and `runs.long_controls`."""
    return stored_records(f"{experiment}-long", folder)


def gate_sentence(experiment: str, folder: Path | None = None) -> str:
    """How a fixed model stands to the best table of counts, as the experiment trains it and trained long."""
    long, short = long_records(experiment, folder), stored_records(experiment, folder)
    if long.empty or short.empty:
        return ""
    both = set(long["model"]) & set(short["model"])
    label = "fixed-deep" if "fixed-deep" in both else "fixed-shallow"
    order, counts = best_count(long)
    told = []
    for records in (short, long):
        own = records[records["model"] == label]
        config = own.iloc[0]["record"]["config"]
        reached = f"{own['loss'].mean():.3f} nats and {own['accuracy'].mean():.1f} %"
        told.append(f"after {config['train']['epochs']} epochs {reached}")
    layers = count(config["model"]["n_layers"])
    return (
        f"On held-out text the best table of counts, of {order}-grams, has a loss of {counts['loss']:.3f} "
        f"nats a token, and its guess is right for {counts['accuracy']:.1f} %. {layers.capitalize()} layers "
        f"reach {told[0]}, {told[1]}."
    )


def worth_of_depth(folder: Path | None = None) -> pd.DataFrame:
    """One row a text, length of training and width: seeds, accuracy (%) of N and of N/2 fixed layers as each
    is judged, their difference in points with its 95 % interval. Windows are of one length in all."""
    rows = []
    for experiment, text in WORTH_OF_DEPTH.items():
        for r in stored_records(experiment, folder).get("record", ()):
            model, epochs = r["config"]["model"], r["config"]["train"]["epochs"]
            if model["routing"] == "none" and not model.get("shared_blocks"):
                setting = TEXT_NAMES[text], model["d_model"], epochs
                rows.append([*setting, model["n_layers"], r["seed"], r["metrics"]["accuracy"]])
    settings = ["text", "width", "epochs"]
    table = pd.DataFrame(rows, columns=[*settings, "layers", "seed", "accuracy"])
    N, found = table["layers"].max(), []
    for setting, group in table.groupby(settings, sort=False):
        wide = group.pivot_table(index="seed", columns="layers", values="accuracy")  # one run may stand twice
        wide = wide.reindex(columns=[N // 2, N]).dropna()
        if wide.empty:
            continue
        mean, low, high = interval(wide[N] - wide[N // 2])
        row = dict(zip(settings, setting)) | dict(seeds=len(wide))
        row |= {f"{layers} layers (%)": round(wide[layers].mean(), 2) for layers in (N // 2, N)}
        row |= {"difference (points)": signed(mean)}
        found.append(row | {"95 % interval": "" if math.isnan(low) else span(low, high)})
    if not found:
        return pd.DataFrame()
    order = list(dict.fromkeys(row["text"] for row in found))
    found.sort(key=lambda row: (order.index(row["text"]), -row["width"], row["epochs"]))
    return pd.DataFrame(found).set_index(settings)


def gap(records: pd.DataFrame, a: str, b: str) -> str:
    """A difference in points of accuracy with its interval and its seeds, and from six seeds on what it shows
    in words, in loss too where that shows more."""
    c = compare(records, a, b)
    shows = f"{verdict_words(c)}, " if c["pairs"] >= LEAST_SEEDS else ""
    return shows + points_of(c, digits=2) + loss_apart(records, a, b)


def depth_sentence(experiment: str, folder: Path | None = None) -> str:
    """What depth is worth on a text to models that train long, and how much of it MoR gets.

    Nothing, where no such records ship.
    """
    records, (routed, _) = long_records(experiment, folder), ROUTED[experiment]
    labels = set(records.get("model", ()))
    if not {"fixed-deep", "fixed-shallow"} <= labels:
        return ""
    layers = {r["model"]: r["config"]["model"]["n_layers"] for r in records["record"]}
    deep, shallow = (count(layers[label]) for label in ("fixed-deep", "fixed-shallow"))
    trained = f"On {TEXT_NAMES[experiment]}, trained for {epochs_of(records, 'fixed-deep')} epochs"
    told = f"{trained}, {deep} layers against {shallow}: {gap(records, 'fixed-deep', 'fixed-shallow')}."
    if routed not in labels:
        return told
    E = records[records["model"] == routed]["effective_depth"].mean()
    mor = f"MoR, which runs {E:.1f} layers on average, against the same {shallow}"
    told = f"{told} {mor}: {gap(records, routed, 'fixed-shallow')}"
    if "fixed-at-E" not in labels:
        return f"{told}."
    as_cheap = f"against {count(layers['fixed-at-E'])} fixed layers, which cost as much"
    return f"{told}; {as_cheap}: {gap(records, routed, 'fixed-at-E')}."


def kinds_sentence(experiment: str, folder: Path | None = None) -> str:
    """What it is worth to run always the same kinds of tokens, against a new draw each time and against MoR.

    Nothing, where no such records ship.
    """
    records, (mor, _) = long_records(experiment, folder), ROUTED[experiment]
    if not {"by-kind", "blind-tokens", mor} <= set(records.get("model", ())):
        return ""
    config = records[records["model"] == "by-kind"]["record"].iloc[0]["config"]["model"]
    N, always = config["n_layers"], config["options"]["always"]
    share = share_words((config["target_depth"] - always) / (N - always))
    told = (
        f"Let {share} of the tokens run {count(N)} layers, the others {count(always)}. Lots that fix once "
        "which kinds these are, against lots for each token anew: "
        f"{gap(records, 'by-kind', 'blind-tokens')}; against MoR, whose router learns: "
        f"{gap(records, 'by-kind', mor)}."
    )
    if "told" not in set(records["model"]):
        return told
    return f"{told} To be told where depth pays, against these lots: {gap(records, 'told', 'by-kind')}."


def show_long(experiment: str, folder: Path | None = None) -> None:
    """Show what an experiment's models reach when they train long, from records that ship; without WHO."""
    records, told = long_records(experiment, folder), depth_sentence(experiment, folder)
    if not told:
        print(f"No stored record of {experiment}-long ships with this copy: see runs.long_runs.")
        return
    records = records[~records["model"].isin(WHO)]
    order, counts = best_count(records)
    config = records.iloc[0]["record"]["config"]["model"]
    who = "All of these models have" if records["did_train"].all() else "Not all of these models have"
    table = f"the best table of counts ({order}-grams: {counts['loss']:.3f} nats a token)"
    if records["accuracy"].max() < counts["accuracy"]:
        table += f", and none guesses right as often as it ({counts['accuracy']:.1f} %)"
    early = sum(r["metrics"]["best"]["step"] < r["history"][-1]["step"] for r in records["record"])
    note = (
        f"{who} a lower loss than {table}. Points of held-out accuracy where validation loss was lowest (in "
        f"{early or 'none'} of {len(records)} runs before the end), "
        f"width {config['d_model']}, over the seeds that both models have. {HOW_TO_READ}"
    )
    show(told, verdicts(records, long_pairs(experiment)), note)
    accuracy_against_depth(records, "fixed-shallow" if experiment.startswith("exp2") else "fixed-deep")
