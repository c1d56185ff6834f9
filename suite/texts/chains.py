"""A second task of known depth: variables that are set to earlier variables, in chains.

A line defines its variables in turn: a token says what each is set to. In rows of four, `5712` sets a to d
to four numbers, `bdca` sets e to b, f to d, g to c and h to a, and so on: each row is set to variables of the
row before, drawn evenly. Then come questions: `?e7` says that e is 7. But for the mark, only answers can be
predicted. How many steps one takes: the assignments to follow, back to a number or to a variable whose value
the line has told.

It differs from hops: a question does not say how many steps it takes, what is followed ends by itself, and
since each variable stands behind what it is set to, the work can be done where it is defined, before anyone
asks.

Chains meet: some number is soon that of most variables, and saying it is a shortcut. So all tokens are
trained on, but skill is judged by the *hard* answers, those with another number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .drawn import SYMBOLS, Drawn
from .tokenizers import CharTokenizer

NUMBERS = "0123456789"


@dataclass(eq=False)
class Chains(Drawn):
    """Lines of so many `chains`, each of `deepest` assignments one behind another.

    Raises ValueError for fewer than two chains, or for more variables than there are letters.
    """

    chains: int = 4  # C
    deepest: int = 5  # K
    KINDS = ("table", "mark", "x", "answer")

    def __post_init__(self):
        most = len(NUMBERS)
        if not 2 <= self.chains <= most or self.deepest < 1 or self.m > len(SYMBOLS):
            wanted = f"2 to {most} chains and {len(SYMBOLS)} variables at most"
            raise ValueError(f"chains-C-K needs {wanted}, not {self.chains} and {self.deepest}")
        self.tokenizer = CharTokenizer("?" + NUMBERS + SYMBOLS[: self.m])
        firsts = dict(digit="0", mark="?", x="a")
        self.ids = {kind: self.tokenizer.stoi[first] for kind, first in firsts.items()}

    @property
    def m(self) -> int:
        """Variables."""
        return self.chains * self.deepest

    @property
    def name(self) -> str:
        return f"chains-{self.chains}-{self.deepest}"

    def numbers(self) -> range:
        return range(1, self.deepest + 1)

    def _lines(self, n: int, length: int, generator: torch.Generator, part: str) -> Tensor:
        m, C, K = self.m, self.chains, self.deepest
        digits = torch.rand(n, len(NUMBERS), generator=generator).argsort(1)[:, :C]
        draw = torch.randint(C, (n, K - 1, C), generator=generator)
        values, table = [self.ids["digit"] + digits], [self.ids["digit"] + digits]
        for row, chosen in enumerate(draw.unbind(1)):
            table.append(self.ids["x"] + C * row + chosen)
            values.append(values[-1].gather(1, chosen))
        x = torch.randint(m, (n, math.ceil((length + 1 - m) / 3)), generator=generator)
        mark, answer = torch.full_like(x, self.ids["mark"]), torch.cat(values, dim=1).gather(1, x)
        questions = torch.stack([mark, self.ids["x"] + x, answer], dim=-1).view(n, -1)
        return torch.cat([*table, questions], dim=1)[:, : length + 1]

    # ---- What the answers say ----

    def answers(self, lines: Tensor) -> dict[str, Tensor]:
        """Of lines [n, L + 1], each [n, A]: k, x, answer (0 to 9), and hard: the line has not told it before
        (else k is 0), and it is not the number that most variables have."""
        n, m, C, places = len(lines), self.m, self.chains, self.places(lines.shape[1] - 1)
        parent = (lines[:, :m] - self.ids["x"]).clamp(min=-1)  # -1: a number
        x, answer = lines[:, places] - self.ids["x"], lines[:, places + 1] - self.ids["digit"]
        told, rows, k = torch.zeros(n, m, dtype=torch.bool), torch.arange(n), torch.zeros_like(x)
        for a in range(x.shape[1]):
            at = x[:, a]
            for _ in range(self.deepest):
                follows = (at >= 0) & ~told[rows, at]
                k[:, a] += follows
                at = torch.where(follows, parent[rows, at], at)
            told[rows, x[:, a]] = True
        value = lines[:, :m] - self.ids["digit"]
        for i in range(C, m):
            value[:, i] = value[rows, parent[:, i]]
        most = value.mode(1, keepdim=True).values
        return dict(k=k, x=x, answer=answer, hard=(k > 0) & (answer != most))

    def least_loss(self, length: int) -> float:
        """The least loss (nats a token) of lines of this length: the entropy of what can't be predicted.

        The numbers of the first row are drawn without repeats, and the first of them is not predicted;
        assignments and x are drawn evenly; marks and answers cost nothing.
        """
        C, asked = self.chains, self.kinds(length + 1).count("x")
        numbers = sum(math.log(len(NUMBERS) - i) for i in range(1, C))
        assigned = C * (self.deepest - 1) * math.log(C)
        return (numbers + assigned + asked * math.log(self.m)) / length
