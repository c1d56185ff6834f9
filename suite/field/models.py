"""Which systems the field is compared by, on the task of known depth and on text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..results.field import BEST, BEST_ON_TEXT, MOST_SEEDS, SEEDS
from ..runs import NARROW, Run, Settings, known_depth_models, known_depth_runs, settings
from ..runs.experiments import LONG, TEXTS, WORTH_TRAINING, Changes, experiment_runs
from ..runs.known_depth import RATE, SIZES, fixed_between
from .ponder import prior_of_mean

KNOWN = ("fixed-deep", "planted", "blind", "frozen", "worth", "mor")  # as `known_depth_models` makes them
# Systems that begin with the weights of another row, and the share of its steps that they take then
ADDED = {"dr": ("fixed-deep", 1 / 20), "lora-uptrained": ("fixed-half", 1 / 2)}
# Options on text, where a pass is worth less: of act the best of its trials, of ponder the best of those near
# its depth. The price of dr is what a layer is worth there to fixed models, from six layers to twelve
ON_TEXT = {"act": dict(tau=0.003), "dr": dict(cost=0.005), "ponder": dict(beta=0.01)}
# Where a preset has no time for the setting that is stored: that of a test, and that of a try
SMALL = {
    "smoke": dict(task="hops-8-2", layers=4, width=16, steps=30, batch=16, target=2.3, heldout=100),
    "quick": dict(task="hops-8-3", layers=4, width=32, steps=150, batch=32, target=2.3, heldout=300),
}
QUICK = ("fixed-half", "fixed-deep", "act", "exit", "mor-expert")  # what `quick` has time for


def field_size(s: Settings) -> dict:
    """Task, depth, width and steps of the field under a preset: NARROW, or the preset's own small ones."""
    return SMALL.get(s.preset, NARROW)


def systems_of(N: int, target: float) -> dict[str, dict]:
    """Each system by its name: what it changes of a model of N layers.

    Early exits are asked for a depth of `target`, and of PonderNet's prior, cut at N steps, it is the mean;
    its beta is one by which depth keeps near it. Of all others E follows from settings of their own, and may
    be far from it. Dr.LLM begins with all N layers.

    MoR has two to four recursions where N is 4, 6 or 12, as in the paper. Of twelve layers it runs six by
    top-k: three recursions of two blocks between a first and a last one, or of three blocks without these.
    Of four it runs 3.5, the fewest that it can have, and 2.5 without ends. Where N is 6 it has four layers
    too: without ends two recursions of two blocks, which run 3.
    """
    recursive, cycle = dict(n_layers=4), dict(n_layers=4, options=dict(ends=False))
    if N == 6:
        cycle |= dict(shared_blocks=2)
    elif N >= 12:
        recursive = dict(n_layers=2 + 3 * (N // 6), shared_blocks=N // 6)
        cycle |= dict(n_layers=3 * (N // 4), shared_blocks=N // 4)
    return {
        "act": dict(routing="act"),
        "ponder": dict(routing="ponder", options=dict(prior=prior_of_mean(target, N), beta=0.1)),
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
        "lora-uptrained": dict(routing="lora", n_layers=N // 2),
        "sliced": dict(routing="sliced", n_layers=N // 2),
        "moe-top1": dict(routing="moe", n_layers=N // 2),
        "moe-top2": dict(routing="moe", n_layers=N // 2, options=dict(top=2)),
        "mor-moe": recursive | dict(routing="mor-moe"),
        "dr": dict(routing="dr", max_recursions=2),
    }


def same_rate(lr: float) -> dict:
    """Training in which routers learn as everything else, as their authors have it."""
    return dict(router_lr=lr, share_power=0.0)


def field_models(s: Settings, size: dict | None = None) -> Changes:
    """Each system (`systems_of`) on the task of known depth, with fixed depth and the controls.

    size: in place of the preset's, for instance SIZES["usual"].
    """
    size = size or field_size(s)
    N = size["layers"]
    known = known_depth_models(s, size)
    models = {"fixed-half": known["fixed-half"], "fixed-between": fixed_between(N)}
    models |= {label: known[label] for label in KNOWN}
    own = systems_of(N, size["target"])
    if s.preset == "smoke":  # a search that takes seconds
        own["dr"] |= dict(options=dict(rounds=4))
    return models | {label: (changes, same_rate(RATE)) for label, changes in own.items()}


def text_models(s: Settings) -> Changes:
    """Each system (`systems_of`) on text, with fixed depth and the controls."""
    base, lr = s.model(vocab_size=1), s.train().lr
    N, target = base.n_layers, base.n_layers / 2
    fixed, once = dict(routing="none"), dict(target_depth=target, max_recursions=1)
    models = {
        "fixed-half": (fixed | dict(n_layers=N // 2), {}),
        "fixed-between": (fixed | dict(n_layers=2 * N // 3), {}),
        "fixed-deep": (fixed, {}),
        "blind": (once | dict(routing="blind-tokens"), dict(depth_warmup=WORTH_TRAINING["depth_warmup"])),
        "frozen": (dict(routing="frozen", target_depth=target), {}),
        "worth": (once | dict(routing="worth"), WORTH_TRAINING),
        "mor": (dict(routing="mor", target_depth=target), {}),
    }
    own = systems_of(N, target)
    for label, options in ON_TEXT.items():
        own[label] |= dict(options=own[label].get("options", {}) | options)
    models |= {label: (dict(max_recursions=1) | own[label], same_rate(lr)) for label in own}
    # By validation loss, routers that pay loss for depth are best before they learn: judged at the end
    models["dr"][1]["evaluations"] = 1
    return models


def field_runs(s: Settings, labels: list[str] | None = None) -> list[Run]:
    """One Run per seed, three at most, six of BEST, and system on the task of a preset.

    labels: some of `field_models`; None: all. `suite.runs.run(field_runs(s, ["act"])[0])` trains one row.
    Raises ValueError that names the labels.
    """
    make = partial(known_depth_runs, s, experiment="field", size=field_size(s))
    return begun(make, field_models(s), labels, BEST)


def wide_field_runs(s: Settings, labels: list[str] | None = None) -> list[Run]:
    """The same in the wide setting of notebook 07: six layers of width 64. Three seeds at most.

    Fixed models, plan, token worth and MoR of notebook 02 are those of `runs.known_depth_runs`.
    """
    size = SIZES["usual"]
    make = partial(known_depth_runs, s, experiment="field-wide", size=size)
    return begun(make, field_models(s, size), labels)


def text_runs(s: Settings, labels: list[str] | None = None) -> list[Run]:
    """One Run per seed, three at most, six of BEST_ON_TEXT, and system on the text of experiment 1, trained
    long.

    labels: some of `text_models`; None: all. Of s only seeds and device are used; under the presets "smoke"
    and "quick" their sizes. Fixed models are those of `runs.long_runs`.
    Raises ValueError that names the labels.
    """
    if s.preset not in SMALL:
        s = settings(dict(preset="long", epochs=LONG["exp1"], seeds=s.seeds, device=s.device))
    make = partial(experiment_runs, s, "field-text", TEXTS["exp1"])
    return begun(make, text_models(s), labels, BEST_ON_TEXT)


def first_seeds(runs: list[Run], best: tuple[str, ...] = ()) -> list[Run]:
    """The runs of the first SEEDS seeds, and of the best systems those of the first MOST_SEEDS."""
    return [run for run in runs if run.train.seed < (MOST_SEEDS if run.model in best else SEEDS)]


def begun(make: Callable, models: Changes, labels: list[str] | None, best: tuple = ()) -> list[Run]:
    """The runs that `make` gives of the models with these labels, or of all: their `first_seeds`.

    Those of ADDED begin with the weights of another row at their seed, and train for a part of its
    steps.
    Raises ValueError that names labels that are none of them.
    """
    if unknown := sorted(set(labels or ()) - set(models)):
        raise ValueError(f"no system {', '.join(unknown)}: choose among {', '.join(models)}")
    chosen = {label: changes for label, changes in models.items() if labels is None or label in labels}
    runs = first_seeds(make(chosen), best)
    first = make({label: models[label] for label, _ in ADDED.values()})
    parents = {(run.model, run.train.seed): run for run in first}
    for index, own in enumerate(runs):
        if own.model in ADDED:
            label, part = ADDED[own.model]
            fewer = max(round(part * own.train.windows), own.train.batch_size)
            train = replace(own.train, windows=fewer)
            runs[index] = replace(own, train=train, parent=parents[label, own.train.seed])
    return runs
