"""The goals for speed, one row each, and what a record of the bench says of them. For developers.

Each goal is a ratio of two times, unless it says otherwise. "Fixed" is the model of twelve layers that every
token runs, "blind" draws at random who runs, "router" is a router that has trained a little. E is the
effective depth; 128 × 64 tokens are a batch of 128 windows of 64. What is in braces is a size of a record.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

PACKED = (
    "Time also goes into what does not shrink with E: the head, in training the optimizer, moving tokens in "
    "and out of the packed batch, and matrix products with fewer rows, which run at a lower rate."
)
ROUTED = PACKED + " A router that is trained also sorts its margins in each batch to hold its budget."
NARROW = (
    "At width 64 an operation takes hardly longer than starting it, and a layer that runs few tokens starts "
    "as many."
)
ROUTED_NARROW = (
    f"{NARROW} By the profile in notebook 06 a router a layer and packing take a quarter of a step."
)
PADDED = (
    f"{NARROW} The profile of a step at E = 6: attention works on rows padded to a multiple of 16, a "
    "fourteenth of the time moves tokens in and out of the packed batch, and the optimizer does not shrink."
)
LEARNT = (
    f"{PADDED} Token worth also asks a network, and in training a mask is added in attention, which is then "
    "written out."
)
STARTS = "A small model leaves a card waiting for the next kernel: what counts is how many, not how large."
SAME = "Both do the same matrix products, and nearly the same work between them."
NO_PRODUCT = "Normalisation, dropout, residuals, softmax and the optimizer do no matrix product."
CONVERT = "Conversions and whatever is not a matrix product gain nothing from a narrower type."
BITS = "Fewer bits a number."
SINGLE = (
    "A token at a time is bound by memory and by the price of starting an operation, a whole context by "
    "arithmetic."
)
ASKING = (
    "With one sequence a layer is either run or not, but asking who runs costs as many small operations in "
    "each layer."
)
APART = (
    "Weights are read for half of the batch as for all of it, and where sequences differ in what ran, each "
    "attends in a call of its own."
)
READ = (
    "A layer's weights are read as long as one sequence runs it: with half of the rows its products take "
    "nearly as long. The profile of 32 sequences: products take half of the time, attention, a call for each "
    "sequence, a quarter."
)
CALLS = (
    "What a module, a packing and a count of what ran cost on top of the same products. The profile of a "
    "token of one sequence: 1,424 calls of torch, in the plain loop 1,330; the rest is Python around them."
)
GROWTH = "Room is made for up to an eighth more tokens than are held."
MOVING = "Gathering, scattering and sorting move memory at every layer, however wide the feed-forward is."


class Goal(NamedTuple):
    """One row of the table of goals."""

    key: str  # of the row in a record
    what: str
    sense: str  # "at most", "at least", "within": that far from 1, or "said": it is measured, and no goal
    limit: float
    where: str  # CPU or GPU
    why: str  # what keeps a row from its goal, said where it misses

    def met(self, measured: float) -> bool:
        if self.sense == "within":
            return abs(measured - 1) <= self.limit
        if self.sense == "said":
            return True
        return measured <= self.limit if self.sense == "at most" else measured >= self.limit

    def verdict(self, measured: float) -> str:
        """Whether a goal is met, and by how many per cent of it or not; nothing where there is none."""
        if self.sense == "said":
            return ""
        within = self.sense == "within"
        distance = abs(abs(measured - 1) - self.limit) if within else abs(measured / self.limit - 1)
        return f"{'reached' if self.met(measured) else 'missed'} by {100 * distance:.1f} %"

    def named(self, sizes: dict) -> str:
        """What is measured, with the sizes of a record: windows times their length, and tokens generated."""
        short, long = (f"{sizes[at + 'batch']} × {sizes[at + 'length']}" for at in ("", "long_"))
        return self.what.format(short=short, long=long, generated=sizes["generated"])

    def words(self) -> str:
        sign = {"at most": "≤ {:g}", "at least": "≥ {:g}", "within": "1 ± {:g}", "said": "–"}[self.sense]
        return sign.format(self.limit)


MOST, LEAST, CLOSE, SAID, CPU, GPU = "at most", "at least", "within", "said", "CPU", "GPU"
GOALS = [
    Goal("train-8", "training step, blind E = 8 / fixed, {short} tokens", MOST, 0.75, CPU, PACKED),
    Goal("train-6", "training step, blind E = 6 / fixed, {short} tokens", MOST, 0.58, CPU, PACKED),
    Goal("forward-8", "forward pass, blind E = 8 / fixed, {short} tokens", MOST, 0.72, CPU, PACKED),
    Goal("forward-6", "forward pass, blind E = 6 / fixed, {short} tokens", MOST, 0.55, CPU, PACKED),
    Goal("train-8-long", "training step, blind E = 8 / fixed, {long} tokens", MOST, 0.78, CPU, PACKED),
    Goal("train-6-long", "training step, blind E = 6 / fixed, {long} tokens", MOST, 0.62, CPU, PACKED),
    Goal("forward-8-long", "forward pass, blind E = 8 / fixed, {long} tokens", MOST, 0.78, CPU, PACKED),
    Goal("forward-6-long", "forward pass, blind E = 6 / fixed, {long} tokens", MOST, 0.62, CPU, PACKED),
    Goal("train-8-router", "training step, router E = 8 / fixed, {short} tokens", MOST, 0.75, CPU, ROUTED),
    Goal("train-6-router", "training step, router E = 6 / fixed, {short} tokens", MOST, 0.58, CPU, ROUTED),
    Goal("forward-8-router", "forward pass, router E = 8 / fixed, {short} tokens", MOST, 0.72, CPU, ROUTED),
    Goal("forward-6-router", "forward pass, router E = 6 / fixed, {short} tokens", MOST, 0.55, CPU, ROUTED),
    Goal("train-once-8", "training step, decided once E = 8 / fixed, {short}", MOST, 0.72, CPU, PACKED),
    Goal("train-once-6", "training step, decided once E = 6 / fixed, {short}", MOST, 0.54, CPU, PACKED),
    Goal(
        "train-small",
        "training step, router E = 8 / fixed, size of experiment 1",
        *(MOST, 0.77, CPU, ROUTED_NARROW),
    ),
    Goal("train-8-gpu", "training step, blind E = 8 / fixed, large batch", MOST, 0.75, GPU, STARTS),
    Goal("encoder", "training step, fixed, ours / torch.nn.TransformerEncoder", MOST, 0.90, CPU, SAME),
    Goal("nanogpt", "training step, fixed, ours / a block as nanoGPT writes it", MOST, 0.95, CPU, SAME),
    Goal("encoder-gpu", "on a card: training step, fixed, ours / TransformerEncoder", MOST, 0.90, GPU, SAME),
    Goal("rate", "arithmetic rate, fixed training step / large product", LEAST, 0.70, CPU, NO_PRODUCT),
    Goal("bfloat16", "training step, bfloat16 with float32 weights kept / float32", MOST, 0.70, CPU, CONVERT),
    Goal("bfloat16-loss", "validation loss, bfloat16 minus float32 (nats)", MOST, 0.01, CPU, BITS),
    Goal("int8", "cached decoding, fixed, weights in int8 / float32, batch 1", SAID, 1.0, CPU, BITS),
    Goal("generation", "generating {generated} tokens, cached / uncached, batch 1", MOST, 0.08, CPU, SINGLE),
    Goal("decode-1", "cached decoding, blind E = 6 / fixed, batch 1", MOST, 0.65, CPU, ASKING),
    Goal("decode-32", "cached decoding, blind E = 6 / fixed, batch 32", MOST, 0.65, CPU, APART),
    Goal("once-8", "training step at width 64, decided once E = 8 / fixed", MOST, 0.80, CPU, PADDED),
    Goal("once-6", "training step at width 64, decided once E = 6 / fixed", MOST, 0.62, CPU, PADDED),
    Goal("worth-8", "training step at width 64, token worth E = 8 / fixed", MOST, 0.80, CPU, LEARNT),
    Goal("worth-6", "training step at width 64, token worth E = 6 / fixed", MOST, 0.62, CPU, LEARNT),
    Goal("decode-once-1", "cached decoding, decided once E = 6 / fixed, batch 1", MOST, 0.56, CPU, READ),
    Goal("decode-once-8", "cached decoding, decided once E = 6 / fixed, batch 8", MOST, 0.60, CPU, READ),
    Goal("decode-once-32", "cached decoding, decided once E = 6 / fixed, batch 32", MOST, 0.63, CPU, READ),
    Goal("decode-router-1", "cached decoding, routers E = 6 / fixed, batch 1", MOST, 0.68, CPU, ASKING),
    Goal("decode-router-8", "cached decoding, routers E = 6 / fixed, batch 8", MOST, 0.75, CPU, APART),
    Goal("decode-router-32", "cached decoding, routers E = 6 / fixed, batch 32", MOST, 0.80, CPU, APART),
    Goal("decode-plain-1", "cached decoding, fixed, ours / a plain loop, batch 1", MOST, 1.00, CPU, CALLS),
    Goal("decode-plain-8", "cached decoding, fixed, ours / a plain loop, batch 8", MOST, 1.00, CPU, CALLS),
    Goal("decode-plain-32", "cached decoding, fixed, ours / a plain loop, batch 32", MOST, 1.00, CPU, CALLS),
    Goal("decode-gpu-1", "on a card: decoding, decided once E = 6 / fixed, batch 1", MOST, 0.60, GPU, STARTS),
    Goal(
        "decode-gpu-32", "on a card: decoding, decided once E = 6 / fixed, batch 32", MOST, 0.60, GPU, STARTS
    ),
    Goal("cache", "cache bytes, blind E = 6 / fixed, over E / N", CLOSE, 0.01, CPU, GROWTH),
    Goal("share", "router and packing, share of a training step, E = 8", MOST, 0.04, CPU, MOVING),
    Goal("share-once", "router and packing, share of a step, token worth E = 8", MOST, 0.04, CPU, MOVING),
]


def table(record: dict) -> pd.DataFrame:
    """Every goal beside what a record measured, its spread, and whether it is reached."""
    rows = {}
    for goal in GOALS:
        row = record["rows"].get(goal.key, {})
        measured, quartiles, E = (row.get(name) for name in ("measured", "quartiles", "E"))
        missing = row.get("note") or ("needs a GPU" if goal.where == GPU else "not measured")
        rows[goal.key] = {
            "what": goal.named(record["sizes"]),
            "on": goal.where,
            "measured": "" if measured is None else f"{measured:.3f}",
            "quartiles": "{:.3f} to {:.3f}".format(*quartiles) if quartiles else "",
            "goal": goal.words(),
            "reached": missing if measured is None else goal.verdict(measured) or row["note"],
            "E": "" if E is None else f"{E:.2f}",
            "dtype": row.get("dtype", ""),
        }
    return pd.DataFrame(rows).T.rename_axis("row")


def misses(record: dict) -> list[str]:
    """For each reason why rows miss their goals, a line: which rows, by how much, and the reason."""
    missed: dict[str, list[str]] = {}
    for goal in GOALS:
        row = record["rows"].get(goal.key, {})
        measured = row.get("measured")
        if measured is None or goal.met(measured):
            continue
        more = plain_loop(record) if goal.key == "generation" else ""
        note = f" ({row['note']}{more})" if row.get("note") else ""
        what = goal.named(record["sizes"])
        line = f"{what}: {measured:.3f}, goal {goal.words()}, {goal.verdict(measured)}{note}"
        missed.setdefault(goal.why, []).append(line)
    return [f"{'; '.join(rows)}. {why}" for why, rows in missed.items()]


def plain_loop(record: dict) -> str:
    """What generation with a plain loop takes of the time without a cache, the least that is known to be
    reached; nothing without both timings."""
    timings = record.get("seconds", {})
    plain = timings.get("decoding, decided once, batch 1", {}).get("plain")
    uncached = timings.get("generation", {}).get("uncached")
    if not (plain and uncached):
        return ""
    return f"; a plain loop over keys made beforehand comes to {plain['median'] / uncached['median']:.3f}"


def line(key: str, row: dict, sizes: dict) -> str:
    """One row of a record of such sizes beside its goal, if it has one."""
    goal = next(goal for goal in GOALS if goal.key == key)
    what = goal.named(sizes)
    if row["measured"] is None:
        return f"{what}: {row['note']}"
    if goal.sense == "said":
        return f"{what}: {row['measured']:.3f} ({row['note']})"
    return f"{what}: {row['measured']:.3f} (goal {goal.words()}, {goal.verdict(row['measured'])})"
