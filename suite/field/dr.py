"""Dr.LLM: routers for a trained model, taught by paths that pay.

Heakl et al. 2025, arXiv:2510.12773, sections 3.1 (routers), 3.2 (how they learn), 4.1 (edited paths) and 4.2
(length-aware MCTS).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib
from morlib import FORWARD, Decision, ModelConfig, Output, StepInput, Tokens, Transformer

from .common import System, learning


class DynamicRouting(System):
    """A trained model keeps its weights. A router a layer (D -> hidden -> 3) learns who skips it, runs it, or
    runs it twice.

    For `lines` lines of each batch a search looks for paths by which they cost less: the loss of a line (the
    sum over its tokens, nats) and `cost` for each application. It begins with the routers' own path or with
    the plain one, whichever is cheaper. `rounds` times it gives some tokens another action at a layer, and
    keeps what is cheaper; every other time these are the tokens that the router itself would change first.
    The routers learn the path found, by the focal loss -(1 - p)^gamma log p. An action that was taken n times
    in the batch weighs (1 - beta) / (1 - beta^n) (Cui et al. 2019, arXiv:1901.05555), 1 on average.

    Differs: each token has its own path, read from its own (normalised) state, where the paper has one for a
    whole question, read from the means of parts of it. So a token that skips a layer shows no keys there, and
    a second pass sees those that repeat only; there all tokens skip or repeat together, and attention sees
    them all. The trained model never met such gaps; whether that is why it has little to skip is not tested.
    What a path is worth is its loss and its price, where theirs must keep the answer right within a budget.
    Any number of layers in a row may be skipped, of theirs two at most (section 4.1). The search climbs, anew
    for each batch, where theirs is a tree (MCTS) that labels a set of questions once. All actions weigh the
    same (beta 0), where theirs has beta 0.999, which was worse in the trials; weights are of a batch, theirs
    of all labels (section 3.2). The bias of FORWARD begins at 1, where theirs begin at 0 (section 3.1).
    A record does not count the passes of the search among its applications. Where memory makes a batch
    several parts, `lines` are of each part.
    Raises ValueError with dropout, by which a path would cost another amount each time, and for a beta
    outside [0, 1).
    """

    OPTIONS = dict(cost=0.1, lines=8, rounds=128, gamma=2.0, beta=0.0)

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        if cfg.dropout:  # the search sees the states as the batch began with them
            raise ValueError(f"ModelConfig: routing dr needs dropout 0, not {cfg.dropout}")
        morlib.check_value("ModelConfig: option lines", self.options["lines"], morlib.Count)
        if not 0 <= self.options["beta"] < 1:
            raise ValueError(f"ModelConfig: routing dr needs a beta in [0, 1), not {self.options['beta']}")
        self.hidden = max(cfg.d_model // 2, 8)
        self.routers = nn.ModuleList(self.router() for _ in range(cfg.n_layers))

    def router(self) -> nn.Module:
        """Begins with the plain path: run once."""
        last = nn.Linear(self.hidden, 3)
        last.bias.data[FORWARD] = 1.0
        return nn.Sequential(nn.Linear(self.cfg.d_model, self.hidden), nn.GELU(), last)

    def logits(self, states: Tensor, layer: int) -> Tensor:
        return self.routers[layer](F.layer_norm(states, states.shape[-1:])).float()  # [T, 3]

    def forward(self, step: StepInput) -> Decision:
        if step.recursion:  # who repeats does so once
            return Decision()
        if step.layer == 0 and learning(step):
            step.memory |= dict(start=step.states.detach(), model=step.readout.__self__)
        with torch.no_grad():
            return Decision(self.logits(step.states, step.layer).argmax(-1))

    def operations(self, actions: Tensor) -> int:
        return actions[:, 0].numel() * 2 * self.hidden * (self.cfg.d_model + 3)

    def adopt(self, model: Transformer, state: dict[str, Tensor]) -> None:
        """Put the weights of a trained fixed model in. Raises ValueError if they are of another kind."""
        own = model.state_dict()
        backbone = {name: own[name].shape for name in own if not name.startswith("policy.")}
        if {name: tensor.shape for name, tensor in state.items()} != backbone:
            wanted = f"a fixed model of its own width and {self.cfg.n_layers} layers, a block each"
            raise ValueError(f"dr begins with {wanted}")
        model.load_state_dict(own | state)

    def objective(self, loss: Tensor, out: Output, targets: Tensor) -> Tensor:
        model, training, lines = out.memory["model"], out.memory["model"].training, self.options["lines"]
        path, targets = out.actions[:, 0, :lines].flatten(1).long(), targets[:lines]
        start = out.memory["start"][: targets.numel()]
        model.eval()
        try:
            path = self.search(model, start, targets, path)
            seen = through(model, start, path, targets.shape)
        finally:
            model.train(training)
        return self.focal(self.along(seen).flatten(0, 1), path.flatten())

    def along(self, seen: list[Tensor]) -> Tensor:
        """The routers' logits [N, B * L, 3] on the states that a path goes through."""
        return torch.stack([self.logits(states, layer) for layer, states in enumerate(seen[:-1])])

    def focal(self, logits: Tensor, actions: Tensor) -> Tensor:
        """The mean focal loss of logits [T, 3] on the actions [T] that were found."""
        taken = torch.bincount(actions, minlength=3)
        weight = (1 - self.options["beta"]) / (1 - self.options["beta"] ** taken.clamp(min=1))
        weight = weight[actions] / weight[actions].mean()
        log_p = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        return -(weight * (1 - log_p.exp()) ** self.options["gamma"] * log_p).mean()

    @torch.no_grad()
    def search(self, model: Transformer, start: Tensor, targets: Tensor, path: Tensor) -> Tensor:
        """A path [N, B * L] by which each line costs no more than by the given one, and than by the plain.

        start: the states [B * L, D] before the first layer; targets [B, L].
        """
        logits = self.along(through(model, start, path, targets.shape))
        keen = logits - logits.gather(2, path[..., None])  # to leave the path for each action
        best, least = path, self.price(model, start, targets, path)  # [B]
        for turn in range(self.options["rounds"] + 1):
            trial = torch.full_like(path, FORWARD)
            if turn:
                trial = changed(best, targets.shape, keen if turn % 2 == 0 else None)
            price = self.price(model, start, targets, trial)
            cheaper = price < least
            best = torch.where(cheaper.repeat_interleave(targets.shape[1]), trial, best)
            least = torch.where(cheaper, price, least)
        return best

    def price(self, model: Transformer, start: Tensor, targets: Tensor, path: Tensor) -> Tensor:
        """What each line [B] costs by a path [N, B * L] (nats)."""
        logits = model.readout(through(model, start, path, targets.shape)[-1]).float()
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
        applications = path.clamp(max=model.cfg.max_recursions).sum(0).view(targets.shape)
        return (losses + self.options["cost"] * applications).sum(1)


def changed(path: Tensor, shape: torch.Size, keen: Tensor | None = None) -> Tensor:
    """A path [N, B * L] in which each line takes one action, drawn, at one layer for up to half of its
    tokens: for any of them, or for the keenest of them by keen [N, B * L, 3]."""
    (B, L), device = shape, path.device
    row = torch.arange(B, device=device)
    layer, action = torch.randint(len(path), (B,), device=device), torch.randint(3, (B,), device=device)
    drawn = keen is None
    first = torch.rand(B, L, device=device) if drawn else keen.view(-1, B, L, 3)[layer, row, :, action]
    rank = first.argsort(1, descending=True).argsort(1)
    chosen = rank < (L / 2 * torch.rand(B, 1, device=device) ** 3).clamp(min=1)
    path = path.clone().view(-1, B, L)
    path[layer, row] = torch.where(chosen, action[:, None], path[layer, row])
    return path.flatten(1)


@torch.no_grad()
def through(model: Transformer, x: Tensor, path: Tensor, shape: torch.Size) -> list[Tensor]:
    """The states [B * L, D] before each layer and after the last, [N + 1] of them, by a path [N, B * L]."""
    seen = [x]
    for layer, actions in enumerate(path):
        block = model.blocks[model.layout[layer]]
        for recursion in range(model.cfg.max_recursions):
            places = (actions > recursion).nonzero().flatten()
            if len(places):  # a copy, as states are changed in place
                x = model.run_step([block], x.clone(), Tokens(places), [None], *shape)
        seen.append(x)
    return seen


morlib.POLICIES["dr"] = DynamicRouting
