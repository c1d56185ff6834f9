"""Figures of cost: time against depth, the parts of a step, where routing breaks even."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..results import figure_style
from ..results.figures import AMBER, BLACK, BLUE, GREEN, GREY, PINK, SKY, VERMILLION, legend_of, stacked_bars

PALE, YELLOW = "#DDDDDD", "#F0E442"
PART_LOOKS = (  # of `probes.PARTS`: colour and hatch
    *((colour, "") for colour in (BLUE, SKY, "#999999", YELLOW)),
    *((VERMILLION, "///"), (PINK, "..."), (PALE, "")),
)


def time_against_depth(record: dict) -> Figure:
    """From a record of the bench: time against depth, both as shares of the fixed model's."""
    figure_style()
    N = record["sizes"]["model"]["n_layers"]
    few, many = record["sizes"]["decoded"], record["sizes"]["generated"]
    lines = {  # keys of a record's rows, from the deepest to the shallowest
        "training step, blind": (("train-8", "train-6"), "o", BLUE, "-"),
        "forward pass, blind": (("forward-8", "forward-6"), "s", GREEN, "--"),
        f"decoding {few} tokens, blind, 1 sequence": (("decode-1",), "^", VERMILLION, "-."),
        f"decoding {few // 2} tokens, blind, 32 sequences": (("decode-32",), "D", PINK, ":"),
        "training step at width 64, MoR's router": (("train-small",), "v", AMBER, (0, (5, 1))),
        "training step at width 64, decided once": (("once-8", "once-6"), "p", GREY, (0, (3, 1, 1, 1))),
        f"decoding {many} tokens, decided once, 1 sequence": (("decode-once-1",), "<", SKY, "-"),
        f"decoding {many} tokens, decided once, 32 sequences": (("decode-once-32",), ">", YELLOW, "--"),
    }
    figure, ax = plt.subplots(figsize=(8, 5.4))
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (1, 2)))
    along = dict(rotation=45, rotation_mode="anchor", transform_rotates_text=True, va="top")
    ax.text(0.14, 0.125, "time follows depth", color=GREY, fontsize=9, **along)
    for name, (keys, marker, colour, line) in lines.items():
        if keys[0] not in record["rows"]:
            continue
        rows = [record["rows"][key] for key in keys if key in record["rows"]]
        x = [1.0, *(row["E"] / N for row in rows)]
        y = [1.0, *(row["measured"] for row in rows)]
        below = [0.0, *(row["measured"] - row["quartiles"][0] for row in rows)]
        above = [0.0, *(row["quartiles"][1] - row["measured"] for row in rows)]
        look = dict(color=colour, marker=marker, linestyle=line, markersize=6, capsize=3)
        ax.errorbar(x, y, [below, above], label=name, **look)
    ax.plot(1, 1, marker="*", markersize=14, color=BLACK, linestyle="", label="fixed model", zorder=3)
    ax.set(xlabel="depth, as a share of the fixed model's", ylabel="time, as a share of the fixed model's")
    ax.set(xlim=(0, 1.05), ylim=(0, 1.15))
    legend_of(figure, ax, 2)
    return figure


def milliseconds_against_depth(table: pd.DataFrame) -> Figure:
    """Milliseconds against effective depth, a panel each; columns panel, kind, E, milliseconds.

    On the dotted line time would follow depth exactly, from nothing to the fixed model's time.
    """
    figure_style()
    looks = {
        "blind": ("blind routing", dict(marker="o", color=BLUE, linestyle="-", zorder=2)),
        "decided once": ("decided once", dict(marker="D", color=SKY, linestyle="--", zorder=2)),
        "with a router": ("with a router", dict(marker="s", color=VERMILLION, linestyle="", zorder=3)),
        "fixed": ("fixed", dict(marker="*", color=BLACK, linestyle="", markersize=12, zorder=4)),
    }
    panels = list(table.groupby("panel", sort=False))
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9, 0.6 + 3.3 * rows), squeeze=False)
    for ax, (title, points) in zip(axes.flat, panels):
        fixed = points[points["kind"] == "fixed"].sort_values("E").iloc[-1]
        ideal = [0, fixed["E"]], [0, fixed["milliseconds"]]
        ax.plot(*ideal, color=GREY, linestyle=":", label="time follows depth")
        for kind, (label, look) in looks.items():
            own = points[points["kind"] == kind].sort_values("E")
            if len(own):
                ax.plot(own["E"], own["milliseconds"], label=label, **look)
        ax.set(title=title, xlim=(0, None), ylim=(0, None))
    for ax in axes[-1]:
        ax.set_xlabel("effective depth E (applications a token)")
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds")
    legend_of(figure, axes.flat[0], 5)
    return figure


def parts_of_a_step(milliseconds: pd.DataFrame) -> Figure:
    """The parts of a training step, side by side in one bar a model; milliseconds [model, part]."""
    return stacked_bars(milliseconds, PART_LOOKS, "milliseconds of a training step")


def break_even_rates(even: pd.DataFrame, skipped: float) -> Figure:
    """The skip rate above which routing pays, against the batch; columns kind, batch, skip rate (NaN: never).

    skipped: a share to compare with, drawn as a line.
    """
    figure_style()
    figure, ax = plt.subplots()
    batches = sorted(even["batch"].unique())
    looks = zip("os^", (BLUE, VERMILLION, GREEN), (0.94, 1.0, 1.06))
    for (kind, group), (marker, colour, aside) in zip(even.groupby("kind", sort=False), looks):
        rate = 100 * group["skip rate"]
        ax.plot(group["batch"], rate, marker=marker, label=kind, color=colour)
        never = group["batch"][rate.isna()] * aside  # side by side where they would hide each other
        ax.scatter(never, [110] * len(never), marker="x", color=colour)
    line = dict(color=GREY, linestyle=":", linewidth=1)
    ax.axhline(100 * skipped, **line, label=f"{skipped:.0%}, for comparison")
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, batches)
    ticks = (0, 25, 50, 75, 100)
    ax.set(xlabel="batch (sequences)", ylabel="skip rate that breaks even (%)", ylim=(-3, 116))
    ax.set_yticks((*ticks, 110), (*ticks, "never"))
    legend_of(figure, ax)
    return figure


GROWTH = {  # the axes of a sweep: what stands below them, and the base of a logarithmic scale
    "batch": ("batch", 2),
    "length": ("length (tokens)", 2),
    "width": ("width", 2),
    "depth": ("effective depth E", None),
}


def growth_curves(points: pd.DataFrame) -> Figure:
    """Time a token against batch, length, width and depth, a row of panels a kind.

    points: columns kind, axis, value; fixed, routed, ideal (seconds a token); high (ratio's upper quartile).
    A ring marks where routing is faster than the fixed model.
    """
    figure_style()
    looks = {
        "fixed": ("fixed", dict(color=BLACK, marker="*", markersize=9)),
        "routed": ("routing that decides once", dict(color=BLUE, marker="o")),
        "ideal": ("if time followed depth", dict(color=GREY, linestyle=":")),
    }
    ring = dict(marker="o", markersize=12, markerfacecolor="none", markeredgecolor=GREEN, linestyle="")
    kinds = list(points["kind"].unique())
    figure, axes = plt.subplots(len(kinds), 4, figsize=(11, 0.6 + 2.7 * len(kinds)), squeeze=False)
    for kind, row in zip(kinds, axes):
        for ax, (axis, (label, base)) in zip(row, GROWTH.items()):
            own = points[(points["kind"] == kind) & (points["axis"] == axis)]
            for column, (name, look) in looks.items():
                ax.plot(own["value"], 1e6 * own[column], label=name, **look)
            faster = own[own["high"] < 1]
            ax.plot(faster["value"], 1e6 * faster["routed"], label="faster than fixed", **ring)
            ax.set(xlabel=label, title=kind if ax is row[0] else "")
            if base:
                ax.set_xscale("log", base=base)
                ax.set_yscale("log")
                ax.set_xticks(own["value"], [f"{value:g}" for value in own["value"]])
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
                ax.minorticks_off()
            else:
                ax.set_ylim(0, None)
        row[0].set_ylabel("microseconds a token")
    legend_of(figure, axes.flat[0], 4)
    return figure
