"""The runs on recursion: one block that is run again and again, asked for more than it was trained on."""

from __future__ import annotations

from dataclasses import replace

import torch

import morlib
from morlib import FORWARD, RECURSE, Decision, ModelConfig, StepInput, TrainConfig, Transformer

from .experiments import Run
from .settings import Settings


class Loops(morlib.Policy):
    """All layers but the last run every token once, the last one as often as `max_recursions` says.

    Training draws for each batch how often, from half of it on: so the states between are of use, and the
    number can be raised later.
    """

    version = "1"

    def forward(self, step: StepInput) -> Decision:
        if step.layer + 1 < self.cfg.n_layers:
            return Decision()
        times = most = self.cfg.max_recursions
        if step.sampling:
            draw = torch.randint(most - most // 2, most + 1, ())
            times = int(step.memory.setdefault("times", draw))
        return Decision(torch.full_like(step.index, RECURSE if step.recursion + 1 < times else FORWARD))


morlib.POLICIES["loops"] = Loops


def with_recursions(model: Transformer, recursions: int) -> Transformer:
    """A copy of a model that runs each layer up to another number of times."""
    with torch.random.fork_rng(devices=[]):
        other = Transformer(replace(model.cfg, max_recursions=recursions))
    other.load_state_dict(model.state_dict())
    other.vocabulary = model.vocabulary
    return other.to(model.embed.weight.device).eval()


# Of each preset: the task, the recursions of the last layer, width and steps of training
REACH = {
    "smoke": dict(task="strokes-8-2", recursions=2, width=16, steps=20, heldout=100),
    "quick": dict(task="strokes-8-2", recursions=4, width=32, steps=150, heldout=200),
    "usual": dict(task="strokes-8-6", recursions=8, width=64, steps=4000),
}


def recursion_runs(s: Settings) -> list[Run]:
    """One block that runs 4 to 8 times, and as many blocks of their own, on hops in strokes."""
    size = REACH.get(s.preset, REACH["usual"])
    R, width, steps = size["recursions"], size["width"], size["steps"]
    base = ModelConfig(
        vocab_size=1, n_layers=2, d_model=width, n_heads=4, d_ff=4 * width, max_len=64, dropout=0.0,
        routing="loops", max_recursions=R,
    )  # fmt: skip
    train = TrainConfig(
        epochs=10, windows=32 * steps // 10, batch_size=32, lr=2e-3, evaluations=max(steps // 500, 2),
        heldout_windows=size.get("heldout"),
    )  # fmt: skip
    models = {"loops": base, "fixed": replace(base, routing="none", n_layers=1 + R, max_recursions=1)}
    corpus = (("name", size["task"]), ("split", "full"))
    return [
        Run("recursion", label, config, replace(train, seed=seed), corpus, s.preset, s.recipe, s.device)
        for seed in range(s.seeds)
        for label, config in models.items()
    ]
