"""The settings of each system that were tried for a part of its training, on a seed of their own."""

from __future__ import annotations

from dataclasses import fields, replace

from morlib import ModelConfig, TrainConfig

from ..runs import Run, Settings
from .models import field_runs, text_runs

STEPS, SEED = 1500, 10  # a seed that no row of the field has
# Of each system its trials: fields of ModelConfig or TrainConfig, or options, in place of those of its row.
# Early exit by confidence has no setting but its threshold, which the target depth sets
PAIRS = [dict(alpha=alpha, weight=weight) for alpha in (0.1, 1.0) for weight in (0.001, 0.01)]
EXPERTS = [dict(balance=0.001), dict(balance=0.01), dict(balance=0.1), dict(experts=8)]
TRIALS: dict[str, list[dict]] = {
    "ponder": [dict(beta=beta) for beta in (0.001, 0.01, 0.1, 1.0)],
    "mor-expert": PAIRS,
    "lora": [dict(rank=rank) for rank in (2, 4, 8, 16)],
    "sliced": [dict(groups=groups) for groups in (1, 2, 4, 8)],
    "moe-top1": EXPERTS,
    "moe-top2": EXPERTS,
    "mor-moe": EXPERTS,
    "fixed-half": [dict(lr=rate) for rate in (1e-3, 2e-3, 4e-3, 8e-3)],
    "fixed-deep": [dict(lr=rate) for rate in (1e-3, 2e-3, 4e-3, 8e-3)],
    "worth": [dict(lr=rate, router_lr=rate) for rate in (1e-3, 2e-3, 4e-3, 8e-3)],
    "act": [*(dict(tau=tau) for tau in (0.001, 0.01, 0.03, 0.1)), dict(bias=1.0)],
    "exit": [dict(cost=cost) for cost in (0.01, 0.05, 0.2, 0.5)],
    "mod": [dict(router_lr=5e-4), dict(router_lr=2e-3), dict(capacity=0.25), dict(capacity=0.5)],
    "mor-token": [dict(alpha=alpha, weight=weight) for alpha in (0.1, 1.0) for weight in (0.01, 0.1)],
    "dr": [dict(beta=0.0), dict(beta=0.999), dict(cost=0.05), dict(cost=0.2)],
}
# On text models learn at twice the rate, and a pass is worth less
TRIALS_ON_TEXT = TRIALS | {
    "fixed-half": [dict(lr=rate) for rate in (2e-3, 4e-3, 8e-3, 1.6e-2)],
    "fixed-deep": [dict(lr=rate) for rate in (2e-3, 4e-3, 8e-3, 1.6e-2)],
    "worth": [dict(lr=rate, router_lr=rate / 2) for rate in (2e-3, 4e-3, 8e-3, 1.6e-2)],
    "act": [*(dict(tau=tau) for tau in (0.0003, 0.001, 0.003, 0.01)), dict(bias=1.0)],
    "exit": [dict(cost=cost) for cost in (0.002, 0.01, 0.05, 0.2)],
    "mod": [dict(router_lr=1e-3), dict(router_lr=4e-3), dict(capacity=0.25), dict(capacity=0.5)],
    "dr": [dict(cost=cost) for cost in (0.005, 0.01, 0.02, 0.05)],
}
AHEAD_ON_TEXT = {"moe-top1": dict(balance=0.1), "mor-moe": dict(balance=0.1), "mor-expert": dict(alpha=1.0)}


def trial_runs(s: Settings) -> list[Run]:
    """One Run a trial on the task of a preset: few steps, judged by the end of its validation curve."""
    rows = {run.model: run for run in field_runs(replace(s, seeds=1), list(TRIALS))}
    return [trial(rows[label], changes) for label, several in TRIALS.items() for changes in several]


def text_trial_runs(s: Settings) -> list[Run]:
    """The same on text."""
    rows = {run.model: run for run in text_runs(replace(s, seeds=1), list(TRIALS_ON_TEXT))}
    return [trial(rows[label], changes) for label, several in TRIALS_ON_TEXT.items() for changes in several]


def long_trial_runs(s: Settings) -> list[Run]:
    """On text, settings that were ahead of those in use in the short trials, trained as long as the rows."""
    runs = []
    for label, changes in AHEAD_ON_TEXT.items():
        for spec in text_runs(s, [label]):
            config = replace(spec.config, options=(spec.config.options or {}) | changes)
            names = dict(experiment="field-text-long-trials", model=f"{label}, {told(changes)}")
            runs.append(replace(spec, config=config, **names))
    return runs


def told(changes: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in changes.items())


def trial(spec: Run, changes: dict) -> Run:
    """A short run of a row of the field with some settings changed; its name says which."""
    named = {kind: {f.name for f in fields(kind)} for kind in (ModelConfig, TrainConfig)}
    of_model = {k: v for k, v in changes.items() if k in named[ModelConfig]}
    of_training = {k: v for k, v in changes.items() if k in named[TrainConfig]}
    options = {k: v for k, v in changes.items() if k not in of_model and k not in of_training}
    options = (spec.config.options or {}) | options
    windows = min(spec.train.batch_size * STEPS // spec.train.epochs, spec.train.windows)
    short = dict(windows=windows, evaluations=3, seed=SEED, heldout_windows=300)
    train = replace(spec.train, **short | of_training)
    config = replace(spec.config, options=options or None, **of_model)
    names = dict(experiment=f"{spec.experiment}-trials", model=f"{spec.model}, {told(changes)}")
    parent = spec.parent
    if parent:  # a model that no row of the field has either
        own = replace(parent.train, seed=SEED)
        parent = replace(parent, train=own, experiment=f"{spec.experiment}-trials-begin")
    return replace(spec, config=config, train=train, parent=parent, **names)
