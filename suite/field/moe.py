"""Mixture of experts: top-1 (Switch), top-2 (Mixtral), and in MoR.

Fedus et al. 2022, arXiv:2101.03961, section 2; Jiang et al. 2024, arXiv:2401.04088, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib
from morlib import Block, ModelConfig, Output

from .common import System
from .mor import ExpertChoice, balance

EXPERTS = dict(experts=4, top=1, balance=0.01)


class Experts(nn.Module):
    """Feed-forward networks of width d_ff / top, of which each token uses its `top` likeliest.

    So a token uses as many parameters as in the dense network, but for the router. With one, the output is
    scaled by its probability among all (Switch); with more, by the softmax among those chosen
    (Mixtral).

    Differs: biases, a row an expert, begin at random and decay as matrices do, where those of a dense network
    begin at 0 and do not decay.
    """

    def __init__(self, cfg: ModelConfig, experts: int, top: int):
        super().__init__()
        D, hidden, self.top = cfg.d_model, cfg.d_ff // top, top
        self.router = nn.Linear(D, experts, bias=False)
        self.expand = nn.Parameter(torch.randn(experts, hidden, D) * (3 * D) ** -0.5)
        self.contract = nn.Parameter(torch.randn(experts, D, hidden) * (6 * hidden * cfg.n_layers) ** -0.5)
        self.bias = nn.ParameterList([torch.zeros(experts, hidden), torch.zeros(experts, D)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] to the same, and the `balance` of this use of the experts."""
        p = self.router(x).float().softmax(-1)  # [T, experts]
        gate, chosen = p.topk(self.top, -1)  # each [T, top]
        gate = gate / gate.sum(-1, keepdim=True) if self.top > 1 else gate
        y = torch.zeros_like(x)
        for expert in range(p.shape[1]):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            hidden = F.linear(x[rows], self.expand[expert], self.bias[0][expert]).relu()
            out = F.linear(hidden, self.contract[expert], self.bias[1][expert])
            y = y.index_add(0, rows, (out * gate[rows, place, None]).to(y.dtype))
        return y, balance(p, chosen)


class ExpertBlock(Block):
    """A block whose feed-forward network is Experts. Their balance is added to the pass' memory.

    Raises ValueError if there are fewer experts than a token uses, or if these do not divide d_ff.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        options = morlib.POLICIES[cfg.routing].options_of(cfg)
        if not 1 <= options["top"] <= options["experts"] or cfg.d_ff % options["top"]:
            wanted = f"top in 1..{options['experts']} that divides d_ff ({cfg.d_ff})"
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs {wanted}, not {options['top']}")
        self.feed_forward = Experts(cfg, options["experts"], options["top"])
        self.weights_used = 4 * cfg.d_model**2 + 2 * cfg.d_model * cfg.d_ff + cfg.d_model * options["experts"]

    def at(self, layer: int, memory: dict) -> Callable:
        return partial(self, memory=memory)

    def forward(self, x, packing, past=None, mask=None, memory=None) -> Tensor:
        def experts(h: Tensor) -> Tensor:
            change, even = self.feed_forward(h)
            memory.setdefault("balance", []).append(even)
            return change

        return self.around(x, lambda h: self.attention(h, packing, past, mask), experts)


class MixtureOfExperts(System):
    """Every token runs every layer once; experts stand in the feed-forward (Switch).

    The loss gets `balance` times the mean of n sum_i f_i P_i over the layers.

    Differs: Switch adds up the balance of the layers, where this is their mean. Switch has experts in every
    other layer. Mixtral's experts have the full width each, and there are eight; its section 2 names no
    balance, so the one here is Switch's. No expert has a capacity beyond which it drops tokens. Switch has
    one for the sake of many devices; it would let a token's output depend on later tokens. Mixtral has none.
    Switch's smaller initialisation (a tenth) and its router's jitter are left out.
    """

    block = ExpertBlock
    OPTIONS = EXPERTS

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        return loss + self.options["balance"] * torch.stack(out.memory["balance"]).mean()


class RecursionsOfExperts(ExpertChoice):
    """MoR whose blocks have experts. Sparsity inside a recursion is future work that its authors name
    (Bae et al. 2025, arXiv:2507.10524, limitations)."""

    block = ExpertBlock
    OPTIONS = ExpertChoice.OPTIONS | EXPERTS

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        even = torch.stack(out.memory["balance"]).mean()
        return super().objective(loss, out, targets) + self.options["balance"] * even


morlib.POLICIES |= {"moe": MixtureOfExperts, "mor-moe": RecursionsOfExperts}
