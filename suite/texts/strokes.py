"""Hops whose number is written in strokes, so that more can be asked for than a model was trained on.

A line is the table of a random permutation f of m symbols, as for hops-M-K. A question is a symbol, a stroke
for each hop, a mark and the answer: `a|||~b` says that three hops from a lead to b. There is no most number
of strokes but the length of a line: a model that is trained on strokes-8-6 can be asked by strokes-8-12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .drawn import SYMBOLS, Drawn
from .known_depth import Hops, hop
from .tokenizers import CharTokenizer


@dataclass(eq=False)
class Strokes(Drawn):
    """Lines drawn without end from a seed. Tables are shared out among the parts as those of `Hops`."""

    symbols: int = 8  # m
    hops: int = 6  # K: the most that is asked for

    def __post_init__(self):
        if not 4 <= self.symbols <= len(SYMBOLS) or not 1 <= self.hops:
            most = f"4 to {len(SYMBOLS)} symbols and 1 hop or more"
            raise ValueError(f"strokes-M-K needs {most}, not {self.symbols} and {self.hops}")
        self.tokenizer = CharTokenizer(SYMBOLS[: self.symbols] + "|~")
        self.ids = {mark: self.tokenizer.stoi[mark] for mark in "|~"}
        self.tables = Hops(self.symbols, 1)

    @property
    def name(self) -> str:
        return f"strokes-{self.symbols}-{self.hops}"

    def numbers(self) -> range:
        return range(1, self.hops + 1)

    def _lines(self, n: int, length: int, generator: torch.Generator, part: str) -> Tensor:
        m, K = self.symbols, self.hops
        if length < m + K + 3:
            raise ValueError(f"{self.name} needs a max_len of {m + K + 3} or more, not {length}")
        table = self.tables._tables(n, generator, part)
        questions = math.ceil((length + 1 - m) / 4)
        k = torch.randint(1, K + 1, (n, questions), generator=generator)
        x = torch.randint(m, (n, questions), generator=generator)
        answer = hop(table, x, k)
        end = (k + 3).cumsum(1)  # [n, Q] where each question ends, counted from the table's end
        place = torch.arange(length + 1 - m).expand(n, -1).contiguous()  # [n, P]
        which = torch.searchsorted(end, place, right=True)
        k, x, answer, end = (of.gather(1, which) for of in (k, x, answer, end))
        left = end - place  # tokens to the end of the question, the answer is the last
        token = torch.where(left == 1, answer, torch.where(left == 2, self.ids["~"], self.ids["|"]))
        token = torch.where(left == k + 3, x, token)
        return torch.cat([table, token], dim=1)

    # ---- What the answers say ----

    def kinds(self, length: int) -> list[str]:
        return ["table" if t < self.symbols else "question" for t in range(length)]

    def places(self, length: int) -> Tensor:
        """All, for questions have no fixed places: where no answer is predicted, k is 0."""
        return torch.arange(length)

    def answers(self, lines: Tensor) -> dict[str, Tensor]:
        """Of lines [n, L + 1], each [n, L]: k (0 where no answer is predicted), and whether it is hard: on a
        cycle of at least all symbols but one, to a question that the line has not answered before, and
        neither x nor f(x) would do."""
        m, L = self.symbols, lines.shape[1] - 1
        asked = lines[:, :L] == self.ids["~"]
        place = torch.arange(L).expand(len(lines), -1)
        strokes = lines[:, :L] == self.ids["|"]
        before = torch.where(strokes, -1, place).cummax(1).values  # the last place that is no stroke
        k = torch.where(asked, place - 1 - before.roll(1, 1), 0)
        x = lines.gather(1, (place - 1 - k).clamp(min=0)).clamp(max=m - 1)
        table, at, cycle = lines[:, :m], x, torch.zeros_like(x)
        for i in range(1, m + 1):
            at = table.gather(1, at)
            cycle = torch.where((at == x) & (cycle == 0), i, cycle)
        further = k % cycle
        question = torch.where(asked, further * m + x, -1)
        told = (question[:, :, None] == question[:, None, :]) & torch.ones(L, L, dtype=torch.bool).tril(-1)
        hard = asked & (cycle >= m - 1) & (further > (k > 1)) & ~told.any(-1)
        return dict(k=k, x=x, answer=lines[:, 1:], hard=hard)
