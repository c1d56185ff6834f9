"""What notebook 04 says of the Bangla text and its tokenizers: measured on the text, or as it ships."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pandas as pd
import sentencepiece

from ..files import REFERENCE, outputs, write_whole
from ..runs import TEXTS, Settings
from ..texts import Corpus, load_corpus
from .bangla import code_points, conjuncts_whole, script_shares, segmentation, surfaces

FILE = "findings_bangla.json"  # `bangla_` would name a record of the experiment
VOCABULARIES = [1000, 4000, 16_000]  # the small presets have the first: many pieces train slowly
PIECE_NEEDS = 100  # characters of training text; a vocabulary that has fewer a piece is left out
# Words that may be written in several ways, with what is special about each
WORDS = {
    "vowel sign o in two parts": "ক\u09c7\u09be",
    "rra as one code point": "\u09dc",
    "ra, joiner, ya-phala": "র\u200d্যাব",
    "a visible hasanta (non-joiner)": "ক্\u200cষ",
}


def usual_rule() -> sentencepiece.SentencePieceNormalizer:
    """SentencePiece's usual normalisation, which the suite switches off."""
    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False
    )


def normalisations() -> pd.DataFrame:
    """The code points of WORDS as they are written, in NFC, and by SentencePiece's usual rule."""
    usual, rows = usual_rule(), {}
    for name, word in WORDS.items():
        rows[name] = {
            "written": code_points(word),
            "in NFC": code_points(unicodedata.normalize("NFC", word)),
            "by the usual rule": code_points(usual.normalize(word)),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("what")


def checked(s: Settings, vocabularies: list[int] | None) -> list[int]:
    """How many pieces the vocabularies that are compared have; None: what suits the preset.

    Raises ValueError if one of them is no size of a vocabulary.
    """
    if vocabularies is None:
        return VOCABULARIES[:1] if s.preset in ("smoke", "quick") else VOCABULARIES
    if not all(isinstance(size, int) and size > 256 for size in vocabularies):
        advice = f"sizes above 256 (so many pieces are bytes), not {vocabularies!r}"
        raise ValueError(f"vocabularies must be {advice}")
    return vocabularies


def load_vocabularies(s: Settings, vocabularies: list[int]) -> dict[str, Corpus]:
    """The Bangla text in characters, in the settings' pieces, and in each number of pieces that it bears.

    A vocabulary for which the text is too small is left out, and a note says so.
    """
    common = TEXTS["bangla"] | dict(max_chars=s.max_chars)
    corpora = {"characters": load_corpus(**common, tokenizer="char")}
    length = len(corpora["characters"].text["train"])
    for size in sorted({s.subwords, *vocabularies}):
        if length < PIECE_NEEDS * size and size != s.subwords:
            print(f"{size} pieces are left out: {length:,} characters of training text are too few for them")
        else:
            corpora[f"{size}-pieces"] = load_corpus(**common, subwords=size)
    return corpora


def measure(corpora: dict[str, Corpus]) -> dict:
    """The findings of a text that is read in several vocabularies."""
    corpus = list(corpora.values())[1]  # in pieces: brought to NFC
    heldout = corpus.text["heldout"]
    tokenizers = {name: c.tokenizer for name, c in corpora.items()}
    first = heldout.split("\n")[:40]
    line = max(first, key=len)[:70].rsplit(" ", 1)[0]  # the longest of the first, cut between words
    cut = {name: "·".join(surfaces(t, t.encode(line))) for name, t in tokenizers.items()}
    whole = conjuncts_whole({name: t for name, t in tokenizers.items() if name != "characters"}, heldout)
    return dict(
        text=describe(corpus),
        script=script_shares("".join(corpus.text.values())).to_dict(),
        segmentation={name: segmentation(t, heldout) for name, t in tokenizers.items()},
        line=cut,
        conjuncts=whole.to_dict(),
    )


def describe(corpus: Corpus) -> dict:
    """Size and script of a text, and what the usual normalisation would change in it."""
    whole = "".join(corpus.text.values())
    letters = [character for character in whole if not character.isspace()]
    usual = usual_rule()
    joined = {word for word in whole.split() if "\u200c" in word or "\u200d" in word}
    return dict(
        name=corpus.name,
        characters=len(letters),
        bangla_script=100 * sum("\u0980" <= c <= "\u09ff" for c in letters) / len(letters),
        pieces=corpus.vocab_size,
        tokens={part: len(ids) for part, ids in corpus.ids.items()},
        joiners=whole.count("\u200d"),
        non_joiners=whole.count("\u200c"),
        changed_words=sum(usual.normalize(word) != word for word in joined),
        in_nfc=whole == unicodedata.normalize("NFC", whole),
    )


def stored(path: Path = REFERENCE / FILE) -> dict:
    """The findings that ship: those of `measure`, and `samples` that a trained MoR wrote.

    Raises FileNotFoundError that says what to do if there are none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} does not ship with this copy: choose a preset that trains")
    return json.loads(path.read_text(encoding="utf-8"))


def save(found: dict, path: Path | None = None) -> Path:
    """Keep findings as a file, by default among the outputs."""
    return write_whole(path or outputs() / FILE, json.dumps(found, indent=1, ensure_ascii=False).encode())
