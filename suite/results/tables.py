"""Tables and sentences from records: what is measured of each model, and what a comparison shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import morlib
from morlib import ModelConfig, depth_budget

from ..files import REFERENCE, read_rows, write_rows
from ..runs import Run, check_one_kind
from .stats import by_equality_alone, compare, different, equal, interval, new_seed_range

BEATS = "beats its table"  # of a row: whether every seed has the loss that its preset asks for
WORDS = "no one two three four five six seven eight nine ten eleven twelve".split()
SHARES = {1 / 2: "half", 1 / 3: "a third", 1 / 4: "a quarter", 2 / 3: "two thirds", 3 / 4: "three quarters"}
# What the labels of the experiments mean, in the order of tables. n: layers, k: blocks, E: effective depth
NAMES = {
    "mor": "MoR",
    "mor-deep": "MoR at depth {E:.0f}",
    "mor-half": "MoR at depth {E:.0f}",
    "mor-equal-epochs": "MoR (equal epochs)",
    "mor-equal-compute": "MoR (equal computation)",
    "mor-source-protocol": "MoR trained longer",
    "worth": "token worth",
    "worth-above": "token worth for a third",
    "blind-tokens": "blind, whole tokens",
    "by-position": "by position",
    "by-kind": "by kind of token",
    "by-kind-sees-all": "by kind, all keys seen",
    "told": "told where depth pays",
    "told-sees-all": "told, all keys seen",
    "fixed-deep": "{n} layers",
    "fixed-at-E": "{n} layers",
    "fixed-shallow": "{n} layers",
    "fixed-long": "{n} layers trained longer",
    "fixed-shared": "{n} layers of {k} blocks",
    "frozen": "untrained router",
    "frozen-deep": "untrained router at depth {E:.0f}",
    "frozen-half": "untrained router at depth {E:.0f}",
    "random": "blind routing",
    "random-deep": "blind routing at depth {E:.0f}",
    "random-half": "blind routing at depth {E:.0f}",
}
FRONT_KINDS = {"fixed": "fixed depth", "mor": "MoR", "random": "blind routing"}


# ---- Words and numbers ----


class Text(str):
    """Markdown that a notebook renders and a terminal prints as it is."""

    def _repr_markdown_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as JSON, a line a row; `stored_table` reads it."""
    write_rows(path, table.to_dict("records"))


def stored_table(name: str, folder: Path = REFERENCE) -> pd.DataFrame:
    """A table that ships, by its file's name; without rows where it does not."""
    return pd.DataFrame(read_rows(folder / name))


def count(n: int) -> str:
    """A small number in words: 6 is six."""
    return WORDS[n] if 0 <= n < len(WORDS) else f"{n:,}"


def in_seeds(n: int) -> str:
    """So many seeds in words: one seed, three seeds."""
    return f"{count(n)} seed{'' if n == 1 else 's'}"


def share_words(share: float) -> str:
    """A share in words where it is close to a simple one: 0.329 is a third, 0.41 is 41 %."""
    near = min(SHARES, key=lambda simple: abs(simple - share))
    return SHARES[near] if abs(near - share) < 0.02 else f"{100 * share:.0f} %"


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign, a real minus."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def span(low: float, high: float, digits: int = 2) -> str:
    """From low to high; nothing where there is no interval."""
    return "" if math.isnan(low) else f"{signed(low, digits)} to {signed(high, digits)}"


def with_interval(values: Iterable[float], digits: int = 2) -> str:
    """Mean and 95 % interval over seeds, or the bare mean where there is no interval."""
    mean, low, high = interval(list(values))
    if math.isnan(low):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def by_model(records: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Each model's records: MoR, fixed models and controls in the order of NAMES, then all others."""
    groups = dict(list(records.groupby("model", sort=False)))
    return [(label, groups[label]) for label in sorted(groups, key=place_of)]


def place_of(label: str) -> int:
    return list(NAMES).index(label) if label in NAMES else len(NAMES)


def plain_names(records: pd.DataFrame) -> dict[str, str]:
    """The models of some records in words, by label. A label that is not an experiment's stays as it is."""
    names = {}
    for label, group in by_model(records):
        config = group["record"].iloc[0]["config"]["model"]
        n, k, E = config["n_layers"], config["shared_blocks"], group["effective_depth"].mean()
        names[label] = NAMES.get(label, "{label}").format(n=n, k=k, E=E, label=label)
    return names


def layers_by_model(records: pd.DataFrame) -> dict[str, int]:
    """How many layers the models of some records have, by label."""
    found = zip(records.get("model", ()), records.get("record", ()))
    return {label: record["config"]["model"]["n_layers"] for label, record in found}


def as_texts(column: pd.Series) -> pd.Series:
    """A column as text; its numbers with as many decimals as the longest of them has, with minus signs."""
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        return column.map(str)
    whole = not pd.api.types.is_float_dtype(column)
    digits = 0 if whole else max((len(repr(float(x)).partition(".")[2]) for x in column), default=0)
    return column.map(lambda value: f"{value:.{digits}f}".replace("-", "\u2212"))


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown, the index first, unless it only counts the rows."""
    numbered = isinstance(table.index, pd.RangeIndex)
    head = [*table.columns] if numbered else [table.index.name or "", *table.columns]
    texts = table.apply(as_texts)
    rows = [head, ["---"] * len(head), *texts.itertuples(index=not numbered)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


# ---- Experiments ----


def models_table(runs: Sequence[Run]) -> pd.DataFrame:
    """What is trained, one row a model: layers, blocks, who runs a layer, the depth asked for, epochs."""
    rows = {}
    for run in runs:
        cfg, tc = run.config, run.train
        depth = cfg.target_depth if cfg.routing in ("mor", "frozen") else cfg.n_layers
        rows[run.model] = {
            "layers": cfg.n_layers,
            "blocks": cfg.shared_blocks or cfg.n_layers,
            "a layer runs": who_runs(cfg),
            "depth asked": "as it falls out" if depth is None else f"{depth:g}",
            "epochs": tc.epochs,
            "windows an epoch": tc.windows,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def who_runs(cfg: ModelConfig) -> str:
    """Who runs a layer: every token, or whom a policy chooses; for a held depth, in how many layers which."""
    if cfg.routing == "none":
        return "every token"
    who = dict(mor="the router's choice", frozen="an untrained router's choice")
    chosen = who.get(cfg.routing, "a blind choice")
    if cfg.target_depth is None or cfg.routing not in who:
        return chosen
    everyone = sum(spent == (1.0, 0.0) for spent in depth_budget(cfg))
    return f"every token in {everyone}, {chosen} in {cfg.n_layers - everyone}" if everyone else chosen


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """One row a model: means over seeds with 95 % intervals, where a further seed is expected (95 %), and
    whether every seed has the loss that its preset asks for (`runs.records.gate`).

    Raises ValueError if records must not be averaged.
    """
    check_one_kind(records)
    rows = {}
    for model, group in by_model(records):
        further = "{:.1f} to {:.1f}".format(*new_seed_range(group["accuracy"])) if len(group) > 2 else ""
        sampled = np.mean([metrics["effective_depth"] for metrics in group["sampled"]])
        rows[model] = {
            "seeds": len(group),
            "accuracy (%)": with_interval(group["accuracy"]),
            "a new seed (%)": further,
            "loss (nats)": with_interval(group["loss"], 3),
            "bits per byte": f"{group['bits_per_byte'].mean():.3f}",
            "E": with_interval(group["effective_depth"]),
            "E sampled": f"{sampled:.2f}",
            "training (s)": f"{group['train_seconds'].mean():.1f}",
            "applications (M)": f"{group['train_applications'].mean() / 1e6:.1f}",
            BEATS: "yes" if group["did_train"].all() else "no",
        }
    return pd.DataFrame(rows).T.rename_axis("model")


def possible(records: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of which both models have records. Raises ValueError if none has."""
    found = [pair for pair in pairs if set(pair) <= set(records["model"])]
    if not found:
        named = ", ".join(f"{a} and {b}" for a, b in pairs)
        raise ValueError(f"no pair has records of both its models: {named}")
    return found


def comparisons(
    records: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    metric: str = "accuracy",
    margin: float | None = None,
) -> pd.DataFrame:
    """Each pair's `compare`, a row a pair: the difference a minus b with all that the claim rests on. Beside
    accuracy stands what the losses show (`loss_words`).

    Raises ValueError if no pair has records of both models.
    """
    digits = 2 if metric in ("accuracy", "effective_depth") else 4
    rows = []
    for a, b in possible(records, pairs):
        c = compare(records, a, b, metric, margin)
        rows.append({
            "model": a, "minus": b, "pairs": c["pairs"], "difference": signed(c["mean"], digits),
            "95 % interval": span(c["low"], c["high"], digits),
            "90 % interval": span(c["low90"], c["high90"], digits),
            "sign-flip p": short(c["p"]), "p of equality": short(c["p_equivalent"]), "claim": c["claim"],
        })  # fmt: skip
        if metric == "accuracy":
            rows[-1]["loss (nats)"] = loss_words(records, a, b)
    return pd.DataFrame(rows).set_index("model")


def loss_words(records: pd.DataFrame, a: str, b: str) -> str:
    """Model a's held-out loss minus that of b in nats, with its 95 % interval, and what this shows, if so."""
    c, worse = compare_loss(records, a, b)
    told = signed(c["mean"], 4)
    if within := span(c["low"], c["high"], 4):
        told += f" ({within})"
    return f"{told}, {worse}" if worse else told


def compare_loss(records: pd.DataFrame, a: str, b: str) -> tuple[dict, str]:
    """`compare` in held-out loss (nats), and what it shows of model a: "better", "worse", or nothing."""
    c = compare(records, a, b, "loss")
    shown = different(c) and not c["claim"].startswith("none")
    return c, ("worse" if c["mean"] > 0 else "better") if shown else ""


def short(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.3f}"


def differences(records: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Each pair's difference in held-out accuracy for a forest plot, with its 95 % interval.

    Raises ValueError if no pair has records of both models.
    """
    names = plain_names(records)
    rows = []
    for a, b in possible(records, pairs):
        c = compare(records, a, b)
        numbers = {name: c[name] for name in ("mean", "low", "high")}
        rows.append(dict(model=a, against=f"{names[a]} \u2212 {names[b]}") | numbers)
    return pd.DataFrame(rows)


def verdicts(records: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Five columns for a reader: against what, difference in points of accuracy, its interval, verdict, and
    `loss_words`.

    Raises ValueError if no pair has records of both models.
    """
    names, pairs = plain_names(records), possible(records, pairs)
    several = len({a for a, _ in pairs}) > 1
    rows = []
    for a, b in pairs:
        c = compare(records, a, b)
        against = f"{names[a]} against {names[b]}" if several else f"{names[b]} ({b})"
        told = deciding_interval(c), verdict_words(c), loss_words(records, a, b)
        rows.append([against, signed(c["mean"]), *told])
    columns = ["against", "difference (points)", "interval", "verdict", "loss (nats)"]
    return pd.DataFrame(rows, columns=columns).set_index("against")


def deciding_interval(c: dict) -> str:
    """The interval that a claim rests on: the 90 % one for equality alone, else the 95 % one.

    Both, where there is a difference within the margin that the 95 % interval alone does not show.
    """
    if math.isnan(c["low"]):
        return ""
    wide, narrow = f"{span(c['low'], c['high'])} (95 %)", f"{span(c['low90'], c['high90'])} (90 %)"
    if not equal(c):
        return wide
    if by_equality_alone(c):
        return narrow
    enough = -c["margin"] < c["low"] and c["high"] < c["margin"]
    return wide if enough else f"{wide}; {narrow}"


def verdict_words(c: dict) -> str:
    """A comparison's claim for a reader who has the table of `verdicts` alone."""
    margin = {0.5: "half a point", 1: "a point"}.get(c["margin"], f"{c['margin']:g}")
    if c["claim"].startswith("none: "):
        return c["claim"].removeprefix("none: ")
    if different(c):
        better = "better" if c["mean"] > 0 else "worse"
        return f"{better}, by less than {margin}" if equal(c) else better
    undecided = "undecided" in c["claim"]
    if equal(c):
        return f"{'undecided, yet ' if undecided else ''}equal within {margin}"
    return "undecided: two tests disagree" if undecided else "no difference shown"


def front_table(front: pd.DataFrame) -> pd.DataFrame:
    """Mean E, loss and accuracy by kind and asked depth, of models that are named "kind depth" ("mor 8")."""
    named = front["model"].str.split(expand=True)
    by_kind = front.assign(kind=named[0], asked=named[1].astype(int)).groupby(["kind", "asked"])
    return by_kind[["effective_depth", "loss", "accuracy"]].mean()


def front_lines(front: pd.DataFrame) -> list[str]:
    """What the front says: where MoR has the lower loss, what depth itself is worth, how well E was held."""
    loss = front_table(front)["loss"].unstack("kind")
    fixed = loss["fixed"].dropna()
    most = fixed.index.max()  # held to all its layers MoR is the fixed model, and says nothing
    lines = []
    for other in ("fixed", "random"):
        both = loss.loc[loss.index < most, ["mor", other]].dropna()
        gap = both["mor"] - both[other]
        lower = f"lower held-out loss at {(gap < 0).sum()} of {len(gap)} depths"
        lines.append(f"MoR against {FRONT_KINDS[other]}: {lower}; on average {signed(gap.mean(), 4)} nats")
    best = f"{fixed.min():.4f} ({fixed.idxmin()} layers)"
    worst = f"{fixed.max():.4f} ({fixed.idxmax()} layers)"
    lines.append(f"fixed depth: losses from {best} to {worst}")
    mor = front[front["model"].str.startswith("mor ")]
    return lines + held_lines(mor[mor["model"].str.split().str[1].astype(float) < most])


def held_lines(mor: pd.DataFrame) -> list[str]:
    """How well models that are named "mor depth" hold it on held-out text, a line a way of holding."""
    asked = mor["model"].str.split().str[1].astype(float)
    ways = {"the thresholds that validation text set": mor["effective_depth"]}
    if "followed" in mor and mor["followed"].notna().all():
        followed = mor["followed"].map(lambda metrics: metrics["effective_depth"])
        ways["thresholds that follow the text read so far"] = followed
    lines = []
    for way, E in ways.items():
        off = (E - asked).abs()
        close = f"within 0.1 of its target in {(off <= 0.1).sum()} of {len(off)} runs"
        lines.append(f"E on held-out text with {way}: {close}, {off.max():.2f} from it at most")
    return lines


def by_validation(records: pd.DataFrame) -> pd.DataFrame:
    """One row a model, the best first: loss and accuracy on validation text at the end of training, E on
    held-out text by argmax and sampled, and the loss that sampling costs (nats).

    From three seeds on also where the validation loss of a further one is expected (95 %).
    """
    records = records.reset_index(drop=True)  # the tables below are counted from 0
    last = pd.DataFrame([record["history"][-1] for record in records["record"]])
    sampled = pd.DataFrame(list(records["sampled"]))
    table = pd.DataFrame({
        "model": records["model"],
        "validation loss": last["val_loss"],
        "validation accuracy (%)": last["val_accuracy"],
        "E": records["effective_depth"],
        "E sampled": sampled["effective_depth"],
        "loss sampled - argmax": sampled["loss"] - records["loss"],
    })  # fmt: skip
    grouped = table.groupby("model", sort=False)
    means = grouped.mean().assign(seeds=grouped.size())
    further = [new_seed_range(losses) for _, losses in grouped["validation loss"]]
    if not all(math.isnan(low) for low, _ in further):
        words = ["" if math.isnan(low) else f"{low:.3f} to {high:.3f}" for low, high in further]
        means.insert(1, "a new seed", words)
    digits = {"validation loss": 4, "validation accuracy (%)": 2, "E": 2, "E sampled": 2}
    return means.sort_values("validation loss").round(digits | {"loss sampled - argmax": 4})


def collapse_table(records: pd.DataFrame) -> pd.DataFrame:
    """Whether routers took one action for every held-out token, one row a model.

    Over all seeds: the range of E, and of E with thresholds that follow the text
    (`runs.evaluate_following`); of the layers that the budget gives a choice how many there are, how many
    collapsed, and the share of each action in them (%).
    """
    rows = []
    for model, record, E in zip(records["model"], records["record"], records["effective_depth"]):
        budget = morlib.depth_budget(morlib.ModelConfig(**record["config"]["model"]))
        choice = [spend != (1.0, 0.0) for spend in budget]
        first = np.asarray(record["metrics"]["action_rates"])[choice, 0]  # [layers with a choice, 3]
        followed = record["metrics"].get("followed", {}).get("effective_depth", math.nan)
        collapsed = int((first.max(-1, initial=0) == 1).sum())
        row = dict(model=model, E=E, followed=followed, choice=len(first), collapsed=collapsed)
        rows.append(row | dict(zip(morlib.ACTIONS, 100 * first.mean(0))))
    grouped = pd.DataFrame(rows).groupby("model", sort=False)
    actions = {f"{action} (%)": grouped[action].mean().round(1) for action in morlib.ACTIONS}
    return pd.DataFrame({
        "seeds": grouped.size(),
        "E": grouped["E"].agg(range_words),
        "E, followed": grouped["followed"].agg(range_words),
        "layers with a choice": grouped["choice"].mean(),
        "of them collapsed, all seeds": grouped["collapsed"].sum(),
        **actions,
    })  # fmt: skip


def range_words(values: pd.Series) -> str:
    return "" if values.isna().any() else f"{values.min():.2f} to {values.max():.2f}"


def bits_by_vocabulary(records: pd.DataFrame) -> pd.DataFrame:
    """Held-out bits per byte by vocabulary, small first: tables of pairs and triples, and the model."""
    rows = {}
    for name, group in sorted(records.groupby("model"), key=lambda item: pieces_of(item[0])):
        record = group["record"].iloc[0]
        bits = record["metrics"]["bits_per_byte"] / record["metrics"]["loss"]  # of a nat a token
        floors = {f"{n}-gram table": bits * floor["heldout"]["loss"] for n, floor in record["floors"].items()}
        own = group["bits_per_byte"]
        model = dict(model=own.mean(), lowest=own.min(), highest=own.max(), seeds=len(own))
        rows[name] = floors | model
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("vocabulary")


def pieces_of(vocabulary: str) -> int:
    """How many pieces a vocabulary has by its name, 0 for characters."""
    return 0 if vocabulary == "characters" else int(vocabulary.split("-")[0])
