"""The README's answers in a word or two, in which the records decide."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..runs import stored_records
from ..runs.experiments import ROUTED
from .known_depth import verdict_of, with_hops
from .stats import compare, different, equal
from .tables import count, signed


def ahead(comparison: dict) -> bool:
    """Whether a comparison shows that the first of the two is better."""
    return different(comparison) and comparison["mean"] > 0


def keeps(comparison: dict) -> bool:
    """Whether a comparison shows that the first of the two is as good, within the margin, or better."""
    return ahead(comparison) or equal(comparison)


def short_answer(experiment: str, records: pd.DataFrame, folder: Path | None = None) -> str:
    """Of an experiment: yes or no, whether MoR is ahead of as many fixed layers as it runs, and whether it
    holds after longer training, where records of that ship."""
    (routed, _), fixed = ROUTED[experiment], "fixed-shallow" if experiment == "exp2" else "fixed-deep"
    c = compare(records, routed, fixed)
    if experiment == "exp2":
        return "Yes." if ahead(c) else "No."
    if not keeps(c):
        return "No." if different(c) else "Not shown."
    layers = count(round(records[records["model"] == "fixed-at-E"]["effective_depth"].mean()))
    better = ahead(compare(records, routed, "fixed-at-E"))
    told = f"Yes, {'and better than' if better else 'but no better than'} {layers} fixed layers"
    long = stored_records(f"{experiment}-long", folder)
    if {routed, fixed} <= set(long.get("model", ())):
        c = compare(long, routed, fixed)
        told += "; trained longer too" if keeps(c) else "; trained longer no" if different(c) else ""
    return f"{told}."


def short_depth(tables: list[pd.DataFrame]) -> str:
    """What all layers are worth against half of them at most, and whether MoR gets more of that than fixed
    layers of its cost. Nothing without records of these.

    tables: of models that train long, one a setting.
    """
    needed = {"mor", "fixed-deep", "fixed-shallow", "fixed-at-E"}
    tables = [records for records in tables if needed <= set(records.get("model", ()))]
    if not tables:
        return ""
    most = max(compare(records, "fixed-deep", "fixed-shallow")["mean"] for records in tables)
    ahead_of_fixed = [ahead(compare(records, "mor", "fixed-at-E")) for records in tables]
    gets = "more" if all(ahead_of_fixed) else "not always more" if any(ahead_of_fixed) else "no more"
    return f"{signed(most)} points at most; MoR gets {gets} of it than fixed layers of its cost."


def short_known(records: pd.DataFrame) -> str:
    """Whether token worth is better than half of the layers where depth is known to matter, and MoR."""
    scored = with_hops(records)
    labels = [label for label in ("worth", "mor") if label in set(scored["model"])]
    won = {label: verdict_of(compare(scored, label, "fixed-half", metric="hops")) for label in labels}
    said = {"better": "does", "worse": "does not"}
    told = [
        f"{name} {said.get(won[label], 'is not shown to')}"
        for label, name in (("worth", "Token worth"), ("mor", "MoR's own router"))
        if label in won
    ]
    return f"{'; '.join(told)}."
