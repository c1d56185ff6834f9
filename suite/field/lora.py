"""Relaxed Recursive Transformers: shared blocks, LoRA by depth.

Bae et al. 2024, arXiv:2410.20672, section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

import morlib
from morlib import Block, ModelConfig

from .common import Cycled

MATRICES = ("attention.qkv", "attention.proj", "feed_forward.0", "feed_forward.2")


class RelaxedBlock(Block):
    """A shared block whose matrices are W + B A, with B [out, rank] and A [rank, in] of each depth's own."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.cycle = cfg.shared_blocks or 1
        rank, depths = morlib.POLICIES[cfg.routing].options_of(cfg)["rank"], -(-cfg.n_layers // self.cycle)
        morlib.check_value("ModelConfig: option rank", rank, morlib.Count)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in MATRICES:
            linear = self.get_submodule(name)
            std = linear.in_features**-0.5
            self.down.append(torch.randn(depths, rank, linear.in_features) * std)
            self.up.append(torch.zeros(depths, linear.out_features, rank))

    def at(self, layer: int, memory: dict) -> Callable:
        depth = layer // self.cycle
        weights = {}
        for name, down, up in zip(MATRICES, self.down, self.up):
            weights[f"{name}.weight"] = self.get_submodule(name).weight + up[depth] @ down[depth]
        return lambda *args: functional_call(self, weights, args)


class Relaxed(Cycled):
    """Every token runs all layers; `shared_blocks` blocks (by default one) are passed in a cycle.

    The row `lora` trains from scratch: B begins at 0. The row `lora-uptrained` begins as the
    authors do, by `adopt`, with a trained model of as many layers, and trains on: a shared matrix
    is the mean of those of its layers, and B A the best approximation of rank `rank` to what each
    layer differs from it by, from its singular values.

    Differs: norms and biases are shared too. The products B A are made anew in each pass.
    """

    block = RelaxedBlock
    OPTIONS = dict(rank=8)

    def operations(self, actions: Tensor) -> int:
        D, hidden = self.cfg.d_model, self.cfg.d_ff
        return self.cfg.n_layers * 2 * self.options["rank"] * (3 * D * D + D * D + 2 * D * hidden)

    @torch.no_grad()
    def adopt(self, model: morlib.Transformer, state: dict[str, Tensor]) -> None:
        """Begin with the weights of a fixed model of as many layers, each with a block of its own.

        Raises ValueError if they are those of another kind of model.
        """
        own, N = model.state_dict(), self.cfg.n_layers
        layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        needed = {name: value.shape for name, value in own.items() if not name.startswith("blocks.")}
        for name, value in model.blocks[0].state_dict().items():
            if not name.startswith(("up.", "down.")):
                needed |= {f"blocks.{layer}.{name}": value.shape for layer in range(N)}
        if len(layers) != N or any(name not in state or state[name].shape != needed[name] for name in needed):
            D = self.cfg.d_model
            raise ValueError(f"lora begins with a fixed model of {N} layers of width {D}, not with this one")
        begun = {name: state.get(name, value) for name, value in own.items()}
        for number, block in enumerate(model.blocks):
            of_block = [layer for layer in range(N) if model.layout[layer] == number]
            for name in block.state_dict():
                if not name.startswith(("up.", "down.")):
                    begun[f"blocks.{number}.{name}"] = mean([state[f"blocks.{i}.{name}"] for i in of_block])
            for which, matrix in enumerate(MATRICES):
                shared = begun[f"blocks.{number}.{matrix}.weight"]
                for depth, layer in enumerate(of_block):
                    up, down = low_rank(
                        state[f"blocks.{layer}.{matrix}.weight"] - shared, self.options["rank"]
                    )
                    begun[f"blocks.{number}.up.{which}"][depth, :, : up.shape[1]] = up
                    begun[f"blocks.{number}.down.{which}"][depth, : len(down)] = down
        model.load_state_dict(begun)


def mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of [out, r] and [r, in] that is nearest to a matrix, r at most `rank`."""
    U, S, V = torch.linalg.svd(matrix.float(), full_matrices=False)
    return U[:, :rank] * S[:rank], V[:rank]


morlib.POLICIES["lora"] = Relaxed
