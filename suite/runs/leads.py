"""How the router learns: what was tried on token worth, one change at a time."""

from __future__ import annotations

from bisect import bisect
from collections import deque
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import morlib
from morlib import Decision, ModelConfig, Output, StepInput

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
    "a warm-up that those worth least leave first": "worth: least first",
    "a Huber loss, clipped at 100": "worth: huber",
    "a median of means, clipped at 100": "worth: median of means",
    "the router learns from its last four batches": "worth: four batches",
    "what a token's own loss falls by is added": "worth: own loss",
    "a second decision half-way": "worth-half-way",
    "a depth between, each step up with a worth of its own": "worth: steps up",
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


class LeastFirst(morlib.WorthRouter):
    """In the warm-up those that are worth least leave full depth first, in place of any by chance."""

    version = "least-first"

    def decide(self, step: StepInput) -> Decision:
        own, self.share = self.share, self.share + (1 - self.share) * step.full
        try:
            return super().decide(replace(step, full=0.0))
        finally:
            self.share = own


class Huber(morlib.WorthRouter):
    """A loss that grows as the error does, beyond one nat, and not as its square."""

    CLIP, version = 100.0, "huber"

    def error(self, states: Tensor, measured: Tensor) -> Tensor:
        predicted, measured = self.network(states)[:, 0].float(), measured.clamp(-self.CLIP, self.CLIP)
        return F.huber_loss(predicted, measured, reduction="sum") / max(len(measured), 1)


class MedianOfMeans(morlib.WorthRouter):
    """The loss of the middle one of eight groups of tokens (Lecué and Lerasle 2020, Annals of Statistics)."""

    CLIP, GROUPS, version = 100.0, 8, "median-of-means"

    def error(self, states: Tensor, measured: Tensor) -> Tensor:
        """The router's loss, and its gradient, of the group whose mean squared error is the median."""
        error = self.network(states)[:, 0].float() - measured.clamp(-self.CLIP, self.CLIP)
        if not len(error):
            return error.sum()
        groups = (error**2).split(max(len(error) // self.GROUPS, 1))[: self.GROUPS]
        return torch.stack([group.mean() for group in groups]).median() / 2


class OwnLoss(morlib.WorthRouter):
    """Added to what is measured: by how much a token's own loss falls from where it is asked to the end."""

    version = "own-loss"

    def decide(self, step: StepInput) -> Decision:
        decision = super().decide(step)
        if decision.weights is not None:  # in training
            with torch.no_grad():
                step.memory["asked"] = step.readout(step.states)  # [T, V]
        return decision

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        with torch.no_grad():
            asked, end = out.memory.pop("asked").float(), out.logits.flatten(0, 1).float()
            before, after = (F.cross_entropy(x, targets.flatten(), reduction="none") for x in (asked, end))
        out.memory["fell"] = before - after
        return loss

    def own_loss(self, memory: dict, scale: float) -> Tensor | None:
        if memory["w"].grad is not None:  # minus what is worth, of a mean loss that was scaled
            memory["w"].grad -= memory["fell"] * scale / len(memory["fell"])
        return super().own_loss(memory, scale)


class FourBatches(morlib.WorthRouter):
    """The router learns from its last batches too. (They are not kept in a checkpoint.)"""

    BATCHES, version = 4, "four-batches"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.seen = deque(maxlen=self.BATCHES)

    def error(self, states: Tensor, measured: Tensor) -> Tensor:
        self.seen.append((states, measured))
        return super().error(*(torch.cat(parts) for parts in zip(*self.seen)))


class StepsUp(morlib.WorthRouter):
    """Decides once among more depths than two: the first layers, a quarter, half, or all of them. (A quarter
    or half that is not above the first layers is left out.)

    Each step up has a worth of its own. A token runs to the depth at which the worth of its steps (nats),
    less a price for each of their layers, is largest. An explored token runs to a step drawn by lot, and that
    one has a random weight.
    """

    version = "steps-up"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        N, first = cfg.n_layers, self.ALWAYS
        self.depths = [first, *sorted({depth for depth in (N // 4, N // 2, N) if depth > first})]
        self.register_buffer("layers", torch.tensor(self.depths).diff(), persistent=False)  # [S] of each step
        self.network[2] = torch.nn.Linear(self.network[2].in_features, len(self.layers))

    def forward(self, step: StepInput) -> Decision:
        if step.layer < self.ALWAYS:
            return Decision()
        if "decisions" not in step.memory:
            step.memory["decisions"] = self.decisions(step)
        return step.memory["decisions"][bisect(self.depths, step.layer) - 1]

    def decisions(self, step: StepInput) -> list[Decision]:
        """One a step up, for all layers of that step: actions [T], and in training weights [2, T]."""
        T, S = len(step.states), len(self.layers)
        states = F.layer_norm(step.states.detach(), step.states.shape[-1:])
        with torch.no_grad():
            worth = self.network(states).float()  # [T, S]
        learning = step.sampling and torch.is_grad_enabled()
        price = self.price[int(learning)]
        if step.calibrate:
            price.lerp_(self.price_that_holds(worth).to(price), self.RATE if learning and price else 1.0)
        climbed = self.climbed(worth, price)
        if not learning:
            return [Decision((climbed > s).long()) for s in range(S)]
        draw, w, stays = torch.rand(3, T, device=worth.device).unbind()
        explored, at = draw < self.explored(step.done), torch.randint(S, (T,), device=worth.device)
        climbed = torch.where(explored, at + 1, torch.where(stays < step.full, S, climbed))
        weights = [torch.where(explored & (at == s), w, 1.0).requires_grad_() for s in range(S)]
        step.memory |= dict(weights=weights, explored=explored, at=at, states=states)
        return [
            Decision((climbed > s).long(), None, torch.stack([w, w]), self.SLOPE * (w - 1))
            for s, w in enumerate(weights)
        ]

    def climbed(self, worth: Tensor, price: Tensor) -> Tensor:
        """How many steps up [T] each token takes, by the worth [T, S] of each, at a price a layer."""
        gain = (worth - price * self.layers).cumsum(1)
        return F.pad(gain, (1, 0)).argmax(1)

    def price_that_holds(self, worth: Tensor) -> Tensor:
        """The price at which worth [T, S] runs the target depth on average, found by halving.

        It lies in the middle of a gap, so that a token's rounding seldom decides.
        """
        depths = torch.tensor(self.depths, device=worth.device, dtype=torch.float)

        def least(most: Tensor | float) -> Tensor:  # the least price at which it runs so much or less
            low, high = worth.new_tensor(-1e3), worth.new_tensor(1e3)
            for _ in range(50):
                middle = (low + high) / 2
                too_deep = depths[self.climbed(worth, middle)].mean() > most
                low, high = (middle, high) if too_deep else (low, middle)
            return high

        price = least(self.cfg.target_depth)
        runs = depths[self.climbed(worth, price)].mean()
        if runs <= depths[0]:  # nobody takes a step
            return price
        return (price + least(runs - 0.5 / len(worth))) / 2

    def own_loss(self, memory: dict, scale: float) -> Tensor | None:
        losses, predicted = [], self.network(memory["states"]).float()  # [T, S]
        for s, w in enumerate(memory["weights"]):
            chosen = memory["explored"] & (memory["at"] == s)
            if w.grad is not None and chosen.any():
                measured = (-w.grad * len(w) / scale)[chosen].clamp(-self.CLIP, self.CLIP)
                losses.append(((predicted[chosen, s] - measured) ** 2).mean() / 2)
        return sum(losses) if losses else None


morlib.POLICIES |= {
    "worth: steps up": StepsUp,
    "worth: least first": LeastFirst,
    "worth: huber": Huber,
    "worth: four batches": FourBatches,
    "worth: median of means": MedianOfMeans,
    "worth: own loss": OwnLoss,
    "worth: in windows": InWindows,
    "worth: warm-up by window, in windows": ByWindows,  # under this name its lead was trained
    "worth: plan": ExploredPlan,
    "worth: plan, warm-up": WarmPlan,
}
for _label, _changes in CONSTANTS.items():
    own = dict(_changes, version=repr(_changes), __module__=__name__)
    morlib.POLICIES[f"worth: {_label}"] = type("Lead", (morlib.WorthRouter,), own)


def lead_runs(s: Settings) -> list[Run]:
    """Token worth as it is and with each lead, in the setting NARROW with half of its steps."""
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
