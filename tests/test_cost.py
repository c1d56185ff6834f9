"""What is said of cost is true: arithmetic as torch counts it, time, memory, energy, int8, goals, records."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import joblib
import nbformat
import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import morlib
from suite import cost, runs
from suite.cost import (
    bench,
    benched,
    goals,
    live,
    others,
    probes,
    speed,
    timing,
)
from suite.files import REFERENCE, ROOT, outputs
from suite.routing.interventions import Planned

TOKENS = torch.arange(48).view(4, 12) % 11


# ---- Arithmetic ----


def counted(call):
    """Torch's own count of a call: all operations, those of attention, and those of what attention saw."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watch(q, k, v, *args, **kwargs):
        seen.append((q.shape[0] * q.shape[2] * k.shape[2], q.shape[1] * q.shape[3]))
        return attend(q, k, v, *args, **kwargs)

    counter = FlopCounterMode(display=False)
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH), counter:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        out = call()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "bmm" in str(op))
    return out, counter.get_total_flops(), attention, sum(4 * pairs * width for pairs, width in seen)


def trained_once(model):
    """A forward and backward pass that an operation counter can watch."""

    def call():
        out = model(TOKENS)
        out.logits.sum().backward()
        return out

    return call


def evenly(model, per_row):
    """Planned routing in which each row of TOKENS runs as many tokens as any other."""
    applications = torch.zeros(model.cfg.n_layers, *TOKENS.shape, dtype=torch.long)
    for layer, count in enumerate(per_row):
        for row in range(len(TOKENS)):
            chosen = torch.randperm(12, generator=torch.Generator().manual_seed(row))[:count]
            applications[layer, row, chosen] = 1 + layer % 2
    model.policy = Planned(applications)
    return model


def test_operations_of_a_fixed_model_are_torchs(make_model):
    model = make_model(routing="none")
    out, total, attention, _ = counted(lambda: model(TOKENS))
    mine = cost.flops(model, out.actions)
    assert mine["total"] == total == sum(mine[part] for part in ("blocks", "attention", "router", "head"))
    assert mine["attention"] == attention and mine["router"] == 0
    out, total, *_ = counted(trained_once(model))
    assert cost.training_flops(model, out.actions) == total


def test_operations_of_a_planned_model_are_torchs(make_model):
    model = evenly(make_model(max_recursions=2, target_depth=1.5), (7, 3, 12))
    out, total, attention, computed = counted(lambda: model(TOKENS))
    mine = cost.flops(model, out.actions)
    assert mine["total"] - mine["attention"] == total - attention and attention == computed
    assert mine["attention"] <= computed, "what packing pads comes on top"
    if computed == mine["attention"]:
        assert mine["total"] == total


ROUTED = [
    dict(target_depth=1.5),
    dict(target_depth=2.2),
    dict(),
    dict(routing="frozen", target_depth=2.0),
    dict(granularity="sample"),
    dict(estimator="gumbel"),
    dict(routing="random", target_depth=2.0),
    dict(routing="even", target_depth=2.0),
]


@pytest.mark.parametrize("changes", ROUTED)
def test_operations_of_a_routed_model_are_torchs_router_included(make_model, changes):
    model = make_model(**dict(routing="mor") | changes).train()
    out, total, attention, computed = counted(trained_once(model))
    mine = cost.flops(model, out.actions)
    assert 0 < mine["attention"] <= computed and attention == 3 * computed
    assert cost.training_flops(model, out.actions) - 3 * mine["attention"] == total - attention
    assert (mine["router"] > 0) == (model.cfg.routing not in ("random", "even"))


@pytest.mark.parametrize("changes", [dict(routing="none"), dict(routing="even", target_depth=2.0)])
def test_operations_of_a_decoded_token_are_torchs(make_model, changes):
    model, cache, actions = make_model(**changes), morlib.Cache(), []
    with torch.no_grad():
        actions.append(model(TOKENS[:1, :8], cache).actions)
        for place in range(8, 12):
            out, total, attention, _ = counted(lambda p=place: model(TOKENS[:1, p : p + 1], cache))
            actions.append(out.actions)
            mine = cost.flops(model, torch.cat(actions, -1), fresh=1)
            assert mine["total"] - mine["attention"] == total - attention
            if model.cfg.routing == "none":
                assert mine["attention"] <= attention


def test_operations_a_token_add_up(make_model):
    models = {"fixed": make_model(routing="none"), "mor": make_model(target_depth=1.5)}
    table = cost.arithmetic(models, torch.cat([TOKENS, TOKENS[:, :1]], dim=1))
    assert list(table.index) == ["fixed", "mor"] and table.loc["fixed", "E"] == 3
    parts = table[["blocks", "attention", "router", "head"]].sum(axis=1)
    assert parts.to_numpy() == pytest.approx(table["forward"].to_numpy())
    assert table.loc["fixed", "training"] == pytest.approx(3 * table.loc["fixed", "forward"])
    assert table.loc["fixed", "router"] == 0 < table.loc["mor", "router"]


# ---- Blind routing for benches ----


@pytest.mark.parametrize("N, E", [(3, 2), (12, 8), (12, 6), (12, 3), (12, 12), (4, 5)])
def test_even_routing_runs_exactly_its_depth_in_inference(make_model, N, E):
    """Each token as many layers, each layer its share; in one pass and in several with a cache alike."""
    model = make_model(n_layers=N, routing="even", target_depth=float(E))
    with torch.no_grad():
        out, cache = model(TOKENS), morlib.Cache()
        parts = [model(TOKENS[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert (out.depth == E).all()
    assert torch.equal(torch.cat([part.actions for part in parts], -1), out.actions)
    by_layer = (out.actions >= morlib.FORWARD).double().sum(1).mean((1, 2))
    assert (by_layer - E / N).abs().max() < 0.1, "of 48 tokens"


def test_even_routing_runs_about_a_depth_that_is_no_whole_number(make_model):
    depth = make_model(routing="even", target_depth=1.5)(TOKENS).depth
    assert set(depth.unique().tolist()) == {1, 2} and depth.double().mean() == pytest.approx(1.5, abs=0.1)


def test_even_routing_is_known_in_the_cost_room_only():
    known = "print(*morlib.POLICIES)"
    program = f"import morlib, suite.results; {known}; import suite.cost; {known}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    before, after = done.stdout.splitlines()
    assert "even" not in before.split() and after == f"{before} even even-once", done.stderr


# ---- Turns and ratios ----


def test_ratios_are_paired_turn_by_turn():
    drift, depth = iter(range(1, 100)), iter([100, 5, 6, 7])
    calls = {
        "a": lambda: dict(seconds=2.0 * next(drift), E=next(depth)),
        "b": lambda: dict(seconds=2.0),
    }
    timings = cost.in_turn(calls, repeats=3)
    assert len(timings.seconds) == 3 and timings.depth == {"a": 6.0, "b": None}, "no warm-up counts"
    assert timings.ratio("a", "b") == dict(measured=3.0, quartiles=[2.5, 3.5], repeats=3, E=6.0)
    assert timings.milliseconds("a") == 6000.0


def test_every_second_turn_is_in_reverse():
    order = []
    calls = {name: lambda name=name: order.append(name) or dict(seconds=1.0) for name in "ab"}
    cost.in_turn(calls, repeats=2, warmup=1)
    assert "".join(order) in ("baabba", "abbaab")


def test_a_timed_training_step_leaves_the_model_as_it_was(make_model):
    """It sets thresholds in each batch, as training does, and gives the router its own back."""
    model = make_model(target_depth=1.5)
    morlib.calibrate(model, TOKENS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = cost.training_step(model, torch.cat([TOKENS, TOKENS[:, :1]], dim=1))
    assert step()["E"] == pytest.approx(1.5, abs=0.1) and step()["seconds"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_timed_training_step_takes_a_dtype(make_model):
    model, seen = make_model(routing="none"), []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        cost.training_step(model, torch.cat([TOKENS, TOKENS[:, :1]], dim=1), dtype)()
    assert seen == [torch.float32, torch.bfloat16]


def test_uncached_passes_are_each_done_once(make_model):
    model, lengths = make_model(routing="none"), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    call = others.uncached_generation(model, 12, stride=4)
    for _ in range(4):
        call()
    assert sorted(lengths) == list(range(1, 13))


def test_cached_generation_in_parts_is_one_generation(make_model):
    """The parts, one after another, write what `generate` writes; after the last it starts again."""
    model, fed = make_model(routing="none"), []
    model.register_forward_pre_hook(lambda module, args: fed.append(int(args[0][0, -1])))
    call = others.cached_generation(model, torch.zeros(1, 1, dtype=torch.long), 12, parts=3)
    assert all(call()["seconds"] > 0 for _ in range(3)) and len(fed) == 12
    written = fed[:]
    call()
    assert fed[12:] == written[:4]
    prompt = torch.zeros(1, dtype=torch.long)
    assert morlib.generate(model, prompt, 11, use_cache=False).tolist() == written


def test_the_plain_loop_generates_what_the_model_does(make_model):
    """With a prompt, in parts, several sequences; and begins anew where all parts are done."""
    model, prompt = make_model(routing="none"), TOKENS[:, :3]
    ours, plain, made = others.cached_generation(model, prompt, 8, 2), None, []
    model.head.register_forward_hook(lambda module, args, output: made.append(output.view(len(prompt), -1)))
    for _ in range(3):
        assert ours()["seconds"] > 0
    of_ours, made[:] = [out for out in made if out.shape[1] == 11], []
    plain = others.plain_generation(model, prompt, 8, 2)
    for _ in range(3):
        assert plain()["seconds"] > 0
    of_plain = [made[i] for i in range(len(made)) if i not in (0, 9)]  # the pass over the prompt, twice
    assert len(of_ours) == len(of_plain) == 12
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(of_ours, of_plain))


@pytest.mark.parametrize("E", (2.0, 3.5))
def test_even_once_runs_its_share_and_decodes_alike(make_model, E):
    model = make_model(n_layers=5, routing="even-once", target_depth=E, max_recursions=1)
    with torch.no_grad():
        out, cache = model(TOKENS), morlib.Cache()
        parts = [model(TOKENS[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
        drawn = model(TOKENS, sampling=True)
    assert out.depth.unique().tolist() == [1, 5] and out.depth.double().mean() == pytest.approx(E, abs=0.2)
    assert torch.equal(torch.cat([part.depth for part in parts], -1), out.depth)
    assert drawn.depth.double().mean() == pytest.approx(E, abs=2 / TOKENS.numel())


def test_a_timed_training_step_of_token_worth_learns_from_those_explored(make_model):
    model = make_model(routing="worth", target_depth=2.0, max_recursions=1)
    before, windows = model.policy.price.clone(), torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
    model.policy.EXPLORED = (0.5, 0.5)
    cost.training_step(model, windows)()
    assert all(p.grad is not None and p.grad.any() for p in model.policy.network.parameters())
    assert torch.equal(model.policy.price, before)


def test_break_even_is_where_the_line_meets_the_fixed_model():
    assert cost.break_even([3, 6, 9], [0.4, 0.7, 1.0], 1.0, 12) == pytest.approx(0.25)
    assert cost.break_even([3, 6, 9], [0.2, 0.4, 0.6], 1.0, 12) == 0, "cheaper even where nothing is skipped"
    assert pd.isna(cost.break_even([3, 6, 9], [1.1, 1.2, 1.3], 0.9, 12)), "dearer even where all is skipped"
    assert cost.break_even([3, 6, 9], [0.5, 0.5, 0.49], 1.0, 12) == 0, "half of the time at any depth"
    assert pd.isna(cost.break_even([3, 6, 9], [1.1, 1.1, 1.0], 0.9, 12)), "flat, and dearer"


def test_break_even_at_several_batches(make_model, corpus):
    size = dict(vocab_size=corpus.vocab_size)
    blind = [make_model(routing="even", target_depth=float(E), **size) for E in (1, 2)]
    table = cost.break_even_table(make_model(routing="none", **size), blind, corpus, [1, 2], repeats=2)
    kinds = ["training step", "prefill", "decode"]
    assert table[["kind", "batch"]].values.tolist() == [[kind, B] for B in (1, 2) for kind in kinds]
    rate = table["skip rate"].dropna()
    assert ((rate >= 0) & (rate < 1)).all()


def test_serving_gives_latency_throughput_and_cache(make_model):
    model = make_model(routing="even", target_depth=2.0, max_len=16)
    table = cost.serving(model, torch.arange(200) % 11, [1, 4], prompt=8, tokens=4, repeats=3)
    phases = [["prefill", 1], ["decode", 1], ["prefill", 4], ["decode", 4]]
    assert table[["phase", "batch"]].values.tolist() == phases
    assert (table["p95 (ms)"] >= table["p50 (ms)"]).all() and (table["tokens/s"] > 0).all()
    assert table["E"].tolist() == [2.0] * 4
    assert table["cache bytes a sequence"].notna().tolist() == [False, True, False, True]


def test_nothing_needs_float64_which_apple_gpus_have_not(make_model, monkeypatch):
    def double(self):
        raise TypeError("the MPS framework doesn't support float64")

    monkeypatch.setattr(torch.Tensor, "double", double)
    model, windows = make_model(routing="even", target_depth=2.0), torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
    calls = [cost.training_step(model, windows), cost.forward_pass(model, TOKENS)]
    calls += [cost.decoding(model, TOKENS[:, :4], 4), others.cached_generation(model, TOKENS[:, :4], 4, 1)]
    assert [float(call()["E"]) for call in calls[1:]] == [2.0] * 3 and 1 < calls[0]()["E"] < 3
    assert cost.arithmetic({"even": model}, windows)["E"].tolist() == [2.0]


def test_the_clock_waits_for_the_device_that_is_timed(make_model, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(str(device)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for device in ("cuda:1", "cpu", torch.device("mps")):
        assert timing.clock(device) > 0
    assert waited == ["cuda:1", "mps"]
    cost.forward_pass(make_model(routing="none"), TOKENS)()
    assert len(waited) == 2, "a model on the CPU waits for no card"


# ---- Parts of a step, memory, energy, int8 ----


def test_the_parts_of_a_step_on_the_cpu_are_the_cpus_also_where_a_card_is_in_use(make_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    model = make_model(routing="none")
    parts = cost.where_time_goes(model, cost.forward_pass(model, TOKENS), repeats=1)
    assert parts.sum(axis=1).to_numpy() == pytest.approx([1.0])


def test_the_parts_of_a_step_are_all_of_it(make_model):
    windows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
    ours = ["attention", "feed-forward", "head and embedding", "loss and optimizer"]
    for routing in ("none", "mor"):
        model = make_model(routing=routing, target_depth=None if routing == "none" else 1.5)
        parts = cost.where_time_goes(model, cost.training_step(model, windows), repeats=2)
        assert list(parts) == list(cost.PARTS) and parts.sum(axis=1).to_numpy() == pytest.approx([1.0, 1.0])
        assert (parts[ours] > 0).to_numpy().all()
        assert routing == "none" or (parts[["router", "packing"]] > 0).to_numpy().all()
        hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
        assert not any(before or after for after, before in hooks), "nothing stays behind"


def test_moving_tokens_counts_as_packing_also_inside_attention(make_model):
    """What TakeRows and PadRows do, forward and backward, and finding the places, is none of attention's."""
    model = make_model(target_depth=1.5)
    windows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
    step = cost.training_step(model, windows)
    with probes.labelled(model), torch.profiler.profile() as profiler:
        step()
    named = {}
    for event in profiler.events():
        named.setdefault(event.name, []).append(event)

    def parents(event):
        while event := event.cpu_parent:
            yield event.name

    places = named["aten::bincount"]  # which rows have how many tokens
    assert all("part: attention" not in set(parents(event)) for event in places)
    assert all(probes.part_of(event, {}) == "packing" for event in places)
    assert any("part: attention" in set(parents(event)) for event in named["PadRows"])
    assert all(probes.part_of(event, {}) == "packing" for event in named["PadRows"] + named["TakeRows"])
    assert all(probes.part_of(event, {}) == "packing" for event in named["PadRowsBackward"])


def test_hooks_go_also_when_a_step_fails(make_model):
    model = make_model(target_depth=1.5)
    with pytest.raises(ValueError, match="out of range"), probes.labelled(model):
        model(TOKENS + 100)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_energy_is_read_or_said_to_be_unreadable(monkeypatch):
    monkeypatch.setattr(probes, "energy_counter", lambda device: None)
    assert cost.energy_a_token(dict, 1, "cpu") == cost.NOT_MEASURABLE == "not measurable here"
    joules = iter((10.0, 30.0))
    monkeypatch.setattr(probes, "energy_counter", lambda device: (lambda: next(joules), "a counter"))
    assert cost.energy_a_token(dict, 5, "cpu", seconds=0.0) == 4.0, "20 joules, one call, 5 tokens"
    joules = iter((30.0, 1.0))
    assert cost.energy_a_token(dict, 5, "cpu", seconds=0.0) == cost.NOT_MEASURABLE, "the counter went round"


@pytest.fixture
def power_zones(tmp_path, monkeypatch):
    """RAPL of two processors, the cores of one of them, and the board; the joules of each."""
    zones = {"0": ("package-0", 3), "0:0": ("core", 2), "1": ("package-1", 5), "2": ("psys", 9)}
    for number, (name, joules) in zones.items():
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text(f"{joules}000000\n")
    monkeypatch.setattr(probes, "POWER_ZONES", tmp_path)


def test_the_energy_of_processors_counts_once(power_zones):
    read, what = cost.energy_counter("cpu")
    assert read() == 8.0 and what == "RAPL, the whole package"
    assert cost.energy_counter("mps") is None


def test_the_energy_of_a_card_is_that_of_the_models_card(power_zones, monkeypatch):
    """Found by its id, as the driver counts hidden cards, too."""
    cards = {"GPU-first": 1000, "GPU-second": 7000}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: "GPU-first",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda card: cards[card],
    )
    names = {torch.device("cuda:0"): "hidden", torch.device("cuda:1"): "second"}
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=names[d]))
    read, what = cost.energy_counter("cuda:1")
    assert read() == 7.0 and what == "NVML, the whole card"
    assert cost.energy_counter("cuda:0") is None, "a card that NVML does not find; the processor is another"
    assert cost.energy_counter("cpu")[1] == "RAPL, the whole package"


def test_peak_memory_on_a_card_is_that_of_the_models_card(monkeypatch):
    card, asked = torch.device("cuda:1"), []
    allocated = {"memory_allocated": 5, "reset_peak_memory_stats": None, "max_memory_allocated": 12}
    for name, n in allocated.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, n=n: asked.append(device) or n)
    monkeypatch.setattr(probes, "_call", lambda *case: dict)
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=card)]))
    assert probes._peak_on_card(model, 1, 4, False, torch.float32) == 7 and asked == [card] * 3


@pytest.fixture
def of_a_user(tmp_path, monkeypatch):
    """A user's policies, by name: of a module that registers nothing, and of no module, as in a notebook."""
    code = "import morlib\n\nprint('hello')\n\n\nclass Own(morlib.RandomPolicy):\n    pass\n"
    (tmp_path / "own_policy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    class Here(morlib.RandomPolicy):
        pass

    policies = {"own": importlib.import_module("own_policy").Own, "here": Here}
    for name, policy in policies.items():
        monkeypatch.setitem(morlib.POLICIES, name, policy)
    return policies


def test_peak_memory_grows_with_the_batch(make_model, monkeypatch, tmp_path, of_a_user):
    """From any folder, in a process that is told where our modules are while this one's environment stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    size = dict(n_layers=2, d_model=32, d_ff=512, max_len=64)
    blind = make_model(**size, routing="even", target_depth=1.0)
    models = {"fixed": make_model(**size, routing="none"), "blind": blind}
    models |= {name: make_model(**size, routing=name, target_depth=1.0) for name in of_a_user}
    small, large = (cost.peak_memory(models, B, 64) for B in (2, 128))
    assert "PYTHONPATH" not in os.environ
    assert list(small) == ["forward pass", "training step"] and list(small.index) == [*models]
    if sys.platform != "linux":
        assert (small == cost.NOT_MEASURABLE).to_numpy().all()
        pytest.skip("no counter of resident memory here")
    assert (small.loc["here"] == cost.NOT_MEASURABLE).all(), "no other process can find it"
    small, large = small.drop("here"), large.drop("here")
    assert small.map(lambda value: isinstance(value, int)).to_numpy().all()
    assert (large["training step"] > small["training step"] + 2_000_000).all()
    assert (large["training step"] > large["forward pass"]).all()


def test_what_cannot_be_measured_is_said_in_words(make_model, monkeypatch):
    monkeypatch.setattr(probes.sys, "executable", "/bin/false")
    table = cost.peak_memory({"fixed": make_model(routing="none")}, 2, 12)
    assert (table == cost.NOT_MEASURABLE).to_numpy().all()


def test_int8_is_smaller_and_as_good(corpus):
    size = dict(n_layers=3, d_model=32, n_heads=2, d_ff=128, max_len=16, dropout=0.0, target_depth=2.0)
    model = cost.build(morlib.ModelConfig(corpus.vocab_size, **size))
    short = dict(epochs=2, windows=160, batch_size=8, lr=5e-3, evaluations=1, eval_windows=8)
    morlib.train(model, corpus, morlib.TrainConfig(**short))
    small = cost.as_int8(model)
    if isinstance(small, str):
        assert small == cost.NOT_MEASURABLE
        pytest.skip("this torch has no int8 engine")
    before, after = (morlib.evaluate(m, corpus, "val") for m in (model, small))
    assert after["loss"] == pytest.approx(before["loss"], abs=0.05)
    assert after["effective_depth"] == pytest.approx(before["effective_depth"], abs=0.3)
    assert cost.stored_bytes(small) < 0.6 * cost.stored_bytes(model)
    assert any(p.dtype == torch.float32 for p in small.policy.parameters())
    assert next(model.blocks[0].parameters()).dtype == torch.float32, "the model itself stays"
    table = cost.int8_table({"mor": model}, corpus, repeats=2)
    assert list(table.index) == [("mor", "float32"), ("mor", "int8")] and table.notna().to_numpy().all()


# ---- Goals and records ----


def goal(sense, limit):
    return goals.Goal("k", "w", sense, limit, "CPU", "because")


def test_goals_say_what_is_met_and_by_how_much_not():
    most, least, close = goal("at most", 0.8), goal("at least", 0.7), goal("within", 0.01)
    assert [most.verdict(x) for x in (0.8, 0.84)] == ["reached by 0.0 %", "missed by 5.0 %"]
    assert [least.verdict(x) for x in (0.7, 0.35)] == ["reached by 0.0 %", "missed by 50.0 %"]
    assert [close.verdict(x) for x in (0.998, 1.03)] == ["reached by 0.8 %", "missed by 2.0 %"]
    said = goal("said", 1.0)
    assert [g.words() for g in (most, least, close, said)] == ["≤ 0.8", "≥ 0.7", "1 ± 0.01", "–"]
    assert said.met(7.0) and said.verdict(7.0) == "", "no goal is missed where there is none"
    assert len({g.what for g in goals.GOALS}) == len(goals.GOALS) == len({g.key for g in goals.GOALS})
    assert all(g.why for g in goals.GOALS)


def test_the_table_holds_every_goal_and_says_why_a_row_misses():
    row = dict(measured=0.9, quartiles=[0.8, 1.0], E=8.0, dtype="float32")
    note = "no units for bfloat16 in this processor"
    rows = {"train-8": row, "bfloat16": dict(measured=None, note=note), "rate": dict(measured=0.77)}
    sizes = dict(batch=32, length=64, long_batch=4, long_length=512, generated=128)
    record = dict(rows=rows | {"int8": dict(measured=0.6, note="faster here")}, sizes=sizes)
    table = cost.table(record)
    assert list(table.index) == [g.key for g in goals.GOALS]
    shown = table.loc["train-8", ["measured", "goal", "reached", "E"]].tolist()
    assert shown == ["0.900", "≤ 0.75", "missed by 20.0 %", "8.00"]
    reached = table["reached"][["bfloat16", "rate", "train-6", "train-8-gpu", "int8"]].tolist()
    assert reached == [note, "reached by 10.0 %", "not measured", "needs a GPU", "faster here"]
    assert table.loc["train-8", "what"] == "training step, blind E = 8 / fixed, 32 × 64 tokens"
    (line,) = cost.misses(record)
    assert "missed by 20.0 %" in line and line.endswith(goals.PACKED)
    record["rows"]["train-6"] = dict(measured=0.7)
    assert len(cost.misses(record)) == 1, "rows with one reason share a line"


def test_what_a_plain_loop_reaches_stands_beside_generation():
    (record,) = cost.speed_records()
    seconds = record["seconds"]
    plain = seconds["decoding, decided once, batch 1"]["plain"]["median"]
    share = plain / seconds["generation"]["uncached"]["median"]
    assert 0.08 < share < record["rows"]["generation"]["measured"], "even that misses the goal"
    told = [line for line in cost.misses(record) if line.startswith("generating 512 tokens")]
    assert len(told) == 1 and f"; a plain loop over keys made beforehand comes to {share:.3f})" in told[0]
    del seconds["generation"]
    assert "a plain loop over keys" not in "".join(cost.misses(record))


def test_what_is_said_of_a_router_a_layer_at_width_64_holds():
    tables = json.loads((REFERENCE / "deployment_cpu.json").read_text(encoding="utf-8"))["tables"]
    shares = pd.DataFrame(tables["shares"]["data"]).set_index("model").loc["MoR E = 8"]
    assert 0.2 < shares["router"] + shares["packing"] < 0.3, "a quarter of a step"
    turns = pd.DataFrame(tables["turns"]["data"]).query("panel == 'training step' and model == 'once E = 8'")
    assert turns["quartiles"].tolist() == ["0.72 to 1.00"], "the edge that notebook 06 tells of"


def test_the_goals_are_those_of_the_table_of_speed():
    limits = {g.key: g.limit for g in goals.GOALS}
    decoding = [limits[f"decode-{kind}-{B}"] for kind in ("once", "router", "plain") for B in (1, 8, 32)]
    assert decoding == [0.56, 0.60, 0.63, 0.68, 0.75, 0.80, 1, 1, 1]
    training = [limits[f"{kind}-{E}"] for kind in ("once", "worth", "train-once") for E in (8, 6)]
    assert training == [0.80, 0.62, 0.80, 0.62, 0.72, 0.54]
    others = [limits[key] for key in ("generation", "nanogpt", "share", "bfloat16", "bfloat16-loss")]
    assert others == [0.08, 0.95, 0.04, 0.70, 0.01]


def test_the_stored_record_is_found_and_each_of_its_rows_is_one_that_has_a_goal():
    (record,) = cost.speed_records()
    here = {g.key for g in goals.GOALS if g.where == "CPU"}
    gone = {"dtype", "dtype-loss"}  # rows of records made before bfloat16 had rows of its own
    assert set(record["rows"]) <= here | gone and len(record["rows"]) > 20
    measured = [key for key, row in record["rows"].items() if row["measured"] is not None and key in here]
    assert len(cost.ratios(record)) == len(measured)
    assert not any(word in cost.ratios(record).reset_index().to_string() for word in ("goal", "missed", "≤"))


def test_stored_records_open_the_notebook(tmp_path, capsys):
    cost.headline(tmp_path)
    assert "`make bench` makes one" in capsys.readouterr().out
    (record,) = cost.speed_records()
    (tmp_path / "speed_here.json").write_text(json.dumps(record), encoding="utf-8")
    for kind in ("quick", "tiny"):
        (tmp_path / f"speed_here_{kind}.json").write_text("not read", encoding="utf-8")
    cost.headline(tmp_path)
    shown = capsys.readouterr().out
    keys = ("train-small", "once-8", "train-8-router", "train-once-8")
    small, once, routed, once_wide = (f"{record['rows'][key]['measured']:.2f}" for key in keys)
    assert (
        f"takes {small} of the fixed model's time, and {once} where chance decides once for all layers."
        in shown
    )
    assert (
        f"At the sources' size (width 256) it takes {routed}, and {once_wide} where chance decides once."
        in shown
    )
    decoded = f"{record['rows']['decode-1']['measured']:.2f}"
    assert f"decoding, 1 sequence, blind at each layer, half skipped | {decoded} |" in shown
    assert "goal" not in shown and "missed" not in shown, "goals are for developers"


@pytest.mark.parametrize("small, large, where", [
    (1.03, 0.72, "at the sources' size only"), (0.9, 1.1, "in small models only"),
    (0.9, 0.8, "at both sizes"), (1.2, 1.1, "nowhere"),
])  # fmt: skip
def test_the_short_answer_on_time_is_that_of_both_sizes(small, large, where):
    rows = {"train-small": small, "train-8-router": large, "once-8": 0.8, "train-once-8": 1.1}
    record = dict(sizes=dict(model=dict(d_model=256)))
    record["rows"] = {key: dict(measured=r - 0.1, quartiles=[r - 0.2, r]) for key, r in rows.items()}
    told = f"with MoR's router {where}; where chance decides once for all layers in small models only"
    assert cost.short(record) == f"In training: {told}."
    del record["rows"]["train-small"]
    assert cost.short(record) == cost.training_sentence(record) == ""


def test_the_sentence_on_training_is_the_record_s_ratios():
    (record,) = cost.speed_records()
    rows, told = ("train-small", "once-8", "train-8-router", "train-once-8"), cost.training_sentence(record)
    assert re.findall(r"\d\.\d\d", told) == [f"{record['rows'][key]['measured']:.2f}" for key in rows]
    assert "skips a third" in told


def test_a_record_of_some_groups_can_be_shown(tmp_path, capsys):
    """`--only` leaves rows out; what is there is shown."""
    (record,) = cost.speed_records()
    record["rows"] = {"train-8": record["rows"]["train-8"]}
    assert len(cost.first_table(record)) == 1
    (tmp_path / "speed_here.json").write_text(json.dumps(record), encoding="utf-8")
    cost.headline(tmp_path)
    assert "This record does not hold training at both sizes" in capsys.readouterr().out
    record["sizes"]["model"] |= dict(d_model=16, d_ff=32)  # counted sooner
    assert cost.operations_and_time(record).isna().to_numpy().sum() == 7


@pytest.mark.parametrize("row, words", [
    (dict(measured=0.74, quartiles=[0.7, 0.8]), "saves 26 % of the time"),
    (dict(measured=1.03, quartiles=[1.02, 1.07]), "3 % slower"),
    (dict(measured=0.98, quartiles=[0.96, 1.0]), "no faster"),
])  # fmt: skip
def test_a_ratio_in_words(row, words):
    assert speed.verdict(row) == words


@pytest.fixture(scope="module")
def operations_and_time():
    """Of the record that ships; to be read alone."""
    (record,) = cost.speed_records()
    return cost.operations_and_time(record)


def test_operations_and_time_are_shares_of_the_fixed_models(operations_and_time):
    (record,), table = cost.speed_records(), operations_and_time
    assert (table.loc["fixed"] == 1).all() and table.notna().to_numpy().all()
    for kind, key in (("training step", "train"), ("forward pass", "forward")):
        timed = [record["rows"][f"{key}-{name}"]["E"] / 12 for name in ("8", "8-router", "6", "6-router")]
        assert table[kind, "depth"].tolist() == pytest.approx([1, *timed], abs=0.01), "as deep as was timed"
    assert table["forward pass", "time"]["blind, E = 8"] == record["rows"]["forward-8"]["measured"]
    operations = table["training step", "operations"]
    router, blind = operations["with a router, E = 6"], operations["blind, E = 6"]
    assert 0.48 < blind < router < 0.53, "asking costs operations, too"


# ---- The bench ----


def the_record():
    (path,) = (outputs() / "results").glob("speed_*_tiny.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_row_of_the_bench_is_measured_and_kept(capsys, same_threads):
    bench.main(["--tiny", "--threads", "1"])
    record = the_record()
    here = [g.key for g in goals.GOALS if g.where == "CPU" or torch.cuda.is_available()]
    assert sorted(record["rows"]) == sorted(here)
    about = "device cpu gpu cores threads load versions date commit sizes dtype rows seconds took parts"
    assert set(about.split()) <= set(record)
    assert record["versions"]["morlib"].startswith(f"{morlib.__version__}+") and record["threads"] == 1
    for key, row in record["rows"].items():
        if row["measured"] is not None:
            assert row["dtype"] and row["date"], key
            one_number = key in ("cache", "bfloat16-loss")
            assert one_number or row["repeats"] >= 2 and len(row["quartiles"]) == 2, key
    for key in (
        "train-8",
        "train-6",
        "train-8-long",
        "train-once-8",
        "train-once-6",
        "decode-1",
        "decode-32",
    ):
        E = 8 if "8" in key else 6
        assert record["rows"][key]["E"] == pytest.approx(E, abs=0.1), "it runs the share it was asked for"
    for key in ("router-1", "router-8", "router-32", "once-8", "once-32"):
        assert record["rows"][f"decode-{key}"]["E"] == pytest.approx(6, abs=0.4), "in few tokens"
    assert record["rows"]["cache"]["measured"] == pytest.approx(1, abs=0.01)
    assert sum(record["parts"].values()) == pytest.approx(1, abs=0.1)
    assert set(record["took"]) == set(bench.GROUPS)
    assert "needs a GPU" in capsys.readouterr().out or torch.cuda.is_available()


def test_the_bench_goes_on_where_it_was(capsys, same_threads):
    """Groups that a record holds stay, unless they are asked for by name; a limit of time ends it early."""
    path = bench.record_path(outputs() / "results", "speed", "tiny")
    sizes, tiny = benched.TINY, ["--tiny", "--threads", "1"]
    bench.measure(("int8", "generation"), sizes, path, minutes=0)
    assert "the same command goes on with int8, generation" in capsys.readouterr().out and not path.exists()
    bench.main([*tiny, "--only", "generation"])
    first = the_record()
    assert list(first["took"]) == ["generation"]
    bench.measure(("int8", "generation"), sizes, path)
    second = the_record()
    assert second["rows"]["generation"] == first["rows"]["generation"] and "int8" in second["rows"]
    bench.measure(("int8", "generation"), sizes, path)
    assert the_record() == second, "nothing is left to measure"
    bench.main([*tiny, "--only", "generation", "--turns", "8"])
    third = the_record()
    assert third["rows"]["generation"]["repeats"] == 8 and third["rows"]["int8"] == second["rows"]["int8"]


def test_the_kinds_of_a_bench_have_the_turns_and_the_minutes_asked():
    (full, most), (quick, few) = bench.KINDS["full"], bench.KINDS["quick"]
    assert (full.turns, full.short_turns, most, few) == (7, 15, 40, 10)
    assert quick.model == full.model and quick.generated == full.generated == 512, "the rows mean the same"


def test_a_record_of_another_version_is_begun_anew():
    (record,) = cost.speed_records()
    more_turns = record | dict(sizes=record["sizes"] | dict(turns=99, short_turns=99))
    assert speed.comparable(record) == speed.comparable(more_turns)
    other = record | dict(versions=record["versions"] | dict(morlib="0.2.0+another1"))
    assert speed.comparable(record) != speed.comparable(other)


def test_the_bench_names_its_groups(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "everything"])
    assert "no group everything; there are training, once, router" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--turns", "3"])
    assert "--turns must be 7 or more" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_bench_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("suite.cost.bench", run_name="__main__")
    told = capsys.readouterr()
    assert ended.value.code == 0 and not told.err
    for option in "turns only quick tiny growth reference threads router-steps".split():
        assert f"--{option}" in told.out


# ---- Cards ----


def test_runs_side_by_side_have_a_card_each(monkeypatch, tmp_path):
    monkeypatch.setattr(runs.device.tempfile, "gettempdir", lambda: str(tmp_path))
    with runs.device.claim_card(0, 2) as first, runs.device.claim_card(1, 2) as second:
        assert {first, second} == {0, 1}
        with runs.device.claim_card(2, 2) as third:
            assert third == 0, "when all are taken, they are shared in turn"
    with runs.device.claim_card(1, 2) as again:
        assert again == 0, "a card that is free again is taken"
    for cards in (0, 1):
        with runs.device.claim_card(1, cards) as card:
            assert card is None, "nothing to hand out"


def test_two_workers_take_two_cards(tmp_path):
    """In processes of their own, as runs have them."""

    def which(worker, folder):
        runs.device.tempfile.tempdir = folder
        took, latest = Path(folder), time.monotonic() + 60
        with runs.device.claim_card(worker, 2) as card:
            (took / f"took-{worker}").touch()
            while len(list(took.glob("took-*"))) < 2 and time.monotonic() < latest:
                time.sleep(0.01)  # so that both hold one at a time
            return card

    jobs = joblib.Parallel(n_jobs=2)(joblib.delayed(which)(worker, str(tmp_path)) for worker in range(2))
    assert sorted(jobs) == [0, 1]


def test_the_preset_paper_runs_one_seed_a_card(monkeypatch):
    for cards, jobs in ((0, 1), (1, 1), (2, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        assert runs.settings(dict(preset="paper")).jobs == jobs
        assert runs.settings(dict(preset="paper", jobs=1)).jobs == 1
        assert runs.settings(dict(preset="quick")).jobs == 2


# ---- The notebook ----


def test_the_notebook_shows_ratios_and_no_goals():
    notebook = nbformat.read(ROOT / "notebooks" / "06_deployment.ipynb", 4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    text = json.dumps(notebook).lower()
    assert "goal" not in text and "missed by" not in text


def test_what_the_notebook_says_of_numbers_comes_from_the_record(operations_and_time):
    """No number of the record stands in prose; what is printed is the record's."""
    (record,) = cost.speed_records()
    notebook = nbformat.read(ROOT / "notebooks" / "06_deployment.ipynb", 4)
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells], ensure_ascii=False)
    for table in (operations_and_time.round(2), cost.ratios(record)):
        with pd.option_context("display.max_colwidth", None):  # as in the notebook
            cells = table.to_html().split("<tbody>")[1]
        assert json.dumps(cells, ensure_ascii=False)[1:-1] in printed
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not any(f"{row['measured']:.2f}" in prose for row in record["rows"].values() if row["measured"])


def test_a_record_says_from_which_commit_it_is_and_whether_that_was_changed(tmp_path, monkeypatch):
    def git(*words):
        own = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *own, *words], check=True, capture_output=True)

    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert cost.machine()["commit"] is None, "no checkout"
    git("init")
    (tmp_path / "file").write_text("one", encoding="utf-8")
    git("add", "file")
    git("commit", "-m", "first")
    assert re.fullmatch("[0-9a-f]{12}", cost.machine()["commit"])
    (tmp_path / "other").touch()  # not in git: no change of what it holds
    assert re.fullmatch("[0-9a-f]{12}", cost.machine()["commit"])
    (tmp_path / "file").write_text("two", encoding="utf-8")
    assert re.fullmatch("[0-9a-f]{12}, changed", cost.machine()["commit"])


def test_rows_of_one_thread_say_so():
    (record,) = cost.speed_records()
    alone = {key for key, row in record["rows"].items() if row.get("note") == "one thread"}
    assert {"once-8", "worth-8", "train-small"} <= alone
    assert sum(what.endswith(", one thread") for what in cost.ratios(record).index) == len(alone)
    first = cost.first_table(record)["measured"]
    assert sum(first.str.endswith("skipped, one thread")) == len(alone & set(speed.SHOWN))


# ---- What the notebook measures on the reader's machine ----


def test_tables_are_measured_once_and_read_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path))
    measured, called = cost.Measured(runs.settings(dict(preset="cpu", device="cpu"))), []
    nested = {
        ("fixed", "int8"): {"size (MB)": 1.5, "E": None},
        ("fixed", "float32"): {"size (MB)": 6.0, "E": 2.0},
    }
    tables = {
        "turns": pd.DataFrame(
            [dict(panel="step", model="fixed", E=3.0), dict(panel="step", model="b", E=None)]
        ),
        "int8": pd.DataFrame(nested).T.rename_axis(["model", "weights"]),
        "energy": cost.NOT_MEASURABLE,
    }
    for name, table in tables.items():
        for _ in range(2):
            assert measured(name, lambda name=name, table=table: called.append(name) or table) is table
    assert called == list(tables)
    assert measured.save() == "deployment_cpu.json"

    again = cost.Measured(runs.settings(dict(preset="stored", device="cpu")), folder=tmp_path)
    assert "The stored record: preset cpu" in again.about() and "float32" in again.about()
    for name, table in tables.items():
        found = again(name, lambda: pytest.fail("nothing is measured under the preset stored"))
        assert found == table if isinstance(table, str) else found.equals(table)
    with pytest.raises(KeyError, match="no table 'served', only turns, int8, energy"):
        again("served", dict)
    with pytest.raises(ValueError, match="the preset cpu, holds models of other settings: choose a preset"):
        cost.Measured(runs.settings(dict(preset="stored", device="cpu", n_layers=8)))
    with pytest.raises(FileNotFoundError, match="choose a preset to measure"):
        cost.Measured(runs.settings(dict(preset="stored", device="cpu")), folder=tmp_path / "elsewhere")


def test_models_are_timed_in_turn_against_the_fixed_one(make_model, monkeypatch):
    models = {"fixed": make_model(routing="none"), "blind": make_model(routing="even", target_depth=1.5)}
    windows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
    decoded = []

    def decoding(model, prompts, tokens):
        decoded.append((len(prompts), tokens))
        return cost.decoding(model, prompts, tokens)

    monkeypatch.setattr(live, "decoding", decoding)
    table = cost.against_fixed(models, "fixed", windows, repeats=2).set_index(["panel", "model"])
    assert decoded == [(1, 3), (1, 3), (4, 3), (4, 3)], "a quarter of a window of 12 tokens"
    panels = ("training step", "forward pass", "decoding, 1 sequence", "decoding, 4 sequences")
    assert [*table.index] == [(panel, model) for panel in panels for model in models]
    of_fixed, blind = (table.xs(name, level="model") for name in models)
    assert of_fixed["time"].tolist() == [1.0] * 4 and of_fixed["quartiles"].tolist() == ["1.00 to 1.00"] * 4
    assert blind["kind"].tolist() == ["blind"] * 4 and (blind["milliseconds"] > 0).all()
    assert of_fixed["E"].tolist() == [3.0] * 4 and blind["E"].between(1, 2).all()
    assert blind["E"].iloc[:2].tolist() == pytest.approx([1.5] * 2, abs=0.1), (
        "over many tokens it is the target"
    )


def test_the_record_that_ships_holds_what_the_notebook_shows():
    (record,) = cost.speed_records(kind="deployment")
    notebook = nbformat.read(ROOT / "notebooks" / "06_deployment.ipynb", 4)
    asked = re.findall(
        r'measured\("([^"]+)"', "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    )
    assert asked == list(record["tables"])
    assert record["preset"] == "cpu", "the size of experiment 1, as the notebook says"
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells], ensure_ascii=False)
    assert cost.Measured(runs.settings(dict(preset="stored", device="cpu"))).about() in printed


def test_what_the_notebook_says_of_its_stored_tables_holds():
    measured = cost.Measured(runs.settings(dict(preset="stored", device="cpu")))
    notebook = nbformat.read(ROOT / "notebooks" / "06_deployment.ipynb", 4)
    prose = " ".join(" ".join(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert measured.record["threads"] == 1 and "with one thread" in prose

    time = (
        measured("turns", dict).set_index(["panel", "kind"])["time"].groupby(level=[0, 1]).agg(["min", "max"])
    )
    assert (
        "MoR's router saves no time: not in a training step, a forward pass, or the decoding of one" in prose
    )
    for panel in ("training step", "forward pass", "decoding, 1 sequence"):
        assert time["min"][panel, "with a router"] > 1 > time["max"][panel, "decided once"]
    assert "Sixteen sequences are decoded slower by every model that routes" in prose
    many = time.loc["decoding, 16 sequences"].drop("fixed")
    assert len(many) == 3 and (many["min"] > 1).all()

    assert "where it decides once, times are lower (above)" in prose
    by_name = measured("turns", dict).set_index(["panel", "model"])["time"]
    for panel in by_name.index.unique("panel"):
        assert all(by_name[panel, f"once E = {E}"] < by_name[panel, f"blind E = {E}"] for E in (6, 8))

    int8 = measured("int8", dict)
    small, whole = (int8.xs(kind, level="weights") for kind in ("int8", "float32"))
    assert "In the stored record int8 is smaller, and slower" in prose
    assert (small["size (MB)"] < whole["size (MB)"]).all()
    for column in ("prompt (ms)", "decoded token (ms)"):
        assert (small[column] > whole[column]).all()
    (bench,) = cost.speed_records()
    assert "at width 256 it decodes faster than float32" in prose and bench["rows"]["int8"]["measured"] < 1


def test_what_notebooks_02_and_06_say_of_where_time_goes_holds():
    measured = cost.Measured(runs.settings(dict(preset="stored", device="cpu")))
    shares = measured("shares", dict).astype(float)
    turns = measured("turns", dict)
    ratio = turns[(turns["panel"] == "training step")].set_index("model")["time"].astype(float)
    fixed, mor = shares.loc["fixed N = 12"], shares.loc["MoR E = 8"] * ratio["MoR E = 8"]
    work, around = ["attention", "feed-forward"], ["router", "packing"]
    saved = fixed[work].sum() - mor[work].sum()
    assert 0 < saved / fixed[work].sum() < 1 / 3 and mor[around].sum() - fixed[around].sum() > saved
    even = measured("break even", dict).set_index(["kind", "batch"])["skip rate"]
    assert even["training step", 64] < 1 / 3 and ratio["MoR E = 8"] > 1
    rows = cost.speed_records()[0]["rows"]
    assert all(rows[key]["measured"] > 1 for key in rows if key.startswith("decode-plain"))
