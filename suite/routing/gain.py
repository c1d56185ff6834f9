"""Where on a text depth is worth something, and whether a router's depth goes there.

The gain of a place is what a model of N layers predicts better there than one of N/2, trained apart. One pair
of models tells little of a single place, since it differs between seeds; what it tells of kinds of places it
tells reliably. So places are put in an order by something that is known without that pair, and it is
measured how much of the whole gain the first of them carry.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import morlib

from .. import runs
from ..results import TEXT_NAMES
from ..results.figures import figure_style
from ..results.headlines import seeds_so_far
from ..results.stats import LEAST_SEEDS, interval
from ..results.tables import with_interval
from ..texts import context_numbers

GAIN = "depth_gain.json"  # the table of `measure_gain` that ships
EXPERIMENT = "exp1-thin"  # of `runs.long_runs`: the setting in which depth is worth most
MODELS = ("fixed-deep", "fixed-shallow", "mor")
SHARES = [round(0.05 * i, 2) for i in range(1, 21)]  # of the places
WINDOWS = 3000  # of the training text, from which it is learned where depth pays
PRIOR = 50  # places' worth of trust in the shorter context
WAYS = {
    "three": "the last three tokens",
    "read": "the token read",
    "entropy": "how unsure six layers are",
    "mor": "MoR's own depth",
}


def measure_gain(specs: list[runs.Run]) -> pd.DataFrame:
    """One row a seed and way in WAYS: the `accuracy` (points) and `loss` (nats) that the first SHARES of the
    held-out places, in that order, add to a whole text, and the ids of the seed's runs.

    specs: `runs.long_runs(s, EXPERIMENT)`. Runs that are not finished are trained. The order of a seed is
    made from the training text and from the models of all other seeds, but for MoR's, which is its own.
    Raises ValueError without two seeds of each of MODELS.
    """
    seeds = {label: {spec.train.seed for spec in specs if spec.model == label} for label in MODELS}
    if len(seeds["mor"]) < 2 or len({frozenset(own) for own in seeds.values()}) > 1:
        raise ValueError(f"two seeds or more are needed, each with runs of {', '.join(MODELS)}")
    scored, ids, windows = scores(specs)
    gains = {part: gains_of(scored, part) for part in windows}
    rows = []
    for index, seed in enumerate(sorted(seeds["mor"])):
        others = [i for i in range(len(gains["train"]["loss"])) if i != index]
        told = gains["train"]["loss"][others].mean(0)
        entropy = stacked(scored, "heldout", "fixed-shallow", "entropy")[others].mean(0)
        depth = scored["heldout", "mor", seed]["depth"].flatten().double().numpy()
        orders = {
            "three": expected(told, windows["train"], windows["heldout"], 3),
            "read": expected(told, windows["train"], windows["heldout"], 1),
            "entropy": entropy,
            "mor": depth,
        }
        own = {name: values[index] for name, values in gains["heldout"].items()}
        for way, value in orders.items():
            carried = {name: carried_by(value, gain) for name, gain in own.items()}
            rows.append(dict(seed=seed, way=way) | carried | dict(runs=ids[seed]))
    return pd.DataFrame(rows)


def deep_contexts(specs: list[runs.Run], share: float = 1 / 3) -> dict:
    """The contexts of three tokens that promise most, such that they hold a share of the training text.

    Learned from the training text by all seeds of the specs, of `runs.long_runs`. A context is one of the
    `texts.context_numbers`. `suite.field.told` reads what is returned as JSON, from
    `runs.whole_tokens.CONTEXTS`.
    """
    scored, ids, windows = scores([spec for spec in specs if spec.model != "mor"])
    read, vocabulary = windows["train"], runs.trained_model(specs[0])[0].cfg.vocab_size
    told = expected(gains_of(scored, "train")["loss"].mean(0), read, read, 3)
    number = context_numbers(read[:, :-1], 3, vocabulary).flatten().numpy()
    kinds, place, n = np.unique(number, return_inverse=True, return_counts=True)
    promise = np.zeros(len(kinds))
    promise[place] = told  # alike for all places of a context
    order = np.argsort(-promise, kind="stable")
    deep = kinds[order[: np.searchsorted(n[order].cumsum(), share * len(number))]]
    return dict(vocabulary=vocabulary, share=share, runs=ids, contexts=sorted(deep.tolist()))


def scores(specs: list[runs.Run]) -> tuple[dict, dict, dict]:
    """By part, label and seed what `morlib.score` gives; by seed the ids of its runs; by part the windows."""
    scored, ids, windows = {}, {}, {}
    for spec in specs:
        if spec.model not in MODELS:
            continue
        model, record, corpus = runs.trained_model(spec)
        for part, most in (("train", WINDOWS), ("heldout", None)):
            windows[part] = corpus.windows(part, model.cfg.max_len, most)
            if part == "heldout" or spec.model != "mor":
                scored[part, spec.model, spec.train.seed] = morlib.score(model, windows[part])
        ids.setdefault(spec.train.seed, {})[spec.model] = record["id"]
    return scored, ids, windows


def stacked(scored: dict, part: str, label: str, what: str) -> np.ndarray:
    """A score [seeds, places] of the models with a label, in the order of seeds."""
    seeds = sorted(seed for p, own, seed in scored if (p, own) == (part, label))
    return torch.stack([scored[part, label, s][what].flatten().double() for s in seeds]).numpy()


def gains_of(scored: dict, part: str) -> dict[str, np.ndarray]:
    """What N layers gain over N/2 at each place, each [seeds, places]: nats of loss, points of accuracy."""
    deep, shallow = ("fixed-deep", "fixed-shallow")
    loss = stacked(scored, part, shallow, "surprisal") - stacked(scored, part, deep, "surprisal")
    right = stacked(scored, part, deep, "correct") - stacked(scored, part, shallow, "correct")
    return dict(loss=loss, accuracy=100 * right)


def expected(gain: np.ndarray, read: torch.Tensor, at: torch.Tensor, order: int) -> np.ndarray:
    """The mean gain after the last `order` tokens, as learned where `gain` [places] was measured.

    read: the windows [n, L + 1] of those places; at: the windows for which it is asked. Short contexts stand
    in for long ones that are rare: each is worth PRIOR places.
    """
    vocabulary = int(max(read.max(), at.max())) + 1
    told, answer = np.full(len(gain), gain.mean()), np.full(at[:, 1:].numel(), gain.mean())
    for tokens in range(1, order + 1):
        of_known, of_asked = (
            context_numbers(windows[:, :-1], tokens, vocabulary).flatten().numpy() for windows in (read, at)
        )
        kinds, place = np.unique(of_known, return_inverse=True)
        sums, n = np.bincount(place, gain), np.bincount(place)
        before = np.bincount(place, told) / n  # alike for all places of a kind
        mean = (sums + PRIOR * before) / (n + PRIOR)
        told = mean[place]
        found = np.searchsorted(kinds, of_asked).clip(max=len(kinds) - 1)
        answer = np.where(kinds[found] == of_asked, mean[found], answer)
    return answer


def carried_by(value: np.ndarray, gain: np.ndarray) -> list[float]:
    """How much the first SHARES of the places, those of the highest value, add to the mean gain.

    Places of one value share alike in what they add.
    """
    place = np.unique(-value, return_inverse=True)[1]
    n, sums = np.bincount(place), np.bincount(place, gain)
    share = np.concatenate([[0], n.cumsum() / n.sum()])
    return np.interp(SHARES, share, np.concatenate([[0], sums.cumsum() / n.sum()])).round(6).tolist()


# ---- What is stored and shown ----


def carried_share(table: pd.DataFrame, way: str, what: str = "accuracy") -> np.ndarray:
    """Of a way in WAYS, the part of a seed's whole gain that the first SHARES carry, [seeds, shares] in %."""
    carried = np.array(table[table["way"] == way][what].tolist())
    return 100 * carried / carried[:, -1:]


def gain_table(table: pd.DataFrame, what: str = "accuracy") -> pd.DataFrame:
    """A row a way: what part of the gain in accuracy or loss a tenth, a third, half of the tokens carry."""
    rows = {}
    for way, told in WAYS.items():
        rows[told] = {
            f"first {100 * first:.0f} %": with_interval(carried_first(table, way, first, what), 0)
            for first in (0.1, 0.2, 1 / 3, 0.5)
        }
    return pd.DataFrame(rows).T.rename_axis("tokens in the order of")


def carried_first(table: pd.DataFrame, way: str, share: float, what: str = "accuracy") -> np.ndarray:
    """What part of the gain (%) the first share of the tokens carries, [seeds]."""
    return np.array([np.interp(share, SHARES, seed) for seed in carried_share(table, way, what)])


def gain_sentence(table: pd.DataFrame) -> str:
    """What the third of the tokens carries that promises most, and the third that MoR runs most often.

    Nothing for an empty table.
    """
    if table.empty:
        return ""
    parts = {way: interval(carried_first(table, way, 1 / 3)) for way in ("three", "mor")}
    told = {way: f"{mean:.0f} % ({low:.0f} to {high:.0f})" for way, (mean, low, high) in parts.items()}
    _, low, high = parts["mor"]
    beyond = "not shown to differ from"
    if table["seed"].nunique() >= LEAST_SEEDS and not low <= 100 / 3 <= high:
        beyond = "more than" if low > 100 / 3 else "less than"
    return (
        f"On {TEXT_NAMES[EXPERIMENT]}, {told['three']} of what twelve layers gain in accuracy over six falls "
        "on a third of the tokens, which the last three characters name in advance. On the third that MoR "
        f"runs most often falls {told['mor']}, {beyond} the 33 % of chance (95 % intervals, "
        f"{seeds_so_far(table['seed'].nunique())})."
    )


def draw_gain(table: pd.DataFrame) -> Figure:
    """The part of the gain in accuracy that the first tokens carry, in each order; the diagonal is chance."""
    figure_style()
    figure, ax = plt.subplots(figsize=(6.4, 4.2))
    x = 100 * np.array([0, *SHARES])
    ax.plot([0, 100], [0, 100], color="0.6", linestyle=":", linewidth=1, label="chance")
    for index, (way, told) in enumerate(WAYS.items()):
        shares = carried_share(table, way)
        bounds = np.array([interval(column) for column in shares.T])  # [shares, 3]
        colour = f"C{index}"
        ax.plot(x, [0, *bounds[:, 0]], color=colour, linestyle="-", label=told)
        ax.fill_between(x, [0, *bounds[:, 1]], [0, *bounds[:, 2]], color=colour, alpha=0.15, linewidth=0)
    ax.axvline(100 / 3, color="0.8", linewidth=1, zorder=0)
    ax.axhline(0, color="0.8", linewidth=1, zorder=0)
    ax.set(
        xlabel="share of the tokens, taken in this order (%)", ylabel="part of the gain that they carry (%)"
    )
    ax.set(xlim=(0, 100), ylim=(-20, 110))
    third = carried_first(table, "three", 1 / 3).mean()
    ax.set_title(f"A third of the tokens can carry {third:.0f} % of the gain")
    ax.legend(title="tokens in the order of", loc="lower right")
    return figure
