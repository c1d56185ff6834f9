"""The yardstick on text: a third of the tokens runs all layers, and it is told which."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor

import morlib
from morlib import Decision, ModelConfig, StepInput

from ..files import sha256
from ..runs import ByKind, Run, Settings, WholeTokens, long_runs
from ..runs.whole_tokens import CONTEXTS, warmed_up
from ..texts import context_numbers
from .blocks import AllKeys, OfAll

READ = 3  # tokens that make a context


def digest() -> str:
    """Of the contexts that ship: models that were told others are other runs."""
    return sha256(CONTEXTS.read_bytes())[:8] if CONTEXTS.is_file() else ""


class Told(WholeTokens):
    """A third of the tokens runs all layers: those whose last three characters promised most.

    Which contexts these are is written down, from what twelve layers gain over six in the training text of
    Tiny Shakespeare (`routing.deep_contexts`). So it is no router that could be had for nothing. It shows
    what one could win. Raises ValueError for another vocabulary, or where the file is missing.
    """

    version = digest()

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        found = json.loads(CONTEXTS.read_text(encoding="utf-8")) if CONTEXTS.is_file() else {}
        if found.get("vocabulary") != cfg.vocab_size:
            wanted = (
                f"a text of the vocabulary of {CONTEXTS.name} ({found.get('vocabulary', 'no such file')})"
            )
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs {wanted}, not {cfg.vocab_size}")
        deep = torch.zeros((cfg.vocab_size + 1) ** READ, dtype=torch.bool)
        deep[found["contexts"]] = True
        self.register_buffer("deep", deep, persistent=False)

    def chosen(self, step: StepInput) -> Tensor:
        numbers = context_numbers(step.ids, READ, self.cfg.vocab_size)
        return warmed_up(self.deep[numbers[step.row, step.position]], step)


class SeesAll:
    """For a WholeTokens: tokens that run a layer see the keys of all tokens before them, as in AllKeys.

    Keys and values of a token that does not run it cost a sixth of what running it costs, with a feed-forward
    four times as wide as the states.
    """

    block = AllKeys

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        if cfg.granularity != "token":
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs granularity token")

    def forward(self, step: StepInput) -> Decision:
        if step.layer < self.always:
            return Decision()
        if "run" not in step.memory:
            step.memory["run"] = self.chosen(step).long()
        step.memory["states"] = step.states
        return OfAll(step.memory["run"])

    def shows(self, layer: int) -> str:
        return "run" if layer < self.always else "all"


class ToldSeesAll(SeesAll, Told):
    """Told, and all keys are seen."""


class ByKindSeesAll(SeesAll, ByKind):
    """Kinds drawn by lot, and all keys are seen."""


def told_runs(s: Settings) -> list[Run]:
    """With the setting and the seeds of experiment 1 trained long at width 32, where `by-kind` is already:
    what knowing where depth pays is worth, and what seeing all keys is worth to it."""
    made = []
    for spec in long_runs(s, "exp1-thin"):
        if spec.model == "by-kind":
            for label in ("told", "told-sees-all", "by-kind-sees-all"):
                made.append(replace(spec, model=label, config=replace(spec.config, routing=label)))
    return made


morlib.POLICIES |= {"told": Told, "told-sees-all": ToldSeesAll, "by-kind-sees-all": ByKindSeesAll}
