"""Recursion with a plan written down: one block is run once a hop, as often as a question asks."""

from __future__ import annotations

import torch

import morlib
from morlib import FORWARD, RECURSE, Decision, ModelConfig, StepInput

from ..texts import Hops
from .experiments import Run
from .known_depth import known_depth_runs
from .settings import Settings

# Three layers, of which the middle one recurses
RECURSION = dict(task="hops-8-4", layers=3, width=32, steps=16000, batch=32, lr=4e-3, target=None)


class RunPerHop(morlib.Policy):
    """The middle layer runs at a symbol x as often as the number k before it says, and `extra` times more,
    at most `max_recursions` times.

    The table's tokens run it as often as anyone may, for x looks at tokens that run beside it. All others run
    it once. The layers below and above run once, for all.
    """

    TASK, OPTIONS, version = Hops(8, 4), dict(extra=0), "1"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.extra = (self.OPTIONS | (cfg.options or {}))["extra"]
        kinds = self.TASK.kinds(cfg.max_len)
        for name in ("table", "x"):
            is_one = torch.tensor([kind == name for kind in kinds])
            self.register_buffer(name, is_one, persistent=False)  # [max_len]

    def forward(self, step: StepInput) -> Decision:
        if step.layer != self.cfg.n_layers // 2:
            return Decision()
        position, most = step.position, self.cfg.max_recursions
        k = 1 + step.ids[step.row, (position - 1).clamp(min=0)]  # ids of numbers begin at 0
        runs = torch.where(self.x[position], (k + self.extra).clamp(max=most), 1)
        runs = torch.where(self.table[position], most, runs)  # [T]
        return Decision(torch.where(runs > step.recursion + 1, RECURSE, FORWARD))


morlib.POLICIES["run-per-hop"] = RunPerHop


def recursion_runs(s: Settings) -> list[Run]:
    """One Run per seed of a model that recurses once a hop, on questions of up to K hops."""
    K = RunPerHop.TASK.hops
    models = {"a run a hop": (dict(routing="run-per-hop", max_recursions=K), {})}
    return known_depth_runs(s, models, "recursion", RECURSION)
