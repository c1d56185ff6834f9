"""The README's answers in a word or two, in which the records decide."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..runs import stored_records
from ..runs.experiments import ROUTED
from .known_depth import verdict_of, with_hops
from .stats import compare, different, equal
from .tables import count, signed


def judged(comparison: dict) -> str:
    """What a comparison shows of the first of the two: "better", "equal", "worse" or "open".

    Better by less than the margin is better, worse by less than the margin is equal.
    """
    if comparison["claim"].startswith("none"):  # few seeds, or a run that did not train
        return "open"
    if different(comparison) and comparison["mean"] > 0:
        return "better"
    if equal(comparison):
        return "equal"
    return "worse" if different(comparison) else "open"


def short_answer(experiment: str, records: pd.DataFrame, folder: Path | None = None) -> str:
    """Of an experiment: yes or no, whether MoR is ahead of as many fixed layers as it runs, and whether it
    holds after longer training, where records of that ship."""
    (routed, _), fixed = ROUTED[experiment], "fixed-shallow" if experiment == "exp2" else "fixed-deep"
    stands = judged(compare(records, routed, fixed))
    if experiment == "exp2":
        return {"better": "Yes.", "open": "Not shown."}.get(stands, "No.")
    if stands in ("worse", "open"):
        return "No." if stands == "worse" else "Not shown."
    layers = count(round(records[records["model"] == "fixed-at-E"]["effective_depth"].mean()))
    better = judged(compare(records, routed, "fixed-at-E")) == "better"
    told = f"Yes, {'and better than' if better else 'but no better than'} {layers} fixed layers"
    long = stored_records(f"{experiment}-long", folder)
    if not {routed, fixed} <= set(long.get("model", ())):
        return f"{told}; longer training was not tried."
    after = {"worse": "not after longer training", "open": "open after longer training"}
    return f"{told}; {after.get(judged(compare(long, routed, fixed)), 'after longer training too')}."


def short_depth(tables: list[pd.DataFrame]) -> str:
    """What all layers are worth against half of them, and whether MoR is better than fixed layers of its
    cost. Nothing without records of these.

    tables: of models that train long, one a setting.
    """
    needed = {"mor", "fixed-deep", "fixed-shallow", "fixed-at-E"}
    tables = [records for records in tables if needed <= set(records.get("model", ()))]
    if not tables:
        return ""
    worth = [compare(records, "fixed-deep", "fixed-shallow")["mean"] for records in tables]
    found = {judged(compare(records, "mor", "fixed-at-E")) for records in tables}
    better = "not shown to be better" if "open" in found else "no better"
    if "better" in found:
        better = "better" if found == {"better"} else "not always better"
    points = " and ".join(map(signed, worth))
    return f"{points} points; MoR is {better} than fixed layers of its cost."


def short_known(records: pd.DataFrame) -> str:
    """Whether token worth, and MoR's router, are better than half of the layers where depth is known to
    matter."""
    scored = with_hops(records)
    names = {"worth": "Token worth", "mor": "MoR's router"}
    words = {"better": "does", "worse": "does not"}
    told = []
    for label, name in names.items():
        if label in set(scored["model"]):
            won = verdict_of(compare(scored, label, "fixed-half", metric="hops", margin=1.0))
            at = " at a depth that is set by hand" if label == "worth" and won == "better" else ""
            told.append(f"{name} {words.get(won, 'is not shown to')}{at}")
    return f"{'; '.join(told)}."
