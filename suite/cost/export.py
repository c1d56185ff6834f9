"""A model as one graph of fixed shapes, routing inside: for torch.export, and from there for ONNX."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morlib import FORWARD, NOT_ASKED, RECURSE, SKIP, Block, Decision, Policy, StepInput, Transformer


class Masked(nn.Module):
    """The same function as a Transformer in evaluation mode, computed in full and masked afterwards.

    A packed step has as many rows as tokens run, which no fixed graph can hold. Here each step computes every
    token, lets attention see the executed ones only, and keeps the change of those. So it gives the same
    logits and depths at the cost of every step for every token.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        if model.cfg.granularity != "token":
            raise ValueError(
                "a model whose router reads prefix means is not exported: granularity must be token"
            )
        policy = model.policy
        if policy.block is not Block or type(policy).settle is not Policy.settle:
            raise ValueError(f"routing {model.cfg.routing} has blocks or states of its own: not exported")
        self.model = model.eval()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens int64 [B, L] to logits [B, L, V] and depth [B, L]."""
        model, cfg = self.model, self.model.cfg
        B, L = tokens.shape
        x = (model.embed(tokens) + model.positions[:L]).view(B * L, -1)
        index = torch.arange(B * L, device=x.device)
        actions = torch.full((cfg.n_layers, cfg.max_recursions, B * L), NOT_ASKED, device=x.device)
        depth = torch.zeros(B * L, dtype=torch.long, device=x.device)
        memory, decision = {}, Decision()
        for layer in range(cfg.n_layers):
            block = model.blocks[model.layout[layer]]
            asked, weight = torch.ones_like(index, dtype=torch.bool), torch.ones_like(x[:, 0])
            for recursion in range(cfg.max_recursions):
                how = dict(sampling=False, calibrate=False, full=0.0, memory=memory, ids=tokens)
                step = StepInput(layer, recursion, x, index, L, 0, actions, **how)
                decision = decision if decision.lasts else model.policy(step)
                chosen = torch.full_like(index, FORWARD) if decision.actions is None else decision.actions
                runs = asked & (chosen != SKIP)
                share = weight
                if decision.weights is not None:
                    share = weight * decision.weights[0]
                    weight = weight * decision.weights[1]
                change = self.full_step(block, x, runs.view(B, L)) - x
                x = x + torch.where(runs, share, torch.zeros_like(share))[:, None] * change
                depth = depth + runs
                taken = torch.where(asked, chosen.long(), torch.full_like(index, NOT_ASKED))
                actions = actions.index_put((torch.tensor(layer), torch.tensor(recursion)), taken)
                asked = asked & (chosen == RECURSE)
                if decision.actions is None or decision.lasts:
                    break
        return model.head(model.norm(x)).view(B, L, -1), depth.view(B, L)

    def full_step(self, block: Block, x: Tensor, runs: Tensor) -> Tensor:
        """Block on every token x [B * L, D]; keys are those of the tokens that run [B, L], and one's own."""
        B, L = runs.shape
        causal = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        seen = causal & (runs[:, None, None, :] | torch.eye(L, dtype=torch.bool, device=x.device))

        def attention(h: Tensor) -> Tensor:
            H = block.attention.n_heads
            qkv = block.attention.qkv(h).view(B, L, 3, H, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv.unbind(), attn_mask=seen)
            return block.attention.proj(y.transpose(1, 2).reshape(B * L, -1))

        return block.around(x, attention, block.feed_forward)


def export(model: Transformer, path: str | Path | None = None) -> torch.export.ExportedProgram:
    """The model as a torch.export program, batch and length free up to `max_len`; saved as .pt2 if asked for.

    For ONNX, with the packages onnx and onnxscript: `torch.onnx.export(export(model), dynamo=True)`.
    Checked against the model itself on random tokens. Raises ValueError if they differ, or if the routing
    reads more than the tokens' own states, or has blocks or states of its own.
    """
    masked = Masked(model)
    shape, device = (2, max(model.cfg.max_len // 2, 2)), next(model.parameters()).device
    tokens = torch.randint(model.cfg.vocab_size, shape, device=device)
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2, max=model.cfg.max_len)
    with torch.no_grad():
        program = torch.export.export(masked, (tokens,), dynamic_shapes=({0: batch, 1: length},))
        logits, depth = program.module()(tokens)
        out = model(tokens)
    if not torch.equal(depth, out.depth) or not torch.allclose(logits, out.logits, atol=1e-4):
        raise ValueError("the exported program differs from the model: please report this configuration")
    if path is not None:
        torch.export.save(program, Path(path).expanduser())
    return program
