"""Who runs all layers is decided once: controls of token worth, and token worth above more layers."""

from __future__ import annotations

from dataclasses import replace

import torch

import morlib
from morlib import Decision, ModelConfig, StepInput

from ..files import REFERENCE

# Made by `suite.routing.deep_contexts`, read by `suite.field.told`
CONTEXTS = REFERENCE / "depth_pays.json"


class WholeTokens(morlib.Policy):
    """A token runs the first layers, as many as the option `always` says, then all of the others or none.

    The target depth says how many tokens run all. Raises ValueError unless it leaves a choice.
    """

    OPTIONS = dict(always=morlib.WorthRouter.ALWAYS)
    version = "1"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        N, E, always = cfg.n_layers, cfg.target_depth, (self.OPTIONS | (cfg.options or {}))["always"]
        morlib.check_value("ModelConfig: option always", always, morlib.Count)
        if E is None or not always < E < N:
            wanted = f"a target_depth above {always} and below n_layers ({N})"
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs {wanted}, not {E}")
        self.always, self.share = always, (E - always) / (N - always)

    def shares(self) -> list[float]:
        return [1.0] * self.always + [self.share] * (self.cfg.n_layers - self.always)

    def forward(self, step: StepInput) -> Decision:
        if step.layer < self.always:
            return Decision()
        return Decision(self.chosen(step).long(), lasts=True)

    def chosen(self, step: StepInput) -> torch.Tensor:
        """Who runs all layers, bool [T]."""
        raise NotImplementedError


def warmed_up(chosen: torch.Tensor, step: StepInput) -> torch.Tensor:
    """Those who are chosen [T], and of the others as many as the warm-up from full depth still runs.

    Inference draws by position and row, evenly spread, so that a pass can be repeated.
    """
    if not step.full:
        return chosen
    draw = torch.rand(len(chosen), device=chosen.device)
    if not step.sampling:
        draw = (0.7548776662 * step.position + 0.6180339887 * step.row) % 1
    return chosen | (draw < step.full)


class BlindTokens(WholeTokens):
    """The control of a router that decides once: as many tokens run all layers, drawn blindly.

    Of blind draws for each layer apart, which "random" makes, hardly any token runs all layers.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.register_buffer("table", torch.rand(cfg.max_len))

    def chosen(self, step: StepInput) -> torch.Tensor:
        return step.draw(self.table) < self.share + (1 - self.share) * step.full


class ByKind(WholeTokens):
    """The control of learning whom to run: as many tokens run all layers, and lots decide once which *kinds*.

    A kind is the token that was read. So it always gets the same depth, as it gets the same expert in Hash
    Layers (Roller et al. 2021, arXiv:2106.04426, section 3), and nothing asks what depth is worth to it.
    The first batch of a training says how frequent the kinds are, and from then on the choice stands. Each
    kind is as likely to be chosen, frequent or rare, and those chosen make up the share of that batch as
    nearly as lots allow. Kinds that it lacks are drawn one by one.
    """

    version = "2"
    NEAR, TRIES = 0.005, 100  # lots are drawn until they are so near to the share, or so often

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.register_buffer("deep", torch.rand(cfg.vocab_size) < self.share)  # [V]
        self.register_buffer("settled", torch.tensor(False))

    def chosen(self, step: StepInput) -> torch.Tensor:
        kinds = step.ids[step.row, step.position]
        if step.calibrate and not self.settled:
            self.settle_kinds(kinds)
        return warmed_up(self.deep.index_select(0, kinds), step)

    def settle_kinds(self, kinds: torch.Tensor) -> None:
        """Choose the kinds that run all layers by how frequent they are among these [T]."""
        frequency = torch.bincount(kinds.cpu(), minlength=self.cfg.vocab_size) / len(kinds)  # [V]
        seen, best = frequency.nonzero().flatten(), None
        for _ in range(self.TRIES):
            order = seen[torch.randperm(len(seen))]
            # kinds lie on a circle, as long as they are frequent: those whose middle is in the share run all
            middle = (frequency[order].cumsum(0) - frequency[order] / 2 + torch.rand(1)) % 1
            deep = order[middle < self.share]
            off = abs(frequency[deep].sum().item() - self.share)
            if best is None or off < best[0]:
                best = off, deep
            if off < self.NEAR:
                break
        self.deep[seen.to(self.deep.device)] = False
        self.deep[best[1].to(self.deep.device)] = True
        self.settled.fill_(True)


class ByPosition(WholeTokens):
    """The control of ByKind: lots decide once which positions run all layers, whatever token stands there."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.register_buffer("deep", torch.randperm(cfg.max_len) < self.share * cfg.max_len)

    def chosen(self, step: StepInput) -> torch.Tensor:
        return warmed_up(self.deep.index_select(0, step.position), step)


class WorthHalfWay(morlib.Policy):
    """Two routers of token worth: one decides about the layers up to the half, the other about the rest.

    Each asks every token, so four depths are possible. Each holds the share that the target depth asks for.
    Raises ValueError where there are not three layers.
    """

    holds_budget, version = True, "1"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.routers = torch.nn.ModuleList(morlib.WorthRouter(cfg) for _ in range(2))
        self.half = max(cfg.n_layers // 2, morlib.WorthRouter.ALWAYS + 1)
        if not self.half < cfg.n_layers:
            raise ValueError(f"ModelConfig: routing {cfg.routing} needs three layers, not {cfg.n_layers}")

    def shares(self) -> list[float]:
        return self.routers[0].shares()

    def forward(self, step: StepInput) -> Decision:
        second = step.layer >= self.half
        memory = step.memory.setdefault(second, {})
        return replace(self.routers[second](replace(step, memory=memory)), lasts=second)

    def own_loss(self, memory: dict, scale: float) -> torch.Tensor | None:
        losses = [router.own_loss(memory[second], scale) for second, router in enumerate(self.routers)]
        losses = [loss for loss in losses if loss is not None]
        return sum(losses) if losses else None


morlib.POLICIES |= {
    "blind-tokens": BlindTokens,
    "by-kind": ByKind,
    "by-position": ByPosition,
    "worth-half-way": WorthHalfWay,
}
for _first in (5, 6):  # token worth above more layers; five are much as in MoR's budget of six in twelve
    _own = dict(ALWAYS=_first, __module__=__name__)
    morlib.POLICIES[f"worth-above-{_first}"] = type("WorthAbove", (morlib.WorthRouter,), _own)
_own = dict(OPTIONS=dict(always=5), __module__=__name__)
morlib.POLICIES["blind-tokens-above-5"] = type("BlindAbove", (BlindTokens,), _own)  # its control
