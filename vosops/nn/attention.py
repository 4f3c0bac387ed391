# SPDX-License-Identifier: Apache-2.0
"""The three attentions of AOT's transformer blocks, with the parameter names of its published checkpoints.

Tokens lie as (B, N, C), N = H * W row by row: channels innermost, so that a map of tokens is a view.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vosops.ops.attention import attention
from vosops.ops.local_attention import local_attention

WINDOW = 15


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, H * W, C) as a map (B, C, H, W): a view, channels innermost."""
    # In this order also the strides of a batch of one are those of torch.channels_last.
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def as_tokens(maps: Tensor) -> Tensor:
    """A map (B, C, H, W) as tokens (B, H * W, C): a view if its channels are innermost."""
    return maps.flatten(2).transpose(1, 2)


class MultiHeadAttention(nn.Module):
    """Self-attention over the tokens of one frame: projections, attention, projection.

    Args:
        channels: of tokens.
        num_heads: divides channels.

    Source: AOT (Yang et al., NeurIPS 2021), eq. 2; parameters linear_Q, linear_K, linear_V, projection.
    """

    def __init__(self, channels: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_Q = nn.Linear(channels, channels)
        self.linear_K = nn.Linear(channels, channels)
        self.linear_V = nn.Linear(channels, channels)
        self.projection = nn.Linear(channels, channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, N, C) of query (B, N, C), key and value (B, M, C)."""
        read = attention(
            self.linear_Q(query), self.linear_K(key), self.linear_V(value), num_heads=self.num_heads
        )
        return self.projection(read)


class LongTermAttention(nn.Module):
    """Attention of a frame over the frames remembered.

    Args:
        channels: of queries, keys and values.
        num_heads: divides channels.

    Source: AOT, eq. 3; parameter projection.
    """

    def __init__(self, channels: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projection = nn.Linear(channels, channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, top_k: int | None = None) -> Tensor:
        """(B, N, C) of query (B, N, C), key and value (B, M, C), of which a query reads the best `top_k`."""
        return self.projection(attention(query, key, value, num_heads=self.num_heads, top_k=top_k))


class ShortTermAttention(nn.Module):
    """Attention of every position over the window around it on the previous frame, with relative positions.

    Args:
        channels: of queries, keys and values.
        num_heads: divides channels.
        window: side of the window in cells, odd.
        dilation: cells from one offset of the window to the next.

    Source: AOT, eq. 4; parameters relative_emb_k (of the unscaled query), relative_emb_v, projection.
    """

    def __init__(self, channels: int, num_heads: int = 8, window: int = WINDOW, dilation: int = 1) -> None:
        super().__init__()
        self.num_heads, self.window, self.dilation = num_heads, window, dilation
        self.relative_emb_k = relative_embedding(channels, num_heads, window)
        self.relative_emb_v = nn.Parameter(torch.zeros(num_heads, channels // num_heads, window**2))
        self.projection = nn.Linear(channels, channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Tokens (B, H * W, C) of maps (B, C, H, W), any strides."""
        read = local_attention(
            query,
            key,
            value,
            num_heads=self.num_heads,
            window=self.window,
            dilation=self.dilation,
            relative_weight=self.relative_emb_k.weight.flatten(1),
            relative_offset=self.relative_emb_k.bias,
            relative_value=self.relative_emb_v,
        )
        return self.projection(as_tokens(read))


def relative_embedding(channels: int, num_heads: int, window: int) -> nn.Conv2d:
    """The parameters of a query's score for every offset: a 1x1 convolution per head, which is never run."""
    return nn.Conv2d(channels, num_heads * window**2, 1, groups=num_heads)
