"""Blocks in which a token that runs sees more than the tokens that run beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from morlib import POLICIES, Block, Decision, ModelConfig, Packing, StepCache, Tokens


class OfAll(Decision):
    """A decision after which the layer is called even if nobody runs: its cache gets everybody's keys."""

    def split(self, asked: Tokens, last: bool) -> tuple[Tokens | None, Tokens | None]:
        running, again = super().split(asked, last)
        return running or Tokens(asked.places[:0]), again


class Apart(Block):
    """A block whose queries come from one set of tokens, keys and values from another."""

    def keys(self, states: Tensor, packing: Packing, past: StepCache | None) -> Tensor:
        """Keys and values [B, P, 2, H, D/H] of what the cache holds and of everyone's states [B * L, D]."""
        D, B, L = states.shape[1], packing.B, packing.L
        weight, bias = (part[D:] for part in self.attention.qkv.parameters())
        states = self.norm1(states) if self.pre else states
        kv = F.linear(states, weight, bias).view(B * L, 2, self.attention.n_heads, -1)
        if past is None:
            return kv.view(B, L, *kv.shape[1:])
        past.append(kv, Packing(torch.arange(B * L, device=states.device), B, L))
        return past.kv[0][:, :, :, : past.count[0]].permute(0, 3, 1, 2, 4)

    def look(self, h: Tensor, kv: Tensor, packing: Packing, size: int | None = None) -> Tensor:
        """Normalised states h [T, D] look at keys [B, P, 2, H, D/H] up to their own position.

        size: only at those of their own slice of so many positions.
        """
        T, D = h.shape
        if T == 0:
            return h
        weight, bias = (part[:D] for part in self.attention.qkv.parameters())
        q = packing.pad(F.linear(h, weight, bias).view(T, self.attention.n_heads, -1))  # [B, M, H, D/H]
        before = kv.shape[1] - packing.L  # how many the cache held
        position = packing.pad((before + packing.index % packing.L).view(T, 1))  # [B, M, 1]
        place = torch.arange(kv.shape[1], device=h.device)
        seen = place <= position  # [B, M, P]
        if size:
            seen &= place // size == position // size
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [B, H, P, D/H]
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen[:, None])
        return self.attention.proj(packing.unpad(y.transpose(1, 2)).reshape(T, D))


class AllKeys(Apart):
    """A block in which tokens that run see all tokens before them, also those that have stopped.

    Keys and values of a token that has stopped are the layer's own, of the token's last state: it is copied
    up (Elbayad et al. 2020; Dehghani et al. 2019). So of a token that has stopped
    the query, the output projection and the feed-forward are saved. The policy puts the states [B * L, D]
    into the pass' memory, and answers with OfAll.
    """

    def at(self, layer: int, memory: dict) -> Callable:
        return partial(self, memory=memory)

    def forward(self, x: Tensor, packing: Packing, past: StepCache | None = None,
                mask: Tensor | None = None, memory: dict | None = None) -> Tensor:  # fmt: skip
        if packing.full:
            return super().forward(x, packing, past, mask)
        if past is None and not len(x):
            return x
        kv = self.keys(memory["states"], packing, past)
        return self.around(x, lambda h: self.look(h, kv, packing), self.feed_forward)


class FirstKeys(Apart):
    """A block of Mixture-of-Recursions with recursive KV sharing (Bae et al. 2025).

    In the first recursion, which everybody runs, keys and values are computed and cached. Later recursions
    look at these, whoever runs, and compute and cache none.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.cycle, self.inside = cfg.shared_blocks or 1, POLICIES[cfg.routing].inner_layers(cfg)

    def at(self, layer: int, memory: dict) -> Callable:
        if layer not in self.inside:
            return self
        recursion, place = divmod(layer - self.inside.start, self.cycle)
        return partial(self, first=recursion == 0, place=("keys", place), memory=memory)

    def forward(self, x: Tensor, packing: Packing, past: StepCache | None = None,
                mask: Tensor | None = None, first: bool = False, place: tuple = (),
                memory: dict | None = None) -> Tensor:  # fmt: skip
        if memory is None:
            return super().forward(x, packing, past, mask)
        if first:
            memory[place] = self.keys(x, packing, past)
        return self.around(x, lambda h: self.look(h, memory[place], packing), self.feed_forward)
