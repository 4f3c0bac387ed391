# SPDX-License-Identifier: Apache-2.0
"""Soft aggregation on the GPU: one pass over the probabilities, any number of objects."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, on_device

_LOW: tl.constexpr = tl.constexpr(1e-7)
_HIGH: tl.constexpr = tl.constexpr(1 - 1e-7)


@triton.jit
def logit(b_x):
    # NaN passes through: it is neither below nor above.
    b_clamped = tl.where(b_x < _LOW, _LOW, b_x)
    b_clamped = tl.where(b_clamped > _HIGH, _HIGH, b_clamped)
    return tl.log(b_clamped / (1 - b_clamped))


@triton.jit
def slope(b_x):
    """Of `logit`: 0 outside of the clamp."""
    outside = (b_x < _LOW) | (b_x > _HIGH)
    return tl.where(outside, 0.0, 1 / tl.where(outside, 0.5, b_x * (1 - b_x)))


@triton.jit
def forward_kernel(p_in, p_out, objects, positions, s_batch, s_object, BLOCK: tl.constexpr):
    i_s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_b = tl.program_id(1).to(tl.int64)
    inside = i_s < positions
    p_row = p_out + i_b * (objects + 1) * positions + i_s
    b_background = tl.full((BLOCK,), 1.0, tl.float32)
    for i_o in range(objects):
        b_x = tl.load(p_in + i_b * s_batch + i_o * s_object + i_s, mask=inside, other=0.0).to(tl.float32)
        b_background *= 1 - b_x
        tl.store(p_row + (i_o + 1) * positions, logit(b_x), mask=inside)
    tl.store(p_row, logit(b_background), mask=inside)


@triton.jit
def backward_kernel(p_in, p_grad, p_out, objects, positions, s_batch, s_object, BLOCK: tl.constexpr):
    """d background / d p_o = -prod of the others' (1 - p): a factor 0 is counted, not divided by."""
    i_s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_b = tl.program_id(1).to(tl.int64)
    inside = i_s < positions
    p_row = p_grad + i_b * (objects + 1) * positions + i_s
    b_product = tl.full((BLOCK,), 1.0, tl.float32)
    b_zeros = tl.zeros((BLOCK,), tl.int32)
    for i_o in range(objects):
        b_x = tl.load(p_in + i_b * s_batch + i_o * s_object + i_s, mask=inside, other=0.0).to(tl.float32)
        zero = b_x == 1.0
        b_zeros += zero.to(tl.int32)
        b_product *= tl.where(zero, 1.0, 1 - b_x)
    b_background = tl.where(b_zeros > 0, 0.0, b_product)
    b_common = tl.load(p_row, mask=inside, other=0.0) * slope(b_background)
    for i_o in range(objects):
        b_x = tl.load(p_in + i_b * s_batch + i_o * s_object + i_s, mask=inside, other=0.0).to(tl.float32)
        zero = b_x == 1.0
        b_others = tl.where(b_zeros > zero.to(tl.int32), 0.0, b_product / tl.where(zero, 1.0, 1 - b_x))
        b_own = tl.load(p_row + (i_o + 1) * positions, mask=inside, other=0.0) * slope(b_x)
        tl.store(p_out + (i_b * objects + i_o) * positions + i_s, b_own - b_common * b_others, mask=inside)


def soft_aggregate(probabilities: Tensor) -> Tensor:
    """(B, O + 1, positions) float32."""
    p = _flat(probabilities)
    batch, objects, positions = p.shape
    out = torch.empty(batch, objects + 1, positions, dtype=torch.float32, device=p.device)
    if out.numel():
        _launch(forward_kernel, p, (p, out))
    return out


def soft_aggregate_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """(B, O, positions) float32."""
    p = _flat(probabilities)
    out = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    if out.numel():
        _launch(backward_kernel, p, (p, grad, out))
    return out


def _launch(kernel, p: Tensor, tensors: tuple[Tensor, ...]) -> None:
    batch, objects, positions = p.shape
    with on_device(p.device):
        launch(
            kernel,
            (triton.cdiv(positions, 512), batch),
            *tensors, objects, positions, p.stride(0), p.stride(1), BLOCK=512, num_warps=4,
        )  # fmt: skip


def _flat(probabilities: Tensor) -> Tensor:
    """(B, O, positions) with positions innermost; a copy where they are not, one pass as the operator is."""
    p = probabilities.flatten(2)
    return p if p.stride(2) == 1 or p.numel() == 0 else p.contiguous()
