"""What recursion is good for: one block, run once a hop, is asked for more hops than in training."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from morlib import Transformer

from ..runs import Run, trained_model
from ..texts.known_depth import hop, returns
from .figures import BLUE, GREY, VERMILLION, figure_style
from .known_depth import shares
from .tables import count, in_seeds

RECURSION = "recursion.json"  # the table of `measure_recursion` that ships
MOST = 7  # runs that are asked for: on eight symbols a further hop leads back to the first
GUESSING = 100 / 8  # per cent of the answers that are right
KEYS = {"run-per-hop": "keys of each recursion", "run-per-hop-sharing": "keys of the first, shared"}


def measure_recursion(specs: list[Run], most: int = MOST, lines: int | None = None) -> pd.DataFrame:
    """One row a run and number of times that the block is run: `right`, how often the answer is as many hops
    away (%), over hard answers of held-out lines that stand on a cycle longer than these hops.

    Up to the K hops of the training, questions are those that ask for as many. Beyond, they are all that can
    be asked, and the block is run so much more often. lines: how many are read; None: all that records are
    judged on. Runs that are not finished are trained.
    """
    rows = []
    for spec in specs:
        model, record, task = trained_model(spec)
        read = task.windows("heldout", model.cfg.max_len, lines)
        asked, table = task.answers(read), read[:, : task.symbols] - task.hops
        for extra in range(most):
            guess = likeliest(model, read, extra)[:, task.places(model.cfg.max_len)] - task.hops
            for k in task.numbers():
                runs = k + extra
                if runs > most or extra and runs <= task.hops:
                    continue
                judged = asked["hard"] & (asked["k"] == k) & ~returns(table, asked["x"], runs)
                right = guess == hop(table, asked["x"], torch.full_like(asked["x"], runs))
                row = dict(run=record["id"], model=spec.model, seed=spec.train.seed, k=k, runs=runs)
                rows.append(row | dict(right=100 * right[judged].double().mean().item()))
    return pd.DataFrame(rows)


@torch.no_grad()
def likeliest(model: Transformer, lines: Tensor, extra: int) -> Tensor:
    """The likeliest next tokens [n, L] of lines [n, L + 1], where the block is run `extra` times more."""
    layers = model.cfg.n_layers + extra
    further = Transformer(replace(model.cfg, n_layers=layers, options=dict(extra=extra)))
    further.load_state_dict(model.state_dict())
    return torch.cat([further.eval()(part[:, :-1]).logits.argmax(-1) for part in lines.split(128)])


def named(table: pd.DataFrame) -> dict[str, str]:
    """The ways to keep keys that a table knows, in words."""
    return {model: name for model, name in KEYS.items() if model in set(table["model"])}


def by_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Right answers (%), means over the numbers that questions name: a row a model and seed, a column a
    number of runs."""
    return table.pivot_table(index=["model", "seed"], columns="runs", values="right")


def recursion_table(table: pd.DataFrame) -> pd.DataFrame:
    """Right answers (%) by how often the block is run: what the seeds reach of each way to keep keys."""
    shown = by_runs(table).groupby("model", sort=False).agg(shares)
    return shown.rename(index=KEYS).rename_axis("what x looks at").rename_axis("runs", axis=1)


def recursion_sentence(table: pd.DataFrame) -> str:
    """How far one block goes beyond the runs of its training, in plain words; nothing for an empty table."""
    if table.empty:
        return ""
    trained, wide, told = int(table["k"].max()), by_runs(table), []
    for model, name in named(table).items():
        shown = [runs for runs in (trained, trained + 1, trained + 2) if runs in wide]
        reached = [f"{shares(wide.loc[model, runs])} % after {count(runs)}" for runs in shown]
        told.append(f"{name}: {', '.join(reached)}")
    n, guessing = table["seed"].nunique(), f"{GUESSING:g} %"
    return (
        f"A block that is trained to follow up to {count(trained)} hops, one a run, is run more often. Right "
        f"answers with {'; with '.join(told)} ({in_seeds(n)}; guessing: {guessing})."
    )


def draw_recursion(table: pd.DataFrame) -> Figure:
    """Right answers against the number of runs: a line a seed, for each way to keep keys."""
    figure_style()
    figure, ax = plt.subplots(figsize=(8.6, 3.6))
    wide, looks = by_runs(table), dict(zip(KEYS, ((VERMILLION, "D", "--"), (BLUE, "s", "-"))))
    for model in named(table):
        colour, marker, line = looks[model]
        for number, (_, own) in enumerate(wide.loc[[model]].iterrows()):
            label = KEYS[model] if number == 0 else None
            ax.plot(own.index, own, color=colour, marker=marker, markersize=4, linestyle=line, label=label)
    trained = table["k"].max()
    ax.axvspan(0.5, trained + 0.5, color=GREY, alpha=0.12, linewidth=0, label="runs in training")
    ax.axhline(GUESSING, color=GREY, linestyle=":", linewidth=1, label="guessing")
    ax.set(xlabel="runs of the block, and hops that are to be followed", ylabel="right answers (%)")
    ax.set(ylim=(-3, 103), xlim=(0.5, table["runs"].max() + 0.5))
    figure.legend(title="x looks at", loc="outside right upper")
    return figure
