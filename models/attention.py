"""Causal self-attention with rotary positions and grouped queries."""

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from models.config import RopeScalingConfig, TransformerConfig
from models.documents import attend_in_blocks


def rotary_frequencies(head_width: int, base: float, scaling: RopeScalingConfig | None) -> Tensor:
    """Radians per position of each pair of a head's numbers, (head_width / 2,) fp32 on the CPU.

    base^(-2i / head_width) (Su et al. 2021), stretched for long contexts as Llama 3.1 does where `scaling` is given.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width
    frequencies = 1.0 / base**exponents
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    # 1 where a wavelength is short against the original context, 0 where it is long, linear between.
    unscaled_share = ((scaling.original_context_tokens / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return unscaled_share * frequencies + (1.0 - unscaled_share) * frequencies / scaling.factor


class RotaryPositions(nn.Module):
    """Turns pairs of numbers of queries and keys by an angle that grows with the position (Su et al. 2021).

    A pair is (i, i + head_width / 2), as in Hugging Face's Llama weights. One instance serves all layers of a model.
    """

    cosines: Tensor
    signed_sines: Tensor

    def __init__(self, head_width: int, context_tokens: int, base: float, scaling: RopeScalingConfig | None) -> None:
        super().__init__()
        self.head_width = head_width
        self.context_tokens = context_tokens
        self.base = base
        self.scaling = scaling
        table = torch.empty(context_tokens, head_width, dtype=torch.float32)
        self.register_buffer("cosines", table, persistent=False)
        self.register_buffer("signed_sines", table.clone(), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Fill the tables, computed on the CPU so that every device has the same bits."""
        device = self.cosines.device
        if device.type == "meta":
            return
        positions = torch.arange(self.context_tokens, dtype=torch.float32, device="cpu")
        frequencies = rotary_frequencies(self.head_width, self.base, self.scaling)
        angles = torch.outer(positions, frequencies)  # (context, head_width / 2)
        cosines, sines = angles.cos(), angles.sin()
        self.cosines = torch.cat((cosines, cosines), dim=1).to(device)  # (context, head_width)
        self.signed_sines = torch.cat((-sines, sines), dim=1).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast of the whole model (`model.bfloat16()`, as DeepSpeed does) would round the angles of far positions
        # away, and `to_empty` leaves garbage: whatever was done to the tables, they are made anew, in fp32.
        super()._apply(fn, recurse)
        self.initialise()
        return self

    def forward(self, heads: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, H, T, head_width) -> the same shape and dtype, turned in fp32. `positions`: (B, T); without it 0 to T - 1."""
        if positions is None:
            tokens = heads.shape[-2]
            cosines, signed_sines = (
                self.cosines[:tokens],
                self.signed_sines[:tokens],
            )  # (T, head_width), spread over B, H
        else:
            cosines, signed_sines = self.cosines[positions], self.signed_sines[positions]  # (B, T, head_width)
            cosines, signed_sines = cosines.unsqueeze(1), signed_sines.unsqueeze(1)
        single = heads.float()
        # Rolling by half a head puts each number's partner in its place; with the sign in the table that is the whole
        # rotation in three operations, which matters where a step takes milliseconds.
        partners = single.roll(self.head_width // 2, dims=-1)
        return torch.addcmul(single * cosines, partners, signed_sines).to(heads.dtype)


class Attention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017); several heads share a key/value head where configured."""

    def __init__(self, config: TransformerConfig, rotary: RotaryPositions | None) -> None:
        super().__init__()
        self.heads = config.heads
        self.key_value_heads = config.resolved_key_value_heads
        self.head_width = config.resolved_head_width
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, self.heads * self.head_width, bias=config.bias)
        self.key = nn.Linear(config.width, self.key_value_heads * self.head_width, bias=config.bias)
        self.value = nn.Linear(config.width, self.key_value_heads * self.head_width, bias=config.bias)
        self.output = nn.Linear(self.heads * self.head_width, config.width, bias=config.bias)
        self.rotary = rotary

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | BlockMask | None = None) -> Tensor:
        """(B, T, width) -> (B, T, width). `positions` (B, T) and `mask`, one of `models.documents`, where documents are
        kept apart; without them every token sees all before it."""
        query = self._split(self.query(x), self.heads)  # (B, H, T, head_width)
        key = self._split(self.key(x), self.key_value_heads)
        value = self._split(self.value(x), self.key_value_heads)
        if self.rotary is not None:
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        grouped = self.heads != self.key_value_heads
        if isinstance(mask, BlockMask):
            mixed = attend_in_blocks(query, key, value, mask, grouped=grouped)
        else:
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None,
                enable_gqa=grouped,
            )
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, H, T, head_width) -> (B, T, H x head_width) -> width

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_width)).transpose(1, 2)
