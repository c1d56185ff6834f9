"""What a router should reach where depth is known to matter, and what token worth reaches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pandas as pd

from ..runs import stored_records
from .headlines import seeds_so_far
from .known_depth import (
    KINDS,
    LABELS,
    SOLVED,
    by_hops,
    deep_records,
    names_of,
    narrow_records,
    steps_of,
    upper_half,
    with_hops,
)
from .known_front import asked_depth
from .stats import LEAST_SEEDS, compare
from .tables import count, signed, span

NEAR, EACH = 0.05, 0.15  # how far the mean of E, and each seed's, may be from what is asked for
CLOSE, AHEAD, SURE = 1.0, 25.0, 15.0  # points: behind all layers, ahead of half of them, and of its interval
DEEP, SHALLOW = 0.8, 0.3  # shares of the layers that the plan's deep tokens, and the others, run
GAIN = 0.9  # share of what the plan gains over half of the layers
ROUTERS = ("worth", "worth-by-windows")
Row = tuple[str, str, bool]  # the goal, what is found, whether that is it


def known_goals(settings: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row a setting, router of token worth and goal: what is found, and whether the goal is reached.

    settings: of each name, its records. Those without token worth are left out. Fewer than six seeds decide
    nothing: "so far".
    """
    rows = []
    for (name, records), model in itertools.product(settings.items(), ROUTERS):
        own = records[records["model"] == model] if len(records) else records
        told = f"{name}, {LABELS[model]}, {seeds_so_far(len(own))}"
        for goal, found, met in goals_of(records, model) if len(own) else ():
            so_far = "" if len(own) >= LEAST_SEEDS else " so far"
            rows.append([told, goal, found, ("yes" if met else "no") + so_far])
    return pd.DataFrame(rows, columns=["setting", "goal", "found", "reached"]).set_index("setting")


def known_settings() -> dict[str, pd.DataFrame]:
    """The records that ship of each setting of hops."""
    own = {"wide": stored_records("known-depth"), "narrow": narrow_records()}
    return own | {"twelve layers": deep_records()}


def goals_of(records: pd.DataFrame, model: str) -> Iterator[Row]:
    """Each goal that the records allow to judge of a model."""
    scored, names = with_hops(records), names_of(records)
    own = scored[scored["model"] == model]
    paired = set(scored[scored["seed"].isin(own["seed"])]["model"])  # who shares a seed with it
    yield depth_goal(own)
    yield plan_goal(own)
    if "fixed-deep" in paired:
        yield every_k_goal(records, model, names["fixed-deep"])
    for label in ("fixed-half", "fixed-half-long", "fixed-between"):
        if label in paired:
            yield ahead_goal(scored, model, label, names[label])
    solved = int(own["solved"].sum())
    yield f"{SOLVED:g} % at every k, at every seed", f"{solved} of {len(own)}", solved == len(own)
    if {"planted", "fixed-half"} <= set(names):
        yield speed_goal(records, model, names["fixed-half"])


def depth_goal(own: pd.DataFrame) -> Row:
    """Whether the depth that is asked for is held."""
    E, asked = own["effective_depth"], asked_depth(own.iloc[0]["record"]["config"]["model"])
    met = abs(E.mean() - asked) <= NEAR and (E - asked).abs().max() <= EACH
    goal = f"E {asked:g}: the mean within {NEAR:g}, each seed within {EACH:g}"
    return goal, f"{E.mean():.2f} ({E.min():.2f} to {E.max():.2f})", met


def plan_goal(own: pd.DataFrame) -> Row:
    """At how many seeds the table and x run nearly all layers, and the other tokens few."""
    found = 0
    for record in own["record"]:
        N, depth = record["config"]["model"]["n_layers"], record["metrics"]["details"]["depth_by_kind"]
        deep, others = ("table", "x"), set(KINDS) - {"table", "x"}
        found += all(depth[kind] >= DEEP * N for kind in deep) and all(
            depth[kind] <= SHALLOW * N for kind in others
        )
    goal = f"the plan: table and x run {DEEP:g} N or more, others {SHALLOW:g} N or less, at every seed"
    return goal, f"{found} of {len(own)}", found == len(own)


def every_k_goal(records: pd.DataFrame, model: str, name: str) -> Row:
    """How far a model is behind all layers at the k where it is furthest behind, in means of paired seeds."""
    wide = by_hops(records).pivot_table(index=["k", "seed"], columns="model", values="accuracy")
    behind = (wide[model] - wide["fixed-deep"]).dropna().groupby("k").mean()
    found = f"{signed(behind.min(), 1)} points at k = {behind.idxmin()}"
    return f"within {CLOSE:g} point of {name} at every k", found, behind.min() >= -CLOSE


def ahead_goal(scored: pd.DataFrame, model: str, label: str, name: str) -> Row:
    """How far a model is ahead of a fixed one at the upper half of k."""
    c = compare(scored, model, label, metric="hops", margin=CLOSE)
    interval = "" if pd.isna(c["low"]) else f" ({span(c['low'], c['high'], 1)})"
    met = c["mean"] >= AHEAD and not c["low"] < SURE
    return f"{AHEAD:g} points ahead of {name}, interval above {SURE:g}", signed(c["mean"], 1) + interval, met


def speed_goal(records: pd.DataFrame, model: str, half: str) -> Row:
    """Which share of what the plan gains over half of the layers a model has in half of the steps; at the
    upper half of k, on validation lines."""
    ends, halfway = {}, []
    for label in ("fixed-half", "planted"):
        points = [r["history"][-1] for r in records[records["model"] == label]["record"]]
        ends[label] = sum(upper_half(p["val_details"]["by_hops"]) for p in points) / len(points)
    for record in records[records["model"] == model]["record"]:
        point = next(p for p in record["history"] if p["step"] >= steps_of(record["config"]) / 2)
        halfway.append(upper_half(point["val_details"]["by_hops"]))
    gain = ends["planted"] - ends["fixed-half"]
    share = (sum(halfway) / len(halfway) - ends["fixed-half"]) / gain
    goal = f"{GAIN:.0%} of the plan's gain over {half}, in half of the steps".replace("%", " %")
    return goal, f"{100 * share:.0f} %" if share > 0 else "none of it", share >= GAIN


def known_goals_sentence(table: pd.DataFrame) -> str:
    """How many of the goals are reached in each setting."""
    told = []
    for setting, own in table.groupby("setting", sort=False):
        won = int(own["reached"].str.startswith("yes").sum())
        told.append(f"{setting}: {count(won)} of {count(len(own))}")
    return f"Goals reached: {'; '.join(told)}" if told else ""
