"""morlib: Mixture-of-Recursions (MoR) and fixed-depth Transformers, small enough to read in one sitting.

What is unusual here:
- A model is a sequence of steps. Step (layer i, recursion r) applies block i to the tokens that a routing
  policy names, and leaves every other token as it is. All models and controls differ in the policy only.
- Skipping is real: a block sees packed tokens [T, D], in decoding too. Depth is counted from what ran.
- At a step a token attends to the tokens executed at that step, at or before its own position
  (recursion-wise cache). Training does the same, so cached and uncached generation agree.

Read from top to bottom. Nothing here reads the environment, a folder or a text. `train` takes any corpus with

    vocab_size                          how many kinds of tokens there are
    draw(windows, length, generator)    random training windows, int64 [windows, length + 1]
    windows(part, length, most)         windows of the part "train", "val" or "heldout", int64 [n, length + 1]
    tokens_per_byte(part)               may be missing: then bits per byte are None
    vocabulary                          may be missing: a name for what the ids stand for
    details(scores, windows)            may be missing: what else is measured, a dict for JSON

Letters: B batch, L length, D width, H heads, V vocabulary, N layers, R recursions (most applications of one
layer), T packed tokens, M tokens of the fullest row when packed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn
from tqdm.auto import tqdm

__version__ = "0.2.0"  # part of every run's identity: raise it when a change alters what a run computes
SKIP, FORWARD, RECURSE, NOT_ASKED = 0, 1, 2, -1
ACTIONS = ("skip", "forward", "recurse")


# ---- Configurations: a wrong one cannot be made ----

TINY, HUGE, BELOW = math.nextafter(0, 1), sys.float_info.max, math.nextafter(1, 0)
Count, Whole = Annotated[int, 1, HUGE], Annotated[int, 0, HUGE]
Share, BelowOne = Annotated[float, 0, 1], Annotated[float, 0, BELOW]
Positive, NotNegative = Annotated[float, TINY, HUGE], Annotated[float, 0, HUGE]


def check_value(name: str, value, hint):
    """The value, numpy's numbers as Python's. Raises ValueError unless it has a hint's type and range."""
    value = value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
    if isinstance(value, (list, tuple)):
        value = type(value)(check_value(name, v, object) for v in value)
    value = {k: check_value(k, v, object) for k, v in value.items()} if isinstance(value, dict) else value
    if type(None) in get_args(hint):
        return value if value is None else check_value(name, value, get_args(hint)[0])
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, not {value!r}")
        return value
    kind, *ends = get_args(hint) or (hint,)
    allowed = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind in (int, float)):
        raise ValueError(f"{name} must be {kind.__name__}, not {type(value).__name__} {value!r}")
    if ends and not ends[0] <= value <= ends[1]:
        low = "above 0" if ends[0] == TINY else f"{ends[0]} or more"
        high = {HUGE: "", BELOW: ", below 1"}.get(ends[1], f", {ends[1]:g} at most")
        raise ValueError(f"{name} must be {low}{high}, not {value!r}")
    return float(value) if kind is float else value  # 8 and 8.0 are one run


class Checked:
    """Base of the configurations: each field has the type and range of its hint, and `rules` hold."""

    def __post_init__(self):
        """Raises ValueError that says which field is wrong and what would be right."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = check_value(f"{type(self).__name__}: {name}", getattr(self, name), hint)
            object.__setattr__(self, name, value)
        for holds, message in self.rules():
            if not holds:
                raise ValueError(f"{type(self).__name__}: {message}")


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Everything that shapes a model."""

    vocab_size: Count
    n_layers: Count = 12
    d_model: Count = 256
    n_heads: Count = 8
    d_ff: Count = 2048
    max_len: Count = 64
    dropout: BelowOne = 0.1
    norm: Literal["pre", "post"] = "pre"  # "post" as in the sources
    routing: str = "mor"  # a key of POLICIES
    max_recursions: Count = 2  # R: the most applications of one layer to one token
    shared_blocks: Count | None = None  # k blocks used in a cycle; None: one block a layer
    granularity: Literal["token", "sample"] = "token"  # the router reads states, or their causal prefix mean
    target_depth: NotNegative | None = None  # effective depth that "random" draws and that a budget holds
    action_rates: tuple | None = None  # "random": [N][R][3] probabilities of skip, forward, recurse
    capacity: BelowOne = 0.125  # under a target depth, about the least share of tokens that a layer runs
    recurse_share: Share = 0.2  # under a target depth, the share of those that recurse
    estimator: Literal["scaled", "gumbel", "cut"] = "scaled"  # see Router
    temperature: Positive = 1.0  # tau of the Gumbel-Softmax
    scaled_init: bool = True  # see Transformer._scaled_init; False: PyTorch's own
    options: dict | None = None  # settings of a policy's own, by name: those in its OPTIONS

    def rules(self):
        N, R, k, E = self.n_layers, self.max_recursions, self.shared_blocks, self.target_depth
        yield self.d_model % self.n_heads == 0, f"d_model must be a multiple of n_heads ({self.n_heads})"
        yield self.d_model % 2 == 0, f"d_model must be even for sinusoidal positions, not {self.d_model}"
        yield self.routing in POLICIES, f"routing must be one of {', '.join(POLICIES)}, not {self.routing!r}"
        yield k is None or k <= N, f"shared_blocks must be in 1..{N} or None, not {k}"
        yield (E or 0) <= N * R, f"target_depth must be in 0..N*R = {N * R}, not {E}"
        kind = POLICIES[self.routing]
        yield issubclass(kind, Policy), f"routing {self.routing}: a policy must subclass morlib.Policy"
        unknown = ", ".join(sorted(set(self.options or {}) - set(kind.OPTIONS)))
        yield not unknown, f"options of {self.routing} are {', '.join(kind.OPTIONS) or 'none'}, not {unknown}"
        if self.action_rates is not None:
            rates = np.empty(0)
            with contextlib.suppress(ValueError, TypeError):
                rates = np.asarray(self.action_rates, dtype=float)
            fits = rates.shape == (N, R, 3)
            yield fits, f"action_rates must have shape [N][R][3] = {(N, R, 3)}, not {rates.shape}"
            yield (rates >= 0).all() and np.allclose(rates.sum(-1), 1), "action_rates must be >= 0, sum to 1"


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Everything that shapes a training. An epoch is `windows` windows of the model's length."""

    epochs: Count = 30
    windows: Count = 5000
    batch_size: Count = 128
    lr: Positive = 1e-3
    router_lr: Positive = 1e-4  # of the routers alone
    share_power: NotNegative = 0.5  # a block that runs a share of tokens learns at lr * share**share_power
    weight_decay: NotNegative = 0.1
    warmup: Share = 0.1  # share of the steps in which the learning rate rises linearly
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # wsd: after Hu et al. 2024, arXiv:2404.06395
    clip: Positive | None = 1.0  # largest gradient norm
    fresh_windows: bool = True  # draw new windows every epoch; False: one draw for all (the sources)
    penalty: NotNegative = 0.0  # lambda of the auxiliary loss lambda * E
    depth_warmup: Share = 0.0  # share of the steps in which depth falls from full to its target
    evaluations: Count = 10  # points of the learning curve
    eval_windows: Count = 200  # windows of the validation part at each point
    heldout_windows: Count | None = None  # None: the whole held-out part at the end
    seed: Annotated[int, 0, 2**63 - 1] = 0  # torch's range

    def rules(self):
        yield self.windows >= self.batch_size, f"windows must be at least batch_size ({self.batch_size})"


# ---- Packing: how the tokens that run find their rows ----


class TakeRows(torch.autograd.Function):
    """The rows of x [n, ...] at distinct places [T].

    The gradient is put back as it is. Torch's own adds, as places might repeat, which takes longer.
    """

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return put_rows(gradient, ctx.saved_tensors[0], ctx.rows), None


class PadRows(torch.autograd.Function):
    """x [T, ...] at distinct places [T] of a longer tensor [S, ...]; `source` [S] says which row to read.

    Places between them repeat some row. They get no gradient: padding is not attended to and not unpacked.
    """

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def put_rows(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """The inverse of TakeRows: x [T, ...] at distinct places of so many rows of zeros."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, places, x)


class Packing:
    """Where T tokens stand in a batch: at the ascending places `index` [T] of B rows of L.

    `pad` moves [T, ...] to [B, M, ...], `unpad` back; M holds the fullest row. Tokens keep their order, so
    attention that is causal over packed places is causal over positions. Padding stands at the ends of the
    rows, where no token before it sees it. A longer M is a multiple of 16, which suits attention on a CPU.
    """

    def __init__(self, index: Tensor, B: int, L: int):
        self.index, self.B, self.L = index, B, L
        self.full = index.numel() == B * L

    @cached_property
    def row(self) -> Tensor:  # [T]
        return self.index // self.L

    @cached_property
    def count(self) -> Tensor:  # [B]
        return torch.bincount(self.row, minlength=self.B)

    @cached_property
    def counts(self) -> list[int]:  # [B] on the host
        return [self.L] * self.B if self.full else self.count.tolist()

    @cached_property
    def M(self) -> int:
        most = max(self.counts)
        return most if self.full or most <= 8 else -(-most // 16) * 16

    @cached_property
    def slot(self) -> Tensor:  # [T] each token's place among the B * M
        order = torch.arange(self.index.numel(), device=self.index.device)
        first_slot = torch.arange(0, self.B * self.M, self.M, device=self.index.device)  # [B] of each row
        first_token = self.count.cumsum(0) - self.count  # [B] of each row
        return (first_slot - first_token).index_select(0, self.row) + order

    @cached_property
    def source(self) -> Tensor:  # [B * M] the token in each slot; padding repeats the first
        return put_rows(torch.arange(len(self.index), device=self.index.device), self.slot, self.B * self.M)

    def pad(self, x: Tensor) -> Tensor:
        x = x if self.full else PadRows.apply(x, self.slot, self.source)
        return x.view(self.B, self.M, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        x = x.reshape(self.B * self.M, *x.shape[2:])
        return x if self.full else TakeRows.apply(x, self.slot)


# ---- The cache: keys and values of the tokens executed at each step ----


class StepCache:
    """Keys and values of the tokens executed at one step.

    As long as rows hold equally many they lie in one tensor kv[0] [B, 2, H, room, D/H]; from the first
    difference on each row has its own, kv[b] [1, 2, H, room, D/H]. Either way what attention reads lies side
    by side, and no row waits for another. Room grows by an eighth at a time; `phase` in [0, 1) shifts the
    sizes, so that not all layers grow at one token. For use without gradients: what is held changes in place.
    """

    GROWTH = 9 / 8

    def __init__(self, B: int, phase: float = 0.0):
        self.kv: list[Tensor] = []
        self.count, self.phase = [0] * B, phase

    def append(self, kv: Tensor, packing: Packing) -> None:
        """Add the keys and values [T, 2, H, D/H] of new tokens."""
        new, kv = packing.counts, kv.detach()
        if not self.kv:
            self.kv = [kv.new_empty(len(new), 2, kv.shape[2], 0, kv.shape[3])]
        if len(self.kv) < len(new) and len(set(new)) > 1:  # from now on rows hold differently many
            self.kv = [row.clone() for row in self.kv[0].narrow(3, 0, self.count[0]).split(1)]
        for i, added in self._by_row(kv, new):
            held, after = self.count[i], self.count[i] + new[i]
            if after > self.kv[i].shape[3]:
                self.kv[i] = F.pad(self.kv[i].narrow(3, 0, held), (0, 0, 0, self._room(after) - held))
            self.kv[i].narrow(3, held, new[i]).copy_(added)
        self.count = [c + n for c, n in zip(self.count, new)]

    def _by_row(self, x: Tensor, new: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Of x [T, ..., D/H]: for each kv[i] that gets tokens, i and its own part [b, ..., m, D/H]."""
        if len(self.kv) == 1:
            return iter([(0, x.view(len(new), -1, *x.shape[1:]).movedim(1, -2))])
        rows = [b for b, n in enumerate(new) if n]
        if len({new[b] for b in rows}) == 1:
            return zip(rows, x.view(len(rows), -1, *x.shape[1:]).movedim(1, -2).split(1))
        return zip(rows, (part[None].movedim(1, -2) for part in x.split([new[b] for b in rows])))

    def _room(self, n: int) -> int:
        """The smallest of the sizes GROWTH^(i + phase) that holds n; n itself while rows are short."""
        if n < 32:
            return n
        power = math.ceil(math.log(n, self.GROWTH) - self.phase) + self.phase
        return max(n, round(self.GROWTH**power))

    def attend(self, q: Tensor, kv: Tensor, packing: Packing) -> Tensor:
        """Add new tokens q [T, H, D/H], kv [T, 2, H, D/H]; each looks at what its row holds up to itself.

        Rows that always held equally many go together, others one by one. Returns [T, H, D/H].
        """
        self.append(kv, packing)
        made = []
        for i, queries in self._by_row(q, packing.counts):  # [b, H, m, D/H]
            m, n, seen = queries.shape[2], self.count[i], None
            if m > 1:
                seen = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
            y = F.scaled_dot_product_attention(queries, *self.kv[i].narrow(3, 0, n).unbind(1), seen)
            made.append(y.transpose(1, 2).flatten(0, 1))
        return torch.cat(made) if len(made) > 1 else made[0]


class Cache:
    """What decoding keeps: a StepCache a step, and for per-sample routing the sum of the states so far."""

    def __init__(self):
        self.length, self.ids = 0, None  # positions consumed, and their tokens [B, length]
        self.steps: dict[tuple[int, int], StepCache] = {}
        self.prefix: dict[tuple[int, int], Tensor] = {}  # [B, 1, D]

    def step(self, layer: int, recursion: int, B: int, N: int) -> StepCache:
        return self.steps.setdefault((layer, recursion), StepCache(B, layer / N))

    def tokens(self) -> int:
        """Executed tokens that the cache holds, over all steps."""
        return sum(sum(step.count) for step in self.steps.values())

    def bytes(self) -> int:
        """Allocated bytes of keys, values and sums of states."""
        return sum(t.nbytes for t in chain(self.prefix.values(), *(s.kv for s in self.steps.values())))


# ---- The block ----


class Attention(nn.Module):
    """Causal multi-head self-attention among the tokens of one step."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.proj = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x: Tensor, packing: Packing, past: StepCache | None = None,
                mask: Tensor | None = None) -> Tensor:  # fmt: skip
        T, D = x.shape
        qkv = self.qkv(x).view(T, 3, self.n_heads, D // self.n_heads)
        if past is not None and past.kv:
            return self.proj(past.attend(qkv[:, 0], qkv[:, 1:], packing).reshape(T, D))
        if past is not None:
            past.append(qkv[:, 1:], packing)
        q, k, v = (t.transpose(1, 2) for t in packing.pad(qkv).unbind(2))  # each [B, H, M, D/H]
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # written out: where a mask needs a gradient, torch's own takes half as long again
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).add_(mask).softmax(-1) @ v
        return self.proj(packing.unpad(y.transpose(1, 2)).reshape(T, D))


def key_mask(key_bias: Tensor, packing: Packing) -> Tensor:
    """Added to attention's logits, [B, 1, M, M]: the bias [T] of a key, but not for itself; -inf ahead."""
    ahead = torch.full((packing.M, packing.M), -torch.inf, device=key_bias.device).triu(1)
    itself = torch.eye(packing.M, dtype=torch.bool, device=key_bias.device)
    return (packing.pad(key_bias)[:, None, None] + ahead).masked_fill(itself, 0.0)


class Block(nn.Module):
    """Attention and feed-forward on packed tokens [T, D], pre-norm or post-norm."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        D, hidden = cfg.d_model, cfg.d_ff
        self.pre = cfg.norm == "pre"
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = Attention(cfg)
        self.feed_forward = nn.Sequential(nn.Linear(D, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, D))
        self.dropout = nn.Dropout(cfg.dropout)

    def at(self, layer: int, memory: dict) -> Callable:
        """What a layer calls in a pass with this memory: the block itself if it is the same everywhere."""
        return self

    def forward(self, x: Tensor, packing: Packing, past: StepCache | None = None,
                mask: Tensor | None = None) -> Tensor:  # fmt: skip
        return self.around(x, lambda h: self.attention(h, packing, past, mask), self.feed_forward)

    def around(self, x: Tensor, attention: Callable, feed_forward: Callable) -> Tensor:
        """x [T, D] through the block, with these two from (normalised) states to a change, each [T, D]."""
        dropout = self.dropout if self.training else lambda change: change  # a call a token would cost time
        if self.pre:
            x = x + dropout(attention(self.norm1(x)))
            return x + dropout(feed_forward(self.norm2(x)))
        x = self.norm1(x + dropout(attention(x)))
        return self.norm2(x + dropout(feed_forward(x)))


# ---- Routing policies: who is executed at a step ----


@dataclass
class StepInput:
    """What a policy is shown: T tokens that await a decision at step (layer, recursion).

    A policy that needs the states later must copy them: without a gradient the model changes them in place.
    """

    layer: int
    recursion: int
    states: Tensor  # [T, D] the tokens' states, or their causal prefix means
    index: Tensor  # [T] each token's place in the flat batch of B * L
    L: int
    start: int  # position of the first column
    actions: Tensor  # [N, R, B * L] decisions taken so far in this pass, NOT_ASKED elsewhere
    sampling: bool  # draw actions, or take the likeliest
    calibrate: bool  # set the thresholds of a budget by these tokens
    full: float  # what is left of the warm-up from full depth, 1 to 0
    done: float = 1.0  # the share of the training that is over
    memory: dict = field(default_factory=dict)  # for what a policy keeps from step to step of a pass
    readout: Callable | None = None  # states [T, D] to logits [T, V], as at the end of the model
    ids: Tensor | None = None  # [B, start + L] the tokens that were read

    @property
    def row(self) -> Tensor:
        return self.index // self.L

    @property
    def position(self) -> Tensor:
        return self.start + self.index % self.L

    def draw(self, table: Tensor) -> Tensor:
        """Draws [T] in [0, 1): those of a random permutation while sampling, which give each step its share
        exactly; else by position from a table [max_len], spread over rows by the golden ratio."""
        if self.sampling:
            return (torch.randperm(len(self.index), device=self.index.device) + 0.5) / len(self.index)
        return table.index_select(0, self.position).add_(self.row, alpha=0.6180339887498949).remainder_(1)


class Tokens(NamedTuple):
    """Some tokens of a batch: their places, and the probability of the choices that led to them."""

    places: Tensor  # [T]
    weight: Tensor | None = None  # [T]; None: 1
    all: bool = False  # places are 0, 1, 2, ...
    key_bias: Tensor | None = None  # [T]; None: 0


@dataclass
class Decision:
    """A policy's answer for T tokens. A policy with probabilities learns; one without counts what it runs."""

    actions: Tensor | None = None  # [T] SKIP, FORWARD, RECURSE (at the last recursion FORWARD); None: FORWARD
    probabilities: Tensor | None = None  # [T, 3], for the expected depth
    weights: Tensor | None = None  # [2, T] probability to execute, and to recurse: they scale the change
    key_bias: Tensor | None = None  # [T] in training, added to the logits of a token's key but for its own
    lasts: bool = False  # given where a layer first asks: who runs, runs all further layers too, once each

    def split(self, asked: Tokens, last: bool) -> tuple[Tokens | None, Tokens | None]:
        """Of those asked: who runs now, and who is asked again afterwards. None is nobody."""
        if self.actions is None and self.weights is None and self.key_bias is None:
            return asked, None
        actions = torch.full_like(asked.places, FORWARD) if self.actions is None else self.actions
        run, recurse = (None, None) if self.weights is None else self.weights
        running = self._those(asked, actions != SKIP, run)
        again = None if last or running is None else self._those(asked, actions == RECURSE, recurse)
        return running, again

    def _those(self, asked: Tokens, chosen: Tensor, weight: Tensor | None) -> Tokens | None:
        index = chosen.nonzero().flatten()
        if not len(index):
            return None
        factors = [w for w in (weight, asked.weight) if w is not None]
        weight = TakeRows.apply(math.prod(factors), index) if factors else None
        key_bias = None if self.key_bias is None else TakeRows.apply(self.key_bias, index)
        return Tokens(index if asked.all else asked.places.index_select(0, index), weight, key_bias=key_bias)


class Policy(nn.Module):
    """The fixed-depth Transformer (every token, once a layer), and what every policy has."""

    OPTIONS: dict = {}  # settings of its own, with their defaults
    holds_budget = False  # whether `calibrate` sets what holds the target depth
    version = ""  # part of a run's identity: raise it when a change alters what this policy computes
    block = Block  # makes a block of a model from its configuration

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg

    def forward(self, step: StepInput) -> Decision:
        return Decision(lasts=True)

    @classmethod
    def layout(cls, cfg: ModelConfig) -> list[int]:
        """The number of the block that each layer [N] uses."""
        return [layer % (cfg.shared_blocks or cfg.n_layers) for layer in range(cfg.n_layers)]

    def settle(self, x: Tensor, layer: int, memory: dict) -> Tensor:
        """What a layer hands on in place of the states x [B * L, D] after it (or after all that a decision
        lasts for), which may change later."""
        return x

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        """What training minimises, given the mean loss (nats a token) of a pass and its targets [B, L]."""
        return loss

    def shares(self) -> list[float]:
        """The share of the tokens that each layer [N] is meant to run: its block's learning rate suits it."""
        return [1.0] * self.cfg.n_layers

    def own_loss(self, memory: dict, scale: float) -> Tensor | None:
        """A second loss, or None. The model's own, times `scale`, went back: the memory has its gradients."""
        return None


class RandomPolicy(Policy):
    """Blind control: the given action rates a layer, or those of `target_depth`, or one third each."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        N, R = cfg.n_layers, cfg.max_recursions
        if cfg.action_rates is not None:
            rates = torch.tensor(cfg.action_rates, dtype=torch.float)
        elif cfg.target_depth is None:
            rates = torch.full((N, R, 3), 1 / 3)
        else:
            depth = cfg.target_depth / N
            reach = [min(max(depth - r, 0.0), 1.0) for r in range(R)] + [0.0]  # P(more than r applications)
            again = [reach[r + 1] / reach[r] if reach[r] else 0.0 for r in range(R)]
            run = [reach[0]] + [1.0] * (R - 1)
            rates = torch.tensor([[1 - p, p * (1 - a), p * a] for p, a in zip(run, again)]).repeat(N, 1, 1)
        self.register_buffer("rates", rates)
        self.register_buffer("table", torch.rand(N, R, cfg.max_len))

    def forward(self, step: StepInput) -> Decision:
        draw = step.draw(self.table[step.layer, step.recursion])
        skip, forward, _ = self.rates[step.layer, step.recursion].tolist()
        runs_from = (1 - step.full) * skip
        recurses_from = (1 - step.full) * (skip + forward) + step.full
        return Decision((draw >= runs_from).to(torch.int8).add_(draw >= recurses_from))

    def shares(self) -> list[float]:
        return (1 - self.rates[:, 0, SKIP]).tolist()


class Router(Policy):
    """MoR: a two-layer network a layer (D -> D/2 -> 3, as in the sources) chooses skip, forward or recurse.

    How it learns (`estimator`):
    - "scaled": the likeliest action is taken, in training as in inference. The change that a block makes is
      multiplied by the probability of the choices that led to it, so the loss reaches the router through what
      it executed (as in Mixture-of-Depths, Raposo et al. 2024, equation 1).
    - "gumbel": training samples by Gumbel-Softmax with a straight-through gradient (Jang et al. 2017).
    - "cut": the same samples and no gradient, as in the sources' public code.

    With a target depth, biases (buffers, no gradient) hold the rates at what `depth_budget` asks, whatever
    the scale of the logits. Each training batch sets them, as it sets the statistics of a batch norm;
    `calibrate` sets them for inference. Sampled and likeliest actions have biases of their own. Under a
    target, a token that chose recurse is run again for certain, and decides whether to recurse once more.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        N, R, D, hidden = cfg.n_layers, cfg.max_recursions, cfg.d_model, max(cfg.d_model // 2, 1)
        networks = (nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, 3)) for _ in range(N))
        self.routers = nn.ModuleList(networks)
        self.register_buffer("bias", torch.zeros(2, N, R, 3))  # of [likeliest or sampled, N, R, action]
        self.budget = depth_budget(cfg)
        self.everyone = [cfg.target_depth is not None and spend == (1.0, 0.0) for spend in self.budget]
        self.holds_budget = cfg.target_depth is not None
        self.learns = cfg.routing != "frozen" and cfg.estimator != "cut"
        self.requires_grad_(cfg.routing != "frozen")

    def shares(self) -> list[float]:
        return [run for run, _ in self.budget]

    def forward(self, step: StepInput) -> Decision:
        if self.everyone[step.layer]:  # a layer without a choice
            return Decision()
        scaled = self.cfg.estimator == "scaled"
        sampling = step.sampling and not scaled
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns):
            states = F.layer_norm(step.states, step.states.shape[-1:])
            logits = self.routers[step.layer](states).float()  # [T, 3]
            noisy = logits - torch.empty_like(logits).exponential_().log() if sampling else logits  # Gumbel
            logits = logits.t().contiguous()  # [3, T]: three columns are slow to read
            noisy = noisy.t().contiguous() if sampling else logits
            bias = self.bias[int(sampling), step.layer, step.recursion]
            if step.calibrate and self.cfg.target_depth is not None:
                bias.copy_(self._biases(noisy.detach(), step))
            logits = logits + bias[:, None]
            noisy = noisy + bias[:, None] if sampling else logits
            skip, forward, recurse = (noisy if scaled else noisy / self.cfg.temperature).unbind()
            weights = torch.stack([torch.logaddexp(forward, recurse) - skip, recurse - forward]).sigmoid()
            if not scaled:  # 1, with the gradient of the probability
                weights = weights - weights.detach() + 1 if weights.requires_grad else None
            actions = (torch.maximum(forward, recurse) > skip) * (1 + (recurse > forward).long())
            return Decision(actions, logits.softmax(0).t(), weights)

    def _biases(self, logits: Tensor, step: StepInput) -> Tensor:
        """The biases [3] by which these logits [3, T] spend the layer's budget."""
        run, again = self.budget[step.layer]
        run = 1.0 if step.recursion else step.full + (1 - step.full) * run
        again = (1 - step.full) * again
        skip, forward, recurse = logits.unbind()
        bias = logits.new_zeros(3)
        left = self.cfg.max_recursions - step.recursion - 1
        further = sum(again**r for r in range(1, left + 1))  # applications that a recursing token may cause
        if further:  # recurse is for the share of those who would run that favours it most
            favour = recurse - forward
            favour = favour[forward - skip > quantile(forward - skip, run)] if run < 1 else favour
            bias[RECURSE] = -apart(quantile(favour, again), favour, step) if len(favour) else -1e9
        else:
            bias[RECURSE] = -1e9 if left else 0.0  # at the last recursion both run once
        if run in (0, 1):  # holds for tokens not seen here too
            bias[SKIP] = 1e9 if run == 0 else -1e9
            return bias
        recurse = recurse + bias[RECURSE]
        margin, order = (torch.maximum(forward, recurse) - skip).sort(descending=True)
        cost = 1 + (further / again if further else 0) * (recurse > forward)[order]
        paid = int((cost.cumsum(0) <= run * (1 + further) * len(skip)).sum())  # the keenest that are paid for
        bias[SKIP] = apart(margin[min(paid, len(margin) - 1)], margin, step)
        return bias


class WorthRouter(Policy):
    """Decides once: a token runs the first ALWAYS layers, then all of the others or none of them.

    A network predicts what running them is worth: by how much the loss of the whole text is lower (nats). A
    token runs if that exceeds a price, and the price (a buffer) holds the target depth. In training some
    tokens are explored: they run with a weight w ~ U(0, 1) on all that they change, on their own state's
    change and, by SLOPE (w - 1) added to the attention logits of their keys, on what others read. The mean
    over w of -dL/dw is exactly L(w = 0) - L(w = 1), so -dL/dw measures worth without bias, also where the
    gain is another token's. At w = 0 a token is hardly seen, a skipped one not at all; others are as while
    exploring.
    """

    ALWAYS, SLOPE, RATE, CLIP = 1, 4.0, 0.05, 10.0  # clipped is what is measured, which has heavy tails
    EXPLORED = (0.15, 0.02)  # share of the tokens: until a tenth of the training, and from half of it on
    holds_budget, version = True, "1"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        N, D = cfg.n_layers, cfg.d_model
        if cfg.target_depth is None or not self.ALWAYS < cfg.target_depth < N:
            wanted = f"a target_depth above {self.ALWAYS} and below n_layers ({N})"
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs {wanted}, not {cfg.target_depth}")
        self.share = (cfg.target_depth - self.ALWAYS) / (N - self.ALWAYS)
        self.network = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, 1))
        self.register_buffer("price", torch.zeros(2))  # of inference, of training

    def shares(self) -> list[float]:
        return [1.0] * self.ALWAYS + [self.share] * (self.cfg.n_layers - self.ALWAYS)

    def forward(self, step: StepInput) -> Decision:
        if step.layer < self.ALWAYS:
            return Decision()
        if "decision" not in step.memory:
            step.memory["decision"] = self.decide(step)
        return step.memory["decision"]

    def decide(self, step: StepInput) -> Decision:
        states = F.layer_norm(step.states.detach(), step.states.shape[-1:])
        with torch.no_grad():  # it learns from those explored only
            worth = self.network(states)[:, 0].float()  # [T]
        learning = step.sampling and torch.is_grad_enabled()
        price = self.price[int(learning)]
        if step.calibrate:
            rate = self.RATE if learning and price else 1.0
            price.lerp_(apart(quantile(worth, self.share), worth, step).to(price), rate)
        run = worth > price
        if not learning:
            return Decision(run.long(), lasts=True)
        draw, w, stays = torch.rand(3, len(worth), device=worth.device).unbind()
        explored = draw < self.explored(step.done)
        w = torch.where(explored, w, 1.0).requires_grad_()
        step.memory |= dict(w=w, explored=explored, states=states)
        run = run | explored | (stays < step.full)
        return Decision(run.long(), None, torch.stack([w, w]), self.SLOPE * (w - 1), lasts=True)

    def explored(self, done: float) -> float:
        """The share of the tokens that is explored when a share of the training is done."""
        first, last = self.EXPLORED
        return first + (last - first) * min(max((done - 0.1) / 0.4, 0.0), 1.0)

    def own_loss(self, memory: dict, scale: float) -> Tensor | None:
        if memory["w"].grad is None:  # nobody ran
            return None
        measured = -memory["w"].grad * len(memory["w"]) / scale  # of a sum of losses, not of their mean
        return self.error(memory["states"][memory["explored"]], measured[memory["explored"]])

    def error(self, states: Tensor, measured: Tensor) -> Tensor:
        """Half of the mean squared error of the network, at states [T, D] whose worth [T] was measured."""
        error = self.network(states)[:, 0].float() - measured.clamp(-self.CLIP, self.CLIP)
        return (error**2).sum() / (2 * max(len(measured), 1))


def quantile(values: Tensor, share: float) -> Tensor:
    """The value [] that the given share of values [T] exceeds."""
    return values.kthvalue(min(max(round((1 - share) * len(values)), 1), len(values)))[0]


def apart(threshold: Tensor, values: Tensor, step: StepInput) -> Tensor:
    """A threshold that is one of the values [T], in inference raised to a gap that no rounding crosses: the
    first of 2e-5, or the widest, above one in 200 of the values at most."""
    if step.sampling or not threshold.isfinite():
        return threshold
    above = values[values >= threshold].sort()[0]
    gaps = above.diff(append=above.new_tensor([torch.inf]))[: max(len(values) // 200, 16)].clamp(max=2e-5)
    return above[gaps.argmax()] + gaps.max() / 2


def depth_budget(cfg: ModelConfig) -> list[tuple[float, float]]:
    """How a target depth is spent: a layer's share of tokens that run, and of these the share that recurses.

    As many layers as the target allows run every token once, from the bottom up and the last one too. Each
    of the others runs the same share of the tokens, at least about `capacity`, and `recurse_share` of these
    again: 1 + a + ... + a^(R-1) applications each. With N = 12, R = 2 and a target of 8, seven layers run
    everyone and five run a sixth, of which a fifth recurses. Above N everyone runs everywhere, some again.
    """
    N, R = cfg.n_layers, cfg.max_recursions
    again = cfg.recurse_share if R > 1 else 0.0
    if cfg.target_depth is None:
        return [(1.0, again)] * N
    if cfg.target_depth >= N:
        return [(1.0, brentq(lambda a: N * sum(a**r for r in range(R)) - cfg.target_depth, 0, 1))] * N
    everyone = min(max(int((cfg.target_depth - cfg.capacity * N) / (1 - cfg.capacity) + 1e-9), 0), N - 1)
    rest = (cfg.target_depth - everyone) / (N - everyone) / sum(again**r for r in range(R))
    bottom = max(everyone - 1, min(everyone, 1))
    return [(1.0, 0.0)] * bottom + [(rest, again)] * (N - everyone) + [(1.0, 0.0)] * (everyone - bottom)


POLICIES = {"none": Policy, "mor": Router, "frozen": Router, "random": RandomPolicy, "worth": WorthRouter}


# ---- The model ----


@dataclass
class Output:
    logits: Tensor  # [B, L, V]
    depth: Tensor  # [B, L] applications that each token received
    expected_depth: Tensor  # scalar; its gradient reaches every decision taken
    actions: Tensor  # [N, R, B, L] int8: SKIP, FORWARD, RECURSE, or NOT_ASKED
    memory: dict = field(default_factory=dict)  # what the policy kept of this pass


class Trace:
    """What the policy decided in a pass: the actions, and the applications that were to be expected."""

    def __init__(self, cfg: ModelConfig, tokens: int, device: torch.device):
        shape = cfg.n_layers, cfg.max_recursions, tokens
        self.actions = torch.full(shape, NOT_ASKED, dtype=torch.int8, device=device)
        self.certain = 0  # applications by policies without probabilities
        self.asked: list[list] = [[] for _ in range(cfg.n_layers)]  # the others': (T, probabilities [T, 3])

    def add(self, step: StepInput, decision: Decision, running: Tokens | None) -> None:
        last = len(self.actions) if decision.lasts else step.layer + 1
        actions = self.actions[step.layer : last, step.recursion]
        if decision.actions is None:
            actions.index_fill_(1, step.index, FORWARD)
        else:
            actions.index_copy_(1, step.index, decision.actions.to(torch.int8).expand(len(actions), -1))
        if decision.probabilities is None:
            self.certain += len(actions) * len(running.places) if running else 0
        else:
            for asked in self.asked[step.layer : last]:
                asked.append((len(step.index), decision.probabilities))

    def expected(self) -> Tensor | float:
        """Expected applications, summed over tokens and layers, from the probabilities at each recursion.

        A layer's share is sum_r [f_r + c_r + w_r (c_r - c_r.detach())], where f_r and c_r are the summed
        probabilities of forward and recurse at recursion r, and w_r is what a token that recursed there went
        on to execute on average. So the value is that of the path taken, and the gradient is that of the true
        expectation, up to the difference of a token from that average.
        """
        total = 0.0
        for asked in filter(None, self.asked):
            of_layer, later, worth = 0.0, 0.0, float(len(asked) < self.actions.shape[1])
            for T, p in reversed(asked):
                _, forward, recurse = p.sum(0)
                of_layer = of_layer + forward + recurse + worth * (recurse - recurse.detach())
                later = later + (forward + recurse).detach()
                worth = later / T
            total = total + of_layer
        return total + self.certain


class Transformer(nn.Module):
    """A causal decoder-only language model whose steps are named by a routing policy."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, kind = cfg, POLICIES[cfg.routing]
        self.layout = kind.layout(cfg)
        self.vocabulary: str | None = None  # what the ids stood for in training
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.register_buffer("positions", sinusoids(cfg.max_len, cfg.d_model), persistent=False)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(kind.block(cfg) for _ in range(max(self.layout) + 1))
        self.norm = nn.LayerNorm(cfg.d_model) if cfg.norm == "pre" else nn.Identity()
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size)
        if cfg.scaled_init:
            self._scaled_init()
        self.policy = kind(cfg)  # last: one seed gives every policy the same backbone

    def forward(self, tokens: Tensor, cache: Cache | None = None, sampling: bool | None = None,
                calibrate: bool | None = None, full: float = 0.0, done: float = 1.0) -> Output:  # fmt: skip
        """tokens int64 [B, L] to an Output. With a cache, tokens follow those it holds.

        sampling: draw actions; calibrate: let a budget set its thresholds by this batch. Both are by default
        as in training mode. full: what is left of the warm-up, 1 to 0. done: the share of the training done.
        Raises ValueError if tokens have another shape or type, are out of range, or pass `max_len`.
        """
        cfg, start = self.cfg, cache.length if cache else 0
        self.check(tokens, start)
        B, L = tokens.shape
        sampling = self.training if sampling is None else sampling
        calibrate = self.training if calibrate is None else calibrate
        x = self.dropout(self.embed(tokens) + self.positions[start : start + L]).view(B * L, -1)
        ids = torch.cat([cache.ids, tokens], dim=1) if start else tokens
        everyone = Tokens(torch.arange(B * L, device=x.device), all=True)
        trace, memory, decision = Trace(cfg, B * L, x.device), {}, Decision()
        for layer in range(cfg.n_layers):
            if decision.lasts:
                break
            asked = everyone
            for recursion in range(cfg.max_recursions):
                states = self._router_input(x, B, L, (layer, recursion), cache)
                if asked is None:
                    continue  # not break: per-sample routing sums up the states of every step
                if not asked.all:
                    states = TakeRows.apply(states, asked.places)
                step = StepInput(layer, recursion, states, asked.places, L, start, trace.actions,
                                 sampling, calibrate, full, done, memory, self.readout, ids)  # fmt: skip
                decision = self.policy(step)
                running, again = decision.split(asked, decision.lasts or recursion + 1 == cfg.max_recursions)
                trace.add(step, decision, running)
                if running is not None:
                    layers = range(layer, cfg.n_layers if decision.lasts else layer + 1)
                    blocks = [self.blocks[self.layout[i]].at(i, memory) for i in layers]
                    pasts = [cache and cache.step(i, recursion, B, cfg.n_layers) for i in layers]
                    x = self.run_step(blocks, x, running, pasts, B, L)
                asked = again
            x = self.policy.settle(x, layer, memory)
        if cache:
            cache.length, cache.ids = start + L, ids
        actions = trace.actions.view(cfg.n_layers, -1, B, L)
        logits, expected = self.readout(x).view(B, L, -1), (x.new_zeros(()) + trace.expected()) / (B * L)
        return Output(logits, (actions >= FORWARD).sum((0, 1)), expected, actions, memory)

    def readout(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        return self.head(self.norm(states))

    def run_step(self, blocks: list, x: Tensor, running: Tokens, pasts: list, B: int, L: int) -> Tensor:
        """x [B * L, D] after blocks have run some tokens, one after another, each change times their weight.

        The tokens are packed once for all of the blocks. pasts: the cache of each block, or None.
        """
        packing, weight = Packing(running.places, B, L), running.weight
        states = x if packing.full else TakeRows.apply(x, running.places)  # [T, D]
        mask = None if running.key_bias is None else key_mask(running.key_bias, packing)
        for block, past in zip(blocks, pasts):
            after = block(states, packing, past, mask)
            states = after if weight is None else torch.lerp(states, after, weight[:, None].to(after.dtype))
        put = x.index_copy if torch.is_grad_enabled() else x.index_copy_  # where no gradient needs the old
        return states if packing.full else put(0, running.places, states)

    def _router_input(self, x: Tensor, B: int, L: int, step: tuple[int, int], cache: Cache | None) -> Tensor:
        """[B * L, D] what the policy reads: the states, or the mean of those at or before each position."""
        if self.cfg.granularity == "token":
            return x
        total, start = x.view(B, L, -1).cumsum(1), cache.length if cache else 0
        if cache:
            total = total + cache.prefix.get(step, 0)
            cache.prefix[step] = total[:, -1:]
        count = torch.arange(start + 1, start + L + 1, device=x.device)
        return (total / count[:, None]).view(B * L, -1)

    def check(self, tokens: Tensor, start: int = 0) -> None:
        """Raises ValueError if tokens that follow `start` others cannot be read."""
        if tokens.dim() != 2 or tokens.dtype != torch.long or tokens.numel() == 0:
            raise ValueError(f"tokens must be a non-empty int64 tensor, not {tokens.dtype} {[*tokens.shape]}")
        length, most, V = start + tokens.shape[1], self.cfg.max_len, self.cfg.vocab_size
        if length > most:
            raise ValueError(f"{length} tokens are longer than the model's max_len of {most}: shorten it")
        low, high = torch.stack(tokens.aminmax()).tolist()
        if not 0 <= (wrong := low if low < 0 else high) < V:
            raise ValueError(f"token id {wrong} is out of range: the vocabulary has ids 0 to {V - 1}")

    def _scaled_init(self) -> None:
        """Variance 1 / (3 fan_in), which is GPT-2's 0.02 at its width of 768; residual projections over
        sqrt(2N) (Radford et al. 2019, section 2.3); an embedding small beside the first blocks' changes."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "feed_forward.2.weight"))
                std = (3 * parameter.shape[1]) ** -0.5 / (math.sqrt(2 * self.cfg.n_layers) if residual else 1)
                nn.init.normal_(parameter, std=0.1 if name == "embed.weight" else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.positions *= 0.1


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions [length, width] (Vaswani et al. 2017, section 3.5)."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).view(length, width)


# ---- Training ----


def learning_rate(step: int, steps: int, tc: TrainConfig) -> float:
    """Factor on the rate: linear warm-up; then constant, a cosine to a tenth, or in the last fifth a line."""
    if step < (warmup := round(tc.warmup * steps)):
        return (step + 1) / warmup
    if tc.schedule == "wsd":
        return min(0.1 + 4.5 * (1 - step / steps), 1.0)
    cosine = 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))
    return cosine if tc.schedule == "cosine" else 1.0


def build_optimizer(model: Transformer, tc: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: matrices, vectors (no decay) and routers in groups of their own; each block at its own rate.

    A block that sees a share of the tokens has gradients as noisy as a batch of that share. For Adam the rate
    then goes with the square root of the batch (Malladi et al. 2022, section 5).
    """
    shares, groups = model.policy.shares(), {}
    for name, parameter in model.named_parameters():
        if name.startswith("policy."):
            rate, decay = tc.router_lr, 0.0
        else:
            number = int(name.split(".")[1]) if name.startswith("blocks.") else None
            layers = [s for s, own in zip(shares, model.layout) if own == number] or [1.0]
            rate = tc.lr * float(np.mean(layers)) ** tc.share_power
            decay = tc.weight_decay if parameter.dim() >= 2 else 0.0
        if parameter.requires_grad:
            groups.setdefault((rate, decay), []).append(parameter)
    groups = [dict(params=p, lr=rate, peak=rate, weight_decay=decay) for (rate, decay), p in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def batches(corpus, tc: TrainConfig, length: int):
    """The batches [B, length + 1] of a training, in an order that depends on the seed alone."""
    order = torch.Generator().manual_seed(tc.seed)
    for epoch in range(tc.epochs):
        if epoch == 0 or tc.fresh_windows:
            windows = corpus.draw(tc.windows, length, order)
        shuffled = windows[torch.randperm(tc.windows, generator=order)]
        yield from shuffled.split(tc.batch_size)[: tc.windows // tc.batch_size]


class Training:
    """A training under way: model, optimizer, and what was measured so far."""

    def __init__(self, model: Transformer, corpus, tc: TrainConfig, dtype: torch.dtype = torch.float32):
        self.model, self.corpus, self.tc, self.dtype = model, corpus, tc, dtype
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(model, tc)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.steps = tc.epochs * (tc.windows // tc.batch_size)
        self.points = {round(self.steps * (i + 1) / tc.evaluations) for i in range(tc.evaluations)}
        self.step, self.seconds, self.history = 0, 0.0, []
        self.micro = tc.batch_size  # windows that go through the model at once
        self.applications = torch.zeros((), dtype=torch.long, device=self.device)
        self.loss, self.depth = None, None  # of the last batch: mean loss (nats a token), mean depth
        self.losses, self.depths = [], 0  # since the last point of the history: losses, and applications

    def full(self, step: int) -> float:
        """What is left of the warm-up from full depth at a step: 1 at the first, 0 once it is over."""
        return max(1 - step / warm, 0.0) if (warm := self.tc.depth_warmup * self.steps) else 0.0

    def update(self, batch: Tensor) -> None:
        """One optimizer step on a batch [B, L + 1]."""
        began, tc = time.perf_counter(), self.tc
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(self.step, self.steps, tc)
        loss, applications = self.gradients(batch.to(self.device))
        if tc.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), tc.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.loss, self.depth = loss, applications / batch[:, 1:].numel()
        self.losses.append(loss)
        self.depths = self.depths + applications
        self.applications += applications
        self.seconds += time.perf_counter() - began

    def gradients(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a batch [B, L + 1]; returns its mean loss and its applications.

        `micro` windows go through the model at a time, fewer from then on where memory runs out.
        """
        self.optimizer.zero_grad(set_to_none=True)
        mean_loss, applications = 0.0, 0
        try:
            for part in batch.split(self.micro):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    out = self.model(part[:, :-1], full=self.full(self.step), done=self.step / self.steps)
                    loss = F.cross_entropy(out.logits.flatten(0, 1).float(), part[:, 1:].flatten())
                    total = self.model.policy.objective(loss, out, part[:, 1:])
                    total = total + self.tc.penalty * out.expected_depth if self.tc.penalty else total
                share = len(part) / len(batch)
                self.scaler.scale(total * share).backward()
                own = self.model.policy.own_loss(out.memory, share * self.scaler.get_scale())
                if own is not None:
                    self.scaler.scale(own * share).backward()
                mean_loss = mean_loss + loss.detach() * share
                applications = applications + out.depth.sum()
            return mean_loss, applications
        except torch.OutOfMemoryError:
            if self.micro == 1:
                advice = "take a smaller model or max_len, or the CPU"
                raise torch.OutOfMemoryError(f"out of memory with a single window: {advice}") from None
        self.micro = (self.micro + 1) // 2  # tried again outside of the handler, which holds on to the memory
        out = loss = total = own = None  # and so does the failed try's graph
        torch.cuda.empty_cache()
        print(f"note: out of memory at step {self.step + 1}: the micro-batch is now {self.micro} windows; "
              f"the effective batch stays {len(batch)}")  # fmt: skip
        return self.gradients(batch)

    def measure(self) -> None:
        """A point of the learning curve: training since the last one, and the validation part.

        Raises ValueError if a loss or a weight is no longer finite.
        """
        began, tc, length = time.perf_counter(), self.tc, self.model.cfg.max_len
        train_loss = float(torch.stack(self.losses).mean())  # waits for the device
        self.seconds += time.perf_counter() - began
        self.check_finite()
        since = self.step - (self.history[-1]["step"] if self.history else 0)
        last = self.step == self.steps
        full = 0.0 if last else self.full(self.step - 1)  # the last point is of the model as it will be used
        calibrate_on_validation(self.model, self.corpus, 512 if last else 64, full)
        at_val = evaluate(self.model, self.corpus, "val", tc.eval_windows, full=full)
        tokens, depth = self.step * tc.batch_size * length, self.depths / (since * tc.batch_size * length)
        point = dict(step=self.step, tokens=tokens, train_loss=train_loss, train_depth=float(depth))
        names = [name for name in ("loss", "accuracy", "effective_depth", "details") if name in at_val]
        self.history.append(point | {f"val_{name}": at_val[name] for name in names})
        self.losses, self.depths = [], 0

    def check_finite(self) -> None:
        """Raises ValueError that says since when a loss, or that a weight, is nan or infinite."""
        bad = (~torch.stack(self.losses).isfinite()).nonzero() if self.losses else ()
        if len(bad):
            step = self.step - len(self.losses) + int(bad[0]) + 1
            trouble = f"the loss became {float(self.losses[int(bad[0])])} at step {step}"
        elif all(bool(p.isfinite().all()) for p in self.model.parameters()):
            return
        else:
            trouble = f"the weights became nan or infinite by step {self.step}"
        raise ValueError(f"{trouble} of {self.steps}: lower lr ({self.tc.lr}) or set clip ({self.tc.clip})")


def check_vocabulary(model: Transformer, corpus) -> None:
    """Raises ValueError if a corpus has more kinds of tokens than a model, or ids that mean other tokens."""
    V, have, theirs = model.cfg.vocab_size, corpus.vocab_size, getattr(corpus, "vocabulary", None)
    if have > V:
        raise ValueError(f"the corpus has {have} token kinds, the model {V}: build it with vocab_size={have}")
    if None not in (model.vocabulary, theirs) and theirs != model.vocabulary:
        named = f"the model reads vocabulary {model.vocabulary}, the corpus has {theirs}"
        raise ValueError(f"{named}: load the corpus with the model's tokenizer")


def train(model: Transformer, corpus, tc: TrainConfig, progress: bool = False, dtype=torch.float32,
          resume=None, after_step=None) -> Training:  # fmt: skip
    """Train a model where it is; measure it on the validation part at `evaluations` points (`.history`).

    The order of the data depends on the seed alone: trainings of one seed are paired, whatever their model.
    progress: a bar with loss and E. dtype: of autocast. resume(training) may put it back to where another
    one was. after_step(training) may look at it, keep it, and stop it by returning True.
    However it ends, the model is left in evaluation mode with its budget calibrated on the validation part.
    Raises ValueError if the corpus has other tokens than the model, or when a loss is not finite.
    """
    check_vocabulary(model, corpus)
    model.vocabulary = getattr(corpus, "vocabulary", model.vocabulary)
    torch.manual_seed(tc.seed)
    training = Training(model, corpus, tc, dtype)
    label, total = f"{model.cfg.routing} N={model.cfg.n_layers}", training.steps
    try:
        if resume:
            resume(training)
        with tqdm(desc=label, total=total, initial=training.step, disable=not progress, leave=False) as bar:
            for batch in islice(batches(corpus, tc, model.cfg.max_len), training.step, None):
                training.update(batch)
                if training.step in training.points:
                    training.measure()
                if bar.update():  # it was drawn anew
                    bar.set_postfix(loss=f"{float(training.loss):.3f}", E=f"{float(training.depth):.2f}")
                if after_step and after_step(training):
                    break
        if training.losses:  # stopped between two points
            training.measure()
        return training
    finally:
        model.eval()
        if not training.history or training.history[-1]["step"] < training.steps:  # else it is calibrated
            calibrate_on_validation(model, corpus)


def calibrate_on_validation(model: Transformer, corpus, windows: int = 256, full: float = 0.0) -> None:
    """`calibrate` on the validation part, as inference sees text: unseen, no dropout.

    Not on training text, whose states drift as it is learnt; never on held-out text.
    """
    calibrate(model, corpus.windows("val", model.cfg.max_len, windows)[:, :-1], full)


@torch.no_grad()
def calibrate(model: Transformer, tokens: Tensor, full: float = 0.0) -> None:
    """Set what holds a target depth (biases, a threshold or a price) on tokens [n, L]; else do nothing."""
    if not model.policy.holds_budget:
        return
    was_training, tokens = model.training, tokens.to(model.embed.weight.device)
    model.eval()
    try:
        for sampling in ((False,) if model.cfg.estimator == "scaled" else (True, False)) * 2:
            model(tokens, sampling=sampling, calibrate=True, full=full)
        return
    except torch.OutOfMemoryError:
        if len(tokens) == 1:
            raise
    finally:
        model.train(was_training)
    torch.cuda.empty_cache()  # outside of the handler, which holds on to the memory
    calibrate(model, tokens[: len(tokens) // 2], full)


def at_depth(model: Transformer, corpus, target_depth: float) -> Transformer:
    """A copy of a model that is held to another depth, by thresholds or a price set on the validation part.

    Raises ValueError if the model has no budget that can be set, or its policy cannot have such a depth.
    """
    if not model.policy.holds_budget:
        raise ValueError(f"routing {model.cfg.routing} holds no target depth: it cannot be set")
    with torch.random.fork_rng(devices=[]):
        other = Transformer(replace(model.cfg, target_depth=target_depth)).to(model.embed.weight)
    other.eval().load_state_dict(model.state_dict())
    other.vocabulary = model.vocabulary
    calibrate_on_validation(other, corpus)
    return other


# ---- Measuring and generating ----


@torch.no_grad()
def score(model: Transformer, windows: Tensor, sampling=False, batch_size=128, full=0.0) -> dict[str, Tensor]:
    """Per predicted token of windows [n, L + 1], each [n, L] on the CPU: surprisal and entropy (nats),
    correct, depth; and the actions [N, R, n, L]. Where memory runs out, batches get smaller."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        parts = []
        for batch in windows.split(batch_size):
            inputs, targets = batch[:, :-1].to(device), batch[:, 1:].to(device)
            out = model(inputs, sampling=sampling, full=full)
            logits = out.logits.float()
            surprisal = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
            seen = dict(surprisal=surprisal, entropy=entropy, correct=logits.argmax(-1) == targets)
            parts.append(seen | dict(depth=out.depth, actions=out.actions))
        return joined(parts)
    except torch.OutOfMemoryError:
        if batch_size == 1:
            raise
    finally:
        model.train(was_training)
    parts = out = logits = surprisal = entropy = seen = None  # and outside of the handler: they hold memory
    torch.cuda.empty_cache()
    return score(model, windows, sampling, batch_size // 2, full)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Scores of several batches as one, on the CPU."""
    return {k: torch.cat([part[k] for part in parts], 2 if k == "actions" else 0).cpu() for k in parts[0]}


def metrics(seen: dict[str, Tensor], tokens_per_byte: float | None = None) -> dict:
    """Of scores: loss (nats a token), accuracy (%), effective depth, bits per byte, rates [N][R][3]."""
    loss, actions = seen["surprisal"].mean().item(), seen["actions"]
    counts = torch.stack([(actions == action).sum((2, 3)) for action in (SKIP, FORWARD, RECURSE)], dim=-1)
    counts[..., SKIP] += counts.sum(-1) == 0  # a step where none is asked runs none
    rates = counts.double() / counts.sum(-1, keepdim=True)  # [N, R, 3] of the tokens asked
    accuracy, depth = 100 * seen["correct"].float().mean().item(), seen["depth"].float().mean().item()
    bits = None if tokens_per_byte is None else loss / math.log(2) * tokens_per_byte
    return dict(loss=loss, accuracy=accuracy, effective_depth=depth, bits_per_byte=bits,
                tokens=seen["depth"].numel(), action_rates=rates.tolist())  # fmt: skip


def evaluate(model: Transformer, corpus, part: str = "heldout", windows: int | None = None,
             sampling: bool = False, full: float = 0.0, target_depth=None) -> dict:  # fmt: skip
    """The `metrics` of a part of a corpus ("train", "val", "heldout"), or of some windows spread over it.

    target_depth: measure the model as it is `at_depth`. Raises ValueError if the corpus has other tokens than
    the model, or if the model cannot be held to the depth.
    """
    check_vocabulary(model, corpus)
    model = model if target_depth is None else at_depth(model, corpus, target_depth)
    read = corpus.windows(part, model.cfg.max_len, windows)
    seen = score(model, read, sampling, full=full)
    tokens_per_byte = corpus.tokens_per_byte(part) if hasattr(corpus, "tokens_per_byte") else None
    details = dict(details=corpus.details(seen, read)) if hasattr(corpus, "details") else {}
    return metrics(seen, tokens_per_byte) | details


@torch.inference_mode()
def generate(model: Transformer, prompt: Tensor, max_new_tokens: int, use_cache: bool = True,
             temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """Continue a prompt of token ids, int64 [B, L] or [L]; returns the same kind, prompt included.

    temperature 0 takes the likeliest token, above it samples. When the context is full, its older half is
    dropped and the cache is built again. So generation can go on for ever, with and without a cache alike.
    Raises ValueError for a prompt that is no tensor, empty, out of range or too long, and for wrong numbers.
    """
    if not isinstance(prompt, Tensor):
        raise ValueError(f"the prompt must be an int64 tensor of token ids, not {type(prompt).__name__}")
    temperature = check_value("temperature", temperature, NotNegative)
    max_new_tokens = check_value("max_new_tokens", max_new_tokens, Whole)
    tokens = torch.atleast_2d(prompt).to(next(model.parameters()).device)
    model.check(tokens)
    was_training, most = model.training, model.cfg.max_len
    model.eval()
    start, cache, fresh = 0, Cache(), tokens  # where the context begins; fresh: what the cache has not seen
    try:
        for _ in range(max_new_tokens):
            if tokens.shape[1] - start > most:
                start = tokens.shape[1] - max(most // 2, 1)
                cache, fresh = Cache(), tokens[:, start:]
            logits = (model(fresh, cache) if use_cache else model(tokens[:, start:])).logits[:, -1]
            fresh = logits.argmax(-1, keepdim=True)
            if temperature > 0:
                p = (logits / temperature).softmax(-1).to(generator.device if generator else logits.device)
                fresh = torch.multinomial(p, 1, generator=generator).to(tokens.device)
            tokens = torch.cat([tokens, fresh], dim=1)
    finally:
        model.train(was_training)
    with torch.inference_mode(False):  # tensors like any others: one may train on them
        return tokens[0].clone() if prompt.dim() == 1 else tokens.clone()


# ---- Saving and loading ----


def save_model(model: Transformer, path: str | Path, notes: dict[str, str] | None = None) -> None:
    """Write weights, configuration and notes (text by name) into one safetensors file, whole or not at all.

    Raises ValueError if notes are not text, OSError if the file cannot be written.
    """
    notes = dict(notes or {})
    if not all(isinstance(text, str) for item in notes.items() for text in item):
        raise ValueError("notes must map names to text")
    about = dict(format="morlib", morlib=__version__, config=json.dumps(asdict(model.cfg)))
    about |= dict(vocabulary=json.dumps(model.vocabulary), notes=json.dumps(notes))
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    path = Path(path).expanduser()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(safetensors.torch.save(tensors, about))
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path.name} in {path.parent}: {error.strerror}") from error


def load_model(path: str | Path) -> tuple[Transformer, dict[str, str]]:
    """The model that `save_model` wrote, on the CPU in evaluation mode, and its notes. Runs no code.

    Raises ValueError that names a file which is missing, cut short, or none of ours.
    """
    if not (path := Path(path).expanduser()).is_file():
        raise ValueError(f"no model file at {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != "morlib":
                raise ValueError("it was not written by morlib.save_model")
            model = Transformer(ModelConfig(**json.loads(about["config"])))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
            model.vocabulary = json.loads(about["vocabulary"])
            return model.eval(), json.loads(about["notes"])
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path.name} is not a model that can be loaded ({reason})") from None
