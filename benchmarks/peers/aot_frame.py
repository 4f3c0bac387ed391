# SPDX-License-Identifier: Apache-2.0
"""A frame of AOT and of DeAOT by the published formulas, with the weights of our networks.

Tokens are sequence-first (N, B, C), maps channels first, normalisations of the encoder apart from its
convolutions. Dense attention stores its matrix; window attention scatters its weights into a dense one of
padded frames; the identity bank convolves a one-hot mask; the long-term memory grows by torch.cat, newest
first. The products of a window come from F.unfold, where the published code has an extension for them.

Source: the formulas and layouts of the published code of Yang, Wei, Yang: AOT, NeurIPS 2021, and Yang, Yang:
DeAOT, NeurIPS 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.models.aot import AOT, IDENTITIES, DeAOT
from vosops.models.aot_encoders import _FoldedConv, _FoldedNorm
from vosops.models.aot_session import merge_groups
from vosops.nn.attention import WINDOW
from vosops.nn.identity import sine_position

from .window import _products_of_unfold

_REACH = WINDOW // 2
_FAR = 1e8  # what the scores of offsets outside of the frame are lowered by
_UNUSED = -1e10  # the logit of identities that nobody has

Parts = tuple[Tensor, ...]
"""What a block remembers: key and value; DeAOT adds the value of its identity branch."""


class Maps(NamedTuple):
    """What is kept of an image.

    shortcuts: maps (1, C, ...) at strides 4, 8 and 16.
    projected: (1, 256, h, w) at stride 16.
    """

    shortcuts: tuple[Tensor, Tensor, Tensor]
    projected: Tensor


@dataclass
class Group:
    """Up to ten objects.

    objects: how many.
    long: per block, (T * h * w, 1, C) each.
    short: per block, (1, C, h, w) each.
    newest: what `short` was made of, (h * w, 1, C) each.
    currents: what each block keeps of the frame segmented last, (h * w, 1, C) each.
    """

    objects: int
    long: list[Parts] = field(default_factory=list)
    short: list[Parts] = field(default_factory=list)
    newest: list[Parts] = field(default_factory=list)
    currents: list[Parts] = field(default_factory=list)


class PublishedAOT:
    """The published engine for one video (batch 1), with a copy of a model's weights.

    Args:
        model: `AOT` with blocks of version 1, or `DeAOT`.
        sdpa: dense attention by F.scaled_dot_product_attention instead; the rest stays.

    Attributes:
        groups: every ten objects. Methods replace what a group holds, so that copies of the groups keep the
            memory of the time of copying.

    Raises:
        ValueError: the model has blocks of version 2, which the published engine does not run.
    """

    def __init__(self, model: AOT, *, sdpa: bool = False) -> None:
        self._dual = isinstance(model, DeAOT)
        if not self._dual and model.id_norm is not None:
            raise ValueError("model must have blocks of version 1, got AOT with blocks of version 2")
        self._model: Any = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)
        unfold_norms(self._model.encoder)
        self._read = _read_sdpa if sdpa else _read_stored
        self.groups: list[Group] = []

    def take(self, state: dict[str, Any]) -> None:
        """The memory of our session, from its `state_dict`."""

        def parts(key: Tensor, value: Tensor) -> Parts:  # [1, C, ...]
            values = value.chunk(2, 1) if self._dual else (value,)
            return (key.contiguous(), *(x.contiguous() for x in values))

        self.groups = []
        for saved in state["groups"]:
            group = Group(saved["given"])
            for bank, memory in zip(saved["long"], saved["short"], strict=True):
                long = parts(bank["key"], bank["groups"][0]["value"])
                group.long.append(tuple(_tokens(x).contiguous() for x in long))
                group.short.append(parts(*(x.mT.unflatten(2, bank["key"].shape[3:]) for x in memory)))
            self.groups.append(group)

    def encode(self, image: Tensor) -> Maps:
        """Maps of a normalised image (1, 3, H, W).

        Raises:
            ValueError: H and W are no size of the network; this engine resizes nothing.
        """
        size = (image.shape[2], image.shape[3])
        expected = self._model.network_size(size)
        if expected != size:
            raise ValueError(f"image must have a size of the network such as {expected}, got {size}")
        x4, x8, x16, last = self._model.encoder(image)
        return Maps((x4, x8, x16), self._model.encoder_projector(last))

    def segment(self, maps: Maps, lap: Callable[[str], None] = lambda _: None) -> Tensor:
        """Probabilities (1, 1 + O, H, W) of all groups' objects, H and W of the image.

        Args:
            lap: called after each "propagate" and each "decode".
        """
        logits = []
        for group in self.groups:
            outputs, group.currents = self._propagate(maps, group, None)
            lap("propagate")
            logits.append(self._decode(maps, outputs, group.objects))
            lap("decode")
        probabilities = merge_groups(logits)
        lap("decode")
        return probabilities

    def refer(self, maps: Maps, labels: Tensor, objects: int) -> None:
        """Starts the memory with a reference frame and its labels (1, H, W), 0 to `objects`."""
        self.groups = [Group(min(IDENTITIES, objects - first)) for first in range(0, objects, IDENTITIES)]
        for i, group in enumerate(self.groups):
            _, group.currents = self._propagate(maps, group, self._identity(labels, i))
        self.remember(maps, labels)
        self.append()

    def remember(self, maps: Maps, labels: Tensor) -> None:
        """Makes the frame last propagated, with its labels (1, H, W), the short-term memory."""
        for i, group in enumerate(self.groups):
            identity = self._identity(labels, i)
            layers = zip(self._model.LSTT.layers, group.currents, strict=True)
            group.newest = [self._memory(layer, current, identity) for layer, current in layers]
            group.short = [tuple(_map(x, _size(maps)) for x in parts) for parts in group.newest]
            group.currents = []

    def append(self) -> None:
        """Adds the short-term memory to the long-term memory, in front of it."""
        for group in self.groups:
            old = group.long or [tuple(x[:0] for x in parts) for parts in group.newest]
            pairs = zip(group.newest, old, strict=True)
            group.long = [tuple(torch.cat(both) for both in zip(*pair, strict=True)) for pair in pairs]

    def _identity(self, labels: Tensor, group: int) -> Tensor:
        """Embedding (h * w, 1, 256) of a group's objects in labels (1, H, W)."""
        own = labels - group * IDENTITIES
        own = torch.where((own > 0) & (own <= IDENTITIES), own, 0)
        channels = torch.arange(1 + IDENTITIES, device=labels.device)[None, :, None, None]
        bank = self._model.patch_wise_id_bank
        one_hot = (own[:, None] == channels).float()
        identity = _tokens(F.conv2d(one_hot, bank.weight, bank.bias, bank.stride, bank.padding))
        norm = self._model.id_norm
        return identity if norm is None else norm(identity)

    def _propagate(
        self, maps: Maps, group: Group, identity: Tensor | None
    ) -> tuple[list[Tensor], list[Parts]]:
        """Outputs for the decoder (h * w, 1, C), and what each block keeps."""
        lstt, size, block = self._model.LSTT, _size(maps), self._dual_block if self._dual else self._block
        branches: tuple[Tensor, ...] = (_tokens(maps.projected),)
        outputs, currents = [], []
        for i, layer in enumerate(lstt.layers):
            memory = None if identity is not None else (group.long[i], group.short[i])
            branches, current = block(layer, branches, memory, identity, size)
            currents.append(current)
            if not self._dual:
                outputs.append(lstt.decoder_norms[i](branches[0]))
        if self._dual:
            whole = torch.cat(branches, 2).permute(1, 2, 0)
            outputs.append(lstt.decoder_norms[0].gn(whole).permute(2, 0, 1))
        return outputs, currents

    def _decode(self, maps: Maps, outputs: list[Tensor], objects: int) -> Tensor:
        """Logits (1, 1 + objects, H, W), once those of all identities were brought to the image's size."""
        decoder, (f4, f8, f16) = self._model.decoder, maps.shortcuts
        inputs = [_map(x, _size(maps)) for x in outputs]
        x = F.relu_(decoder.conv_in(torch.cat(inputs if self._dual else [maps.projected, *inputs], 1)))
        x = F.relu_(decoder.conv_16x(decoder.adapter_16x(f16) + x))
        x = decoder.adapter_8x(f8) + self._resized(x, f8)
        x = F.relu_(decoder.conv_8x(x))
        x = decoder.adapter_4x(f4) + self._resized(x, f4)
        logits = decoder.conv_out(F.relu_(decoder.conv_4x(x)))
        logits[:, 1 + objects :] = _UNUSED
        stride, aligned = self._model.stride, self._model.aligned
        size = [(side - aligned) * stride + aligned for side in _size(maps)]
        whole = F.interpolate(logits, size, mode="bilinear", align_corners=aligned)
        return whole[:, : 1 + objects]

    def _resized(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=self._model.aligned)

    def _memory(self, layer: Any, current: Parts, identity: Tensor) -> Parts:
        """What a block remembers of a frame."""
        key, value, *branch = current
        if not self._dual:
            return key, layer.linear_V(value + identity)
        return key, value, F.silu(layer.linear_ID_V(torch.cat((*branch, identity), 2)))

    def _block(
        self,
        layer: Any,
        branches: tuple[Tensor, ...],
        memory: tuple[Parts, Parts] | None,
        identity: Tensor | None,
        size: tuple[int, int],
    ) -> tuple[tuple[Tensor, ...], Parts]:
        """A block of AOT."""
        (x,) = branches
        y = layer.norm1(x)
        placed, own = y + _position(size, y.shape[2]), layer.self_attn
        q, k, v = own.linear_Q(placed), own.linear_K(placed), own.linear_V(y)
        x = x + own.projection(self._read(q, k, v, own.num_heads))
        y = layer.norm2(x)
        query = layer.linear_Q(y)
        current: Parts = (query, y)
        long, short = memory or self._itself(layer, current, identity, size)
        (key, value), heads = long, layer.long_term_attn.num_heads
        read = layer.long_term_attn.projection(self._read(query, key, value, heads))
        window = window_attention(layer.short_term_attn, _map(query, size), *short)
        x = x + (read + layer.short_term_attn.projection(window))
        hidden = _map(layer.linear1(layer.norm3(x)), size)
        hidden = layer.activation.conv(F.gelu(layer.activation.gn(hidden)))
        return (x + layer.linear2(_tokens(hidden)),), current

    def _dual_block(
        self,
        layer: Any,
        branches: tuple[Tensor, ...],
        memory: tuple[Parts, Parts] | None,
        identity: Tensor | None,
        size: tuple[int, int],
    ) -> tuple[tuple[Tensor, ...], Parts]:
        """A block of DeAOT: the values of both branches are concatenated for every frame anew."""
        x, heads = branches[0], layer.num_heads
        y = layer.norm1(x)
        query, value = layer.linear_QV(y).split([heads * layer.keys, 2 * y.shape[2]], 2)
        current: Parts = (query, F.silu(value))
        gate = F.silu(layer.linear_U(y))
        if layer.first:
            gate = torch.cat((gate, torch.ones_like(gate)), 2)
        else:
            z = layer.id_norm1(branches[1])
            current = (*current, z)
            gate = torch.cat((gate, F.silu(layer.linear_ID_U(z))), 2)
        long, short = memory or self._itself(layer, current, identity, size)
        whole = torch.cat(long[1:], 2)
        read = _gated(layer.long_term_attn, self._read(query, long[0], whole, heads), gate, size)
        near = torch.cat(short[1:], 1)
        window = window_attention(layer.short_term_attn, _map(query, size), short[0], near)
        visual, ids = (read + _gated(layer.short_term_attn, window, gate, size)).chunk(2, 2)
        x, branch = x + visual, ids if layer.first else branches[1] + ids
        own, y, z = layer.self_attn, layer.norm2(x), layer.id_norm2(branch)
        query = own.linear_QK(torch.cat((y, z), 2))
        value = F.silu(torch.cat((own.linear_V1(y), own.linear_V2(z)), 2))
        gate = F.silu(torch.cat((own.linear_U1(y), own.linear_U2(z)), 2))
        visual, ids = _gated(own, self._read(query, query, value, heads), gate, size).chunk(2, 2)
        return (x + visual, branch + ids), current

    def _itself(
        self, layer: Any, current: Parts, identity: Tensor | None, size: tuple[int, int]
    ) -> tuple[Parts, Parts]:
        """The memories of a reference frame, which reads itself."""
        assert identity is not None
        parts = self._memory(layer, current, identity)
        return parts, tuple(_map(x, size) for x in parts)


def window_attention(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Short-term attention as AOT's published code aggregates it.

    Args:
        attention: `vosops.nn.ShortTermAttention` or `LocalGatedPropagation`, for heads and relative terms.
        query, key: (1, C, h, w).
        value: (1, Cv, h, w).

    Returns:
        Tokens (h * w, 1, Cv).

    Note:
        Cost: 2 Q (n^2 C + P Cv) operations, P = (h + 14) (w + 14), Q = h w. Memory: unfolded keys twice
        (Q n^2 C), the padded matrix (heads Q P), its cut (heads Q^2), and the indices of all weights.
    """
    heads, size = attention.num_heads, (query.shape[2], query.shape[3])
    there, mask = _cells(size)
    embedding, scale = attention.relative_emb_k, (query.shape[1] // heads) ** -0.5
    products = _products_of_unfold(query * scale, key, heads, WINDOW)  # [1, heads, n^2, Q]
    products = products + embedding(query).flatten(2).unflatten(1, (heads, -1))
    weights = (products - there).softmax(2)
    # Every weight to its cell of the padded frame, position after position; then the padding is cut away.
    height, width = size
    padded = weights.new_zeros(1, heads, height * width, height + 2 * _REACH, width + 2 * _REACH)
    padded[mask.expand(1, heads, -1, -1, -1)] = weights.mT.reshape(-1)
    dense = padded[..., _REACH:-_REACH, _REACH:-_REACH].reshape(1, heads, height * width, -1)
    read = dense @ value.flatten(2).unflatten(1, (heads, -1)).mT
    read = read.permute(2, 0, 1, 3).flatten(2)
    relative = getattr(attention, "relative_emb_v", None)
    if relative is None:
        return read
    return read + torch.einsum("bhnq,hcn->qbhc", weights, relative).flatten(2)


def matrices(model: AOT, size: tuple[int, int], frames: int) -> dict[str, int]:
    """Bytes, in float32, of what one block's attentions store on the way; freed block by block.

    Args:
        size: (h, w) of the map at stride 16.
        frames: in the long-term memory.

    Returns:
        scores, weights: of the long-term attention, there at once; padded, dense, indices: of the window
        attention; unfolded: its keys, twice for a moment.
    """
    layer: Any = model.LSTT.layers[0]
    heads, channels = layer.short_term_attn.num_heads, layer.short_term_attn.relative_emb_k.in_channels
    positions = size[0] * size[1]
    matrix = 4 * heads * positions * frames * positions
    return {
        "scores": matrix,
        "weights": matrix,
        "padded": 4 * heads * positions * (size[0] + 2 * _REACH) * (size[1] + 2 * _REACH),
        "dense": 4 * heads * positions**2,
        "indices": 8 * 5 * heads * positions * WINDOW**2,
        "unfolded": 4 * channels * WINDOW**2 * positions,
    }


class _FrozenNorm(nn.Module):
    """A frozen batch normalisation in one pass over the map, by the library."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name))
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        return F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias, eps=self.eps)


def unfold_norms(network: nn.Module) -> None:
    """Takes the normalisations of an encoder of ours out of its convolutions again."""
    for name, part in list(network.named_modules()):
        if isinstance(part, _FoldedConv):
            options = (part.kernel_size, part.stride, part.padding, part.dilation, part.groups)
            conv = nn.Conv2d(part.in_channels, part.out_channels, *options, device="meta")  # type: ignore[arg-type]
            conv.weight, conv.bias = part.weight, part.bias
            network.set_submodule(name, conv)
        elif isinstance(part, _FoldedNorm):
            network.set_submodule(name, _FrozenNorm(part))


def _read_stored(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention (Q, B, Cv) of query (Q, B, C), key (M, B, C), value (M, B, Cv): scores stored, softmax."""
    scale = (query.shape[2] // heads) ** -0.5
    scores = _heads(query * scale, heads) @ _heads(key, heads).mT
    return (scores.softmax(3) @ _heads(value, heads)).permute(2, 0, 1, 3).flatten(2)


def _read_sdpa(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    q, k, v = (_heads(x, heads) for x in (query, key, value))
    read = F.scaled_dot_product_attention(q, k, v)
    return read.permute(2, 0, 1, 3).flatten(2)


def _gated(part: Any, read: Tensor, gate: Tensor, size: tuple[int, int]) -> Tensor:
    """W DWConv(U * read) of DeAOT, tokens."""
    return part.projection(_tokens(part.dw_conv.conv(_map(read * gate, size))))  # type: ignore[no-any-return]


def _heads(x: Tensor, heads: int) -> Tensor:  # [N, B, C] -> [B, heads, N, C / heads]
    return x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)


def _map(tokens: Tensor, size: tuple[int, int]) -> Tensor:  # [h * w, B, C] -> [B, C, h, w]
    return tokens.permute(1, 2, 0).unflatten(2, size).contiguous()


def _tokens(maps: Tensor) -> Tensor:  # [B, C, ...] -> [N, B, C]
    return maps.flatten(2).permute(2, 0, 1)


def _size(maps: Maps) -> tuple[int, int]:
    return maps.projected.shape[2], maps.projected.shape[3]


@cache
def _position(size: tuple[int, int], channels: int) -> Tensor:
    """(h * w, 1, channels), once per video as published."""
    return sine_position(size, channels, torch.device("cpu")).transpose(0, 1)


@cache
def _cells(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of a window around every position: what offsets outside of the frame are lowered by (n^2, Q), and its
    cells (Q, h + 14, w + 14) in the padded frame, bool."""
    height, width = size
    inside = F.unfold(torch.ones(1, 1, *size), WINDOW, padding=_REACH)[0]
    y, x = torch.arange(height + 2 * _REACH), torch.arange(width + 2 * _REACH)
    near_y = (y - torch.arange(height)[:, None] - _REACH).abs() <= _REACH  # [h, h + 14]
    near_x = (x - torch.arange(width)[:, None] - _REACH).abs() <= _REACH
    mask = near_y[:, None, :, None] & near_x[None, :, None, :]
    return (1 - inside) * _FAR, mask.flatten(0, 1)
