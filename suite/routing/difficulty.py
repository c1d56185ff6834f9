"""Does depth follow difficulty? Places in a text, what makes them difficult, and what depth they get.

Depth and difficulty belong to a *place*: at place t a model has read token t and is to predict token t + 1.
Depth is what it spends there. Surprisal is that of the token it then has to predict. Frequency, kind and
place in the word are those of the token it has read, for a router sees no more. Arrays over places have
shape [n, L], windows of tokens [n, L + 1].
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import morlib

from ..results.stats import LEAST_SEEDS, interval, rank_correlation, variance_explained
from ..texts import ngram_surprisal
from .bangla import kinds
from .interventions import applications

MEASURES = {
    "surprisal": "surprisal of the next token (nats)",
    "entropy": "entropy of the prediction (nats)",
    "ngram": "surprisal by trigrams (nats)",
    "read": "surprisal of the token just read (nats)",
    "frequency": "frequency of the token read (per 1,000)",
    "position": "position in the window (tokens)",
    "in_word": "position in the word (tokens)",
    "kind": "kind of the token read",
}
DIFFICULTY = ("surprisal", "entropy", "ngram", "read")  # the others could pass for difficulty


# ---- Places ----


def places(corpus, reference, most: int) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Held-out windows [n, L + 1], and at each place [n, L] the MEASURES and the `token` that was read.

    reference: the fixed-depth model, independent of the routers, that says what is hard.
    most: how many windows, spread over the held-out part.
    """
    length, ids = reference.cfg.max_len, corpus.ids["heldout"]
    starts = corpus.starts("heldout", length, most)
    where = starts[:, None] + torch.arange(min(length, len(ids) - 1) + 1)  # [n, L + 1] in the part
    windows, read, target = ids[where], where[:, :-1].numpy(), where[:, 1:].numpy()
    scored = morlib.score(reference, windows)
    surprisal = scored["surprisal"].numpy()
    # The reference model has not predicted a window's first token
    unknown = np.full((len(windows), 1), np.nan)
    kind, in_word = kinds(corpus.tokenizer, ids)
    return windows, dict(
        surprisal=surprisal,
        entropy=scored["entropy"].numpy(),
        ngram=trigram_surprisal(corpus)[target],
        read=np.concatenate([unknown, surprisal[:, :-1]], axis=1),
        frequency=frequency(corpus)[ids.numpy()[read]],
        position=np.broadcast_to(np.arange(read.shape[1]), read.shape),
        in_word=in_word[read],
        kind=kind[read],
        token=ids.numpy()[read],
    )


def trigram_surprisal(corpus) -> np.ndarray:
    """Surprisal (nats) [tokens] of held-out text by trigrams of the training part, across windows."""
    with_context = torch.cat([corpus.ids["val"][-2:], corpus.ids["heldout"]])
    return ngram_surprisal(corpus.ids["train"], with_context, 3, corpus.vocab_size)[0]


def frequency(corpus) -> np.ndarray:
    """How often each token [V] occurs in 1,000 of the training part."""
    count = torch.bincount(corpus.ids["train"], minlength=corpus.vocab_size).numpy()
    return 1000 * count / count.sum()


def groups(values: np.ndarray, most: int = 10) -> np.ndarray:
    """Groups 0, 1, ... of about equal size, from low to high. Equal values share a group; missing: -1."""
    edges = np.unique(np.nanquantile(values, np.arange(1, most) / most))
    codes = np.unique(np.searchsorted(edges, values), return_inverse=True)[1].reshape(values.shape)
    return np.where(np.isnan(values), -1, codes)


# ---- What is spent where ----


def rates(actions: Tensor, group: np.ndarray) -> pd.DataFrame:
    """By group: how many places, which share of the layers skips, runs once or recurses there (%), and the
    mean depth. actions: [N, R, n, L], of which the first decision of each layer counts; group: [n, L]"""
    first, depth = actions[:, 0].numpy(), (actions >= morlib.FORWARD).sum((0, 1)).numpy()
    columns = {name: 100 * (first == a).mean(0).flatten() for a, name in enumerate(morlib.ACTIONS)}
    frame = pd.DataFrame(columns | dict(depth=depth.flatten(), group=group.flatten()))
    means = {column: (column, "mean") for column in (*morlib.ACTIONS, "depth")}
    return frame.groupby("group").agg(places=("depth", "size"), **means)


def rates_by(measure: str, known: dict[str, np.ndarray], scores: dict) -> pd.DataFrame:
    """`rates` of each model and seed by groups of one measure; `middle` is the mean of a group's values.

    scores: (model, seed) to what `morlib.score` gives.
    """
    values = known[measure]
    named = measure == "kind"
    group = values if named else groups(values.astype(float))
    middle = pd.Series(values.flatten()).groupby(group.flatten()).agg("first" if named else "mean")
    tables = []
    for (model, seed), score in scores.items():
        table = rates(score["actions"], group).assign(middle=middle, measure=measure, model=model, seed=seed)
        tables.append(table.drop(index=-1, errors="ignore").rename_axis("group").reset_index())
    return pd.concat(tables, ignore_index=True)


# ---- Is it real? ----


def controls(known: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """What a correlation is taken within: nothing (`raw`); groups of equal frequency, window position and
    word position (`given`); the very same token at the same position (`same`)."""
    return {
        "raw": [],
        "given": [groups(known["frequency"], 20), known["position"], known["in_word"]],
        "same": [known["token"], known["position"]],
    }


def correlations_with(known: dict[str, np.ndarray], scores: dict) -> pd.DataFrame:
    """Rank correlation `r` of depth with each difficulty under each control, for each model and seed,
    with its 95 % interval over windows, `low` to `high`."""
    rows, factors = [], controls(known)
    for (model, seed), score in scores.items():
        depth = score["depth"].numpy().astype(float)
        for measure in DIFFICULTY:
            for control, given in factors.items():
                r, low, high = rank_correlation(depth, known[measure], given)
                names = dict(model=model, seed=seed, measure=measure, control=control)
                rows.append(names | dict(r=r, low=low, high=high))
    return pd.DataFrame(rows)


def variance_by(known: dict[str, np.ndarray], scores: dict, vocab_size: int) -> pd.DataFrame:
    """Shares (%) of the variance of single decisions that the layer explains, then the position in each
    layer, then the token read in each layer, for each model and seed; and the same two shares of a
    place's depth."""
    rows = []
    for (model, seed), score in scores.items():
        runs = applications(score["actions"]).numpy()  # [N, n, L]
        layer, L = np.arange(len(runs))[:, None, None], runs.shape[-1]
        factors = dict(layer=layer, position=layer * L + known["position"])
        factors["token read"] = layer * vocab_size + known["token"]
        of_depth = {"position": known["position"], "token read": known["token"]}
        shares = variance_explained(score["depth"].numpy(), of_depth)
        row = dict(model=model, seed=seed) | variance_explained(runs, factors)
        rows.append(row | {f"{name} (of depth)": shares[name] for name in of_depth})
    return pd.DataFrame(rows)


def verdict(correlations: pd.DataFrame) -> str:
    """Whether depth follows difficulty, in words and numbers: the `answer`, and MoR's rank correlations.

    correlations: one row a model and seed, with columns `raw`, `given` and `same` (see `controls`).
    """
    means = mean_correlations(correlations)
    texts = {c: spelt(*means[c]) for c in means}
    numbers = f"rank correlation {texts['raw']}; given frequency and position {texts['given']}; "
    return f"{answer(correlations)}: {numbers}given the token and position {texts['same']}"


def spelt(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A mean with its sign, and its interval if it has one."""
    reach = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if np.isfinite(low) else ""
    return f"{mean:+.{digits}f}{reach}"


def mean_correlations(correlations: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """MoR's mean correlation and its 95 % interval over seeds, under each control."""
    own = correlations[correlations["model"] == "mor"].sort_values("seed")
    return {column: interval(own[column]) for column in ("raw", "given", "same")}


def answer(correlations: pd.DataFrame) -> str:
    """Whether depth follows difficulty, in words.

    A claim needs six seeds. "yes" needs `raw` above zero, and `given` above zero and above that of each
    other router, each beyond its 95 % interval over seeds. What `same` says then is whether the router
    also tells hard from easy places that read the same token.
    """
    means, seeds = mean_correlations(correlations), correlations["seed"].nunique()
    if seeds < LEAST_SEEDS:
        return f"open, {seeds} seed(s) are too few for a claim ({LEAST_SEEDS} or more)"
    if means["raw"][2] < 0:
        return "no, depth falls with difficulty"
    if not means["raw"][1] > 0:
        return "no, a rise with difficulty is not shown"
    if not means["given"][1] > 0:
        return "no, what there is goes with frequency and position"
    if as_good := rival(correlations, "given"):
        return f"no, {as_good} routing shows as much"
    if not means["same"][1] > 0 or rival(correlations, "same"):
        return "yes, but only by which token was read"
    return "yes, also among places that read the same token"


def rival(correlations: pd.DataFrame, column: str) -> str | None:
    """The first other router whose correlation MoR's does not exceed over paired seeds; None if there is
    none."""
    wide = correlations.pivot(index="seed", columns="model", values=column)
    others = [model for model in correlations["model"].unique() if model != "mor"]
    return next((other for other in others if not interval(wide["mor"] - wide[other])[1] > 0), None)
