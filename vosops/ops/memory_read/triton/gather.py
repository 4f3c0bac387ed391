# SPDX-License-Identifier: Apache-2.0
"""The weighted sum over kept positions on the GPU, and its gradients; none of them uses atomics.

An index past the memory reads NaN: raising would need to wait for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch, on_device
from .operands import Positions, index_type, value_strides
from .scores import offset_of


@triton.jit
def gather_kernel(
    p_indices, p_weights, p_value, p_read,
    queries, kept, memory, width, per_object, s_batch, s_object, s_channel,
    middle, inner, s_outer, s_middle, s_inner,
    FLAT: tl.constexpr, INDEX: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """read [B, width, Q] = sum over k of weight * value row; width = O * Cv."""
    i_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_b = tl.program_id(2).to(tl.int64)
    at_channel = (i_c // per_object).to(INDEX) * s_object + (i_c % per_object).to(INDEX) * s_channel
    rows = (i_b * queries + i_q) * kept
    p_base = p_value + i_b * s_batch
    b_read = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for i_k in range(kept):
        b_index = tl.load(p_indices + rows + i_k, mask=i_q < queries, other=-1)
        b_weight = tl.load(p_weights + rows + i_k, mask=i_q < queries, other=0.0)
        inside = (b_index >= 0) & (b_index < memory)
        b_weight = tl.where((b_index < 0) | inside, b_weight, float("nan"))
        at = offset_of(b_index, middle, inner, s_outer, s_middle, s_inner, FLAT, INDEX)
        b_value = tl.load(
            p_base + (at[:, None] + at_channel[None, :]),
            mask=inside[:, None] & (i_c < width)[None, :], other=0.0,
        )  # fmt: skip
        b_read += b_weight[:, None] * b_value.to(tl.float32)
    p_out = p_read + (i_b * width + i_c.to(tl.int64)[None, :]) * queries + i_q[:, None]
    tl.store(p_out, b_read, mask=(i_q < queries)[:, None] & (i_c < width)[None, :])


@triton.jit
def weight_gradient_kernel(
    p_grad, p_indices, p_value, p_grad_weights,
    queries, kept, memory, width, per_object, s_batch, s_object, s_channel,
    middle, inner, s_outer, s_middle, s_inner,
    FLAT: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_weights [B, Q, k]: products of the read's gradient [B, Q, width] with the value rows."""
    i_q, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = i_b * queries + i_q
    p_base = p_value + i_b * s_batch
    for i_first in range(0, kept, BLOCK_K):
        i_k = i_first + tl.arange(0, BLOCK_K)
        b_index = tl.load(p_indices + row * kept + i_k, mask=i_k < kept, other=-1)
        inside = (b_index >= 0) & (b_index < memory)
        at = offset_of(b_index, middle, inner, s_outer, s_middle, s_inner, FLAT, INDEX)
        b_sum = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for i_c0 in range(0, width, BLOCK_C):
            i_c = i_c0 + tl.arange(0, BLOCK_C)
            at_channel = (i_c // per_object).to(INDEX) * s_object + (i_c % per_object).to(INDEX) * s_channel
            b_grad = tl.load(p_grad + row * width + i_c, mask=i_c < width, other=0.0)
            b_value = tl.load(
                p_base + (at[:, None] + at_channel[None, :]),
                mask=inside[:, None] & (i_c < width)[None, :], other=0.0,
            )  # fmt: skip
            b_sum += b_grad[None, :] * b_value.to(tl.float32)
        b_out = tl.where((b_index < 0) | inside, tl.sum(b_sum, 1), float("nan"))
        tl.store(p_grad_weights + row * kept + i_k, b_out, mask=i_k < kept)


@triton.jit
def value_gradient_kernel(
    p_grad, p_order, p_starts, p_weights, p_grad_value, queries, kept, memory, width,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_value [B, M, width]: of one position, over the entries that kept it, in the order of queries."""
    i_m = tl.program_id(0)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_b = tl.program_id(2).to(tl.int64)
    row = i_b * memory + i_m
    start, end = tl.load(p_starts + row), tl.load(p_starts + row + 1)
    b_sum = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    for i_first in range(start, end, BLOCK_E):
        i_e = i_first + tl.arange(0, BLOCK_E)
        b_entry = tl.load(p_order + i_e, mask=i_e < end, other=0)
        b_weight = tl.load(p_weights + b_entry, mask=i_e < end, other=0.0)
        b_grad = tl.load(
            p_grad + (b_entry // kept)[:, None] * width + i_c[None, :],
            mask=(i_e < end)[:, None] & (i_c < width)[None, :], other=0.0,
        )  # fmt: skip
        b_sum += b_weight[:, None] * b_grad
    tl.store(p_grad_value + row * width + i_c, tl.sum(b_sum, 0), mask=i_c < width)


def gather(indices: Tensor, weights: Tensor, value: Tensor) -> Tensor:
    """(B, O, Cv, Q) float32, contiguous."""
    batch, queries, kept = indices.shape
    objects, channels = value.shape[1:3]
    read = torch.empty(batch, objects, channels, queries, dtype=torch.float32, device=value.device)
    if read.numel() == 0:
        return read
    width, positions = objects * channels, Positions.of(value, 3)
    block_c = min(256, max(16, triton.next_power_of_2(width)))
    block_q = 2048 // block_c
    with on_device(value.device):
        launch(
            gather_kernel,
            (triton.cdiv(queries, block_q), triton.cdiv(width, block_c), batch),
            indices, weights, value, read, queries, kept, value[0, 0, 0].numel(), width,
            *value_strides(value), *positions.arguments,
            FLAT=positions.flat, INDEX=index_type(value), BLOCK_Q=block_q, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return read


def gather_backward(
    grad_read: Tensor, indices: Tensor, weights: Tensor, value: Tensor, need_value: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights (B, Q, k) and of the values (B, O, Cv, M), position-major, float32."""
    batch, queries, kept = indices.shape
    objects, channels = value.shape[1:3]
    width, memory = objects * channels, value[:1, :1, :1].numel() if value.numel() else 0
    grad_weights = torch.zeros_like(weights)
    grad_value = value_gradient(value, memory if need_value else 0)
    if grad_read.numel() == 0:
        return grad_weights, grad_value.zero_()
    grad = grad_read.flatten(1, 2).mT.contiguous()  # [B, Q, width]
    positions = Positions.of(value, 3)
    block_c = min(128, max(16, triton.next_power_of_2(width)))
    with on_device(value.device):
        launch(
            weight_gradient_kernel,
            (queries, batch),
            grad, indices, value, grad_weights, queries, kept, memory, width,
            *value_strides(value), *positions.arguments,
            FLAT=positions.flat, INDEX=index_type(value),
            BLOCK_K=min(32, max(8, triton.next_power_of_2(kept))), BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        if need_value:
            entry = torch.arange(batch, device=indices.device)[:, None, None] * memory
            nowhere = (indices < 0) | (indices >= memory)
            flat = (indices + entry).masked_fill(nowhere, batch * memory).flatten()
            sorted_rows, order = flat.sort(stable=True)
            bounds = torch.arange(batch * memory + 1, device=indices.device)
            starts = torch.searchsorted(sorted_rows, bounds)
            launch(
                value_gradient_kernel,
                (memory, triton.cdiv(width, 256), batch),
                grad, order, starts, weights, grad_value, queries, kept, memory, width,
                BLOCK_E=8, BLOCK_C=min(256, max(16, triton.next_power_of_2(width))), num_warps=4,
            )  # fmt: skip
    return grad_weights, grad_value


def value_gradient(value: Tensor, memory: int) -> Tensor:
    """An uninitialised (B, O, Cv, M) float32 whose channels are innermost in memory."""
    batch, objects, channels = value.shape[:3]
    return value.new_empty((batch, memory, objects, channels), dtype=torch.float32).permute(0, 2, 3, 1)
