"""Rows of the bench about training steps and forward passes. Each group yields keys and rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

import morlib
from morlib import TrainConfig, Transformer

from ..runs import pick_device, settings
from . import goals
from .benched import Bench, Rows
from .flops import training_flops
from .others import Bfloat16Training, EncoderStack, PlainStack, matrix_product
from .probes import where_time_goes
from .timing import Timed, Timings, build, clock, forward_pass, training_step

ROUTED = (8, 6, "8 router", "6 router")  # names of the models that are compared with "fixed"


def training(bench: Bench) -> Rows:
    """Blind and trained routing, and routing that decides once, against the fixed model."""
    s, models = bench.sizes, bench.fixed_and_routed()
    models |= {f"once {E}": bench.once(s.length, E) for E in (8, 6)}
    windows = bench.windows(s.batch, s.length)
    product = {"product": matrix_product(s.product)}
    warm = bench.steps(models, windows[: s.batch // 4]) | product
    timings = bench.turns("training", bench.steps(models, windows) | product, warm=warm)
    for name in ROUTED:
        yield f"train-{str(name).replace(' ', '-')}", timings.ratio(name, "fixed")
    for E in (8, 6):
        yield f"train-once-{E}", timings.ratio(f"once {E}", "fixed")
    with torch.no_grad():
        work = training_flops(models["fixed"], models["fixed"](windows[:, :-1]).actions)
    seconds = timings.seconds
    a_flop = {"step": seconds["fixed"] / work, "product": seconds["product"] / (2 * s.product**3)}
    a_flop = Timings(pd.DataFrame(a_flop), {})
    note = "step {:.0f} GFLOP/s, product {:.0f} GFLOP/s".format(*(1 / a_flop.seconds.median() / 1e9))
    yield "rate", a_flop.ratio("product", "step") | dict(note=note)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As experiment 1 trains: a run has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def small(bench: Bench) -> Rows:
    """At experiment 1's size: a router, token worth, and blind routing that decides once."""
    chosen, s = settings(dict(preset=bench.sizes.experiment)), bench.sizes
    batch, V = chosen.train().batch_size, bench.corpus.vocab_size
    N = chosen.model(vocab_size=V).n_layers
    changes = {"fixed": dict(routing="none", target_depth=None)}
    changes["train-small"] = dict(routing="mor", target_depth=2 / 3 * N)
    for name, routing in (("once", "even-once"), ("worth", "worth")):
        for E in (8, 6):
            changes[f"{name}-{E}"] = dict(routing=routing, target_depth=E / 12 * N, max_recursions=1)
    models = {name: build(chosen.model(vocab_size=V, **change)) for name, change in changes.items()}
    windows = bench.windows(batch, models["fixed"].cfg.max_len)
    short = dict(epochs=1, windows=batch * s.router_steps, evaluations=1, eval_windows=8)
    with one_thread():
        for name in ("train-small", "worth-8", "worth-6"):
            morlib.train(models[name], bench.corpus, chosen.train(**short))
        for name in ("worth-8", "worth-6"):
            models[name].policy.price.zero_()  # so each timed step sets it by its own batch
        timings = bench.turns("small", bench.steps(models, windows), 2 * s.short_turns)
    for name in list(models)[1:]:
        yield name, timings.ratio(name, "fixed") | dict(note="one thread")


def forward(bench: Bench) -> Rows:
    tokens, models = bench.windows(bench.sizes.batch, bench.sizes.length)[:, :-1], bench.fixed_and_routed()
    calls = {name: forward_pass(model, tokens) for name, model in models.items()}
    timings = bench.turns("forward", calls, bench.sizes.short_turns)
    for name in ROUTED:
        row = timings.ratio(name, "fixed")
        yield f"forward-{str(name).replace(' ', '-')}", row | dict(dtype="float32")


def long(bench: Bench) -> Rows:
    """Long windows: attention is a larger part of the work."""
    s = bench.sizes
    windows, models = bench.windows(s.long_batch, s.long_length), bench.fixed_and_blind(s.long_length)
    warm = bench.steps(models, windows[: s.long_batch // 4 or 1])
    timings = bench.turns("training, long", bench.steps(models, windows), warm=warm)
    for E in (8, 6):
        yield f"train-{E}-long", timings.ratio(E, "fixed")
    calls = {name: forward_pass(model, windows[:, :-1]) for name, model in models.items()}
    timings = bench.turns("forward, long", calls)
    for E in (8, 6):
        yield f"forward-{E}-long", timings.ratio(E, "fixed") | dict(dtype="float32")


def encoder(bench: Bench, device: str = "cpu") -> Rows:
    """Ours of fixed depth against torch's encoder and a plain stack. On a CPU half a batch."""
    on_cpu = device == "cpu"
    dtype = torch.float32 if on_cpu else pick_device()[1]
    windows = bench.windows(bench.sizes.batch // (2 if on_cpu else 1), bench.sizes.length, device)
    ours = bench.build(bench.sizes.length, device, routing="none")
    models = {"ours": ours, "torch": EncoderStack(ours.cfg).to(device)}
    if on_cpu:
        models["plain"] = PlainStack(ours.cfg)
    warm = bench.steps(models, windows[: len(windows) // 2], dtype)
    timings = bench.turns(f"encoder, {device}", bench.steps(models, windows, dtype), warm=warm)
    about_it = dict(dtype=str(dtype)[6:], note=f"batch {len(windows)}")
    yield "encoder" if on_cpu else "encoder-gpu", timings.ratio("ours", "torch") | about_it
    if on_cpu:
        yield "nanogpt", timings.ratio("ours", "plain") | about_it


def units(path: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The processor's units for products of bfloat16, by the names of their flags; empty: none is known."""
    flags = path.read_text(errors="replace").split() if path.is_file() else []
    return [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags]


def bfloat16(bench: Bench) -> Rows:
    """A training step in bfloat16, with weights rounded and under autocast; and what it does to the loss."""
    s, there = bench.sizes, units()
    if not there:
        for key in ("bfloat16", "bfloat16-loss"):
            yield key, dict(measured=None, note="no units for bfloat16 in this processor")
        return
    kinds = {
        "float32": morlib.Training,
        "rounded weights": Bfloat16Training,
        "autocast": lambda *args: morlib.Training(*args, torch.bfloat16),
    }
    windows, tc = bench.windows(s.batch // 2, s.length), TrainConfig(batch_size=s.batch // 2, lr=1e-6)
    calls = {}
    for name, kind in kinds.items():
        calls[name] = update(kind(bench.build(s.length, routing="none"), bench.corpus, tc), windows)
    timings = bench.turns("bfloat16", calls)
    rows = {name: timings.ratio(name, "float32") for name in list(kinds)[1:]}
    best = min(rows, key=lambda name: rows[name]["measured"])
    tried = ", ".join(f"{name} {row['measured']:.2f}" for name, row in rows.items())
    note = f"{tried}; units {', '.join(there)}; batch {len(windows)}"
    yield "bfloat16", rows[best] | dict(note=note, dtype="bfloat16")
    if not next(g for g in goals.GOALS if g.key == "bfloat16").met(rows[best]["measured"]):
        yield "bfloat16-loss", dict(measured=None, note="not fast enough: float32 stays")
        return
    yield "bfloat16-loss", loss_against_float32(bench, best, kinds[best])


def update(training: morlib.Training, windows: torch.Tensor) -> Timed:
    """A step of a training on windows [B, L + 1]."""

    def call() -> dict:
        began = clock(training.device)
        training.update(windows)
        return dict(seconds=clock(training.device) - began, E=training.depth)

    return call


def loss_against_float32(bench: Bench, name: str, kind) -> dict:
    """Validation loss of a short run of another kind of Training, minus that of the same run in float32."""
    chosen, losses = settings(dict(preset=bench.sizes.preset)), []
    for make in (morlib.Training, kind):
        model: Transformer = build(chosen.model(vocab_size=bench.corpus.vocab_size, routing="none"))
        torch.manual_seed(0)
        training = make(model, bench.corpus, chosen.train())
        for batch in morlib.batches(bench.corpus, training.tc, model.cfg.max_len):
            training.update(batch)
        losses.append(morlib.evaluate(model, bench.corpus, "val", training.tc.eval_windows)["loss"])
    note = f"{losses[1]:.4f} ({name}) against {losses[0]:.4f}, preset {bench.sizes.preset}, one seed"
    return dict(measured=losses[1] - losses[0], note=note)


def share(bench: Bench) -> Rows:
    """The parts of a training step with a trained router, and of one where token worth decides once."""
    worth = bench.build(bench.sizes.length, routing="worth", target_depth=8.0, max_recursions=1)
    morlib.train(worth, bench.corpus, bench.short_training())
    worth.policy.price.zero_()  # so each timed step sets it by its own batch
    windows = bench.windows(bench.sizes.batch, bench.sizes.length)
    for key, model in (("share", bench.routed[8]), ("share-once", worth)):
        step = training_step(model, windows)
        parts = where_time_goes(model, step, bench.sizes.turns)
        if key == "share":
            bench.parts = parts.median().to_dict()
        both = parts["router"] + parts["packing"]
        note = "router {:.3f}, packing {:.3f}".format(*parts[["router", "packing"]].median())
        quartiles = [float(q) for q in both.quantile([0.25, 0.75])]
        row = dict(measured=float(both.median()), quartiles=quartiles, repeats=len(both))
        yield key, row | dict(E=float(step()["E"]), note=note)


def gpu(bench: Bench) -> Rows:
    """Growing batches on a card, up to the largest that fits."""
    device, dtype, _ = pick_device()
    if device.type != "cuda":
        return
    models, pays, row = bench.fixed_and_blind(bench.sizes.length, str(device)), None, None
    models = {name: models[name] for name in ("fixed", 8)}
    for batch in bench.sizes.gpu_batches:
        windows = bench.windows(batch, bench.sizes.length, str(device))
        try:
            timings = bench.turns(f"training, GPU, batch {batch}", bench.steps(models, windows, dtype))
        except torch.OutOfMemoryError:
            break
        row = timings.ratio(8, "fixed") | dict(dtype=str(dtype)[6:], batch=batch)
        pays = pays or (batch if row["measured"] < 1 else None)
    if row:
        note = f"batch {row['batch']}; it breaks even at batch {pays or 'none of those tried'}"
        yield "train-8-gpu", row | dict(note=note)
    yield from encoder(bench, str(device))
