"""What happens to a run when its process is killed, its disk fills, its loss explodes, or another process wants it too."""

import dataclasses
import errno
import json
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from test_runs import SMALL, strip

import morlib

TINY = morlib.TrainConfig(epochs=2, windows=64, batch_size=8, lr=3e-3, evaluations=3, eval_windows=8, heldout_windows=16)  # 16 steps


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(morlib, "CHECKPOINT_SECONDS", 0.0)  # after every step


def spec(text, training=TINY, **model):
    settings = SMALL | dict(routing="mor", target_depth=2.0) | model
    return morlib.Run("test", "mor", morlib.ModelConfig(vocab_size=1, **settings), training, (("name", text),), "smoke", "sound")


def fork(work):
    """Do `work` in a child process that has all of this one's memory. Returns its number; exit status 0: done, 1: it raised."""
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
    """What a run leaves behind: its record without the clock, and its weights. Nothing else may lie about but the lock."""
    out = morlib.outputs()
    records, weights = list((out / "results").iterdir()), [p for p in (out / "checkpoints").iterdir() if p.suffix != ".lock"]
    assert [len(records), len(weights)] == [1, 1], [p.name for p in records + weights]
    return strip(json.loads(records[0].read_text())), weights[0].read_bytes()


@pytest.fixture
def undisturbed(small_text, tmp_path, monkeypatch):
    """What each spec comes to when nothing happens to it."""

    def run(one):
        with monkeypatch.context() as patch:
            patch.setenv("MORLIB_OUTPUTS", str(tmp_path / "undisturbed"))
            began = time.monotonic()
            morlib.run(one)
            return results(), time.monotonic() - began

    return run


def test_ten_kills_at_random_moments_change_nothing(small_text, undisturbed, monkeypatch):
    one = spec(small_text, dataclasses.replace(TINY, epochs=8, evaluations=16))
    expected, seconds = undisturbed(one)
    phase = mmap.mmap(-1, 1)  # shared with the children: what they are at
    for number, name in enumerate(("_gradients", "evaluate", "save_checkpoint", "write_whole"), 1):

        def told(*args, _number=number, _function=getattr(morlib, name), **more):
            before, phase[0] = phase[0], _number
            try:
                return _function(*args, **more)
            finally:
                phase[0] = before

        monkeypatch.setattr(morlib, name, told)
    dice, kills, seen = random.Random(6), 0, set()
    while kills < 10:
        child = fork(lambda: morlib.run(one))
        time.sleep(dice.uniform(0.02, seconds / 7))
        os.kill(child, signal.SIGKILL)
        if status(child) == 0:  # it was faster than the kill: so far so good, and from the start again
            assert results() == expected
            shutil.rmtree(morlib.outputs())
            continue
        kills += 1
        seen.add(phase[0])
        phase[0] = 0
        for path in morlib.outputs().rglob("*.partial"):
            morlib.load_checkpoint(path, path.stem)  # whole, whenever the kill came
    assert len(seen) > 1, "the kills all came at the same kind of moment"
    assert status(fork(lambda: morlib.run(one))) == 0
    assert results() == expected


MOMENTS = ("training", "evaluation", "checkpoint", "last evaluation", "weights", "record")


@pytest.mark.parametrize("routing, moment", [*(("mor", moment) for moment in MOMENTS), ("none", "training"), ("random", "evaluation")])
def test_a_kill_at_this_moment_changes_nothing(small_text, undisturbed, monkeypatch, routing, moment):
    one = spec(small_text, dataclasses.replace(TINY, penalty=0.01), routing=routing, dropout=0.2, target_depth=2.0 if routing == "mor" else None)
    expected, _ = undisturbed(one)

    def die_at(name, when):
        function, calls = getattr(*name), []

        def dying(*args, **more):
            calls.append(args)
            if when(len(calls), *args):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)

        return name, dying

    place = {
        "training": die_at((morlib, "_gradients"), lambda n, *a: n == 10),
        "evaluation": die_at((morlib, "evaluate"), lambda n, model, corpus, split, *a: n == 2),
        "last evaluation": die_at((morlib, "evaluate"), lambda n, model, corpus, split, *a: split == "train"),
        "checkpoint": die_at((morlib.os, "replace"), lambda n, a, b: str(b).endswith(".partial") and n > 9),
        "weights": die_at((morlib.os, "replace"), lambda n, a, b: str(b).endswith(".safetensors")),
        "record": die_at((morlib.os, "replace"), lambda n, a, b: str(b).endswith(".json")),
    }[moment]

    def doomed():
        monkeypatch.setattr(*place[0], place[1])
        morlib.run(one)

    assert status(fork(doomed)) == -signal.SIGKILL
    assert list(morlib.outputs().rglob("*.partial")) and not list((morlib.outputs() / "results").glob("*.json"))
    trained = []
    counted = morlib._gradients
    monkeypatch.setattr(morlib, "_gradients", lambda *a: trained.append(1) or counted(*a))
    morlib.run(one)
    assert results() == expected
    assert len(trained) <= (9 if moment in ("training", "evaluation", "checkpoint") else 0), "what was done is not done again"


def test_a_short_run_writes_no_checkpoint_but_the_last(small_text, monkeypatch):
    monkeypatch.setattr(morlib, "CHECKPOINT_SECONDS", 60.0)
    saved = []
    monkeypatch.setattr(morlib, "save_checkpoint", lambda path, state: saved.append(state["step"]))
    morlib.run(spec(small_text))
    assert saved == [16]


def test_time_is_carried_over(small_text, monkeypatch, corpus, tmp_path):
    one = spec(small_text)
    model = morlib.build_model(dataclasses.replace(one.config, vocab_size=corpus.vocab_size))
    whole = morlib.train(model, corpus, one.train, checkpoint=tmp_path / "x.partial")["metrics"]["train_seconds"]
    again = morlib.train(model, corpus, one.train, checkpoint=tmp_path / "x.partial")["metrics"]["train_seconds"]
    assert whole == again > 0, "training had ended, so the clock of the checkpoint is the clock of the run"


def test_a_run_that_went_on_elsewhere_says_so(small_text, corpus, tmp_path):
    one, path = spec(small_text), tmp_path / "x.partial"
    cfg = dataclasses.replace(one.config, vocab_size=corpus.vocab_size)
    morlib.train(morlib.build_model(cfg), corpus, one.train, checkpoint=path)
    identity = morlib.run_id(cfg, one.train, corpus)
    morlib.save_checkpoint(path, morlib.load_checkpoint(path, identity) | dict(where="Tesla T4, float16"))
    assert morlib.train(morlib.build_model(cfg), corpus, one.train, checkpoint=path)["device"].startswith("Tesla T4, float16; from step 16 on CPU")


# ---- Files that are not what they should be ----


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


@pytest.mark.parametrize("harm", ("cut", "empty", "changed", "pickle", "signed pickle", "other run", "not a state", "text"))
def test_a_checkpoint_that_is_not_ours_is_refused_by_name(small_text, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    one = spec(small_text, dataclasses.replace(TINY, epochs=1))
    with monkeypatch.context() as patch:
        patch.setattr(morlib, "write_whole", lambda path, data, write=morlib.write_whole: os._exit(3) if path.suffix == ".safetensors" else write(path, data))
        assert status(fork(lambda: morlib.run(one))) == 3
    path = next(morlib.outputs().rglob("*.partial"))
    good = path.read_bytes()

    def signed(data):
        return morlib._sha256(data).encode() + b"\n" + data

    path.write_bytes({
        "cut": good[: len(good) // 2], "empty": b"", "changed": good[:-2000] + bytes([good[-2000] ^ 1]) + good[-1999:],
        "pickle": pickle.dumps(Trap()), "signed pickle": signed(pickle.dumps(Trap())), "text": b"nothing of the kind",
        "other run": good, "not a state": good,
    }[harm])  # fmt: skip
    if harm in ("other run", "not a state"):
        morlib.save_checkpoint(path, dict(id="another") if harm == "other run" else [1, 2])
    with pytest.raises(ValueError, match=rf"checkpoint {path.name} is refused: .*; delete it to train this run from the start"):
        morlib.run(one)
    assert not (tmp_path / "trapped").exists(), "loading a file ran its code"
    path.unlink()
    assert morlib.run(one)["id"] == path.stem


@pytest.mark.parametrize("harm", ("cut", "changed", "pickle", "other"))
def test_stored_weights_that_are_not_the_runs_are_refused_by_name(small_text, harm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = spec(small_text, dataclasses.replace(TINY, epochs=1))
    record = morlib.run(one)
    path = morlib.outputs() / "checkpoints" / f"{record['id']}.safetensors"
    good = path.read_bytes()
    path.write_bytes({"cut": good[:-5], "changed": good[:-1] + bytes([good[-1] ^ 1]), "pickle": pickle.dumps(Trap()), "other": b""}[harm])
    with pytest.raises(ValueError, match=f"{path.name} is not the file that its run wrote"):
        morlib.trained_model(one)
    assert not (tmp_path / "trapped").exists()


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
        patch.setattr(morlib.os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*\.partial in .*: No space left on device; free it, or choose another folder"):
            morlib.run(one)
    path = next(morlib.outputs().rglob("*.partial"))
    assert morlib.load_checkpoint(path, path.stem)["step"] > 5, "the last good checkpoint is still there"
    assert not list(morlib.outputs().rglob("*.part"))
    morlib.run(one)
    assert results() == expected


def test_the_systems_own_refusal_to_write_is_told(small_text):
    def limited():  # a real failing write: no file may grow past 30 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(OSError, match=r"cannot write .*\.partial in .*: File too large"):
            morlib.run(spec(small_text))

    assert status(fork(limited)) == 0
    assert not list(morlib.outputs().rglob("*.part*"))


def test_a_finished_run_is_found_in_a_folder_that_cannot_be_written(small_text, monkeypatch):
    record = morlib.run(spec(small_text))
    monkeypatch.setattr(morlib, "write_whole", lambda *a: pytest.fail("written"))
    assert morlib.run(spec(small_text)) == record


# ---- A loss that explodes ----


def test_a_loss_that_turns_nan_stops_the_run_and_keeps_the_last_good_state(small_text, monkeypatch):
    monkeypatch.setattr(morlib, "CHECKPOINT_SECONDS", 60.0)
    one, gradients, steps = spec(small_text), morlib._gradients, []

    def exploding(*args):
        loss, depth = gradients(*args)
        steps.append(1)
        return loss * (float("nan") if len(steps) == 13 else 1), depth

    with monkeypatch.context() as patch:
        patch.setattr(morlib, "_gradients", exploding)
        with pytest.raises(ValueError, match=r"the loss became nan at step 13 of 16: lower lr \(0.003\) or set clip \(1.0\); the state of step 11 is kept"):
            morlib.run(one)
    assert not list(morlib.outputs().rglob("*.json"))
    path = next(morlib.outputs().rglob("*.partial"))
    state = morlib.load_checkpoint(path, path.stem)
    assert state["step"] == 11 and all(t.isfinite().all() for t in state["model"].values())
    assert morlib.run(one)["history"][-1]["step"] == 16, "and goes on from there"


def test_weights_that_are_not_finite_are_never_a_checkpoint(corpus, tmp_path):
    model = morlib.build_model(morlib.ModelConfig(vocab_size=corpus.vocab_size, **SMALL))
    explode = dataclasses.replace(TINY, lr=3e38, clip=None, warmup=0.0, weight_decay=1.0)
    with pytest.raises(ValueError, match=r"(loss|weights) became .* at step [12] of 16"):
        morlib.train(model, corpus, explode, checkpoint=tmp_path / "x.partial")
    for path in tmp_path.glob("x.partial"):
        assert all(t.isfinite().all() for t in morlib.load_checkpoint(path, morlib.run_id(model.cfg, explode, corpus))["model"].values())


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
    children = [fork(lambda: (morlib.run(one), print(end="", flush=True))) for _ in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    assert len(trainings()) == 1
    assert "is being trained by another process: waiting for it" in capfd.readouterr().out
    results()


def test_the_run_of_a_killed_process_is_taken_over_by_the_one_that_waits(small_text, tmp_path, monkeypatch, undisturbed):
    one = spec(small_text)
    expected, _ = undisturbed(one)
    trainings, gradients = counting(monkeypatch, tmp_path), morlib._gradients

    def endless():
        calls = []
        monkeypatch.setattr(morlib, "_gradients", lambda *a: time.sleep(600) if len(calls) == 9 else calls.append(1) or gradients(*a))
        morlib.run(one)

    first = fork(endless)
    while not list(morlib.outputs().rglob("*.partial")):
        time.sleep(0.01)
    second = fork(lambda: morlib.run(one))
    time.sleep(0.5)
    assert trainings() == [str(first)], "the second waits"
    os.kill(first, signal.SIGKILL)
    assert [status(first), status(second)] == [-signal.SIGKILL, 0]
    assert trainings() == [str(first), str(second)], "the second began only when the first was dead"
    assert results() == expected


def test_two_threads_do_not_share_one_generator(small_text, monkeypatch):
    monkeypatch.setattr(morlib, "CHECKPOINT_SECONDS", 60.0)
    many = [spec(small_text, dataclasses.replace(TINY, epochs=2, seed=seed)) for seed in range(2)]
    alone = [strip(morlib.run(one)) for one in many]
    for path in morlib.outputs().rglob("*.*"):
        path.unlink()
    together = {}
    threads = [threading.Thread(target=lambda i=i, one=one: together.update({i: strip(morlib.run(one))})) for i, one in enumerate(many)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [together[i] for i in range(2)] == alone


# ---- Many runs, some of which fail ----


def test_failed_runs_are_listed_and_the_others_go_on(small_text, capsys, monkeypatch):
    monkeypatch.setattr(morlib, "CHECKPOINT_SECONDS", 60.0)
    good = [spec(small_text, dataclasses.replace(TINY, epochs=1, seed=seed)) for seed in (0, 1)]
    bad = [spec(small_text, dataclasses.replace(TINY, lr=1e38, clip=None, warmup=0.0, weight_decay=1.0)), spec("nowhere.txt"), spec(small_text, n_heads=3)]
    table = morlib.run_all([bad[0], good[0], *bad[1:], good[1]])
    assert table["seed"].tolist() == [0, 1] and np_finite(table["loss"])
    said = capsys.readouterr().out
    assert "3 of 5 runs failed; those that finished are stored" in said
    for line, told in zip(table.attrs["failed"], ("became nan", "no text file at nowhere.txt", "must be a multiple of n_heads")):
        assert line.startswith("test mor, seed 0: ValueError: ") and told in line and line in said
    with pytest.raises(RuntimeError, match="2 of 2 runs failed.*\n.*nowhere.txt"):
        morlib.run_all(bad[1:])


def np_finite(values):
    return torch.tensor(values.to_numpy()).isfinite().all()


def dying_once(flag: Path, epochs: int):
    """An `_attempt` for workers: in the first one that is at a run of so many epochs, SIGKILL comes at its tenth step."""
    begun, flag = f"{flag}.begun", str(flag)

    def attempt(one, folder):
        import os
        import signal

        import morlib

        gradients, calls = morlib._gradients, []
        morlib.CHECKPOINT_SECONDS = 0.0
        with open(begun, "a") as file:
            file.write(f"{one.train.epochs} {one.train.seed}\n")

        def deadly(*args):
            calls.append(1)
            if one.train.epochs == epochs and len(calls) == 10 and not os.path.exists(flag):
                open(flag, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return gradients(*args)

        morlib._gradients = deadly
        try:
            return morlib._attempt(one, folder)
        finally:
            morlib._gradients = gradients

    return attempt


def test_a_killed_local_worker_ends_nothing(small_text, tmp_path, monkeypatch, capsys, undisturbed):
    many = [spec(small_text, dataclasses.replace(TINY, epochs=epochs)) for epochs in (1, 2)] + [spec("nowhere.txt")]
    expected, _ = undisturbed(many[1])
    monkeypatch.setattr(morlib, "_attempt", dying_once(tmp_path / "died", 2))
    table = morlib.run_all(many, jobs=2)
    assert (tmp_path / "died").exists() and "a worker died" in capsys.readouterr().out
    assert len(table) == 2 and len(table.attrs["failed"]) == 1
    assert strip(table["record"][1]) == expected[0]
