"""The answers of all experiments side by side: in words for the README, in numbers for RESULTS.md."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from ..runs import stored_records
from ..runs.experiments import ROUTED
from .headlines import SOURCES_MOR, TEXT_NAMES, epochs_of
from .known_depth import WORTH, answerable, hops_verdicts, main_records, steps_of, worth_on_text
from .stats import LEAST_SEEDS, compare, different
from .tables import compare_loss, deciding_interval, plain_names, signed, verdict_words

AGAINST = (  # the columns of `text_table`
    "all layers against half",
    "MoR against all layers",
    "MoR against layers of its cost",
    "MoR against the same, never trained",
)
TEXTS = (
    *("exp1", "exp1-long", "exp1-thin-long"),
    *("exp2", "exp2-long", "exp2-thin-long"),
    *("bangla", "bangla-long"),
)
# Further comparisons on which an answer rests
FURTHER = {
    "pareto": [("fixed 12", "fixed 6")],
    "exp1-long": [("fixed-at-E", "fixed-shallow"), ("mor", "fixed-shallow")],
    "exp1-thin-long": [
        ("fixed-at-E", "fixed-shallow"),
        ("mor", "fixed-shallow"),
        ("by-kind", "blind-tokens"),
        ("by-kind", "mor"),
        ("told", "by-kind"),
    ],
    "exp2": [(SOURCES_MOR, "fixed-shallow"), (SOURCES_MOR, "fixed-long")],
    "exp2-worth": [(WORTH, "fixed-shallow")],
    "bangla": [("mor-half", "fixed-shallow")],
}
ORDER = ("exp1", "pareto", *TEXTS[1:6], "exp2-worth", *TEXTS[6:])  # of the rows of `glance_table`
CAPTION_ON_TEXT = (
    "The table: differences in percentage points of next tokens guessed right on held-out text, means over "
    "six paired seeds, in brackets how many where they are fewer, in bold where a difference is shown. All "
    "layers are twelve, half are six; those of MoR's cost are eight, on half of Tiny Shakespeare six. *Loss "
    "worse*: held-out loss shows what accuracy does not. \u2013: not trained."
)
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
    for experiment in ORDER:
        records = (
            worth_on_text("exp2", folder)
            if experiment == "exp2-worth"
            else stored_records(experiment, folder)
        )
        pairs = [*side_pairs(experiment).values(), *FURTHER.get(experiment, [])]
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


def side_pairs(experiment: str) -> dict[str, tuple[str, str]]:
    """Of an experiment of TEXTS the two models that each column of `text_table` compares; else none."""
    if experiment not in TEXTS:
        return {}
    mor, blind = ROUTED[experiment.removesuffix("-long")]
    as_cheap = "fixed-shallow" if experiment.startswith("exp2") else "fixed-at-E"
    pairs = ("fixed-deep", "fixed-shallow"), (mor, "fixed-deep"), (mor, as_cheap)
    return dict(zip(AGAINST, (*pairs, (mor, blind.replace("random", "frozen")))))


def text_table(folder: Path | None = None) -> pd.DataFrame:
    """One row an experiment of TEXTS that has records, and a column each of AGAINST: the difference in points
    of accuracy, in bold where it is shown. What all layers are worth in experiment 1 is that of the front."""
    rows, front = {}, stored_records("pareto", folder)
    front = front.replace({"model": {"fixed 12": "fixed-deep", "fixed 6": "fixed-shallow"}})
    for experiment in TEXTS:
        records = stored_records(experiment, folder)
        mor, text = ROUTED[experiment.removesuffix("-long")][0], TEXT_NAMES[experiment.partition("-")[0]]
        if mor not in set(records.get("model", ())):
            continue
        width = records.iloc[0]["record"]["config"]["model"]["d_model"]
        name = f"{text}, width {width}, {epochs_of(records, mor)} epochs"
        rows[name] = {"E of MoR": f"{records[records['model'] == mor]['effective_depth'].mean():.2f}"}
        for column, (a, b) in side_pairs(experiment).items():
            own = front if experiment == "exp1" and column == AGAINST[0] else records
            rows[name][column] = points(own, a, b) if {a, b} <= set(own.get("model", ())) else "\u2013"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("text and training")


def points(records: pd.DataFrame, a: str, b: str) -> str:
    """A difference in points, in bold where it is shown, and its seeds where they are too few for a claim."""
    c = compare(records, a, b)
    told = signed(c["mean"]) if round(c["mean"], 2) else "0.00"
    shown = different(c) and not c["claim"].startswith("none")
    told = f"**{told}**" if shown else told
    few = "" if c["pairs"] >= LEAST_SEEDS else f" ({c['pairs']})"
    _, loss = compare_loss(records, a, b)
    return told + few + (f", loss {loss}" if loss and not shown else "")


def setting(records: pd.DataFrame) -> str:
    """Text, width and length of training of some records."""
    first, configs = records.iloc[0], [r["config"] for r in records["record"]]
    length = " and ".join(map(str, sorted({c["train"]["epochs"] for c in configs}))) + " epochs"
    if "details" in first["record"]["metrics"]:  # a task, whose epochs nobody counts
        length = f"{min(map(steps_of, configs)):,} steps"
    split = first["record"]["data"]["split"]
    text = first["data"] + ("" if split == "full" else f", {split}")
    return f"{text}, width {configs[0]['model']['d_model']}, {length}"
