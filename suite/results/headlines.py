"""The first thing a reader sees of an experiment: one sentence, five columns, one picture."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from ..runs import PAIRS, stored_records
from ..runs.experiments import ROUTED, THIN
from .figures import accuracy_against_depth
from .stats import LEAST_SEEDS, compare, different, equal, judged
from .tables import (
    Text,
    compare_loss,
    count,
    in_seeds,
    layers_by_model,
    markdown,
    share_words,
    signed,
    span,
    verdicts,
)

TEXT_NAMES = {
    "exp1": "Tiny Shakespeare",
    "exp1-thin": f"Tiny Shakespeare, at width {THIN['exp1-thin']['d_model']}",
    "exp2": "half of Tiny Shakespeare",
    "exp2-thin": f"half of Tiny Shakespeare, at width {THIN['exp2-thin']['d_model']}",
    "bangla": "Bangla Wikipedia",
}
SOURCES_MOR = "mor-source-protocol"  # of experiment 2: trains for longer than the fixed layers
AHEAD = {"better": "better", "equal": "no better", "worse": "no better", "open": "not shown to be better"}
HOW_TO_READ = (
    "*Equal within half a point*: the 90 % interval lies between \u22120.5 and +0.5. *Better* or *worse*: "
    "the 95 % interval leaves out zero, and a test without assumptions about the spread of seeds "
    "(sign-flip) agrees. *Loss*: the difference with its 95 % interval; lower is better, and *better* or "
    "*worse* stands where the same two tests show it."
)


def headline(experiment: str, folder: Path | None = None) -> None:
    """Show an experiment's answer from stored records, by default those that ship with the suite.

    experiment: "exp1", "exp2" or "bangla".
    """
    records = stored_records(experiment, folder)
    if records.empty:
        print(f"No stored record of {experiment} ships with this copy: run the notebook to make some.")
        return
    answer = sentence(experiment, records) + early_sentence(experiment, records, folder)
    answer += trained_longer(experiment, records, folder)
    show(answer, verdicts(records, PAIRS[experiment]), origin(records))
    picture(experiment, records)


def show(answer: str, table: pd.DataFrame, note: str) -> None:
    """Display one sentence, a small table, and a note on where the numbers come from and how to read them."""
    display(Text(f"**{answer}**\n\n{markdown(table)}\n\n{note}"))


def origin(records: pd.DataFrame) -> str:
    """Where the numbers come from, and how the verdicts are decided."""
    first = records.iloc[0]
    model = first["record"]["config"]["model"]
    seeds, text = records["seed"].nunique(), first["data"]
    return (
        f"Points of held-out accuracy on {text}, models of width {model['d_model']}, {seeds} seeds, preset "
        f"{first['preset']}, recipe {first['recipe']}. {HOW_TO_READ}"
    )


def picture(experiment: str, records: pd.DataFrame) -> Figure:
    """The one figure that shows an experiment's answer."""
    if experiment == "exp2":
        return accuracy_against_depth(records, "fixed-shallow", cost="train_applications")
    return accuracy_against_depth(records, "fixed-deep")


def sentence(experiment: str, records: pd.DataFrame) -> str:
    """An experiment's answer in one plain sentence, in which the records decide the words."""
    if experiment == "exp2":
        return equal_cost_sentence(records)
    return efficiency_sentence(records, "mor-deep" if experiment == "bangla" else "mor")


def rivals(experiment: str) -> tuple[str, str]:
    """Of an experiment, the MoR that its answer is about, and the fixed model that it is held to."""
    return ROUTED[experiment][0], "fixed-shallow" if experiment == "exp2" else "fixed-deep"


def longer(experiment: str, folder: Path | None = None) -> dict | None:
    """How these two compare where they train long, or None without such records."""
    long = stored_records(f"{experiment}-long", folder)
    return (
        compare(long, *rivals(experiment)) if set(rivals(experiment)) <= set(long.get("model", ())) else None
    )


def protocol_sentence(records: pd.DataFrame) -> str:
    """Of experiment 2, what the protocol of the sources shows: MoR that trains longer than fixed layers, and
    the same against layers that train as long; nothing without records of these."""
    if not {SOURCES_MOR, "fixed-shallow", "fixed-long"} <= set(records.get("model", ())):
        return ""
    fixed = "fixed-shallow", "fixed-long"
    shorter, as_long = (compare(records, SOURCES_MOR, label)["mean"] for label in fixed)
    layers = f"{count(layers_by_model(records)['fixed-shallow'])} fixed layers"
    return (
        f"MoR that trains longer, as in the thesis and the paper: {signed(shorter)} points against {layers}; "
        f"{signed(as_long)} points against as many that train as long."
    )


def epochs_of(records: pd.DataFrame, model: str) -> int:
    """For how many epochs a model of some records trained."""
    return records[records["model"] == model].iloc[0]["record"]["config"]["train"]["epochs"]


def trained_longer(experiment: str, records: pd.DataFrame, folder: Path | None = None) -> str:
    """What becomes of an answer when the models train long, where such records ship; else nothing."""
    c, long = longer(experiment, folder), stored_records(f"{experiment}-long", folder)
    if c is None:
        return ""
    routed, other = rivals(experiment)
    config = long[long["model"] == other].iloc[0]["record"]["config"]
    layers = count(config["model"]["n_layers"])
    after, before = (epochs_of(table, routed) for table in (long, records))
    if c["pairs"] < LEAST_SEEDS:
        gap = f"{abs(c['mean']):.2f} points {'above' if c['mean'] > 0 else 'below'} {layers} layers"
        return f" After {after} epochs {seeds_so_far(c['pairs'])} ship, too few to say: MoR is {gap} there."
    stands = as_words(c, f"{layers} {'fixed ' if experiment == 'exp2' else ''}layers")
    seeds, apart = seeds_so_far(c["pairs"]), loss_apart(long, routed, other)
    return f" After {after} epochs in place of {before}, MoR is {stands} ({numbers(c)}; {seeds}){apart}."


def early_sentence(experiment: str, records: pd.DataFrame, folder: Path | None = None) -> str:
    """How a fixed model of some records stands to counting, where that has a lower loss, or guesses right
    more often: then they say little of depth."""
    order, counts, own = against_counting(experiment, records, folder)
    config, loss, right = own["record"].iloc[0]["config"], own["loss"].mean(), own["accuracy"].mean()
    trained = f"{count(config['model']['n_layers'])} layers after {config['train']['epochs']} epochs"
    told = []
    if counts["loss"] < loss:
        told.append(f"has a lower loss ({counts['loss']:.3f} against {loss:.3f} nats)")
    if counts["accuracy"] > right:
        told.append(f"guesses right more often ({counts['accuracy']:.1f} against {right:.1f} %)")
    early = f" It is early training: counting {order}-grams {' and '.join(told)} than {trained}."
    return early if told else ""


def early_line(experiments: dict[str, pd.DataFrame]) -> str:
    """In one sentence, for which of several experiments counting guesses right more often than their fixed
    models; nothing where it never does.

    experiments: the records of each.
    """
    told, epochs = [], set()
    for experiment, records in experiments.items():
        _, counts, own = against_counting(experiment, records)
        if counts["accuracy"] > own["accuracy"].mean():
            shares = f"{counts['accuracy']:.1f} against {own['accuracy'].mean():.1f} %"
            told.append(f"on {TEXT_NAMES[experiment]} {shares}")
            epochs |= {r["config"]["train"]["epochs"] for r in own["record"]}
    if not told:
        return ""
    trained = " and ".join(map(str, sorted(epochs)))
    return (
        f"After {trained} epochs a table that counts which characters or pieces follow each other guesses "
        f"right more often than a fixed model: {', '.join(told)}."
    )


def against_counting(
    experiment: str, records: pd.DataFrame, folder: Path | None = None
) -> tuple[str, dict, pd.DataFrame]:
    """The best table of counts of an experiment's text, its order, loss and accuracy, and the fixed model's
    records to hold it to. Records of long training know more tables of the same text."""
    long = stored_records(f"{experiment}-long", folder)
    label = next(label for label in ("fixed-deep", "fixed-shallow") if label in set(records["model"]))
    return *best_count(long if len(long) else records), records[records["model"] == label]


def best_count(records: pd.DataFrame) -> tuple[str, dict]:
    """The table of counts with the lowest held-out loss on a record's text: its order, loss and accuracy."""
    floors = records.iloc[0]["record"]["floors"]
    order = min(floors, key=lambda order: floors[order]["heldout"]["loss"])
    return order, floors[order]["heldout"]


def less_computation(depth: pd.Series, routed: str) -> str:
    """What a model saves of the applications of all layers, in words; depth: E of each model."""
    saved = share_words(1 - depth[routed] / depth["fixed-deep"])
    return "half the computation" if saved == "half" else f"{saved} less computation"


def efficiency_sentence(records: pd.DataFrame, routed: str) -> str:
    """MoR against all layers, and against as many layers as it runs."""
    depth = records.groupby("model")["effective_depth"].mean()
    deep, shallow = compare(records, routed, "fixed-deep"), compare(records, routed, "fixed-at-E")
    less = less_computation(depth, routed)
    ahead = AHEAD[judged(shallow)]
    layers, as_cheap = count(round(depth["fixed-deep"])), count(round(depth["fixed-at-E"]))
    stands, seeds = as_words(deep, f"{layers} layers"), in_seeds(deep["pairs"])
    in_loss = loss_apart(records, routed, "fixed-at-E")
    return (
        f"With {less}, MoR is {stands} ({numbers(deep)}; {seeds}), and {ahead} than {as_cheap} fixed layers, "
        f"which apply blocks as often ({numbers(shallow)}){in_loss}."
    )


def equal_cost_sentence(records: pd.DataFrame) -> str:
    """MoR against a fixed model of equal cost, and what longer training does to both."""
    depth = records.groupby("model")["effective_depth"].mean()
    equal_epochs = compare(records, "mor-equal-epochs", "fixed-shallow")
    published = compare(records, "mor-source-protocol", "fixed-shallow")
    as_long = compare(records, "mor-source-protocol", "fixed-long")
    layers, seeds = count(round(depth["fixed-shallow"])), in_seeds(equal_epochs["pairs"])
    ahead = AHEAD[judged(equal_epochs)]
    first = (
        f"At equal cost MoR is {ahead} than {layers} fixed layers ({numbers(equal_epochs)}; {seeds})"
        f"{loss_apart(records, 'mor-equal-epochs', 'fixed-shallow')}"
    )
    stands = as_words(as_long, f"{layers} layers that train as long")
    stands = f"{'and' if judged(as_long) == 'better' else 'but'} is {stands}"
    more = published["mean"]
    gains = f"gains {signed(more)}" if more > 0 else f"loses {-more:.2f}"
    return (
        f"{first}. Trained for longer than these, as the thesis and the paper do, it {gains} "
        f"points on them, {stands} ({numbers(as_long)})"
        f"{loss_apart(records, 'mor-source-protocol', 'fixed-long')}."
    )


def loss_apart(records: pd.DataFrame, a: str, b: str) -> str:
    """How model a stands to b in held-out loss, where that shows a difference and accuracy does not."""
    loss, worse = compare_loss(records, a, b)
    if not worse or different(compare(records, a, b)):
        return ""
    apart = f"{signed(loss['mean'], 4)} nats, 95 % interval {span(loss['low'], loss['high'], 4)}"
    return f", {'and' if worse == 'worse' else 'but'} in loss {worse} ({apart})"


def seeds_so_far(n: int) -> str:
    """How many seeds there are, of those that a claim needs."""
    return count(n) + (" seeds" if n >= LEAST_SEEDS else f" of {count(LEAST_SEEDS)} seeds")


def as_words(comparison: dict, other: str) -> str:
    """How a model stands to another, as the claim allows to say it."""
    if different(comparison):
        more = "more" if comparison["mean"] > 0 else "less"
        little = "a little " if equal(comparison) else ""
        return f"{little}{more} accurate than {other}"
    if equal(comparison):
        return f"as accurate as {other}, within half a point"
    return f"not shown to differ from {other}"


def numbers(comparison: dict) -> str:
    """The difference in points with the interval that the words rest on."""
    difference = f"{signed(comparison['mean'])} points"
    if pd.isna(comparison["low"]):
        return difference
    if equal(comparison) and not different(comparison):
        return f"{difference}, 90 % interval {span(comparison['low90'], comparison['high90'])}"
    return f"{difference}, 95 % interval {span(comparison['low'], comparison['high'])}"
