"""What counting alone achieves: n-gram models with Witten-Bell smoothing."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048  # histories whose distributions [CHUNK, V] are held at once


def ngram_floor(train_ids: Tensor, test_ids: Tensor, order: int, vocab_size: int) -> dict:
    """Mean loss (nats) and top-1 accuracy (%) of an n-gram model, counted on train_ids, on test_ids.

    Smoothed as in `ngram_surprisal`. The first order - 1 test tokens only give context.
    """
    surprisal, correct = ngram_surprisal(train_ids, test_ids, order, vocab_size)
    return dict(loss=float(surprisal.mean()), accuracy=float(100 * correct.mean()))


def ngram_surprisal(
    train_ids: Tensor, test_ids: Tensor, order: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """How an n-gram model predicts each test token but the first order - 1.

    Returns the surprisals (nats) and whether the token was the likeliest, both [n].

    The probability of word w after history h, with h' the history without its first token, is
    P_n(w|h) = (c(h,w) + d(h) P_{n-1}(w|h')) / (c(h) + d(h)). Here c counts the training text, and d(h) is the
    number of distinct words that followed h. Below unigrams all words are equally likely (Witten-Bell: Chen
    and Goodman 1998, TR-10-98, section 2.5).

    Raises ValueError if n-grams of this order do not fit into 63 bits.
    """
    windows = np.lib.stride_tricks.sliding_window_view(test_ids.numpy(), order)  # [n, order], the last is w
    histories, history_of = np.unique(windows[:, :-1], axis=0, return_inverse=True)
    history_of = history_of.reshape(-1)
    tables = [_count(train_ids.numpy(), n, vocab_size) for n in range(1, order + 1)]
    by_history = np.argsort(history_of, kind="stable")
    bounds = np.searchsorted(history_of[by_history], np.arange(len(histories) + 1))
    surprisal = np.empty(len(windows))
    correct = np.empty(len(windows), dtype=bool)
    for start in range(0, len(histories), CHUNK):
        chunk = histories[start : start + CHUNK]
        p = _distributions(chunk, tables, vocab_size)
        tokens = by_history[bounds[start] : bounds[start + len(chunk)]]
        rows = history_of[tokens] - start
        targets = windows[tokens, -1]
        surprisal[tokens] = -np.log(p[rows, targets])
        correct[tokens] = p.argmax(1)[rows] == targets
    return surprisal, correct


def context_numbers(ids: Tensor, order: int, vocab_size: int) -> Tensor:
    """A number [B, L] for the last `order` tokens at each place of ids [B, L]: alike where these are alike.

    It is the token + 1, plus the one before + 1 times V + 1, and so on; before the first stands 0.
    """
    ids, number = ids + 1, torch.zeros_like(ids)
    for back in range(order):
        number = number + F.pad(ids, (back, 0))[:, : ids.shape[1]] * (vocab_size + 1) ** back
    return number


def _count(train: np.ndarray, n: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct n-grams of the training text, sorted: key of the history, last word, count."""
    grams = np.lib.stride_tricks.sliding_window_view(train, n)
    keys, counts = np.unique(_as_key(grams, vocab_size), return_counts=True)
    return keys // vocab_size, keys % vocab_size, counts


def _distributions(histories: np.ndarray, tables: list, vocab_size: int) -> np.ndarray:
    """P(w|h) [histories, V], from the uniform distribution up to the longest n-grams."""
    p = np.full((len(histories), vocab_size), 1 / vocab_size)
    for n, (history_keys, words, counts) in enumerate(tables, 1):
        keys = _as_key(histories[:, histories.shape[1] - (n - 1) :], vocab_size)
        first = np.searchsorted(history_keys, keys)
        distinct = np.searchsorted(history_keys, keys, side="right") - first  # d(h)
        seen = distinct > 0
        rows = np.repeat(np.arange(len(histories)), distinct)
        within_row = np.arange(distinct.sum()) - np.repeat(distinct.cumsum() - distinct, distinct)
        entries = np.repeat(first, distinct) + within_row  # of the table, a row after the other
        total = np.bincount(rows, counts[entries], minlength=len(histories))  # c(h)
        p[seen] *= distinct[seen, None]
        p[rows, words[entries]] += counts[entries]
        p[seen] /= (total + distinct)[seen, None]
    return p


def _as_key(grams: np.ndarray, vocab_size: int) -> np.ndarray:
    """One integer an n-gram; V^n must stay under 2^63, which allows 10 characters or 5 pieces."""
    if grams.shape[1] * math.log2(vocab_size) >= 63:
        raise ValueError(
            f"an n-gram of {grams.shape[1]} tokens over {vocab_size} does not fit: use a lower order"
        )
    powers = vocab_size ** np.arange(grams.shape[1] - 1, -1, -1, dtype=np.int64)
    return grams.astype(np.int64) @ powers
