"""The answers of all experiments side by side: in words for the README, in numbers for RESULTS.md."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from ..runs import stored_records
from .known_depth import WORTH, answerable, hops_verdicts, main_records, steps_of, worth_on_text
from .stats import compare
from .tables import deciding_interval, plain_names, signed, verdict_words

MOR, LONGER = "mor-equal-epochs", "mor-source-protocol"  # of experiment 2
DEPTH = [("fixed-deep", "fixed-shallow"), ("fixed-at-E", "fixed-shallow"), ("mor", "fixed-shallow")]
# Each experiment's comparisons on which an answer rests
COMPARED = {
    "exp1": [("mor", "fixed-deep"), ("mor", "fixed-at-E"), ("mor", "frozen")],
    "pareto": [("fixed 12", "fixed 6")],
    "exp1-long": [("mor", "fixed-deep"), ("mor", "fixed-at-E"), *DEPTH],
    "exp1-thin-long": [
        *DEPTH,
        ("mor", "fixed-at-E"),
        ("by-kind", "blind-tokens"),
        ("by-kind", "mor"),
        ("told", "by-kind"),
    ],
    "exp2": [(MOR, "fixed-shallow"), (MOR, "frozen"), (LONGER, "fixed-shallow"), (LONGER, "fixed-long")],
    "exp2-long": [(MOR, "fixed-shallow")],
    "exp2-thin-long": [("fixed-deep", "fixed-shallow"), (MOR, "fixed-shallow")],
    "exp2-worth": [(WORTH, "fixed-shallow")],
    "bangla": [
        ("mor-deep", "fixed-deep"),
        ("mor-deep", "fixed-at-E"),
        ("mor-deep", "frozen-deep"),
        ("mor-half", "fixed-shallow"),
        ("fixed-deep", "fixed-shallow"),
    ],
    "bangla-long": [("mor-deep", "fixed-deep")],
}
INTERVAL = re.compile(r"(?:, |(?<=\())9[05] % intervals? \S+ to [^\s;),]+")
SEEDS = re.compile(r"(?:[;,] |(?<=\())six seeds(?=\))")


def without_intervals(told: str) -> str:
    """Sentences without the intervals in their brackets, and without how many seeds, where these are six."""
    told = SEEDS.sub("", INTERVAL.sub("", told))
    return told.replace("(; ", "(").replace(" ()", "")


def glance_table(folder: Path | None = None) -> pd.DataFrame:
    """One row a comparison on which an answer rests: setting, who against whom, difference in points of
    accuracy (on the task of known depth: of hard answers right), interval, verdict.

    folder: of records, by default those that ship. What has no records has no row.
    """
    rows = []
    for experiment, pairs in COMPARED.items():
        records = (
            worth_on_text("exp2", folder)
            if experiment == "exp2-worth"
            else stored_records(experiment, folder)
        )
        found = [pair for pair in pairs if set(pair) <= set(records.get("model", ()))]
        names = plain_names(records) if found else {}
        for a, b in found:
            c = compare(records, a, b)
            told = f"{names[a]} against {names[b]}", signed(c["mean"]), deciding_interval(c)
            pair = records[records["model"].isin([a, b])]
            rows.append([setting(pair), *told, verdict_words(c)])
    known = main_records(folder)
    for row in hops_verdicts(known).itertuples(index=False) if answerable(known) else ():
        rows.append([setting(known), f"token worth against {row[0]}", *row[1:]])
    return pd.DataFrame(rows, columns=["setting", "who against whom", "points", "interval", "verdict"])


def setting(records: pd.DataFrame) -> str:
    """Text, width and length of training of some records."""
    first, configs = records.iloc[0], [r["config"] for r in records["record"]]
    length = " and ".join(map(str, sorted({c["train"]["epochs"] for c in configs}))) + " epochs"
    if "details" in first["record"]["metrics"]:  # a task, whose epochs nobody counts
        length = f"{min(map(steps_of, configs)):,} steps"
    split = first["record"]["data"]["split"]
    text = first["data"] + ("" if split == "full" else f", {split}")
    return f"{text}, width {configs[0]['model']['d_model']}, {length}"
