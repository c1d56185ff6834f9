"""What each system of the field costs in use, and what its depth follows: measured on trained models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import morlib
from morlib import Cache, Transformer

from ..files import REFERENCE, write_whole
from ..results.dial import follows
from ..runs import Run, trained_model
from .flops import flops
from .timing import decoding

FILE = "systems_costs.json"
LINES = 500  # held-out lines that are read, at most


def measure_systems(specs: list[Run], lines: int = LINES, repeats: int = 5) -> pd.DataFrame:
    """One row a run: `run`, `model`, `seed`, and of held-out lines

    operations: floating-point operations of a forward pass, a token; cache: bytes of keys and values that are
    kept, a token of context; decode: milliseconds to decode a token of one sequence with a cache, the median;
    r: the rank correlation of depth with the hops that are asked for; balance: n sum_i f_i P_i of experts
    (1: all are used evenly), NaN where there are none.
    Runs that are not finished are trained.
    """
    rows = []
    for spec in specs:
        model, record, task = trained_model(spec)
        names = dict(run=record["id"], model=spec.model, seed=spec.train.seed)
        rows.append(names | measured(model, task, lines, repeats))
    return pd.DataFrame(rows)


@torch.no_grad()
def measured(model: Transformer, task, lines: int, repeats: int) -> dict:
    """What a trained model costs, and what its depth follows."""
    windows = task.windows("heldout", model.cfg.max_len, lines)
    seen, device = morlib.score(model, windows), next(model.parameters()).device
    cache = Cache()
    out = model(windows[:8, :-1].to(device), cache)
    kept = cache.tokens() * 2 * model.cfg.d_model * out.logits.element_size()
    decode = decoding(model, windows[:1, : task.symbols + 4].to(device), 32)
    each = [seconds for _ in range(repeats + 1) for seconds in decode()["each"]]
    even = out.memory.get("balance")
    return dict(
        operations=flops(model, seen["actions"])["total"] / seen["depth"].numel(),
        cache=kept / out.depth.numel(),
        decode=1000 * float(np.median(each)),
        r=follows(seen, windows, task),
        balance=float(torch.stack(even).mean()) if even else float("nan"),
    )


def save_systems(table: pd.DataFrame, path: Path = REFERENCE / FILE) -> None:
    """Write the table as JSON, a line a row; `stored_systems` reads it."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    rows = ",\n".join(map(json.dumps, rows))
    write_whole(path, f"[\n{rows}\n]\n".encode())


def stored_systems(path: Path = REFERENCE / FILE) -> pd.DataFrame:
    """The table that ships; without rows where none does."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    names = ("run", "model", "seed", "operations", "cache", "decode", "r", "balance")
    return pd.DataFrame(rows, columns=names)
