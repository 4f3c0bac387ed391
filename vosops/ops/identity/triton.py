# SPDX-License-Identifier: Apache-2.0
"""The identity embedding of labels on the GPU: a product with the one-hot mask, which only registers hold.

A sum of one row of the weights for every tap would read cells * taps rows, 495 MB at 480p with 256 channels
in float32. A tile of cells as a product [cells, taps] x [taps, channels] for every class reads the weights
once per tile, about 80 MB there, and leaves out the classes that no tap of the tile shows: two or three of
eleven remain. One-hot numbers are exact in every type, so that only the sums round. Taps are innermost in the
weights, so a block of them is read in runs as it lies: packing it (one more pass over 3 MB) gains nothing.

Floor at 480p: 0.4 MB of labels, 3.3 MB of weights, 1.7 MB of result, 2 us of an H200's memory; 2 * 1674 * 289
* 256 operations for each class that is there, 0.25 G.

Labels that are no class, which only the CPU looks for, add nothing, like 255.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, on_device
from ..memory_read.triton.operands import TYPES, float32_precision

IGNORED: tl.constexpr = tl.constexpr(255)


@triton.jit
def load_labels(
    p_labels, s_batch, s_row, s_column, height, width, out_height, out_width, stride, padding, i_cell, cells,
    i_t, taps, kernel_width, classes,
):  # fmt: skip
    """Labels under every tap of every cell [cells, taps]; -1 for what is ignored, no class or outside."""
    i_b = i_cell // (out_height * out_width)
    i_y = i_cell // out_width % out_height * stride - padding
    i_x = i_cell % out_width * stride - padding
    i_y = i_y[:, None] + (i_t // kernel_width)[None, :]
    i_x = i_x[:, None] + (i_t % kernel_width)[None, :]
    inside = (i_y >= 0) & (i_y < height) & (i_x >= 0) & (i_x < width)
    inside = inside & (i_cell < cells)[:, None] & (i_t < taps)[None, :]
    at = i_b.to(tl.int64)[:, None] * s_batch + i_y.to(tl.int64) * s_row + i_x.to(tl.int64) * s_column
    b_label = tl.load(p_labels + at, mask=inside, other=IGNORED)
    inside = inside & (b_label != IGNORED) & (b_label >= 0) & (b_label < classes)
    return tl.where(inside, b_label.to(tl.int32), -1)


@triton.jit
def load_weight(
    p_weight, s_channel, s_y, s_x, i_t, taps, kernel_width, i_c, channels
):  # fmt: skip
    """Of one class [taps, channels]."""
    at = (i_t // kernel_width).to(tl.int64) * s_y + (i_t % kernel_width).to(tl.int64) * s_x
    return tl.load(
        p_weight + (at[:, None] + i_c.to(tl.int64)[None, :] * s_channel),
        mask=(i_t < taps)[:, None] & (i_c < channels)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def embed_kernel(
    p_labels, s_batch, s_row, s_column, height, width, out_height, out_width, stride, padding, cells,
    p_weight, s_channel, s_class, s_y, s_x, channels, classes, taps, kernel_width, p_bias, p_out,
    BIAS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[B, C, out_height, out_width]."""
    i_cell = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_out = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_poison = tl.zeros((BLOCK_T, BLOCK_C), DTYPE)
    for i_t0 in range(0, taps, BLOCK_T):
        i_t = i_t0 + tl.arange(0, BLOCK_T)
        b_label = load_labels(
            p_labels, s_batch, s_row, s_column, height, width, out_height, out_width, stride, padding,
            i_cell, cells, i_t, taps, kernel_width, classes,
        )  # fmt: skip
        p_class = p_weight
        for i_n in range(classes):
            hot = b_label == i_n
            if tl.max(hot.to(tl.int32)) > 0:
                b_weight = load_weight(
                    p_class, s_channel, s_y, s_x, i_t, taps, kernel_width, i_c, channels
                ).to(DTYPE)  # fmt: skip
                b_poison += b_weight * 0
                b_weight = tl.where(tl.abs(b_weight) < float("inf"), b_weight, 0.0).to(DTYPE)
                b_out = tl.dot(hot.to(DTYPE), b_weight, b_out, input_precision=PRECISION)
            p_class += s_class
    if tl.max(tl.where(b_poison == b_poison, 0, 1)) > 0:
        # A product would spread a weight that is not finite, as 0 times NaN, to cells that do not show it.
        b_count = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for i_t0 in range(0, taps, BLOCK_T):
            i_t = i_t0 + tl.arange(0, BLOCK_T)
            b_label = load_labels(
                p_labels, s_batch, s_row, s_column, height, width, out_height, out_width, stride, padding,
                i_cell, cells, i_t, taps, kernel_width, classes,
            )  # fmt: skip
            p_class = p_weight
            for i_n in range(classes):
                hot = b_label == i_n
                b_weight = load_weight(
                    p_class, s_channel, s_y, s_x, i_t, taps, kernel_width, i_c, channels
                )  # fmt: skip
                b_bad = tl.where(tl.abs(b_weight) < float("inf"), 0.0, 1.0).to(DTYPE)
                b_count = tl.dot(hot.to(DTYPE), b_bad, b_count)
                p_class += s_class
        b_out = tl.where(b_count > 0, float("nan"), b_out)
    if BIAS:
        b_out += tl.load(p_bias + i_c, mask=i_c < channels, other=0.0)[None, :]
    area = out_height * out_width
    at = (i_cell // area).to(tl.int64) * channels * area + i_cell % area
    tl.store(
        p_out + (at[:, None] + i_c.to(tl.int64)[None, :] * area),
        b_out, mask=(i_cell < cells)[:, None] & (i_c < channels)[None, :],
    )  # fmt: skip


@triton.jit
def embed_weight_kernel(
    p_labels, s_batch, s_row, s_column, height, width, out_height, out_width, stride, padding, cells,
    p_grad, p_grad_weight, channels, classes, taps, kernel_width,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_weight [C, class, taps] of a block of taps of one class, over all cells; grad [B, C, h, w]."""
    i_t = tl.program_id(0) // classes * BLOCK_T + tl.arange(0, BLOCK_T)
    i_n = tl.program_id(0) % classes
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    area = out_height * out_width
    b_out = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i_m0 in range(0, cells, BLOCK_M):
        i_cell = i_m0 + tl.arange(0, BLOCK_M)
        b_label = load_labels(
            p_labels, s_batch, s_row, s_column, height, width, out_height, out_width, stride, padding,
            i_cell, cells, i_t, taps, kernel_width, classes,
        )  # fmt: skip
        hot = b_label == i_n
        if tl.max(hot.to(tl.int32)) > 0:
            at = (i_cell // area).to(tl.int64) * channels * area + i_cell % area
            b_grad = tl.load(
                p_grad + (at[:, None] + i_c.to(tl.int64)[None, :] * area),
                mask=(i_cell < cells)[:, None] & (i_c < channels)[None, :], other=0.0,
            ).to(DTYPE)  # fmt: skip
            b_out = tl.dot(tl.trans(hot.to(DTYPE)), b_grad, b_out, input_precision=PRECISION)
    at = (i_c.to(tl.int64)[None, :] * classes + i_n) * taps + i_t[:, None]
    tl.store(p_grad_weight + at, b_out, mask=(i_t < taps)[:, None] & (i_c < channels)[None, :])


def identity_embedding(
    labels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> Tensor:
    """(B, C, h, w) float32; the operator's arguments."""
    out_height, out_width = _cells(labels, weight, stride, padding)
    channels, classes, kernel_height, kernel_width = weight.shape
    batch = labels.shape[0]
    out = torch.empty(batch, channels, out_height, out_width, dtype=torch.float32, device=weight.device)
    if out.numel() == 0:
        return out
    cells = batch * out_height * out_width
    block_c = _block(weight)
    with on_device(weight.device):
        launch(
            embed_kernel,
            (triton.cdiv(cells, 64), triton.cdiv(channels, block_c)),
            labels, *labels.stride(), *labels.shape[1:], out_height, out_width, stride, padding, cells,
            weight, *weight.stride(), channels, classes, kernel_height * kernel_width, kernel_width,
            weight if bias is None else bias, out,
            BIAS=bias is not None, DTYPE=TYPES[weight.dtype], PRECISION=float32_precision(),
            BLOCK_M=64, BLOCK_T=32, BLOCK_C=block_c, num_warps=8, num_stages=1,
        )  # fmt: skip
    return out


def identity_embedding_backward(
    grad: Tensor, labels: Tensor, weight: Tensor, stride: int, padding: int
) -> Tensor:
    """(C, N, kh, kw) float32; grad (B, C, h, w) contiguous float32."""
    out_height, out_width = _cells(labels, weight, stride, padding)
    channels, classes, kernel_height, kernel_width = weight.shape
    taps, cells = kernel_height * kernel_width, labels.shape[0] * out_height * out_width
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if out.numel() == 0:
        return out
    block_c = _block(weight)
    with on_device(weight.device):
        launch(
            embed_weight_kernel,
            (triton.cdiv(taps, 32) * classes, triton.cdiv(channels, block_c)),
            labels, *labels.stride(), *labels.shape[1:], out_height, out_width, stride, padding, cells,
            grad, out, channels, classes, taps, kernel_width,
            DTYPE=TYPES[weight.dtype], PRECISION=float32_precision(),
            BLOCK_M=64, BLOCK_T=32, BLOCK_C=block_c, num_warps=8, num_stages=1,
        )  # fmt: skip
    return out


def _cells(labels: Tensor, weight: Tensor, stride: int, padding: int) -> list[int]:
    """Height and width of the result."""
    return [
        (size + 2 * padding - kernel) // stride + 1
        for size, kernel in zip(labels.shape[1:], weight.shape[2:], strict=True)
    ]


def _block(weight: Tensor) -> int:
    """Channels of a program: what the registers hold in the products' type."""
    return 32 if weight.dtype == torch.float32 else 64
