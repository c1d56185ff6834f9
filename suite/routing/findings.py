"""The whole analysis of routing as one JSON file: made where models are trained, shown by notebook 05.

A Subject is a text with what was found on it. Its tables come from the findings that ship, or are made
here from trained models (its Material) when they are first asked for, and then kept by `save`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import morlib

from .. import runs
from ..files import REFERENCE, outputs, write_whole
from ..results.stats import interval, rank_correlation, spearman, variance_explained
from . import difficulty, interventions, textpage

FILE = "routing_findings.json"
PAGE = "routing_text.html"
TEXTS = {"tinyshakespeare": runs.TEXTS["exp1"], "bangla": runs.TEXTS["bangla"]}
NAMES = {
    "tinyshakespeare": "Tiny Shakespeare",
    "bangla-wikipedia": "Bangla Wikipedia",
    "bangla-sample": "Bangla (the small sample)",
}
REFERENCE_SEED = 1000  # of the model that says what is hard: no router has its initial weights
SAMPLE = {"smoke": 100, "quick": 300, "cpu": 300}  # held-out windows that are analysed; else 500
TRIES = {"smoke": 16, "quick": 64, "cpu": 64}  # places at which the oracle tries; else 200
WATCHED = 3  # seeds that are trained once more and looked at on the way
PASSAGE = 600  # characters of held-out text that are shown token by token
OWN_TEXT = 3_000  # characters of a reader's own text that are shown: about a page


@dataclass
class Material:
    """What a text's findings are made from."""

    corpus: object
    reference: morlib.Transformer  # fixed depth: it says what is hard
    models: dict[tuple[str, int], morlib.Transformer]  # by label and seed
    records: pd.DataFrame
    runs: list[runs.Run]
    windows: Tensor  # [n, L + 1]
    known: dict[str, np.ndarray]  # the measures [n, L], see `difficulty.places`
    scores: dict[tuple[str, int], dict[str, Tensor]]  # what `morlib.score` gives of each model
    tries: int


@dataclass
class Subject:
    """A text with what was found on it."""

    text: str  # a key of TEXTS
    about: dict  # data, config, meter_seed (of the reference model), runs
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    passage: dict | None = None  # see `textpage.section`
    material: Material | None = None  # None: the findings ship, the weights do not

    @property
    def name(self) -> str:
        return NAMES.get(self.about["data"]["name"], self.about["data"]["name"])

    def needs(self) -> Material:
        """Raises ValueError where only the stored findings are there."""
        if self.material is None:
            raise ValueError("this needs trained models, and weights do not ship: choose another preset")
        return self.material


# ---- Which texts, models and places ----


def checked(s: runs.Settings, texts, sample, own_text) -> tuple[list[str], int | None, str]:
    """The parameters of notebook 05 alone, as they were meant: one text as a list, digits as text.

    Raises ValueError if the notebook cannot do what they ask.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if s.text:  # a text of the reader's own in place of ours
        texts = list(s.text)
    own_text = "" if own_text is None else str(own_text)
    if not texts or not (s.text or set(texts) <= set(TEXTS)):
        raise ValueError(f"texts must be a list of one or more of {', '.join(TEXTS)}, not {texts!r}")
    if s.text and len(names := {Path(text).stem for text in texts}) < len(texts):
        raise ValueError(f"the texts share a name ({', '.join(sorted(names))}): rename one of them")
    if len(own_text) == 1:
        raise ValueError("own_text needs two characters or more: the first is only read")
    if sample is not None and sample < 10:
        raise ValueError(f"sample must be 10 windows or more, not {sample}")
    if s.stored and (own_text or sample or s.text):
        raise ValueError("text, own_text and sample need weights, which do not ship: choose another preset")
    return texts, sample, own_text


def subjects(
    s: runs.Settings, texts: list[str], sample: int | None = None, target_depth: float | None = None
) -> list[Subject]:
    """The texts to be analysed. Under the preset "stored" from the findings that ship, else models are
    trained.

    sample: held-out windows of each text, None: as the preset says. target_depth: of the routers, None:
    two thirds of the layers, as in experiment 1. Raises ValueError if the stored findings are of other
    settings.
    """
    if target_depth is None and s.recipe == "sound":  # the sources hold no budget, only a penalty
        target_depth = round(2 * s.n_layers / 3, 2)
    if s.stored:
        stored = {subject.text: subject for subject in stored_subjects()}
        for text in texts:
            check_settings(s, stored[text], target_depth)
        return [stored[text] for text in texts]
    return [trained_subject(s, text, sample or SAMPLE.get(s.preset, 500), target_depth) for text in texts]


def check_settings(s: runs.Settings, subject: Subject, target_depth: float | None) -> None:
    """Raises ValueError that names what differs if stored findings are not of these settings."""
    V = subject.about["config"]["model"]["vocab_size"]
    asked = vars(s.model(vocab_size=V, routing="mor", target_depth=target_depth)) | vars(s.train())
    asked |= dict(max_chars=s.max_chars)
    found = subject.about["config"]["model"] | subject.about["config"]["train"] | dict(max_chars=None)
    differs = [name for name, value in found.items() if name != "seed" and asked[name] != value]
    if differs:
        raise ValueError(f"the findings that ship have another {', '.join(differs)}: choose another preset")


def trained_subject(s: runs.Settings, text: str, windows: int, target_depth: float | None) -> Subject:
    """A text with its trained router (mor), an untrained one under the same budget (frozen), blind
    routing at the trained one's rates (random), and the reference model. Finished runs are found, not
    trained again."""
    models = {name: (dict(routing=name, target_depth=target_depth), {}) for name in ("mor", "frozen")}
    own = dict(name=text, split="full") | (dict(tokenizer=s.tokenizer) if s.tokenizer else {})
    routed = runs.experiment_runs(s, f"routing-{Path(text).stem}", TEXTS.get(text, own), models)
    fixed = replace(routed[0].config, routing="none", target_depth=None)
    seed = replace(routed[0].train, seed=REFERENCE_SEED)
    reference_run = replace(routed[0], model="reference", config=fixed, train=seed)
    table = runs.run_all([*routed, reference_run], s.jobs)
    blind = runs.random_controls(table, routed, "mor")
    tables = [table[:-1], runs.run_all(blind, s.jobs), table[-1:]]  # the reference model last
    records = pd.concat(tables, ignore_index=True)
    reference, _, corpus = runs.trained_model(reference_run)
    trained = {(run.model, run.train.seed): runs.trained_model(run)[0] for run in routed + blind}
    at, known = difficulty.places(corpus, reference, windows)
    scores = {key: morlib.score(model, at) for key, model in trained.items()}
    tries = TRIES.get(s.preset, 200)
    material = Material(corpus, reference, trained, records, routed, at, known, scores, tries)
    return Subject(text, about_of(records), material=material)


def about_of(records: pd.DataFrame) -> dict:
    """What findings say of a text's runs."""
    first = records[records["model"] == "mor"]["record"].iloc[0]
    ids = sorted(record["id"] for record in records["record"])
    return dict(data=first["data"], config=first["config"], meter_seed=REFERENCE_SEED, runs=ids)


# ---- What is found ----


def gathered(name: str, first: bool = False) -> Callable:
    """Decorates what makes a table of one subject: then it takes a list of them, and gives one table.

    Their names are in its column `text`; what a subject does not have is made and kept as `name`.
    first: of the first subject alone.
    """

    def decorate(make: Callable[[Subject], pd.DataFrame]) -> Callable[[list[Subject]], pd.DataFrame]:
        @functools.wraps(make)
        def table_of(subjects: list[Subject]) -> pd.DataFrame:
            subjects = subjects[:1] if first else subjects
            for subject in subjects:
                if name not in subject.tables:
                    subject.needs()
                    subject.tables[name] = make(subject)
            tables = [subject.tables[name].assign(text=subject.name) for subject in subjects]
            table = pd.concat(tables, ignore_index=True)
            return table[["text", *(column for column in table if column != "text")]]

        return table_of

    return decorate


@gathered("models")
def models(subject: Subject) -> pd.DataFrame:
    """Held-out loss, accuracy and depth of each model and seed, and whether it trained."""
    columns = ["model", "seed", "loss", "accuracy", "effective_depth", "did_train"]
    return subject.material.records[columns]


@gathered("rates")
def rates(subject: Subject) -> pd.DataFrame:
    """`difficulty.rates` of each model and seed by groups of each measure; `middle` is the mean of a group's
    values."""
    known, tables = subject.material.known, []
    for measure in difficulty.MEASURES:
        values, named = known[measure], measure == "kind"
        group = values if named else difficulty.groups(values.astype(float))
        middle = pd.Series(values.flatten()).groupby(group.flatten()).agg("first" if named else "mean")
        for (model, seed), score in subject.material.scores.items():
            names = dict(middle=middle, measure=measure, model=model, seed=seed)
            table = difficulty.rates(score["actions"], group).assign(**names)
            tables.append(table.drop(index=-1, errors="ignore").rename_axis("group").reset_index())
    return pd.concat(tables, ignore_index=True)


@gathered("correlations")
def correlations(subject: Subject) -> pd.DataFrame:
    """Rank correlation `r` of depth with each difficulty under each control, for each model and seed,
    with its 95 % interval over windows, `low` to `high`."""
    rows, known = [], subject.material.known
    factors = difficulty.controls(known)
    for (model, seed), score in subject.material.scores.items():
        depth = score["depth"].numpy().astype(float)
        for measure in difficulty.DIFFICULTY:
            for control, given in factors.items():
                r, low, high = rank_correlation(depth, known[measure], given)
                names = dict(model=model, seed=seed, measure=measure, control=control)
                rows.append(names | dict(r=r, low=low, high=high))
    return pd.DataFrame(rows)


def verdicts(subjects: list[Subject]) -> pd.DataFrame:
    """The correlations that the answer is taken from, one row a measure, model and seed: see
    `difficulty.answer`."""
    table = correlations(subjects)
    table = table[table["measure"].isin(["surprisal", "entropy"])]
    keys = ["text", "measure", "model", "seed"]
    wide = table.pivot(index=keys, columns="control", values="r").reset_index()
    order = {subject.name: place for place, subject in enumerate(subjects)}
    return wide.sort_values("text", key=lambda text: text.map(order), kind="stable").rename_axis(columns=None)


@gathered("variance")
def variance(subject: Subject) -> pd.DataFrame:
    """Shares (%) of the variance of single decisions that the layer explains, then the position in each
    layer, then the token read in each layer, for each model and seed; and the same two shares of a
    place's depth."""
    known, rows = subject.material.known, []
    for (model, seed), score in subject.material.scores.items():
        ran = interventions.applications(score["actions"]).numpy()  # [N, n, L]
        layer, L = np.arange(len(ran))[:, None, None], ran.shape[-1]
        factors = dict(layer=layer, position=layer * L + known["position"])
        factors["token read"] = layer * subject.material.corpus.vocab_size + known["token"]
        of_depth = {"position": known["position"], "token read": known["token"]}
        shares = variance_explained(score["depth"].numpy(), of_depth)
        row = dict(model=model, seed=seed) | variance_explained(ran, factors)
        rows.append(row | {f"{name} (of depth)": shares[name] for name in of_depth})
    return pd.DataFrame(rows)


@gathered("interventions")
def changes(subject: Subject) -> pd.DataFrame:
    """What overruling the trained and the untrained router does: see `interventions.interventions`."""
    material, tables = subject.material, []
    for (model, seed), routed in material.models.items():
        if model != "random":
            hard = material.known["entropy"]
            table = interventions.interventions(routed, material.windows, hard, seed)
            tables.append(table.assign(model=model, seed=seed))
    return pd.concat(tables, ignore_index=True)


@gathered("oracle")
def oracles(subject: Subject) -> pd.DataFrame:
    """What the best single decisions would be worth to each trained router: see `interventions.oracle`."""
    material, rows = subject.material, []
    for (model, seed), routed in material.models.items():
        if model == "mor":
            args = material.windows, material.reference, material.tries, seed
            rows.append(dict(seed=seed) | interventions.oracle(routed, *args))
    return pd.DataFrame(rows)


@gathered("layers")
def layers(subject: Subject) -> pd.DataFrame:
    """First decisions of each layer of each trained router on held-out text (%): skip, forward, recurse."""
    tables, records = [], subject.material.records
    for record in records[records["model"] == "mor"]["record"]:
        first = 100 * np.asarray(record["metrics"]["action_rates"])[:, 0]  # [N, 3]
        table = pd.DataFrame(first, columns=list(morlib.ACTIONS))
        table.insert(0, "layer", np.arange(1, len(first) + 1))
        table.insert(0, "seed", record["seed"])
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@gathered("formation", first=True)
def formation(subject: Subject) -> pd.DataFrame:
    """When depth by entropy forms: the first text's first routers are trained once more, and at each
    point of the learning curve there is `rates` by tenth of entropy, and the rank correlation `r` of
    depth with entropy."""
    watched = [run for run in subject.material.runs if run.model == "mor"][:WATCHED]
    return pd.concat([watch(subject.material, run) for run in watched], ignore_index=True)


def watch(material: Material, run: runs.Run) -> pd.DataFrame:
    """Train a run again and look at it on the way. The looks are kept beside the records."""
    kept = outputs() / "formation" / f"{runs.run(run)['id']}-{len(material.windows)}.csv"
    if kept.is_file():
        return pd.read_csv(kept)
    entropy = material.known["entropy"]
    tenth, looks = difficulty.groups(entropy.astype(float)), []

    def look(training):
        if training.step in training.points:
            score = morlib.score(training.model, material.windows)
            table = difficulty.rates(score["actions"], tenth)
            r = spearman(score["depth"], entropy)
            looks.append(table.assign(step=training.step, r=r, seed=run.train.seed))

    device, dtype, _ = runs.pick_device(run.device)
    torch.manual_seed(run.train.seed)
    config = replace(run.config, vocab_size=material.corpus.vocab_size)
    model = morlib.Transformer(config).to(device)
    morlib.train(model, material.corpus, run.train, dtype=dtype, after_step=look)
    table = pd.concat(looks).reset_index()
    write_whole(kept, table.to_csv(index=False).encode())
    return table


# ---- Texts that are shown token by token ----


def passages(subjects: list[Subject]) -> list[dict]:
    """A held-out passage of each text as the first seed's router reads it: see `textpage.section`."""
    for subject in subjects:
        if subject.passage is None:
            text = cut(subject.needs().corpus.text["heldout"], PASSAGE)
            subject.passage = section(subject, text, f"{subject.name}: held-out text")
    return [subject.passage for subject in subjects]


def cut(text: str, characters: int) -> str:
    """A passage that begins with a line's end, where enough of the text follows one, and ends with a word."""
    breaks = (text.find("\n\n"), text.find("\n"))
    enough = min(characters, len(text) // 2)
    start = next((at for at in breaks if 0 <= at <= len(text) - enough), 0)
    passage = text[start : start + characters]
    end = max(passage.rfind(" "), passage.rfind("\n"))
    return passage[:end] if end > 0 else passage


def section(subject: Subject, text: str, title: str) -> dict:
    """A text as the page shows it, read by the first seed's router."""
    material = subject.needs()
    first = material.records[(material.records["model"] == "mor")]["record"].iloc[0]
    N, metrics = first["config"]["model"]["n_layers"], first["metrics"]
    about = f"MoR of {N} layers, effective depth {metrics['effective_depth']:.2f}, "
    about += (
        f"held-out loss {metrics['loss']:.2f} nats a token, preset {first['preset']}, seed {first['seed']}."
    )
    lang = "bn" if subject.text == "bangla" else "en"
    model, codec = material.models["mor", first["seed"]], material.corpus.tokenizer
    return textpage.section(title, about, lang, model, material.reference, codec, text)


def own_passage(subjects: list[Subject], text: str) -> dict:
    """A reader's own text, at most a page of it, read by the router of its script. Says what was left
    out."""
    letters = [c for c in text if c.isalpha()]
    mostly_bangla = 2 * sum("\u0980" <= c <= "\u09ff" for c in letters) > len(letters)
    by_text = {subject.text: subject for subject in subjects}
    subject = by_text["bangla"] if mostly_bangla and "bangla" in by_text else subjects[0]
    passage, codec = text[:OWN_TEXT], subject.needs().corpus.tokenizer
    if len(text) > OWN_TEXT:
        print(f"own_text has {len(text):,} characters: the first {OWN_TEXT:,}, about a page, are shown")
    if codec.kind == "char" and (unknown := sorted(set(passage) - set(codec.stoi))):
        print(f"left out, as the model has no token for them: {' '.join(unknown)}")
        passage = "".join(c for c in passage if c in codec.stoi)
    return section(subject, passage, "Your text")


# ---- One file ----


TABLES = ("models", "correlations", "rates", "variance", "interventions", "oracle", "layers", "formation")


def save_page(passages: list[dict]) -> Path:
    """Write the page of coloured texts into outputs/routing_text.html."""
    return write_whole(outputs() / PAGE, textpage.page(passages).encode())


def save(subjects: list[Subject], s: runs.Settings) -> Path:
    """Write what was found on trained models into outputs/routing_findings.json."""
    first = subjects[0].needs().records["record"].iloc[0]
    made = dict(
        preset=s.preset, recipe=s.recipe, seeds=s.seeds, device=first["device"], versions=first["versions"]
    )
    made |= dict(places=len(subjects[0].material.windows))
    made["texts"] = {subject.text: as_json(subject) for subject in subjects}
    text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
    return write_whole(outputs() / FILE, text.encode())


def as_json(subject: Subject) -> dict:
    """A subject as plain lists, each table by column."""
    tables = {name: subject.tables[name] for name in TABLES if name in subject.tables}
    tables["verdict"] = verdicts([subject]).drop(columns="text")
    result = subject.about | {name: columns_of(table) for name, table in tables.items()}
    return result | dict(passage=subject.passage and rounded(subject.passage))


def rounded(passage: dict) -> dict:
    """A passage, numbers with four decimals."""
    return passage | {name: [round(v, 4) for v in passage[name]] for name in ("surprisal", "probability")}


def columns_of(table: pd.DataFrame) -> dict[str, list]:
    """A table's columns as lists, numbers with four decimals."""
    to_list = dict(orient="values", double_precision=4)
    return {column: json.loads(values.to_json(**to_list)) for column, values in table.items()}


def stored_findings(path: Path = REFERENCE / FILE) -> dict | None:
    """The findings that ship, or None where none do."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def stored_subjects(path: Path = REFERENCE / FILE) -> list[Subject]:
    """The subjects of the findings that ship. Raises ValueError where none do."""
    made = stored_findings(path)
    if made is None:
        raise ValueError("no findings ship with this copy: choose another preset to make some")
    result = []
    for text, found in made["texts"].items():
        about = {name: found[name] for name in ("data", "config", "meter_seed", "runs")}
        tables = {name: pd.DataFrame(found[name]) for name in TABLES if name in found}
        result.append(Subject(text, about, tables, found.get("passage")))
    return result


# ---- Over seeds ----


def over_seeds(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Mean over seeds and its 95 % interval in each group of a table: columns `mean`, `low`, `high`,
    index `by`.

    With fewer than three seeds the mean interval over windows, where the table has one.
    """
    groups = table.groupby(by, sort=False)
    found = groups[value].apply(interval)
    result = pd.DataFrame(found.tolist(), found.index, ["mean", "low", "high"])
    if {"low", "high"} <= set(table):
        result = result.fillna(groups[["low", "high"]].mean())
    return result
