"""Figures of routing, from the tables of `findings`. Forest plots and heat maps are those of `results`."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import morlib

from ..results import figure_style, forest, heat_map
from ..results.figures import AMBER, BLUE, GREY, SKY, Look, legend_of, look_of, marker_of, stacked_bars
from .difficulty import DIFFICULTY, MEASURES
from .findings import over_seeds

ROUTERS = {"mor": "MoR", "frozen": "untrained router", "random": "blind routing"}
CONTROLS = {
    "raw": "raw",
    "given": "given frequency and position",
    "same": "given the token and position",
}
SHORT = dict(zip(DIFFICULTY, ("surprisal", "entropy", "trigram surprisal", "surprisal just read")))
SHARES = {
    "layer": (BLUE, ""),
    "position": (AMBER, "xx"),
    "token read": (SKY, "//"),
    "rest": ("#D9D9D9", ""),
}


# ---- Depth and actions by difficulty ----


def line(ax: Axes, table: pd.DataFrame, column: str, look: Look, label: str) -> None:
    """A column's mean over seeds, with its interval where there is one, over the groups of a measure."""
    means = over_seeds(table, ["group", "middle"], column).reset_index()
    means = means.sort_values("middle")
    style = marker_of(look) | dict(markersize=4.5, label=label)
    ax.plot(means["middle"], means["mean"], linestyle=look.line, **style)
    ax.vlines(means["middle"], means["low"], means["high"], color=look.colour, linewidth=1.2)


def depth_by_tenth(rates: pd.DataFrame) -> Figure:
    """Mean depth in each tenth of entropy, a panel a text, a line a router, with intervals over seeds."""
    figure_style()
    texts = list(rates["text"].unique())
    size = (1.6 + 3.6 * len(texts), 3.6)
    figure, axes = plt.subplots(1, len(texts), figsize=size, sharey=True, squeeze=False)
    for ax, text in zip(axes[0], texts):
        of_text = rates[(rates["text"] == text) & (rates["measure"] == "entropy")]
        for index, (model, name) in enumerate(ROUTERS.items()):
            own = of_text[of_text["model"] == model]
            beside = own.assign(middle=own["group"] + 1 + 0.12 * (index - 1))  # so that intervals stay apart
            line(ax, beside, "depth", look_of(model), name)
        tenths = of_text["group"].max() + 1
        xlabel = "tenth of the tokens by entropy (1: easiest)"
        ax.set(title=text, xlabel=xlabel, xticks=range(1, tenths + 1))
    axes[0, 0].set_ylabel("mean depth\n(applications a token)")
    legend_of(figure, axes[0, 0], 3)
    return figure


def depth_panels(rates: pd.DataFrame, text: str) -> Figure:
    """Mean depth of each router by each measure, a panel a measure; that of kinds has a scale of its own."""
    figure_style()
    figure, axes = plt.subplots(2, 4, figsize=(12, 6))
    of_text = rates[rates["text"] == text]
    for ax in axes.flat[1:-1]:  # the last one is that of kinds
        ax.sharey(axes[0, 0])
    for ax, (measure, label) in zip(axes.flat, MEASURES.items()):
        own = of_text[of_text["measure"] == measure]
        if measure == "kind":
            kind_panel(ax, own)
        else:
            for model, name in ROUTERS.items():
                line(ax, own[own["model"] == model], "depth", look_of(model), name)
        if measure == "frequency":
            ax.set_xscale("log")
        ax.set_xlabel(label)
    for ax in axes[:, 0]:
        ax.set_ylabel("mean depth (applications)")
    figure.suptitle(f"{text}, held-out text", fontsize=11, x=0.02, ha="left")
    legend_of(figure, axes[0, 0], 3)
    return figure


def kind_panel(ax: Axes, rates: pd.DataFrame) -> None:
    """The same by kind of token, from the shallowest kind to the deepest by the trained router."""
    kinds = rates[rates["model"] == "mor"].groupby("group")["depth"].mean().sort_values().index
    for index, (model, name) in enumerate(ROUTERS.items()):
        means = over_seeds(rates[rates["model"] == model], ["group"], "depth").loc[kinds]
        x = np.arange(len(kinds)) + 0.16 * (index - 1)  # so that intervals stay apart
        style = marker_of(look_of(model)) | dict(markersize=4.5, label=name)
        ax.plot(x, means["mean"], linestyle="none", **style)
        ax.vlines(x, means["low"], means["high"], color=look_of(model).colour, linewidth=1.2)
    ax.set_xticks(range(len(kinds)), kinds, rotation=50, ha="right", rotation_mode="anchor")


# ---- Is it real, does it help ----


def correlation_forest(correlations: pd.DataFrame) -> Figure:
    """Rank correlation of depth with each difficulty under each control, a panel a text, a point a
    router."""
    table = over_seeds(correlations, ["text", "measure", "control", "model"], "r").reset_index()
    table["row"] = table["measure"].map(SHORT) + ", " + table["control"].map(CONTROLS)
    return forest(in_order(table), "row", unit="rank correlation with depth", names=ROUTERS, panels="text")


def change_forest(changes: pd.DataFrame) -> Figure:
    """What overruling a router does to the loss, a panel a text, a point a router."""
    table = over_seeds(changes, ["text", "intervention", "model"], "there").reset_index()
    table["intervention"] = table["intervention"].map(short)
    unit = "change in loss there (nats)"
    return forest(in_order(table), "intervention", unit=unit, names=ROUTERS, panels="text")


def short(intervention: str) -> str:
    """An intervention in fewer words."""
    return intervention.replace("skips every layer that can be skipped", "skips wherever it can")


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the routers in their usual order, and all else in its own."""
    order = {model: place for place, model in enumerate(ROUTERS)}
    return table.sort_values("model", key=lambda models: models.map(order), kind="stable")


def stacked_variance(variance: pd.DataFrame) -> Figure:
    """Shares of the variance of decisions that each factor explains, a bar a text and router."""
    means = variance.groupby(["text", "model"], sort=False)[list(SHARES)].mean().clip(lower=0)
    means.index = [f"{text}, {ROUTERS[model]}" for text, model in means.index]
    means = means.rename(columns={"rest": "context, or chance"})
    return stacked_bars(means, SHARES.values(), "share of the variance of decisions (%)")


def formation_lines(formation: pd.DataFrame) -> Figure:
    """How much deeper the hardest tenth by entropy is than the easiest through training, a line a seed."""
    figure_style()
    figure, ax = plt.subplots(figsize=(7.5, 3.5))
    last = formation["group"].max()
    for index, (seed, own) in enumerate(formation.groupby("seed")):
        depth = own.pivot_table("depth", "step", "group")
        look, gap = look_of("seed", index), depth[last] - depth[0]
        ax.plot(gap.index, gap, linestyle=look.line, label=f"seed {seed}", **marker_of(look))
    ax.axhline(0, color=GREY, linewidth=1, zorder=0)
    ax.set(xlabel="training step", ylabel="depth, hardest less easiest tenth")
    ax.set_title(formation["text"].iloc[0])
    ax.set_xticks(sorted(formation["step"].unique()))
    legend_of(figure, ax)
    return figure


# ---- See it ----


def layers_by_actions(layers: pd.DataFrame) -> Figure:
    """First decisions of MoR (% of the tokens), mean over seeds: a row a text and action, a column a
    layer."""
    means = layers.groupby(["text", "layer"], sort=False)[list(morlib.ACTIONS)].mean().stack()
    table = means.unstack("layer")
    order = [(text, action) for text in layers["text"].unique() for action in morlib.ACTIONS]
    table = table.loc[order]
    table.index = [f"{text}: {action}" for text, action in order]
    figure = heat_map(table, "First decisions of MoR at each layer (% of the tokens)", low=0, high=100)
    figure.axes[0].set_xlabel("layer")
    return figure


def tokens_by_layers(passages: list[dict], rows: int = 32) -> Figure:
    """How often each layer ran each of a passage's first tokens; a row is named by the token that was
    read."""
    figure_style()
    most = passages[0]["recursions"]
    shades = ListedColormap([plt.cm.Blues(0.04 + 0.86 * runs / most) for runs in range(most + 1)])
    size = (1.5 + 3.6 * len(passages), 1.2 + 0.23 * rows)
    figure, axes = plt.subplots(1, len(passages), figsize=size, squeeze=False)
    for ax, part in zip(axes[0], passages):
        runs = np.array(part["runs"][:rows])  # [rows, N]
        cells = dict(edgecolor="white", linewidth=0.8)
        image = ax.pcolormesh(runs, cmap=shades, vmin=-0.5, vmax=most + 0.5, **cells)
        words = [token.replace("\n", "newline").replace(" ", "\u2423") for token in part["tokens"][:rows]]
        ax.set(title=part["title"], xlabel="layer")
        ax.set_xticks(np.arange(runs.shape[1]) + 0.5, range(1, runs.shape[1] + 1))
        ax.set_yticks(np.arange(len(words)) + 0.5, words, fontsize=11 if part["lang"] == "bn" else 10)
        ax.invert_yaxis()
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    axes[0, 0].set_ylabel("token read, from the passage's beginning downwards")
    bar = figure.colorbar(image, ax=axes[0, -1], ticks=range(most + 1), shrink=0.3, anchor=(0, 1))
    words = ["skip", "run once", "run twice", *(f"run {runs} times" for runs in range(3, most + 1))]
    bar.ax.set_yticklabels(words[: most + 1])
    return figure
