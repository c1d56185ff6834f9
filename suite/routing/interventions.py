"""What are a router's decisions worth? They are overruled in a trained model, and the loss is measured
again.

A plan int64 [N, n, L] says how often each layer runs each token of n windows of L places. Windows have
shape [n, L + 1], hardness and changes of the loss [n, L].
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pandas as pd
import scipy.stats
import torch
from torch import Tensor

import morlib
from morlib import RECURSE, SKIP, Decision, Policy, StepInput, Transformer

from ..results.stats import within


class Planned(Policy):
    """Decisions made elsewhere: interventions, oracles and planted routers. Give it to a model as its
    policy.

    The policy that is overruled, if given, still weighs what is run.
    """

    def __init__(self, plan: Tensor, overruled: Policy | None = None):
        super().__init__(overruled.cfg if overruled else None)
        self.register_buffer("plan", plan)  # [N, B, L] how often each layer runs each token of a batch
        self.overruled = overruled

    def forward(self, step: StepInput) -> Decision:
        """Raises ValueError if the batch is not the one that was planned."""
        plan = self.plan[step.layer]  # [B, L]
        if step.recursion == 0 and len(step.index) != plan.numel():
            raise ValueError(f"the plan is for {plan.numel()} tokens, the batch has {len(step.index)}")
        left = plan.flatten()[step.index] - step.recursion
        actions = left.clamp(SKIP, RECURSE).long()  # none left: skip; the last one: forward; more: recurse
        return replace(self.overruled(step), actions=actions) if self.overruled else Decision(actions)

    def shares(self) -> list[float]:
        return [1.0] * len(self.plan)


@contextlib.contextmanager
def follows(model: Transformer, plan: Tensor):
    """Inside, the model does what a plan for its batch says; afterwards its policy is back in its place."""
    policy = model.policy
    model.policy = Planned(plan.to(next(model.parameters()).device), policy)
    try:
        yield
    finally:
        model.policy = policy


def applications(actions: Tensor) -> Tensor:
    """[N, n, L]: how often each layer ran each token, from actions [N, R, n, L]."""
    return (actions >= morlib.FORWARD).sum(1)


def forced(model: Transformer, windows: Tensor, plan: Tensor, batch_size: int = 128) -> np.ndarray:
    """Surprisal (nats) [n, L] of a model that follows a plan.

    What is run counts with the weight that the router gives it, also where the router would have skipped.
    """
    surprisal = []
    for part, batch in zip(plan.split(batch_size, dim=1), windows.split(batch_size)):
        with follows(model, part):
            surprisal.append(morlib.score(model, batch)["surprisal"])
    return torch.cat(surprisal).numpy()


# ---- The plans ----


def plans(
    own: Tensor, hardness: np.ndarray, most: int, seed: int = 0
) -> dict[str, tuple[Tensor, np.ndarray]]:
    """The interventions: name to plan, and the places bool [n, L] that it is about.

    own: the router's own plan. most: R, the most applications of a layer.
    """
    rng = np.random.default_rng(seed)
    everywhere = np.ones(hardness.shape, dtype=bool)
    whole = {
        "depths shuffled in each sequence": shuffled(own, rng),
        "the same depth for all": same_for_all(own, most),
        "deepest to the hardest": dealt(own, hardness, "hardest"),
        "deepest to the easiest": dealt(own, hardness, "easiest"),
    }
    result = {name: (plan, everywhere) for name, plan in whole.items()}
    tenths = tenths_of(hardness, rng)
    for name, tenth in tenths.items():
        result[f"{name} tenth skips every layer that can be skipped"] = skipping(own, tenth), tenth
    if most > 1:
        for name, tenth in tenths.items():
            result[f"{name} tenth recurses once more"] = recursing(own, tenth, most), tenth
    return result


def reordered(own: Tensor, order: np.ndarray) -> Tensor:
    """Each sequence keeps its depths, but place i gets the decisions of place order[i]. order: [n, L]"""
    return own.gather(2, torch.as_tensor(order).expand_as(own))


def shuffled(own: Tensor, rng: np.random.Generator) -> Tensor:
    n, L = own.shape[1:]
    return reordered(own, rng.permuted(np.broadcast_to(np.arange(L), (n, L)), axis=1))


def dealt(own: Tensor, hardness: np.ndarray, first: str) -> Tensor:
    """The deepest decisions of each sequence go to its "hardest" or "easiest" place, the next to the
    next."""
    deepest_first = own.sum(0).argsort(dim=1, descending=True, stable=True).numpy()
    turn = np.argsort(np.argsort(-hardness, axis=1), axis=1)  # 0: the hardest of its sequence
    if first == "easiest":
        turn = hardness.shape[1] - 1 - turn
    return reordered(own, np.take_along_axis(deepest_first, turn, 1))


def same_for_all(own: Tensor, most: int) -> Tensor:
    """Every place runs the applications that are run most, as many as the mean depth."""
    reach = reach_of(own, most)
    depth = int(own.sum(0).double().mean().round())
    chosen = torch.zeros(reach.numel()).index_fill(0, reach.flatten().topk(depth)[1], 1)
    level = chosen.view_as(reach).sum(1).long()  # [N]
    return level[:, None, None].expand_as(own).contiguous()


def reach_of(own: Tensor, most: int) -> Tensor:
    """[N, R]: the share of the places that each layer runs more than r times."""
    return torch.stack([(own > r).double().mean((1, 2)) for r in range(most)], dim=1)


def tenths_of(hardness: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The hardest tenth of all places, a random one and the easiest, each as bool [n, L]."""
    rank = scipy.stats.rankdata(hardness, method="ordinal").reshape(hardness.shape) / hardness.size
    drawn = rng.permutation(rank.flatten()).reshape(rank.shape)
    return {"hardest": rank > 0.9, "random": drawn > 0.9, "easiest": rank <= 0.1}


def skipping(own: Tensor, where: np.ndarray) -> Tensor:
    """Some places skip every layer that the router skips somewhere; all else as it is."""
    optional = (own == 0).flatten(1).any(1)  # [N]
    return torch.where(optional[:, None, None] & torch.as_tensor(where), 0, own)


def recursing(own: Tensor, where: np.ndarray, most: int) -> Tensor:
    """Some places recurse once more: in that of their running layers which recurses most often
    elsewhere."""
    has_room = (own > 0) & (own < most) & torch.as_tensor(where)
    often = 1 + reach_of(own, most)[:, 1][:, None, None]
    layer = (has_room * often).argmax(0)  # [n, L]
    more = torch.zeros_like(own).scatter(0, layer[None], 1) * has_room
    return own + more


# ---- What they change ----


def interventions(model: Transformer, windows: Tensor, hardness: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """One row an intervention: the change in loss (nats) where it was made (`there`, with its 95 % interval
    over windows, `low` to `high`) and over all places (`everywhere`); the change in mean depth
    (`depth`)."""
    own = applications(morlib.score(model, windows)["actions"])
    before, rows, n = forced(model, windows, own), [], len(windows)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=400)
    weight = np.vstack([np.ones(n), drawn])  # [401, n] first all windows once, then bootstrap draws of them
    for name, (plan, where) in plans(own, hardness, model.cfg.max_recursions, seed).items():
        change = forced(model, windows, plan) - before
        there = weight @ (change * where).sum(1) / (weight @ where.sum(1))
        low, high = np.percentile(there[1:], [2.5, 97.5])
        row = dict(intervention=name, there=there[0], low=low, high=high, everywhere=change.mean())
        rows.append(row | dict(depth=float((plan - own).sum(0).double().mean())))
    return pd.DataFrame(rows)


# ---- The oracle ----


def oracle(model: Transformer, windows: Tensor, reference: Transformer, most: int, seed: int = 0) -> dict:
    """What the best number of applications of one layer at one place would be worth (nats).

    One place is drawn in each of at most so many windows. Every count of every layer that the router may
    skip is tried there, one at a time. The result:
        places, layers  how many were tried
        loss            of the router's own decisions
        hindsight       gain of the best single change, chosen by the token that came: no router can know it
        foresight       gain of that chosen by cross-entropy with the reference model's prediction, and then
                        judged by the token that came
        decision        mean gain, in foresight, of the best count of one given layer
        ran, skipped    worth, in foresight, of running a layer once instead of skipping it, where the router
                        ran it and where it skipped it
        agreement       rank correlation of the router's choice with that worth, within layers
    """
    windows = windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]
    n = len(windows)
    own = applications(morlib.score(model, windows)["actions"])
    at = torch.as_tensor(np.random.default_rng(seed).integers(windows.shape[1] - 1, size=n))
    optional = (own == 0).flatten(1).any(1).nonzero()[:, 0].tolist()
    belief = prediction(reference, windows, at).softmax(-1)
    loss, expected = (v.numpy() for v in outcome(model, windows, own, at, belief))
    result = dict(places=n, layers=len(optional), loss=float(loss.mean()))
    if not optional:
        return result | dict.fromkeys(MISSING_WITHOUT_CHOICE, np.nan)
    tried = np.stack([
        np.stack([outcome(model, windows, changed(own, layer, at, count), at, belief).numpy()
                  for count in range(model.cfg.max_recursions + 1)]) for layer in optional
    ])  # [F, R + 1, 2, n]  # fmt: skip
    chosen = own[optional, torch.arange(n)[:, None], at[:, None]].T.numpy()  # [F, n]
    return result | gains(loss, expected, tried) | choices(chosen, tried[:, 0, 1] - tried[:, 1, 1])


MISSING_WITHOUT_CHOICE = ("hindsight", "foresight", "decision", "ran", "skipped", "agreement")


def changed(own: Tensor, layer: int, at: Tensor, count: int) -> Tensor:
    """The router's plan, but for one layer at one place `at` [n] of each window."""
    plan = own.clone()
    plan[layer, torch.arange(len(at)), at] = count
    return plan


@torch.no_grad()
def prediction(model: Transformer, windows: Tensor, at: Tensor) -> Tensor:
    """Logits [n, V] at one place `at` [n] of each window."""
    inputs = windows[:, :-1].to(next(model.parameters()).device)
    return model(inputs, sampling=False).logits[torch.arange(len(windows)), at].cpu()


def outcome(model: Transformer, windows: Tensor, plan: Tensor, at: Tensor, belief: Tensor) -> Tensor:
    """[2, n] under a plan, at one place of each window: the surprisal of the token that came, and the
    cross-entropy with what the reference model believes, probabilities [n, V] (nats)."""
    with follows(model, plan):
        logp = prediction(model, windows, at).log_softmax(-1)
    row = torch.arange(len(windows))
    return torch.stack([-logp[row, windows[row, at + 1]], -(belief * logp).sum(-1)])


def gains(loss: np.ndarray, expected: np.ndarray, tried: np.ndarray) -> dict[str, float]:
    """What the best changes gain on average. loss, expected: [n]; tried: [F, R + 1, 2, n]."""
    flat, row = tried.reshape(-1, 2, len(loss)), np.arange(len(loss))
    foreseen = flat[flat[:, 1].argmin(0), 0, row]
    return dict(
        hindsight=float((loss - flat[:, 0].min(0)).mean()),
        foresight=float((loss - foreseen).mean()),
        decision=float((expected - tried[:, :, 1].min(1)).mean()),
    )


def choices(chosen: np.ndarray, benefit: np.ndarray) -> dict[str, float]:
    """Whether a router runs layers where that is worth more. chosen: its counts [F, n]; benefit: [F, n]."""
    ran = chosen > 0
    layer = np.broadcast_to(np.arange(len(chosen))[:, None], chosen.shape).flatten()
    a, b = (within(scipy.stats.rankdata(v), [layer]) for v in (benefit, chosen))
    return dict(
        ran=float(benefit[ran].mean()) if ran.any() else np.nan,
        skipped=float(benefit[~ran].mean()) if not ran.all() else np.nan,
        agreement=float(a @ b / np.sqrt((a @ a) * (b @ b))) if a.any() and b.any() else 0.0,
    )
