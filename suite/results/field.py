"""What the records of the field say: one row a system, what it answers and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from morlib import POLICIES, Policy

from ..runs import stored_records
from .figures import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PINK,
    SKY,
    VERMILLION,
    Look,
    figure_style,
    legend_of,
    marker_of,
)
from .glance import without_intervals
from .headlines import show
from .known_depth import FIXED, LABELS, by_hops, steps_of, way_of, with_hops
from .known_front import front_records, trained_twice
from .stats import LEAST_SEEDS, different, interval, tested
from .tables import count, in_seeds, layers_by_model, signed, span

# Each row of the field in words. n: layers of the model, N: of the deepest
NAMES = {
    **{label: LABELS[label] for label in (*FIXED, "planted", "blind", "frozen", "worth", "mor")},
    "act": "Universal Transformer with ACT",
    "ponder": "PonderNet",
    "exit": "Depth-Adaptive Transformer",
    "exit-confidence": "early exit by confidence",
    "mod": "Mixture-of-Depths",
    "mor-expert": "MoR of Bae et al., expert choice",
    "mor-token": "MoR of Bae et al., token choice",
    "mor-expert-cycle": "MoR of Bae et al., expert choice, all blocks shared",
    "mor-token-cycle": "MoR of Bae et al., token choice, all blocks shared",
    "mor-expert-sharing": "MoR of Bae et al., expert choice, keys shared",
    "mor-token-sharing": "MoR of Bae et al., token choice, keys shared",
    "lora": "relaxed recursive (LoRA by depth)",
    "lora-uptrained": "relaxed recursive, from a trained model",
    "sliced": "sliced recursive",
    "moe-top1": "mixture of experts, top 1",
    "moe-top2": "mixture of experts, top 2",
    "mor-moe": "MoR of Bae et al. with experts",
    "dr": "Dr.LLM, routers for a trained model",
}
CONTROLS = ("planted", "blind", "frozen")
# Who is no rival of fixed depth: the controls, and what trains on from a model of the table, and so has had
# more steps than all others
ASIDE = (*CONTROLS, "lora-uptrained")
# In these nothing learns who is deep
NO_CHOICE = (*FIXED, *CONTROLS, "lora", "lora-uptrained", "sliced", "moe-top1", "moe-top2")
EDGE = 0.01  # a layer has a choice where it runs a share of the tokens between this and all but this
SEEDS, MOST_SEEDS = 3, 6  # of each system; of fixed depth and of those that were best with the first three
BEST = (*FIXED, "worth", "mor-moe", "mor-expert", "mor-token")
BEST_ON_TEXT = (*FIXED, "moe-top1", "moe-top2", "mod", "mor")
BEST_OF = {"field": BEST, "field-text": BEST_ON_TEXT}  # of each experiment that has such
COST_NAMES = ("operations", "cache", "step", "decode", "r", "balance", "agreement")
APART = 0.3  # seeds whose rank correlations lie further apart are shown by their range
# On text, what experiment 1 trained long calls the fixed models of the field
ON_TEXT = {"fixed-shallow": "fixed-half", "fixed-at-E": "fixed-between", "fixed-deep": "fixed-deep"}
# How systems of a kind are drawn, and which they are
FAMILIES = {
    "token worth": (Look(BLUE, "*"), ("worth",)),
    "stops early": (Look(VERMILLION, "^"), ("act", "ponder", "exit", "exit-confidence")),
    "skips layers": (Look(GREEN, "s"), ("mor", "mod", "dr")),
    "MoR of Bae et al.": (Look(PINK, "D"), tuple(label for label in NAMES if label.startswith("mor-"))),
    "shared block, no choice": (Look(AMBER, "v"), ("lora", "lora-uptrained", "sliced")),
    "experts, no choice of depth": (Look(SKY, "P"), ("moe-top1", "moe-top2")),
    "plan and controls": (Look(GREY, "X"), CONTROLS),
}
# On the task of known depth and on text: what is right, and what depth may follow
RIGHT = ("hard answers right (%)", "accuracy (%)")
FOLLOWS = ("depth follows hops", "depth follows surprisal")


def stored_field(folder: Path | None = None) -> pd.DataFrame:
    """The records of the field that ship, on the task of known depth. Those of notebook 07 alone, which lie
    among them, are left out."""
    stored = stored_records("field", folder)
    return stored[stored["model"].isin(NAMES)] if len(stored) else stored


def stored_wide_field(folder: Path | None = None) -> pd.DataFrame:
    """The records of the field in the wide setting that ship, with notebook 07's of the same models."""
    own, known = stored_records("field-wide", folder), stored_records("known-depth", folder)
    if own.empty or known.empty:
        return own
    known = known[known["model"].isin(NAMES)].assign(experiment="field-wide")
    return pd.concat([known, own[~own["model"].isin(known["model"])]], ignore_index=True)


def stored_text_field(folder: Path | None = None) -> pd.DataFrame:
    """The records of the field on text that ship, with the fixed models of experiment 1 trained long."""
    own, fixed = stored_records("field-text", folder), stored_records("exp1-long", folder)
    if own.empty or fixed.empty:
        return own
    fixed = fixed[fixed["model"].isin(ON_TEXT)]
    fixed = fixed.assign(experiment="field-text", model=fixed["model"].replace(ON_TEXT))
    return pd.concat([fixed, own[~own["model"].isin(FIXED)]], ignore_index=True)


def is_text(records: pd.DataFrame) -> bool:
    """Whether records are of text. Those of a task know its answers."""
    return len(records) > 0 and "details" not in records.iloc[0]["record"]["metrics"]


# ---- Of one run ----


def chose_nothing(record: dict) -> bool:
    """Whether a router collapsed: on held-out lines each step runs all of the tokens asked, or none, and
    recurses with all or none."""
    rates = np.asarray(record["metrics"]["action_rates"])  # [N, R, 3]
    shares = np.stack([1 - rates[..., 0], rates[..., 2]])
    return not ((shares > EDGE) & (shares < 1 - EDGE)).any()


def collapsed(row: pd.Series) -> bool:
    """Whether a run's router, or its experts, chose nothing. Experts: as uneven as with half of them idle."""
    uneven = bool(row["balance"] >= 2)  # NaN where there are no experts
    return uneven or (row["model"] not in NO_CHOICE and chose_nothing(row["record"]))


def with_costs(records: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Records with what was measured of their models, by run, `right`, `way`, and `collapsed`.

    right: per cent of the hard answers, or of all tokens of a text. way: `way_of`. Operations that were not
    measured at a seed are those of the others.
    """
    if records.empty:
        return pd.DataFrame(columns=["model", "seed", "loss", *COST_NAMES, "right", "way", "collapsed"])
    own = costs.set_index("run")[list(COST_NAMES)].astype(float)
    own = own[~own.index.duplicated()]
    ids = records["record"].map(lambda record: record["id"])
    right = records["accuracy"] if is_text(records) else with_hops(records)["hops"]
    table = records.assign(right=right).join(own.reindex(ids).set_axis(records.index))
    table["operations"] = table.groupby("model")["operations"].transform(lambda own: own.fillna(own.mean()))
    table["way"] = way_of(records)
    table["collapsed"] = table.apply(collapsed, axis=1)
    return table


# ---- Tables ----


def names_of(records: pd.DataFrame) -> dict[str, str]:
    """Each label that records are of, in words; a fixed model by its number of layers."""
    layers = layers_by_model(records)
    return {label: NAMES.get(label, label).format(n=count(n)) for label, n in layers.items()}


def field_table(records: pd.DataFrame, costs: pd.DataFrame, seeds: int = MOST_SEEDS) -> pd.DataFrame:
    """One row a system that has records: means over seeds.

    way: per cent of the way from half of the layers to all, in loss. costs: of `suite.cost`, by run. seeds:
    how many there are to be at most; a row that is not among the best is to have three. Empty where nothing
    was measured.
    """
    names, scored, table = names_of(records), with_costs(records, costs), {}
    for label in rows_of(records):
        table[names[label]] = row_of(scored[scored["model"] == label], seeds)
    return pd.DataFrame.from_dict(table, orient="index").fillna("").rename_axis("system")


def row_of(own: pd.DataFrame, seeds: int) -> dict:
    """The row of one system from its records; seeds: how many the best are to have."""
    model, experiment = own.iloc[0][["model", "experiment"]]
    asked = seeds if model in BEST_OF.get(experiment, ()) else min(seeds, SEEDS)
    chooses = model not in NO_CHOICE or own["balance"].notna().any()
    mean, text = own.mean(numeric_only=True), is_text(own)
    cells = {
        "seeds": f"{len(own)} of {max(asked, len(own))}",
        "E": f"{mean['effective_depth']:.2f}",
        "loss (nats)": f"{mean['loss']:.3f}",
        RIGHT[text]: f"{mean['right']:.{2 if text else 0}f}",
        "way (%)": f"{mean['way'].round() + 0.0:.0f}",
        "parameters (thousands)": f"{mean['parameters'] / 1e3:.0f}",
        "operations a token (thousands)": f"{mean['operations'] / 1e3:.0f}",
        "training step (all layers: 1)": f"{mean['step']:.2f}",
        "decoding (all layers: 1)": f"{mean['decode']:.2f}",
        "cache (bytes a token)": f"{mean['cache']:.0f}",
        FOLLOWS[text]: "" if model in NO_CHOICE else followed(own["r"]),
        "collapsed": f"{own['collapsed'].sum()} of {len(own)}" if chooses else "",
    }
    return {name: "" if cell.endswith("nan") else cell.replace("-", "\u2212") for name, cell in cells.items()}


def followed(r: pd.Series) -> str:
    """Rank correlations r [seeds] in words: their mean, or the lowest and the highest where seeds
    differ in sign or lie more than APART from each other."""
    low, high = r.round(2).min(), r.round(2).max()
    differ = low * high < 0 or high - low > APART
    return span(low, high) if differ else signed(r.mean())


def answers_table(records: pd.DataFrame) -> pd.DataFrame:
    """Hard answers right (%) by the number of hops, and how deep the tokens of each kind are; no row without
    a record."""
    if records.empty:
        return pd.DataFrame({"seeds": []}).rename_axis("system")
    names, table = names_of(records), {}
    hops = by_hops(records)
    for label in rows_of(records):
        own = records[records["model"] == label]
        right = hops[hops["model"] == label].groupby("k")["accuracy"].mean()
        depth = pd.DataFrame([r["metrics"]["details"]["depth_by_kind"] for r in own["record"]]).mean()
        cells = {"seeds": len(own)} | {f"k = {k}": round(value) for k, value in right.items()}
        table[names[label]] = cells | {f"depth of {kind}": f"{value:.1f}" for kind, value in depth.items()}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("system")


def sampled_table(records: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Systems that train by top-k of a whole row: what deciding token by token changes.

    Means over seeds, losses in nats. predictor agrees: per cent of tokens and routed layers in
    which it says what top-k does; empty where there is none, or where it was not measured. costs:
    of `suite.cost`, by run.
    """
    scored, rows = with_costs(records, costs), {}
    for label in rows_of(records):
        if label == "mod" or label.startswith(("mor-expert", "mor-moe")):
            own = scored[scored["model"] == label]
            trained, agreed = pd.DataFrame(list(own["sampled"])).mean(), own["agreement"].mean()
            rows[NAMES[label]] = {
                "E by top-k": trained["effective_depth"].round(2),
                "E in use": own["effective_depth"].mean().round(2),
                "loss by top-k": trained["loss"].round(3),
                "loss in use": own["loss"].mean().round(3),
                "predictor agrees (%)": "" if np.isnan(agreed) else f"{agreed:.1f}",
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")


def trials_table(trials: pd.DataFrame, records: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every setting that was tried, on validation lines: the best of each system first.

    records: of the field, to say which of the settings its rows have.
    """
    rows = []
    used = [settings_of(record) for record in (records if records is not None else {}).get("record", ())]
    for record in trials["record"] if len(trials) else ():
        system, _, changed = record["model"].partition(", ")
        last = record["history"][-1]
        rows.append({
            "system": system, "setting": changed, "steps": last["step"], "seed": record["seed"],
            "validation loss (nats)": round(last["val_loss"], 3), "E": round(last["val_effective_depth"], 2),
            "in use": "yes" if settings_of(record) in used else "",
        })  # fmt: skip
    names = ["system", "setting", "steps", "seed", "validation loss (nats)", "E", "in use"]
    return pd.DataFrame(rows, columns=names).sort_values(["system", "validation loss (nats)"])


def settings_of(record: dict) -> tuple:
    """What a trial may change of a row: its model, with all options of its policy, and its learning rates."""
    model, train = record["config"]["model"], record["config"]["train"]
    options = POLICIES.get(model["routing"], Policy).OPTIONS | (model.get("options") or {})
    return model | dict(options=options), train["lr"], train["router_lr"]


# ---- The answer in words ----


def fixed_line(scored: pd.DataFrame, what: str = "loss", seed: int | None = None) -> tuple[np.ndarray, ...]:
    """Operations and loss (or `right`) of the fixed models, from the cheapest on: means over seeds, or those
    of one seed where it has two or more."""
    fixed = scored[scored["model"].isin(FIXED)]
    here = fixed[fixed["seed"] == seed]
    fixed = here if len(here) > 1 else fixed
    own = fixed.groupby("model")[["operations", what]].mean().dropna().sort_values("operations")
    return own["operations"].to_numpy(), own[what].to_numpy()


def gaps_to_fixed(scored: pd.DataFrame, label: str, what: str = "loss") -> np.ndarray:
    """By how much a system is ahead of the fixed models of its seed at its operations, each seed: in loss
    (nats), or in `right` (points). Below 0 it is behind.

    Between fixed models the line is straight, below the cheapest it is level. NaN where something is missing,
    and where the system costs more than any fixed model.
    """
    gaps = []
    for row in scored[scored["model"] == label].to_dict("records"):
        operations, values = fixed_line(scored, what, row["seed"])
        known = len(values) > 1 and row["operations"] <= 1.01 * operations[-1]
        gaps.append(row[what] - np.interp(row["operations"], operations, values) if known else np.nan)
    return np.array(gaps) if what == "right" else -np.array(gaps)


def is_ahead(gaps: np.ndarray) -> bool:
    """Whether a system's gaps to fixed depth [seeds] show that it is ahead: six seeds by their interval and a
    sign-flip test, fewer if each of them is ahead. One seed shows nothing."""
    if len(gaps) < LEAST_SEEDS:
        return len(gaps) > 1 and bool((gaps > 0).all())
    found = tested(gaps)
    return different(found) and found["mean"] > 0


def lead(gaps: np.ndarray) -> str:
    """A system's mean gap to fixed depth in nats; of six seeds with its interval."""
    told, reach = f"{signed(gaps.mean(), 3)} nats", span(*interval(gaps)[1:], 3)
    if len(gaps) >= LEAST_SEEDS and reach:
        told += f", 95 % interval {reach}"
    return f"{told}; {in_seeds(len(gaps))}"


def ahead_of_fixed(records: pd.DataFrame, costs: pd.DataFrame) -> tuple[dict, list[str], list[str]]:
    """The gaps to fixed depth [seeds] of each system whose costs are known, which of them are ahead, the
    furthest first, and which chose nothing: these are fixed models themselves, and have no gap."""
    scored = with_costs(records, costs)
    systems = [label for label in rows_of(records) if label not in (*FIXED, *ASIDE)]
    fallen = [label for label in systems if scored[scored["model"] == label]["collapsed"].any()]
    gaps = {label: gaps_to_fixed(scored, label) for label in systems if label not in fallen}
    known = {label: gap for label, gap in gaps.items() if not np.isnan(gap).any()}
    ahead = sorted((x for x in known if is_ahead(known[x])), key=lambda x: -known[x].mean())
    return known, ahead, fallen


def field_sentence(records: pd.DataFrame, costs: pd.DataFrame) -> str:
    """The answer of notebook 08 in plain words: who is ahead of fixed depth at equal operations."""
    known, ahead, fallen = ahead_of_fixed(records, costs)
    if not known:
        return "Not known yet: fixed models of two depths, and their costs, must be measured first."
    judged, told = {x: gaps for x, gaps in known.items() if len(gaps) > 1}, []
    shown = [x for x in ahead if len(known[x]) >= LEAST_SEEDS]
    if judged:
        many = count(len(shown)).capitalize() if shown else "None"
        lie = f"{'is' if len(shown) < 2 else 'are'} shown to lie"
        leads = "; ".join(f"{NAMES[x]} ({lead(known[x])})" for x in shown)
        systems = f"{count(len(judged))} system{'' if len(judged) == 1 else 's'}"
        told.append(
            f"{many} of {systems} {lie} below the line of fixed depth at equal operations, in loss"
            f"{f': {leads}' if shown else ''}."
        )
        if hints := [f"{NAMES[x]} ({lead(known[x])})" for x in ahead if x not in shown]:
            told.append(f"Ahead of it so far, at each of few seeds: {'; '.join(hints)}.")
        if not ahead:
            nearest = max(judged, key=lambda label: judged[label].mean())
            told.append(f"The nearest to it is {NAMES[nearest]} ({lead(judged[nearest])}).")
    if once := len(known) - len(judged):
        told.append(f"Of {count(once)} more there is one seed so far, which shows nothing.")
    if fallen:
        chose = "; ".join(NAMES[x] for x in fallen)
        told.append(f"Left out, since a router chose nothing at one seed or more: {chose}.")
    if unknown := [NAMES[x] for x in rows_of(records) if x not in (*FIXED, *ASIDE, *fallen, *known)]:
        why = "since its operations are not measured, or are above those of all layers"
        told.append(f"Left out, {why}: {'; '.join(unknown)}.")
    if "lora-uptrained" in set(records["model"]):
        told.append("Left out, since it has had more steps: relaxed recursion from a trained model.")
    return " ".join(told)


def stays_high_sentence(costs: pd.DataFrame, folder: Path | None = None) -> str:
    """By how much token worth is ahead of fixed depth at equal operations where the learning rate stays at
    its height for longer (`runs.wsd_runs`); nothing without such records and costs.

    costs: those of the field, whose models these are, too.
    """
    own, field = stored_records("known-depth-wsd", folder), stored_field(folder)
    if own.empty or field.empty:
        return ""
    operations = with_costs(field, costs).groupby("model")["operations"].mean()
    gaps = gaps_to_fixed(own.assign(operations=own["model"].map(operations)), "worth")
    if not len(gaps) or np.isnan(gaps).any():
        return ""
    started = "Where the learning rate stays high for longer, for fixed layers as well, token worth"
    return f"{started} {stands_too(gaps)} ({lead(gaps)})."


def second_lead_sentence(costs: pd.DataFrame, folder: Path | None = None) -> str:
    """By how much token worth is ahead of fixed depth where the second trainings of its seeds count in place
    of the first (`known_front.second_sentence`); nothing without such trainings and costs."""
    (_, again), scored = trained_twice(front_records(folder)), with_costs(stored_field(folder), costs)
    if again.empty or scored.empty:
        return ""
    second = scored["seed"].map(again.groupby("seed")["loss"].mean()).where(scored["model"] == "worth")
    gaps = gaps_to_fixed(scored.assign(loss=second.fillna(scored["loss"])), "worth")
    if not len(gaps) or np.isnan(gaps).any():
        return ""
    started = f"If the second trainings of {in_seeds(again['seed'].nunique())} count in place of the first"
    told = f"{lead(gaps)}, ahead at {count(int((gaps > 0).sum()))} of them"
    return f"{started}, token worth {stands_too(gaps)} ({told})."


def stands_too(gaps: np.ndarray) -> str:
    """Whether a system is ahead of fixed depth in one more setting, by its gaps [seeds]."""
    return "is ahead too" if is_ahead(gaps) else "is not shown to be ahead"


def short_field(known: pd.DataFrame, text: pd.DataFrame, costs: pd.DataFrame) -> str:
    """Who is ahead of fixed depth at equal operations on the task of known depth and on text, in a few words;
    nothing where one of them has no records."""
    told = []
    for records in (known, text):
        gaps, ahead, _ = ahead_of_fixed(records, costs)
        if not gaps:
            return ""
        told.append(" and ".join(f"{NAMES[x]} (ahead by {lead(gaps[x])[1:]})" for x in ahead) or "none")
    return f"Where depth is known to matter, {told[0]}; on text, {told[1]}."


def on_text_sentence(records: pd.DataFrame, costs: pd.DataFrame) -> str:
    """What records of the field on text show; nothing without fixed models of both depths."""
    losses = records.groupby("model")["loss"].mean().to_dict() if len(records) else {}
    if not {"fixed-half", "fixed-deep"} <= set(losses):
        return ""
    names, told = names_of(records), field_sentence(records, costs)
    worth = f"{losses['fixed-half'] - losses['fixed-deep']:.3f} nats"
    start = f"On text, where {names['fixed-deep']} are worth {worth} over {names['fixed-half']}: "
    scored, fallen = with_costs(records, costs), ahead_of_fixed(records, costs)[2]
    gaps = {label: gaps_to_fixed(scored, label, "right") for label in rows_of(records)}
    ahead = [NAMES[x] for x, gap in gaps.items() if x not in (*FIXED, *ASIDE, *fallen) and is_ahead(gap)]
    by_accuracy = f"By accuracy, those ahead of it are: {'; '.join(ahead) or 'none'}."
    return f"{start}{told[0].lower()}{told[1:]} {by_accuracy}"


def rows_of(records: pd.DataFrame) -> list[str]:
    """The labels that records are of, in the table's order."""
    return [label for label in NAMES if label in set(records.get("model", ()))]


def field_headline(costs: pd.DataFrame, folder: Path | None = None) -> None:
    """Show the answer of notebook 08 from the records that ship. costs: those that ship with them."""
    records = stored_field(folder)
    if records.empty:
        print("No stored record of the field ships with this copy: run the notebook to make some.")
        return
    first = records["record"].iloc[0]
    width, steps = first["config"]["model"]["d_model"], steps_of(first["config"])
    note = (
        f"Held-out lines of {first['data']['name']}, width {width}, {steps:,} steps. *way*: of the way from "
        "half of the layers to all, in loss. Token worth is held by hand to the depth that its plan needs."
    )
    table = field_table(records, costs)
    shown = ["seeds", "loss (nats)", "way (%)", "operations a token (thousands)"]
    text = stored_text_field(folder)
    answer, short = field_sentence(records, costs), without_intervals(short_field(records, text, costs))
    told = [second_lead_sentence(costs, folder), stays_high_sentence(costs, folder)]
    told += [on_text_sentence(text, costs), note]
    if short:
        told = [answer, *told]
        answer = f"Ahead of fixed layers at equal operations: {short[0].lower()}{short[1:]}"
    show(answer, table[shown], "\n\n".join(filter(None, told)))
    way_to_all_layers(records, costs)


def choices_table(records: pd.DataFrame, costs: pd.DataFrame, without=()) -> pd.DataFrame:
    """Which system to choose by what matters: of all that learn who is deep, and of those without a choice.

    Of equals it is the one of the lowest loss. Left out are the labels in `without`, those of ASIDE,
    of which the plan written down is one that nobody has on another task, routers that chose nothing
    at some seed, and rows of a single seed, which shows nothing.
    """
    columns = ["what matters", "system", "loss (nats)", "operations a token (thousands)"]
    scored = with_costs(records, costs)
    fallen = scored.groupby("model")["collapsed"].any()
    scored = scored[~scored["model"].isin([*ASIDE, *without, *fallen[fallen].index])]
    scored = scored[scored.groupby("model")["seed"].transform("size") > 1]
    if not {"fixed-half", "fixed-deep"} <= set(scored["model"]):
        return pd.DataFrame(columns=columns)
    names, means = names_of(scored), scored.groupby("model").mean(numeric_only=True)
    rows = []
    for question, (among, what) in questions_of(means).items():
        known = among.dropna(subset=[what])
        if len(known):
            best = known.sort_values([what, "loss"]).index[0]
            loss, operations = means.loc[best, ["loss", "operations"]]
            rows.append([question, names[best], f"{loss:.3f}", f"{operations / 1e3:.0f}"])
    return pd.DataFrame(rows, columns=columns)


def questions_of(means: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, str]]:
    """What may matter, by the means of each system: who is asked, and of what the least is best."""
    half, good = means.loc["fixed-half"], means[means["way"] >= 50]
    cheap = means[means["operations"] <= 1.2 * half["operations"]]
    small = means[means["parameters"] <= half["parameters"]]
    return {
        "the loss alone": (means, "loss"),
        "the loss, at the operations of half the layers or a fifth more": (cheap, "loss"),
        "the loss, on no more parameters than half the layers have": (small, "loss"),
        "operations, half of the way to all layers at least": (good, "operations"),
        "bytes of the cache, half of the way at least": (good, "cache"),
        "time to decode, half of the way at least": (good, "decode"),
    }


# ---- Figures ----


def field_look(label: str) -> Look:
    """How a system is drawn: fixed depth black, the others as their family is, in outline who is no rival."""
    look = next((look for look, own in FAMILIES.values() if label in own), Look(BLACK, "o"))
    return replace(look, filled=label not in ASIDE)


def loss_against_operations(records: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """Held-out loss against operations a token, of all systems and of those near the line of fixed depth.

    Each system has a number, beside its mark and in the legend; a bar goes from its lowest seed to its
    highest.
    """
    figure_style()
    figure, (whole, near) = plt.subplots(1, 2, figsize=(10, 6.4))
    scored = with_costs(records, costs).dropna(subset=["operations"])
    operations, loss = fixed_line(scored)
    for ax in (whole, near):
        ax.plot(operations / 1e3, loss, color=BLACK, linewidth=1, marker="o", label="fixed depth")
        ax.set(xlabel="operations of a forward pass, a token (thousands)")
    marks = draw_systems((whole, near), scored)
    whole.set(ylabel="held-out loss (nats a token)", title="all")
    near.set(title="near the line of fixed depth")
    if len(loss):
        near.set_ylim(near.get_ylim()[0], loss[0] + 0.75 * (loss[0] - loss[-1]))
    figure.legend(*whole.get_legend_handles_labels(), ncols=3, loc="outside lower center", fontsize=8)
    for ax in (whole, near):
        low, high = ax.get_ylim()
        shown = {number: mark for number, mark in marks.items() if low <= mark[1] <= high}
        number_marks(ax, shown, list(zip(operations / 1e3, loss)))
    return figure


def draw_systems(axes: Sequence[Axes], scored: pd.DataFrame) -> dict[int, tuple]:
    """Draw the means and ranges of seeds of all systems into each panel; the marks, by their numbers."""
    names, marks = names_of(scored), {}
    for label in rows_of(scored):
        own, look = scored[scored["model"] == label], field_look(label)
        cost, mean = own["operations"].mean() / 1e3, own["loss"].mean()
        if label not in FIXED:
            marks[len(marks) + 1] = (cost, mean)
        for ax in axes:
            ax.vlines(cost, own["loss"].min(), own["loss"].max(), color=look.colour, linewidth=1, alpha=0.4)
            if label not in FIXED:
                named = f"{len(marks)}  {names[label]}"
                ax.plot(cost, mean, linestyle="", markersize=7, label=named, **marker_of(look))
    return marks


def number_marks(ax: Axes, marks: dict[int, tuple], others: list[tuple]) -> None:
    """Write the numbers beside marks, each on the side where it is farthest from other marks, numbers too."""
    ax.figure.draw_without_rendering()  # the layout is known from here on
    taken = [ax.transData.transform(mark) for mark in [*marks.values(), *others]]
    away = 9 * ax.figure.dpi / 72  # pixels
    sides = [away * np.array([np.cos(angle), np.sin(angle)]) for angle in np.arange(8) * np.pi / 4]
    for number, mark in marks.items():
        here = ax.transData.transform(mark)
        rest = [place for place in taken if not np.array_equal(place, here)]
        best = max(
            sides, key=lambda side: min((np.hypot(*(here + side - place)) for place in rest), default=0)
        )
        taken.append(here + best)
        ax.annotate(str(number), mark, best * 72 / ax.figure.dpi, textcoords="offset points", fontsize=8,
                    ha="center", va="center")  # fmt: skip


def way_to_all_layers(records: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """How far each system is from half of the layers to all, in loss: mean over seeds, and each seed."""
    figure_style()
    scored = with_costs(records, costs).dropna(subset=["way"])
    means = scored.groupby("model")["way"].mean().sort_values()
    names = names_of(records)
    figure, ax = plt.subplots(figsize=(8.5, 1.4 + 0.28 * len(means)))
    for place, label in enumerate(means.index):
        own, look = scored[scored["model"] == label]["way"], field_look(label)
        ax.scatter(own, np.full(len(own), place), s=9, alpha=0.5, color=look.colour)
        ax.plot(means[label], place, linestyle="", markersize=8, **marker_of(look))
    for level, name in ((0, "half of\nthe layers"), (100, "all\nlayers")):
        ax.axvline(level, color=GREY, linewidth=1, linestyle=":")
        ax.text(level, len(means) - 0.3, name, ha="center", va="bottom", fontsize=8, color=GREY)
    for family, (_, own) in FAMILIES.items():
        if drawn := [label for label in own if label in means.index]:
            ax.plot([], [], linestyle="", label=family, **marker_of(field_look(drawn[0])))
    ax.set_yticks(range(len(means)), [names.get(label, label) for label in means.index])
    ax.set(xlabel="way from half of the layers to all, in loss (%); small dots are seeds")
    ax.tick_params(axis="y", length=0)
    legend_of(figure, ax, columns=4)
    return figure
