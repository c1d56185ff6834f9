"""Where files lie: the checkout, the outputs, the texts that are there; and how a file is written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs" / "reference"  # the records that ship
KAGGLE_INPUT = Path("/kaggle/input")


def outputs() -> Path:
    """Where records, checkpoints and figures go: the folder MORLIB_OUTPUTS, else outputs/ of the checkout.

    A relative MORLIB_OUTPUTS is taken from the checkout, wherever a notebook runs. Where the checkout is
    read-only, outputs/ of the current folder.
    """
    if folder := os.environ.get("MORLIB_OUTPUTS"):
        return ROOT / Path(folder).expanduser()  # an absolute one stays as it is
    writable = os.access(ROOT, os.W_OK) and not ROOT.is_relative_to(KAGGLE_INPUT)
    return (ROOT if writable else Path.cwd()) / "outputs"


def candidates(filename: str) -> Iterator[tuple[str, Path]]:
    """The places in which a text or a font is looked for, in order, with a word for each.

    A relative MORLIB_DATA is taken from the checkout, too.
    """
    yield "data/", ROOT / "data" / filename
    if folder := os.environ.get("MORLIB_DATA"):
        yield "MORLIB_DATA", ROOT / Path(folder).expanduser() / filename
    if KAGGLE_INPUT.is_dir():
        for mounted in sorted(KAGGLE_INPUT.rglob(filename)):
            yield "Kaggle input", mounted
    yield "outputs/data", outputs() / "data" / filename


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all. Raises OSError with a message that names the folder."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # no two writers share it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's place
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise unwritable(path, error) from error
    return path


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a table as JSON, a line a row."""
    lines = ",\n".join(map(json.dumps, rows))
    write_whole(path, f"[\n{lines}\n]\n".encode())


def read_rows(path: Path) -> list[dict]:
    """The rows that `write_rows` wrote; none where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def safe_name(text: str) -> str:
    """A text as a file's name: what file systems mind becomes a dash, and it is cut to 120 bytes."""
    name = "".join("-" if c in '/\\:*?"<>|\0\n' else c for c in text)
    return name.encode(errors="ignore")[:120].decode(errors="ignore")


def unwritable(path: Path, error: OSError) -> OSError:
    advice = "free it, or choose another folder (MORLIB_OUTPUTS)"
    return OSError(f"cannot write {path.name} in {path.parent}: {error.strerror}; {advice}")
