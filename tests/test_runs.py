"""Training, records, parameters, statistics, and what the README says."""

import dataclasses
import json
import subprocess
import sys
from unittest import mock

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

import analysis
import bench
import morlib
import report

SMALL = dict(n_layers=3, d_model=16, n_heads=2, d_ff=40, max_len=12, dropout=0.1)


def config(corpus, **changes):
    return morlib.ModelConfig(vocab_size=corpus.vocab_size, **(SMALL | changes))


def trained(corpus, training, **changes):
    torch.manual_seed(training.seed)
    model = morlib.build_model(config(corpus, **changes))
    return model, morlib.train(model, corpus, training)


def strip(record):
    """A record without what the clock decides."""
    return json.dumps(record | {"metrics": {k: v for k, v in record["metrics"].items() if k != "train_seconds"}})


@pytest.mark.parametrize("routing", ("none", "mor", "random"))
def test_training_is_deterministic_in_its_seed(corpus, quick_training, routing):
    first, again = (trained(corpus, quick_training, routing=routing) for _ in range(2))
    assert strip(first[1]) == strip(again[1])
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), again[0].parameters()))
    losses = []
    for seed in (0, 0, 1):  # the same initial weights, whatever torch's generator has done since
        torch.manual_seed(0)
        model = morlib.build_model(config(corpus, routing=routing))
        torch.rand(len(losses))
        losses.append(morlib.train(model, corpus, dataclasses.replace(quick_training, seed=seed))["metrics"]["loss"])
    assert losses[0] == losses[1] == first[1]["metrics"]["loss"] != losses[2]


def test_training_learns_and_the_record_says_so(corpus):
    training = morlib.TrainConfig(epochs=4, windows=128, batch_size=8, lr=5e-3, evaluations=4, eval_windows=8)
    model, record = trained(corpus, training, routing="mor")
    losses = [point["train_loss"] for point in record["history"]]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5
    assert record["metrics"]["loss"] == pytest.approx(morlib.evaluate(model, corpus)["loss"])
    assert json.loads(json.dumps(record)) == record
    for name in ("experiment", "model", "recipe", "preset", "seed", "config", "data", "versions", "device", "metrics", "history"):
        assert name in record
    for name in ("loss", "accuracy", "effective_depth", "bits_per_byte", "train_seconds", "sampled"):
        assert name in record["metrics"]
    assert record["data"].keys() >= {"name", "sha256", "split"}


@pytest.mark.parametrize("target, warm", ((2.0, 0.0), (3.0, 0.3), (4.5, 0.0)))
def test_a_target_depth_is_held(corpus, target, warm):
    training = morlib.TrainConfig(epochs=4, windows=128, batch_size=8, lr=5e-3, router_lr=5e-3, evaluations=4, eval_windows=8, depth_warmup=warm)
    model, record = trained(corpus, training, routing="mor", n_layers=4, target_depth=target, dropout=0.0)
    assert abs(morlib.evaluate(model, corpus, "train")["effective_depth"] - target) < 0.15
    assert abs(record["metrics"]["effective_depth"] - target) < 0.3 and abs(record["metrics"]["sampled"]["effective_depth"] - target) < 0.3
    assert [point["train_depth"] for point in record["history"][2:]] == pytest.approx([target] * 2, abs=0.1), "in training too, after the warm-up"
    assert (record["history"][0]["train_depth"] > target + 0.3) == (warm > 0), "which falls from full depth if asked to"


def test_a_budget_that_follows_the_text_holds_and_looks_only_back(corpus):
    """Biases set far off: following, E comes back to its target; what is read later changes nothing earlier, and the model keeps its biases."""
    torch.manual_seed(0)
    model = morlib.build_model(config(corpus, routing="mor", n_layers=4, target_depth=2.5))
    morlib.calibrate(model, corpus)
    model.policy.bias[..., morlib.SKIP] += 0.05
    own, text = model.policy.bias.clone(), corpus.windows("heldout", model.cfg.max_len)
    off, held = (morlib.evaluate(model, corpus, follow=follow)["effective_depth"] for follow in (0, 8))
    assert abs(held - 2.5) < 0.1 < abs(off - 2.5) and torch.equal(model.policy.bias, own)
    read, score = [], morlib.score

    def watched(model, windows, sampling):
        seen = score(model, windows, sampling)
        read.append((windows[:, :-1], seen["depth"]))
        return seen

    with mock.patch.object(morlib, "score", watched):
        for ids in (corpus.ids["heldout"], torch.cat([text[:12, :-1].flatten(), corpus.ids["heldout"].flip(0)])):
            morlib.evaluate(model, dataclasses.replace(corpus, ids=corpus.ids | dict(heldout=ids)), follow=8)
    half = next(i for i in range(1, len(read)) if torch.equal(read[i][0], read[0][0]))  # the second reading starts alike
    one, other = (torch.cat([depth for _, depth in part]) for part in (read[:half], read[half:]))
    assert torch.equal(one[:12], other[:12]) and not torch.equal(one[12:24], other[12:24]), "the second piece of eight is the same in its first half only"
    record = trained(corpus, morlib.TrainConfig(epochs=1, windows=32, batch_size=8, evaluations=1, eval_windows=8), routing="mor", n_layers=4, target_depth=2.5)[1]
    with pytest.raises(ValueError, match="follow counts windows"):
        morlib.evaluate(model, corpus, follow=-1)
    assert set(record["metrics"]["followed"]) == {"loss", "accuracy", "effective_depth"}
    fixed = trained(corpus, morlib.TrainConfig(epochs=1, windows=32, batch_size=8, evaluations=1, eval_windows=8), routing="none", n_layers=2)[1]
    assert "followed" not in fixed["metrics"]


def test_biases_are_set_on_validation_text_alone(corpus):
    """Calibration comes out the same whatever the other parts hold, and differently if the validation part does."""

    def biases(**parts):
        torch.manual_seed(0)
        model = morlib.build_model(config(corpus, routing="mor", n_layers=4, target_depth=2.5))
        morlib.calibrate(model, dataclasses.replace(corpus, ids=corpus.ids | parts))
        return model.policy.bias

    other = corpus.ids["train"].flip(0)
    assert torch.equal(biases(), biases(train=other, heldout=other)) and not torch.equal(biases(), biases(val=other))


def test_a_penalty_lowers_depth_in_training(corpus):
    training = morlib.TrainConfig(epochs=4, windows=128, batch_size=8, router_lr=1e-2, evaluations=1, eval_windows=8)
    depth = [trained(corpus, dataclasses.replace(training, penalty=penalty), routing="mor")[1]["metrics"]["sampled"]["effective_depth"] for penalty in (0.0, 0.3)]
    assert depth[1] < 0.8 * depth[0]


def test_random_controls_repeat_the_measured_rates(small_text, quick_training):
    spec = specs(small_text, quick_training, ("mor",))
    records = morlib.run_all(spec)
    control = morlib.run_all(morlib.random_controls(records, spec, "mor"))
    assert control["model"].tolist() == ["random"]
    assert control["effective_depth"][0] == pytest.approx(records["effective_depth"][0], abs=0.3)


def test_evaluate_agrees_with_a_plain_computation(corpus, quick_training):
    model, record = trained(corpus, quick_training, routing="mor")
    windows = corpus.windows("heldout", 12)
    out = model.eval()(windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    metrics = record["metrics"]
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(100 * (out.logits.argmax(-1) == windows[:, 1:]).float().mean().item(), abs=1e-3)
    assert metrics["effective_depth"] == pytest.approx(out.depth.float().mean().item())
    assert metrics["bits_per_byte"] == pytest.approx(loss / np.log(2), abs=1e-4), "one character is one byte here"
    rates = torch.tensor(metrics["action_rates"])
    first, second = rates[:, 0], rates[:, 1]
    depth = (1 - first[:, 0] + first[:, 2] * (1 - second[:, 0])).sum()
    assert depth.item() == pytest.approx(metrics["effective_depth"], abs=1e-4), "rates and depth tell the same story"


def specs(small_text, training, labels=("fixed", "mor"), seeds=(0,)):
    models = {"fixed": dict(routing="none"), "mor": dict(routing="mor")}
    return [morlib.Run("test", label, morlib.ModelConfig(vocab_size=1, **SMALL, **models[label]), dataclasses.replace(training, seed=seed),
                       (("name", small_text),), "smoke", "sound") for seed in seeds for label in labels]  # fmt: skip


def test_a_finished_run_is_found_and_not_repeated(small_text, quick_training, monkeypatch):
    spec = specs(small_text, quick_training)[0]
    record = morlib.run(spec)
    files = list((morlib.outputs() / "results").glob("*.json"))
    assert len(files) == 1 and json.loads(files[0].read_text()) == record
    monkeypatch.setattr(morlib, "train", lambda *a, **k: pytest.fail("trained again"))
    assert morlib.run(spec) == record
    renamed = morlib.run(dataclasses.replace(spec, experiment="other"))
    assert renamed["experiment"] == "other" and renamed["metrics"] == record["metrics"]
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        morlib.run(dataclasses.replace(spec, train=dataclasses.replace(spec.train, lr=0.5)))


def test_a_stored_model_is_the_trained_model(small_text, quick_training):
    spec = specs(small_text, quick_training, ("mor",))[0]
    model, record, corpus = morlib.trained_model(spec)
    assert morlib.evaluate(model, corpus)["loss"] == pytest.approx(record["metrics"]["loss"], abs=1e-6)
    assert isinstance(morlib.generate(model, "the quick", 5), str)


def test_runs_side_by_side_give_the_same_records(small_text, quick_training, tmp_path, monkeypatch):
    alone = morlib.run_all(specs(small_text, quick_training, seeds=(0, 1)))
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "second"))
    together = morlib.run_all(specs(small_text, quick_training, seeds=(0, 1)), jobs=2)
    assert [strip(r) for r in alone["record"]] == [strip(r) for r in together["record"]]


def test_an_unwritable_folder_is_told_before_training(small_text, quick_training, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "file"))
    monkeypatch.setattr(morlib, "train", lambda *a, **k: pytest.fail("trained although nothing can be stored"))
    with pytest.raises(OSError, match="choose another folder"):
        morlib.run(specs(small_text, quick_training)[0])
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    morlib.write_whole(path, b"first")

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(morlib.os, "replace", broken)
    with pytest.raises(OSError, match="No space left"):
        morlib.write_whole(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.glob(".record*")) == []


@pytest.mark.parametrize("changes, message", [
    (dict(epochs=0), "epochs must be 1 or more"),
    (dict(windows=4), "at least batch_size"),
    (dict(schedule="zigzag"), "schedule"),
    (dict(lr=-1.0), "lr and router_lr"),
    (dict(penalty=-1.0), "penalty"),
])  # fmt: skip
def test_a_wrong_training_configuration_is_explained(corpus, quick_training, changes, message):
    with pytest.raises(ValueError, match=message):
        trained(corpus, dataclasses.replace(quick_training, **changes))


def test_training_refuses_what_cannot_work(corpus, quick_training):
    with pytest.raises(ValueError, match="build it with vocab_size"):
        morlib.train(morlib.build_model(morlib.ModelConfig(vocab_size=5, **SMALL)), corpus, quick_training)
    with pytest.raises(ValueError, match="smaller max_len"):
        trained(corpus, quick_training, max_len=100_000)
    with pytest.raises(ValueError, match="the loss became nan"):
        trained(corpus, dataclasses.replace(quick_training, lr=1e30, clip=None, warmup=0.0), norm="post")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        morlib.generate(morlib.build_model(config(corpus)), "text", 3)


def test_settings_resolve_in_order(monkeypatch):
    monkeypatch.setenv("MORLIB_PRESET", "smoke")
    s = morlib.settings(dict(preset="auto", recipe="source", seeds=None, lr=None, epochs=7, _hidden=1, In=[], morlib=morlib))
    assert (s.preset, s.seeds, s.train().epochs, s.train().lr, s.model(vocab_size=3).norm) == ("smoke", 1, 7, 3e-4, "post")
    assert morlib.settings(dict(preset="paper")).model(vocab_size=3) == morlib.ModelConfig(vocab_size=3)
    monkeypatch.delenv("MORLIB_PRESET")
    monkeypatch.setattr(morlib, "pick_device", lambda: (torch.device("cpu"), torch.float32, ""))
    assert morlib.settings({}).preset == "quick"
    monkeypatch.setattr(morlib, "pick_device", lambda: (torch.device("cuda"), torch.bfloat16, ""))
    assert morlib.settings({}).preset == "paper"


@pytest.mark.parametrize("given, message", [
    (dict(sedes=3), "unknown parameter sedes; allowed are: .*seeds"),
    (dict(seeds="six"), "parameter seeds must be int, not str 'six'; allowed are"),
    (dict(seeds=2.5), "seeds must be int"),
    (dict(seeds=True), "seeds must be int"),
    (dict(seeds=0), "1 or more"),
    (dict(lr="fast"), "lr must be float"),
    (dict(preset="tiny"), "preset must be one of smoke, quick, cpu, paper"),
    (dict(recipe="secret"), "recipe must be one of sound, source"),
    (dict(d_model=65), "multiple of n_heads"),
    (dict(temperature=0), "temperature must be above 0"),
    (dict(max_chars=-5), "max_chars must be 1 or more"),
    (dict(batch_size=0), "batch_size must be 1 or more"),
    (dict(epochs=0), "epochs must be 1 or more"),
    (dict(action_rates=[[1], [1, 2]]), "action_rates must have shape"),
])  # fmt: skip
def test_a_wrong_parameter_is_explained(given, message):
    with pytest.raises(ValueError, match=message):
        morlib.settings(dict(preset="smoke") | given)


def test_the_parameter_cell_can_be_run_again():
    namespace = dict(preset="smoke", seeds=None)
    morlib.settings(namespace)
    namespace |= dict(N=4, models={}, seeds=3)  # left by later cells, and changed by the reader
    assert morlib.settings(namespace).seeds == 3
    with pytest.raises(ValueError, match="own_text must be str"):
        morlib.settings(dict(preset="smoke", own_text=5), dict(own_text=str))


def test_papermill_refuses_an_unknown_parameter(tmp_path):
    notebook = morlib.ROOT / "notebooks" / "03_exp2_equal_cost.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), str(tmp_path / "out.ipynb"), "--cwd", str(notebook.parent), "-p", "preset", "smoke", "-p", "sedes", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "unknown parameter sedes; allowed are" in done.stderr


def test_the_studies_of_notebook_02_run(tmp_path, monkeypatch):
    """They ship as records; here they are trained, as small as can be."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tiny = dict(preset="smoke", studies="run", epochs=1, windows=32, eval_windows=8, heldout_windows=8, evaluations=1)
    parameters = [word for name, value in tiny.items() for word in ("-p", name, str(value))]
    done = subprocess.run([sys.executable, "-m", "papermill", "notebooks/02_exp1_efficiency.ipynb", str(tmp_path / "out.ipynb"), "--cwd", "notebooks", "-k", "python3", *parameters],
                          cwd=morlib.ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    experiments = {path.name.split("_")[0] for path in (morlib.outputs() / "results").glob("*.json")}
    assert experiments == {"exp1", "pareto", "estimators", "recursions", "collapse", "sources"}
    recipes = {morlib.read_record(path)["recipe"] for path in (morlib.outputs() / "results").glob("sources_*.json")}
    assert recipes == {"source"}


def test_notebooks_are_laid_out_as_agreed():
    notebooks = sorted((morlib.ROOT / "notebooks").glob("*.ipynb"))
    assert [p.stem for p in notebooks][:5] == ["01_data", "02_exp1_efficiency", "03_exp2_equal_cost", "04_bangla", "05_routing_analysis"]
    for path in notebooks:
        cells = nbformat.read(path, 4).cells
        tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
        assert tags.count("parameters") == 1 and "nbval-check-output" in tags
        assert cells[0].source.startswith("# ") and "What this does not show" in cells[-1].source
        outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
        assert outputs and not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)


def table(accuracies, did_train=True):
    return pd.DataFrame([dict(model=m, seed=i, accuracy=a, did_train=did_train) for m, values in accuracies.items() for i, a in enumerate(values)])


def test_paired_comparison():
    rng = np.random.default_rng(0)
    base = rng.normal(40, 3, 8)
    better = morlib.compare(table(dict(a=base + 1 + rng.normal(0, 0.1, 8), b=base)), "a", "b")
    assert better["low"] > 0.8 and better["high"] < 1.2 and better["p"] == pytest.approx(2 / 2**8) and better["claim"] == "a higher"
    same = morlib.compare(table(dict(a=base + 0.1 * np.array([1, -1, 2, -2, 3, -3, 1, -1]), b=base)), "a", "b")
    assert same["claim"] == "equal within 0.5" and same["p_equivalent"] < 0.001 < 0.05 < same["p"]
    wide = morlib.compare(table(dict(a=base + 2 * np.array([1, -1, 2, -2, 3, -3, 1, -1]), b=base)), "a", "b")
    assert wide["claim"] == "no difference shown" and wide["p_equivalent"] > 0.05, "too noisy to say either"
    slight = morlib.compare(table(dict(a=base - 0.2 + rng.normal(0, 0.01, 8), b=base)), "a", "b")
    assert slight["claim"] == "a lower, yet equal within 0.5", "a difference can be certain and small"
    few = morlib.compare(table(dict(a=base[:5] + 1 + rng.normal(0, 0.01, 5), b=base[:5])), "a", "b")
    assert few["p"] > 0.05 and "too few" in few["claim"]
    assert "did not train" in morlib.compare(table(dict(a=base + 1, b=base), did_train=False), "a", "b")["claim"]
    with pytest.raises(ValueError, match="no records of model 'c'"):
        morlib.compare(table(dict(a=base, b=base)), "c", "b")


def test_where_a_new_seed_is_expected():
    """The interval of one further draw holds 95 % of further draws from a normal population, whatever the number of seeds."""
    rng = np.random.default_rng(0)
    draws = rng.normal(40, 0.3, (4000, 7))
    inside = [low < row[6] < high for row in draws for low, high in [morlib.new_seed_range(row[:6])]]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_the_readme_prints_the_stored_records(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_bytes((morlib.ROOT / "README.md").read_bytes())
    report.update_readme(readme)
    assert readme.read_text(encoding="utf-8") == (morlib.ROOT / "README.md").read_text(encoding="utf-8"), "run `make report`"


@pytest.mark.parametrize("experiment", ("exp1", "exp2", "bangla"))
def test_what_the_readme_says_of_mor_holds_in_the_records(experiment):
    """Parity within half a point with the fixed model, better than blind routing, and depth within a tenth of its target."""
    records = morlib.stored_records(experiment)
    for routed, fixed, blind in {"exp1": [("mor", "fixed-deep", "random")], "exp2": [("mor-equal-epochs", "fixed-shallow", "random")],
                                 "bangla": [("mor-deep", "fixed-deep", "random-deep"), ("mor-half", "fixed-shallow", "random-half")]}[experiment]:  # fmt: skip
        assert abs(morlib.compare(records, routed, fixed)["mean"]) < 0.5 and morlib.compare(records, routed, fixed)["pairs"] >= 6
        assert morlib.compare(records, routed, blind)["mean"] > 0
        own = records[records["model"] == routed]
        targets = [r["config"]["model"]["target_depth"] for r in own["record"]]
        assert (own["effective_depth"] - targets).abs().max() <= 0.1
    assert records["did_train"].all()


def test_what_is_said_of_controls_and_studies_holds_in_the_records():
    """README and notebook 02: where the gains come from, what recursing buys, which choices matter, and that E is held by following."""
    exp2, bangla = morlib.stored_records("exp2"), morlib.stored_records("bangla")
    assert morlib.compare(exp2, "mor-source-protocol", "fixed-long")["high"] < 0 < morlib.compare(exp2, "mor-source-protocol", "fixed-shallow")["low"]
    for routed, frozen in (("mor-deep", "frozen-deep"), ("mor-half", "frozen-half")):
        assert (shown := morlib.compare(bangla, routed, frozen))["low"] < 0 < shown["high"] and shown["pairs"] >= 6
    front, collapse, recursions, estimators, sources = map(morlib.stored_records, ("pareto", "collapse", "recursions", "estimators", "sources"))
    loss = analysis.front_table(front)["loss"].unstack("kind")
    assert (loss["mor"] < loss["random"])[loss["random"].notna()].mean() > 0.5
    gap = (loss["mor"] - loss["fixed"]).drop(12)
    assert (gap > 0).sum() > len(gap) / 2
    accuracy = analysis.front_table(front)["accuracy"]["fixed"]
    assert accuracy.max() - accuracy.min() < 1
    for records in (front, collapse):
        for record in records[records["model"].str.startswith("mor")]["record"]:
            assert abs(record["metrics"]["followed"]["effective_depth"] - record["config"]["model"]["target_depth"]) <= 0.1
    collapsed = analysis.collapse_table(collapse)
    assert all((records.groupby("model").size() == 3).all() for records in (front, recursions, estimators, sources))
    assert (collapsed["seeds"] == 10).all() and (collapsed["of them collapsed, all seeds"] == 0).all()
    assert analysis.by_validation(recursions).index[0] == "R = 1"
    speed = {key: row["measured"] for record in bench.stored() for key, row in record["rows"].items()}
    assert max(speed["train-8"], speed["forward-8"]) < 0.8 and 0.7 < speed["decode-1"] < 1 and 0.9 < speed["decode-32"] and 0.9 < speed["train-small"]
    losses = analysis.by_validation(estimators)["validation loss"]
    assert losses.iloc[-1] - losses.iloc[-2] > losses.iloc[-2] - losses.iloc[0] and losses.index[-1] == "scaled, budget spread"
    E = analysis.sources_table(sources)["E sampled"]
    assert abs(E["mor, as published"] - 8) < 0.2 and E["mor, recursing mended"] > 8.2 and E["mor, gradient mended"] < 0.2


def test_a_usable_gpu_trains_too(corpus, quick_training):
    device, dtype, why = morlib.pick_device()
    if device.type != "cuda":
        pytest.skip(f"no GPU here: {why}")
    _, record = trained(corpus, quick_training, routing="mor")
    assert np.isfinite(record["metrics"]["loss"])
