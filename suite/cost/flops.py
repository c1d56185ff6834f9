"""Arithmetic: floating-point operations, counted from the configuration and from what really ran.

A multiplication and an addition are two operations. Only matrix products count, as in torch's own counter,
against which the tests hold these numbers.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from morlib import FORWARD, NOT_ASKED, Router, Transformer


def flops(model: Transformer, actions: Tensor, fresh: int | None = None) -> dict[str, int]:
    """Operations of one forward pass, by part: blocks, attention, router, head, and their total.

    actions: [N, R, B, P] the decisions for all P positions so far (`Output.actions`, joined along the last
    axis). fresh: the pass computes that many positions, the last ones; a cache holds the others. None: all.

    Attention is counted as a dense kernel computes it: each query against each key of its row and step, those
    that the causal mask hides included. Where tokens that have stopped stay visible, their keys and values
    count among the blocks' operations.
    """
    cfg, D = model.cfg, model.cfg.d_model
    B, P = actions.shape[2:]
    first = P - (fresh or P)
    ran = actions >= FORWARD
    ran_now = ran[..., first:]
    keys_of = getattr(model.policy, "shows", lambda layer: "run")
    shows = [keys_of(layer) for layer in range(cfg.n_layers)]
    keys = [ran[n].sum(-1) if shows[n] == "run" else P for n in range(cfg.n_layers)]
    pairs = sum(int((ran_now[n].sum(-1) * keys[n]).sum()) for n in range(cfg.n_layers))  # of query and key
    used = sum(_weights_used(model, n, shows[n], ran_now[n], fresh) for n in range(cfg.n_layers))
    counts = dict(
        blocks=2 * used,
        attention=pairs * 4 * D,  # q k^T, and the probabilities times v
        router=_router_flops(model, actions[..., first:]),
        head=B * (P - first) * 2 * D * cfg.vocab_size,
    )
    return counts | {"total": sum(counts.values())}


def _weights_used(model: Transformer, layer: int, shows: str, ran: Tensor, fresh: int | None) -> int:
    """Weights that a layer multiplies, summed over tokens, where those ran [R, B, P] run.

    A block with experts says how many a token uses. shows: see `suite.field.common.System`. Keys and values
    of tokens that do not run are computed for a cache, or if some token looks at them.
    """
    D = model.cfg.d_model
    dense = 4 * D * D + 2 * D * model.cfg.d_ff  # q, k, v, projection; feed-forward
    each = getattr(model.blocks[model.layout[layer]], "weights_used", dense)
    if shows == "first":
        each -= 2 * D * D
    used = int(ran.sum()) * each
    if shows == "all" and (fresh is not None or bool(ran.any())):
        used += int((~ran[0]).sum()) * 2 * D * D
    return used


def _router_flops(model: Transformer, actions: Tensor) -> int:
    """Operations of the routers (D -> D/2 -> 3) on the tokens that were asked, in layers with a choice.

    A policy of another kind may count its own: `operations(actions)`.
    """
    if not isinstance(model.policy, Router):
        return model.policy.operations(actions) if hasattr(model.policy, "operations") else 0
    has_choice = ~torch.tensor(model.policy.everyone, device=actions.device)  # [N]
    asked = actions[has_choice] != NOT_ASKED
    D = model.cfg.d_model
    hidden = max(D // 2, 1)
    return int(asked.sum()) * 2 * (D * hidden + 3 * hidden)


@torch.no_grad()
def arithmetic(models: dict[str, Transformer], windows: Tensor) -> pd.DataFrame:
    """Millions of operations a token [model, part] on windows [n, L + 1], and the effective depth.

    forward: the sum of the parts before it. decoded: the last token of a full context, with a cache.
    training: forward and backward.
    """
    rows, n = {}, len(windows)
    for name, model in models.items():
        out = model(windows[:, :-1])
        tokens = out.depth.numel()
        counts = flops(model, out.actions)
        parts = {part: counts[part] / tokens for part in ("blocks", "attention", "router", "head")}
        sums = dict(
            forward=counts["total"] / tokens,
            decoded=flops(model, out.actions, fresh=1)["total"] / n,
            training=training_flops(model, out.actions) / tokens,
        )
        in_millions = {part: count / 1e6 for part, count in (parts | sums).items()}
        rows[name] = dict(E=out.depth.float().mean().item()) | in_millions
    return pd.DataFrame(rows).T.rename_axis("model")


def training_flops(model: Transformer, actions: Tensor) -> int:
    """Operations of a forward and backward pass over actions [N, R, B, L].

    Each product needs two more on the way back, one for its input and one for its weight. The routers learn
    from what their choices ran. So a router that does not learn has no way back, nor has a step that no token
    ran. This is exact for morlib's policies; for others the actions must be those of training, and what they
    read out at each layer comes on top.
    """
    counts = flops(model, actions)
    without_router = counts["total"] - counts["router"]
    if not getattr(model.policy, "learns", True):
        return 3 * without_router + counts["router"]
    someone_ran = (actions >= FORWARD).flatten(2).any(-1)  # [N, R]
    learnt_from = torch.where(someone_ran[..., None, None], actions, NOT_ASKED)
    return 3 * without_router + counts["router"] + 2 * _router_flops(model, learnt_from)
