"""Sliced Recursive Transformer: a shared block, attention in slices.

Shen et al. 2022, arXiv:2111.05297: its non-linear projection layers (NLL) and sliced group self-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import morlib
from morlib import ModelConfig, Packing, StepCache

from .blocks import Apart
from .common import Cycled


class SlicedBlock(Apart):
    """A block that is passed again and again: in turn with attention inside slices, and across all of a row.

    Before each pass but the first a small network of that pass' own changes the states, so that passes do
    not learn the same: x + W2 gelu(W1 norm(x)).
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.cycle = cfg.shared_blocks or 1
        groups = morlib.POLICIES[cfg.routing].options_of(cfg)["groups"]
        self.size = -(-cfg.max_len // groups)  # tokens of a slice
        D, passes = cfg.d_model, -(-cfg.n_layers // self.cycle)
        self.between = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
            for _ in range(passes - 1)
        )

    def at(self, layer: int, memory: dict) -> Callable:
        return partial(self, number=layer // self.cycle)

    def forward(self, x: Tensor, packing: Packing, past: StepCache | None = None,
                mask: Tensor | None = None, number: int = 0) -> Tensor:  # fmt: skip
        if number:
            x = x + self.between[number - 1](x)
        kv = self.keys(x, packing, past)
        size = self.size if number % 2 == 0 else None
        return self.around(x, lambda h: self.look(h, kv, packing, size), self.feed_forward)


class Sliced(Cycled):
    """Every token runs all layers; `shared_blocks` blocks (by default one) are passed in a cycle.

    groups: into how many slices, at most, a row of `max_len` tokens is cut, in the first pass and every
    second one after it. All but the last are equally long.

    Differs: the paper reads images. Here a token looks back only, slices are runs of neighbours,
    and nothing is permuted between passes, for the pass across the row mixes them. The learnt
    coefficients of residual connections are left out. Slices are only masked, so attention costs as
    much as without them. In the authors' code (SReT.py) a projection follows each pass, the last one
    too; here it stands between passes alone. Several blocks are repeated one by one there (B0 B0 B1 B1),
    and take turns here. Their first stage slices both passes of a block, and their last one none; here one
    is sliced and one whole.
    """

    block = SlicedBlock
    OPTIONS = dict(groups=4)

    @classmethod
    def options_of(cls, cfg: ModelConfig) -> dict:
        """All settings. Raises ValueError if one is ill-typed, or if there are more slices than tokens."""
        options = super().options_of(cfg)
        if not 1 <= options["groups"] <= cfg.max_len:
            most = f"1..{cfg.max_len}"
            raise ValueError(f"ModelConfig: option groups must be in {most}, not {options['groups']}")
        return options

    def operations(self, actions: Tensor) -> int:
        changed = actions[self.cfg.shared_blocks or 1 :] >= morlib.FORWARD
        return int(torch.count_nonzero(changed)) * 2 * 2 * self.cfg.d_model**2


morlib.POLICIES["sliced"] = Sliced
