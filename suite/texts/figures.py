"""What the stored records say of the texts, and the pictures of notebook 01."""

from __future__ import annotations

import json

import pandas as pd

from suite import files

from .corpus import Corpus

# Experiments and their texts; those that train long know the longest tables
STORED = {"exp1-long": "Tiny Shakespeare, characters", "bangla-long": "Bangla Wikipedia, pieces"}
PARTS = {"train": "training", "val": "validation", "heldout": "held-out"}
COLOURS = ("#0072B2", "#E69F00", "#CC79A7")  # told apart by the colour-blind (Okabe and Ito 2008)
HATCHES = ("", "///", "...")  # and in grey


def stored_floors() -> pd.DataFrame:
    """The n-gram floors of the held-out texts, from the records that ship.

    Columns: text, counted ("2-grams" and so on), right (%), loss (nats a token). No records give no rows.
    """
    rows = []
    for experiment, text in STORED.items():
        paths = sorted(files.REFERENCE.glob(f"{experiment}_*.json"))
        for path in paths[:1]:  # all of them have the same text
            floors = json.loads(path.read_text(encoding="utf-8"))["floors"]
            for order in sorted(floors):
                floor = floors[order]["heldout"]
                rows.append([text, f"{order}-grams", floor["accuracy"], floor["loss"]])
    return pd.DataFrame(rows, columns=["text", "counted", "right (%)", "loss (nats a token)"])


def headline() -> None:
    """Show the answer of notebook 01: a sentence, a table, a picture, from the records that ship."""
    from IPython.display import Markdown, display

    floors = stored_floors()
    if floors["text"].nunique() < len(STORED):
        print("There are no stored records here: all numbers below are counted anew.")
        return
    display(Markdown(f"**{say_floors(floors)}**"))
    display(floors.round(2).set_index(["text", "counted"]))
    draw_floors_of_texts(floors)


def say_floors(floors: pd.DataFrame) -> str:
    """What the longest tables of characters and of pieces guess, and which tables models are held to."""
    by_text = floors.groupby("text", sort=False)
    right, bangla_right = by_text["right (%)"].last()
    longest, bangla_longest = by_text["counted"].last()
    pairs, bangla_pairs = by_text["loss (nats a token)"].first()
    best, bangla_best = by_text["loss (nats a token)"].min()
    return (
        f"Counting alone goes far. A table of {longest} guesses {right:.1f} % of the next characters of Tiny "
        f"Shakespeare, a table of {bangla_longest} {bangla_right:.1f} % of the next pieces of Bangla "
        f"Wikipedia. A model has learnt something only if its loss is below that of 2-grams (pairs), "
        f"{pairs:.2f} and {bangla_pairs:.2f} nats a token; one that trains long, only if it is below that of "
        f"the best of these tables, {best:.2f} and {bangla_best:.2f}."
    )


def draw_floors_of_texts(floors: pd.DataFrame):
    """Bars of what counting guesses right, a group a text. Returns the figure."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
    names = floors["text"] + ", " + floors["counted"]
    colours = [COLOURS[text != floors["text"].iloc[0]] for text in floors["text"]]
    bars = ax.barh(names, floors["right (%)"], 0.7, color=colours)
    ax.bar_label(bars, fmt="%.1f", padding=3)
    ax.set(xlabel="next tokens guessed right in held-out text (%)", xlim=(0, 55))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_splits(corpora: dict[str, Corpus]):
    """Where the three parts of each text lie. Returns the figure."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 2.2), layout="constrained")
    left = [0.0] * len(corpora)
    for (part, name), colour, hatch in zip(PARTS.items(), COLOURS, HATCHES):
        shares = [100 * len(c.text[part]) / sum(map(len, c.text.values())) for c in corpora.values()]
        ax.barh(list(corpora), shares, left=left, label=name, color=colour, hatch=hatch, edgecolor="white")
        left = [start + share for start, share in zip(left, shares)]
    ax.set(xlabel="position in the text (%)", xlim=(0, 100))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure
