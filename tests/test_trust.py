"""What the suite trusts: no code out of files, no plain HTTP, a licence for every text, how to cite it."""

import ast
import re

import nbformat
import yaml

import morlib
from suite import files, runs

FOLDERS = ("", "kaggle", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((files.ROOT / folder).glob("*.py"))]
SOURCES += sorted((files.ROOT / "suite").rglob("*.py"))
NOTEBOOKS = sorted((files.ROOT / "notebooks").glob("*.ipynb"))
FORBIDDEN = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "joblib.load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "os.system",
    "dill.load",
    "dill.loads",
    "marshal.loads",
    "shelve.open",
    "yaml.load",
    "zipfile.extractall",
    "shutil.unpack_archive",
}
OWN_CODE = {
    "test_own_text.py",
    "test_field_table.py",
    "test_live.py",
    "test_notebooks.py",
    "test_runs.py",
}  # cells and README lines


def calls(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), arguments


def programs():
    for path in SOURCES:
        yield path.name, path.read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                yield path.name, cell.source


def test_all_programs_are_looked_at():
    names = [name for name, _ in programs()]
    assert {"morlib.py", "stage.py", "runner.py", "sources.py", "report.py", "06_deployment.ipynb"} <= set(
        names
    )


def test_no_program_runs_code_that_it_reads():
    for name, code in programs():
        for called, arguments in calls(code):
            own = called == "exec" and name in OWN_CODE
            assert called not in FORBIDDEN or own, f"{name} calls {called}"
            assert not called.endswith((".extractall", ".extract")), f"{name} unpacks with {called}"
            weights = called != "torch.load" or arguments.get("weights_only") == "True"
            assert weights, f"{name} loads without weights_only"
            pickles = called.startswith("np.load") and "allow_pickle" in arguments
            assert not pickles, f"{name} allows pickles"
            for trusting in ("shell", "trust_remote_code"):
                assert arguments.get(trusting) != "True", f"{name}: {called}"
        if not name.startswith("test_"):
            assert "http://" not in code, f"{name} names an address without encryption"


def test_every_text_has_a_licence_and_a_source():
    page = (files.ROOT / "data" / "README.md").read_text(encoding="utf-8")
    licences = {}
    for names, cells in re.findall(r"^\| (`.+?) \|(.+)\|$", page, re.M):
        licences |= {name: cells.split("|")[-1].strip() for name in re.findall(r"`(.+?)`", names)}
    named = {f"{text}{kind}" for text in ("tinyshakespeare", "balcony") for kind in ("", "-iambic")}
    named |= {"bangla-wikipedia", "bangla-sample"}
    assert named == set(licences) and all(len(licence) > 2 for licence in licences.values())
    tables = map(runs.stored_records, ("exp1", "exp2", "bangla"))
    assert {record["data"]["name"] for table in tables for record in table["record"]} <= named
    wikipedia = licences["bangla-wikipedia"]
    assert "Wikipedia contributors" in wikipedia and "CC BY-SA" in wikipedia
    for text in (files.ROOT / "data").glob("*.txt"):
        assert text.name in page


def test_how_to_cite_is_valid():
    cff = yaml.safe_load((files.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    names = {
        "cff-version",
        "message",
        "title",
        "authors",
        "type",
        "version",
        "license",
        "abstract",
        "references",
    }
    assert names == set(cff)
    about = [cff[name] for name in ("cff-version", "type", "license", "version")]
    assert about == ["1.2.0", "software", "MIT", morlib.__version__]
    assert cff["authors"] == [{"name": "The MoR bench contributors"}]
    readme = (files.ROOT / "README.md").read_text(encoding="utf-8")
    for reference in cff["references"][1:]:  # the thesis and the paper, which the README names too
        authors = (f"{author['given-names']} {author['family-names']}" for author in reference["authors"])
        assert reference["title"] in readme and " and ".join(authors) in readme


def test_the_changelog_and_the_ten_lines():
    log = (files.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {morlib.__version__}" in log or "## Unreleased" in log
    page = (files.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert 5 <= len([line for line in page.splitlines() if line.strip()]) <= 12


def test_what_is_installed_is_pinned():
    lines = (files.ROOT / "requirements.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert packages
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", package) for package in packages)


def test_the_style_is_part_of_the_tests():
    recipe = (files.ROOT / "Makefile").read_text().split("\ntest: $(VENV)/ready\n")[1].split("\n\n")[0]
    assert "ruff check" in recipe and "ruff format --check" in recipe
