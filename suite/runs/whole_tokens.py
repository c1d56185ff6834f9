"""Policies that decide once for all further layers of a token: controls of one that learns, and its kin."""

from __future__ import annotations

import torch

import morlib
from morlib import Decision, ModelConfig, StepInput


class WholeTokens(morlib.Policy):
    """A token runs the first layers, as many as the option `always` says, then all of the others or none.

    The target depth says how many tokens run all. Raises ValueError unless it leaves a choice.
    """

    OPTIONS = dict(always=morlib.WorthRouter.ALWAYS)
    version = "1"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        N, E, always = cfg.n_layers, cfg.target_depth, (self.OPTIONS | (cfg.options or {}))["always"]
        morlib.check_value("ModelConfig: option always", always, morlib.Count)
        if E is None or not always < E < N:
            wanted = f"a target_depth above {always} and below n_layers ({N})"
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs {wanted}, not {E}")
        self.always, self.share = always, (E - always) / (N - always)

    def shares(self) -> list[float]:
        return [1.0] * self.always + [self.share] * (self.cfg.n_layers - self.always)

    def forward(self, step: StepInput) -> Decision:
        if step.layer < self.always:
            return Decision()
        return Decision(self.chosen(step).long(), lasts=True)

    def chosen(self, step: StepInput) -> torch.Tensor:
        """Who runs all layers, bool [T]."""
        raise NotImplementedError


def warmed_up(chosen: torch.Tensor, step: StepInput) -> torch.Tensor:
    """Those who are chosen [T], and of the others as many as the warm-up from full depth still runs."""
    return chosen | (torch.rand(len(chosen), device=chosen.device) < step.full) if step.full else chosen


class BlindTokens(WholeTokens):
    """The control of a router that decides once: as many tokens run all layers, drawn blindly.

    Training draws anew, with the share exact in each batch; in inference see `StepInput.draw`. (Blind draws
    for each layer apart, which "random" makes, are a weaker control: hardly any token runs all layers then.)
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.register_buffer("table", torch.rand(cfg.max_len))

    def chosen(self, step: StepInput) -> torch.Tensor:
        if step.sampling:
            draw = (torch.randperm(len(step.index), device=step.index.device) + 0.5) / len(step.index)
        else:
            draw = step.draw(self.table)
        return draw < self.share + (1 - self.share) * step.full


class ByKind(WholeTokens):
    """The control of learning whom to run: as many tokens run all layers, and lots decide once which *kinds*.

    A kind is the token that was read. So it always gets the same depth, as it gets the same expert in Hash
    Layers (Roller et al. 2021, arXiv:2106.04426, section 3), and nothing asks what depth is worth to it.
    How frequent kinds are, the first batch of a training says. In the order of the lots, each that still
    finds room in the share is taken; from then on the choice stands. The first lots hold for kinds that are
    not in that batch.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        lots = torch.randperm(cfg.vocab_size)
        self.register_buffer("lots", lots)  # kinds, in the order in which they are taken
        self.register_buffer("deep", lots.argsort() < self.share * cfg.vocab_size)  # [V]
        self.register_buffer("settled", torch.tensor(False))

    def chosen(self, step: StepInput) -> torch.Tensor:
        kinds = step.ids[step.row, step.position]
        if step.calibrate and not self.settled:
            self.settle_kinds(kinds)
        return warmed_up(self.deep.index_select(0, kinds), step)

    def settle_kinds(self, kinds: torch.Tensor) -> None:
        """Choose the kinds that run all layers by how frequent they are among these [T]."""
        counts = torch.bincount(kinds, minlength=self.cfg.vocab_size).tolist()
        room = self.share * len(kinds)
        for kind in self.lots.tolist():
            if counts[kind]:
                self.deep[kind] = counts[kind] <= room
                room -= counts[kind] * int(self.deep[kind])
        self.settled.fill_(True)


class ByPosition(WholeTokens):
    """The control of ByKind: lots decide once which positions run all layers, whatever token stands there."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.register_buffer("deep", torch.randperm(cfg.max_len) < self.share * cfg.max_len)

    def chosen(self, step: StepInput) -> torch.Tensor:
        return warmed_up(self.deep.index_select(0, step.position), step)


class FiveThenWorth(morlib.WorthRouter):
    """Token worth, but five layers run every token, much as in MoR's budget of six layers in twelve."""

    ALWAYS = 5


class SixThenWorth(morlib.WorthRouter):
    """Token worth, but six layers run every token."""

    ALWAYS = 6


class FiveThenBlind(BlindTokens):
    """The control of FiveThenWorth."""

    OPTIONS = dict(always=5)


morlib.POLICIES |= {
    "blind-tokens": BlindTokens,
    "by-kind": ByKind,
    "by-position": ByPosition,
    "worth-above-5": FiveThenWorth,
    "worth-above-6": SixThenWorth,
    "blind-tokens-above-5": FiveThenBlind,
}
