# SPDX-License-Identifier: Apache-2.0
"""The best that plain PyTorch can do: one matrix product, topk, and a gather of the kept rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vosops import KernelPrior

from .scores import as_product, with_prior


def memory_read(
    query_key: Tensor,  # [B, Ck, *q]
    memory_key: Tensor,  # [B, Ck, *m]
    memory_value: Tensor,  # [B, O, Cv, *m]
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,  # [B, 1, *m]
    selection: Tensor | None = None,  # [B, Ck, *q]
    top_k: int | None = None,
    prior: KernelPrior | None = None,
) -> Tensor:
    """The top-k memory read without the dense affinity: scores in one product, topk, embedding_bag.

    Biases and the prior ride along as extra key channels, so that nothing but the product and topk
    touches a Q x M matrix; embedding_bag gathers and weighs the kept rows in one pass.

    Args, returns: as `vosops.memory_read`, without memory_mask and usage; top_k must be given.

    Raises:
        ValueError: top_k is None: there is nothing to gather.

    Note:
        Cost: 2 B Q M C' operations (C' of `as_product`), one topk over Q x M, Q k rows of O Cv values.
        Memory: one B Q M matrix, and the values once more where channels are not innermost.
    """
    if top_k is None:
        raise ValueError("top_k must be an integer: a dense read has nothing to gather, got None")
    batch, objects, channels = memory_value.shape[:3]
    scale = query_key.shape[1] ** -0.5 if scale is None else scale
    q, k = as_product(
        query_key, memory_key, similarity=similarity, scale=scale, shrinkage=shrinkage, selection=selection
    )
    if prior is not None:
        q, k = with_prior(q, k, prior, (query_key.shape[2], query_key.shape[3]))
    memory = k.shape[2]
    best, indices = torch.bmm(q.mT, k).topk(min(top_k, memory), dim=2, sorted=False)  # [B, Q, k]
    weights = best.softmax(2)
    table = memory_value.flatten(3).permute(0, 3, 1, 2).reshape(batch * memory, objects * channels)
    rows = indices + memory * torch.arange(batch, device=indices.device)[:, None, None]
    read = F.embedding_bag(
        rows.flatten(0, 1), table, per_sample_weights=weights.flatten(0, 1).to(table.dtype), mode="sum"
    )  # [B*Q, O*Cv]
    read = read.view(batch, -1, objects, channels).permute(0, 2, 3, 1)
    return read.reshape(batch, objects, channels, *query_key.shape[2:])
