"""The runs of notebook 07: a task on which depth is known to matter."""

from __future__ import annotations

from dataclasses import replace

import morlib
from morlib import Decision, ModelConfig, StepInput, TrainConfig

from .experiments import Changes, Run
from .settings import Settings


class PlantedHops(morlib.Policy):
    """The plan written down, the most a router could find. For the task hops-8-K.

    The table's tokens and each x run every layer, all others the first one only. Hops are followed at x, and
    read from the table. The number before x is looked up by x, and the answer behind it is of no further use.
    """

    SYMBOLS = 8
    version = "1"

    def forward(self, step: StepInput) -> Decision:
        if step.layer == 0:
            return Decision()
        behind = step.position - self.SYMBOLS
        return Decision(((behind < 0) | (behind % 3 == 1)).long(), lasts=True)


morlib.POLICIES["planted-hops-8"] = PlantedHops

# Of each preset: the task, its models' depth and width, steps of training, and the depth that is asked for
SIZES = {
    "smoke": dict(task="hops-8-2", layers=3, width=16, steps=40, target=2.0),
    "quick": dict(task="hops-8-3", layers=4, width=32, steps=800, target=2.4),
    "usual": dict(task="hops-8-6", layers=6, width=64, steps=4000, target=3.1),
}


def size_of(s: Settings) -> dict:
    """The entry of SIZES for a preset."""
    return SIZES.get(s.preset, SIZES["usual"])


def known_depth_models(s: Settings) -> Changes:
    """Fixed depth whole and halved, and four ways to choose who is deep at about half of the cost."""
    size = size_of(s)
    N, target = size["layers"], size["target"]
    fixed, routed = dict(routing="none"), dict(target_depth=target)
    return {
        "fixed-half": (fixed | dict(n_layers=N // 2), {}),
        "fixed-deep": (fixed, {}),
        "planted": (dict(routing="planted-hops-8"), {}),
        "worth": (routed | dict(routing="worth"), dict(router_lr=2e-3, share_power=0.0, depth_warmup=0.2)),
        "mor": (routed | dict(routing="mor"), dict(router_lr=2.5e-4)),
        "frozen": (routed | dict(routing="frozen"), {}),
    }


def known_depth_runs(s: Settings, models: Changes, experiment: str = "known-depth") -> list[Run]:
    """One Run per seed and model label on the task of a preset: windows without end, each seen once."""
    size = size_of(s)
    width, steps = size["width"], size["steps"]
    base = ModelConfig(
        vocab_size=1, n_layers=size["layers"], d_model=width, n_heads=4, d_ff=4 * width, max_len=64,
        dropout=0.0, max_recursions=1,
    )  # fmt: skip
    train = TrainConfig(
        epochs=10, windows=64 * steps // 10, batch_size=64, lr=2e-3, evaluations=max(steps // 500, 2),
    )  # fmt: skip
    corpus = (("name", size["task"]), ("split", "full"))
    runs = []
    for seed in range(s.seeds):
        for label, (model, training) in models.items():
            cfg, tc = replace(base, **model), replace(train, seed=seed, **training)
            runs.append(Run(experiment, label, cfg, tc, corpus, s.preset, s.recipe, s.device))
    return runs
