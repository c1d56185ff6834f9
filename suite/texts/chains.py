"""A second task of known depth: assignments modulo a prime, each to a function of an earlier variable.

A line defines its variables in turn, each by two tokens, a function and what it is applied to: `B3Fa` says
a = B(3) and b = F(a). Functions add or multiply by a constant modulo 5 (capital letters, the same in every
line): nobody is told what they do. Then come questions: `?b2` says that b is 2. Only answers can be
predicted. How hard one is: as many assignments as must be followed, back to a number or to a variable whose
value the line has already told.

It differs from hops: functions must be learnt by heart, nothing is asked for by number, and following two
assignments at once takes a function of a function, of which there are twenty. Like Mano (Allen-Zhu 2025,
Physics of Language Models, part 4.1) it is nested arithmetic modulo a prime; its terms have names, so that
parts are shared and each line asks many questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .drawn import SYMBOLS, Drawn
from .tokenizers import CharTokenizer

PRIME = 5
FUNCTIONS = [(1, c) for c in range(1, PRIME)] + [(c, 0) for c in range(2, PRIME)]  # v -> times * v + plus
DEEPER = 0.6  # share of the variables that lie one assignment deeper than all before them
KINDS = ("function", "argument", "mark", "x", "answer")  # of the token that is read


@dataclass(eq=False)
class Chains(Drawn):
    """Lines of `variables` assignments, at most `deepest` of them one behind another."""

    variables: int = 12  # m
    deepest: int = 6  # K

    def __post_init__(self):
        if not 2 <= self.variables <= len(SYMBOLS) or not 1 <= self.deepest <= self.variables:
            most = f"2 to {len(SYMBOLS)} variables and 1 to as many steps"
            raise ValueError(f"chains-M-K needs {most}, not {self.variables} and {self.deepest}")
        digits, names = "0123456789"[:PRIME], "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(FUNCTIONS)]
        self.tokenizer = CharTokenizer("?" + digits + names + SYMBOLS[: self.variables])
        firsts = dict(digit="0", mark="?", function="A", x="a")
        self.ids = {kind: self.tokenizer.stoi[first] for kind, first in firsts.items()}
        v = torch.arange(PRIME)
        self.values = torch.stack([(times * v + plus) % PRIME for times, plus in FUNCTIONS])  # [F, 5]

    @property
    def name(self) -> str:
        return f"chains-{self.variables}-{self.deepest}"

    def numbers(self) -> range:
        return range(1, self.deepest + 1)

    def _lines(self, n: int, length: int, generator: torch.Generator, part: str) -> Tensor:
        m = self.variables
        if length < 2 * m + 3:
            raise ValueError(
                f"{self.name} needs a max_len of {2 * m + 3} or more, not {length}: no answer fits"
            )
        function, argument, value = self._assignments(n, generator)
        x = torch.randint(m, (n, math.ceil((length + 1 - 2 * m) / 3)), generator=generator)
        table = torch.stack([self.ids["function"] + function, argument], dim=-1).view(n, -1)
        mark, answer = torch.full_like(x, self.ids["mark"]), self.ids["digit"] + value.gather(1, x)
        questions = torch.stack([mark, self.ids["x"] + x, answer], dim=-1).view(n, -1)
        return torch.cat([table, questions], dim=1)[:, : length + 1]

    def _assignments(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Each [n, m]: the function, the argument's token id, and the value of each variable."""
        m, rows = self.variables, torch.arange(n)
        function = torch.randint(len(FUNCTIONS), (n, m), generator=generator)
        digit = torch.randint(PRIME, (n, m), generator=generator)
        deeper, height_draw = torch.rand(2, n, m, generator=generator).unbind()
        parent_draw = torch.rand(n, m, m, generator=generator)
        height, value = torch.zeros(n, m, dtype=torch.long), torch.zeros(n, m, dtype=torch.long)
        argument = self.ids["digit"] + digit
        for i in range(m):
            most = (height.max(1).values + 1).clamp(max=self.deepest)
            height[:, i] = torch.where(deeper[:, i] < DEEPER, most, 1 + (height_draw[:, i] * most).long())
            one_less = height == height[:, i, None] - 1  # it is a function of one of these, of a number at 1
            parent = torch.where(one_less, parent_draw[:, i], -1.0).argmax(1)
            named = height[:, i] > 1
            argument[:, i] = torch.where(named, self.ids["x"] + parent, argument[:, i])
            value[:, i] = self.values[function[:, i], torch.where(named, value[rows, parent], digit[:, i])]
        return function, argument, value

    # ---- What the answers say ----

    def kinds(self, length: int) -> list[str]:
        table = 2 * self.variables
        return [KINDS[t % 2] if t < table else KINDS[2 + (t - table) % 3] for t in range(length)]

    def places(self, length: int) -> Tensor:
        return torch.arange(2 * self.variables + 1, length, 3)

    def answers(self, lines: Tensor) -> dict[str, Tensor]:
        """Of lines [n, L + 1], each [n, A]: k, x, answer (0 to 4), and hard: whether k is above 0, for else
        the line has told this answer before."""
        n, m, places = len(lines), self.variables, self.places(lines.shape[1] - 1)
        parent = (lines[:, 1 : 2 * m : 2] - self.ids["x"]).clamp(min=-1)  # -1: a number
        x, answer = lines[:, places] - self.ids["x"], lines[:, places + 1] - self.ids["digit"]
        told, rows, k = torch.zeros(n, m, dtype=torch.bool), torch.arange(n), torch.zeros_like(x)
        for a in range(x.shape[1]):
            at = x[:, a]
            for _ in range(self.deepest):
                follows = (at >= 0) & ~told[rows, at]
                k[:, a] += follows
                at = torch.where(follows, parent[rows, at], at)
            told[rows, x[:, a]] = True
        return dict(k=k, x=x, answer=answer, hard=k > 0)
