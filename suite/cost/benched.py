"""The sizes, models and text of the bench, and how its calls take turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import morlib
from morlib import ModelConfig, TrainConfig, Transformer

from ..runs import keep_memory
from ..texts import load_corpus
from .timing import Timed, Timings, build, in_turn, training_step

SOURCES = dict(n_layers=12, d_model=256, n_heads=8, d_ff=2048, dropout=0.0)  # the sources' sizes
Rows = Iterator[tuple[str, dict]]  # the keys of rows, and what was measured


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
    turns: int = 7  # of calls that take seconds
    short_turns: int = 15  # of calls that take less
    gpu_batches: tuple = (8, 32, 128, 512)
    preset: str = "quick"  # of the two runs whose losses tell whether a narrower dtype harms
    experiment: str = "cpu"  # preset of the rows at experiment 1's size


FULL = Sizes(model=SOURCES)
QUICK = Sizes(model=SOURCES, batch=32, long_batch=4, product=2048, turns=3, short_turns=5)
TINY = Sizes(
    SOURCES | dict(d_model=32, n_heads=4, d_ff=64), batch=8, length=16, long_batch=2, long_length=32,
    generated=24, decoded=8, product=128, router_steps=2, max_chars=40_000, turns=2, short_turns=2,
    gpu_batches=(8, 32), preset="smoke", experiment="smoke",
)  # fmt: skip


class Bench:
    """A bench's models and text, and the turns that its calls take."""

    def __init__(self, sizes: Sizes = FULL):
        keep_memory()
        self.sizes = sizes
        self.corpus = load_corpus("tinyshakespeare", max_chars=sizes.max_chars)
        self.seconds: dict = {}  # of all calls, by the name of their turns
        self.parts: dict = {}  # shares of a training step's time

    def build(self, length: int, device: str = "cpu", **changes) -> Transformer:
        sizes = dict(self.sizes.model, vocab_size=self.corpus.vocab_size, max_len=length)
        return build(ModelConfig(**sizes | changes), device)

    def fixed_and_blind(self, length: int, device: str = "cpu") -> dict:
        """The fixed model, and blind routing at E = 8 and 6."""
        models = {"fixed": self.build(length, device, routing="none")}
        for E in (8, 6):
            models[E] = self.build(length, device, routing="even", target_depth=float(E))
        return models

    def once(self, length: int, E: int, device: str = "cpu") -> Transformer:
        """Blind routing that decides once for all layers."""
        return self.build(length, device, routing="even-once", target_depth=float(E), max_recursions=1)

    @cached_property
    def routed(self) -> dict[int, Transformer]:
        """Two models with routers that have trained a little, for all groups."""
        models = {}
        for E in (8, 6):
            models[E] = self.build(self.sizes.length, routing="mor", target_depth=float(E))
            morlib.train(models[E], self.corpus, self.short_training())
        return models

    def short_training(self) -> TrainConfig:
        windows = 8 * self.sizes.router_steps
        return TrainConfig(epochs=1, windows=windows, batch_size=8, evaluations=1, eval_windows=8)

    def fixed_and_routed(self) -> dict:
        models = self.fixed_and_blind(self.sizes.length)
        return models | {f"{E} router": model for E, model in self.routed.items()}

    def steps(self, models: dict, windows: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Timed]:
        return {name: training_step(model, windows, dtype) for name, model in models.items()}

    def windows(self, batch: int, length: int, device: str = "cpu") -> Tensor:
        return self.corpus.draw(batch, length, torch.Generator().manual_seed(0)).to(device)

    def turns(self, name: str, calls: dict, repeats: int | None = None, warm: dict | None = None) -> Timings:
        """Calls in turn, after a turn that does not count, or after the calls in `warm`: the same on less."""
        for call in (warm or {}).values():
            call()
        timings = in_turn(calls, repeats or self.sizes.turns, warmup=0 if warm else 1)
        self.seconds[name] = {
            str(k): dict(median=float(timings.seconds[k].median()), E=timings.depth[k]) for k in calls
        }
        return timings
