"""Which models each experiment and study trains, and which pairs it compares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from morlib import ModelConfig, TrainConfig

from .code import code_of
from .settings import PRESETS, RECIPES, Settings, settings

# What each experiment compares: in its notebook, its headline and RESULTS.md. MoR first, then its control.
PAIRS = {
    "exp1": [
        ("mor", "fixed-deep"),
        ("mor", "fixed-at-E"),
        ("mor", "random"),
        ("mor", "frozen"),
        ("mor", "fixed-shared"),
    ],
    "exp2": [
        ("mor-source-protocol", "fixed-shallow"),
        ("mor-equal-epochs", "fixed-shallow"),
        ("mor-equal-compute", "fixed-shallow"),
        ("mor-source-protocol", "fixed-long"),
        ("mor-equal-epochs", "random"),
        ("mor-equal-epochs", "frozen"),
    ],
    "bangla": [
        ("mor-deep", "fixed-deep"),
        ("mor-deep", "fixed-at-E"),
        ("mor-deep", "random-deep"),
        ("mor-deep", "frozen-deep"),
        ("mor-deep", "fixed-shared"),
        ("mor-half", "fixed-shallow"),
        ("mor-half", "random-half"),
        ("mor-half", "frozen-half"),
        ("fixed-at-E", "fixed-deep"),
        ("frozen-deep", "fixed-deep"),
        ("random-deep", "fixed-deep"),
        ("fixed-deep", "fixed-shallow"),
    ],
}
TEXTS = {
    "exp1": dict(name="tinyshakespeare", split="full"),
    "exp2": dict(name="tinyshakespeare", split="halves"),
    "bangla": dict(name="bangla", split="90/10"),
}
# Epochs of models that train long: enough for fixed models to have a lower loss than the best table of counts
EPOCHS = PRESETS["long"]["epochs"]
LONG = {"exp1": EPOCHS, "exp1-thin": EPOCHS, "exp2": EPOCHS, "exp2-thin": EPOCHS, "bangla": 30}
# Narrower models, to which depth is worth more
THIN = {"exp1-thin": dict(d_model=32, d_ff=128), "exp2-thin": dict(d_model=48, d_ff=192)}
# Of each experiment the MoR that matters most, and what its blind control is called
ROUTED = {
    "exp1": ("mor", "random"),
    "exp1-thin": ("mor", "random"),
    "exp2": ("mor-equal-epochs", "random"),
    "exp2-thin": ("mor-equal-epochs", "random"),
    "bangla": ("mor-deep", "random-deep"),
}
# Of token worth, on each task: its router learns as fast as everything else, and all begins at full depth
WORTH_TRAINING = dict(router_lr=2e-3, share_power=0.0, depth_warmup=0.2)
Changes = dict[str, tuple[dict, dict]]  # a model's label to what it changes of ModelConfig and of TrainConfig
FIXED = dict(routing="none", target_depth=None)


@dataclass(frozen=True)
class Run:
    """One training run with its names."""

    experiment: str
    model: str  # the label in tables
    config: ModelConfig  # its vocab_size is left to the corpus
    train: TrainConfig
    corpus: tuple[tuple[str, object], ...]  # the arguments of `texts.load_corpus`
    preset: str
    recipe: str
    device: str | None = None  # as in `pick_device`; not part of a run's identity
    parent: Run | str = ""  # the run whose weights it begins with, trained first if need be; or its id

    @property
    def code(self) -> str:
        """A digest of the policy's code as it is now, if it does not ship."""
        return code_of(self.config.routing)

    def labels(self) -> dict:
        return dict(experiment=self.experiment, model=self.model, preset=self.preset, recipe=self.recipe)

    def __str__(self) -> str:
        return f"{self.experiment} {self.model}, seed {self.train.seed}"


def experiment_runs(s: Settings, experiment: str, corpus: dict, models: Changes) -> list[Run]:
    """One Run per seed and model label."""
    corpus = tuple(sorted((dict(max_chars=s.max_chars, subwords=s.subwords) | corpus).items()))
    return runs_of(s, experiment, corpus, models, s.model(vocab_size=1), s.train())


def runs_of(s: Settings, experiment: str, corpus: tuple, models: Changes, config: ModelConfig,
            train: TrainConfig) -> list[Run]:  # fmt: skip
    """One Run per seed and model label: the configurations with what the label changes of them."""
    return [
        Run(experiment, label, replace(config, **model), replace(train, **{"seed": seed} | training), corpus,
            s.preset, s.recipe, s.device)
        for seed in range(s.seeds) for label, (model, training) in models.items()
    ]  # fmt: skip


def text_of(s: Settings, experiment: str) -> dict:
    """The arguments of `texts.load_corpus` for an experiment: its own text, or the reader's."""
    text = dict(TEXTS[experiment])
    if s.text:
        text["name"] = s.text[0] if len(s.text) == 1 else tuple(s.text)
    return text | (dict(tokenizer=s.tokenizer) if s.tokenizer else {})


def random_controls(records: pd.DataFrame, runs: list[Run], model: str, label: str = "random") -> list[Run]:
    """For each run of a routed model, blind routing at the action rates of its record, layer by layer."""
    own = records[records["model"] == model]["record"]
    rates = {r["seed"]: r["metrics"]["action_rates"] for r in own}
    controls = []
    for run in runs:
        if run.model == model and run.train.seed in rates:
            blind = dict(routing="random", action_rates=rates[run.train.seed], target_depth=None)
            controls.append(replace(run, model=label, config=replace(run.config, **blind)))
    return controls


def exp1_models(s: Settings, target: float | None) -> Changes:
    """Experiment 1: MoR held to an effective depth (None: as it falls out), fixed depth, and controls."""
    N = s.n_layers
    return {
        "fixed-deep": (FIXED, {}),
        "mor": (dict(routing="mor", target_depth=target), {}),
        "fixed-at-E": (FIXED | dict(n_layers=max(round(target or 2 * N / 3), 1)), {}),
        "frozen": (dict(routing="frozen", target_depth=target), {}),
        "fixed-shared": (FIXED | dict(shared_blocks=max(N // 2, 1)), {}),
    }


def exp2_models(s: Settings, target: float) -> Changes:
    """Experiment 2: MoR of N layers at the cost of N/2 in three protocols, and its controls."""
    N, tc = s.n_layers, s.train()
    shallow = FIXED | dict(n_layers=max(N // 2, 1))
    mor = dict(routing="mor", target_depth=target)
    long = dict(epochs=round(tc.epochs * 5 / 3))  # 50 epochs against 30 in the sources
    warmup = tc.depth_warmup / 2 * (N - target)  # mean depth that the warm-up adds, applications a token
    equal = dict(windows=max(int(tc.windows * shallow["n_layers"] / (target + warmup)), tc.batch_size))
    return {
        "fixed-shallow": (shallow, {}),
        "mor-source-protocol": (mor, long),
        "mor-equal-epochs": (mor, {}),
        "mor-equal-compute": (mor, equal),
        "fixed-long": (shallow, long),
        "frozen": (dict(routing="frozen", target_depth=target), {}),
        "fixed-shared": (shallow | dict(shared_blocks=max(N // 4, 1)), {}),
    }


def worth_runs(s: Settings) -> list[Run]:
    """Token worth and blind whole tokens on the text of experiment 2, at half of the layers: exp2-worth.

    With one layer that runs every token, or with five; token worth also taught by windows, and asked twice,
    which makes four depths.
    The settings are those of the task of known depth. Models of one seed see the same text as those of the
    experiment, so they can be compared.
    """
    routed = dict(target_depth=s.n_layers / 2, max_recursions=1)
    policies = ["worth", "worth-by-windows", "blind-tokens", "worth-half-way"]
    if routed["target_depth"] > 5:
        policies += ["worth-above-5", "blind-tokens-above-5"]
    models = {policy: (routed | dict(routing=policy), WORTH_TRAINING) for policy in policies}
    return experiment_runs(s, "exp2-worth", text_of(s, "exp2"), models)


def bangla_models(s: Settings, deep: float | None, half: float | None) -> Changes:
    """Bangla: MoR held to two depths (None: as it falls out), fixed depths, and controls.

    Under the preset "quick" the routed models of half the depth are left out.
    """
    N = s.n_layers
    models = {
        "fixed-deep": (FIXED, {}),
        "mor-deep": (dict(routing="mor", target_depth=deep), {}),
        "fixed-at-E": (FIXED | dict(n_layers=max(round(2 * N / 3), 1)), {}),
        "fixed-shallow": (FIXED | dict(n_layers=max(N // 2, 1)), {}),
        "mor-half": (dict(routing="mor", target_depth=half), {}),
        "frozen-deep": (dict(routing="frozen", target_depth=deep), {}),
        "frozen-half": (dict(routing="frozen", target_depth=half), {}),
        "fixed-shared": (FIXED | dict(shared_blocks=max(N // 2, 1)), {}),
    }
    left_out = ("mor-half", "frozen-half") if s.preset == "quick" else ()
    return {label: changes for label, changes in models.items() if label not in left_out}


def long_runs(s: Settings, experiment: str) -> list[Run]:
    """The main models of an experiment trained long: "exp1-long" for "exp1", with the preset `long`.

    experiment: a key of LONG. With token worth and fixed models of N and N/2 layers; "exp1-thin" also with
    those of `whole_token_models`. Blind routing is added by `long_controls`. Only the seeds and the device of
    s are used.
    """
    kind, changes = experiment.removesuffix("-thin"), THIN.get(experiment, {})
    given = dict(preset="long", epochs=LONG[experiment], seeds=s.seeds, device=s.device)
    long = settings(given | changes)
    N = long.n_layers
    most, half = round(2 * N / 3, 2), N / 2
    targets = {"exp1": (most,), "exp2": (half,), "bangla": (most, half)}[kind]
    models = {"exp1": exp1_models, "exp2": exp2_models, "bangla": bangla_models}[kind](long, *targets)
    worth = dict(routing="worth", target_depth=targets[0], max_recursions=1)
    models |= {"fixed-deep": (FIXED, {}), "fixed-shallow": (FIXED | dict(n_layers=max(N // 2, 1)), {})}
    models |= {"worth": (worth, WORTH_TRAINING)}
    if experiment == "exp1-thin":
        models |= whole_token_models(N, targets[0])
    for label in ("fixed-shared", "mor-equal-compute", "mor-half", "frozen-half"):
        models.pop(label, None)
    return experiment_runs(long, f"{experiment}-long", TEXTS[kind], models)


def whole_token_models(N: int, target: float) -> Changes:
    """Some tokens run all layers, the others half of them: which? Those that token worth learns, those that
    are drawn anew each time, or always those of the same kinds, or at the same positions.

    Token worth has training settings of its own, the lots those of all others.
    """
    always = N // 2
    once = dict(target_depth=target, max_recursions=1)
    lots = once | dict(options=dict(always=always))
    return {
        "worth-above": (once | dict(routing=f"worth-above-{always}"), WORTH_TRAINING),
        "blind-tokens": (lots | dict(routing="blind-tokens"), {}),
        "by-kind": (lots | dict(routing="by-kind"), {}),
        "by-position": (lots | dict(routing="by-position"), {}),
    }


def long_controls(records: pd.DataFrame, runs: list[Run], experiment: str) -> list[Run]:
    """Blind routing at the rates of the MoR of `long_runs`, given its records."""
    return random_controls(records, runs, *ROUTED[experiment])


def depth_worth_runs(s: Settings) -> list[Run]:
    """Fixed models of N and N/2 layers on the text of experiment 1: what depth is worth to them, trained for
    longer than `long_runs` do ("length"), or in other widths and contexts ("sizes").

    Three seeds at most; otherwise the settings of preset `long`. A wider model learns at a rate that falls
    with the root of its width. A longer context has as many tokens a batch and an epoch. Narrower models are
    those of `long_runs(s, "exp1-thin")`.
    """
    own = settings(dict(preset="long"))
    cfg, tc = own.model(vocab_size=1), own.train()
    k = 256 // cfg.max_len
    fewer = {name: getattr(tc, name) // k for name in ("batch_size", "windows", "eval_windows")}
    wide = dict(d_model=128, d_ff=512, lr=tc.lr * (cfg.d_model / 128) ** 0.5)
    return [
        *fixed_pair(s, "length", "30 epochs", dict(epochs=30)),
        *fixed_pair(s, "length", "60 epochs", dict(epochs=60)),
        *fixed_pair(s, "sizes", "width 128", wide),
        *fixed_pair(s, "sizes", "context 256", dict(max_len=256) | fewer),
    ]


def fixed_pair(s: Settings, experiment: str, named: str, changes: dict) -> list[Run]:
    """Fixed models of N/2 and N layers on the text of experiment 1, with the preset `long` and changes."""
    long = settings(dict(preset="long", seeds=min(s.seeds, 3), device=s.device) | changes)
    N = long.n_layers
    models = {f"fixed {n}, {named}": (FIXED | dict(n_layers=n), {}) for n in (N // 2, N)}
    return experiment_runs(long, experiment, TEXTS["exp1"], models)


def vocabulary_runs(s: Settings, vocabularies: list[str]) -> list[Run]:
    """A fixed model of half the layers on Bangla in each vocabulary, with at most three seeds.

    vocabularies: "characters", or a number of pieces as in "4000-pieces".
    """
    N = s.n_layers
    shallow = FIXED | dict(n_layers=max(N // 2, 1))
    few = replace(s, seeds=min(s.seeds, 3))  # many pieces train slowly
    runs = []
    for name in vocabularies:
        cut = dict(tokenizer="char") if name == "characters" else dict(subwords=int(name.split("-")[0]))
        runs += experiment_runs(few, "vocabulary", TEXTS["bangla"] | cut, {name: (shallow, {})})
    return runs


def study_runs(s: Settings, study: str, target: float | None) -> list[Run]:
    """The runs of a study on the text of experiment 1. target: the effective depth of the routed models.

    A study has its own number of seeds, and may have its own recipe.
    """
    models, seeds, recipe = STUDIES[study]
    recipe = recipe or s.recipe
    changed = replace(s, seeds=seeds, recipe=recipe, values=s.values | RECIPES[recipe])
    return experiment_runs(changed, study, text_of(s, "exp1"), models(s, target))


def front_controls(records: pd.DataFrame, runs: list[Run]) -> list[Run]:
    """Blind routing at the rates of each MoR of the front that skips anything: "random 8" for "mor 8"."""
    routed = {run.model: run.config for run in runs if run.config.routing == "mor"}
    depths = [name.split()[1] for name, config in routed.items() if config.target_depth < config.n_layers]
    return [control for k in depths for control in random_controls(records, runs, f"mor {k}", f"random {k}")]


def front_models(s: Settings, target: float | None) -> Changes:
    """The front: fixed depths from a quarter of the layers on, and MoR held to the same depths."""
    N = s.n_layers
    depths = range(max(N // 4, 1), N + 1)
    fixed = {f"fixed {k}": (FIXED | dict(n_layers=k), {}) for k in depths}
    return fixed | {f"mor {k}": (dict(routing="mor", target_depth=float(k)), {}) for k in depths}


def estimator_models(s: Settings, target: float | None) -> Changes:
    """How the router learns: one change at a time from the setting in use."""
    N = s.n_layers
    mor = dict(routing="mor", target_depth=target)
    return {
        "scaled (in use)": (mor, {}),
        "gumbel": (mor | dict(estimator="gumbel"), {}),
        "gradient cut": (mor | dict(estimator="cut"), {}),
        "scaled, fast router": (mor, dict(router_lr=s.train().lr)),
        "scaled, one rate for all blocks": (mor, dict(share_power=0.0)),
        "scaled, budget spread": (mor | dict(capacity=target / N if target else 0.5), {}),
        "scaled, warm-up from full depth": (mor, dict(depth_warmup=0.3)),
    }


def recursion_models(s: Settings, target: float | None) -> Changes:
    """What recursing buys: one, two and three applications a layer at most."""
    return {f"R = {R}": (dict(routing="mor", target_depth=target, max_recursions=R), {}) for R in (1, 2, 3)}


def collapse_models(s: Settings, target: float | None) -> Changes:
    """Do routers collapse: two thirds and half of the layers, many seeds."""
    N = s.n_layers
    return {f"mor {k}": (dict(routing="mor", target_depth=float(k)), {}) for k in (2 * N // 3, N // 2)}


def source_models(s: Settings, target: float | None) -> Changes:
    """What happened in the sources: their recipe as published, then one thing mended at a time.

    In MoR recursing is mended first, and the others on top of it.
    """
    N = s.n_layers
    cut = dict(routing="mor", target_depth=None, estimator="cut")
    return {
        f"fixed {N}": (FIXED, {}),
        f"fixed {N // 2}": (FIXED | dict(n_layers=max(N // 2, 1)), {}),
        "mor, as published": (cut | dict(max_recursions=1), {}),
        "mor, per sample": (cut | dict(max_recursions=1, granularity="sample"), {}),
        "mor, recursing mended": (cut, {}),
        "mor, gradient mended": (cut | dict(estimator="gumbel"), {}),
        "mor, warm-up mended": (cut, dict(warmup=0.1)),
        "mor, norm mended": (cut | dict(norm="pre"), {}),
        f"fixed {N}, warm-up mended": (FIXED, dict(warmup=0.1)),
        f"fixed {N}, norm mended": (FIXED | dict(norm="pre"), {}),
    }


# Of each study: its models, its seeds, and its recipe (None: the notebook's)
STUDIES = {
    "pareto": (front_models, 3, None),
    "estimators": (estimator_models, 3, None),
    "recursions": (recursion_models, 3, None),
    "collapse": (collapse_models, 10, None),
    "sources": (source_models, 3, "source"),
}
