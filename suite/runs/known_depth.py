"""The runs of notebook 07: a task on which depth is known to matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import morlib
from morlib import Decision, ModelConfig, StepInput, TrainConfig

from ..texts import Chains, Drawn, Hops
from .experiments import WORTH_TRAINING, Changes, Run, runs_of
from .settings import Settings


class Planted(morlib.Policy):
    """A plan written down, which suffices for the task: the kinds DEEP run every layer, others the first.

    layers: how many layers those that are deep run, from the bottom; 0 for all of them.
    """

    TASK: Drawn
    DEEP: tuple[str, ...]
    OPTIONS = dict(layers=0)
    version = "1"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        deep = [kind in self.DEEP for kind in self.TASK.kinds(cfg.max_len)]
        self.register_buffer("deep", torch.tensor(deep).long(), persistent=False)  # [max_len]
        self.layers = (self.OPTIONS | (cfg.options or {}))["layers"] or cfg.n_layers
        morlib.check_value("ModelConfig: option layers", self.layers, int)
        if not 1 <= self.layers <= cfg.n_layers:
            wanted = f"layers in 0..{cfg.n_layers} (0: all)"
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs {wanted}, not {self.layers}")

    def forward(self, step: StepInput) -> Decision:
        if not step.layer:
            return Decision()
        deep = self.deep[step.position]
        if self.layers == self.cfg.n_layers:
            return Decision(deep, lasts=True)
        return Decision(deep if step.layer < self.layers else torch.zeros_like(deep))


class PlantedHops(Planted):
    """For hops-8-K. Hops are followed at x, and read from the table. The number before x is looked up by x,
    and the answer behind it is of no further use."""

    TASK, DEEP = Hops(8, 6), ("table", "x")


class PlantedLongHops(Planted):
    """For hops-10-K, as for hops-8-K."""

    TASK, DEEP = Hops(10, 8), ("table", "x")


class PlantedChains(Planted):
    """For chains-4-5. A variable's number is found where it is defined, and x looks it up there."""

    TASK, DEEP = Chains(4, 5), ("table", "x")


class WholeWindows(morlib.WorthRouter):
    """Token worth, but in training a share of the windows runs whole. So the model also learns what takes
    depth at tokens that the plan leaves out, and the router is shown what they are worth then."""

    WHOLE = 0.1

    def decide(self, step: StepInput) -> Decision:
        decision = super().decide(step)
        if decision.weights is not None:  # in training
            whole = torch.rand(int(step.row[-1]) + 1, device=step.index.device) < self.WHOLE
            decision.actions = decision.actions | whole[step.row].long()
        return decision


class InWindows(morlib.WorthRouter):
    """Token worth that explores in a share of the windows; in the others it learns as it will be used."""

    WINDOWS, version = 0.25, "quarter"

    def decide(self, step: StepInput) -> Decision:
        if step.sampling:  # in training
            chosen = torch.rand(int(step.row[-1]) + 1, device=step.index.device) < self.WINDOWS
            self.chosen = chosen[step.row]  # [T]
        return super().decide(step)

    def explored(self, done: float) -> Tensor:
        return super().explored(done) * self.chosen


class ByWindows(InWindows):
    """The same; and in the warm-up from full depth windows run whole or as they will be used, not tokens.

    It draws where it is measured in the warm-up, too: more points of the curve make it another training.
    """

    version = "by-window-quarter"

    def decide(self, step: StepInput) -> Decision:
        if step.full:
            whole = torch.rand(int(step.row[-1]) + 1, device=step.index.device) < step.full
            step = replace(step, full=whole[step.row].float())
        return super().decide(step)


morlib.POLICIES |= {
    "worth-by-windows": ByWindows,
    "worth-whole-windows": WholeWindows,
    "planted-hops-8": PlantedHops,
    "planted-hops-10": PlantedLongHops,
    "planted-chains-4-5": PlantedChains,
}

PLANS = {"hops-8": "planted-hops-8", "hops-10": "planted-hops-10", "chains-4": "planted-chains-4-5"}

# Of each preset: the task, its models' depth and width, steps of training, the depth that is asked for, and
# how many held-out lines a model is judged on where it is not all
SIZES = {
    "smoke": dict(task="hops-8-2", layers=3, width=16, steps=20, target=2.0, heldout=100),
    "quick": dict(task="hops-8-3", layers=4, width=32, steps=200, target=2.4, heldout=200),
    "usual": dict(task="hops-8-6", layers=6, width=64, steps=4000, target=3.1),
}
# The setting of the field: half of its layers are still behind, at this schedule in twice the steps too
NARROW = dict(task="hops-8-6", layers=4, width=32, steps=8000, batch=32, target=2.3)
# A harder one: two symbols and two hops more, and twelve layers
DEEP = dict(task="hops-10-8", layers=12, width=32, steps=16000, batch=32, target=6.0)
# The second task, in which half of the layers stay behind too
CHAINS = dict(task="chains-4-5", layers=4, width=32, steps=8000, batch=32, target=2.7)
RATE = 2e-3  # the learning rate of all of these
# NARROW with a rate that stays at its height until the last fifth of the steps
NARROW_WSD = NARROW | dict(schedule="wsd")
FRONT = (1.6, 1.9, 3.0)  # depths asked for beside NARROW's own
SHORT_PLANS = (2, 3)  # layers that the plan's deep tokens run, beside all
SHALLOW = dict(n_layers=3, target_depth=1.87)  # as the plan with three layers runs them, and a little more
WIDE_SHALLOW = dict(n_layers=4, target_depth=2.3)  # the same of four layers, for the wide setting
# Four layers as wide as the preset's own, with a rate that stays high
FOUR_WIDE_WSD = SIZES["usual"] | dict(layers=4, target=2.3, schedule="wsd")


def size_of(s: Settings) -> dict:
    """The entry of SIZES for a preset."""
    return SIZES.get(s.preset, SIZES["usual"])


def known_depth_models(s: Settings, size: dict | None = None) -> Changes:
    """Fixed depth whole and halved, and seven ways to choose who is deep at about half of the cost.

    size: in place of the preset's, for instance NARROW.
    """
    size = size or size_of(s)
    N, target = size["layers"], size["target"]
    fixed, routed = dict(routing="none"), dict(target_depth=target)
    mor, own_rate = routed | dict(routing="mor"), dict(router_lr=size.get("lr", RATE) / 8)
    spread = round((target - 1) / (N - 1) - 0.005, 3)  # so that one layer runs everyone, as in the plan
    as_worth = WORTH_TRAINING | dict(router_lr=size.get("lr", RATE))
    return {
        "fixed-half": (fixed | dict(n_layers=N // 2), {}),
        "fixed-deep": (fixed, {}),
        "planted": (dict(routing=PLANS[size["task"].rsplit("-", 1)[0]]), {}),
        "worth": (routed | dict(routing="worth"), as_worth),
        "worth-by-windows": (routed | dict(routing="worth-by-windows"), as_worth),
        "blind": (routed | dict(routing="blind-tokens"), dict(depth_warmup=0.2)),
        "mor": (mor, own_rate),
        "mor-spread": (mor | dict(capacity=spread), own_rate),
        "frozen": (routed | dict(routing="frozen"), {}),
    }


def fixed_between(N: int) -> tuple[dict, dict]:
    """A fixed model of three quarters of N layers, as an entry of Changes."""
    return dict(routing="none", n_layers=max(3 * N // 4, 1)), {}


def known_depth_runs(
    s: Settings, models: Changes, experiment: str = "known-depth", size: dict | None = None
) -> list[Run]:
    """One Run per seed and model label on the task of a preset: windows without end, each seen once.

    size: in place of the preset's, for instance NARROW.
    """
    size = size or size_of(s)
    width, steps, batch = size["width"], size["steps"], size.get("batch", 64)
    base = ModelConfig(
        vocab_size=1, n_layers=size["layers"], d_model=width, n_heads=4, d_ff=4 * width, max_len=64,
        dropout=0.0, max_recursions=1,
    )  # fmt: skip
    train = TrainConfig(
        epochs=10, windows=batch * steps // 10, batch_size=batch, lr=size.get("lr", RATE),
        schedule=size.get("schedule", "cosine"), evaluations=max(steps // 500, 2),
        heldout_windows=size.get("heldout"),
    )  # fmt: skip
    corpus = (("name", size["task"]), ("split", "full"))
    return runs_of(s, experiment, corpus, models, base, train)


def map_runs(s: Settings) -> list[Run]:
    """The map of fixed depth: which k so many layers follow after so many steps."""
    size, mapped = size_of(s), []
    for layers in (2, 3, 4, 6):
        for length in (4000, 8000):
            models = {f"fixed {layers}, {length} steps": (dict(routing="none", n_layers=layers), {})}
            mapped += known_depth_runs(s, models, "known-depth-map", size | dict(steps=length))
    return mapped


def chains_runs(s: Settings) -> list[Run]:
    """The models of the known depth on the second task, and a fixed model of three layers."""
    models = known_depth_models(s, CHAINS)
    del models["worth-by-windows"]
    worth, training = models["worth"]
    models["worth-whole-windows"] = (worth | dict(routing="worth-whole-windows"), training)
    models["fixed-between"] = fixed_between(CHAINS["layers"])
    return known_depth_runs(s, models, "chains", CHAINS)


def front_runs(s: Settings) -> list[Run]:
    """Token worth trained for several depths in the setting NARROW, and in a model of three layers; the plan
    with fewer layers; and a fixed model of one layer.

    Fixed models of two layers and more are in `narrow_runs` and in the field.
    """
    made = known_depth_models(s, NARROW)
    model, training = made["worth"]
    models = {f"worth {E:g}": (model | dict(target_depth=E), training) for E in FRONT}
    models |= fewer_layers(made, SHORT_PLANS, SHALLOW)
    models["fixed 1"] = (dict(routing="none", n_layers=1), {})
    return known_depth_runs(s, models, "front", NARROW)


def fewer_layers(made: Changes, plans: Sequence[int], shallow: dict) -> Changes:
    """Of Changes that hold both: the plan whose deep tokens run so many layers, and token worth in a model
    that is `shallow`."""
    (model, training), (plan, _) = made["worth"], made["planted"]
    models = {f"planted {layers}": (plan | dict(options=dict(layers=layers)), {}) for layers in plans}
    return models | {"worth-shallow": (model | shallow, training)}


def rate_runs(s: Settings) -> list[Run]:
    """The main models at twice the learning rate, and at four times: is any of them behind for want of it?

    Those of the setting NARROW, also half of its layers in twice the steps ("rates" and "rates-4"); and half
    of the layers and token worth in the preset's own at twice the rate ("known-depth-rates"). Each seed sees
    the text that it sees there.
    """
    asked, runs = ("fixed-half", "fixed-between", "fixed-deep", "planted", "worth", "mor"), []
    for experiment, times in (("rates", 2), ("rates-4", 4)):
        size = NARROW | dict(lr=times * RATE)
        models = known_depth_models(s, size) | {"fixed-between": fixed_between(size["layers"])}
        runs += also_longer(s, {label: models[label] for label in asked}, experiment, size)
    own = size_of(s) | dict(lr=2 * RATE)
    models = known_depth_models(s, own)
    two = {label: models[label] for label in ("fixed-half", "worth")}
    return runs + known_depth_runs(s, two, "known-depth-rates", own)


def wsd_runs(s: Settings) -> list[Run]:
    """The main models in the setting NARROW_WSD, and half of the layers in twice the steps."""
    models = known_depth_models(s, NARROW_WSD) | {"fixed-between": fixed_between(NARROW["layers"])}
    asked = {label: models[label] for label in models if label not in ("blind", "mor-spread")}
    return also_longer(s, asked, "known-depth-wsd", NARROW_WSD)


def narrow_runs(s: Settings) -> list[Run]:
    """The models of the known depth in the setting NARROW, half of its layers in twice the steps, and:

    fixed-shared: all layers, of two blocks in turn. mor-free: MoR as the sources write it, with recursion and
    no depth that it is held to. mor-spread-warm: "mor-spread", trained as token worth is.
    """
    models = known_depth_models(s, NARROW)
    spread, _ = models["mor-spread"]
    models["fixed-shared"] = (dict(routing="none", shared_blocks=2), {})
    models["mor-free"] = (dict(routing="mor", max_recursions=2), models["mor"][1])
    models["mor-spread-warm"] = (spread, models["worth"][1])
    return also_longer(s, models, "field", NARROW)


def wide_front_runs(s: Settings) -> list[Run]:
    """In the preset's own setting: the plan in four of the six layers, and token worth in a model of four."""
    models = fewer_layers(known_depth_models(s), [WIDE_SHALLOW["n_layers"]], WIDE_SHALLOW)
    return known_depth_runs(s, models, "front-wide")


def four_wide_runs(s: Settings) -> list[Run]:
    """The main models in the setting FOUR_WIDE_WSD."""
    models = known_depth_models(s, FOUR_WIDE_WSD)
    models["fixed-between"] = fixed_between(FOUR_WIDE_WSD["layers"])
    asked = ("fixed-half", "fixed-between", "fixed-deep", "planted", "worth", "worth-by-windows", "mor")
    return known_depth_runs(s, {x: models[x] for x in asked}, "known-depth-4", FOUR_WIDE_WSD)


def deep_runs(s: Settings) -> list[Run]:
    """The same in the setting DEEP."""
    return known_depth_runs(s, known_depth_models(s, DEEP), "known-depth-12", DEEP)


def also_longer(s: Settings, models: Changes, experiment: str, size: dict) -> list[Run]:
    """`known_depth_runs`, and half of the layers in twice the steps."""
    longer, half = size | dict(steps=2 * size["steps"]), {"fixed-half-long": models["fixed-half"]}
    own = known_depth_runs(s, models, experiment, size)
    return own + known_depth_runs(s, half, experiment, longer)
