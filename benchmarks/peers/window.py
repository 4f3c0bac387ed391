# SPDX-License-Identifier: Apache-2.0
"""Local attention as the published code and plain PyTorch can compute it; all take the same arguments.

query, key (B, C, H, W), value (B, Cv, H, W), num_heads h, window n, relative_weight (h n^2, C / h),
relative_offset (h n^2,), relative_value (h, Cv / h, n^2); the three relative terms or none of them may be
None. All return (B, Cv, H, W). Costs are given for Q = H W.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from . import flexible


def unfold(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    window: int,
    relative_weight: Tensor | None = None,
    relative_offset: Tensor | None = None,
    relative_value: Tensor | None = None,
) -> Tensor:
    """AOT's formula on F.unfold: every position's window of keys and of values written out.

    Note:
        Cost: 2 B Q n^2 (C + Cv) operations and as many elements of memory, written once and read once.
    """
    weights = _weights(query, key, num_heads, window, relative_weight, relative_offset, _products_of_unfold)
    values = _unfolded(value, num_heads, window)  # [B, h, c, n^2, Q]
    read = (weights[:, :, None] * values).sum(3)
    return _with_relative_value(read, weights, relative_value).reshape(value.shape)


def dense_scatter(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    window: int,
    relative_weight: Tensor | None = None,
    relative_offset: Tensor | None = None,
    relative_value: Tensor | None = None,
) -> Tensor:
    """AOT's formula as it aggregates: weights scattered into a dense Q x Q matrix, then a product with V.

    Note:
        Cost: 2 B Q (n^2 C + Q Cv) operations; memory of two Q x Q matrices per head and the unfolded keys.
    """
    weights = _weights(query, key, num_heads, window, relative_weight, relative_offset, _products_of_unfold)
    return _aggregate_dense(weights, value, num_heads, window, relative_value)


def sampler(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    window: int,
    relative_weight: Tensor | None = None,
    relative_offset: Tensor | None = None,
    relative_value: Tensor | None = None,
) -> Tensor:
    """What AOT runs: scores from the spatial_correlation_sampler extension, values as `dense_scatter`.

    Raises:
        ImportError: the extension is not installed (`has_sampler`).
    """
    weights = _weights(query, key, num_heads, window, relative_weight, relative_offset, _products_of_sampler)
    return _aggregate_dense(weights, value, num_heads, window, relative_value)


def masked_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    window: int,
    relative_weight: Tensor | None = None,
    relative_offset: Tensor | None = None,
    relative_value: Tensor | None = None,
) -> Tensor:
    """Dense attention with everything outside of the window masked: the best plain PyTorch does here.

    Note:
        Cost: 2 B Q^2 (C + Cv) operations; memory of two to four Q x Q matrices per head.
    """
    q, k, v = (_tokens(x, num_heads) for x in (query, key, value))
    s = (q * q.shape[-1] ** -0.5) @ k.mT  # [B, h, Q, Q]
    height, width = query.shape[2:]
    offsets, inside = _offsets(height, width, window, query.device)
    relative = _relative(query, num_heads, relative_weight, relative_offset)
    if relative is not None:
        s = s + relative.mT.gather(3, offsets.expand(*s.shape))
    weights = s.masked_fill(~inside, -torch.inf).softmax(-1)
    read = weights @ v  # [B, h, Q, c]
    if relative_value is not None:
        cells, there = _cells(height, width, window, query.device)
        local = weights.gather(3, cells.expand(*weights.shape[:3], -1)) * there
        read = read + local @ relative_value.mT
    return read.mT.reshape(value.shape)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    window: int,
    relative_weight: Tensor | None = None,
    relative_offset: Tensor | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention with the window, and the relative term, as its mask.

    Note:
        Cost: 2 B Q^2 (C + Cv) operations; the mask is Q x Q, per head with a relative term.
        relative_value needs the weights, which it does not return.
    """
    q, k, v = (_tokens(x, num_heads) for x in (query, key, value))
    offsets, mask = _offsets(*query.shape[2:], window, query.device)
    relative = _relative(query, num_heads, relative_weight, relative_offset)
    if relative is not None:
        bias = relative.mT.gather(3, offsets.expand(*relative.shape[:2], *offsets.shape))
        mask = bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).mT.reshape(value.shape)


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    window: int,
    relative_weight: Tensor | None = None,
    relative_offset: Tensor | None = None,
) -> Tensor:
    """Compiled FlexAttention: the window as block mask, the relative term in its score_mod.

    Note:
        Cost: the blocks of 128 x 128 that the window touches; maps whose channels lie innermost are not
        copied. The first call with new shapes compiles for several seconds. Forward only on the CPU; no
        relative_value, as `sdpa`.
    """
    q, k, v = (_tokens(x, num_heads) for x in (query, key, value))
    height, width = query.shape[2:]
    reach = window // 2
    relative = _relative(query, num_heads, relative_weight, relative_offset)
    score_mod = None
    if relative is not None:
        table = relative.mT.contiguous()  # [B, h, Q, n^2]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            dy, dx = j // width - i // width + reach, j % width - i % width + reach
            inside = (dy >= 0) & (dy < window) & (dx >= 0) & (dx < window)
            return score + table[b, h, i, torch.where(inside, dy * window + dx, 0)]

    mask = _block_mask(height, width, window, query.device)
    return flexible.attend(q, k, v, score_mod=score_mod, block_mask=mask).mT.reshape(value.shape)


def natten(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, window: int) -> Tensor:
    """NATTEN's na2d. It shifts windows at the border inwards; a border of keys that score -1e4 undoes that.

    Raises:
        ImportError: NATTEN is not installed (`has_natten`).

    Note:
        Cost: 2 B Q' n^2 (C + Cv) operations, Q' the map with its border. No relative terms, and C = Cv.
    """
    from natten.functional import na2d  # type: ignore[import-not-found,unused-ignore]

    reach = window // 2
    scale = (query.shape[1] // num_heads) ** -0.5

    def heads(x: Tensor) -> Tensor:  # [B, H', W', h, c]
        return F.pad(x, (reach,) * 4).unflatten(1, (num_heads, -1)).permute(0, 3, 4, 1, 2)

    frame = torch.ones_like(query[:, :num_heads])
    border = 1 - heads(frame)  # [B, H', W', h, 1]
    q = torch.cat((heads(query), torch.ones_like(heads(query)[..., :8])), -1)
    k = torch.cat((heads(key), (-1e4 / 8 / scale) * border.expand(*heads(key).shape[:-1], 8)), -1)
    v = F.pad(heads(value), (0, 8))  # it wants one width
    read = na2d(q, k, v, kernel_size=window, scale=scale)[..., :-8]
    inner = read[:, reach : reach + query.shape[2], reach : reach + query.shape[3]]
    return inner.permute(0, 3, 4, 1, 2).reshape(value.shape)


def has_sampler() -> bool:
    """Whether the spatial_correlation_sampler extension is installed."""
    return importlib.util.find_spec("spatial_correlation_sampler") is not None


def has_natten() -> bool:
    """Whether NATTEN is installed."""
    return importlib.util.find_spec("natten") is not None


def _tokens(x: Tensor, num_heads: int) -> Tensor:  # [B, C, H, W] -> [B, h, Q, c]
    return x.flatten(2).unflatten(1, (num_heads, -1)).mT


def _unfolded(x: Tensor, num_heads: int, window: int) -> Tensor:  # [B, h, c, n^2, Q]
    columns = F.unfold(x, window, padding=window // 2)
    return columns.view(x.shape[0], num_heads, x.shape[1] // num_heads, window * window, -1)


def _products_of_unfold(query: Tensor, key: Tensor, num_heads: int, window: int) -> Tensor:  # [B, h, n^2, Q]
    q = query.flatten(2).unflatten(1, (num_heads, -1))
    return (q[:, :, :, None] * _unfolded(key, num_heads, window)).sum(2)


def _products_of_sampler(query: Tensor, key: Tensor, num_heads: int, window: int) -> Tensor:  # [B, h, n^2, Q]
    from spatial_correlation_sampler import (  # type: ignore[import-not-found,unused-ignore]
        spatial_correlation_sample,
    )

    q, k = (x.unflatten(1, (num_heads, -1)).flatten(0, 1).contiguous() for x in (query, key))
    products = spatial_correlation_sample(q, k, kernel_size=1, patch_size=window, stride=1, padding=0)
    return products.unflatten(0, (-1, num_heads)).flatten(4).flatten(2, 3)  # type: ignore[no-any-return]


def _weights(
    query: Tensor,
    key: Tensor,
    num_heads: int,
    window: int,
    relative_weight: Tensor | None,
    relative_offset: Tensor | None,
    products: Callable[[Tensor, Tensor, int, int], Tensor],
) -> Tensor:  # [B, h, n^2, Q]
    scale = (query.shape[1] // num_heads) ** -0.5
    s = products(query * scale, key, num_heads, window)
    relative = _relative(query, num_heads, relative_weight, relative_offset)
    if relative is not None:
        s = s + relative
    _, there = _cells(*query.shape[2:], window, query.device)
    return s.masked_fill(~there.mT, -torch.inf).softmax(2)


def _relative(
    query: Tensor, num_heads: int, weight: Tensor | None, offset: Tensor | None
) -> Tensor | None:  # [B, h, n^2, Q]
    if weight is None:
        return None
    bias = F.conv2d(query, weight[..., None, None].to(query.dtype), offset, groups=num_heads)
    return bias.flatten(2).unflatten(1, (num_heads, -1))


def _with_relative_value(read: Tensor, weights: Tensor, relative_value: Tensor | None) -> Tensor:
    return read if relative_value is None else read + relative_value @ weights


def _aggregate_dense(
    weights: Tensor, value: Tensor, num_heads: int, window: int, relative_value: Tensor | None
) -> Tensor:
    height, width = value.shape[2:]
    cells, there = _cells(height, width, window, value.device)  # [Q, n^2]
    dense = weights.new_zeros(*weights.shape[:2], height * width, height * width)
    # Offsets outside of the frame weigh 0: they may be added to any cell.
    dense = dense.scatter_add(3, cells.expand(*weights.shape[:2], -1, -1), (weights * there.mT).mT)
    read = (dense @ _tokens(value, num_heads)).mT
    return _with_relative_value(read, weights, relative_value).reshape(value.shape)


@cache
def _cells(height: int, width: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cell of every offset of every position, and whether it is in the frame.  # [Q, n^2] twice"""
    reach = window // 2
    shift = torch.arange(-reach, reach + 1, device=device)
    y = torch.arange(height, device=device)[:, None, None, None] + shift[:, None]  # [H, 1, n, 1]
    x = torch.arange(width, device=device)[:, None, None] + shift  # [W, 1, n]
    there = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    cells = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return cells.reshape(height * width, -1), there.reshape(height * width, -1)


@cache
def _offsets(height: int, width: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The offset between every two positions, and whether it is in the window.  # [Q, Q] twice"""
    cells = torch.arange(height * width, device=device)
    dy = cells // width - (cells // width)[:, None] + window // 2
    dx = cells % width - (cells % width)[:, None] + window // 2
    inside = (dy >= 0) & (dy < window) & (dx >= 0) & (dx < window)
    return torch.where(inside, dy * window + dx, 0), inside


@cache
def _block_mask(height: int, width: int, window: int, device: torch.device) -> BlockMask:
    cells = height * width
    return create_block_mask(mask_mod(width, window), None, None, cells, cells, device=str(device))


def mask_mod(width: int, window: int) -> flexible.MaskMod:
    """Whether position j of a map lies in the window around position i, as `create_block_mask` asks."""
    reach = window // 2

    def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dy, dx = j // width - i // width, j % width - i % width
        return (dy.abs() <= reach) & (dx.abs() <= reach)

    return inside
