# SPDX-License-Identifier: Apache-2.0
"""The definition of the memory read in plain torch; every other backend is tested against it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import Scores


def scores(p: Scores) -> Tensor:  # [B, Q, M]
    wide = torch.promote_types(torch.promote_types(p.query_key.dtype, p.memory_key.dtype), torch.float32)
    q, k = p.query_key.flatten(2).to(wide), p.memory_key.flatten(2).to(wide)  # [B, Ck, Q], [B, Ck, M]
    if p.memory_mask is not None:
        k = k.masked_fill(~p.memory_mask.flatten(1)[:, None], 0)  # what never matches cannot spread NaN
    if p.similarity == "dot":
        s = q.mT @ k
    elif p.selection is None:
        s = 2 * q.mT @ k - k.square().sum(1)[:, None]
    else:
        e = p.selection.flatten(2).to(wide)
        s = 2 * (e * q).mT @ k - e.mT @ k.square() - (e * q.square()).sum(1)[..., None]
    if p.shrinkage is not None:
        s = s * p.shrinkage.flatten(2).to(wide)
    s = s * p.scale
    if p.centers is not None and p.precision is not None:
        distance = p.cells(s)[None, :, None] - p.centers[:, None].to(wide)  # [B, Q, M, 2]
        s = s - distance.square().sum(-1) * p.precision[:, None].to(wide)
    if p.memory_mask is not None:
        s = s.masked_fill(~p.memory_mask.flatten(1)[:, None], -math.inf)
    return s


def softmax(s: Tensor) -> Tensor:
    """Over the last dimension; a score of -inf never matches, and a row of nothing else is 0."""
    top = s.detach().amax(-1, keepdim=True)
    weights = (s - top.masked_fill(top == -math.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def match(p: Scores, top_k: int) -> tuple[Tensor, Tensor]:  # [B, Q, k] twice
    best, indices = scores(p).topk(min(top_k, p.memory), dim=-1)
    return indices.masked_fill(best == -math.inf, -1), softmax(best)


def gather(indices: Tensor, weights: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:  # [B, O, Cv, Q]
    table = value.flatten(3).permute(0, 3, 1, 2).flatten(2).to(weights.dtype)  # [B, M, O*Cv]
    first = indices[..., :1]
    rows = torch.where(indices < 0, first, indices).clamp(min=0).flatten(1)  # weight 0: rows read anyway
    picked = table.gather(1, rows[..., None].expand(-1, -1, table.shape[2])).unflatten(1, indices.shape[1:])
    read = torch.einsum("bqk,bqkc->bcq", weights, picked).masked_fill((first < 0).mT, 0)
    return read.unflatten(1, value.shape[1:3]).to(dtype)


def read(p: Scores, value: Tensor, dtype: torch.dtype, return_usage: bool) -> tuple[Tensor, Tensor | None]:
    weights = softmax(scores(p))  # [B, Q, M]
    if p.memory_mask is not None:
        value = value.masked_fill(~p.memory_mask[:, None, None], 0)
    result = torch.einsum("bqm,bocm->bocq", weights, value.flatten(3).to(weights.dtype))
    return result.to(dtype), weights.detach().sum(1).float() if return_usage else None


def best_query(p: Scores, log_prior: Tensor | None, gain: Tensor | None) -> Tensor:  # [B, M]
    s = scores(p).nan_to_num(nan=-math.inf)
    if log_prior is not None and gain is not None:
        s = s + log_prior[..., None] * gain[:, None]  # [B, Q, 1] * [B, 1, M]
    return s.masked_fill(~p.in_window(s.device), -math.inf).argmax(1)
