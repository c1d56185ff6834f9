"""Training, records, parameters, notebooks as a whole."""

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pytest
import torch

import morlib
from suite import files, runs, texts
from suite.runs import checkpoint, records
from suite.runs.code import code_of
from suite.runs.settings import names_set

SMALL = dict(n_layers=3, d_model=16, n_heads=2, d_ff=40, max_len=12, dropout=0.1)
SHORT = morlib.TrainConfig(epochs=1, windows=32, batch_size=8, evaluations=1, eval_windows=8)
LONGER = morlib.TrainConfig(epochs=4, windows=128, batch_size=8, lr=5e-3, evaluations=4, eval_windows=8)


def config(corpus, **changes):
    return morlib.ModelConfig(vocab_size=corpus.vocab_size, **(SMALL | changes))


def new_model(corpus, seed=0, **changes):
    torch.manual_seed(seed)
    return morlib.Transformer(config(corpus, **changes))


def trained(corpus, training, **changes):
    """A trained model and its record."""
    model = new_model(corpus, training.seed, **changes)
    return model, records.record_of(morlib.train(model, corpus, training), "here")


def strip(record):
    """A record without what the clock decides."""
    metrics = {k: v for k, v in record["metrics"].items() if k != "train_seconds"}
    return json.dumps(record | dict(metrics=metrics))


# ---- Training ----


@pytest.mark.parametrize("routing", ("none", "mor", "random"))
def test_training_is_deterministic_in_its_seed(corpus, quick_training, routing):
    models, found = [], []
    for seed, drawn in ((0, 0), (0, 1), (1, 0)):  # the same weights, whatever torch's generator did since
        models.append(new_model(corpus, routing=routing))
        torch.rand(drawn)
        training = morlib.train(models[-1], corpus, dataclasses.replace(quick_training, seed=seed))
        found.append(records.record_of(training, "here"))
    assert strip(found[0]) == strip(found[1])
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert found[0]["metrics"]["loss"] != found[2]["metrics"]["loss"]


def test_training_learns_and_the_record_says_so(small_text):
    spec = specs(small_text, LONGER, ("mor",))[0]
    record = runs.run(spec)
    losses = [point["train_loss"] for point in record["history"]]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5
    model, again, corpus = runs.trained_model(spec)
    assert again == record
    assert record["metrics"]["loss"] == pytest.approx(morlib.evaluate(model, corpus)["loss"])
    assert json.loads(json.dumps(record)) == record
    names = "experiment model recipe preset seed config data versions device metrics history".split()
    assert set(names) <= set(record)
    for name in ("loss", "accuracy", "effective_depth", "bits_per_byte", "train_seconds", "sampled"):
        assert name in record["metrics"]
    assert record["data"].keys() >= {"name", "sha256", "split"}


@pytest.mark.parametrize("target, warm", ((2.0, 0.0), (3.0, 0.3), (4.5, 0.0)))
def test_a_target_depth_is_held(corpus, target, warm):
    training = dataclasses.replace(LONGER, router_lr=5e-3, depth_warmup=warm)
    model, record = trained(corpus, training, routing="mor", n_layers=4, target_depth=target, dropout=0.0)
    metrics = record["metrics"]
    assert abs(morlib.evaluate(model, corpus, "train")["effective_depth"] - target) < 0.15
    assert abs(metrics["effective_depth"] - target) < 0.3
    assert abs(metrics["sampled"]["effective_depth"] - target) < 0.3
    depths = [point["train_depth"] for point in record["history"]]
    assert depths[2:] == pytest.approx([target] * 2, abs=0.1), "in training too, after the warm-up"
    assert (depths[0] > target + 0.3) == (warm > 0), "which falls from full depth if asked to"


def test_a_budget_that_follows_the_text_holds_and_looks_only_back(corpus, monkeypatch):
    """Biases set far off: following, E comes back to its target, and nothing is looked at ahead."""
    model = new_model(corpus, routing="mor", n_layers=4, target_depth=2.5)
    morlib.calibrate_on_validation(model, corpus)
    model.policy.bias[..., morlib.SKIP] += 0.05
    own, text = model.policy.bias.clone(), corpus.windows("heldout", model.cfg.max_len)
    off = morlib.evaluate(model, corpus)["effective_depth"]
    held = runs.evaluate_following(model, corpus, follow=8)["effective_depth"]
    assert abs(held - 2.5) < 0.1 < abs(off - 2.5) and torch.equal(model.policy.bias, own)
    read, score = [], morlib.score

    def watched(model, windows):
        seen = score(model, windows)
        read.append((windows[:, :-1], seen["depth"]))
        return seen

    monkeypatch.setattr(morlib, "score", watched)
    ids = corpus.ids["heldout"]
    for other in (ids, torch.cat([text[:12, :-1].flatten(), ids.flip(0)])):
        changed = dataclasses.replace(corpus, ids=corpus.ids | dict(heldout=other))
        runs.evaluate_following(model, changed, follow=8)
    second = next(i for i in range(1, len(read)) if torch.equal(read[i][0], read[0][0]))
    one, other = (torch.cat([depth for _, depth in part]) for part in (read[:second], read[second:]))
    assert torch.equal(one[:12], other[:12]), "the second piece of eight is the same in its first half"
    assert not torch.equal(one[12:24], other[12:24]), "and only there"


def test_a_record_says_what_a_followed_budget_comes_to(corpus):
    metrics = trained(corpus, SHORT, routing="mor", n_layers=4, target_depth=2.5)[1]["metrics"]
    assert set(metrics["followed"]) == {"loss", "accuracy", "effective_depth"}
    assert "followed" not in trained(corpus, SHORT, routing="none", n_layers=2)[1]["metrics"]


def test_biases_are_set_on_validation_text_alone(corpus):
    """Calibration is the same whatever the other parts hold, and differs if the validation part does."""

    def biases(**parts):
        model = new_model(corpus, routing="mor", n_layers=4, target_depth=2.5)
        morlib.calibrate_on_validation(model, dataclasses.replace(corpus, ids=corpus.ids | parts))
        return model.policy.bias

    other = corpus.ids["train"].flip(0)
    assert torch.equal(biases(), biases(train=other, heldout=other))
    assert not torch.equal(biases(), biases(val=other))


def test_a_penalty_lowers_depth_in_training(corpus):
    depth = []
    for penalty in (0.0, 0.3):
        training = dataclasses.replace(LONGER, lr=1e-3, router_lr=1e-2, evaluations=1, penalty=penalty)
        metrics = trained(corpus, training, routing="mor")[1]["metrics"]
        depth.append(metrics["sampled"]["effective_depth"])
    assert depth[1] < 0.8 * depth[0]


@pytest.mark.parametrize("routing", ("mor", "random"))
def test_a_warm_up_leaves_no_trace(small_text, routing):
    """Also one that lasts for the whole training: the record tells of the model that is stored."""
    training = dataclasses.replace(SHORT, depth_warmup=1.0)
    spec = specs(small_text, training, (routing,), target_depth=1.5)[0]
    model, record, corpus = runs.trained_model(spec)
    measured = morlib.evaluate(model, corpus)
    assert record["metrics"]["effective_depth"] == measured["effective_depth"]
    assert measured["effective_depth"] == pytest.approx(1.5, abs=0.3)
    assert record["history"][0]["train_depth"] > 2, "in training it ran deeper"
    assert record["history"][-1]["val_effective_depth"] == pytest.approx(1.5, abs=0.3)


def test_evaluate_agrees_with_a_plain_computation(corpus, quick_training):
    model, record = trained(corpus, quick_training, routing="mor")
    windows = corpus.windows("heldout", 12)
    out = model.eval()(windows[:, :-1])
    targets = windows[:, 1:]
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten()).item()
    metrics = record["metrics"]
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    accuracy = 100 * (out.logits.argmax(-1) == targets).float().mean().item()
    assert metrics["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert metrics["effective_depth"] == pytest.approx(out.depth.float().mean().item())
    assert metrics["bits_per_byte"] == pytest.approx(loss / np.log(2), abs=1e-4), "a character is a byte here"
    rates = torch.tensor(metrics["action_rates"])
    first, second = rates[:, 0], rates[:, 1]
    depth = (1 - first[:, 0] + first[:, 2] * (1 - second[:, 0])).sum()
    assert depth.item() == pytest.approx(metrics["effective_depth"], abs=1e-4), "both tell the same story"


def test_training_refuses_what_cannot_work(corpus, quick_training):
    small = morlib.Transformer(morlib.ModelConfig(vocab_size=5, **SMALL))
    with pytest.raises(ValueError, match="build it with vocab_size"):
        morlib.train(small, corpus, quick_training)
    explode = dataclasses.replace(quick_training, lr=1e30, clip=None, warmup=0.0)
    with pytest.raises(ValueError, match="the loss became nan"):
        trained(corpus, explode, norm="post")


@pytest.mark.parametrize("other", ("another text", "another order"))
def test_a_text_of_another_vocabulary_is_refused(corpus, quick_training, tmp_path, other):
    """Equally many kinds of tokens or fewer, with other meanings."""
    text = "".join(corpus.text.values())
    text = text.upper() if other == "another text" else text.translate(str.maketrans("tno", "TNO"))
    (tmp_path / "other.txt").write_text(text, encoding="utf-8")
    foreign = texts.load_corpus(tmp_path / "other.txt")
    assert foreign.vocab_size <= corpus.vocab_size and foreign.vocabulary != corpus.vocabulary
    model = new_model(corpus)
    morlib.train(model, corpus, quick_training)
    message = (
        f"reads vocabulary {corpus.vocabulary}, the corpus has {foreign.vocabulary}: load the corpus with"
    )
    before = [parameter.clone() for parameter in model.parameters()]
    for use in (
        lambda: morlib.train(model, foreign, quick_training),
        lambda: morlib.evaluate(model, foreign),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert model.vocabulary == corpus.vocabulary
    morlib.save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        morlib.evaluate(morlib.load_model(tmp_path / "model.safetensors")[0], foreign)


def test_going_on_with_another_text_by_the_first_ones_tokenizer(corpus, quick_training, tmp_path):
    model = new_model(corpus)
    morlib.train(model, corpus, quick_training)
    (tmp_path / "other.txt").write_text("line 7 of the brown fox. " * 100, encoding="utf-8")
    other = texts.load_corpus(tmp_path / "other.txt", tokenizer=corpus.tokenizer)
    assert other.vocabulary == corpus.vocabulary
    before = morlib.evaluate(model, other)["loss"]
    morlib.train(model, other, quick_training)
    assert morlib.evaluate(model, other)["loss"] < before


def test_a_hook_sees_each_step_and_stops_the_training(corpus, quick_training):
    seen = []

    def look(training):
        seen.append((training.step, float(training.loss), float(training.depth)))
        assert training.model.training and training.optimizer.param_groups
        return training.step == 3

    model = new_model(corpus, routing="none")
    training = morlib.train(model, corpus, quick_training, after_step=look)
    assert [step for step, _, _ in seen] == [1, 2, 3] == list(range(1, training.step + 1))
    assert all(np.isfinite(loss) and depth == 3 for _, loss, depth in seen)
    assert training.history[-1]["step"] == 3 and not model.training
    loss = morlib.evaluate(model, corpus, "val", quick_training.eval_windows)["loss"]
    assert training.history[-1]["val_loss"] == pytest.approx(loss)


def test_the_bar_shows_loss_and_depth(corpus, quick_training, monkeypatch):
    shown = []

    class Bar(morlib.tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **(more | dict(mininterval=0, miniters=1)))

        def set_postfix(self, **values):
            shown.append(values)

    monkeypatch.setattr(morlib, "tqdm", Bar)
    morlib.train(new_model(corpus, routing="none"), corpus, quick_training, progress=True)
    assert shown and all(set(values) == {"loss", "E"} and values["E"] == "3.00" for values in shown)


def test_a_usable_gpu_trains_too(corpus, quick_training):
    device, dtype, why = runs.pick_device()
    if device.type != "cuda":
        pytest.skip(f"no GPU here: {why}")
    model = new_model(corpus, routing="mor").to(device)
    training = morlib.train(model, corpus, quick_training, dtype=dtype)
    assert np.isfinite(training.history[-1]["val_loss"])


# ---- Runs and their records ----


def specs(small_text, training, labels=("fixed", "mor"), seeds=(0,), **changes):
    models = {"fixed": dict(routing="none"), "mor": dict(routing="mor"), "random": dict(routing="random")}
    many = []
    for seed in seeds:
        for label in labels:
            cfg = morlib.ModelConfig(vocab_size=1, **(SMALL | models[label] | changes))
            tc = dataclasses.replace(training, seed=seed)
            many.append(runs.Run("test", label, cfg, tc, (("name", small_text),), "smoke", "sound"))
    return many


def refuse_training(monkeypatch):
    monkeypatch.setattr(morlib, "train", lambda *a, **k: pytest.fail("trained again"))


def test_random_controls_repeat_the_measured_rates(small_text, quick_training):
    spec = specs(small_text, quick_training, ("mor",))
    table = runs.run_all(spec)
    control = runs.run_all(runs.random_controls(table, spec, "mor"))
    assert control["model"].tolist() == ["random"]
    assert control["effective_depth"][0] == pytest.approx(table["effective_depth"][0], abs=0.3)


def test_a_finished_run_is_found_and_not_repeated(small_text, quick_training, monkeypatch):
    spec = specs(small_text, quick_training)[0]
    record = runs.run(spec)
    found = list((files.outputs() / "results").glob("*.json"))
    assert len(found) == 1 and json.loads(found[0].read_text()) == record
    refuse_training(monkeypatch)
    assert runs.run(spec) == record
    renamed = runs.run(dataclasses.replace(spec, experiment="other"))
    assert renamed["experiment"] == "other" and renamed["metrics"] == record["metrics"]
    elsewhere = dataclasses.replace(spec, device="cpu")
    assert runs.run(elsewhere) == record, "where a run is done is not part of what it is"
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        runs.run(dataclasses.replace(spec, train=dataclasses.replace(spec.train, lr=0.5)))


ODD_LABELS = [
    "mor/8",
    "a\\b",
    "../up",
    "E: 8",
    "what?*",
    '<"|">',
    "two\nlines",
    "100 %",
    "বাংলা" * 60,
    "x" * 300,
    "a\0b",
    ".",
    "",
    "[1]",
]


@pytest.mark.parametrize("label", ODD_LABELS, ids=range(len(ODD_LABELS)))
def test_any_label_is_found_again(small_text, monkeypatch, label):
    spec = dataclasses.replace(specs(small_text, SHORT)[0], model=label)
    record = runs.run(spec)
    assert record["model"] == label
    found = list((files.outputs() / "results").rglob("*.json"))
    assert len(found) == 1 and found[0].parent == files.outputs() / "results"
    assert not set('/\\:*?"<>|\n') & set(found[0].name)
    refuse_training(monkeypatch)
    assert runs.run(spec) == record
    assert runs.run_all([spec])["model"].tolist() == [label]


def test_labels_that_share_a_file_name_are_told_apart(small_text):
    one, other = (dataclasses.replace(spec, model=label) for spec, label in
                  zip(specs(small_text, SHORT), ("a/b", "a:b")))  # fmt: skip
    first, second = runs.run(one), runs.run(other)
    assert first["id"] != second["id"] and runs.run(one) == first and runs.run(other) == second


def test_a_stored_model_is_the_trained_model(small_text, quick_training):
    spec = specs(small_text, quick_training, ("mor",))[0]
    model, record, corpus = runs.trained_model(spec)
    assert morlib.evaluate(model, corpus)["loss"] == pytest.approx(record["metrics"]["loss"], abs=1e-6)
    assert isinstance(texts.write(model, corpus.tokenizer, "the quick", 5), str)
    weights = files.outputs() / "checkpoints" / f"{record['id']}.safetensors"
    again, tokenizer = texts.load_model(weights)
    assert texts.write(again, tokenizer, "the fox", 20) == texts.write(model, corpus.tokenizer, "the fox", 20)
    assert morlib.load_model(weights)[1]["id"] == record["id"]


def test_runs_side_by_side_give_the_same_records(small_text, quick_training, tmp_path, monkeypatch):
    alone = runs.run_all(specs(small_text, quick_training, seeds=(0, 1)))
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "second"))
    together = runs.run_all(specs(small_text, quick_training, seeds=(0, 1)), jobs=2)
    assert [strip(r) for r in alone["record"]] == [strip(r) for r in together["record"]]
    assert len(list((tmp_path / "second" / "results").iterdir())) == 4


def test_an_unwritable_folder_is_told_before_training(small_text, quick_training, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "file"))
    refuse_training(monkeypatch)
    with pytest.raises(OSError, match="choose another folder"):
        runs.run(specs(small_text, quick_training)[0])
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    files.write_whole(path, b"first")

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.glob(".record*")) == []

    def read_only(*args, **how):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.Path, "unlink", read_only)
    with pytest.raises(OSError, match="choose another folder|MORLIB_OUTPUTS|No space left"):
        files.write_whole(path, b"second")


def test_a_run_that_a_hook_stops_has_a_record_of_its_own(small_text, quick_training, tmp_path, monkeypatch):
    spec = specs(small_text, quick_training, ("mor",), target_depth=2.0)[0]
    stopped = runs.run(spec, hook=lambda training: training.step == 5)
    assert stopped["stopped_at"] == 5 == stopped["history"][-1]["step"]
    assert stopped["id"].endswith("-stopped-at-5")
    weights = files.outputs() / "checkpoints" / f"{stopped['id']}.safetensors"
    model, _ = texts.load_model(weights)
    corpus = texts.load_corpus(small_text)
    assert morlib.evaluate(model, corpus)["loss"] == pytest.approx(stopped["metrics"]["loss"], abs=1e-6)
    whole = runs.run(spec)
    assert "stopped_at" not in whole and whole["history"][-1]["step"] == 8
    assert stopped["id"].startswith(whole["id"]) and runs.run(spec) == whole
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "undisturbed"))
    assert strip(runs.run(spec)) == strip(whole)


def test_a_record_holds_the_best_point_by_validation(small_text):
    """Also of a training that was taken up again; claims of presets that train long rest on that point."""
    spec = specs(small_text, LONGER, ("mor",), target_depth=2.0)[0]
    points = [16, 32, 48, 64]
    second = points[1]

    def spoil(training):  # from the second point on it gets worse
        if training.step == second + 1:
            for parameter in training.model.parameters():
                parameter.data *= 3

    def and_stop(training):
        spoil(training)
        if training.step == second + 2:
            raise KeyboardInterrupt

    spoilt = dataclasses.replace(spec, preset="paper", train=dataclasses.replace(LONGER, seed=1))
    stopped = runs.run(spoilt, hook=lambda training: training.step == second)
    with pytest.raises(KeyboardInterrupt):
        runs.run(spoilt, hook=and_stop, checkpoint_seconds=0.0)
    record = runs.run(spoilt, hook=spoil)
    metrics, best = record["metrics"], record["metrics"]["best"]
    assert [point["step"] for point in record["history"]] == points and best["step"] == second
    assert best["loss"] == pytest.approx(stopped["metrics"]["loss"], abs=1e-6)
    assert metrics["loss"] == best["loss"] < metrics["last"]["loss"] and metrics["last"]["step"] == points[-1]
    assert stopped["metrics"]["best"] == stopped["metrics"]["last"]
    model, _ = texts.load_model(files.outputs() / "checkpoints" / f"{record['id']}.safetensors")
    corpus = texts.load_corpus(small_text)
    assert morlib.evaluate(model, corpus)["loss"] == pytest.approx(best["loss"], abs=1e-6)
    other = runs.run(dataclasses.replace(spoilt, preset="cpu"), hook=spoil)
    assert other["id"] != record["id"], "who is judged by the last point is another run"
    assert other["metrics"]["loss"] == other["metrics"]["last"]["loss"] == metrics["last"]["loss"]
    assert other["metrics"]["best"] == best


def test_the_best_point_is_none_of_the_warm_up(small_text):
    """There the model still runs deeper than it is asked to."""

    def spoil(training):
        if training.step == 41:
            for parameter in training.model.parameters():
                parameter.data *= 3

    train = dataclasses.replace(LONGER, depth_warmup=1.0)
    record = runs.run(specs(small_text, train, ("mor",), target_depth=1.0)[0], hook=spoil)
    losses = [point["val_loss"] for point in record["history"]]
    assert min(losses) < losses[-1] and record["metrics"]["best"] == record["metrics"]["last"]


def test_a_checkpoint_without_best_points_claims_none(small_text):
    """It was written before they were kept: the lowest point may be lost."""

    def stop(training):
        if training.step == 40:
            raise KeyboardInterrupt

    def spoil(training):
        if training.step == 41:
            for parameter in training.model.parameters():
                parameter.data *= 3

    spec = specs(small_text, LONGER, ("fixed",))[0]
    with pytest.raises(KeyboardInterrupt):
        runs.run(spec, hook=stop, checkpoint_seconds=0.0)
    [path] = (files.outputs() / "checkpoints").glob("*.partial")
    state = checkpoint.load_state(path, path.stem)
    del state["best"]
    checkpoint.save_state(path, state)
    metrics = runs.run(spec, hook=spoil)["metrics"]
    assert "best" not in metrics and metrics["last"]["loss"] == metrics["loss"]


def test_models_that_train_long_are_held_to_the_best_table_of_counts(corpus, monkeypatch):
    floors = {"2": dict(heldout=dict(loss=50.0)), "5": dict(heldout=dict(loss=0.1))}
    monkeypatch.setattr(type(corpus), "floors", floors)
    training = morlib.train(new_model(corpus), corpus, SHORT)
    judged = {
        preset: records.record_of(training, "here", None, preset) for preset in ("cpu", "long", "paper")
    }
    assert [judged[preset]["metrics"]["did_train"] for preset in judged] == [True, False, False]


def test_going_on_from_a_finished_run(small_text, quick_training, monkeypatch):
    spec = specs(small_text, quick_training, ("mor",), target_depth=2.0)[0]
    parent = runs.run(spec)
    child = runs.go_on(spec, epochs=3, lr=1e-3)
    record = runs.run(child)
    assert record["parent"] == parent["id"] != record["id"] and record["model"] == "mor, continued"
    assert record["history"][0]["train_loss"] < parent["history"][0]["train_loss"], (
        "it began with its weights"
    )
    fresh = dataclasses.replace(child, parent="")
    assert runs.run(fresh)["id"] not in (parent["id"], record["id"]), "the parent is part of what a run is"
    grandchild = runs.go_on(child)
    assert runs.run(grandchild)["parent"] == record["id"]
    refuse_training(monkeypatch)
    assert runs.run(child) == record and runs.go_on(spec, epochs=3, lr=1e-3) == child
    with pytest.raises(TypeError, match="epoch"):
        runs.go_on(spec, epoch=3)


def test_numbers_of_numpy_are_numbers(small_text, quick_training, corpus):
    """Configurations made with numpy's numbers are the runs of Python's."""
    plain = specs(small_text, dataclasses.replace(quick_training, lr=0.5), ("mor",), target_depth=2.0)[0]
    cfg = dataclasses.replace(plain.config, n_layers=np.int64(3), target_depth=np.float64(2.0),
                              scaled_init=np.bool_(True))  # fmt: skip
    tc = dataclasses.replace(plain.train, lr=np.float32(0.5), epochs=np.int32(2), seed=np.int64(0))
    for numpys, pythons in ((cfg, plain.config), (tc, plain.train)):
        assert numpys == pythons
        assert all(type(value) is type(getattr(pythons, name)) for name, value in vars(numpys).items())
    assert runs.run_id(cfg, tc, corpus) == runs.run_id(plain.config, plain.train, corpus)


# ---- Policies that a user registers ----

THEIRS = """
import morlib

class Sparse(morlib.Policy):
    def forward(self, step):
        return morlib.Decision((step.position % {every} < 1).long())
"""


def registered(monkeypatch, tmp_path, every):
    """A policy from a user's module, as it is after the user has edited it."""
    path = tmp_path / f"theirs_{every}.py"
    path.write_text(THEIRS.format(every=every))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(morlib.POLICIES, "sparse", importlib.import_module(path.stem).Sparse)


def test_an_edited_policy_is_another_run(small_text, tmp_path, monkeypatch):
    registered(monkeypatch, tmp_path, 2)
    spec = specs(small_text, SHORT, ("mor",), routing="sparse", max_recursions=1)[0]
    first = runs.run(spec)
    registered(monkeypatch, tmp_path, 1)
    edited = runs.run(spec)
    assert first["metrics"]["effective_depth"] == 1.5 and edited["metrics"]["effective_depth"] == 3
    registered(monkeypatch, tmp_path, 2)
    refuse_training(monkeypatch)
    assert first["id"] != edited["id"] and runs.run(spec) == first


BEFORE = """
SHARE = 0.5
UNUSED = 1

def helper(x):
    return x * SHARE

class Base(morlib.Policy):
    every = 2

class Typed(Base):
    def forward(self, step):
        layer = lambda t: helper(t) + len([p for p in (1, 2) if p in {"a", "b"}])
        return layer(step.position), step.UNUSED

    @staticmethod
    def further():
        return 7

    @functools.cached_property
    def kept(self):
        return 11
"""
EDITS = {
    "a plain value that it names": ("SHARE = 0.5", "SHARE = 0.9"),
    "a function that it calls": ("x * SHARE", "x + SHARE"),
    "an attribute of its base": ("every = 2", "every = 3"),
    "its base": ("Base(morlib.Policy)", "Base(morlib.Router)"),
    "a function inside a method": ("helper(t) +", "helper(t) -"),
    "a number in a method": ("(1, 2)", "(1, 3)"),
    "a name in a set": ('{"a", "b"}', '{"a", "c"}'),
    "a static method": ("return 7", "return 8"),
    "a property that is kept": ("return 11", "return 12"),
}
NO_EDITS = {
    "nothing": ("", ""),
    "a comment": ("every = 2", "every = 2  # tokens\n"),
    "a value that it does not read": ("UNUSED = 1", "UNUSED = 2"),
}
DIGESTS = """
import functools, json, sys
import morlib
from suite.runs.code import code_of
codes = []
for source in json.loads(told):
    names = dict(morlib=morlib, functools=functools, __name__="__main__")
    exec(source, names)
    morlib.POLICIES["typed"] = names["Typed"]
    codes.append(code_of("typed"))
"""


def test_what_a_policy_computes_is_part_of_its_code(monkeypatch):
    """Of classes that were typed in, as in a notebook; in any process alike."""
    edited = {name: BEFORE.replace(*edit) for name, edit in (EDITS | NO_EDITS).items()}
    told = json.dumps([BEFORE, *edited.values()])
    monkeypatch.setitem(morlib.POLICIES, "typed", None)
    here = dict(told=told)
    exec(DIGESTS, here)
    there = f"import sys; told = sys.stdin.read(){DIGESTS}print(json.dumps(codes))"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # the order of a set differs there
    command = subprocess.run([sys.executable, "-c", there], env=environment(PYTHONHASHSEED=seed),
                             input=told, capture_output=True, text=True)  # fmt: skip
    assert command.returncode == 0, command.stderr
    before, *after = here["codes"]
    assert len(before) == 12 and json.loads(command.stdout) == here["codes"]
    assert {name for name, code in zip(edited, after) if code == before} == set(NO_EDITS)
    assert len(set(after)) == len(EDITS) + 1


def test_a_version_raised_in_a_policy_that_ships_changes_what_is_built_on_it(monkeypatch):
    class Mine(morlib.WorthRouter):
        pass

    Mine.__module__ = "__main__"
    monkeypatch.setitem(morlib.POLICIES, "mine", Mine)
    before = code_of("mine")
    monkeypatch.setattr(morlib.WorthRouter, "version", "another")
    assert code_of("mine") != before != ""


@pytest.mark.parametrize("edit", ["cached", "partial", "number", "tensor", "settings"])
def test_an_edit_behind_a_cache_a_partial_or_an_object_is_another_run(edit, monkeypatch):
    class Settings:
        def __init__(self, depth):
            self.depth = depth

    def made(n):
        def plain(layers, least=0):
            return max(n if edit == "cached" else 1, least)

        values = dict(
            cached=functools.lru_cache(plain),
            partial=functools.partial(plain, least=n),
            number=np.int64(n),
            tensor=torch.tensor([n]),
            settings=Settings(n),
        )
        mine = type("Mine", (morlib.Policy,), {"value": values[edit], "__module__": "__main__"})
        monkeypatch.setitem(morlib.POLICIES, "mine", mine)
        return code_of("mine")

    assert made(1) == made(1) != made(3)


def test_what_ships_has_no_code_in_its_identity(corpus, quick_training):
    cfg = config(corpus)
    assert [code_of(name) for name in ("none", "mor", "frozen", "random")] == [""] * 4
    plain = runs.run_id(cfg, quick_training, corpus)
    assert plain == runs.run_id(cfg, quick_training, corpus, "", "")
    assert (
        plain
        != runs.run_id(cfg, quick_training, corpus, "0123")
        != runs.run_id(cfg, quick_training, corpus, "4567")
    )


def test_what_a_tokenizer_of_ones_own_does_is_part_of_the_identity(corpus, small_text, quick_training):
    class Lower(texts.CharTokenizer):
        kind, fold = "lower", str.lower

        def encode(self, text):
            return super().encode(type(self).fold(text))

    class Upper(Lower):
        fold = str.upper

    letters = "".join(corpus.tokenizer.itos) + "ABCDEFGHIJKLMNOPQRSTUVWXYZL"
    ids = []
    for kind in (Lower, Upper, Lower):
        own = texts.load_corpus(small_text, tokenizer=kind(letters))
        ids.append(runs.run_id(config(own), quick_training, own))
    assert ids[0] == ids[2] != ids[1]
    assert "ids" not in texts.load_corpus(small_text, tokenizer=corpus.tokenizer).describe()


def test_a_registered_policy_works_in_workers(small_text, monkeypatch):
    """Defined in a function, so that no worker could import it."""

    class Sparse(morlib.Policy):
        def forward(self, step):
            return morlib.Decision((step.position % 2 < 1).long())

    monkeypatch.setitem(morlib.POLICIES, "sparse", Sparse)
    many = specs(small_text, SHORT, ("fixed", "mor"), max_recursions=1)
    many[1] = dataclasses.replace(many[1], config=dataclasses.replace(many[1].config, routing="sparse"))
    there = runs.run_all(many, jobs=2)
    assert there["effective_depth"].tolist() == [3, 1.5]
    refuse_training(monkeypatch)
    assert runs.run_all(many)["record"].tolist() == there["record"].tolist(), "it is one run here and there"


SCRIPT = """
import sys
import morlib
from suite import runs

class Sparse(morlib.Policy):
    def forward(self, step):
        return morlib.Decision((step.position % 2 < 1).long())

if __name__ == "__main__":
    morlib.POLICIES["sparse"] = Sparse
    cfg = morlib.ModelConfig(1, 3, 16, 2, 40, 12, 0.0, routing="sparse", max_recursions=1)
    many = []
    for seed in (0, 1):
        tc = morlib.TrainConfig(epochs=1, windows=32, batch_size=8, evaluations=1, eval_windows=8, seed=seed)
        many.append(runs.Run("own", "sparse", cfg, tc, (("name", sys.argv[1]),), "smoke", "sound"))
    print(runs.run_all(many, jobs=2)["effective_depth"].tolist())
"""


def test_a_script_s_own_policy_works_in_workers(small_text, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), small_text]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[1.5, 1.5]", done.stdout + done.stderr


def environment(**more):
    return os.environ | dict(PYTHONPATH=str(files.ROOT), TQDM_DISABLE="1", OMP_NUM_THREADS="1") | more


# ---- Parameters ----


def on_device(monkeypatch, kind):
    found = torch.device(kind), torch.float32, ""
    monkeypatch.setattr(importlib.import_module("suite.runs.settings"), "pick_device", lambda *a: found)


def test_settings_resolve_in_order(monkeypatch):
    monkeypatch.setenv("MORLIB_PRESET", "smoke")
    given = dict(preset="auto", recipe="source", seeds=None, lr=None, epochs=7, _hidden=1, morlib=morlib)
    s = runs.settings(given)
    assert (s.preset, s.seeds, s.train().epochs, s.train().lr) == ("smoke", 1, 7, 3e-4)
    assert s.model(vocab_size=3).norm == "post" and not s.stored
    paper = runs.settings(dict(preset="paper"))
    assert paper.model(vocab_size=3) == morlib.ModelConfig(vocab_size=3)
    monkeypatch.delenv("MORLIB_PRESET")
    on_device(monkeypatch, "cpu")
    assert runs.settings({}).preset == "quick"
    monkeypatch.setenv("MORLIB_PRESET", "auto")
    assert runs.settings({}).preset == "quick"
    on_device(monkeypatch, "cuda")
    assert runs.settings({}).preset == "paper"


def test_the_environment_says_how_many_jobs_where_a_reader_does_not(monkeypatch):
    monkeypatch.setenv("MORLIB_JOBS", "3")
    assert [runs.settings(dict(preset=name)).jobs for name in ("quick", "paper")] == [3, 3]
    assert runs.settings(dict(preset="quick", jobs=1)).jobs == 1
    monkeypatch.setenv("MORLIB_JOBS", "many")
    with pytest.raises(ValueError, match="MORLIB_JOBS must be int, not str 'many'"):
        runs.settings(dict(preset="quick"))


def test_the_preset_of_committed_notebooks_is_that_of_the_records(monkeypatch):
    monkeypatch.setenv("MORLIB_PRESET", "stored")
    s, cpu = runs.settings(dict(preset="auto")), runs.settings(dict(preset="cpu"))
    assert s.stored and (s.model(vocab_size=3), s.train()) == (cpu.model(vocab_size=3), cpu.train())


@pytest.mark.parametrize("given, message", [
    (dict(sedes=3), "unknown parameter sedes; allowed are: .*seeds"),
    (dict(seeds="six"), "parameter seeds must be int, not str 'six'; allowed are"),
    (dict(seeds=2.5), "seeds must be int"),
    (dict(seeds="2.5"), "seeds must be int"),
    (dict(seeds=True), "seeds must be int"),
    (dict(seeds=0), "1 or more"),
    (dict(seeds="none"), "seeds must be int, not str 'none'"),
    (dict(lr="fast"), "lr must be float"),
    (dict(lr="nan"), "lr must be above 0, not nan"),
    (dict(preset="tiny"), "preset must be one of auto, stored, smoke, quick, cpu, long, paper"),
    (dict(recipe="secret"), "recipe must be one of sound, source"),
    (dict(d_model=65), "multiple of n_heads"),
    (dict(batch_size=0), "batch_size must be 1 or more"),
    (dict(device="gpu"), "device must be cpu, cuda, cuda:NUMBER or mps, not 'gpu'"),
])  # fmt: skip
def test_a_wrong_parameter_is_explained(given, message):
    with pytest.raises(ValueError, match=message):
        runs.settings(dict(preset="smoke") | given)


def test_none_is_a_word_and_None_is_as_the_preset_says():
    left = runs.settings(dict(preset="smoke", clip=None, heldout_windows=None, max_chars=None))
    assert (left.train().clip, left.train().heldout_windows, left.max_chars) == (1.0, 64, 120_000)
    none = runs.settings(dict(preset="smoke", clip="none", heldout_windows="none", max_chars="none"))
    assert (none.train().clip, none.train().heldout_windows, none.max_chars) == (None, None, None)
    own = dict(prompt=str, sample=int | None)
    given = runs.settings(dict(preset="smoke", prompt="none", sample="none"), own)
    assert given.values["prompt"] == "none" and given.values["sample"] is None, "where None may be"


@pytest.mark.parametrize("name, written, meant", [
    ("lr", "1e-3", 1e-3),
    ("lr", 1, 1.0),
    ("lr", "1", 1.0),
    ("lr", np.float64(0.5), 0.5),
    ("target_depth", "8", 8.0),
    ("epochs", "12", 12),
    ("max_chars", "1000", 1000),
    ("prompt", 1234, "1234"),
    ("prompt", 0.5, "0.5"),
    ("texts", "bangla", ["bangla"]),
    ("texts", ["bangla"], ["bangla"]),
    ("sizes", 4000, [4000]),
    ("sizes", [1000, 4000], [1000, 4000]),
    ("sizes", (1000, 4000), [1000, 4000]),
    ("sizes", "[1000, 4000]", [1000, 4000]),
    ("texts", "[broken", ["[broken"]),
])  # fmt: skip
def test_what_papermill_hands_over_is_taken_as_meant(name, written, meant):
    own = dict(prompt=str, texts=list, sizes=list)
    s = runs.settings({"preset": "smoke", name: written}, own)
    value = s.values[name]
    assert value == meant and type(value) is type(meant)


def test_one_number_written_in_two_ways_is_one_run(corpus):
    ids = set()
    for written in (8, 8.0, "8", "8.0"):
        s = runs.settings(dict(preset="smoke", n_layers=12, target_depth=written, clip="1"))
        ids.add(runs.run_id(s.model(vocab_size=corpus.vocab_size), s.train(), corpus))
    assert len(ids) == 1


def test_8_and_8_0_are_one_run_in_scripts_too(corpus):
    shape, ids = SMALL | dict(vocab_size=corpus.vocab_size, n_layers=8), set()
    for number in (8, 8.0, np.int64(8), np.float32(8)):
        cfg = morlib.ModelConfig(**shape, target_depth=number)
        tc = morlib.TrainConfig(weight_decay=number, clip=number)
        assert type(cfg.target_depth) is type(tc.weight_decay) is type(tc.clip) is float
        ids.add(runs.run_id(cfg, tc, corpus))
    assert len(ids) == 1
    assert morlib.ModelConfig(**shape).target_depth is None and type(cfg.n_layers) is int
    with pytest.raises(ValueError, match="lr must be float, not bool True"):
        morlib.TrainConfig(lr=True)


def test_a_text_that_is_cut_has_no_record_of_the_whole_text():
    def found(**given):
        s = runs.settings(dict(preset="stored", seeds=1) | given)
        own = runs.experiment_runs(s, "exp1", runs.TEXTS["exp1"], dict(fixed=(dict(routing="none"), {})))
        return runs.runner.stored(own)[0]

    assert isinstance(found(), dict)
    assert found(max_chars=5000) == found(epochs=3) == "no record of it ships: choose a preset that trains it"


def test_the_parameter_cell_can_be_run_again():
    """In a notebook, as IPython keeps it: `In` is the list of executed cells."""
    parameters = 'preset: str = "smoke"\nseeds: int = None'
    namespace = dict(preset="smoke", seeds=None, In=["", parameters, "s = runs.settings(globals())"])
    before = dict(namespace)
    assert runs.settings(namespace).seeds == 1 and namespace == before, "nothing is written there"
    namespace |= dict(N=4, models={}, seeds=3)  # left by later cells, and changed by the reader
    namespace["In"] = [*namespace["In"], "N, models = 4, {}", parameters.replace("None", "3")]
    assert runs.settings(namespace).seeds == 3
    with pytest.raises(ValueError, match="own_text must be str"):
        runs.settings(dict(preset="smoke", own_text=[5]), dict(own_text=str))


READERS_CELL = "import os\nDEBUG = True\nprint(os.getcwd())\nsedes = 4\nlr: float = 0.5"
PARAMETERS_CELL = "# how much\npreset: str = 'auto'  # see the README\nepochs: int = None\nseeds: int = None"


def notebook(*cells, **values):
    return dict(In=["", *cells], Out={}, _ih=[""], _dh=["."], exit=print, **values)


def test_a_reader_s_own_cells_are_not_judged():
    values = dict(DEBUG=True, sedes=4, lr=0.5, preset="smoke", epochs=None, seeds=None)
    s = runs.settings(notebook(READERS_CELL, "!ls", "%%time\n1 + 1", PARAMETERS_CELL, **values))
    assert s.train().lr == runs.settings(dict(preset="smoke")).train().lr, "nor taken for a parameter"


def test_what_the_parameters_cell_names_is_judged():
    values = dict(preset="smoke", epochs=None, seeds=None, sedes=3)
    misspelt = PARAMETERS_CELL + "\nsedes: int = 3"
    for cell in (misspelt, misspelt.replace(": int = 3", " = 3")):
        with pytest.raises(ValueError, match="unknown parameter sedes; allowed are: "):
            runs.settings(notebook(READERS_CELL, cell, **values))
    assert runs.settings(notebook(misspelt, PARAMETERS_CELL, **values)), "it was corrected and run again"


def test_annotated_items_and_attributes_are_no_parameters():
    cell = PARAMETERS_CELL + "\nclass A: pass\na = A()\na.x: int = 1\nd = {}\nd['x']: int = 2"
    assert names_set(notebook(cell)) == {"preset", "epochs", "seeds", "a", "d"}


def test_what_papermill_sets_is_judged_and_taken():
    injected = "# Parameters\nlr = 0.25\nepochs = 3"
    values = dict(preset="smoke", epochs=3, seeds=None, lr=0.25)
    assert runs.settings(notebook(PARAMETERS_CELL, injected, **values)).train().lr == 0.25
    with pytest.raises(ValueError, match="unknown parameter sedes"):
        runs.settings(notebook(PARAMETERS_CELL, injected + "\nsedes = 4", sedes=4, **values))
    again = notebook(
        PARAMETERS_CELL, injected, PARAMETERS_CELL.replace("None", "2"), **values | dict(epochs=2)
    )
    assert runs.settings(again).train().epochs == 2, "what the reader ran last"


# ---- Notebooks ----


NOTEBOOKS = sorted((files.ROOT / "notebooks").glob("*.ipynb"))
FIRST_CELL = [
    'import pathlib, sys  # "No module named suite"? It needs the checkout: README, "Kaggle and Colab"',
    'sys.path[:0] = ["..", ".", *(str(p.parent) for p in pathlib.Path("/kaggle/input").rglob("morlib.py"))]',
]


def test_a_notebook_that_comes_alone_says_where_it_belongs(tmp_path):
    """The line stands in what is shown of the error, and the README has the chapter that it names."""
    alone = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("\n".join([*FIRST_CELL, "import suite"]))]
    )
    with pytest.raises(nbclient.exceptions.CellExecutionError) as error:
        nbclient.NotebookClient(
            alone, kernel_name="python3", resources=dict(metadata=dict(path=tmp_path))
        ).execute()
    assert "No module named" in str(error.value) and "It needs the checkout" in str(error.value)
    assert "## Kaggle and Colab" in (files.ROOT / "README.md").read_text(encoding="utf-8")


def made_of(target):
    """The words of the commands that `make` would give for a target."""
    plain = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "-n", target], cwd=files.ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(";", " ").split()


def test_make_leaves_no_notebook_and_no_test_out():
    names = [path.stem for path in NOTEBOOKS]
    executed = [word for word in made_of("run") if word.startswith("execute-")]
    assert sorted(executed) == [f"execute-{name}" for name in names]
    assert {"stored", "properties-a-to-m", "properties-n-to-z"} <= set(made_of("test"))
    commands = [word for part in ("a-to-m", "n-to-z") for word in made_of(f"properties-{part}")]
    found = [path for word in commands if word.startswith("tests/") for path in files.ROOT.glob(word)]
    assert sorted(found) == sorted((files.ROOT / "tests").glob("test_*.py"))


def test_each_notebook_is_trained_at_a_test_s_size():
    here, kaggle = ((files.ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8")
                    for name in ("notebooks", "kaggle"))  # fmt: skip
    listed = re.findall(r'"(\d\d_\w+)"', re.search(r"NOTEBOOKS = \[.*\]", here)[0])
    with_studies = re.findall(r'execute\("(\d\d_\w+)", studies="run"', here)
    as_on_kaggle = re.findall(r'execute\(imitation, "(\d\d_\w+)", preset="smoke"', kaggle)
    assert sorted(listed + with_studies + as_on_kaggle) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_laid_out_as_agreed(path):
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and "nbval-check-output" in tags
    assert cells[0].source.startswith("# ") and "What this does not show" in cells[-1].source
    first = code[0].source.split("\n")
    assert first[:2] == FIRST_CELL and len(first) == 3 and first[2].startswith("from suite import ")
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert "preset: str" in parameters.source, "settings() knows the cell by this"
    for cell in code:
        assert len(cell.source.split("\n")) <= 16, cell.source
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert "preset smoke" not in json.dumps(outputs), "real results are committed, not a test's"
