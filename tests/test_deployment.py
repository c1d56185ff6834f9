"""What is said of cost is true: arithmetic against torch's counter, goals and records, memory, energy, int8, and a card a worker."""

import json
import os
import time
import types

import nbformat
import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import deployment
import morlib

TOKENS = torch.arange(48).view(4, 12) % 11


def counted(call):
    """Torch's own count of the operations of a call, all and those of batched products (attention), with the rows and keys that attention saw."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watch(q, k, v, **kwargs):
        seen.append((q.shape[0] * q.shape[2] * k.shape[2], q.shape[1] * q.shape[3]))
        return attend(q, k, v, **kwargs)

    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        out = call()
    attention = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    return out, counter.get_total_flops(), attention, sum(4 * pairs * width for pairs, width in seen)


def evenly(model, per_row):
    """Planned routing in which each row of TOKENS runs as many tokens as any other."""
    applications = torch.zeros(model.cfg.n_layers, *TOKENS.shape, dtype=torch.long)
    for layer, count in enumerate(per_row):
        for row in range(len(TOKENS)):
            applications[layer, row, torch.randperm(12, generator=torch.Generator().manual_seed(row))[:count]] = 1 + layer % 2
    model.policy = morlib.Planned(applications)
    return model


def test_operations_of_a_fixed_model_are_torchs(make_model):
    model = make_model(routing="none")
    out, total, attention, _ = counted(lambda: model(TOKENS))
    mine = deployment.flops(model, out.actions)
    assert mine["total"] == total == sum(mine[part] for part in ("blocks", "attention", "router", "head"))
    assert mine["attention"] == attention and mine["router"] == 0

    def train():
        out = model(TOKENS)
        out.logits.sum().backward()
        return out

    out, total, *_ = counted(train)
    assert deployment.training_flops(model, out.actions) == total


def test_operations_of_a_planned_model_are_torchs(make_model):
    model = evenly(make_model(max_recursions=2, target_depth=1.5), (7, 3, 12))
    out, total, attention, computed = counted(lambda: model(TOKENS))
    mine = deployment.flops(model, out.actions)
    assert mine["total"] - mine["attention"] == total - attention and attention == computed
    assert mine["attention"] <= computed, "what packing pads comes on top"
    if computed == deployment.flops(model, out.actions)["attention"]:
        assert mine["total"] == total


@pytest.mark.parametrize("changes", [dict(target_depth=1.5), dict(target_depth=2.2), dict(), dict(routing="frozen", target_depth=2.0), dict(granularity="sample"),
                                     dict(estimator="gumbel"), dict(routing="random", target_depth=2.0)])  # fmt: skip
def test_operations_of_a_routed_model_are_torchs_router_included(make_model, changes):
    model = make_model(routing=changes.pop("routing", "mor"), **changes).train()
    if isinstance(model.policy, morlib.Router):
        model.policy.calibrating = model.cfg.target_depth is not None

    def train():
        out = model(TOKENS)
        out.logits.sum().backward()
        return out

    out, total, attention, computed = counted(train)
    mine = deployment.flops(model, out.actions)
    assert 0 < mine["attention"] <= computed and attention == 3 * computed
    assert deployment.training_flops(model, out.actions) - 3 * mine["attention"] == total - attention
    assert (mine["router"] > 0) == (model.cfg.routing != "random")


def test_operations_of_a_decoded_token_are_torchs(make_model):
    for model in (make_model(routing="none"), make_model(routing="random", target_depth=2.0)):
        deployment.hold_share(model, 0, 12)
        cache, actions = morlib.Cache(), []
        with torch.no_grad():
            actions.append(model(TOKENS[:1, :8], cache).actions)
            for place in range(8, 12):
                out, total, attention, _ = counted(lambda: model(TOKENS[:1, place : place + 1], cache))
                actions.append(out.actions)
                mine = deployment.flops(model, torch.cat(actions, -1), fresh=1)
                assert mine["total"] - mine["attention"] == total - attention
                if model.cfg.routing == "none":
                    assert mine["attention"] <= attention


def test_blind_routing_runs_exactly_its_share_in_inference(make_model):
    model = make_model(routing="random", target_depth=1.5)
    deployment.hold_share(model, 2, 10)
    cache = morlib.Cache()
    model(TOKENS[:1, :2], cache)
    assert model(TOKENS[:1, 2:], cache).depth.float().mean() == 1.5


def test_goals_say_what_is_met_and_by_how_much_not():
    most, least, close = (bench.Goal("k", "w", limit, sense) for limit, sense in ((0.8, "at most"), (0.7, "at least"), (0.01, "within")))
    assert [most.verdict(x) for x in (0.8, 0.84)] == ["yes", "no, by 5.0 %"]
    assert [least.verdict(x) for x in (0.7, 0.35)] == ["yes", "no, by 50.0 %"]
    assert [close.verdict(x) for x in (0.99001, 1.03)] == ["yes", "no, by 2.0 %"]
    assert [goal.words() for goal in (most, least, close)] == ["≤ 0.8", "≥ 0.7", "1 ± 0.01"]
    assert len({goal.key for goal in bench.GOALS}) == len(bench.GOALS) and all(goal.why for goal in bench.GOALS)


def test_the_table_holds_every_goal_and_says_why_a_row_misses():
    record = dict(rows={"train-8": dict(measured=0.9, quartiles=[0.8, 1.0], E=8.0, dtype="float32"), "dtype": dict(measured=None, note="yes: it chooses float32"),
                        "rate": dict(measured=0.75)})  # fmt: skip
    table = bench.table(record)
    assert list(table.index) == [goal.key for goal in bench.GOALS]
    assert table.loc["train-8", ["measured", "goal", "met", "E"]].tolist() == ["0.900", "≤ 0.75", "no, by 20.0 %", "8.00"]
    assert table["met"][["dtype", "rate", "train-6", "train-8-gpu"]].tolist() == ["yes: it chooses float32", "yes", "not measured", "needs a GPU"]
    (line,) = bench.misses(record)
    assert "missed by 20.0 %" in line and line.endswith(bench.PACKED)
    record["rows"]["train-6"] = dict(measured=0.7)
    assert len(bench.misses(record)) == 1, "rows with one reason share a line"


def test_stored_records_open_the_notebook(tmp_path, capsys):
    assert bench.headline(tmp_path) is None and "`make bench` makes one" in capsys.readouterr().out
    record = bench.machine() | dict(dtype="float32", rows={"rate": dict(measured=0.75), "encoder": dict(measured=0.95)})
    (tmp_path / "speed_here.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "speed_here_quick.json").write_text("not read", encoding="utf-8")
    shown = bench.headline(tmp_path)
    assert shown["met"].str.startswith("no,").sum() == 1 and len(shown) == len(bench.GOALS)
    assert "missed by 5.6 %" in capsys.readouterr().out


def test_every_row_of_the_bench_is_measured_and_kept(capsys):
    threads = torch.get_num_threads()
    bench.main(["--quick", "--threads", "1"])
    (path,) = (morlib.outputs() / "results").glob("speed_*_quick.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    here = [goal.key for goal in bench.GOALS if goal.where == "CPU" or torch.cuda.is_available()]
    assert sorted(record["rows"]) == sorted(here)
    assert {"device", "cpu", "gpu", "cores", "threads", "load", "versions", "date", "commit", "sizes", "dtype", "rows", "seconds", "took", "parts"} <= set(record)
    assert record["versions"]["morlib"].startswith(f"{morlib.__version__}+") and record["threads"] == 1
    for key, row in record["rows"].items():
        if row["measured"] is not None:
            assert row["dtype"] and row["date"] and (key in ("cache", "dtype-loss") or row["repeats"] >= 2 and len(row["quartiles"]) == 2), key
    for key in ("train-8", "train-6", "train-8-long", "decode-1", "decode-32", "cache"):
        assert record["rows"][key]["E"] == pytest.approx(8 if "8" in key else 6, abs=0.1), "it runs the share that it was asked for"
    assert record["rows"]["cache"]["measured"] == pytest.approx(1, abs=0.01)
    assert sum(record["parts"].values()) == pytest.approx(1, abs=0.1)
    before = record["rows"]
    bench.main(["--quick", "--threads", "1", "--only", "generation", "--turns", "8"])
    after = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert after["generation"]["repeats"] == 16 and after["train-8"]["repeats"] == 2
    assert set(after) == set(before) and after["train-8"] == before["train-8"], "rows of the same machine and version are kept"
    assert "needs a GPU" in capsys.readouterr().out or torch.cuda.is_available()
    torch.set_num_threads(threads)


def test_the_bench_names_its_groups(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "everything"])
    assert "no group everything; there are training, small, forward" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--turns", "3"])
    assert "--turns must be 7 or more" in capsys.readouterr().err


def test_ratios_are_paired_turn_by_turn():
    drift = iter(range(1, 100))
    calls = {"a": lambda: dict(seconds=2.0 * (turn := next(drift)), E=6) | dict(turn=turn), "b": lambda: dict(seconds=2.0)}
    seconds = deployment.in_turn(calls, repeats=3)
    assert len(seconds) == 3 and seconds.attrs["E"] == {"a": 6.0, "b": None}
    assert deployment.ratio(seconds, "a", "b") == dict(measured=3.0, quartiles=[2.5, 3.5], repeats=3, E=6.0)


def test_uncached_passes_are_each_done_once(make_model):
    model, lengths = make_model(routing="none"), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    call = bench.uncached_generation(model, 12, stride=4)
    for _ in range(4):
        call()
    assert sorted(lengths) == list(range(1, 13))


def test_cached_generation_in_parts_is_one_generation(make_model):
    """The parts, one after another, write what `generate` writes; after the last it starts again."""
    model, fed = make_model(routing="none"), []
    model.register_forward_pre_hook(lambda module, args: fed.append(int(args[0][0, -1])))
    call = bench.generation(model, 12, parts=3)
    assert all(call()["seconds"] > 0 for _ in range(3)) and len(fed) == 12
    written = fed[:]
    call()
    assert fed[12:] == written[:4]
    assert morlib.generate(model, torch.zeros(1, dtype=torch.long), 11, use_cache=False).tolist() == written


def test_the_parts_of_a_step_are_all_of_it(make_model):
    windows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1)
    for routing in ("none", "mor"):
        model = make_model(routing=routing, target_depth=None if routing == "none" else 1.5)
        parts = deployment.where_time_goes(model, deployment.training_step(model, windows), repeats=2)
        assert list(parts) == list(deployment.PARTS) and torch.tensor(parts.sum(axis=1).to_numpy()).sub(1).abs().max() < 1e-6
        assert (parts[["attention", "feed-forward", "head and embedding", "loss and optimizer"]] > 0).to_numpy().all()
        assert routing == "none" or (parts[["router", "packing"]] > 0).to_numpy().all()
        assert "forward" not in vars(model), "nothing stays behind"


def test_break_even_is_where_the_line_meets_the_fixed_model():
    assert deployment.break_even([3, 6, 9], [0.4, 0.7, 1.0], 1.0, 12) == pytest.approx(0.25)
    assert deployment.break_even([3, 6, 9], [0.2, 0.4, 0.6], 1.0, 12) == 0, "cheaper even where nothing is skipped"
    assert pd.isna(deployment.break_even([3, 6, 9], [1.1, 1.2, 1.3], 0.9, 12)), "dearer even where all is skipped"


def test_energy_is_read_or_said_to_be_unreadable(monkeypatch):
    monkeypatch.setattr(deployment, "energy_counter", lambda: None)
    assert deployment.energy_a_token(dict, 1) == deployment.NOT_MEASURABLE == "not measurable here"
    joules = iter((10.0, 30.0))
    monkeypatch.setattr(deployment, "energy_counter", lambda: (lambda: next(joules), "a counter"))
    assert deployment.energy_a_token(dict, 5, seconds=0.0) == 4.0, "20 joules, one call, 5 tokens"
    joules = iter((30.0, 1.0))
    assert deployment.energy_a_token(dict, 5, seconds=0.0) == deployment.NOT_MEASURABLE, "the counter went round"


def test_peak_memory_grows_with_the_batch(make_model):
    model = make_model(n_layers=2, d_model=32, d_ff=512, max_len=64, routing="none")
    small, large = (deployment.peak_memory(model, B, 64, training=True) for B in (2, 128))
    if small == deployment.NOT_MEASURABLE:
        pytest.skip("no counter of resident memory here")
    assert large > small + 2_000_000


def test_int8_is_smaller_and_as_good(corpus):
    torch.manual_seed(0)
    model = morlib.build_model(morlib.ModelConfig(corpus.vocab_size, n_layers=3, d_model=32, n_heads=2, d_ff=128, max_len=16, dropout=0.0, target_depth=2.0))
    morlib.train(model, corpus, morlib.TrainConfig(epochs=2, windows=160, batch_size=8, lr=5e-3, evaluations=1, eval_windows=8, heldout_windows=8))
    small = deployment.as_int8(model)
    if small == deployment.NOT_MEASURABLE:
        pytest.skip("this torch has no int8 engine")
    before, after = (morlib.evaluate(m, corpus, "val") for m in (model, small))
    assert after["loss"] == pytest.approx(before["loss"], abs=0.05) and after["effective_depth"] == pytest.approx(before["effective_depth"], abs=0.3)
    assert deployment.stored_bytes(small) < 0.6 * deployment.stored_bytes(model)
    assert any(p.dtype == torch.float32 for p in small.policy.parameters()) and next(model.blocks[0].parameters()).dtype == torch.float32


def test_serving_gives_latency_throughput_and_cache(make_model):
    table = deployment.serving(make_model(routing="random", target_depth=1.5, max_len=16), torch.arange(200) % 11, [1, 4], prompt=8, tokens=4, repeats=3)
    assert table[["phase", "batch"]].values.tolist() == [["prefill", 1], ["decode", 1], ["prefill", 4], ["decode", 4]]
    assert (table["p95 (ms)"] >= table["p50 (ms)"]).all() and (table["tokens/s"] > 0).all()
    assert table["E"].tolist() == pytest.approx([1.5] * 4, abs=0.15)
    assert table["cache bytes a sequence"].notna().tolist() == [False, True, False, True]


def test_each_worker_has_a_card_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [morlib.card_of(worker, 2) for worker in (1, 2, 3)] == ["0", "1", "0"]
    assert morlib.card_of(1, 1) is None and morlib.card_of(1, 0) is None, "nothing to hand out"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [morlib.card_of(worker, 2) for worker in (1, 2)] == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert morlib.card_of(1, 2) == "5", "a worker that has its card keeps it"


def test_two_workers_see_two_cards(monkeypatch, corpus, small_text):
    """Without a card: what workers with joblib's names find in their environment when the run begins."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")))
    monkeypatch.setattr(morlib, "run", lambda spec, progress: os.environ.get("CUDA_VISIBLE_DEVICES"))
    for name, card in (("LokyProcess-1", "0"), ("LokyProcess-2", "1"), ("Dask Worker process (from Nanny)", None)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(morlib.multiprocessing, "current_process", lambda name=name: types.SimpleNamespace(name=name))
        assert [morlib._attempt(None, str(morlib.outputs())) for _ in range(2)] == [card, card], "and a second run stays there"
    monkeypatch.undo()

    def who():
        time.sleep(0.2)
        return morlib.multiprocessing.current_process().name

    names = set(morlib.joblib.Parallel(n_jobs=2)(morlib.joblib.delayed(who)() for _ in range(4)))
    assert all(name.rpartition("-")[2].isdigit() for name in names), "joblib numbers its workers"


def test_the_preset_paper_runs_one_seed_a_card(monkeypatch):
    for cards, jobs in ((0, 1), (1, 1), (2, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        assert morlib.settings(dict(preset="paper")).jobs == jobs and morlib.settings(dict(preset="paper", jobs=1)).jobs == 1
        assert morlib.settings(dict(preset="quick")).jobs == 2


@pytest.mark.parametrize("changed, message", [(dict(batches=[]), "batches must be a list"), (dict(batches=[0]), "batches must be a list"),
                                              (dict(repeats=0), "repeats 1 or more"), (dict(repeats="seven"), "repeats must be int")])  # fmt: skip
def test_the_notebook_refuses_what_it_cannot_do(changed, message):
    cells = [cell for cell in nbformat.read(morlib.ROOT / "notebooks" / "06_deployment.ipynb", 4).cells if cell.cell_type == "code"]
    namespace = dict(preset="smoke", batches=[1], repeats=7) | changed
    with pytest.raises(ValueError, match=message):
        exec(cells[2].source, namespace | dict(morlib=morlib, torch=torch))
