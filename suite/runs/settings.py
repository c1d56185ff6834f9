"""A notebook's parameters: a preset and a recipe, then whatever the reader changed, all of it checked."""

from __future__ import annotations

import ast
import contextlib
import os
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch

from morlib import Checked, Count, ModelConfig, TrainConfig, check_value

from .device import pick_device

RECIPES = {
    "sound": {},
    "source": dict(
        norm="post", scaled_init=False, estimator="gumbel", lr=3e-4, router_lr=3e-4, weight_decay=0.01,
        warmup=0.0, schedule="constant", clip=None, fresh_windows=False, penalty=0.1, share_power=0.0,
    ),
}  # fmt: skip
SMOKE = dict(
    n_layers=4, d_model=32, n_heads=4, d_ff=96, max_len=32, dropout=0.0, batch_size=16, windows=400, epochs=2,
    lr=1e-2, router_lr=1e-3, evaluations=5, eval_windows=16, heldout_windows=64, max_chars=120_000,
    subwords=500, seeds=1, jobs=1,
)  # fmt: skip
QUICK = dict(
    d_model=64, n_heads=4, d_ff=256, dropout=0.0, batch_size=16, windows=880, epochs=6, lr=4e-3,
    router_lr=5e-4, evaluations=6, eval_windows=50, heldout_windows=200, max_chars=1_200_000, subwords=500,
    seeds=1, jobs=2,
)  # fmt: skip
CPU = QUICK | dict(
    windows=2944, eval_windows=200, heldout_windows=None, max_chars=None, subwords=1000, seeds=6,
)  # fmt: skip
PRESETS = {
    "stored": CPU,  # shows the records that ship, of the size `cpu`, and trains nothing
    "smoke": SMOKE,  # a test's size, seconds
    "quick": QUICK,  # minutes on two cores
    "cpu": CPU,  # an afternoon on two cores
    "long": CPU | dict(epochs=15),  # a lower loss than counting on Tiny Shakespeare; a day on two cores
    "paper": dict(seeds=6, jobs=1),  # the sources' sizes, for a GPU
}


@dataclass(frozen=True)
class Settings(Checked):
    """A notebook's resolved parameters."""

    preset: str = "auto"
    recipe: str = "sound"
    seeds: Count = 6
    jobs: Count = 1  # runs trained side by side, one thread each
    max_chars: Count | None = None  # the corpus is cut here
    subwords: Count = 4000  # SentencePiece vocabulary
    text: list | None = None  # a text of the reader's own: a file, a folder, a pattern, or several files
    tokenizer: Literal["char", "sentencepiece"] | None = None  # of that text; None: characters
    device: str | None = None  # "cpu", "cuda", "cuda:1" or "mps"; None: a usable GPU, else the CPU
    values: dict = field(default_factory=dict, repr=False)

    def rules(self):
        return ()

    @property
    def stored(self) -> bool:
        """Whether the records that ship are shown, and nothing is trained."""
        return self.preset == "stored"

    @property
    def n_layers(self) -> int:
        return self.model(vocab_size=1).n_layers

    def model(self, **changes) -> ModelConfig:
        """The model of these settings; needs vocab_size among the changes."""
        return ModelConfig(**{k: v for k, v in self.values.items() if k in FIELDS[ModelConfig]} | changes)

    def train(self, **changes) -> TrainConfig:
        return TrainConfig(**{k: v for k, v in self.values.items() if k in FIELDS[TrainConfig]} | changes)


FIELDS = {kind: get_type_hints(kind, include_extras=True) for kind in (Settings, ModelConfig, TrainConfig)}
OWN_TEXT = {name: FIELDS[Settings][name] for name in ("text", "tokenizer")}


def settings(
    namespace: dict, own: dict | None = None, only: tuple | None = None, changed: dict | None = None
) -> Settings:
    """Settings from a notebook's `globals()`: its preset, then its recipe, then every parameter not None.

    own: name to type of the parameters that are this notebook's alone; OWN_TEXT are those of a notebook that
    takes a text of the reader's own. only: the names that a notebook without training uses. changed: by name
    of a preset, values that are others in this notebook.
    In a notebook, parameters are what the parameters cell sets and what papermill's
    cell sets; otherwise all plain values of the namespace. None means: as the preset says. The word "none"
    means None, where a parameter may be None. MORLIB_JOBS stands in for a `jobs` of None.
    Raises ValueError that names the allowed parameters if one is unknown, ill-typed or out of range.
    """
    known = FIELDS[Settings] | FIELDS[ModelConfig] | FIELDS[TrainConfig]
    hidden = ("vocab_size", "seed", "values", *OWN_TEXT)
    known = {k: v for k, v in known.items() if k not in hidden and (only is None or k in only)} | (own or {})
    given = parameters(namespace, known)
    preset, recipe = given.get("preset", "auto"), given.get("recipe", "sound")
    if preset == "auto":
        preset = os.environ.get("MORLIB_PRESET") or "auto"
    if preset == "auto" or "device" in given and preset != "stored":  # stored records need none
        on_card = pick_device(given.get("device"))[0].type == "cuda"
    if preset == "auto":
        preset = "paper" if on_card else "quick"
    for name, value, table in (("preset", preset, PRESETS), ("recipe", recipe, RECIPES)):
        if value not in table:
            options = ["auto", *table] if name == "preset" else table
            raise ValueError(f"parameter {name} must be one of {', '.join(options)}, not {value!r}")
    values = PRESETS[preset] | (changed or {}).get(preset, {}) | RECIPES[recipe] | given
    if "jobs" not in given:
        if preset == "paper":
            values["jobs"] = max(torch.cuda.device_count(), 1)  # one run a card
        if jobs := os.environ.get("MORLIB_JOBS"):
            values["jobs"] = check_value("MORLIB_JOBS", as_meant(jobs, int), Count)
    if values.get("text"):
        values["text"] = [wherever(place) for place in values["text"]]
    names = {k: v for k, v in values.items() if k in FIELDS[Settings]}
    result = Settings(**names | dict(preset=preset, recipe=recipe, values=values))
    result.model(vocab_size=2)
    result.train()
    return result


def parameters(namespace: dict, known: dict[str, Any]) -> dict:
    """What a reader has set: name to value; those left at None are left out.

    Raises ValueError that names the allowed ones if a name is unknown or a value wrong.
    """
    plain = (bool, int, float, str, list, tuple, dict, types.NoneType)
    names = names_set(namespace)
    if names is None:
        names = {k for k, v in namespace.items() if not k.startswith("_") and isinstance(v, plain)}
    given = {k: v for k, v in namespace.items() if k in names}
    allowed = f"allowed are: {', '.join(sorted(known))}"
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"unknown parameter {', '.join(unknown)}; {allowed}")
    result = {}
    for name, value in given.items():
        if value is None:
            continue
        try:
            result[name] = check_value(f"parameter {name}", as_meant(value, known[name]), known[name])
        except ValueError as error:
            raise ValueError(f"{error}; {allowed}") from None
    return result


def names_set(namespace: dict) -> set[str] | None:
    """The names that a notebook's parameters cell and papermill's cell set; None outside of notebooks.

    The parameters cell is the last executed one that annotates `preset`; papermill's begins with a comment.
    So names that other cells hold, a reader's own or later ones, are never taken for parameters.
    """
    if "In" not in namespace:
        return None
    cells = {}
    for source in namespace["In"]:
        try:
            body = ast.parse(source).body
        except SyntaxError:  # a line for the shell, a cell magic
            continue
        annotated = [node.target.id for node in body
                     if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]  # fmt: skip
        assigned = [t.id for node in body if isinstance(node, ast.Assign) for t in node.targets
                    if isinstance(t, ast.Name)]  # fmt: skip
        if "preset" in annotated:
            cells["parameters"] = {*annotated, *assigned}
        elif source.lstrip().startswith("# Parameters"):
            cells["papermill"] = set(assigned)
    if "parameters" not in cells:  # a runner that keeps no history of cells
        cells["parameters"] = set(namespace.get("__annotations__", ()))
    return set().union(*cells.values())


def wherever(place: str) -> str:
    """The path of a text as any process finds it, whatever its folder; what is no file or folder as it is."""
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


def as_meant(value, hint):
    """A value as it was meant: "none" as None, text as a number, digits as text, one thing as a list."""
    options = get_args(hint) if get_origin(hint) is not Annotated else ()
    if value == "none" and types.NoneType in options:
        return None
    kinds = {bare_type(option) for option in options or (hint,)}
    if isinstance(value, str) and kinds & {int, float} and str not in kinds:
        for kind in (k for k in (int, float) if k in kinds):
            try:
                return kind(value)
            except ValueError:
                continue
    if kinds == {str} and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kinds & {list, tuple} and not kinds & {str, int, float}:
        if isinstance(value, str) and value.startswith("["):  # papermill's -p has no lists
            with contextlib.suppress(ValueError, SyntaxError):
                return ast.literal_eval(value)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return [value]
        return list(value) if isinstance(value, tuple) and tuple not in kinds else value
    return value


def bare_type(hint) -> type:
    """The type that a hint is about: int for Count, list for list[str]."""
    if get_origin(hint) is Annotated:
        return get_args(hint)[0]
    return get_origin(hint) or hint
