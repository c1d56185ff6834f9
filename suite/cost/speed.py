"""The records that `python -m suite.cost.bench` makes: found, and put into a sentence, tables and figures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import pandas as pd
import torch

import morlib

from ..files import REFERENCE, ROOT, sha256
from ..results import show
from ..results.tables import share_words
from ..runs import pick_device
from .figures import time_against_depth
from .flops import flops, training_flops
from .goals import GOALS
from .timing import build

# The rows of the first table: their key in a record, and what they measure
SHOWN = {
    "train-8": "training step, blind",
    "train-8-router": "training step, MoR's router",
    "train-6-router": "training step, MoR's router",
    "train-once-8": "training step, decided once",
    "train-once-6": "training step, decided once",
    "forward-8": "forward pass, blind",
    "forward-8-router": "forward pass, MoR's router",
    "forward-6-router": "forward pass, MoR's router",
    "decode-1": "decoding, 1 sequence, blind at each layer",
    "decode-32": "decoding, 32 sequences, blind at each layer",
    "decode-router-1": "decoding, 1 sequence, an untrained router a layer",
    "decode-router-32": "decoding, 32 sequences, an untrained router a layer",
    "decode-once-1": "decoding, 1 sequence, decided once",
    "decode-once-32": "decoding, 32 sequences, decided once",
    "train-small": "training step at experiment 1's size, MoR's router",
    "once-8": "training step at experiment 1's size, decided once",
    "once-6": "training step at experiment 1's size, decided once",
    "worth-8": "training step at experiment 1's size, token worth",
    "worth-6": "training step at experiment 1's size, token worth",
}
# The bench's models: routing, target depth, and what their rows' keys end in
BENCHED = {
    "fixed": ("none", None, ""),
    "blind, E = 8": ("even", 8.0, "8"),
    "with a router, E = 8": ("mor", 8.0, "8-router"),
    "blind, E = 6": ("even", 6.0, "6"),
    "with a router, E = 6": ("mor", 6.0, "6-router"),
}
HOW_TO_READ = (
    "The time of the fixed model, which runs every layer, is 1. The models took turns in one process; shown "
    "are the median over turns and the quartiles. *No faster*: the quartiles include 1. Where it says "
    "blind or decided once, chance decides who skips, which shows what skipping itself can save."
)


# ---- Making and finding records ----


def machine(wanted: str | None = None) -> dict:
    """Device, cores, versions, date, load and commit, for a record.

    wanted: the device that is measured, as for `runs.pick_device`. A card is named where it is that one.
    """
    core = sha256(Path(morlib.__file__).read_bytes())[:8]
    device, _, why = pick_device(wanted)
    return dict(
        device=why,
        cpu=_processor(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # of all programs
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            morlib=f"{morlib.__version__}+{core}",
        ),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=_commit(),
    )


def comparable(record: dict) -> list:
    """What two records must have in common to be one: machine, threads, versions, sizes but for the turns."""
    sizes = {k: v for k, v in record.get("sizes", {}).items() if "turns" not in k}
    return [record.get(k) for k in ("cpu", "gpu", "threads", "versions", "sweep")] + [sizes]


def begun(path: Path | None, here: dict, empty: dict) -> dict:
    """The record at a path, to go on with, if it is `comparable` with one made here; else an empty one."""
    here = json.loads(json.dumps(here))
    if path and path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if comparable(old) == comparable(here):
            return old | {k: here[k] for k in ("date", "load", "commit")}
    return here | empty


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{commit}, changed" if commit and changed else commit or None


def speed_records(folder: Path | None = None, kind: str = "speed") -> list[dict]:
    """The records of whole benches, or of another kind, in a folder, by default those that ship."""
    paths = sorted((folder or REFERENCE).glob(f"{kind}_*.json"))
    whole = [path for path in paths if not path.stem.endswith(("_quick", "_tiny"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in whole]


# ---- What a record says ----


def about(record: dict) -> str:
    """What a record was measured on."""
    v = record["versions"]
    where = f"{record['gpu'] or record['cpu']}, {record['threads']} of {record['cores']} cores"
    what = f"{record['dtype']}, torch {v['torch']}, morlib {v['morlib']}"
    when = f"{record['date'][:10]}, commit {record['commit'] or 'unknown'}, load before it {record['load']}"
    return f"{where}, {what}, {when}"


def ratios(record: dict) -> pd.DataFrame:
    """What was measured, one row each: the ratio, its quartiles over turns, and the effective depth."""
    rows = {}
    for goal in GOALS:
        row = record["rows"].get(goal.key, {})
        if row.get("measured") is None:
            continue
        low, high = row.get("quartiles") or (None, None)
        rows[goal.named(record["sizes"]) + threads_of(row)] = dict(
            ratio=f"{row['measured']:.2f}",
            quartiles="" if low is None else f"{low:.2f} to {high:.2f}",
            E="" if row.get("E") is None else f"{row['E']:.1f}",
        )
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("what")


def threads_of(row: dict) -> str:
    """What stands behind the name of a row that was measured with one thread."""
    return ", one thread" if row.get("note") == "one thread" else ""


def verdict(row: dict) -> str:
    """What a ratio of times says, in a few words."""
    low, high = row["quartiles"]
    change = 100 * abs(1 - row["measured"])
    if low <= 1 <= high:
        return "no faster"
    return f"saves {change:.0f} % of the time" if saves(row) else f"{change:.0f} % slower"


def first_table(record: dict) -> pd.DataFrame:
    """The four columns that a reader sees first: what, its time, the quartiles, the verdict."""
    rows, N = [], record["sizes"]["model"]["n_layers"]
    for key, what in SHOWN.items():
        row = record["rows"].get(key)
        if row is None:
            continue
        low, high = row["quartiles"]
        measured = f"{what}, {share_words(1 - row['E'] / N)} skipped{threads_of(row)}"
        columns = {"measured": measured, "time": f"{row['measured']:.2f}"}
        rows.append(columns | {"quartiles": f"{low:.2f} to {high:.2f}", "verdict": verdict(row)})
    return pd.DataFrame(rows)


def saves(row: dict) -> bool:
    """Whether a row's time is below that of its fixed model, in all but the slowest quarter of its pairs."""
    return row["quartiles"][1] < 1


def short(record: dict) -> str:
    """Whether skipping saves time in training, at both sizes, by a router a layer and by one blind choice, in
    a few words; empty where it is not measured."""
    ways = {
        "with MoR's router": ("train-small", "train-8-router"),
        "where chance decides once for all layers": ("once-8", "train-once-8"),
    }
    if not all(key in record["rows"] for keys in ways.values() for key in keys):
        return ""
    told = []
    for way, keys in ways.items():
        small, large = (saves(record["rows"][key]) for key in keys)
        where = "at both sizes" if small else "at the sources' size only"
        told.append(f"{way} {where if large else 'in small models only' if small else 'nowhere'}")
    return f"In training: {'; '.join(told)}."


def training_sentence(record: dict) -> str:
    """Ratios of times of a training step at both sizes, with a router and where chance decides once; empty
    where they are not measured."""
    if not short(record):
        return ""
    rows, sizes = record["rows"], record["sizes"]["model"]
    keys = ("train-small", "once-8", "train-8-router", "train-once-8")
    small, once, wide, once_wide = (f"{rows[key]['measured']:.2f}" for key in keys)
    third = share_words(1 - rows["train-8-router"]["E"] / sizes["n_layers"])  # alike at both widths
    return (
        f"At the size of experiment 1 a training step in which MoR's router skips {third} of the work takes "
        f"{small} of the fixed model's time, and {once} where chance decides once for all layers. At the "
        f"sources' size (width {sizes['d_model']}) it takes {wide}, and {once_wide} where "
        "chance decides once."
    )


def headline(folder: Path | None = None) -> None:
    """Show what stored records say: for each one a sentence, a table, what it was measured on, a picture."""
    records = speed_records(folder)
    if not records:
        print("No stored record of the bench ships with this copy: `make bench` makes one.")
    for record in records:
        N, width = (record["sizes"]["model"][name] for name in ("n_layers", "d_model"))
        size = f"Models of {N} layers, of width {width} unless a row says *experiment 1's size*"
        answer = f"{short(record)} {training_sentence(record)}".strip()
        answer = answer or "This record does not hold training at both sizes: `make bench` measures it."
        show(answer, first_table(record), f"{size}; {about(record)}. {HOW_TO_READ}")
        time_against_depth(record)


@torch.no_grad()
def operations_and_time(record: dict) -> pd.DataFrame:
    """Depth, operations and time of each model of the bench, as shares of the fixed model's.

    Operations are counted here, on 8 random windows, by models that run as deep as those that were timed.
    Times are the record's. A router holds its budget there, trained or not.
    """
    length, vocab_size = record["sizes"]["length"], 65
    sizes = record["sizes"]["model"] | dict(vocab_size=vocab_size, max_len=length, dropout=0.0)
    tokens = torch.randint(vocab_size, (8, length), generator=torch.Generator().manual_seed(0))
    columns = {}
    for kind, words in (("forward", "forward pass"), ("train", "training step")):
        for label, (routing, target, key) in BENCHED.items():
            row = record["rows"].get(f"{kind}-{key}", {})
            depth = row.get("E", target) if target else target
            model = build(morlib.ModelConfig(**sizes, routing=routing, target_depth=depth))
            out = model(tokens, calibrate=True)
            operations = flops(model, out.actions)["total"] if kind == "forward" else None
            if kind == "train":
                operations = training_flops(model, out.actions)
            time = row.get("measured") if target else 1.0
            cells = dict(depth=out.depth.double().mean().item(), operations=operations, time=time)
            for name, value in cells.items():
                columns.setdefault((words, name), {})[label] = value
    table = pd.DataFrame(columns).astype(float)
    return table / table.loc["fixed"]


def stored_milliseconds(record: dict) -> pd.DataFrame:
    """The bench's timings at several depths: columns panel, kind, E, milliseconds."""
    s = record["sizes"]
    short, long = f"{s['batch']} × {s['length']}", f"{s['long_batch']} × {s['long_length']}"
    panels = {
        "training": f"training step, {short} tokens",
        "forward": f"forward pass, {short} tokens",
        "training, long": f"training step, {long} tokens",
        "forward, long": f"forward pass, {long} tokens",
    }
    rows = []
    for name, panel in panels.items():
        for model, timing in record["seconds"].get(name, {}).items():
            if timing["E"] is not None:
                point = dict(E=timing["E"], milliseconds=1000 * timing["median"])
                rows.append(dict(panel=panel, kind=kind_of(model)) | point)
    return pd.DataFrame(rows)


def kind_of(model: str) -> str:
    """What a name among timings stands for: fixed, with a router, decided once, or blind."""
    if model.startswith("fixed"):
        return "fixed"
    if model.startswith("once"):
        return "decided once"
    return "with a router" if model.endswith("router") or model.startswith("MoR") else "blind"
