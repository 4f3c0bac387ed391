# SPDX-License-Identifier: Apache-2.0
"""The dense memory read through PyTorch's attention: scaled_dot_product_attention and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from vosops import KernelPrior

from .scores import as_product, best_cells, with_prior


def memory_read_sdpa(
    query_key: Tensor,  # [B, Ck, *q]
    memory_key: Tensor,  # [B, Ck, *m]
    memory_value: Tensor,  # [B, O, Cv, *m]
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,  # [B, 1, *m]
    selection: Tensor | None = None,  # [B, Ck, *q]
    prior: KernelPrior | None = None,
) -> Tensor:
    """The dense read with F.scaled_dot_product_attention, one head of O Cv value channels.

    l2, shrinkage, selection and the prior ride along as extra key channels (`as_product`, `with_prior`).

    Args, returns: as `vosops.memory_read` with top_k=None, without memory_mask and usage.

    Note:
        Cost: 2 B Q M (C' + O Cv) operations. Where key and value widths differ PyTorch's CPU backend takes
        its matrix path, which stores Q x M; splitting the values over heads of Ck channels, which its
        fused path accepts, recomputes the scores per head and is slower still.
    """
    scale = query_key.shape[1] ** -0.5 if scale is None else scale
    q, k = as_product(
        query_key, memory_key, similarity=similarity, scale=scale, shrinkage=shrinkage, selection=selection
    )
    if prior is not None:
        q, k = with_prior(q, k, prior, (query_key.shape[2], query_key.shape[3]))
    read = F.scaled_dot_product_attention(_head(q), _head(k), _value_head(memory_value), scale=1.0)
    return _unpack(read, query_key, memory_value)


def memory_read_flex(
    query_key: Tensor,  # [B, Ck, *q]
    memory_key: Tensor,  # [B, Ck, *m]
    memory_value: Tensor,  # [B, O, Cv, *m]
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,  # [B, 1, *m]
    selection: Tensor | None = None,  # [B, Ck, *q]
    prior: KernelPrior | None = None,
) -> Tensor:
    """The dense read with compiled FlexAttention: the prior, and l2's bias, in its score_mod.

    Args, returns: as `vosops.memory_read` with top_k=None, without memory_mask and usage.

    Note:
        Cost: 2 B Q M (C' + O Cv) operations, and M x Q once for the prior's argmax. The first call with
        new shapes compiles for several seconds. Forward only on the CPU.
    """
    scale = query_key.shape[1] ** -0.5 if scale is None else scale
    bias = None
    if similarity == "l2" and selection is None and shrinkage is None:
        q, k = 2 * scale * query_key.flatten(2), memory_key.flatten(2)
        bias = scale * k.square().sum(1)  # [B, M]
    else:
        q, k = as_product(
            query_key,
            memory_key,
            similarity=similarity,
            scale=scale,
            shrinkage=shrinkage,
            selection=selection,
        )
    center = width = None
    if prior is not None:
        height, width = query_key.shape[2:]
        center = best_cells(q, k, (height, width))  # [B, M, 2]
    score_mod = _score_mod(bias, center, width, prior.sigma if prior is not None else 1.0)
    read = _compiled_flex()(_head(q), _head(k), _value_head(memory_value), score_mod=score_mod, scale=1.0)
    return _unpack(read, query_key, memory_value)


def _score_mod(
    bias: Tensor | None, center: Tensor | None, width: int | None, sigma: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    if center is not None and width is not None:
        precision = 0.5 * sigma**-2
        row, column = center[..., 0].contiguous(), center[..., 1].contiguous()  # [B, M]

        def add_prior(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            y, x = i // width - row[b, j], i % width - column[b, j]
            return score - precision * (y * y + x * x)

        return add_prior
    if bias is not None:

        def subtract_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - bias[b, j]

        return subtract_bias
    return None


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _head(key: Tensor) -> Tensor:  # [B, C, N] -> [B, 1, N, C]
    return key.mT[:, None]


def _value_head(memory_value: Tensor) -> Tensor:  # [B, O, Cv, *m] -> [B, 1, M, O*Cv]
    return memory_value.flatten(3).flatten(1, 2).mT[:, None]


def _unpack(read: Tensor, query_key: Tensor, memory_value: Tensor) -> Tensor:  # -> [B, O, Cv, *q]
    return read[:, 0].mT.reshape(*memory_value.shape[:3], *query_key.shape[2:])
