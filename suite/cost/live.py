"""What notebook 06 measures on the reader's machine: tables by name, and the record of them that ships."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from morlib import Transformer

from ..files import REFERENCE, outputs, write_whole
from ..runs.settings import Settings
from .speed import about, kind_of, machine, speed_records
from .timing import decoding, forward_pass, in_turn, training_step

Table = pd.DataFrame | str  # words where it could not be measured


class Measured:
    """Tables by name: each is measured when it is first asked for. Under the preset `stored` nothing is
    measured: they are those of the record that ships.

    dtype: of autocast in training steps. how: what else the measurements depend on, kept in the record.
    Raises FileNotFoundError under `stored` where no record ships, ValueError where its models are others.
    """

    def __init__(
        self, settings: Settings, dtype: torch.dtype = torch.float32, folder: Path = REFERENCE, **how
    ):
        self.stored = settings.stored
        self.tables: dict[str, Table] = {}
        if self.stored:
            self.record = stored_record(folder, made_from(settings))
            self.tables = {name: _unpacked(packed) for name, packed in self.record["tables"].items()}
        else:
            own = dict(preset=settings.preset, dtype=str(dtype).removeprefix("torch."), how=how)
            self.record = machine(settings.device) | own | dict(made_from=made_from(settings))

    def __call__(self, name: str, measure: Callable[[], Table]) -> Table:
        """The table of this name. Raises KeyError where it is not in the record that ships."""
        if self.stored and name not in self.tables:
            raise KeyError(f"the stored record has no table {name!r}, only {', '.join(self.tables)}")
        if name not in self.tables:
            self.tables[name] = measure()
        return self.tables[name]

    def about(self) -> str:
        """Where the tables come from, in a sentence."""
        source = "The stored record" if self.stored else "Measured now"
        how = "".join(f", {name} {value}" for name, value in self.record["how"].items())
        return f"{source}: preset {self.record['preset']}{how}; {about(self.record)}."

    def save(self) -> str:
        """Keep all tables as one file in the outputs, with what they were measured on; its name."""
        tables = {name: _packed(table) for name, table in self.tables.items()}
        path = outputs() / f"deployment_{self.record['preset']}.json"
        return write_whole(path, json.dumps(self.record | dict(tables=tables), indent=1).encode()).name


def made_from(settings: Settings) -> dict:
    """What the measured models are made from, as a record holds it."""
    text = dict(max_chars=settings.max_chars, text=settings.text, tokenizer=settings.tokenizer)
    made = dict(model=vars(settings.model(vocab_size=1)), train=vars(settings.train()), text=text)
    return json.loads(json.dumps(made))


def stored_record(folder: Path, made: dict) -> dict:
    """The record deployment_*.json in a folder whose models were made from this.

    Raises FileNotFoundError without any, ValueError where all are of others.
    """
    records = speed_records(folder, "deployment")
    if not records:
        words = "holds no record deployment_*.json: choose a preset to measure"
        raise FileNotFoundError(f"{folder} {words}")
    for record in records:
        if record["made_from"] == made:
            return record
    presets = ", ".join(record["preset"] for record in records)
    words = "holds models of other settings: choose a preset to measure yours"
    raise ValueError(f"the stored record, of the preset {presets}, {words}")


def _packed(table: Table) -> dict | str:
    return table if isinstance(table, str) else json.loads(table.to_json(orient="table"))


def _unpacked(packed: dict | str) -> Table:
    if isinstance(packed, str):
        return packed
    return pd.read_json(io.StringIO(json.dumps(packed)), orient="table")


def against_fixed(models: dict[str, Transformer], fixed: str, windows: Tensor, repeats: int = 7,
                  dtype: torch.dtype = torch.float32) -> pd.DataFrame:  # fmt: skip
    """A training step and a forward pass on windows [B, L + 1], and cached decoding of a quarter of a window
    after half of one, for one sequence and for B: all models in turn, a row each.

    fixed: the name of the model whose time is 1, one of those in models. dtype: of autocast in training
    steps; the rest runs in the weights' own type. Columns panel, kind (by the name: `kind_of`), model, E
    (applications a token), milliseconds, time (the median of the ratios to the fixed model's) and quartiles,
    as text.
    """
    B, L = len(windows), windows.shape[1] - 1
    prompts, inputs = windows[:, : L // 2], windows[:, :-1]
    panels = {
        "training step": lambda model: training_step(model, windows, dtype),
        "forward pass": lambda model: forward_pass(model, inputs),
        "decoding, 1 sequence": lambda model: decoding(model, prompts[:1], L // 4),
        f"decoding, {B} sequences": lambda model: decoding(model, prompts, L // 4),
    }
    rows = []
    for panel, timed in panels.items():
        timings = in_turn({name: timed(model) for name, model in models.items()}, repeats)
        for name in models:
            ratio = timings.ratio(name, fixed)
            low, high = ratio["quartiles"]
            row = dict(panel=panel, kind=kind_of(name), model=name, E=ratio["E"])
            row |= dict(milliseconds=timings.milliseconds(name), time=ratio["measured"])
            rows.append(row | dict(quartiles=f"{low:.2f} to {high:.2f}"))
    return pd.DataFrame(rows)
