"""The settings of the task of known depth, side by side, and the answer of notebook 07."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..runs import stored_records, table_of
from .headlines import show
from .known_depth import (
    answerable,
    by_hops,
    deep_records,
    draw_known_depth,
    hops_sentence,
    main_records,
    map_records,
    narrow_records,
    steps_of,
    with_hops,
)
from .stats import LEAST_SEEDS

SIDE_BY_SIDE = {  # the models of the table, and how its columns name them
    "fixed-half": "half",
    "fixed-half-long": "half, twice as long",
    "fixed-between": "between",
    "fixed-deep": "all",
    "mor": "MoR",
    "frozen": "untrained",
    "worth": "token worth",
    "worth-by-windows": "by windows",
    "planted": "the plan",
}
CAPTION = (
    "A line gives a permutation of eight letters (in the last row ten), and a question asks where *k* hops "
    "lead. The table: how many hard questions of the upper half of *k* are right (%), means of six seeds, in "
    "brackets how many where they are fewer. *Hard*: no shortcut answers them. Fixed depth: *half* of the "
    "layers, *between* (three of four, four of six) and *all*. *E* is that of token worth; MoR, and the same "
    "*untrained*, are held to it. *By windows*: token worth taught by whole windows. *The plan* is written "
    "by hand: the permutation and the letters asked about run all layers, other tokens one. *Rate stays "
    "high*: the learning rate falls in the last fifth of the steps only. \u2013: not trained."
)


def known_settings(folder: Path | None = None) -> dict[str, pd.DataFrame]:
    """The records that ship of each setting of hops."""
    return {
        "narrow": narrow_records(folder),
        "narrow, a rate that stays high": stored_records("known-depth-wsd", folder),
        "wide, four layers, a rate that stays high": stored_records("known-depth-4", folder),
        "wide": wide_records(folder),
        "twelve layers": deep_records(folder),
    }


def wide_records(folder: Path | None = None) -> pd.DataFrame:
    """The records that ship of the wide setting, with those that other experiments trained in it: half of the
    layers in twice the steps, a depth between, and the untrained router."""
    own, field = stored_records("known-depth", folder), stored_records("field-wide", folder)
    if not answerable(own):
        return own
    first = own[own["model"] == "fixed-half"].iloc[0]["record"]
    half, kind = first["config"], {name: first[name] for name in ("experiment", "preset")}
    label = f"fixed {half['model']['n_layers']}, {2 * steps_of(half)} steps"
    more = [r | dict(model="fixed-half-long") for r in map_records(folder)["record"] if r["model"] == label]
    more += [r for r in field.get("record", ()) if r["model"] in ("fixed-between", "frozen")]
    return table_of([*own["record"], *(r | kind for r in more)])


def settings_table(folder: Path | None = None) -> pd.DataFrame:
    """One row a setting, with the E that token worth runs, and a column a model: hard answers right at the
    upper half of k (%), on average. Fewer seeds than a claim needs stand in brackets. Settings without an
    answer are left out."""
    rows = {}
    for records in known_settings(folder).values():
        if not answerable(records):
            continue
        scored = with_hops(records)
        groups = scored.groupby("model")
        right, seeds, E = groups["hops"].mean(), groups["seed"].nunique(), groups["effective_depth"].mean()
        config = records[records["model"] == "fixed-deep"].iloc[0]["record"]["config"]
        name = "{n_layers} layers, width {d_model}".format(**config["model"])
        name += f", {by_hops(records)['k'].max()} hops, {steps_of(config):,} steps"
        name += ", rate stays high" if config["train"].get("schedule") == "wsd" else ""
        rows[name] = {"E": f"{E['worth']:.1f}"}
        for label, column in SIDE_BY_SIDE.items():
            few = f" ({seeds[label]})" if label in seeds and seeds[label] < LEAST_SEEDS else ""
            rows[name][column] = f"{right[label]:.0f}{few}" if label in right else "\u2013"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("setting")


def known_depth_headline(folder: Path | None = None) -> None:
    """Show the answer of notebook 07 from the records that ship."""
    records = main_records(folder)
    if not answerable(records):
        print("No stored record of this task ships with this copy: run the notebook to make some.")
        return
    show(hops_sentence(records), settings_table(folder), CAPTION)
    draw_known_depth(records)
