"""Chains, the second task of known depth: its lines and its answers, each against plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import morlib
from suite import runs, texts
from suite.texts.chains import NUMBERS, Chains
from suite.texts.drawn import WINDOWS

TASKS = st.integers(2, 6).flatmap(lambda C: st.builds(Chains, st.just(C), st.integers(1, 26 // C)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def read(task, line):
    """A line's variables {name: what it is set to}, and its questions [(x, answer or None)]."""
    text = task.tokenizer.decode(line.tolist())
    m = task.m
    table = {chr(ord("a") + i): text[i] for i in range(m)}
    rest = text[m:]
    triples = [rest[i : i + 3] for i in range(0, len(rest), 3)]
    assert all(triple[0] == "?" for triple in triples)
    return table, [(triple[1], triple[2]) for triple in triples if len(triple) == 3]


def value_of(table, x):
    return x if x.isdigit() else value_of(table, table[x])


def steps(table, x, told):
    return 0 if x.isdigit() or x in told else 1 + steps(table, table[x], told)


@settings(deadline=None, max_examples=40)
@given(TASKS, st.sampled_from(list(WINDOWS)), st.integers(0, 40), st.integers(0, 99))
def test_a_line_is_assignments_and_then_right_answers(task, part, more, seed):
    length, C = task.m + 3 + more, task.chains
    lines = task._lines(5, length, generator(seed), part)
    assert lines.shape == (5, length + 1) and lines.dtype == torch.int64
    asked = task.answers(lines)
    for row, line in enumerate(lines):
        table, questions = read(task, line)
        assert max(steps(table, x, ()) for x in table) == task.deepest
        names = list(table)
        assert len({table[x] for x in names[:C]}) == C and all(table[x].isdigit() for x in names[:C])
        for i in range(C, len(names)):  # it is set to a variable of the row before
            assert names.index(table[names[i]]) // C == i // C - 1
        values = [value_of(table, x) for x in names]
        most, told = max(sorted(set(values)), key=values.count), set()
        for a, (x, answer) in enumerate(questions):
            assert value_of(table, x) == answer and int(answer) == asked["answer"][row, a]
            assert steps(table, x, told) == asked["k"][row, a]
            assert (x not in told and answer != most) == asked["hard"][row, a]
            told.add(x)


def test_no_answer_is_likelier_and_every_k_is_asked_for():
    task = Chains()
    asked = task.answers(task.windows("heldout", 64))
    for k in task.numbers():
        hard = asked["answer"][(asked["k"] == k) & asked["hard"]]
        assert len(hard) > 300
        shares = torch.bincount(hard, minlength=len(NUMBERS)) / len(hard)
        assert shares.max() < 0.17 and shares.min() > 0.04


def test_windows_are_always_the_same_and_parts_differ():
    task, again = Chains(), Chains()
    lines = task.windows("heldout", 64)
    assert torch.equal(lines, again.windows("heldout", 64))
    assert torch.equal(lines[:7], task.windows("heldout", 64, 7))
    tables = {part: {tuple(row) for row in task.windows(part, 64)[:, :20].tolist()} for part in WINDOWS}
    assert not tables["heldout"] & (tables["val"] | tables["train"])


def test_kinds_and_places_name_what_is_read():
    task = Chains(4, 2)
    line = task.tokenizer.decode(task.windows("val", 20, 1)[0].tolist())
    kinds = task.kinds(20)
    assert kinds == ["table"] * 8 + ["mark", "x", "answer"] * 4
    assert all(line[t] == "?" for t in range(20) if kinds[t] == "mark")
    assert task.places(20).tolist() == [t for t in range(20) if kinds[t] == "x"]


@pytest.mark.parametrize("sizes", [(1, 1), (11, 1), (4, 0), (4, 7)])
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="chains-C-K needs 2 to 10 chains"):
        Chains(*sizes)
    with pytest.raises(ValueError, match="needs a max_len of 23 or more, not 22"):
        Chains(4, 5).windows("val", 22)


def test_it_is_found_by_name_trained_on_and_measured(make_model):
    task = texts.load_corpus("chains-4-5")
    assert task is texts.load_corpus("chains-4-5") and task.name == task.describe()["name"] == "chains-4-5"
    model = make_model(vocab_size=task.vocab_size, max_len=40, routing=runs.known_depth.PLANS["chains-4"])
    morlib.train(model, task, morlib.TrainConfig(epochs=1, windows=64, batch_size=16, evaluations=1))
    found = morlib.evaluate(model, task, "heldout", 200)["details"]
    assert [row["k"] for row in found["by_hops"]] == [1, 2, 3, 4, 5]
    N = model.cfg.n_layers
    assert found["depth_by_kind"] == dict(table=N, mark=1, x=N, answer=1)


def test_least_loss_is_the_entropy_of_all_lines_counted_out():
    """Two chains of two: 90 pairs of numbers, four ways to assign, four questions, all as likely."""
    task, length = Chains(2, 2), 7
    lines = task._lines(30_000, length, torch.Generator().manual_seed(0), "train")
    seen = {tuple(line) for line in lines.tolist()}
    assert len(seen) == 90 * 4 * 4
    assert task.least_loss(length) == pytest.approx((math.log(len(seen)) - math.log(10)) / length)
