"""What a router should reach where depth is known to matter, and on text, and what it reaches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ..runs.experiments import ROUTED
from .dial import at_own_depth
from .headlines import TEXT_NAMES, seeds_so_far
from .known_depth import (
    KINDS,
    LABELS,
    SOLVED,
    by_hops,
    compare_hops,
    steps_of,
    upper_half,
    with_hops,
)
from .known_front import asked_depth
from .long import long_records
from .stats import LEAST_SEEDS, MARGIN, compare, interval, judged, tested
from .tables import count, layers_by_model, signed, span, verdict_words

NEAR, EACH = 0.05, 0.15  # how far the mean of E, and each seed's, may be from what is asked for
CLOSE, AHEAD, SURE = 1.0, 25.0, 15.0  # points: behind all layers, ahead of half of them, and of its interval
DEEP, SHALLOW = 0.8, 0.3  # shares of the layers that the plan's deep tokens, and the others, run
GAIN = 0.9  # share of what the plan gains over half of the layers
ROUTERS = ("worth", "worth-by-windows")
# What these reach of a goal stands where a router misses it
YARDSTICKS = {"planted": "The plan", "fixed-deep": "All layers"}
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
    must be those of the models that it is compared with too, decide nothing: "so far". Where a goal is
    missed, what YARDSTICKS reach of it stands beside.
    """
    rows = []
    for name, records in settings.items():
        seeds_of = records.groupby("model").size() if len(records) else {}
        there = [label for label in YARDSTICKS if label in seeds_of]
        yardsticks = {YARDSTICKS[label]: list(further_goals(records, label)) for label in there}
        for model in [model for model in ROUTERS if model in seeds_of]:
            n = int(seeds_of[model])
            told = f"{name}, {LABELS[model]}, {seeds_so_far(n)}"
            for goal, found, met, seeds in goals_of(records, model):
                reached, found = in_words(found, met, seeds, n)
                found += "" if met else beside(yardsticks, goal, n)
                rows.append([told, model, goal, found, reached])
    columns = ["setting", "router", "goal", "found", "reached"]
    return pd.DataFrame(rows, columns=columns).set_index("setting")


def in_words(found: str, met: bool, seeds: int, n: int) -> tuple[str, str]:
    """Whether a goal is reached, and what is found; n: the router's seeds, of which so many were used."""
    reached = ("yes" if met else "no") + ("" if seeds >= LEAST_SEEDS else " so far")
    return reached, found + ("" if seeds == n else f"; {seeds_so_far(seeds)}")


def beside(yardsticks: dict[str, list[Row]], goal: str, n: int) -> str:
    """What each yardstick that can have such a goal reaches of it; n: the router's seeds."""
    told = ""
    for name, rows in yardsticks.items():
        for own, found, met, seeds in rows:
            if own == goal:
                told += ". {}: {}, {}".format(name, *in_words(found, met, seeds, n))
    return told


def goals_side_by_side(goals: pd.DataFrame, router: str = "worth") -> pd.DataFrame:
    """A row a goal and a column a setting, of one of ROUTERS: whether it is reached, and what is found."""
    own = goals[goals["router"] == router].reset_index()
    own["told"] = own["reached"] + ": " + own["found"]
    wide = own.pivot(index="goal", columns="setting", values="told").fillna("")
    of_setting = sorted((group["goal"].tolist() for _, group in own.groupby("setting")), key=len)
    in_order = dict.fromkeys(itertools.chain(*reversed(of_setting)))  # the setting with the most goals first
    wide = wide.reindex(index=list(in_order), columns=own["setting"].unique())
    return wide.rename_axis(index="goal", columns=None)


def goals_of(records: pd.DataFrame, model: str) -> Iterator[Row]:
    """Each goal that the records allow to judge of a router."""
    own = records[records["model"] == model]
    yield depth_goal(own)
    yield plan_goal(own)
    yield from follow_goal(own)
    yield from further_goals(records, model)


def further_goals(records: pd.DataFrame, model: str) -> Iterator[Row]:
    """Of these goals those that a model without a router may have, too."""
    scored = with_hops(records)
    own = scored[scored["model"] == model]
    paired = set(scored[scored["seed"].isin(own["seed"])]["model"]) - {model}  # who shares a seed with it
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
    found = sum(is_plan(record["metrics"]["details"], record) for record in own["record"])
    return "the plan is found at every seed", f"{found} of {len(own)}", found == len(own), len(own)


def is_plan(details: dict, record: dict) -> bool:
    """Whether the table and x run nearly all layers, and the other tokens few, by the details of a run."""
    N, depth = record["config"]["model"]["n_layers"], details["depth_by_kind"]
    shallow = set(KINDS) - {"table", "x"}
    return all(depth[k] <= SHALLOW * N if k in shallow else depth[k] >= DEEP * N for k in KINDS)


def follow_goal(own: pd.DataFrame) -> Iterator[Row]:
    """Whether depth rises with the number of hops, at the depth that a router is trained for; nothing where
    no dial that ships was measured on these runs."""
    r = at_own_depth(list(own["record"]))
    if len(r):
        mean, low, high = interval(r)
        found = signed(mean) + (f" ({reach})" if (reach := span(low, high)) else "")
        yield "depth rises with the number of hops", found, low > 0, len(r)


def every_k_goal(records: pd.DataFrame, model: str) -> Row:
    """How far a model may be behind all layers at some k: the lowest end of a 90 % interval over paired
    seeds, as for equality; without intervals the lowest mean."""
    wide = by_hops(records).pivot_table(index=["k", "seed"], columns="model", values="accuracy")
    gaps = (wide[model] - wide["fixed-deep"]).dropna().groupby("k")
    found = {k: tested(gap.to_numpy()) for k, gap in gaps}
    least = {k: c["mean"] if np.isnan(c["low90"]) else c["low90"] for k, c in found.items()}
    k = min(least, key=least.get)
    reach = span(found[k]["low90"], found[k]["high90"], 1)
    told = f"{signed(found[k]['mean'], 1)} points at k = {k}" + (f" ({reach})" if reach else "")
    goal = f"within {CLOSE:g} point of all layers at every k (90 % interval)"
    return goal, told, least[k] >= -CLOSE, int(gaps.size().min())


def ahead_goal(scored: pd.DataFrame, model: str, label: str) -> Row:
    """How far a model is ahead of a fixed one at the upper half of k, its interval above SURE."""
    c = compare_hops(scored, model, label)
    interval = f" ({reach})" if (reach := span(c["low"], c["high"], 1)) else ""
    met = c["mean"] >= AHEAD and not c["low"] <= SURE  # few seeds have no interval
    return f"{AHEAD:g} points ahead of {BEHIND[label]}", signed(c["mean"], 1) + interval, met, c["pairs"]


def speed_goal(records: pd.DataFrame, model: str) -> Iterator[Row]:
    """Which share of what the plan gains over half of the layers a model has in half of the steps; at the
    upper half of k, on validation lines, over the seeds that all three share. Nothing without a gain."""

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
        own = (mean(model, 0.5) - half) / (mean("planted", 1) - half)
        goal = f"{100 * GAIN:.0f} % of the plan's gain in half of the steps"
        yield goal, share_of_gain(own), own >= GAIN, len(seeds)


def share_of_gain(share: float) -> str:
    """A share of a gain in words."""
    return f"{100 * share:.0f} %" if share > 0 else "none of it"


def text_goals(folder: Path | None = None) -> pd.DataFrame:
    """A row an experiment that trains long, router and goal: behind fixed layers by so many points at most,
    or ahead of them (0 points).

    The first is reached where the whole 90 % interval says so, the second where the comparison is judged
    better, by its 95 % interval. Fewer than six seeds decide nothing, nor do runs that did not train: "so
    far". Where a goal is missed, what as many fixed layers as MoR runs reach of it stands beside.
    """
    rows = []
    for experiment, rivals in TEXT_GOALS.items():
        records = long_records(experiment, folder)
        layers = layers_by_model(records)
        for label, name in ((ROUTED[experiment][0], "MoR"), ("worth", "token worth")):
            for other in [other for other in rivals if {label, other} <= set(layers)]:
                most, fixed = rivals[other], f"{count(layers[other])} fixed layers"
                goal = f"{most:g} points behind {fixed} at most" if most else f"ahead of {fixed}"
                found, reached, seeds = of_text(records, label, other, most)
                if reached.startswith("no") and other != "fixed-at-E" and "fixed-at-E" in layers:
                    own, theirs, _ = of_text(records, "fixed-at-E", other, most)
                    found += f". {count(layers['fixed-at-E']).capitalize()} fixed layers: {theirs}, {own}"
                told = f"{TEXT_NAMES[experiment]}, {name}, {seeds_so_far(seeds)}"
                rows.append([told, goal, found, reached])
    return pd.DataFrame(rows, columns=["setting", "goal", "found", "reached"]).set_index("setting")


def of_text(records: pd.DataFrame, label: str, other: str, most: float) -> tuple[str, str, int]:
    """A model against another on text, in points, whether that is a goal's (`text_goals`), and over how many
    seeds."""
    c = compare(records, label, other, margin=most or MARGIN)
    decided = not c["claim"].startswith("none")
    low, high, shown = c["low"], c["high"], judged(c) == "better"
    if most:
        low, high, shown = c["low90"], c["high90"], c["low90"] >= -most
    enough = c["pairs"] >= LEAST_SEEDS
    found = signed(c["mean"]) + (f" ({reach})" if enough and (reach := span(low, high)) else "")
    found += f"; {verdict_words(c)}" if enough and not decided else ""
    met = shown if decided else c["mean"] > -most
    return found, ("yes" if met else "no") + ("" if decided else " so far"), c["pairs"]


def known_goals_sentence(table: pd.DataFrame) -> str:
    """How many of the goals are reached in each setting; those that few seeds reach stand apart."""
    told = []
    for setting, own in table.groupby("setting", sort=False):
        won, so_far = (int((own["reached"] == word).sum()) for word in ("yes", "yes so far"))
        more = f" ({count(so_far)} more so far)" if so_far else ""
        told.append(f"{setting}: {count(won)} of {count(len(own))}{more}")
    return f"Goals reached: {'; '.join(told)}" if told else ""
