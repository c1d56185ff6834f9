"""Accuracy against depth on the task of known depth: fixed models, and token worth trained for each depth."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..files import REFERENCE
from ..runs import stored_records
from .dial import NARROW_DIAL
from .figures import BLACK, BLUE, GREEN, Look, figure_style, legend_of, marker_of
from .known_depth import (
    DRAWN,
    FIXED,
    compare_hops,
    names_of,
    narrow_records,
    points_of,
    shares,
    upper_half,
    with_hops,
)
from .stats import interval, judged, spearman
from .tables import count, in_seeds, stored_table

FRONT_LINES = {  # of models that differ in depth only
    "fixed": "fixed depth",
    "worth": "token worth, trained for each depth",
    "worth-shallow": "token worth in three layers",
    "held": "token worth, one model held to each",
    "planted": "the plan written down",
    "mor": "MoR of notebook 02",
    "mor-spread": "MoR, choice in all layers but one",
    "blind": "blind, whole tokens",
}
LOOKS = DRAWN | {
    "fixed": Look(BLACK, "o", "--", False),
    "worth-shallow": Look(BLUE, "D", "-.", False),
    "held": Look(GREEN, "s", ":", False),
}


def front_records(folder: Path | None = None) -> pd.DataFrame:
    """The records that ship of `runs.front_runs`, and those of the narrow setting, with `line` and `hops`.

    line: a key of FRONT_LINES. hops: accuracy (%) at the hard answers of the upper half of k.
    """
    own, narrow = stored_records("front", folder), narrow_records(folder)
    if own.empty or narrow.empty:
        return pd.DataFrame()
    narrow = narrow[narrow["model"].isin({*FRONT_LINES, *FIXED})]
    both = with_hops(pd.concat([own, narrow], ignore_index=True))
    both["line"] = both["model"].where(
        both["model"].isin(FRONT_LINES), both["model"].str.split("[ -]").str[0]
    )
    both["asked"] = [asked_depth(record["config"]["model"]) for record in both["record"]]
    return pd.concat([both[both["line"].isin(FRONT_LINES)], held_rows(folder)], ignore_index=True)


def wide_front_records(folder: Path | None = None) -> pd.DataFrame:
    """The records that ship of `runs.wide_front_runs`, and at their seeds those of fixed models, of the plan
    and of token worth in the same setting; none as long as token worth with fewer layers has none."""
    own = stored_records("front-wide", folder)
    others = pd.concat([stored_records(name, folder) for name in ("known-depth", "field-wide")])
    if "worth-shallow" not in set(own.get("model", ())) or others.empty:
        return own.head(0)
    chosen = others["model"].isin({*FIXED, "planted", "worth"}) & others["seed"].isin(own["seed"])
    return pd.concat([own, others[chosen].assign(experiment="front-wide")], ignore_index=True)


def held_rows(folder: Path | None = None) -> pd.DataFrame:
    """The table that ships of the dial in the narrow setting, as rows of `front_records`, without records."""
    table = stored_table(NARROW_DIAL, folder or REFERENCE)
    if table.empty:
        return table
    return table.assign(
        model="held", line="held", asked=table["target"], hops=table["by_hops"].map(upper_half)
    )[["model", "line", "asked", "hops", "seed", "loss", "effective_depth"]]


def asked_depth(model: dict) -> float:
    """The depth a configuration asks for: of a fixed model its layers, of a plan those of deep tokens."""
    if model["target_depth"] is not None:
        return model["target_depth"]
    return (model.get("options") or {}).get("layers") or model["n_layers"]


def known_front_table(front: pd.DataFrame) -> pd.DataFrame:
    """One row a model and depth asked for: seeds, E, loss, hard answers right in the upper half of k (%)."""
    groups = front.groupby(["line", "asked"])
    table = pd.DataFrame({"seeds": groups.size(), "E": groups["effective_depth"].mean().round(2)})
    table["loss (nats)"] = groups["loss"].mean().round(3)
    table["right (%)"] = groups["hops"].apply(shares)
    table = table.reset_index("asked", drop=True)
    order = [line for line in FRONT_LINES if line in table.index]
    return table.loc[order].rename(index=FRONT_LINES).rename_axis("model")


def who_is_deep(front: pd.DataFrame) -> pd.DataFrame:
    """Of token worth a row a depth asked for and seed: the mean depth at x of the hard questions of each k,
    in brackets how many of these are answered (%), and the rank correlation of these depths with k."""
    rows = []
    if front.empty:
        return front
    for own in front[front["line"] == "worth"].sort_values(["asked", "seed"]).to_dict("records"):
        by_hops = own["record"]["metrics"]["details"]["by_hops"]
        row = {"depth asked for": own["asked"], "seed": own["seed"]}
        row |= {f"k = {of['k']}": f"{of['depth']:.1f} ({of['accuracy']:.0f})" for of in by_hops}
        rows.append(row | {"rank correlation with k": round(rank_with_k(by_hops), 2)})
    return pd.DataFrame(rows).set_index(["depth asked for", "seed"]) if rows else pd.DataFrame()


def rank_with_k(by_hops: list[dict]) -> float:
    """Rank correlation (Spearman) of the mean depth at x with k, over the rows of `Drawn.by_hops`."""
    return spearman(*zip(*((of["k"], of["depth"]) for of in by_hops)))


def less_depth_sentence(front: pd.DataFrame) -> str:
    """Which questions token worth runs deep where it is trained for less depth than the plan takes; nothing
    without such records."""
    plan = front[front["model"] == "planted"]["effective_depth"].mean() if len(front) else None
    own = front[(front["line"] == "worth") & (front["asked"] < plan)] if len(front) else front
    if own.empty:
        return ""
    asked = own["asked"].max()  # the nearest to the plan
    by_hops = [r["metrics"]["details"]["by_hops"] for r in own[own["asked"] == asked]["record"]]
    r = [rank_with_k(rows) for rows in by_hops]
    verb = "fall" if max(r) < 0 else "rise" if min(r) > 0 else "neither rise nor fall"
    deep, shallow = (pd.Series([rows[i]["depth"] for rows in by_hops]).mean() for i in (0, -1))
    last = by_hops[0][-1]["k"]
    return (
        f"Trained for E {asked:g}, less than the plan written down takes, depths {verb} with the number of "
        f"hops: x runs {shallow:.1f} layers on average in questions of {count(last)} hops, and {deep:.1f} in "
        f"questions of one ({in_seeds(len(r))})."
    )


def trained_twice(front: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Token worth at the depth that it is trained for: its seeds, and those that were trained a second time,
    for the dial. On another machine a seed is another training."""
    if front.empty:
        return front, front
    first = front[front["model"] == "worth"]
    return first, front[(front["model"] == "held") & front["asked"].isin(first["asked"])]


def again_sentence(front: pd.DataFrame) -> str:
    """What seeds of token worth reach that were trained a second time; nothing without them."""
    first, again = trained_twice(front)
    if again.empty:
        return ""
    both = again.merge(first, on="seed", suffixes=("", "_first")).sort_values("seed")
    told = {name: ", ".join(f"{hops:.0f}" for hops in both[name]) for name in ("hops", "hops_first")}
    return (
        f"Trained again, {in_seeds(len(both))} of token worth reach {told['hops']} % in place of "
        f"{told['hops_first']} %."
    )


def weakest_sentence(front: pd.DataFrame) -> str:
    """What the weakest of all trainings of token worth reaches; nothing where none was repeated."""
    first, again = trained_twice(front)
    if again.empty:
        return ""
    hops = [*first["hops"], *again["hops"]]
    return f"Of {count(len(hops))} trainings of token worth the weakest answers {min(hops):.0f} %."


def second_sentence(front: pd.DataFrame, narrow: pd.DataFrame) -> str:
    """What token worth reaches, and which of its leads over fixed models are still shown, where the second
    trainings of its seeds count, and where the mean of both does; nothing without them.

    narrow: `narrow_records`, whose seeds these are.
    """
    _, again = trained_twice(front)
    scored = with_hops(narrow) if len(narrow) else narrow
    if again.empty or not {"worth", *FIXED} <= set(scored.get("model", ())):
        return ""
    names, second = names_of(scored), again.groupby("seed")["hops"].mean()
    others = [label for label in ("fixed-half", "fixed-half-long", *FIXED[1:]) if label in names]
    led = [x for x in others if judged(compare_hops(scored, "worth", x)) == "better"]
    here, told = scored["model"] == "worth", []
    for part in (1.0, 0.5):
        first = scored["hops"].where(here)
        counted = first + part * (scored["seed"].map(second) - first).fillna(0)
        table = scored.assign(hops=counted.fillna(scored["hops"]))
        mean, low, high = interval(table[here]["hops"])
        lost = [
            names[x].replace(", ", " in ") for x in led if judged(compare_hops(table, "worth", x)) != "better"
        ]
        leads = f"no lead over {' and '.join(lost)} is shown" if lost else "each lead stands"
        told.append(f"{mean:.0f} % (95 % interval {low:.0f} to {min(high, 100):.0f}), and {leads}")
    return (
        f"If the second trainings of {in_seeds(len(second))} count in place of the first, token worth "
        f"answers {told[0]}; by the mean of both it answers {told[1]}."
    )


def plan_sentence(front: pd.DataFrame) -> str:
    """The plan written down against all layers for everyone."""
    own = front[front["model"].isin(["planted", "fixed-deep"])]
    c = compare_hops(own, "planted", "fixed-deep")
    layers = max(record["config"]["model"]["n_layers"] for record in own["record"])
    return f"The plan written down against {count(layers)} layers for all tokens: {points_of(c)}."


def draw_known_front(front: pd.DataFrame) -> Figure:
    """Hard answers right against effective depth. Lines join means, dots are seeds."""
    figure_style()
    figure, ax = plt.subplots(figsize=(8, 4.2))
    lines = [line for line in FRONT_LINES if line in set(front["line"])]
    for line in lines:
        own, look = front[front["line"] == line], LOOKS[line]
        mean = own.groupby("asked")[["effective_depth", "hops"]].mean()
        style = dict(linestyle=look.line, label=FRONT_LINES[line], **marker_of(look))
        ax.plot(mean["effective_depth"], mean["hops"], **style)
        ax.scatter(own["effective_depth"], own["hops"], s=8, alpha=0.4, color=look.colour)
    ax.set(
        xlabel="effective depth E (applications a token)", ylabel="hard answers right, upper half of k (%)"
    )
    ax.set_ylim(-3, 103)
    legend_of(figure, ax)
    return figure
