"""From text to token ids and back: characters, and SentencePiece pieces with byte fallback."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property

from suite import files

SPACE_SIGN = "\u2581"  # SentencePiece's own sign for a space
LINE_LENGTH = 100_000  # SentencePiece learns from lines; longer ones are cut


class Tokenizer:
    """What every tokenizer has: `kind`, `vocab_size`, `encode`, `decode`, and itself as text.

    One of your own: subclass it, give it a `kind` and these methods, and add it to TOKENIZERS.
    """

    kind: str
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError

    def to_text(self) -> str:
        """The whole tokenizer as text, from which `from_text` makes an equal one."""
        raise NotImplementedError

    @classmethod
    def from_text(cls, text: str) -> Tokenizer:
        """Raises ValueError if the text is not what `to_text` gives."""
        raise NotImplementedError

    @cached_property
    def identity(self) -> str:
        """12 hex digits; two tokenizers of one identity give the same ids."""
        return files.sha256(self.to_text().encode())[:12]


class CharTokenizer(Tokenizer):
    """One token a character, `stoi` and `itos` over the sorted set of a text's characters."""

    kind = "char"

    def __init__(self, text: str):
        self.itos = sorted(set(text))
        self.stoi = {character: i for i, character in enumerate(self.itos)}
        self.vocab_size = len(self.itos)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError that names the first character outside the vocabulary."""
        try:
            return [self.stoi[character] for character in text]
        except KeyError as error:
            unknown = error.args[0]
            raise ValueError(
                f"unknown character {unknown!r} (U+{ord(unknown):04X}) at position {text.index(unknown)}: "
                f"the vocabulary has {self.vocab_size} characters"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Raises ValueError that names an id outside the vocabulary."""
        return "".join(self.itos[i] for i in checked_ids(ids, self.vocab_size))

    def to_text(self) -> str:
        return json.dumps(self.itos)

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        characters = json.loads(text)
        is_list = isinstance(characters, list) and all(isinstance(c, str) and len(c) == 1 for c in characters)
        if not is_list or characters != sorted(set(characters)):
            raise ValueError("the characters of a vocabulary must be a sorted list without repeats")
        return cls("".join(characters))


class SubwordTokenizer(Tokenizer):
    """SentencePiece unigram with byte fallback: decode(encode(text)) is text in NFC, for any text.

    Lines are encoded one by one and joined by the newline byte. U+2581 is SentencePiece's own sign for a
    space, so a literal one goes through its three bytes.
    """

    kind = "sentencepiece"

    def __init__(self, text: str, vocab_size: int):
        """Learn the pieces from a text, or read them where they were learnt before (outputs/tokenizers).

        Raises ValueError if the text cannot give so many pieces, or if the file of pieces is damaged.
        """
        name = f"pieces-{files.sha256(text.encode())[:12]}-{vocab_size}.model"
        path = files.outputs() / "tokenizers" / name
        if not path.is_file():
            files.write_whole(path, learn_pieces(text, vocab_size))
        try:
            self._use(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"tokenizer model {path.name} is damaged ({error}): delete it, and it is learnt again"
            ) from None
        if self.vocab_size < vocab_size:
            print(
                f"note: the text bears {self.vocab_size} pieces, not {vocab_size}: "
                "the vocabulary is smaller than asked"
            )

    def _use(self, model: bytes) -> None:
        """Take over a SentencePiece model. Raises ValueError if it is none, or has no byte fallback."""
        import sentencepiece

        model = model or b"-"  # an empty one would pass for none
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise ValueError(str(error).splitlines()[0]) from None
        self.model = model
        self.vocab_size = self.pieces.get_piece_size()
        self.newline = [self.pieces.piece_to_id("<0x0A>")]
        self.space_sign = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        if not all(self.pieces.is_byte(i) for i in self.newline + self.space_sign):
            raise ValueError("its pieces hold no bytes to fall back on")

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for half a surrogate pair, which is no text."""
        if lone := re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"the text holds half a surrogate pair (U+{ord(lone[0]):04X} at position {lone.start()}): "
                "it was not read as UTF-8"
            )
        ids = []
        for part in re.split(f"(\n|{SPACE_SIGN})", unicodedata.normalize("NFC", text)):
            if part == "\n":
                ids += self.newline
            elif part == SPACE_SIGN:
                ids += self.space_sign
            else:
                ids += self.pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Raises ValueError that names an id outside the vocabulary."""
        return self.pieces.decode(checked_ids(ids, self.vocab_size))

    def to_text(self) -> str:
        return base64.b64encode(self.model).decode()

    @classmethod
    def from_text(cls, text: str) -> SubwordTokenizer:
        try:
            model = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the pieces are not in base64: {error}") from None
        tokenizer = cls.__new__(cls)  # not learnt from a text
        tokenizer._use(model)
        return tokenizer


TOKENIZERS: dict[str, type[Tokenizer]] = {"char": CharTokenizer, "sentencepiece": SubwordTokenizer}


def learn_pieces(text: str, vocab_size: int) -> bytes:
    """A SentencePiece unigram model with byte fallback. Raises ValueError if the text is too short for it."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short_lines(text),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            max_sentence_length=1_000_000,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"SentencePiece cannot learn {vocab_size} pieces from this text ({reason}); "
            "256 of them are bytes: ask for more pieces or give more text"
        ) from None
    return model.getvalue()


def _short_lines(text: str) -> Iterator[str]:
    for line in unicodedata.normalize("NFC", text).split("\n"):
        for start in range(0, len(line), LINE_LENGTH):
            yield line[start : start + LINE_LENGTH]


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as integers. Raises ValueError that names one without a token."""
    ids = [int(i) for i in ids]
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(f"token id {wrong[0]} is out of range: the vocabulary has ids 0 to {vocab_size - 1}")
    return ids
