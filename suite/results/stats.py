"""Statistics over seeds and over windows: intervals, comparisons, rank correlation, variance explained.

Over seeds every interval is Student's t. *Higher* or *lower* needs two things that agree: the 95 % interval
of the paired difference leaves out zero, and p < 0.05 in the sign-flip test, which assumes no distribution.
Where only one of them says so, the claim says that they disagree. *Equal within a margin* is decided by the
90 % interval alone: it must lie inside the margin, which is what two one-sided t tests at 5 % ask for
(Schuirmann 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.stats

from ..runs import check_one_kind

LEAST_SEEDS = 6  # with five pairs a sign-flip p cannot fall below 0.0625
LEVEL = 0.05  # of each test
MARGIN = 0.5  # points of accuracy: what counts as equal


# ---- Over seeds ----


def interval(values, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean over seeds and the interval of that mean by Student's t.

    Without an interval (NaN) for fewer than three seeds, or where all are the same.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 3 or np.ptp(values) == 0:
        return mean, math.nan, math.nan
    half = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * scipy.stats.sem(values)
    return mean, float(mean - half), float(mean + half)


def new_seed_range(values) -> tuple[float, float]:
    """Where one further run is expected with 95 %: mean -+ t(n-1) sd sqrt(1 + 1/n). NaN for one or two."""
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return math.nan, math.nan
    t = scipy.stats.t.ppf(0.975, len(values) - 1)
    reach = t * values.std(ddof=1) * math.sqrt(1 + 1 / len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def paired(records: pd.DataFrame, a: str, b: str, metric: str = "accuracy") -> np.ndarray:
    """A metric of model a minus that of b, for each seed of both. Raises ValueError if one has no record."""
    wide = records.pivot_table(index="seed", columns="model", values=metric)
    for name in (a, b):
        if name not in wide:
            raise ValueError(f"no records of model {name!r}; there are {', '.join(wide.columns)}")
    return (wide[a] - wide[b]).dropna().to_numpy()


def compare(
    records: pd.DataFrame, a: str, b: str, metric: str = "accuracy", margin: float | None = None
) -> dict[str, object]:
    """Model a minus model b over paired seeds, in the metric's unit.

    margin: within which they are equal. None: MARGIN points of accuracy; in other metrics nothing is equal.

    a, b, metric, margin, pairs; mean; low, high: 95 % interval by Student's t; low90, high90: the 90 % one;
    p: two-sided sign-flip test; p_equivalent: the larger p of the two one-sided t tests of equality within
    the margin; claim: what the seeds show, see the top of this file. With fewer than six pairs, or where a
    run does not beat its table of counts, it claims nothing and says so.
    Raises ValueError if a model has no record, or if the records are of different kinds.
    """
    check_one_kind(records)
    if margin is None:
        margin = MARGIN if metric == "accuracy" else 0.0
    result = dict(a=a, b=b, metric=metric, margin=margin) | tested(paired(records, a, b, metric), margin)
    both = records[records["model"].isin([a, b])]
    return result | dict(claim=claim_of(result, bool(both["did_train"].all())))


def tested(difference: np.ndarray, margin: float = MARGIN) -> dict[str, object]:
    """Of `compare`, what rests on the paired differences [seeds] alone: pairs, mean, intervals and p.

    Three or more that are all the same have intervals of no width.
    """
    if len(difference) >= 3 and np.ptp(difference) == 0:
        mean = float(difference[0])
        alike = dict.fromkeys(("mean", "low", "high", "low90", "high90"), mean)
        p = 2 * 0.5 ** len(difference) if mean else 1.0
        p_equivalent = float(abs(mean) >= margin) if margin else math.nan
        return alike | dict(pairs=len(difference), p=p, p_equivalent=p_equivalent)
    mean, low, high = interval(difference)
    _, low90, high90 = interval(difference, 0.90)
    p = p_equivalent = math.nan
    if not math.isnan(low):
        test = scipy.stats.permutation_test((difference,), np.mean, permutation_type="samples", rng=0)
        p = float(test.pvalue)
        if margin:
            below = scipy.stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
            above = scipy.stats.ttest_1samp(difference, margin, alternative="less").pvalue
            p_equivalent = float(max(below, above))
    return dict(
        pairs=len(difference), mean=mean, low=low, high=high, low90=low90, high90=high90, p=p,
        p_equivalent=p_equivalent,
    )  # fmt: skip


def claim_of(comparison: dict, did_train: bool = True) -> str:
    """What a comparison shows, in words."""
    if not did_train:
        return "none: a run does not beat its table of counts"
    if comparison["pairs"] < LEAST_SEEDS:
        seeds = "1 seed is" if comparison["pairs"] == 1 else f"{comparison['pairs']} seeds are"
        return f"none: {seeds} too few ({LEAST_SEEDS} or more)"
    claims = []
    if different(comparison):
        claims.append(f"{comparison['a']} {'higher' if comparison['mean'] > 0 else 'lower'}")
    elif excludes_zero(comparison) or comparison["p"] < LEVEL:
        claims.append("undecided (tests disagree)")
    if equal(comparison):
        claims.append(f"equal within {comparison['margin']:g}")
    return ", yet ".join(claims) or "no difference shown"


def judged(comparison: dict) -> str:
    """What a comparison shows of the first of the two: "better", "equal", "worse" or "open".

    Better by less than the margin is better; worse by less than it is equal. Few seeds show nothing, nor do
    runs that did not train.
    """
    if comparison["claim"].startswith("none"):
        return "open"
    if different(comparison) and comparison["mean"] > 0:
        return "better"
    if equal(comparison):
        return "equal"
    return "worse" if different(comparison) else "open"


def excludes_zero(comparison: dict) -> bool:
    """Whether the 95 % interval leaves out zero."""
    return comparison["low"] > 0 or comparison["high"] < 0


def different(comparison: dict) -> bool:
    """Whether the interval and the sign-flip test agree that there is a difference, from six pairs on."""
    enough = comparison["pairs"] >= LEAST_SEEDS
    return enough and excludes_zero(comparison) and comparison["p"] < LEVEL


def by_equality_alone(comparison: dict) -> bool:
    """Whether all that is shown is equality, which the 90 % interval decides."""
    return equal(comparison) and not different(comparison)


def equal(comparison: dict) -> bool:
    """Whether the 90 % interval lies inside the margin, from six pairs on."""
    margin, enough = comparison["margin"], comparison["pairs"] >= LEAST_SEEDS
    return enough and -margin < comparison["low90"] and comparison["high90"] < margin


# ---- Over places in a text ----


def within(values: np.ndarray, factors: Sequence[np.ndarray]) -> np.ndarray:
    """What is left of values when the means of each factor's groups are taken out.

    With several factors in turns, until they settle (backfitting).
    """
    codes = [np.unique(factor, return_inverse=True)[1].reshape(-1) for factor in factors]
    left = values - values.mean()
    for _ in range(10 if len(codes) > 1 else 1):
        for code in codes:
            left = left - (np.bincount(code, left) / np.bincount(code))[code]
    return left


def spearman(x, y) -> float:
    """Spearman's correlation of x and y, where both are known (not NaN); 0 where one of them is constant."""
    x, y = np.ravel(x).astype(float), np.ravel(y).astype(float)
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    constant = min(np.ptp(x), np.ptp(y)) < 1e-6
    return 0.0 if constant else float(scipy.stats.spearmanr(x, y).statistic)


def rank_correlation(
    x: np.ndarray, y: np.ndarray, given: Sequence[np.ndarray] = (), draws: int = 400
) -> tuple[float, float, float]:
    """Spearman's correlation of x and y [n, L] within the groups of the given factors [n, L], with its 95 %
    interval over windows.

    Neighbours in a text are not independent, so whole windows (rows) are drawn (cluster bootstrap). Places
    that are NaN in x or y are left out. Windows in which one of the two is constant correlate by 0.
    """
    known = ~(np.isnan(x) | np.isnan(y))
    factors = [factor[known] for factor in given]
    a = within(scipy.stats.rankdata(x[known]), factors)
    b = within(scipy.stats.rankdata(y[known]), factors)
    if np.ptp(a) < 1e-9 or np.ptp(b) < 1e-9:
        return 0.0, 0.0, 0.0
    n, row = len(x), np.nonzero(known)[0]
    products = (a * b, a * a, b * b, a, b, np.ones_like(a))
    sums = np.stack([np.bincount(row, product, minlength=n) for product in products])  # [6, n]
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)  # [draws, n]
    ab, aa, bb, sum_a, sum_b, count = sums @ np.vstack([np.ones(n), drawn]).T  # each [1 + draws]
    covariance = ab - sum_a * sum_b / count
    spread = np.sqrt((aa - sum_a**2 / count).clip(0) * (bb - sum_b**2 / count).clip(0))
    r = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 1e-9)
    low, high = np.percentile(r[1:], [2.5, 97.5])
    return float(r[0]), float(low), float(high)


def variance_explained(values: np.ndarray, factors: dict[str, np.ndarray]) -> dict[str, float]:
    """The share (%) of the variance of values [..., n, L] that each factor adds to those before it.

    `rest` is what none explains. Group means are learnt on every other window and tried on those between, so
    that many small groups explain nothing by chance.
    """
    y = values.astype(float).flatten() - values.mean()
    odd = np.broadcast_to(np.arange(values.shape[-2])[:, None] % 2 == 1, values.shape).flatten()
    total = y.var()
    shares = {}
    for name, factor in factors.items():
        code = np.unique(np.broadcast_to(factor, values.shape), return_inverse=True)[1].reshape(-1)
        before = y.var()
        left = y - fitted(y, code, odd)
        if left.var() < before:  # means that do not hold on the other half explain nothing
            y = left
        shares[name] = 100 * (before - y.var()) / total if total else 0.0
    return shares | {"rest": 100 * y.var() / total if total else 0.0}


def fitted(y: np.ndarray, code: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """For each value the mean of its group in the other half, drawn a little towards zero."""
    means = np.empty_like(y)
    for half in (odd, ~odd):
        sums = np.bincount(code[half], y[half], minlength=code.max() + 1)
        count = np.bincount(code[half], minlength=code.max() + 1)
        means[~half] = (sums / (count + 1))[code[~half]]
    return means
