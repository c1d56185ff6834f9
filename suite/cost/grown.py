"""What the records of `growth` say: sentences, a figure, and an estimate of what more needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ..results import save_figure, show
from ..runs import settings
from .figures import growth_curves
from .growth import AXES, DECODING, TRAINING, V
from .speed import about, speed_records
from .timing import break_even


def growth_records(folder: Path | None = None) -> list[dict]:
    """The records of whole sweeps in a folder, by default those that ship."""
    return speed_records(folder, "growth")


def table_of(record: dict) -> pd.DataFrame:
    """The points: kind, axis, value, E; seconds a token fixed, routed, ideal; the ratio, low, high."""
    table = pd.DataFrame(record["points"])
    table[["low", "high"]] = table["quartiles"].tolist()
    table["ideal"] = table["fixed"] * table["E"] / record["sweep"]["layers"]
    order = {name: i for i, name in enumerate((TRAINING, DECODING, *AXES))}
    return table.sort_values(["kind", "axis", "value"], key=lambda column: column.replace(order))


def pays(points: pd.DataFrame) -> str:
    """Where routing breaks even, in words: where the upper quartile of the ratio is below 1."""
    faster = points[points["high"] < 1]["value"]
    if len(faster) in (0, len(points)):
        return "everywhere" if len(faster) else "nowhere"
    first = points[points["value"] >= faster.min()]
    if len(first) == len(faster):
        return f"from {faster.min():g} on"
    return "at " + ", ".join(f"{value:g}" for value in faster)


def findings(record: dict) -> list[str]:
    """A sentence for each kind and axis: what routing saves, and where it breaks even, with quartiles."""
    lines, layers = [], record["sweep"]["layers"]
    for (kind, axis), points in table_of(record).groupby(["kind", "axis"], sort=False):
        first, last = points.iloc[0], points.iloc[-1]
        if axis == "depth":
            if len(points) > 1:
                fixed = points["fixed"].median()
                rate = break_even(points["E"].tolist(), points["routed"].tolist(), fixed, layers)
                even = "at no depth" if np.isnan(rate) else f"from {100 * rate:.0f} % of the work skipped on"
                lines.append(f"{kind}, against depth: by a line through the points, routing pays {even}.")
            continue
        times = " and ".join(
            f"{p['measured']:.2f} ({p['low']:.2f} to {p['high']:.2f}) at {p['value']:g}"
            for p in (first, last)
        )
        ideal = f"where its depth is {first['E'] / layers:.2f} of it"
        lines.append(f"{kind}, {axis} {first['value']:g} to {last['value']:g}: routing takes {times} of the "
                     f"fixed model's time, {ideal}; it pays {pays(points)}.")  # fmt: skip
    turns = table_of(record)["repeats"]
    many = f"{turns.min()} to {turns.max()} turns"
    return [*lines, f"In brackets are the quartiles over {many}. It pays where the upper one is below 1."]


# ---- What more would need: an estimate ----

BYTES = 16  # a parameter, its gradient and two moments, float32


def seconds_a_token(record: dict, width: float, column: str) -> float:
    """Of a training step at a width, on a line between the measured ones, both scales logarithmic.

    Beyond the widest, the line through the last two goes on.
    """
    table = table_of(record)
    points = table[(table["kind"] == TRAINING) & (table["axis"] == "width")]
    x, y = np.log(points["value"].to_numpy(float)), np.log(points[column].to_numpy())
    if np.log(width) <= x[-1]:
        return float(np.exp(np.interp(np.log(width), x, y)))
    return float(np.exp(y[-1] + (y[-1] - y[-2]) / (x[-1] - x[-2]) * (np.log(width) - x[-1])))


def estimate(record: dict, runs: int = 10_000, larger: int = 100) -> pd.DataFrame:
    """Core hours of many runs at experiment 1's size, and of a model with so many times its parameters.

    Parameters grow with the square of the width. `training_tokens` says how long a run is.
    """
    width, tokens = settings(dict(preset="cpu")).model(vocab_size=V).d_model, training_tokens()
    wide, rows = width * larger**0.5, {}
    cases = {
        f"{runs:,} runs at experiment 1's size": (width, tokens * runs),
        f"a model {larger} times larger, as many tokens": (wide, tokens),
        f"the same, {larger} times the tokens": (wide, tokens * larger),
    }
    for name, (w, read) in cases.items():
        parameters = 12 * record["sweep"]["layers"] * w**2
        seconds = {c: read * seconds_a_token(record, w, c) for c in ("fixed", "routed")}
        hours = {c: record["threads"] * spent / 3600 for c, spent in seconds.items()}
        rows[name] = {
            "width": f"{w:.0f}",
            "parameters": f"{parameters / 1e6:.1f} million",
            "tokens": f"{read / 1e9:.3g} billion" if read >= 1e9 else f"{read / 1e6:.3g} million",
            "core hours, fixed": f"{hours['fixed']:,.3g}",
            "core hours, blind routing": f"{hours['routed']:,.3g}",
            "GB of weights, gradients, moments": f"{BYTES * parameters / 1e9:.2f}",
        }
    return pd.DataFrame(rows).T.rename_axis("what")


def training_tokens() -> int:
    """Tokens that one training of the preset cpu reads."""
    tc, cfg = settings(dict(preset="cpu")).train(), settings(dict(preset="cpu")).model(vocab_size=V)
    return tc.epochs * (tc.windows // tc.batch_size) * tc.batch_size * cfg.max_len


def basis(record: dict) -> str:
    """What the estimate rests on."""
    sweep = record["sweep"]
    measured = (
        f"training steps of {sweep['base_batch']} windows at the widths {', '.join(map(str, sweep['width']))}"
    )
    return (
        f"An estimate, not a measurement. Its basis: seconds a token of {measured} ({about(record)}), along "
        f"straight lines on logarithmic scales. A run reads {training_tokens() / 1e6:.2f} million tokens, as "
        f"at the preset cpu. Tokens usually grow with the parameters (Hoffmann et al. 2022): the "
        f"last row. Routing is blind at E = {sweep['layers'] / 2:g}; a router and "
        f"evaluations come on top."
    )


def show_growth(folder: Path | None = None) -> None:
    """Show what stored sweeps say: the curves, a sentence an axis, and the estimate with its basis."""
    records = growth_records(folder)
    if not records:
        print(
            "No stored record of how cost grows ships with this copy: `make bench BENCH=--growth` makes one."
        )
    for record in records:
        save_figure(growth_curves(table_of(record)), "06_growth")
        print("\n".join(findings(record)))
        show("What more would need, estimated from these curves", estimate(record), basis(record))
