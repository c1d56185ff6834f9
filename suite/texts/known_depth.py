"""A task of known depth: hops on a permutation that stands in the context.

A line is the table of a random permutation f of m symbols, then questions: a number k, a symbol x, and the
answer f^k(x). With 8 symbols and up to 6 hops, `cadbhgef` says that f(a) = c, f(b) = a, ...; `3ab` asks for
three hops from a. Only answers can be predicted, and k says how hard they are: a small version of *Depo*
(Allen-Zhu 2025, Physics of Language Models, part 4.1).

Random permutations have short cycles, on which f^k(x) is often x or f(x). Those answers are easy, and a model
learns from them first. So all tokens are trained on, but skill is judged by the *hard* answers: those on a
cycle longer than the most hops, to a question that the line has not answered before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .drawn import SYMBOLS, Drawn
from .tokenizers import CharTokenizer

KINDS = ("table", "k", "x", "answer")  # of the token that is read
NUMBERS = "123456789"


@dataclass(eq=False)
class Hops(Drawn):
    """Lines drawn without end from a seed: a corpus like any other, without bytes.

    A tenth of all tables is for held-out lines, a tenth for validation, and the others are for training: no
    table that a model is judged on was ever trained on.
    Raises ValueError for fewer than four symbols, or for more symbols or hops than have a letter or a digit.
    """

    symbols: int = 8  # m
    hops: int = 6  # K: the most that is asked for
    length: int = 64  # of the lines that floors and sizes are given for
    KINDS = KINDS

    def __post_init__(self):
        if not 4 <= self.symbols <= len(SYMBOLS) or not 1 <= self.hops <= len(NUMBERS):
            most = f"4 to {len(SYMBOLS)} symbols and 1 to {len(NUMBERS)} hops"
            raise ValueError(f"hops-M-K needs {most}, not {self.symbols} and {self.hops}")
        self.tokenizer = CharTokenizer(NUMBERS[: self.hops] + SYMBOLS[: self.symbols])

    @property
    def m(self) -> int:
        return self.symbols

    @property
    def name(self) -> str:
        return f"hops-{self.symbols}-{self.hops}"

    def _lines(self, n: int, length: int, generator: torch.Generator, part: str) -> Tensor:
        m, K = self.symbols, self.hops
        table = self._tables(n, generator, part)
        questions = math.ceil((length + 1 - m) / 3)
        k = torch.randint(1, K + 1, (n, questions), generator=generator)
        x = torch.randint(m, (n, questions), generator=generator)
        answer = hop(table, x, k)
        triples = torch.stack([k - 1, K + x, K + answer], dim=-1).view(n, -1)
        return torch.cat([K + table, triples], dim=1)[:, : length + 1]

    def _tables(self, n: int, generator: torch.Generator, part: str) -> Tensor:
        """Random permutations [n, m] of those that are the part's."""
        found, left = [], n
        while left > 0:
            tables = torch.rand(2 * left + 64, self.symbols, generator=generator).argsort(1)
            tenth = hashed(tables) % 10
            own = {"heldout": tenth == 0, "val": tenth == 1, "train": tenth > 1}[part]
            found.append(tables[own][:left])
            left -= len(found[-1])
        return torch.cat(found)

    # ---- What the answers say ----

    def answers(self, lines: Tensor) -> dict[str, Tensor]:
        """Of lines [n, L + 1], each [n, A]: k, x and answer (as symbols from 0), and whether it is hard."""
        m, K, places = self.symbols, self.hops, self.places(lines.shape[1] - 1)
        k, x, answer = lines[:, places - 1] + 1, lines[:, places] - K, lines[:, places + 1] - K
        table = lines[:, :m] - K
        long = ~returns(table, x, K)
        question = k * m + x
        same = question[:, :, None] == question[:, None, :]  # [n, A, A]
        before = torch.ones(len(places), len(places), dtype=torch.bool).tril(-1)
        return dict(k=k, x=x, answer=answer, hard=long & ~(same & before).any(-1))

    def shortcuts(self, lines: Tensor) -> dict[str, dict[int, dict[str, float]]]:
        """What needs no hops, in per cent of hard and of all answers, by k.

        guess: any symbol; x: answering x; f(x): one hop whatever k is; copy: the answer of the last triple of
        the line with the same x, else x.
        """
        asked = self.answers(lines)
        table, x = lines[:, : self.symbols] - self.hops, asked["x"]
        copied = x.clone()
        for a in range(1, x.shape[1]):
            for b in range(a):  # a later triple overrules an earlier one
                copied[:, a] = torch.where(x[:, b] == x[:, a], asked["answer"][:, b], copied[:, a])
        tried = {"x": x, "f(x)": table.gather(1, x), "copy": copied}
        found = {"guess": {k: dict(hard=100 / self.symbols, all=100 / self.symbols) for k in self.numbers()}}
        for name, guess in tried.items():
            right = (guess == asked["answer"]).double()
            found[name] = {}
            for k in self.numbers():
                every = asked["k"] == k
                hard = every & asked["hard"]
                found[name][k] = {
                    "hard": 100 * right[hard].mean().item(),
                    "all": 100 * right[every].mean().item(),
                }
        return found

    def numbers(self) -> range:
        return range(1, self.hops + 1)

    def least_loss(self, length: int) -> float:
        """The least loss (nats a token) of lines of this length: the entropy of what can't be predicted.

        Table symbols after the first, numbers and x are drawn evenly; answers cost nothing. It leaves aside
        that a part's tables are a share of all.
        """
        entropy = {"table": 0.0, "k": math.log(self.hops), "x": math.log(self.symbols), "answer": 0.0}
        predicted = self.kinds(length + 1)[1:]
        return (math.lgamma(self.symbols) + sum(entropy[kind] for kind in predicted)) / length


def hashed(tables: Tensor) -> Tensor:
    """A number of 44 bits for each table [n, m]: equal for equal ones, else as good as random."""
    number = torch.zeros(len(tables), dtype=torch.long)
    for column in tables.unbind(1):
        number = (number + column + 1) * 6364136223846793005  # Knuth's multiplier, modulo 2^64
        number = number ^ (number >> 29)
    return (number >> 20) & (2**44 - 1)


def returns(table: Tensor, x: Tensor, hops: int) -> Tensor:
    """Whether so many hops or fewer lead from x [n, A] back to it, by tables [n, m]."""
    at, found = x, torch.zeros_like(x, dtype=torch.bool)
    for _ in range(hops):
        at = table.gather(1, at)
        found |= at == x
    return found


def hop(table: Tensor, x: Tensor, k: Tensor) -> Tensor:
    """f^k(x) for tables of f [n, m], and x and k [n, A]."""
    answer = x
    for i in range(int(k.max())):
        answer = torch.where(k > i, table.gather(1, answer), answer)
    return answer
