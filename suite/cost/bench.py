"""The bench of speed: `make bench`, or `python -m suite.cost.bench --help`.

Every ratio is taken side by side in one process: the models in turn, after a warm-up (for long training
steps, on a quarter of the batch), the median of the paired ratios with its quartiles. Rows that need a GPU
run where there is one. The record is written after each group of rows, so that nothing is lost, and a bench
that was stopped goes on where it was: what the record of this machine and version holds is not measured again
unless `--only` asks for it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from ..files import REFERENCE, outputs, write_whole
from ..runs import pick_device
from . import decoding_rows, goals, growth, training_rows
from .benched import FULL, QUICK, TINY, Bench, Sizes
from .grown import findings
from .speed import about, begun, machine

GROUPS = {  # the name of each group, and what measures its rows; what people feel most comes first
    "training": training_rows.training,
    "once": decoding_rows.once,
    "router": decoding_rows.router,
    "small": training_rows.small,
    "encoder": training_rows.encoder,
    "share": training_rows.share,
    "bfloat16": training_rows.bfloat16,
    "int8": decoding_rows.int8,
    "generation": decoding_rows.generation,
    "forward": training_rows.forward,
    "long": training_rows.long,
    "decoding": decoding_rows.decoding,
    "gpu": training_rows.gpu,
    "gpu-decoding": decoding_rows.gpu,
}
KINDS = {  # what a bench is for: its sizes, and the minutes after which it begins no further group
    "full": (FULL, 40),
    "quick": (QUICK, 10),
    "tiny": (TINY, 10),
}


# ---- The record ----


def record_path(folder: Path, what: str = "speed", kind: str = "full") -> Path:
    on_cpu = f"cpu {platform.machine()} {torch.get_num_threads()} threads"
    device = pick_device("cpu" if what == "growth" else None)[0]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    name = re.sub(r"[^a-z0-9]+", "-", where.lower())
    return folder / f"{what}_{name}{'' if kind == 'full' else f'_{kind}'}.json"


def measure(groups: tuple[str, ...] = tuple(GROUPS), sizes: Sizes = FULL, path: Path | None = None,
            again: bool = False, minutes: float = math.inf) -> dict:  # fmt: skip
    """Measure groups of rows; the record goes to `path` after each.

    A record there that is `comparable` is gone on with, else it is begun anew. Groups that it holds are
    measured `again` only if asked. After so many minutes no further group is begun. Each row says how many
    turns it took.
    """
    here, start = machine() | dict(sizes=dict(vars(sizes)), dtype="float32"), time.perf_counter()
    record = begun(path, here, dict(rows={}, seconds={}, took={}))
    left = [group for group in groups if again or group not in record["took"]]
    if not left:
        return record
    bench = Bench(sizes)
    while left and time.perf_counter() - start < 60 * minutes:
        group, began = left.pop(0), time.perf_counter()
        for key, row in GROUPS[group](bench):
            record["rows"][key] = dict(dtype=record["dtype"]) | row | dict(date=machine()["date"])
            print(goals.line(key, record["rows"][key], record["sizes"]), flush=True)
        record["seconds"] |= bench.seconds
        record |= dict(parts=bench.parts) if bench.parts else {}
        record["took"][group] = round(time.perf_counter() - began, 1)
        if path:
            write_whole(path, json.dumps(record, indent=1).encode())
        gc.collect()
    if left:
        print(f"{minutes:g} minutes are over; the same command goes on with {', '.join(left)}.")
    return record


# ---- The command ----


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick = "fewer turns and smaller batches: ten minutes at most, and less to be relied on"
    tiny = "tiny sizes and two turns: shows that it works, measures nothing"
    only = f"groups of rows to measure, also those that the record holds; with commas: {', '.join(GROUPS)}"
    grows = "measure how cost grows with batch, length, width and depth, in place of the rows"
    reference = "write the record to outputs/reference, where records that ship are"
    steps = f"training steps of the routers (default {FULL.router_steps})"
    turns = f"turns of each measurement (default {FULL.turns}, no fewer; of short ones {FULL.short_turns})"
    p.add_argument("--quick", action="store_const", const="quick", dest="kind", default="full", help=quick)
    p.add_argument("--tiny", action="store_const", const="tiny", dest="kind", help=tiny)
    p.add_argument("--only", help=only)
    p.add_argument("--growth", action="store_true", help=grows)
    p.add_argument("--reference", action="store_true", help=reference)
    p.add_argument("--threads", type=int, help="default: 2, and 1 with --growth")
    p.add_argument("--router-steps", type=int, help=steps)
    p.add_argument("--turns", type=int, help=turns)
    return p


def main(arguments: list[str] | None = None) -> dict:
    chosen = parser().parse_args(arguments)
    groups = tuple(chosen.only.split(",")) if chosen.only else tuple(GROUPS)
    if unknown := set(groups) - set(GROUPS):
        parser().error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if chosen.turns is not None and chosen.turns < FULL.turns:
        parser().error(f"--turns must be {FULL.turns} or more: a median of fewer says little")
    torch.set_num_threads(chosen.threads or min(1 if chosen.growth else 2, os.cpu_count() or 1))
    folder = REFERENCE if chosen.reference and chosen.kind == "full" else outputs() / "results"
    began = time.perf_counter()
    if chosen.growth:
        tiny = chosen.kind == "tiny"
        path = record_path(folder, "growth", "tiny" if tiny else "full")
        record = growth.measure(growth.TINY if tiny else growth.FULL, path)
        print("\n".join(findings(record)))
    else:
        sizes, minutes = KINDS[chosen.kind]
        given = dict(router_steps=chosen.router_steps, turns=chosen.turns)
        given["short_turns"] = chosen.turns and max(chosen.turns, sizes.short_turns)
        sizes = replace(sizes, **{k: v for k, v in given.items() if v})
        path = record_path(folder, "speed", chosen.kind)
        record = measure(groups, sizes, path, bool(chosen.only), minutes)
        show_rows(record)
    print(f"\n{path.name}: {about(record)}; {time.perf_counter() - began:.0f} s")
    if chosen.kind == "tiny":
        print("Tiny sizes, two turns: this shows that the bench works and measures nothing.")
    return record


def show_rows(record: dict) -> None:
    """Print the table of goals, and for each reason the rows that miss."""
    with pd.option_context("display.max_colwidth", None, "display.width", None):
        columns = ["what", "measured", "quartiles", "goal", "reached", "E"]
        print("\n" + goals.table(record)[columns].to_string(index=False))
    print("\n".join(goals.misses(record)))


if __name__ == "__main__":
    main()
