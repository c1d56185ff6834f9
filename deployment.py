"""deployment: what a model costs to run, measured: arithmetic, time, memory, energy, and its size as int8.

- Arithmetic (FLOPs) is counted from the configuration and from the applications that were really executed; the tests hold it against torch's counter.
- Times are taken in turn, in one process: a ratio is the median over turns of paired ratios, with its quartiles.
- What cannot be measured here is the words NOT_MEASURABLE, never an estimate.

Letters as in morlib: B batch, L length, D width, H heads, V vocabulary, N layers, R recursions, E effective depth.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import io
import multiprocessing
import os
import sys
import time
import typing
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib

NOT_MEASURABLE = "not measurable here"


# ---- Arithmetic ----


def flops(model: morlib.Transformer, actions: Tensor, fresh: int | None = None) -> dict[str, int]:
    """Floating-point operations of one pass, by part: a multiplication and an addition are two; only matrix products count.

    actions [N, R, B, P] are the decisions for all P positions so far (`Output.actions`, joined along the last axis); the pass computes the
    last `fresh` of them (all, unless a cache holds the others). Attention is counted as a dense kernel computes it: each query against each
    key of its row and step, those that the causal mask hides included.
    """
    cfg, P = model.cfg, actions.shape[-1]
    first = P - (fresh or P)
    ran, asked = actions >= morlib.FORWARD, actions != morlib.NOT_ASKED
    D, new = cfg.d_model, ran[..., first:]
    counts = dict(
        blocks=int(new.sum()) * 2 * (4 * D * D + 2 * D * cfg.d_ff),  # q, k, v, projection; two feed-forward layers
        attention=int((new.sum(-1) * ran.sum(-1)).sum()) * 4 * D,  # q k^T and p v
        router=0,
        head=actions.shape[2] * (P - first) * 2 * D * cfg.vocab_size,
    )
    if isinstance(model.policy, morlib.Router):
        choosing = ~torch.tensor(model.policy.everyone, device=actions.device)
        hidden = max(D // 2, 1)
        counts["router"] = int(asked[choosing][..., first:].sum()) * 2 * (D * hidden + 3 * hidden)
    return counts | {"total": sum(counts.values())}


def training_flops(model: morlib.Transformer, actions: Tensor) -> int:
    """Operations of a forward and backward pass: each product forward needs two backward, for its input and for its weight.

    A router hears of its choices through what it ran, so there is no way back through one that does not learn, or at a step that nobody runs.
    """
    counts = flops(model, actions)
    heard = torch.where((actions >= morlib.FORWARD).flatten(2).any(-1)[..., None, None], actions, morlib.NOT_ASKED)
    way_back = 2 * flops(model, heard)["router"] if getattr(model.policy, "learns", True) else 0
    return 3 * (counts["total"] - counts["router"]) + counts["router"] + way_back


# ---- Models to be measured ----


def build(config: morlib.ModelConfig, device: torch.device | str | None = None) -> morlib.Transformer:
    """An untrained model with weights from seed 0, on the device that morlib picks or on another."""
    torch.manual_seed(0)
    return morlib.build_model(config).to(device or morlib.pick_device()[0]).eval()


def hold_share(model: morlib.Transformer, start: int, length: int) -> None:
    """Let blind routing run exactly its share of `length` positions from `start` on in inference too: evenly spaced draws, in an order of their own at each step."""
    if isinstance(model.policy, morlib.RandomPolicy):
        for draws in model.policy.table.flatten(0, 1):
            draws[start : start + length] = ((torch.randperm(length) + 0.5) / length).to(draws)


# ---- Time ----


def clock() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(calls: dict[str, typing.Callable[[], dict]], repeats: int = 7, warmup: int = 1) -> pd.DataFrame:
    """Seconds [turn, name] of calls that time themselves, each once a turn, every second turn in reverse; attrs["E"] holds the depths that they executed."""
    turns, depth = [], {}
    for turn in range(warmup + repeats):
        done = {name: calls[name]() for name in (list(calls) if turn % 2 else list(calls)[::-1])}
        depth = {name: result.get("E") for name, result in done.items()}
        turns.append({name: done[name]["seconds"] for name in calls})
    seconds = pd.DataFrame(turns[warmup:])
    seconds.attrs["E"] = {name: None if E is None else float(E) for name, E in depth.items()}
    return seconds


def ratio(seconds: pd.DataFrame, over: str, under: str) -> dict:
    """Median and quartiles of the paired ratios of two columns, with the depth that the first one executed."""
    paired = seconds[over] / seconds[under]
    return dict(measured=float(paired.median()), quartiles=[float(q) for q in paired.quantile([0.25, 0.75])], repeats=len(paired), E=seconds.attrs["E"][over])


def training_step(model: nn.Module, windows: Tensor, dtype: torch.dtype | None = None) -> typing.Callable[[], dict]:
    """A whole training step on windows [B, L + 1]: forward, backward, clipping, AdamW at rate 0, which does the same work and leaves the weights.

    dtype None: the one that training chooses. A router holds its budget in each batch, as in `morlib.train`, and has its own biases back afterwards.
    """
    morlib.keep_memory()
    dtype = dtype or morlib.pick_device()[1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)

    routed = isinstance(getattr(model, "policy", None), morlib.Router) and model.cfg.target_depth is not None

    def step() -> dict:
        model.train()
        if routed:
            biases, model.policy.calibrating = model.policy.bias.clone(), True
        began = clock()
        with torch.autocast(windows.device.type, dtype, enabled=dtype != torch.float32):
            out = model(windows[:, :-1])
            logits = out if isinstance(out, Tensor) else out.logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = clock() - began
        if routed:
            model.policy.bias.copy_(biases)
            model.policy.calibrating = False
        return dict(seconds=seconds, E=None if isinstance(out, Tensor) else out.depth.double().mean())

    return step


def forward_pass(model: morlib.Transformer, tokens: Tensor, use_cache: bool = False) -> typing.Callable[[], dict]:
    """A forward pass without gradient on tokens [B, L] in evaluation mode; with a cache it is what decoding does with its prompt."""

    @torch.no_grad()
    def call() -> dict:
        model.eval()
        began = clock()
        out = model(tokens, morlib.Cache() if use_cache else None)
        return dict(seconds=clock() - began, E=out.depth.double().mean())

    return call


def decoding(model: morlib.Transformer, prompt: Tensor, tokens: int) -> typing.Callable[[], dict]:
    """Cached decoding of so many tokens after a prompt [B, L]; the prompt's pass is not timed.

    Also gives the seconds of each token, the cache, and the mean depth `held` of all the positions in it.
    """
    morlib.keep_memory()

    @torch.inference_mode()
    def call() -> dict:
        model.eval()
        cache, each, depth = morlib.Cache(), [], []
        out = model(prompt, cache)
        fresh, before = out.logits[:, -1:].argmax(-1), out.depth
        for _ in range(tokens):
            began = clock()
            out = model(fresh, cache)
            fresh = out.logits[:, -1:].argmax(-1)
            each.append(clock() - began)
            depth.append(out.depth)
        return dict(seconds=sum(each), each=each, E=torch.cat(depth, 1).double().mean(), held=torch.cat([before, *depth], 1).double().mean(), cache=cache)

    return call


def serving(model: morlib.Transformer, text: Tensor, batches: list[int], prompt: int, tokens: int, repeats: int = 7) -> pd.DataFrame:
    """Prefill and decode at several batches: milliseconds a token (p50, p95), tokens a second, depth, operations a token, cache bytes.

    text: token ids to take prompts from. Prefill's latency is that of the whole prompt, p50 and p95 over the repeats.
    """
    rows = []
    for B in batches:
        start = torch.arange(B)[:, None] * 7919 % (len(text) - prompt)
        tokens_in = text[start + torch.arange(prompt)].to(next(model.parameters()).device)
        hold_share(model, 0, prompt)
        hold_share(model, prompt, tokens)
        call = forward_pass(model, tokens_in, use_cache=True)
        runs = [call() for _ in range(repeats + 1)][1:]
        passes = pd.Series([run["seconds"] for run in runs])
        rows.append(_served("prefill", B, passes, B * prompt, runs[-1]["E"]))
        decode = decoding(model, tokens_in, tokens)
        decode()
        runs = [decode() for _ in range(max(repeats // 3, 1))]
        row = _served("decode", B, pd.Series(np.concatenate([run["each"] for run in runs])), B, runs[-1]["E"])
        rows.append(row | {"cache bytes a sequence": runs[-1]["cache"].bytes() / B, "E in cache": float(runs[-1]["held"])})
    return pd.DataFrame(rows)


def _served(phase: str, B: int, seconds: pd.Series, tokens: int, E: Tensor) -> dict:
    return {"phase": phase, "batch": B, "p50 (ms)": 1000 * seconds.median(), "p95 (ms)": 1000 * seconds.quantile(0.95),
            "tokens/s": tokens / seconds.median(), "E": float(E)}  # fmt: skip


def break_even(depths: list[float], seconds: list[float], fixed: float, N: int) -> float:
    """The share of skipped applications above which routing pays: a line through seconds against E, where it meets the fixed model's. NaN: never."""
    slope, base = np.polyfit(depths, seconds, 1)
    skip = 1 - (fixed - base) / slope / N if slope > 0 else np.nan
    return float(max(skip, 0.0)) if skip < 1 else np.nan


PARTS = ("attention", "feed-forward", "norms and residuals", "head and embedding", "router", "packing", "loss and optimizer")


@contextlib.contextmanager
def _labelled(model: morlib.Transformer):
    """Name the parts of a model to torch's profiler while this is open."""

    def wrap(function, part):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            with torch.profiler.record_function(f"part: {part}"):
                return function(*args, **kwargs)

        return inner

    named = [(model, "packing"), (model.policy, "router"), (model.embed, "head and embedding"), (model.dropout, "head and embedding"),
             (model.norm, "norms and residuals"), (model.head, "head and embedding")]  # fmt: skip
    for block in model.blocks:
        named += [(block, "norms and residuals"), (block.attention, "attention"), (block.feed_forward, "feed-forward")]
    with contextlib.ExitStack() as stack:
        for module, part in named:
            stack.enter_context(mock.patch.object(module, "forward", wrap(module.forward, part)))
        stack.enter_context(mock.patch.object(model, "run_step", wrap(model.run_step, "packing")))
        for name, function in list(vars(morlib.Packing).items()):
            if inspect.isfunction(function):
                stack.enter_context(mock.patch.object(morlib.Packing, name, wrap(function, "packing")))
        yield


def where_time_goes(model: morlib.Transformer, step: typing.Callable[[], dict], repeats: int = 7) -> pd.DataFrame:
    """Share of a training step's time [repeat, part], forward and backward, by torch's profiler.

    The backward pass of an operation belongs to the part that ran it forward. What a model does between its parts (who is asked, who
    runs, gather and scatter) counts as packing.
    """
    cuda = torch.cuda.is_initialized()
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    shares = []
    with _labelled(model):
        step()
        for _ in range(repeats):
            with _no_stderr(), torch.profiler.profile(activities=activities) as profiler:
                step()
            shares.append(_by_part(profiler.events(), "self_device_time_total" if cuda else "self_cpu_time_total"))
    return pd.DataFrame(shares)[[*PARTS]]


@contextlib.contextmanager
def _no_stderr():
    """Torch's profiler tells the process' stderr, past Python, that it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _by_part(events, cost: str) -> dict:
    """Share of the time a part, from a profile's events: each event's own time goes to the label, or the backward node, that encloses it."""
    maker = {}  # of a backward node, known by its number: the part that ran forward

    def part_of(event):
        while event is not None:
            if event.name.startswith("part: "):
                return event.name[len("part: ") :]
            if event.name.startswith("autograd::engine::evaluate_function"):
                return maker.get(event.sequence_nr)
            event = event.cpu_parent
        return None

    forward = [e for e in events if e.sequence_nr >= 0 and not e.name.startswith("autograd::") and part_of(e)]
    for event in sorted(forward, key=lambda e: e.time_range.start):
        maker[event.sequence_nr] = part_of(event)  # the last event before the number moves on made the node
    total = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if not event.name.startswith("ProfilerStep"):
            total[part_of(event) or "loss and optimizer"] += getattr(event, cost)
    return {part: value / sum(total.values()) for part, value in total.items()}


# ---- Memory, energy ----


def lines_of(path: str) -> list[str]:
    return Path(path).read_text(errors="replace").splitlines() if Path(path).is_file() else []


def _peak(config: morlib.ModelConfig, state: bytes, B: int, L: int, training: bool, connection) -> None:
    """In a process of its own: the most memory above what a model and its batch take, in bytes."""
    import resource

    torch.set_num_threads(1)
    model, windows = build(config), torch.zeros(B, L + 1, dtype=torch.long)
    model.load_state_dict(safetensors.torch.load(state))
    call = training_step(model, windows) if training else forward_pass(model, windows[:, :-1])
    before = int(lines_of("/proc/self/statm")[0].split()[1]) * os.sysconf("SC_PAGE_SIZE")
    call()
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def peak_memory(model: morlib.Transformer, B: int, L: int, training: bool = False) -> int | str:
    """Peak bytes that a pass or a training step needs above the model: on a card from torch's allocator, on Linux from a fresh process, else NOT_MEASURABLE."""
    if next(model.parameters()).is_cuda:
        windows = torch.zeros(B, L + 1, dtype=torch.long, device="cuda")
        call, before = training_step(model, windows) if training else forward_pass(model, windows[:, :-1]), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not lines_of("/proc/self/statm"):
        return NOT_MEASURABLE
    context = multiprocessing.get_context("forkserver")  # forks before torch has started a thread
    context.set_forkserver_preload(["deployment", "torch._dynamo"])  # an optimizer loads the second
    receive, send = context.Pipe(duplex=False)
    state = safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()})
    process = context.Process(target=_peak, args=(model.cfg, state, B, L, training, send))
    try:
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):  # what is preloaded is found where it was found here
            process.start()
        send.close()
        return receive.recv()
    except (EOFError, OSError):  # a program that was typed in has no file that a new process could begin with
        return NOT_MEASURABLE
    finally:
        if process.pid:
            process.join()


def energy_counter() -> tuple[typing.Callable[[], float], str] | None:
    """A function that reads joules so far, and what it reads; None where no counter can be read."""
    if torch.cuda.is_available():
        with contextlib.suppress(Exception):  # no library, no driver, a card before Volta: then there is no counter
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            card = nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            nvml.nvmlDeviceGetTotalEnergyConsumption(card)
            return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000, "NVML, the whole card"
    domains = [path for path in Path("/sys/class/powercap").glob("intel-rapl:*/energy_uj") if os.access(path, os.R_OK)]
    if domains:
        return lambda: sum(int(path.read_text()) for path in domains) / 1e6, "RAPL, the whole package"
    return None


def energy_a_token(call: typing.Callable[[], dict], tokens: int, seconds: float = 2.0) -> float | str:
    """Joules a token of a call that processes so many, over some seconds of calls; NOT_MEASURABLE without a counter."""
    counter = energy_counter()
    if counter is None:
        return NOT_MEASURABLE
    call()
    calls, began, before = 0, clock(), counter[0]()
    while not calls or clock() - began < seconds:
        call()
        calls += 1
    used = counter[0]() - before
    return used / (calls * tokens) if used > 0 else NOT_MEASURABLE  # a counter that went round


# ---- int8 ----


def as_int8(model: morlib.Transformer) -> morlib.Transformer | str:
    """A copy on the CPU whose blocks and head compute in int8 (weights stored so, activations quantised as they come); routers and norms keep float32.

    NOT_MEASURABLE where this torch has no int8 engine or has dropped eager quantisation.
    """
    small = copy.deepcopy(model).cpu().float().eval()
    try:
        with warnings.catch_warnings():  # torch moves this to the package torchao, which Kaggle's image and ours do not hold
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
