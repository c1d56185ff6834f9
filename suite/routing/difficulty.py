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

from ..results.stats import LEAST_SEEDS, interval
from ..texts import ngram_surprisal
from .bangla import kinds

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
    after = torch.cat([corpus.ids["val"][-2:], ids])  # so that the first places have a context, too
    trigrams = ngram_surprisal(corpus.ids["train"], after, 3, corpus.vocab_size)[0]  # of the whole part
    count = torch.bincount(corpus.ids["train"], minlength=corpus.vocab_size).numpy()  # [V]
    return windows, dict(
        surprisal=surprisal,
        entropy=scored["entropy"].numpy(),
        ngram=trigrams[target],
        read=np.concatenate([unknown, surprisal[:, :-1]], axis=1),
        frequency=1000 * count[ids.numpy()[read]] / count.sum(),
        position=np.broadcast_to(np.arange(read.shape[1]), read.shape),
        in_word=in_word[read],
        kind=kind[read],
        token=ids.numpy()[read],
    )


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


# ---- Is it real? ----


def controls(known: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """What a correlation is taken within: nothing (`raw`); groups of equal frequency, window position and
    word position (`given`); the very same token at the same position (`same`)."""
    return {
        "raw": [],
        "given": [groups(known["frequency"], 20), known["position"], known["in_word"]],
        "same": [known["token"], known["position"]],
    }


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
