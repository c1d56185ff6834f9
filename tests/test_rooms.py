"""How the suite is built: what imports what, how long things are, and that morlib.py works alone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import morlib
import suite.field  # noqa: F401  registers the policies that stored records name
from suite import files, runs, texts
from suite.runs import records, runner
from suite.runs.code import code_of

# Each room may import those to the left of it.
ORDER = ("files", "texts", "runs", "results", ("routing", "cost", "field"), "report")
CORE = {"torch", "numpy", "scipy", "safetensors", "tqdm"}
ENVIRONMENT = {"files.py", "runs/settings.py", "runs/device.py", "runs/runner.py"}
SUITE = files.ROOT / "suite"
MODULES = sorted(SUITE.rglob("*.py"))
CODE = [files.ROOT / "morlib.py", *MODULES]
MOST_LINES, LONGEST_FUNCTION = 1300, 46


def name_of(path):
    return str(path.relative_to(SUITE)) if path.is_relative_to(SUITE) else path.name


def room_of(path):
    """The room that a module of the suite belongs to; None for the suite's own __init__."""
    parts = path.relative_to(SUITE).parts
    return None if parts == ("__init__.py",) else parts[0].removesuffix(".py")


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """The absolute dotted names that a module imports, a name from a package as `package.name`."""
    package = path.relative_to(files.ROOT).parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def rank(room):
    return next(i for i, rooms in enumerate(ORDER) if room == rooms or room in rooms and rooms != room)


# ---- What imports what ----


def test_there_are_the_rooms_and_nothing_else():
    assert [path.name for path in files.ROOT.glob("*.py")] == ["morlib.py"]
    rooms = {room_of(path) for path in MODULES} - {None}
    assert rooms == {"files", "texts", "runs", "results", "routing", "cost", "field", "report"}


def test_the_core_imports_nothing_of_ours():
    for name in imported(files.ROOT / "morlib.py"):
        package = name.split(".")[0]
        assert package in CORE or package in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    own = room_of(path)
    for name in imported(path):
        package, *rest = name.split(".")
        if package != "suite" or own is None:
            assert package in ("morlib", "suite") or own is not None or package in sys.stdlib_module_names
            continue
        if rest and rest[0] != own:
            assert any(rest[0] == room or rest[0] in room for room in ORDER), f"{name} is no room"
            assert rank(rest[0]) < rank(own), f"{name_of(path)} imports {name}"


def test_the_test_of_imports_can_fail(tmp_path):
    assert rank("files") < rank("texts") < rank("runs") < rank("results") < rank("cost") == rank("routing")
    assert rank("field") == rank("cost")
    assert rank("routing") < rank("report")
    names = set(imported(SUITE / "runs" / "runner.py"))
    assert {"suite.files.outputs", "suite.texts.load_corpus", "suite.runs.records.run_id", "morlib"} <= names
    assert "suite.results" in {name for name in imported(SUITE / "report.py")}


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_mock_no_hidden_settings_and_no_long_function(path):
    code = path.read_text(encoding="utf-8")
    assert not any(name.startswith("unittest") for name in imported(path))
    assert ".attrs" not in code, "no second return value in DataFrame.attrs"
    reads = re.search(r"getenv|os\.environ\b(?! \| )", code)  # one may hand it on to another process
    assert not reads or name_of(path) in ENVIRONMENT
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def test_the_core_is_thin():
    assert len((files.ROOT / "morlib.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


# ---- morlib.py alone ----

ALONE = """
import json, sys
import torch
import morlib

class Numbers:
    vocab_size = 7

    def draw(self, windows, length, generator):
        starts = torch.randint(7, (windows, 1), generator=generator)
        return (starts + torch.arange(length + 1)) % 7

    def windows(self, part, length, most=None):
        starts = torch.arange(7)[:most, None]
        return (starts + torch.arange(length + 1)) % 7

if sys.argv[1] == "train":
    torch.manual_seed(0)
    model = morlib.Transformer(morlib.ModelConfig(7, 4, 16, 2, 32, 12, 0.0, target_depth=3.0))
    before = morlib.evaluate(model, Numbers(), "val")
    tc = morlib.TrainConfig(epochs=4, windows=64, batch_size=8, lr=1e-2, evaluations=2, eval_windows=7)
    training = morlib.train(model, Numbers(), tc)
    after = morlib.evaluate(model, Numbers())
    morlib.save_model(model, "numbers.safetensors", dict(about="counting"))
    told = [before["loss"], after["loss"], after["bits_per_byte"], after["effective_depth"]]
    told.append(len(training.history))
else:
    model, notes = morlib.load_model("numbers.safetensors")
    told = [notes["about"], morlib.evaluate(model, Numbers())["loss"]]
told.append(morlib.generate(model, torch.tensor([3, 4]), 20).tolist())
ours = [name for name in sys.modules if name.split(".")[0] in ("suite", "pandas")]
print(json.dumps(dict(told=told, ours=ours)))
"""


def test_morlib_works_alone_beside_a_script(tmp_path):
    shutil.copyfile(files.ROOT / "morlib.py", tmp_path / "morlib.py")
    (tmp_path / "script.py").write_text(ALONE)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MORLIB_") and k != "PYTHONPATH"}
    told = []
    for act in ("train", "load"):
        command = [sys.executable, "script.py", act]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["ours"] == []
        told.append(answer["told"])
    (before, after, bits, depth, points, written), (about, loss, again) = told
    assert after < 0.5 < before and bits is None and abs(depth - 3) < 0.5 and points == 2
    assert written == [(3 + i) % 7 for i in range(22)], "it has learnt to count"
    assert about == "counting" and loss == pytest.approx(after, abs=1e-6) and again == written
    left = {path.name for path in tmp_path.iterdir()} - {"outputs", "__pycache__"}
    assert left == {"morlib.py", "script.py", "numbers.safetensors"}


# ---- What ships is found ----

GONE = {"all-branches", "hard", "trapezoid", "zero-at-threshold"}  # estimators that were tried and deleted
GONE_LEADS = {"steps up", "least first", "huber", "four batches", "median of means", "own loss"}
STORED = sorted(files.REFERENCE.glob("*_s*_*.json"))


class Described:
    """The text of a record, as far as a run's identity asks."""

    def __init__(self, data):
        self.data = data

    def describe(self):
        return self.data


def test_every_stored_record_has_the_identity_of_its_content():
    assert len(STORED) >= 300
    for path in STORED:
        record = runs.read_record(path)
        fields = record["config"]["model"]
        estimator = fields["estimator"]
        lead = fields["routing"].removeprefix("worth: ")
        instead = dict(estimator="cut") if estimator in GONE else {}
        instead |= dict(routing="worth") if lead in GONE_LEADS else {}
        cfg = morlib.ModelConfig(**fields | instead)
        for name in instead:
            object.__setattr__(cfg, name, fields[name])
        tc = morlib.TrainConfig(**record["config"]["train"])
        code = lead.replace(" ", "-") if lead in GONE_LEADS else code_of(cfg.routing)
        parent = record.get("parent", "")
        identity = records.run_id(cfg, tc, Described(record["data"]), code, parent, record["preset"])
        if "stopped_at" in record:  # it is not that of the whole run, and says so
            identity += f"-stopped-at-{record['stopped_at']}"
        assert path.stem.endswith(f"_{identity}") and record["id"] == identity, path.name


def test_a_field_that_comes_later_leaves_identities_alone(monkeypatch):
    record = runs.read_record(STORED[0])
    tc, data = morlib.TrainConfig(**record["config"]["train"]), Described(record["data"])
    first = records.FIRST_FIELDS[morlib.ModelConfig]
    fields = morlib.ModelConfig(**record["config"]["model"])
    without = {**records.FIRST_FIELDS, morlib.ModelConfig: first.replace(" scaled_init", "")}
    monkeypatch.setattr(records, "FIRST_FIELDS", without)
    assert fields.scaled_init and records.run_id(fields, tc, data) != record["id"], "as if it had come later"
    assert "scaled_init" not in records.identifying(fields)
    other = morlib.ModelConfig(**record["config"]["model"] | dict(scaled_init=False))
    assert records.identifying(other)["scaled_init"] is False


def no_text(*args, **more):
    raise AssertionError("a text was read")


@pytest.fixture
def stored(monkeypatch):
    """The settings of committed notebooks, where no text is at hand."""
    for owner in (texts, runner, texts.corpus):
        monkeypatch.setattr(owner, "load_corpus", no_text)
    monkeypatch.setattr(morlib, "train", no_text)
    monkeypatch.setenv("MORLIB_PRESET", "stored")
    return runs.settings(dict(preset="auto"))


def experiment(s, name):
    N = s.model(vocab_size=1).n_layers
    models = {
        "exp1": lambda: runs.exp1_models(s, round(2 * N / 3, 2)),
        "exp2": lambda: runs.exp2_models(s, N / 2),
        "bangla": lambda: runs.bangla_models(s, round(2 * N / 3, 2), N / 2),
    }[name]()
    return runs.experiment_runs(s, name, runs.TEXTS[name], models)


BLIND = {
    "exp1": {"random": "mor"},
    "exp2": {"random": "mor-equal-epochs"},
    "bangla": {"random-deep": "mor-deep", "random-half": "mor-half"},
}


@pytest.mark.parametrize("name", BLIND)
def test_stored_runs_are_found_without_any_text(stored, name, capsys):
    specs = experiment(stored, name)
    table = runs.run_all(specs)
    for label, routed in BLIND[name].items():
        controls = runs.random_controls(table, specs, routed, label)
        assert len(controls) == 6
        specs = [*specs, *controls]
    table = runs.run_all(specs)
    assert "failed" not in capsys.readouterr().out
    assert table["model"].tolist() == [spec.model for spec in specs]
    assert table["seed"].tolist() == [spec.train.seed for spec in specs]
    assert (table.groupby("model")["seed"].nunique() == 6).all()
    needed = {label for pair in runs.PAIRS[name] for label in pair}
    assert needed <= set(table["model"])
    for spec, record in zip(specs, table["record"]):
        found = record["config"]["model"]
        assert {**records.LATER, **found, "vocab_size": 1} == json.loads(json.dumps(vars(spec.config)))
    runs.check_one_kind(table)


@pytest.mark.parametrize("study", runs.STUDIES)
def test_stored_studies_are_found_without_any_text(stored, study, capsys):
    specs = runs.study_runs(stored, study, 8.0)
    table = runs.run_all(specs)
    assert len(table) == len(specs) and "failed" not in capsys.readouterr().out
    if study == "pareto":
        controls = runs.front_controls(table, specs)
        there = [control for control in controls if control.model.split()[1] in "3 4 5 6 8 10".split()]
        assert len(runs.run_all(there)) == len(there) == 18


def test_stored_vocabularies_are_found_without_any_text(stored, capsys):
    specs = runs.vocabulary_runs(stored, ["characters", "1000-pieces", "4000-pieces", "16000-pieces"])
    assert len(runs.run_all(specs)) == len(specs) and "failed" not in capsys.readouterr().out


def test_what_does_not_ship_is_told_under_stored(stored, capsys):
    spec = experiment(stored, "exp1")[1]
    other = runs.experiment_runs(stored, "exp1", runs.TEXTS["exp1"], {"mor": (dict(target_depth=7.5), {})})
    assert len(runs.run_all([spec, other[0]])) == 1
    assert "no record of it ships: choose a preset that trains it" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="6 of 6 runs failed"):
        runs.run_all(other)
    with pytest.raises(ValueError, match="weights do not ship: choose a preset that trains"):
        runs.trained_model(spec)


# ---- Where outputs go ----


def test_outputs_do_not_depend_on_the_folder_one_is_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MORLIB_OUTPUTS", "some where")
    assert files.outputs() == files.ROOT / "some where"
    monkeypatch.setenv("MORLIB_OUTPUTS", "~/some where")
    assert files.outputs() == Path.home() / "some where"
    monkeypatch.setenv("MORLIB_OUTPUTS", str(tmp_path / "with blanks"))
    assert files.outputs() == tmp_path / "with blanks"
    monkeypatch.delenv("MORLIB_OUTPUTS")
    assert files.outputs() == files.ROOT / "outputs"
    monkeypatch.setattr(files, "KAGGLE_INPUT", files.ROOT.parent)
    assert files.outputs() == tmp_path / "outputs", "where the suite is mounted nothing can be written"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("folder", ["some where", "~/some where", "../aside", "/an absolute/one", None])
def test_make_writes_where_the_suite_does(monkeypatch, folder):
    monkeypatch.delenv("MORLIB_OUTPUTS")
    if folder:
        monkeypatch.setenv("MORLIB_OUTPUTS", folder)
    command = ["make", "-n", "-C", str(files.ROOT), "stored", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert f'MORLIB_OUTPUTS="{files.outputs()}/stored"' in done.stdout, done.stderr
