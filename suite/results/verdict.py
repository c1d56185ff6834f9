"""The README's answers in a word or two, in which the records decide."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..runs.experiments import ROUTED
from .headlines import epochs_of, longer, rivals
from .known_depth import answerable, compare_hops, names_of, with_hops
from .stats import compare, different, judged
from .tables import count, signed


def short_answer(experiment: str, records: pd.DataFrame, folder: Path | None = None) -> str:
    """Of an experiment: yes, no or not shown. Of experiments 1 and 3 also whether MoR is ahead of as many
    fixed layers as it runs, and whether the answer holds after longer training."""
    stands = judged(compare(records, *rivals(experiment)))
    if experiment == "exp2":
        return {"better": "Yes.", "open": "Not shown."}.get(stands, "No.")
    if stands in ("worse", "open"):
        return "No." if stands == "worse" else "Not shown."
    layers = count(round(records[records["model"] == "fixed-at-E"]["effective_depth"].mean()))
    ahead = judged(compare(records, ROUTED[experiment][0], "fixed-at-E"))
    better = {"better": "and better than", "open": "but not shown to be better than"}
    told = f"Yes, {better.get(ahead, 'but no better than')} {layers} fixed layers"
    c = longer(experiment, folder)
    if c is None:
        return f"{told}; of longer training no record ships."
    after = {"worse": "not after longer training", "open": "open after longer training"}
    return f"{told}; {after.get(judged(c), 'after longer training too')}."


def with_depth(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Those of the tables from which it can be said what depth is worth to fixed models and to MoR."""
    needed = {"mor", "fixed-deep", "fixed-shallow", "fixed-at-E"}
    return [records for records in tables if needed <= set(records.get("model", ()))]


def worth_of_all_layers(tables: list[pd.DataFrame]) -> str:
    """What all layers are worth against half of them, in each table."""
    worth = [compare(records, "fixed-deep", "fixed-shallow") for records in tables]
    points = " and ".join(signed(c["mean"]) + ("" if different(c) else " (not shown)") for c in worth)
    widths = " and ".join(str(r["record"].iloc[0]["config"]["model"]["d_model"]) for r in tables)
    return f"{points} points at width {widths}"


def against_its_cost(tables: list[pd.DataFrame]) -> str:
    """Whether MoR is better than fixed layers of its cost, over all tables."""
    found = {judged(compare(records, "mor", "fixed-at-E")) for records in tables}
    better = "not shown to be better" if "open" in found else "no better"
    if "better" in found:
        better = "better" if found == {"better"} else "not always better"
    return f"is {better} than fixed layers of its cost"


def short_depth(tables: list[pd.DataFrame]) -> str:
    """What all layers are worth against half of them, and whether MoR is better than fixed layers of its
    cost. Nothing without records of these.

    tables: of models that train long, one a setting.
    """
    tables = with_depth(tables)
    return f"{worth_of_all_layers(tables)}; MoR {against_its_cost(tables)}." if tables else ""


def gains(tables: list[pd.DataFrame], model: str) -> str:
    """A model against half of the layers, in each table (points), and whether that is shown to be a gain."""
    found = [compare(records, model, "fixed-shallow") for records in tables]
    shown = ["" if different(gain) else " (not shown to be a gain)" for gain in found]
    return " and ".join(signed(gain["mean"]) + words for gain, words in zip(found, shown))


def in_short(known: pd.DataFrame, tables: list[pd.DataFrame]) -> str:
    """Both halves of what the suite shows, in a few sentences: whether depth is found where it is known to
    matter, and what depth is worth on text. Nothing without records of both.

    known: `main_records`. tables: as of `short_depth`.
    """
    tables = with_depth(tables)
    if not tables or not answerable(known):
        return ""
    scored, names = with_hops(known), names_of(known)
    right = {label: f"{hops:.0f} %" for label, hops in scored.groupby("model")["hops"].mean().items()}
    E = scored[scored["model"] == "worth"]["effective_depth"].mean()
    words = {"better": "finds the kinds of tokens that need it", "open": "is not shown to find them"}
    found = {}
    for label in [label for label in ("worth", "mor") if label in right]:
        stands = judged(compare_hops(scored, label, "fixed-half"))
        found[label] = words.get(stands, "does not find them")
    spread = f"; free to choose in all layers but one, {right['mor-spread']}" if "mor-spread" in right else ""
    mor = f"; MoR's router {found['mor']} ({right['mor']}{spread})" if "mor" in found else ""
    trained = f"On text, after {epochs_of(tables[0], 'fixed-deep')} epochs"
    return (
        "**In short.** Where depth is known to matter (a task of following a permutation), *token worth*, a "
        f"router that learns what depth is worth to a token, {found['worth']}. Held to E {E:.1f}, which is "
        f"set by hand, it answers {right['worth']} of the hard questions, {names['fixed-half']} "
        f"{right['fixed-half']}, {names['fixed-deep']} {right['fixed-deep']}{mor}. {trained}, all layers "
        f"against half of them are worth {worth_of_all_layers(tables)}. MoR gets {gains(tables, 'mor')} of "
        f"that, and {against_its_cost(tables)}, which get {gains(tables, 'fixed-at-E')}."
    )


def short_known(records: pd.DataFrame) -> str:
    """Whether token worth, and MoR's router, beat half of the layers where depth is known to matter."""
    scored = with_hops(records)
    words = {"better": "does", "open": "is not shown to"}
    told = []
    for label, name in (("worth", "Token worth"), ("mor", "MoR's router")):
        if label in set(scored["model"]):
            won = judged(compare_hops(scored, label, "fixed-half"))
            at = " at a depth that is set by hand" if label == "worth" and won == "better" else ""
            told.append(f"{name} {words.get(won, 'does not')}{at}")
    return f"{'; '.join(told)}."
