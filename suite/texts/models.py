"""A model with its tokenizer in one file, so that another process can go on with a text."""

from __future__ import annotations

from pathlib import Path

import morlib

from .tokenizers import TOKENIZERS, Tokenizer

NOTES = ("tokenizer", "tokenizer_kind")  # the notes of morlib.save_model that hold the tokenizer


def save_model(
    model: morlib.Transformer, tokenizer: Tokenizer, path: str | Path, notes: dict[str, str] | None = None
) -> None:
    """Write a model and its tokenizer into one safetensors file, whole or not at all.

    notes: more text by name; `morlib.load_model` gives them back. Raises ValueError if model and tokenizer do
    not belong together, OSError if the file cannot be written.
    """
    check_together(model, tokenizer)
    if taken := [name for name in notes or {} if name in NOTES]:
        raise ValueError(f"the note {taken[0]!r} is the tokenizer's: give yours another name")
    path = Path(path).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    of_tokenizer = dict(tokenizer=tokenizer.to_text(), tokenizer_kind=tokenizer.kind)
    morlib.save_model(model, path, (notes or {}) | of_tokenizer)


def load_model(path: str | Path) -> tuple[morlib.Transformer, Tokenizer]:
    """The model and the tokenizer that `save_model` wrote. Runs no code.

    The model is on the CPU and in evaluation mode. Raises ValueError that names a file which is missing, cut,
    not ours, or without a tokenizer.
    """
    model, notes = morlib.load_model(path)
    name = Path(path).name
    if not isinstance(notes, dict) or not all(note in notes for note in NOTES):
        raise ValueError(
            f"{name} holds no tokenizer: read it with morlib.load_model, or write it with texts.save_model"
        )
    if notes["tokenizer_kind"] not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise ValueError(f"{name} has a tokenizer of the kind {notes['tokenizer_kind']!r}; known are {known}")
    try:
        tokenizer = TOKENIZERS[notes["tokenizer_kind"]].from_text(notes["tokenizer"])
        check_together(model, tokenizer)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} has a tokenizer that cannot be used ({error})") from None
    return model, tokenizer


def check_together(model: morlib.Transformer, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless model and tokenizer have the same tokens, as far as that is known."""
    if tokenizer.vocab_size != model.cfg.vocab_size:
        raise ValueError(
            f"the model has {model.cfg.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}: "
            "they do not belong together"
        )
    if model.vocabulary not in (None, tokenizer.identity):
        raise ValueError(
            f"the model reads {model.vocabulary}, the tokenizer is {tokenizer.identity}: "
            "they do not belong together"
        )
