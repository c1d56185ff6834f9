"""What the bench times besides our models: the same stack as others write it, loops of decoding, bfloat16."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import morlib
from morlib import Cache, ModelConfig, Transformer

from .timing import Timed, clock

# ---- The same stack, as others write it ----


class EncoderStack(nn.Module):
    """The same stack from torch.nn.TransformerEncoder: causal, pre-norm, of the same sizes."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        sizes = cfg.d_model, cfg.n_heads, cfg.d_ff, cfg.dropout
        layer = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size)
        self.register_buffer("positions", morlib.sinusoids(cfg.max_len, cfg.d_model))
        norm = nn.LayerNorm(cfg.d_model)
        self.stack = nn.TransformerEncoder(layer, cfg.n_layers, norm, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, L, V] of tokens [B, L]."""
        L = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(L, device=tokens.device)
        return self.head(self.stack(self.embed(tokens) + self.positions[:L], mask, is_causal=True))


class PlainBlock(nn.Module):
    """A block as nanoGPT writes it (Karpathy 2022), with ReLU as ours: one matrix for q, k and v."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        D = cfg.d_model
        self.heads = cfg.n_heads
        self.before_attention, self.before_feed_forward = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.expand, self.contract = nn.Linear(D, cfg.d_ff), nn.Linear(cfg.d_ff, D)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] to the same shape."""
        B, L, D = x.shape
        parts = self.qkv(self.before_attention(x)).split(D, dim=2)
        q, k, v = (part.view(B, L, self.heads, D // self.heads).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, L, D))
        return x + self.contract(F.relu(self.expand(self.before_feed_forward(x))))


class PlainStack(nn.Module):
    """A stack of such blocks, with learnt positions and no dropout."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed, self.positions = (
            nn.Embedding(cfg.vocab_size, cfg.d_model),
            nn.Embedding(cfg.max_len, cfg.d_model),
        )
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layers))
        self.norm, self.head = nn.LayerNorm(cfg.d_model), nn.Linear(cfg.d_model, cfg.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, L, V] of tokens [B, L]."""
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---- Generation ----


def cached_generation(model: Transformer, prompt: Tensor, tokens: int, parts: int,
                      then: Tensor | None = None) -> Timed:  # fmt: skip
    """Greedy generation with a cache after a prompt [B, P], as `morlib.generate` does it, less its checks.

    A call generates the next of `parts` equal parts of the tokens, and multiplies its seconds by `parts`. The
    pass over the prompt, but for its last token, is not timed. then: tokens [B, tokens] to read after the
    prompt in place of those chosen, so that models compared read one text. E is that of the part.
    """
    cache, fresh, some, P = Cache(), None, tokens // parts, prompt.shape[1]

    @torch.inference_mode()
    def call() -> dict:
        nonlocal cache, fresh
        model.eval()
        if fresh is None or cache.length + some > P - 1 + tokens:
            cache, fresh = Cache(), prompt[:, -1:]
            if P > 1:
                model(prompt[:, :-1], cache)
        depth, began = 0, clock(prompt.device)
        for _ in range(some):
            out = model(fresh, cache)
            fresh = out.logits[:, -1].argmax(-1, keepdim=True)
            if then is not None:
                place = cache.length - P
                fresh = then[:, place : place + 1]
            depth = depth + out.depth
        seconds = (clock(prompt.device) - began) * parts
        return dict(seconds=seconds, E=depth.float().mean() / some)

    return call


def plain_generation(model: Transformer, prompt: Tensor, tokens: int, parts: int) -> Timed:
    """The same for a model of fixed depth, as a plain loop over its weights, pre-norm.

    All keys and values lie in one tensor [N, 2, B, H, P + tokens, D/H], made beforehand.
    """
    (B, P), N, H, D = prompt.shape, model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
    held, start, fresh, some = torch.zeros(N, 2, B, H, P + tokens, D // H), 0, None, tokens // parts

    def step(ids: Tensor, start: int) -> Tensor:
        L = ids.shape[1]
        x = model.embed(ids) + model.positions[start : start + L]
        for block, kv in zip(model.blocks, held):
            made = block.attention.qkv(block.norm1(x)).view(B, L, 3, H, D // H).permute(2, 0, 3, 1, 4)
            kv[:, :, :, start : start + L] = made[1:]
            k, v = kv[:, :, :, : start + L]
            y = F.scaled_dot_product_attention(made[0], k, v, is_causal=L > 1)
            x = x + block.attention.proj(y.transpose(1, 2).reshape(B, L, D))
            x = x + block.feed_forward(block.norm2(x))
        return model.head(model.norm(x[:, -1])).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def call() -> dict:
        nonlocal start, fresh
        model.eval()
        if fresh is None or start + some > P - 1 + tokens:
            start, fresh = P - 1, prompt[:, -1:]
            if P > 1:
                step(prompt[:, :-1], 0)
        began = clock(prompt.device)
        for _ in range(some):
            fresh, start = step(fresh, start), start + 1
        return dict(seconds=(clock(prompt.device) - began) * parts)

    return call


def uncached_generation(model: Transformer, tokens: int, stride: int) -> Timed:
    """Generation without a cache, where token n needs a pass over all n before it.

    A call does every `stride`-th of these passes, the next call others, and multiplies its seconds by that.
    """
    text, calls = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device), 0

    @torch.inference_mode()
    def call() -> dict:
        nonlocal calls
        model.eval()
        began = clock(text.device)
        for length in range(1 + calls % stride, tokens + 1, stride):
            model(text[:, :length]).logits[:, -1].argmax(-1)
        calls += 1
        return dict(seconds=(clock(text.device) - began) * stride)

    return call


def linear_layers(model: Transformer, rows: int, times: int) -> Timed:
    """The linear layers of all blocks on so many rows, so many times: what decoding does with each row."""
    layers = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]

    @torch.inference_mode()
    def call() -> dict:
        began = clock("cpu")
        for _ in range(times):
            for layer, x in zip(layers, inputs):
                layer(x)
        return dict(seconds=clock("cpu") - began)

    return call


# ---- Arithmetic ----


def matrix_product(size: int) -> Timed:
    """A large matrix product, [size, size] times [size, size]: 2 size^3 operations."""
    a, b = (torch.randn(size, size) for _ in range(2))

    def call() -> dict:
        began = clock("cpu")
        a @ b
        return dict(seconds=clock("cpu") - began)

    return call


class Bfloat16Training(morlib.Training):
    """A training that computes in bfloat16 and learns in float32 (Micikevicius et al. 2018).

    Each step rounds the float32 weights into a copy of the model, and hands its gradients back.
    """

    def __init__(self, model: Transformer, corpus, tc: morlib.TrainConfig):
        super().__init__(model, corpus, tc)
        self.narrow = copy.deepcopy(model).bfloat16().train()

    def gradients(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        pairs = list(zip(self.narrow.parameters(), self.model.parameters()))
        with torch.no_grad():
            for narrow, master in pairs:
                narrow.copy_(master)
        out = self.narrow(batch[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        for narrow, master in pairs:
            master.grad, narrow.grad = narrow.grad.float(), None
        return loss.detach(), out.depth.sum()
