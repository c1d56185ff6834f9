"""Rows of the bench about generation, cached decoding and the cache. Each group yields keys and rows."""

from __future__ import annotations

import morlib
from morlib import Transformer

from ..runs import pick_device
from .benched import Bench, Rows
from .others import cached_generation, linear_layers, plain_generation, uncached_generation
from .probes import as_int8, stored_bytes
from .timing import Timings
from .timing import decoding as decoded

PROMPT = 8  # tokens before those that are decoded
BATCHES = (1, 8, 32)


def generation(bench: Bench) -> Rows:
    s, parts = bench.sizes, bench.sizes.short_turns
    model = bench.build(s.generated + 1, routing="none")
    start = bench.windows(1, 1)[:, :1]
    calls = {
        "cached": cached_generation(model, start, s.generated, parts),
        "uncached": uncached_generation(model, s.generated, parts),
    }
    row = bench.turns("generation", calls, parts).ratio("cached", "uncached")
    tokens = f"each of {parts} turns generates the next {s.generated // parts} tokens with the cache"
    note = f"{tokens}, and does one uncached pass in {parts}"
    yield "generation", row | dict(note=note, dtype="float32")


def decoding(bench: Bench) -> Rows:
    """Where each layer draws apart: cached decoding of one sequence and of 32, and the size of the cache."""
    s, models = bench.sizes, bench.fixed_and_blind(2 * bench.sizes.decoded)
    models = {name: models[name] for name in ("fixed", 6)}
    for batch, tokens in ((1, s.decoded), (32, s.decoded // 2)):
        prompt = bench.windows(batch, s.decoded)[:, :-1]
        calls = {name: decoded(model, prompt, tokens) for name, model in models.items()}
        row = bench.turns(f"decoding, batch {batch}", calls, s.short_turns).ratio(6, "fixed")
        if batch > 1:
            row["note"] = products(bench, models["fixed"], batch)
        yield f"decode-{batch}", row | dict(dtype="float32")
    done = {name: call() for name, call in calls.items()}
    size = {name: result["cache"].bytes() for name, result in done.items()}
    held = {name: float(result["held"]) for name, result in done.items()}
    positions = s.decoded + s.decoded // 2
    note = f"{size[6]:,} of {size['fixed']:,} bytes, batch 32, {positions} positions"
    share = size[6] / size["fixed"] / (held[6] / held["fixed"])
    yield "cache", dict(measured=share, E=held[6], note=note, dtype="float32")


def about(bench: Bench) -> dict:
    return dict(note=f"{PROMPT} tokens of prompt, {bench.sizes.generated} new ones", dtype="float32")


def once(bench: Bench) -> Rows:
    """Where a token's depth is decided once; and ours of fixed depth against a plain loop."""
    fixed = bench.build(bench.sizes.length, routing="none")
    for batch in BATCHES:
        timings = decided_once(bench, batch)
        row = timings.ratio("once", "fixed") | about(bench)
        if batch > 1:
            row["note"] += f"; {products(bench, fixed, batch)}"
        yield f"decode-once-{batch}", row
        yield f"decode-plain-{batch}", timings.ratio("fixed", "plain") | about(bench)


def decided_once(bench: Bench, batch: int, device: str = "cpu") -> Timings:
    """Times of cached decoding: fixed depth, half of it decided once a token, and on a CPU a plain loop."""
    s, parts, length = bench.sizes, bench.sizes.short_turns, 2 * bench.sizes.generated
    models = {"fixed": bench.build(length, device, routing="none"), "once": bench.once(length, 6, device)}
    how = bench.windows(batch, PROMPT, device)[:, :-1], s.generated, parts
    calls = {name: cached_generation(model, *how) for name, model in models.items()}
    on = ", GPU"
    if device == "cpu":
        calls["plain"], on = plain_generation(models["fixed"], *how), ""
    return bench.turns(f"decoding, decided once, batch {batch}{on}", calls, parts)


def gpu(bench: Bench) -> Rows:
    """The same on a card, where there is one: as the models are, without graphs of the card's calls."""
    device = pick_device()[0]
    for batch in (1, 32) if device.type == "cuda" else ():
        timings = decided_once(bench, batch, str(device))
        yield f"decode-gpu-{batch}", timings.ratio("once", "fixed") | about(bench)


def products(bench: Bench, model: Transformer, batch: int) -> str:
    """What half of the rows take of the time of all in linear layers alone: weights are read for either."""
    half, times = batch // 2, bench.sizes.decoded // 2
    alone = {rows: linear_layers(model, rows, times) for rows in (batch, half)}
    part = bench.turns(f"linear layers alone, batch {batch}", alone).ratio(half, batch)["measured"]
    return f"the linear layers alone, {half} rows against {batch}: {part:.2f}"


def router(bench: Bench) -> Rows:
    """A router a layer, with R = 2. Its thresholds are set on the very text that is then read.

    So it runs the share that it was asked for, whatever its scores are: they are those of an untrained model.
    """
    s, parts, length = bench.sizes, bench.sizes.short_turns, 2 * bench.sizes.generated
    models = {"fixed": bench.build(length, routing="none")}
    models["router"] = bench.build(length, routing="mor", target_depth=6.0, max_recursions=2)
    for batch in BATCHES:
        text = bench.windows(batch, PROMPT + s.generated - 1)
        morlib.calibrate(models["router"], text)
        how = text[:, :PROMPT], s.generated, parts, text[:, PROMPT:]
        calls = {name: cached_generation(model, *how) for name, model in models.items()}
        timings = bench.turns(f"decoding, a router a layer, batch {batch}", calls, parts)
        yield f"decode-router-{batch}", timings.ratio("router", "fixed") | about(bench)


def int8(bench: Bench) -> Rows:
    """The fixed model with weights in int8: one sequence."""
    s, parts, length = bench.sizes, bench.sizes.short_turns, 2 * bench.sizes.generated
    model = bench.build(length, routing="none")
    small = as_int8(model)
    if isinstance(small, str):
        yield "int8", dict(measured=None, note=small)
        return
    how = bench.windows(1, PROMPT)[:, :-1], s.generated, parts
    calls = {"float32": cached_generation(model, *how), "int8": cached_generation(small, *how)}
    row = bench.turns("decoding, int8", calls, parts).ratio("int8", "float32")
    size = {name: stored_bytes(m) / 1e6 for name, m in (("int8", small), ("float32", model))}
    used = "faster here" if row["quartiles"][1] < 1 else "float32 stays"
    note = f"{used}; {size['int8']:.0f} of {size['float32']:.0f} MB"
    yield "int8", row | dict(note=note, dtype="int8")
