"""What each system of the field costs in use, and what its depth follows: measured on trained models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import morlib
from morlib import Cache, Transformer

from ..files import REFERENCE, read_rows, write_rows
from ..results.dial import follows
from ..results.stats import spearman
from ..runs import Run, trained_model
from ..texts import ngram_surprisal
from .flops import flops
from .speed import machine
from .timing import decoding, in_turn, training_step

FILE = "systems_costs.json"
LINES = 500  # held-out lines that are read, at most
BATCH = 32  # of a training step that is timed


def measure_systems(specs: list[Run], lines: int = LINES, repeats: int = 5) -> pd.DataFrame:
    """One row a run: `run`, `model`, `seed`, `measured_on` (machine and versions), and of held-out lines

    operations: floating-point operations of a forward pass, a token; cache: bytes of keys and
    values that are kept, a token of context (of eight lines); r: the rank correlation of depth with
    the hops that are asked for, or on text as in `follows_surprisal`; balance: n sum_i f_i P_i of
    experts (1: all are used evenly), NaN where there are none; agreement: per cent of tokens and
    layers in which a predictor says what top-k does, NaN without one; step and decode: as in
    `times`, over those of a fixed model with as many layers as the deepest of these runs. Runs that
    are not finished are trained.
    """
    rows, layers = [], max(spec.config.n_layers for spec in specs)
    for spec in specs:
        model, record, task = trained_model(spec)
        names = dict(run=record["id"], model=spec.model, seed=spec.train.seed, measured_on=here(spec.device))
        rows.append(names | measured(model, task, lines) | times(model, task, layers, repeats))
    return pd.DataFrame(rows)


def here(wanted: str | None = None) -> str:
    """This machine, with versions and the day, in a line; wanted: its device, as for `runs.pick_device`."""
    m = machine(wanted)
    return (
        f"{m['gpu'] or m['cpu']}, threads {m['threads']}, torch {m['versions']['torch']}, "
        f"morlib {m['versions']['morlib']}, {m['date'][:10]}"
    )


@torch.no_grad()
def measured(model: Transformer, task, lines: int) -> dict:
    """What a trained model costs, and what its depth follows."""
    windows = task.windows("heldout", model.cfg.max_len, lines)
    seen, device = morlib.score(model, windows), next(model.parameters()).device
    cache = Cache()
    out = model(windows[:8, :-1].to(device), cache)
    kept = cache.tokens() * 2 * model.cfg.d_model * out.logits.element_size()
    even, agreement = out.memory.get("balance"), getattr(model.policy, "agreement", None)
    followed = follows if hasattr(task, "answers") else follows_surprisal
    return dict(
        operations=flops(model, seen["actions"])["total"] / seen["depth"].numel(),
        cache=kept / out.depth.numel(),
        r=followed(seen, windows, task),
        balance=float(torch.stack(even).mean()) if even else float("nan"),
        agreement=100 * agreement(model, windows[:, :-1].to(device)) if agreement else float("nan"),
    )


def follows_surprisal(seen: dict[str, Tensor], windows: Tensor, corpus) -> float:
    """Rank correlation (Spearman) of depth with the surprisal of the next token by trigrams of the training
    text, which no model has a part in; windows [n, L + 1]. 0 where all are equally deep."""
    surprisal = ngram_surprisal(corpus.ids["train"], windows.flatten(), 3, corpus.vocab_size)[0]
    surprisal = np.append([np.nan, np.nan], surprisal).reshape(windows.shape)[:, 2:]  # [n, L - 1]
    return spearman(seen["depth"][:, 1:], surprisal)


def times(model: Transformer, task, layers: int, repeats: int) -> dict[str, float]:
    """How long a training step (`step`) and decoding a token of one sequence (`decode`) take.

    Each as a ratio to a fixed model of so many layers, in turn in one process, the median of the turns.
    """
    plain = dict(routing="none", options=None, target_depth=None, shared_blocks=None, action_rates=None)
    device, L = next(model.parameters()).device, model.cfg.max_len
    fixed = Transformer(replace(model.cfg, n_layers=layers, **plain)).to(device)
    lines = task.draw(BATCH, L, torch.Generator().manual_seed(0)).to(device)
    kinds = {
        "step": lambda each: training_step(each, lines),
        "decode": lambda each: decoding(each, lines[:1, : L // 4], L // 2),
    }
    ratios = {}
    for kind, call in kinds.items():
        timings = in_turn({"own": call(model), "fixed": call(fixed)}, repeats)
        ratios[kind] = timings.ratio("own", "fixed")["measured"]
    return ratios


def save_systems(table: pd.DataFrame, path: Path = REFERENCE / FILE) -> None:
    """Write the table as JSON, a line a row; `stored_systems` reads it."""
    write_rows(path, table.astype(object).where(table.notna(), None).to_dict("records"))


def stored_systems(path: Path = REFERENCE / FILE) -> pd.DataFrame:
    """The table that ships; without rows where none does."""
    measures = ("operations", "cache", "r", "balance", "agreement", "step", "decode")
    return pd.DataFrame(read_rows(path), columns=["run", "model", "seed", "measured_on", *measures])
