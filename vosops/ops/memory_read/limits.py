# SPDX-License-Identifier: Apache-2.0
"""What the memory read's compiled backends cannot serve, beyond device and dtype: one list of reasons."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..priors import CenterPrior, Prior

LARGEST_TOP_K = 128
"""Positions a query can keep on the GPU backends."""
_CHANNELS, _CHANNELS_SELECTED = 128, 64


def reasons_against(
    backend: str, tensors: dict[str, Tensor], top_k: int | None, prior: Prior | None
) -> list[str]:
    """Reasons of `backend` against a call on `tensors`; top_k None reads densely, 0 only gathers."""
    if backend not in ("triton", "cuda"):
        return []
    reasons = []
    key, value = tensors.get("memory_key"), tensors.get("memory_value")
    if top_k is not None and key is not None and min(top_k, math.prod(key.shape[2:])) > LARGEST_TOP_K:
        reasons.append(f"top_k is {top_k}, it keeps at most {LARGEST_TOP_K}")
    most, when = (_CHANNELS_SELECTED, " with selection") if "selection" in tensors else (_CHANNELS, "")
    if key is not None and key.shape[1] > most:
        reasons.append(f"memory_key has Ck = {key.shape[1]} channels, it serves at most {most}{when}")
    for name, tensor, first in (("memory_key", key, 2), ("memory_value", value, 3)):
        if tensor is not None and len(merged(tensor, first)[0]) > 3:
            reasons.append(f"{name} has positions that take more than three strides")
    if backend == "cuda":
        reasons += _cuda_reasons(tensors, top_k, prior)
    return reasons


def _cuda_reasons(tensors: dict[str, Tensor], top_k: int | None, prior: Prior | None) -> list[str]:
    reasons = ["it has no dense read, top_k is None"] if top_k is None else []
    if prior is not None and not isinstance(prior, CenterPrior):
        reasons.append(f"it has no argmax over queries, which {type(prior).__name__} needs")
    if "memory_key" in tensors and tensors["memory_key"].shape[1] % 8:
        reasons.append(f"memory_key has Ck = {tensors['memory_key'].shape[1]}, it serves multiples of 8")
    keys = {name: tensors[name].dtype for name in ("query_key", "memory_key", "selection") if name in tensors}
    if keys and (len(set(keys.values())) > 1 or torch.float32 in keys.values()):
        found = ", ".join(f"{name} {dtype}" for name, dtype in keys.items())
        reasons.append(f"keys must all be bfloat16 or all float16, got {found}")
    return reasons


def merged(tensor: Tensor, first: int) -> tuple[list[int], list[int]]:
    """Sizes and strides of the dimensions from `first` on, neighbours merged where one stride spans both."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(tensor.shape[first:], tensor.stride()[first:], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides
