"""Small tables of routing, as notebook 05 shows them, from the tables of `findings`."""

from __future__ import annotations

import pandas as pd

from ..results.tables import BEATS
from .difficulty import answer, mean_correlations, spelt
from .figures import CONTROLS, ROUTERS, short
from .findings import Subject, over_seeds, verdicts

ORACLE = {  # what `interventions.oracle` gives, in words
    "loss": "loss of the router's own decisions (nats)",
    "hindsight": "gain of the best change in hindsight (nats)",
    "foresight": "gain of the best change in foresight (nats)",
    "decision": "gain of the best count of one layer (nats)",
    "ran": "worth of a layer that the router ran (nats)",
    "skipped": "worth of a layer that it skipped (nats)",
    "agreement": "rank correlation of choice and worth (no unit)",
}


def model_table(models: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of each model, and whether every seed beats its table of counts."""
    table = models.groupby(["text", "model"], sort=False).agg(
        seeds=("seed", "size"),
        loss=("loss", "mean"),
        accuracy=("accuracy", "mean"),
        E=("effective_depth", "mean"),
        **{BEATS: ("did_train", "all")},
    )
    table[BEATS] = table[BEATS].map({True: "yes", False: "no"})
    units = {"loss": "loss (nats)", "accuracy": "accuracy (%)", "E": "effective depth E"}
    table = table.rename(columns=units)
    return table.rename(index=ROUTERS, level="model").round(2)


def ends(
    rates: pd.DataFrame, measure: str = "entropy", columns: tuple[str, ...] = ("depth",)
) -> pd.DataFrame:
    """Means in the first and the last tenth of a measure: of depth, or of shares of the layers (%)."""
    of_measure = rates[rates["measure"] == measure]
    last = of_measure["group"].max()
    tables = {}
    for column in columns:
        means = of_measure.pivot_table(column, ["text", "model"], "group", sort=False)
        for group, name in ((0, "easiest tenth"), (last, "hardest tenth")):
            tables[column, name] = means[group]
    table = pd.DataFrame(tables).rename(index=ROUTERS, level="model").round(2)
    return table.droplevel(0, axis=1) if len(columns) == 1 else table


def verdict_table(subjects: list[Subject]) -> pd.DataFrame:
    """For each text and measure of difficulty: the answer, and MoR's correlations with their intervals."""
    rows = {}
    for (text, measure), part in verdicts(subjects).groupby(["text", "measure"], sort=False):
        means = {CONTROLS[control]: spelt(*mean) for control, mean in mean_correlations(part).items()}
        rows[text, measure] = dict(verdict=answer(part)) | means
    return pd.DataFrame(rows).T.rename_axis(["text", "difficulty"])


def variance_table(variance: pd.DataFrame) -> pd.DataFrame:
    """Shares of the variance (%), means over seeds."""
    means = variance.drop(columns="seed").groupby(["text", "model"], sort=False).mean()
    return means.rename(index=ROUTERS, level="model").rename(columns={"rest": "context, or chance"}).round(1)


def change_table(changes: pd.DataFrame) -> pd.DataFrame:
    """What each intervention changes: loss where it was made, with its interval, for each router."""
    effect = over_seeds(changes, ["text", "intervention", "model"], "there")
    cells = [spelt(*numbers, digits=3) for numbers in effect.itertuples(index=False)]
    wide = pd.Series(cells, index=effect.index).unstack("model", sort=False)
    own = changes[changes["model"] == "mor"]
    depth = own.groupby(["text", "intervention"], sort=False)["depth"].mean()
    wide = wide.rename(columns=ROUTERS).assign(**{"change in E (MoR)": depth.round(2)})
    return wide.rename(index=short, level="intervention")


def oracle_table(oracles: pd.DataFrame) -> pd.DataFrame:
    """What the best single decisions would be worth, means over seeds, one column a text."""
    return oracles.groupby("text", sort=False)[list(ORACLE)].mean().rename(columns=ORACLE).T.round(3)


def formation_table(formation: pd.DataFrame) -> pd.DataFrame:
    """The rank correlation of depth with entropy, a row a seed and a column a training step."""
    table = formation.pivot_table("r", "seed", "step").round(2)
    return table.rename_axis(columns="rank correlation at step")
