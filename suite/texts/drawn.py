"""Tasks of known depth: corpora whose lines are drawn without end from a seed."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from suite import files

from .ngrams import ngram_surprisal
from .tokenizers import CharTokenizer

SEEDS = {"train": 10**12, "val": 10**12 + 1, "heldout": 10**12 + 2}  # that no training takes
WINDOWS = {"train": 2000, "val": 500, "heldout": 2000}
SYMBOLS = "abcdefghijklmnopqrstuvwxyz"


class Drawn:
    """A corpus like any other, without bytes. A task says how lines are drawn and how hard its answers are.

    A line is a table of m tokens, then questions of three tokens: at the second the answer is predicted.
    A task has a `name`, a `tokenizer`, `m`, KINDS, `_lines` (n lines of a part), and `answers` (how hard each
    is).
    """

    split = "full"
    source = "drawn from a seed"
    length = 64  # of the lines that floors and sizes are given for
    name: str
    tokenizer: CharTokenizer
    m: int  # tokens of the table
    KINDS: tuple[str, ...]  # of the token that is read: in the table, and the three of a question

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def vocabulary(self) -> str:
        return self.tokenizer.identity

    def draw(self, windows: int, length: int, generator: torch.Generator) -> Tensor:
        """Random training lines int64 [windows, length + 1]. Raises ValueError if a line is too short."""
        return self._long_enough(windows, length, generator, "train")

    def windows(self, part: str, length: int, most: int | None = None) -> Tensor:
        """The lines int64 [n, length + 1] of a part; those of "train" are some that training may draw.

        Raises ValueError if there is no such part, or if a line is too short.
        """
        if part not in WINDOWS:
            raise ValueError(f"part must be one of {', '.join(WINDOWS)}, not {part!r}")
        generator = torch.Generator().manual_seed(SEEDS[part])
        return self._long_enough(WINDOWS[part], length, generator, part)[:most]

    def _long_enough(self, n: int, length: int, generator: torch.Generator, part: str) -> Tensor:
        if length < (least := self.m + 3):
            raise ValueError(f"{self.name} needs a max_len of {least} or more, not {length}: no answer fits")
        return self._lines(n, length, generator, part)

    def _lines(self, n: int, length: int, generator: torch.Generator, part: str) -> Tensor:
        raise NotImplementedError

    @cached_property
    def floors(self) -> dict:
        """Of bigrams and trigrams, as `Corpus.floors`: they see neither the table nor the question whole.

        Counted on the "train" lines. A line's first token is not counted, for no model predicts it.
        """
        return {
            str(order): {part: self._floor(part, order) for part in ("val", "heldout")} for order in (2, 3)
        }

    def _floor(self, part: str, order: int) -> dict[str, float]:
        train, lines = self.windows("train", self.length).flatten(), self.windows(part, self.length)
        text = torch.cat([lines[-1, 1 - order :], lines.flatten()])  # something before the first line
        found = ngram_surprisal(train, text, order, self.vocab_size)
        surprisal, correct = (values.reshape(lines.shape)[:, 1:] for values in found)
        return dict(loss=float(surprisal.mean()), accuracy=float(100 * correct.mean()))

    @cached_property
    def sha256(self) -> str:
        """Of the held-out lines."""
        return files.sha256(self.windows("heldout", self.length).numpy().tobytes())

    def describe(self) -> dict:
        """What a record says of the task."""
        sizes = {part: n * self.length for part, n in WINDOWS.items()} | dict(train="drawn without end")
        return dict(
            name=self.name,
            sha256=self.sha256,
            split=self.split,
            source=self.source,
            tokenizer="symbols",
            vocab_size=self.vocab_size,
            tokens=sizes,
        )

    # ---- What the answers say ----

    def kinds(self, length: int) -> list[str]:
        """The kind of the token that is read at each place of a line."""
        table, *question = self.KINDS
        return [table if t < self.m else question[(t - self.m) % 3] for t in range(length)]

    def places(self, length: int) -> Tensor:
        """Where an x is read, and so an answer is predicted, int64 [A]."""
        return torch.arange(self.m + 1, length, 3)

    def answers(self, lines: Tensor) -> dict[str, Tensor]:
        """Of lines [n, L + 1], each [n, A]: at least k, the steps an answer needs, and whether it is hard."""
        raise NotImplementedError

    def numbers(self) -> range:
        """Every k that may be needed."""
        raise NotImplementedError

    def by_hops(self, seen: dict[str, Tensor], lines: Tensor) -> list[dict]:
        """One row a k, from `morlib.score` of lines [n, L + 1].

        accuracy and all: share right (%) of the hard and of all answers; depth: mean depth where the hard
        ones are predicted; answers: how many are hard. None where there are no such answers.
        """

        def mean(values: Tensor) -> float | None:
            return values.mean().item() if len(values) else None

        asked, places = self.answers(lines), self.places(lines.shape[1] - 1)
        correct, depth = seen["correct"][:, places].double(), seen["depth"][:, places].double()
        rows = []
        for k in self.numbers():
            every = asked["k"] == k
            hard = every & asked["hard"]
            right, among_all = mean(100 * correct[hard]), mean(100 * correct[every])
            rows.append(
                dict(k=k, accuracy=right, all=among_all, depth=mean(depth[hard]), answers=int(hard.sum()))
            )
        return rows

    def details(self, seen: dict[str, Tensor], lines: Tensor) -> dict:
        """What a record keeps beside loss and depth: `by_hops` and `depth_by_kind`."""
        return dict(by_hops=self.by_hops(seen, lines), depth_by_kind=self.depth_by_kind(seen))

    def depth_by_kind(self, seen: dict[str, Tensor]) -> dict[str, float]:
        """Mean depth of the tokens of each kind, from `morlib.score`."""
        depth = seen["depth"].double().mean(0)  # [L]
        kinds = self.kinds(len(depth))
        return {
            kind: depth[[t for t, name in enumerate(kinds) if name == kind]].mean().item()
            for kind in dict.fromkeys(kinds)
        }
