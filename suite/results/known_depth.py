"""What the records of the task of known depth say: accuracy by hops, and who is deep."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..runs import stored_records, table_of
from .figures import (
    AMBER,
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    LINES,
    PINK,
    SKY,
    VERMILLION,
    Look,
    figure_style,
    legend_of,
    look_of,
    marker_of,
)
from .headlines import TEXT_NAMES, seeds_so_far
from .stats import LEAST_SEEDS, by_equality_alone, compare, different, interval, judged
from .tables import count, layers_by_model, plain_names, signed, span, verdict_words

LABELS = {
    "fixed-half": "{n} layers",
    "fixed-half-long": "{n} layers, twice the steps",
    "fixed-between": "{n} layers",
    "fixed-deep": "{n} layers",
    "fixed-shared": "{n} layers of two blocks",
    "planted": "the plan written down",
    "planted 4": "the plan in four layers",
    "worth": "token worth",
    "worth-shallow": "token worth in {n} layers",
    "worth-by-windows": "token worth, by windows",
    "worth-whole-windows": "token worth, a tenth of the windows whole",
    "mor": "MoR of notebook 02",
    "mor-spread": "MoR, choice in all layers but one",
    "mor-spread-warm": "such MoR, trained as token worth",
    "mor-free": "MoR, no depth set",
    "blind": "blind, whole tokens",
    "random": "blind, layer by layer",
    "frozen": "untrained router",
}
DRAWN = {
    "worth": Look(BLUE, "s"),
    "worth-by-windows": Look(GREEN, "s", ":", False),
    "planted": Look(SKY, "P", "--", False),
    "fixed-half": Look(BLACK, "o", "--", False),
    "fixed-half-long": Look(GREY, "v", "--", False),
    "fixed-between": Look(BLACK, "X", "-.", False),
    "mor": Look(VERMILLION, "D", "-."),
    "mor-spread": Look(AMBER, "^", ":"),
    "blind": Look(PINK, "v", ":"),
}
FIXED = ("fixed-half", "fixed-between", "fixed-deep")
SIDE = {"fixed-shared", "mor-spread-warm", "mor-free", "frozen"}  # in tables only: figures would be too full
ON_TEXT = {  # policies of `runs.worth_runs`
    "worth": "token worth",
    "blind-tokens": "blind, whole tokens",
    "worth-above-5": "worth above 5 layers",
    "blind-tokens-above-5": "blind above 5 layers",
    "worth-half-way": "token worth, asked twice",
    "worth-by-windows": "token worth, by windows",
}
WORTH, BLIND, WORTH_5, BLIND_5, TWICE, WINDOWS = ON_TEXT.values()
TEXT_PAIRS = (
    *((WORTH, other) for other in ("fixed-shallow", "mor-equal-epochs", "random", BLIND)),
    *((WORTH_5, other) for other in (WORTH, BLIND_5, "fixed-shallow")),
    *((TWICE, other) for other in (WORTH, "fixed-shallow")),
    (WINDOWS, WORTH),
)  # fmt: skip
MAIN = {"worth", "fixed-half", "fixed-deep"}  # what an answer needs
SOLVED = 99.0  # per cent of the hard answers, at every k
KINDS = ("table", "k", "x", "answer")
KIND_NAMES = ("table", "number k", "symbol x", "answer")


def names_of(records: pd.DataFrame) -> dict[str, str]:
    """What each model's label means, for readers; a fixed model is named by its layers."""
    layers = layers_by_model(records)
    return {label: LABELS.get(label, label).format(n=count(n)) for label, n in layers.items()}


def answerable(records: pd.DataFrame) -> bool:
    """Whether records hold the models that an answer needs."""
    return MAIN <= set(records.get("model", ()))


def narrow_records(folder: Path | None = None) -> pd.DataFrame:
    """The records that ship of `runs.narrow_runs`. They stand among those of the field, with which they share
    a setting."""
    stored = stored_records("field", folder)
    return stored[stored["model"].isin(LABELS)] if len(stored) else stored


def deep_records(folder: Path | None = None) -> pd.DataFrame:
    """The records that ship of `runs.deep_runs`; none, as long as a model that an answer needs has none."""
    stored = stored_records("known-depth-12", folder)
    return stored if answerable(stored) else pd.DataFrame()


def by_hops(records: pd.DataFrame) -> pd.DataFrame:
    """One row a run and k: model, seed, k, accuracy at the hard answers (%), depth at their x."""
    rows = []
    for record in records["record"]:
        names = dict(model=record["model"], seed=record["seed"])
        rows += [names | row for row in record["metrics"]["details"]["by_hops"]]
    return pd.DataFrame(rows)


def with_hops(records: pd.DataFrame) -> pd.DataFrame:
    """Records with the columns `hops`, the mean accuracy (%) at the upper half of k, and `solved`."""
    table = by_hops(records).set_index(["model", "seed"])
    most = table["k"].max()
    upper = table[table["k"] > most / 2]["accuracy"].groupby(level=[0, 1]).mean()
    least = table["accuracy"].groupby(level=[0, 1]).min()
    keys = pd.MultiIndex.from_frame(records[["model", "seed"]])
    return records.assign(hops=upper[keys].to_numpy(), solved=(least[keys] >= SOLVED).to_numpy())


def compare_hops(scored: pd.DataFrame, a: str, b: str) -> dict[str, object]:
    """`compare` at the upper half of k, where a point more or less is equal; scored: `with_hops`."""
    return compare(scored, a, b, metric="hops", margin=1.0)


def hops_table(records: pd.DataFrame) -> pd.DataFrame:
    """One row a model: seeds, E, loss, `way_of` (where three seeds have both of its ends), accuracy at the
    hard answers by k (%), applications in training (millions), seeds that solve every k. No records give no
    rows."""
    if records.empty:
        return pd.DataFrame({"seeds": []}).rename_axis("model")
    names, scored = names_of(records), with_hops(records)
    wide = by_hops(records).pivot_table(index="model", columns="k", values="accuracy", sort=False)
    groups = scored.groupby("model", sort=False)
    table = pd.DataFrame({"seeds": groups.size(), "E": groups["effective_depth"].mean().round(2)})
    table["loss (nats)"] = groups["loss"].mean().round(3)
    both = records.groupby("seed")["model"].apply(lambda own: {"fixed-half", "fixed-deep"} <= set(own))
    if both.sum() >= 3:
        table["way (%)"] = way_of(records).groupby(records["model"]).mean().round().astype("Int64")
    for k in wide:
        table[f"k = {k}"] = wide[k].round(0).astype(int)
    table["applications (M)"] = (groups["train_applications"].mean() / 1e6).round(0).astype(int)
    table["solved"] = groups["solved"].sum().astype(str) + " of " + groups.size().astype(str)
    order = [label for label in LABELS if label in table.index] or [*table.index]
    return table.loc[order].rename(index=names).rename_axis("model")


def way_of(records: pd.DataFrame) -> pd.Series:
    """How far each run is on the way from half of the layers (0) to all of them (100), in held-out loss (%).

    Paired by seed where both are there, else by their mean. 100 is what all layers gain on average over the
    seeds of the run's own model. NaN where one of the two has no record, or all layers gain nothing.
    """
    losses = records.pivot_table(index="seed", columns="model", values="loss")
    if not {"fixed-half", "fixed-deep"} <= set(losses):
        return pd.Series(np.nan, records.index)
    half, deep = (losses[name].fillna(losses[name].mean()) for name in ("fixed-half", "fixed-deep"))
    ahead = half[records["seed"]].to_numpy() - records["loss"]
    gain = records["seed"].map(half - deep).groupby(records["model"]).transform("mean")
    return 100 * ahead / gain.where(gain > 0)


def hops_verdicts(records: pd.DataFrame, model: str = "worth") -> pd.DataFrame:
    """The model against each other one, at the upper half of k: difference, interval, verdict."""
    names, scored = names_of(records), with_hops(records)
    rows = []
    for other in [label for label in LABELS if label in names and label != model]:
        c = compare_hops(scored, model, other)
        interval = f"{reach} (95 %)" if (reach := span(c["low"], c["high"], 1)) else ""
        rows.append([names[other], signed(c["mean"], 1), interval, verdict_words(c)])
    subject = f"{names.get(model, model)} against"
    return pd.DataFrame(rows, columns=[subject, "difference (points)", "interval", "verdict"])


def main_records(folder: Path | None = None) -> pd.DataFrame:
    """The records that ship on which the main answer rests: those of the narrow setting, in which half of the
    layers stay behind, or where they are not there, those of the task's own."""
    narrow = narrow_records(folder)
    return narrow if answerable(narrow) else stored_records("known-depth", folder)


def hops_sentence(records: pd.DataFrame) -> str:
    """What records of the task of known depth show, in plain words: token worth, and fixed layers."""
    scored, names = with_hops(records), names_of(records)
    first = scored[scored["model"] == "worth"].iloc[0]["record"]["config"]
    depth = scored[scored["model"] == "worth"]["effective_depth"].mean()
    right = {label: shares(group["hops"]) for label, group in scored.groupby("model")}
    most = by_hops(records)["k"].max()
    c = compare_hops(scored, "worth", "fixed-half")
    so_far = c["pairs"] < LEAST_SEEDS and c["mean"] > 0
    start = "Yes so far" if so_far else "Not shown"
    if judged(c) == "better":
        start = "Yes, held to a depth set by hand"
    seeds = seeds_so_far(c["pairs"])
    return (
        f"{start}: at E {depth:.1f}, token worth (a router that learns what depth is worth) answers "
        f"{right['worth']} % of the hard questions of {most // 2 + 1} to {most} hops, "
        f"{names['fixed-half']} {right['fixed-half']} %, and "
        f"{names['fixed-deep']} {right['fixed-deep']} % ({seeds}, {steps_of(first):,} steps)."
    )


def steps_of(config: dict) -> int:
    """How many steps a record's training takes."""
    train = config["train"]
    return train["epochs"] * (train["windows"] // train["batch_size"])


def known_depth_answer(records: pd.DataFrame) -> str:
    """How token worth stands to fixed layers in the setting of some records: each difference in points, with
    its interval."""
    scored, names = with_hops(records), names_of(records)
    E = records[records["model"] == "worth"]["effective_depth"].mean()
    told = []
    for label in [label for label in ("fixed-half-long", "fixed-deep") if label in names]:
        c = compare_hops(scored, "worth", label)
        shows = f"{verdict_words(c)}, " if c["pairs"] >= LEAST_SEEDS else ""
        told.append(f"against {names[label]}: {shows}{points_of(c)}")
    return f"In {size_in_words(records)}, at E {E:.1f}, *token worth* {'; '.join(told)}."


def size_in_words(records: pd.DataFrame) -> str:
    """The size of the setting of some records in words, by the layers of all of them."""
    model = records[records["model"] == "fixed-deep"].iloc[0]["record"]["config"]["model"]
    return f"{count(model['n_layers'])} layers of width {model['d_model']}"


def points_of(c: dict, digits: int = 0) -> str:
    """A difference in points, its interval and its seeds."""
    level, low, high = 95, c["low"], c["high"]
    if by_equality_alone(c):
        level, low, high = 90, c["low90"], c["high90"]
    interval = f"{level} % interval {reach}; " if (reach := span(low, high, digits)) else ""
    return f"{signed(c['mean'], digits)} points ({interval}{seeds_so_far(c['pairs'])})"


def worth_on_text(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """The stored records of an experiment on text, with those of `runs.worth_runs` on its text and seeds."""
    own, added = (stored_records(name, folder) for name in (experiment, f"{experiment}-worth"))
    if own.empty or added.empty:
        return own
    added = added.assign(experiment=experiment, model=added["model"].replace(ON_TEXT))
    return pd.concat([own, added], ignore_index=True)


def text_sentence(folder: Path | None = None) -> str:
    """How token worth does on the text of experiment 2, against as many layers as it runs; nothing without
    records of both."""
    records = worth_on_text("exp2", folder)
    if not {WORTH, "fixed-shallow"} <= set(records.get("model", ())):
        return ""
    c = compare(records, WORTH, "fixed-shallow")
    verb = "is not shown to differ from"
    if different(c):
        verb = "is ahead of" if c["mean"] > 0 else "loses against"
    against = plain_names(records)["fixed-shallow"]
    epochs = records[records["model"] == WORTH].iloc[0]["record"]["config"]["train"]["epochs"]
    told = f"On {TEXT_NAMES['exp2']}, after {epochs} epochs, token worth {verb} {against}"
    return f"{told}: {points_of(c, digits=2)}."


def shares(values: pd.Series) -> str:
    """Mean and interval of six seeds or more, as far as per cent go; of fewer, the range that they span."""
    mean, low, high = interval(values)
    if len(values) < LEAST_SEEDS:
        low, high = values.min(), values.max()
        return f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"
    if np.isnan(low):  # all are the same
        return f"{mean:.0f}"
    return f"{mean:.0f} [{max(low, 0):.0f}, {min(high, 100):.0f}]"


def draw_known_depth(records: pd.DataFrame) -> Figure:
    """Accuracy by hops, and how deep the tokens of each kind are. Lines are means, dots are seeds."""
    figure_style()
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), width_ratios=[3, 2])
    names = names_of(records)
    order = [label for label in LABELS if label in names and label not in SIDE]
    draw_by_hops(axes[0], by_hops(records), order, names)
    draw_depth_by_kind(axes[1], records, [label for label in order if not label.startswith("fixed")], names)
    legend_of(figure, axes[0], columns=4)
    return figure


def draw_by_hops(ax: Axes, table: pd.DataFrame, order: list[str], names: dict[str, str]) -> None:
    for index, label in enumerate(order):
        own, look = table[table["model"] == label], DRAWN.get(label, look_of(label, index))
        mean = own.groupby("k")["accuracy"].mean()
        ax.plot(mean.index, mean, linestyle=look.line, label=names[label], **marker_of(look))
        ax.scatter(own["k"], own["accuracy"], s=7, alpha=0.5, color=look.colour)
    ax.set(xlabel="hops k that the question asks for", ylabel="hard answers right (%)", ylim=(-3, 103))
    ax.set_title("Accuracy by hops")


def draw_depth_by_kind(ax: Axes, records: pd.DataFrame, order: list[str], names: dict[str, str]) -> None:
    for index, label in enumerate(order):
        own = records[records["model"] == label]["record"]
        depth = [[r["metrics"]["details"]["depth_by_kind"][kind] for kind in KINDS] for r in own]
        look, aside = DRAWN.get(label, look_of(label, index)), 0.09 * (index - (len(order) - 1) / 2)
        ax.plot(np.arange(4) + aside, np.mean(depth, 0), linestyle="none", markersize=7, **marker_of(look))
    ax.set_xticks(range(4), KIND_NAMES)
    ax.set(xlabel="kind of token", ylabel="depth (applications a token)", ylim=(0, None))
    ax.set_title("Who is deep")


def hops_curves(records: pd.DataFrame) -> Figure:
    """Accuracy at the upper half of k on validation lines, against training steps: the mean, and thin each
    seed. Left out is what trains for longer than the others."""
    figure_style()
    figure, ax = plt.subplots(figsize=(8, 4.8))
    names = names_of(records)
    drawn = [label for label in LABELS if label in names and label not in SIDE | {"fixed-half-long"}]
    for index, label in enumerate(drawn):
        look = DRAWN.get(label, look_of(label, index))
        curves = pd.DataFrame(
            {
                record["seed"]: {
                    p["step"]: upper_half(p["val_details"]["by_hops"]) for p in record["history"]
                }
                for record in records[records["model"] == label]["record"]
            }
        ).sort_index()
        ax.plot(curves, color=look.colour, linestyle=look.line, linewidth=0.7, alpha=0.35)
        style = marker_of(look) | dict(markersize=4, label=names[label])
        ax.plot(curves.mean(axis=1), linestyle=look.line, linewidth=1.6, **style)
    right = "hard answers right, upper half of k (%)"
    ax.set(xlabel="training step", ylabel=f"{right},\nvalidation lines", ylim=(-3, 103))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    legend_of(figure, ax, columns=3)
    return figure


def plan_curves(records: pd.DataFrame) -> Figure:
    """The depth that token worth gives each kind of token on validation lines, against training steps, a line
    a seed.

    Grey: the plan written down, where its records are there.
    """
    figure_style()
    figure, ax = plt.subplots(figsize=(8, 3.5))
    planted = records[records["model"] == "planted"]["record"]
    for index, (kind, name) in enumerate(zip(KINDS, KIND_NAMES)):
        for number, record in enumerate(records[records["model"] == "worth"]["record"]):
            curve = [
                (point["step"], point["val_details"]["depth_by_kind"][kind]) for point in record["history"]
            ]
            label = name if number == 0 else None
            ax.plot(*zip(*curve), color=COLOURS[index], linestyle=LINES[index], linewidth=1.2, label=label)
        for record in planted[:1]:
            level = record["metrics"]["details"]["depth_by_kind"][kind]
            label = "the plan" if index + 1 == len(KINDS) else None
            ax.axhline(level, color=GREY, linewidth=3, alpha=0.4, zorder=0, label=label)
    ax.set(xlabel="training step", ylabel="depth (applications a token)", ylim=(0, None))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    legend_of(figure, ax)
    return figure


def upper_half(rows: list[dict]) -> float:
    """Mean accuracy (%) at the hard answers of the upper half of k."""
    most = max(row["k"] for row in rows)
    return float(np.mean([row["accuracy"] for row in rows if row["k"] > most / 2], dtype=float))


def leads_table(records: pd.DataFrame) -> pd.DataFrame:
    """One row a lead, the best first: seeds, E, loss, hard answers right at the upper half of k (%), and the
    depth of each kind of token."""
    scored = with_hops(records)
    groups = scored.groupby("model")
    table = pd.DataFrame({"seeds": groups.size(), "E": groups["effective_depth"].mean().round(2)})
    table["loss (nats)"] = groups["loss"].mean().round(3)
    table["right (%)"] = groups["hops"].mean().round(0).astype(int)
    depth = pd.DataFrame([record["metrics"]["details"]["depth_by_kind"] for record in scored["record"]])
    depth = depth[[*KINDS]].groupby(scored["model"].to_numpy()).mean().round(1).set_axis(KIND_NAMES, axis=1)
    return table.join(depth).sort_values("loss (nats)").rename_axis("token worth")


def early_table(
    records: pd.DataFrame, steps: tuple[int, ...] = (2000, 3000, 4000, 6000, 8000)
) -> pd.DataFrame:
    """How fast models learn: a row a model, with its seeds, the loss on validation lines after so many steps,
    and the depth of the table's tokens at the first of these. Empty where one of them was stopped before."""
    if records.empty:
        return records
    names, rows = names_of(records), []
    for label, own in records.groupby("model", sort=False):
        curves = [{point["step"]: point for point in record["history"]} for record in own["record"]]
        row = {"model": names[label], "seeds": len(own)}
        for step in steps:
            at = [curve[step]["val_loss"] for curve in curves if step in curve]
            row[f"after {step:,}"] = f"{np.mean(at):.3f}" if len(at) == len(own) else ""
        first = [curve[steps[0]] for curve in curves if steps[0] in curve]
        deep = [point["val_details"]["depth_by_kind"]["table"] for point in first] or [np.nan]
        rows.append(row | {f"table's depth after {steps[0]:,}": round(float(np.mean(deep)), 1)})
    return pd.DataFrame(rows).set_index("model")


def map_records(folder: Path | None = None) -> pd.DataFrame:
    """Fixed models of the wide setting, by layers and steps: those of the map, and the same models elsewhere.

    A run that was trained twice, with two results, stands twice.
    """
    found = {}
    for experiment in ("known-depth-map", "known-depth", "field-wide"):
        for record in stored_records(experiment, folder).get("record", ()):
            model = record["config"]["model"]
            if model["routing"] == "none" and not model.get("shared_blocks"):
                label = f"fixed {model['n_layers']}, {steps_of(record['config'])} steps"
                found[record["id"], record["metrics"]["loss"]] = record | dict(model=label)
    return table_of(list(found.values()))


def map_table(records: pd.DataFrame) -> pd.DataFrame:
    """`hops_table` of fixed models by layers and length of training; a run may stand twice."""
    table = hops_table(records).drop(columns=["E", "solved"], errors="ignore")
    return table.rename(columns={"seeds": "trainings"}).sort_index()
