"""What token worth measures, beside what it stands for: on a trained model, by kind of token."""

from __future__ import annotations

from contextlib import contextmanager

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import morlib

from ..runs import Run, trained_model
from .known_depth import KIND_NAMES, KINDS
from .tables import signed

WORTH_MEASURED = "worth_measured.json"  # a table of `worth_means` that ships
LINES, DRAWS = 60, 100


def measure_worth(spec: Run, lines: int = LINES, draws: int = DRAWS) -> pd.DataFrame:
    """One row a token of held-out lines: its kind, and by how much the loss of its line (nats) rises if it

    damped: runs with weight 0, which is what worth stands for, all others as the price says;
    skipped: does not run the further layers at all.
    explored: the mean of what is measured in training, over as many draws of an explored share of the tokens
    (None where it was never drawn).
    """
    model, record, task = trained_model(spec)
    ids = task.windows("heldout", model.cfg.max_len, lines)
    kinds, rows = task.kinds(model.cfg.max_len), []
    explored = explored_worth(model, ids, draws)
    for number, line in enumerate(ids):
        run = morlib.score(model, line[None])["depth"][0] > model.policy.ALWAYS
        damped, skipped = one_by_one(model, line, run)
        for t, kind in enumerate(kinds):
            worth = explored[number, t].item()
            row = dict(line=number, kind=kind, runs=bool(run[t]), explored=None if worth != worth else worth)
            rows.append(row | dict(damped=damped[t].item(), skipped=skipped[t].item()))
    return pd.DataFrame(rows).assign(run=record["id"], seed=spec.train.seed)


def one_by_one(model: morlib.Transformer, line: Tensor, run: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of a line [L + 1]: by how much the line's loss rises if it runs damped, and if it is
    skipped, against running it; all others run as `run` [L] says. Two tensors [L]."""
    L = len(run)
    batch, one = line.expand(L, -1), torch.eye(L, dtype=torch.bool)  # in copy t, token t is another
    plan, ones = run | one, torch.ones(L, L)
    with torch.no_grad():
        full, damped = (line_losses(model, batch, plan, w) for w in (ones, 1 - one.float()))
        skipped = line_losses(model, batch, plan & ~one, ones)
    return damped - full, skipped - full


def explored_worth(model: morlib.Transformer, ids: Tensor, draws: int) -> Tensor:
    """The mean of -dL/dw of each token of lines [n, L + 1] over the draws in which it was explored, [n, L].

    The share that is explored is that of the first part of the training. NaN where a token never was.
    """
    run = morlib.score(model, ids)["depth"] > model.policy.ALWAYS  # [n, L]
    generator = torch.Generator().manual_seed(0)
    total, times = torch.zeros(run.shape), torch.zeros(run.shape)
    for _ in range(draws):
        explored = torch.rand(run.shape, generator=generator) < model.policy.EXPLORED[0]
        w = torch.where(explored, torch.rand(run.shape, generator=generator), 1.0).requires_grad_()
        loss = line_losses(model, ids, run | explored, w).sum()
        total -= torch.autograd.grad(loss, w)[0] * explored
        times += explored
    return total / times


def line_losses(model: morlib.Transformer, ids: Tensor, run: Tensor, w: Tensor) -> Tensor:
    """The summed loss (nats) of each line of ids [n, L + 1], if tokens `run` [n, L] with weights w [n, L]."""
    device = model.embed.weight.device
    w, ids, run = w.flatten().to(device), ids.to(device), run.to(device)
    bias = model.policy.SLOPE * (w - 1)
    decision = morlib.Decision(run.flatten().long(), None, torch.stack([w, w]), bias, lasts=True)
    with deciding(model, decision):
        logits = model(ids[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1).cpu()


@contextmanager
def deciding(model: morlib.Transformer, decision: morlib.Decision):
    """In place of what the policy of token worth decides."""
    model.policy.decide = lambda step: decision
    try:
        yield
    finally:
        del model.policy.decide


def worth_means(table: pd.DataFrame) -> pd.DataFrame:
    """Of `measure_worth`, a row a kind of token and one of all: tokens, the share that runs (%), the three
    means, and the rank correlation of damped and of explored with skipped."""
    rows = []
    for kind in (*KINDS, "all"):
        own = table if kind == "all" else table[table["kind"] == kind]
        of = own[["damped", "skipped", "explored"]]
        row = dict(kind=kind, tokens=len(own), runs=100 * own["runs"].mean()) | of.mean().to_dict()
        r = of.corr("spearman")["skipped"]
        rows.append(row | dict(r_damped=r["damped"], r_explored=r["explored"]))
    about = table[["run", "seed"]].iloc[0].to_dict()
    return pd.DataFrame([about | row for row in rows])


def worth_table(means: pd.DataFrame) -> pd.DataFrame:
    """`worth_means`, for readers."""
    names = dict(zip(KINDS, KIND_NAMES)) | {"all": "all"}
    shown = pd.DataFrame(index=means["kind"].map(names).rename("kind of token"))
    shown["tokens"], shown["runs (%)"] = means["tokens"].to_numpy(), means["runs"].round().to_numpy()
    titles = {"skipped": "skipped", "damped": "weight 0", "explored": "measured while exploring"}
    for name, title in titles.items():
        shown[f"{title} (nats)"] = [signed(value, 2) for value in means[name]]
    for name, title in (("r_damped", "weight 0"), ("r_explored", "measured")):
        shown[f"rank correlation, {title} with skipped"] = means[name].round(2).to_numpy()
    return shown
