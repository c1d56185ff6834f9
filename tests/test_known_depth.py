"""Hops, the task of known depth: its lines, its answers and its floors, each against plain Python."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import morlib
from suite import field, files, report, results, runs, texts
from suite.results.dial import follows
from suite.runs import leads
from suite.runs.runner import stored
from suite.texts import drawn, known_depth, tasks
from suite.texts.drawn import SEEDS, WINDOWS
from suite.texts.known_depth import KINDS, Hops

TASKS = st.builds(Hops, symbols=st.integers(4, 10), hops=st.integers(1, 9))
PARTS = st.sampled_from(list(WINDOWS))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def read(task, line):
    """A line's table as a dict, and its triples (k, x, answer or None), letter by letter."""
    text = task.tokenizer.decode(line.tolist())
    letters = drawn.SYMBOLS[: task.symbols]
    table = dict(zip(letters, text))
    rest = text[task.symbols :]
    triples = [rest[i : i + 3] for i in range(0, len(rest), 3)]
    return table, [(int(t[0]), t[1], t[2]) for t in triples if len(t) == 3]


def cycle(table, x):
    length, at = 1, table[x]
    while at != x:
        length, at = length + 1, table[at]
    return length


# ---- Lines ----


@settings(deadline=None, max_examples=40)
@given(TASKS, PARTS, st.integers(0, 40), st.integers(0, 99))
def test_a_line_is_a_permutation_and_then_right_answers(task, part, more, seed):
    length = task.symbols + 3 + more
    lines = task._lines(5, length, generator(seed), part)
    assert lines.shape == (5, length + 1) and lines.dtype == torch.int64
    assert 0 <= int(lines.min()) and int(lines.max()) < task.vocab_size
    for line in lines:
        table, triples = read(task, line)
        assert sorted(table.values()) == sorted(table)
        assert len(triples) == (length + 1 - task.symbols) // 3
        for k, x, answer in triples:
            for _ in range(k):
                x = table[x]
            assert x == answer and 1 <= k <= task.hops


def test_k_x_and_tables_are_drawn_evenly():
    task = Hops(5, 4)
    lines = task.draw(6000, 5 + 3 * 4 - 1, generator())
    asked = task.answers(lines)
    for name, first, count in (("k", 1, 4), ("x", 0, 5)):
        share = torch.bincount(asked[name].flatten() - first).double() / asked[name].numel()
        assert torch.allclose(share, torch.full((count,), 1 / count, dtype=torch.double), atol=0.015)
    tables, counts = lines[:, :5].unique(dim=0, return_counts=True)
    own = [p for p in itertools.permutations(range(5)) if tenth(p) > 1]
    assert len(tables) == len(own)
    assert counts.min() > 0.5 * counts.double().mean()


def tenth(table):
    return int(known_depth.hashed(torch.tensor([table]))[0] % 10)


def test_a_line_may_end_anywhere():
    task = Hops()
    whole = task.windows("val", 64)
    for length in range(11, 64):
        shorter = task.draw(3, length, generator(1))
        assert shorter.shape == (3, length + 1)
    assert whole.shape == (WINDOWS["val"], 65)
    with pytest.raises(ValueError, match="max_len of 11 or more, not 10"):
        task.draw(3, 10, generator())


# ---- Parts ----


@pytest.mark.parametrize("m", range(4, 9))
def test_every_part_has_tables_and_no_table_is_in_two(m):
    tables = torch.tensor(list(itertools.permutations(range(m))))
    number = known_depth.hashed(tables)
    assert len(number.unique()) == len(tables)
    counts = torch.bincount(number % 10, minlength=10)
    assert counts[0] > 0 and counts[1] > 0
    if m >= 7:
        assert (counts / len(tables) - 0.1).abs().max() < 0.01


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**40), st.sampled_from([(5, 3), (8, 6), (12, 9)]))
def test_training_never_meets_a_table_of_another_part(seed, size):
    task = Hops(*size)
    trained = {tuple(row) for row in task.draw(300, 64, generator(seed))[:, : size[0]].tolist()}
    for part in ("val", "heldout"):
        lines = task.windows(part, 64)
        assert not trained & {tuple(row) for row in lines[:, : size[0]].tolist()}
    held = {tuple(row) for row in task.windows("heldout", 64)[:, : size[0]].tolist()}
    assert not held & {tuple(row) for row in task.windows("val", 64)[:, : size[0]].tolist()}


def test_training_on_a_parts_own_seed_does_not_draw_its_lines():
    task = Hops()
    assert len(set(SEEDS.values())) == len(SEEDS)
    for part in ("val", "heldout"):
        drawn = {tuple(row) for row in task.draw(500, 64, generator(SEEDS[part])).tolist()}
        assert not drawn & {tuple(row) for row in task.windows(part, 64).tolist()}


def test_a_held_out_table_is_like_any_other():
    """A hash that kept, say, the even ones would make held-out lines of another kind."""
    task = Hops()
    for part in WINDOWS:
        tables = task.windows(part, 64)[:, :8] - 6
        for place, symbol in itertools.product(range(8), range(8)):
            assert abs((tables[:, place] == symbol).double().mean() - 1 / 8) < 0.055
        assert abs((tables == torch.arange(8)).sum(1).double().mean() - 1) < 0.2  # one fixed point


def test_draws_follow_the_generator_alone():
    task, other = Hops(), Hops()
    same = [t.draw(40, 64, generator(3)) for t in (task, other)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], task.draw(40, 64, generator(4)))
    going_on = generator(3)
    first, second = task.draw(40, 64, going_on), task.draw(40, 64, going_on)
    assert torch.equal(first, same[0]) and not torch.equal(first, second)


def test_windows_are_always_the_same_and_most_takes_the_first():
    task = Hops()
    for part, count in WINDOWS.items():
        whole = task.windows(part, 64)
        assert len(whole) == count
        assert torch.equal(whole, Hops().windows(part, 64))
        assert torch.equal(task.windows(part, 64, 7), whole[:7])
        assert torch.equal(task.windows(part, 64, 10**6), whole)
    with pytest.raises(ValueError, match="train, val, heldout, not 'test'"):
        task.windows("test", 64)


def test_wrong_sizes_are_refused():
    for symbols, hops in ((3, 2), (27, 2), (8, 0), (8, 10)):
        with pytest.raises(ValueError, match=f"not {symbols} and {hops}"):
            Hops(symbols, hops)


# ---- Answers ----


@settings(deadline=None, max_examples=30)
@given(TASKS, st.integers(0, 40), st.integers(0, 99))
def test_answers_say_what_a_reader_would(task, more, seed):
    lines = task.draw(4, task.symbols + 3 + more, generator(seed))
    asked, places = task.answers(lines), task.places(lines.shape[1] - 1)
    for i, line in enumerate(lines):
        table, triples = read(task, line)
        letters = drawn.SYMBOLS
        assert asked["k"][i].tolist() == [k for k, _, _ in triples]
        assert [letters[x] for x in asked["x"][i]] == [x for _, x, _ in triples]
        assert [letters[y] for y in asked["answer"][i]] == [y for _, _, y in triples]
        for a, (k, x, _) in enumerate(triples):
            before = any((k, x) == triple[:2] for triple in triples[:a])
            assert bool(asked["hard"][i, a]) == (cycle(table, x) > task.hops and not before)
        for place, (_, x, y) in zip(places.tolist(), triples):  # x is read there, and y is its target
            assert task.tokenizer.decode(line[place : place + 2].tolist()) == x + y


def test_no_answer_is_hard_where_every_cycle_is_short():
    task = Hops(4, 5)
    assert not task.answers(task.draw(50, 40, generator()))["hard"].any()


def test_kinds_name_the_token_that_is_read():
    task = Hops(4, 2)
    assert task.kinds(9) == ["table"] * 4 + ["k", "x", "answer", "k", "x"]
    assert task.places(9).tolist() == [5, 8]


def invented(lines, seed=0):
    """Scores of a model that does not exist: random, with some structure."""
    shape = lines.shape[0], lines.shape[1] - 1
    correct = torch.rand(shape, generator=generator(seed)) < 0.6
    return dict(correct=correct, depth=torch.randint(0, 7, shape, generator=generator(seed + 1)))


def test_accuracy_and_depth_by_k_are_means_over_the_right_tokens():
    task = Hops(7, 5)
    lines = task.draw(200, 40, generator())
    seen = invented(lines)
    right, depths, every = ({k: [] for k in range(1, 6)} for _ in range(3))
    for i, line in enumerate(lines):
        table, triples = read(task, line)
        for a, (k, x, _) in enumerate(triples):
            place = 7 + 3 * a + 1
            every[k].append(float(seen["correct"][i, place]))
            if cycle(table, x) > 5 and (k, x) not in [t[:2] for t in triples[:a]]:
                right[k].append(float(seen["correct"][i, place]))
                depths[k].append(float(seen["depth"][i, place]))
    rows = task.by_hops(seen, lines)
    assert [row["k"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        k = row["k"]
        assert row["answers"] == len(right[k]) > 20
        assert row["accuracy"] == pytest.approx(100 * sum(right[k]) / len(right[k]))
        assert row["all"] == pytest.approx(100 * sum(every[k]) / len(every[k]))
        assert row["depth"] == pytest.approx(sum(depths[k]) / len(depths[k]))


def test_depth_by_kind_is_that_of_the_plan():
    task = Hops()
    depth = torch.tensor([KINDS.index(kind) for kind in task.kinds(64)]).expand(3, 64)
    assert task.depth_by_kind(dict(depth=depth)) == dict(table=0, k=1, x=2, answer=3)


def test_where_no_answer_is_hard_nothing_is_scored():
    """On one line some k has none; JSON has no word for nan."""
    task = Hops(5, 3, length=20)
    rows = [
        row
        for line in task.draw(20, 20, generator())
        for row in task.by_hops(invented(line[None]), line[None])
    ]
    assert {row["accuracy"] for row in rows if not row["answers"]} == {None}
    assert None not in {row["accuracy"] for row in rows if row["answers"]}
    json.dumps(rows, allow_nan=False)


def test_a_record_keeps_both_as_json(make_model):
    task = Hops(5, 3, length=20)
    model = make_model(vocab_size=8, routing="random", target_depth=2.0, max_len=20)
    measured = morlib.evaluate(model, task, "val", 60)
    lines = task.windows("val", 20, 60)
    seen = morlib.score(model, lines)
    expected = dict(by_hops=task.by_hops(seen, lines), depth_by_kind=task.depth_by_kind(seen))
    assert measured["details"] == expected == json.loads(json.dumps(expected))
    kinds = task.kinds(20)
    mean = sum(expected["depth_by_kind"][kind] * kinds.count(kind) for kind in KINDS) / 20
    assert mean == pytest.approx(measured["effective_depth"], abs=1e-4)


# ---- What needs no hops, and what nobody can know ----


def test_shortcuts_are_what_plain_python_finds():
    task = Hops(6, 4)
    lines = task.draw(300, 40, generator())
    tried = {name: {k: {"hard": [], "all": []} for k in range(1, 5)} for name in ("x", "f(x)", "copy")}
    for line in lines:
        table, triples = read(task, line)
        for a, (k, x, answer) in enumerate(triples):
            earlier = [t for t in triples[:a] if t[1] == x]
            guesses = {"x": x, "f(x)": table[x], "copy": earlier[-1][2] if earlier else x}
            hard = cycle(table, x) > 4 and all(t[0] != k for t in earlier)
            for name, guess in guesses.items():
                tried[name][k]["all"].append(guess == answer)
                if hard:
                    tried[name][k]["hard"].append(guess == answer)
    found = task.shortcuts(lines)
    assert found.pop("guess") == {k: dict(hard=100 / 6, all=100 / 6) for k in range(1, 5)}
    assert found.keys() == tried.keys()
    for name, k, kind in itertools.product(tried, range(1, 5), ("hard", "all")):
        answers = tried[name][k][kind]
        assert found[name][k][kind] == pytest.approx(100 * sum(answers) / len(answers)), (name, k, kind)


def test_no_shortcut_gives_a_hard_answer_but_one_hop_for_one():
    found = Hops().shortcuts(Hops().windows("heldout", 64))
    for name, k in itertools.product(("x", "f(x)", "copy"), range(1, 7)):
        assert found[name][k]["hard"] == (100 if (name, k) == ("f(x)", 1) else 0)


def test_least_loss_is_the_entropy_of_all_lines_counted_out():
    """All lines of a small task, drawn evenly: the entropy of lines, given their first token."""
    task, length = Hops(4, 2), 8
    chance = {}
    for table in itertools.permutations(range(4)):
        for questions in itertools.product(range(1, 3), range(4), repeat=2):
            line = list(table)
            for k, x in (questions[:2], questions[2:]):
                answer = table[x] if k == 1 else table[table[x]]
                line += [("k", k), ("x", x), ("answer", answer)]
            line = tuple(line[: length + 1])
            chance[line] = chance.get(line, 0) + 1 / (24 * 64)
    assert sum(chance.values()) == pytest.approx(1)
    entropy = -sum(p * math.log(p) for p in chance.values()) - math.log(4)
    assert task.least_loss(length) == pytest.approx(entropy / length)
    assert Hops().least_loss(64) == pytest.approx(1.2825, abs=1e-4)


def test_floors_are_those_of_counting_without_a_line_s_first_token():
    task = Hops(5, 3, length=30)
    lines = {part: task.windows(part, 30) for part in WINDOWS}
    train = lines["train"].flatten().tolist()
    after = {}
    for one, next_one in zip(train, train[1:]):
        after.setdefault(one, []).append(next_one)
    single = [(train.count(t) + len(set(train)) / 8) / (len(train) + len(set(train))) for t in range(8)]
    surprisal, right = [], []
    for line in lines["heldout"].tolist():
        for one, next_one in zip(line, line[1:]):
            seen = after[one]
            distinct = len(set(seen))
            p = [(seen.count(t) + distinct * single[t]) / (len(seen) + distinct) for t in range(8)]
            surprisal.append(-math.log(p[next_one]))
            right.append(max(range(8), key=p.__getitem__) == next_one)
        if len(surprisal) > 300:
            break
    short = Hops(5, 3, length=30)
    short.windows = lambda part, length, most=None: (
        lines[part] if part == "train" else lines[part][: len(surprisal) // 30]
    )
    floor = short.floors["2"]["heldout"]
    assert floor["loss"] == pytest.approx(sum(surprisal) / len(surprisal))
    assert floor["accuracy"] == pytest.approx(100 * sum(right) / len(right))


def test_counting_more_helps_a_little_and_stays_above_the_least_loss():
    task = Hops()
    for part in ("val", "heldout"):
        two, three = task.floors["2"][part], task.floors["3"][part]
        assert math.log(14) > two["loss"] > three["loss"] > task.least_loss(64)
        assert 0 < two["accuracy"] < three["accuracy"] < 40


# ---- As a corpus ----


def test_it_is_found_by_name():
    task = texts.load_corpus("hops-8-6")
    assert isinstance(task, Hops) and task is texts.load_corpus("hops-8-6", subwords=400, max_chars=1000)
    assert (task.symbols, task.hops, task.name, task.vocab_size) == (8, 6, "hops-8-6", 14)
    assert texts.load_corpus("hops-12-9").vocab_size == 21
    assert tasks.made("tinyshakespeare") is None
    with pytest.raises(ValueError, match="not 2 and 6"):
        texts.load_corpus("hops-2-6")


def test_its_description_tells_tasks_apart():
    first, again, other = Hops().describe(), Hops().describe(), Hops(8, 5).describe()
    assert first == again
    assert first["sha256"] != other["sha256"] and first["name"] != other["name"]
    assert set(first) == {"name", "sha256", "split", "source", "tokenizer", "vocab_size", "tokens"}


def test_it_is_trained_on_and_measured(make_model):
    task = Hops(4, 2, length=16)
    model = make_model(vocab_size=task.vocab_size, n_layers=2, routing="none", max_len=16)
    tc = morlib.TrainConfig(
        epochs=2, windows=960, batch_size=32, lr=1e-2, evaluations=2, eval_windows=50, heldout_windows=50
    )
    training = morlib.train(model, task, tc)
    measured = morlib.evaluate(model, task, "heldout", 50)
    assert measured["bits_per_byte"] is None
    assert training.history[-1]["val_loss"] < task.floors["2"]["val"]["loss"]
    assert measured["loss"] > task.least_loss(16) - 0.05


def test_a_perfect_reader_has_the_least_loss():
    """Sure of answers, and even about k, x and what is left of the table: on real lines, token by token."""
    task = Hops()
    loss, n = 0.0, 50
    for line in task.windows("heldout", 64, n).tolist():
        for t in range(1, 65):
            choices = {"table": 8 - t, "k": 6, "x": 8, "answer": 1}[task.kinds(65)[t]]
            loss += math.log(choices)
            if task.kinds(65)[t] == "table":
                assert line[t] not in line[:t]
    assert loss / n / 64 == pytest.approx(task.least_loss(64))


# ---- Variants and the front ----


def test_whole_windows_run_whole_in_training_only(make_model, monkeypatch):
    monkeypatch.setattr(runs.known_depth.WholeWindows, "WHOLE", 0.5)
    model = make_model(routing="worth-whole-windows", n_layers=4, max_len=32, target_depth=1.3)
    tokens = torch.randint(model.cfg.vocab_size, (64, 32))
    depth = model.train()(tokens, done=1.0).depth.float()
    whole = (depth == 4).all(1)
    assert 20 <= whole.sum() <= 44 and depth[~whole].mean() < 2
    morlib.calibrate(model.eval(), tokens)
    depth = model(tokens).depth.float()
    assert not (depth == 4).all(1).any() and depth.mean() == pytest.approx(1.3, abs=0.02)


def test_a_plan_may_run_its_tokens_through_the_lower_layers_alone(make_model):
    sizes = dict(routing="planted-hops-8", n_layers=4, max_len=64)
    model, whole = (make_model(**sizes, options=dict(layers=n)) for n in (2, 4))
    tokens = torch.randint(model.cfg.vocab_size, (2, 64))
    depth, deep = model(tokens).depth, whole(tokens).depth == 4
    assert deep.any() and (depth[deep] == 2).all() and (depth[~deep] == 1).all()
    assert torch.equal(whole(tokens).logits, make_model(**sizes)(tokens).logits)
    with pytest.raises(ValueError, match=r"needs layers in 0\.\.4 \(0: all\), not 5"):
        make_model(**sizes, options=dict(layers=5))
    with pytest.raises(ValueError, match="option layers must be int, not float 2.5"):
        make_model(**sizes, options=dict(layers=2.5))


def test_what_notebook_07_says_of_fewer_layers_holds():
    front = results.front_records()
    first = front[(front["seed"] < 3) & (front["line"] != "held")]
    hops = first.groupby("model")["hops"].agg(["min", "max"]).round()
    said = {"worth-shallow": (54, 69), "planted 3": (58, 85), "fixed-between": (39, 62)}
    said |= {"planted 2": (2, 45), "fixed-half": (28, 30), "worth 1.9": (4, 11)}
    assert {model: tuple(hops.loc[model]) for model in said} == said
    for record in front[front["model"] == "worth-shallow"]["record"]:
        depth = record["metrics"]["details"]["depth_by_kind"]
        assert min(depth["table"], depth["x"]) > 2.95 and max(depth["k"], depth["answer"]) < 1.15
    E = first.groupby("model")["effective_depth"].mean()
    assert E["worth-shallow"] == pytest.approx(1.87, abs=0.01) and E["planted 2"] == pytest.approx(
        1.42, abs=0.01
    )
    assert E["fixed-between"] > 1.5 * E["worth-shallow"]
    assert set(front[front["line"] == "planted"]["asked"]) == {2, 3, 4}, "what a plan asks for"


def test_fewer_layers_in_the_wide_setting_stand_beside_the_others_at_their_seeds(tmp_path):
    records = results.wide_front_records()
    shallow = records[records["model"] == "worth-shallow"]
    seeds = set(records[records["experiment"] == "front-wide"]["seed"])
    assert len(shallow) and set(records["seed"]) == seeds
    sizes = {(r["config"]["model"]["d_model"], r["config"]["train"]["epochs"]) for r in records["record"]}
    assert len(sizes) == 1, "one setting"
    layers = {r["model"]: r["config"]["model"]["n_layers"] for r in records["record"]}
    models = ("fixed-half", "fixed-between", "fixed-deep", "worth-shallow", "planted 4")
    assert [layers[model] for model in models] == [3, 4, 6, 4, 6]
    assert results.wide_front_records(tmp_path).empty
    for seed in (0, 1):
        for path in files.REFERENCE.glob(f"front-wide_*_s{seed}_*.json"):
            shutil.copy(path, tmp_path)
    assert len(runs.stored_records("front-wide", tmp_path)) == 4
    assert results.wide_front_records(tmp_path).empty, "nothing to stand beside"
    assert results.hops_table(results.wide_front_records(tmp_path)).empty
    for path in files.REFERENCE.glob("known-depth_*.json"):
        shutil.copy(path, tmp_path)
    beside = results.wide_front_records(tmp_path)
    assert set(beside["seed"]) == {0, 1}
    assert set(beside["model"]) == {
        "worth-shallow",
        "planted 4",
        "fixed-half",
        "fixed-deep",
        "planted",
        "worth",
    }


def test_what_notebook_07_says_of_fewer_layers_in_the_wide_setting_holds():
    records = results.wide_front_records()
    scored = results.known_depth.with_hops(records)
    right = scored.groupby("model")["hops"].mean().round()
    assert (right["worth-shallow"], right["worth"]) == (92, 99)
    for record in records[records["model"] == "worth-shallow"]["record"]:
        depth = record["metrics"]["details"]["depth_by_kind"]
        assert min(depth["table"], depth["x"]) > 3.9 and max(depth["k"], depth["answer"]) < 1.15
    told = results.hops_verdicts(records, "worth-shallow").set_index("token worth in four layers against")
    assert told["verdict"][["three layers", "six layers", "token worth"]].tolist() == [
        "better", "no difference shown", "undecided: two tests disagree"]  # fmt: skip
    E = records.groupby("model")["effective_depth"].mean()
    assert E["worth-shallow"] < E["fixed-deep"] / 2.5 and round(E["planted 4"], 2) == 2.27
    plans = scored[scored["model"] == "planted 4"]["record"]
    right = [of["accuracy"] for record in plans for of in record["metrics"]["details"]["by_hops"]]
    assert len(plans) == 3 and min(right) > 99


def test_what_notebook_07_says_of_four_wide_layers_holds():
    records = runs.stored_records("known-depth-4")
    assert {record["config"]["train"]["schedule"] for record in records["record"]} == {"wsd"}
    hops = results.known_depth.with_hops(records).pivot_table(index="seed", columns="model", values="hops")
    assert len(hops["worth"].dropna()) == len(hops["fixed-half"].dropna()) == 6
    assert (hops["worth"] > hops["fixed-half"]).all()
    three, four = hops["fixed-between"].dropna(), hops["fixed-deep"].dropna()
    assert (hops["worth"] > three).all() and len(three) == 6
    assert (round(three.min()), round(three.max())) == (29, 96)
    lead = results.known_depth.compare_hops(results.known_depth.with_hops(records), "worth", "fixed-between")
    assert [round(lead[name]) for name in ("mean", "low", "high")] == [28, 4, 53]  # 3.5 and 52.5
    assert len(four) == 6 and [round(x) for x in (four.min(), four.mean(), four.max())] == [73, 89, 100]
    solved = results.known_depth.with_hops(records[records["model"] == "fixed-deep"])["solved"]
    assert solved.sum() == 2
    mor, windows = hops["mor"].dropna(), hops["worth-by-windows"].dropna()
    assert len(mor) == 3 and (round(mor.min()), round(mor.max())) == (55, 69)
    assert (mor < four[mor.index]).all() and (mor < hops["worth"][mor.index]).all()
    assert windows.round().tolist() == [99]
    own = records[records["model"] == "worth"]
    for record in own["record"]:
        depth = record["metrics"]["details"]["depth_by_kind"]
        assert min(depth["table"], depth["x"]) > 3.9 and max(depth["k"], depth["answer"]) < 1.15
    plan = results.known_depth.with_hops(records[records["model"] == "planted"])["solved"]
    assert len(plan) == 6 and plan.all()
    right = results.known_depth.by_hops(own)
    assert right.loc[right["accuracy"].idxmin(), "k"] == 6 and round(right["accuracy"].min()) == 95
    verdicts = results.hops_verdicts(records).set_index("token worth against")["verdict"]
    assert verdicts["two layers"] == verdicts["three layers"] == "better"
    assert verdicts["the plan written down"] == "undecided: two tests disagree"
    assert verdicts["four layers"] == "no difference shown"
    ahead = results.known_depth.compare_hops(results.known_depth.with_hops(records), "worth", "fixed-deep")
    assert [round(ahead[name]) for name in ("mean", "low", "high")] == [10, -1, 22]
    behind = results.known_depth.compare_hops(results.known_depth.with_hops(records), "worth", "planted")
    assert round(behind["mean"], 1) == -0.7


def test_the_plan_is_equal_to_all_layers_within_a_point_as_in_the_other_sentences():
    front = results.front_records()
    for model, level in (("planted", 50), ("fixed-deep", 0)):
        own = front["model"] == model
        front.loc[own, "hops"] = 50 + front.loc[own, "seed"].map(lambda seed: 0.9 * (-1) ** seed * level / 50)
    told = results.plan_sentence(front)
    assert "+0 points (90 % interval \u22121 to +1; six seeds)" in told


def test_the_front_is_drawn_from_both_kinds_of_records():
    front = results.front_records()
    narrow = results.narrow_records()
    assert set(front["model"]) >= {"worth 1.9", "worth 3", "fixed 1", "fixed-between", "worth", "mor"}
    assert "fixed-half-long" not in set(front["model"]) and "fixed-half-long" in set(narrow["model"])
    own = front[front["line"] != "held"]
    assert own["record"].map(lambda record: record["id"]).is_unique, "no run counts twice"
    table = results.known_front_table(front)
    fixed = table.loc["fixed depth"]
    assert fixed["E"].tolist() == sorted(fixed["E"]) and {2.0, 3.0, 4.0} <= set(fixed["E"])
    for label in ("mor", "mor-spread"):
        assert table.loc[results.known_front.FRONT_LINES[label], "seeds"] == 6, "two kinds of MoR stay apart"
    worth = front[front["line"] == "worth"]
    for asked, own in worth.groupby("asked"):
        assert own["effective_depth"].mean() == pytest.approx(asked, abs=0.05)
    lines = {line.get_label() for line in results.draw_known_front(front).axes[0].lines}
    assert {"fixed depth", "token worth, trained for each depth", "the plan written down"} <= lines


def test_each_lead_changes_what_its_name_says_and_is_a_run_of_its_own():
    s = runs.settings(dict(preset="cpu", seeds=6))
    tried = runs.lead_runs(s)
    corpus = texts.load_corpus("hops-8-6")
    ids = {runs.run_id(replace(r.config, vocab_size=14), r.train, corpus, r.code) for r in tried}
    assert len(ids) == len(tried) and {r.train.seed for r in tried}.isdisjoint(range(6))
    for run in tried:
        policy = morlib.POLICIES[run.config.routing]
        for name, value in leads.CONSTANTS.get(run.model, {}).items():
            assert getattr(policy, name) == value != getattr(morlib.WorthRouter, name)
        for name, value in leads.TRAINING.get(run.model, {}).items():
            assert getattr(run.train, name) == value != getattr(tried[0].train, name)


def test_what_notebook_07_says_of_leads_that_spoil_the_plan_holds():
    table = results.leads_table(runs.stored_records("leads"))
    s = runs.settings(dict(preset="cpu", seeds=6))
    kept = {run.model for run in runs.lead_runs(s)}
    assert kept < set(table.index) and len(table) == len(kept) + 6, "each was tried, and six lost their code"
    deep = (table["table"] >= 3.6) & (table["symbol x"] >= 3.9)
    assert set(table.index[~deep]) == {
        "a key's slope of 1", "two layers for all", "a second decision half-way",
        "one block, run again in place of on", "two blocks, run again in place of on",
        "what a token's own loss falls by is added", "a depth between, each step up with a worth of its own",
    }  # fmt: skip
    between = table.loc["a depth between, each step up with a worth of its own"]
    assert between["table"] < 2.6 and between["number k"] > 1.3 and between["answer"] > 1.5
    best = table.index[0]
    right = table["right (%)"]
    assert best == "a constant learning rate" and right[best] > 2 * right.iloc[1]
    again = table[table.index.str.contains("run again")]
    assert (again["table"] < 2.5).all() and (again["answer"] > 2.3).all()


# ---- The answer in words ----


def records_of(accuracy):
    """Records like stored ones: for each model the accuracy (%) at every k of each of its seeds."""
    stored, made = runs.stored_records("known-depth"), []
    for model, values in accuracy.items():
        first = stored[stored["model"] == model].iloc[0]
        for seed, value in enumerate(values):
            record = json.loads(json.dumps(first["record"])) | dict(seed=seed, id=f"{model}{seed}")
            record["config"]["train"]["seed"] = seed
            for row in record["metrics"]["details"]["by_hops"]:
                row["accuracy"] = value
            made.append(record)
    return runs.table_of(made)


@pytest.mark.parametrize("worth, half, start, short", [
    ([99, 98, 99, 97, 99, 98], [60, 55, 70, 65, 50, 60],
     "Yes, held to a depth set by hand: at E 3.1, WORTH answers 98 ", "does at a depth that is set by hand."),
    ([99, 98], [60, 55], "Yes so far: at E 3.1, WORTH answers 98 to 99 % ", "is not shown to."),
    ([60, 55, 70, 65, 50, 60], [99, 98, 99, 97, 99, 98], "Not shown: at E 3.1, WORTH answers 60 ",
     "does not."),
    ([60, 50, 70, 55, 52, 61], [59, 51, 68, 57, 51, 60], "Not shown: at E 3.1, WORTH answers 58 ",
     "is not shown to."),
])  # fmt: skip
def test_sentences_say_no_more_than_the_seeds(worth, half, start, short):
    records = records_of({"worth": worth, "fixed-half": half, "fixed-deep": [90] * len(worth)})
    told = results.hops_sentence(records)
    assert told.replace("token worth (a router that learns what depth is worth)", "WORTH").startswith(start)
    assert "of the hard questions of 4 to 6 hops" in told and "4,000 steps" in told
    assert results.short_known(records) == f"Token worth {short}"
    told = results.known_depth_answer(records)
    against_all = f"{results.signed(sum(worth) / len(worth) - 90, 0)} points ("
    assert told.startswith("In six layers of width 64, at E 3.1, *token worth* against six layers: ")
    assert re.search(rf"against six layers: (?:[\w ]+, )?{re.escape(against_all)}", told)
    assert ("of six seeds" in told) == (len(worth) < 6)


def test_the_short_answer_of_the_records_that_ship():
    narrow = "Token worth does at a depth that is set by hand; MoR's router is not shown to."
    assert results.short_known(results.main_records()) == narrow


def test_settings_stand_side_by_side_with_their_means_and_few_seeds_in_brackets():
    table, stored = results.settings_table(), results.known_settings()
    assert len(table) == len(stored) == table.index.nunique()
    for (name, row), records in zip(table.iterrows(), stored.values()):
        scored = results.known_depth.with_hops(records)
        config = records[records["model"] == "fixed-deep"].iloc[0]["record"]["config"]
        assert ("rate stays high" in name) == (config["train"].get("schedule") == "wsd")
        assert name.startswith(f"{config['model']['n_layers']} layers, width {config['model']['d_model']}, ")
        assert row["E"] == f"{scored[scored['model'] == 'worth']['effective_depth'].mean():.1f}"
        for label, column in results.side_by_side.SIDE_BY_SIDE.items():
            own = scored[scored["model"] == label]["hops"]
            few = f" ({len(own)})" if len(own) < 6 else ""
            assert row[column] == (f"{own.mean():.0f}{few}" if len(own) else "\u2013")
    assert "(" in table.to_string() and "\u2013" in table.to_string()


def test_settings_without_an_answer_are_left_out(tmp_path):
    for path in files.REFERENCE.glob("known-depth-wsd_*.json"):
        shutil.copy(path, tmp_path)
    assert results.settings_table(tmp_path).index.tolist() == [
        "4 layers, width 32, 6 hops, 8,000 steps, rate stays high"
    ]


def test_the_main_answer_rests_on_the_narrow_setting_where_it_ships(tmp_path):
    assert set(results.main_records()["experiment"]) == {"field"}
    assert results.main_records(tmp_path).empty
    for path in files.REFERENCE.glob("known-depth_*.json"):
        shutil.copy(path, tmp_path)
    assert set(results.main_records(tmp_path)["experiment"]) == {"known-depth"}


def test_the_headline_of_notebook_07_shows_all_settings(capsys):
    results.known_depth_headline()
    told = capsys.readouterr().out
    assert results.CAPTION in told and results.markdown(results.settings_table()) in told


def test_of_a_rate_that_stays_high_only_the_schedule_is_another():
    s = runs.settings(dict(preset="cpu", seeds=1))
    other = {(r.model, r.train.windows): r for r in runs.narrow_runs(s) + field.field_runs(s)}
    made = runs.wsd_runs(s)
    assert len(made) == 9 and {r.experiment for r in made} == {"known-depth-wsd"}
    for run in made:
        same = other[run.model, run.train.windows]
        assert run.train == replace(same.train, schedule="wsd")
        assert replace(run, experiment=same.experiment, train=same.train) == same


def test_what_notebook_07_says_of_higher_rates_holds():
    usual, fast = (
        results.known_depth.with_hops(records).set_index(["model", "seed"])["hops"]
        for records in (results.narrow_records(), runs.stored_records("rates-4"))
    )
    less = (fast < usual[fast.index]).groupby(level="model").agg(["sum", "size"])
    assert less.T.to_dict() == dict.fromkeys(
        ["fixed-between", "fixed-deep", "fixed-half", "worth"], dict(sum=2, size=3)
    )
    twice = results.known_depth.with_hops(runs.stored_records("rates")).groupby("model")["hops"]
    assert twice.mean().round().to_dict() == {"worth": 91, "fixed-half": 29, "fixed-deep": 83}
    assert set(twice.size()) == {3}


def test_each_stored_record_can_be_trained_again_by_its_name():
    s = runs.settings(dict(preset="cpu", seeds=6))
    made = runs.known_depth_runs(s, runs.known_depth_models(s))
    named = {spec.model for spec in made} | {"fixed-half-long", "random"}
    own = ("front", "chains", "rates", "rates-4", "known-depth-rates", "known-depth-12", "known-depth-wsd")
    own = (*own, "leads", "front-wide", "known-depth-4")
    stored = [runs.stored_records(name) for name in ("known-depth", "known-depth-map", "field", *own)]
    made += runs.random_controls(stored[0], made, "worth")
    ids = set()
    made += (
        runs.front_runs(s)
        + runs.wide_front_runs(s)
        + runs.four_wide_runs(s)
        + runs.chains_runs(s)
        + runs.rate_runs(s)
        + runs.wsd_runs(s)
    )
    made += runs.lead_runs(s)
    for spec in made + runs.map_runs(s) + runs.narrow_runs(s) + runs.deep_runs(s):
        corpus = texts.load_corpus(**dict(spec.corpus))
        cfg = replace(spec.config, vocab_size=corpus.vocab_size)
        ids.add((spec.model, spec.train.seed, runs.run_id(cfg, spec.train, corpus, spec.code)))
    kept = [
        r for table in stored for r in table["record"] if r["config"]["model"]["routing"] in morlib.POLICIES
    ]
    assert sum(map(len, stored)) == len(kept) + 6, "six leads lost their code"
    for record in kept:
        if record["model"] in named or record["experiment"] in ("known-depth-map", *own):
            assert (record["model"], record["seed"], record["id"]) in ids


def test_what_notebook_07_says_of_mor_in_the_wide_setting_holds():
    scored = results.known_depth.with_hops(runs.stored_records("known-depth"))
    mor = scored[scored["model"] == "mor"].set_index("seed")
    half = scored[scored["model"] == "fixed-half"].set_index("seed")["hops"]
    assert list(mor.index) == list(range(6)) and (mor["hops"] > half).sum() == 4
    depth = [record["metrics"]["details"]["depth_by_kind"] for record in mor["record"]]
    table = [round(own["table"], 1) for own in depth]
    assert (min(table), *sorted(table)[-2:]) == (2.1, 2.8, 5.4)
    assert table.index(5.4) == mor["hops"].argmax(), "where most of the table runs, most is answered"
    assert all(1.9 < own["x"] < 2.5 for own in depth)


def test_what_notebook_07_says_where_the_rate_stays_high_holds(goals):
    records = runs.stored_records("known-depth-wsd")
    hops = results.known_depth.with_hops(records).pivot_table(index="seed", columns="model", values="hops")
    for model, least in (("worth", 89), ("worth-by-windows", 91)):
        own = hops[model].dropna().round()
        assert len(own) == 6 and (own.min(), own.max()) == (least, 99)
    told = results.hops_verdicts(records).set_index("token worth against")["verdict"]
    alike = told[["token worth, by windows", "four layers", "the plan written down"]]
    assert set(alike) == {"no difference shown"}
    for model in ("fixed-between", "fixed-half-long"):
        assert (hops["worth"] - hops[model] < 6).sum() == 1, "comes near token worth at a seed"
    plan = goals[goals["goal"].str.startswith("the plan")]["found"]
    high = plan[plan.index.str.startswith("narrow, a rate that stays high")]
    assert high.tolist() == ["5 of 6", "1 of 6"]


def test_what_notebook_07_says_of_by_windows_in_the_wide_setting_holds():
    records = runs.stored_records("known-depth")
    own = results.known_depth.with_hops(records)
    own = own[own["model"] == "worth-by-windows"].sort_values("hops")
    assert len(own) == 6 and round(own["hops"].iloc[0]) == 62 and own["hops"].iloc[1] > 95
    deep = own["record"].iloc[0]["metrics"]["details"]["depth_by_kind"]
    assert deep["table"] > 5.5 and deep["x"] > 5.5 and deep["answer"] < 1.5 and deep["k"] < 1.5
    told = results.hops_verdicts(records).set_index("token worth against")["verdict"]
    assert told["token worth, by windows"] == "no difference shown"


# ---- The price as a dial ----


def test_depth_that_follows_k_is_seen_and_equal_depth_is_none():
    task = Hops(8, 6)
    lines = task.windows("val", 64, 100)
    asked, places = task.answers(lines), task.places(64)
    depth = torch.randint(
        9, (100, 64), generator=torch.Generator().manual_seed(0)
    )  # noise where nobody looks
    depth[:, places] = torch.where(asked["hard"], 2 * asked["k"], 1)
    assert follows(dict(depth=depth), lines, task) == pytest.approx(1)
    depth[:, places] = torch.where(asked["hard"], -asked["k"], 1)
    assert follows(dict(depth=depth), lines, task) == pytest.approx(-1)
    assert follows(dict(depth=torch.ones(100, 64)), lines, task) == 0


def test_token_worth_on_text_stands_beside_the_experiment_s_records():
    own = runs.worth_runs(runs.settings(dict(preset="cpu", seeds=6)))
    assert all(isinstance(record, dict) for record in stored(own))
    records = results.worth_on_text("exp2")
    worth, fixed = (records[records["model"] == name] for name in ("token worth", "fixed-shallow"))
    assert list(worth["seed"]) == list(fixed["seed"]) == list(range(6))
    assert {r["data"]["sha256"] for r in worth["record"]} == {r["data"]["sha256"] for r in fixed["record"]}
    gap = (worth["accuracy"].to_numpy() - fixed["accuracy"].to_numpy()).mean()
    told = results.verdicts(records, [("token worth", "fixed-shallow")])
    assert told["difference (points)"].iloc[0] == results.signed(gap)
    loses = "On half of Tiny Shakespeare, after 6 epochs, token worth loses against 6 layers"
    twice = records[records["model"] == "token worth, asked twice"]["accuracy"].to_numpy()
    back = (twice - worth["accuracy"].to_numpy()).mean() / -gap
    assert 1 / 8 < back < 1 / 6, "notebook 07 says a seventh"
    c = results.compare(records, "token worth, asked twice", "token worth", metric="loss", margin=0.01)
    assert c["pairs"] == 6 and c["low"] < 0 < c["high"], "and in loss nothing"
    alike = results.verdicts(records, [("token worth, by windows", "token worth")])["verdict"]
    assert alike.tolist() == ["equal within half a point"]
    assert gap < -1 and results.text_sentence().startswith(f"{loses}: {results.signed(gap)} points (")


def test_without_records_nothing_is_said_of_token_worth_on_text(tmp_path, monkeypatch):
    assert results.text_sentence(tmp_path) == ""
    monkeypatch.setattr(results, "text_sentence", lambda: "")
    assert report.worth_on_text() == []


def test_the_dial_that_ships_is_of_the_stored_runs():
    stored, dial = runs.stored_records("known-depth"), results.stored_table(results.DIAL)
    own = stored[stored["model"] == "worth"]
    assert sorted(dial["run"].unique()) == sorted(record["id"] for record in own["record"])
    assert (dial["effective_depth"] - dial["target"]).abs().max() < 0.1
    losses = {record["id"]: record["metrics"]["loss"] for record in own["record"]}
    for row in dial[(dial["target"] - 3.1).abs() < 1e-6].to_dict("records"):
        assert row["loss"] == pytest.approx(losses[row["run"]], abs=0.02)
    by_k = results.dial_table(dial).filter(like="depth at")
    assert ((by_k >= 1) & (by_k <= 6)).all(axis=None)
    own_depth, shown = dial[dial["target"] == 3.1], results.dial_table(dial).loc[3.1]
    worst = [min(row["accuracy"] for row in by_hops) for by_hops in own_depth["by_hops"]]
    assert shown["worst k (%)"] == round(sum(worst) / 6)
    assert shown["solved"] == f"{sum(right >= 99 for right in worst)} of 6"
    assert "harder questions get more of it: at E 2, rank correlation" in results.dial_sentence(dial)


@pytest.mark.parametrize(
    "r, told",
    [
        (
            [0.5, 0.6, 0.7, 0.6, 0.5, 0.4],
            "harder questions get more of it: at E 2,",
        ),
        (
            [0.5, 0.6],
            "harder questions get more of it, so far: at E 2",
        ),
        (
            [0.5, -0.6, 0.7, -0.6, 0.5, -0.4],
            "it is not shown that harder",
        ),
    ],
)
def test_the_dial_s_sentence_says_no_more_than_the_seeds(r, told):
    dial = results.stored_table(results.DIAL)
    dial = dial[dial["seed"] < len(r)].copy()
    dial["r"] = [r[seed] for seed in dial["seed"]]
    held = "Held to less depth after training (the wide setting of notebook 07), "
    assert results.dial_sentence(dial).startswith(held + told)


def by_seed(experiment, metric):
    """A table of a metric by seed and model, of records that ship."""
    return runs.stored_records(experiment).pivot_table(index="seed", columns="model", values=metric)


def test_two_layers_in_twice_the_steps_are_behind_four_as_notebooks_07_and_08_say():
    for experiment, behind, losses in (("field", 5, (1.383, 1.338)), ("known-depth-wsd", 6, (1.357, 1.290))):
        own = by_seed(experiment, "loss")[["fixed-half-long", "fixed-deep"]].dropna()
        assert len(own) == 6 and tuple(own.mean().round(3)) == losses
        assert (own["fixed-half-long"] > own["fixed-deep"]).sum() == behind


def test_what_notebook_07_says_of_mor_and_of_three_layers_at_twice_the_rate_holds():
    told = results.hops_verdicts(runs.stored_records("known-depth"), "mor").set_index(
        "MoR of notebook 02 against"
    )
    assert told.loc["six layers", "interval"] == "\u221255.6 to \u22122.1 (95 %)"
    assert told.loc["six layers", ["difference (points)", "verdict"]].tolist() == ["\u221228.9", "worse"]
    spread = runs.stored_records("field")
    depths = [r["metrics"]["details"]["depth_by_kind"]
              for r in spread[spread["model"] == "mor-spread"]["record"]]  # fmt: skip
    both = [round(depth[kind], 1) for depth in depths for kind in ("table", "x")]
    assert (min(both), max(both)) == (1.4, 2.5)
    hops = {name: results.known_depth.with_hops(runs.stored_records(name)).pivot_table(
        index="seed", columns="model", values="hops")["fixed-half"]
        for name in ("known-depth", "known-depth-rates")}  # fmt: skip
    fast = hops["known-depth-rates"].dropna().round()
    usual = hops["known-depth"][fast.index].round()
    assert len(fast) == 3 and (fast.min(), fast.max(), usual.min(), usual.max()) == (41, 76, 18, 88)


WORTH_AND_RIVALS = ["token worth", "worth above 5 layers", "fixed-shallow", "blind above 5 layers"]


def test_what_notebook_07_says_that_layers_for_all_bring_back_on_text_holds():
    records = results.worth_on_text("exp2")
    for metric, percent in (("accuracy", 55), ("loss", 48)):
        own = records.pivot_table(index="seed", columns="model", values=metric)
        worth, above, six, blind = own[WORTH_AND_RIVALS].dropna().mean()
        assert round(100 * (above - worth) / (six - worth)) == percent
    assert round(above - blind, 3) == 0.012


def test_the_map_of_fixed_models_holds_each_training_once():
    found = results.map_records()
    table, known = results.map_table(found), runs.stored_records("known-depth")
    for label, model in (("fixed 3, 4000 steps", "fixed-half"), ("fixed 6, 4000 steps", "fixed-deep")):
        own = known[known["model"] == model]
        assert table.at[label, "trainings"] == len(own) == 6
        assert table.at[label, "loss (nats)"] == round(own["loss"].mean(), 3)
    four = found[(found["model"] == "fixed 4, 4000 steps") & (found["seed"] == 0)]["record"]
    right = [results.known_depth.upper_half(r["metrics"]["details"]["by_hops"]) for r in four]
    assert sorted(map(round, right)) == [81, 99], "one run, trained on two machines"
    configs = [record["config"]["model"] for record in found["record"]]
    assert all(
        c["routing"] == "none" and not c.get("shared_blocks") and not c.get("options") for c in configs
    )
    assert len(table) == 7 and results.map_table(found.head(0)).empty


def test_what_notebook_07_says_of_99_percent_at_each_k_holds():
    solved = {}
    known = ("known-depth", "known-depth-wsd", "known-depth-4", "known-depth-12")
    for experiment in ("field", "front", "front-wide", *known):
        scored = results.known_depth.with_hops(runs.stored_records(experiment))
        for model, own in scored.groupby("model"):
            solved[experiment, model] = own["effective_depth"].mean(), own["solved"].mean(), len(own)
    whole = {
        name: E for name, (E, share, _) in solved.items() if share == 1 and name[1].startswith("planted")
    }
    assert round(min(whole.values()), 2) == 2.27 and min(whole, key=whole.get) == ("front-wide", "planted 4")
    routers = {name for name, (_, share, _) in solved.items() if share == 1 and name[1].startswith("worth")}
    assert not routers
    E, share, seeds = solved["known-depth-4", "worth"]
    assert (round(E, 1), round(share * seeds), seeds) == (2.3, 3, 6)
    wide = {
        model: round(share * n) for (name, model), (_, share, n) in solved.items() if name == "known-depth"
    }
    assert (wide["planted"], wide["worth"], wide["fixed-deep"]) == (6, 1, 0)


def test_what_notebook_07_says_of_twelve_layers_holds():
    deep, leads = results.deep_records(), runs.stored_records("known-depth-12-leads")
    assert len(leads) == 6 and not set(leads["seed"]) & set(deep["seed"])
    six = results.known_depth.with_hops(deep[deep["model"] == "fixed-half"])["hops"].mean()
    assert round(100 - six) == 16, "what six layers leave to win"
    losses = [
        next(point["val_loss"] for point in record["history"] if point["step"] == 3000)
        for table, model in ((deep, "planted"), (leads, "the plan, with the warm-up"))
        for record in table[table["model"] == model]["record"]
    ]
    assert len(losses) == 2 and round(losses[1] - losses[0], 2) == 0.11
