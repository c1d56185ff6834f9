"""Accuracy against depth on the task of known depth: fixed models, and token worth trained for each depth."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..runs import stored_records
from .figures import BLACK, Look, figure_style, legend_of, marker_of
from .known_depth import DRAWN, narrow_records, points_of, shares, with_hops
from .stats import compare
from .tables import count

FRONT_LINES = {  # of models that differ in depth only
    "fixed": "fixed depth",
    "worth": "token worth",
    "planted": "the plan written down",
    "mor": "MoR of notebook 02",
    "mor-spread": "MoR, choice in all layers but one",
    "blind": "blind, whole tokens",
}
LOOKS = DRAWN | {"fixed": Look(BLACK, "o", "--", False)}


def front_records(folder: Path | None = None) -> pd.DataFrame:
    """The records that ship of `runs.front_runs`, and those of the narrow setting, with `line` and `hops`.

    line: a key of FRONT_LINES. hops: accuracy (%) at the hard answers of the upper half of k.
    """
    own, narrow = stored_records("front", folder), narrow_records(folder)
    if own.empty or narrow.empty:
        return pd.DataFrame()
    both = with_hops(pd.concat([own, narrow[narrow["model"] != "fixed-half-long"]], ignore_index=True))
    both["line"] = both["model"].where(
        both["model"].isin(FRONT_LINES), both["model"].str.split("[ -]").str[0]
    )
    both["asked"] = [asked_depth(record["config"]["model"]) for record in both["record"]]
    return both[both["line"].isin(FRONT_LINES)]


def asked_depth(model: dict) -> float:
    """The depth that a configuration asks for; of a fixed model its layers."""
    return model["n_layers"] if model["target_depth"] is None else model["target_depth"]


def known_front_table(front: pd.DataFrame) -> pd.DataFrame:
    """One row a model and depth asked for: seeds, E, loss, hard answers right in the upper half of k (%)."""
    groups = front.groupby(["line", "asked"])
    table = pd.DataFrame({"seeds": groups.size(), "E": groups["effective_depth"].mean().round(2)})
    table["loss (nats)"] = groups["loss"].mean().round(3)
    table["right (%)"] = groups["hops"].apply(shares)
    table = table.reset_index("asked", drop=True)
    order = [line for line in FRONT_LINES if line in table.index]
    return table.loc[order].rename(index=FRONT_LINES).rename_axis("model")


def other_depths_sentence(front: pd.DataFrame) -> str:
    """What token worth reaches where it is trained for other depths, each beside the fixed model that is next
    to it in depth; nothing without such records."""
    own = front[front["model"].str.startswith("worth ")] if len(front) else front
    if own.empty:
        return ""
    fixed, told = front[front["line"] == "fixed"], []
    for E, hops in own.groupby("asked")["hops"]:
        layers = fixed[fixed["asked"] == round(E)]["hops"]
        beside = f" ({count(round(E))} layers {layers.mean():.0f} %)" if len(layers) else ""
        told.append(f"{shares(hops)} % at E {E:g}{beside}")
    return f"Trained for other depths it answers {', '.join(told)}."


def plan_sentence(front: pd.DataFrame) -> str:
    """The plan written down against all layers for everyone."""
    own = front[front["model"].isin(["planted", "fixed-deep"])]
    c = compare(own, "planted", "fixed-deep", metric="hops")
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
