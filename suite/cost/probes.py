"""What else a model costs: where a step's time goes, peak memory, energy, and its size as int8.

What cannot be measured here is the words NOT_MEASURABLE, never an estimate.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import morlib
from morlib import Transformer, load_model, save_model

from ..files import ROOT
from ..runs import keep_memory
from .timing import Timed, clock, decoding, forward_pass, in_turn, training_step

NOT_MEASURABLE = "not measurable here"
POWER_ZONES = Path("/sys/class/powercap")


# ---- Where the time goes ----

ATTENTION, FEED_FORWARD = "attention", "feed-forward"
NORMS, ENDS = "norms and residuals", "head and embedding"
ROUTER, PACKING, REST = "router", "packing", "loss and optimizer"
PARTS = (ATTENTION, FEED_FORWARD, NORMS, ENDS, ROUTER, PACKING, REST)
LABEL = "part: "
PACKS = ("TakeRows", "PadRows")  # morlib's functions that move rows; the profiler knows them by name


def where_time_goes(model: Transformer, step: Timed, repeats: int = 7) -> pd.DataFrame:
    """Share of a training step's time [repeat, part], forward and backward, by torch's profiler.

    The backward pass of an operation belongs to the part that ran it forward. What a model does between its
    parts (who is asked, who runs, moving tokens in and out of the packed batch) counts as packing.
    """
    cuda = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    cost = "self_device_time_total" if cuda else "self_cpu_time_total"
    shares = []
    with labelled(model):
        step()
        for _ in range(repeats):
            with no_stderr(), profile(activities=activities) as profiler:
                step()
            shares.append(_by_part(profiler.events(), cost))
    return pd.DataFrame(shares)[[*PARTS]]


@contextlib.contextmanager
def labelled(model: Transformer) -> Iterator[None]:
    """Name the parts of a model to torch's profiler while this is open, by hooks on its modules.

    A part inside another counts for itself. The places of packed tokens are computed where attention first
    asks for them, so here they are asked for just before it, under their own name.
    """
    parts = [(model, PACKING), (model.policy, ROUTER), (model.norm, NORMS)]
    parts += [(module, ENDS) for module in (model.embed, model.dropout, model.head)]
    for block in model.blocks:
        parts += [(block, NORMS), (block.attention, ATTENTION), (block.feed_forward, FEED_FORWARD)]
    open_labels: list[record_function] = []

    def begin(part: str) -> None:
        open_labels.append(record_function(LABEL + part))
        open_labels[-1].__enter__()

    def end(*_) -> None:
        open_labels.pop().__exit__(None, None, None)

    def place(module: nn.Module, args: tuple) -> None:
        packing = args[1]
        if not packing.full:
            begin(PACKING)
            _ = packing.slot, packing.source  # kept by the packing from now on
            end()

    hooks = [block.attention.register_forward_pre_hook(place) for block in model.blocks]
    for module, part in parts:
        hooks.append(module.register_forward_pre_hook(lambda module, args, part=part: begin(part)))
        hooks.append(module.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Torch's profiler tells the process' stderr, past Python, that it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _by_part(events, cost: str) -> dict[str, float]:
    """Share of the time a part, from a profile's events; each event's own time goes to its part.

    A node of the backward pass has a number. The last operation before the number moves on carries it, too:
    that one made the node.
    """
    made_in: dict[int, str] = {}  # a node's number to the part that made it
    for event in sorted(events, key=lambda e: e.time_range.start):
        forward = event.sequence_nr >= 0 and not event.name.startswith("autograd::")
        if forward and (part := part_of(event, made_in)):
            made_in[event.sequence_nr] = part
    total = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if not event.name.startswith("ProfilerStep"):
            total[part_of(event, made_in) or REST] += getattr(event, cost)
    return {part: value / sum(total.values()) for part, value in total.items()}


def part_of(event, made_in: dict[int, str]) -> str | None:
    """The part whose label encloses an event, or that made the node of the backward pass which does."""
    while event is not None:
        if event.name in PACKS:
            return PACKING
        if event.name.startswith(LABEL):
            return event.name.removeprefix(LABEL)
        if event.name.startswith("autograd::engine::evaluate_function"):
            moves_rows = event.name.endswith(tuple(f"{name}Backward" for name in PACKS))
            return PACKING if moves_rows else made_in.get(event.sequence_nr)
        event = event.cpu_parent
    return None


# ---- Memory ----


def peak_memory(models: dict[str, Transformer], B: int, L: int,
                dtype: torch.dtype = torch.float32) -> pd.DataFrame:  # fmt: skip
    """Peak bytes [model, "forward pass" or "training step"] above what a model and its batch take.

    dtype: of autocast in a training step on a card.

    On a card from torch's allocator; on Linux from the resident memory of a process that did nothing else;
    elsewhere NOT_MEASURABLE.
    """
    kinds = {"forward pass": False, "training step": True}
    if next(next(iter(models.values())).parameters()).is_cuda:
        peaks = [_peak_on_card(m, B, L, t, dtype) for m in models.values() for t in kinds.values()]
    elif Path("/proc/self/statm").is_file():
        peaks = _peaks_of_processes(list(models.values()), B, L)
    else:
        peaks = [NOT_MEASURABLE] * 2 * len(models)
    rows = [peaks[i : i + 2] for i in range(0, len(peaks), 2)]
    return pd.DataFrame(rows, index=pd.Index(models, name="model"), columns=list(kinds), dtype=object)


def _call(model: Transformer, B: int, L: int, training: bool, dtype: torch.dtype = torch.float32) -> Timed:
    windows = torch.zeros(B, L + 1, dtype=torch.long, device=next(model.parameters()).device)
    return training_step(model, windows, dtype) if training else forward_pass(model, windows[:, :-1])


def _peak_on_card(model: Transformer, B: int, L: int, training: bool, dtype: torch.dtype) -> int:
    call = _call(model, B, L, training, dtype)
    card = next(model.parameters()).device
    before = torch.cuda.memory_allocated(card)
    torch.cuda.reset_peak_memory_stats(card)
    call()
    return torch.cuda.max_memory_allocated(card) - before


def _peaks_of_processes(models: list[Transformer], B: int, L: int) -> list[int | str]:
    """The peaks of a forward pass and a training step of each model, each from a process of its own.

    A fresh Python loads torch once, and forks for each measurement before torch has started a thread. It
    finds what is found here, as it is handed this process' module search path and where policies are; one
    that is in no module, as in a notebook, is NOT_MEASURABLE.
    """
    path = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, sys.path)]))
    program = [sys.executable, "-c", "from suite.cost import probes; probes.answer()"]
    used = {model.cfg.routing: morlib.POLICIES[model.cfg.routing] for model in models}
    policies = [(routing, kind.__module__, kind.__name__) for routing, kind in used.items()]
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for i, model in enumerate(models):
            file = str(Path(folder) / f"{i}.safetensors")
            save_model(model, file)
            cases += [(file, B, L, False), (file, B, L, True)]
        asked, env = json.dumps([policies, cases]).encode(), os.environ | {"PYTHONPATH": path}
        done = subprocess.run(program, input=asked, capture_output=True, env=env)
    if done.returncode:
        return [NOT_MEASURABLE] * len(cases)
    return json.loads(done.stdout.splitlines()[-1])  # a user's module may print before


def answer() -> None:
    """The fresh Python's part: read from stdin what to measure, write the peaks to stdout."""
    importlib.import_module("torch._dynamo")  # an optimizer loads it: so it is there before the forks
    context, peaks = get_context("fork"), []
    policies, cases = json.load(sys.stdin)
    for routing, module, name in policies:
        with contextlib.suppress(ImportError, AttributeError):  # it is in no module
            morlib.POLICIES[routing] = getattr(importlib.import_module(module), name)
    for case in cases:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_send_peak, args=(send, *case))
        process.start()
        send.close()
        try:
            peaks.append(receive.recv())
        except EOFError:  # it died
            peaks.append(NOT_MEASURABLE)
        process.join()
    print(json.dumps(peaks))


def _send_peak(connection, file: str, B: int, L: int, training: bool) -> None:
    resource = importlib.import_module("resource")  # not everywhere
    torch.set_num_threads(1)
    keep_memory()
    model, _ = load_model(file)
    call = _call(model, B, L, training)
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = resident_pages * os.sysconf("SC_PAGE_SIZE")
    call()
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


# ---- Energy ----


def energy_counter(device: torch.device | str) -> tuple | None:
    """A function that reads the joules of a device so far, and what it reads; None where none can be read."""
    device = torch.device(device)
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # no library, no driver, a card before Volta: then no counter
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            # By its id: the driver's numbers are others than torch's where CUDA_VISIBLE_DEVICES hides cards
            card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            nvml.nvmlDeviceGetTotalEnergyConsumption(card)
            return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000, "NVML, the whole card"
    zones = POWER_ZONES.glob("intel-rapl:*") if device.type == "cpu" else ()
    names = [zone / "name" for zone in zones]
    # Of processors alone: a zone within one, or the whole board, counts the same joules again
    packages = [name.parent for name in names if name.is_file() and name.read_text().startswith("package")]
    readable = [zone / "energy_uj" for zone in packages if os.access(zone / "energy_uj", os.R_OK)]
    if readable:
        return lambda: sum(int(path.read_text()) for path in readable) / 1e6, "RAPL, the whole package"
    return None


def energy_a_token(call: Timed, tokens: int, device: torch.device | str, seconds: float = 2.0) -> float | str:
    """Joules a token of a call that processes so many on a device, over some seconds of calls.

    NOT_MEASURABLE without a counter, or if it went round meanwhile.
    """
    counter = energy_counter(device)
    if counter is None:
        return NOT_MEASURABLE
    read, _ = counter
    call()
    calls, began, before = 0, clock(device), read()
    while not calls or clock(device) - began < seconds:
        call()
        calls += 1
    used = read() - before
    return used / (calls * tokens) if used > 0 else NOT_MEASURABLE


def memory_and_energy(models: dict[str, Transformer], served: pd.DataFrame, windows: Tensor,
                      dtype: torch.dtype = torch.float32) -> pd.DataFrame:  # fmt: skip
    """What each model takes: bytes of cache, peak memory (MB), joules a decoded token; as text, to be read.

    served: `serving` of these models, with a column model. windows: int64 [B, L + 1].
    """
    B, L = len(windows), windows.shape[1] - 1
    peaks, rows = peak_memory(models, B, L, dtype), {}
    for name, model in models.items():
        decoded = served[(served["model"] == name) & (served["phase"] == "decode")].iloc[-1]
        joules = energy_a_token(decoding(model, windows[:, : L // 2], L // 4), B * (L // 4), windows.device)
        peak = {f"peak of a {kind} (MB)": worded(n, 1e6, ".1f") for kind, n in peaks.loc[name].items()}
        cache = {"cache, bytes a sequence": f"{decoded['cache bytes a sequence']:,.0f}"}
        cache |= {"E of the cache": f"{decoded['E in cache']:.2f}"}
        rows[name] = cache | peak | {"joules a decoded token": worded(joules, 1, ".2e")}
    return pd.DataFrame(rows).T.rename_axis("model")


def worded(value: float | str, unit: float, form: str) -> str:
    """A number in some unit as text; NOT_MEASURABLE stays as it is."""
    return value if isinstance(value, str) else format(value / unit, form)


# ---- int8 ----


def as_int8(model: Transformer) -> Transformer | str:
    """A copy on the CPU whose blocks and head compute in int8; routers and norms keep float32.

    Weights are stored as int8, activations are quantised as they come. NOT_MEASURABLE where this torch has no
    int8 engine or has dropped eager quantisation.
    """
    small = copy.deepcopy(model).cpu().float().eval()
    try:
        with warnings.catch_warnings():  # torch moves this to the package torchao
            warnings.simplefilter("ignore")
            from torch.ao.quantization import quantize_dynamic

            small.blocks = quantize_dynamic(small.blocks, {nn.Linear}, dtype=torch.qint8)
            small.head = quantize_dynamic(nn.Sequential(small.head), {nn.Linear}, dtype=torch.qint8)[0]
    except (ImportError, AttributeError, RuntimeError):
        return NOT_MEASURABLE
    return small


def stored_bytes(model: nn.Module) -> int:
    """Size of a model's weights as a file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model.state_dict(), buffer)
    return buffer.tell()


def int8_table(models: dict[str, Transformer], corpus, repeats: int = 7) -> pd.DataFrame | str:
    """Size, validation loss, depth and latency [model, weights] of models in float32 and int8, on the CPU.

    A prompt of half a window, then a quarter of a window decoded, batch 1. NOT_MEASURABLE as in `as_int8`.
    """
    rows = {}
    for name, model in models.items():
        versions = {"float32": copy.deepcopy(model).cpu(), "int8": as_int8(model)}
        if isinstance(versions["int8"], str):
            return NOT_MEASURABLE
        L = model.cfg.max_len
        prompt, tokens = corpus.ids["val"][: L // 2][None], L // 4
        prefill = in_turn({kind: forward_pass(m, prompt) for kind, m in versions.items()}, repeats)
        decode = in_turn({kind: decoding(m, prompt, tokens) for kind, m in versions.items()}, repeats)
        for kind, version in versions.items():
            seen = morlib.evaluate(version, corpus, "val", 64)
            rows[name, kind] = {
                "size (MB)": stored_bytes(version) / 1e6,
                "validation loss (nats)": seen["loss"],
                "E": seen["effective_depth"],
                "prompt (ms)": prefill.milliseconds(kind),
                "decoded token (ms)": decode.milliseconds(kind) / tokens,
            }
    return pd.DataFrame(rows).T.rename_axis(["model", "weights"])
