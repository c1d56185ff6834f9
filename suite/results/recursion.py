"""What recursion is good for: one block, run once a hop, is asked for more hops than in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from morlib import Transformer

from ..files import REFERENCE, read_rows, write_rows
from ..runs import Run, trained_model
from ..texts.known_depth import hop
from .figures import BLUE, GREY, figure_style
from .tables import count

FILE = "recursion.json"
MOST = 16  # runs that are asked for


def measure_recursion(specs: list[Run], most: int = MOST) -> pd.DataFrame:
    """One row a run and number of times that the block is run: `right`, how often the answer is as many hops
    away (%), over hard answers of held-out lines.

    The question's number stays one of those of the training; the further runs are added to it, up to `most`.
    Runs that are not finished are trained.
    """
    rows = []
    for spec in specs:
        model, record, task = trained_model(spec)
        lines = task.windows("heldout", model.cfg.max_len)
        asked, table = task.answers(lines), lines[:, : task.symbols] - task.hops
        for extra in range(most - task.hops + 1):
            guess = likeliest(model, lines, extra)[:, task.places(model.cfg.max_len)] - task.hops
            right = guess == hop(table, asked["x"], asked["k"] + extra)
            for k in task.numbers():
                hard = asked["hard"] & (asked["k"] == k)
                row = dict(run=record["id"], seed=spec.train.seed, k=k, runs=k + extra)
                rows.append(row | dict(right=100 * right[hard].double().mean().item()))
    return pd.DataFrame(rows)


@torch.no_grad()
def likeliest(model: Transformer, lines: Tensor, extra: int) -> Tensor:
    """The likeliest next tokens [n, L] of lines [n, L + 1], where the block is run `extra` times more."""
    most = model.cfg.max_recursions + extra
    further = Transformer(replace(model.cfg, max_recursions=most, options=dict(extra=extra)))
    further.load_state_dict(model.state_dict())
    return torch.cat([further.eval()(part[:, :-1]).logits.argmax(-1) for part in lines.split(128)])


def save_recursion(table: pd.DataFrame, path: Path = REFERENCE / FILE) -> None:
    """Write the table as JSON, a line a row; `stored_recursion` reads it."""
    write_rows(path, table.to_dict("records"))


def stored_recursion(path: Path = REFERENCE / FILE) -> pd.DataFrame:
    """The table that ships; without rows where none does."""
    return pd.DataFrame(read_rows(path), columns=["run", "seed", "k", "runs", "right"])


def recursion_table(table: pd.DataFrame) -> pd.DataFrame:
    """Right answers (%), means over seeds: a row a number k that the question names, a column a number of
    runs."""
    wide = table.pivot_table(index="k", columns="runs", values="right")
    return wide.round(0).astype("Int64").rename_axis("k in the question").rename_axis("runs", axis=1)


def draw_recursion(table: pd.DataFrame) -> Figure:
    """Right answers against the number of runs: a line a seed, over the questions; dotted, guessing."""
    figure_style()
    figure, ax = plt.subplots(figsize=(7, 3.6))
    trained = table["k"].max()
    for number, (_, own) in enumerate(table.groupby("seed")):
        mean = own.groupby("runs")["right"].mean()
        label = "a seed" if number == 0 else None
        ax.plot(
            mean.index, mean, color=BLUE, marker="o", markersize=4, linestyle="-", linewidth=1, label=label
        )
    ax.axvspan(0.5, trained + 0.5, color=GREY, alpha=0.12, linewidth=0, label="in training")
    ax.axhline(100 / 8, color=GREY, linestyle=":", linewidth=1, label="guessing")
    ax.set(xlabel="runs of the block, and hops that are to be followed", ylabel="right answers (%)")
    ax.set(ylim=(-3, 103), xlim=(0.5, table["runs"].max() + 0.5))
    ax.legend(title=f"trained on up to {count(trained)} hops")
    return figure
