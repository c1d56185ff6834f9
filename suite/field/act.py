"""Universal Transformer with adaptive computation time.

Dehghani et al. 2019, arXiv:1807.03819, section 2; Graves 2016, arXiv:1603.08983, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import morlib
from morlib import Decision, ModelConfig, Output, StepInput

from .blocks import AllKeys, OfAll
from .common import System


class UniversalBlock(AllKeys):
    """The one block of all steps. It adds to the states a signal of the step (Dehghani et al. 2019)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        signal = morlib.sinusoids(cfg.n_layers, cfg.d_model) * (0.1 if cfg.scaled_init else 1)
        self.register_buffer("signal", signal, persistent=False)  # [N, D]

    def at(self, layer: int, memory: dict):
        def call(x, packing, past=None, mask=None):
            signal = self.signal[layer]
            return self(x + signal, packing, past, mask, dict(states=memory["states"] + signal))

        return call


class Universal(System):
    """What ACT and PonderNet have in common: up to N steps of one block, and who is still at work."""

    block = UniversalBlock

    @classmethod
    def layout(cls, cfg: ModelConfig) -> list[int]:
        return [0] * cfg.n_layers

    def shows(self, layer: int) -> str:
        return "all"

    def begin(self, step: StepInput) -> None:
        """Note the states, and at the first step that all are at work."""
        step.memory["states"] = step.states
        if step.layer == 0:
            step.memory["at_work"] = torch.ones_like(step.index, dtype=torch.bool)  # [T]


class AdaptiveComputation(Universal):
    """A token stops when its halting probabilities add up to 1 - epsilon.

    After step n a token's state s_n gives h_n = sigmoid(w s_n + b): first the step, then the
    halting, as Graves has it. It stops at the first step M at which h_1 + ... + h_M reaches
    1 - epsilon, at step N at the latest. Its weights are p_n = h_n before that step, and there the
    remainder R = 1 - (h_1 + ... + h_(M - 1)), so they add up to 1 (Graves 2016). What is read out
    is the mean state sum_n p_n s_n; s_n itself goes on from step to step, and the last one is what
    others see (Dehghani et al. 2019). The loss is L + tau times the mean of M + R (Graves 2016),
    whose gradient is that of R.

    Differs: b begins at -3, so that at first nearly all steps run; with Graves' 1 nearly every token
    stops after the second step from the start. The code beside Dehghani et al. (tensor2tensor) reads
    h_n from the state before step n, and by default it goes from the mean m to p_n s_n + (1 - p_n) m,
    in which earlier steps weigh less than their p_n; here it is the sum, as Graves has it. A position's
    signal is added at the embedding, that of the step at each step; the paper adds both at each.
    """

    OPTIONS = dict(tau=0.01, epsilon=0.01, bias=-3.0)

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.halt = nn.Linear(cfg.d_model, 1)
        nn.init.constant_(self.halt.bias, self.options["bias"])

    def forward(self, step: StepInput) -> Decision:
        self.begin(step)
        if step.layer == 0:
            step.memory |= dict(
                mass=step.states.new_zeros(len(step.index)), mean=torch.zeros_like(step.states)
            )
            return OfAll()
        self.weigh(step.states, step.memory, last=False)
        return OfAll(step.memory["at_work"].long())

    def weigh(self, states: Tensor, memory: dict, last: bool) -> None:
        """Add the states [T, D] after a step to the mean, and see who stops there."""
        at_work, left = memory["at_work"], 1 - memory["mass"]
        p = self.halt(states)[:, 0].float().sigmoid()
        stops = at_work & ((p >= left - self.options["epsilon"]) | last)
        p = torch.where(stops, left, p) * at_work
        memory["mean"] = memory["mean"] + p[:, None] * states
        memory["mass"] = memory["mass"] + p
        memory["remainder"] = torch.where(stops, left, memory.get("remainder", left))
        memory["at_work"] = at_work & ~stops

    def settle(self, x: Tensor, layer: int, memory: dict) -> Tensor:
        if layer < self.cfg.n_layers - 1:
            return x
        self.weigh(x, memory, last=True)
        return memory["mean"].to(x.dtype)

    def operations(self, actions: Tensor) -> int:
        return actions[:, 0].numel() * 2 * self.cfg.d_model

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        ponder = out.depth.float().mean() + out.memory["remainder"].mean()
        return loss + self.options["tau"] * ponder


morlib.POLICIES["act"] = AdaptiveComputation
