"""Early exits: the Depth-Adaptive Transformer, and CALM's confidence as its control.

Elbayad et al. 2020, arXiv:1910.10073, sections 2 and 3; Schuster et al. 2022, arXiv:2207.07061,
section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib
from morlib import Decision, ModelConfig, Output, StepInput

from .blocks import AllKeys, OfAll
from .common import System, learning


class Exits(System):
    """Every depth can be read out. A token leaves after the first block at which it scores above a threshold.

    Training runs everybody through all blocks and reads at each (aligned training, Elbayad et al. 2020); one
    head serves all exits, as in CALM. In inference the state of a token that has left is copied up, and
    others see its keys at every later layer. With a target depth, `calibrate` sets the threshold, so that
    the depth is met. Elbayad et al. leave it at 1/2, and CALM's keeps the text near that of all layers.
    Raises ValueError for a target depth below 1 or above the number of layers.
    """

    block = AllKeys

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.holds_budget = cfg.target_depth is not None
        if cfg.n_layers < 2:
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs two layers or more")
        self.outputs = 1  # of what scores a state
        if self.holds_budget and not 1 <= cfg.target_depth <= cfg.n_layers:
            wanted = f"a target_depth in 1..{cfg.n_layers}, or None"
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs {wanted}, not {cfg.target_depth}")
        self.register_buffer("threshold", torch.tensor(float(self.options["threshold"])))

    def scores(self, states: Tensor, step: StepInput) -> Tensor:
        """How surely tokens of these states [T, D] may leave after `step.layer` blocks, [T]."""
        raise NotImplementedError

    def forward(self, step: StepInput) -> Decision:
        memory = step.memory
        memory["states"] = step.states
        if step.layer == 0:
            memory["stays"] = torch.ones_like(step.index, dtype=torch.bool)
            return Decision()
        if learning(step):
            memory.setdefault("exits", []).append(step.readout(step.states))
            memory.setdefault("seen", []).append(step.states)
            return Decision()
        if step.calibrate and self.holds_budget:
            return self.look_on(step)
        there = memory["stays"].nonzero().flatten()
        scores = self.scores(step.states.index_select(0, there), step)
        memory["stays"][there[scores > self.threshold]] = False
        return OfAll(memory["stays"].long())

    def shows(self, layer: int) -> str:
        return "all"

    def operations(self, actions: Tensor) -> int:
        came_so_far = int((actions[:-1, 0] >= morlib.FORWARD).sum())
        return came_so_far * 2 * self.cfg.d_model * self.outputs

    def look_on(self, step: StepInput) -> Decision:
        """All run, while their highest scores so far are noted; in inference the last layer sets the
        threshold by these.

        So keys are of states that ran on, where in use some are copied: the target is met nearly.
        """
        scores, highest = self.scores(step.states, step), step.memory.setdefault("highest", [])
        highest.append(torch.maximum(scores, highest[-1]) if highest else scores)
        if step.layer == self.cfg.n_layers - 1 and not step.sampling:
            further = (self.cfg.target_depth - 1) / (self.cfg.n_layers - 1)  # share beyond the first block
            every = torch.cat(highest)
            self.threshold.copy_(morlib.apart(morlib.quantile(every, 1 - further), every, step))
        return Decision()


class DepthAdaptive(Exits):
    """A halting network a depth, taught by an oracle that sees the loss at each exit.

    It is "geometric-like", and each token has its own depth (Elbayad et al. 2020, section 3.2).

    chi_n = sigmoid(w_n s_n + b_n) is the probability to leave after block n if a token came so far: q(n) =
    chi_n (1 - chi_1) ... (1 - chi_(n-1)). The oracle is the exit of the highest log-likelihood
    less `cost` (nats) a block, and -log q of it is added to the mean loss of the exits, `weight`
    times. A token leaves where chi exceeds 1/2, or the threshold of a target depth.

    Differs: the oracle looks at one token, where the paper also smooths over its neighbours; halting reads
    states without a gradient to them, so that it does not change what the exits learn.
    """

    OPTIONS = dict(cost=0.05, weight=1.0, threshold=0.5)

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.halt = nn.ModuleList(nn.Linear(cfg.d_model, 1) for _ in range(cfg.n_layers - 1))

    def scores(self, states: Tensor, step: StepInput) -> Tensor:
        return self.halt[step.layer - 1](states)[:, 0].sigmoid()

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        losses = exit_losses(out, targets)  # [N, T]
        logits = [halt(states.detach())[:, 0] for halt, states in zip(self.halt, out.memory["seen"])]
        N = torch.arange(len(losses), device=losses.device)
        oracle = (losses.detach() + self.options["cost"] * N[:, None]).argmin(0)  # [T]
        nll = -log_stopping(torch.stack(logits).float()).gather(0, oracle[None])
        return losses.mean() + self.options["weight"] * nll.mean()


class ConfidenceExit(Exits):
    """Control: a token leaves when the head is sure of its prediction (CALM, Schuster et al. 2022).

    Sure is the likeliest token's probability less that of the second (softmax response). The loss
    is the mean over the exits, exit n with weight n. Reading out costs a pass of the head
    for each token that is still there, at each layer.

    Differs: one threshold for all positions, without the decay over a text. Scores are logarithms, since
    on a task with much that nobody can predict most lie near 0, too near for a threshold between them.
    Raises ValueError with a vocabulary of one token, which has no second.
    """

    OPTIONS = dict(threshold=0.9)
    LEAST = 1e-9  # a lead that is less counts as this
    version = "2"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        if cfg.vocab_size < 2:
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs a vocab_size of 2 or more, not 1")
        self.outputs = cfg.vocab_size
        self.threshold.clamp_min_(self.LEAST).log_()

    def scores(self, states: Tensor, step: StepInput) -> Tensor:
        best = step.readout(states).float().softmax(-1).topk(2).values
        return (best[:, 0] - best[:, 1]).clamp_min(self.LEAST).log()

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        losses = exit_losses(out, targets)
        weight = torch.arange(1, len(losses) + 1, device=losses.device)
        return (losses.mean(1) * weight).sum() / weight.sum()


def exit_losses(out: Output, targets: Tensor) -> Tensor:
    """The loss of each token at each exit (nats), [N, T]."""
    logits = [*out.memory["exits"], out.logits.flatten(0, 1)]
    targets = targets.flatten()
    return torch.stack([F.cross_entropy(at.float(), targets, reduction="none") for at in logits])


def log_stopping(logits: Tensor) -> Tensor:
    """From logits [N - 1, T] to stop after a step, the log-probability [N, T] that each step is the last."""
    stop, go = F.logsigmoid(logits), F.logsigmoid(-logits).cumsum(0)
    return torch.cat([stop, torch.zeros_like(stop[:1])]) + torch.cat([torch.zeros_like(go[:1]), go])


morlib.POLICIES |= {"exit": DepthAdaptive, "exit-confidence": ConfidenceExit}
