"""Recursion asked for more than it was trained on: hops in strokes, with the number of runs raised."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import morlib

from ..files import REFERENCE
from ..runs import Run, trained_model, with_recursions
from ..texts import load_corpus
from .dial import stored_dial
from .figures import BLACK, figure_style
from .tables import count

FILE = "recursion_reach.json"
FURTHER = 2  # so many times the strokes of the training are asked for
FACTORS = (0.5, 1, 1.5, 2, 3)  # of the runs that training allows


def measure_reach(specs: list[Run]) -> pd.DataFrame:
    """One row a run and number of recursions R: loss on held-out lines with FURTHER times the strokes, and
    `by_hops`. A model without recursion has one row, R None. Runs that are not finished are trained."""
    rows = []
    for spec in specs:
        model, record, task = trained_model(spec)
        longer = load_corpus(f"strokes-{task.symbols}-{FURTHER * task.hops}")
        trained, recurs = model.cfg.max_recursions, spec.model == "loops"
        for R in sorted({max(round(f * trained), 1) for f in FACTORS}) if recurs else (None,):
            found = morlib.evaluate(with_recursions(model, R) if recurs else model, longer)
            row = dict(
                run=record["id"], model=spec.model, seed=spec.train.seed, recursions=R, trained=trained
            )
            row |= dict(most=task.hops, layers=model.cfg.n_layers, loss=found["loss"])
            rows.append(row | dict(by_hops=found["details"]["by_hops"]))
    return pd.DataFrame(rows)


def stored_reach(path: Path = REFERENCE / FILE) -> pd.DataFrame:
    """The table that ships."""
    return stored_dial(path)


def reach_by_hops(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy (%) at the hard answers: rows models in words, columns k, mean over seeds."""
    rows = [
        dict(model=name_of(row), k=of_k["k"], right=of_k["accuracy"])
        for row in table.to_dict("records")
        for of_k in row["by_hops"]
        if of_k["accuracy"] is not None
    ]
    return pd.DataFrame(rows).pivot_table(index="model", columns="k", values="right", sort=False)


def name_of(row: dict) -> str:
    """A row of `measure_reach` in words."""
    if row["model"] == "fixed":
        return f"{count(int(row['layers']))} layers of their own"
    R = int(row["recursions"])
    return f"one block, {R} run{'' if R == 1 else 's'}"


def reach_table(table: pd.DataFrame) -> pd.DataFrame:
    """A row a model and number of runs: seeds, then hard answers right (%) by the number of strokes."""
    wide = reach_by_hops(table).round(0).astype(int)
    wide.columns = [f"k = {k}" for k in wide]
    seeds = table.assign(model=[name_of(row) for row in table.to_dict("records")]).groupby("model").size()
    wide.insert(0, "seeds", seeds[wide.index])
    return wide


def beyond(table: pd.DataFrame) -> pd.Series:
    """By seed, the mean accuracy (%) of one block at more strokes than it was trained on, at the number
    of runs that is best on average."""
    own = table[table["model"] == "loops"]
    right = [
        np.mean([of_k["accuracy"] for of_k in row["by_hops"] if of_k["k"] > row["most"] and of_k["answers"]])
        for row in own.to_dict("records")
    ]
    wide = own.assign(right=right).pivot_table(index="seed", columns="recursions", values="right")
    return wide[wide.mean().idxmax()]


def draw_reach(table: pd.DataFrame) -> Figure:
    """Accuracy at the hard answers by the number of strokes, a line a number of runs."""
    figure_style()
    figure, ax = plt.subplots(figsize=(8, 4))
    wide = reach_by_hops(table)
    recurs = [name for name in wide.index if name.startswith("one block")]
    for index, name in enumerate(recurs):
        colour = plt.get_cmap("viridis_r")(0.1 + 0.9 * index / max(len(recurs) - 1, 1))
        ax.plot(wide.columns, wide.loc[name], color=colour, marker="o", markersize=4, label=name)
    for name in wide.index.difference(recurs):
        ax.plot(
            wide.columns, wide.loc[name], color=BLACK, marker="s", markersize=4, linestyle="--", label=name
        )
    ax.axvline(table["most"].iloc[0] + 0.5, color=BLACK, linewidth=1, linestyle=":")
    ax.set(xlabel="strokes that the question has; trained up to the dotted line", ylim=(-3, 103))
    ax.set_ylabel("hard answers right (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
