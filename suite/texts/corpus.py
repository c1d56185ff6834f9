"""A text as a model reads it: in three parts, as token ids, in windows."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from morlib import Count, check_value
from suite import files

from .drawn import Drawn
from .ngrams import ngram_floor
from .sources import CORPORA, folder_name, read_files, text_files
from .tasks import made
from .tokenizers import CharTokenizer, SubwordTokenizer, Tokenizer

HELDOUT_SHARE = {"full": 0.1, "halves": 0.5, "90/10": 0.1}  # of the text, at its end
VALIDATION_SHARE = 0.05  # just before it
FEW_KINDS = 300  # with more kinds of tokens long n-grams are slow to count, and rarely seen twice


@dataclass(eq=False)
class Corpus:
    """A tokenized text in three parts by position.

    `train` is learnt from, settings are chosen on `val`, claims are made on `heldout`.
    """

    name: str
    split: str
    source: str  # where the text was found
    sha256: str  # of the text that was tokenized
    tokenizer: Tokenizer
    text: dict[str, str]
    ids: dict[str, Tensor]  # int64 [tokens]
    given_tokenizer: bool = False  # whether the vocabulary is another text's

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def vocabulary(self) -> str:
        """12 hex digits that say which tokens the ids stand for."""
        return self.tokenizer.identity

    def starts(self, part: str, length: int, most: int | None = None) -> Tensor:
        """Where the windows of a part start, int64 [n]: `length` apart, so that each token is predicted once.

        `most` takes fewer of them, spread evenly. A part that is shorter than a window is one window.
        Raises ValueError for an unknown part, or one of fewer than two tokens.
        """
        ids = self._part(part)
        if len(ids) < 2:
            raise ValueError(
                f"the {part} part of {self.name} has {len(ids)} tokens: too short to predict anything"
            )
        length = min(length, len(ids) - 1)
        starts = torch.arange(0, len(ids) - length, length)
        if most is not None and len(starts) > most:
            starts = starts[torch.linspace(0, len(starts) - 1, most).round().long()]
        return starts

    def windows(self, part: str, length: int, most: int | None = None) -> Tensor:
        """The windows int64 [n, length + 1] at the `starts` of a part, shorter if the part is."""
        starts = self.starts(part, length, most)
        ids = self.ids[part]
        return ids[starts[:, None] + torch.arange(min(length, len(ids) - 1) + 1)]

    def draw(self, windows: int, length: int, generator: torch.Generator) -> Tensor:
        """Random windows int64 [windows, length + 1] of the training part.

        Raises ValueError if the part is shorter than one window.
        """
        ids = self.ids["train"]
        if len(ids) < length + 1:
            raise ValueError(
                f"the training part of {self.name} has {len(ids)} tokens, a window needs {length + 1}: "
                "give more text or a smaller max_len"
            )
        starts = torch.randint(len(ids) - length, (windows,), generator=generator)
        return ids[starts[:, None] + torch.arange(length + 1)]

    def tokens_per_byte(self, part: str) -> float:
        """Turns nats a token into bits a byte. Raises ValueError for an unknown part."""
        return len(self._part(part)) / len(self.text[part].encode())

    @cached_property
    def floors(self) -> dict:
        """Of bigrams and trigrams: {"2": {"val": {"loss", "accuracy"}, "heldout": ...}, "3": ...}.

        With few kinds of tokens, as characters have, of 4-grams and 5-grams too. Loss in nats a token,
        accuracy in per cent, counted on the training part. Of a part that is shorter there are none.
        """
        shortest = min(len(self.ids[part]) for part in ("val", "heldout"))
        return {
            str(order): {
                part: ngram_floor(self.ids["train"], self.ids[part], order, self.vocab_size)
                for part in ("val", "heldout")
            }
            for order in ((2, 3, 4, 5) if self.vocab_size <= FEW_KINDS else (2, 3))
            if order <= shortest
        }

    def describe(self) -> dict:
        """What a record says of the text. It goes into a run's identity, but for `source`."""
        description = dict(
            name=self.name,
            sha256=self.sha256,
            split=self.split,
            source=self.source,
            tokenizer=self.tokenizer.kind,
            vocab_size=self.vocab_size,
            tokens={part: len(ids) for part, ids in self.ids.items()},
        )
        if self.given_tokenizer:  # else the text says which tokens there are
            description["vocabulary"] = self.vocabulary
        if type(self.tokenizer) not in (CharTokenizer, SubwordTokenizer):  # its code may be edited
            all_ids = torch.cat(list(self.ids.values()))
            description["ids"] = files.sha256(all_ids.numpy().tobytes())[:12]
        return description

    def _part(self, part: str) -> Tensor:
        if part not in self.ids:
            raise ValueError(f"part must be one of {', '.join(self.ids)}, not {part!r}")
        return self.ids[part]


def load_corpus(
    name: str | Path | Iterable,
    split: str = "full",
    tokenizer: str | Tokenizer | None = None,
    subwords: int = 4000,
    max_chars: int | None = None,
) -> Corpus | Drawn:
    """A corpus by name ("tinyshakespeare", "balcony", "bangla"), or from UTF-8 text files of your own.

    "hops-8-6" is the task of known depth with 8 symbols and up to 6 hops. It has a tokenizer of its own, and
    makes no use of a split or of sizes.

    name: a corpus, a file, a folder (all its *.txt, sorted), a glob pattern, or a list of files. Several
        texts are joined by a newline.
    split: "full" and "90/10" hold out the last tenth, "halves" the second half. The 5 % before it are for
        validation.
    tokenizer: "char" or "sentencepiece" (`subwords` pieces, learnt from the training part only), a tokenizer
        that there is already (another corpus', or a loaded model's), or None: what suits the name.
    max_chars: cut the text to this many characters.

    The same text, asked for in the same way, is tokenized once; an edited file is read again. Raises
    ValueError if the text is missing, empty, not UTF-8 or too short, if an argument is unknown, or if a given
    tokenizer lacks one of the text's characters.
    """
    if split not in HELDOUT_SHARE:
        raise ValueError(f"split must be one of {', '.join(HELDOUT_SHARE)}, not {split!r}")
    if not isinstance(tokenizer, Tokenizer) and tokenizer not in ("char", "sentencepiece", None):
        raise ValueError(f"tokenizer must be char or sentencepiece, or a tokenizer, not {tokenizer!r}")
    subwords = check_value("subwords", subwords, Count)
    max_chars = check_value("max_chars", max_chars, Count | None)
    if isinstance(name, str) and (task := made(name)):
        if tokenizer is not None:
            raise ValueError(f"{name} is a task: it takes no tokenizer")
        return task
    if isinstance(name, str) and name in CORPORA:
        known, folder = name, None
        paths = [path for filename in CORPORA[name].filenames for _, path in files.candidates(filename)]
    else:
        known, folder = None, folder_name(name)
        paths = text_files(name)
    return _load(known, folder, _versions(paths), split, tokenizer, subwords, max_chars)


def _versions(paths: list[Path]) -> tuple:
    """Each file with the time of its last change and its size: None where there is no file."""
    stats = [path.stat() if path.is_file() else None for path in paths]
    return tuple((path, stat and stat.st_mtime_ns, stat and stat.st_size) for path, stat in zip(paths, stats))


@lru_cache(maxsize=8)
def _load(
    known: str | None,
    folder: str | None,
    versions: tuple,
    split: str,
    tokenizer: str | Tokenizer | None,
    subwords: int,
    max_chars: int | None,
) -> Corpus:
    """The corpus of a known text, or of the files of which these are the versions."""
    if known:
        name, text, source = CORPORA[known].find()
    else:
        name, text, source = read_files([path for path, *_ in versions], folder)
    text = text[:max_chars]
    given = isinstance(tokenizer, Tokenizer)
    kind = tokenizer.kind if given else tokenizer or (CORPORA[known].tokenizer if known else "char")
    if kind == "sentencepiece":
        text = unicodedata.normalize("NFC", text)
    parts = _split(name, text, split)
    if not given:
        tokenizer = CharTokenizer(text) if kind == "char" else SubwordTokenizer(parts["train"], subwords)
    try:
        ids = {part: torch.tensor(tokenizer.encode(piece)) for part, piece in parts.items()}
    except ValueError as error:
        reader = "the given tokenizer" if given else kind
        raise ValueError(f"{name} cannot be read with {reader}: {error}") from None
    return Corpus(name, split, source, files.sha256(text.encode()), tokenizer, parts, ids, given)


def _split(name: str, text: str, split: str) -> dict[str, str]:
    """A text in three parts by position. Raises ValueError if one has fewer than two characters."""
    heldout = int(len(text) * (1 - HELDOUT_SHARE[split]))
    val = heldout - int(len(text) * VALIDATION_SHARE)
    parts = {"train": text[:val], "val": text[val:heldout], "heldout": text[heldout:]}
    if min(len(part) for part in parts.values()) < 2:
        raise ValueError(
            f"{name} has {len(text)} characters: "
            "too short to split into training, validation and held-out text"
        )
    return parts
