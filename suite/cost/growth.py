"""How cost grows: time a token against batch, length, width and depth.

Routing decides once for all layers and is blind, so that its plan runs exactly the share asked. It takes
turns with a fixed model of as many layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from morlib import ModelConfig, Transformer

from ..files import write_whole
from ..runs import keep_memory
from .others import cached_generation
from .speed import begun, machine
from .timing import build, in_turn, training_step

TRAINING, DECODING = "training step", "decoding"
AXES = ("batch", "length", "width", "depth")
MOST_TURNS, PROMPT = 15, 64
V = 65  # kinds of tokens; what they are does not matter


@dataclass(frozen=True)
class Sweep:
    """What is varied, one thing at a time, and what stays. Feed-forward 4 times as wide as the model."""

    batch: tuple = (1, 4, 16, 64, 256)
    length: tuple = (64, 256, 1024, 4096)  # of a training window; in decoding, of what was read before
    width: tuple = (64, 128, 256, 512, 1024)
    depth: tuple = (2.0, 4.0, 6.0, 8.0, 10.0)  # E
    layers: int = 12
    head: int = 16  # width of an attention head
    base_width: int = 128
    # Windows of `length[0]` in a training step; against length, as many tokens as 4 such
    base_batch: int = 16
    seconds: float = 6.0  # turns of a point go on for so long, but are three at least


FULL = Sweep()
TINY = Sweep((1, 2), (8, 16), (16, 32), (2.0,), layers=3, head=8, base_width=16, base_batch=2, seconds=0.0)


# ---- Measuring ----


def model_of(sweep: Sweep, width: int, length: int, E: float | str) -> Transformer:
    """The "fixed" model, or routing that decides once at a depth E."""
    routing = dict(routing="none") if E == "fixed" else dict(routing="even-once", target_depth=E)
    sizes = dict(n_layers=sweep.layers, d_model=width, n_heads=width // sweep.head, d_ff=4 * width)
    more = dict(max_len=length, dropout=0.0, max_recursions=1)
    return build(ModelConfig(V, **sizes, **more, **routing))


def calls_of(sweep: Sweep, kind: str, axis: str, value: float) -> tuple[dict, int]:
    """The fixed model's call and those of routing, by their E; and the tokens of a call."""
    width = int(value) if axis == "width" else sweep.base_width
    length = int(value) if axis == "length" else sweep.length[0]
    one_by_one = kind == DECODING and axis != "batch"
    batch = 1 if one_by_one else int(value) if axis == "batch" else sweep.base_batch
    if axis == "length" and not one_by_one:
        batch = max(4 * sweep.base_batch * sweep.length[0] // length, 1)
    depths = sweep.depth if axis == "depth" else (sweep.layers / 2,)
    tokens = 32 if batch < 8 else 8  # a turn of decoding
    room = length + (tokens * (MOST_TURNS + 1) if kind == DECODING else 0)
    models = {E: model_of(sweep, width, room, E) for E in ("fixed", *depths)}
    text = torch.randint(V, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    if kind == TRAINING:
        return {E: training_step(model, text) for E, model in models.items()}, batch * length
    parts = MOST_TURNS + 1
    how = text[:, :length], tokens * parts, parts
    return {E: cached_generation(model, *how) for E, model in models.items()}, batch * tokens * parts


def point(sweep: Sweep, kind: str, axis: str, value: float) -> list[dict]:
    """Seconds a token of the fixed model and of routing, and their ratio in paired turns; a row an E."""
    calls, tokens = calls_of(sweep, kind, axis, value)
    began = time.perf_counter()
    in_turn(calls, 1, warmup=0)
    turns = int(sweep.seconds / (time.perf_counter() - began))
    timings, rows = in_turn(calls, min(max(turns, 3), MOST_TURNS), warmup=0), []
    a_token = timings.seconds.median() / tokens
    for E in list(calls)[1:]:
        row = dict(kind=kind, axis=axis, value=E if axis == "depth" else value)
        rows.append(
            row | dict(fixed=float(a_token["fixed"]), routed=float(a_token[E])) | timings.ratio(E, "fixed")
        )
    return rows


def measure(sweep: Sweep = FULL, path: Path | None = None) -> dict:
    """All points of a sweep; the record goes to `path` after each of them.

    A record there of the same machine, versions and sweep is gone on with.
    """
    keep_memory()
    record = begun(path, machine("cpu") | dict(sweep=vars(sweep), dtype="float32"), dict(points=[]))
    there = {(row["kind"], row["axis"], row["value"]) for row in record["points"]}
    for kind, axis, value in values(sweep):
        if (kind, axis, value) in there:
            continue
        for row in point(sweep, kind, axis, value):
            record["points"].append(row)
            shown = f"{1e6 * row['fixed']:.1f} µs a token fixed, {1e6 * row['routed']:.1f} routed"
            print(f"{kind}, {axis} {row['value']:g}: {shown}, ratio {row['measured']:.3f}", flush=True)
        if path:
            write_whole(path, json.dumps(record, indent=1).encode())
    return record


def values(sweep: Sweep) -> Iterator[tuple[str, str, float]]:
    """What is measured. All depths take turns with one fixed model: their first value stands for them."""
    for kind in (TRAINING, DECODING):
        for axis in AXES:
            own = getattr(sweep, axis)
            yield from ((kind, axis, value) for value in (own[:1] if axis == "depth" else own))
