# SPDX-License-Identifier: Apache-2.0
"""Attention's operators in Triton: the memory read's kernels with the heads of every batch entry as entries.

The gate on the keys is their shrinkage; the norm of the distance form and the identity beside the values are
compile-time options of those kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory_read.triton import dense, dense_backward, match
from ..memory_read.triton.operands import Operands, Values
from .problem import split_heads


def attention_match(
    query: Tensor,
    key: Tensor,
    identity_gate: Tensor | None,
    num_heads: int,
    distance: bool,
    scale: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    o = _operands(query, key, identity_gate, num_heads, distance, scale)
    indices, weights = match.match_entries(o, top_k)
    shape = (query.shape[0], num_heads, *indices.shape[1:])
    return indices.view(shape), weights.view(shape)


def attention_dense(
    query: Tensor,
    key: Tensor,
    identity_gate: Tensor | None,
    num_heads: int,
    distance: bool,
    scale: float,
    values: list[Tensor],
    identity: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, _ = query.shape
    widths = [value.shape[2] for value in values]
    read = torch.empty(batch, queries, sum(widths), dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, num_heads, queries, dtype=torch.float32, device=query.device)
    added = [] if identity is None else [_heads(identity, num_heads)]
    # A launch for each tensor costs what one for all would: programs of other value channels compute the
    # scores again in any case.
    for value, result in zip(values, read.split(widths, 2), strict=True):
        v = _heads(value, num_heads)
        o = _operands(query, key, identity_gate, num_heads, distance, scale, v, result, *added)
        values_of = Values.of_heads(v, added[0] if added else None, o)
        dense.read_into(o, values_of, _heads(result, num_heads), lse.flatten(0, 1))
    return read, lse


def attention_dense_backward(
    query: Tensor,
    key: Tensor,
    identity_gate: Tensor | None,
    num_heads: int,
    distance: bool,
    scale: float,
    value: Tensor,
    identity: Tensor | None,
    grad_read: Tensor,
    delta: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = _heads(value, num_heads)
    added = None if identity is None else _heads(identity, num_heads)
    further = (v, grad_read) if added is None else (v, grad_read, added)
    o = _operands(query, key, identity_gate, num_heads, distance, scale, *further)
    grad = grad_read.flatten(0, 1).mT.contiguous()  # [B * h, Q, Cv/h]
    left, right, bias, grad_value = dense_backward.backward_of_entries(
        o, Values.of_heads(v, added, o), grad, delta, lse
    )
    return left, right, bias, grad_value[:, None].mT


def attention_usage(
    query: Tensor,
    key: Tensor,
    identity_gate: Tensor | None,
    num_heads: int,
    distance: bool,
    scale: float,
    lse: Tensor,
) -> Tensor:
    o = _operands(query, key, identity_gate, num_heads, distance, scale)
    return dense.usage_of_entries(o, lse).unflatten(0, (query.shape[0], num_heads))


def _heads(tensor: Tensor, num_heads: int) -> Tensor:  # [B, N, C] -> [B, h, C/h, N]
    return split_heads(tensor, num_heads).mT


def _operands(
    query: Tensor,
    key: Tensor,
    identity_gate: Tensor | None,
    num_heads: int,
    distance: bool,
    scale: float,
    *further: Tensor,
) -> Operands:
    gate = None if identity_gate is None else identity_gate.mT.expand(-1, num_heads, -1)
    return Operands.of_heads(
        _heads(query, num_heads), _heads(key, num_heads), gate, distance, scale, *further
    )
