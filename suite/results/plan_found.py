"""How the plan is found: who is deep in one line, while token worth learns; and how late hops are learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import morlib

from ..runs import Run, run
from ..runs.known_depth import PLANS
from ..texts import load_corpus
from .figures import figure_style
from .known_depth import by_hops, names_of, upper_half
from .known_goals import ROUTERS, YARDSTICKS, is_plan
from .stats import LEAST_SEEDS, spearman
from .tables import signed

PLAN_FOUND = "plan_found.json"  # a table of `watch_plan` that ships
STEPS = (100, 200, 400, 800, 1200, 1600, 2000, 3000, 4000, 6000, 8000)


def watch_plan(spec: Run, folder: Path, steps: tuple[int, ...] = STEPS) -> pd.DataFrame:
    """Train a run of token worth, and look at it after so many steps: one row each.

    Its columns: run, seed, step, `line` (depth of each token of the first held-out line, the price set on
    validation lines) and `plan` (the same as it is written down). folder: where the run is kept; one that is
    finished there gives no rows, and one that goes on from a checkpoint only those from there on.
    """
    task = load_corpus(**dict(spec.corpus))
    lines = task.windows("heldout", spec.config.max_len, 1)
    N, deep = spec.config.n_layers, morlib.POLICIES[PLANS[task.name.rsplit("-", 1)[0]]].DEEP
    plan = [N if kind in deep else 1 for kind in task.kinds(spec.config.max_len)]
    rows = []

    def look(training: morlib.Training) -> None:
        if training.step in steps:
            held = morlib.at_depth(training.model, task, spec.config.target_depth)
            depth = morlib.score(held, lines)["depth"][0].tolist()
            rows.append(dict(step=training.step, line=depth, plan=plan))

    record = run(spec, hook=look, folder=folder)
    return pd.DataFrame([dict(run=record["id"], seed=spec.train.seed) | row for row in rows])


def plan_found_sentence(table: pd.DataFrame) -> str:
    """How many tokens of the line run as the plan says, at the first look and at the last."""
    alike = [np.mean(np.equal(row["line"], row["plan"])) for row in table.to_dict("records")]
    first, last = table["step"].iloc[[0, -1]]
    return (
        f"{alike[0]:.0%} of the line's tokens run as the plan says after {first:,} steps, {alike[-1]:.0%} "
        f"after {last:,}."
    ).replace("%", " %")


def draw_plan_found(table: pd.DataFrame, text: str) -> Figure:
    """The depth of each token of a line, a row a step of training; above them the plan written down."""
    figure_style()
    rows = [table["plan"].iloc[0], *table["line"]]
    figure, ax = plt.subplots(figsize=(10.5, 3.4))
    image = ax.imshow(np.array(rows), aspect="auto", cmap="Blues", interpolation="nearest", vmin=0)
    ax.axhline(0.5, color="white", linewidth=4)
    ax.set_xticks(range(len(rows[0])), list(text[: len(rows[0])]), fontsize=7)
    ax.set_yticks(range(len(rows)), ["the plan", *(f"{step:,}" for step in table["step"])])
    ax.set(xlabel="the tokens of a line", ylabel="training step", title="One line: how the plan is found")
    ax.tick_params(length=0)
    ax.grid(False)
    figure.colorbar(image, ax=ax, label="depth (applications)", pad=0.01, ticks=MaxNLocator(integer=True))
    return figure


def learning_table(settings: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How late models learn, a row a setting and model of six seeds: after how many steps a router's plan
    stands, and half of the hard answers of the upper half of k are right, both on validation lines; what is
    right in the end at the worst k (%); and over seeds the rank correlation of the latter two.

    settings: of each name, its records. A seed that never gets half of them right comes last.
    """
    rows = []
    for name, records in settings.items():
        for label in (*ROUTERS, *YARDSTICKS):
            own = records[records["model"] == label] if len(records) else records
            if len(own) < LEAST_SEEDS:
                continue
            plan = own["record"].map(lambda r: first_step(r, lambda at: is_plan(at, r)))
            half = own["record"].map(lambda r: first_step(r, lambda at: upper_half(at["by_hops"]) >= 50))
            worst = by_hops(own).groupby("seed")["accuracy"].min().reindex(own["seed"])
            rows.append({
                "setting": name, "model": names_of(own)[label],
                "the plan stands after": steps_words(plan) if label in ROUTERS else "",
                "half are right after": steps_words(half),
                "worst k (%)": f"{worst.min():.0f} to {worst.max():.0f}",
                "rank correlation of these": "" if half.nunique() == 1 else signed(spearman(half, worst)),
            })  # fmt: skip
    return pd.DataFrame(rows).set_index(["setting", "model"]) if rows else pd.DataFrame()


def first_step(record: dict, holds: Callable[[dict], bool]) -> float:
    """After how many steps something first holds of the details on validation lines; inf if it never does."""
    return next((float(p["step"]) for p in record["history"] if holds(p["val_details"])), np.inf)


def steps_words(steps: pd.Series) -> str:
    """A range of steps over seeds; "never" where something did not come at some seed."""
    low, high = (f"{step:,.0f}" if np.isfinite(step) else "never" for step in (steps.min(), steps.max()))
    return low if low == high else f"{low} to {high}"
