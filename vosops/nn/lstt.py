# SPDX-License-Identifier: Apache-2.0
"""AOT's long short-term transformer (LSTT): blocks of self, long-term and short-term attention.

A block takes the tokens of a frame and reads a memory; what the frame itself brings to the memory becomes
a `Memory` once its mask is known (`memorise`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import LongTermAttention, MultiHeadAttention, ShortTermAttention, as_map, as_tokens

DROP_PATH = 0.1


class Memory(NamedTuple):
    """What attention reads.

    key: (B, M, Ck), M = T * H * W tokens of T frames.
    value: (B, M, Cv), the identities of the objects in it.
    """

    key: Tensor
    value: Tensor


class Read(NamedTuple):
    """The memories of one block.

    long: of all frames remembered.
    short: of the previous frame, on the grid of the present one.
    """

    long: Memory
    short: Memory


Current = tuple[Tensor, ...]
"""What a block keeps of a frame (B, N, C) each until its mask is known; key and value first."""


class DropPath(nn.Module):
    """Leaves out a residual branch (B, ...) of a clip in training, with a probability, and scales the others.

    Source: Huang et al., Deep Networks with Stochastic Depth, ECCV 2016.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        clips = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(kept)
        return x * (clips / kept)


class FeedForward(nn.Module):
    """Group normalisation, GELU and a depthwise 5x5 convolution between the two layers of a feed-forward.

    Source: AOT, published code; parameters gn, conv.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gn = nn.GroupNorm(32, channels)
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) to the same."""
        return as_tokens(self.conv(F.gelu(self.gn(as_map(x, size)))))


class _Block(nn.Module, ABC):
    """What both versions of the block share: they differ in how keys, values and identities meet."""

    def __init__(self, channels: int, num_heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.self_attn = MultiHeadAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self._project(channels, num_heads)
        self.long_term_attn = LongTermAttention(channels, num_heads)
        self.short_term_attn = ShortTermAttention(channels, num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, hidden)
        self.activation = FeedForward(hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.droppath = DropPath(drop_path)
        initialise(self)

    @abstractmethod
    def _project(self, channels: int, num_heads: int) -> None:
        """Makes the projections of queries, keys, values and identities."""

    @abstractmethod
    def current(self, x: Tensor) -> Current:
        """Query, which is the key too, and value of normalised tokens (B, N, C)."""

    @abstractmethod
    def memorise(self, current: Current, identity: Tensor) -> Memory:
        """The memory of a frame (B, N, C) whose mask has the identity embedding (B, N, C)."""

    def forward(
        self,
        x: Tensor,
        read: Read | None,
        identity: Tensor | None,
        *,
        size: tuple[int, int],
        position: Tensor | None = None,
        top_k: int | None = None,
    ) -> tuple[Tensor, Current]:
        """One frame.

        Args:
            x: (B, N, C) tokens of the frame, N = H * W.
            read: the memories, of the batch B; None on a reference frame, which reads itself.
            identity: (B, N, C) embedding of a reference frame's mask; None with `read`.
            size: (H, W).
            position: (1, N, C), added to queries and keys of self-attention.
            top_k: tokens of the long-term memory that a query keeps, per head; None for all.

        Returns:
            The tokens (B, N, C), and what the frame brings to the memory.
        """
        y = self.norm1(x)
        placed = y if position is None else y + position
        x = x + self.droppath(self.self_attn(placed, placed, y))
        current = self.current(self.norm2(x))
        if read is None:
            assert identity is not None
            itself = self.memorise(current, identity)
            read = Read(itself, itself)
        query = current[0]
        long = self.long_term_attn(query, *read.long, top_k=top_k)
        short = self.short_term_attn(as_map(query, size), *(as_map(x, size) for x in read.short))
        x = x + (long + short)
        hidden = self.activation(self.linear1(self.norm3(x)), size)
        return x + self.droppath(self.linear2(hidden)), current


class LSTTBlock(_Block):
    """The block of the published AOT models. Keys know nothing of identities: K is the query of its frame,
    V = W_V (x + E).

    Args:
        channels: of tokens.
        num_heads: of all three attentions.
        hidden: channels of the feed-forward.
        drop_path: probability with which training leaves out a residual branch of a clip.

    Source: AOT (Yang et al., NeurIPS 2021), section 4.2.
    """

    def __init__(
        self, channels: int = 256, num_heads: int = 8, hidden: int = 1024, drop_path: float = DROP_PATH
    ) -> None:
        super().__init__(channels, num_heads, hidden, drop_path)

    def _project(self, channels: int, num_heads: int) -> None:
        self.linear_Q = nn.Linear(channels, channels)
        self.linear_V = nn.Linear(channels, channels)

    def current(self, x: Tensor) -> Current:
        return self.linear_Q(x), x

    def memorise(self, current: Current, identity: Tensor) -> Memory:
        key, value = current
        return Memory(key, self.linear_V(value + identity))


class LSTTBlockV2(_Block):
    """The block in which identities gate the keys too: K = x W_K (1 + tanh(W_G E)), one gate per head, and
    V = x W_V + W_E E.

    Args:
        channels, num_heads, hidden, drop_path: as of `LSTTBlock`.

    Source: LSTT block V2 (Yang et al., AOST, 2022; 5th place of the 4th LSVOS challenge, eq. 2 and 3); names
    and the gate 1 + tanh as in the published code.
    """

    def __init__(
        self, channels: int = 256, num_heads: int = 8, hidden: int = 1024, drop_path: float = DROP_PATH
    ) -> None:
        super().__init__(channels, num_heads, hidden, drop_path)

    def _project(self, channels: int, num_heads: int) -> None:
        self.linear_QV = nn.Linear(channels, 2 * channels)
        self.linear_ID_KV = nn.Linear(channels, num_heads + channels)

    def current(self, x: Tensor) -> Current:
        return self.linear_QV(x).chunk(2, -1)

    def memorise(self, current: Current, identity: Tensor) -> Memory:
        key, value = current
        heads = self.long_term_attn.num_heads
        gate, added = self.linear_ID_KV(identity).split([heads, value.shape[2]], 2)
        gated = key.unflatten(2, (heads, -1)) * (1 + torch.tanh(gate))[..., None]
        return Memory(gated.flatten(2), value + added)


class LSTT(nn.Module):
    """The transformer: blocks one after another, and a normalisation of what each hands to the decoder.

    Args:
        layers: number of blocks.
        channels: of tokens.
        num_heads: of the attentions.
        block: `LSTTBlock` or `LSTTBlockV2`.

    Source: AOT, section 4.2.
    """

    def __init__(
        self, layers: int, channels: int = 256, num_heads: int = 8, block: type[_Block] = LSTTBlock
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block(channels, num_heads, 4 * channels) for _ in range(layers))  # type: ignore[call-arg]
        self.decoder_norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))

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
        """One frame through all blocks.

        Args:
            x, identity, size, position, top_k: as of `LSTTBlock`.
            reads: the memories per block; None on a reference frame.

        Returns:
            The normalised tokens (B, N, C) after every block, and what each brings to the memory.
        """
        outputs, currents = [], []
        for i, (layer, norm) in enumerate(zip(self.layers, self.decoder_norms, strict=True)):
            read = None if reads is None else reads[i]
            x, current = layer(x, read, identity, size=size, position=position, top_k=top_k)
            outputs.append(norm(x))
            currents.append(current)
        return outputs, currents

    def memorise(self, currents: Sequence[Current], identity: Tensor) -> list[Memory]:
        """The memory of a frame per block, once its mask is known: identity (B, N, C)."""
        return memorise(self.layers, currents, identity)


def memorise(layers: nn.ModuleList, currents: Sequence[Current], identity: Tensor) -> list[Memory]:
    """What every block remembers of a frame with the identity embedding (B, N, C) of its mask."""
    return [layer.memorise(x, identity) for layer, x in zip(layers, currents, strict=True)]  # type: ignore[operator]


def initialise(block: nn.Module) -> None:
    """Xavier initialisation of every matrix but the relative values of short-term attention: they stay 0."""
    for name, parameter in block.named_parameters():
        if parameter.dim() > 1 and not name.endswith("relative_emb_v"):
            nn.init.xavier_uniform_(parameter)
