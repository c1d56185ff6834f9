"""Time: calls that time themselves, taken in turn, and the ratios of one to another.

Times of one machine drift. So the models that are compared take turns in one process, and a ratio is the
median of the ratios of each turn, with its quartiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib
from morlib import Cache, ModelConfig, RandomPolicy, Transformer

from ..runs.whole_tokens import BlindTokens

GOLDEN = 0.6180339887498949  # golden ratio: its multiples, modulo 1, lie evenly however many there are

# ---- Models to be measured ----


class EvenPolicy(RandomPolicy):
    """Blind routing for benches: it draws evenly by construction, so it runs its share in inference too.

    In inference the draws of one token at the N layers lie 1/N apart. A token then receives exactly
    `target_depth` applications where that is a whole number. From position to position, and from row to row,
    the draws move on by the golden ratio, so that each layer runs its share of the tokens.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        layers = (torch.arange(cfg.n_layers) + 0.5) / cfg.n_layers
        positions = GOLDEN * torch.arange(cfg.max_len)
        self.table.copy_(((layers[:, None] + positions) % 1)[:, None])  # [N, R, max_len], alike for each R


class EvenOncePolicy(BlindTokens):
    """The same for routing that decides once: draws move on evenly over positions and over rows."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.table.copy_(GOLDEN * torch.arange(cfg.max_len) % 1)


# known wherever this room is imported, and nowhere else
morlib.POLICIES |= {"even": EvenPolicy, "even-once": EvenOncePolicy}


def build(config: ModelConfig, device: torch.device | str = "cpu") -> Transformer:
    """An untrained model in evaluation mode, with the weights of seed 0."""
    torch.manual_seed(0)
    return Transformer(config).to(device).eval()


# ---- Turns ----


def clock(device: torch.device | str) -> float:
    """Seconds, once the device has done what it was given."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@dataclass
class Timings:
    """What `in_turn` measured."""

    seconds: pd.DataFrame  # [turn, name]
    depth: dict[str, float | None]  # the mean effective depth E of each name's turns; None: it has none

    def ratio(self, over: str, under: str) -> dict:
        """The time of one name over that of another in each turn: median, quartiles, and E of the first."""
        paired = self.seconds[over] / self.seconds[under]
        quartiles = [float(q) for q in paired.quantile([0.25, 0.75])]
        median = float(paired.median())
        return dict(measured=median, quartiles=quartiles, repeats=len(paired), E=self.depth.get(over))

    def milliseconds(self, name: str) -> float:
        """The median of a name's turns."""
        return 1000 * float(self.seconds[name].median())


Timed = Callable[[], dict]  # a call that returns its "seconds", and its mean depth "E" if it has one


def in_turn(calls: dict[str, Timed], repeats: int = 7, warmup: int = 1) -> Timings:
    """Time calls in turn: each once a turn, every second turn in reverse. Warm-up turns do not count."""
    turns, depth = [], []
    for turn in range(warmup + repeats):
        order = list(calls) if turn % 2 else list(calls)[::-1]
        done = {name: calls[name]() for name in order}
        turns.append({name: done[name]["seconds"] for name in calls})
        depth.append({name: done[name].get("E") for name in calls})
    seen = pd.DataFrame(depth[warmup:]).astype(float).mean()
    of_name = {name: None if seen.isna()[name] else float(seen[name]) for name in calls}
    return Timings(pd.DataFrame(turns[warmup:]), of_name)


# ---- Calls that time themselves ----


def training_step(model: nn.Module, windows: Tensor, dtype: torch.dtype = torch.float32) -> Timed:
    """A whole training step on windows [B, L + 1]: forward, backward, clipping, AdamW.

    dtype: of autocast. AdamW runs at rate 0: it does the same work, and the weights stay. A policy holds its
    budget in each batch and learns by its own objective, as in `morlib.train`, and has its own buffers back
    afterwards.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    ours, device = isinstance(model, Transformer), windows.device
    buffers = list(model.policy.buffers()) if ours else []

    def step() -> dict:
        model.train()
        before = [buffer.clone() for buffer in buffers]
        began = clock(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = model(windows[:, :-1], calibrate=True) if ours else model(windows[:, :-1])
            logits = out.logits if ours else out
            loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
            loss = model.policy.objective(loss, out, windows[:, 1:]) if ours else loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        own = model.policy.own_loss(out.memory, 1.0) if ours else None
        if own is not None:
            own.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = clock(device) - began
        for buffer, kept in zip(buffers, before):
            buffer.copy_(kept)
        return dict(seconds=seconds, E=out.depth.float().mean() if ours else None)

    return step


def forward_pass(model: Transformer, tokens: Tensor, use_cache: bool = False) -> Timed:
    """A forward pass without gradient on tokens [B, L]; with a cache, what decoding does with a prompt."""

    @torch.no_grad()
    def call() -> dict:
        model.eval()
        began = clock(tokens.device)
        out = model(tokens, Cache() if use_cache else None)
        return dict(seconds=clock(tokens.device) - began, E=out.depth.float().mean())

    return call


def decoding(model: Transformer, prompt: Tensor, tokens: int) -> Timed:
    """Cached greedy decoding of so many tokens after a prompt [B, L]. The prompt's own pass is not timed.

    Also gives the seconds of `each` token, the `cache`, and the mean depth `held` of all positions in it.
    """

    @torch.inference_mode()
    def call() -> dict:
        model.eval()
        cache, each, depths = Cache(), [], []
        out = model(prompt, cache)
        fresh, of_prompt = out.logits[:, -1:].argmax(-1), out.depth
        for _ in range(tokens):
            began = clock(prompt.device)
            out = model(fresh, cache)
            fresh = out.logits[:, -1:].argmax(-1)
            each.append(clock(prompt.device) - began)
            depths.append(out.depth)
        decoded = torch.cat(depths, 1)
        held = torch.cat([of_prompt, decoded], 1).float().mean()
        return dict(seconds=sum(each), each=each, E=decoded.float().mean(), held=held, cache=cache)

    return call


# ---- Several models, several batches ----


def prompts(text: Tensor, B: int, length: int) -> Tensor:
    """B prompts [B, length] from different places of a text of token ids [n]."""
    start = torch.arange(B)[:, None] * 7919 % (len(text) - length)  # a prime: no two near each other
    return text[start + torch.arange(length)]


def serving(model: Transformer, text: Tensor, batches: list[int], prompt: int, tokens: int,
            repeats: int = 7) -> pd.DataFrame:  # fmt: skip
    """Prefill and decoding at several batches: latency (ms), tokens a second, depth, bytes of the cache.

    text: token ids [n] to take prompts from. p50 and p95 of prefill are those of the whole prompt, over the
    repeats; those of decoding are of one more token in each sequence.
    """
    rows = []
    for B in batches:
        tokens_in = prompts(text, B, prompt).to(next(model.parameters()).device)
        prefill = forward_pass(model, tokens_in, use_cache=True)
        passes = [prefill() for _ in range(repeats + 1)][1:]
        seconds = pd.Series([run["seconds"] for run in passes])
        rows.append(_served("prefill", B, seconds, B * prompt, passes[-1]["E"]))
        decode = decoding(model, tokens_in, tokens)
        passes = [decode() for _ in range(max(repeats // 3, 1) + 1)][1:]
        seconds = pd.Series(np.concatenate([run["each"] for run in passes]))
        row = _served("decode", B, seconds, B, passes[-1]["E"])
        cache, held = passes[-1]["cache"], float(passes[-1]["held"])
        rows.append(row | {"cache bytes a sequence": cache.bytes() / B, "E in cache": held})
    return pd.DataFrame(rows)


def _served(phase: str, B: int, seconds: pd.Series, tokens: int, E: Tensor) -> dict:
    p50, p95 = seconds.quantile([0.5, 0.95])
    latency = {"p50 (ms)": 1000 * p50, "p95 (ms)": 1000 * p95}
    return {"phase": phase, "batch": B} | latency | {"tokens/s": tokens / p50, "E": float(E)}


def break_even_table(fixed: Transformer, blind: list[Transformer], corpus, batches: list[int],
                     repeats: int = 7, dtype: torch.dtype = torch.float32) -> pd.DataFrame:  # fmt: skip
    """`break_even` of training steps, prefill and decoding at several batches.

    Columns kind, batch, skip rate. blind: models of blind routing at some depths; the line goes through their
    times.
    """
    N, L, device = fixed.cfg.n_layers, fixed.cfg.max_len, next(fixed.parameters()).device
    models, rows = dict(enumerate([fixed, *blind])), []
    for B in batches:
        windows = corpus.draw(B, L, torch.Generator().manual_seed(B)).to(device)
        kinds = {
            "training step": lambda model, w=windows: training_step(model, w, dtype),
            "prefill": lambda model, w=windows: forward_pass(model, w[:, :-1], use_cache=True),
            "decode": lambda model, w=windows: decoding(model, w[:, : L // 2], max(L // 8, 4)),
        }
        for kind, make in kinds.items():
            timings = in_turn({name: make(model) for name, model in models.items()}, repeats)
            of_fixed, *seconds = timings.seconds.median()
            rate = break_even(list(timings.depth.values())[1:], seconds, of_fixed, N)
            rows.append({"kind": kind, "batch": B, "skip rate": rate})
    return pd.DataFrame(rows)


def break_even(depths: list[float], seconds: list[float], fixed: float, N: int) -> float:
    """The share of skipped applications above which routing pays. NaN: it never does.

    It is where a line through seconds against depth E meets the seconds of the fixed model of N layers; 0
    where these are never met from below.
    """
    slope, base = np.polyfit(depths, seconds, 1)
    if slope <= 0 and max(seconds) < fixed:
        return 0.0
    skip = 1 - (fixed - base) / slope / N if slope > 0 else np.nan
    return float(max(skip, 0.0)) if skip < 1 else np.nan
