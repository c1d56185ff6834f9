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
from ..runs.settings import settings as make_settings
from .speed import about, kind_of, machine, speed_records
from .timing import forward_pass, in_turn, training_step

Table = pd.DataFrame | str  # words where it could not be measured


class Measured:
    """Tables by name: each is measured when it is first asked for. Under the preset `stored` nothing is
    measured: they are those of the record that ships.

    Raises FileNotFoundError under `stored` where no record ships, ValueError where its models are others.
    """

    def __init__(self, settings: Settings, dtype: torch.dtype = torch.float32, folder: Path = REFERENCE):
        self.tables: dict[str, Table] = {}
        self.record = machine() | dict(preset=settings.preset, dtype=str(dtype).removeprefix("torch."))
        self.stored = settings.stored
        if self.stored:
            records = speed_records(folder, "deployment")
            if not records:
                raise FileNotFoundError(
                    f"no record deployment_*.json in {folder}: choose a preset to measure"
                )
            self.record = records[0]
            preset = self.record["preset"]
            if made_from(settings) != made_from(make_settings(dict(preset=preset))):
                words = "holds models of other settings: choose a preset to measure yours"
                raise ValueError(f"the stored record, of the preset {preset}, {words}")
            self.tables = {name: _unpacked(packed) for name, packed in self.record["tables"].items()}

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
        return f"{source}: preset {self.record['preset']}, {about(self.record)}."

    def save(self) -> str:
        """Keep all tables as one file in the outputs, with what they were measured on; its name."""
        tables = {name: _packed(table) for name, table in self.tables.items()}
        path = outputs() / f"deployment_{self.record['preset']}.json"
        return write_whole(path, json.dumps(self.record | dict(tables=tables), indent=1).encode()).name


def made_from(settings: Settings) -> tuple:
    """What the measured models are made from."""
    return settings.model(vocab_size=1), settings.train()


def _packed(table: Table) -> dict | str:
    return table if isinstance(table, str) else json.loads(table.to_json(orient="table"))


def _unpacked(packed: dict | str) -> Table:
    return (
        packed if isinstance(packed, str) else pd.read_json(io.StringIO(json.dumps(packed)), orient="table")
    )


def against_fixed(models: dict[str, Transformer], fixed: str, windows: Tensor, repeats: int = 7,
                  dtype: torch.dtype = torch.float32) -> pd.DataFrame:  # fmt: skip
    """Training steps and forward passes of models in turn on windows [B, L + 1], a row each.

    fixed: the name of the model whose time is 1. Columns panel, kind, model, E, milliseconds, time (the
    median of the ratios to the fixed model's) and quartiles, as text.
    """
    calls = {
        "training step": {name: training_step(model, windows, dtype) for name, model in models.items()},
        "forward pass": {name: forward_pass(model, windows[:, :-1]) for name, model in models.items()},
    }
    rows = []
    for panel, timed in calls.items():
        timings = in_turn(timed, repeats)
        for name in models:
            ratio = timings.ratio(name, fixed)
            low, high = ratio["quartiles"]
            row = dict(panel=panel, kind=kind_of(name), model=name, E=ratio["E"])
            row |= dict(milliseconds=timings.milliseconds(name), time=ratio["measured"])
            rows.append(row | dict(quartiles=f"{low:.2f} to {high:.2f}"))
    return pd.DataFrame(rows)
