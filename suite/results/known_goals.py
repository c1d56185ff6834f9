"""What a router should reach where depth is known to matter, and on text, and what it reaches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ..runs import stored_records
from ..runs.experiments import ROUTED
from .headlines import TEXT_NAMES, seeds_so_far
from .known_depth import (
    KINDS,
    LABELS,
    SOLVED,
    by_hops,
    compare_hops,
    deep_records,
    narrow_records,
    steps_of,
    upper_half,
    with_hops,
)
from .known_front import asked_depth
from .long import long_records
from .stats import LEAST_SEEDS, MARGIN, compare, judged
from .tables import count, layers_by_model, signed, span

NEAR, EACH = 0.05, 0.15  # how far the mean of E, and each seed's, may be from what is asked for
CLOSE, AHEAD, SURE = 1.0, 25.0, 15.0  # points: behind all layers, ahead of half of them, and of its interval
DEEP, SHALLOW = 0.8, 0.3  # shares of the layers that the plan's deep tokens, and the others, run
GAIN = 0.9  # share of what the plan gains over half of the layers
ROUTERS = ("worth", "worth-by-windows")
# Of each fixed model that a router should leave behind: the same in every setting
BEHIND = {
    "fixed-half": "half of the layers",
    "fixed-half-long": "half of the layers in twice the steps",
    "fixed-between": "a fixed depth between half and all",
}
Row = tuple[str, str, bool, int]  # the goal, what is found, whether that is it, and over how many seeds
# On text, of models that train long: MoR's experiments, and by how many points a router may be behind what
TEXT_GOALS = {
    "exp1": {"fixed-deep": 0.5, "fixed-at-E": 0.2},
    "exp1-thin": {"fixed-deep": 0.5, "fixed-at-E": 0.2},
    "exp2": {"fixed-shallow": 0.3},
    "exp2-thin": {"fixed-shallow": 0.0},  # where depth is worth about a point, a router should be ahead
}


def known_goals(settings: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row a setting, router (one of ROUTERS) and goal: what is found, and whether the goal is reached.

    Goals are named alike in each setting.
    settings: of each name, its records. Those without token worth are left out. Fewer than six seeds, which
    must be those of the models that it is compared with too, decide nothing: "so far".
    """
    rows = []
    for (name, records), model in itertools.product(settings.items(), ROUTERS):
        own = records[records["model"] == model] if len(records) else records
        told = f"{name}, {LABELS[model]}, {seeds_so_far(len(own))}"
        for goal, found, met, seeds in goals_of(records, model) if len(own) else ():
            so_far = "" if seeds >= LEAST_SEEDS else " so far"
            found += "" if seeds == len(own) else f"; {seeds_so_far(seeds)}"
            reached = ("yes" if met else "no") + so_far
            rows.append([told, model, goal, found, reached])
    columns = ["setting", "router", "goal", "found", "reached"]
    return pd.DataFrame(rows, columns=columns).set_index("setting")


def goals_side_by_side(goals: pd.DataFrame, router: str = "worth") -> pd.DataFrame:
    """A row a goal and a column a setting, of one of ROUTERS: whether it is reached, and what is found."""
    own = goals[goals["router"] == router].reset_index()
    own["told"] = own["reached"] + ": " + own["found"]
    wide = own.pivot(index="goal", columns="setting", values="told").fillna("")
    of_setting = sorted((group["goal"].tolist() for _, group in own.groupby("setting")), key=len)
    in_order = dict.fromkeys(itertools.chain(*reversed(of_setting)))  # the setting with the most goals first
    wide = wide.reindex(index=list(in_order), columns=own["setting"].unique())
    return wide.rename_axis(index="goal", columns=None)


def known_settings() -> dict[str, pd.DataFrame]:
    """The records that ship of each setting of hops."""
    return {
        "wide": stored_records("known-depth"),
        "narrow": narrow_records(),
        "narrow, a rate that stays high": stored_records("known-depth-wsd"),
        "wide, four layers, a rate that stays high": stored_records("known-depth-4"),
        "twelve layers": deep_records(),
    }


def goals_of(records: pd.DataFrame, model: str) -> Iterator[Row]:
    """Each goal that the records allow to judge of a model."""
    scored = with_hops(records)
    own = scored[scored["model"] == model]
    paired = set(scored[scored["seed"].isin(own["seed"])]["model"])  # who shares a seed with it
    yield depth_goal(own)
    yield plan_goal(own)
    if "fixed-deep" in paired:
        yield every_k_goal(records, model)
    yield from (ahead_goal(scored, model, label) for label in BEHIND if label in paired)
    solved, n = int(own["solved"].sum()), len(own)
    yield f"{SOLVED:g} % at every k, at every seed", f"{solved} of {n}", solved == n, n
    yield from speed_goal(records, model)


def depth_goal(own: pd.DataFrame) -> Row:
    """Whether the depth that is asked for is held: in the mean within NEAR, at each seed within EACH."""
    E, asked = own["effective_depth"], asked_depth(own.iloc[0]["record"]["config"]["model"])
    met = abs(E.mean() - asked) <= NEAR and (E - asked).abs().max() <= EACH
    found = f"{E.mean():.2f} ({E.min():.2f} to {E.max():.2f}) of {asked:g}"
    return "the depth asked for is held", found, met, len(own)


def plan_goal(own: pd.DataFrame) -> Row:
    """At how many seeds the table and x run nearly all layers (DEEP), and the other tokens few (SHALLOW)."""
    found = 0
    for record in own["record"]:
        N, depth = record["config"]["model"]["n_layers"], record["metrics"]["details"]["depth_by_kind"]
        deep, others = ("table", "x"), set(KINDS) - {"table", "x"}
        found += all(depth[kind] >= DEEP * N for kind in deep) and all(
            depth[kind] <= SHALLOW * N for kind in others
        )
    return "the plan is found at every seed", f"{found} of {len(own)}", found == len(own), len(own)


def every_k_goal(records: pd.DataFrame, model: str) -> Row:
    """How far a model is behind all layers at the k where it is furthest behind, in means of paired seeds."""
    wide = by_hops(records).pivot_table(index=["k", "seed"], columns="model", values="accuracy")
    gaps = (wide[model] - wide["fixed-deep"]).dropna().groupby("k")
    behind = gaps.mean()
    found = f"{signed(behind.min(), 1)} points at k = {behind.idxmin()}"
    goal = f"within {CLOSE:g} point of all layers at every k"
    return goal, found, behind.min() >= -CLOSE, int(gaps.size().min())


def ahead_goal(scored: pd.DataFrame, model: str, label: str) -> Row:
    """How far a model is ahead of a fixed one at the upper half of k, its interval above SURE."""
    c = compare_hops(scored, model, label)
    interval = f" ({reach})" if (reach := span(c["low"], c["high"], 1)) else ""
    met = c["mean"] >= AHEAD and not c["low"] <= SURE  # few seeds have no interval
    return f"{AHEAD:g} points ahead of {BEHIND[label]}", signed(c["mean"], 1) + interval, met, c["pairs"]


def speed_goal(records: pd.DataFrame, model: str) -> Iterator[Row]:
    """Which share of what the plan gains over half of the layers a model has in half of the steps, and the
    plan itself; at the upper half of k, on validation lines, over the seeds that all three share. Nothing
    without a gain."""

    def reached(record: dict, step: float) -> float:
        points = [point for point in record["history"] if point["step"] >= step]
        return upper_half(points[0]["val_details"]["by_hops"])

    rows = {(r["model"], r["seed"]): r for r in records["record"]}
    three = ("fixed-half", "planted", model)
    seeds = [seed for seed in sorted({seed for _, seed in rows}) if all((m, seed) in rows for m in three)]
    steps = steps_of(records[records["model"] == model].iloc[0]["record"]["config"])

    def mean(label: str, at: float) -> float:
        return float(np.mean([reached(rows[label, seed], at * steps) for seed in seeds]))

    if seeds and mean("planted", 1) > (half := mean("fixed-half", 1)):
        own, plan = ((mean(m, 0.5) - half) / (mean("planted", 1) - half) for m in (model, "planted"))
        goal = f"{100 * GAIN:.0f} % of the plan's gain in half of the steps"
        found = f"{share_of_gain(own)} (the plan itself: {share_of_gain(plan)})"
        yield goal, found, own >= GAIN, len(seeds)


def share_of_gain(share: float) -> str:
    """A share of a gain in words."""
    return f"{100 * share:.0f} %" if share > 0 else "none of it"


def text_goals(folder: Path | None = None) -> pd.DataFrame:
    """A row an experiment that trains long, router and goal: behind fixed layers by so many points at most,
    or ahead of them (0 points).

    The first is reached where the whole 90 % interval says so, the second where the comparison is judged
    better, by its 95 % interval. Fewer than six seeds decide nothing: "so far".
    """
    rows = []
    for experiment, rivals in TEXT_GOALS.items():
        records = long_records(experiment, folder)
        layers = layers_by_model(records)
        for label, name in ((ROUTED[experiment][0], "MoR"), ("worth", "token worth")):
            for other in [other for other in rivals if {label, other} <= set(layers)]:
                most, c = rivals[other], compare(records, label, other, margin=rivals[other] or MARGIN)
                decided = c["pairs"] >= LEAST_SEEDS
                if most:
                    low, high, shown = c["low90"], c["high90"], c["low90"] >= -most
                else:
                    low, high, shown = c["low"], c["high"], judged(c) == "better"
                interval = f" ({reach})" if decided and (reach := span(low, high)) else ""
                met = shown if decided else c["mean"] > -most
                told = f"{TEXT_NAMES[experiment]}, {name}, {seeds_so_far(c['pairs'])}"
                fixed = f"{count(layers[other])} fixed layers"
                goal = f"{most:g} points behind {fixed} at most" if most else f"ahead of {fixed}"
                reached = ("yes" if met else "no") + ("" if decided else " so far")
                rows.append([told, goal, signed(c["mean"]) + interval, reached])
    return pd.DataFrame(rows, columns=["setting", "goal", "found", "reached"]).set_index("setting")


def known_goals_sentence(table: pd.DataFrame) -> str:
    """How many of the goals are reached in each setting."""
    told = []
    for setting, own in table.groupby("setting", sort=False):
        won = int(own["reached"].str.startswith("yes").sum())
        told.append(f"{setting}: {count(won)} of {count(len(own))}")
    return f"Goals reached: {'; '.join(told)}" if told else ""
