"""bench: the table of speed goals, measured again: `make bench`, or `python bench.py --help`.

Every ratio is taken side by side in one process: the models in turn, at least seven turns after a warm-up (long training steps: on a
quarter of the batch), the median of the paired ratios with its quartiles. Rows that need a GPU run where there is one. The record is
written after each group of rows, so that nothing is lost; `--only` measures some groups again and keeps the others of the same machine and
version.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import time
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from torch import Tensor, nn

import deployment
import morlib
from deployment import clock, in_turn, ratio

SOURCES = dict(n_layers=12, d_model=256, n_heads=8, d_ff=2048, dropout=0.1)  # the documents' sizes


# ---- Goals ----


@dataclass(frozen=True)
class Goal:
    """One row of the table of goals. `sense` is "at most", "at least", or "within": that far from 1."""

    key: str
    what: str
    limit: float
    sense: str = "at most"
    where: str = "CPU"
    why: str = ""  # what keeps a row from its goal, said where it misses

    def met(self, measured: float) -> bool:
        return {"at most": measured <= self.limit, "at least": measured >= self.limit, "within": abs(measured - 1) <= self.limit}[self.sense]

    def verdict(self, measured: float) -> str:
        """ "yes", or "no" with the distance to the goal in per cent of the goal."""
        if self.met(measured):
            return "yes"
        return f"no, by {100 * (abs(measured - 1) - self.limit if self.sense == 'within' else abs(measured / self.limit - 1)):.1f} %"

    def words(self) -> str:
        return {"at most": f"≤ {self.limit:g}", "at least": f"≥ {self.limit:g}", "within": f"1 ± {self.limit:g}"}[self.sense]


PACKED = "Time also goes into what does not shrink with E: the head, in training the optimizer, moving tokens in and out of the packed batch, and matrix products with fewer rows, which run at a lower rate."
ROUTED = PACKED + " A router that is trained also sorts its margins in each batch to hold its budget."
GOALS = [
    Goal(f"{kind}-{E}{'-long' if long else ''}{'-router' if router else ''}",
         f"{name}, MoR {'with a trained router' if router else 'blindly routed'} / fixed N = 12, E = {E}, {'batch 16, length 512' if long else 'batch 128, length 64'}",
         limit, why=ROUTED if router else PACKED)
    for router, long, limits in ((False, False, (0.75, 0.58, 0.72, 0.55)), (False, True, (0.78, 0.62, 0.78, 0.62)), (True, False, (0.75, 0.58, 0.72, 0.55)))
    for (kind, name, E), limit in zip((("train", "training step", 8), ("train", "training step", 6), ("forward", "forward pass", 8), ("forward", "forward pass", 6)), limits)
] + [
    Goal("train-small", "training step at experiment 1's size (preset cpu, one thread), MoR with a trained router / fixed N = 12, E = 8", 0.77,
         why="At width 64 an operation takes hardly longer than starting it, and a layer that runs few tokens starts as many."),
    Goal("train-8-gpu", "training step, MoR blindly routed / fixed N = 12, E = 8, large batch", 0.85, where="GPU", why="A small model leaves a card waiting for the next kernel: what counts is how many there are, not how large."),
    Goal("encoder", "training step, ours / torch.nn.TransformerEncoder, fixed N = 12, no dropout", 0.90, why="Both spend nearly all their time in the same matrix products."),
    Goal("encoder-gpu", "training step, ours / torch.nn.TransformerEncoder, fixed N = 12, no dropout", 0.90, where="GPU", why="Both spend nearly all their time in the same matrix products."),
    Goal("rate", "fixed N = 12 training step, arithmetic rate / a large matrix product", 0.70, "at least", why="Normalisation, dropout, residuals, softmax and the optimizer move memory and do no matrix product."),
    Goal("dtype", "training step, the dtype that the suite chooses / float32", 0.65, why="Conversions and whatever is not a matrix product gain nothing from a narrower type."),
    Goal("dtype-loss", "validation loss (nats), the dtype that the suite chooses minus float32", 0.01, why="Fewer bits a number."),
    Goal("generation", "generating 512 tokens, cached / uncached, batch 1", 0.10, why="A token at a time is bound by memory and by the price of starting an operation, a whole context by arithmetic."),
    Goal("decode-1", "cached decoding, MoR blindly routed at E = 6 / fixed N = 12, batch 1", 0.65, why="With one sequence a layer is either run or not, but asking who runs costs as many small operations in each layer."),
    Goal("decode-32", "cached decoding, MoR blindly routed at E = 6 / fixed N = 12, batch 32", 0.65, why="Weights are read for half of the batch as for all of it, and where sequences differ in what ran, their keys and values are gathered for each token."),
    Goal("cache", "cache bytes, MoR blindly routed / fixed N = 12, over E/N", 0.01, "within", why="Room is made for a 32nd more tokens than are held."),
    Goal("share", "router and packing, share of a routed training step, E = 8", 0.05, why="Gathering, scattering and sorting move memory at every layer, whatever the width of the feed-forward."),
]  # fmt: skip


def table(record: dict) -> pd.DataFrame:
    """Every goal beside what a record measured, its spread, and whether it is met."""
    rows = {}
    for goal in GOALS:
        row = record["rows"].get(goal.key, {})
        measured = row.get("measured")
        rows[goal.key] = {
            "what": goal.what,
            "on": goal.where,
            "measured": "" if measured is None else f"{measured:.3f}",
            "quartiles": "{:.3f} to {:.3f}".format(*row["quartiles"]) if row.get("quartiles") else "",
            "goal": goal.words(),
            "met": (row.get("note") or ("needs a GPU" if goal.where == "GPU" else "not measured")) if measured is None else goal.verdict(measured),
            "E": f"{row['E']:.2f}" if row.get("E") is not None else "",
            "dtype": row.get("dtype", ""),
        }
    return pd.DataFrame(rows).T.rename_axis("row")


def misses(record: dict) -> list[str]:
    """For each reason why rows miss their goals, a line: which rows, by how much, and the reason."""
    missed: dict[str, list[str]] = {}
    for goal in GOALS:
        row = record["rows"].get(goal.key, {})
        if row.get("measured") is not None and not goal.met(row["measured"]):
            note = f" ({row['note']})" if row.get("note") else ""
            missed.setdefault(goal.why, []).append(f"{goal.what}: {row['measured']:.3f}, goal {goal.words()}, missed {goal.verdict(row['measured'])[4:]}{note}")
    return [f"{'; '.join(rows)}. {why}" for why, rows in missed.items()]


def stored(folder: Path | None = None) -> list[dict]:
    """The records of whole benches in a folder, by default those that ship."""
    paths = sorted((folder or morlib.ROOT / "outputs" / "reference").glob("speed_*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if not path.stem.endswith("_quick")]


def about(record: dict) -> str:
    """What a record was measured on."""
    v = record["versions"]
    return (f"{record['gpu'] or record['cpu']}, {record['threads']} of {record['cores']} cores, {record['dtype']}, torch {v['torch']}, morlib {v['morlib']}, "
            f"{record['date'][:10]}, commit {record['commit'] or 'unknown'}, load before it {record['load']}")  # fmt: skip


def headline(folder: Path | None = None) -> pd.DataFrame | None:
    """Print what stored records were measured on and a sentence for each miss; the tables of all records as one."""
    records = stored(folder)
    if not records:
        print("No stored record of the bench ships with this copy: `make bench` makes one in about ten minutes.")
        return None
    for record in records:
        print("Stored record:", about(record))
        print("\n".join(f"- {miss}" for miss in misses(record)) or "Every row that was measured meets its goal.")
    return pd.concat([table(record).assign(device=record["gpu"] or record["cpu"]) for record in records]).set_index("what")


def machine() -> dict:
    """Device, cores, versions, date, load and commit, for a record."""
    model = next((line.split(":")[1].strip() for line in deployment.lines_of("/proc/cpuinfo") if line.startswith("model name")), platform.processor() or platform.machine())
    try:
        asked = subprocess.run(["git", "-C", str(morlib.ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        commit = asked.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return dict(
        device=morlib.pick_device()[2],
        cpu=model,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # more than `threads`: something else was running
        versions=dict(python=platform.python_version(), torch=torch.__version__, morlib=f"{morlib.__version__}+{morlib._sha256(Path(morlib.__file__).read_bytes())[:8]}"),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=commit,
    )


# ---- What is measured ----


class EncoderStack(nn.Module):
    """The same stack from torch.nn.TransformerEncoder: causal, pre-norm, the sizes of `cfg`; returns logits [B, L, V]."""

    def __init__(self, cfg: morlib.ModelConfig):
        super().__init__()
        layer = nn.TransformerEncoderLayer(cfg.d_model, cfg.n_heads, cfg.d_ff, cfg.dropout, batch_first=True, norm_first=True)
        self.embed, self.head = nn.Embedding(cfg.vocab_size, cfg.d_model), nn.Linear(cfg.d_model, cfg.vocab_size)
        self.register_buffer("positions", morlib.sinusoids(cfg.max_len, cfg.d_model))
        self.stack = nn.TransformerEncoder(layer, cfg.n_layers, nn.LayerNorm(cfg.d_model), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        L = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(L, device=tokens.device)
        return self.head(self.stack(self.embed(tokens) + self.positions[:L], mask, is_causal=True))


def generation(model: morlib.Transformer, tokens: int, parts: int) -> typing.Callable[[], dict]:
    """Cached generation, greedy, from one token on: a call does the next of `parts` equal parts of the tokens and counts it `parts` times. As `morlib.generate`, less its checks."""
    morlib.keep_memory()
    state: dict = {}

    @torch.inference_mode()
    def call() -> dict:
        model.eval()
        if not state or state["cache"].length + tokens // parts > tokens:
            state.update(cache=morlib.Cache(), fresh=torch.zeros(1, 1, dtype=torch.long))
        began = clock()
        for _ in range(tokens // parts):
            state["fresh"] = model(state["fresh"], state["cache"]).logits[:, -1].argmax(-1, keepdim=True)
        return dict(seconds=(clock() - began) * parts)

    return call


def uncached_generation(model: morlib.Transformer, tokens: int, stride: int) -> typing.Callable[[], dict]:
    """Uncached generation, sampled: a call does every `stride`-th of its passes, each time from another one on, and counts them `stride` times."""
    text, calls = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device), [0]

    @torch.inference_mode()
    def call() -> dict:
        model.eval()
        began = clock()
        for length in range(1 + calls[0] % stride, tokens + 1, stride):
            model(text[:, :length]).logits[:, -1].argmax(-1)
        calls[0] += 1
        return dict(seconds=(clock() - began) * stride)

    return call


def linear_layers(model: morlib.Transformer, rows: int, times: int) -> typing.Callable[[], dict]:
    """The linear layers of all blocks on so many rows, so many times: the part of decoding that goes with the rows."""
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


def matrix_product(size: int = 4096, dtype: torch.dtype = torch.float32, device: str = "cpu") -> typing.Callable[[], dict]:
    """A large matrix product, [size, size] times [size, size]: 2 size^3 operations."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def call() -> dict:
        began = clock()
        a @ b
        return dict(seconds=clock() - began)

    return call


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
    router_steps: int = 12  # training steps of the routers behind the rows "with a trained router", 8 windows each
    max_chars: int | None = None  # of the text
    repeats: int = 7
    gpu_batches: tuple = (8, 32, 128, 512, 1024)
    preset: str = "quick"  # of the two runs whose losses tell whether a narrower dtype harms
    experiment: str = "cpu"  # preset of the row at experiment 1's size


FULL = Sizes(model=SOURCES)
QUICK = Sizes(dict(SOURCES, d_model=32, n_heads=4, d_ff=64), batch=8, length=16, long_batch=2, long_length=32, generated=24, decoded=8, product=128,
              router_steps=2, max_chars=40_000, repeats=2, gpu_batches=(8, 32), preset="smoke", experiment="smoke")  # fmt: skip


class Bench:
    """Models and text of one bench; each method below measures a group of rows and yields their keys with what was measured."""

    def __init__(self, sizes: Sizes = FULL):
        self.sizes, self.corpus = sizes, morlib.load_corpus("tinyshakespeare", max_chars=sizes.max_chars)
        device, dtype, _ = morlib.pick_device()
        self.dtype = dtype if device.type == "cpu" else torch.float32  # CPU rows run on the CPU, whatever else there is
        self.extra: dict = {"seconds": {}}

    def build(self, length: int, device: str = "cpu", **changes) -> morlib.Transformer:
        sizes = dict(self.sizes.model, vocab_size=self.corpus.vocab_size, max_len=length)
        return deployment.build(morlib.ModelConfig(**sizes | changes), device)

    def fixed_and_random(self, length: int, device: str = "cpu") -> dict[str, morlib.Transformer]:
        models = {"fixed": self.build(length, device, routing="none")}
        return models | {E: self.build(length, device, routing="random", target_depth=float(E)) for E in (8, 6)}

    @property
    def routed(self) -> dict[str, morlib.Transformer]:
        """Two models with routers that have trained a little, once for all groups."""
        if not hasattr(self, "_routed"):
            steps = self.sizes.router_steps
            config = morlib.TrainConfig(epochs=1, windows=8 * steps, batch_size=8, evaluations=1, eval_windows=8, heldout_windows=8)
            self._routed = {E: self.build(self.sizes.length, routing="mor", target_depth=float(E)) for E in (8, 6)}
            with mock.patch.object(morlib, "pick_device", lambda: (torch.device("cpu"), torch.float32, "CPU, float32: chosen by the bench")):
                for model in self._routed.values():
                    morlib.train(model, self.corpus, config)
        return self._routed

    def steps(self, models: dict[str, nn.Module], windows: Tensor, dtype: torch.dtype | None = None) -> dict[str, typing.Callable]:
        return {name: deployment.training_step(model, windows, dtype or self.dtype) for name, model in models.items()}

    def windows(self, batch: int, length: int, device: str = "cpu") -> Tensor:
        return self.corpus.draw(batch, length, torch.Generator().manual_seed(0)).to(device)

    def turns(self, name: str, calls: dict[str, typing.Callable], repeats: int | None = None, warm: dict[str, typing.Callable] | None = None) -> pd.DataFrame:
        """Seconds of calls in turn, after a turn that does not count, or after the calls in `warm`: the same on less."""
        for call in (warm or {}).values():
            call()
        seconds = in_turn(calls, repeats or self.sizes.repeats, warmup=0 if warm else 1)
        self.extra["seconds"][name] = {str(k): dict(median=float(seconds[k].median()), E=seconds.attrs["E"][k]) for k in calls}
        return seconds

    def training(self):
        s = self.sizes
        windows = self.windows(s.batch, s.length)
        models = self.fixed_and_random(s.length)
        models |= {f"{E} router": model for E, model in self.routed.items()}
        product = {"product": matrix_product(s.product, self.dtype)}
        seconds = self.turns("training", self.steps(models, windows) | product, warm=self.steps(models, windows[: s.batch // 4]) | product)
        with torch.no_grad():
            work = deployment.training_flops(models["fixed"], models["fixed"](windows[:, :-1]).actions)
        for name in (8, 6, "8 router", "6 router"):
            yield f"train-{str(name).replace(' ', '-')}", ratio(seconds, name, "fixed")
        rates = pd.DataFrame({"step": seconds["fixed"] / work, "product": seconds["product"] / (2 * s.product**3)})
        rates.attrs["E"] = {"product": None}
        note = "step {:.0f} GFLOP/s, product {:.0f} GFLOP/s".format(*(1 / rates.median() / 1e9))
        yield "rate", ratio(rates, "product", "step") | dict(note=note)

    def small(self):
        """Experiment 1's fixed model and a router that has trained a little, at the size of its preset, with the one thread that its runs have."""
        chosen, threads = morlib.settings(dict(preset=self.sizes.experiment)), torch.get_num_threads()
        sizes = chosen.model(vocab_size=self.corpus.vocab_size)
        torch.set_num_threads(1)
        models = {name: deployment.build(replace(sizes, routing=name, target_depth=depth)) for name, depth in (("none", None), ("mor", 2 / 3 * sizes.n_layers))}
        batch = chosen.train().batch_size
        morlib.train(models["mor"], self.corpus, chosen.train(epochs=1, windows=batch * self.sizes.router_steps, evaluations=1, eval_windows=8, heldout_windows=8))
        windows = self.windows(batch, sizes.max_len)
        seconds = self.turns("small", {name: deployment.training_step(model, windows, self.dtype) for name, model in models.items()}, 3 * self.sizes.repeats)
        torch.set_num_threads(threads)
        yield "train-small", ratio(seconds, "mor", "none") | dict(note="one thread")

    def forward(self):
        s = self.sizes
        tokens = self.windows(s.batch, s.length)[:, :-1]
        models = self.fixed_and_random(s.length) | {f"{E} router": model for E, model in self.routed.items()}
        for model in models.values():
            deployment.hold_share(model, 0, s.length)
        seconds = self.turns("forward", {name: deployment.forward_pass(model, tokens) for name, model in models.items()})
        for name in (8, 6, "8 router", "6 router"):
            yield f"forward-{str(name).replace(' ', '-')}", ratio(seconds, name, "fixed") | dict(dtype="float32")

    def long(self):
        s = self.sizes
        windows = self.windows(s.long_batch, s.long_length)
        models = self.fixed_and_random(s.long_length)
        for model in models.values():
            deployment.hold_share(model, 0, s.long_length)
        seconds = self.turns("training, long", self.steps(models, windows), warm=self.steps(models, windows[: s.long_batch // 4 or 1]))
        for E in (8, 6):
            yield f"train-{E}-long", ratio(seconds, E, "fixed")
        seconds = self.turns("forward, long", {name: deployment.forward_pass(model, windows[:, :-1]) for name, model in models.items()})
        for E in (8, 6):
            yield f"forward-{E}-long", ratio(seconds, E, "fixed") | dict(dtype="float32")

    def encoder(self, device: str = "cpu"):
        """Without dropout both do the same: torch's layer drops in two more places. On a CPU with half a batch, to save time."""
        s, dtype = self.sizes, self.dtype if device == "cpu" else morlib.pick_device()[1]
        windows, ours = self.windows(s.batch if device == "cuda" else s.batch // 2, s.length, device), self.build(s.length, device, routing="none", dropout=0.0)
        models = {"ours": ours, "torch": EncoderStack(ours.cfg).to(device)}
        seconds = self.turns(f"encoder, {device}", self.steps(models, windows, dtype), warm=self.steps(models, windows[: len(windows) // 2], dtype))
        yield "encoder" if device == "cpu" else "encoder-gpu", ratio(seconds, "ours", "torch") | dict(dtype=str(dtype)[6:], note=f"batch {len(windows)}")

    def dtypes(self):
        s, model = self.sizes, self.build(self.sizes.length, routing="none")
        other = torch.bfloat16 if self.dtype == torch.float32 else self.dtype
        windows = self.windows(s.batch if other == self.dtype else s.batch // 8, s.length)
        calls = {str(dtype)[6:]: deployment.training_step(model, windows, dtype) for dtype in (torch.float32, other)}
        measured = ratio(self.turns("dtypes", calls), str(other)[6:], "float32")
        if self.dtype == torch.float32:  # then it is only to be told what the choice was between
            tried = f"a step of {len(windows)} windows under autocast to bfloat16 takes {measured['measured']:.2f} of its time here"
            note = f"float32 chosen, as asked where another gains less; {tried}"
            yield "dtype", dict(measured=None, note=note, alternative=measured)
            yield "dtype-loss", dict(measured=None, note="float32 chosen")
            return
        yield "dtype", measured
        settings, losses = morlib.settings(dict(preset=s.preset)), {}
        for dtype in (torch.float32, self.dtype):
            chosen = torch.device("cpu"), dtype, f"CPU, {str(dtype)[6:]}: chosen by the bench"
            with mock.patch.object(morlib, "pick_device", lambda chosen=chosen: chosen):
                model = deployment.build(settings.model(vocab_size=self.corpus.vocab_size, routing="none"), "cpu")
                losses[dtype] = morlib.train(model, self.corpus, settings.train())["history"][-1]["val_loss"]
        note = f"{losses[self.dtype]:.4f} against {losses[torch.float32]:.4f}, preset {s.preset}, one seed"
        yield "dtype-loss", dict(measured=losses[self.dtype] - losses[torch.float32], note=note)

    def generation(self):
        s, parts = self.sizes, 2 * self.sizes.repeats
        model = self.build(s.generated + 1, routing="none")
        calls = {"cached": generation(model, s.generated, parts), "uncached": uncached_generation(model, s.generated, parts)}
        note = f"each of {parts} turns generates the next {s.generated // parts} tokens with the cache, and does one uncached pass in {parts}"
        yield "generation", ratio(self.turns("generation", calls, parts), "cached", "uncached") | dict(note=note, dtype="float32")

    def decoding(self):
        s = self.sizes
        models = {name: model for name, model in self.fixed_and_random(2 * s.decoded).items() if name != 8}
        for batch, tokens in ((1, s.decoded), (32, s.decoded // 2)):
            for model in models.values():
                deployment.hold_share(model, 0, s.decoded)
                deployment.hold_share(model, s.decoded, tokens)
            prompt = self.windows(batch, s.decoded)[:, :-1]
            calls = {name: deployment.decoding(model, prompt, tokens) for name, model in models.items()}
            measured = ratio(self.turns(f"decoding, batch {batch}", calls), 6, "fixed") | dict(dtype="float32")
            if batch > 1:  # how far skipping can go if all else were free
                parts = self.turns("linear layers alone", {rows: linear_layers(models["fixed"], rows, tokens) for rows in (batch, batch // 2)})
                measured["note"] = f"the linear layers alone, {batch // 2} rows against {batch}: {ratio(parts, batch // 2, batch)['measured']:.2f}"
            yield f"decode-{batch}", measured
        done = {name: call() for name, call in calls.items()}
        size = {name: result["cache"].bytes() for name, result in done.items()}
        E = float(done[6]["held"])
        note = f"{size[6]:,} of {size['fixed']:,} bytes, batch 32, {s.decoded + s.decoded // 2} positions"
        yield "cache", dict(measured=size[6] / size["fixed"] / (E / done["fixed"]["held"].item()), E=E, note=note, dtype="float32")

    def share(self):
        s, model = self.sizes, self.routed[8]
        step = deployment.training_step(model, self.windows(s.batch, s.length), self.dtype)
        parts = deployment.where_time_goes(model, step, s.repeats)
        self.extra["parts"] = parts.median().to_dict()
        share = parts["router"] + parts["packing"]
        note = f"router {parts['router'].median():.3f}, packing {parts['packing'].median():.3f}"
        yield "share", dict(measured=float(share.median()), quartiles=[float(q) for q in share.quantile([0.25, 0.75])], repeats=len(share), E=float(step()["E"]), note=note)

    def gpu(self):
        if morlib.pick_device()[0].type != "cuda":
            return
        s, pays, dtype = self.sizes, None, str(morlib.pick_device()[1])[6:]
        models = self.fixed_and_random(s.length, "cuda")
        for batch in s.gpu_batches:
            windows = self.windows(batch, s.length, "cuda")
            calls = {name: deployment.training_step(models[name], windows) for name in ("fixed", 8)}
            try:
                measured = ratio(self.turns(f"training, GPU, batch {batch}", calls), 8, "fixed") | dict(dtype=dtype, batch=batch)
            except torch.OutOfMemoryError:
                break
            pays = pays or (batch if measured["measured"] < 1 else None)
        yield "train-8-gpu", measured | dict(note=f"batch {measured['batch']}; it breaks even at batch {pays or 'none of those tried'}")
        yield from self.encoder("cuda")


GROUPS = ("training", "small", "forward", "long", "encoder", "dtypes", "generation", "decoding", "share", "gpu")


# ---- The record ----


def record_path(folder: Path, quick: bool = False) -> Path:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()} {torch.get_num_threads()} threads"
    return folder / f"speed_{re.sub(r'[^a-z0-9]+', '-', device.lower())}{'_quick' if quick else ''}.json"


def measure(groups: tuple[str, ...] = GROUPS, sizes: Sizes = FULL, path: Path | None = None) -> dict:
    """Measure groups of rows; the record goes to `path` after each. Rows of other groups stay, if device, threads, versions and sizes are the same; each row says how many turns it took."""
    about = machine() | dict(sizes={k: v for k, v in vars(sizes).items()})
    record = about | dict(dtype="", rows={}, seconds={}, took={})
    if path and path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if _comparable(old) == _comparable(json.loads(json.dumps(about))):
            record = old | {k: about[k] for k in ("date", "load", "commit")}
    bench = Bench(sizes)
    record["dtype"] = str(bench.dtype)[6:]
    for group in groups:
        began = time.perf_counter()
        for key, row in getattr(bench, group)():
            record["rows"][key] = dict(dtype=record["dtype"]) | row | dict(date=machine()["date"])
            print(line(key, record["rows"][key]), flush=True)
        record["seconds"] |= bench.extra["seconds"]
        record |= {k: v for k, v in bench.extra.items() if k != "seconds"}
        record["took"][group] = round(time.perf_counter() - began, 1)
        if path:
            morlib.write_whole(path, json.dumps(record, indent=1).encode())
        gc.collect()
    return record


def _comparable(about: dict) -> list:
    """What two records must have in common to be one."""
    return [about.get(k) for k in ("cpu", "gpu", "threads", "versions")] + [{k: v for k, v in about.get("sizes", {}).items() if k != "repeats"}]


def line(key: str, row: dict) -> str:
    goal = next(goal for goal in GOALS if goal.key == key)
    if row["measured"] is None:
        return f"{goal.what}: {row['note']}"
    return f"{goal.what}: {row['measured']:.3f} (goal {goal.words()}: {goal.verdict(row['measured'])})"


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two turns: shows that it works, measures nothing")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of rows to measure, with commas: " + ", ".join(GROUPS))
    parser.add_argument("--reference", action="store_true", help="write the record to outputs/reference, where records that ship are")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--router-steps", type=int, help=f"training steps of the routers (default {FULL.router_steps})")
    parser.add_argument("--turns", type=int, help=f"turns of each measurement (default {FULL.repeats}, no fewer): the median of more is steadier")
    chosen = parser.parse_args(arguments)
    groups = tuple(chosen.only.split(","))
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    torch.set_num_threads(chosen.threads)
    if chosen.turns is not None and chosen.turns < FULL.repeats:
        parser.error(f"--turns must be {FULL.repeats} or more: a median of fewer says little")
    given = dict(router_steps=chosen.router_steps, repeats=chosen.turns)
    sizes = replace(QUICK if chosen.quick else FULL, **{name: value for name, value in given.items() if value})
    folder = morlib.ROOT / "outputs" / "reference" if chosen.reference and not chosen.quick else morlib.outputs() / "results"
    path, began = record_path(folder, chosen.quick), time.perf_counter()
    record = measure(groups, sizes, path)
    with pd.option_context("display.max_colwidth", None, "display.width", None):
        print("\n" + table(record)[["what", "measured", "quartiles", "goal", "met", "E"]].to_string(index=False))
    for miss in misses(record):
        print(miss)
    print(f"\n{path.name}: {about(record)}; {time.perf_counter() - began:.0f} s")
    if chosen.quick:
        print("Tiny sizes, two turns: this shows that the bench works and measures nothing.")
    return record


if __name__ == "__main__":
    main()
