"""Bangla writing, and what a tokenizer does with it: kinds of tokens, conjuncts, segmentation."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import numpy as np
import pandas as pd

HASANTA = "\u09cd"
CONSONANT = "[\u0995-\u09b9\u09ce\u09dc-\u09df]\u09bc?"
CONJUNCT = re.compile(f"{CONSONANT}(?:\u200d?{HASANTA}\u200d?{CONSONANT})+")  # consonants drawn as one sign
VOWEL_SIGN = re.compile("[\u09be-\u09c4\u09c7\u09c8\u09cb\u09cc\u09d7]")
VOWEL_LETTERS = "A AA I II U UU E AI O AU".split()  # as their Unicode names end
EXAMPLES = {
    "consonant": "ক খ",
    "vowel sign": "কা কি",
    "hasanta": "ক্",
    "vowel letter": "অ আ",
    "other sign": "কং কঁ",
    "digit": "১ ২",
    "danda": "।",
    "Latin": "a b",
    "joiner": "র‍্য",
    "other": "( - ,",
}


# ---- Tokens: their text and their kind ----


def surfaces(tokenizer, ids) -> list[str]:
    """The text of each token. A piece that is a byte stays <0xNN>, but for the newline."""
    if tokenizer.kind == "char":
        return [tokenizer.itos[int(i)] for i in ids]
    newline, pieces = tokenizer.newline[0], tokenizer.pieces
    return ["\n" if int(i) == newline else pieces.id_to_piece(int(i)).replace("\u2581", " ") for i in ids]


def is_byte(tokenizer, token: str) -> bool:
    """Whether the text of a token stands for a byte, not for characters."""
    return tokenizer.kind != "char" and token.startswith("<0x")


def kinds(tokenizer, ids) -> tuple[np.ndarray, np.ndarray]:
    """The kind of each token [n], and its place in its word [n] (0: it begins one, or belongs to none).

    Characters are capital, letter, digit, punctuation, space or newline. Of the pieces of a word, one
    with a hasanta is a conjunct wherever it stands; of the others the first is word-initial, the last a
    suffix, and what lies between a continuation.
    """
    texts = surfaces(tokenizer, ids)
    wordy = in_words(tokenizer, texts)
    n = len(texts)
    begins = [wordy[i] and (i == 0 or not wordy[i - 1] or texts[i][0] == " ") for i in range(n)]
    ends = [i + 1 == n or begins[i + 1] or not wordy[i + 1] for i in range(n)]
    place = np.zeros(n, dtype=int)
    for i in range(n):
        if wordy[i] and not begins[i]:
            place[i] = place[i - 1] + 1
    found = [kind_of(tokenizer, texts[i], wordy[i], begins[i], ends[i]) for i in range(n)]
    return np.array(found), place


def in_words(tokenizer, texts: list[str]) -> list[bool]:
    """Whether each token is part of a word: it has a letter, or is an apostrophe between letters."""
    bare = [text.strip(" ") for text in texts]
    lettered = [not t.startswith("<0x") and any(unicodedata.category(c)[0] in "LM" for c in t) for t in bare]
    if tokenizer.kind != "char":
        return lettered
    inner = range(1, len(bare) - 1)
    joined = {i for i in inner if bare[i] in ("'", "\u2019") and lettered[i - 1] and lettered[i + 1]}
    return [has or i in joined for i, has in enumerate(lettered)]


def kind_of(tokenizer, text: str, wordy: bool, begins: bool, ends: bool) -> str:
    """The kind of one token; see `kinds`."""
    core, char = text.strip(" "), tokenizer.kind == "char"
    if text == "\n":
        return "newline"
    if not core:
        return "space"
    if is_byte(tokenizer, core):
        return "byte"
    if not wordy or (char and not core.isalpha()):
        return kind_of_sign(core)
    if char:
        return "capital" if core.isupper() else "letter"
    if HASANTA in core:
        return "conjunct"
    return "word-initial" if begins else "suffix" if ends else "continuation"


def kind_of_sign(core: str) -> str:
    """The kind of a token that is no part of a word."""
    categories = {unicodedata.category(c)[0] for c in core}
    if "N" in categories:
        return "digit"
    if set(core) & set("\u0964\u0965"):
        return "danda"
    return "sign" if "M" in categories else "punctuation"


# ---- Characters ----


def character_class(character: str) -> str | None:
    """What a character is in Bangla writing, a key of EXAMPLES; None for white space."""
    if character.isspace():
        return None
    name = unicodedata.name(character, "")
    if not name.startswith("BENGALI"):
        if character in "\u0964\u0965":
            return "danda"
        if character in "\u200c\u200d":
            return "joiner"
        return "Latin" if name.startswith("LATIN") else "other"
    if "VOWEL SIGN" in name or "AU LENGTH" in name:
        return "vowel sign"
    if "VIRAMA" in name:
        return "hasanta"
    if "DIGIT" in name or "NUMERATOR" in name:
        return "digit"
    if "SIGN" in name:
        return "other sign"
    return "vowel letter" if name.split()[-1] in VOWEL_LETTERS or "VOCALIC" in name else "consonant"


def script_shares(text: str) -> pd.Series:
    """The share (%) of each class of characters in a text, white space left out, from rare to frequent."""
    counts = Counter()
    for character, n in Counter(text).items():
        if kind := character_class(character):
            counts[kind] += n
    return (100 * pd.Series(counts, dtype=float) / counts.total()).sort_values(kind="stable")


def code_points(word: str) -> str:
    """The code points of a word, as Unicode writes them: 0995 09CD 09B7."""
    return " ".join(f"{ord(character):04X}" for character in word)


# ---- Segmentation: where a tokenizer cuts ----


def cuts(tokenizer, text: str) -> set[int]:
    """The places in an NFC text at which one token ends and the next begins."""
    ends, at, held = set(), 0, b""
    for token in surfaces(tokenizer, tokenizer.encode(text)):
        if is_byte(tokenizer, token):
            held += bytes([int(token[3:5], 16)])
            token = held.decode(errors="ignore")  # empty until a character is complete
            held = b"" if token else held
        at += len(token)
        ends.add(at)
    return ends


def is_whole(conjunct: re.Match, ends: set[int]) -> bool:
    """Whether no token ends inside a conjunct."""
    return not ends & set(range(conjunct.start() + 1, conjunct.end()))


def share(hits) -> float:
    """Which part of some truth values is true (%); 0 if there are none."""
    hits = list(hits)
    return 100 * sum(hits) / max(len(hits), 1)


def segmentation(tokenizer, text: str) -> dict[str, float]:
    """How a tokenizer cuts an NFC text: fertility (tokens a word), bytes a token, tokens that are single
    bytes (%), conjuncts that stay whole (%), and vowel signs that are cut off their letter (%)."""
    tokens, ends = surfaces(tokenizer, tokenizer.encode(text)), cuts(tokenizer, text)
    return {
        "tokens": tokenizer.vocab_size,
        "fertility (tokens a word)": sum(t != "\n" for t in tokens) / len(text.split()),
        "bytes a token": len(text.encode()) / len(tokens),
        "byte tokens (%)": share(is_byte(tokenizer, t) for t in tokens),
        "conjuncts whole (%)": share(is_whole(m, ends) for m in CONJUNCT.finditer(text)),
        "vowel signs cut off (%)": share(m.start() in ends for m in VOWEL_SIGN.finditer(text)),
    }


def conjuncts_whole(tokenizers: dict, text: str) -> pd.DataFrame:
    """How often (%) each tokenizer (a column) keeps the 14 most frequent conjuncts (the rows) whole."""
    matches = list(CONJUNCT.finditer(text))
    frequent = [conjunct for conjunct, _ in Counter(m.group() for m in matches).most_common(14)]
    table = pd.DataFrame(index=frequent, columns=list(tokenizers), dtype=float)
    for name, tokenizer in tokenizers.items():
        ends = cuts(tokenizer, text)
        for conjunct in frequent:
            same = [m for m in matches if m.group() == conjunct]
            table.loc[conjunct, name] = share(is_whole(m, ends) for m in same)
    return table
