"""Which systems the field is compared by, on the task of known depth."""

from __future__ import annotations

from dataclasses import replace

from ..runs import NARROW, Run, Settings, known_depth_models, known_depth_runs, run
from ..runs.experiments import Changes
from ..runs.known_depth import fixed_between

CONTROLS = ("fixed-deep", "planted", "blind", "worth", "mor")  # as `known_depth_models` makes them
SEEDS = 3
# Where a preset has no time for the setting that is stored: that of a test, and that of a try
SMALL = {
    "smoke": dict(task="hops-8-2", layers=4, width=16, steps=30, batch=16, target=2.3, heldout=100),
    "quick": dict(task="hops-8-3", layers=4, width=32, steps=150, batch=32, target=2.3, heldout=300),
}
QUICK = ("fixed-half", "fixed-deep", "act", "exit", "mor-expert")  # what `quick` has time for


def field_size(s: Settings) -> dict:
    """Task, depth, width and steps of the field under a preset: NARROW, or the preset's own small ones."""
    return SMALL.get(s.preset, NARROW)


def field_models(s: Settings) -> Changes:
    """Each system by its name, at about half of the cost of N layers, beside fixed depth and the controls.

    Where E follows from the system's own settings, these are near: see each class.
    """
    size = field_size(s)
    N, target = size["layers"], size["target"]
    recursive = dict(n_layers=max(N // 2 + 1, 4))  # two blocks of their own and as many recursions as fit
    cycle = dict(options=dict(ends=False))  # N recursions of one block: E is (N + 1) / 2
    systems = {
        "act": dict(routing="act"),
        "ponder": dict(routing="ponder", options=dict(prior=round(1 / target, 3))),
        "exit": dict(routing="exit", target_depth=target),
        "exit-confidence": dict(routing="exit-confidence", target_depth=target),
        "mod": dict(routing="mod"),
        "mor-expert": recursive | dict(routing="mor-expert"),
        "mor-token": recursive | dict(routing="mor-token"),
        "mor-expert-cycle": cycle | dict(routing="mor-expert"),
        "mor-token-cycle": cycle | dict(routing="mor-token"),
        "mor-expert-sharing": recursive | dict(routing="mor-expert-sharing"),
        "mor-token-sharing": recursive | dict(routing="mor-token-sharing"),
        "lora": dict(routing="lora", n_layers=N // 2),
        "sliced": dict(routing="sliced", n_layers=N // 2),
        "moe-top1": dict(routing="moe", n_layers=N // 2),
        "moe-top2": dict(routing="moe", n_layers=N // 2, options=dict(top=2)),
        "mor-moe": recursive | dict(routing="mor-moe"),
    }
    same_rate = dict(router_lr=2e-3, share_power=0.0)  # routers learn as everything else, as their authors do
    known = known_depth_models(s, size)
    models = {"fixed-half": known["fixed-half"], "fixed-between": fixed_between(N)}
    models |= {label: known[label] for label in CONTROLS}
    return models | {label: (changes, same_rate) for label, changes in systems.items()}


def field_runs(s: Settings, labels: list[str] | None = None) -> list[Run]:
    """One Run per seed, three at most, and system on the task of a preset.

    labels: some of `field_models`; None: all. `suite.runs.run(field_runs(s, ["act"])[0])` trains one row.
    Raises ValueError that names the labels.
    """
    models = field_models(s)
    if unknown := sorted(set(labels or ()) - set(models)):
        raise ValueError(f"no system {', '.join(unknown)}: choose among {', '.join(models)}")
    chosen = {label: changes for label, changes in models.items() if labels is None or label in labels}
    return known_depth_runs(replace(s, seeds=min(s.seeds, SEEDS)), chosen, "field", field_size(s))


def uptrained(s: Settings, label: str, **changes) -> list[Run]:
    """One Run per seed of a system that begins with the weights of a fixed model of as many layers.

    label: "lora". That model is trained first if need be: its steps come on top. changes: of TrainConfig.
    """
    runs = []
    for spec in field_runs(s, [label]):
        fixed = replace(spec.config, routing="none", options=None, shared_blocks=None)
        parent = replace(spec, model=f"fixed {fixed.n_layers}", config=fixed)
        train = replace(spec.train, **changes)
        runs.append(replace(spec, model=f"{label}, uptrained", train=train, parent=run(parent)["id"]))
    return runs
