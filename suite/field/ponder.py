"""PonderNet (Banino et al. 2021, arXiv:2107.05407, section 2)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

import morlib
from morlib import Decision, ModelConfig, Output, StepInput

from .act import Universal
from .blocks import OfAll
from .common import learning
from .exits import exit_losses, log_stopping


class PonderNet(Universal):
    """A token stops after step n with probability lambda_n = sigmoid(w s_n + b).

    p_n = lambda_n (1 - lambda_1) ... (1 - lambda_(n-1)), and the last step takes what is left.
    Training runs all steps and minimises sum_n p_n L_n + beta KL(p || p_G), where L_n is the loss of what
    step n predicts and p_G a geometric distribution of parameter `prior`, cut at N steps. In inference
    a token stops by a throw of dice with lambda_n, and predicts from there. The dice
    are a table of the model's own, by position and spread over rows, so that decoding repeats them.
    Others see the last state of a token that has stopped.

    Differs: the step network is one block of a Universal Transformer for each token, as the paper's is for a
    whole sequence in its experiment on bAbI; N is always `n_layers`, where the paper ends once the p_n add up
    to more than 1 - epsilon; lambda begins near the prior, and depth above its mean, for the last step takes
    what is left.
    """

    OPTIONS = dict(beta=0.01, prior=0.2)

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        prior = self.options["prior"]
        if not 0 < prior < 1 or cfg.n_layers < 2:
            raise ValueError(
                f"ModelConfig: routing {cfg.routing} needs a prior in (0, 1) and two layers or more"
            )
        self.halt = nn.Linear(cfg.d_model, 1)
        nn.init.constant_(self.halt.bias, math.log(prior / (1 - prior)))
        self.register_buffer("dice", torch.rand(cfg.n_layers, cfg.max_len))

    def forward(self, step: StepInput) -> Decision:
        self.begin(step)
        if step.layer == 0:
            return Decision()
        logits = self.halt(step.states)[:, 0]
        if learning(step):
            step.memory.setdefault("exits", []).append(step.readout(step.states))
            step.memory.setdefault("halting", []).append(logits)
            return Decision()
        draw = replace(step, sampling=False).draw(self.dice[step.layer])  # the same in each pass
        step.memory["at_work"] &= draw >= logits.sigmoid()
        return OfAll(step.memory["at_work"].long())

    def operations(self, actions: Tensor) -> int:
        return actions[1:, 0].numel() * 2 * self.cfg.d_model

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        log_p = log_stopping(torch.stack(out.memory["halting"]).float())  # [N, T]
        kl = (log_p.exp() * (log_p - self.log_prior(log_p.device)[:, None])).sum(0)
        expected = (log_p.exp() * exit_losses(out, targets)).sum(0)
        return (expected + self.options["beta"] * kl).mean()

    def log_prior(self, device: torch.device) -> Tensor:
        """log p_G(n) for the steps 1 to N, [N]: geometric, and normalised over these."""
        steps = torch.arange(self.cfg.n_layers, device=device)
        return (steps * math.log(1 - self.options["prior"])).log_softmax(0)


def prior_of_mean(mean: float, N: int) -> float:
    """The `prior`, to three digits, by which a geometric distribution cut at N steps has this mean (steps).

    Raises ValueError if none has: the mean must lie between 1 and (N + 1) / 2.
    """
    if not 1 < mean < (N + 1) / 2:
        most = f"it must be above 1 and below {(N + 1) / 2:g}"
        raise ValueError(f"a geometric distribution cut at {N} steps has no mean of {mean}: {most}")
    steps = torch.arange(N)
    priors = torch.arange(1, 1000) / 1000
    means = 1 + ((1 - priors[:, None]).log() * steps).softmax(1) @ steps.float()  # [999]
    return round(float(priors[(means - mean).abs().argmin()]), 3)


morlib.POLICIES["ponder"] = PonderNet
