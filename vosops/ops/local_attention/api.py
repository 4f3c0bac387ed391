# SPDX-License-Identifier: Apache-2.0
"""Local attention: the public function."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from .. import backends
from . import limits, native, reference
from .problem import build_window


def local_attention(
    query: Tensor,  # [B, C, H, W]
    key: Tensor,  # [B, C, H, W]
    value: Tensor,  # [B, Cv, H, W]
    *,
    num_heads: int,
    window: int = 15,
    dilation: int = 1,
    relative_bias: Tensor | None = None,  # [B, h, window^2, H, W]
    relative_weight: Tensor | None = None,  # [h * window^2, C / h]
    relative_offset: Tensor | None = None,  # [h * window^2]
    relative_value: Tensor | None = None,  # [h, Cv / h, window^2]
    scale: float | None = None,
) -> Tensor:
    """Short-term attention: every position attends to the window around it, on the previous frame.

    For position p and offset D, row by row through the window (index (dy + r) * window + (dx + r), r =
    window // 2), of every head

        s_pD = scale <q_p, k_(p+D)> + relative term,
        a_p = softmax of s_p over the offsets inside the frame,
        out_p = sum_D a_pD (v_(p+D) + relative_value_D).

    The relative term is `relative_bias`, or <q_p, relative_weight_D> + relative_offset_D of the *unscaled*
    query: a grouped 1x1 convolution, computed on the fly.

    Args:
        query, key: (B, C, H, W), any strides; C a multiple of `num_heads`, heads one after another.
        value: (B, Cv, H, W), any strides; Cv, a multiple of `num_heads` too, may differ from C.
        num_heads: h.
        window: side of the window in cells, odd.
        dilation: cells from one offset to the next.
        relative_bias: (B, h, window^2, H, W), any strides.
        relative_weight: (h * window^2, C / h), instead of `relative_bias`.
        relative_offset: (h * window^2,), with `relative_weight` only.
        relative_value: (h, Cv / h, window^2), added to the values of every window.
        scale: of the dot product; 1 / sqrt(C / h) for None.

    float32, bfloat16 and float16, freely mixed, computed in float32; float64 on the reference backend.
    Autocast changes nothing.

    Returns:
        (B, Cv, H, W), contiguous, in value's dtype. Differentiable with respect to every tensor.

    Raises:
        TypeError, ValueError: a bad argument, named, before any work.
        BackendError: a forced backend cannot serve the call.

    Note:
        Cost: 2 B H W window^2 (C + Cv) operations, and as many again for relative_weight (C) and
        relative_value (Cv). Extra memory: on the CPU packed copies of key and value, O(B H W (C + Cv)),
        on the triton backend nothing; the reference backend stores the windows, window^2 times that. NaN
        in a query makes that position NaN, NaN in a key the positions whose windows hold it, NaN in a value
        its channel there, and nothing else.

    Source: AOT (Yang et al., NeurIPS 2021), short-term attention with relative positions; DeAOT (Yang and
        Yang, NeurIPS 2022): one head, 128 key and 1024 value channels, no relative_value.

    Example:
        >>> short = vosops.local_attention(
        ...     query, previous_key, previous_value, num_heads=8,
        ...     relative_weight=conv.weight.flatten(1), relative_offset=conv.bias,
        ... )
    """
    p = build_window(
        query,
        key,
        value,
        num_heads,
        window,
        dilation,
        relative_bias,
        relative_weight,
        relative_offset,
        relative_value,
        scale,
    )
    backend = backends.choose("local_attention", p.tensors(), partial(limits.reasons_against, p=p))
    # No autocast inside: scores stay in float32. Outside of autocast nothing, for torch.export.
    device = query.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if backend == "reference":
            return reference.local_attention(p)
        return native.local_attention(p, "triton_" if backend == "triton" else "")
