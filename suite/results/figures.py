"""Figures of records. Colours are those of Okabe and Ito (2008); shapes and lines differ too, for grey."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from IPython import get_ipython
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import morlib

from ..files import candidates, outputs, safe_name
from .stats import MARGIN, interval
from .tables import FRONT_KINDS, bits_by_vocabulary, by_model, front_table, plain_names

BLACK, BLUE, VERMILLION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PINK, SKY, AMBER, GREY = "#CC79A7", "#56B4E9", "#E69F00", "#6E6E6E"
COLOURS = [BLUE, VERMILLION, GREEN, PINK, SKY, AMBER]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
MARKERS = "sDo^vPX*<>"
METRICS = {"accuracy": "accuracy (%)", "loss": "loss (nats a token)"}
UNITS = {"accuracy": "points", "loss": "nats a token"}  # of a difference
# (model, E, accuracy in %) as the thesis and the paper report them: of experiment 1, then of experiment 2
SOURCE_POINTS = (("fixed", 12, 22.76), ("MoR", 8.0, 22.76), ("fixed", 6, 39.87), ("MoR", 5.89, 49.67))


@dataclass(frozen=True)
class Look:
    """How a model is drawn, the same in every figure."""

    colour: str
    marker: str
    line: str | tuple = "-"
    filled: bool = True


LOOKS = {
    "mor": Look(BLUE, "s"),
    "mor-deep": Look(BLUE, "s"),
    "mor-half": Look(BLUE, "s", "--", False),
    "mor-equal-epochs": Look(BLUE, "s"),
    "mor-equal-compute": Look(SKY, "s", ":", False),
    "mor-source-protocol": Look(BLUE, "s", "--", False),
    "fixed-deep": Look(BLACK, "o"),
    "fixed-shallow": Look(BLACK, "o", "--", False),
    "fixed-at-E": Look(VERMILLION, "o", "-."),
    "fixed-long": Look(VERMILLION, "o", "-."),
    "fixed-shared": Look(PINK, "v", ":"),
    "worth": Look(SKY, "P", ":"),
    "frozen": Look(GREEN, "D", (0, (5, 1))),
    "frozen-deep": Look(GREEN, "D", (0, (5, 1))),
    "frozen-half": Look(GREEN, "D", (0, (2, 1)), False),
    "random": Look(AMBER, "^", (0, (1, 1))),
    "random-deep": Look(AMBER, "^", (0, (1, 1))),
    "random-half": Look(AMBER, "^", (0, (3, 1, 1, 1)), False),
}


# ---- Style ----


def bangla_font() -> Path | None:
    """The Bangla font that ships in data/fonts, or its copy in a Kaggle input."""
    name = "NotoSansBengali-Regular.ttf"
    for where in (f"fonts/{name}", name):
        for _, path in candidates(where):
            if path.is_file():
                return path
    return None


def figure_style() -> None:
    """The style of all figures, with a font for Bangla. Six colours, each with a line of its own."""
    if font := bangla_font():
        font_manager.fontManager.addfont(font)
        plt.rcParams["font.family"] = ["DejaVu Sans", font_manager.FontProperties(fname=font).get_name()]
    lines = LINES + LINES[3:] + LINES[:3]
    plt.rcParams.update({
        "axes.prop_cycle": cycler(color=2 * COLOURS) + cycler(linestyle=lines),
        "figure.figsize": (7, 4),
        "figure.dpi": 100,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "savefig.bbox": "tight",
        "figure.constrained_layout.use": True,
    })  # fmt: skip
    if shell := get_ipython():
        shell.display_formatter.formatters["image/png"].for_type(Figure, few_colours)


def few_colours(figure: Figure) -> bytes:
    """A figure as a notebook keeps it: a PNG of 128 colours, a third as large as one of all."""
    whole, few = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi="figure")
    picture = Image.open(whole).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE)  # keeps rare colours
    picture.save(few, "PNG", optimize=True)
    return few.getvalue()


def save_figure(figure: Figure, name: str) -> None:
    """Save a figure as outputs/figures/name.png; the notebook shows it too."""
    folder = outputs() / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{safe_name(name)}.png", dpi=150)


def look_of(label: str, index: int = 0) -> Look:
    """How a model is drawn; one that is not an experiment's takes its turn among colours and shapes."""
    usual = Look(COLOURS[index % 6], MARKERS[index % 10], LINES[(index + index // 6) % 6])
    return LOOKS.get(label, usual)


def marker_of(look: Look) -> dict:
    """matplotlib's arguments for a model's marker."""
    inside = look.colour if look.filled else "white"
    return dict(color=look.colour, marker=look.marker, markerfacecolor=inside, markeredgecolor=look.colour)


def legend_of(figure: Figure, ax: Axes, columns: int | None = None) -> None:
    """One legend for the whole figure, outside of its panels: at the right, or below in some columns."""
    handles, labels = ax.get_legend_handles_labels()
    if columns:
        figure.legend(handles, labels, ncols=columns, loc="outside lower center")
    else:
        figure.legend(handles, labels, loc="outside right upper")


def say(ax: Axes, x: float, y: float, words: str, **how) -> None:
    """Small grey words at a share x of the width and a value y."""
    ax.text(x, y, words, transform=ax.get_yaxis_transform(), fontsize=8, color=GREY, **how)


# ---- Experiments ----


def draw_floors(ax: Axes, record: dict, metric: str) -> None:
    """Dotted lines at what tables of counts reach on a record's validation text; metric: accuracy or loss."""
    for order, floor in record["floors"].items():
        value = floor["val"][metric]
        ax.axhline(value, color=GREY, linewidth=1, linestyle=":")
        say(ax, 0.995, value, f"{order}-gram table", va="bottom", ha="right")


def curve_of(group: pd.DataFrame, metric: str, by: str) -> pd.Series:
    """A model's validation metric during training, mean over seeds, by step or by applications (millions)."""
    histories = pd.concat([pd.DataFrame(record["history"]) for record in group["record"]])
    curve = histories.groupby("step")[f"val_{metric}"].mean()
    if by == "applications":  # within a run they are drawn as even over its steps
        curve.index = curve.index / curve.index.max() * group["train_applications"].mean() / 1e6
    return curve


def learning_curves(
    records: pd.DataFrame, metric: str = "accuracy", by: Sequence[str] = ("step",), minus: str | None = None
) -> Figure:
    """Validation accuracy (%) or loss (nats) during training, mean over seeds, one line a model.

    by: a panel each, "step" or "applications" (of blocks in training). minus: a further panel with the
    difference to this model.
    """
    figure_style()
    panels = [*by, *(["minus"] if minus else [])]
    size = (7.6, 4) if len(panels) == 1 else (5.2 * len(panels), 4.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    names = plain_names(records)
    base = curve_of(records[records["model"] == minus], metric, "step") if minus else None
    for panel, ax in zip(panels, axes[0]):
        for index, (label, group) in enumerate(by_model(records)):
            curve = curve_of(group, metric, panel)
            curve = curve - base if panel == "minus" else curve
            look = look_of(label, index)
            style = marker_of(look) | dict(linestyle=look.line, markersize=4)
            ax.plot(curve.index, curve, label=names[label], **style)
        if panel == "minus":
            ax.axhline(0, color=GREY, linewidth=1)
            ax.set_ylabel(f"{metric} minus that of {names[minus]} ({UNITS[metric]})")
        else:
            draw_floors(ax, records["record"].iloc[0], metric)
            ax.set_ylabel(f"validation {METRICS[metric]}")
        applications = "block applications in training (millions)"
        ax.set_xlabel(applications if panel == "applications" else "training step")
    legend_of(figure, axes[0, 0], None if len(panels) == 1 else 4)
    return figure


def side_by_side(values: Sequence[float], gap: float) -> np.ndarray:
    """The values moved apart where neighbours are closer than the gap, each group about its middle.

    A group is four gaps wide at most, unless its values are: many stand closer.
    """
    values = np.asarray(values, dtype=float)
    order = np.argsort(values, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(values[order]) >= gap) + 1)
    moved = values.copy()
    for group in groups:
        steps = max(len(group) - 1, 1)
        step = max(gap * min(1, 4 / steps), np.ptp(values[group]) / steps)
        moved[group] = values[group].mean() + step * (np.arange(len(group)) - (len(group) - 1) / 2)
    return moved


def accuracy_against_depth(
    records: pd.DataFrame, base: str | None = None, cost: str = "effective_depth", metric: str = "accuracy"
) -> Figure:
    """Held-out accuracy (%) against what it costs: mean over seeds with the 95 % interval, and each seed.

    cost: "effective_depth" (applications a token) or "train_applications" (millions, in training). base: the
    model about which a band shows what counts as equal to it in accuracy. metric: "loss" in place of
    accuracy. Models of equal cost are moved apart.
    """
    figure_style()
    figure, ax = plt.subplots(figsize=(8.4, 4))
    scale, words = dict(
        effective_depth=(1, "effective depth E (block applications a token)"),
        train_applications=(1e6, "block applications in training (millions)"),
    )[cost]
    names, groups = plain_names(records), by_model(records)
    means = [group[cost].mean() / scale for _, group in groups]
    gap = 0.012 * max(means)
    places = side_by_side(means, gap)
    if base is not None:
        middle = records[records["model"] == base][metric].mean()
        ax.axhspan(middle - MARGIN, middle + MARGIN, color="#EDEDED", zorder=0)
        ax.axhline(middle, color=GREY, linewidth=1, linestyle=":")
        band = f"within {MARGIN:g} {UNITS[metric]} of {names[base]}"
        say(ax, 0.65, middle + MARGIN, band, va="top", ha="center")
    for index, ((label, group), place) in enumerate(zip(groups, places)):
        style = marker_of(look_of(label, index)) | dict(linestyle="", capsize=3, markersize=7)
        seeds = np.full(len(group), place + 0.3 * gap)
        ax.scatter(seeds, group[metric], s=9, color=style["color"], alpha=0.5, linewidths=0)
        mean, low, high = interval(group[metric])
        bar = None if np.isnan(low) else [[mean - low], [high - mean]]
        ax.errorbar(place, mean, bar, label=names[label], **style)
    xlim = (0.85 * min(places), 1.04 * max(places))
    ax.set(xlabel=f"{words}; equal ones moved apart", ylabel=f"held-out {METRICS[metric]}", xlim=xlim)
    legend_of(figure, ax)
    return figure


def actions_by_layer(records: pd.DataFrame, model: str = "mor") -> Figure:
    """What a model's routers first decide at each layer on held-out text: shares of tokens (%)."""
    own = records[records["model"] == model]["record"]
    rates = np.mean([np.asarray(record["metrics"]["action_rates"])[:, 0] for record in own], axis=0)  # [N, 3]
    table = pd.DataFrame(100 * rates, range(1, len(rates) + 1), morlib.ACTIONS)
    looks = (("#D9D9D9", ""), (BLUE, ""), (VERMILLION, "///"))
    figure = stacked_bars(table[::-1], looks, "share of tokens (%)")  # the first layer lowest
    figure.axes[0].set_ylabel("layer")
    return figure


# ---- Forms that several rooms use ----


def forest(
    table: pd.DataFrame, rows: str, unit: str = "", names: dict[str, str] | None = None,
    panels: str | None = None,
) -> Figure:  # fmt: skip
    """A forest plot: for each row one point with its interval for each model, the rows from top to bottom.

    table: columns `model`, `mean`, `low`, `high` (NaN: no interval), and those that `rows` and, for a panel
    each, `panels` name. Order is that of the table. unit: what is drawn along x. names: models in words.
    """
    figure_style()
    parts = [(None, table)] if panels is None else list(table.groupby(panels, sort=False))
    labels, kinds = list(table[rows].unique()), list(table["model"].unique())
    size = (4 + 3.6 * len(parts), 1.3 + len(labels) * (0.22 + 0.16 * len(kinds)))
    figure, axes = plt.subplots(1, len(parts), figsize=size, sharey=True, sharex=True, squeeze=False)
    for (title, part), ax in zip(parts, axes[0]):
        ax.axvline(0, color=GREY, linewidth=1)
        for index, kind in enumerate(kinds):
            own, look = part[part["model"] == kind], look_of(kind, index)
            offset = 0.75 * ((index + 0.5) / len(kinds) - 0.5)
            y = [labels.index(row) + offset for row in own[rows]]
            reach = np.nan_to_num([own["mean"] - own["low"], own["high"] - own["mean"]])
            said = (names or {}).get(kind, kind)
            ax.errorbar(own["mean"], y, xerr=reach, linestyle="", markersize=5, label=said, **marker_of(look))
        for row in range(1, len(labels)):
            ax.axhline(row - 0.5, color="#E5E5E5", linewidth=0.8, zorder=0)
        ax.set(xlabel=unit, title=title or "", yticks=range(len(labels)), ylim=(len(labels) - 0.5, -0.5))
        ax.set_yticklabels(labels)
        ax.tick_params(axis="y", length=0)
    if len(kinds) > 1:
        legend_of(figure, axes[0, 0])
    return figure


def heat_map(
    table: pd.DataFrame, title: str = "", digits: int = 0, low: float | None = None,
    high: float | None = None, big_columns: bool = False,
) -> Figure:  # fmt: skip
    """A table as coloured cells with the numbers in them; rows and columns as in the table, NaN stays empty.

    low, high: the values of the lightest and of the darkest colour. big_columns: large names of columns, for
    writing that is dense.
    """
    figure_style()
    values = table.to_numpy(dtype=float)
    size = (1.8 + 0.56 * values.shape[1], 1.1 + 0.36 * values.shape[0])
    figure, ax = plt.subplots(figsize=size)
    image = ax.imshow(values, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "white" if image.norm(value) > 0.6 else "black"
            ax.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=9, color=ink)
    ax.set(yticks=range(len(table.index)), xticks=range(len(table.columns)), title=title)
    ax.set_yticklabels(table.index)
    ax.set_xticklabels(table.columns, fontsize=15 if big_columns else 9)
    ax.tick_params(length=0, pad=6)
    ax.spines[:].set_visible(False)
    return figure


def bars(values: pd.Series, unit: str) -> Figure:
    """Horizontal bars with their numbers, from top to bottom as in the series."""
    figure_style()
    figure, ax = plt.subplots(figsize=(7, 0.9 + 0.3 * len(values)))
    ax.barh(list(values.index), values, color=BLUE)
    for place, value in enumerate(values):
        number = f"{value:.1f}" if value >= 0.05 else f"{value:.3f}"
        ax.text(value + 0.01 * values.max(), place, number, va="center", fontsize=9)
    ax.set(xlabel=unit, xlim=(0, 1.1 * values.max()))
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    return figure


def stacked_bars(table: pd.DataFrame, looks: Sequence[tuple[str, str]], unit: str) -> Figure:
    """A bar a row, from top to bottom, of parts side by side: a column is a part, its look colour and hatch.

    unit: what the parts are measured in, along x.
    """
    figure_style()
    figure, ax = plt.subplots(figsize=(9, 1.4 + 0.36 * len(table)))
    left = np.zeros(len(table))
    for (part, width), (colour, hatch) in zip(table.items(), looks):
        look = dict(color=colour, hatch=hatch, edgecolor="white", label=part)
        ax.barh(table.index.astype(str), width, left=left, **look)
        left = left + width.to_numpy()
    ax.set(xlabel=unit, xlim=(0, left.max()))
    ax.margins(y=0.02)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    legend_of(figure, ax, 4)
    return figure


# ---- Studies ----


def draw_vocabularies(records: pd.DataFrame) -> Figure:
    """Held-out bits per byte by vocabulary: the model with each seed, and what tables of counts reach."""
    figure_style()
    table = bits_by_vocabulary(records)
    figure, ax = plt.subplots(figsize=(7.6, 3.8))
    layers = records["record"].iloc[0]["config"]["model"]["n_layers"]
    looks = {
        "model": Look(BLUE, "s"),
        "3-gram table": Look(GREY, "^", ":"),
        "2-gram table": Look(GREY, "v", "--"),
    }
    for column, look in looks.items():
        style = marker_of(look) | dict(linestyle=look.line, markersize=6)
        name = f"model of {layers} layers" if column == "model" else column
        ax.plot(table.index, table[column], label=name, **style)
    ax.set(xlabel="vocabulary", ylabel="held-out bits per byte (lower is better)")
    legend_of(figure, ax)
    return figure


def draw_front(front: pd.DataFrame, sources: bool = True) -> Figure:
    """Held-out loss and accuracy against effective depth: fixed depth, MoR and blind routing, dots are seeds.

    sources: a third panel with the points that the thesis and the paper report.
    """
    figure_style()
    panels = ("loss", "accuracy", "accuracy") if sources else ("loss", "accuracy")
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.8))
    means = front_table(front)
    looks = dict(fixed=LOOKS["fixed-deep"], mor=LOOKS["mor"], random=LOOKS["random"])
    for ax, metric in zip(axes, panels):
        for kind, name in FRONT_KINDS.items():
            if kind not in means.index:
                continue
            line, look = means.loc[kind], looks[kind]
            own = front[front["model"].str.startswith(kind + " ")]
            style = marker_of(look) | dict(linestyle=look.line, markersize=5)
            ax.plot(line["effective_depth"], line[metric], label=name, **style)
            ax.scatter(own["effective_depth"], own[metric], s=8, alpha=0.35, color=look.colour, linewidths=0)
        ax.set(xlabel="effective depth E (applications a token)", ylabel=f"held-out {METRICS[metric]}")
    if sources:
        names, depths, accuracy = zip(*SOURCE_POINTS)
        style = dict(marker="x", color=VERMILLION, zorder=3)
        axes[2].scatter(depths, accuracy, label="as the sources report", **style)
        beside = dict(xytext=(-6, -3), textcoords="offset points", ha="right", fontsize=8)
        for name, *place in SOURCE_POINTS:
            axes[2].annotate(name, place, **beside)
    legend_of(figure, axes[-1], 4)
    return figure
