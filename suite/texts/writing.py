"""Text in, text out: a model goes on with a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor

import morlib

from .models import check_together
from .tokenizers import Tokenizer

ABOVE_ZERO_TO_ONE = Annotated[float, morlib.TINY, 1]
INCOMPLETE = "\ufffd"  # what the first bytes of a character are read as


def write(
    model: morlib.Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    n: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    use_cache: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] | None = None,
    stream: bool = False,
) -> str | list[str]:
    """The prompt and up to n further tokens of text; of a list of prompts a list, each as if it stood alone.

    temperature: 0 takes the likeliest token, above it samples; one seed gives one text.
    top_k: sample among so many of the likeliest tokens only.
    top_p: sample among the likeliest tokens that together have this probability (Holtzman et al. 2020).
    stop: end before the first of these strings that the continuation holds.
    stream: print the text as it comes.

    Of a prompt that is longer than the model's context the last part is read, and a note says so. Raises
    ValueError for an empty prompt or stop string, for one with characters that the tokenizer does not have,
    for a value out of range, or for a tokenizer that is not the model's.
    """
    check_together(model, tokenizer)
    _check(n, temperature, seed, top_k, top_p)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    stop = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(each, str) and each for each in stop):
        raise ValueError(f"a stop string must be text and not empty, not {stop!r}")
    encoded = [_encode(tokenizer, each) for each in prompts]
    longest = max(map(len, encoded), default=0)
    if longest > model.cfg.max_len:
        print(f"note: the model reads the last {model.cfg.max_len} of the prompt's {longest} tokens")
    written = []
    for text, ids in zip(prompts, encoded):
        generator = torch.Generator().manual_seed(int(seed))
        tokens = sample(model, ids, n, temperature, generator, use_cache, top_k, top_p)
        written.append(_collect(tokenizer, tokens, text, stop, stream))
    return written[0] if isinstance(prompt, str) else written


def sample(
    model: morlib.Transformer,
    ids: list[int],
    n: int,
    temperature: float,
    generator: torch.Generator,
    use_cache: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[int]:
    """n token ids that go on from `ids`, one at a time; without top_k and top_p those of `morlib.generate`.

    Of more ids than the context holds the last are read. When the context is full, its older half is dropped.
    """
    most = model.cfg.max_len
    device = next(model.parameters()).device
    was_training = model.training
    context = ids[-most:]
    cache, fresh = morlib.Cache(), context  # fresh: what the cache has not seen
    model.eval()
    try:
        for _ in range(n):
            if len(context) > most:
                context = context[-max(most // 2, 1) :]
                cache, fresh = morlib.Cache(), context
            with torch.inference_mode():
                read = torch.tensor([fresh if use_cache else context], device=device)
                logits = model(read, cache if use_cache else None).logits[0, -1]
                token = choose(logits, temperature, generator, top_k, top_p)
            fresh = [token]
            context = context + fresh
            yield token
    finally:
        model.train(was_training)


def choose(
    logits: Tensor, temperature: float, generator: torch.Generator, top_k: int | None, top_p: float | None
) -> int:
    """The next token from logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    p = logits.softmax(-1)
    if top_p is not None:
        likeliest, order = p.sort(descending=True, stable=True)
        before = likeliest.cumsum(0) - likeliest  # the probability of all likelier tokens
        p = p.index_fill(0, order[before >= top_p], 0.0)
    return int(torch.multinomial(p.to(generator.device), 1, generator=generator))


def _check(n: int, temperature: float, seed: int, top_k: int | None, top_p: float | None) -> None:
    for name, value, hint in (
        ("n", n, morlib.Whole),
        ("seed", seed, Annotated[int, -(2**63), 2**63 - 1]),  # torch's range
        ("temperature", temperature, morlib.NotNegative),
        ("top_k", top_k, morlib.Count | None),
        ("top_p", top_p, ABOVE_ZERO_TO_ONE | None),
    ):
        morlib.check_value(name, value, hint)


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be text, not {type(prompt).__name__}")
    if not prompt:
        raise ValueError("the prompt is empty: give the model at least a character to go on from")
    return tokenizer.encode(prompt)


def _collect(tokenizer: Tokenizer, tokens: Iterator[int], prompt: str, stop: list[str], stream: bool) -> str:
    """The prompt and the text of the tokens up to a stop string, printed as it comes if asked for."""
    ids = []
    text = ""  # of the continuation
    shown = 0  # characters of it that are printed
    held_back = max(map(len, stop), default=1) - 1  # they could begin a stop string
    if stream:
        print(prompt, end="", flush=True)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        ends = [text.index(each) for each in stop if each in text]
        if ends:
            text = text[: min(ends)]
            break
        ready = len(text.rstrip(INCOMPLETE)) - held_back
        if stream and ready > shown:
            print(text[shown:ready], end="", flush=True)
            shown = ready
    if stream:
        print(text[shown:], flush=True)
    return prompt + text
