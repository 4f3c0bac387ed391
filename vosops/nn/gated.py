# SPDX-License-Identifier: Apache-2.0
"""DeAOT's gated propagation: one attention map carries a visual and an identity branch side by side.

Values and gates hold both branches, one behind the other: (B, N, 2 * 512) at 256 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.ops.attention import attention
from vosops.ops.local_attention import local_attention

from .attention import WINDOW, as_map, as_tokens, relative_embedding
from .lstt import DROP_PATH, Current, DropPath, Memory, Read, initialise, memorise

_EXPANSION = 2  # of the channels of values and gates


class DepthwiseConv(nn.Module):
    """Depthwise 5x5 convolution over tokens; whole channels drop out in training. Parameter conv."""

    def __init__(self, channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) to the same."""
        return as_tokens(self.dropout(self.conv(as_map(x, size))))


class GatedPropagation(nn.Module):
    """Long-term gated propagation: W DWConv(U * attention(Q, K, V)).

    Args:
        values: channels of values and gates, both branches.
        channels: of the result.
        num_heads: 1 in the published models.

    Source: DeAOT (Yang and Yang, NeurIPS 2022), eq. 4 to 6; parameters dw_conv.conv, projection.
    """

    def __init__(self, values: int, channels: int, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dw_conv = DepthwiseConv(values)
        self.projection = nn.Linear(values, channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor,
        size: tuple[int, int],
        top_k: int | None = None,
    ) -> Tensor:
        """(B, N, channels) of query (B, N, Ck), key (B, M, Ck), value (B, M, values), gate (B, N, values)."""
        read = attention(query, key, value, num_heads=self.num_heads, top_k=top_k)
        return self.projection(self.dw_conv(read * gate, size))


class SelfGatedPropagation(GatedPropagation):
    """Gated propagation within a frame: queries, which are the keys too, values and gates are projected from
    both branches.

    Args:
        channels: of one branch.
        keys: channels of queries and keys.
        num_heads: 1 in the published models.

    Source: DeAOT, section 4.2; parameters linear_QK, linear_V1, linear_V2, linear_U1, linear_U2 beside those
    of `GatedPropagation`.
    """

    def __init__(self, channels: int, keys: int, num_heads: int = 1) -> None:
        wide = _EXPANSION * channels
        super().__init__(2 * wide, 2 * channels, num_heads)
        self.linear_QK = nn.Linear(2 * channels, num_heads * keys)
        self.linear_V1 = nn.Linear(channels, wide)
        self.linear_V2 = nn.Linear(channels, wide)
        self.linear_U1 = nn.Linear(channels, wide)
        self.linear_U2 = nn.Linear(channels, wide)

    def forward(self, visual: Tensor, identity: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(B, N, 2 * channels) of the branches (B, N, channels)."""
        query = self.linear_QK(torch.cat((visual, identity), 2))
        value = F.silu(self._interleave(self.linear_V1(visual), self.linear_V2(identity)))
        gate = F.silu(self._interleave(self.linear_U1(visual), self.linear_U2(identity)))
        return super().forward(query, query, value, gate, size)

    def _interleave(self, visual: Tensor, identity: Tensor) -> Tensor:
        """Both branches in every head."""
        heads = (self.num_heads, -1)
        return torch.cat((visual.unflatten(2, heads), identity.unflatten(2, heads)), 3).flatten(2)


class LocalGatedPropagation(nn.Module):
    """Short-term gated propagation: the window around every position on the previous frame.

    Args:
        keys: channels of queries and keys.
        values: channels of values and gates, both branches.
        channels: of the result.
        num_heads: 1 in the published models.
        window: side of the window in cells, odd.

    Source: DeAOT, section 4.2; parameters relative_emb_k, dw_conv.conv, projection.
    """

    def __init__(
        self, keys: int, values: int, channels: int, num_heads: int = 1, window: int = WINDOW
    ) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.relative_emb_k = relative_embedding(num_heads * keys, num_heads, window)
        self.dw_conv = DepthwiseConv(values)
        self.projection = nn.Linear(values, channels)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """(B, N, channels) of query, key (B, N, Ck), value, gate (B, N, values), N = H * W of `size`."""
        read = local_attention(
            as_map(query, size),
            as_map(key, size),
            as_map(value, size),
            num_heads=self.num_heads,
            window=self.window,
            relative_weight=self.relative_emb_k.weight.flatten(1),
            relative_offset=self.relative_emb_k.bias,
        )
        return self.projection(self.dw_conv(as_tokens(read) * gate, size))


class GatedPropagationBlock(nn.Module):
    """One block of DeAOT: long-term and short-term propagation, then self-propagation; no feed-forward.

    Args:
        channels: of tokens of one branch.
        num_heads: of the attentions, 1 in the published models.
        first: the first block has no identity branch yet.
        drop_path: as of `LSTTBlock`.

    Source: DeAOT (Yang and Yang, NeurIPS 2022), section 4.2, the dual-branch gated propagation module.
    """

    def __init__(
        self, channels: int = 256, num_heads: int = 1, *, first: bool, drop_path: float = DROP_PATH
    ) -> None:
        super().__init__()
        wide = _EXPANSION * channels
        self.keys = channels // 2 if num_heads == 1 else channels // num_heads
        self.num_heads, self.first = num_heads, first
        self.norm1 = nn.LayerNorm(channels)
        self.linear_QV = nn.Linear(channels, num_heads * self.keys + wide)
        self.linear_U = nn.Linear(channels, wide)
        if first:
            self.linear_ID_V = nn.Linear(channels, wide)
        else:
            self.id_norm1 = nn.LayerNorm(channels)
            self.linear_ID_V = nn.Linear(2 * channels, wide)
            self.linear_ID_U = nn.Linear(channels, wide)
        self.long_term_attn = GatedPropagation(2 * wide, 2 * channels, num_heads)
        self.short_term_attn = LocalGatedPropagation(self.keys, 2 * wide, 2 * channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.id_norm2 = nn.LayerNorm(channels)
        self.self_attn = SelfGatedPropagation(channels, self.keys, num_heads)
        self.droppath = DropPath(drop_path)
        initialise(self)

    def memorise(self, current: Current, identity: Tensor) -> Memory:
        """The memory of a frame whose mask has the identity embedding (B, N, C): values of both branches."""
        key, value, *branch = current
        seen = torch.cat((*branch, identity), 2)
        return Memory(key, torch.cat((value, F.silu(self.linear_ID_V(seen))), 2))

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        read: Read | None,
        identity: Tensor | None,
        *,
        size: tuple[int, int],
        top_k: int | None = None,
    ) -> tuple[Tensor, Tensor, Current]:
        """One frame.

        Args:
            x, branch: (B, N, C) tokens of the visual and the identity branch; the first block has no branch.
            read, identity, size, top_k: as of `LSTTBlock`.

        Returns:
            Both branches (B, N, C), and what the frame brings to the memory.
        """
        y = self.norm1(x)
        query, value = self.linear_QV(y).split([self.num_heads * self.keys, 2 * y.shape[2]], 2)
        current: Current = (query, F.silu(value))
        gate = F.silu(self.linear_U(y))
        if branch is None:
            gate = torch.cat((gate, torch.ones_like(gate)), 2)
        else:
            z = self.id_norm1(branch)
            current = (*current, z)
            gate = torch.cat((gate, F.silu(self.linear_ID_U(z))), 2)
        if read is None:
            assert identity is not None
            itself = self.memorise(current, identity)
            read = Read(itself, itself)
        long = self.long_term_attn(query, *read.long, gate, size, top_k)
        short = self.short_term_attn(query, *read.short, gate, size)
        visual, ids = (long + short).chunk(2, 2)
        x, branch = x + visual, ids if branch is None else branch + ids
        visual, ids = self.self_attn(self.norm2(x), self.id_norm2(branch), size).chunk(2, 2)
        return x + self.droppath(visual), branch + self.droppath(ids), current


class GatedPropagationModule(nn.Module):
    """DeAOT's transformer: blocks one after another; the decoder gets both branches of the last.

    Args:
        layers: number of blocks.
        channels: of tokens of one branch.
        num_heads: of the attentions, 1 in the published models.

    Source: DeAOT, section 4.
    """

    def __init__(self, layers: int, channels: int = 256, num_heads: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GatedPropagationBlock(channels, num_heads, first=i == 0) for i in range(layers)
        )
        self.decoder_norms = nn.ModuleList([_TokenGroupNorm(2, 2 * channels)])

    def forward(
        self,
        x: Tensor,
        reads: Sequence[Read] | None,
        identity: Tensor | None,
        *,
        size: tuple[int, int],
        position: Tensor | None = None,
        top_k: int | None = None,
    ) -> tuple[list[Tensor], list[Current]]:
        """As of `LSTT`, but `position` is not used, and the one output is (B, N, 2 * channels)."""
        branch, currents = None, []
        for i, layer in enumerate(self.layers):
            read = None if reads is None else reads[i]
            x, branch, current = layer(x, branch, read, identity, size=size, top_k=top_k)
            currents.append(current)
        assert branch is not None
        return [self.decoder_norms[0](torch.cat((x, branch), 2))], currents

    def memorise(self, currents: Sequence[Current], identity: Tensor) -> list[Memory]:
        """As of `LSTT`."""
        return memorise(self.layers, currents, identity)


class _TokenGroupNorm(nn.Module):
    """Group normalisation of tokens (B, N, C) over groups of channels and all positions. Parameter gn."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.gn = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(x.transpose(1, 2)).transpose(1, 2)
