"""What the stored records say of the texts, and the pictures of notebook 01."""

from __future__ import annotations

import json

import pandas as pd

from suite import files

from .corpus import Corpus

STORED = {
    "exp1": "Tiny Shakespeare, characters",
    "bangla": "Bangla Wikipedia, pieces",
}  # experiment: its text
COUNTED = {"2": "pairs", "3": "triples"}
PARTS = {"train": "training", "val": "validation", "heldout": "held-out"}
COLOURS = ("#0072B2", "#E69F00", "#CC79A7")  # told apart by the colour-blind (Okabe and Ito 2008)
HATCHES = ("", "///", "...")  # and in grey


def stored_floors() -> pd.DataFrame:
    """The n-gram floors of the held-out texts, from the records that ship.

    Columns: text, counted (pairs or triples), right (%), loss (nats a token). No records give no rows.
    """
    rows = []
    for experiment, text in STORED.items():
        # All of them have the same text
        for path in sorted(files.REFERENCE.glob(f"{experiment}_*.json"))[:1]:
            floors = json.loads(path.read_text(encoding="utf-8"))["floors"]
            for order, counted in COUNTED.items():
                floor = floors[order]["heldout"]
                rows.append([text, counted, floor["accuracy"], floor["loss"]])
    return pd.DataFrame(rows, columns=["text", "counted", "right (%)", "loss (nats a token)"])


def headline() -> None:
    """Show the answer of notebook 01: a sentence, a table, a picture, from the records that ship."""
    from IPython.display import Markdown, display

    floors = stored_floors()
    if len(floors) < len(STORED) * len(COUNTED):
        print("There are no stored records here: all numbers below are counted anew.")
        return
    display(Markdown(f"**{say_floors(floors)}**"))
    display(floors.round(2).set_index(["text", "counted"]))
    draw_floors_of_texts(floors)


def say_floors(floors: pd.DataFrame) -> str:
    (pairs, triples), (bangla_pairs, bangla_triples) = floors["right (%)"].to_numpy().reshape(2, 2)
    (loss, _), (bangla_loss, _) = floors["loss (nats a token)"].to_numpy().reshape(2, 2)
    return (
        f"Counting alone goes far. A table of letter triples guesses {triples:.1f} % of the next characters "
        f"of Tiny Shakespeare, a table of piece triples {bangla_triples:.1f} % of the next pieces of Bangla "
        "Wikipedia. A model has learnt something only if its loss is below that of the table of pairs: "
        f"{loss:.2f} and {bangla_loss:.2f} nats a token ({pairs:.1f} % and {bangla_pairs:.1f} % right)."
    )


def draw_floors_of_texts(floors: pd.DataFrame):
    """Bars of what counting guesses right, a group a text. Returns the figure."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(floors["text"]))
    figure, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
    for i, counted in enumerate(COUNTED.values()):
        right = floors.loc[floors["counted"] == counted, "right (%)"]
        places = [place + 0.38 * i for place in range(len(names))]
        bars = ax.barh(
            places, right, 0.36, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", label=counted
        )
        ax.bar_label(bars, fmt="%.1f", padding=3)
    ax.set_yticks([place + 0.19 for place in range(len(names))], names)
    ax.set(xlabel="next tokens guessed right in held-out text (%)", xlim=(0, 45))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="table of", loc="lower right", frameon=False)
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
