"""What each notebook trains and draws where records are not at hand, at a test's size.

Notebook 03 is left to test_kaggle.py, which executes it as Kaggle does. `make test` also compares what all
notebooks show under the preset `stored`, each in a kernel of its own. Here they run in IPython's shell and
without a kernel, so that torch is imported once.
"""

import sys

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from suite import files, routing, runs

NOTEBOOKS = ["01_data", "04_bangla", "05_routing_analysis", "06_deployment", "07_known_depth", "08_field"]
SMALLER = {  # than smoke; every system is trained in test_field.py
    "04_bangla": dict(epochs=1),
    "05_routing_analysis": dict(epochs=1),
    "06_deployment": dict(batches=[1, 4], repeats=2),
    "08_field": dict(systems=["fixed-half", "fixed-deep", "act", "exit", "mor-expert"]),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Outputs of all notebooks: 05 finds the models of 04."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Run a notebook under the preset smoke, with parameters where papermill puts them."""
    monkeypatch.chdir(files.ROOT / "notebooks")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell puts its own there
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MORLIB_PRESET", "smoke")

    def execute(name, **given):
        prepared = tmp_path / f"{name}.ipynb"
        papermill.execute_notebook(f"{name}.ipynb", prepared, given, prepare_only=True, progress_bar=False)
        shell = InteractiveShell(config=Config(HistoryManager=dict(enabled=False)))
        for cell in nbformat.read(prepared, 4).cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source, store_history=True).raise_error()

    with matplotlib.rc_context(), pd.option_context("display.max_colwidth", None):
        yield execute
    plt.close("all")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_trains_and_draws(name, execute, shared, monkeypatch):
    monkeypatch.setenv("MORLIB_OUTPUTS", str(shared))
    execute(name, **SMALLER.get(name, {}))
    assert list((shared / "figures").glob(f"{name[:2]}_*.png"))


def test_the_studies_of_notebook_02_run(execute, monkeypatch):
    """They ship as records; here they are trained, as small as can be."""
    for name, (models, _, recipe) in runs.STUDIES.items():
        monkeypatch.setitem(runs.STUDIES, name, (models, 2, recipe))
    execute("02_exp1_efficiency", studies="run", epochs=1, windows=32, eval_windows=8, heldout_windows=8,
            evaluations=1)  # fmt: skip
    paths = list((files.outputs() / "results").glob("*.json"))
    experiments = {path.name.split("_")[0] for path in paths}
    assert experiments == {"exp1", "pareto", "estimators", "recursions", "collapse", "sources"}
    of_sources = [path for path in paths if path.name.startswith("sources_")]
    assert {runs.read_record(path)["recipe"] for path in of_sources} == {"source"}


def test_papermill_s_unknown_parameter_is_refused(execute):
    with pytest.raises(ValueError, match="unknown parameter sedes; allowed are"):
        execute("01_data", sedes=2)


def judged(name, given):
    """The names that a notebook's parameters cell and the one that judges them leave; and the cell after."""
    cells = nbformat.read(files.ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    cells = [cell for cell in cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    space = {"routing": routing}
    exec(cells[at].source, space)
    space |= {"preset": "smoke"} | given
    exec(cells[at + 1].source, space)
    return space, cells[at + 2].source


@pytest.mark.parametrize("name, given, meant", [
    ("02_exp1_efficiency", dict(target_depth="none"), dict(target=None)),
    ("02_exp1_efficiency", dict(target_depth="3"), dict(target=3.0)),
    ("03_exp2_equal_cost", dict(target_depth="none"), dict(target=2.0)),
    ("04_bangla", dict(vocabularies="[1000, 4000]"), dict(vocabularies=[1000, 4000])),
    ("05_routing_analysis", dict(sample="50"), dict(sample=50)),
    ("06_deployment", dict(batches=4), dict(batches=[4])),
    ("08_field", dict(systems="act"), dict(labels=["act"])),
])  # fmt: skip
def test_a_notebook_works_with_a_parameter_as_it_is_meant(name, given, meant):
    space, after = judged(name, given)
    if name.startswith("08"):
        exec(after.split("\n")[0], space)
    assert {key: space[key] for key in meant} == meant


@pytest.mark.parametrize("name, given, message", [
    ("04_bangla", dict(vocabularies=[200]), "sizes above 256"),
    ("04_bangla", dict(vocabularies=["4000"]), "sizes above 256"),
    ("05_routing_analysis", dict(own_text="a"), "own_text needs two characters"),
    ("05_routing_analysis", dict(own_text=3), "own_text needs two characters"),
    ("05_routing_analysis", dict(own_text=["To be"]), "own_text must be str"),
    ("05_routing_analysis", dict(texts=["hamlet"]), "one or more of tinyshakespeare, bangla"),
    ("05_routing_analysis", dict(texts=[]), "one or more of tinyshakespeare, bangla"),
    ("05_routing_analysis", dict(sample=1), "sample must be 10 windows or more"),
    ("05_routing_analysis", dict(preset="stored", own_text="To be"), "weights, which do not ship"),
    ("05_routing_analysis", dict(preset="stored", sample=50), "weights, which do not ship"),
    ("05_routing_analysis", dict(text=["de/book.txt", "fr/book.txt"]), r"share a name \(book\): rename one"),
    ("06_deployment", dict(batches=[]), "batches must be a list"),
    ("06_deployment", dict(batches=[0]), "batches must be a list"),
    ("06_deployment", dict(repeats=0), "repeats must be 1 or more"),
    ("06_deployment", dict(repeats="seven"), "repeats must be int"),
])  # fmt: skip
def test_a_notebook_refuses_what_it_cannot_do(name, given, message):
    with pytest.raises(ValueError, match=message):
        judged(name, given)
