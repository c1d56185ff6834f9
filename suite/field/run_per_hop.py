"""Recursion with a plan written down: one block is run once a hop, as often as a question asks."""

from __future__ import annotations

import torch
from torch import Tensor

import morlib
from morlib import ModelConfig, StepInput

from ..runs import Run, Settings, known_depth_runs
from ..texts import Hops
from .blocks import FirstKeys
from .models import first_seeds
from .mor import Recursive

TASK = Hops(8, 3)
# A layer, one block that is run up to K times, and a layer
RECURSION = dict(task=TASK.name, layers=2 + TASK.hops, width=32, steps=8000, batch=32, lr=4e-3, target=None)


class RunPerHop(Recursive):
    """The block in the middle runs at a symbol x as often as the number k before it says, and `extra` times
    more. All other tokens run it once, but the table's run every recursion, since x sees at each recursion
    the keys of what runs it (recursion-wise caching, Bae et al. 2025).

    A model of more layers has the same weights, and can be asked for more hops.
    """

    OPTIONS = Recursive.OPTIONS | dict(extra=0)

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        kinds = TASK.kinds(cfg.max_len)
        for name in ("table", "x"):
            is_one = torch.tensor([kind == name for kind in kinds])
            self.register_buffer(name, is_one, persistent=False)  # [max_len]

    def choose(self, step: StepInput, recursion: int) -> None:
        k = 1 + step.ids[step.row, (step.position - 1).clamp(min=0)]  # ids of numbers begin at 0
        run = self.x[step.position] & (k + self.options["extra"] > recursion)
        if self.block is not FirstKeys:
            run |= self.table[step.position]
        step.memory["run"] = run | (recursion == 0)

    def operations(self, actions: Tensor) -> int:
        return 0


class SharingRunPerHop(RunPerHop):
    """The same with recursive KV sharing: x looks at the keys of the first recursion each time, and the
    table's tokens run the block once."""

    block = FirstKeys


morlib.POLICIES |= {"run-per-hop": RunPerHop, "run-per-hop-sharing": SharingRunPerHop}


def recursion_runs(s: Settings) -> list[Run]:
    """One Run per seed, three at most, and way to keep keys, on questions of up to K hops."""
    models = {name: (dict(routing=name), {}) for name in ("run-per-hop", "run-per-hop-sharing")}
    return first_seeds(known_depth_runs(s, models, "run-per-hop", RECURSION))
