"""The Forgetting Transformer: embedding, blocks, head, initialisation, and the count of its parameters and FLOPs.

Pre-norm blocks of attention and SwiGLU, a final norm and an untied head, as published (FoX LLaMA and Pro). The model
maps tokens and labels of this rank's part of the sequence to the sum of their losses; it knows neither ZeRO nor data.
"""

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from foxdist.attention import Acp, ContextParallel
from foxdist.attention.replay import checkpoint_contexts, compiled_checkpoint_contexts
from foxdist.attention.stats import Counted
from foxdist.config import Model
from foxdist.layer import Attention, RMSNorm
from foxdist.layout import positions
from foxdist.loss import cross_entropy_sum
from foxdist.offload import HostMemory, Offload, current
from foxdist.progress import progress


class SwiGLU(nn.Module):
    """down(silu(gate) * up), gate and up from one projection."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, model: Model, acp: Acp | None, cp: ContextParallel | None, activation_checkpointing: bool):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.attention_norm = RMSNorm(model.hidden, model.norm_eps)
        self.attention = Attention(model, acp, cp)
        self.mlp_norm = RMSNorm(model.hidden, model.norm_eps)
        self.mlp = SwiGLU(model.hidden, model.mlp_width)

    def forward(
        self, x: torch.Tensor, starts: torch.Tensor, where: torch.Tensor | None
    ) -> tuple[torch.Tensor, Counted]:
        """As `Attention.forward`, whose counts it passes on."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return self._layer(x, starts, where)
        # In here, so that a compiled block does not compute again what backward has no use for, as its own output.
        return checkpoint(
            self._layer,
            x,
            starts,
            where,
            use_reentrant=False,
            context_fn=compiled_checkpoint_contexts if torch.compiler.is_compiling() else _contexts,
            preserve_rng_state=False,  # no dropout
        )

    def _layer(self, x: torch.Tensor, starts: torch.Tensor, where: torch.Tensor | None) -> tuple[torch.Tensor, Counted]:
        y, counted = self.attention(self.attention_norm(x), starts, where)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), counted


def _contexts() -> tuple:
    return checkpoint_contexts(current())


class Head(nn.Module):
    """Final norm and vocabulary projection, fused with the loss so that full logits never exist."""

    def __init__(self, model: Model):
        super().__init__()
        self.norm = RMSNorm(model.hidden, model.norm_eps)
        self.weight = nn.Parameter(torch.empty(model.vocab, model.hidden))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy_sum(self.norm(x).flatten(0, 1), self.weight, labels.flatten())


class FoX(nn.Module):
    """tokens, labels, starts [B, T] -> sum of the tokens' losses, a float32 scalar. T is this rank's part."""

    def __init__(
        self,
        model: Model,
        *,
        acp: Acp | None = None,
        cp: ContextParallel | None = None,
        activation_checkpointing: bool = False,
        activation_offloading: bool = False,
    ):
        super().__init__()
        self.config, self.cp = model, cp
        self.host = HostMemory() if activation_offloading else None
        self.embedding = nn.Embedding(model.vocab, model.hidden)
        self.blocks = nn.ModuleList(Block(model, acp, cp, activation_checkpointing) for _ in range(model.layers))
        self.head = Head(model)
        self.apply(self._initialise)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(tokens, starts), labels)

    def hidden(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """What the head sees: [B, T, F]."""
        where = self._positions(tokens) if self.config.rope else None
        x = self.embedding(tokens)
        offload = self._offload(x)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            progress.enter("forward", i)
            with offload.block() if offload else nullcontext():
                x, counted = block(x, starts, where)
            progress.enter_backward(i, x)
            block.attention.meter.add(counted)
        progress.enter("forward")
        return x

    def _offload(self, x: torch.Tensor) -> Offload | None:
        """For one forward, if its blocks' activations are to wait on the host."""
        return Offload(self.host, x.device) if self.host and torch.is_grad_enabled() else None

    def _positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] int64, in the whole sequence."""
        rank, size, layout = (self.cp.rank, self.cp.size, self.cp.layout) if self.cp else (0, 1, "contiguous")
        return positions(rank, size, tokens.shape[1], layout, tokens.device)  # made there: no copy to wait for

    def attention_layers(self) -> list[Attention]:
        """The attention of each block, from the bottom up."""
        return [block.attention for block in self.blocks]  # type: ignore[misc]

    def _initialise(self, module: nn.Module) -> None:
        """All matrices and the embedding N(0, init_std), biases 0, norm weights 1."""
        if isinstance(module, nn.Linear | nn.Embedding | Head):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def parameter_count(model: Model) -> int:
    """All parameters, counted without allocating them."""
    outside, block, _ = _shapes(model)
    return outside + model.layers * block


def flops_per_token(model: Model, length: int) -> tuple[float, float]:
    """FLOPs of forward and backward for one token of a sequence of `length`: (matrices, attention counted dense).

    Two FLOPs a multiply-add, backward twice the forward. Matrices: every parameter that multiplies a token; embedding
    and norms do not. Attention: q.k and weights.v over the (length + 1) / 2 keys of the average query.
    """
    keys = (length + 1) / 2
    return 6.0 * _shapes(model)[2], 3 * 4.0 * model.heads * model.head_dim * keys * model.layers


@lru_cache
def _shapes(model: Model) -> tuple[int, int, int]:
    """Parameters outside the blocks, parameters of one block, and elements of all matrices that multiply a token."""
    with torch.device("meta"):
        fox = FoX(model.model_copy(update={"layers": 1}))
    whole = sum(p.numel() for p in fox.parameters())
    block = sum(p.numel() for p in fox.blocks.parameters())
    matrices = sum(p.numel() for p in fox.blocks.parameters() if p.ndim == 2)
    return whole - block, block, model.layers * matrices + fox.head.weight.numel()
