"""The way to Kaggle: metadata that its client accepts, and a notebook run in a folder that imitates /kaggle without internet."""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import nbformat
import pytest

import morlib

stage = runpy.run_path(str(morlib.ROOT / "kaggle" / "stage.py"))["stage"]
NOTEBOOKS = sorted((morlib.ROOT / "notebooks").glob("*.ipynb"))
KERNEL_FIELDS = dict(id=str, title=str, code_file=str, language=str, kernel_type=str, is_private=bool, enable_gpu=bool, enable_tpu=bool, enable_internet=bool,
                     dataset_sources=list, competition_sources=list, kernel_sources=list, model_sources=list)  # fmt: skip


@pytest.fixture
def staged(tmp_path):
    return stage("some-owner", tmp_path / "staged")


def test_metadata_is_what_the_client_documents(staged):
    dataset, *kernels = staged
    meta = json.loads((dataset / "dataset-metadata.json").read_text(encoding="utf-8"))
    owner, slug = meta["id"].split("/")
    assert owner == "some-owner" and 6 <= len(slug) <= 50 and 6 <= len(meta["title"]) <= 50 and 20 <= len(meta["subtitle"]) <= 80
    assert [set(licence) for licence in meta["licenses"]] == [{"name"}] and isinstance(meta["description"], str) and meta["keywords"] == []
    assert set(meta) == {"id", "title", "subtitle", "description", "licenses", "keywords"}
    assert [kernel.name for kernel in kernels] == [notebook.stem for notebook in NOTEBOOKS], "each notebook has its metadata"
    for kernel in kernels:
        meta = json.loads((kernel / "kernel-metadata.json").read_text(encoding="utf-8"))
        assert {name: type(value) for name, value in meta.items()} == KERNEL_FIELDS
        assert meta["id"] == "some-owner/" + re.sub(r"[^a-z0-9]+", "-", meta["title"].lower()) and 5 <= len(meta["title"]) <= 50, "the title makes the address"
        assert (meta["language"], meta["kernel_type"]) == ("python", "notebook") and (kernel / meta["code_file"]).is_file()
        assert meta["dataset_sources"] == [f"some-owner/{slug}"] and not meta["enable_internet"]
    assert not [path for path in dataset.rglob("*") if path.is_file() and "OWNER" in path.name]


def test_staging_explains_itself(tmp_path):
    with pytest.raises(ValueError, match="'Some One' is no Kaggle user name"):
        stage("Some One", tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is not empty: remove it, or name another folder"):
        stage("some-owner", tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["mine.txt"]


@pytest.mark.parametrize("place, start", [
    ("kaggle/input/mor-bench", "kaggle/working"),
    ("kaggle/input/datasets/some-owner/mor-bench", "kaggle/working"),
    ("suite/notebooks", "suite/notebooks"),
    ("suite", "suite/notebooks"),
])  # fmt: skip
def test_notebooks_find_morlib_in_every_layout(tmp_path, place, start):
    for folder in (place, start):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "morlib.py").write_text("")
    for notebook in NOTEBOOKS:
        lines = next(cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code").split("\n")
        search = "\n".join(line for line in lines if re.match(r"import (glob|sys|os)$|sys\.path", line)).replace("/kaggle/", f"{tmp_path}/kaggle/")
        search += "\nimport importlib.util, os; print(os.path.abspath(importlib.util.find_spec('morlib').origin))"
        done = subprocess.run([sys.executable, "-I", "-c", search], cwd=tmp_path / start, capture_output=True, text=True)
        assert done.stdout.strip() == str(tmp_path / place / "morlib.py"), notebook.name + done.stderr


def contents(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_the_whole_path_in_a_folder_that_imitates_kaggle(tmp_path, staged):
    """What is staged, mounted as Kaggle mounts it, run as Kaggle runs it; only the address of /kaggle differs."""
    dataset, *kernels = staged
    name, text, _ = morlib._find_shakespeare()
    (dataset / "data" / f"{name}.txt").write_text(text, encoding="utf-8")
    root = tmp_path / "kaggle"
    mounted, working = root / "input" / "datasets" / "some-owner" / "mor-bench", root / "working"
    shutil.copytree(dataset, mounted, ignore=lambda *_: ["dataset-metadata.json"])
    working.mkdir()
    (kernel,) = (kernel for kernel in kernels if kernel.name == "03_exp2_equal_cost")
    for path, target in ((mounted / "morlib.py", mounted / "morlib.py"), (kernel / "03_exp2_equal_cost.ipynb", working / "__notebook__.ipynb")):
        target.write_text(path.read_text(encoding="utf-8").replace("/kaggle/", f"{root}/"), encoding="utf-8")
    before = contents(root / "input")
    for path in (root / "input").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MORLIB_") and k != "PYTHONPATH"}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9") | {"PIP_NO_INDEX": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "papermill", "__notebook__.ipynb", "__output__.ipynb", "-k", "python3", "-p", "preset", "smoke", "-p", "epochs", "2"]
    done = subprocess.run(command, cwd=working, env=environment | nowhere, capture_output=True, text=True)
    for path in (root / "input").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(root / "input") == before, "the input was written to"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (working / "outputs" / "results").glob("*.json")]
    assert len(records) >= 5 and {record["data"]["name"] for record in records} == {name}
    assert all(record["data"]["source"].startswith("data/") for record in records)
    assert list((working / "outputs" / "figures").glob("*.png"))
    printed = "".join(str(output.get("text", "")) for cell in nbformat.read(working / "__output__.ipynb", 4).cells for output in cell.get("outputs", []))
    assert "Stored records: preset" in printed, "the stored records came along"
