"""The price as a dial: one trained model, held to other depths than its own, on the task of known depth.

With less depth than all its questions need, a router shows what it takes for hard: who is run first.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

import morlib

from ..runs import Run, trained_model
from .figures import figure_style
from .known_depth import LABELS, SOLVED
from .stats import LEAST_SEEDS, interval, spearman
from .tables import in_seeds, signed, span, stored_table

# Tables that ship: of `measure_dial` in the wide setting, the narrow one and with twelve layers, and on text
DIAL, NARROW_DIAL = "known_depth_dial.json", "known_depth_dial_narrow.json"
DEEP_DIAL, TEXT_DIAL = "known_depth_dial_deep.json", "text_dial.json"
SHARES = (0.1, 0.2, 0.28, 0.34, 0.38, 0.42, 0.6)


def measure_dial(specs: list[Run], depths: tuple[float, ...] | None = None) -> pd.DataFrame:
    """One row a run and depth asked for, on held-out text: E, loss, accuracy (%); on the task of known depth
    also `by_hops`, and the rank correlation `r` of depth with k.

    The price, or MoR's thresholds, are set on validation text. Runs that are not finished are trained.
    depths: by default those at which SHARES of the tokens run more than the first layer.
    """
    rows = []
    for spec in specs:
        model, record, task = trained_model(spec)
        windows = task.windows("heldout", model.cfg.max_len)
        for target in depths or [round(1 + share * (model.cfg.n_layers - 1), 2) for share in SHARES]:
            seen = morlib.score(morlib.at_depth(model, task, target), windows)
            found = morlib.metrics(seen)
            row = dict(run=record["id"], model=spec.model, seed=spec.train.seed, target=target)
            row |= {name: found[name] for name in ("loss", "accuracy", "effective_depth")}
            if hasattr(task, "answers"):
                row |= dict(r=follows(seen, windows, task), by_hops=task.by_hops(seen, windows))
            rows.append(row)
    return pd.DataFrame(rows)


def text_dial_table(table: pd.DataFrame, records: pd.DataFrame) -> pd.DataFrame:
    """A row a depth asked for: mean E and accuracy (%) of each model held to it, and that of models trained
    with as many fixed layers, where records have them."""
    groups = table.groupby(["target", "model"])
    shown = {}
    for model in table["model"].unique():
        own, name = groups[["effective_depth", "accuracy"]].mean().xs(model, level="model"), LABELS[model]
        shown[f"{name}: E"] = own["effective_depth"]
        shown[f"{name} (%)"] = own["accuracy"]
    fixed = records[records["model"].isin(["fixed-shallow", "fixed-at-E", "fixed-deep"])]
    by_layers = fixed.groupby(fixed["effective_depth"].round())["accuracy"].mean()
    shown["as many fixed layers (%)"] = by_layers.reindex(table["target"].unique())
    table = pd.DataFrame(shown).rename_axis("depth asked for")
    return table.map(lambda value: "" if np.isnan(value) else f"{value:.2f}")


def follows(seen: dict[str, Tensor], lines: Tensor, task) -> float:
    """Rank correlation (Spearman) of depth at x with the k that is asked for, over the hard answers.

    0 where all are equally deep.
    """
    asked, places = task.answers(lines), task.places(lines.shape[1] - 1)
    k, depth = asked["k"][asked["hard"]].numpy(), seen["depth"][:, places][asked["hard"]].numpy()
    return spearman(k, depth)


def at_own_depth(records: list[dict]) -> np.ndarray:
    """The rank correlations of depth with k that ship, of these runs at the depth that each was trained for,
    as far as a dial was measured on them."""
    asked = {record["id"]: record["config"]["model"]["target_depth"] for record in records}
    tables = pd.concat([stored_table(name) for name in (DIAL, NARROW_DIAL, DEEP_DIAL)])
    rows = tables.to_dict("records")
    return np.array([row["r"] for row in rows if row["target"] == asked.get(row["run"])])


def by_target(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """Means over seeds of `accuracy` (hard answers, %) or `depth` (at their x): rows targets, columns k."""
    rows = [
        dict(target=row["target"], k=of_k["k"], value=of_k[what])
        for row in table.to_dict("records")
        for of_k in row["by_hops"]
    ]
    return pd.DataFrame(rows).pivot_table(index="target", columns="k", values="value")


def dial_table(table: pd.DataFrame) -> pd.DataFrame:
    """A row a depth asked for: E, loss, hard answers right at the worst k (%), seeds that solve every k,
    depth at x of each k, and the correlation of depth with k."""
    table = table.assign(worst=[min(row["accuracy"] for row in by_hops) for by_hops in table["by_hops"]])
    groups = table.groupby("target")
    shown = pd.DataFrame({"seeds": groups.size(), "E": groups["effective_depth"].mean().round(2)})
    shown["loss (nats)"] = groups["loss"].mean().round(3)
    shown["worst k (%)"] = groups["worst"].mean().round().astype(int)
    solved = (table["worst"] >= SOLVED).groupby(table["target"]).sum()
    shown["solved"] = solved.astype(str) + " of " + groups.size().astype(str)
    for k, depth in by_target(table, "depth").items():
        shown[f"depth at k = {k}"] = depth.round(1)
    shown["rank correlation with k"] = groups["r"].mean().round(2)
    return shown.rename_axis("depth asked for")


def dial_sentence(table: pd.DataFrame) -> str:
    """Whether depth follows difficulty: at the depth asked for at which x is nearest to half of its depth,
    at the one with the lowest loss, and at the one below that. Nothing for an empty table."""
    if table.empty:
        return ""
    depth, loss = by_target(table, "depth"), table.groupby("target")["loss"].mean()
    target, best = (depth.mean(axis=1) - (1 + depth.max(axis=None)) / 2).abs().idxmin(), loss.idxmin()
    r = {at: table[table["target"] == at]["r"] for at in (target, best)}
    mean, low, high = interval(r[target])
    so_far = len(r[target]) < LEAST_SEEDS and mean > 0
    found = "harder questions get more of it" + (", so far" if so_far else "")
    start = found if low > 0 or so_far else "it is not shown that harder questions get more of it"
    seeds = in_seeds(len(r[target]))
    if reach := span(low, high):
        seeds = f"95 % interval {reach}; {seeds}"
    held = "Held to less depth after training (the wide setting of notebook 07)"
    told = f"rank correlation of depth with the number of hops {signed(mean, 2)} ({seeds})"
    at_best = f"the correlation is {signed(r[best].mean(), 2)}"
    below = max((at for at in loss.index if at < best), default=target)
    near = table[table["target"] == below]["r"]
    reach = f", 95 % interval {reach}" if (reach := span(*interval(near)[1:])) else ""
    return (
        f"{held}, {start}: at E {target:g}, {told}, though with a loss of {loss[target]:.2f} nats. "
        f"At E {below:g} it is {signed(near.mean(), 2)} (a loss of {loss[below]:.2f}{reach}). "
        f"At E {best:g}, where the loss is lowest ({loss[best]:.2f}), {at_best}."
    )


def draw_dial(table: pd.DataFrame) -> Figure:
    """Accuracy at the hard answers, and depth at their x, by k: a line for each depth asked for."""
    figure_style()
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), sharex=True)
    for ax, what in zip(axes, ("accuracy", "depth")):
        values = by_target(table, what)
        for index, (target, row) in enumerate(values.iterrows()):
            colour = plt.get_cmap("viridis_r")(0.1 + 0.9 * index / max(len(values) - 1, 1))
            ax.plot(
                row.index, row, color=colour, marker="o", markersize=4, linestyle="-", label=f"{target:g}"
            )
        ax.set_xlabel("hops k that the question asks for")
    axes[0].set(ylabel="hard answers right (%)", ylim=(-3, 103), title="What is answered")
    axes[1].set(ylabel="depth at x (applications)", ylim=(0, None), title="Who is deep")
    axes[1].legend(title="E asked for", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
