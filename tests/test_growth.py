"""How cost grows, and what the bench compares ours with: the measures are what they say."""

import json

import numpy as np
import pytest
import torch

import morlib
from suite import cost, report, runs
from suite.cost import bench, benched, decoding_rows, grown, growth, others, training_rows
from suite.files import outputs

SWEEP = growth.Sweep(
    (1, 2), (8, 16), (16, 32), (2.0, 3.0), layers=4, head=8, base_width=16, base_batch=2, seconds=0
)


# ---- What the bench compares ours with ----


def test_the_plain_stack_is_causal_and_as_large_as_ours(make_model):
    ours = make_model(routing="none")
    plain = others.PlainStack(ours.cfg)
    tokens = torch.arange(24).view(2, 12) % 11
    changed = tokens.clone()
    changed[:, 7] = 0
    with torch.no_grad():
        before, after = plain(tokens), plain(changed)
    assert before.shape == (2, 12, 11) and torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 8:], after[:, 8:]), "later tokens see it"
    blocks = [sum(p.numel() for p in model.blocks.parameters()) for model in (ours, plain)]
    assert blocks[0] == blocks[1]


def test_the_plain_block_is_ours_with_its_weights(make_model):
    ours = make_model(routing="none").blocks[0]
    plain = others.PlainBlock(make_model(routing="none").cfg)
    pairs = {
        "before_attention": ours.norm1, "before_feed_forward": ours.norm2, "qkv": ours.attention.qkv,
        "out": ours.attention.proj, "expand": ours.feed_forward[0], "contract": ours.feed_forward[2],
    }  # fmt: skip
    for name, module in pairs.items():
        getattr(plain, name).load_state_dict(module.state_dict())
    x = torch.randn(2, 12, 16)
    made = ours(x.view(24, 16), morlib.Packing(torch.arange(24), 2, 12))
    assert torch.allclose(plain(x).view(24, 16), made, atol=1e-5)


def test_bfloat16_learns_in_float32(make_model, corpus, quick_training):
    """Steps far below what bfloat16 can tell apart add up; gradients are close to those of float32."""
    model = make_model(routing="none", vocab_size=corpus.vocab_size)
    training = others.Bfloat16Training(model, corpus, quick_training)
    batch = corpus.draw(4, 12, torch.Generator().manual_seed(0))
    exact = morlib.Training(make_model(routing="none", vocab_size=corpus.vocab_size), corpus, quick_training)
    losses = [float(kind.gradients(batch)[0]) for kind in (training, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    pairs = [kind.model.blocks[0].attention.qkv.weight.grad.flatten() for kind in (training, exact)]
    assert pairs[0].dtype == torch.float32 and torch.cosine_similarity(*pairs, dim=0) > 0.99
    weight = model.head.weight
    start = weight.detach().clone()
    for _ in range(3):
        training.update(batch)
    assert weight.dtype == torch.float32 and next(training.narrow.parameters()).dtype == torch.bfloat16
    moved = (weight - start).abs().max()
    assert 0 < moved and not torch.equal(weight.bfloat16().float(), weight), "finer than bfloat16"


def test_bfloat16_has_rows_only_where_there_are_units(tmp_path, monkeypatch):
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags : fpu avx512_bf16 avx\n")
    assert training_rows.units(flags) == ["avx512_bf16"]
    flags.write_text("flags : fpu avx\n")
    assert training_rows.units(flags) == training_rows.units(tmp_path / "none") == []
    monkeypatch.setattr(training_rows, "units", lambda: [])
    rows = dict(training_rows.bfloat16(benched.Bench(benched.TINY)))
    assert set(rows) == {"bfloat16", "bfloat16-loss"}
    assert all(
        row == dict(measured=None, note="no units for bfloat16 in this processor") for row in rows.values()
    )


def test_bfloat16_says_what_it_does_to_the_loss_only_where_it_is_fast_enough(monkeypatch):
    tiny, seen = benched.Bench(benched.TINY), []
    monkeypatch.setattr(training_rows, "units", lambda: ["avx512_bf16"])
    monkeypatch.setattr(
        training_rows, "loss_against_float32", lambda *how: seen.append(how) or dict(measured=0.0)
    )
    for ratio in (0.5, 0.9):
        monkeypatch.setattr(cost.Timings, "ratio", lambda *of, ratio=ratio: dict(measured=ratio))
        rows = dict(training_rows.bfloat16(tiny))
        told = "" if ratio == 0.5 else "not fast enough: float32 stays"
        assert rows["bfloat16-loss"].get("note", "") == told and len(seen) == 1
        assert "rounded weights" in rows["bfloat16"]["note"] and "autocast" in rows["bfloat16"]["note"]


def test_the_loss_of_another_kind_of_training_is_held_against_float32(monkeypatch):
    """The same run twice is the same; one that computes in bfloat16 is close, and not the same."""
    short = dict(epochs=1, windows=160, eval_windows=8)
    monkeypatch.setattr(training_rows, "settings", lambda given: runs.settings(given | short))
    tiny, how = benched.Bench(benched.TINY), training_rows.loss_against_float32
    assert how(tiny, "float32", morlib.Training)["measured"] == 0
    row = how(tiny, "rounded weights", others.Bfloat16Training)
    assert 0 < abs(row["measured"]) < 0.05 and "(rounded weights) against" in row["note"]


def test_routers_that_decode_read_one_text_and_run_their_share(make_model):
    """Thresholds set on the text that is read hold the depth there; both models read the same tokens."""
    text = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0))
    model, fed, depths = make_model(n_layers=6, target_depth=3.0, max_recursions=2), [], []
    model(text, calibrate=True)
    model.register_forward_pre_hook(lambda module, args: fed.append(args[0].clone()))
    model.register_forward_hook(lambda module, args, out: depths.append(out.depth))
    call = others.cached_generation(model, text[:, :4], 8, 2, text[:, 4:])
    first, second = call()["E"], call()["E"]
    assert torch.equal(torch.cat(fed, 1), text[:, :11]), "what was chosen is not read"
    decoded = torch.cat(depths[1:], 1).double()
    assert float(first) == pytest.approx(float(decoded[:, :4].mean()))
    assert float(second) == pytest.approx(float(decoded[:, 4:].mean()))
    assert float(torch.cat(depths, 1).double().mean()) == pytest.approx(3, abs=0.3), "of few tokens"


def test_the_row_of_int8_says_whether_it_is_faster(monkeypatch):
    tiny = benched.Bench(benched.TINY)
    ((key, row),) = decoding_rows.int8(tiny)
    assert key == "int8" and (
        row["measured"] is None or row["note"].startswith(("faster here", "float32 stays"))
    )
    monkeypatch.setattr(decoding_rows, "as_int8", lambda model: cost.NOT_MEASURABLE)
    assert dict(decoding_rows.int8(tiny))["int8"] == dict(measured=None, note=cost.NOT_MEASURABLE)


# ---- How cost grows ----


def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    made, path = [], tmp_path / "growth_here.json"

    def point(sweep, kind, axis, value):
        made.append((kind, axis, value))
        return [row(kind, axis, E, 1e-4, 1e-4) for E in (sweep.depth if axis == "depth" else [value])]

    monkeypatch.setattr(growth, "point", point)
    record = growth.measure(SWEEP, path)
    values = [(kind, axis, v) for kind in (growth.TRAINING, growth.DECODING) for axis in growth.AXES
              for v in getattr(SWEEP, axis)]  # fmt: skip
    assert [(p["kind"], p["axis"], p["value"]) for p in record["points"]] == values
    assert made == [v for v in values if v[1:] != ("depth", 3.0)], "all depths in turn with one fixed model"
    growth.measure(SWEEP, path)
    assert len(made) == 14, "nothing is left to measure"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stored | dict(points=stored["points"][:-3])), encoding="utf-8")
    assert len(growth.measure(SWEEP, path)["points"]) == 16 and made[14:] == made[12:14]
    other = growth.measure(growth.TINY, path)
    assert len(other["points"]) == 14 and cost.growth_records(tmp_path) == [other], (
        "another sweep begins anew"
    )


@pytest.mark.parametrize("kind", [growth.TRAINING, growth.DECODING])
def test_a_point_is_of_the_size_that_it_names(kind):
    seen = {}
    for axis, value in (("batch", 2), ("length", 16), ("width", 32), ("depth", 2.0)):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("training_step", "cached_generation"):
                patch.setattr(growth, name, lambda model, text, *how: (model, text, how))
            calls, tokens = growth.calls_of(SWEEP, kind, axis, value)
        seen[axis] = calls
        assert next(iter(calls)) == "fixed" and len(calls) == (3 if axis == "depth" else 2)
        model, text, how = calls["fixed"]
        made = text[:, :-1].numel() if kind == growth.TRAINING else len(text) * how[0]
        assert tokens == made
    assert len(seen["batch"]["fixed"][1]) == 2 and seen["width"]["fixed"][0].cfg.d_model == 32
    length = seen["length"]["fixed"][1].shape[1]
    assert length == (17 if kind == growth.TRAINING else 16)
    windows = len(seen["length"]["fixed"][1])
    assert windows == (4 if kind == growth.TRAINING else 1), "of training, as many tokens at each length"
    assert [E for E in seen["depth"]] == ["fixed", 2.0, 3.0]
    assert seen["batch"][2.0][0].cfg.target_depth == 2.0 and seen["batch"][2.0][0].cfg.n_layers == 4


def row(kind, axis, value, fixed, routed, E=6.0, spread=0.01):
    ratio = routed / fixed
    quartiles = [ratio - spread, ratio + spread]
    point = dict(kind=kind, axis=axis, value=value, fixed=fixed, routed=routed, measured=ratio)
    return point | dict(quartiles=quartiles, repeats=3, E=E)


@pytest.fixture
def record():
    """A sweep of 12 layers, written down: routing pays from batch 4 on, and time goes with width squared."""
    kind = growth.TRAINING
    points = [row(kind, "batch", B, 1e-4, r) for B, r in ((1, 1.2e-4), (4, 0.9e-4), (16, 0.6e-4))]
    points += [row(kind, "length", L, 1e-4, 0.6e-4) for L in (64, 256)]
    points += [row(kind, "width", w, 1e-8 * w**2, 0.6e-8 * w**2) for w in (1024, 64, 256)]
    points += [row(kind, "depth", E, 1e-4, (0.1 + 0.09 * E) * 1e-4, E) for E in (3.0, 6.0, 9.0)]
    points += [dict(point, kind=growth.DECODING) for point in points[::-1]]
    (made,) = cost.speed_records()
    about = {k: made[k] for k in "cpu gpu cores threads load versions date commit dtype".split()}
    return about | dict(sweep=vars(growth.FULL), points=points, threads=2)


def test_the_table_is_in_order_and_has_the_ideal(record):
    table = cost.table_of(record)
    assert list(table["kind"].unique()) == [growth.TRAINING, growth.DECODING]
    assert list(table["axis"].unique()) == list(growth.AXES)
    assert table[(table["axis"] == "width")]["value"].tolist() == 2 * [64, 256, 1024]
    assert table["ideal"].to_numpy() == pytest.approx((table["fixed"] * table["E"] / 12).to_numpy())


def test_findings_name_where_routing_breaks_even(record):
    lines = cost.findings(record)
    assert len(lines) == 9 and lines[-1].startswith("In brackets are the quartiles over 3 to 3 turns.")
    batch, length, width, depth = lines[:4]
    ends = [record["points"][i] for i in (0, 2)]
    low, high = ([f"{point['quartiles'][i]:.2f}" for i in (0, 1)] for point in ends)
    assert f"1.20 ({low[0]} to {low[1]}) at 1 and 0.60 ({high[0]} to {high[1]}) at 16" in batch
    assert "depth is 0.50" in batch and batch.endswith("from 4 on.")
    assert length.endswith("it pays everywhere.") and width.startswith("training step, width 64 to 1024")
    through = "by a line through the points, routing pays from 17 % of the work skipped on."
    assert depth == f"training step, against depth: {through}"
    for point in record["points"]:
        point["quartiles"] = [0.9, 1.1]
    assert cost.findings(record)[0].endswith("it pays nowhere.")


def test_breaking_even_where_it_comes_and_goes(record):
    points = cost.table_of(record).query("kind == 'training step' and axis == 'batch'")
    assert grown.pays(points.assign(high=[0.9, 1.1, 0.9])) == "at 1, 16"
    fixed = points["fixed"].median()
    assert np.isnan(cost.break_even([3, 6, 9], [2e-4] * 3, fixed, 12)), "times that do not fall"


def test_time_between_and_beyond_widths(record):
    for width in (64, 100, 640, 1024, 4096):
        assert grown.seconds_a_token(record, width, "fixed") == pytest.approx(1e-8 * width**2)


def test_the_estimate_is_computed_from_the_curve(record):
    table, tokens = cost.estimate(record), grown.training_tokens()
    assert tokens == 6 * 184 * 16 * 64, "of the preset cpu"
    many, larger, longer = (table.iloc[i] for i in range(3))
    hours = 10_000 * tokens * 1e-8 * 64**2 * 2 / 3600  # on two threads
    assert float(many["core hours, fixed"].replace(",", "")) == pytest.approx(hours, rel=0.01)
    assert float(many["core hours, blind routing"].replace(",", "")) == pytest.approx(0.6 * hours, rel=0.01)
    assert larger["width"] == "640" and larger["parameters"] == "59.0 million"
    assert float(larger["core hours, fixed"]) == pytest.approx(hours / 10_000 * 100, rel=0.01)
    assert float(longer["core hours, fixed"].replace(",", "")) == pytest.approx(hours, rel=0.01)
    assert larger["GB of weights, gradients, moments"] == "0.94"
    told = cost.basis(record)
    assert told.startswith("An estimate, not a measurement.") and "64, 128, 256, 512, 1024" in told


def test_growth_is_shown_and_told_or_its_lack_is(record, tmp_path, capsys, monkeypatch):
    cost.show_growth(tmp_path)
    assert "make bench BENCH=--growth" in capsys.readouterr().out
    (tmp_path / "growth_here.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "growth_here_tiny.json").write_text("not read", encoding="utf-8")
    cost.show_growth(tmp_path)
    shown = capsys.readouterr().out
    assert "it pays from 4 on" in shown and "a model 100 times larger" in shown and "An estimate" in shown
    assert (outputs() / "figures" / "06_growth.png").is_file()
    monkeypatch.setattr(cost, "growth_records", lambda: [record])
    page = "\n".join(report.growth())
    assert "## How cost grows" in page and cost.findings(record)[0] in page and cost.basis(record) in page


def test_the_figure_has_all_curves_and_rings_where_routing_is_faster(record):
    figure = cost.growth_curves(cost.table_of(record))
    assert len(figure.axes) == 8
    fixed, routed, ideal, rings = figure.axes[0].lines
    assert rings.get_xdata().tolist() == [4, 16] and routed.get_ydata()[0] == pytest.approx(120)
    assert ideal.get_ydata() == pytest.approx([50, 50, 50])
    assert figure.axes[0].get_xscale() == "log" and figure.axes[3].get_xscale() == "linear"


def test_growth_is_an_option_of_the_bench(capsys):
    threads = torch.get_num_threads()
    bench.main(["--tiny", "--growth"])
    assert torch.get_num_threads() == 1, "a sweep has one thread unless another number is asked for"
    torch.set_num_threads(threads)
    (path,) = (outputs() / "results").glob("growth_*_tiny.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert len(record["points"]) == 14
    assert all(point["repeats"] == 3 and point["fixed"] > 0 < point["routed"] for point in record["points"])
    assert "routing takes" in capsys.readouterr().out
