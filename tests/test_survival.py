"""A run whose process is killed or interrupted, whose disk fills, whose loss explodes, or that two want."""

import contextlib
import dataclasses
import errno
import json
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_runs import SMALL, new_model, strip

import morlib
from suite import files, runs
from suite.runs import checkpoint, runner

TINY = morlib.TrainConfig(
    epochs=2, windows=64, batch_size=8, lr=3e-3, evaluations=3, eval_windows=8, heldout_windows=16
)  # 16 steps, points of the learning curve at 5, 11 and 16


def run(one, seconds=0.0, **more):
    """A run with a checkpoint after every step, or after so many seconds."""
    return runs.run(one, checkpoint_seconds=seconds, **more)


def spec(text, training=TINY, **model):
    cfg = morlib.ModelConfig(vocab_size=1, **(SMALL | dict(routing="mor", target_depth=2.0) | model))
    return runs.Run("test", "mor", cfg, training, (("name", text),), "smoke", "sound")


def fork(work):
    """Do `work` in a child process that has all of this one's memory. Returns its number.

    Exit status 0: done, 1: it raised.
    """
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", flush=True)
        os._exit(1)


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results():
    """What a run leaves: its record without the clock, and its tensors. Nothing else lies about."""
    out = files.outputs()
    records = list((out / "results").iterdir())
    weights = [path for path in (out / "checkpoints").iterdir() if path.suffix != ".lock"]
    assert [len(records), len(weights)] == [1, 1], [path.name for path in records + weights]
    return strip(json.loads(records[0].read_text())), runner.tensors_digest(load_file(weights[0]))


def partial():
    """The one checkpoint that is there, and its state."""
    (path,) = files.outputs().rglob("*.partial")
    return path, checkpoint.load_state(path, path.stem)


@pytest.fixture
def undisturbed(small_text, tmp_path, monkeypatch):
    """What each spec comes to when nothing happens to it, and how long it takes."""

    def whole(one):
        with monkeypatch.context() as patch:
            patch.setenv("MORLIB_OUTPUTS", str(tmp_path / "undisturbed"))
            began = time.monotonic()
            run(one)
            return results(), time.monotonic() - began

    return whole


# ---- Kills ----


def test_ten_kills_at_random_moments_change_nothing(small_text, undisturbed, monkeypatch):
    one = spec(small_text, dataclasses.replace(TINY, epochs=4, evaluations=8))
    expected, seconds = undisturbed(one)
    phase = mmap.mmap(-1, 1)  # shared with the children: what they are at
    places = [(morlib.Training, "gradients"), (morlib, "evaluate"), (checkpoint, "save_state"),
              (runner, "save_model"), (runner, "write_whole")]  # fmt: skip
    for number, (owner, name) in enumerate(places, 1):

        def told(*args, _number=number, _function=getattr(owner, name), **more):
            before, phase[0] = phase[0], _number
            try:
                return _function(*args, **more)
            finally:
                phase[0] = before

        monkeypatch.setattr(owner, name, told)
    dice, kills, seen = random.Random(6), 0, set()
    while kills < 10:
        child = fork(lambda: run(one))
        time.sleep(dice.uniform(0.02, seconds / 7))
        os.kill(child, signal.SIGKILL)
        if status(child) == 0:  # it was faster than the kill: so far so good, and from the start again
            assert results() == expected
            shutil.rmtree(files.outputs())
            continue
        kills += 1
        seen.add(phase[0])
        phase[0] = 0
        for path in files.outputs().rglob("*.partial"):
            checkpoint.load_state(path, path.stem)  # whole, whenever the kill came
    assert len(seen) > 1, "the kills all came at the same kind of moment"
    assert status(fork(lambda: run(one))) == 0
    assert results() == expected


def at(owner, name, when, act):
    """Where to patch, and a function that acts first when `when(number of the call, *arguments)` holds."""
    function, calls = getattr(owner, name), []

    def acting(*args, **more):
        calls.append(args)
        if when(len(calls), *args):
            act()
        return function(*args, **more)

    return owner, name, acting


def die():
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = {
    "training": lambda: at(morlib.Training, "gradients", lambda n, *a: n == 10, die),
    "evaluation": lambda: at(morlib, "evaluate", lambda n, *a: n == 2, die),
    "last evaluation": lambda: at(
        morlib, "evaluate", lambda n, model, corpus, part, *a: part == "train", die
    ),
    "checkpoint": lambda: at(os, "replace", lambda n, a, b: str(b).endswith(".partial") and n > 9, die),
    "weights": lambda: at(os, "replace", lambda n, a, b: str(b).endswith(".safetensors"), die),
    "record": lambda: at(os, "replace", lambda n, a, b: str(b).endswith(".json"), die),
}
CASES = [*(("mor", moment) for moment in MOMENTS), ("none", "training"), ("random", "evaluation")]


@pytest.mark.parametrize("routing, moment", CASES)
def test_a_kill_at_this_moment_changes_nothing(small_text, undisturbed, monkeypatch, routing, moment):
    target = 2.0 if routing == "mor" else None
    training = dataclasses.replace(TINY, penalty=0.01)
    one = spec(small_text, training, routing=routing, dropout=0.2, target_depth=target)
    expected, _ = undisturbed(one)
    place = MOMENTS[moment]()

    def doomed():
        monkeypatch.setattr(*place)
        run(one)

    assert status(fork(doomed)) == -signal.SIGKILL
    assert partial() and not list((files.outputs() / "results").glob("*.json"))
    steps, gradients = [], morlib.Training.gradients
    monkeypatch.setattr(morlib.Training, "gradients", lambda *a: steps.append(1) or gradients(*a))
    run(one)
    assert results() == expected
    most = 9 if moment in ("training", "evaluation", "checkpoint") else 0
    assert len(steps) <= most, "what was done is not done again"


def test_a_short_run_writes_a_checkpoint_at_each_point(small_text, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save_state", lambda path, state: saved.append(state["step"]))
    run(spec(small_text), seconds=60.0)
    assert saved == [5, 11, 16]


def kept(one, corpus, path, where="here"):
    """A training with a checkpoint at this path, and the checkpoint."""
    keeper = checkpoint.Checkpoint(path, "0123", where, seconds=0.0)
    model = morlib.Transformer(dataclasses.replace(one.config, vocab_size=corpus.vocab_size))
    training = morlib.train(model, corpus, one.train, resume=keeper.resume, after_step=keeper.after_step)
    return training, keeper


def test_a_run_that_went_on_elsewhere_says_so_and_carries_its_time_over(small_text, corpus, tmp_path):
    one, path = spec(small_text), tmp_path / "x.partial"
    whole, first = kept(one, corpus, path, "Tesla T4, float16")
    again, second = kept(one, corpus, path, "CPU, float32")
    assert first.where == "Tesla T4, float16"
    assert second.where == "Tesla T4, float16; from step 16 on CPU, float32"
    assert whole.seconds == again.seconds > 0, (
        "training had ended, so the clock of the checkpoint is the clock of the run"
    )


# ---- Interrupts ----


def interrupt(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def interrupted(one, monkeypatch, step, times=1):
    """In a child: Ctrl-C in the middle of this step, with no checkpoint due."""
    place = at(morlib.Training, "gradients", lambda n, *a: n == step, lambda: interrupt(times))

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(*place)
        try:
            run(one, seconds=600.0)
        except KeyboardInterrupt as stop:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            print(f"told: {stop}", flush=True)
            os._exit(130)

    return status(fork(work))


def test_an_interrupt_keeps_the_step_it_came_in(small_text, undisturbed, monkeypatch, capfd):
    one = spec(small_text, dropout=0.2)
    expected, _ = undisturbed(one)
    assert interrupted(one, monkeypatch, 7) == 130
    assert "told: stopped after step 7 of 16; it is kept" in capfd.readouterr().out
    assert partial()[1]["step"] == 7 and not list(files.outputs().rglob("*.json"))
    assert interrupted(one, monkeypatch, 2) == 130
    assert partial()[1]["step"] == 9, "and again, while it goes on"
    run(one)
    assert results() == expected


def test_an_interrupt_after_the_last_step_is_not_lost(small_text):
    def stops(training):
        if training.step == 5:
            interrupt()
        return training.step == 5

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.run(spec(small_text), hook=stops)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_ends_at_once(small_text, undisturbed, monkeypatch):
    one = spec(small_text)
    expected, _ = undisturbed(one)
    assert interrupted(one, monkeypatch, 7, times=2) == 130
    assert partial()[1]["step"] == 5, "the last point"
    run(one)
    assert results() == expected


def test_an_interrupt_ends_a_list_of_runs_and_all_of_it_goes_on(small_text, monkeypatch):
    many = [spec(small_text, dataclasses.replace(TINY, epochs=1, seed=seed)) for seed in (0, 1)]
    place = at(morlib.Training, "gradients", lambda n, *a: n == 11, interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(*place)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 8"):
            runs.run_all(many)
    assert len(list(files.outputs().rglob("*.json"))) == 1 and partial()[1]["step"] == 3
    assert runs.run_all(many)["seed"].tolist() == [0, 1]


# ---- However a training ends, its model can be used ----


def raising(error):
    def act(*args):
        raise error

    return act


def hook_raises(patch):
    return lambda training: training.step == 7 and raising(KeyboardInterrupt())()


def hook_stops(patch):
    return lambda training: training.step == 7


def model_raises(error):
    def prepare(patch):
        patch.setattr(*at(morlib.Block, "forward", lambda n, *a: n == 50, raising(error)))

    return prepare


def measuring_raises(patch):
    """In the last point, before its thresholds are set: as a Ctrl-C there does."""

    def last(number, training):
        return training.step == training.steps

    patch.setattr(*at(morlib.Training, "measure", last, raising(KeyboardInterrupt())))


def loss_turns_nan(patch, step=2):
    gradients = morlib.Training.gradients

    def exploding(training, batch):
        loss, applications = gradients(training, batch)
        return loss * (float("nan") if training.step == step else 1), applications

    patch.setattr(morlib.Training, "gradients", exploding)


ENDS = {
    "a hook that raises": (hook_raises, KeyboardInterrupt),
    "a hook that stops it": (hook_stops, None),
    "an interrupt inside the model": (model_raises(KeyboardInterrupt()), KeyboardInterrupt),
    "lack of a card's memory": (model_raises(RuntimeError("CUDA error")), RuntimeError),
    "an interrupt at the last point": (measuring_raises, KeyboardInterrupt),
    "an early nan": (loss_turns_nan, ValueError),
    "nothing": (lambda patch: None, None),
}


@pytest.mark.parametrize("points, estimator", [(1, "gumbel"), (3, "scaled")])
@pytest.mark.parametrize("end", ENDS)
def test_however_a_training_ends_its_model_can_be_used(corpus, monkeypatch, end, points, estimator):
    """In evaluation mode, at its target, causal, deaf to its batch neighbours, cached as uncached."""
    model = new_model(corpus, routing="mor", n_layers=4, target_depth=2.5, estimator=estimator, dropout=0.2)
    prepare, error = ENDS[end]
    training = dataclasses.replace(TINY, router_lr=3e-3, evaluations=points, depth_warmup=0.5)
    with monkeypatch.context() as patch:
        hook = prepare(patch)
        with pytest.raises(error) if error else contextlib.nullcontext():
            morlib.train(model, corpus, training, after_step=hook)
    assert not model.training
    biases = model.policy.bias.clone()
    assert abs(morlib.evaluate(model, corpus, "val")["effective_depth"] - 2.5) < 0.5
    x = corpus.windows("val", 12)[:5, :-1]
    out, changed = model(x), x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % corpus.vocab_size
    assert torch.allclose(model(changed).logits[:, :-1], out.logits[:, :-1], atol=1e-5)
    assert torch.allclose(model(x[:1]).logits, out.logits[:1], atol=1e-5)
    assert torch.equal(model(x[:1]).depth, out.depth[:1])
    cached, uncached = (morlib.generate(model, x[:, :4], 20, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert torch.equal(model.policy.bias, biases), "using it changes nothing"


# ---- Files that are not what they should be ----


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def signed(data):
    return files.sha256(data).encode() + b"\n" + data


HARMS = {
    "cut": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "changed": lambda good: good[:-2000] + bytes([good[-2000] ^ 1]) + good[-1999:],
    "pickle": lambda good: pickle.dumps(Trap()),
    "signed pickle": lambda good: signed(pickle.dumps(Trap())),
    "text": lambda good: b"nothing of the kind",
}


def test_a_checkpoint_that_is_not_ours_is_refused_by_name(small_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = spec(small_text, dataclasses.replace(TINY, epochs=1))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "save_model", lambda *a: os._exit(3))
        assert status(fork(lambda: run(one))) == 3
    path, _ = partial()
    good, others = path.read_bytes(), {"other run": dict(id="another"), "not a state": [1, 2]}
    message = rf"checkpoint {path.name} is refused: .*; delete it to train this run from the start"
    for harm in (*HARMS, *others):
        if harm in HARMS:
            path.write_bytes(HARMS[harm](good))
        else:
            checkpoint.save_state(path, others[harm])
        with pytest.raises(ValueError) as error:
            run(one)
        assert re.search(message, str(error.value)), f"{harm}: {error.value}"
        assert not (tmp_path / "trapped").exists(), f"{harm}: loading a file ran its code"
    path.unlink()
    assert run(one)["id"] == path.stem


def test_stored_weights_that_are_not_the_runs_are_refused_by_name(small_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = spec(small_text, dataclasses.replace(TINY, epochs=1))
    record = run(one)
    path = files.outputs() / "checkpoints" / f"{record['id']}.safetensors"
    good = path.read_bytes()
    changed = good[:-1] + bytes([good[-1] ^ 1])
    for harm, data in dict(cut=good[:-5], changed=changed, pickle=pickle.dumps(Trap()), empty=b"").items():
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            runs.trained_model(one)
        assert f"{path.name} does not hold the weights of its run" in str(error.value), harm
        assert not (tmp_path / "trapped").exists(), harm


def test_weights_of_another_configuration_are_not_called_damaged(small_text):
    one = spec(small_text, dataclasses.replace(TINY, epochs=1))
    run(one)
    wider = dataclasses.replace(runs.go_on(one), config=dataclasses.replace(one.config, d_ff=24))
    with pytest.raises(ValueError, match="holds weights of another configuration"):
        runs.run(wider)


def test_a_stopped_record_is_not_averaged_with_whole_ones():
    whole = runs.stored_records("exp1")
    runs.check_one_kind(whole)
    cut = [r | dict(stopped_at=3) if r["seed"] == 0 else r for r in whole["record"]]
    with pytest.raises(ValueError, match="last step: stopped at 3, whole"):
        runs.check_one_kind(runs.table_of(cut))


# ---- A disk that is full, a folder that cannot be written ----


def test_a_full_disk_loses_nothing(small_text, undisturbed, monkeypatch):
    one = spec(small_text)
    expected, _ = undisturbed(one)
    calls = []

    def full(number, fsync=os.fsync):
        calls.append(1)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        message = (
            r"cannot write .*\.partial in .*: No space left on device; free it, or choose another folder"
        )
        with pytest.raises(OSError, match=message):
            run(one)
    assert partial()[1]["step"] > 5, "the last good checkpoint is still there"
    assert not list(files.outputs().rglob("*.part"))
    run(one)
    assert results() == expected


def test_the_systems_own_refusal_to_write_is_told(small_text):
    def limited():  # a real failing write: no file may grow past 30 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(OSError, match=r"cannot write .*\.partial in .*: File too large"):
            run(spec(small_text))

    assert status(fork(limited)) == 0
    assert not list(files.outputs().rglob("*.part*"))


def test_a_finished_run_is_found_in_a_folder_that_cannot_be_written(small_text, monkeypatch):
    record = run(spec(small_text))
    assert record["device"].startswith("CPU, float32, "), "it says where it was done"
    for owner in (files, runner, checkpoint):
        monkeypatch.setattr(owner, "write_whole", lambda *a: pytest.fail("written"))
    assert run(spec(small_text)) == record


# ---- A loss that explodes ----


def test_a_loss_that_turns_nan_stops_the_run_and_keeps_the_last_good_state(small_text, monkeypatch):
    one = spec(small_text)
    with monkeypatch.context() as patch:
        loss_turns_nan(patch, step=12)
        message = r"the loss became nan at step 13 of 16: lower lr \(0.003\) or set clip \(1.0\)"
        with pytest.raises(ValueError, match=message):
            run(one, seconds=60.0)
    assert not list(files.outputs().rglob("*.json"))
    _, state = partial()
    assert state["step"] == 11 and all(t.isfinite().all() for t in state["model"].values())
    assert run(one)["history"][-1]["step"] == 16, "and goes on from there"


@pytest.mark.parametrize("routing", ("none", "mor"))
def test_weights_that_are_not_finite_are_never_a_checkpoint(corpus, tmp_path, routing):
    training = dataclasses.replace(TINY, lr=3e38, clip=None, warmup=0.0, weight_decay=1.0)
    one = spec("", training, routing=routing, target_depth=None if routing == "none" else 2.0)
    path = tmp_path / "x.partial"
    with pytest.raises(ValueError, match=r"(loss|weights) became .* (at|by) step [12] of 16"):
        kept(one, corpus, path)
    if path.exists():
        assert all(t.isfinite().all() for t in checkpoint.load_state(path, "0123")["model"].values())


# ---- Two who want the same ----


def counting(monkeypatch, tmp_path):
    """Each training leaves a line in a file, whichever process does it."""
    log, train = tmp_path / "trainings", morlib.train

    def counted(*args, **more):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return train(*args, **more)

    monkeypatch.setattr(morlib, "train", counted)
    return lambda: log.read_text().split()


def test_two_processes_with_one_config_train_it_once(small_text, tmp_path, monkeypatch, capfd):
    trainings, one = counting(monkeypatch, tmp_path), spec(small_text, dataclasses.replace(TINY, epochs=4))
    children = [fork(lambda: (run(one), print(end="", flush=True))) for _ in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    assert len(trainings()) == 1
    assert "is being trained by another process: waiting for it" in capfd.readouterr().out
    results()


def test_the_run_of_a_killed_process_is_taken_over_by_the_one_that_waits(
    small_text, tmp_path, monkeypatch, undisturbed
):
    one = spec(small_text)
    expected, _ = undisturbed(one)
    trainings = counting(monkeypatch, tmp_path)
    endless_step = at(morlib.Training, "gradients", lambda n, *a: n == 10, lambda: time.sleep(600))

    def endless():
        monkeypatch.setattr(*endless_step)
        run(one)

    first = fork(endless)
    while not list(files.outputs().rglob("*.partial")):
        time.sleep(0.01)
    second = fork(lambda: run(one))
    time.sleep(0.5)
    assert trainings() == [str(first)], "the second waits"
    os.kill(first, signal.SIGKILL)
    assert [status(first), status(second)] == [-signal.SIGKILL, 0]
    assert trainings() == [str(first), str(second)], "the second began only when the first was dead"
    assert results() == expected


# ---- Many runs, some of which fail ----


def test_failed_runs_are_listed_and_the_others_go_on(small_text, capsys):
    good = [spec(small_text, dataclasses.replace(TINY, epochs=1, seed=seed)) for seed in (0, 1)]
    explode = dataclasses.replace(TINY, lr=1e38, clip=None, warmup=0.0, weight_decay=1.0)
    bad = [spec(small_text, explode), spec("nowhere.txt"), spec(small_text, max_len=10_000)]
    table = runs.run_all([bad[0], good[0], *bad[1:], good[1]])
    assert table["seed"].tolist() == [0, 1] and torch.tensor(table["loss"].to_numpy()).isfinite().all()
    said = capsys.readouterr().out
    assert "3 of 5 runs failed; those that finished are stored" in said
    reasons = "became nan", "no text file at nowhere.txt", "smaller max_len"
    for line, told in zip(said.splitlines()[-3:], reasons):
        assert line.strip().startswith("test mor, seed 0: ValueError: ") and told in line
    with pytest.raises(RuntimeError, match="2 of 2 runs failed.*\n.*nowhere.txt"):
        runs.run_all(bad[1:])


def dying_once(flag: Path, epochs: int):
    """An `attempt_in_worker`: once, in a run of so many epochs, SIGKILL comes at the tenth step."""
    begun, flag = f"{flag}.begun", str(flag)

    def attempt(one, folder, number, policies):
        import functools
        import os
        import signal

        import morlib
        from suite.runs import runner

        gradients, calls = morlib.Training.gradients, []
        with open(begun, "a") as file:
            file.write(f"{one.train.epochs} {one.train.seed}\n")

        def deadly(training, batch):
            calls.append(1)
            if one.train.epochs == epochs and len(calls) == 10 and not os.path.exists(flag):
                open(flag, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return gradients(training, batch)

        whole = runner.run
        morlib.Training.gradients = deadly
        runner.run = functools.partial(whole, checkpoint_seconds=0.0)
        try:
            return runner.attempt_in_worker(one, folder, number, policies)
        finally:
            morlib.Training.gradients, runner.run = gradients, whole

    return attempt


def test_a_killed_local_worker_ends_nothing(small_text, tmp_path, monkeypatch, capsys, undisturbed):
    many = [spec(small_text, dataclasses.replace(TINY, epochs=epochs)) for epochs in (1, 2)]
    many.append(spec("nowhere.txt"))
    expected, _ = undisturbed(many[1])
    monkeypatch.setattr(runner, "attempt_in_worker", dying_once(tmp_path / "died", 2))
    table = runs.run_all(many, jobs=2)
    said = capsys.readouterr().out
    assert (tmp_path / "died").exists() and "a worker died" in said and "1 of 3 runs failed" in said
    assert len(table) == 2
    assert strip(table["record"][1]) == expected[0]
