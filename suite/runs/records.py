"""A run as one JSON record: what identifies it, how it is made, read and put into a table."""

from __future__ import annotations

import copy
import json
import math
import platform
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import morlib
from morlib import ModelConfig, Router, TrainConfig, Training, Transformer

from ..files import REFERENCE, sha256
from .checkpoint import Best

STRICT = ("long", "paper")  # presets that train long enough to be held to the best table of counts
POINT = ("loss", "accuracy", "effective_depth", "bits_per_byte")  # what is kept of a point of a training
FOLLOWED = 64  # windows that the measure of a followed budget reads at a time
# The fields that were there when the stored records were made. One that came later is left out of a run's
# identity as long as it has its default, so that what ships is still found.
FIRST_FIELDS = {
    ModelConfig: "vocab_size n_layers d_model n_heads d_ff max_len dropout norm routing max_recursions "
    "shared_blocks granularity target_depth action_rates capacity recurse_share estimator temperature "
    "scaled_init",
    TrainConfig: "epochs windows batch_size lr router_lr share_power weight_decay warmup schedule clip "
    "fresh_windows penalty depth_warmup evaluations eval_windows heldout_windows seed",
}

LATER = {f.name: f.default for kind, first in FIRST_FIELDS.items() for f in fields(kind)
         if f.name not in first.split()}  # fmt: skip


def identifying(cfg: ModelConfig | TrainConfig) -> dict:
    """The fields of a configuration that identify a run."""
    first = FIRST_FIELDS[type(cfg)].split()
    return {k: v for k, v in asdict(cfg).items() if k in first or v != getattr(type(cfg), k)}


def run_id(
    cfg: ModelConfig, tc: TrainConfig, corpus, code: str = "", parent: str = "", preset: str = "cpu"
) -> str:
    """What makes a run the same run, as 12 hexadecimal digits.

    Both configurations, the text and how it was cut, morlib's version, the code of a policy that does not
    ship (see `code_of`), the run that it goes on from, and whether it is judged as presets that train long.
    """
    data = {k: v for k, v in corpus.describe().items() if k != "source"}
    what = [identifying(cfg), identifying(tc), data, morlib.__version__]
    further = dict(code=code, parent=parent, judged="best" if preset in STRICT else "")
    what += [{name: value} for name, value in further.items() if value]
    return sha256(json.dumps(what, sort_keys=True).encode())[:12]


def evaluate_following(model: Transformer, corpus, part: str = "heldout", windows: int | None = None,
                       follow: int = FOLLOWED) -> dict:  # fmt: skip
    """`morlib.evaluate` with a budget that follows the text: so E is held on text that differs.

    `follow` windows are read at a time, then the biases are set on these before the next are read. For the
    first the model's own serve. Nothing is looked at ahead, and the model keeps its biases.
    """
    model, parts = copy.deepcopy(model), []
    pieces = corpus.windows(part, model.cfg.max_len, windows).split(follow)
    for i, piece in enumerate(pieces):
        if i:
            morlib.calibrate(model, pieces[i - 1][:, :-1])
        parts.append(morlib.score(model, piece))
    per_byte = corpus.tokens_per_byte(part) if hasattr(corpus, "tokens_per_byte") else None
    return morlib.metrics(morlib.joined(parts), per_byte)


def gate(floors: dict, preset: str) -> float:
    """The loss (nats a held-out token) under which a model has learnt: that of a table of pairs, or of the
    best table of counts under a preset that trains long."""
    losses = {order: parts["heldout"]["loss"] for order, parts in floors.items()}
    return min(losses.values()) if preset in STRICT else losses["2"]


def settle(training: Training, best: Best | None, preset: str) -> tuple[dict, dict]:
    """Choose the point of a training that its record is about: the last one, or under a preset that trains
    long the one where validation loss was lowest; its weights are then the model's.

    Returns its held-out metrics, and `last` and `best`, the main ones of both points. `best` is left out
    where its weights are not known.
    """

    def heldout(model: Transformer) -> dict:
        return morlib.evaluate(model, training.corpus, "heldout", training.tc.heldout_windows)

    def point(metrics: dict, step: int) -> dict:
        return dict(step=step) | {name: metrics[name] for name in POINT}

    metrics = heldout(training.model)
    points = dict(last=point(metrics, training.history[-1]["step"]))
    if best is None or (best.before(training) and not best.weights):
        return metrics, points
    if not best.before(training):
        return metrics, points | dict(best=points["last"])
    model = training.model if preset in STRICT else copy.deepcopy(training.model)
    model.load_state_dict(best.weights)
    morlib.calibrate_on_validation(model, training.corpus, 512)
    lowest = heldout(model)
    points |= dict(best=point(lowest, best.point["step"]))
    return lowest if preset in STRICT else metrics, points


def measured(training: Training, metrics: dict, preset: str) -> dict:
    """All metrics of a finished training, given those on held-out text: also sampled, followed, and what it
    cost."""
    model, corpus, tc, cfg = training.model, training.corpus, training.tc, training.model.cfg
    likeliest = isinstance(model.policy, Router) and cfg.estimator == "scaled"
    if cfg.routing == "none" or likeliest:
        sampled = metrics  # in training they act as in inference
    else:
        sampled = morlib.evaluate(model, corpus, "heldout", tc.heldout_windows, sampling=True)
    also = dict(sampled=sampled)
    if model.policy.holds_budget:
        also["followed"] = evaluate_following(model, corpus, "heldout", tc.heldout_windows)
    short = {name: {k: m[k] for k in ("loss", "accuracy", "effective_depth")} for name, m in also.items()}
    return metrics | short | dict(
        train_seconds=training.seconds,
        train_accuracy=morlib.evaluate(model, corpus, "train", tc.eval_windows)["accuracy"],
        train_applications=int(training.applications),
        parameters=sum(p.numel() for p in model.parameters()),
        did_train=metrics["loss"] < gate(corpus.floors, preset),
    )  # fmt: skip


def record_of(training: Training, where: str, best: Best | None = None, preset: str = "cpu") -> dict:
    """The record of a finished training, without its names. where: the device, in words.

    best: kept while it trained; without it the record is of the last point. See `settle`.
    """
    metrics, points = settle(training, best, preset)
    core = sha256(Path(morlib.__file__).read_bytes())[:8]
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    return dict(
        seed=training.tc.seed,
        config=dict(model=asdict(training.model.cfg), train=asdict(training.tc)),
        data=training.corpus.describe(),
        versions=versions | dict(morlib=f"{morlib.__version__}+{core}"),
        device=where,
        metrics=measured(training, metrics, preset) | points,
        floors=training.corpus.floors,
        history=training.history,
    )


NEEDED = "experiment model recipe preset seed config data metrics floors history".split()


def read_record(path: Path) -> dict:
    """A stored record. Raises ValueError that names a file which is not a whole one."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if missing := [k for k in NEEDED if k not in record]:
            raise ValueError(f"it has no {', '.join(missing)}")
        if not all(math.isfinite(record["metrics"][k]) for k in ("loss", "accuracy", "effective_depth")):
            raise ValueError("its metrics are not finite")
        return record
    except (ValueError, KeyError, TypeError) as error:
        advice = "delete it to do the run again, or put the whole file back"
        raise ValueError(f"record {path.name} is refused ({error}): {advice}") from None


def table_of(records: list[dict]) -> pd.DataFrame:
    """One row a record: its names, its metrics, and the record itself."""
    names = ("experiment", "model", "recipe", "preset", "seed")
    rows = []
    for r in records:
        rows.append({k: r[k] for k in names} | {"data": r["data"]["name"]} | r["metrics"] | {"record": r})
    return pd.DataFrame(rows)


def stored_records(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """The records of an experiment in a folder, by default those that ship with the suite."""
    paths = sorted((folder or REFERENCE).glob(f"{experiment}_*.json"))
    return table_of([read_record(path) for path in paths])


def check_one_kind(records: pd.DataFrame) -> None:
    """Raises ValueError that names what differs if records must not be averaged or compared."""
    kinds = {name: records[name].unique() for name in ("experiment", "preset", "recipe") if name in records}
    if "record" in records:
        texts = [r["data"] for r in records["record"]]
        kinds["text"] = {f"{d['name']} {d['split']} {d['sha256'][:8]}" for d in texts}
        kinds["last step"] = {f"stopped at {r['stopped_at']}" if "stopped_at" in r else "whole"
                              for r in records["record"]}  # fmt: skip
        kinds["morlib version"] = {r["versions"]["morlib"].split("+")[0] for r in records["record"]}
        for model, group in records.groupby("model"):
            configs = [LATER | r["config"]["model"] | r["config"]["train"] for r in group["record"]]
            names = dict.fromkeys(name for config in configs for name in config)
            for name in [name for name in names if name not in ("seed", "action_rates")]:
                kinds[f"{name} of {model}"] = {str(config.get(name, "absent")) for config in configs}
    if mixed := {name: sorted(map(str, values)) for name, values in kinds.items() if len(values) > 1}:
        listed = "; ".join(f"{name}: {', '.join(values)}" for name, values in mixed.items())
        advice = "take those of one kind, for instance records[records['preset'] == 'quick']"
        raise ValueError(f"these records are of different kinds ({listed}): {advice}")
    count = records.groupby(["model", "seed"]).size()
    if twice := [f"seed {seed} of {model}" for (model, seed), n in count.items() if n > 1]:
        advice = "records.drop_duplicates(['model', 'seed']) keeps one of each"
        raise ValueError(f"{', '.join(twice)} occurs more than once: {advice}")
