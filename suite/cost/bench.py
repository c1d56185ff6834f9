"""The bench of speed: `make bench`, or `python -m suite.cost.bench --help`.

Every ratio is taken side by side in one process: the models in turn, at least seven turns after a warm-up
(for long training steps, on a quarter of the batch), the median of the paired ratios with its quartiles. Rows
that need a GPU run where there is one. The record is written after each group of rows, so that nothing is
lost. `--only` measures some groups again and keeps the others of the same machine and version.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib
from morlib import Cache, ModelConfig, TrainConfig, Transformer

from ..files import REFERENCE, outputs, write_whole
from ..runs import keep_memory, pick_device, settings
from ..texts import load_corpus
from . import goals
from .flops import training_flops
from .probes import where_time_goes
from .speed import about, machine
from .timing import Timed, Timings, build, clock, decoding, forward_pass, in_turn, training_step

SOURCES = dict(n_layers=12, d_model=256, n_heads=8, d_ff=2048, dropout=0.1)  # the sources' sizes
ROUTED = (8, 6, "8 router", "6 router")  # names of the models that are compared with "fixed"
Rows = Iterator[tuple[str, dict]]  # the keys of rows, and what was measured


# ---- What is measured besides our models ----


class EncoderStack(nn.Module):
    """The same stack from torch.nn.TransformerEncoder: causal, pre-norm, of the same sizes."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        sizes = cfg.d_model, cfg.n_heads, cfg.d_ff, cfg.dropout
        layer = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size)
        self.register_buffer("positions", morlib.sinusoids(cfg.max_len, cfg.d_model))
        norm = nn.LayerNorm(cfg.d_model)
        self.stack = nn.TransformerEncoder(layer, cfg.n_layers, norm, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, L, V] of tokens [B, L]."""
        L = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(L, device=tokens.device)
        return self.head(self.stack(self.embed(tokens) + self.positions[:L], mask, is_causal=True))


def cached_generation(model: Transformer, prompt: Tensor, tokens: int, parts: int) -> Timed:
    """Greedy generation with a cache after a prompt [B, P], as `morlib.generate` does it, less its checks.

    A call generates the next of `parts` equal parts of the tokens, and multiplies its seconds by `parts`. The
    pass over the prompt, but for its last token, is not timed.
    """
    cache, fresh, some, P = Cache(), None, tokens // parts, prompt.shape[1]

    @torch.inference_mode()
    def call() -> dict:
        nonlocal cache, fresh
        model.eval()
        if fresh is None or cache.length + some > P - 1 + tokens:
            cache, fresh = Cache(), prompt[:, -1:]
            if P > 1:
                model(prompt[:, :-1], cache)
        began, depth = clock(), 0.0
        for _ in range(some):
            out = model(fresh, cache)
            fresh = out.logits[:, -1].argmax(-1, keepdim=True)
            depth = depth + out.depth
        return dict(seconds=(clock() - began) * parts, E=depth.double().mean() / some)

    return call


def plain_generation(model: Transformer, prompt: Tensor, tokens: int, parts: int) -> Timed:
    """The same for a model of fixed depth, as a plain loop over its weights, pre-norm.

    All keys and values lie in one tensor [N, 2, B, H, P + tokens, D/H], made beforehand.
    """
    (B, P), N, H, D = prompt.shape, model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
    held, start, fresh, some = torch.zeros(N, 2, B, H, P + tokens, D // H), 0, None, tokens // parts

    def step(ids: Tensor, start: int) -> Tensor:
        L = ids.shape[1]
        x = model.embed(ids) + model.positions[start : start + L]
        for block, kv in zip(model.blocks, held):
            made = block.attention.qkv(block.norm1(x)).view(B, L, 3, H, D // H).permute(2, 0, 3, 1, 4)
            kv[:, :, :, start : start + L] = made[1:]
            k, v = kv[:, :, :, : start + L]
            y = F.scaled_dot_product_attention(made[0], k, v, is_causal=L > 1)
            x = x + block.attention.proj(y.transpose(1, 2).reshape(B, L, D))
            x = x + block.feed_forward(block.norm2(x))
        return model.head(model.norm(x[:, -1])).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def call() -> dict:
        nonlocal start, fresh
        model.eval()
        if fresh is None or start + some > P - 1 + tokens:
            start, fresh = P - 1, prompt[:, -1:]
            if P > 1:
                step(prompt[:, :-1], 0)
        began = clock()
        for _ in range(some):
            fresh, start = step(fresh, start), start + 1
        return dict(seconds=(clock() - began) * parts)

    return call


def uncached_generation(model: Transformer, tokens: int, stride: int) -> Timed:
    """Generation without a cache, where token n needs a pass over all n before it.

    A call does every `stride`-th of these passes, the next call others, and multiplies its seconds by that.
    """
    text, calls = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device), 0

    @torch.inference_mode()
    def call() -> dict:
        nonlocal calls
        model.eval()
        began = clock()
        for length in range(1 + calls % stride, tokens + 1, stride):
            model(text[:, :length]).logits[:, -1].argmax(-1)
        calls += 1
        return dict(seconds=(clock() - began) * stride)

    return call


def linear_layers(model: Transformer, rows: int, times: int) -> Timed:
    """The linear layers of all blocks on so many rows, so many times: what decoding does with each row."""
    layers = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]

    @torch.inference_mode()
    def call() -> dict:
        began = clock()
        for _ in range(times):
            for layer, x in zip(layers, inputs):
                layer(x)
        return dict(seconds=clock() - began)

    return call


def matrix_product(size: int, dtype: torch.dtype = torch.float32) -> Timed:
    """A large matrix product, [size, size] times [size, size]: 2 size^3 operations."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))

    def call() -> dict:
        began = clock()
        a @ b
        return dict(seconds=clock() - began)

    return call


# ---- The bench ----


@dataclass(frozen=True)
class Sizes:
    """The sizes of a bench: the sources', or tiny ones that only show that it works."""

    model: dict
    batch: int = 128
    length: int = 64
    long_batch: int = 16
    long_length: int = 512
    generated: int = 512
    decoded: int = 64  # tokens after a prompt of as many; at batch 32 half as many
    product: int = 4096  # side of the large matrix product
    router_steps: int = 12  # training steps of the routers, 8 windows each
    max_chars: int | None = None  # of the text
    repeats: int = 7
    gpu_batches: tuple = (8, 32, 128, 512, 1024)
    preset: str = "quick"  # of the two runs whose losses tell whether a narrower dtype harms
    experiment: str = "cpu"  # preset of the row at experiment 1's size


FULL = Sizes(model=SOURCES)
QUICK = Sizes(
    dict(SOURCES, d_model=32, n_heads=4, d_ff=64), batch=8, length=16, long_batch=2, long_length=32,
    generated=24, decoded=8, product=128, router_steps=2, max_chars=40_000, repeats=2, gpu_batches=(8, 32),
    preset="smoke", experiment="smoke",
)  # fmt: skip


class Bench:
    """A bench's models and text. Each method named in GROUPS measures rows and yields key and row."""

    def __init__(self, sizes: Sizes = FULL):
        keep_memory()
        self.sizes = sizes
        self.corpus = load_corpus("tinyshakespeare", max_chars=sizes.max_chars)
        device, dtype, _ = pick_device()
        self.dtype = dtype if device.type == "cpu" else torch.float32  # of the CPU rows, GPU or not
        self.extra: dict = {"seconds": {}}

    def build(self, length: int, device: str = "cpu", **changes) -> Transformer:
        sizes = dict(self.sizes.model, vocab_size=self.corpus.vocab_size, max_len=length)
        return build(ModelConfig(**sizes | changes), device)

    def fixed_and_blind(self, length: int, device: str = "cpu") -> dict:
        """The fixed model, and blind routing at E = 8 and 6."""
        models = {"fixed": self.build(length, device, routing="none")}
        for E in (8, 6):
            models[E] = self.build(length, device, routing="even", target_depth=float(E))
        return models

    @cached_property
    def routed(self) -> dict[int, Transformer]:
        """Two models with routers that have trained a little, for all groups."""
        windows, models = 8 * self.sizes.router_steps, {}
        short = TrainConfig(epochs=1, windows=windows, batch_size=8, evaluations=1, eval_windows=8)
        for E in (8, 6):
            models[E] = self.build(self.sizes.length, routing="mor", target_depth=float(E))
            morlib.train(models[E], self.corpus, short)
        return models

    def fixed_and_routed(self) -> dict:
        models = self.fixed_and_blind(self.sizes.length)
        return models | {f"{E} router": model for E, model in self.routed.items()}

    def steps(self, models: dict, windows: Tensor, dtype: torch.dtype | None = None) -> dict[str, Timed]:
        return {name: training_step(model, windows, dtype or self.dtype) for name, model in models.items()}

    def windows(self, batch: int, length: int, device: str = "cpu") -> Tensor:
        return self.corpus.draw(batch, length, torch.Generator().manual_seed(0)).to(device)

    def turns(self, name: str, calls: dict, repeats: int | None = None, warm: dict | None = None) -> Timings:
        """Calls in turn, after a turn that does not count, or after the calls in `warm`: the same on less."""
        for call in (warm or {}).values():
            call()
        timings = in_turn(calls, repeats or self.sizes.repeats, warmup=0 if warm else 1)
        self.extra["seconds"][name] = {
            str(k): dict(median=float(timings.seconds[k].median()), E=timings.depth[k]) for k in calls
        }
        return timings

    # -- Groups of rows --

    def training(self) -> Rows:
        """Blind and trained routing against the fixed model; and the rate of arithmetic."""
        s, models = self.sizes, self.fixed_and_routed()
        windows = self.windows(s.batch, s.length)
        product = {"product": matrix_product(s.product, self.dtype)}
        warm = self.steps(models, windows[: s.batch // 4]) | product
        timings = self.turns("training", self.steps(models, windows) | product, warm=warm)
        for name in ROUTED:
            yield f"train-{str(name).replace(' ', '-')}", timings.ratio(name, "fixed")
        with torch.no_grad():
            work = training_flops(models["fixed"], models["fixed"](windows[:, :-1]).actions)
        seconds = timings.seconds
        a_flop = {"step": seconds["fixed"] / work, "product": seconds["product"] / (2 * s.product**3)}
        a_flop = Timings(pd.DataFrame(a_flop), {})
        note = "step {:.0f} GFLOP/s, product {:.0f} GFLOP/s".format(*(1 / a_flop.seconds.median() / 1e9))
        yield "rate", a_flop.ratio("product", "step") | dict(note=note)

    def small(self) -> Rows:
        """A router that has trained a little, at experiment 1's size, with the one thread of its runs."""
        chosen, threads = settings(dict(preset=self.sizes.experiment)), torch.get_num_threads()
        batch, V = chosen.train().batch_size, self.corpus.vocab_size
        N = chosen.model(vocab_size=V).n_layers
        models = {
            "none": build(chosen.model(vocab_size=V, routing="none", target_depth=None)),
            "mor": build(chosen.model(vocab_size=V, routing="mor", target_depth=2 / 3 * N)),
        }
        windows = self.windows(batch, models["none"].cfg.max_len)
        torch.set_num_threads(1)
        try:
            short = dict(epochs=1, windows=batch * self.sizes.router_steps, evaluations=1, eval_windows=8)
            morlib.train(models["mor"], self.corpus, chosen.train(**short))
            timings = self.turns("small", self.steps(models, windows), 3 * self.sizes.repeats)
        finally:
            torch.set_num_threads(threads)
        yield "train-small", timings.ratio("mor", "none") | dict(note="one thread")

    def forward(self) -> Rows:
        tokens, models = self.windows(self.sizes.batch, self.sizes.length)[:, :-1], self.fixed_and_routed()
        timings = self.turns("forward", {name: forward_pass(m, tokens) for name, m in models.items()})
        for name in ROUTED:
            row = timings.ratio(name, "fixed")
            yield f"forward-{str(name).replace(' ', '-')}", row | dict(dtype="float32")

    def long(self) -> Rows:
        """Long windows: attention is a larger part of the work."""
        s = self.sizes
        windows, models = self.windows(s.long_batch, s.long_length), self.fixed_and_blind(s.long_length)
        warm = self.steps(models, windows[: s.long_batch // 4 or 1])
        timings = self.turns("training, long", self.steps(models, windows), warm=warm)
        for E in (8, 6):
            yield f"train-{E}-long", timings.ratio(E, "fixed")
        calls = {name: forward_pass(model, windows[:, :-1]) for name, model in models.items()}
        timings = self.turns("forward, long", calls)
        for E in (8, 6):
            yield f"forward-{E}-long", timings.ratio(E, "fixed") | dict(dtype="float32")

    def encoder(self, device: str = "cpu") -> Rows:
        """Without dropout both do the same: torch's layer drops in two more places. On a CPU half a batch."""
        on_cpu = device == "cpu"
        dtype = self.dtype if on_cpu else pick_device()[1]
        windows = self.windows(self.sizes.batch // (2 if on_cpu else 1), self.sizes.length, device)
        ours = self.build(self.sizes.length, device, routing="none", dropout=0.0)
        models = {"ours": ours, "torch": EncoderStack(ours.cfg).to(device)}
        warm = self.steps(models, windows[: len(windows) // 2], dtype)
        timings = self.turns(f"encoder, {device}", self.steps(models, windows, dtype), warm=warm)
        about_it = dict(dtype=str(dtype)[6:], note=f"batch {len(windows)}")
        yield "encoder" if on_cpu else "encoder-gpu", timings.ratio("ours", "torch") | about_it

    def dtypes(self) -> Rows:
        """The number type that the suite chooses; where that is float32, a word on what bfloat16 would do."""
        s, narrow = self.sizes, self.dtype != torch.float32
        model, other = self.build(s.length, routing="none"), self.dtype if narrow else torch.bfloat16
        windows = self.windows(s.batch if narrow else s.batch // 8, s.length)
        calls = {str(dtype)[6:]: training_step(model, windows, dtype) for dtype in (torch.float32, other)}
        measured = self.turns("dtypes", calls).ratio(str(other)[6:], "float32")
        if narrow:
            yield "dtype", measured
            yield "dtype-loss", self.loss_of_dtype()
            return
        tried = f"a step of {len(windows)} windows under autocast to bfloat16"
        takes = f"takes {measured['measured']:.2f} of its time here"
        note = f"float32 chosen, as asked where another gains less; {tried} {takes}"
        yield "dtype", dict(measured=None, note=note, alternative=measured)
        yield "dtype-loss", dict(measured=None, note="float32 chosen")

    def loss_of_dtype(self) -> dict:
        """Validation loss of a short run in the chosen dtype, minus that of the same run in float32."""
        chosen, losses = settings(dict(preset=self.sizes.preset)), {}
        for dtype in (torch.float32, self.dtype):
            model = build(chosen.model(vocab_size=self.corpus.vocab_size, routing="none"))
            training = morlib.train(model, self.corpus, chosen.train(), dtype=dtype)
            losses[dtype] = training.history[-1]["val_loss"]
        narrow, full = losses[self.dtype], losses[torch.float32]
        note = f"{narrow:.4f} against {full:.4f}, preset {self.sizes.preset}, one seed"
        return dict(measured=narrow - full, note=note)

    def generation(self) -> Rows:
        s, parts = self.sizes, 2 * self.sizes.repeats
        model = self.build(s.generated + 1, routing="none")
        calls = {
            "cached": cached_generation(model, torch.zeros(1, 1, dtype=torch.long), s.generated, parts),
            "uncached": uncached_generation(model, s.generated, parts),
        }
        row = self.turns("generation", calls, parts).ratio("cached", "uncached")
        tokens = f"each of {parts} turns generates the next {s.generated // parts} tokens with the cache"
        note = f"{tokens}, and does one uncached pass in {parts}"
        yield "generation", row | dict(note=note, dtype="float32")

    def decoding(self) -> Rows:
        """Cached decoding of one sequence and of 32, and the size of the cache."""
        s, models = self.sizes, self.fixed_and_blind(2 * self.sizes.decoded)
        models = {name: models[name] for name in ("fixed", 6)}
        for batch, tokens in ((1, s.decoded), (32, s.decoded // 2)):
            prompt = self.windows(batch, s.decoded)[:, :-1]
            calls = {name: decoding(model, prompt, tokens) for name, model in models.items()}
            row = self.turns(f"decoding, batch {batch}", calls).ratio(6, "fixed") | dict(dtype="float32")
            if batch > 1:  # how far skipping could go if all else were free
                half = batch // 2
                alone = {rows: linear_layers(models["fixed"], rows, tokens) for rows in (batch, half)}
                part = self.turns("linear layers alone", alone).ratio(half, batch)["measured"]
                row["note"] = f"the linear layers alone, {half} rows against {batch}: {part:.2f}"
            yield f"decode-{batch}", row
        done = {name: call() for name, call in calls.items()}
        size = {name: result["cache"].bytes() for name, result in done.items()}
        held = {name: float(result["held"]) for name, result in done.items()}
        positions = s.decoded + s.decoded // 2
        note = f"{size[6]:,} of {size['fixed']:,} bytes, batch 32, {positions} positions"
        share = size[6] / size["fixed"] / (held[6] / held["fixed"])
        yield "cache", dict(measured=share, E=held[6], note=note, dtype="float32")

    def once(self) -> Rows:
        """Routing that decides once for all layers: at experiment 1's size with one thread, and decoding."""
        chosen, threads, s = settings(dict(preset=self.sizes.experiment)), torch.get_num_threads(), self.sizes
        batch, V = chosen.train().batch_size, self.corpus.vocab_size
        N = chosen.model(vocab_size=V).n_layers
        changes = {"fixed": dict(routing="none", target_depth=None)}
        for name, routing in (("once", "even-once"), ("worth", "worth")):
            for E in (8, 6):
                changes[f"{name}-{E}"] = dict(routing=routing, target_depth=E / 12 * N, max_recursions=1)
        models = {name: build(chosen.model(vocab_size=V, **change)) for name, change in changes.items()}
        windows = self.windows(batch, models["fixed"].cfg.max_len)
        torch.set_num_threads(1)
        try:
            short = dict(epochs=1, windows=batch * s.router_steps, evaluations=1, eval_windows=8)
            for name in ("worth-8", "worth-6"):
                morlib.train(models[name], self.corpus, chosen.train(**short))
                models[name].policy.price.zero_()  # so each timed step sets it by its own batch
            timings = self.turns("small, decided once", self.steps(models, windows), 3 * s.repeats)
        finally:
            torch.set_num_threads(threads)
        for name in list(models)[1:]:
            yield name, timings.ratio(name, "fixed") | dict(note="one thread")
        yield from self.once_decoding()

    def once_decoding(self) -> Rows:
        """Cached decoding where a token's depth is decided once, and ours of fixed depth as a plain loop."""
        s, parts = self.sizes, 2 * self.sizes.repeats
        build = dict(max_recursions=1, dropout=0.0)
        fixed = self.build(2 * s.generated, routing="none", **build)
        once = self.build(2 * s.generated, routing="even-once", target_depth=6.0, **build)
        for batch in (1, 8, 32):
            prompt = self.windows(batch, 8)[:, :-1]
            how = prompt, s.generated, parts
            calls = {"fixed": cached_generation(fixed, *how), "once": cached_generation(once, *how)}
            calls["plain"] = plain_generation(fixed, *how)
            timings = self.turns(f"decoding, decided once, batch {batch}", calls, parts)
            note = dict(note=f"8 tokens of prompt, {s.generated} new ones", dtype="float32")
            yield f"decode-once-{batch}", timings.ratio("once", "fixed") | note
            yield f"decode-plain-{batch}", timings.ratio("fixed", "plain") | note

    def share(self) -> Rows:
        """The parts of a training step with a trained router."""
        model = self.routed[8]
        step = training_step(model, self.windows(self.sizes.batch, self.sizes.length), self.dtype)
        parts = where_time_goes(model, step, self.sizes.repeats)
        self.extra["parts"] = parts.median().to_dict()
        share = parts["router"] + parts["packing"]
        note = "router {:.3f}, packing {:.3f}".format(*parts[["router", "packing"]].median())
        quartiles = [float(q) for q in share.quantile([0.25, 0.75])]
        row = dict(measured=float(share.median()), quartiles=quartiles, repeats=len(share))
        yield "share", row | dict(E=float(step()["E"]), note=note)

    def gpu(self) -> Rows:
        """Growing batches on a card, up to the largest that fits."""
        device, dtype, _ = pick_device()
        if device.type != "cuda":
            return
        models, pays, row = self.fixed_and_blind(self.sizes.length, "cuda"), None, None
        models = {name: models[name] for name in ("fixed", 8)}
        for batch in self.sizes.gpu_batches:
            windows = self.windows(batch, self.sizes.length, "cuda")
            try:
                timings = self.turns(f"training, GPU, batch {batch}", self.steps(models, windows, dtype))
            except torch.OutOfMemoryError:
                break
            row = timings.ratio(8, "fixed") | dict(dtype=str(dtype)[6:], batch=batch)
            pays = pays or (batch if row["measured"] < 1 else None)
        if row:
            note = f"batch {row['batch']}; it breaks even at batch {pays or 'none of those tried'}"
            yield "train-8-gpu", row | dict(note=note)
        yield from self.encoder("cuda")


GROUPS = tuple("training small forward long encoder dtypes generation decoding once share gpu".split())


# ---- The record ----


def record_path(folder: Path, quick: bool = False) -> Path:
    on_cpu = f"cpu {platform.machine()} {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu
    name = re.sub(r"[^a-z0-9]+", "-", device.lower())
    return folder / f"speed_{name}{'_quick' if quick else ''}.json"


def comparable(record: dict) -> list:
    """What two records must have in common to be one: machine, threads, versions, sizes but for the turns."""
    sizes = {k: v for k, v in record.get("sizes", {}).items() if k != "repeats"}
    return [record.get(k) for k in ("cpu", "gpu", "threads", "versions")] + [sizes]


def measure(groups: tuple[str, ...] = GROUPS, sizes: Sizes = FULL, path: Path | None = None) -> dict:
    """Measure groups of rows; the record goes to `path` after each.

    Rows of other groups stay if the record there is `comparable`; else it is begun anew. Each row says how
    many turns it took.
    """
    here = machine() | dict(sizes=dict(vars(sizes)))
    record = here | dict(dtype="", rows={}, seconds={}, took={})
    if path and path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if comparable(old) == comparable(json.loads(json.dumps(here))):
            record = old | {k: here[k] for k in ("date", "load", "commit")}
    bench = Bench(sizes)
    record["dtype"] = str(bench.dtype)[6:]
    for group in groups:
        began = time.perf_counter()
        for key, row in getattr(bench, group)():
            record["rows"][key] = dict(dtype=record["dtype"]) | row | dict(date=machine()["date"])
            print(goals.line(key, record["rows"][key]), flush=True)
        record["seconds"] |= bench.extra["seconds"]
        record |= {k: v for k, v in bench.extra.items() if k != "seconds"}
        record["took"][group] = round(time.perf_counter() - began, 1)
        if path:
            write_whole(path, json.dumps(record, indent=1).encode())
        gc.collect()
    return record


# ---- The command ----


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick = "tiny sizes and two turns: shows that it works, measures nothing"
    only = f"groups of rows to measure, with commas: {', '.join(GROUPS)}"
    reference = "write the record to outputs/reference, where records that ship are"
    steps = f"training steps of the routers (default {FULL.router_steps})"
    turns = f"turns of each measurement (default {FULL.repeats}, no fewer): the median of more is steadier"
    p.add_argument("--quick", action="store_true", help=quick)
    p.add_argument("--only", default=",".join(GROUPS), help=only)
    p.add_argument("--reference", action="store_true", help=reference)
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--router-steps", type=int, help=steps)
    p.add_argument("--turns", type=int, help=turns)
    return p


def main(arguments: list[str] | None = None) -> dict:
    chosen = parser().parse_args(arguments)
    groups = tuple(chosen.only.split(","))
    if unknown := set(groups) - set(GROUPS):
        parser().error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if chosen.turns is not None and chosen.turns < FULL.repeats:
        parser().error(f"--turns must be {FULL.repeats} or more: a median of fewer says little")
    torch.set_num_threads(chosen.threads)
    given = dict(router_steps=chosen.router_steps, repeats=chosen.turns)
    sizes = replace(QUICK if chosen.quick else FULL, **{k: v for k, v in given.items() if v})
    folder = REFERENCE if chosen.reference and not chosen.quick else outputs() / "results"
    path, began = record_path(folder, chosen.quick), time.perf_counter()
    record = measure(groups, sizes, path)
    with pd.option_context("display.max_colwidth", None, "display.width", None):
        columns = ["what", "measured", "quartiles", "goal", "met", "E"]
        print("\n" + goals.table(record)[columns].to_string(index=False))
    print("\n".join(goals.misses(record)))
    print(f"\n{path.name}: {about(record)}; {time.perf_counter() - began:.0f} s")
    if chosen.quick:
        print("Tiny sizes, two turns: this shows that the bench works and measures nothing.")
    return record


if __name__ == "__main__":
    main()
