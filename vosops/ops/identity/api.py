# SPDX-License-Identifier: Apache-2.0
"""Identity embedding of masks."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .. import backends
from ..checks import FLOATS, check_device, check_shape, check_tensor
from . import native, reference

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def identity_embedding(
    labels: Tensor,  # [B, H, W] or [B, N, H, W]
    weight: Tensor,  # [C, N, kh, kw]
    bias: Tensor | None = None,  # [C]
    *,
    stride: int = 16,
    padding: int = 8,
) -> Tensor:
    """The identity embedding of a mask: AOT's patch-wise identity bank, a convolution of the one-hot mask.

    From labels it is a sum of rows of `weight`, one for each tap of the kernel, and the one-hot mask never
    exists.

    Args:
        labels: (B, H, W) integers: 0 is the background, 1 to N - 1 the objects, 255 is ignored and adds
            nothing; or (B, N, H, W) soft masks, floating point. Any strides.
        weight: (C, N, kh, kw).
        bias: (C,); zero if None.
        stride: of the convolution, in pixels.
        padding: pixels around the frame that add nothing.

    Returns:
        (B, C, (H + 2 padding - kh) // stride + 1, (W + 2 padding - kw) // stride + 1), contiguous, in the
        dtype of `weight`; for soft masks in the promoted dtype of both.

    Raises:
        TypeError, ValueError: a bad argument, named, before any work.
        ValueError: a label is neither below N nor 255 (RuntimeError on the cpu backend; found before
            anything is summed, and not looked for on CUDA devices, where it would wait for the device:
            such a label adds nothing there).
        BackendError: a forced backend cannot serve the call.

    Note:
        dtypes of weight float32, bfloat16, float16 (float64 on the reference backend); sums are accumulated
        in float32 at least. Autocast changes nothing.
        Cost from labels: B h w kh kw C additions and one pass over the weights; extra memory 32 channels of
        the weights per thread and the labels as int32; none on the triton backend. From soft masks it is
        `torch.nn.functional.conv2d`.
        Differentiable with respect to weight, bias and soft masks.

    Source: AOT (Yang et al., NeurIPS 2021), eq. 1, as its published models have it.

    Example:
        >>> weight = torch.randn(256, 11, 17, 17)
        >>> vosops.identity_embedding(torch.zeros(1, 481, 849, dtype=torch.uint8), weight).shape
        torch.Size([1, 256, 31, 54])
    """
    check_tensor("labels", labels, layout="(B, H, W) or (B, N, H, W)", dtypes=(*_INTEGERS, *FLOATS))
    check_tensor("weight", weight, layout="(C, N, kh, kw)")
    soft = labels.is_floating_point()
    dims, layout = (
        (4, "(B, N, H, W) as it is floating point") if soft else (3, "(B, H, W) as it has integers")
    )
    if labels.dim() != dims:
        raise ValueError(f"labels must have shape {layout}, got {list(labels.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must have shape (C, N, kh, kw), got {list(weight.shape)}")
    if 0 in weight.shape[1:]:
        raise ValueError(f"weight must have at least one class and one tap, got shape {list(weight.shape)}")
    if soft and labels.shape[1] != weight.shape[1]:
        raise ValueError(
            f"labels must have the classes of weight, N = {weight.shape[1]}, got {labels.shape[1]}"
        )
    check_device("labels", labels, "weight", weight.device)
    if bias is not None:
        check_tensor("bias", bias, layout="(C,)")
        check_shape("bias", bias, weight.shape[:1], "(C,)")
        check_device("bias", bias, "weight", weight.device)
    for name, number, least in (("stride", stride, 1), ("padding", padding, 0)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an integer, got {type(number).__name__}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    for size, kernel in zip(labels.shape[-2:], weight.shape[2:], strict=True):
        if size + 2 * padding < kernel:
            raise ValueError(
                f"labels must be at least as large as the kernel of weight, {list(weight.shape[2:])}, with "
                f"padding {padding} around them, got {list(labels.shape[-2:])}"
            )
    tensors = {"weight": weight, "labels": labels} | ({"bias": bias} if bias is not None else {})
    backend = backends.choose("identity_embedding", tensors, _limits)
    autocast = torch.is_autocast_enabled(weight.device.type)
    with torch.autocast(weight.device.type, enabled=False) if autocast else nullcontext():
        if soft:
            result = reference.embed(labels, weight, bias, stride, padding)
        elif backend == "reference":
            if not (labels.is_cuda or torch.compiler.is_compiling()):
                reference.check_labels(labels, weight.shape[1])
            result = reference.embed_labels(labels, weight, bias, stride, padding)
        else:
            family = "triton_" if backend == "triton" else ""
            result = native.embed_labels(labels, weight, bias, stride, padding, family)
    return result.to(torch.promote_types(labels.dtype, weight.dtype) if soft else weight.dtype)


def _limits(backend: str) -> list[str]:
    return ["it has no identity_embedding"] if backend == "cuda" else []
