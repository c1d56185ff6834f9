"""Mixture-of-Recursions in its authors' own form.

Bae et al. 2025, arXiv:2507.10524, sections 2.1 and 2.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib
from morlib import Decision, ModelConfig, Output, StepInput

from .blocks import FirstKeys
from .common import System, keep, learning, top_k


class Recursive(System):
    """ "Middle-Cycle" sharing: a first and a last block of their own, and `shared_blocks` (by
    default one) between them that are passed through again and again. Each pass is one recursion.
    Without `ends` all layers are recursions, which they call "Cycle". There are as many as `n_layers` and
    `shared_blocks` give; the paper has two to four.

    A token that has stopped shows no keys to a later recursion (recursion-wise caching). With
    `block = FirstKeys` it shows those of the first (recursive sharing).
    Raises ValueError unless the layers make two recursions or more.
    """

    OPTIONS = dict(ends=True)

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.cycle, self.inside = cfg.shared_blocks or 1, self.inner_layers(cfg)
        self.recursions, rest = divmod(len(self.inside), self.cycle)
        if rest or self.recursions < 2:
            more = "2 more than " if self.options["ends"] else ""
            wanted = f"n_layers of {more}a multiple of shared_blocks ({self.cycle}), at least twice it"
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs {wanted}, not {cfg.n_layers}")

    @classmethod
    def inner_layers(cls, cfg: ModelConfig) -> range:
        """The layers that are passes of the shared blocks."""
        return range(1, cfg.n_layers - 1) if cls.options_of(cfg)["ends"] else range(cfg.n_layers)

    @classmethod
    def layout(cls, cfg: ModelConfig) -> list[int]:
        inside, cycle = cls.inner_layers(cfg), cfg.shared_blocks or 1
        shared = [inside.start + layer % cycle for layer in range(len(inside))]
        return [0, *shared, cycle + 1] if inside.start else shared

    def forward(self, step: StepInput) -> Decision:
        if step.layer not in self.inside:
            return Decision()
        recursion, place = divmod(step.layer - self.inside.start, self.cycle)
        if place == 0:
            self.choose(step, recursion)
        return Decision(step.memory["run"].long())

    def shows(self, layer: int) -> str:
        later = layer in self.inside[self.cycle :]
        return "first" if later and self.block is FirstKeys else "run"

    def operations(self, actions: Tensor) -> int:
        return self.recursions * actions[0, 0].numel() * 2 * self.cfg.d_model

    def choose(self, step: StepInput, recursion: int) -> None:
        """Write into the memory who runs this recursion, bool [T]."""
        raise NotImplementedError


class ExpertChoice(Recursive):
    """Before each recursion a router scores the tokens, and the best of those that ran the last one go on.

    Of Nr recursions, recursion r runs (Nr - r + 1) / Nr of a row's tokens (of three: all, 2/3, 1/3), chosen
    among those of the recursion before (hierarchical filtering). The state becomes H + g f(H), where f is a
    whole pass with its residual connections, as in their code, and g = alpha sigmoid(w H).
    Top-k looks at the whole row, which decoding can't. So an auxiliary loss (`weight` times a cross-entropy)
    teaches the very router to be above 1/2 for those that are chosen, and inference runs these.
    `sampling=True` decides by top-k there too.

    Differs: an option of their code lets the shares fall from all tokens as training begins; it is left out.
    """

    OPTIONS = Recursive.OPTIONS | dict(alpha=0.1, weight=0.001)

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.routers = nn.ModuleList(nn.Linear(cfg.d_model, 1, bias=False) for _ in range(self.recursions))

    def choose(self, step: StepInput, recursion: int) -> None:
        logits = self.routers[recursion](step.states)[:, 0].float()
        before = step.memory.get("run", torch.ones_like(logits, dtype=torch.bool))
        run = before
        if recursion and step.sampling:
            k = max(int(step.L * (self.recursions - recursion) / self.recursions), 1)
            run = top_k(logits.masked_fill(~before, -torch.inf), k, step.L)
        elif recursion:
            run = before & (logits > 0)
        if learning(step):
            step.memory.setdefault("choices", []).append((logits[before], run[before].float()))
        gate = self.options["alpha"] * logits.sigmoid()
        step.memory |= dict(run=run, gate=gate[:, None], start=keep(step.states))

    def settle(self, x: Tensor, layer: int, memory: dict) -> Tensor:
        if layer not in self.inside or (layer - self.inside.start + 1) % self.cycle:
            return x
        return torch.where(memory["run"][:, None], memory["start"] + memory["gate"].to(x.dtype) * x, x)

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        choices = out.memory.get("choices", ())
        auxiliary = sum(F.binary_cross_entropy_with_logits(logits, run) for logits, run in choices)
        return loss + self.options["weight"] * auxiliary


class TokenChoice(Recursive):
    """Before the first recursion a router gives each token its number of recursions, once and for all.

    The likeliest of g = alpha softmax(W H) is taken: i recursions, and then the state is H + g_i f(...f(H)),
    with the state H before the first. So everybody runs one at least. `weight` times the
    balance loss Nr sum_i f_i P_i (Fedus et al. 2022) keeps the numbers in use: f_i is the share
    of tokens that take i, P_i its mean probability.

    Differs: g scales what the last recursion gives, as in their code; the paper's formula scales at
    each recursion. The z-loss of their runs of token choice (1e-5 times it) is left out.
    """

    OPTIONS = Recursive.OPTIONS | dict(alpha=1.0, weight=0.1)

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.router = nn.Linear(cfg.d_model, self.recursions, bias=False)

    def choose(self, step: StepInput, recursion: int) -> None:
        if recursion == 0:
            p = self.router(step.states).float().softmax(-1)  # [T, Nr]
            gate, number = p.max(-1, keepdim=True)
            step.memory |= dict(p=p, number=number[:, 0], start=keep(step.states))
            step.memory["gate"] = self.options["alpha"] * gate
        step.memory["run"] = step.memory["number"] >= recursion

    def settle(self, x: Tensor, layer: int, memory: dict) -> Tensor:
        last = layer == self.inside[-1]
        return memory["start"] + memory["gate"].to(x.dtype) * x if last else x

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        return loss + self.options["weight"] * balance(out.memory["p"], out.memory["number"][:, None])


def balance(p: Tensor, chosen: Tensor) -> Tensor:
    """n sum_i f_i P_i for probabilities p [T, n] and the choices [T, k]: 1 if all are used evenly."""
    n = p.shape[1]
    f = torch.bincount(chosen.flatten(), minlength=n) / chosen.numel()
    return n * (f * p.mean(0)).sum()


class SharingExpertChoice(ExpertChoice):
    """Expert choice with recursive KV sharing."""

    block = FirstKeys


class SharingTokenChoice(TokenChoice):
    """Token choice with recursive KV sharing."""

    block = FirstKeys


morlib.POLICIES |= {"mor-expert": ExpertChoice, "mor-token": TokenChoice}
morlib.POLICIES |= {"mor-expert-sharing": SharingExpertChoice, "mor-token-sharing": SharingTokenChoice}
