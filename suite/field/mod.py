"""Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib
from morlib import Decision, ModelConfig, Output, StepInput, Transformer

from .common import System, top_k

LINES = 32  # that are read at a time


class MixtureOfDepths(System):
    """Every other layer runs the `capacity` of a row's tokens that score highest; the others skip it.

    x + r f(x) for those that run: the raw score r = w x scales the layer's change, so the loss
    reaches w (section 3.4). Top-k looks at the whole row, which decoding can't. So a second
    network, which reads the same states without a gradient to them, learns to say who is among the
    top k, and decides in inference (section 3.5); `agreement` says how often it is right.
    `sampling=True` decides by top-k there too: what the predictor costs in loss. Keys and values
    are of those that run.

    Differs: the score's network has a bias, as torch's own; the paper writes none.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        D, hidden, routed = cfg.d_model, max(cfg.d_model // 2, 1), range(1, cfg.n_layers, 2)
        self.routers = nn.ModuleDict({str(layer): nn.Linear(D, 1) for layer in routed})
        networks = {
            str(i): nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for i in routed
        }
        self.predictors = nn.ModuleDict(networks)

    def forward(self, step: StepInput) -> Decision:
        if str(step.layer) not in self.routers:
            return Decision()
        score = self.routers[str(step.layer)](step.states)[:, 0]  # [T]
        guess = self.predictors[str(step.layer)](step.states.detach())[:, 0].float()
        run = guess > 0
        if step.sampling:
            run = top_k(score, max(round(self.cfg.capacity * step.L), 1), step.L)
            step.memory.setdefault("guesses", []).append((guess, run))
        return Decision(run.long(), weights=torch.stack([score, score]))

    def operations(self, actions: Tensor) -> int:
        D, hidden = self.cfg.d_model, max(self.cfg.d_model // 2, 1)
        return len(self.routers) * actions[0, 0].numel() * 2 * (D + D * hidden + hidden)

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        """The loss, and the cross-entropy of each predictor, which reaches nothing else."""
        guesses = out.memory.get("guesses", ())
        return loss + sum(F.binary_cross_entropy_with_logits(g, run.float()) for g, run in guesses)

    @torch.no_grad()
    def agreement(self, model: Transformer, tokens: Tensor) -> float:
        """The share of tokens [n, L] and routed layers in which the predictor says what top-k does.

        From 0 to 1; one that lets nobody run has 1 - `capacity`. NaN where no layer is routed.
        """
        agreed = []
        for lines in tokens.split(LINES):
            guesses = model(lines, sampling=True).memory.get("guesses", ())
            agreed += [(guess > 0) == run for guess, run in guesses]
        return float(torch.cat(agreed).float().mean()) if agreed else float("nan")


morlib.POLICIES["mod"] = MixtureOfDepths
