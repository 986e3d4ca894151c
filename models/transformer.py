"""The decoder-only transformer: GPT-2, Llama, and what lies between, from one configuration."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from models.attention import Attention, RotaryPositions
from models.base import Model
from models.config import TransformerConfig
from models.documents import LEAST_HEAD_WIDTH, document_blocks, document_mask, document_positions
from models.initialisation import constant_, normal_


def _norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.width, eps=config.norm_epsilon)  # Zhang & Sennrich 2019
    return nn.LayerNorm(config.width, eps=config.norm_epsilon, bias=config.bias)  # Ba et al. 2016


class FeedForward(nn.Module):
    """Two linear layers with GELU between, or SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden_width = config.resolved_feed_forward_width
        self.activation = config.activation
        if self.activation == "swiglu":
            self.gate = nn.Linear(config.width, hidden_width, bias=config.bias)
        self.up = nn.Linear(config.width, hidden_width, bias=config.bias)
        self.down = nn.Linear(hidden_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        if self.activation == "swiglu":
            hidden = F.silu(self.gate(x)) * self.up(x)  # (B, T, feed_forward_width)
        else:
            hidden = F.gelu(self.up(x), approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down(hidden)


class Block(nn.Module):
    """One layer: each branch reads a normalised copy and adds to the residual stream."""

    def __init__(self, config: TransformerConfig, rotary: RotaryPositions | None) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config, rotary)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | BlockMask | None = None) -> Tensor:
        """(B, T, width) -> (B, T, width); `positions` and `mask` as `Attention` takes them."""
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, mask))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(Model):
    """Token ids in, a score for every possible next token out.

    With tied embeddings the output projection is the token embedding, one parameter under one name.
    """

    def __init__(self, config: TransformerConfig, *, vocabulary_size: int, context_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.context_tokens = context_tokens
        self.token_embedding = nn.Embedding(vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(context_tokens, config.width) if config.positions == "learned" else None
        rotary = None
        if config.positions == "rope":
            rotary = RotaryPositions(config.resolved_head_width, context_tokens, config.rope_base, config.rope_scaling)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, rotary) for _ in range(config.layers))
        self.final_norm = _norm(config)
        self.output = None if config.tied_embeddings else nn.Linear(config.width, vocabulary_size, bias=False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T) int64 -> logits (B, T, V). ValueError where T is above `context_tokens`.

        With `documents` (B, T), equal numbers side by side being one document, each document is computed as if alone.
        """
        sequence_tokens = tokens.shape[1]
        if sequence_tokens > self.context_tokens:
            raise ValueError(
                f"a sequence of {sequence_tokens} tokens is longer than the model's {self.context_tokens}; "
                "raise model.context_tokens or shorten the sequence"
            )
        positions = None if documents is None else document_positions(documents)
        mask = None if documents is None else self._mask(documents)
        x = self.token_embedding(tokens)  # (B, T, width)
        if self.position_embedding is not None:
            places = torch.arange(sequence_tokens, device=tokens.device) if positions is None else positions
            x = x + self.position_embedding(places)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, positions, mask)
        x = self.final_norm(x)
        if self.output is None:
            return F.linear(x, self.token_embedding.weight)
        return self.output(x)

    def _mask(self, documents: Tensor) -> Tensor | BlockMask:
        """One for all layers. Dropout of attention, and narrow heads, are beyond FlexAttention."""
        dropout = self.training and self.config.dropout > 0
        if documents.is_cuda and not dropout and self.config.resolved_head_width >= LEAST_HEAD_WIDTH:
            return document_blocks(documents)
        return document_mask(documents)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def initialise_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """N(0, initialisation_std^2); projections that end a residual branch smaller by sqrt(2 x layers), so that the
        residual stream does not grow with depth (Radford et al. 2019); norms 1, biases 0."""
        std = self.config.initialisation_std
        if name.endswith("bias"):
            constant_(parameter, 0.0)
        elif parameter.ndim == 1:
            constant_(parameter, 1.0)
        elif name.endswith((".attention.output.weight", ".feed_forward.down.weight")):
            normal_(parameter, std / math.sqrt(2 * self.config.layers), generator)
        else:
            normal_(parameter, std, generator)

    def initialise_buffers(self) -> None:
        for module in self.modules():
            if isinstance(module, RotaryPositions):
                module.initialise()
