"""What the systems of this room share: settings of their own, and what they say of their cost."""

from __future__ import annotations

import torch
from torch import Tensor

import morlib
from morlib import ModelConfig, StepInput


class System(morlib.Policy):
    """A system of the field in its authors' form: it decides for each token once a layer, to run or to skip.

    OPTIONS: its own settings and their defaults; `ModelConfig.options` changes them.
    Raises ValueError unless granularity is token.
    """

    version = "1"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.options = self.options_of(cfg)
        if cfg.granularity != "token":
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs granularity token")

    @classmethod
    def options_of(cls, cfg: ModelConfig) -> dict:
        """All settings. Raises ValueError if one is ill-typed."""
        given = cfg.options or {}
        for name, value in given.items():
            morlib.check_value(f"ModelConfig: option {name}", value, type(cls.OPTIONS[name]))
        return cls.OPTIONS | given

    def shows(self, layer: int) -> str:
        """Whose keys a token sees at a layer: of those that "run", of "all", or "first": kept from before."""
        return "run"

    def operations(self, actions: Tensor) -> int:
        """Operations of what decides, in an inference pass with these actions [N, R, B, P]."""
        return 0


class Cycled(System):
    """A system whose `shared_blocks` blocks (by default one) are passed in a cycle."""

    @classmethod
    def layout(cls, cfg: ModelConfig) -> list[int]:
        return [layer % (cfg.shared_blocks or 1) for layer in range(cfg.n_layers)]


def learning(step: StepInput) -> bool:
    """Whether a pass is one of training, in which a system may run what it needs to learn."""
    return step.sampling and torch.is_grad_enabled()


def keep(states: Tensor) -> Tensor:
    """States [T, D] that stay as they are: without a gradient the model changes its own in place."""
    return states if torch.is_grad_enabled() else states.clone()


def top_k(scores: Tensor, k: int, L: int) -> Tensor:
    """Which of the scores [B * L] are among the k highest of their row, bool [B * L]."""
    scores = scores.view(-1, L)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k, 1).indices, True).flatten()
