"""How the router learns: what was tried on token worth, one change at a time.

Six leads that lost had code of their own, which is gone; their records stay.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import morlib
from morlib import Decision, ModelConfig, StepInput

from .experiments import Run
from .known_depth import (
    DEEP,
    NARROW,
    ByWindows,
    InWindows,
    PlantedLongHops,
    known_depth_models,
    known_depth_runs,
)
from .settings import Settings

CONSTANTS = {  # of `morlib.WorthRouter`, each lead with what it changes
    "explores a third as much": dict(EXPLORED=(0.05, 0.007)),
    "explores 40 % at first": dict(EXPLORED=(0.4, 0.02)),
    "goes on exploring 15 %": dict(EXPLORED=(0.15, 0.15)),
    "a key's slope of 8": dict(SLOPE=8.0),
    "a key's slope of 1": dict(SLOPE=1.0),
    "what is measured clipped at 3": dict(CLIP=3.0),
    "what is measured clipped at 100": dict(CLIP=100.0),
    "two layers for all": dict(ALWAYS=2),
}
TRAINING = {  # of `morlib.TrainConfig`
    "no warm-up from full depth": dict(depth_warmup=0.0),
    "a warm-up of 5 %": dict(depth_warmup=0.05),
    "a warm-up of 50 %": dict(depth_warmup=0.5),
    "router at a quarter of the rate": dict(router_lr=5e-4),
    "router at four times the rate": dict(router_lr=8e-3),
    "rarely run blocks at a lower rate": dict(share_power=0.5),
    "a constant learning rate": dict(schedule="constant"),
}
MODEL = {  # of `morlib.ModelConfig`
    "two blocks, run again in place of on": dict(shared_blocks=2),
    "one block, run again in place of on": dict(shared_blocks=1),
}
POLICIES = {
    "explores in a quarter of the windows": "worth: in windows",
    "a second decision half-way": "worth-half-way",
}
SEEDS = (10, 11)  # none that a claim is made on


class ExploredPlan(morlib.WorthRouter):
    """The plan written down decides, and all else is as in token worth: the warm-up, and who is explored."""

    version = "plan"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.register_buffer("deep", PlantedLongHops(cfg).deep.bool(), persistent=False)  # [max_len]

    def decide(self, step: StepInput) -> Decision:
        decision = super().decide(step)
        run = self.deep[step.position]
        if decision.weights is not None:  # in training
            stays = torch.rand(len(run), device=run.device) < step.full
            run = run | step.memory["explored"] | stays
        decision.actions = run.long()
        return decision


class WarmPlan(ExploredPlan):
    """The same, and nobody is explored."""

    EXPLORED, version = (0.0, 0.0), "plan-warm"


morlib.POLICIES |= {
    "worth: in windows": InWindows,
    "worth: warm-up by window, in windows": ByWindows,  # under this name its lead was trained
    "worth: plan": ExploredPlan,
    "worth: plan, warm-up": WarmPlan,
}
for _label, _changes in CONSTANTS.items():
    own = dict(_changes, version=repr(_changes), __module__=__name__)
    morlib.POLICIES[f"worth: {_label}"] = type("Lead", (morlib.WorthRouter,), own)


def lead_runs(s: Settings) -> list[Run]:
    """Token worth as it is and with each lead that is kept, in the setting NARROW with half of its steps."""
    model, training = known_depth_models(s, NARROW)["worth"]
    models = {"as it is": (model, training)}
    models |= {label: (model | dict(routing=f"worth: {label}"), training) for label in CONSTANTS}
    models |= {label: (model, training | changes) for label, changes in TRAINING.items()}
    models |= {label: (model | changes, training) for label, changes in MODEL.items()}
    models |= {label: (model | dict(routing=routing), training) for label, routing in POLICIES.items()}
    size = NARROW | dict(steps=NARROW["steps"] // 2)
    tried = known_depth_runs(replace(s, seeds=max(SEEDS) + 1), models, "leads", size)
    return [run for run in tried if run.train.seed in SEEDS]


def deep_lead_runs(s: Settings) -> list[Run]:
    """Token worth in the setting DEEP with one change at a time, and the plan with what token worth adds."""
    model, training = known_depth_models(s, DEEP)["worth"]
    rarely = model | dict(routing="worth: in windows")
    models = {
        "explores in a quarter of the windows": (rarely, training),
        "in a quarter, warm-up of 40 %": (rarely, training | dict(depth_warmup=0.4)),
        "in a quarter, warm-up of 5 %": (rarely, training | dict(depth_warmup=0.05)),
        "in a quarter, warm-up by windows": (
            model | dict(routing="worth: warm-up by window, in windows"),
            training,
        ),
        "the plan, explored": (model | dict(routing="worth: plan"), training),
        "the plan, with the warm-up": (model | dict(routing="worth: plan, warm-up"), training),
    }
    tried = known_depth_runs(replace(s, seeds=max(SEEDS) + 1), models, "known-depth-12-leads", DEEP)
    return [run for run in tried if run.train.seed in SEEDS]
